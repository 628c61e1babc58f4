"""What a run puts in place of a pipeline's denoiser: it looks the same to the pipeline, and is the run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# What pipelines call their denoiser, a U-Net or a transformer.
_NAMES = ("unet", "transformer")


class DenoiserStandIn:
    """Has all that the denoiser has, and answers in its own way."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        answer = self._answer(args, kwargs)
        return _Answer(answer) if return_dict else (answer,)

    def _answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what it predicts. Pipelines give some arguments by position, and differ in which."""
        raise NotImplementedError

    def _asked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what the denoiser itself predicts."""
        return self._denoiser(*args, return_dict=False, **kwargs)[0]


class _Answer(NamedTuple):
    # As diffusers' own, it is asked by name and by number.
    sample: Any


def denoiser_of(pipeline: Any) -> Any:
    """Return a pipeline's denoiser."""
    return getattr(pipeline, _name(pipeline))


def put_denoiser(pipeline: Any, denoiser: Any) -> None:
    """Give a run's copy of a pipeline another denoiser."""
    # Not by setattr, which would write the stand-in's class into the configuration.
    vars(pipeline)[_name(pipeline)] = denoiser


def sample_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the noisy latents of a call to a denoiser: one tensor, or of some families a list of them."""
    return args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]


def _name(pipeline: Any) -> str:
    return next(name for name in _NAMES if hasattr(pipeline, name))
