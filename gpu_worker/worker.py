"""The life of a worker: one engine, one GPU, a thread for each run, and whoever asks.

All of a worker's state belongs to the event loop it was made on; the threads of runs take turns with the
engine and hand each finished attempt back to the loop. What a worker promises:

- `render` returns at once, and asking again for the same attempt changes nothing;
- every attempt it was given ends in exactly one result, kept until it is acknowledged or forgotten; until
  that is there, each report has the attempt in hand;
- a run that is to make room for good is cut at its next boundary and ends there, as handed over, with all
  that it did in a checkpoint;
- a run that is parked gives up the GPU at its next boundary and goes on by itself, to the same bits, when
  those above it have ended; meanwhile it bills nothing and can be stopped at once;
- a caller with an older epoch than the newest seen is refused, whatever it asks;
- an attempt that fails, for whatever reason, leaves the worker able to take the next; after an error that
  nobody expected it checks its device before anybody else has it, and if that computes wrongly, it hands over
  what it has and takes nothing more. An error that sticks, as CUDA's do, fails every later call of the
  process and ends it: nothing can be copied from the device then, and what was in hand is lost like any
  other attempt, to go on elsewhere from its newest checkpoint.

No Ray here: `actor.py` is the thin layer that makes this reachable.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, replace

from opentelemetry.trace import NoOpTracer, Tracer

from gpu_worker.contract import (
    AttemptResult,
    Blame,
    Checkpoint,
    Heartbeat,
    Outcome,
    Progress,
    RenderRequest,
    RenderSpec,
    StageTimes,
    StaleEpoch,
    WorkerBusy,
    WorkerReport,
)
from gpu_worker.delivery import deliver
from gpu_worker.gpu_account import Doing, GpuAccount
from gpu_worker.held_run import Cut, HeldRun
from gpu_worker.outputs import (
    ArtifactMissing,
    Artifacts,
    ArtifactsUnavailable,
    attempt_folder,
    checkpoint_path,
)
from gpu_worker.run import Engine, EngineFailure, Inputs, Preview, Rendering, RunStopped, parked_bytes
from gpu_worker.run_stack import Place, RunStack
from gpu_worker.settings import WorkerSettings
from gpu_worker.tracing import Piece, RunTrace, TracedClock

_log = logging.getLogger(__name__)

_NS_PER_MS = 1_000_000
_PNG = "image/png"

EXIT_GPU_THREAD_ENDED = 70
"""Exit status of a process in which the thread of a run could not go on."""


class Worker:
    """One GPU's worker. Made, and called, on one running event loop."""

    def __init__(
        self, settings: WorkerSettings, engine: Engine, artifacts: Artifacts, tracer: Tracer | None = None
    ) -> None:
        """Without `tracer` nothing is traced."""
        self._settings = settings
        self._engine = engine
        self._artifacts = artifacts
        self._tracer = tracer or NoOpTracer()
        self._loop = asyncio.get_running_loop()
        self._incarnation = str(uuid.uuid4())
        self._epoch = 0
        # In the order in which they were begun, the newest last: also those that are drawn.
        self._hands: list[HeldRun] = []
        self._threads: set[threading.Thread] = set()
        self._ended: dict[str, _Ended] = {}
        self._chores: set[asyncio.Task[None]] = set()
        # Raised whenever something happened that a scheduler should hear of at once.
        self._news = 0
        self._news_told = 0
        self._news_came = asyncio.Event()
        self._account = GpuAccount(time.monotonic_ns())
        self._stack = RunStack()
        self._broken = self._checked()
        """Why its device is not to be trusted; empty: it is."""

    @property
    def incarnation(self) -> str:
        """UUID of this process start."""
        return self._incarnation

    def render(self, request: RenderRequest) -> None:
        """Take an attempt in hand and return; its result comes with a later heartbeat.

        One that comes while the run before it is at its last piece of work has the GPU right after that.
        A run that has the GPU, and that `request.parks` names, gives it up at its next boundary. Where too
        many are parked, or what they hold is too much, the ones parked first are handed over. Raises
        StaleEpoch, and WorkerBusy where another run has the GPU or the worker is not healthy.
        """
        self._heed(request.epoch)
        if request.attempt_id in self._ended or self._held(request.attempt_id) is not None:
            return
        if self._broken:
            raise WorkerBusy(f"{self._settings.worker_id} takes no jobs: {self._broken}")
        drawing = [run for run in self._hands if not run.drawn and not run.forgotten]
        if drawing and drawing[-1].attempt_id != request.parks:
            raise WorkerBusy(f"{self._settings.worker_id} has attempt {drawing[-1].attempt_id} in hand")
        for oldest in self._too_many(drawing):
            oldest.hand_over()
        clock, trace = self._engine.stage_clock(), RunTrace(self._tracer, request)
        run = HeldRun(
            request,
            clock=TracedClock(clock, trace) if trace.is_told else clock,
            trace=trace,
            stack=self._stack,
            account=self._account,
            settings=self._settings,
            loop=self._loop,
            parks=drawing[-1] if drawing else None,
            keep=self._keep,
            show=self._show,
            load=self._load,
            tell_drawn=self._tell_news,
        )
        self._hands.append(run)
        thread = threading.Thread(target=self._work, args=(run,), name="run", daemon=True)
        self._threads.add(thread)
        thread.start()

    def stop(self, epoch: int, attempt_id: str, token: str) -> None:
        """Ask a run to end at its next boundary; nothing happens where no such attempt is in hand.

        It ends as CANCELLED, or as it would have if it was past its last boundary; one that is parked ends at
        once. Raises StaleEpoch.
        """
        self._heed(epoch)
        run = self._held(attempt_id)
        if run is not None and run.request.token == token:
            run.stop()

    def hand_over(self, epoch: int, attempt_id: str) -> None:
        """Cut a run at its next boundary and end it, for another attempt to go on from its checkpoint.

        It ends as HANDED_OVER once the checkpoint is stored, or as it would have if it was past its last
        boundary; one that is parked does so at once. Nothing happens where no such attempt is in hand. Raises
        StaleEpoch.
        """
        self._heed(epoch)
        run = self._held(attempt_id)
        if run is not None:
            run.hand_over()

    def resume(self, epoch: int, attempt_id: str) -> None:
        """Let a parked run go on as soon as the newest run that draws has ended.

        The newest parked run does so by itself; nothing happens where the attempt has the GPU, or is not in
        hand. Raises StaleEpoch.
        """
        self._heed(epoch)
        run = self._held(attempt_id)
        if run is not None:
            order = self._stack.lift(run.place)
            drawing = (each for place in order for each in self._hands if each.place is place)
            self._hands = [next(drawing) if each.place in order else each for each in self._hands]

    async def heartbeat(self, epoch: int, wait_ms: int) -> Heartbeat:
        """Return a report as soon as there is news, or after `wait_ms`.

        News is an attempt that is drawn, or ended, a checkpoint that was stored, and a change of the models
        in memory.
        Raises StaleEpoch, also to a caller that a newer epoch overtook while it waited.
        """
        self._heed(epoch)
        try:
            async with asyncio.timeout(wait_ms / 1000):
                while self._news == self._news_told and epoch == self._epoch:
                    await self._news_came.wait()
        except TimeoutError:
            pass
        return Heartbeat(report=self.report(epoch))

    def report(self, epoch: int) -> WorkerReport:
        """Return what this worker is and has. Raises StaleEpoch.

        The newest run in hand that is not drawn is the active one. So is one that is, while more deliver than
        are to at once: else a store that is slow, or away, would fill this machine's memory with pictures.
        """
        self._heed(epoch)
        self._news_told = self._news
        drawn = [run for run in self._hands if run.drawn][: self._settings.most_delivering]
        hands = [run.in_hand for run in self._hands if run not in drawn]
        return WorkerReport(
            worker_id=self._settings.worker_id,
            incarnation=self._incarnation,
            pid=os.getpid(),
            release=self._settings.release,
            epoch=self._epoch,
            device=self._engine.device_type,
            speed_permille=self._settings.speed_permille,
            memory_bytes=self._engine.memory_bytes,
            memory_used_bytes=self._engine.memory_used_bytes(),
            warm_models=self._engine.warm_models(),
            models=self._engine.models(),
            lacks_for_upscales=self._engine.lacks_for_upscales(),
            active=hands[-1] if hands else None,
            parked=tuple(hands[:-1]),
            drawn=tuple(run.in_hand for run in drawn),
            unacknowledged=tuple(ended.result for ended in self._ended.values()),
            gpu_time=self._account.read(time.monotonic_ns()),
            healthy=not self._broken,
            sentence=self._broken,
        )

    def acknowledge(self, epoch: int, attempt_id: str) -> None:
        """Drop a result that the scheduler has settled; again is harmless. Raises StaleEpoch.

        Its checkpoints go, unless the job will be tried again from them.
        """
        self._heed(epoch)
        ended = self._ended.pop(attempt_id, None)
        if ended is None:
            return
        result, run = ended.result, ended.run
        failed = result.outcome is Outcome.FAILED
        self._account.settle(result.times.gpu_ms, "wasted" if failed else run.request.tier)
        if not (failed and result.blame is Blame.PLATFORM):
            self._begin(self._delete_checkpoints(run))

    async def forget(self, epoch: int, attempt_id: str, kept: bool = False) -> None:
        """Drop an attempt that no longer counts: its pictures are deleted and its time was wasted.

        With `kept`, another attempt goes on from its newest checkpoint, and the time that this keeps was of
        use. Checkpoints stay in either case: the job may be going on from one, and they end with it. One that
        is in hand is stopped, and dropped when it ends. Again is harmless. Raises StaleEpoch, and
        ArtifactsUnavailable where the pictures cannot be deleted now; the result is dropped all the same.
        """
        self._heed(epoch)
        run = self._held(attempt_id)
        if run is not None:
            run.forgotten, run.of_use = True, kept
            run.stop()
            return
        ended = self._ended.pop(attempt_id, None)
        if ended is not None:
            ended.run.of_use = kept
            self._settle_forgotten(ended.run, ended.result)
            folder = attempt_folder(ended.result.job_id, attempt_id)
            await asyncio.to_thread(self._artifacts.delete, folder)

    async def watch(self, attempt_id: str, previews: bool) -> AsyncIterator[Progress]:
        """Yield the newest progress of an attempt whenever there is some, until the attempt ends.

        What comes faster than it is taken is skipped. A preview is made beside the run, and comes a little
        later than the step that it shows. Ends at once where the attempt is not in hand.
        """
        run = self._held(attempt_id)
        if run is None:
            return
        run.watchers += 1
        run.preview_watchers += previews
        seen, seen_preview = 0, 0
        try:
            while not run.ended:
                step = run.newest
                fresh = previews and run.shown_number > seen_preview
                if step.number == seen and not fresh:
                    await run.came.wait()
                    continue
                seen, seen_preview = step.number, run.shown_number
                preview = run.shown if fresh else b""
                yield Progress(
                    attempt_id=attempt_id,
                    step=step.step,
                    steps=step.steps,
                    preview=preview,
                    preview_content_type=_PNG if preview else "",
                )
        finally:
            run.watchers -= 1
            run.preview_watchers -= previews

    async def close(self) -> None:
        """Stop what is in hand, parked or not, and end all threads."""
        for run in self._hands:
            run.stop()
        for thread in tuple(self._threads):
            await asyncio.to_thread(thread.join)
        await asyncio.gather(*self._chores)

    def _heed(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise StaleEpoch(f"epoch {epoch} was overtaken by {self._epoch}")
        if epoch > self._epoch:
            self._epoch = epoch
            self._wake_heartbeats()

    def _too_many(self, parked: Sequence[HeldRun]) -> Sequence[HeldRun]:
        """Return of the runs that wait once another begins, the oldest first, those that must not."""
        settings = self._settings
        held_bytes = 0
        staying = [run for run in parked if not run.leaving.is_set()]
        for number, run in enumerate(reversed(staying)):
            held_bytes += parked_bytes(run.request.spec)
            if number == settings.most_parked or held_bytes > settings.parked_memory_bytes:
                return staying[: len(staying) - number]
        return ()

    def _held(self, attempt_id: str) -> HeldRun | None:
        return next((run for run in self._hands if run.attempt_id == attempt_id), None)

    def _tell_news(self) -> None:
        self._news += 1
        self._wake_heartbeats()

    def _wake_heartbeats(self) -> None:
        self._news_came.set()
        self._news_came = asyncio.Event()

    def _begin(self, chore: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
        return task

    def _take_result(self, run: HeldRun, result: AttemptResult, thread: threading.Thread) -> None:
        """Called on the loop when a run's thread is done with it."""
        self._threads.discard(thread)
        if result.outcome is Outcome.HANDED_OVER:
            self._begin(self._end_stored(run, result))
        else:
            self._end(run, result)

    async def _end_stored(self, run: HeldRun, result: AttemptResult) -> None:
        if run.storing is not None:
            await asyncio.wait({run.storing})
        self._end(run, replace(result, checkpoint=run.in_hand.checkpoint))

    def _end(self, run: HeldRun, result: AttemptResult) -> None:
        self._hands.remove(run)
        run.end()
        if run.forgotten:
            self._settle_forgotten(run, result)
            self._begin(self._delete(attempt_folder(result.job_id, result.attempt_id)))
        else:
            self._ended[result.attempt_id] = _Ended(result=result, run=run)
        self._tell_news()

    def _break(self, sentence: str, heeded: threading.Event) -> None:
        """Called on the loop when the device failed its check."""
        _log.critical("self-check failed worker=%s: %s", self._settings.worker_id, sentence)
        self._broken = sentence
        for run in self._hands:
            run.hand_over()
        heeded.set()
        self._tell_news()

    def _settle_forgotten(self, run: HeldRun, result: AttemptResult) -> None:
        of_use_ms = run.stored_ms if run.of_use else 0
        self._account.settle(of_use_ms, run.request.tier)
        self._account.settle(result.times.gpu_ms - of_use_ms, "wasted")

    def _keep(self, run: HeldRun, cut: Cut) -> None:
        """Called on the loop with each cut of a run; of those that wait, the newest is stored."""
        run.unstored = cut
        if run.storing is None:
            run.storing = self._begin(self._store(run))

    async def _store(self, run: HeldRun) -> None:
        # One path, written over: should this worker die before the scheduler heard of the newest, the next
        # attempt finds more done than it was told, and the time of that is not billed. A path for each step
        # could name one that is deleted by then.
        path = checkpoint_path(run.request.job_id, run.attempt_id)
        while (cut := run.unstored) is not None:
            run.unstored = None
            try:
                run.stored = await asyncio.to_thread(self._stored, path, cut)
            except ArtifactsUnavailable as error:
                # The run goes on, and the next cut is tried again.
                _log.warning("checkpoint not stored attempt=%s: %s", run.attempt_id, error)
            except Exception:
                # A bug, and no reason to end the run, or to keep its next cut from being stored.
                _log.exception("checkpoint not made attempt=%s", run.attempt_id)
            else:
                self._tell_news()
        run.storing = None

    def _show(self, run: HeldRun, preview: Preview) -> None:
        """Called on the loop with each preview of a run, one after the other."""
        self._begin(self._shown(run, preview))

    async def _shown(self, run: HeldRun, preview: Preview) -> None:
        try:
            run.show(await asyncio.to_thread(preview))
        except Exception:
            # A bug, and no reason to end the run, or to keep the next preview from being made.
            _log.exception("preview not made attempt=%s", run.attempt_id)
        run.showing = False

    async def _delete_checkpoints(self, run: HeldRun) -> None:
        if run.storing is not None:
            await run.storing
        for checkpoint in (run.stored, run.request.checkpoint):
            if checkpoint is not None:
                await self._delete(checkpoint.path)

    async def _delete(self, path: str) -> None:
        try:
            await asyncio.to_thread(self._artifacts.delete, path)
        except ArtifactsUnavailable as error:
            # Nothing refers to it any more; it goes with the job's folder.
            _log.warning("file not deleted: %s", error)

    def _stored(self, path: str, cut: Cut) -> Checkpoint:
        began_ns = time.monotonic_ns()
        content = cut.state()
        self._artifacts.put(path, content)
        return Checkpoint(
            path=path,
            step=cut.step,
            steps=cut.steps,
            kept=cut.kept,
            device=self._engine.device_type,
            size_bytes=len(content),
            stored_in_ms=(time.monotonic_ns() - began_ns) // _NS_PER_MS,
        )

    # From here on: the threads of runs.

    def _work(self, run: HeldRun) -> None:
        try:
            result = self._attempt(run)
            run.trace.turn_to(None)
            self._loop.call_soon_threadsafe(self._take_result, run, result, threading.current_thread())
        except BaseException:
            # What gets past _attempt is a bug or a device that is gone for good: some CUDA errors fail every
            # later call of the process. A worker that stayed would look alive and hold its attempt for ever;
            # ended, its attempts are lost like any other and a fresh process takes its place.
            _log.critical("thread of a run ended, and the process with it", exc_info=True)
            os._exit(EXIT_GPU_THREAD_ENDED)

    def _attempt(self, run: HeldRun) -> AttemptResult:
        request = run.request
        rendering: Rendering | None = None
        result = AttemptResult(
            job_id=request.job_id,
            attempt_id=request.attempt_id,
            token=request.token,
            incarnation=self._incarnation,
            outcome=Outcome.SUCCEEDED,
            times=StageTimes(),
        )
        try:
            rendering = self._drawn(run)
        except RunStopped:
            cancelled = run.stopping.is_set()
            result = replace(result, outcome=Outcome.CANCELLED if cancelled else Outcome.HANDED_OVER)
        except Exception as error:
            result = _failed(result, error)
        suspect = result.failure_reason == "ENGINE_ERROR"
        place = Place(urgent=True)
        if suspect:
            # Before this run leaves, or one below would have the GPU first; urgent, or one that comes now.
            self._stack.enter(place, ready=True)
        times, redone_ms = run.leave_gpu()
        if suspect:
            self._check(place)
        result = replace(
            result,
            times=times,
            kept=run.kept,
            redone_ms=redone_ms,
            steps_redone=run.steps_redone,
            park_waits=tuple(run.park_waits),
            load_ms=run.load_ns // _NS_PER_MS,
        )
        if rendering is None:
            return result
        run.say_drawn()
        run.trace.turn_to(Piece.DELIVER)
        try:
            delivered = deliver(
                self._artifacts,
                request,
                rendering,
                pauses_s=self._settings.delivery_pauses_s,
                stop=run.stopping,
            )
        except Exception as error:
            return _failed(result, error)
        return replace(
            result,
            images=delivered.images,
            videos=delivered.videos,
            latents_path=delivered.latents_path,
            receipt=rendering.receipt,
        )

    def _drawn(self, run: HeldRun) -> Rendering:
        spec = run.request.spec
        # Before it has the GPU, which is another run's until this one can use it.
        run.trace.turn_to(Piece.FETCH)
        inputs = self._inputs(spec)
        checkpoint = self._checkpoint(run)
        run.trace.turn_to(Piece.WAIT)
        run.take_gpu()
        run.check()
        while self._load(run):
            # It may be parked here, and find that what it loaded had to make room.
            run.check()
        self._account.turn_to(Doing.RUN, time.monotonic_ns())
        return self._engine.render(spec, inputs, run, run.clock, checkpoint)

    def _check(self, place: Place) -> None:
        """Find out whether what went wrong was the device; `place` is on the stack, and taken from it."""
        try:
            self._stack.take(place)
            sentence = self._checked()
            if sentence:
                # The device is not let go before every run that would be next is to be handed over.
                heeded = threading.Event()
                self._loop.call_soon_threadsafe(self._break, sentence, heeded)
                heeded.wait()
        finally:
            self._stack.leave(place)

    def _checked(self) -> str:
        try:
            return self._engine.self_check()
        except Exception as error:
            return f"Its self-check failed with {type(error).__name__}: {error}"

    def _inputs(self, spec: RenderSpec) -> Inputs:
        read, source = self._artifacts.read, spec.source
        return Inputs(
            source=read(source.picture_path or source.latents_path) if source else None,
            pictures=tuple(read(picture.path) for picture in spec.pictures),
        )

    def _checkpoint(self, run: HeldRun) -> bytes | None:
        """Return the content of the checkpoint that a run is to go on from.

        One that is gone costs the steps again, not the picture: it ends with its job, and another attempt may
        have ended the job by now.
        """
        checkpoint = run.request.checkpoint
        if checkpoint is None:
            return None
        try:
            content = self._artifacts.read(checkpoint.path)
        except ArtifactMissing:
            _log.warning("checkpoint is gone attempt=%s path=%s", run.attempt_id, checkpoint.path)
            return None
        run.goes_on_from(checkpoint)
        return content

    def _load(self, run: HeldRun) -> bool:
        """Bring the next thing that a run needs into memory; False where all of it is there."""
        spec, warm = run.request.spec, self._engine.warm_models()
        run.trace.turn_to(Piece.LOAD)
        self._account.turn_to(Doing.LOAD, time.monotonic_ns())
        try:
            return self._engine.load(spec.model, spec.kind)
        finally:
            run.load_ns += self._account.turn_to(Doing.IDLE, time.monotonic_ns())
            if self._engine.warm_models() != warm:
                self._loop.call_soon_threadsafe(self._tell_news)


def _failed(result: AttemptResult, error: Exception) -> AttemptResult:
    """Return the result of an attempt that `error` ended: whose fault it was and why."""
    match error:
        case EngineFailure():
            blame, reason, sentence = error.blame, error.reason, error.sentence
        case ArtifactsUnavailable():
            blame, reason, sentence = Blame.PLATFORM, "ARTIFACTS_UNAVAILABLE", str(error)
        case ArtifactMissing():
            blame, reason, sentence = Blame.CLIENT, "SOURCE_MISSING", "The picture to start from was deleted."
        case _:
            blame, reason, sentence = Blame.PLATFORM, "ENGINE_ERROR", f"{type(error).__name__}: {error}"
    _log.warning("attempt failed attempt=%s reason=%s", result.attempt_id, reason, exc_info=error)
    return replace(
        result, outcome=Outcome.FAILED, blame=blame, failure_reason=reason, failure_sentence=sentence
    )


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """A result that waits to be acknowledged, and the run that it is of."""

    result: AttemptResult
    run: HeldRun
