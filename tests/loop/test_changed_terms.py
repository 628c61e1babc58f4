"""What admins and owners change counts for a scheduler that runs, within a second."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from billing import plan_changes, plans
from billing.plans import EffectiveFrom, PlanFields, PlanLimits
from scheduler import intake
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.leader import Leader
from scheduler.policy.ids import Tier
from scheduler.store import accounts, deletions
from tests.loop.conftest import Stage


async def change_plan_version(stage: Stage, plan: str, **fields: object) -> Sequence[str]:
    """Make a version of a plan that counts at once, as UpdatePlan does; return whom it tells of."""
    async with stage.pool.transaction() as connection:
        current = await plans.newest(connection, plan)
        changed: PlanFields = replace(current, **fields)  # type: ignore[arg-type]
        await plans.update(
            connection,
            changed,
            etag=current.etag,
            effective_from=EffectiveFrom.NOW,
            actor="test",
            reason="a test",
            request_id=str(uuid.uuid4()),
            at=datetime.now(UTC),
        )
        return await accounts.accounts_known_to_scheduler(connection)


async def a_poor_job(stage: Stage, leader: Leader, fleet: LocalFleet) -> str:
    """Return a job of ben's, on the plan basic, that waits for funds while a GPU is free."""
    await stage.open_account("ada")
    await stage.open_account("ben", plan="basic")
    first = await stage.submit("ada", Tier.FAST)
    await stage.until_state(leader, first, "running")
    poor = await stage.submit("ben", Tier.FAST)
    await stage.adjust_balance("ben", -12_000_000)
    fleet.finish("here/gpu-0")
    await stage.until_waits(leader, poor, "funds")
    return poor


async def test_a_higher_limit_lets_one_more_job_run_within_a_second(stage: Stage) -> None:
    await stage.open_account("ada")
    async with stage.leading(LocalFleet(workers=4, take_ms=None, gpu_ms=500)) as leader:
        jobs = [await stage.submit("ada", Tier.FAST) for _ in range(4)]
        for job_id in jobs[:3]:
            await stage.until_state(leader, job_id, "running")
        assert (await stage.job(jobs[3]))["state"] == "queued"
        limits = PlanLimits(running=4, relax_running=2, accepted=10)
        known = await change_plan_version(stage, "standard", limits=limits)
        async with asyncio.timeout(1):
            leader.accounts_changed(known)
            await stage.until_state(leader, jobs[3], "running")


async def test_a_higher_quota_lets_a_job_that_lacked_time_run_within_a_second(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    async with stage.leading(fleet) as leader:
        poor = await a_poor_job(stage, leader, fleet)
        known = await change_plan_version(stage, "basic", quota_ms=13_000_000)
        assert "ben" in known
        async with asyncio.timeout(1):
            leader.accounts_changed(known)
            await stage.until_state(leader, poor, "running")


async def test_another_plan_lets_a_job_that_lacked_time_run_within_a_second(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    async with stage.leading(fleet) as leader:
        poor = await a_poor_job(stage, leader, fleet)
        async with stage.pool.transaction() as connection:
            await plan_changes.change(
                connection,
                "ben",
                "standard",
                etag="",
                actor="test",
                reason="a test",
                request_id=str(uuid.uuid4()),
                at=datetime.now(UTC),
            )
        async with asyncio.timeout(1):
            leader.accounts_changed(["ben"])
            await stage.until_state(leader, poor, "running")


async def test_an_account_is_erased_under_a_scheduler_that_has_its_jobs(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    await stage.open_account("zoe")
    async with stage.leading(fleet) as leader:
        running = await stage.submit("zoe", Tier.FAST)
        await stage.until_state(leader, running, "running")
        waiting = await stage.submit("zoe", Tier.RELAX)
        later = datetime.now(UTC) + timedelta(seconds=1)
        async with stage.pool.transaction() as connection:
            cancelled = await intake.withdraw_all(connection, "zoe", later, "Erased.")
            await accounts.forget(connection, "zoe")
        assert set(cancelled) == {running, waiting}
        leader.jobs_changed(cancelled)
        await stage.until_state(leader, running, "cancelled")

        async def erased() -> str | None:
            async with stage.pool.transaction() as connection:
                await deletions.delete_ended_jobs(connection, "zoe", limit=10)
                return await deletions.erase_if_at_rest(connection, "zoe", later)

        pseudonym = await stage.until(leader, erased)
        assert (await stage.job(running))["account_id"] == pseudonym
        leader.accounts_changed(["zoe"])  # as a notice that comes late
        of_another = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, of_another, "running")
        fleet.finish("here/gpu-0")
        await stage.until_state(leader, of_another, "succeeded")
