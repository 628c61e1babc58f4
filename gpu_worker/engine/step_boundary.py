"""The step boundary: a place after each denoising step of any stock pipeline where a run can be acted on.

Each run gets its own copy of the pipeline's scheduler, of a subclass whose `step` calls the original and then
whoever listens. This needs nothing from the pipeline, so it works also for those without callbacks. A copy,
since a scheduler keeps the state of a run, and two runs on one is the best-known crash of diffusers servers;
a deep copy, since a scheduler made anew from the configuration did not give equal bits in every case.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

Predict = Callable[[], torch.Tensor]


class StepListener(Protocol):
    """Who acts at the boundaries of one run. What it raises ends the pipeline's call."""

    def denoising_begins(self) -> None:
        """Called when the pipeline sets its timesteps: encoding is over."""

    def skipped(self, scheduler: Any, sample: torch.Tensor) -> torch.Tensor | None:
        """Called before each step. Returns what it gives back, if it is not to be taken."""

    def step_ended(self, scheduler: Any, latents: torch.Tensor, predict: Predict) -> None:
        """Called after each step that was taken, with the latents that it gives back.

        `predict` returns the picture as the model sees it now, as latents.
        """


Generators = torch.Generator | Sequence[torch.Generator]
"""A run's own: of each of its pictures, or of the only one."""


def with_boundary(scheduler: Any, listener: StepListener, generators: Generators) -> Any:
    """Return a copy of `scheduler` for one run, which tells `listener` of its boundaries.

    Where a step draws noise and its pipeline passes no generator (that of Stable Diffusion 3 does not), it is
    drawn from `generators`, and not from torch's own that all runs of a process share.
    """
    own = deepcopy(scheduler)
    base: Any = type(scheduler)
    own.__class__ = _bounded_class(base)
    own.boundary_listener, own.boundary_generators = listener, generators
    return own


def has_boundary(scheduler: Any) -> bool:
    """Return whether the picture so far can be told from this scheduler's steps: not in the EDM family."""
    return hasattr(scheduler, "alphas_cumprod") or _is_flow(scheduler)


@functools.cache
def _bounded_class(base: Any) -> Any:
    # Pipelines inspect the signatures of both methods (for `sigmas`, `eta`, `generator`), hence the wraps.
    draws_noise = "generator" in inspect.signature(base.step).parameters

    class Bounded(base):  # type: ignore[misc]
        @functools.wraps(base.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            base.set_timesteps(self, *args, **kwargs)
            self.boundary_listener.denoising_begins()

        @functools.wraps(base.step)
        def step(
            self,
            model_output: torch.Tensor,
            timestep: Any,
            sample: torch.Tensor,
            *args: Any,
            return_dict: bool = True,
            **kwargs: Any,
        ) -> Any:
            listener = self.boundary_listener
            latents = listener.skipped(self, sample)
            if latents is not None:
                return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)
            if draws_noise and kwargs.get("generator") is None:
                kwargs["generator"] = self.boundary_generators
            output = base.step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs)
            listener.step_ended(
                self,
                output.prev_sample,
                lambda: _predicted(self, output, model_output, timestep, sample),
            )
            return output if return_dict else output.to_tuple()

    # Pipelines and saved configurations know schedulers by their class's name.
    Bounded.__name__, Bounded.__qualname__ = base.__name__, base.__qualname__
    Bounded.__module__ = base.__module__
    return Bounded


def _is_flow(scheduler: Any) -> bool:
    return bool(scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction") and hasattr(
        scheduler, "sigmas"
    )


def _predicted(
    scheduler: Any, output: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor
) -> torch.Tensor:
    """Return the model's prediction of the finished latents at the step that just ended.

    Schedulers that compute it say so. For the others, with `a` the cumulated alpha of the step's time:
    epsilon `(x - sqrt(1-a) e) / sqrt(a)`, v `sqrt(a) x - sqrt(1-a) v` (Salimans and Ho 2022), and flow
    `x - sigma u`.
    """
    for name in ("pred_original_sample", "denoised"):
        told: torch.Tensor | None = getattr(output, name, None)
        if told is not None:
            return told
    if _is_flow(scheduler):
        sigma: torch.Tensor = scheduler.sigmas[scheduler.step_index - 1].to(sample)
        return sample - sigma * model_output
    alpha: torch.Tensor = scheduler.alphas_cumprod[int(timestep)].to(sample)
    match scheduler.config.prediction_type:
        case "epsilon":
            return (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
        case "v_prediction":
            return alpha.sqrt() * sample - (1 - alpha).sqrt() * model_output
        case _:
            return model_output
