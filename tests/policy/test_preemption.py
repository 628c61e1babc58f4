"""What the board promises of parked runs: who makes room for fast, what relax keeps, how they go on."""

from __future__ import annotations

from itertools import pairwise

import pytest
from policy_cell import GIB, NEVER_MS, PLAIN, REMEMBERING, Cell, a_worker

from scheduler.policy import usage
from scheduler.policy.attempt import Attempt
from scheduler.policy.decisions import ChosenBecause, Decision, Migrate, Resume, Start, Stop
from scheduler.policy.events import (
    AttemptParked,
    AttemptResumed,
    CancelWanted,
    CheckpointSaved,
    MigrationRefused,
    ModelEvicted,
    ModelLoaded,
    RefusedBecause,
    StopAsked,
    TierPaused,
    TierResumed,
    WorkerDraining,
    WorkerLost,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Checkpoint, Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.parked import ParkedRuns
from scheduler.policy.preemption import relax_floor
from scheduler.policy.status import QueueReason

FAST, RELAX = Tier.FAST, Tier.RELAX
HOUR_MS = 3_600_000
LONG_MS = 500_000
EAGER = Parameters(memory_span_ms=0, affinity_ms=0, aging_ms=60_000)
"""Relax has its turn before fast after a minute."""


def only_start(cell: Cell) -> Start:
    (served,) = cell.decide()
    return served.start


def a_parked_run(cell: Cell, account: str = "relaxed", *, fast_ms: int = LONG_MS, step_ms: int = 1000) -> str:
    """Start a relax job on the only idle GPU, then a fast one, `over`, in its place."""
    job = cell.submit(account, LONG_MS, step_ms=step_ms)
    cell.decide()
    cell.submit("paying", fast_ms, tier=FAST, name="over")
    cell.decide()
    assert cell.is_parked(job)
    return job


def kinds(decisions: list[Decision]) -> list[type[object]]:
    return [type(one) for one in decisions]


# -- where a fast job starts ---------------------------------------------------------------------------


def test_a_fast_job_takes_an_idle_gpu_with_its_model_before_any_other() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("a", warm=(), speed=2000))
    cell.join(a_worker("b", warm=("m",)))
    cell.join(a_worker("c", warm=("m",)))
    cell.submit("relaxed", LONG_MS)
    cell.decide()
    cell.submit("paying", tier=FAST)
    start = only_start(cell)
    assert (start.worker_id, start.warm, start.parks) == ("c", True, None)


def test_a_fast_job_takes_an_idle_gpu_before_it_parks_a_run_on_a_warm_one() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("a", warm=("m",)))
    cell.submit("relaxed", LONG_MS)
    cell.decide()
    cell.join(a_worker("b", warm=()))
    cell.submit("paying", tier=FAST)
    start = only_start(cell)
    assert (start.worker_id, start.warm, start.parks) == ("b", False, None)


def test_an_idle_gpu_without_a_parked_run_is_taken_before_one_with() -> None:
    cell = Cell()
    parked = a_parked_run(cell)
    cell.join(a_worker("w1", speed=500))
    cell.end(cell.attempt("over"), 1000)
    following = cell.submit("next", tier=FAST)
    cell.decide()
    assert cell.worker_of(following) == "w1"
    assert not cell.is_parked(parked)


def test_an_idle_gpu_with_a_parked_run_is_taken_before_another_run_is_parked() -> None:
    cell = Cell()
    parked = a_parked_run(cell)
    cell.join(a_worker("w1"))
    other = cell.submit("other", LONG_MS, step_ms=1000)
    cell.decide()
    cell.end(cell.attempt("over"), 1000)
    cell.submit("next", tier=FAST)
    start = only_start(cell)
    assert (start.worker_id, start.parks) == ("w0", None)
    assert cell.is_parked(parked)
    assert not cell.is_parked(other)


def test_a_fast_job_on_a_full_fleet_parks_a_relax_run_in_the_same_cycle() -> None:
    cell = Cell()
    relaxed = cell.submit("relaxed", LONG_MS, step_ms=1000)
    cell.decide()
    cell.now_ms = 5000
    fast = cell.submit("paying", 10_000, tier=FAST)
    start = only_start(cell)
    assert (start.job_id, start.parks) == (fast, cell.attempt(relaxed))
    assert "makes room" in start.reason
    assert cell.is_parked(relaxed)
    assert cell.board.parked() == 1


def test_a_fast_job_waits_where_only_fast_jobs_run() -> None:
    cell = Cell()
    cell.submit("paying", 10_000, tier=FAST)
    cell.submit("second", tier=FAST)
    cell.decide()
    assert cell.board.queued(FAST) == 1
    cell.run()
    assert cell.order() == "paying second"


