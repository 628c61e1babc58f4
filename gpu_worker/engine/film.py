"""What a grid looks like on its way, kept for a video: as many frames as one looks at in a few seconds.

Frames are kept as small as latents are, so that a checkpoint can carry them, and enlarged when all are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from gpu_worker.engine.latents import sheet
from gpu_worker.run import Film, RenderedImage

_MOST_FRAMES = 48
_LONGEST_SIDE = 512


class FilmRoll:
    """The frames of one run. Taking them changes nothing of it."""

    def __init__(self, frames: Sequence[torch.Tensor] = ()) -> None:
        """`frames` are those of a roll before it was cut."""
        self._frames = list(frames)

    @property
    def frames(self) -> Sequence[torch.Tensor]:
        """Contact sheets as bytes, of shape (height, width, 3)."""
        return self._frames

    def step_ended(self, step: int, steps: int, pictures: Callable[[], torch.Tensor]) -> None:
        """Take a frame of what `pictures` returns, bytes of shape (n, h, w, 3), if one is due here."""
        # The last is of the finished pictures.
        every = -(-steps // (_MOST_FRAMES - 1))
        if step % every == 0 and step < steps:
            self._frames.append(sheet(pictures()))

    def developed(self, images: Sequence[RenderedImage]) -> Film:
        """Return the film that ends with these pictures."""
        tiles = [
            torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).view(image.height, image.width, 3)
            for image in images
        ]
        finished = sheet(torch.stack(tiles))
        height, width = finished.shape[:2]
        scale = min(1.0, _LONGEST_SIDE / max(height, width))
        # Video codecs want even sides.
        size = (2 * round(width * scale / 2), 2 * round(height * scale / 2))
        return Film(
            width=size[0],
            height=size[1],
            frames=tuple(
                Image.fromarray(frame.numpy()).resize(size, Image.Resampling.BICUBIC).tobytes()
                for frame in [*self._frames, finished]
            ),
        )
