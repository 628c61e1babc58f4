"""An attempt that is claimed again long after it was settled, and what the scheduler looks for by itself."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from gpu_worker.contract import AttemptResult, Outcome, StageTimes
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.settlement import end_of
from scheduler.store import endings, live, past_jobs
from tests.loop.conftest import Stage, a_started_attempt


async def test_an_attempt_of_a_past_job_is_settled_as_it_was(stage: Stage) -> None:
    await stage.open_account("ada")
    lead, planned = await a_started_attempt(stage, await stage.submit("ada", Tier.FAST))
    end = end_of(
        AttemptResult(
            attempt_id=planned.attempt_id,
            incarnation="first",
            job_id=planned.job_id,
            token=planned.token,
            outcome=Outcome.SUCCEEDED,
            times=StageTimes(denoise_ms=100),
        ),
        device="gpu-a",
        speed_permille=1_000,
        memory_bytes=24 * 2**30,
    )

    async def settled(claimed: endings.AttemptEnd) -> endings.Settled | endings.Unknown:
        (one,) = await endings.settle_attempts(
            stage.connection,
            epoch=lead.epoch,
            ends=[claimed],
            parameters=Parameters(),
            now_ms=lead.now_ms,
        )
        return one

    first = await settled(end)
    async with stage.connection.transaction():
        now = datetime.now(UTC) + timedelta(minutes=1)
        await past_jobs.make_months(stage.connection, ended_from=None, until=now)
        assert await past_jobs.move(stage.connection, ended_before=now, ended_from=None, limit=10)
    again = await settled(end)
    assert isinstance(first, endings.Settled)
    assert isinstance(again, endings.Settled)
    assert (again.job_id, again.job_state, again.gpu_ms) == (first.job_id, "succeeded", first.gpu_ms)
    assert isinstance(await settled(replace(end, token=str(uuid4()))), endings.Unknown)


@pytest.mark.parametrize("seconds_ago", [1, 30])
async def test_a_job_that_nobody_told_of_is_found_at_once_or_within_a_minute(
    stage: Stage, seconds_ago: int
) -> None:
    await stage.open_account("ada")
    waiting = await stage.submit("ada")
    await stage.connection.execute(
        "UPDATE scheduler.job SET created_at = now() - $1::interval", timedelta(seconds=seconds_ago)
    )
    found = [waiting] if seconds_ago == 1 else []
    assert await live.unheeded(stage.connection, most=10, everywhere=False) == found
    assert await live.unheeded(stage.connection, most=10, everywhere=True) == [waiting]
    await stage.connection.execute(
        "UPDATE scheduler.job SET noticed_epoch = 1 WHERE job_id = $1", UUID(waiting)
    )
    assert await live.unheeded(stage.connection, most=10, everywhere=True) == []


async def test_a_cancelled_job_that_nobody_told_of_is_found_however_old_it_is(stage: Stage) -> None:
    await stage.open_account("ada")
    waiting = await stage.submit("ada")
    await stage.connection.execute("UPDATE scheduler.job SET created_at = '2026-01-01', noticed_epoch = 1")
    await stage.cancel("ada", waiting)
    assert await live.unheeded(stage.connection, most=10, everywhere=False) == [waiting]
