"""What operators and curious owners ask of a running service, over a real Ray."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg
import pytest

from billing.v1 import admin_pb2
from scheduler.client.aio import DarkroomClient, JobHandle
from scheduler.v1 import fleet_pb2, job_pb2
from tests.service.people import People, result_of, until_step
from tests.service.process import ServiceProcess

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

WHY = "a test"


async def until_held(handle: JobHandle, reason: job_pb2.QueueReason.ValueType) -> None:
    """Return once a job waits for that reason."""
    async with asyncio.timeout(30):
        async for update in handle.watch():
            if update.queue_status.reason == reason:
                return
    raise AssertionError("the job ended")


async def an_operator(people: People, running: ServiceProcess, name: str) -> DarkroomClient:
    async with DarkroomClient(running.address, running.admin_key) as admin:
        await admin.create_account(plan="basic", account_id=name, reason=WHY)
        key = await admin.create_api_key(name, role=admin_pb2.ROLE_OPERATOR, reason=WHY)
    return DarkroomClient(running.address, key.secret)


async def test_a_paused_tier_holds_a_job_that_its_owner_can_move_and_says_why(
    running: ServiceProcess, people: People
) -> None:
    async with (
        await an_operator(people, running, "olga") as operator,
        await people.account("ada") as ada,
    ):
        await operator.pause_tier(job_pb2.TIER_RELAX, reason=WHY)

        handle = await ada.imagine("a lighthouse", tier=job_pb2.TIER_RELAX)
        try:
            await until_held(handle, job_pb2.QUEUE_REASON_TIER_PAUSED)
            (relax,) = [q for q in (await operator.queues()).tiers if q.tier == job_pb2.TIER_RELAX]
            assert (relax.waiting, relax.paused, relax.pause_reason) == (1, True, WHY)
            told = await ada.explain(handle.id)
            assert "paused by an operator" in told.sentences[0]
            options = {option.tier: option for option in (await ada.estimate_job(handle.id)).options}
            assert not options[job_pb2.TIER_RELAX].HasField("start_p50_ms"), "no time opens a paused tier"
            assert options[job_pb2.TIER_FAST].start_p50_ms == 0
            await ada.move(handle.id, job_pb2.TIER_FAST)
            done = await result_of(handle)
            assert (done.tier, done.receipt.billed_gpu_ms > 0) == (job_pb2.TIER_FAST, True)
        finally:
            await operator.resume_tier(job_pb2.TIER_RELAX, reason=WHY)
        assert await result_of(await ada.imagine("a lighthouse", tier=job_pb2.TIER_RELAX))


async def test_drained_workers_get_nothing_and_one_that_is_resumed_takes_what_waits(
    running: ServiceProcess, people: People
) -> None:
    async with await an_operator(people, running, "otto") as operator, await people.account("ben") as ben:
        workers = await operator.workers()
        assert {worker.state for worker in workers} == {fleet_pb2.WORKER_STATE_IDLE}
        assert (await operator.queues()).gpus == len(workers) == 3
        for worker in workers:
            await operator.drain_worker(worker.name, reason=WHY)
        first, second = [await ben.imagine("a lighthouse", tier=job_pb2.TIER_FAST) for _ in range(2)]
        await until_held(first, job_pb2.QUEUE_REASON_NO_WORKER)
        drained = await operator.workers()
        assert {(worker.state, worker.drain_reason) for worker in drained} == {
            (fleet_pb2.WORKER_STATE_DRAINING, WHY)
        }
        assert "No worker is taking jobs." in (await ben.explain(first.id)).sentences[0]

        await operator.resume_worker(workers[0].name, reason=WHY)
        await until_step(first, 1)
        (busy,) = [worker for worker in await operator.workers() if worker.HasField("active")]
        assert (busy.name, busy.active.job) == (workers[0].name, first.job.name)
        waiting = await ben.explain(second.id)
        assert (waiting.place.position, waiting.ahead.running) == (1, 1)
        assert waiting.ahead.HasField("soonest_end_ms")
        assert waiting.HasField("bound")

        for worker in workers[1:]:
            await operator.resume_worker(worker.name, reason=WHY)
        for job in [await result_of(first), await result_of(second)]:
            assert job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_whoever_watches_a_waiting_job_is_told_when_it_will_start(
    running: ServiceProcess, people: People
) -> None:
    async with await an_operator(people, running, "olaf") as operator, await people.account("eve") as eve:
        others = (await operator.workers())[1:]
        for worker in others:
            await operator.drain_worker(worker.name, reason="so that it waits for long enough")
        handles = [await eve.imagine("a lighthouse", tier=job_pb2.TIER_RELAX) for _ in range(10)]
        try:
            async with asyncio.timeout(60):
                async for update in handles[-1].watch():
                    assert update.event.state != job_pb2.JOB_STATE_RUNNING, "it was never told"
                    if update.queue_status.HasField("start_p50_ms"):
                        assert update.queue_status.start_p50_ms <= update.queue_status.start_p90_ms
                        break
        finally:
            for handle in handles:
                await handle.cancel()
            for worker in others:
                await operator.resume_worker(worker.name, reason=WHY)


async def test_what_a_drained_worker_does_not_finish_in_time_goes_on_elsewhere_where_it_was(
    running: ServiceProcess, people: People
) -> None:
    async with await an_operator(people, running, "odin") as operator, await people.account("zoe") as zoe:
        handle = await zoe.imagine("a lighthouse", tier=job_pb2.TIER_FAST)
        await until_step(handle, 3)
        (busy,) = [worker for worker in await operator.workers() if worker.active.job == handle.job.name]
        try:
            drained = await operator.drain_worker(busy.name, reason=WHY, within=timedelta(0))
            assert drained.HasField("hand_over_time")
            job = await result_of(handle)
        finally:
            await operator.resume_worker(busy.name, reason=WHY)
    assert job.receipt.attempts == 2
    assert job.receipt.worker != busy.name.removeprefix("workers/")
    assert running.said_of("attempt ended", handle.id, times=2)["steps_redone"] == 0
    # 20 steps of 100 ms, each of them once.
    assert 2_000 <= job.receipt.gpu_ms < 2_400
    connection = await asyncpg.connect(running.dsn)
    try:
        losses = "SELECT losses FROM scheduler.job WHERE job_id = $1"
        assert await connection.fetchval(losses, handle.id) == 0
        absorbed = "SELECT sum(absorbed_ms) FROM billing.settlement WHERE job_id = $1"
        assert await connection.fetchval(absorbed, handle.id) < 100, "less than a step was done twice"
    finally:
        await connection.close()
