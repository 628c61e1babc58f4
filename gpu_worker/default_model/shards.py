"""The pictures and latents that lessons are given, in shards: each is what its number says.

They are made when they are asked for. So a lesson that is continued is given what it would have been given,
and nothing of it is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_worker.default_model.networks import SIDE
from gpu_worker.default_model.pictures import Pixels, Studio, captioned

SHARD_PICTURES = 2048
"""In each shard of pictures."""

_SHARD_LATENTS = 4096
_ENCODED_AT_ONCE = 64
# Of so many shards of latents one is of wide pictures and one of tall ones.
_SHAPES = 16
_LONG_SIDE = SIDE * 3 // 2
_OF_LATENTS = 1_000_000

Tokens = Callable[[tuple[str, ...]], torch.Tensor]
Encode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PictureShard:
    """Square pictures and what is said of them."""

    pictures: Pixels
    """Of shape (n, side, side, 3)."""
    tokens: torch.Tensor
    """Of shape (n, tokens)."""


@dataclass(frozen=True, kw_only=True)
class LatentShard:
    """Latents of one shape and what is said of the pictures."""

    latents: torch.Tensor
    """Of shape (n, channels, h, w), in half precision."""
    tokens: torch.Tensor
    close: torch.Tensor
    """Which show a part of their scene."""


class Shards:
    """Makes shards, and keeps those that are asked for again and again."""

    def __init__(self, studio: Studio, tokens: Tokens) -> None:
        self._studio = studio
        self._tokens = tokens
        self._pictures: tuple[int, PictureShard] | None = None
        self._latents: dict[int, LatentShard] = {}

    def pictures(self, number: int) -> PictureShard:
        """Return a shard of pictures. The last one is kept."""
        if self._pictures is None or self._pictures[0] != number:
            made = captioned(self._studio, SHARD_PICTURES, SIDE, SIDE, number)
            shard = PictureShard(pictures=made.pictures, tokens=self._tokens(made.captions))
            self._pictures = (number, shard)
        return self._pictures[1]

    def latents(self, pool: range, number: int, encode: Encode) -> LatentShard:
        """Return a shard of latents. Those of `pool` are kept."""
        for old in [each for each in self._latents if each not in pool]:
            del self._latents[old]
        if number not in self._latents:
            width = _LONG_SIDE if number % _SHAPES == _SHAPES - 2 else SIDE
            height = _LONG_SIDE if number % _SHAPES == _SHAPES - 1 else SIDE
            made = captioned(self._studio, _SHARD_LATENTS, width, height, _OF_LATENTS + number)
            pictures = torch.split(torch.from_numpy(made.pictures), _ENCODED_AT_ONCE)
            self._latents[number] = LatentShard(
                latents=torch.cat([encode(levels(some)).half().cpu() for some in pictures]),
                tokens=self._tokens(made.captions),
                close=torch.tensor(made.close),
            )
        return self._latents[number]


def levels(pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures of bytes, of shape (n, h, w, 3), as (n, 3, h, w) of -1 to 1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
