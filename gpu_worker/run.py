"""A run: an attempt's life inside a worker, as the worker and an engine see it together.

The worker asks an `Engine` to render and gives it two things to hold on to: a `RunControl`, through which
the engine offers a boundary after each denoising step and before each other piece of work, and the engine's
own `StageClock`, which the worker reads also where the run ends by an exception. A call to the control may
last: a run that is parked waits inside it, and has the device again when it returns. No torch here: engines
bring their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gpu_worker.contract import Blame, RenderKind, RenderSpec, StageTimes

_NS_PER_MS = 1_000_000


class RunStopped(Exception):
    """Raised at a step boundary, or between two pieces of work: the run was asked to stop."""


class EngineFailure(Exception):
    """An engine cannot go on, for a reason it knows."""

    def __init__(self, *, reason: str, sentence: str, blame: Blame = Blame.PLATFORM) -> None:
        super().__init__(reason, sentence, blame)
        self.reason = reason
        self.sentence = sentence
        self.blame = blame

    def __str__(self) -> str:
        return f"{self.reason}: {self.sentence}"


class Stage(StrEnum):
    """What the device does for a run. Every instant of a run belongs to one stage."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    UPSCALE = "upscale"


class StageClock(Protocol):
    """Device time of one run by stage."""

    def enter(self, stage: Stage) -> None:
        """Give the time from now on to `stage`, and end the stage before."""

    def pause(self) -> None:
        """Wait for the device; the time from now on is not this run's."""

    def resume(self) -> None:
        """Give the time from now on to the stage that was paused."""

    def set_aside(self) -> None:
        """Count all time so far as spent on getting to where a checkpoint was."""

    def times(self) -> StageTimes:
        """Wait for the device and return the sums so far, without what was set aside."""

    def redone_ms(self) -> int:
        """Return what was set aside, as of the last `times`."""


CutState = Callable[[], bytes]
"""A copy of a run's state. Called, by any thread that has time for it, it gives a checkpoint's content."""

Preview = Callable[[], bytes]
"""A copy of what a run looks like. Called, by any thread that has time for it, it gives a PNG."""


class RunControl(Protocol):
    """What an engine must tell and ask while it renders. Called on the device thread."""

    def check(self, *, last: bool = False) -> None:
        """Park here if the GPU is wanted. For before each piece of work that is not a step.

        `last`: nothing that needs the GPU comes after that piece. From here on the run is neither parked nor
        stopped, and whoever is next waits for no more than that. Raises RunStopped if the run was asked to
        stop.
        """

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        """Say that `step` of `steps` is done; park here if the GPU is wanted.

        `preview` copies the grid so far. It is called only when somebody watches and one is due.
        `cut` copies what the run needs to go on from here elsewhere. It is called only when a checkpoint
        is due, here or at a later `check`: no step may come between. Raises RunStopped if the run was asked
        to stop.
        """

    def restored(self) -> None:
        """Say that the run is where its checkpoint was: the time so far went into getting there."""


@dataclass(frozen=True, kw_only=True)
class RenderedImage:
    """One picture. Files are made of it while the device is free for the next run."""

    pixels: bytes
    """Red, green and blue of each pixel, row by row from the top."""
    width: int
    height: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Film:
    """What a grid looked like on its way, at equal distances."""

    width: int
    height: int
    frames: tuple[bytes, ...]
    """Each as a rendered image's pixels; the last is the finished grid."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """What a completed render gives back."""

    images: tuple[RenderedImage, ...]
    latents: bytes | None
    """The grid latents as safetensors, from which variations start; None of an upscale."""
    receipt: Mapping[str, object]
    """What is needed to make the same bits again; JSON values only."""
    film: Film | None = None
    """Where the request asked for a video."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files that a render starts from, read by the worker."""

    source: bytes | None = None
    """The source job's grid latents for a variation, the source picture's file for an upscale."""
    pictures: tuple[bytes, ...] = ()
    """The files of the request's picture parts, in their order."""


