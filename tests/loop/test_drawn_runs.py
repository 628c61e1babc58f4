"""A worker that needs its GPU for a run no more gets the next, and the run ends as if it had been alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from billing import invariants, ledger
from gpu_worker.contract import Blame, Outcome
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.leader import Leader
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.store import dispatch, leadership
from scheduler.store.parking import DrawnAttempt
from tests.loop.conftest import Stage, a_planned_attempt

WORKER = "here/gpu-0"
PICTURE_MS = 1_000


async def begun(stage: Stage, leader: Leader, fleet: LocalFleet, job_id: str) -> None:
    """Wait until a job has the only GPU."""
    await stage.until(leader, lambda: WORKER in fleet.busy and fleet.busy[WORKER].job_id == job_id)


async def two_in_hand(
    stage: Stage, leader: Leader, fleet: LocalFleet, tier: Tier = Tier.RELAX
) -> tuple[str, str]:
    """Have Ben's relax job drawn and Ada's on the only GPU."""
    for name in ("ada", "ben"):
        await stage.open_account(name)
    before = await stage.submit("ben")
    await begun(stage, leader, fleet, before)
    fleet.draw(WORKER)
    after = await stage.submit("ada", tier)
    await begun(stage, leader, fleet, after)
    return before, after


async def attempt_id(stage: Stage, job_id: str) -> str:
    (attempt,) = await stage.attempts(job_id)
    return str(attempt["attempt_id"])


async def test_the_next_job_begins_while_the_one_before_it_is_stored(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        before, after = await two_in_hand(stage, leader, fleet)
        (drawn,), (active,) = await stage.attempts(before), await stage.attempts(after)
        assert (drawn["state"], active["state"]) == ("running", "running")
        assert (drawn["drawn_at"] is None, active["drawn_at"] is None) == (False, True)
        (view,) = leader.workers_view()
        assert view.active is not None
        assert (view.active.job_id, view.parked) == (after, ())
        fleet.finish(WORKER, attempt_id=str(drawn["attempt_id"]))
        await stage.until_state(leader, before, "succeeded")
        assert (await stage.job(after))["state"] == "running"
        fleet.finish(WORKER)
        await stage.until_state(leader, after, "succeeded")
    assert await invariants.check(stage.connection) == []


async def test_a_fast_job_parks_nobody_where_the_run_is_drawn(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        before, after = await two_in_hand(stage, leader, fleet, Tier.FAST)
        assert fleet.busy[WORKER].parks is None
        assert (await stage.attempts(before))[0]["parks"] == 0
        # The one that ends first need not be the one that began first.
        fleet.finish(WORKER)
        await stage.until_state(leader, after, "succeeded")
        fleet.finish(WORKER, attempt_id=await attempt_id(stage, before))
        await stage.until_state(leader, before, "succeeded")
    async with stage.pool.transaction() as connection:
        assert (await ledger.balance(connection, "ada", datetime.now(UTC))).used_ms == PICTURE_MS
    assert await invariants.check(stage.connection) == []


async def test_a_drawn_job_counts_for_its_account_until_it_is_settled(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        await stage.open_account("ada")
        first, second, third = [await stage.submit("ada") for _ in range(3)]
        await begun(stage, leader, fleet, first)
        fleet.draw(WORKER)
        await begun(stage, leader, fleet, second)
        fleet.draw(WORKER)
        await stage.until(leader, lambda: leader.workers_view()[0].active is None)
        assert (await stage.job(third))["state"] == "queued"
        fleet.finish(WORKER, attempt_id=await attempt_id(stage, first))
        await begun(stage, leader, fleet, third)


async def test_a_result_in_good_order_frees_the_gpu_before_it_is_settled(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        before = await stage.submit("ben")
        await begun(stage, leader, fleet, before)
        async with stage.connection.transaction():
            await stage.connection.execute(
                "SELECT FROM billing.subscription WHERE account_id = 'ben' FOR UPDATE"
            )
            fleet.finish(WORKER)
            await stage.until_blocked()
            after = await stage.submit("ada")
            await begun(stage, leader, fleet, after)
            assert (await stage.job(before))["state"] == "running"
        await stage.until_state(leader, before, "succeeded")


async def test_a_new_leader_adopts_a_drawn_run_beside_the_one_that_has_the_gpu(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        before, after = await two_in_hand(stage, leader, fleet)
    async with stage.leading(fleet) as leader:
        fleet.finish(WORKER, attempt_id=await attempt_id(stage, before))
        await stage.until_state(leader, before, "succeeded")
        fleet.finish(WORKER)
        await stage.until_state(leader, after, "succeeded")
    assert len(fleet.rendered) == 2, "nothing was drawn twice"
    assert await invariants.check(stage.connection) == []


async def test_a_new_leader_hears_of_a_drawn_run_that_no_row_tells_of(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        before = await stage.submit("ben")
        await begun(stage, leader, fleet, before)
    fleet.draw(WORKER)
    assert (await stage.attempts(before))[0]["drawn_at"] is None
    async with stage.leading(fleet) as leader:
        await begun(stage, leader, fleet, await stage.submit("ada"))
        fleet.finish(WORKER, attempt_id=await attempt_id(stage, before))
        await stage.until_state(leader, before, "succeeded")


async def test_a_drawn_run_that_its_worker_has_no_more_is_drawn_again_when_the_gpu_is_free(
    stage: Stage,
) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        before, after = await two_in_hand(stage, leader, fleet)
    fleet.tell_to(lambda fact: None)
    fleet.forget(WORKER, await attempt_id(stage, before))
    async with stage.leading(fleet) as leader:
        await stage.until_state(leader, before, "queued")
        assert fleet.busy[WORKER].job_id == after
        fleet.finish(WORKER)
        await begun(stage, leader, fleet, before)


async def test_a_dead_worker_loses_what_it_drew_and_what_it_had_drawn(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        jobs = await two_in_hand(stage, leader, fleet)
        fleet.kill(WORKER)
        for _ in jobs:
            await stage.until(leader, lambda: fleet.busy)
            job_id = fleet.busy[WORKER].job_id
            fleet.finish(WORKER)
            await stage.until_state(leader, job_id, "succeeded")
        for job_id in jobs:
            lost, succeeded = await stage.attempts(job_id)
            assert (lost["state"], succeeded["state"]) == ("lost", "succeeded")
            assert (await stage.job(job_id))["losses"] == 1
    drawn = (await stage.attempts(jobs[0]))[0]
    absorbed_ms = await stage.connection.fetchval(
        "SELECT sum(absorbed_ms) FROM billing.settlement WHERE job_id = $1", jobs[0]
    )
    held_ms = (drawn["drawn_at"] - drawn["started_at"]) // timedelta(milliseconds=1)
    assert absorbed_ms == held_ms, "what the GPU did since was the other's"
    assert await invariants.check(stage.connection) == []


async def test_a_drawn_run_whose_pictures_cannot_be_stored_is_tried_again(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        before, after = await two_in_hand(stage, leader, fleet)
        fleet.finish(
            WORKER,
            attempt_id=await attempt_id(stage, before),
            outcome=Outcome.FAILED,
            blame=Blame.PLATFORM,
            reason="ARTIFACTS_UNAVAILABLE",
        )
        await stage.until_state(leader, before, "queued")
        assert fleet.busy[WORKER].job_id == after
        fleet.finish(WORKER)
        await begun(stage, leader, fleet, before)
        fleet.finish(WORKER)
        await stage.until_state(leader, before, "succeeded")
    assert await invariants.check(stage.connection) == []


async def test_the_database_lets_a_worker_draw_one_attempt_beside_those_that_are_drawn(stage: Stage) -> None:
    await stage.open_account("ada")
    first, second = [await stage.submit("ada", Tier.RELAX) for _ in range(2)]
    taken = await leadership.take_lead(stage.connection, "test")
    before = a_planned_attempt(first, taken.now_ms, tier=Tier.RELAX)
    after = a_planned_attempt(second, taken.now_ms, tier=Tier.RELAX)

    async def start(planned: dispatch.PlannedAttempt, *drawn: DrawnAttempt) -> dispatch.StartOutcome:
        return await dispatch.start_attempts(
            stage.connection,
            epoch=taken.epoch,
            planned=[planned],
            drawn=drawn,
            tags=[],
            running=[],
            parameters=Parameters(),
            now_ms=taken.now_ms,
            again=False,
        )

    assert len((await start(before)).started) == 1
    with pytest.raises(asyncpg.UniqueViolationError, match="attempt_one_per_worker"):
        await start(after)
    drawn = DrawnAttempt(attempt_id=before.attempt_id, at_ms=taken.now_ms)
    assert len((await start(after, drawn)).started) == 1
