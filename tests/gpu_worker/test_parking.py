"""Runs that share one GPU: who has it, who waits, and what each is told and billed.

Nothing here depends on how fast anything is: the engine does a piece of work when the test lets it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_builders import a_request, some_settings, uses_that_are_the_wall_time

from gpu_worker.contract import (
    AttemptResult,
    Checkpoint,
    Outcome,
    RenderKind,
    RenderRequest,
    RenderSpec,
    RunInHand,
    SourceImage,
    StageTimes,
    StaleEpoch,
    WorkerBusy,
    WorkerReport,
)
from gpu_worker.outputs import ArtifactMissing, Artifacts, ArtifactsUnavailable, checkpoint_path
from gpu_worker.run import Inputs, Rendering, RunControl, Stage, StageClock, WallStageClock, parked_bytes
from gpu_worker.timed_engine import TimedEngine
from gpu_worker.worker import Worker
from tests.stand_in import stand_in_models

MakeWorker = Callable[..., Worker]

_LONG_MS = 60_000
_PATIENCE_S = 20
_IMAGES = 2


class SteppedEngine(TimedEngine):
    """Does one piece of work for each `allow`, and writes down whose it was.

    Pieces are named by the run's prompt: `relax step 3`. Has room for one model.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(stand_in_models(), some_settings(folder))
        self.done: list[str] = []
        self.at = ""
        """The piece that was last seen to begin."""
        self.broken = ""
        """Why it fails its self-check."""
        self.fails: str | None = None
        """The piece that raises."""
        self._allowed = threading.Semaphore(0)
        self._begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._free = False

    def self_check(self) -> str:
        return self.broken

    def load(self, model: str, kind: RenderKind) -> bool:
        if model not in self._warm:
            self._work(f"load {model}")
            self._warm = {model: 1}
            return True
        if kind.is_upscale and "upscaler" not in self._warm:
            self._work("load upscaler")
            self._warm = {**self._warm, "upscaler": 1}
            return True
        return False

    def render(
        self,
        spec: RenderSpec,
        inputs: Inputs,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None = None,
    ) -> Rendering:
        clock.enter(Stage.ENCODE)
        self._work(f"{spec.prompt} encode")
        control.check()
        clock.enter(Stage.DENOISE)
        done = 0
        if checkpoint is not None:
            done = int(checkpoint)
            control.restored()
        for step in range(done + 1, spec.steps + 1):
            self._work(f"{spec.prompt} step {step}")
            content = str(step).encode()
            control.boundary(step, spec.steps, lambda: lambda: b"", lambda content=content: lambda: content)
        clock.enter(Stage.DECODE)
        for index in range(1, spec.images + 1):
            control.check(last=index == spec.images)
            self._work(f"{spec.prompt} decode {index}")
        return Rendering(images=(), latents=b"latents", receipt={})

    async def begins(self, piece: str) -> None:
        """Let pieces be done until this one is begun, and not done."""
        while self.at != piece:
            await self.finish()

    async def finish(self) -> str:
        """Let the piece in hand be done, if there is one; return the one that is begun next."""
        if self.at:
            self._allowed.release()
        self.at = await asyncio.to_thread(self._begun.get, timeout=_PATIENCE_S)
        return self.at

    def allow(self) -> None:
        """Let the piece in hand be done, where no other follows."""
        self._allowed.release()
        self.at = ""

    def let_run(self) -> None:
        """Let everything be done from now on."""
        self._free = True
        self._allowed.release()

    def _work(self, piece: str) -> None:
        self._begun.put(piece)
        if not self._free:
            self._allowed.acquire()
        self.done.append(piece)
        if piece == self.fails:
            raise RuntimeError("the kernel is unhappy")


class TilingEngine(SteppedEngine):
    """Lets others go before it in the middle of each step too, as upscales do; a piece takes 10 ms."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._now_ns = 0

    def stage_clock(self) -> WallStageClock:
        return WallStageClock(lambda: self._now_ns)

    def render(
        self,
        spec: RenderSpec,
        inputs: Inputs,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None = None,
    ) -> Rendering:
        clock.enter(Stage.UPSCALE)
        for step in range(1, spec.steps + 1):
            self._work(f"{spec.prompt} tile {step} begun")
            control.check()
            self._work(f"{spec.prompt} tile {step}")
            control.boundary(step, spec.steps, lambda: lambda: b"", lambda: lambda: b"tiles")
        return Rendering(images=(), latents=None, receipt={})

    def _work(self, piece: str) -> None:
        super()._work(piece)
        self._now_ns += 10_000_000


class SlowStore(Artifacts):
    """Does not read or write what `slow` names until it is let."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.slow = "nothing"
        self.away = False
        self.let = threading.Event()
        self.waits = threading.Event()
        """Somebody waits to be let."""

    def put(self, path: str, content: bytes) -> None:
        self._wait(path)
        if self.away:
            raise ArtifactsUnavailable("the store is away")
        super().put(path, content)

    def read(self, path: str) -> bytes:
        self._wait(path)
        return super().read(path)

    def _wait(self, path: str) -> None:
        if self.slow in path:
            self.waits.set()
            self.let.wait()


