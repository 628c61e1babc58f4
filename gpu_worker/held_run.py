"""A run in a worker's hands: the engine's RunControl, and what the worker's event loop knows of the run.

Here a run is parked and cut. Parked, it waits inside the call in which the engine offered a boundary, and
bills nothing. A cut is a copy of its state taken at a boundary, from which the worker makes a checkpoint
while the run goes on or waits. A run that is handed over is cut and ends, so that another attempt can go on
from there.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

from gpu_worker.contract import Checkpoint, RenderRequest, RunInHand, StageTimes
from gpu_worker.gpu_account import Doing, GpuAccount
from gpu_worker.run import CutState, Preview, RunStopped, StageClock
from gpu_worker.run_stack import Place, RunStack
from gpu_worker.settings import WorkerSettings
from gpu_worker.tracing import Piece, RunTrace

_NS_PER_MS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The newest boundary a run has passed. Replaced whole, so that a reader never sees half of two."""

    number: int = 0
    step: int = 0
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A copy of a run's state at a boundary, not stored yet."""

    step: int
    steps: int
    kept: StageTimes
    state: CutState


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """A boundary at which the engine can be asked for the run's state, until the next step."""

    step: int
    steps: int
    cut: Callable[[], CutState]
    times: StageTimes | None = None
    """What the run had taken there; None where it may be asked for later, since no work that a checkpoint
    does not keep comes before the next boundary but decodes."""