def test_a_parked_run_goes_on_when_its_fast_job_has_ended_and_loses_no_time() -> None:
    cell = Cell()
    relaxed = cell.submit("relaxed", 60_000, step_ms=1000)
    cell.decide()
    cell.now_ms = 20_000
    cell.submit("paying", 10_000, tier=FAST)
    cell.run()
    assert cell.now_ms == 70_000
    assert cell.used_ms("relaxed") == pytest.approx(60_000, rel=1e-4), "parked time bills nothing"
    assert [one.job for one in cell.served].count(relaxed) == 1
    cell.check_rows()


# -- which run is parked -------------------------------------------------------------------------------


def test_a_run_on_a_gpu_with_the_fast_jobs_model_is_parked_before_any_other() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("a", warm=("n",)))
    cell.join(a_worker("b", warm=("m",)))
    cell.account("ahead", finish_tag=10**9)
    behind = cell.submit("behind", LONG_MS, model="m", step_ms=1000)
    cell.submit("ahead", LONG_MS, model="n", step_ms=1000)
    cell.decide()
    cell.submit("paying", model="m", tier=FAST)
    start = only_start(cell)
    assert (start.parks, start.worker_id, start.warm) == (cell.attempt(behind), "b", True)


def test_a_run_with_fewer_than_two_steps_left_beyond_the_park_is_spared() -> None:
    cell = Cell(workers=2)
    cell.account("ahead", finish_tag=10**9)
    ending = cell.submit("ahead", 60_000, step_ms=1000)
    lasting = cell.submit("behind", LONG_MS, step_ms=1000)
    cell.decide()
    cell.now_ms = 57_001
    cell.submit("paying", tier=FAST)
    assert only_start(cell).parks == cell.attempt(lasting)
    assert not cell.is_parked(ending)


def test_a_run_with_two_steps_left_beyond_the_park_is_not_spared() -> None:
    cell = Cell(workers=2)
    cell.account("ahead", finish_tag=10**9)
    last_chance = cell.submit("ahead", 60_000, step_ms=1000)
    cell.submit("behind", LONG_MS, step_ms=1000)
    cell.decide()
    cell.now_ms = 57_000
    cell.submit("paying", tier=FAST)
    assert only_start(cell).parks == cell.attempt(last_chance)


def test_steps_are_as_long_as_the_worker_is_slow() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("w0", speed=500))
    cell.join(a_worker("w1", speed=1000))
    cell.account("ahead", finish_tag=10**9)
    lasting = cell.submit("behind", LONG_MS, step_ms=1000)
    cell.decide()
    assert cell.worker_of(lasting) == "w1"
    cell.submit("ahead", 60_000, actual_ms=120_000, step_ms=1000)
    cell.decide()
    cell.now_ms = 115_000
    cell.submit("paying", tier=FAST)
    assert only_start(cell).parks == cell.attempt(lasting), "five seconds are two and a half steps there"


def test_if_all_are_about_to_end_the_one_that_ends_first_is_reserved() -> None:
    cell = Cell(workers=3)
    for account, cost_ms in (("a", 62_000), ("b", 61_000), ("c", 62_500)):
        cell.submit(account, cost_ms, step_ms=1000, name=account)
    cell.decide()
    cell.now_ms = 60_000
    cell.submit("paying", tier=FAST)
    start = only_start(cell)
    assert start.parks == cell.attempt("b")


def test_a_run_parked_three_times_is_spared_while_another_can_be_parked() -> None:
    cell = Cell(PLAIN, workers=1)
    often = cell.submit("ahead", LONG_MS, step_ms=1000)
    cell.decide()
    for _ in range(3):
        cell.now_ms += 1000
        cell.submit("paying", 1000, tier=FAST)
        assert only_start(cell).parks == cell.attempt(often)
        cell.step()
        assert not cell.is_parked(often)
    cell.join(a_worker("w1"))
    other = cell.submit("behind", 100, actual_ms=LONG_MS, step_ms=0)
    cell.submit("behind", LONG_MS)
    cell.decide()
    cell.now_ms += 1
    cell.submit("paying", 1000, tier=FAST)
    assert only_start(cell).parks == cell.attempt(other)
    cell.submit("paying", 1000, tier=FAST)
    assert only_start(cell).parks == cell.attempt(often), "only if no other can be"


def test_the_run_of_the_account_with_the_largest_tag_is_parked() -> None:
    cell = Cell(REMEMBERING, workers=3)
    cell.account("light", usage_ms=0)
    cell.account("heavy", usage_ms=30 * HOUR_MS)
    cell.account("middle", usage_ms=HOUR_MS)
    jobs = {name: cell.submit(name, LONG_MS, step_ms=1000) for name in ("heavy", "middle", "light")}
    cell.decide()
    for name in ("heavy", "middle", "light"):
        cell.submit("paying", LONG_MS, tier=FAST)
        assert only_start(cell).parks == cell.attempt(jobs[name])


