"""Whether a device computes what it should: a tiny denoise with a known result, done in milliseconds.

The network is of what real ones are of (convolution, normalisation, attention, matrix products), with seeded
weights. What the device makes of it in float32 must be near what the CPU makes of it in float64, and the same
bits when it is done again: a device that is broken, or was overclocked too far, fails one or the other.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_SEED = 11
_STEPS = 4
_IMAGES = 2
_CHANNELS = 32
_SIDE = 16
_HEADS = 4
# Rounding in float32 is a thousand times less than this; TF32, which a GPU may use for it, about a third.
_TOLERANCE = 3e-3


def self_check(device: torch.device) -> str | None:
    """Return why the device is not to be trusted with a picture; None if it is.

    What the device raises is a reason too, since a device that is gone answers in many ways; but for
    torch.OutOfMemoryError, which passes.
    """
    with torch.no_grad():
        expected = _denoised(torch.device("cpu"), torch.float64)
        try:
            first = _denoised(device, torch.float32)
            second = _denoised(device, torch.float32)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"The self-check could not run on {device}: {error}"
    return _verdict(expected, first, second)


def _verdict(expected: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> str | None:
    if not torch.isfinite(first).all():
        return "The self-check gave numbers that are not finite."
    distance = float((first.double() - expected).abs().max() / expected.abs().max())
    if distance > _TOLERANCE:
        return f"The self-check is off by {distance:.1e} of the known result; {_TOLERANCE:.0e} is allowed."
    if not torch.equal(first, second):
        return "The self-check gave other bits when it was done again."
    return None


def _denoised(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return what a small denoiser makes of noise: shape (images, 4, side, side), on the CPU."""
    generator = torch.Generator().manual_seed(_SEED)

    def drawn(*shape: int) -> torch.Tensor:
        # In float64 and on the CPU whatever is asked for, so that all start from the same numbers.
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    into = drawn(_CHANNELS, 4, 3, 3) / 6
    mixing = drawn(3 * _CHANNELS, _CHANNELS) / _CHANNELS**0.5
    along = drawn(_CHANNELS, _CHANNELS, 3, 3) / (9 * _CHANNELS) ** 0.5
    out = drawn(4, _CHANNELS, 3, 3) / (9 * _CHANNELS) ** 0.5
    sample = drawn(_IMAGES, 4, _SIDE, _SIDE)
    for step in range(_STEPS):
        hidden = functional.group_norm(functional.conv2d(sample, into, padding=1), 8)
        rows = hidden.flatten(2).transpose(1, 2)
        query, key, value = (
            part.reshape(_IMAGES, _SIDE * _SIDE, _HEADS, -1).transpose(1, 2)
            for part in (rows @ mixing.T).chunk(3, dim=2)
        )
        seen = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + seen.transpose(2, 3).reshape(_IMAGES, _CHANNELS, _SIDE, _SIDE)
        predicted = functional.conv2d(
            functional.silu(functional.conv2d(hidden, along, padding=1)), out, padding=1
        )
        sample = sample - predicted / (step + 2)
    return sample.cpu()
