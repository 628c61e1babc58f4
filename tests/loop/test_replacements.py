"""Workers of another release are gone on with, and make room for those of this one while jobs go on."""

from __future__ import annotations

from billing import invariants
from scheduler.answers import WorkerView
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.leader import Leader
from scheduler.policy.ids import Tier
from scheduler.workers import LeavesBecause, Leaving, Workers
from tests.loop.conftest import Stage

FIRST, SECOND = "here/gpu-0", "here/gpu-1"
PICTURE_MS = 1_000
A_MINUTE_MS = 60_000
AN_HOUR_MS = 60 * A_MINUTE_MS


async def until_replaced(stage: Stage, leader: Leader, fleet: LocalFleet, *workers: str) -> None:
    """Wait until these workers have made room, in that order, each telling that it has nothing any more."""

    def replaced() -> bool:
        for worker_id in workers[len(fleet.replaced) :]:
            fleet.beat(worker_id)
        return fleet.replaced == list(workers)

    await stage.until(leader, replaced)


async def test_what_runs_at_an_upgrade_goes_on_and_then_its_worker_makes_room(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
    (busy,) = fleet.busy
    idle = SECOND if busy == FIRST else FIRST
    fleet.grow_old()
    async with stage.leading(fleet) as leader:
        # The idle one first; the other is given nothing and goes on with what it has.
        await until_replaced(stage, leader, fleet, idle)
        await stage.until(leader, lambda: busy in leader._loop._desk.workers.closed())
        next_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: idle in fleet.busy)
        assert fleet.replaced == [idle]
        fleet.finish(busy)
        await stage.until_state(leader, job_id, "succeeded")
        await until_replaced(stage, leader, fleet, idle, busy)
        fleet.finish(idle)
        await stage.until_state(leader, next_id, "succeeded")
        last_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        assert not leader._loop._desk.workers.closed(), "all take jobs again"
        fleet.finish(next(iter(fleet.busy)))
        await stage.until_state(leader, last_id, "succeeded")
    assert [len(await stage.attempts(one)) for one in (job_id, next_id, last_id)] == [1, 1, 1]
    assert await invariants.check(stage.connection) == []


