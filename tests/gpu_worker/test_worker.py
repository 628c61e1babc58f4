"""What a worker promises, with an engine that only takes time."""

from __future__ import annotations

import asyncio
import hashlib
import io
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from worker_builders import a_request, a_spec, some_settings, uses_that_are_the_wall_time

from gpu_worker.contract import (
    AttemptResult,
    Blame,
    Checkpoint,
    Outcome,
    RenderKind,
    RenderRequest,
    RenderSpec,
    SourceImage,
    StageTimes,
    StaleEpoch,
    WorkerBusy,
)
from gpu_worker.image_seeds import image_seed
from gpu_worker.outputs import ArtifactMissing, Artifacts, ArtifactsUnavailable
from gpu_worker.run import (
    CutState,
    EngineFailure,
    Inputs,
    Preview,
    Rendering,
    RunControl,
    Stage,
    StageClock,
)
from gpu_worker.timed_engine import TimedEngine
from gpu_worker.worker import EXIT_GPU_THREAD_ENDED, Worker
from tests.stand_in import stand_in_models

MakeWorker = Callable[..., Worker]

# Long enough never to pass in a test that works.
_LONG_MS = 60_000


async def ended(worker: Worker, epoch: int = 1) -> AttemptResult:
    """Wait, as a scheduler does, until an attempt has ended; return its result, unacknowledged."""
    report = worker.report(epoch)
    while report.active is not None or report.drawn:
        report = (await worker.heartbeat(epoch, _LONG_MS)).report
    return report.unacknowledged[-1]


async def step_passed(worker: Worker, request: RenderRequest, step: int) -> None:
    async for progress in worker.watch(request.attempt_id, previews=False):
        if progress.step >= step:
            return


class FailingEngine(TimedEngine):
    """Fails with what it is given, after its first step."""

    def __init__(self, error: Exception, folder: Path, *, step_ms: int = 0) -> None:
        super().__init__(stand_in_models(), some_settings(folder, timed_step_ms=step_ms))
        self.error: Exception | None = error

    def render(
        self,
        spec: RenderSpec,
        inputs: Inputs,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None = None,
    ) -> Rendering:
        rendering = super().render(spec, inputs, control, clock, checkpoint)
        if self.error is not None:
            raise self.error
        return rendering


class AgeingEngine(FailingEngine):
    """Passes so many self-checks and fails those after."""

    def __init__(self, folder: Path, *, passes: int) -> None:
        super().__init__(RuntimeError("the kernel is unhappy"), folder)
        self.passes = passes

    def self_check(self) -> str:
        self.passes -= 1
        if self.passes < -1:
            raise RuntimeError("an illegal memory access was encountered")
        return "" if self.passes >= 0 else "It drew another picture than it should."


