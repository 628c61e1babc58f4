"""A run's state between two steps: copied out of one process, put back in another, to the same bits.

The state is the latents, every attribute that the run's scheduler has by then, the state of each picture's
generator, the frames of its film and the number of steps that are done. It is written as one safetensors
file, whose header holds the attributes as JSON: nothing in it is ever executed.

Going on runs the stock pipeline's call from its beginning, with the whole table of timesteps, and skips: the
denoiser answers zeros and `step` returns what it was given, until as many steps have passed as were done.
There the state is put back. That costs an encode and no step, and works for whatever a pipeline does before
its loop: image-to-image pipelines cut the table themselves and draw noise, which a shorter table would break.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from gpu_worker.engine.denoiser import DenoiserStandIn, sample_of

_log = logging.getLogger(__name__)

# Of a scheduler's attributes, those that are the pipeline's or the run's own, not state.
_NOT_STATE = frozenset({"_internal_dict", "boundary_listener", "boundary_generators"})


class NotCheckpointable(Exception):
    """A scheduler keeps something that cannot be written: a live object, such as a Brownian tree."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run after `step` steps. Its tensors are copies on the CPU, of the same strides as the originals."""

    step: int
    latents: Any
    scheduler: Any
    generators: Sequence[torch.Tensor]
    film: Sequence[torch.Tensor]
    tensors: Mapping[str, torch.Tensor]
    """What `latents` and `scheduler` refer to by name."""

    @staticmethod
    def of(
        *,
        step: int,
        latents: torch.Tensor,
        scheduler: Any,
        generators: Sequence[torch.Generator],
        film: Sequence[torch.Tensor] = (),
    ) -> RunState:
        """Copy the state of a run. Raises NotCheckpointable."""
        tensors: dict[str, torch.Tensor] = {}
        attributes = {name: value for name, value in vars(scheduler).items() if name not in _NOT_STATE}
        return RunState(
            step=step,
            latents=_described(latents, tensors),
            scheduler=_described(attributes, tensors),
            generators=[generator.get_state() for generator in generators],
            film=list(film),
            tensors=tensors,
        )

    def content(self, receipt: Mapping[str, object]) -> bytes:
        """Return the file: this state, and the receipt of whoever can go on from it."""
        header = {
            "step": self.step,
            "latents": self.latents,
            "scheduler": self.scheduler,
            "receipt": receipt,
        }
        generators = {f"generator.{i}": state for i, state in enumerate(self.generators)}
        film = {f"film.{i}": frame for i, frame in enumerate(self.film)}
        # safetensors knows no strides: they are in the description.
        values = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        content: bytes = safetensors.torch.save(
            {**values, **generators, **film}, metadata={"state": json.dumps(header)}
        )
        return content

    @staticmethod
    def read(content: bytes, receipt: Mapping[str, object]) -> RunState | None:
        """Return the state in a file; None where `opened` does."""
        file = opened(content, receipt)
        if file is None:
            return None
        header, tensors = file
        generators = [tensors.pop(f"generator.{i}") for i in range(_count(tensors, "generator."))]
        film = [tensors.pop(f"film.{i}") for i in range(_count(tensors, "film."))]
        return RunState(
            step=header["step"],
            latents=header["latents"],
            scheduler=header["scheduler"],
            generators=generators,
            film=film,
            tensors=tensors,
        )

    def put_back(
        self, *, scheduler: Any, generators: Sequence[torch.Generator], device: torch.device
    ) -> torch.Tensor:
        """Give a scheduler and the generators this state; return the latents."""
        vars(scheduler).update(_value(self.scheduler, self.tensors, device))
        for generator, state in zip(generators, self.generators, strict=True):
            generator.set_state(state)
        latents = _value(self.latents, self.tensors, device)
        assert isinstance(latents, torch.Tensor)
        return latents


