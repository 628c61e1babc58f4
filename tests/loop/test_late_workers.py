"""A worker that a new leader does not hear at once holds up nobody, and is not given up at once either."""

from __future__ import annotations

from billing import invariants
from gpu_worker.contract import Blame, Outcome
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import Tier
from tests.loop.conftest import Stage

FIRST, SECOND = "here/gpu-0", "here/gpu-1"
GIB = 1 << 30


async def begun(stage: Stage, fleet: LocalFleet) -> tuple[str, str, str]:
    """Let a scheduler start a job and die; returns the job, its worker, which is late now, and the other."""
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, job_id, 1)
    (busy,) = fleet.busy
    fleet.late = {busy}
    return job_id, busy, SECOND if busy == FIRST else FIRST


async def test_a_worker_that_answers_late_goes_on_with_what_it_has(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None)
    job_id, late, other = await begun(stage, fleet)
    async with stage.leading(fleet) as leader:
        next_id = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, next_id, 1)
        assert fleet.busy.keys() == {late, other}, "what can start need not wait for it"
        assert (await leader.updates.after(0, 0)).abilities is None, "it may be able to do more"
        fleet.speak_again(late)
        await stage.until(leader, lambda: leader.workers == 2)
        assert (await leader.updates.after(0, 0)).abilities is not None
        for worker_id, ended in ((late, job_id), (other, next_id)):
            fleet.finish(worker_id)
            await stage.until_state(leader, ended, "succeeded")
    assert len(fleet.rendered) == 2
    assert len(await stage.attempts(job_id)) == 1
    assert await invariants.check(stage.connection) == []


async def test_what_a_worker_had_that_never_answers_is_lost(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None)
    job_id, late, other = await begun(stage, fleet)
    async with stage.leading(fleet) as leader:
        next_id = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, next_id, 1)
        fleet.finish(other)
        await stage.until_state(leader, next_id, "succeeded")
        assert [one["state"] for one in await stage.attempts(job_id)] == ["running"]
        fleet.fall_silent(late)
        await stage.until_attempts(leader, job_id, 2)
        fleet.finish(other)
        await stage.until_state(leader, job_id, "succeeded")
    assert (await stage.job(job_id))["losses"] == 1
    assert await invariants.check(stage.connection) == []


async def test_a_worker_that_answers_late_is_given_what_it_never_got(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None)
    job_id, late, _ = await begun(stage, fleet)
    fleet.never_got(late)
    async with stage.leading(fleet) as leader:
        fleet.speak_again(late)
        await stage.until(leader, lambda: late in fleet.busy)
        fleet.finish(late)
        await stage.until_state(leader, job_id, "succeeded")
    assert len(await stage.attempts(job_id)) == 1


async def test_a_worker_that_was_restarted_before_it_answered_has_lost_what_it_had(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    job_id, late, _ = await begun(stage, fleet)
    async with stage.leading(fleet) as leader:
        fleet.kill(late)
        await stage.until_attempts(leader, job_id, 2)
    assert (await stage.job(job_id))["losses"] == 1


async def test_no_job_is_too_large_while_the_largest_worker_is_awaited(stage: Stage) -> None:
    large = "here/gpu-2"
    fleet = LocalFleet(workers=3, take_ms=None, memory_bytes=[24 * GIB, 24 * GIB, 80 * GIB])
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, job_id, 1)
    (small,) = fleet.busy
    fleet.finish(small, outcome=Outcome.FAILED, blame=Blame.PLATFORM, reason="OUT_OF_MEMORY")
    fleet.late = {large}
    async with stage.leading(fleet) as leader:
        fleet.beat(small)
        other = await stage.submit("ada", Tier.FAST)
        await stage.until_attempts(leader, other, 1)
        fleet.speak_again(large)
        await stage.until(leader, lambda: leader.workers == 3)
        fleet.beat(small)
        await stage.until_attempts(leader, job_id, 2)
    assert fleet.busy[large].job_id == job_id