def test_of_one_accounts_runs_the_one_that_began_last_is_parked() -> None:
    cell = Cell(workers=2)
    early = cell.submit("a", LONG_MS, step_ms=1000)
    cell.decide()
    cell.now_ms = 1000
    late = cell.submit("a", LONG_MS, step_ms=1000)
    cell.decide()
    cell.submit("paying", LONG_MS, tier=FAST)
    assert only_start(cell).parks == cell.attempt(late)
    assert not cell.is_parked(early)


def test_only_a_run_whose_gpu_the_fast_job_fits_is_parked() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("small", gib=8))
    small = cell.submit("a", LONG_MS, gib=4)
    cell.decide()
    cell.submit("paying", gib=12, tier=FAST)
    assert cell.decide() == []
    assert not cell.is_parked(small)
    cell.join(a_worker("large", gib=16))
    cell.submit("b", LONG_MS, gib=4)
    assert only_start(cell).worker_id == "large"


def test_a_model_that_comes_and_goes_changes_which_run_is_parked() -> None:
    cell = Cell(workers=2)
    first = cell.submit("a", LONG_MS, step_ms=1000)
    second = cell.submit("b", LONG_MS, step_ms=1000)
    cell.decide()
    cell.apply(ModelLoaded(at_ms=0, worker_id=WorkerId(cell.worker_of(first)), model="n"))
    cell.submit("paying", tier=FAST, model="n")
    assert [one.parks for one in cell.board.decide(0) if isinstance(one, Start)] == [cell.attempt(first)]
    cell.apply(ModelEvicted(at_ms=0, worker_id=WorkerId(cell.worker_of(first)), model="n"))
    cell.apply(ModelLoaded(at_ms=0, worker_id=WorkerId(cell.worker_of(second)), model="n"))
    assert only_start(cell).parks == cell.attempt(second)


# -- one parks one -------------------------------------------------------------------------------------


def test_b14_one_fast_job_parks_one_run_and_what_was_parked_parks_nobody() -> None:
    cell = Cell(PLAIN, workers=3)
    for account in "abc":
        cell.submit(account, LONG_MS, step_ms=1000)
    cell.decide()
    for _ in range(2):
        cell.submit("paying", 50_000, tier=FAST)
    cell.decide()
    assert cell.board.parked() == 2
    parks = len(cell.parks)
    cell.run(until_ms=49_999)
    assert len(cell.parks) == parks, "a parked run takes nobody's GPU"
    cell.run()
    assert len(cell.parks) == parks


def test_relax_that_waits_beside_a_parked_run_parks_nobody() -> None:
    cell = Cell()
    a_parked_run(cell)
    cell.join(a_worker("w1"))
    cell.submit("running", LONG_MS, gib=4, step_ms=1000)
    cell.decide()
    cell.join(a_worker("small", gib=2))
    cell.submit("waiting", 1000, gib=4)
    assert cell.decide() == []
    assert len(cell.parks) == 1


def test_a_gpu_with_a_parked_run_has_no_second_one_parked_on_it() -> None:
    cell = Cell()
    a_parked_run(cell)
    cell.submit("second", tier=FAST)
    assert cell.decide() == []


def test_a_refused_fast_start_parks_nobody_and_is_not_repeated() -> None:
    cell = Cell()
    relaxed = cell.submit("relaxed", LONG_MS, step_ms=1000)
    cell.decide()
    cell.submit("paying", tier=FAST)
    cell.refuse = lambda start: RefusedBecause.FUNDS
    assert cell.decide() == []
    assert not cell.is_parked(relaxed)
    assert cell.board.decide(0) == []


# -- the floor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "floor"), [(0, 0), (3, 0), (4, 1), (20, 1), (21, 2), (40, 2), (41, 3), (100, 5), (10_000, 500)]
)
def test_the_floor_is_five_percent_at_least_one_and_nothing_below_four(gpus: int, floor: int) -> None:
    assert relax_floor(gpus, Parameters()) == floor


def test_fast_leaves_relax_its_floor_while_relax_is_parked() -> None:
    cell = Cell(workers=4)
    for account in "abcd":
        cell.submit(account, LONG_MS, step_ms=1000)
    cell.decide()
    for number in range(5):
        cell.submit(f"paying{number}", LONG_MS, tier=FAST)
    assert len(cell.decide()) == 3
    assert (cell.board.running(FAST), cell.board.parked(), cell.board.queued(FAST)) == (3, 3, 2)


def test_fast_leaves_relax_its_floor_while_relax_waits() -> None:
    cell = Cell(workers=4)
    relaxed = cell.submit("relaxed", 10_000)
    for number in range(5):
        cell.submit(f"paying{number}", LONG_MS, tier=FAST)
    cell.decide()
    assert [cell.board.running(tier) for tier in (FAST, RELAX)] == [3, 1]
    assert cell.attempt(relaxed)


