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


async def test_fast_job_passes_every_waiting_relax_job(people: People, running: ServiceProcess) -> None:
    async with (
        await people.account("ada") as ada,
        await people.account("ben") as ben,
        await people.account("eve") as eve,
    ):
        relax = [*await flood(ben), *await flood(eve)]
        fast = await result_of(await ada.imagine("a red apple", tier=job_pb2.TIER_FAST))
        relax_jobs = await asyncio.gather(*[result_of(handle) for handle in relax])
    accepted_ns = fast.create_time.ToNanoseconds()
    waited = [job for job in relax_jobs if job.start_time.ToNanoseconds() > accepted_ns]
    assert len(waited) > 5, "there was somebody to pass"
    assert await decided_before(running, fast.uid) == 0


async def decided_before(running: ServiceProcess, job_id: str) -> int:
    """Return how many other starts were decided from when the scheduler heard of a job until it started that.

    By the scheduler's own journal: how long it takes to hear of a job says nothing of the order.
    """
    connection = await asyncpg.connect(running.dsn)
    try:
        while True:
            row = await connection.fetchrow(
                """WITH start AS (
                       SELECT at, attempt.job_id::text FROM scheduler.journal
                       JOIN scheduler.attempt ON attempt.attempt_id::text = subject WHERE kind = 'Dispatch'
                   )
                   SELECT count(other) AS others FROM scheduler.journal AS heard
                   JOIN start AS own ON own.job_id = heard.subject
                   LEFT JOIN start AS other ON other.at > heard.at AND other.at < own.at
                   WHERE heard.kind = 'JobSubmitted' AND heard.subject = $1
                   GROUP BY own.at""",
                job_id,
            )
            if row is not None:
                others: int = row["others"]
                return others
            await asyncio.sleep(0.1)
    finally:
        await connection.close()