@pytest.fixture
def engine(tmp_path: Path) -> SteppedEngine:
    return SteppedEngine(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> SlowStore:
    return SlowStore(some_settings(tmp_path).artifacts_url)


@pytest.fixture
async def worker(tmp_path: Path, engine: SteppedEngine, store: SlowStore) -> AsyncIterator[Worker]:
    worker = Worker(some_settings(tmp_path), engine, store)
    yield worker
    engine.let_run()
    store.let.set()
    await worker.close()


def a_run(name: str, **changes: Any) -> RenderRequest:
    spec = {"prompt": name, "steps": 4, "images": _IMAGES, **changes.pop("spec", {})}
    tier = "fast" if name.startswith("fast") else "relax"
    return a_request(**{"attempt_id": name, "tier": tier, "spec": spec, **changes})


async def ended(worker: Worker, attempt_id: str) -> AttemptResult:
    report = worker.report(1)
    while True:
        for result in report.unacknowledged:
            if result.attempt_id == attempt_id:
                return result
        report = (await worker.heartbeat(1, _LONG_MS)).report


async def in_hand(worker: Worker, found: Callable[[WorkerReport], bool]) -> WorkerReport:
    report = worker.report(1)
    while not found(report):
        report = (await worker.heartbeat(1, _LONG_MS)).report
    return report


def names(report: WorkerReport) -> tuple[str | None, list[str]]:
    """Return the active attempt and the parked ones."""
    return report.active and report.active.attempt_id, [run.attempt_id for run in report.parked]


def drawn(report: WorkerReport) -> list[str]:
    return [run.attempt_id for run in report.drawn]


def checkpointed(report: WorkerReport, step: int) -> bool:
    runs: list[RunInHand] = [*report.parked, *([report.active] if report.active else [])]
    return any(run.checkpoint is not None and run.checkpoint.step == step for run in runs)


@pytest.mark.parametrize(
    "piece", ["relax encode", "relax step 1", "relax step 3", "relax step 4", "relax decode 1"]
)
async def test_fast_begins_when_the_piece_that_relax_is_at_is_done(
    worker: Worker, engine: SteppedEngine, piece: str
) -> None:
    worker.render(a_run("relax"))
    await engine.begins(piece)
    worker.render(a_run("fast", parks="relax"))
    assert await engine.finish() == "fast encode"
    assert engine.done[-1] == piece


async def test_a_parked_run_goes_on_by_itself_and_does_nothing_again(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax step 2")
    worker.render(a_run("fast", parks="relax"))
    engine.let_run()
    assert (await ended(worker, "fast")).outcome is Outcome.SUCCEEDED
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED
    whole = ["encode", *(f"step {n}" for n in range(1, 5)), *(f"decode {n}" for n in range(1, _IMAGES + 1))]
    fast, relax = [f"fast {piece}" for piece in whole], [f"relax {piece}" for piece in whole]
    assert engine.done == ["load stand-in", *relax[:3], *fast, *relax[3:]]


async def test_a_model_that_made_room_for_another_is_back_before_its_parked_run_goes_on(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax step 2")
    worker.render(a_run("fast", parks="relax", spec={"model": "second"}))
    engine.let_run()
    assert (await ended(worker, "fast")).outcome is Outcome.SUCCEEDED
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED
    assert worker.report(1).warm_models == ("stand-in",)
    assert engine.done.index("relax step 3") == engine.done.index("load stand-in", 1) + 1


async def test_one_run_is_parked_again_and_again(worker: Worker, engine: SteppedEngine) -> None:
    worker.render(a_run("relax"))
    for number in range(1, 4):
        await engine.begins(f"relax step {number}")
        worker.render(a_run(f"fast-{number}", parks="relax", spec={"steps": 1}))
        assert await engine.finish() == f"fast-{number} encode"
        if number < 3:
            await engine.begins(f"relax step {number + 1}")
            await ended(worker, f"fast-{number}")
    engine.let_run()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED
    assert [piece for piece in engine.done if piece.startswith("relax step")] == [
        f"relax step {number}" for number in range(1, 5)
    ]


async def test_a_report_names_who_has_the_gpu_and_who_waits(worker: Worker, engine: SteppedEngine) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax step 1")
    assert names(worker.report(1)) == ("relax", [])
    worker.render(a_run("fast", parks="relax"))
    # From the moment it was asked: relax is at its step still.
    assert names(worker.report(1)) == ("fast", ["relax"])
    await engine.begins("fast step 1")
    assert names(worker.report(1)) == ("fast", ["relax"])
    await engine.begins("relax step 2")
    await ended(worker, "fast")
    assert names(worker.report(1)) == ("relax", [])


async def test_pictures_are_written_while_the_next_run_has_the_gpu_and_stay_in_hand_until_then(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    store.slow = "fast/"
    worker.render(a_run("relax"))
    await engine.begins("relax step 1")
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("relax step 2")
    report = worker.report(1)
    assert (names(report), drawn(report)) == (("relax", []), ["fast"])
    assert report.unacknowledged == ()
    store.let.set()
    await ended(worker, "fast")
    assert names(worker.report(1)) == ("relax", [])


async def test_the_next_run_begins_while_the_one_before_writes_its_pictures(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    store.slow = "relax/"
    worker.render(a_run("relax"))
    await engine.begins(f"relax decode {_IMAGES}")
    engine.allow()
    await asyncio.to_thread(store.waits.wait, _PATIENCE_S)
    worker.render(a_run("relax-2"))
    await engine.begins("relax-2 step 1")
    report = worker.report(1)
    assert (names(report), drawn(report)) == (("relax-2", []), ["relax"])
    store.let.set()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize("name", ["relax-2", "fast"])
async def test_the_next_run_is_given_during_the_last_piece_and_begins_right_after_it(
    worker: Worker, engine: SteppedEngine, name: str
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax decode 1")
    assert drawn(worker.report(1)) == []
    with pytest.raises(WorkerBusy):
        worker.render(a_run(name))
    await engine.finish()
    told = await in_hand(worker, lambda report: report.active is None)
    assert drawn(told) == ["relax"]
    worker.render(a_run(name))
    assert names(worker.report(1)) == (name, [])
    assert await engine.finish() == f"{name} encode"
    assert engine.done[-1] == f"relax decode {_IMAGES}"
    relax = await ended(worker, "relax")
    assert (relax.outcome, relax.park_waits) == (Outcome.SUCCEEDED, ())


async def test_what_is_drawn_is_stopped_and_handed_over_no_more(
    worker: Worker, engine: SteppedEngine
) -> None:
    relax = a_run("relax")
    worker.render(relax)
    await engine.begins(f"relax decode {_IMAGES}")
    worker.stop(1, "relax", relax.token)
    worker.hand_over(1, "relax")
    engine.allow()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED


async def test_a_parked_run_goes_on_when_the_next_was_not_given_in_time(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax step 2")
    worker.render(a_run("fast", parks="relax"))
    await engine.begins(f"fast decode {_IMAGES}")
    report = worker.report(1)
    assert (names(report), drawn(report)) == (("relax", []), ["fast"])
    assert await engine.finish() == "relax step 3"
    worker.render(a_run("fast-2", parks="relax"))
    assert await engine.finish() == "fast-2 encode"
    assert names(worker.report(1)) == ("fast-2", ["relax"])


async def test_only_who_had_the_gpu_notes_how_long_another_waited_for_it(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax", spec={"steps": 9}))
    await engine.begins("relax step 2")
    worker.render(a_run("fast-1", parks="relax"))
    await engine.begins(f"fast-1 decode {_IMAGES}")
    worker.render(a_run("fast-2", parks="relax"))
    assert await engine.finish() == "fast-2 encode"
    await engine.begins("relax step 7")
    worker.render(a_run("fast-3", parks="relax"))
    engine.let_run()
    assert (await ended(worker, "relax")).park_waits == (1, 1)


async def test_who_was_given_during_a_last_piece_that_broke_the_device_is_handed_over(
    worker: Worker, engine: SteppedEngine
) -> None:
    engine.fails = f"relax decode {_IMAGES}"
    worker.render(a_run("relax"))
    await engine.begins(engine.fails)
    worker.render(a_run("relax-2"))
    engine.broken = "It drew another picture than it should."
    engine.allow()
    assert (await ended(worker, "relax")).failure_reason == "ENGINE_ERROR"
    assert (await ended(worker, "relax-2")).outcome is Outcome.HANDED_OVER
    assert engine.done[-1] == engine.fails


async def test_while_too_many_deliver_the_next_of_them_keeps_its_place(
    tmp_path: Path, engine: SteppedEngine, store: SlowStore
) -> None:
    worker = Worker(some_settings(tmp_path, most_delivering=1), engine, store)
    store.slow = "/relax-"
    engine.let_run()
    worker.render(a_run("relax-1"))
    await in_hand(worker, lambda report: report.active is None)
    worker.render(a_run("relax-2"))
    await engine.begins(f"relax-2 decode {_IMAGES}")
    report = worker.report(1)
    assert (names(report), drawn(report)) == (("relax-2", []), ["relax-1"])
    store.let.set()
    await ended(worker, "relax-1")
    assert names(await in_hand(worker, lambda report: report.active is None)) == (None, [])
    await ended(worker, "relax-2")
    await worker.close()


async def test_a_run_that_only_writes_its_pictures_keeps_nobody_from_the_gpu(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    store.slow = "relax/"
    worker.render(a_run("relax"))
    await engine.begins(f"relax decode {_IMAGES}")
    worker.render(a_run("fast", parks="relax"))
    assert await engine.finish() == "fast encode"
    report = worker.report(1)
    assert (names(report), drawn(report)) == (("fast", []), ["relax"])
    store.let.set()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED
    assert names(worker.report(1)) == ("fast", [])


async def test_a_parked_run_that_is_stopped_ends_at_once(worker: Worker, engine: SteppedEngine) -> None:
    relax = a_run("relax")
    worker.render(relax)
    await engine.begins("relax step 2")
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("fast step 1")
    worker.stop(1, "relax", relax.token)
    result = await ended(worker, "relax")
    assert result.outcome is Outcome.CANCELLED
    assert engine.at == "fast step 1"
    assert names(worker.report(1)) == ("fast", [])
    engine.let_run()
    assert (await ended(worker, "fast")).outcome is Outcome.SUCCEEDED


async def test_a_run_that_is_stopped_before_it_had_the_gpu_parks_nobody(
    worker: Worker, engine: SteppedEngine
) -> None:
    fast = a_run("fast", parks="relax")
    worker.render(a_run("relax"))
    await engine.begins("relax step 2")
    worker.render(fast)
    worker.stop(1, "fast", fast.token)
    result = await ended(worker, "fast")
    assert (result.outcome, result.times) == (Outcome.CANCELLED, StageTimes())
    assert await engine.finish() == "relax step 3"


async def test_a_run_that_fails_lets_the_parked_one_go_on(worker: Worker, engine: SteppedEngine) -> None:
    engine.fails = "fast step 2"
    worker.render(a_run("relax"))
    await engine.begins("relax step 2")
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("relax step 3")
    assert (await ended(worker, "fast")).outcome is Outcome.FAILED


async def test_a_device_that_broke_hands_over_what_is_parked_on_it(
    worker: Worker, engine: SteppedEngine
) -> None:
    engine.fails = "fast step 2"
    worker.render(a_run("relax"))
    await engine.begins("relax step 2")
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("fast step 2")
    engine.broken = "It is on fire."
    engine.let_run()
    assert (await ended(worker, "fast")).outcome is Outcome.FAILED
    result = await ended(worker, "relax")
    assert result.outcome is Outcome.HANDED_OVER
    assert result.checkpoint is not None
    assert worker.report(1).sentence == "It is on fire."


async def test_a_parked_run_that_is_forgotten_was_wasted(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax step 2")
    await spend(worker, 5)
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("fast step 1")
    await worker.forget(1, "relax")
    report = await in_hand(worker, lambda report: not report.parked)
    assert names(report) == ("fast", [])
    assert report.unacknowledged == ()
    assert report.gpu_time.wasted_ms >= 5


async def test_the_time_of_a_run_that_goes_on_elsewhere_is_not_wasted(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    relax = a_run("relax")
    worker.render(relax)
    await engine.begins("relax step 2")
    await spend(worker, 5)
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("fast step 1")
    report = await in_hand(worker, lambda report: checkpointed(report, 2))
    (parked,) = report.parked
    assert parked.checkpoint is not None
    await worker.forget(1, "relax", kept=True)
    report = await in_hand(worker, lambda report: not report.parked)
    assert report.gpu_time.relax_ms == parked.checkpoint.kept.gpu_ms >= 5
    assert report.gpu_time.wasted_ms == 0
    assert store.read(parked.checkpoint.path)


async def spend(worker: Worker, ms: int) -> None:
    """Let the run in hand take at least that long for its piece."""
    began_ms = worker.report(1).gpu_time.open_ms
    while (await worker.heartbeat(1, 1)).report.gpu_time.open_ms < began_ms + ms + 1:  # both are rounded down
        pass


async def test_a_gpu_in_use_is_refused_to_who_does_not_park_its_run(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax step 1")
    for parks in (None, "never heard of"):
        with pytest.raises(WorkerBusy):
            worker.render(a_run("fast", parks=parks))
    worker.render(a_run("fast", parks="relax"))
    with pytest.raises(WorkerBusy):
        worker.render(a_run("fast-2", parks="relax"))
    assert names(worker.report(1)) == ("fast", ["relax"])


async def test_who_parks_a_run_that_is_not_there_begins_at_once(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("fast", parks="never heard of"))
    await engine.begins("fast step 1")


async def test_a_run_that_went_on_by_itself_is_parked_again_by_its_name(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax step 1")
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("relax step 2")
    await ended(worker, "fast")
    worker.resume(1, "relax")
    worker.render(a_run("fast-2", parks="relax"))
    assert await engine.finish() == "fast-2 encode"


async def test_a_forgotten_run_at_its_last_step_keeps_nobody_waiting_to_ask(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax step 1")
    await worker.forget(1, "relax")
    worker.render(a_run("fast"))
    assert await engine.finish() == "fast encode"


async def test_no_more_runs_are_parked_than_set_and_the_oldest_waits_as_a_checkpoint(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    for number in range(1, 5):
        worker.render(a_run(f"fast-{number}", parks=f"fast-{number - 1}"))
        await engine.begins(f"fast-{number} step 2")
    assert names(worker.report(1)) == ("fast-4", ["fast-1", "fast-2", "fast-3"])
    worker.render(a_run("fast-5", parks="fast-4"))
    result = await ended(worker, "fast-1")
    assert (result.outcome, result.images) == (Outcome.HANDED_OVER, ())
    assert result.checkpoint is not None
    # The step that it was at when it was parked was done first.
    assert store.read(result.checkpoint.path) == b"2"
    assert result.times == result.checkpoint.kept
    assert names(worker.report(1)) == ("fast-5", ["fast-2", "fast-3", "fast-4"])


async def test_what_parked_runs_hold_is_bounded_too(make_worker: MakeWorker, engine: SteppedEngine) -> None:
    spec = {"width": 512, "height": 512}
    room = 2 * parked_bytes(a_run("one", spec=spec).spec)
    worker = make_worker(engine, parked_memory_bytes=room)
    for number in range(1, 5):
        worker.render(a_run(f"fast-{number}", parks=f"fast-{number - 1}", spec=spec))
        await engine.begins(f"fast-{number} step 1")
    await ended(worker, "fast-1")
    assert names(worker.report(1)) == ("fast-4", ["fast-2", "fast-3"])
    engine.let_run()


async def test_a_run_that_is_handed_over_ends_at_its_next_boundary_and_another_worker_does_nothing_again(
    worker: Worker, make_worker: MakeWorker, engine: SteppedEngine, tmp_path: Path
) -> None:
    relax = a_run("relax")
    worker.render(relax)
    await engine.begins("relax step 3")
    await spend(worker, 5)
    worker.hand_over(1, "relax")
    worker.hand_over(1, "never heard of")
    engine.let_run()
    result = await ended(worker, "relax")
    assert result.outcome is Outcome.HANDED_OVER
    assert result.checkpoint is not None
    assert (result.checkpoint.step, result.checkpoint.kept) == (3, result.times)

    await worker.forget(1, "relax", kept=True)
    uses = worker.report(1).gpu_time
    assert (uses.relax_ms, uses.wasted_ms) == (result.times.gpu_ms, 0)
    second_engine = SteppedEngine(tmp_path)
    second_engine.let_run()
    second = make_worker(second_engine)
    second.render(replace(relax, attempt_id="relax-2", checkpoint=result.checkpoint))
    finished = await ended(second, "relax-2")
    assert (finished.outcome, finished.kept, finished.steps_redone) == (
        Outcome.SUCCEEDED,
        result.times,
        0,
    )
    assert "relax step 3" not in second_engine.done


async def test_a_result_that_is_handed_over_waits_for_its_checkpoint(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    store.slow = "checkpoint"
    worker.render(a_run("relax"))
    await engine.begins("relax step 1")
    worker.hand_over(1, "relax")
    worker.render(a_run("fast", parks="relax"))
    assert await engine.finish() == "fast encode"
    report = worker.report(1)
    assert (names(report), report.unacknowledged) == (("fast", ["relax"]), ())
    store.let.set()
    assert (await ended(worker, "relax")).checkpoint is not None


async def test_a_run_that_has_not_begun_is_handed_over_without_a_checkpoint(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax encode")
    worker.hand_over(1, "relax")
    engine.let_run()
    result = await ended(worker, "relax")
    assert (result.outcome, result.checkpoint) == (Outcome.HANDED_OVER, None)


async def test_pictures_that_are_drawn_are_not_handed_over(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    store.slow = "relax/"
    worker.render(a_run("relax"))
    await engine.begins(f"relax decode {_IMAGES}")
    engine.let_run()
    await in_hand(worker, lambda report: bool(report.warm_models))
    worker.hand_over(1, "relax")
    store.let.set()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED


async def test_steps_that_a_dead_worker_may_have_done_are_counted_up_to_the_next_checkpoint(
    make_worker: MakeWorker, engine: SteppedEngine, store: SlowStore
) -> None:
    worker = make_worker(engine, checkpoint_every_steps=5)
    engine.let_run()
    request = a_run("relax", spec={"steps": 20}, after_loss=True)
    worker.render(replace(request, checkpoint=a_checkpoint(store, request, 10)))
    assert (await ended(worker, "relax")).steps_redone == 5
    again = replace(request, attempt_id="again", checkpoint=a_checkpoint(store, request, 18))
    worker.render(again)
    assert (await ended(worker, "again")).steps_redone == 2
    gone = replace(request, attempt_id="gone", checkpoint=a_checkpoint(store, request, 10))
    store.delete(gone.checkpoint.path)
    worker.render(gone)
    assert (await ended(worker, "gone")).steps_redone == 15


async def test_a_result_tells_how_many_steps_each_park_took(worker: Worker, engine: SteppedEngine) -> None:
    worker.render(a_run("relax"))
    for number, piece in enumerate(("relax encode", "relax step 2", "relax decode 1")):
        await engine.begins(piece)
        worker.render(a_run(f"fast-{number}", parks="relax"))
        await engine.begins(f"fast-{number} decode {_IMAGES}")
    engine.let_run()
    # The step that it was at was done first; an encode and a decode are no steps.
    assert (await ended(worker, "relax")).park_waits == (0, 1, 0)


async def test_of_several_parked_runs_the_newest_goes_on_unless_another_is_resumed(
    worker: Worker, engine: SteppedEngine
) -> None:
    for number in range(1, 5):
        worker.render(a_run(f"fast-{number}", parks=f"fast-{number - 1}"))
        await engine.begins(f"fast-{number} step 1")
    worker.resume(1, "fast-1")
    worker.resume(1, "never heard of")
    assert names(worker.report(1)) == ("fast-4", ["fast-2", "fast-3", "fast-1"])
    engine.let_run()
    await ended(worker, "fast-2")
    last = [piece.removesuffix(f" decode {_IMAGES}") for piece in engine.done if f"decode {_IMAGES}" in piece]
    assert last == ["fast-4", "fast-1", "fast-3", "fast-2"]


async def test_a_run_is_resumed_while_the_newest_only_writes_its_pictures(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    store.slow = "fast-3/"
    for number in range(1, 4):
        worker.render(a_run(f"fast-{number}", parks=f"fast-{number - 1}"))
        await engine.begins(f"fast-{number} step 1")
    await engine.begins("fast-2 step 2")
    worker.resume(1, "fast-1")
    report = worker.report(1)
    assert (names(report), drawn(report)) == (("fast-2", ["fast-1"]), ["fast-3"])
    store.let.set()
    await ended(worker, "fast-3")
    # Who has the GPU, so that whoever parks it by its name is not refused.
    assert names(worker.report(1)) == ("fast-2", ["fast-1"])
    worker.render(a_run("fast-4", parks="fast-2"))
    assert await engine.finish() == "fast-4 encode"


async def test_resume_of_an_overtaken_scheduler_is_refused(worker: Worker) -> None:
    worker.report(3)
    with pytest.raises(StaleEpoch):
        worker.resume(2, "attempt")


async def test_the_gpu_stays_with_relax_while_fast_fetches_what_it_starts_from(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    store.put("jobs/a/latents.safetensors", b"latents")
    store.slow = "latents"
    source = SourceImage(
        job_id="a", index=1, latents_path="jobs/a/latents.safetensors", strength_permille=500
    )
    worker.render(a_run("relax", spec={"steps": 20}))
    await engine.begins("relax step 1")
    worker.render(a_run("fast", parks="relax", spec={"kind": RenderKind.VARIATION, "source": source}))
    assert await engine.finish() == "relax step 2"
    assert await engine.finish() == "relax step 3"
    store.let.set()
    await engine.begins("fast encode")
    engine.let_run()
    # Of the steps, none before fast was there to take the GPU, and then the one in hand.
    (waited,) = (await ended(worker, "relax")).park_waits
    assert waited <= 1


async def test_a_run_whose_model_had_to_make_room_while_it_was_parked_loads_it_again(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("load stand-in")
    worker.render(a_run("fast", parks="relax", spec={"model": "other"}))
    assert await engine.finish() == "load other"
    engine.let_run()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED
    assert [piece for piece in engine.done if piece.startswith("load")] == [
        "load stand-in",
        "load other",
        "load stand-in",
    ]


@pytest.mark.parametrize("piece", ["load stand-in", "load upscaler"])
async def test_fast_begins_after_each_thing_that_relax_loads(
    worker: Worker, engine: SteppedEngine, piece: str
) -> None:
    worker.render(a_run("relax", spec={"kind": RenderKind.UPSCALE_LIGHT}))
    await engine.begins(piece)
    worker.render(a_run("fast", parks="relax"))
    assert await engine.finish() == "fast encode"
    engine.let_run()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED
    assert [each for each in engine.done if each.startswith("load")] == ["load stand-in", "load upscaler"]


async def test_fast_begins_when_a_model_is_back_that_had_made_room(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax step 2")
    worker.render(a_run("fast", parks="relax", spec={"model": "other"}))
    await engine.begins("load stand-in")
    await ended(worker, "fast")
    worker.render(a_run("fast-2", parks="relax"))
    assert await engine.finish() == "fast-2 encode"
    engine.let_run()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED


async def test_a_park_stores_a_checkpoint_while_fast_has_the_gpu(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    store.slow = "checkpoint"
    relax = a_run("relax")
    worker.render(relax)
    await engine.begins("relax step 3")
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("fast step 1")
    report = worker.report(1)
    assert [run.checkpoint for run in report.parked] == [None]
    store.let.set()
    report = await in_hand(worker, lambda report: checkpointed(report, 3))
    (parked,) = report.parked
    assert parked.checkpoint is not None
    assert parked.checkpoint.path == checkpoint_path(relax.job_id, "relax")
    assert (parked.checkpoint.steps, parked.checkpoint.device) == (4, engine.device_type)
    assert parked.checkpoint.size_bytes == len(b"3")
    assert store.read(parked.checkpoint.path) == b"3"


async def test_between_decodes_a_run_is_cut_at_its_last_step_without_the_decodes(
    worker: Worker, engine: SteppedEngine
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax decode 1")
    await spend(worker, 3)
    worker.render(a_run("fast", parks="relax"))
    assert await engine.finish() == "fast encode"
    report = await in_hand(worker, lambda report: checkpointed(report, 4))
    (parked,) = report.parked
    assert parked.checkpoint is not None
    assert parked.checkpoint.kept.decode_ms == 0


async def test_a_checkpoint_keeps_no_time_of_a_tile_that_is_drawn_again(
    make_worker: MakeWorker, tmp_path: Path
) -> None:
    engine = TilingEngine(tmp_path)
    worker = make_worker(engine)
    worker.render(a_run("relax", spec={"kind": RenderKind.UPSCALE_DETAILED}))
    await engine.begins("relax tile 3 begun")
    worker.render(a_run("fast", parks="relax", spec={"kind": RenderKind.UPSCALE_LIGHT}))
    await engine.begins("fast tile 1 begun")
    report = await in_hand(worker, lambda report: bool(report.parked and report.parked[0].checkpoint))
    checkpoint = report.parked[0].checkpoint
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.kept) == (2, StageTimes(upscale_ms=40))
    engine.let_run()
    result = await ended(worker, "relax")
    assert result.times == StageTimes(upscale_ms=80)


async def test_a_run_parked_before_its_first_step_has_nothing_to_store(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    worker.render(a_run("relax"))
    await engine.begins("relax encode")
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("relax step 1")
    await ended(worker, "fast")
    active = worker.report(1).active
    assert active is not None
    assert active.checkpoint is None


async def test_a_run_that_nobody_parks_is_stored_every_so_many_steps(
    make_worker: MakeWorker, engine: SteppedEngine, artifacts: Artifacts
) -> None:
    worker = make_worker(engine, checkpoint_every_steps=3)
    request = a_run("relax", spec={"steps": 9})
    worker.render(request)
    for stored, following in ((3, 4), (6, 7)):
        await engine.begins(f"relax step {following}")
        report = await in_hand(worker, lambda report, stored=stored: checkpointed(report, stored))
        assert report.active is not None
        assert report.active.checkpoint is not None
        assert artifacts.read(report.active.checkpoint.path) == str(stored).encode()
    engine.let_run()
    await ended(worker, "relax")
    worker.acknowledge(1, "relax")
    await worker.close()
    with pytest.raises(ArtifactMissing):
        artifacts.read(checkpoint_path(request.job_id, "relax"))


async def test_a_store_that_is_away_costs_a_checkpoint_and_not_the_run(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    store.away = True
    worker.render(a_run("relax"))
    await engine.begins("relax step 1")
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("relax step 2")
    store.away = False
    engine.let_run()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED


async def test_a_cut_that_cannot_be_written_is_told_and_the_next_one_is_stored(
    make_worker: MakeWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unwritable(SteppedEngine):
        """Cuts at its first step what cannot be made into a file."""

        def render(
            self,
            spec: RenderSpec,
            inputs: Inputs,
            control: RunControl,
            clock: StageClock,
            checkpoint: bytes | None = None,
        ) -> Rendering:
            clock.enter(Stage.DENOISE)
            for step in range(1, spec.steps + 1):
                self._work(f"step {step}")
                control.boundary(
                    step, spec.steps, lambda: lambda: b"", lambda step=step: lambda: b"%d" % (1 // (step - 1))
                )
            return Rendering(images=(), latents=None, receipt={})

    engine = Unwritable(tmp_path)
    worker = make_worker(engine, checkpoint_every_steps=1)
    worker.render(a_run("relax"))
    await engine.begins("step 3")
    await in_hand(worker, lambda report: checkpointed(report, 2))
    assert "checkpoint not made attempt=relax" in caplog.text
    engine.let_run()
    assert (await ended(worker, "relax")).outcome is Outcome.SUCCEEDED


def a_checkpoint(store: Artifacts, request: RenderRequest, step: int) -> Checkpoint:
    """Store one of an earlier attempt."""
    path = checkpoint_path(request.job_id, "earlier")
    store.put(path, str(step).encode())
    kept = StageTimes(encode_ms=100, denoise_ms=2000)
    return Checkpoint(path=path, step=step, steps=request.spec.steps, kept=kept, device="")


async def test_another_worker_goes_on_from_a_checkpoint_and_the_way_there_is_nobodys(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    request = a_run("relax")
    checkpoint = a_checkpoint(store, request, 2)
    worker.render(replace(request, checkpoint=checkpoint))
    await engine.begins("relax encode")
    await spend(worker, 5)
    active = worker.report(1).active
    assert active is not None
    assert active.checkpoint == checkpoint
    await engine.begins("relax step 3")
    await spend(worker, 5)
    engine.let_run()
    result = await ended(worker, "relax")
    assert result.outcome is Outcome.SUCCEEDED
    assert "relax step 2" not in engine.done
    assert result.kept == checkpoint.kept
    assert result.redone_ms >= 5
    assert (result.times.encode_ms, result.times.denoise_ms >= 5) == (0, True)
    assert worker.report(1).gpu_time.wasted_ms == result.redone_ms
    worker.acknowledge(1, "relax")
    assert worker.report(1).gpu_time.relax_ms == result.times.gpu_ms
    await worker.close()
    with pytest.raises(ArtifactMissing):
        store.read(checkpoint.path)


async def test_what_is_cut_from_a_run_that_went_on_keeps_the_time_of_all_attempts(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    request = a_run("relax")
    checkpoint = a_checkpoint(store, request, 2)
    worker.render(replace(request, checkpoint=checkpoint))
    await engine.begins("relax step 3")
    await spend(worker, 5)
    worker.render(a_run("fast", parks="relax"))
    await engine.begins("fast step 1")
    report = await in_hand(worker, lambda report: checkpointed(report, 3))
    (parked,) = report.parked
    assert parked.checkpoint is not None
    assert parked.checkpoint.kept.encode_ms == 100
    assert parked.checkpoint.kept.denoise_ms >= 2005
    await worker.forget(1, "relax", kept=True)
    report = await in_hand(worker, lambda report: not report.parked)
    assert report.gpu_time.relax_ms == parked.checkpoint.kept.gpu_ms - checkpoint.kept.gpu_ms


async def test_a_run_that_is_stopped_on_its_way_back_bills_what_its_checkpoint_keeps(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    request = a_run("relax")
    request = replace(request, checkpoint=a_checkpoint(store, request, 2))
    worker.render(request)
    await engine.begins("relax encode")
    await spend(worker, 5)
    worker.stop(1, "relax", request.token)
    engine.let_run()
    result = await ended(worker, "relax")
    assert (result.outcome, result.times) == (Outcome.CANCELLED, StageTimes())
    assert request.checkpoint is not None
    assert (result.kept, result.redone_ms >= 5) == (request.checkpoint.kept, True)


async def test_a_checkpoint_that_is_gone_costs_its_steps(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    request = a_run("relax")
    checkpoint = a_checkpoint(store, request, 2)
    store.delete(checkpoint.path)
    worker.render(replace(request, checkpoint=checkpoint))
    engine.let_run()
    result = await ended(worker, "relax")
    assert (result.outcome, result.kept, result.redone_ms) == (Outcome.SUCCEEDED, StageTimes(), 0)
    assert "relax step 1" in engine.done


async def test_a_checkpoint_stays_for_the_next_attempt_where_a_failure_was_ours(
    worker: Worker, engine: SteppedEngine, store: SlowStore
) -> None:
    request = a_run("relax")
    checkpoint = a_checkpoint(store, request, 2)
    engine.fails = "relax step 3"
    worker.render(replace(request, checkpoint=checkpoint))
    engine.let_run()
    assert (await ended(worker, "relax")).outcome is Outcome.FAILED
    worker.acknowledge(1, "relax")
    await worker.close()
    assert store.read(checkpoint.path)


async def test_parked_time_is_nobodys_and_all_uses_add_up_to_the_wall_time(make_worker: MakeWorker) -> None:
    began_s = time.monotonic()
    worker = make_worker(timed_step_ms=5)
    made_s = time.monotonic()
    worker.render(a_run("relax", spec={"steps": 40}))
    async for progress in worker.watch("relax", previews=False):
        if progress.step in (5, 15):
            break
    for fast, following in (("fast-1", 15), ("fast-2", 25)):
        worker.render(a_run(fast, parks="relax", spec={"steps": 30}))
        await ended(worker, fast)
        async for progress in worker.watch("relax", previews=False):
            if progress.step >= following:
                break
    results = [await ended(worker, name) for name in ("fast-1", "fast-2", "relax")]
    for result in results:
        worker.acknowledge(1, result.attempt_id)
    uses = uses_that_are_the_wall_time(worker, began_s=began_s, made_s=made_s)
    assert uses.relax_ms == results[2].times.gpu_ms
    assert uses.fast_ms == results[0].times.gpu_ms + results[1].times.gpu_ms


async def test_closing_ends_what_is_parked(make_worker: MakeWorker) -> None:
    worker = make_worker(timed_step_ms=5)
    worker.render(a_run("relax", spec={"steps": 10_000}))
    worker.render(a_run("fast", parks="relax", spec={"steps": 10_000}))
    await worker.close()
    report = worker.report(1)
    assert names(report) == (None, [])
    assert {result.outcome for result in report.unacknowledged} == {Outcome.CANCELLED}
