"""What happens at the boundaries of one run: progress, previews, frames, checkpoints, and the early stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from gpu_worker.engine.checkpoint import RunState, WayBack
from gpu_worker.engine.device import Leash
from gpu_worker.engine.film import FilmRoll
from gpu_worker.engine.latents import contact_sheet, rough_pictures
from gpu_worker.engine.step_boundary import Predict
from gpu_worker.run import CutState, Preview, RunControl, Stage, StageClock


class StoppedEarly(Exception):
    """Raised at the step after which the pictures are shown as the model sees them then."""

    def __init__(self, latents: torch.Tensor) -> None:
        self.latents = latents


class RunListener:
    """Passes the boundaries of one run on to the worker, and ends it where it is to stop early."""

    def __init__(
        self,
        *,
        control: RunControl,
        clock: StageClock,
        leash: Leash,
        unpacked: Callable[[torch.Tensor], torch.Tensor],
        latent_to_rgb: torch.Tensor,
        stop_percent: int,
        film: FilmRoll | None,
        generators: Sequence[torch.Generator],
        receipt: Mapping[str, object],
        way: WayBack | None,
    ) -> None:
        self._control = control
        self._clock = clock
        self._leash = leash
        self._unpacked = unpacked
        self._latent_to_rgb = latent_to_rgb
        self._stop_percent = stop_percent
        self._film = film
        self._generators = generators
        self._receipt = receipt
        self._way = way
        self._step = 0
        self._loop_steps: int | None = None

    def count_steps_of(self, pipeline: Any) -> None:
        """Learn how much of the table of steps a run's own copy of an image-to-image pipeline leaves."""
        # They do not agree on how strength is rounded, so that only they can tell.
        cut = pipeline.get_timesteps

        def counted(*args: Any, **kwargs: Any) -> Any:
            timesteps, steps = cut(*args, **kwargs)
            self._loop_steps = len(timesteps)
            return timesteps, steps

        vars(pipeline)["get_timesteps"] = counted

    def denoising_begins(self) -> None:
        self._control.check()
        self._clock.enter(Stage.DENOISE)

    def skipped(self, scheduler: Any, sample: torch.Tensor) -> torch.Tensor | None:
        way = self._way
        if way is None or not way.under_way:
            return None
        self._step += 1
        latents = way.skip(scheduler, sample)
        if self._stops_early(scheduler):
            raise StoppedEarly(latents)
        return latents

    def step_ended(self, scheduler: Any, latents: torch.Tensor, predict: Predict) -> None:
        self._leash.step()
        self._step += 1
        stops_early = self._stops_early(scheduler)
        if stops_early:
            # From here on the run's state is what will be shown.
            latents = predict()
        if self._film is not None:
            self._film.step_ended(
                self._step,
                self._steps(scheduler),
                lambda: rough_pictures(self._unpacked(predict()), self._latent_to_rgb),
            )
        self._control.boundary(
            self._step,
            self._steps(scheduler),
            preview=lambda: self._preview(predict),
            cut=lambda: self._cut(scheduler, latents),
        )
        if stops_early:
            raise StoppedEarly(latents)

    def _all_steps(self, scheduler: Any) -> int:
        # A scheduler's own table, not the number asked for: second-order schedulers step more often.
        return self._loop_steps or len(scheduler.timesteps)

    def _steps(self, scheduler: Any) -> int:
        """Return how many steps will be done."""
        return -(-self._all_steps(scheduler) * self._stop_percent // 100)

    def _stops_early(self, scheduler: Any) -> bool:
        return self._step == self._steps(scheduler) < self._all_steps(scheduler)

    def _preview(self, predict: Predict) -> Preview:
        # A copy, also where it is on the CPU already: a scheduler may go on with what it predicted.
        seen = self._unpacked(predict()).to("cpu", copy=True)
        return partial(contact_sheet, seen, self._latent_to_rgb)

    def _cut(self, scheduler: Any, latents: torch.Tensor) -> CutState:
        state = RunState.of(
            step=self._step,
            latents=latents,
            scheduler=scheduler,
            generators=self._generators,
            film=self._film.frames if self._film is not None else (),
        )
        # Not a closure, which would keep the listener as long as what is to be stored.
        return partial(state.content, self._receipt)
