"""The actor over a real Ray: reachable, watched by streaming, killed and back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError
from worker_builders import a_request, some_settings

from gpu_worker.actor import GpuWorker
from gpu_worker.contract import Outcome, RunInHand, StaleEpoch, WorkerBusy, WorkerReport
from scheduler.cluster.ray_session import start_local_ray

pytestmark = pytest.mark.ray

_LONG_MS = 60_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    # A short path: a Unix socket's name ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dr-") as folder:
        start_local_ray(Path(folder), gpus=4, namespace="test")
        yield
        ray.shutdown()


@pytest.fixture
def make_actor(cluster: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    actors: list[Any] = []

    def make(**changes: Any) -> Any:
        settings = some_settings(tmp_path, **changes)
        actor = GpuWorker.options(  # type: ignore[attr-defined]
            name=f"{settings.worker_id}-{len(actors)}", lifetime="detached", num_gpus=1, max_restarts=-1
        ).remote(settings)
        actors.append(actor)
        return actor

    yield make
    for actor in actors:
        ray.kill(actor)


async def ended(actor: Any) -> WorkerReport:
    report: WorkerReport = await actor.report.remote(1)
    while report.active is not None or report.drawn:
        report = (await actor.heartbeat.remote(1, _LONG_MS)).report
    return report


async def test_an_attempt_is_rendered_watched_and_acknowledged(make_actor: Callable[..., Any]) -> None:
    actor = make_actor(timed_step_ms=20)
    request = a_request(spec={"steps": 15})
    await actor.render.remote(request)
    seen = [await reference async for reference in actor.watch.remote(request.attempt_id, True)]
    steps = [progress.step for progress in seen]
    # A step may come again, with its preview.
    assert steps == sorted(steps)
    assert len(set(steps)) >= len([progress for progress in seen if not progress.preview])
    assert seen[-1].step >= 14
    assert any(progress.preview for progress in seen)
    (result,) = (await ended(actor)).unacknowledged
    assert (result.outcome, result.token, len(result.images)) == (Outcome.SUCCEEDED, request.token, 4)
    await actor.acknowledge.remote(1, request.attempt_id)
    assert (await actor.report.remote(1)).unacknowledged == ()


async def test_a_run_is_stopped_while_a_heartbeat_waits(make_actor: Callable[..., Any]) -> None:
    actor = make_actor(timed_step_ms=20)
    request = a_request(spec={"steps": 10_000})
    await actor.render.remote(request)
    await actor.heartbeat.remote(1, _LONG_MS)
    waiting = actor.heartbeat.remote(1, _LONG_MS)
    await actor.stop.remote(1, request.attempt_id, request.token)
    (result,) = (await waiting).report.unacknowledged
    assert (result.outcome, result.images) == (Outcome.CANCELLED, ())


async def test_a_run_is_parked_resumed_and_given_to_another_worker(make_actor: Callable[..., Any]) -> None:
    one, other = make_actor(timed_step_ms=20), make_actor(timed_step_ms=20)
    relax = a_request(tier="relax", spec={"steps": 200})
    await one.render.remote(relax)
    watch = one.watch.remote(relax.attempt_id, False)
    assert (await (await anext(watch))).step >= 1
    await one.render.remote(a_request(spec={"steps": 10_000}, parks=relax.attempt_id))
    await one.resume.remote(1, relax.attempt_id)
    report: WorkerReport = await one.report.remote(1)
    # It may have stored one before it was parked, which keeps less.
    while not report.parked or _stored_step(report.parked[0]) < report.parked[0].step:
        report = (await one.heartbeat.remote(1, _LONG_MS)).report
    checkpoint = report.parked[0].checkpoint
    assert checkpoint is not None
    await other.render.remote(
        a_request(job_id=relax.job_id, tier="relax", spec={"steps": 200}, checkpoint=checkpoint)
    )
    await one.forget.remote(1, relax.attempt_id, kept=True)
    while report.parked:
        report = (await one.heartbeat.remote(1, _LONG_MS)).report
    assert report.gpu_time.relax_ms == checkpoint.kept.gpu_ms > 0
    (result,) = (await ended(other)).unacknowledged
    assert (result.outcome, result.kept) == (Outcome.SUCCEEDED, checkpoint.kept)


def _stored_step(run: RunInHand) -> int:
    return -1 if run.checkpoint is None else run.checkpoint.step


async def test_refusals_arrive_as_their_own_class(make_actor: Callable[..., Any]) -> None:
    actor = make_actor(timed_step_ms=20)
    await actor.render.remote(a_request(spec={"steps": 10_000}))
    with pytest.raises(WorkerBusy):
        await actor.render.remote(a_request())
    with pytest.raises(StaleEpoch):
        await actor.report.remote(0)


async def report_once_it_is_back(actor: Any) -> WorkerReport:
    async with asyncio.timeout(60):
        while True:
            try:
                report: WorkerReport = await actor.report.remote(2)
            except ActorUnavailableError:
                continue  # Ray says so while it starts the process; asking again is what callers do
            return report


async def test_a_killed_worker_is_back_as_another_incarnation_with_nothing_in_hand(
    make_actor: Callable[..., Any],
) -> None:
    actor = make_actor(timed_step_ms=20)
    await actor.render.remote(a_request(spec={"steps": 10_000}))
    before: WorkerReport = await actor.report.remote(1)
    watch = actor.watch.remote(before.active.attempt_id, False) if before.active else None
    assert watch is not None
    assert (await (await anext(watch))).step >= 1
    os.kill(await actor.pid.remote(), signal.SIGKILL)
    with pytest.raises((ActorUnavailableError, ActorDiedError)):
        await actor.heartbeat.remote(1, _LONG_MS)
    after = await report_once_it_is_back(actor)
    assert after.incarnation != before.incarnation
    assert (after.active, after.unacknowledged, after.worker_id) == (None, (), before.worker_id)


@pytest.mark.engine
async def test_a_real_engine_draws_inside_the_actor(make_actor: Callable[..., Any]) -> None:
    actor = make_actor(engine="diffusers")
    request = a_request(spec={"width": 128, "height": 128, "steps": 4})
    await actor.render.remote(request)
    (result,) = (await ended(actor)).unacknowledged
    assert result.outcome is Outcome.SUCCEEDED, result.failure_sentence
    assert result.receipt["engine"] == "diffusers"


def test_calling_the_actor_needs_no_torch() -> None:
    program = "import sys, gpu_worker.actor; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
