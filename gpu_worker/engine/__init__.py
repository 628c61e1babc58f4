"""Draws with diffusers: the only package that imports torch.

Importing it sets how quiet the libraries are, which they read once, when they are imported themselves. What
they would print is either progress nobody sees, advice on packages we do without, or a prompt.
"""

import os

# Whatever else an operator says: they warn of a prompt that is too long for an encoder with the part that it
# does not read, and what people ask for is in no log. The front door has told the person itself.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# cuBLAS gives the same bits twice only with a fixed workspace, which it reads when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
