"""What the board promises of single jobs: gates, placement, retries, cancels, places and reasons."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from policy_cell import GIB, NEVER_MS, PLAIN, PLAN, REMEMBERING, WIDE, Cell, a_worker

from scheduler.policy import usage
from scheduler.policy.decisions import ChosenBecause, Decision, GiveUp, Start, Stop
from scheduler.policy.events import (
    CancelWanted,
    FundsChanged,
    JobSubmitted,
    LimitsChanged,
    ModelEvicted,
    ModelLoaded,
    RefusedBecause,
    StartRefused,
    StopAsked,
    TierChanged,
    TierPaused,
    TierResumed,
    UsageReset,
    WorkerDraining,
    WorkerLost,
    WorkerResumed,
)
from scheduler.policy.ids import AccountId, JobId, Tier, WorkerId
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.status import JobStatus, QueueReason

FAST, RELAX = Tier.FAST, Tier.RELAX
HOUR_MS = 3_600_000


def starts(decisions: list[Decision]) -> list[str]:
    return [one.job_id for one in decisions if isinstance(one, Start)]


def status_of(cell: Cell, job_id: str) -> JobStatus:
    status = cell.board.status(JobId(job_id))
    assert status is not None
    return status


# -- tiers and caps ----------------------------------------------------------------------------------


def test_fast_passes_all_waiting_relax_jobs() -> None:
    cell = Cell()
    for _ in range(3):
        cell.submit("relaxed")
    fast = cell.submit("paying", tier=FAST)
    assert [one.job for one in cell.decide()] == [fast]


def test_fast_is_fair_between_accounts_whatever_their_plans_weigh() -> None:
    cell = Cell(REMEMBERING)
    cell.account("a", weight=4, usage_ms=30 * HOUR_MS)
    cell.account("b", weight=1)
    for account in "aaabbb":
        cell.submit(account, tier=FAST)
    assert cell.run().order() == "a b a b a b"


def test_level_fast_jobs_start_in_order_of_arrival() -> None:
    cell = Cell(REMEMBERING)
    cell.account("z", usage_ms=30 * HOUR_MS)
    for account in "zyx":
        cell.submit(account, tier=FAST)
    assert cell.run().order() == "z y x"


def test_an_account_runs_three_jobs_and_two_of_them_relax() -> None:
    cell = Cell(workers=8)
    cell.account("a", limits=PLAN)
    for _ in range(4):
        cell.submit("a", tier=RELAX)
    assert len(cell.decide()) == 2
    for _ in range(3):
        cell.submit("a", tier=FAST)
    assert [one.start.tier for one in cell.decide()] == [FAST]
    assert cell.decide() == []


def test_fast_jobs_fill_the_cap_of_relax_too() -> None:
    cell = Cell(workers=8)
    cell.account("a", limits=PLAN)
    for _ in range(3):
        cell.submit("a", tier=FAST)
    cell.submit("a", tier=RELAX)
    assert [one.start.tier for one in cell.decide()] == [FAST, FAST, FAST]


def test_a_finished_job_lets_the_next_one_of_its_account_start() -> None:
    cell = Cell(workers=8)
    cell.account("a", limits=PLAN)
    jobs = [cell.submit("a") for _ in range(3)]
    cell.decide()
    assert status_of(cell, jobs[2]).reason is QueueReason.CONCURRENCY_LIMIT
    cell.step()
    assert cell.started_ms(jobs[2]) == 1000


def test_a_larger_plan_lets_more_start_at_once() -> None:
    cell = Cell(workers=8)
    cell.account("a", limits=PLAN)
    for _ in range(5):
        cell.submit("a")
    assert len(cell.decide()) == 2
    cell.limits["a"] = Limits(running=5, relax_running=4, accepted=20)
    cell.apply(LimitsChanged(at_ms=0, account_id=AccountId("a"), limits=cell.limits["a"], weight_milli=1000))
    assert len(cell.decide()) == 2


def test_a_new_weight_applies_from_the_next_tag_on() -> None:
    cell = Cell()
    for _ in range(3):
        cell.submit("a")
    cell.decide()
    tag = cell.board.share(AccountId("a"), RELAX).tag
    cell.apply(LimitsChanged(at_ms=0, account_id=AccountId("a"), limits=WIDE, weight_milli=4000))
    assert cell.board.share(AccountId("a"), RELAX).tag == tag == 1_000_000
    cell.run(starts=2)
    assert cell.board.share(AccountId("a"), RELAX).tag == 1_250_000


def test_a_paused_tier_starts_nothing_and_keeps_its_order() -> None:
    cell = Cell()
    first = cell.submit("a")
    cell.submit("b")
    cell.apply(TierPaused(at_ms=0, tier=RELAX))
    assert cell.decide() == []
    assert status_of(cell, first).reason is QueueReason.TIER_PAUSED
    cell.apply(TierResumed(at_ms=0, tier=RELAX))
    assert cell.run().order() == "a b"


def test_a_job_without_funds_is_held_until_they_change() -> None:
    cell = Cell(workers=2)
    cell.refuse = lambda start: RefusedBecause.FUNDS if start.tier is FAST else None
    held = cell.submit("a", tier=FAST)
    relaxed = cell.submit("a", tier=RELAX)
    cell.decide()
    assert [one.job for one in cell.decide()] == [relaxed]
    assert status_of(cell, held).reason is QueueReason.FUNDS
    assert cell.decide() == []
    cell.refuse = lambda start: None
    cell.apply(FundsChanged(at_ms=0, account_id=AccountId("a")))
    assert cell.board.queued(FAST) == 1, "held or not, it waits, and is counted once"
    assert [one.job for one in cell.decide()] == [held]


def test_a_refused_start_whose_job_is_gone_is_forgotten() -> None:
    cell = Cell()
    job = cell.submit("a")
    cell.refuse = lambda start: RefusedBecause.GONE
    cell.decide()
    assert cell.board.status(JobId(job)) is None
    assert cell.board.queued(RELAX) == 0
    assert cell.board.decide(0) == []


def test_a_changed_tier_keeps_the_jobs_arrival() -> None:
    cell = Cell()
    moved = cell.submit("a", tier=RELAX)
    cell.submit("b", tier=FAST)
    cell.apply(TierChanged(at_ms=0, job_id=JobId(moved), tier=FAST))
    assert starts(cell.board.decide(0)) == [moved]
    assert (cell.board.queued(RELAX), cell.board.queued(FAST)) == (0, 2)


def test_a_held_job_that_moves_to_relax_needs_no_funds() -> None:
    cell = Cell()
    job = cell.submit("a", tier=FAST)
    cell.apply(StartRefused(at_ms=0, job_id=JobId(job), reason=RefusedBecause.FUNDS))
    assert starts(cell.board.decide(0)) == []
    cell.apply(TierChanged(at_ms=0, job_id=JobId(job), tier=RELAX))
    assert starts(cell.board.decide(0)) == [job]


# -- the order of relax ------------------------------------------------------------------------------


def test_each_job_of_a_heavy_account_waits_behind_what_another_is_served() -> None:
    """Whether it keeps a backlog or sends one at a time: ten minutes' worth each, at this span."""
    cell = Cell(replace(REMEMBERING, memory_span_ms=600_000))
    cell.account("heavy", usage_ms=1000 * HOUR_MS)
    cell.account("other", limits=WIDE)
    for _ in range(3):
        cell.submit("heavy", 60_000)
    for _ in range(60):
        cell.submit("other", 60_000)
        cell.apply(UsageReset(at_ms=0, account_id=AccountId("other")))
    cell.run(starts=40)
    places = [place for place, one in enumerate(cell.served) if one.account == "heavy"]
    assert [there - here for here, there in pairwise([0, *places])] == [10, 11, 11]


