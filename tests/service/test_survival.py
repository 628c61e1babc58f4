"""What is killed, and what its owner sees of it: nothing accepted is lost, nothing is billed twice.

Real processes under a real Ray, killed with SIGKILL.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import asyncpg
import pytest

from scheduler.client.aio import DarkroomClient
from scheduler.v1 import job_pb2
from tests.service.people import People, assert_ledger_closes, result_of, until_step
from tests.service.process import ServiceProcess, service

# Two of these start a service twice, and a start may take a busy machine two minutes.
pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(480)]


async def attempts_of(dsn: str, job_id: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(
            "SELECT * FROM scheduler.attempt WHERE job_id = $1 ORDER BY number", job_id
        )
    finally:
        await connection.close()


async def losses_of(dsn: str, job_id: str) -> tuple[int, int]:
    """Return what counts against a job, and against all workers."""
    connection = await asyncpg.connect(dsn)
    try:
        of_job = await connection.fetchval("SELECT losses FROM scheduler.job WHERE job_id = $1", job_id)
        of_slots = "SELECT coalesce(sum(losses_in_row), 0)::integer FROM scheduler.worker_slot"
        return of_job, await connection.fetchval(of_slots)
    finally:
        await connection.close()


async def test_job_of_a_killed_worker_succeeds_on_another_and_is_billed_once(
    people: People, running: ServiceProcess
) -> None:
    async with await people.account("ada") as ada:
        before_ms = (await ada.balance()).available_ms
        handle = await ada.imagine("a lighthouse", tier=job_pb2.TIER_FAST)
        await until_step(handle, 3)
        (first,) = await attempts_of(running.dsn, handle.id)
        running.kill_worker(first["worker_id"])
        job = await result_of(handle)
        lost, succeeded = await attempts_of(running.dsn, handle.id)
        assert (lost["state"], succeeded["state"]) == ("lost", "succeeded")
        assert succeeded["worker_id"] != lost["worker_id"]
        assert job.receipt.attempts == 2
        assert len(job.images) == 4
        assert before_ms - (await ada.balance()).available_ms == job.receipt.billed_gpu_ms > 0
    await assert_ledger_closes(running.dsn)


async def test_killed_scheduler_loses_nothing_and_adopts_what_runs(
    people: People, running: ServiceProcess
) -> None:
    async with await people.account("ada") as ada, await people.account("ben") as ben:
        runs = await ada.imagine("a lighthouse", tier=job_pb2.TIER_FAST)
        await until_step(runs, 3)
        waits = [await ben.imagine(f"a fox {number}", tier=job_pb2.TIER_RELAX) for number in range(4)]
        running.kill_scheduler()
        # Nobody leads now, and jobs are accepted all the same.
        unseen = await ada.imagine("a harbour", tier=job_pb2.TIER_FAST)
        for handle in (runs, unseen, *waits):
            job = await result_of(handle)
            assert job.receipt.attempts == 1, "it was adopted, or waited; nothing was run again"
    await assert_ledger_closes(running.dsn)


async def test_scheduler_that_was_deposed_leaves_its_name_to_whoever_has_it_now(
    people: People, running: ServiceProcess
) -> None:
    # As a node that was taken for dead and woke up: another process of the same actor leads by then.
    connection = await asyncpg.connect(running.dsn)
    await connection.execute("UPDATE scheduler.leader SET epoch = epoch + 1")
    async with await people.account("ada") as ada:
        await result_of(await ada.imagine("a lighthouse", tier=job_pb2.TIER_FAST))
    assert running.said.count('"event": "deposed"') > 0
    await connection.close()
    await assert_ledger_closes(running.dsn)


async def test_waiting_jobs_continue_when_the_whole_service_was_killed(data_dir: Path) -> None:
    # The first job would take ten seconds: it is not over before the service is killed.
    with service(data_dir, gpus=1, timed_step_ms=500) as first:
        people = People(first.address, first.admin_key)
        key = await people.key("ada")
        async with DarkroomClient(first.address, key) as ada:
            handles = [await ada.imagine(f"a fox {number}", tier=job_pb2.TIER_FAST) for number in range(3)]
            await until_step(handles[0], 3)
        first.kill()
    with service(data_dir, gpus=1, timed_step_ms=0) as second:
        async with DarkroomClient(second.address, key) as ada:
            for handle in handles:
                job = await result_of(await ada.handle(handle.id))
                assert job.state == job_pb2.JOB_STATE_SUCCEEDED
            used_ms = sum([(await ada.get(handle.id)).receipt.billed_gpu_ms for handle in handles])
            assert (await ada.balance()).used_ms == used_ms
        await assert_ledger_closes(second.dsn)


async def test_service_that_was_stopped_in_good_order_continues_where_it_was(data_dir: Path) -> None:
    with service(data_dir, gpus=1, timed_step_ms=100) as first:
        people = People(first.address, first.admin_key)
        key = await people.key("ada")
        async with DarkroomClient(first.address, key) as ada:
            handles = [await ada.imagine(f"a fox {number}", tier=job_pb2.TIER_RELAX) for number in range(3)]
            await until_step(handles[0], 3)
    with service(data_dir, gpus=1, timed_step_ms=100) as second:
        async with DarkroomClient(second.address, key) as ada:
            await asyncio.gather(*[result_of(await ada.handle(handle.id)) for handle in handles])
        stopped, resumed = await attempts_of(second.dsn, handles[0].id)
        assert (stopped["state"], resumed["state"]) == ("lost", "succeeded")
        assert json.loads(resumed["decision"])["resumes_at_step"] >= 3
        assert resumed["kept_ms"] >= 300, "each of those steps took 100 ms"
        assert await losses_of(second.dsn, handles[0].id) == (0, 0), "it is nobody's fault to be stopped"
        await assert_ledger_closes(second.dsn)