def test_fast_uses_what_relax_has_no_work_for() -> None:
    cell = Cell(workers=4)
    for number in range(5):
        cell.submit(f"paying{number}", 10_000 * (1 + number), tier=FAST)
    cell.decide()
    assert cell.board.running(FAST) == 4
    cell.submit("relaxed", 100_000)
    cell.run(until_ms=10_000)
    assert [cell.board.running(tier) for tier in (FAST, RELAX)] == [3, 1], "the next free GPU is relax's"
    cell.run(until_ms=20_000)
    assert cell.board.running(FAST) == 3


def test_fast_has_the_rest_again_once_relax_has_what_it_can_take() -> None:
    cell = Cell(workers=40)
    cell.account("relaxed", limits=Limits(running=1, relax_running=1, accepted=10))
    for _ in range(2):
        cell.submit("relaxed", LONG_MS)
    for _ in range(40):
        cell.submit("paying", LONG_MS, tier=FAST)
    cell.decide()
    assert [cell.board.running(tier) for tier in (FAST, RELAX)] == [39, 1]


def test_fast_parks_nobody_for_more_than_its_part() -> None:
    """The idle GPU is of no use to it, and the one relax run there is has a GPU of the floor."""
    cell = Cell(workers=20)
    cell.join(a_worker("small", gib=2))
    relaxed = cell.submit("relaxed", LONG_MS, gib=4, step_ms=1000)
    for _ in range(20):
        cell.submit("paying", LONG_MS, gib=4, tier=FAST)
    cell.decide()
    assert [cell.board.running(tier) for tier in (FAST, RELAX)] == [19, 1]
    assert cell.decide() == []
    assert not cell.is_parked(relaxed)


def test_relax_that_no_worker_can_run_leaves_fast_the_whole_fleet() -> None:
    cell = Cell(workers=4)
    cell.submit("impossible", gib=99)
    for number in range(4):
        cell.submit(f"paying{number}", LONG_MS, tier=FAST)
    assert len(cell.decide()) == 4


def test_a_paused_relax_tier_leaves_fast_the_whole_fleet() -> None:
    cell = Cell(workers=4)
    cell.apply(TierPaused(at_ms=0, tier=RELAX))
    cell.submit("relaxed")
    for number in range(4):
        cell.submit(f"paying{number}", LONG_MS, tier=FAST)
    assert len(cell.decide()) == 4


def test_draining_workers_do_not_count_for_the_floor() -> None:
    cell = Cell(workers=5)
    for account in "abcde":
        cell.submit(account, LONG_MS, step_ms=1000)
    cell.decide()
    for worker in ("w3", "w4"):
        cell.apply(WorkerDraining(at_ms=0, worker_id=WorkerId(worker)))
    for number in range(5):
        cell.submit(f"paying{number}", LONG_MS, tier=FAST)
    assert {one.start.worker_id for one in cell.decide()} == {"w0", "w1", "w2"}, "of three there is no floor"


# -- small fleets --------------------------------------------------------------------------------------


def flood(cell: Cell, cost_ms: int = 10_000) -> None:
    """Have more fast work than the cell can do, for ever."""

    def ended() -> None:
        cell.submit("flood", cost_ms, tier=FAST)

    cell.on_end = lambda running: ended() if running.job.tier is FAST else None
    for _ in range(4):
        cell.submit("flood", cost_ms, tier=FAST)


def test_below_four_gpus_relax_that_waited_long_takes_one_start_in_ten() -> None:
    cell = Cell(EAGER)
    flood(cell)
    cell.decide()
    for _ in range(20):
        cell.submit("relaxed", 10_000, step_ms=1000)
        cell.submit("other", 10_000, step_ms=1000)
    cell.run(until_ms=600_000)
    relax_starts = [index for index, one in enumerate(cell.served) if one.start.tier is RELAX]
    assert cell.served[relax_starts[0]].at_ms >= 60_000, "not before it has waited long"
    assert len(relax_starts) >= 2
    gaps = [later - earlier for earlier, later in pairwise(relax_starts)]
    assert set(gaps) == {10}
    first = cell.served[relax_starts[0]].start
    assert first.sheltered
    assert first.keys.because is ChosenBecause.RELAX_TURN
    assert "before fast" in first.reason


def test_a_run_that_had_its_turn_is_not_parked() -> None:
    cell = Cell(EAGER)
    flood(cell)
    cell.decide()
    relaxed = cell.submit("relaxed", LONG_MS, step_ms=1000)
    cell.run(until_ms=150_000)
    assert cell.worker_of(relaxed) == "w0"
    cell.submit("paying", tier=FAST)
    assert cell.decide() == []
    assert cell.parks == []