def test_memory_delays_and_is_not_charged() -> None:
    """Two equally heavy accounts share in GPU time, whatever the size of their jobs."""
    cell = Cell(REMEMBERING)
    for name, cost_ms in (("small", 1_000), ("large", 60_000)):
        cell.account(name, usage_ms=1000 * HOUR_MS)
        for _ in range(600_000 // cost_ms):
            cell.submit(name, cost_ms)
    cell.run(until_ms=600_000)
    served_ms = Counter[str]()
    for one in cell.served:
        served_ms[one.account] += one.start.charge.predicted_ms
    assert abs(served_ms["small"] - served_ms["large"]) <= 61_000


def test_a_next_tag_remembers_the_job_just_started() -> None:
    cell = Cell(REMEMBERING)
    cell.account("a")
    cell.submit("a", 600_000)
    cell.submit("a", 600_000)
    cell.decide()
    tag = cell.board.share(AccountId("a"), RELAX).tag
    assert tag == 600_000_000 + usage.memory(600_000, REMEMBERING)


def test_a_heavier_plan_is_remembered_for_less() -> None:
    cell = Cell(REMEMBERING)
    for name, weight in (("light", 1), ("heavy", 4)):
        cell.account(name, weight=weight, usage_ms=4 * HOUR_MS)
        cell.submit(name)
    tags = {name: cell.board.share(AccountId(name), RELAX).tag for name in ("light", "heavy")}
    assert tags == {
        "light": usage.memory(4 * HOUR_MS, REMEMBERING),
        "heavy": usage.memory(HOUR_MS, REMEMBERING),
    }


def test_who_was_idle_is_level_with_a_newcomer() -> None:
    cell = Cell(PLAIN)
    cell.submit("returning")
    for _ in range(6):
        cell.submit("busy")
    cell.run(starts=6)
    cell.submit("new")
    cell.submit("returning")
    assert cell.board.virtual_time(RELAX) == 4_000_000
    assert cell.board.share(AccountId("returning"), RELAX).tag == 4_000_000
    assert cell.run().order().split()[6:] == ["new", "returning", "busy"]


def test_a_newcomer_is_level_with_who_is_served_not_with_who_is_stuck() -> None:
    """The smallest tag of all is of an account whose job fits no worker that is there."""
    cell = Cell(PLAIN)
    cell.submit("stuck", gib=99)
    for account in "abcd":
        for _ in range(30):
            cell.submit(account)
    cell.run(starts=40)
    for _ in range(50):
        cell.submit("new")
    cell.run(starts=60)
    assert 4 <= sum(one.account == "new" for one in cell.served[40:60]) <= 6


def test_fast_use_counts_in_relax() -> None:
    cell = Cell(REMEMBERING)
    cell.submit("payer", 600_000, tier=FAST)
    cell.run()
    cell.submit("payer")
    cell.submit("other")
    assert cell.run().order() == "payer other payer"


def test_a_renewal_forgets_use() -> None:
    cell = Cell(REMEMBERING)
    cell.account("a", usage_ms=100 * HOUR_MS)
    cell.account("b", usage_ms=1 * HOUR_MS)
    cell.apply(UsageReset(at_ms=0, account_id=AccountId("a")))
    cell.submit("b")
    cell.submit("a")
    assert cell.run().order() == "a b"


def test_an_old_account_starts_though_new_ones_never_end() -> None:
    parameters = Parameters(aging_ms=60_000)
    cell = Cell(parameters)
    cell.account("old", finish_tag=10**9)
    job = cell.submit("old")

    def newcomer(number: int) -> None:
        cell.submit(f"new{number}")
        cell.at(cell.now_ms + 1000, lambda: newcomer(number + 1))

    newcomer(0)
    cell.run(until_ms=120_000)
    assert cell.started_ms(job) == 60_000
    served = next(one for one in cell.served if one.job == job)
    assert served.start.keys.because is ChosenBecause.AGED
    assert served.start.charge.virtual_time < served.start.charge.start_tag
    assert cell.board.virtual_time(RELAX) == 0
    cell.check_rows()


def test_a_batch_that_fails_to_commit_costs_no_age() -> None:
    cell = Cell(Parameters(aging_ms=60_000))
    cell.account("old", finish_tag=10**9)
    job = cell.submit("old")
    assert starts(cell.board.decide(50_000)) == [job]
    for number in range(4):
        cell.submit(f"new{number}", 15_000)
    for number in range(4):
        cell.at(60_000, lambda number=number: cell.submit(f"newer{number}", 15_000))
    cell.run()
    assert cell.started_ms(job) == 60_000


def test_a_start_by_age_that_fails_to_commit_is_decided_again() -> None:
    cell = Cell(Parameters(aging_ms=60_000))
    cell.account("old", finish_tag=10**9)
    job = cell.submit("old")
    for number in range(3):
        cell.submit(f"new{number}", 20_000)
    cell.run(starts=3)
    cell.submit("newer")
    cell.end(cell.attempt(cell.served[-1].job), 20_000)
    cell.now_ms = 60_000
    decisions = cell.board.decide(60_000)
    assert starts(decisions) == [job]
    assert cell.board.decide(60_000) == decisions


def test_a_plan_leaves_the_garbage_collector_nothing() -> None:
    """What refers to itself is freed by a walk through all that is young, which is much of a large board."""
    cell = Cell(Parameters(aging_ms=0))
    for name in "abc":
        cell.submit(name)
        cell.submit(name, tier=Tier.FAST)
    gc.collect()
    gc.disable()
    try:
        assert starts(cell.board.decide(cell.now_ms))
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_time_at_the_head_begins_anew_after_a_cap() -> None:
    """A fast job of the account fills its cap; what its relax job waited before counts no more."""
    cell = Cell(Parameters(aging_ms=70_000))
    cell.account("old", finish_tag=10**9, limits=Limits(running=1, relax_running=1, accepted=10))
    job = cell.submit("old")
    cell.submit("old", 60_000, tier=FAST)

    def newcomer(number: int) -> None:
        cell.submit(f"new{number}")
        cell.at(cell.now_ms + 1000, lambda: newcomer(number + 1))

    newcomer(0)
    cell.run(until_ms=150_000)
    assert cell.started_ms(job) == 130_000


def test_at_most_a_part_of_the_time_goes_by_age() -> None:
    """Of the time, not of the starts: a giant lets nine times its cost go before the next that is old."""
    cell = Cell(Parameters(memory_span_ms=0, aging_ms=1, aged_one_in=10))
    for account, cost_ms in zip("abc", (1_000, 30_000, 1_000), strict=True):
        cell.account(account, finish_tag=10**9)
        for _ in range(2):
            cell.submit(account, cost_ms)
    for _ in range(700):
        cell.submit("new")
    cell.run()
    starts = [one.start.charge for one in cell.served]
    aged = [place for place, charge in enumerate(starts) if charge.aged]
    assert len(aged) > 2
    for here, there in pairwise(aged):
        between_ms = sum(charge.predicted_ms for charge in starts[here + 1 : there])
        assert between_ms >= 9 * starts[here].predicted_ms


def test_time_at_the_head_counts_only_below_the_caps() -> None:
    cell = Cell(Parameters(aging_ms=5_000), workers=1)
    cell.account("capped", limits=Limits(running=1, relax_running=1, accepted=10))
    cell.submit("capped", 60_000)
    cell.submit("capped")
    cell.decide()
    cell.now_ms = 10_000
    cell.submit("fresh")
    cell.submit("fresh")
    cell.run()
    assert cell.order() == "capped fresh fresh capped"


# -- placement ---------------------------------------------------------------------------------------


def test_a_warm_worker_is_better_than_a_fast_one_and_a_fast_one_than_a_low_id() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("a", speed=1000, warm=()))
    cell.join(a_worker("b", speed=2000, warm=()))
    cell.join(a_worker("c", speed=2000, warm=()))
    cell.join(a_worker("d", speed=500, warm=("m",)))
    for account in "wxyz":
        cell.submit(account)
    assert [(one.start.worker_id, one.start.warm) for one in cell.decide()] == [
        ("d", True),
        ("b", False),
        ("c", False),
        ("a", False),
    ]


