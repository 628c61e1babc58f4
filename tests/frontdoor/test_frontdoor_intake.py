"""What intake promises beneath the wire."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from billing.refusals import FastTimeExhausted
from gpu_worker.contract import RenderKind, RenderSpec
from scheduler import intake
from scheduler.clock import to_ms
from scheduler.intake import Accepted, Submission
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.refusals import Impossible
from scheduler.store import endings, jobs
from scheduler.store.jobs import JobKind
from tests.frontdoor.door import Door


async def test_a_job_that_would_take_longer_than_any_may_is_impossible(door: Door) -> None:
    await door.caller("ann")
    assert (await _submit(door, predicted_ms=600_000)).job.predicted_ms == 600_000
    with pytest.raises(Impossible, match="about 600 s of GPU time; at most 600 s") as refused:
        await _submit(door, predicted_ms=600_001)
    assert refused.value.metadata() == {"missing": "gpu_time"}


async def test_of_jobs_that_race_for_the_last_fast_time_only_those_it_covers_are_accepted(door: Door) -> None:
    await door.caller("ann")
    await door.leave("ann", 1_800_000)
    answers = await asyncio.gather(
        *(_submit(door, predicted_ms=600_000) for _ in range(8)), return_exceptions=True
    )
    assert sum(isinstance(answer, Accepted) for answer in answers) == 3
    assert sum(isinstance(answer, FastTimeExhausted) for answer in answers) == 5


async def test_nobody_is_told_of_a_job_that_was_refused(door: Door) -> None:
    await door.caller("ann")
    with pytest.raises(Impossible):
        await _submit(door, predicted_ms=600_001)
    assert door.scheduler.told_jobs == []


async def test_a_job_that_is_given_up_meanwhile_keeps_no_other_from_being_withdrawn(door: Door) -> None:
    ann = await door.caller("ann")
    first, given_up = sorted([(await ann.create()).uid for _ in range(2)])
    await door.sql("INSERT INTO scheduler.leader (epoch) VALUES (1) ON CONFLICT DO NOTHING RETURNING 1")
    epoch = await door.sql("SELECT epoch FROM scheduler.leader")

    async def withdraw() -> list[str]:
        async with door.pool.transaction() as connection:
            return await intake.withdraw_all(connection, "ann", door.clock.now, "Blocked.")

    async with door.pool.transaction() as connection:
        assert await jobs.lock_job(connection, first) is not None
        withdrawing = asyncio.create_task(withdraw())
        async with asyncio.timeout(20):
            while not await door.sql(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock'"
            ):
                assert not withdrawing.done(), withdrawing.result()
        async with door.pool.reading() as scheduler:
            assert await endings.give_up(
                scheduler, epoch=epoch, job_id=given_up, sentence="Lost.", now_ms=to_ms(door.clock.now)
            )
    assert await withdrawing == [first]
    states = "SELECT array_agg(state ORDER BY job_id) FROM scheduler.job"
    assert await door.sql(states) == ["cancelled", "failed"]


async def _submit(door: Door, *, predicted_ms: int) -> Accepted:
    return await intake.submit(
        door.pool,
        door.scheduler,
        door.metrics,
        account_id="ann",
        submission=Submission(
            request_id=str(uuid.uuid4()),
            digest=b"content",
            kind=JobKind.IMAGINE,
            prompt="a fox",
            spec=RenderSpec(
                kind=RenderKind.IMAGINE,
                model="small",
                prompt="a fox",
                width=256,
                height=256,
                steps=20,
                guidance_milli=5_000,
                seed=1,
            ),
            seed_fixed=False,
            tier=Tier.FAST,
            visibility=None,
            predicted_ms=predicted_ms,
            source_job_id=None,
            source_image=None,
            warnings=(),
        ),
        parameters=Parameters(),
        at=door.clock.now,
    )
