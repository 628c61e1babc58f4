"""What is done when the device has no memory left, in the order of what it costs.

Each piece of work that can meet that (a call of a network, a load) is tried again after the caches were
freed, then after each model that is cold was evicted. Such a piece has no state of its own, so whoever asked
for it never knows, and no bit changes. A decode has one rung more: tiles, which do change pixels, so that it
says so. (Slicing is no rung, since each decode is of one picture.) Then the job is handed back.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

# What else than torch's own error says it: the allocator of CPUs, and libraries that allocate for themselves.
_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
# In latent pixels. A tile is normalised by what is in it, so that the seams of small ones can be seen.
_LEAST_TILE = 32


def nothing_fails(place: str) -> None:
    """Let every allocation be what it is."""


class MemoryLadder:
    """Of one device. Called by whoever has it."""

    def __init__(
        self,
        device: torch.device,
        *,
        evict: Callable[[], bool],
        allocating: Callable[[str], None] = nothing_fails,
    ) -> None:
        """`evict` frees the coldest model's memory, if there is one, and says so.

        `allocating` is told of each try of a piece of work by the name of its place: "load", or the name of a
        network in its pipeline. What it raises is met as if the device had.
        """
        self._device = device
        self._evict = evict
        self._allocating = allocating

    def done(self, place: str, work: Callable[[], _T]) -> _T:
        """Return what `work` gives, tried on each rung. Raises torch.OutOfMemoryError after the last."""
        freed = False
        while True:
            try:
                self._allocating(place)
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                why = str(error)
            # Here, since the error holds the frames that hold what was being worked on.
            if not freed:
                freed = True
                _log.warning("out of memory place=%s: freed caches", place)
            elif self._evict():
                _log.warning("out of memory place=%s: evicted a model", place)
            else:
                raise torch.OutOfMemoryError(why)
            free_caches(self._device)

    def shelter(self, place: str, module: torch.nn.Module) -> None:
        """Let each call of a network be tried on all rungs.

        Whatever calls it, a stock pipeline too, is sheltered from then on. It is called for inference alone,
        so that a call that failed has left nothing behind.
        """
        forward = module.forward

        @functools.wraps(forward)
        def sheltered(*args: Any, **kwargs: Any) -> Any:
            return self.done(place, lambda: forward(*args, **kwargs))

        module.forward = sheltered


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no memory left, in whichever words."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def free_caches(device: torch.device) -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def decoded_in_memory(
    vae: Any, latents: torch.Tensor, decode: Callable[[Any, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, int | None]:
    """Return the pictures of latents, and the side of the tiles in latent pixels if memory called for them.

    `decode` is the whole way from latents to pictures. Tiles are halved until they fit or would show. Raises
    torch.OutOfMemoryError where they do not fit, or the decoder knows none.
    """
    try:
        return decode(vae, latents), None
    except RuntimeError as error:
        if not is_out_of_memory(error) or not hasattr(vae, "tile_latent_min_size"):
            raise
    factor = vae.tile_sample_min_size // vae.tile_latent_min_size
    side = max(latents.shape[-2:])
    if vae.use_tiling:
        side = min(side, vae.tile_latent_min_size)
    while (side := side // 2) >= _LEAST_TILE:
        # Of a copy that shares all but these: what one run sets, others never see.
        tiled = copy.copy(vae)
        vars(tiled).update(use_tiling=True, tile_latent_min_size=side, tile_sample_min_size=side * factor)
        _log.warning("out of memory place=decode: tiles of %d", side)
        try:
            return decode(tiled, latents), side
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    raise torch.OutOfMemoryError("a decode does not fit, and smaller tiles would show")
