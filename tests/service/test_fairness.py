"""Who gets the GPUs, over a real Ray with stub engines."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from scheduler.client.aio import DarkroomClient, JobHandle
from scheduler.v1 import job_pb2
from tests.service.people import People, result_of
from tests.service.process import ServiceProcess

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

EACH = 9


async def flood(client: DarkroomClient) -> list[JobHandle]:
    """Send relax jobs up to the limit of accepted ones."""
    return [await client.imagine(f"a fox {number}", tier=job_pb2.TIER_RELAX) for number in range(EACH)]


async def test_two_accounts_that_flood_relax_share_it_evenly(people: People) -> None:
    async with await people.account("ada") as ada, await people.account("ben") as ben:
        handles = {"ada": await flood(ada), "ben": await flood(ben)}
        jobs = [
            (job.start_time.ToNanoseconds(), name)
            for name, sent in handles.items()
            for job in await asyncio.gather(*[result_of(handle) for handle in sent])
        ]
    started = [name for _, name in sorted(jobs)]
    # Ben's flood begins when Ada's has the GPUs already; from there on neither is ever far ahead.
    behind = [started[:number].count("ada") - started[:number].count("ben") for number in range(1, 2 * EACH)]
    assert max(map(abs, behind)) <= 3, started


async def test_a_gpu_has_the_next_job_before_the_one_before_it_is_settled(
    people: People, running: ServiceProcess
) -> None:
    async with await people.account("ada") as ada, await people.account("ben") as ben:
        handles = [*await flood(ada), *await flood(ben)]
        await asyncio.gather(*[result_of(handle) for handle in handles])
    connection = await asyncpg.connect(running.dsn)
    try:
        passed_on = await connection.fetchval(
            """SELECT count(*) FROM scheduler.attempt JOIN scheduler.attempt following USING (worker_id)
               WHERE attempt.job_id = ANY($1::uuid[]) AND attempt.drawn_at <= following.started_at
                     AND following.started_at < attempt.ended_at""",
            [handle.job.name.rsplit("/", 1)[1] for handle in handles],
        )
    finally:
        await connection.close()
    assert passed_on > 0


async def test_fast_job_passes_every_waiting_relax_job(people: People) -> None:
    async with (
        await people.account("ada") as ada,
        await people.account("ben") as ben,
        await people.account("eve") as eve,
    ):
        relax = [*await flood(ben), *await flood(eve)]
        fast = await result_of(await ada.imagine("a red apple", tier=job_pb2.TIER_FAST))
        relax_jobs = await asyncio.gather(*[result_of(handle) for handle in relax])
    accepted_ns, started_ns = fast.create_time.ToNanoseconds(), fast.start_time.ToNanoseconds()
    waited = [job for job in relax_jobs if job.start_time.ToNanoseconds() > accepted_ns]
    before_it = [job for job in waited if job.start_time.ToNanoseconds() < started_ns]
    assert len(waited) > 5, "there was somebody to pass"
    # A start that was being committed while the fast job was accepted is no longer waiting.
    assert len(before_it) <= 1
