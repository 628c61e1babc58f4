"""Who gets the GPUs, over a real Ray with stub engines."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.client.aio import DarkroomClient, JobHandle
from scheduler.v1 import job_pb2
from tests.service.people import People, result_of, until_step

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


async def test_fast_job_passes_every_waiting_relax_job(people: People) -> None:
    async with (
        await people.account("ada") as ada,
        await people.account("ben") as ben,
        await people.account("eve") as eve,
    ):
        relax = [*await flood(ben), *await flood(eve)]
        await until_step(relax[0], 1)
        fast = await ada.imagine("a red apple", tier=job_pb2.TIER_FAST)
        fast_job = await result_of(fast)
        relax_jobs = await asyncio.gather(*[result_of(handle) for handle in relax])
        passed = [
            job for job in relax_jobs if job.start_time.ToNanoseconds() > fast_job.start_time.ToNanoseconds()
        ]
        # Three GPUs were busy when it came; everything else that was waiting started after it.
        assert len(passed) >= len(relax) - 4