def test_a_run_parked_for_long_takes_the_turn_and_is_not_parked_again() -> None:
    cell = Cell(EAGER)
    relaxed = cell.submit("relaxed", 100_000, step_ms=1000)
    cell.decide()
    flood(cell)
    cell.run(until_ms=500_000)
    assert len(cell.parks) == 1
    assert all(one.job.job_id != relaxed for one in cell.running.values()), "it has ended"
    resumes = [one for one in cell.journal if isinstance(one, AttemptResumed)]
    assert [one.sheltered for one in resumes] == [True]
    assert resumes[0].at_ms >= 60_000


def test_where_there_is_a_floor_relax_takes_no_turns() -> None:
    cell = Cell(EAGER, workers=4)
    flood(cell)
    cell.decide()
    for _ in range(40):
        cell.submit("relaxed", 10_000, step_ms=1000)
    cell.run(until_ms=300_000)
    assert not any(one.start.sheltered for one in cell.served)
    assert all(one.start.keys.because is not ChosenBecause.RELAX_TURN for one in cell.served)


def test_relax_that_takes_its_turn_leaves_a_parked_run_its_gpu() -> None:
    """Two GPUs are free at once, one with a run that was parked a moment ago, and fast waits for both."""
    cell = Cell(Parameters(aging_ms=60_000, relax_first_one_in=2, affinity_ms=0))
    cell.join(a_worker("w1", warm=()))
    parked = cell.submit("parked", LONG_MS, step_ms=1000)
    cell.decide()
    cell.submit("paying", 70_000, tier=FAST)
    cell.decide()
    waiting = cell.submit("waiting", 1000)
    cell.now_ms = 60_000
    cell.submit("paying", 10_000, tier=FAST)
    cell.decide()
    assert cell.is_parked(parked)
    for _ in range(2):
        cell.submit("paying", LONG_MS, tier=FAST)
    cell.run(until_ms=70_000)
    assert cell.worker_of(waiting) == "w1"
    assert cell.is_parked(parked)


def a_mixed_fleet(**odd: int | str) -> Cell:
    """Four equal workers and an odd one, which fast would take first."""
    cell = Cell(EAGER, workers=0)
    for number in range(4):
        cell.join(a_worker(f"w{number}", gib=8, speed=500))
    cell.join(a_worker("odd", speed=1000, **odd))
    return cell


def test_relax_that_the_floor_cannot_run_takes_its_turn() -> None:
    """The GPUs that fast leaves to relax are small ones: the large one would be fast's again and again."""
    cell = a_mixed_fleet(gib=16)
    flood(cell)
    cell.submit("flood", 10_000, tier=FAST)
    cell.decide()
    small = cell.submit("small", LONG_MS, step_ms=1000)
    large = cell.submit("large", 1000, gib=12)
    cell.run(until_ms=20_000)
    assert not cell.is_parked(small)
    cell.run(until_ms=400_000)
    assert 60_000 <= cell.started_ms(large) <= 200_000


def test_a_parked_run_that_nothing_else_can_go_on_with_takes_its_turn() -> None:
    """It is the only run on its type of device, and fast would take its GPU again and again."""
    cell = a_mixed_fleet(device="odd")
    alone = cell.submit("alone", 50_000, step_ms=1000)
    cell.decide()
    assert cell.worker_of(alone) == "odd"
    cell.submit("spared", LONG_MS, step_ms=LONG_MS)
    cell.decide()
    cell.on_end = lambda one: (
        cell.submit("flood", one.job.predicted_ms, tier=FAST) if one.job.tier is FAST else None
    )
    for cost_ms in (10_007, 10_009, 10_037, 10_039, 10_061, 10_067, 10_069):
        cell.submit("flood", cost_ms, tier=FAST)
    cell.run(until_ms=59_000)
    assert cell.is_parked(alone)
    cell.run(until_ms=300_000)
    assert all(one.job.job_id != alone for one in cell.running.values()), "it has ended"


# -- parked runs ---------------------------------------------------------------------------------------


def test_a_parked_run_counts_toward_the_caps_of_its_account() -> None:
    cell = Cell(workers=1)
    cell.account("relaxed", limits=Limits(running=1, relax_running=1, accepted=10))
    a_parked_run(cell)
    waiting = cell.submit("relaxed")
    cell.join(a_worker("w1"))
    cell.apply(TierPaused(at_ms=0, tier=FAST))
    assert cell.decide() == []
    status = cell.board.status(JobId(waiting))
    assert status is not None
    assert status.reason is QueueReason.CONCURRENCY_LIMIT
    assert cell.board.running(RELAX) == 1