def test_a_job_goes_only_where_it_fits() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("small", gib=8))
    cell.join(a_worker("other", models=("n",)))
    big = cell.submit("a", gib=12)
    assert cell.decide() == []
    assert status_of(cell, big).reason is QueueReason.NO_WORKER
    assert "12.0 GiB" in status_of(cell, big).sentence
    cell.submit("b", gib=8)
    cell.submit("c", model="n")
    assert [one.start.worker_id for one in cell.decide()] == ["small", "other"]
    cell.join(a_worker("large", gib=16))
    assert [one.job for one in cell.decide()] == [big]


def test_no_worker_idles_for_the_sake_of_a_job_it_cannot_run() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("small", gib=8))
    for _ in range(3):
        cell.submit("first", gib=12)
    cell.submit("second", gib=4)
    assert [one.account for one in cell.decide()] == ["second"]


def test_a_model_at_hand_lets_a_job_pass_within_theta() -> None:
    cell = Cell(Parameters(memory_span_ms=0, affinity_ms=60_000, aging_ms=NEVER_MS), workers=0)
    cell.join(a_worker("w", warm=("m",)))
    cell.account("near", finish_tag=60_000_000)
    cell.submit("first", model="n")
    cell.submit("near", model="m")
    served = cell.run().served
    assert [one.account for one in served] == ["near", "first"]
    assert served[0].start.keys.because is ChosenBecause.MODEL_WARM
    assert "model loaded" in served[0].start.reason