class HeldRun:
    """One attempt. The loop writes wishes, watchers and what is stored; the run's thread writes the rest."""

    def __init__(
        self,
        request: RenderRequest,
        *,
        clock: StageClock,
        trace: RunTrace,
        stack: RunStack,
        account: GpuAccount,
        settings: WorkerSettings,
        loop: asyncio.AbstractEventLoop,
        parks: HeldRun | None,
        keep: Callable[[HeldRun, Cut], None],
        show: Callable[[HeldRun, Preview], None],
        load: Callable[[HeldRun], bool],
        tell_drawn: Callable[[], None],
    ) -> None:
        """`parks` is the run that gives way to this one, as soon as this one is ready.

        `keep` is called on the loop with each cut, `tell_drawn` once the run is drawn, and `show` with each
        preview; until that has set `shown`, no other is asked for. `load` brings the next thing that the run
        needs into memory, if there is one.
        """
        self.request = request
        self.clock = clock
        self.trace = trace
        self.stopping = threading.Event()
        self.leaving = threading.Event()
        """It is to be handed over: cut at its next boundary, and ended there."""
        self.forgotten = False
        self.of_use = False
        """Where it is forgotten: whether what its checkpoint keeps goes on elsewhere."""
        self.ended = False
        self.watchers = 0
        self.preview_watchers = 0
        self.newest = Boundary()
        self.showing = False
        """A preview is in the making."""
        self.shown: bytes = b""
        """The newest preview."""
        self.shown_number = 0
        """How many there were."""
        self.came = asyncio.Event()
        self.stored: Checkpoint | None = None
        """The newest checkpoint of this attempt in the store."""
        self.unstored: Cut | None = None
        self.storing: asyncio.Task[None] | None = None
        self.drawn = False
        """It needs the GPU no more, but for what it does with it now."""
        self.kept = StageTimes()
        """What the checkpoint it goes on from had taken."""
        self.load_ns = 0
        self.park_waits: list[int] = []
        """Steps that it ended from when another was ready to go before it until it was parked, each time."""
        self._asked_at_step: int | None = None
        self._first_step = 0
        """The first that this attempt did; 0: none yet."""
        self._restoring = False
        self.place = Place()
        self._parks = parks
        self._stack = stack
        self._account = account
        self._settings = settings
        self._loop = loop
        self._keep = keep
        self._show = show
        self._load = load
        self._tell_drawn = tell_drawn
        self._has_gpu = False
        self._accounted_ms = 0
        self._offer: _Offer | None = None
        self._cut_step = 0
        self._preview_due_ns = 0
        spec = request.spec
        reads = spec.source is not None or bool(spec.pictures) or request.checkpoint is not None
        if not reads:
            self._ask_to_park()
        stack.enter(self.place, ready=not reads)

    # On the loop.

    @property
    def attempt_id(self) -> str:
        return self.request.attempt_id

    @property
    def in_hand(self) -> RunInHand:
        """What a report says of it."""
        newest = self.newest
        return RunInHand(
            job_id=self.request.job_id,
            attempt_id=self.request.attempt_id,
            token=self.request.token,
            checkpoint=self.stored or self.request.checkpoint,
            step=newest.step,
            steps=newest.steps,
        )

    @property
    def stored_ms(self) -> int:
        """Of this attempt's own time, what its newest stored checkpoint keeps."""
        return self.stored.kept.gpu_ms - self.kept.gpu_ms if self.stored else 0

    def stop(self) -> None:
        """End it at its next boundary; at once where it is parked."""
        self.stopping.set()
        self._stack.stop(self.place)

    def hand_over(self) -> None:
        """End it at its next boundary, cut there; at once where it is parked."""
        self.leaving.set()
        self._stack.stop(self.place)

    def show(self, preview: bytes) -> None:
        """Let whoever watches see it."""
        self.shown, self.shown_number = preview, self.shown_number + 1
        self._wake()

    def end(self) -> None:
        """Let whoever watches know that nothing more will come."""
        self.ended = True
        self._wake()

    # On the run's own thread.

    def goes_on_from(self, checkpoint: Checkpoint) -> None:
        """Say, before it takes the GPU, that the engine is given this checkpoint."""
        self.kept, self._restoring = checkpoint.kept, True
        self._cut_step = checkpoint.step

    def take_gpu(self) -> None:
        """Wait until the GPU is this run's. Raises RunStopped."""
        self._ask_to_park()
        self._stack.take(self.place)
        self._has_gpu = True

    def leave_gpu(self) -> tuple[StageTimes, int]:
        """Give up the GPU for good; return its times, and the milliseconds that it spent on getting to its
        checkpoint.
        """
        if self._restoring:
            self.clock.set_aside()
        times = self._count()
        redone_ms = self.clock.redone_ms()
        self._account.settle(redone_ms, "wasted")
        self._offer = None
        self._stack.leave(self.place)
        return times, redone_ms

    @property
    def steps_redone(self) -> int:
        """How many steps that the attempt before may have done were done again so far.

        What that did while a checkpoint was being stored is not among them.
        """
        request = self.request
        if not request.after_loss or not self._first_step:
            return 0
        saved = request.checkpoint.step if request.checkpoint else 0
        reached = min(self.newest.step, saved + self._settings.checkpoint_every_steps)
        return max(0, reached - self._first_step + 1)

    def say_drawn(self) -> None:
        """Say that it needs the GPU no more, if that was not said yet."""
        if not self.drawn:
            self.drawn = True
            self._loop.call_soon_threadsafe(self._tell_drawn)

    def check(self, *, last: bool = False) -> None:
        if self.stopping.is_set():
            raise RunStopped
        if self.leaving.is_set():
            self._leave()
        if self._stack.gives_way(self.place):
            self._park()
        if last:
            self.say_drawn()

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        if self.drawn:
            self._tell(Boundary(number=self.newest.number + 1, step=step, steps=steps))
            return
        if self.stopping.is_set():
            raise RunStopped
        if self._restoring:
            # A step before anything was put back: the engine could not use the checkpoint.
            self._restoring, self.kept, self._cut_step = False, StageTimes(), 0
        self._first_step = self._first_step or step
        # A tile of an upscale is many pieces, and whoever goes on from here does them all.
        times = self.clock.times() if self.request.spec.kind.is_upscale else None
        self._offer = _Offer(step=step, steps=steps, cut=cut, times=times)
        if self.preview_watchers and not self.showing:
            self._preview(preview)
        self._tell(Boundary(number=self.newest.number + 1, step=step, steps=steps))
        if self.leaving.is_set():
            self._leave()
        if self._stack.gives_way(self.place):
            self._park()
        elif step - self._cut_step >= self._settings.checkpoint_every_steps and step < steps:
            self._cut(self._offer.cut())

    def restored(self) -> None:
        self._restoring = False
        self.clock.set_aside()

    def _ask_to_park(self) -> None:
        """Let the run that this one parks note from when on it is to give way."""
        if self._parks is not None:
            # One that is parked already, and stays so for this one too, makes nobody wait.
            if self._parks._has_gpu:
                self._parks._asked_at_step = self._parks.newest.step
            # A run that has ended is not to be kept for it.
            self._parks = None

    def _put_down(self) -> None:
        if self._asked_at_step is not None:
            self.park_waits.append(self.newest.step - self._asked_at_step)
            self._asked_at_step = None
        self._has_gpu = False
        self.trace.turn_to(Piece.PARKED)
        self._stack.put_down(self.place)

    def _preview(self, preview: Callable[[], Preview]) -> None:
        now_ns = time.monotonic_ns()
        if now_ns >= self._preview_due_ns:
            self._preview_due_ns = now_ns + self._settings.preview_interval_ms * _NS_PER_MS
            self.showing = True
            self._loop.call_soon_threadsafe(self._show, self, preview())

    def _park(self) -> None:
        offer = self._offer
        state = offer.cut() if offer is not None and offer.step != self._cut_step else None
        self.clock.pause()
        self._count()
        self._put_down()
        # What is slow about a checkpoint comes after the next run has the GPU.
        if state is not None:
            self._cut(state)
        self.take_gpu()
        # Its model may have made room for another's.
        while self._load(self):
            if self._stack.gives_way(self.place):
                self._put_down()
                self.take_gpu()
        self._account.turn_to(Doing.RUN, time.monotonic_ns())
        self.clock.resume()

    def _leave(self) -> NoReturn:
        if self._offer is not None and self._offer.step != self._cut_step:
            state = self._offer.cut()
            # So that the checkpoint keeps all that is measured.
            self.clock.pause()
            self._cut(state)
        raise RunStopped

    def _cut(self, state: CutState) -> None:
        assert self._offer is not None
        cut = Cut(
            step=self._offer.step,
            steps=self._offer.steps,
            # Decodes are not in a checkpoint: who goes on from it does them all.
            kept=self.kept + replace(self._offer.times or self.clock.times(), decode_ms=0),
            state=state,
        )
        self._cut_step = cut.step
        self._loop.call_soon_threadsafe(self._keep, self, cut)

    def _count(self) -> StageTimes:
        """Bring what the clock measured into the account, and leave the GPU idle."""
        times = self.clock.times()
        measured_ms = times.gpu_ms + self.clock.redone_ms()
        self._account.count(measured_ms - self._accounted_ms)
        self._accounted_ms = measured_ms
        if self._has_gpu:
            self._account.turn_to(Doing.IDLE, time.monotonic_ns())
        return times

    def _tell(self, boundary: Boundary) -> None:
        self.newest = boundary
        if self.watchers:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self.came.set()
        self.came = asyncio.Event()
