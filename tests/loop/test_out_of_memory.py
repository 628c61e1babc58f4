"""A job that runs out of a GPU's memory is tried on larger ones only, and fails where there is none."""

from __future__ import annotations

import json

from billing import invariants
from gpu_worker.contract import Blame, Outcome
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import Tier
from tests.loop.conftest import Stage

GIB = 2**30
SMALL, ITS_LIKE, LARGE = "here/gpu-0", "here/gpu-1", "here/gpu-2"


def a_fleet(*gib: int) -> LocalFleet:
    return LocalFleet(workers=len(gib), take_ms=None, gpu_ms=500, memory_bytes=[one * GIB for one in gib])


def run_out(fleet: LocalFleet, worker_id: str) -> None:
    fleet.finish(
        worker_id,
        outcome=Outcome.FAILED,
        blame=Blame.PLATFORM,
        reason="OUT_OF_MEMORY",
        sentence="Too little.",
    )


async def where(stage: Stage, job_id: str) -> list[str]:
    return [attempt["worker_id"] for attempt in await stage.attempts(job_id)]


async def test_it_goes_on_to_a_larger_worker_past_one_that_is_its_like(stage: Stage) -> None:
    fleet = a_fleet(24, 24, 80)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, job_id, 1)
        run_out(fleet, SMALL)
        await stage.until_attempts(leader, job_id, 2)
        assert fleet.busy[LARGE].after_loss
        fleet.finish(LARGE)
        job = await stage.until_state(leader, job_id, "succeeded")
    assert await where(stage, job_id) == [SMALL, LARGE]
    assert (job["losses"], job["memory_above_bytes"]) == (0, 24 * GIB)
    assert json.loads(job["receipt"])["billed_gpu_ms"] == 500
    assert await invariants.check(stage.connection) == []


async def test_it_fails_at_once_where_no_worker_is_larger_and_says_how_much_there_was(stage: Stage) -> None:
    fleet = a_fleet(24, 24)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, job_id, 1)
        run_out(fleet, SMALL)
        job = await stage.until_state(leader, job_id, "failed")
        next_one = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, next_one, 1)
    assert job["failure_reason"] == "OUT_OF_MEMORY"
    assert "24.0 GiB" in job["failure_sentence"]
    assert await where(stage, job_id) == [SMALL]
    assert json.loads(job["receipt"])["billed_gpu_ms"] == 0


async def test_it_climbs_until_it_has_met_the_largest(stage: Stage) -> None:
    fleet = a_fleet(12, 16, 24, 48, 80)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada")
        for number in range(5):
            await stage.until_attempts(leader, job_id, number + 1)
            run_out(fleet, f"here/gpu-{number}")
        job = await stage.until_state(leader, job_id, "failed")
    assert "80.0 GiB" in job["failure_sentence"]
    assert len(await where(stage, job_id)) == 5


async def test_a_restarted_scheduler_knows_what_was_too_little(stage: Stage) -> None:
    fleet = a_fleet(24, 80)
    await stage.open_account("ada")
    await stage.open_account("ben")
    async with stage.leading(fleet) as leader:
        first = await stage.submit("ben", Tier.FAST)
        await stage.until_attempts(leader, first, 1)
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, job_id, 1)
        (on_large,) = await where(stage, job_id)
        assert on_large == ITS_LIKE
        run_out(fleet, SMALL)
        await stage.until_attempts(leader, first, 1)
        await stage.until_state(leader, first, "queued")
    async with stage.leading(fleet) as leader:
        await stage.until_waits(leader, first, "waiting_for_gpu")
        later = await stage.submit("ben", Tier.FAST)
        await stage.until_attempts(leader, later, 1)
        fleet.finish(ITS_LIKE)
        await stage.until_attempts(leader, first, 2)
        assert await where(stage, first) == [SMALL, ITS_LIKE]
        assert await where(stage, later) == [SMALL]


async def test_who_ran_out_while_nobody_led_is_judged_by_the_whole_fleet(stage: Stage) -> None:
    fleet = a_fleet(24, 24, 80)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, job_id, 1)
    run_out(fleet, SMALL)
    async with stage.leading(fleet) as leader:
        fleet.beat(SMALL)
        await stage.until_attempts(leader, job_id, 2)
    assert await where(stage, job_id) == [SMALL, LARGE]