async def test_what_a_worker_that_leaves_does_not_finish_in_time_is_handed_over(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
    (busy,) = fleet.busy
    fleet.work(busy, 400)
    idle = SECOND if busy == FIRST else FIRST
    fleet.grow_old()
    async with stage.leading(fleet, drain_within_ms=0) as leader:
        await until_replaced(stage, leader, fleet, idle, busy)
        await stage.until(leader, lambda: fleet.busy)
        (now,) = fleet.busy
        request = fleet.busy[now]
        assert request.checkpoint is not None
        assert request.checkpoint.kept.gpu_ms == 400
        fleet.finish(now)
        await stage.until_state(leader, job_id, "succeeded")
    assert (await stage.job(job_id))["losses"] == 0
    assert await invariants.check(stage.connection) == []


async def test_a_worker_that_leaves_has_its_time_however_long_that_is(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
    (busy,) = fleet.busy
    idle = SECOND if busy == FIRST else FIRST
    fleet.grow_old()
    async with stage.leading(fleet, drain_within_ms=AN_HOUR_MS) as leader:
        await until_replaced(stage, leader, fleet, idle)
        await stage.until(leader, lambda: busy in leader._loop._desk.workers.closed())
        now_ms = leader._loop._desk.clock.now_ms()
        for minutes in (20, 40, 59):
            leader._loop._replacements.go_on(now_ms + minutes * A_MINUTE_MS)
            assert fleet.busy.keys() == {busy}
        leader._loop._replacements.go_on(now_ms + AN_HOUR_MS)
        await stage.until(leader, lambda: fleet.busy.keys() == {idle})


async def test_what_a_machine_that_is_about_to_end_has_goes_on_elsewhere_at_once(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        (ending,) = fleet.busy
        other = SECOND if ending == FIRST else FIRST
        fleet.work(ending, 400)
        fleet.depart(ending)
        await stage.until(leader, lambda: fleet.busy.keys() == {other})
        assert fleet.busy[other].checkpoint is not None
        await until_replaced(stage, leader, fleet, ending)
        await stage.until(leader, lambda: leader.workers == 1)
        fleet.finish(other)
        await stage.until_state(leader, job_id, "succeeded")
    assert (await stage.job(job_id))["losses"] == 0
    assert await invariants.check(stage.connection) == []


async def test_a_worker_that_leaves_shows_since_when_and_why_and_how_far_its_run_is(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        (view,) = leader.workers_view()
        assert (view.leaves_since_ms, view.leaves_because) == (None, "")
        fleet.work(FIRST, 400)
        fleet.beat(FIRST)

        def steps() -> tuple[int, int]:
            (view,) = leader.workers_view()
            return (0, 0) if view.active is None else (view.active.step, view.active.steps)

        whole = fleet.busy[FIRST].spec.steps
        await stage.until(leader, lambda: steps() == (whole * 400 // PICTURE_MS, whole))
    fleet.grow_old()
    async with stage.leading(fleet, drain_within_ms=AN_HOUR_MS) as leader:
        began_ms = leader._loop.desk.clock.now_ms()

        def leaves() -> WorkerView | None:
            (view,) = leader.workers_view()
            return None if view.leaves_since_ms is None else view

        view = await stage.until(leader, leaves)
        assert view.active is not None, "it finishes what it has"
        assert view.leaves_since_ms >= began_ms
        assert view.leaves_because == "It makes room for a worker of the scheduler's release."


def test_why_a_worker_leaves_is_the_first_reason_that_is_final() -> None:
    workers = Workers()
    fleet = LocalFleet(workers=1, take_ms=None)
    report = fleet._report(fleet._stubs[FIRST])
    workers.joined(report, 1)
    assert workers.leaving(FIRST) is None
    workers.spare_slots({FIRST}, 2)
    assert workers.leaving(FIRST) == Leaving(since_ms=2, because=LeavesBecause.NOT_NEEDED)
    workers.spare_slots((), 3)
    assert workers.leaving(FIRST) is None, "it is wanted again"
    ends = Leaving(since_ms=4, because=LeavesBecause.MACHINE_ENDS)
    workers.leaves(FIRST, ends)
    workers.spare_slots({FIRST}, 5)
    assert workers.leaving(FIRST) == ends
    workers.joined(report, 6)
    assert workers.leaving(FIRST) == Leaving(since_ms=5, because=LeavesBecause.NOT_NEEDED), "another life"


async def test_a_tenth_of_a_fleet_leaves_at_once_and_the_next_when_their_successors_have_come(
    stage: Stage,
) -> None:
    fleet = LocalFleet(workers=35, take_ms=None, gpu_ms=PICTURE_MS)
    fleet.grow_old()
    async with stage.leading(fleet) as leader:
        fleet.stays_away = True
        await stage.until(leader, lambda: len(fleet.replaced) == 3)
        gone = set(fleet.replaced)
        closed = leader._loop._desk.workers.closed()
        # However much later, there is still only this tenth that does not come back.
        leader._loop._replacements.go_on(leader._loop._desk.clock.now_ms() + 24 * AN_HOUR_MS)
        await stage.open_account("ada")
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        assert (set(fleet.replaced), set(closed)) == (gone, set())
        (drew,) = fleet.busy
        fleet.finish(drew)
        await stage.until_state(leader, job_id, "succeeded")
        fleet.beat(drew)
        # One is not waited for any more, since its GPU has left too.
        fleet.remove(gone.pop())
        await stage.until(leader, lambda: len(fleet.replaced) == 4)
        gone.update(fleet.replaced[3:])
        fleet.stays_away = False
        for worker_id in gone:
            fleet.speak_again(worker_id)
        await stage.until(leader, lambda: len(fleet.replaced) == 35)
    assert sorted(fleet.replaced) == sorted(f"here/gpu-{index}" for index in range(35))