def test_a_model_at_hand_lets_no_job_pass_beyond_theta() -> None:
    cell = Cell(Parameters(memory_span_ms=0, affinity_ms=60_000, aging_ms=NEVER_MS), workers=0)
    cell.join(a_worker("w", warm=("m",)))
    cell.account("far", finish_tag=60_000_001)
    cell.submit("first", model="n")
    cell.submit("far", model="m")
    assert cell.run().order() == "first far"


def test_models_that_come_and_go_are_known() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("a", warm=("m",)))
    cell.join(a_worker("b", warm=()))
    cell.apply(ModelEvicted(at_ms=0, worker_id=WorkerId("a"), model="m"))
    cell.apply(ModelLoaded(at_ms=0, worker_id=WorkerId("b"), model="m"))
    cell.submit("x")
    assert [one.start.worker_id for one in cell.decide()] == ["b"]


def test_a_draining_worker_finishes_and_takes_nothing_new() -> None:
    cell = Cell()
    cell.submit("a")
    cell.decide()
    cell.apply(WorkerDraining(at_ms=0, worker_id=WorkerId("w0")))
    waiting = cell.submit("a")
    cell.run()
    assert status_of(cell, waiting).reason is QueueReason.NO_WORKER
    cell.apply(WorkerResumed(at_ms=0, worker_id=WorkerId("w0")))
    assert [one.job for one in cell.decide()] == [waiting]