def test_a_parked_run_goes_on_before_a_new_relax_job_starts_on_its_gpu() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell, fast_ms=10_000)
    cell.account("first", finish_tag=-(10**9))
    cell.submit("first", 1000)
    cell.run(until_ms=10_000)
    assert not cell.is_parked(relaxed)
    assert cell.starts_of("first") == 0


def test_a_second_fast_job_may_take_the_gpu_before_the_parked_run_goes_on() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell, fast_ms=10_000)
    second = cell.submit("second", 10_000, tier=FAST)
    cell.run(until_ms=10_000)
    assert cell.is_parked(relaxed)
    assert cell.worker_of(second) == "w0"
    assert len(cell.parks) == 1, "it is parked already, so nothing is parked again"
    cell.run(until_ms=20_000)
    assert not cell.is_parked(relaxed)


def test_parked_runs_go_on_though_relax_is_paused() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell, fast_ms=10_000)
    cell.apply(TierPaused(at_ms=0, tier=RELAX))
    cell.run(until_ms=10_000)
    assert not cell.is_parked(relaxed)


def test_a_paused_fast_tier_parks_nobody() -> None:
    cell = Cell()
    relaxed = cell.submit("relaxed", LONG_MS, step_ms=1000)
    cell.decide()
    cell.apply(TierPaused(at_ms=0, tier=FAST))
    cell.submit("paying", tier=FAST)
    assert cell.decide() == []
    cell.apply(TierResumed(at_ms=0, tier=FAST))
    assert only_start(cell).parks == cell.attempt(relaxed)


def test_a_parked_run_that_is_cancelled_is_stopped_and_frees_its_place() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    attempt = cell.attempt(relaxed)
    cell.apply(CancelWanted(at_ms=0, job_id=JobId(relaxed)))
    stops = cell.board.decide(0)
    assert [(type(one), one.attempt_id, one.worker_id) for one in stops if isinstance(one, Stop)] == [
        (Stop, attempt, "w0")
    ]
    cell.apply(StopAsked(at_ms=0, attempt_id=attempt))
    assert cell.board.decide(0) == []
    cell.end(attempt, 0)
    cell.check()
    assert cell.board.parked() == 0
    assert cell.board.running(RELAX) == 0
    cell.submit("other", tier=FAST)
    assert cell.decide() == [], "the fast job still has its GPU"


def test_only_a_relax_run_that_has_its_gpu_is_parked() -> None:
    cell = Cell()
    fast = cell.submit("paying", LONG_MS, tier=FAST)
    cell.decide()
    with pytest.raises(AssertionError, match="only relax"):
        cell.board.apply(AttemptParked(at_ms=0, attempt_id=cell.attempt(fast)))


# -- migration -----------------------------------------------------------------------------------------


def test_a_run_parked_beyond_patience_migrates_with_its_checkpoint() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    cell.now_ms = 9_999
    cell.join(a_worker("w1"))
    assert cell.board.decide(cell.now_ms) == []
    cell.now_ms = 10_000
    (migrate,) = cell.board.decide(cell.now_ms)
    assert isinstance(migrate, Migrate)
    assert (migrate.worker_id, migrate.to) == ("w0", "w1")
    assert migrate.checkpoint == cell.checkpoints[relaxed]
    cell.decide()
    assert cell.worker_of(relaxed) == "w1"
    assert not cell.is_parked(relaxed)


def test_a_migrated_run_is_first_to_get_a_gpu_open_to_relax() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    cell.account("first", finish_tag=-(10**9))
    cell.submit("first", 1000)
    cell.now_ms = 10_000
    cell.join(a_worker("w1"))
    cell.decide()
    assert cell.worker_of(relaxed) == "w1"
    assert cell.starts_of("first") == 0


def test_before_patience_is_over_a_new_relax_job_gets_the_open_gpu() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    waiting = cell.submit("other", LONG_MS)
    cell.now_ms = 9_999
    cell.join(a_worker("w1"))
    cell.decide()
    assert cell.worker_of(waiting) == "w1"
    assert cell.is_parked(relaxed)


def test_a_parked_run_without_a_checkpoint_waits_for_its_own_gpu() -> None:
    cell = Cell()
    cell.stores_checkpoints = False
    relaxed = a_parked_run(cell)
    cell.now_ms = 20_000
    cell.join(a_worker("w1"))
    assert cell.board.decide(cell.now_ms) == []
    cell.apply(
        CheckpointSaved(
            at_ms=cell.now_ms,
            attempt_id=cell.attempt(relaxed),
            checkpoint=Checkpoint(step=3, kept_ms=0, device="d"),
        )
    )
    assert kinds(cell.board.decide(cell.now_ms)) == [Migrate]


def test_a_run_migrates_only_to_its_own_device_type() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    cell.now_ms = 20_000
    cell.join(a_worker("w1", device="other"))
    assert cell.board.decide(cell.now_ms) == []
    cell.join(a_worker("w2", device="d"))
    cell.decide()
    assert cell.worker_of(relaxed) == "w2"