def opened(
    content: bytes, receipt: Mapping[str, object]
) -> tuple[Mapping[str, Any], dict[str, torch.Tensor]] | None:
    """Return the header and the tensors of a checkpoint.

    None where it was made by what leaves another receipt, or cannot be read: a file that is empty or cut
    short costs the steps that were in it, not the attempt.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["state"])
        if header["receipt"] != receipt:
            _log.info("checkpoint is of another receipt bytes=%d", len(content))
            return None
        return header, safetensors.torch.load(content)
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        _log.warning("checkpoint cannot be read bytes=%d: %s: %s", len(content), type(error).__name__, error)
        return None


class WayBack:
    """The way of a run back to where its checkpoint was."""

    def __init__(
        self,
        state: RunState,
        *,
        generators: Sequence[torch.Generator],
        device: torch.device,
        restored: Callable[[], None],
    ) -> None:
        """`restored` is called when the state was put back."""
        self._state = state
        self._generators = generators
        self._device = device
        self._restored = restored
        self._passed = 0

    @property
    def under_way(self) -> bool:
        """Whether steps are skipped still."""
        return self._passed < self._state.step

    def skip(self, scheduler: Any, sample: torch.Tensor) -> torch.Tensor:
        """Return what a skipped `step` gives back."""
        self._passed += 1
        if self.under_way:
            return sample
        latents = self._state.put_back(scheduler=scheduler, generators=self._generators, device=self._device)
        self._restored()
        return latents


class SkippingDenoiser(DenoiserStandIn):
    """Asks the denoiser only where the run is not on its way back."""

    def __init__(self, denoiser: Any, way: WayBack) -> None:
        super().__init__(denoiser)
        self._way = way

    def _answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not self._way.under_way:
            return self._asked(args, kwargs)
        # The answer goes through guidance and into a step that takes no notice of it.
        sample = sample_of(args, kwargs)
        if isinstance(sample, list):
            # Z-Image gives its pictures one by one, all in one call.
            return [torch.zeros_like(each) for each in sample]
        return torch.zeros_like(sample)


def _described(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` as JSON, with its tensors copied to `tensors`. Lists stay; all else is tagged."""
    match value:
        case None | bool() | str():
            return value
        case np.ndarray() | np.generic():
            # Also of one number: its type decides what it makes of a tensor it meets.
            return {
                "numpy": _kept(torch.from_numpy(np.array(value)), tensors),
                "scalar": isinstance(value, np.generic),
            }
        case int() | float():
            return value
        case torch.Tensor():
            copy = value.detach().to("cpu", copy=True)
            return {
                "tensor": _kept(copy, tensors),
                "strides": list(copy.stride()),
                "on_cpu": value.device.type == "cpu",
            }
        case tuple():
            return {"tuple": [_described(each, tensors) for each in value]}
        case list():
            return [_described(each, tensors) for each in value]
        case dict():
            return {"dict": [[key, _described(each, tensors)] for key, each in value.items()]}
        case _:
            raise NotCheckpointable(f"{type(value).__name__} has no place in a checkpoint")


def _value(described: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    match described:
        case {"numpy": str(name), "scalar": bool(scalar)}:
            array = tensors[name].numpy()
            return array[()] if scalar else array
        case {"tensor": str(name), "strides": list(strides), "on_cpu": bool(on_cpu)}:
            stored = tensors[name]
            tensor = torch.empty_strided(stored.shape, strides, dtype=stored.dtype).copy_(stored)
            return tensor if on_cpu else tensor.to(device)
        case {"tuple": list(values)}:
            return tuple(_value(each, tensors, device) for each in values)
        case {"dict": list(pairs)}:
            return {key: _value(each, tensors, device) for key, each in pairs}
        case list():
            return [_value(each, tensors, device) for each in described]
        case _:
            return described


def _kept(tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    name = f"state.{len(tensors)}"
    tensors[name] = tensor
    return name


def _count(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    return sum(name.startswith(prefix) for name in tensors)