def test_a_worker_that_comes_back_is_busy_until_its_attempt_is_lost() -> None:
    cell = Cell()
    job = cell.submit("a")
    cell.decide()
    cell.apply(WorkerLost(at_ms=0, worker_id=WorkerId("w0")))
    cell.join(a_worker("w0"))
    cell.submit("b")
    assert cell.decide() == []
    cell.lose(cell.attempt(job))
    assert [one.job for one in cell.decide()] == [job]


def test_what_could_never_run_is_said_in_a_sentence() -> None:
    cell = Cell(workers=0)
    assert cell.board.could_ever_run("m", 99 * GIB, 1000) is None, "a fleet about to come is not known"
    cell.join(a_worker("w", gib=16, models=("m",)))
    assert cell.board.could_ever_run("m", 16 * GIB, 600_000) is None
    assert cell.board.could_ever_run("n", GIB, 1000) == "No worker can load the model n."
    assert "24.0 GiB" in (cell.board.could_ever_run("m", 24 * GIB, 1000) or "")
    assert "601 GPU-seconds" in (cell.board.could_ever_run("m", GIB, 601_000) or "")
    cell.apply(WorkerDraining(at_ms=0, worker_id=WorkerId("w")))
    assert cell.board.could_ever_run("m", GIB, 1000) is None


