"""What a rendering says about itself: all that is needed to make the same bits again, as JSON values.

It is also what two engines must agree on for one to go on from the other's checkpoint.
"""

from __future__ import annotations

import hashlib
from typing import Any

import diffusers
import PIL
import torch
import transformers

from gpu_worker.contract import RenderSpec
from gpu_worker.engine.loading import LoadedModel
from gpu_worker.engine.parts import Joining, text_parts
from gpu_worker.image_seeds import image_seed
from gpu_worker.run import Inputs

RECIPE = 1
"""What the engine does between a spec and its bits that no library's version tells: how parts are composed,
how tiles of an upscale are drawn and faded, what a film shows, how the picture so far is predicted. Whoever
changes a bit of what one of these gives raises it, so that no checkpoint is continued by another recipe, and
no receipt promises bits that are not made any more."""


def receipt_of(
    spec: RenderSpec, inputs: Inputs, *, model: LoadedModel, pipeline: Any, device_type: str
) -> dict[str, object]:
    """Return what any rendering of `spec` says, whatever its kind."""
    scheduler = pipeline.scheduler
    receipt: dict[str, object] = {
        "engine": "diffusers",
        "recipe": RECIPE,
        "kind": spec.kind.value,
        "model": spec.model,
        "weights_sha256": model.weights_sha256,
        "pipeline": type(pipeline).__name__,
        "scheduler": type(scheduler).__name__,
        "scheduler_config": {key: _plain(value) for key, value in scheduler.config.items() if key[0] != "_"},
        "prompt": spec.prompt,
        "steps": spec.steps,
        "guidance_milli": spec.guidance_milli,
        "width": spec.width,
        "height": spec.height,
        "seed": spec.seed,
        "image_seeds": [image_seed(spec.seed, index) for index in range(1, spec.images + 1)],
        "dtype": model.dtype,
        "device": device_type,
        # A class of torch's own otherwise, and a scheduler without torch could not read the report.
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    if spec.stop_percent < 100:
        receipt["stop_percent"] = spec.stop_percent
    if spec.source is not None:
        assert inputs.source is not None
        receipt["source_job"] = spec.source.job_id
        receipt["source_image"] = spec.source.index
        receipt["source_sha256"] = hashlib.sha256(inputs.source).hexdigest()
        receipt["strength_permille"] = spec.source.strength_permille
    return receipt


def parts_in_receipt(spec: RenderSpec, inputs: Inputs, model: LoadedModel, how: Joining) -> dict[str, object]:
    """Return what a rendering says about the parts of its prompt; nothing where it is one text."""
    if how is Joining.NONE:
        return {}
    parts: dict[str, object] = {
        "parts": how.value,
        "texts": [{"text": part.text, "share_ppm": part.share_ppm} for part in text_parts(spec)],
    }
    if spec.pictures:
        assert model.adapter is not None
        parts["pictures"] = [
            {"sha256": hashlib.sha256(picture).hexdigest(), "share_ppm": part.share_ppm}
            for part, picture in zip(spec.pictures, inputs.pictures, strict=True)
        ]
        parts["adapter_sha256"] = model.adapter.sha256
        # It brings pictures to the size that the adapter looks at.
        parts["pillow"] = PIL.__version__
    return parts


def _plain(value: object) -> object:
    """Return a value of a configuration as JSON has it."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_plain(each) for each in value]
        case _:
            return str(value)
