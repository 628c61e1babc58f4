"""The life of a worker: one engine, one GPU thread behind a mailbox, and whoever asks.

All of a worker's state belongs to the event loop it was made on; the GPU thread owns the engine and hands
each finished attempt back to the loop. What a worker promises:

- `render` returns at once, and asking again for the same attempt changes nothing;
- every attempt it was given ends in exactly one result, kept until it is acknowledged or forgotten;
- a caller with an older epoch than the newest seen is refused, whatever it asks;
- an attempt that fails, for whatever reason, leaves the worker able to take the next.

No Ray here: `actor.py` is the thin layer that makes this reachable.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from PIL import Image

from gpu_worker.contract import (
    ActiveRun,
    AttemptResult,
    Blame,
    Heartbeat,
    ImageFile,
    Outcome,
    Progress,
    RenderRequest,
    StageTimes,
    StaleEpoch,
    WorkerBusy,
    WorkerReport,
)
from gpu_worker.gpu_account import Doing, GpuAccount
from gpu_worker.outputs import (
    ArtifactMissing,
    Artifacts,
    ArtifactsUnavailable,
    attempt_folder,
    image_name,
)
from gpu_worker.run import Engine, EngineFailure, RenderedImage, Rendering, RunStopped
from gpu_worker.settings import WorkerSettings

_log = logging.getLogger(__name__)

_NS_PER_MS = 1_000_000
_PNG = "image/png"

EXIT_GPU_THREAD_ENDED = 70
"""Exit status of a process whose GPU thread could not go on."""


class Worker:
    """One GPU's worker. Made, and called, on one running event loop."""

    def __init__(self, settings: WorkerSettings, engine: Engine, artifacts: Artifacts) -> None:
        self._settings = settings
        self._engine = engine
        self._artifacts = artifacts
        self._loop = asyncio.get_running_loop()
        self._incarnation = str(uuid.uuid4())
        self._epoch = 0
        self._active: _Run | None = None
        self._ended: dict[str, _Ended] = {}
        self._deletions: set[asyncio.Task[None]] = set()
        # Raised whenever something happened that a scheduler should hear of at once.
        self._news = 0
        self._news_told = 0
        self._news_came = asyncio.Event()
        self._account = GpuAccount(time.monotonic_ns())
        self._mailbox: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="gpu", daemon=True)
        self._thread.start()

    @property
    def incarnation(self) -> str:
        """UUID of this process start."""
        return self._incarnation

    def render(self, request: RenderRequest) -> None:
        """Take an attempt in hand and return; its result comes with a later heartbeat.

        Raises StaleEpoch, and WorkerBusy while another attempt is in hand.
        """
        self._heed(request.epoch)
        if request.attempt_id in self._ended:
            return
        if self._active is not None:
            if self._active.request.attempt_id == request.attempt_id:
                return
            raise WorkerBusy(
                f"{self._settings.worker_id} has attempt {self._active.request.attempt_id} in hand"
            )
        self._active = _Run(request, self._loop, self._settings.preview_interval_ms)
        self._mailbox.put(self._active)

    def stop(self, epoch: int, attempt_id: str, token: str) -> None:
        """Ask a run to end at its next step; nothing happens where no such attempt is in hand.

        It ends as CANCELLED, or as it would have if it was past its last boundary. Raises StaleEpoch.
        """
        self._heed(epoch)
        run = self._active
        if run is not None and (run.request.attempt_id, run.request.token) == (attempt_id, token):
            run.stop.set()

    async def heartbeat(self, epoch: int, wait_ms: int) -> Heartbeat:
        """Return a report as soon as an attempt ended or the models changed, or after `wait_ms`.

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
        """Return what this worker is and has. Raises StaleEpoch."""
        self._heed(epoch)
        self._news_told = self._news
        active = None
        if self._active is not None:
            request = self._active.request
            active = ActiveRun(job_id=request.job_id, attempt_id=request.attempt_id, token=request.token)
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
            active=active,
            unacknowledged=tuple(ended.result for ended in self._ended.values()),
            gpu_time=self._account.read(time.monotonic_ns()),
        )

    def acknowledge(self, epoch: int, attempt_id: str) -> None:
        """Drop a result that the scheduler has settled; again is harmless. Raises StaleEpoch."""
        self._heed(epoch)
        ended = self._ended.pop(attempt_id, None)
        if ended is not None:
            use = "wasted" if ended.result.outcome is Outcome.FAILED else ended.tier
            self._account.settle(ended.result.times.gpu_ms, use)

    async def forget(self, epoch: int, attempt_id: str) -> None:
        """Drop an attempt that no longer counts: its pictures are deleted and its time was wasted.

        One that is in hand is stopped, and dropped when it ends. Again is harmless. Raises StaleEpoch, and
        ArtifactsUnavailable where the pictures cannot be deleted now; the result is dropped all the same.
        """
        self._heed(epoch)
        run = self._active
        if run is not None and run.request.attempt_id == attempt_id:
            run.forgotten = True
            run.stop.set()
            return
        ended = self._ended.pop(attempt_id, None)
        if ended is not None:
            self._account.settle(ended.result.times.gpu_ms, "wasted")
            folder = attempt_folder(ended.result.job_id, attempt_id)
            await asyncio.to_thread(self._artifacts.delete_folder, folder)

    async def watch(self, attempt_id: str, previews: bool) -> AsyncIterator[Progress]:
        """Yield the newest progress of an attempt whenever there is some, until the attempt ends.

        What comes faster than it is taken is skipped. Ends at once where the attempt is not in hand.
        """
        run = self._active
        if run is None or run.request.attempt_id != attempt_id:
            return
        run.watchers += 1
        run.preview_watchers += previews
        seen, seen_preview = 0, 0
        try:
            while not run.ended:
                step = run.newest
                if step.number == seen:
                    await run.came.wait()
                    continue
                seen = step.number
                preview = b""
                if previews and step.preview_number > seen_preview:
                    seen_preview, preview = step.preview_number, step.preview
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
        """Stop what is in hand and end the GPU thread."""
        if self._active is not None:
            self._active.stop.set()
        self._mailbox.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.gather(*self._deletions)

    def _heed(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise StaleEpoch(f"epoch {epoch} was overtaken by {self._epoch}")
        if epoch > self._epoch:
            self._epoch = epoch
            self._wake_heartbeats()

    def _tell_news(self) -> None:
        self._news += 1
        self._wake_heartbeats()

    def _wake_heartbeats(self) -> None:
        self._news_came.set()
        self._news_came = asyncio.Event()

    def _take_result(self, run: _Run, result: AttemptResult) -> None:
        """Called on the loop when the GPU thread is done with a run."""
        assert run is self._active
        self._active = None
        run.end()
        if run.forgotten:
            self._account.settle(result.times.gpu_ms, "wasted")
            folder = attempt_folder(result.job_id, result.attempt_id)
            deletion = self._loop.create_task(asyncio.to_thread(self._artifacts.delete_folder, folder))
            self._deletions.add(deletion)
            deletion.add_done_callback(self._deletions.discard)
        else:
            self._ended[result.attempt_id] = _Ended(result=result, tier=run.request.tier)
        self._tell_news()

    # From here on: the GPU thread.

    def _work(self) -> None:
        try:
            while (run := self._mailbox.get()) is not None:
                result = self._attempt(run)
                self._loop.call_soon_threadsafe(self._take_result, run, result)
        except BaseException:
            # What gets past _attempt is a bug or a device that is gone for good: some CUDA errors fail every
            # later call of the process. A worker that stayed would look alive and hold its attempt for ever;
            # ended, its attempt is lost like any other and a fresh process takes its place.
            _log.critical("gpu thread ended, and the process with it", exc_info=True)
            os._exit(EXIT_GPU_THREAD_ENDED)

    def _attempt(self, run: _Run) -> AttemptResult:
        request = run.request
        clock = self._engine.stage_clock()
        rendering: Rendering | None = None
        load_ns = 0
        result = AttemptResult(
            job_id=request.job_id,
            attempt_id=request.attempt_id,
            token=request.token,
            incarnation=self._incarnation,
            outcome=Outcome.SUCCEEDED,
            times=StageTimes(),
        )
        try:
            source = request.spec.source
            source_latents = self._artifacts.read(source.latents_path) if source else None
            run.check()
            load_ns = self._load(request.spec.model)
            run.check()
            self._account.turn_to(Doing.RUN, time.monotonic_ns())
            rendering = self._engine.render(request.spec, source_latents, run, clock)
        except RunStopped:
            result = replace(result, outcome=Outcome.CANCELLED)
        except Exception as error:
            result = _failed(result, error)
        times = clock.times()
        self._account.end_run(times.gpu_ms, time.monotonic_ns())
        result = replace(result, times=times, load_ms=load_ns // _NS_PER_MS)
        if rendering is None:
            return result
        try:
            return self._delivered(result, run, rendering)
        except Exception as error:
            return _failed(result, error)

    def _load(self, model: str) -> int:
        """Bring the model into memory and return the nanoseconds that took; 0 where it was there."""
        if model in self._engine.warm_models():
            return 0
        self._account.turn_to(Doing.LOAD, time.monotonic_ns())
        try:
            self._engine.load(model)
        finally:
            load_ns = self._account.turn_to(Doing.IDLE, time.monotonic_ns())
            self._loop.call_soon_threadsafe(self._tell_news)
        return load_ns

    def _delivered(self, result: AttemptResult, run: _Run, rendering: Rendering) -> AttemptResult:
        """Write the pictures, and go on trying for a while if the store is away: they are made already."""
        for pause_s in (*self._settings.delivery_pauses_s, None):
            try:
                return self._written(result, run.request, rendering)
            except ArtifactsUnavailable:
                if pause_s is None or run.stop.wait(pause_s):
                    raise
        raise AssertionError("the last try returns or raises")

    def _written(self, result: AttemptResult, request: RenderRequest, rendering: Rendering) -> AttemptResult:
        folder = attempt_folder(request.job_id, request.attempt_id)
        files = []
        for index, image in enumerate(rendering.images, start=1):
            name = image_name(request.job_id, request.file_stem, index)
            path = f"{folder}/{name}"
            content = _png(image)
            self._artifacts.put(path, content)
            files.append(
                ImageFile(
                    index=index,
                    path=path,
                    file_name=name,
                    content_type=_PNG,
                    size_bytes=len(content),
                    sha256=hashlib.sha256(content).hexdigest(),
                    width=image.width,
                    height=image.height,
                    seed=image.seed,
                )
            )
        latents_path = f"{folder}/latents.safetensors"
        self._artifacts.put(latents_path, rendering.latents)
        return replace(result, images=tuple(files), latents_path=latents_path, receipt=rendering.receipt)


def _png(image: RenderedImage) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (image.width, image.height), image.pixels).save(file, "PNG")
    return file.getvalue()


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
    """A result that waits to be acknowledged, and the tier its time is counted under."""

    result: AttemptResult
    tier: str


@dataclass(frozen=True, kw_only=True)
class _Boundary:
    """The newest boundary a run has passed. Replaced whole, so that a reader never sees half of two."""

    number: int = 0
    step: int = 0
    steps: int = 0
    preview: bytes = b""
    preview_number: int = 0
    """Number of the boundary at which the preview was made; 0 for none yet."""


class _Run:
    """The attempt in hand: the GPU thread's RunControl, and what the loop knows of it.

    The loop writes the wishes and the counts of watchers; the GPU thread writes `newest`.
    """

    def __init__(
        self, request: RenderRequest, loop: asyncio.AbstractEventLoop, preview_interval_ms: int
    ) -> None:
        self.request = request
        self.stop = threading.Event()
        self.forgotten = False
        self.ended = False
        self.watchers = 0
        self.preview_watchers = 0
        self.newest = _Boundary()
        self.came = asyncio.Event()
        self._loop = loop
        self._preview_interval_ns = preview_interval_ms * _NS_PER_MS
        self._preview_due_ns = 0

    def end(self) -> None:
        self.ended = True
        self._wake()

    def check(self) -> None:
        if self.stop.is_set():
            raise RunStopped

    def boundary(self, step: int, steps: int, preview: Callable[[], bytes]) -> None:
        self.check()
        number = self.newest.number + 1
        shown, shown_number = self.newest.preview, self.newest.preview_number
        now_ns = time.monotonic_ns()
        if self.preview_watchers and now_ns >= self._preview_due_ns:
            shown, shown_number = preview(), number
            self._preview_due_ns = now_ns + self._preview_interval_ns
        self.newest = _Boundary(
            number=number, step=step, steps=steps, preview=shown, preview_number=shown_number
        )
        if self.watchers:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self.came.set()
        self.came = asyncio.Event()
