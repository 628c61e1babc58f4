"""IP-Adapters: what a denoiser needs to be shown a picture beside a text (Ye et al. 2023).

An adapter changes a denoiser's modules, so it is put into a second denoiser, whose modules are its own and
whose weights are the first one's: a run without pictures meets nothing of it, and the two take the memory of
one. Nothing of it is ever set for a run. How much a picture counts is decided outside, by its share.
"""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from gpu_worker.engine.weights import files_sha256

IMAGE_ENCODER = "image_encoder"


class AdapterUnusable(Exception):
    """An adapter does not fit a model, or its files are not what they should be; the text says which."""


@dataclass(frozen=True, kw_only=True)
class PictureAdapter:
    """A model's way to be shown pictures."""

    denoiser: Any
    """Takes `image_embeds`, and shares its other weights with the model's own."""
    image_encoder: Any
    image_processor: Any
    sha256: str
    memory_bytes: int
    """Of its own weights."""

    def embeddings(self, picture: bytes, images: int) -> torch.Tensor:
        """Return what `image_embeds` takes for a picture's file, one row for each picture of the grid."""
        with Image.open(io.BytesIO(picture)) as opened:
            values = self.image_processor(opened.convert("RGB"), return_tensors="pt").pixel_values
        encoder = self.image_encoder
        values = values.to(device=encoder.device, dtype=encoder.dtype)
        projection = self.denoiser.encoder_hid_proj.image_projection_layers[0]
        if isinstance(projection, ImageProjection):
            embeddings = encoder(values).image_embeds
        else:
            # The "plus" kind looks at every patch, one layer before the last, as it was trained.
            embeddings = encoder(values, output_hidden_states=True).hidden_states[-2]
        row: torch.Tensor = embeddings[None]
        return row.repeat(images, *[1] * (row.ndim - 1))


def loaded_adapter(place: Path, denoiser: Any) -> PictureAdapter:
    """Load an adapter for a denoiser, onto its device and in its precision.

    `place` is a folder with one safetensors file, or that file; the image encoder is in the folder
    `image_encoder` beside it. Raises AdapterUnusable.
    """
    if not isinstance(denoiser, UNet2DConditionModel):
        raise AdapterUnusable(f"pictures can be shown to U-Nets only, not to {type(denoiser).__name__}")
    file = _weights_file(place)
    weights: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in safetensors.torch.load_file(file).items():
        kind, _, rest = name.partition(".")
        if kind not in weights:
            raise AdapterUnusable(f"{file.name} is no IP-Adapter: it holds {name}")
        weights[kind][rest] = tensor
    assert "forward" not in vars(denoiser), "a wrapped forward would be copied, and still be the first one's"
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    # A deep copy of all but the weights.
    adapted = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})
    try:
        adapted._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            file.parent / IMAGE_ENCODER, dtype=denoiser.dtype, local_files_only=True, use_safetensors=True
        )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise AdapterUnusable(f"{file.name} does not fit: {error}") from error
    encoder = encoder.to(denoiser.device).eval()
    shared = {id(tensor) for tensor in tensors}
    own = [weight for weight in adapted.parameters() if id(weight) not in shared]
    side = encoder.config.image_size
    return PictureAdapter(
        denoiser=adapted.eval(),
        image_encoder=encoder,
        image_processor=CLIPImageProcessor(size=side, crop_size=side),
        sha256=files_sha256(file.parent, file.name, IMAGE_ENCODER),
        memory_bytes=sum(w.numel() * w.element_size() for w in [*own, *encoder.parameters()]),
    )


def _weights_file(place: Path) -> Path:
    if place.is_file():
        return place
    found = sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        raise AdapterUnusable(f"{place} holds {len(found)} safetensors files, not one")
    return found[0]
