"""How each picture of a job gets its own seed from the job's."""

from __future__ import annotations

import hashlib


def image_seed(job_seed: int, index: int) -> int:
    """Return the seed of picture `index` (1 to 4) of a job: 0 to 2**63 - 1.

    The first eight bytes, big-endian, of SHA-256 over the text `darkroom-image-seed-1:<job seed>:<index>`,
    without the highest bit (the API's integers are signed). A hash, so that neighbouring job seeds share no
    picture; adding the index to the seed would make picture 2 of seed 7 picture 1 of seed 8.
    """
    digest = hashlib.sha256(f"darkroom-image-seed-1:{job_seed}:{index}".encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