class Engine(Protocol):
    """Draws pictures on one device.

    `load` and `render` are called by whoever has the GPU. Renders overlap, each on its own thread: all but
    one wait inside their RunControl.
    """

    @property
    def device_type(self) -> str:
        """The GPU model, or the CPU's instruction set and thread count: equal types draw equal bits."""

    @property
    def memory_bytes(self) -> int:
        """What models and runs may use."""

    def memory_used_bytes(self) -> int: ...

    def warm_models(self) -> tuple[str, ...]:
        """Names of the models in memory. Called from any thread."""

    def models(self) -> tuple[str, ...]:
        """Names of the models that it could load, as far as can be told before it does."""

    def lacks_for_upscales(self) -> str:
        """Return why it can draw no upscale and what to do about it, as far as can be told; empty: it can."""

    def self_check(self) -> str:
        """Return why nothing that this device draws is to be trusted; empty: it computes what it should.

        Called by whoever has the GPU, and before anything was loaded. What it raises means the same.
        """

    def load(self, model: str, kind: RenderKind) -> bool:
        """Bring the next thing into memory that a render of this kind needs and that is not there.

        Returns whether there was one: it is called until all is there. Also for a run that was parked, before
        it goes on: its model may have made room meanwhile. Raises EngineFailure.
        """

    def stage_clock(self) -> StageClock:
        """Return a new clock for one run on this engine's device."""

    def render(
        self,
        spec: RenderSpec,
        inputs: Inputs,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None = None,
    ) -> Rendering:
        """Draw `spec` with what was loaded for it.

        `checkpoint` is where an earlier render of the same spec got to: if it was made by the same software
        and weights on the same device type, this one goes on from there and says so to `control`; else, also
        where it cannot be read, it begins at the beginning. Raises RunStopped where `control` does, and
        EngineFailure.
        """


def parked_bytes(spec: RenderSpec) -> int:
    """Return how many bytes of a GPU's memory a run holds while it is parked, beside its model's, at most.

    Latents have up to 16 channels at an eighth of each side, in 32 bits; multi-step schedulers keep up to
    three predictions beside them. An upscale holds its picture in 32 bits, before and after.
    """
    pixels = spec.width * spec.height * spec.images
    latents = 4 * 16 * 4 * pixels // 64
    return latents + (2 * 3 * 4 * pixels if spec.kind.is_upscale else 0)


class WallStageClock:
    """A stage clock for devices that work while the caller waits: the machine's monotonic clock."""

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._spent_ns = dict.fromkeys(Stage, 0)
        self._redone_ns = 0
        self._stage: Stage | None = None
        self._running = False
        self._since_ns = 0

    def enter(self, stage: Stage) -> None:
        self._count()
        self._stage, self._running = stage, True

    def pause(self) -> None:
        self._count()
        self._running = False

    def resume(self) -> None:
        self._since_ns = self._now_ns()
        self._running = self._stage is not None

    def set_aside(self) -> None:
        self._count()
        self._redone_ns += sum(self._spent_ns.values())
        self._spent_ns = dict.fromkeys(Stage, 0)

    def times(self) -> StageTimes:
        self._count()
        return stage_times({stage: spent / _NS_PER_MS for stage, spent in self._spent_ns.items()})

    def redone_ms(self) -> int:
        return round(self._redone_ns / _NS_PER_MS)

    def _count(self) -> None:
        now_ns = self._now_ns()
        if self._running and self._stage is not None:
            self._spent_ns[self._stage] += now_ns - self._since_ns
        self._since_ns = now_ns


def stage_times(spent_ms: Mapping[Stage, float]) -> StageTimes:
    """Return stage sums in whole milliseconds, each rounded to the nearest."""
    return StageTimes(
        encode_ms=round(spent_ms[Stage.ENCODE]),
        denoise_ms=round(spent_ms[Stage.DENOISE]),
        decode_ms=round(spent_ms[Stage.DECODE]),
        upscale_ms=round(spent_ms[Stage.UPSCALE]),
    )
