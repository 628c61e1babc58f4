"""A fleet that follows its work: what is not needed is emptied and ends, and nothing is lost by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from billing import invariants
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.leader import Leader
from scheduler.metrics import WorkerState
from scheduler.policy.fleet_size import Bounds
from scheduler.policy.ids import Tier
from tests.loop.conftest import Stage

PICTURE_MS = 1_000
AN_HOUR_MS = 3_600_000
AT_ONCE = Bounds(at_least=1, at_most=3, shrinks_after_ms=0)


def spare(fleet: LocalFleet) -> set[str]:
    return {worker_id.partition("/")[0] for worker_id in fleet.spare}


def states_of(leader: Leader) -> Mapping[WorkerState, int]:
    return leader._loop._roster.states(leader._loop.desk.clock.now_ms())


def cycles(leader: Leader) -> float:
    return leader.metrics.registry.get_sample_value("darkroom_scheduler_cycle_seconds_count") or 0


async def until_ended(stage: Stage, leader: Leader, fleet: LocalFleet, *workers: str) -> None:
    """Wait until these workers have ended, each telling that it has nothing any more."""

    def ended() -> bool:
        for worker_id in set(workers) - set(fleet.replaced):
            fleet.beat(worker_id)
        return set(fleet.replaced) >= set(workers)

    await stage.until(leader, ended)


async def test_workers_beyond_what_is_wanted_end_and_come_back_when_work_waits(stage: Stage) -> None:
    fleet = LocalFleet(workers=3, take_ms=None, gpu_ms=PICTURE_MS, per_machine=1)
    await stage.open_account("ada")
    async with stage.leading(fleet, scaling=AT_ONCE) as leader:
        await until_ended(stage, leader, fleet, "here-0/gpu-0", "here-1/gpu-0")
        await stage.until(leader, lambda: leader.workers == 1)
        assert (fleet.wanted, spare(fleet)) == (1, {"here-0", "here-1"})
        states = states_of(leader)
        assert states[WorkerState.IDLE] == 1
        assert states[WorkerState.LOST] == states[WorkerState.STARTING] == 0, "they are not missed"
        jobs = [await stage.submit("ada", Tier.FAST) for _ in range(3)]
        await stage.until(leader, lambda: len(fleet.busy) == 3)
        assert (fleet.wanted, spare(fleet)) == (3, set())
        for worker_id in fleet.busy:
            fleet.finish(worker_id)
        for job_id in jobs:
            await stage.until_state(leader, job_id, "succeeded")
        await stage.until(leader, lambda: fleet.wanted == 1)
    assert [len(await stage.attempts(job_id)) for job_id in jobs] == [1, 1, 1]
    assert await invariants.check(stage.connection) == []


async def test_no_more_are_asked_for_than_the_budget_allows(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, per_machine=1)
    for account in ("ada", "ben"):
        await stage.open_account(account)
    async with stage.leading(fleet, scaling=AT_ONCE) as leader:
        for account in ("ada", "ben"):
            for _ in range(3):
                await stage.submit(account, Tier.FAST)
        await stage.until(leader, lambda: fleet.wanted == 3)
        assert leader.queues().wanted_gpus == 3
        leader._figures.look()
        assert leader.metrics.registry.get_sample_value("darkroom_gpu_workers_desired") == 3


async def test_what_runs_on_a_machine_that_is_not_needed_is_finished_there(stage: Stage) -> None:
    fleet = LocalFleet(workers=4, take_ms=None, gpu_ms=PICTURE_MS, per_machine=2)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        jobs = await one_run_on_each_machine(stage, leader, fleet)
    async with stage.leading(fleet, scaling=AT_ONCE, drain_within_ms=AN_HOUR_MS) as leader:
        await stage.until(leader, lambda: fleet.spare)
        (machine,) = spare(fleet)
        (goes,) = [worker_id for worker_id in fleet.busy if worker_id.startswith(machine)]
        (idle,) = [worker_id for worker_id in fleet.spare if worker_id != goes]
        await until_ended(stage, leader, fleet, idle)
        assert goes not in fleet.replaced
        fleet.finish(goes)
        await until_ended(stage, leader, fleet, goes)
        fleet.finish(next(iter(fleet.busy)))
        for job_id in jobs:
            await stage.until_state(leader, job_id, "succeeded")
    assert [len(await stage.attempts(job_id)) for job_id in jobs] == [1, 1]
    assert await invariants.check(stage.connection) == []


async def test_a_machine_that_is_about_to_end_does_not_count_when_its_worker_has_ended(stage: Stage) -> None:
    fleet = LocalFleet(workers=3, take_ms=None, per_machine=1)
    bounds = Bounds(at_least=2, at_most=3, shrinks_after_ms=0)
    async with stage.leading(fleet, scaling=bounds) as leader:
        await until_ended(stage, leader, fleet, "here-0/gpu-0")
        fleet.depart("here-1/gpu-0")
        await until_ended(stage, leader, fleet, "here-1/gpu-0")
        leader._loop._sweep_ms = 0  # each cycle looks at the fleet
        present = leader._loop.desk.workers.ids()
        await stage.until(leader, lambda: present == {"here-0/gpu-0", "here-2/gpu-0"})
        seen = cycles(leader)
        # The first of them may have begun before.
        await stage.until(leader, lambda: cycles(leader) >= seen + 2)
        assert (fleet.wanted, spare(fleet)) == (2, set()), "what ends is no reserve"
        states = states_of(leader)
        assert states[WorkerState.LOST] == states[WorkerState.STARTING] == 0, "it is not missed"


class SlowToEnd(LocalFleet):
    """Whose workers live on for a while after they were told to end."""

    def replace(self, worker_id: str) -> None:
        self.replaced.append(worker_id)

    def want(self, workers: int, spare: Collection[str]) -> None:
        self.wanted, self.spare = workers, frozenset(spare)


async def test_a_worker_that_was_told_to_end_is_given_nothing_though_it_is_wanted_again(stage: Stage) -> None:
    fleet = SlowToEnd(workers=2, take_ms=None, per_machine=1)
    await stage.open_account("ada")
    async with stage.leading(fleet, scaling=AT_ONCE) as leader:
        await until_ended(stage, leader, fleet, "here-0/gpu-0")
        jobs = [await stage.submit("ada", Tier.FAST) for _ in range(3)]
        await stage.until(leader, lambda: fleet.wanted == 3 and not fleet.spare)
        await stage.until_waits(leader, jobs[1], "waiting_for_gpu")
        assert set(fleet.busy) == {"here-1/gpu-0"}


async def test_what_is_not_finished_in_time_goes_on_where_machines_stay(stage: Stage) -> None:
    fleet = LocalFleet(workers=4, take_ms=None, gpu_ms=PICTURE_MS, per_machine=2)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        jobs = await one_run_on_each_machine(stage, leader, fleet)
        for worker_id in fleet.busy:
            fleet.work(worker_id, 400)
    async with stage.leading(fleet, scaling=AT_ONCE, drain_within_ms=0) as leader:
        await stage.until(
            leader, lambda: fleet.spare and len(fleet.busy) == 2 and not fleet.busy.keys() & fleet.spare
        )
        await until_ended(stage, leader, fleet, *fleet.spare)
        moved = [request for request in fleet.busy.values() if request.checkpoint is not None]
        assert [request.checkpoint.kept.gpu_ms for request in moved if request.checkpoint] == [400]
        for worker_id in tuple(fleet.busy):
            fleet.finish(worker_id)
        for job_id in jobs:
            await stage.until_state(leader, job_id, "succeeded")
            assert (await stage.job(job_id))["losses"] == 0
    assert await invariants.check(stage.connection) == []


async def test_a_new_scheduler_keeps_what_it_finds_until_it_knows_better(stage: Stage) -> None:
    fleet = LocalFleet(workers=3, take_ms=None, per_machine=1)
    patient = Bounds(at_least=1, at_most=3, shrinks_after_ms=AN_HOUR_MS)
    async with stage.leading(fleet, scaling=patient) as leader:
        await stage.until(leader, lambda: fleet.wanted is not None)
        assert (fleet.wanted, spare(fleet)) == (3, set())


async def test_a_fleet_without_bounds_is_never_told_how_large_to_be(stage: Stage) -> None:
    fleet = LocalFleet(workers=3, take_ms=0, gpu_ms=PICTURE_MS, per_machine=1)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "succeeded")
        assert (fleet.wanted, leader.workers) == (None, 3)


async def one_run_on_each_machine(stage: Stage, leader: Leader, fleet: LocalFleet) -> list[str]:
    """Start runs until each of two machines of two GPUs has one, and end the others; returns their jobs."""
    for _ in range(3):
        await stage.submit("ada", Tier.FAST)
    await stage.until(leader, lambda: len(fleet.busy) == 3)
    machines = [worker_id.partition("/")[0] for worker_id in fleet.busy]
    both = next(machine for machine in machines if machines.count(machine) == 2)
    ended = next(worker_id for worker_id in fleet.busy if worker_id.startswith(both))
    fleet.finish(ended)
    await stage.until(leader, lambda: ended not in {one.worker_id for one in leader._loop.desk.running})
    return [request.job_id for request in fleet.busy.values()]
