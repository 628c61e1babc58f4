"""Latents to pictures: the whole way through the decoder, and a short cut for previews.

The short cut is an affine map from the channels of one latent pixel to one colour, fitted to the decoder by
least squares when a model is loaded. It costs a matrix product where a decode costs a second.
"""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import torch
from PIL import Image

# A preview's pictures are enlarged by whole factors up to this many pixels: those of small models are tiny.
_PREVIEW_SIDE = 128
_FIT_PICTURES = 8
_FIT_SIDE = 128
_FIT_SEED = 0


def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return pictures of shape (n, 3, height, width), about -1 to 1, for latents as pipelines return them."""
    config = vae.config
    latents = latents.to(vae.dtype)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(config[key], dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    pictures = vae.decode(latents, return_dict=False)[0]
    assert isinstance(pictures, torch.Tensor)
    return pictures


def tiled(vae: Any) -> Any:
    """Return a decoder that works tile by tile, and leaves the one it shares its weights with as it is."""
    # Whether to tile is an attribute of the module: of a copy that has nothing else of its own.
    own = copy.copy(vae)
    own.enable_tiling()
    return own


def unpacked(pipeline: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Return a pipeline's latents as (n, channels, h, w); those of Flux are rows of patches."""
    if not hasattr(pipeline, "_unpack_latents"):
        return latents
    whole: torch.Tensor = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    return whole


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures of shape (n, 3, h, w), -1 to 1, as bytes of shape (n, h, w, 3) on the CPU."""
    levels = (pictures.float().clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def fitted_latent_to_rgb(vae: Any) -> torch.Tensor:
    """Return the map from a latent pixel to a colour, shape (channels + 1, 3), the last row the constant.

    Fitted to what the decoder makes of two kinds of latents: those of smooth coloured pictures, which lie
    where a trained encoder puts things, and smooth noise of unit size, which is what a denoiser works on.
    """
    generator = torch.Generator().manual_seed(_FIT_SEED)
    device, dtype = vae.device, vae.dtype
    colours = torch.rand((_FIT_PICTURES, 3, 5, 5), generator=generator) * 2 - 1
    coloured = _smooth(colours, _FIT_SIDE).clamp(-1, 1).to(device, dtype)
    shift = vae.config.get("shift_factor") or 0.0
    of_pictures = (vae.encode(coloured).latent_dist.mode() - shift) * vae.config.scaling_factor
    channels, side = of_pictures.shape[1], of_pictures.shape[2]
    noise = torch.randn((_FIT_PICTURES, channels, 5, 5), generator=generator)
    latents = torch.cat([of_pictures, _smooth(noise, side).to(device, dtype)])
    small = torch.nn.functional.interpolate(decoded(vae, latents).float(), size=(side, side), mode="area")
    rows = latents.float().permute(0, 2, 3, 1).reshape(-1, channels).cpu()
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    wanted = small.clamp(-1, 1).permute(0, 2, 3, 1).reshape(-1, 3).cpu()
    # LAPACK's last bits change with where in memory its input lies. Of double precision they are rounded
    # away, so that a film is the same whichever worker went on with it.
    solution: torch.Tensor = torch.linalg.lstsq(rows.double(), wanted.double()).solution
    return solution.float()


def sheet(tiles: torch.Tensor) -> torch.Tensor:
    """Return pictures as bytes, of shape (n, h, w, 3), side by side as one in a near-square grid."""
    count, height, width, _ = tiles.shape
    columns = math.ceil(math.sqrt(count))
    whole = torch.zeros((math.ceil(count / columns) * height, columns * width, 3), dtype=torch.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * height, i % columns * width
        whole[top : top + height, left : left + width] = tile
    return whole


def rough_pictures(latents: torch.Tensor, latent_to_rgb: torch.Tensor) -> torch.Tensor:
    """Return what the short cut makes of latents (n, channels, h, w): bytes of shape (n, h, w, 3)."""
    colours = torch.tensordot(latents.float().cpu().movedim(1, -1), latent_to_rgb[:-1], dims=1)
    return pixels((colours + latent_to_rgb[-1]).movedim(-1, 1))


def contact_sheet(latents: torch.Tensor, latent_to_rgb: torch.Tensor) -> bytes:
    """Return a PNG of all pictures of `latents`, shape (n, channels, h, w), in a near-square grid.

    Takes milliseconds, and no device where the latents are on the CPU.
    """
    tiles = rough_pictures(latents, latent_to_rgb)
    image = Image.fromarray(sheet(tiles).numpy())
    enlarged = max(1, _PREVIEW_SIDE // max(tiles.shape[1:3]))
    image = image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _smooth(coarse: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