def test_the_run_parked_longest_migrates_first() -> None:
    cell = Cell(workers=3)
    for name in ("a", "b"):
        cell.submit(name, LONG_MS, step_ms=1000, name=name)
    cell.submit("busy", LONG_MS, tier=FAST)
    cell.decide()
    for at_ms in (1000, 2000):
        cell.now_ms = at_ms
        cell.submit("paying", LONG_MS, tier=FAST)
        cell.decide()
    (_, first), (_, second) = cell.parks
    cell.now_ms = 30_000
    cell.join(a_worker("w9"))
    (migrate,) = cell.board.decide(cell.now_ms)
    assert isinstance(migrate, Migrate)
    assert migrate.attempt_id == first != second


def test_a_migration_takes_over_the_charge() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    before = cell.board.share(AccountId("relaxed"), RELAX)
    cell.now_ms = 20_000
    cell.join(a_worker("w1"))
    cell.decide()
    assert cell.board.share(AccountId("relaxed"), RELAX) == before
    assert cell.board.running(RELAX) == 1
    cell.check_rows()
    cell.end(cell.attempt(relaxed), LONG_MS + 7_000)
    after = cell.board.share(AccountId("relaxed"), RELAX)
    assert after.finish_tag == before.finish_tag + 7_000_000
    assert after.usage == pytest.approx(LONG_MS + 7_000)
    cell.check_rows()


def test_a_migrated_run_that_is_lost_is_refunded_once() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    cell.now_ms = 20_000
    cell.join(a_worker("w1"))
    cell.decide()
    cell.lose(cell.attempt(relaxed))
    assert cell.used_ms("relaxed") == 0
    assert cell.board.share(AccountId("relaxed"), RELAX).finish_tag == 0
    cell.check_rows()


def test_a_migrated_run_keeps_how_often_it_was_parked() -> None:
    cell = Cell(PLAIN)
    relaxed = cell.submit("ahead", LONG_MS, step_ms=1000)
    cell.decide()
    for number in range(3):
        cell.now_ms += 100
        cell.submit(f"paying{number}", LONG_MS, tier=FAST)
        cell.decide()
        cell.now_ms += 10_000
        cell.join(a_worker(f"x{number}"))
        cell.decide()
        assert cell.worker_of(relaxed) == f"x{number}"
    other = cell.submit("behind", 100, actual_ms=LONG_MS)
    cell.join(a_worker("y"))
    cell.decide()
    cell.submit("last", LONG_MS, tier=FAST)
    assert only_start(cell).parks == cell.attempt(other)


def test_a_migration_is_asked_for_once() -> None:
    """The end of the attempt is told later than the refusal."""
    cell = Cell()
    relaxed = a_parked_run(cell)
    cell.now_ms = 20_000
    cell.join(a_worker("w1"))
    assert kinds(cell.board.decide(cell.now_ms)) == [Migrate]
    cell.apply(MigrationRefused(at_ms=cell.now_ms, attempt_id=cell.attempt(relaxed)))
    assert cell.board.decide(cell.now_ms) == []


def test_a_refused_migration_is_not_repeated() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    cell.now_ms = 20_000
    cell.join(a_worker("w1"))
    cell.refuse_migration = lambda migrate: True
    cell.decide()
    assert relaxed not in [one.job.job_id for one in cell.running.values()]
    assert cell.board.decide(cell.now_ms) == []
    assert cell.board.parked() == 0


def test_a_run_that_is_being_cancelled_does_not_migrate() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    cell.now_ms = 20_000
    cell.join(a_worker("w1"))
    cell.apply(CancelWanted(at_ms=cell.now_ms, job_id=JobId(relaxed)))
    assert kinds(cell.board.decide(cell.now_ms)) == [Stop]


# -- workers that drain or are lost --------------------------------------------------------------------


def test_a_draining_worker_has_nothing_parked_on_it() -> None:
    cell = Cell()
    relaxed = cell.submit("relaxed", LONG_MS, step_ms=1000)
    cell.decide()
    cell.apply(WorkerDraining(at_ms=0, worker_id=WorkerId("w0")))
    cell.submit("paying", tier=FAST)
    assert cell.decide() == []
    assert not cell.is_parked(relaxed)


def test_a_parked_run_on_a_draining_worker_goes_on_there() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell, fast_ms=10_000)
    cell.apply(WorkerDraining(at_ms=0, worker_id=WorkerId("w0")))
    cell.submit("second", tier=FAST)
    cell.run(until_ms=10_000)
    assert not cell.is_parked(relaxed)
    assert cell.starts_of("second") == 0, "nothing new starts there"