# -- ends --------------------------------------------------------------------------------------------


def test_a_lost_job_waits_at_its_old_place_and_costs_nothing() -> None:
    cell = Cell(workers=2)
    jobs = [cell.submit("a", 5000) for _ in range(3)]
    cell.decide()
    before = cell.board.share(AccountId("a"), RELAX)
    cell.now_ms = 1000
    cell.lose(cell.attempt(jobs[0]))
    cell.check_rows()
    assert cell.board.share(AccountId("a"), RELAX).usage == pytest.approx(5000)
    assert cell.board.share(AccountId("a"), RELAX).finish_tag == before.finish_tag - 5_000_000
    assert [one.job for one in cell.decide()] == [jobs[0]]


def test_an_end_undoes_its_charge_whenever_it_comes() -> None:
    half_life_ms = 100_000
    cell = Cell(Parameters(half_life_ms=half_life_ms))
    cell.account("a", usage_ms=1000)
    cell.now_ms = 5 * half_life_ms
    job = cell.submit("a", 8000)
    cell.decide()
    cell.now_ms = 6 * half_life_ms
    cell.lose(cell.attempt(job))
    assert cell.used_ms("a") == pytest.approx(1000 / 2**6)
    cell.check_rows()


def test_the_third_loss_is_the_last() -> None:
    cell = Cell()
    job = cell.submit("a")
    for _ in range(3):
        assert [one.job for one in cell.decide()] == [job]
        cell.lose(cell.attempt(job))
    decisions = cell.board.decide(0)
    assert [type(one) for one in decisions] == [GiveUp]
    assert cell.board.decide(0) == decisions, "decided until it is known to be done"
    cell.decide()
    assert cell.given_up == [job]
    assert cell.board.decide(0) == []
    assert cell.used_ms("a") == 0


def test_a_job_that_ran_out_of_memory_is_tried_on_a_larger_worker_only() -> None:
    cell = Cell(workers=0)
    for name, gib in (("w0", 16), ("w1", 16), ("w2", 24)):
        cell.join(a_worker(name, gib=gib))
    job = cell.submit("a")
    cell.decide()
    assert cell.worker_of(job) == "w0"
    cell.outgrow(cell.attempt(job), 17)
    cell.decide()
    assert cell.worker_of(job) == "w2"
    cell.check_rows()
    assert cell.used_ms("a") == pytest.approx(1000), "charged for the second try alone"


def test_a_job_that_ran_out_of_memory_waits_for_the_larger_worker_and_holds_up_nobody() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("w0", gib=16))
    cell.join(a_worker("w1", gib=24))
    large = cell.submit("a", 10_000, gib=20)
    job = cell.submit("a")
    cell.decide()
    assert (cell.worker_of(large), cell.worker_of(job)) == ("w1", "w0")
    cell.outgrow(cell.attempt(job), 17)
    behind = cell.submit("a")
    assert [one.job for one in cell.decide()] == [behind]
    for _ in range(4):
        assert cell.board.decide(0) == [], (
            "it is no loss of the job's, and no worker but the larger one will do"
        )
    cell.end(cell.attempt(large), 10_000)
    assert [one.job for one in cell.decide()] == [job]
    assert cell.worker_of(job) == "w1"