async def test_a_rendered_attempt_leaves_its_pictures_in_the_store(
    make_worker: MakeWorker, artifacts: Artifacts
) -> None:
    worker = make_worker()
    request = a_request(spec={"width": 128, "height": 64, "seed": 5})
    worker.render(request)
    result = await ended(worker)
    assert (result.outcome, result.blame) == (Outcome.SUCCEEDED, Blame.NONE)
    assert (result.job_id, result.attempt_id, result.token) == (
        request.job_id,
        request.attempt_id,
        request.token,
    )
    assert [image.index for image in result.images] == [1, 2, 3, 4]
    for image in result.images:
        assert image.file_name == f"{request.job_id}_a_lighthouse_in_fog_{image.index}.png"
        assert image.path == f"jobs/{request.job_id}/{request.attempt_id}/{image.file_name}"
        assert image.seed == image_seed(5, image.index)
        content = artifacts.read(image.path)
        assert (image.size_bytes, image.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        with Image.open(io.BytesIO(content)) as picture:
            assert (picture.size, picture.format) == ((128, 64), "PNG")
    assert result.latents_path is not None
    assert artifacts.read(result.latents_path)


async def test_render_returns_at_once_and_says_what_is_in_hand(make_worker: MakeWorker) -> None:
    worker = make_worker(timed_step_ms=5)
    request = a_request(spec={"steps": 10_000})
    worker.render(request)
    active = worker.report(1).active
    assert active is not None
    assert (active.attempt_id, active.token) == (request.attempt_id, request.token)


async def test_asking_again_for_the_same_attempt_changes_nothing(make_worker: MakeWorker) -> None:
    worker = make_worker()
    request = a_request()
    worker.render(request)
    worker.render(request)
    result = await ended(worker)
    worker.render(request)
    report = worker.report(1)
    assert report.active is None
    assert report.unacknowledged == (result,)


async def test_a_second_attempt_is_refused_while_one_is_in_hand(make_worker: MakeWorker) -> None:
    worker = make_worker(timed_step_ms=5)
    worker.render(a_request(spec={"steps": 10_000}))
    with pytest.raises(WorkerBusy):
        worker.render(a_request())


async def test_a_result_is_kept_until_it_is_acknowledged(make_worker: MakeWorker) -> None:
    worker = make_worker()
    first, second = a_request(), a_request()
    worker.render(first)
    await ended(worker)
    worker.render(second)
    await ended(worker)
    kept = worker.report(1).unacknowledged
    assert [result.attempt_id for result in kept] == [first.attempt_id, second.attempt_id]
    worker.acknowledge(1, first.attempt_id)
    worker.acknowledge(1, first.attempt_id)
    assert [result.attempt_id for result in worker.report(1).unacknowledged] == [second.attempt_id]


async def test_stop_ends_a_run_at_its_next_step_without_a_picture(
    make_worker: MakeWorker, artifacts: Artifacts
) -> None:
    worker = make_worker(timed_step_ms=10)
    request = a_request(spec={"steps": 10_000})
    worker.render(request)
    await step_passed(worker, request, 3)
    worker.stop(1, request.attempt_id, request.token)
    result = await ended(worker)
    assert result.outcome is Outcome.CANCELLED
    assert result.images == ()
    assert result.times.denoise_ms >= 30
    assert result.times.decode_ms == 0
    with pytest.raises(ArtifactMissing):
        artifacts.read(f"jobs/{request.job_id}/{request.attempt_id}/latents.safetensors")


async def test_stop_with_another_token_stops_nothing(make_worker: MakeWorker) -> None:
    worker = make_worker(timed_step_ms=1)
    request = a_request(spec={"steps": 20})
    worker.render(request)
    worker.stop(1, request.attempt_id, "another")
    assert (await ended(worker)).outcome is Outcome.SUCCEEDED


async def test_every_message_of_an_overtaken_scheduler_is_refused(make_worker: MakeWorker) -> None:
    worker = make_worker()
    assert worker.report(3).epoch == 3
    with pytest.raises(StaleEpoch):
        worker.render(a_request(epoch=2))
    with pytest.raises(StaleEpoch):
        worker.stop(2, "attempt", "token")
    with pytest.raises(StaleEpoch):
        worker.report(2)
    with pytest.raises(StaleEpoch):
        worker.acknowledge(2, "attempt")
    with pytest.raises(StaleEpoch):
        await worker.forget(2, "attempt")
    with pytest.raises(StaleEpoch):
        await worker.heartbeat(2, 0)


async def test_a_heartbeat_that_waits_is_ended_by_a_newer_epoch(make_worker: MakeWorker) -> None:
    worker = make_worker()
    waiting = asyncio.ensure_future(worker.heartbeat(1, _LONG_MS))
    await asyncio.sleep(0)
    worker.report(2)
    with pytest.raises(StaleEpoch):
        await waiting


async def test_a_heartbeat_without_news_is_answered_after_its_wait(make_worker: MakeWorker) -> None:
    worker = make_worker()
    report = (await worker.heartbeat(1, 1)).report
    assert (report.active, report.unacknowledged) == (None, ())
    assert report.worker_id == "node-a/gpu-0"
    assert report.incarnation == worker.incarnation


async def test_a_heartbeat_brings_a_loaded_model_a_drawn_and_an_ended_attempt_at_once(
    make_worker: MakeWorker,
) -> None:
    worker = make_worker(timed_step_ms=25)
    worker.render(a_request(spec={"steps": 4}))
    loaded = (await worker.heartbeat(1, _LONG_MS)).report
    assert loaded.warm_models == ("stand-in",)
    assert loaded.active is not None
    drawn = (await worker.heartbeat(1, _LONG_MS)).report
    assert drawn.active is None
    done = drawn
    while not done.unacknowledged:
        done = (await worker.heartbeat(1, _LONG_MS)).report
    assert done.drawn == ()
    assert len(done.unacknowledged) == 1


async def test_a_watch_yields_growing_steps_and_ends_with_its_attempt(make_worker: MakeWorker) -> None:
    worker = make_worker(timed_step_ms=2)
    request = a_request(spec={"steps": 20})
    worker.render(request)
    steps = []
    async for progress in worker.watch(request.attempt_id, previews=False):
        assert (progress.attempt_id, progress.steps, progress.preview) == (request.attempt_id, 20, b"")
        steps.append(progress.step)
    assert steps == sorted(set(steps))
    assert worker.report(1).active is None


async def test_previews_come_only_to_those_who_ask_and_no_oftener_than_set(make_worker: MakeWorker) -> None:
    worker = make_worker(timed_step_ms=5, preview_interval_ms=40)
    request = a_request(spec={"steps": 40})
    worker.render(request)

    async def previews(wanted: bool) -> list[bytes]:
        return [p.preview async for p in worker.watch(request.attempt_id, previews=wanted) if p.preview]

    began = time.monotonic()
    seen, unwanted = await asyncio.gather(previews(True), previews(False))
    assert unwanted == []
    assert 1 <= len(seen) <= 1 + (time.monotonic() - began) / 0.040
    with Image.open(io.BytesIO(seen[0])) as picture:
        assert picture.format == "PNG"


class SlowPreviews(TimedEngine):
    """Makes previews when it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(stand_in_models(), some_settings(folder, timed_step_ms=1))
        self.let = threading.Event()

    def render(
        self,
        spec: RenderSpec,
        inputs: Inputs,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None = None,
    ) -> Rendering:
        def preview() -> bytes:
            self.let.wait()
            return b"preview"

        clock.enter(Stage.DENOISE)
        for step in range(1, spec.steps + 1):
            time.sleep(0.001)
            control.boundary(step, spec.steps, lambda: preview, lambda: bytes)
        return Rendering(images=(), latents=None, receipt={})


async def test_a_run_does_not_wait_for_its_preview_to_be_made(
    make_worker: MakeWorker, tmp_path: Path
) -> None:
    engine = SlowPreviews(tmp_path)
    worker = make_worker(engine, preview_interval_ms=0)
    request = a_request(spec={"steps": 100_000})
    worker.render(request)
    watch = worker.watch(request.attempt_id, previews=True)
    async for progress in watch:
        assert not progress.preview
        if progress.step >= 30:
            break
    engine.let.set()
    async for progress in worker.watch(request.attempt_id, previews=True):
        if progress.preview:
            break
    worker.stop(1, request.attempt_id, request.token)
    assert progress.preview == b"preview"
    await watch.aclose()


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"x"])
async def test_a_checkpoint_that_cannot_be_read_costs_its_steps(
    make_worker: MakeWorker, artifacts: Artifacts, content: bytes
) -> None:
    worker = make_worker()
    artifacts.put("jobs/a/checkpoint", content)
    kept = StageTimes(denoise_ms=1000)
    checkpoint = Checkpoint(path="jobs/a/checkpoint", step=3, steps=4, kept=kept, device="")
    worker.render(a_request(checkpoint=checkpoint))
    report = worker.report(1)
    while not report.unacknowledged:
        report = (await worker.heartbeat(1, _LONG_MS)).report
    (result,) = report.unacknowledged
    assert (result.outcome, result.kept) == (Outcome.SUCCEEDED, StageTimes())


class CutAfter:
    """Lets a run go, and keeps the checkpoint after one of its steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.kept = b""
        self.went_on = False

    def check(self, *, last: bool = False) -> None:
        pass

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        if step == self.step:
            self.kept = cut()()

    def restored(self) -> None:
        self.went_on = True


def drawn_from(
    engine: TimedEngine, spec: RenderSpec, checkpoint: bytes | None
) -> tuple[list[bytes], CutAfter]:
    control = CutAfter(step=2)
    rendering = engine.render(spec, Inputs(), control, engine.stage_clock(), checkpoint)
    return [image.pixels for image in rendering.images], control


def test_the_timed_engine_draws_another_picture_when_it_goes_on_from_the_wrong_place(tmp_path: Path) -> None:
    engine = TimedEngine(stand_in_models(), some_settings(tmp_path))
    undisturbed, first = drawn_from(engine, a_spec(), None)
    _, of_another = drawn_from(engine, a_spec(seed=8), None)
    gone_on, second = drawn_from(engine, a_spec(), first.kept)
    assert (gone_on, first.went_on, second.went_on) == (undisturbed, False, True)
    a_step_late = first.kept.replace(b"2 ", b"3 ")
    for wrong in (a_step_late, of_another.kept):
        pixels, control = drawn_from(engine, a_spec(), wrong)
        assert control.went_on
        assert all(one != right for one, right in zip(pixels, undisturbed, strict=True))


async def test_the_timed_engine_stops_at_the_step_that_the_other_does(make_worker: MakeWorker) -> None:
    worker = make_worker()
    worker.render(a_request(spec={"steps": 5, "stop_percent": 50, "video": True}))
    result = await ended(worker)
    # One frame a step. Whoever watches may miss the last.
    assert {video.frames for video in result.videos} == {3}


async def test_watching_what_is_not_in_hand_ends_at_once(make_worker: MakeWorker) -> None:
    worker = make_worker()
    assert [progress async for progress in worker.watch("attempt", previews=True)] == []


async def test_a_forgotten_result_leaves_no_picture_and_its_time_was_wasted(
    make_worker: MakeWorker, artifacts: Artifacts
) -> None:
    worker = make_worker(timed_step_ms=5)
    worker.render(a_request())
    result = await ended(worker)
    await worker.forget(1, result.attempt_id)
    await worker.forget(1, result.attempt_id)
    report = worker.report(1)
    assert report.unacknowledged == ()
    assert report.gpu_time.wasted_ms == result.times.gpu_ms >= 20
    assert (report.gpu_time.fast_ms, report.gpu_time.open_ms) == (0, 0)
    with pytest.raises(ArtifactMissing):
        artifacts.read(result.images[0].path)


async def test_forgetting_the_run_in_hand_stops_it(make_worker: MakeWorker) -> None:
    worker = make_worker(timed_step_ms=5)
    request = a_request(spec={"steps": 10_000})
    worker.render(request)
    await step_passed(worker, request, 2)
    await worker.forget(1, request.attempt_id)
    report = worker.report(1)
    while report.active is not None:
        report = (await worker.heartbeat(1, _LONG_MS)).report
    assert report.unacknowledged == ()
    assert report.gpu_time.wasted_ms >= 10


@pytest.mark.parametrize(
    ("error", "reason", "blame"),
    [
        (RuntimeError("the kernel is unhappy"), "ENGINE_ERROR", Blame.PLATFORM),
        (AssertionError(), "ENGINE_ERROR", Blame.PLATFORM),
        (EngineFailure(reason="OUT_OF_MEMORY", sentence="Too little."), "OUT_OF_MEMORY", Blame.PLATFORM),
    ],
)
async def test_a_failure_is_a_result_and_the_worker_takes_the_next(
    make_worker: MakeWorker, tmp_path: Path, error: Exception, reason: str, blame: Blame
) -> None:
    engine = FailingEngine(error, tmp_path)
    worker = make_worker(engine)
    worker.render(a_request())
    result = await ended(worker)
    assert (result.outcome, result.failure_reason, result.blame) == (Outcome.FAILED, reason, blame)
    assert result.failure_sentence
    engine.error = None
    worker.render(a_request())
    assert (await ended(worker)).outcome is Outcome.SUCCEEDED


async def test_a_model_that_is_not_there_is_a_failure_of_ours(make_worker: MakeWorker) -> None:
    worker = make_worker()
    worker.render(a_request(spec={"model": "sdxl"}))
    result = await ended(worker)
    assert (result.failure_reason, result.blame) == ("MODEL_MISSING", Blame.PLATFORM)


async def test_a_store_that_is_away_is_a_failure_of_ours(make_worker: MakeWorker, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    worker = make_worker(artifacts_url=str(tmp_path / "file"), delivery_pauses_s=())
    worker.render(a_request())
    result = await ended(worker)
    assert (result.failure_reason, result.blame) == ("ARTIFACTS_UNAVAILABLE", Blame.PLATFORM)
    assert result.images == ()


async def test_a_store_that_is_back_soon_gets_the_pictures_and_nothing_is_drawn_again(tmp_path: Path) -> None:
    class BackSoon(Artifacts):
        tries = 0

        def put(self, path: str, content: bytes) -> None:
            self.tries += 1
            if self.tries in (1, 3):
                raise ArtifactsUnavailable("the store is being restarted")
            super().put(path, content)

    settings = some_settings(tmp_path, delivery_pauses_s=(0, 0))
    store = BackSoon(settings.artifacts_url)
    worker = Worker(settings, TimedEngine(stand_in_models(), settings), store)
    worker.render(a_request())
    result = await ended(worker)
    await worker.close()
    assert result.outcome is Outcome.SUCCEEDED
    assert all(store.read(image.path) for image in result.images)


async def test_a_variation_of_a_deleted_picture_is_not_tried_again(make_worker: MakeWorker) -> None:
    source = SourceImage(
        job_id="a", index=1, latents_path="jobs/a/b/latents.safetensors", strength_permille=500
    )
    worker = make_worker()
    worker.render(a_request(spec={"kind": RenderKind.VARIATION, "source": source}))
    result = await ended(worker)
    assert (result.failure_reason, result.blame) == ("SOURCE_MISSING", Blame.CLIENT)


async def test_the_uses_of_the_gpu_thread_add_up_to_its_wall_time(
    make_worker: MakeWorker, tmp_path: Path
) -> None:
    engine = FailingEngine(RuntimeError("no"), tmp_path, step_ms=10)
    began_s = time.monotonic()
    worker = make_worker(engine)
    made_s = time.monotonic()
    worker.render(a_request())
    failed = await ended(worker)
    engine.error = None
    results = {}
    for tier in ("fast", "relax"):
        worker.render(a_request(tier=tier, spec={"steps": 20}))
        results[tier] = await ended(worker)
    open_ms = worker.report(1).gpu_time.open_ms
    assert open_ms == failed.times.gpu_ms + sum(result.times.gpu_ms for result in results.values())
    for result in (failed, *results.values()):
        worker.acknowledge(1, result.attempt_id)
    uses = uses_that_are_the_wall_time(worker, began_s=began_s, made_s=made_s)
    assert uses.fast_ms == results["fast"].times.gpu_ms
    assert uses.relax_ms == results["relax"].times.gpu_ms
    assert uses.wasted_ms == failed.times.gpu_ms
    assert uses.open_ms == 0


async def test_two_workers_never_have_the_same_incarnation(make_worker: MakeWorker) -> None:
    assert make_worker().incarnation != make_worker().incarnation


def test_a_gpu_thread_that_cannot_go_on_ends_its_process(tmp_path: Path) -> None:
    # A stage clock that cannot be read is what a broken CUDA context looks like.
    program = f"""
        import asyncio, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from worker_builders import a_request, some_settings
        from gpu_worker.outputs import Artifacts
        from gpu_worker.run import WallStageClock
        from gpu_worker.timed_engine import TimedEngine
        from gpu_worker.worker import Worker
        from tests.stand_in import stand_in_models

        class BrokenClock(WallStageClock):
            def times(self):
                raise RuntimeError("unspecified launch failure")

        class BrokenEngine(TimedEngine):
            def stage_clock(self):
                return BrokenClock()

        async def main():
            settings = some_settings(Path({str(tmp_path)!r}))
            engine = BrokenEngine(stand_in_models(), settings)
            worker = Worker(settings, engine, Artifacts(settings.artifacts_url))
            worker.render(a_request())
            while True:
                await worker.heartbeat(1, {_LONG_MS})

        asyncio.run(main())
    """
    ended_process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended_process.returncode == EXIT_GPU_THREAD_ENDED, ended_process.stderr
    assert "unspecified launch failure" in ended_process.stderr


async def test_a_worker_whose_device_is_broken_from_the_start_takes_nothing_and_says_why(
    make_worker: MakeWorker, tmp_path: Path
) -> None:
    worker = make_worker(AgeingEngine(tmp_path, passes=0))
    report = worker.report(1)
    assert (report.healthy, report.sentence) == (False, "It drew another picture than it should.")
    with pytest.raises(WorkerBusy, match="another picture"):
        worker.render(a_request())


async def test_an_error_that_was_not_the_devices_leaves_the_worker_healthy(
    make_worker: MakeWorker, tmp_path: Path
) -> None:
    engine = AgeingEngine(tmp_path, passes=2)
    worker = make_worker(engine)
    worker.render(a_request())
    assert (await ended(worker)).failure_reason == "ENGINE_ERROR"
    assert (engine.passes, worker.report(1).healthy) == (0, True)


async def test_a_failure_that_has_a_name_needs_no_check(make_worker: MakeWorker, tmp_path: Path) -> None:
    engine = AgeingEngine(tmp_path, passes=2)
    engine.error = EngineFailure(reason="OUT_OF_MEMORY", sentence="too large")
    worker = make_worker(engine)
    worker.render(a_request())
    assert (await ended(worker)).failure_reason == "OUT_OF_MEMORY"
    assert engine.passes == 1


@pytest.mark.parametrize("passes", [1, 0])
async def test_a_device_that_broke_ends_the_workers_day(
    make_worker: MakeWorker, tmp_path: Path, passes: int
) -> None:
    engine = AgeingEngine(tmp_path, passes=1)
    worker = make_worker(engine)
    engine.passes = passes - 1
    worker.render(a_request())
    result = await ended(worker)
    assert (result.outcome, result.blame) == (Outcome.FAILED, Blame.PLATFORM)
    report = worker.report(1)
    assert not report.healthy
    assert ("another picture" if passes else "illegal memory access") in report.sentence
