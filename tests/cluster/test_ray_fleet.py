"""The fleet over a real Ray, and what it makes of calls that Ray could not deliver."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray._private.state import state as ray_state
from ray.autoscaler.sdk import request_resources
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.experimental.internal_kv import _internal_kv_get

from gpu_worker.contract import Outcome, RenderKind, RenderRequest, RenderSpec, WorkerBusy
from gpu_worker.settings import WorkerSettings
from scheduler.cluster.ray_fleet import RayFleet, actor_name, interval_ms, living_workers
from scheduler.cluster.ray_session import stop_actors
from scheduler.fleet import (
    FleetFact,
    GoneBecause,
    RenderRefused,
    WorkerAwaited,
    WorkerFound,
    WorkerGone,
    WorkerHeard,
)
from tests.cluster.small_ray import NAMESPACE, NODE
from tests.stand_in import STAND_IN_FILE

_WORKER = f"{NODE}/gpu-0"


def a_request(*, tier: str = "fast", parks: str | None = None) -> RenderRequest:
    return RenderRequest(
        job_id=str(uuid.uuid4()),
        attempt_id=str(uuid.uuid4()),
        token="token",
        epoch=1,
        tier=tier,
        file_stem="fox",
        parks=parks,
        spec=RenderSpec(
            kind=RenderKind.IMAGINE,
            model="stand-in",
            prompt="a fox",
            width=64,
            height=64,
            steps=2,
            guidance_milli=5000,
            seed=7,
        ),
    )


def a_fleet(folder: Path, *, step_ms: int = 0, release: str = "test", is_scaled: bool = False) -> RayFleet:
    worker = WorkerSettings(
        worker_id="",
        release=release,
        artifacts_url=str(folder / "artifacts"),
        cache_dir=folder / "cache",
        engine="timed",
        device="cpu",
        timed_step_ms=step_ms,
        models_path=STAND_IN_FILE,
    )
    return RayFleet(worker=worker, namespace=NAMESPACE, heartbeat_ms=3_000, is_scaled=is_scaled)


@asynccontextmanager
async def opened(fleet: RayFleet, *, epoch: int = 1) -> AsyncIterator[asyncio.Queue[FleetFact]]:
    """Run a fleet and yield its facts; then end its workers."""
    facts: asyncio.Queue[FleetFact] = asyncio.Queue()
    await fleet.open(epoch, facts.put_nowait)
    running = asyncio.create_task(fleet.run())
    try:
        async with asyncio.timeout(60):
            yield facts
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        stop_actors(NAMESPACE)


@pytest.mark.parametrize(("workers", "heard_within_ms"), [(1, 3_000), (1_000, 3_000), (10_000, 30_000)])
def test_beyond_a_thousand_workers_each_is_heard_less_often(workers: int, heard_within_ms: int) -> None:
    assert interval_ms(3_000, workers) == heard_within_ms


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
async def test_worker_that_no_slot_wants_is_ended_and_its_gpu_goes_to_one_that_is_wanted(
    tmp_path: Path,
) -> None:
    @ray.remote(num_cpus=0, num_gpus=2)
    class Squatter:
        def here(self) -> None: ...

    squatter = Squatter.options(  # type: ignore[attr-defined]
        name=actor_name("worker", "renamed/gpu-0"), namespace=NAMESPACE, lifetime="detached"
    ).remote()
    await squatter.here.remote()
    async with opened(a_fleet(tmp_path)) as facts:
        found = [await facts.get(), await facts.get()]
        assert {fact.report.worker_id for fact in found if isinstance(fact, WorkerFound)} == {
            f"{NODE}/gpu-0",
            f"{NODE}/gpu-1",
        }


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
async def test_an_attempt_is_rendered_and_its_result_heard(tmp_path: Path) -> None:
    fleet = a_fleet(tmp_path)
    async with opened(fleet) as facts:
        request = a_request()
        given = False
        while True:
            fact = await facts.get()
            if not given and isinstance(fact, WorkerFound):
                fleet.render(fact.report.worker_id, request)
                given = True
            if isinstance(fact, WorkerHeard) and fact.report.unacknowledged:
                (result,) = fact.report.unacknowledged
                assert (result.attempt_id, result.outcome) == (request.attempt_id, Outcome.SUCCEEDED)
                return


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
async def test_run_that_is_parked_is_reported_and_goes_on(tmp_path: Path) -> None:
    fleet = a_fleet(tmp_path, step_ms=500)
    relax = a_request(tier="relax")
    fast = a_request(parks=relax.attempt_id)
    ended: list[str] = []
    async with opened(fleet) as facts:
        worker_id = ""
        while len(ended) < 2:
            fact = await facts.get()
            if isinstance(fact, WorkerFound) and not worker_id:
                worker_id = fact.report.worker_id
                fleet.render(worker_id, relax)
                fleet.render(worker_id, fast)
            if isinstance(fact, WorkerHeard):
                for result in fact.report.unacknowledged:
                    assert result.outcome is Outcome.SUCCEEDED
                    if result.attempt_id not in ended:
                        ended.append(result.attempt_id)
                        fleet.acknowledge(worker_id, result)
                        fleet.resume(worker_id, relax.attempt_id)
            assert not isinstance(fact, RenderRefused), fact
    assert ended == [fast.attempt_id, relax.attempt_id]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
async def test_workers_of_another_release_are_gone_on_with_until_they_are_replaced(tmp_path: Path) -> None:
    older, facts = a_fleet(tmp_path, release="0.1.0"), asyncio.Queue[FleetFact]()
    await older.open(1, facts.put_nowait)
    async with asyncio.timeout(60):
        before = [await facts.get(), await facts.get()]
    lives = {fact.report.incarnation for fact in before if isinstance(fact, WorkerFound)}
    await older._close()  # as its scheduler ends once it is deposed

    newer = a_fleet(tmp_path, release="0.2.0")
    async with opened(newer, epoch=2) as later:
        assert {type(await later.get()) for _ in lives} == {WorkerAwaited}
        for _ in lives:
            found = await later.get()
            assert isinstance(found, WorkerFound)
            assert found.outdated
            assert found.report.incarnation in lives
        newer.replace(_WORKER)
        while not isinstance(fact := await later.get(), WorkerFound):
            assert not isinstance(fact, WorkerGone) or fact.worker_id == _WORKER
        assert not fact.outdated
        assert (fact.report.worker_id, fact.report.release) == (_WORKER, "0.2.0")
        assert living_workers(NAMESPACE) == {
            _WORKER: [f"worker-0.2.0-{_WORKER}"],
            f"{NODE}/gpu-1": [f"worker-0.1.0-{NODE}/gpu-1"],
        }


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
async def test_a_fleet_that_is_scaled_has_workers_only_where_they_are_wanted(tmp_path: Path) -> None:
    other = f"{NODE}/gpu-1"
    fleet = a_fleet(tmp_path, is_scaled=True)
    async with opened(fleet) as facts:

        async def found() -> str:
            while not isinstance(fact := await facts.get(), WorkerFound):
                pass
            return fact.report.worker_id

        assert set(fleet.slots()) == {_WORKER, other}
        fleet.want(1, {other})
        assert await found() == _WORKER
        assert living_workers(NAMESPACE).keys() == {_WORKER}
        # Like any other that is spare, it stays until it is told to end.
        fleet.want(1, {_WORKER})
        assert await found() == other
        assert living_workers(NAMESPACE).keys() == {_WORKER, other}
        fleet.replace(_WORKER)
        while not isinstance(fact := await facts.get(), WorkerGone):
            pass
        assert (fact.worker_id, fact.because) == (_WORKER, GoneBecause.REPLACED)
        assert living_workers(NAMESPACE).keys() == {other}
        fleet.want(2, ())
        assert await found() == _WORKER


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
async def test_a_worker_that_does_not_answer_holds_up_no_takeover_and_is_lost_when_it_was_silent_for_long(
    tmp_path: Path,
) -> None:
    older, facts = a_fleet(tmp_path), asyncio.Queue[FleetFact]()
    await older.open(1, facts.put_nowait)
    async with asyncio.timeout(60):
        before = [await facts.get(), await facts.get()]
    pids = {fact.report.worker_id: fact.report.pid for fact in before if isinstance(fact, WorkerFound)}
    await older._close()
    os.kill(pids[_WORKER], signal.SIGSTOP)
    async with opened(a_fleet(tmp_path), epoch=2) as later:
        told = [later.get_nowait() for _ in range(later.qsize())]
        assert not [fact for fact in told if isinstance(fact, WorkerGone)], "it may only be slow"
        while not isinstance(told[-1], WorkerGone):
            told.append(await later.get())
        assert told[-1].worker_id == _WORKER
        awaited = {fact.worker_id for fact in told if isinstance(fact, WorkerAwaited)}
        found = {fact.report.worker_id for fact in told if isinstance(fact, WorkerFound)}
        assert (awaited, found) == (pids.keys(), pids.keys() - {_WORKER})
        os.kill(pids[_WORKER], signal.SIGCONT)
        while not isinstance(fact := await later.get(), WorkerFound):
            assert not isinstance(fact, WorkerGone)
        assert fact.report.pid == pids[_WORKER]


async def test_gpus_of_a_machine_that_is_about_to_end_are_not_counted(tmp_path: Path) -> None:
    fleet = a_fleet(tmp_path)
    fleet._names = {"1": "node-a", "2": "node-b"}
    fleet._listening = dict.fromkeys(["node-a/gpu-0", "node-b/gpu-0", "node-b/gpu-1"])  # type: ignore[arg-type]
    fleet._ending = {"2"}
    assert set(fleet.slots()) == {"node-a/gpu-0"}


async def test_a_machine_that_ends_while_it_is_looked_at_does_not_seem_to_have_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = iter([True, False])  # when Ray is asked the first thing, and when it is asked the second
    monkeypatch.setattr(ray_state, "get_draining_nodes", lambda: {"1": 0} if next(lives) else {})
    node = {"NodeID": "1", "NodeName": "node-a", "Resources": {"GPU": 1}}
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Alive": next(lives)}])
    monkeypatch.setattr(ray.util, "list_named_actors", lambda **_: [])
    fleet = a_fleet(tmp_path)
    fleet._tell = [].append
    fleet._names, fleet._ending = {"1": "node-a"}, {"1"}
    fleet._listening = {"node-a/gpu-0": asyncio.get_running_loop().create_future()}  # type: ignore[dict-item]
    fleet._answered = {"node-a/gpu-0": asyncio.Event()}
    assert not fleet.slots()
    await fleet._look_at_nodes()
    assert not fleet.slots()


def asked_for() -> list[dict[str, float]]:
    """Return what Ray was asked for last."""
    asked: list[dict[str, float]] = json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL))
    return asked


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
async def test_a_fleet_that_is_not_scaled_takes_back_once_what_a_scaled_one_asked_for(tmp_path: Path) -> None:
    request_resources(bundles=[{"GPU": 1}] * 3)
    fleet = a_fleet(tmp_path)
    await fleet._ask_for_machines()
    assert asked_for() == []
    request_resources(bundles=[{"GPU": 1}])  # somebody else's, from now on
    await fleet._ask_for_machines()
    assert asked_for() == [{"GPU": 1}]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_who_ends_the_service_keeps_no_machines() -> None:
    request_resources(bundles=[{"GPU": 1}] * 3)
    stop_actors(NAMESPACE)
    assert asked_for() == []


class Line:
    """In the place of an actor's handle: each call meets the next of these troubles, and then an answer."""

    def __init__(self, *troubles: Exception) -> None:
        self._troubles = list(troubles)
        self.called = asyncio.Event()
        self.answered = asyncio.Event()
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Line:
        return self

    async def remote(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        self.called.set()
        if self._troubles:
            raise self._troubles.pop(0)
        self.answered.set()


def over(line: Line, folder: Path, tell: Callable[[FleetFact], None] = lambda _: None) -> RayFleet:
    fleet = a_fleet(folder)
    fleet._actors[_WORKER] = line
    fleet._tell = tell
    return fleet


def unavailable() -> ActorUnavailableError:
    return ActorUnavailableError("the network", None)


async def test_call_lost_on_the_way_is_made_again(tmp_path: Path) -> None:
    for act in (
        lambda fleet: fleet.render(_WORKER, a_request()),
        lambda fleet: fleet.stop(_WORKER, "attempt", "token"),
        lambda fleet: fleet.hand_over(_WORKER, "attempt"),
        lambda fleet: fleet.resume(_WORKER, "attempt"),
        lambda fleet: fleet.forget(_WORKER, "attempt", kept=True),
    ):
        line = Line(unavailable(), unavailable())
        act(over(line, tmp_path))
        async with asyncio.timeout(10):
            await line.answered.wait()
        assert line.calls == 3 * line.calls[:1]


async def test_run_reaches_its_worker_before_what_parks_it(tmp_path: Path) -> None:
    line = Line(unavailable())
    fleet = over(line, tmp_path)
    relax = a_request(tier="relax")
    fast = a_request(parks=relax.attempt_id)
    fleet.render(_WORKER, relax)
    fleet.render(_WORKER, fast)
    async with asyncio.timeout(10):
        await asyncio.gather(*fleet._calls)
    assert line.calls == [(relax,), (relax,), (fast,)]


async def test_run_reaches_its_worker_before_what_ends_it(tmp_path: Path) -> None:
    line = Line(unavailable())
    fleet = over(line, tmp_path)
    request = a_request()
    fleet.render(_WORKER, request)
    fleet.stop(_WORKER, request.attempt_id, request.token)
    fleet.hand_over(_WORKER, request.attempt_id)
    fleet.resume(_WORKER, request.attempt_id)
    async with asyncio.timeout(10):
        await asyncio.gather(*fleet._calls)
    asked = (0, request.attempt_id)
    assert line.calls == [(request,), (request,), (*asked, request.token), asked, asked]


async def test_run_of_a_worker_that_died_meanwhile_is_not_given_to_the_next(tmp_path: Path) -> None:
    line = Line(unavailable())
    fleet = over(line, tmp_path)
    fleet._incarnations[_WORKER] = "first"
    fleet.render(_WORKER, a_request())
    fleet.render(_WORKER, a_request())
    await line.called.wait()
    fleet._incarnations[_WORKER] = "second"
    async with asyncio.timeout(10):
        await asyncio.gather(*fleet._calls)
    assert len(line.calls) == 1


async def test_worker_that_is_busy_after_a_lost_call_is_told_in_its_own_words(tmp_path: Path) -> None:
    facts: asyncio.Queue[FleetFact] = asyncio.Queue()
    # As Ray raises what an actor raised: with a traceback for its text.
    busy = RayTaskError("render", "Traceback …", WorkerBusy("It is busy.")).as_instanceof_cause()
    fleet = over(Line(unavailable(), busy), tmp_path, facts.put_nowait)
    request = a_request()
    fleet.render(_WORKER, request)
    async with asyncio.timeout(10):
        told = await facts.get()
    assert told == RenderRefused(worker_id=_WORKER, attempt_id=request.attempt_id, sentence="It is busy.")


async def test_pictures_that_could_not_be_deleted_end_nothing(tmp_path: Path) -> None:
    line = Line(RayTaskError("forget", "", OSError("the artifact store is away")))
    fleet = over(line, tmp_path)
    fleet.forget(_WORKER, "attempt")
    fleet.stop(_WORKER, "attempt", "token")
    await line.answered.wait()
    assert not fleet._failed.done()


async def test_bug_in_a_call_ends_the_fleet(tmp_path: Path) -> None:
    fleet = over(Line(AssertionError("a bug")), tmp_path)
    fleet.stop(_WORKER, "attempt", "token")
    async with asyncio.timeout(10):
        with pytest.raises(AssertionError, match="a bug"):
            await fleet.run()