def test_a_lost_worker_loses_its_active_and_its_parked_run() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    cell.apply(WorkerLost(at_ms=0, worker_id=WorkerId("w0")))
    assert cell.board.decide(0) == []
    cell.lose(cell.attempt(relaxed))
    cell.lose(cell.attempt("over"))
    assert (cell.board.parked(), cell.board.queued(FAST), cell.board.queued(RELAX)) == (0, 1, 1)
    assert cell.used_ms("relaxed") == 0
    cell.join(a_worker("w1"))
    cell.join(a_worker("w2"))
    assert [one.job for one in cell.decide()] == ["over", relaxed]


def test_a_parked_run_outlives_the_loss_of_the_run_it_was_parked_for() -> None:
    cell = Cell()
    relaxed = a_parked_run(cell)
    cell.lose(cell.attempt("over"))
    cell.cancel("over")
    (resume,) = cell.board.decide(0)
    assert isinstance(resume, Resume)
    assert resume.attempt_id == cell.attempt(relaxed)


def test_a_lost_job_goes_on_from_its_checkpoint() -> None:
    cell = Cell()
    job = cell.submit("a", 60_000)
    cell.decide()
    cell.now_ms = 40_000
    cell.save_checkpoint(cell.attempt(job))
    kept = cell.checkpoints[job]
    cell.now_ms = 45_000
    cell.lose(cell.attempt(job))
    assert only_start(cell).resume_from == kept
    cell.run()
    assert cell.now_ms == 65_000, "five seconds are done again, forty are kept"
    assert cell.used_ms("a") == pytest.approx(60_000, rel=1e-4)


def test_a_lost_job_goes_on_from_its_checkpoint_only_on_its_own_device_type() -> None:
    cell = Cell()
    job = cell.submit("a", 60_000)
    cell.decide()
    cell.now_ms = 40_000
    cell.save_checkpoint(cell.attempt(job))
    kept = cell.checkpoints[job]
    cell.apply(WorkerLost(at_ms=cell.now_ms, worker_id=WorkerId("w0")))
    cell.lose(cell.attempt(job))
    cell.join(a_worker("w1", device="other"))
    assert only_start(cell).resume_from is None
    cell.lose(cell.attempt(job))
    cell.apply(WorkerLost(at_ms=cell.now_ms, worker_id=WorkerId("w1")))
    cell.join(a_worker("w2"))
    assert only_start(cell).resume_from == kept, "it is of use again where it was made"


# -- the other refusal ---------------------------------------------------------------------------------


def test_a_start_refused_because_its_job_has_moved_moves_it() -> None:
    cell = Cell()
    job = cell.submit("a", tier=FAST)
    cell.refuse = lambda start: RefusedBecause.MOVED
    cell.decide()
    cell.refuse = lambda start: None
    assert (cell.board.queued(FAST), cell.board.queued(RELAX)) == (0, 1)
    start = only_start(cell)
    assert (start.job_id, start.tier) == (job, RELAX)


def test_usage_remembers_a_parked_run_at_the_time_it_was_charged() -> None:
    parameters = Parameters(half_life_ms=100_000, aging_ms=NEVER_MS)
    cell = Cell(parameters)
    a_parked_run(cell, fast_ms=100_000)
    cell.run(until_ms=100_000)
    assert cell.used_ms("relaxed") == pytest.approx(LONG_MS / 2)
    cell.run()
    grown = usage.growth(cell.now_ms, decay_origin_ms=0, half_life_ms=100_000)
    assert cell.used_ms("relaxed") == pytest.approx(LONG_MS / grown)
    cell.check_rows()


def test_a_fleet_full_of_parked_runs_is_not_gone_through_for_a_gpu_that_fits_none() -> None:
    """One of each kind is looked at: what fits none of a kind's first fits none of the rest."""
    runs = ParkedRuns()
    for number in range(1_000):
        job = Job(
            job_id=JobId(f"job-{number}"),
            account_id=AccountId("a"),
            tier=Tier.RELAX,
            arrival=number,
            predicted_ms=1,
            step_ms=1,
            model="m",
            memory_bytes=(1 + number % 2) * GIB,
        )
        attempt = Attempt(
            AttemptId(f"attempt-{number:04}"),
            job,
            WorkerId(f"w{number}"),
            predicted_ms=1,
            weight_milli=1000,
            charged_at_ms=0,
            started_ms=0,
        )
        runs.put(attempt, "d", number)
    walk = runs.longest_first()
    seen = []
    for attempt_id in walk:
        seen.append(attempt_id)
        walk.pass_over_its_like()
    assert seen == ["attempt-0000", "attempt-0001"]
    assert list(runs.longest_first())[:3] == ["attempt-0000", "attempt-0001", "attempt-0002"]
    runs.discard(AttemptId("attempt-0000"))
    assert (len(runs), next(runs.longest_first())) == (999, "attempt-0001")