def test_what_a_job_needs_does_not_shrink_and_outlives_a_change_of_tier() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("w0", gib=24))
    job = cell.submit("a", gib=20)
    cell.decide()
    cell.outgrow(cell.attempt(job), 9)
    assert cell.board.waiting_job(JobId(job)).memory_bytes == 20 * GIB
    cell.decide()
    cell.outgrow(cell.attempt(job), 25)
    cell.move(job)
    cell.apply(TierChanged(at_ms=0, job_id=JobId(job), tier=FAST))
    assert cell.board.waiting_job(JobId(job)).memory_bytes == 25 * GIB
    assert cell.decide() == []


def test_draining_workers_have_memory_and_those_that_left_have_none() -> None:
    cell = Cell(workers=0)
    cell.join(a_worker("w0", gib=16))
    cell.join(a_worker("w1", gib=24, models=("m",)))
    cell.apply(WorkerDraining(at_ms=0, worker_id=WorkerId("w1")))
    assert cell.board.has_memory("m", 24 * GIB)
    assert not cell.board.has_memory("m", 25 * GIB)
    assert not cell.board.has_memory("n", 24 * GIB), "the larger one cannot load it"
    cell.apply(WorkerLost(at_ms=0, worker_id=WorkerId("w1")))
    assert not cell.board.has_memory("m", 24 * GIB)


def test_losses_of_an_earlier_life_count() -> None:
    cell = Cell()
    job = cell.submit("a")
    cell.cancel(job)
    cell.apply(JobSubmitted(at_ms=0, job=cell.jobs[job], losses=3))
    assert [type(one) for one in cell.board.decide(0)] == [GiveUp]


def test_a_cancelled_waiting_job_leaves() -> None:
    cell = Cell()
    first, second = cell.submit("a"), cell.submit("a")
    cell.cancel(first)
    assert [one.job for one in cell.decide()] == [second]
    cell.cancel(first)


def test_a_cancelled_running_job_is_asked_to_stop_until_it_was() -> None:
    cell = Cell()
    job = cell.submit("a", 10_000)
    cell.decide()
    attempt = cell.attempt(job)
    cell.apply(CancelWanted(at_ms=0, job_id=JobId(job)))
    stop = Stop(attempt_id=attempt, worker_id=WorkerId("w0"), reason="Its owner cancelled the job.")
    assert cell.board.decide(0) == [stop]
    assert cell.board.decide(0) == [stop]
    cell.apply(StopAsked(at_ms=0, attempt_id=attempt))
    assert cell.board.decide(0) == []
    assert cell.board.running(RELAX) == 1, "it holds its GPU until the worker answers"
    cell.now_ms = 3000
    cell.end(attempt, 3000)
    assert cell.used_ms("a") == pytest.approx(3000, rel=1e-4)


def test_a_cancelled_job_whose_worker_is_lost_does_not_come_back() -> None:
    cell = Cell()
    job = cell.submit("a")
    cell.decide()
    cell.apply(CancelWanted(at_ms=0, job_id=JobId(job)))
    cell.lose(cell.attempt(job))
    assert cell.board.decide(0) == []
    assert cell.board.queued(RELAX) == 0


def test_a_job_that_was_shorter_than_predicted_gives_the_rest_back() -> None:
    cell = Cell()
    cell.submit("a", 10_000, actual_ms=1000)
    cell.submit("a", 10_000)
    cell.submit("b", 5_000)
    cell.submit("b", 5_000)
    assert cell.run().order() == "a b a b"
    cell.check_rows()


def test_a_job_reported_twice_is_one_job() -> None:
    cell = Cell(workers=2)
    job = cell.submit("a")
    cell.apply(JobSubmitted(at_ms=0, job=cell.jobs[job]))
    assert len(cell.decide()) == 1
    cell.apply(JobSubmitted(at_ms=0, job=cell.jobs[job]))
    assert cell.decide() == []


# -- places and reasons ------------------------------------------------------------------------------


def test_places_count_the_jobs_that_could_start() -> None:
    cell = Cell()
    cell.account("a", limits=PLAN)
    busy = cell.submit("busy")
    cell.decide()
    jobs = [cell.submit(account) for account in ("a", "a", "a", "b", "c")]
    statuses = cell.board.statuses([JobId(job) for job in (*jobs, busy, "unknown")])
    assert {job: statuses[JobId(job)].position for job in jobs} == {
        jobs[0]: 1,
        jobs[3]: 2,
        jobs[4]: 3,
        jobs[1]: 4,
        jobs[2]: 0,
    }
    assert JobId(busy) not in statuses
    assert JobId("unknown") not in statuses
    assert statuses[JobId(jobs[0])].sentence == "Your job is next in the relax queue."
    assert statuses[JobId(jobs[3])].sentence == "Your job is number 2 in the relax queue."


def test_places_are_the_order_of_starts() -> None:
    cell = Cell(REMEMBERING)
    for number, account in enumerate("abcdef"):
        cell.account(account, usage_ms=number % 3 * HOUR_MS, weight=1 + number % 2)
        for cost_ms in (3000, 7000):
            cell.submit(account, cost_ms)
    statuses = cell.board.statuses([JobId(job) for job in cell.jobs])
    by_place = sorted(statuses, key=lambda job: statuses[job].position)
    assert [one.job for one in cell.run().served][:6] == by_place[:6]


def test_the_running_limit_is_told_in_the_promised_words() -> None:
    cell = Cell(workers=4)
    cell.account("a", limits=PLAN)
    jobs = [cell.submit("a") for _ in range(3)]
    cell.decide()
    assert status_of(cell, jobs[2]).sentence == (
        "Your job will start shortly. You have reached the maximum number of concurrent jobs; "
        "this one starts as soon as another finishes."
    )


def test_a_start_says_which_numbers_decided_it() -> None:
    cell = Cell(REMEMBERING)
    cell.account("heavy", usage_ms=10 * HOUR_MS)
    cell.account("light", usage_ms=1 * HOUR_MS)
    cell.submit("heavy")
    cell.submit("light")
    (start,) = (one.start for one in cell.decide())
    keys = start.keys
    assert keys.because is ChosenBecause.FIRST_IN_ORDER
    assert (keys.chosen.account_id, keys.chosen.usage_per_weight_ms) == ("light", pytest.approx(HOUR_MS))
    assert keys.runner_up is not None
    assert (keys.runner_up.account_id, keys.runner_up.usage_per_weight_ms) == (
        "heavy",
        pytest.approx(10 * HOUR_MS),
    )
    assert keys.chosen.tag == start.charge.start_tag < keys.runner_up.tag
    assert "60.0 GPU-min used lately against 600.0 GPU-min" in start.reason
    assert "heavy" not in start.reason


def test_a_start_without_a_rival_says_so() -> None:
    cell = Cell()
    cell.submit("a")
    cell.submit("a")
    (start,) = (one.start for one in cell.decide())
    assert start.keys.runner_up is None
    assert start.reason == "No other account waited in relax for a GPU that was free."


def test_counts_are_what_is_there() -> None:
    cell = Cell(PLAIN, workers=2)
    cell.now_ms = 500
    cell.submit("a", tier=FAST)
    cell.now_ms = 700
    for _ in range(3):
        cell.submit("a")
    assert cell.board.oldest_arrival_ms(FAST) == 500
    cell.decide()
    board = cell.board
    assert (board.queued(FAST), board.running(FAST)) == (0, 1)
    assert (board.queued(RELAX), board.running(RELAX)) == (2, 1)
    assert (board.oldest_arrival_ms(FAST), board.oldest_arrival_ms(RELAX)) == (None, 700)
    assert board.idle_workers() == 0
