"""The auditor finds what breaks a bound, and nothing where each holds by a hair."""

from __future__ import annotations

from made_journal import NEVER_MS, PLAIN, REMEMBERING, WIDE, Made

from scheduler.policy.auditing.findings import Bound, Verdict
from scheduler.policy.decisions import ChosenBecause
from scheduler.policy.events import (
    AttemptMigrated,
    CellRestored,
    FairShare,
    FundsChanged,
    LimitsChanged,
    RefusedBecause,
    StartRefused,
    TierPaused,
    WorkerDraining,
    WorkerLost,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters

SECOND = 1_000_000
"""Of service, in tags."""
HOUR_MS = 3_600_000


def test_an_empty_period_has_no_cases() -> None:
    made = Made()
    assert {made.finding(bound).verdict for bound in Bound} == {Verdict.NO_CASES}


# --- O1 -----------------------------------------------------------------------------------------------


def two_that_come_together(*, first_used_ms: float, second_used_ms: float) -> Made:
    made = Made(REMEMBERING)
    made.account("first", used_ms=first_used_ms)
    made.account("second", used_ms=second_used_ms)
    made.submit("first", "f")
    made.submit("second", "s")
    tags = made.memory("first"), made.memory("second")
    made.run("f", tags[0], last=True)
    made.run("s", tags[1], last=True)
    return made


def test_o1_holds_where_the_one_that_used_less_is_served_first() -> None:
    finding = two_that_come_together(first_used_ms=HOUR_MS, second_used_ms=HOUR_MS + 50).finding(Bound.O1)
    assert (finding.verdict, finding.worst_margin) == (Verdict.HOLDS, 50)


def test_o1_is_broken_where_the_one_that_used_more_is_served_first() -> None:
    finding = two_that_come_together(first_used_ms=2 * HOUR_MS, second_used_ms=HOUR_MS).finding(Bound.O1)
    assert (finding.verdict, finding.worst_margin) == (Verdict.VIOLATED, -HOUR_MS)
    assert finding.worst is not None
    assert finding.worst.accounts == ("first", "second")


# --- O2, B1, B5: two side by side ----------------------------------------------------------------------


def side_by_side(order: str, *, parameters: Parameters = PLAIN, **used_ms: float) -> Made:
    """Serve accounts in this order though both wait; each job's tag follows from the charges."""
    made = Made(parameters)
    for name in "ab":
        made.account(name, used_ms=used_ms.get(name, 0.0))
        made.submit(name, *(f"{name}{number}" for number in range(10)))
    tags = {name: made.memory(name) for name in "ab"}
    for number, name in enumerate(order):
        made.run(f"{name}{order[:number].count(name)}", tags[name])
        tags[name] = made.records[-2].started.charge.next_tag  # type: ignore[union-attr]
    return made


def test_o2_allows_who_used_more_one_start_more() -> None:
    finding = side_by_side("bababa", a=10_000.0, b=20_000.0).finding(Bound.O2)
    assert (finding.verdict, finding.worst_margin) == (Verdict.HOLDS, 0)


def test_o2_is_broken_by_a_second_start_more() -> None:
    finding = side_by_side("bab" + "b", a=10_000.0, b=20_000.0).finding(Bound.O2)
    assert (finding.verdict, finding.worst_margin) == (Verdict.VIOLATED, -1)


def test_b1_allows_a_job_of_each() -> None:
    # a leads by a job, then b: the difference spans two.
    made = side_by_side("abba")
    finding = made.finding(Bound.B1)
    assert (finding.verdict, finding.worst_margin) == (Verdict.HOLDS, 0)


def test_b1_is_broken_by_three_jobs_in_a_row() -> None:
    finding = side_by_side("aaa").finding(Bound.B1)
    assert (finding.verdict, finding.worst_margin) == (Verdict.VIOLATED, -1_000)


def test_b1_is_broken_though_the_tags_were_not_renewed() -> None:
    made = Made()
    for name in "ab":
        made.account(name)
        made.submit(name, *(f"{name}{number}" for number in range(5)))
    for number in range(4):
        made.run(f"a{number}", 0, next_tag=0)
    assert set(made.broken()) >= {Bound.B1, Bound.TAGS}


def test_b1_is_widened_by_errors_of_prediction() -> None:
    made = Made()
    for name in "ab":
        made.account(name)
        made.submit(name, *(f"{name}{number}" for number in range(5)))
    # It took nothing, so it is served again at its old tag.
    for number in range(4):
        made.start(f"a{number}", 0)
        made.end(f"a{number}", 0)
    assert Bound.B1 not in made.broken()


def returned(order: str) -> Made:
    """`r` comes back to find `b` waiting, with the same use."""
    made = Made()
    made.account("b")
    made.account("r", used_ms=1_000.0)
    made.submit("b", *(f"b{number}" for number in range(10)))
    made.run("b0", 0)
    made.submit("r", *(f"r{number}" for number in range(10)))
    tags = {"b": SECOND, "r": 0}
    for number, name in enumerate(order):
        made.run(f"{name}{order[:number].count(name) + (name == 'b')}", tags[name])
        tags[name] += SECOND
    return made


def test_b5_allows_half_and_a_job() -> None:
    finding = returned("rrbrb").finding(Bound.B5)
    assert (finding.verdict, finding.worst_margin) == (Verdict.HOLDS, 0)


def test_b5_is_broken_by_more() -> None:
    finding = returned("rrr").finding(Bound.B5)
    assert (finding.verdict, finding.worst_margin) == (Verdict.VIOLATED, -0.5)


# --- B2, B3, B4: waits ---------------------------------------------------------------------------------


def a_wait(*, others_starts: int, parameters: Parameters = PLAIN, **account: float) -> Made:
    """`u` comes while one job of `g` runs, and starts when `g` had so many more starts."""
    made = Made(parameters)
    made.account("g")
    made.account("u", **account)  # type: ignore[arg-type]
    made.submit("g", *(f"g{number}" for number in range(10)))
    made.start("g0", 0)
    made.submit("u", "u0")
    tag = made.memory("u")
    for number in range(others_starts):
        made.now_ms += 1_000
        made.end(f"g{number}")
        made.start(f"g{number + 1}", (number + 1) * SECOND)
    made.now_ms += 1_000
    made.end(f"g{others_starts}")
    made.start("u0", tag, last=True)
    return made


def test_b2_and_b3_allow_a_fresh_account_a_job_and_one_of_each_other() -> None:
    made = a_wait(others_starts=1)
    for bound in (Bound.B2, Bound.B3, Bound.B4):
        finding = made.finding(bound)
        assert finding.verdict is Verdict.HOLDS
        assert finding.worst_margin is not None
        assert 0 <= finding.worst_margin < 0.1


def test_b2_b3_and_b4_are_broken_by_a_job_more() -> None:
    made = a_wait(others_starts=2)
    for bound in (Bound.B2, Bound.B3, Bound.B4):
        finding = made.finding(bound)
        assert finding.verdict is Verdict.VIOLATED
        assert finding.worst_margin is not None
        assert -1_000 <= finding.worst_margin < -999
        assert finding.worst is not None
        assert finding.worst.job_id == "u0"


def test_b2_and_b4_allow_an_account_that_used_all_the_span_of_memory() -> None:
    parameters = Parameters(
        memory_span_ms=3_000, affinity_ms=0, aging_ms=NEVER_MS, half_life_ms=NEVER_MS, memory_full_ms=10**9
    )
    heavy = 10.0**12
    made = a_wait(others_starts=4, parameters=parameters, used_ms=heavy)
    assert made.finding(Bound.B3).verdict is Verdict.HOLDS, "only the other one is fresh"
    for bound in (Bound.B2, Bound.B4):
        assert made.finding(bound).verdict is Verdict.HOLDS
    made = a_wait(others_starts=5, parameters=parameters, used_ms=heavy)
    for bound in (Bound.B2, Bound.B4):
        assert made.finding(bound).verdict is Verdict.VIOLATED


def test_time_that_fast_holds_the_gpus_is_not_waited_for_relax() -> None:
    made = Made()
    made.account("u")
    made.account("f")
    made.submit("f", "f0", cost_ms=60_000, tier=Tier.FAST)
    made.start("f0", 0, last=True)
    made.submit("u", "u0")
    made.now_ms += 60_000
    made.end("f0")
    made.start("u0", 0, last=True)
    assert not made.broken()
    assert made.finding(Bound.B15).worst_margin == 60_000


def test_a_run_that_takes_longer_than_predicted_is_nobodys_unfairness() -> None:
    made = Made()
    made.account("g")
    made.account("u")
    made.submit("g", "g0")
    made.start("g0", 0, last=True)
    made.submit("u", "u0")
    made.now_ms += 100_000
    made.end("g0", 100_000)
    made.start("u0", 0, last=True)
    assert not made.broken()


def test_b2_is_widened_for_starts_taken_for_their_age() -> None:
    made = Made(Parameters(memory_span_ms=0, affinity_ms=0, aging_ms=0))
    for name in "gu":
        made.account(name)
    made.submit("g", *(f"g{number}" for number in range(6)))
    for number in range(3):
        made.run(f"g{number}", number * SECOND)
    made.start("g3", 3 * SECOND)
    made.submit("u", "u0")
    made.now_ms += 1_000
    made.end("g3")
    made.run("g4", 4 * SECOND, because=ChosenBecause.AGED)
    made.start("u0", 3 * SECOND, last=True)
    finding = made.finding(Bound.B2)
    assert finding.verdict is Verdict.HOLDS
    assert finding.widened == ("aging: a job for each start taken for its age (1 cases)",)


# --- B7 and the tags -----------------------------------------------------------------------------------


def test_b7_is_broken_where_virtual_time_goes_back_or_ahead() -> None:
    for seen in (0, 2 * SECOND):
        made = Made()
        made.account("a")
        made.submit("a", "a0", "a1", "a2")
        made.run("a0", 0)
        made.run("a1", SECOND)
        assert not made.broken()
        made.run("a2", 2 * SECOND, last=True, keys={"virtual_time": seen})
        assert made.finding(Bound.B7).worst_margin == -SECOND
        assert made.broken() == [Bound.B7]


def test_b7_is_broken_by_a_number_that_is_none() -> None:
    made = Made()
    made.account("a")
    made.submit("a", "a0")
    made.run("a0", 0, last=True, usage_added=float("nan"))
    assert Bound.B7 in made.broken()


def test_tags_are_broken_by_a_charge_of_another_cost() -> None:
    made = Made()
    made.account("a")
    made.submit("a", "a0")
    made.run("a0", 0, last=True, finish_tag=SECOND - 10)
    finding = made.finding(Bound.TAGS)
    assert (finding.verdict, finding.worst_margin) == (Verdict.VIOLATED, -10)


def test_tags_are_broken_by_a_tag_that_forgets_what_was_used() -> None:
    made = Made(REMEMBERING)
    made.account("a", used_ms=HOUR_MS)
    made.submit("a", "a0")
    made.run("a0", 0, last=True)
    assert made.finding(Bound.TAGS).verdict is Verdict.VIOLATED


def test_tags_follow_the_correction_of_a_charge() -> None:
    made = Made()
    made.account("a")
    made.submit("a", "a0", "a1")
    made.start("a0", 0)
    made.now_ms += 400
    made.end("a0", 400)
    made.run("a1", 400_000, last=True)
    assert not made.broken()


def test_what_is_stored_at_the_end_must_be_what_the_records_come_to() -> None:
    made = Made()
    made.account("a")
    made.submit("a", "a0")
    made.run("a0", 0, last=True)
    for finish_tag, usage, verdicts in (
        (SECOND, 1_000.0, (Verdict.HOLDS, Verdict.HOLDS)),
        (2 * SECOND, 2_000.0, (Verdict.VIOLATED, Verdict.VIOLATED)),
    ):
        share = FairShare(finish_tag=finish_tag, tag=None, usage=usage)
        closing = {AccountId("a"): {Tier.RELAX: share}}
        assert verdicts == tuple(made.finding(b, closing=closing).verdict for b in (Bound.TAGS, Bound.B9))


def test_b2_counts_what_a_start_takes_to_its_row_after_a_night_without_workers() -> None:
    made = Made(workers=0)
    made.account("a")
    made.submit("a", "a0")
    made.now_ms += 43_000
    made.join("w0")
    made.now_ms += 300
    made.run("a0", 0, last=True)
    assert made.finding(Bound.B2, grace_ms=299).verdict is Verdict.VIOLATED
    assert made.finding(Bound.B2, grace_ms=300).verdict is Verdict.HOLDS


# --- B8, B13, B14, B15 ---------------------------------------------------------------------------------


def test_b8_is_broken_by_a_gpu_that_idles_beside_a_waiting_job() -> None:
    made = Made(workers=2)
    made.account("a")
    made.submit("a", "a0", "a1")
    made.start("a0", 0)
    made.now_ms += 300
    made.start("a1", SECOND, worker="w1", last=True)
    finding = made.finding(Bound.B8)
    assert (finding.verdict, finding.worst_margin) == (Verdict.VIOLATED, -300)
    assert made.finding(Bound.B8, grace_ms=300).worst_margin == 0
    assert made.finding(Bound.B8, grace_ms=300).verdict is Verdict.HOLDS


def test_b8_sees_a_start_that_is_the_last_record_before_a_takeover() -> None:
    made = Made()
    made.account("a")
    made.submit("a", "a0")
    made.now_ms += 1
    made.start("a0", 0, last=True)
    made.now_ms += 30_000
    for tier in Tier:
        made.note(CellRestored(at_ms=made.now_ms, tier=tier, virtual_time=0, decay_origin_ms=0))
    assert made.finding(Bound.B8).worst_margin == -1


def test_b8_asks_nothing_of_gpus_that_drain_are_gone_or_cannot_hold_the_job() -> None:
    made = Made(workers=3)
    made.join("small", gib=0)
    made.account("a")
    made.note(WorkerDraining(at_ms=0, worker_id=WorkerId("w1")))
    made.note(WorkerLost(at_ms=0, worker_id=WorkerId("w2")))
    made.submit("a", "a0", "a1")
    made.run("a0", 0)
    made.run("a1", SECOND, last=True)
    assert not made.broken()


def test_b8_asks_nothing_of_a_paused_tier_of_held_jobs_and_of_accounts_at_their_caps() -> None:
    made = Made(workers=2)
    made.account("capped", limits=Limits(running=1, relax_running=1, accepted=10))
    made.account("poor")
    made.submit("capped", "c0", "c1")
    made.submit("poor", "p0", tier=Tier.FAST)
    made.note(StartRefused(at_ms=0, job_id=JobId("p0"), reason=RefusedBecause.FUNDS))
    made.start("c0", 0, last=True)
    made.now_ms += 1_000
    made.end("c0")
    made.note(TierPaused(at_ms=made.now_ms, tier=Tier.RELAX))
    made.now_ms += 5_000
    assert not made.broken()
    made.note(FundsChanged(at_ms=made.now_ms, account_id=AccountId("poor")))
    made.now_ms += 10
    made.start("p0", 0, last=True)
    assert made.finding(Bound.B8).worst_margin == -10


def fast_on_a_full_fleet(*, after_ms: int, workers: int = 1) -> Made:
    made = Made(workers=workers)
    made.account("r")
    made.account("f")
    made.submit("r", *(f"r{number}" for number in range(workers)), cost_ms=60_000)
    for number in range(workers):
        made.start(f"r{number}", number * 60 * SECOND, worker=f"w{number}", last=number == workers - 1)
    made.now_ms += 1_000
    made.submit("f", "f0", tier=Tier.FAST)
    made.now_ms += after_ms
    made.park("r0")
    made.start("f0", 0, last=True)
    return made


def test_b13_holds_where_a_run_is_parked_in_the_cycle_of_the_submission() -> None:
    finding = fast_on_a_full_fleet(after_ms=0).finding(Bound.B13)
    assert (finding.verdict, finding.cases, finding.worst_margin) == (Verdict.HOLDS, 1, 0)


def test_b13_is_broken_where_it_waits() -> None:
    finding = fast_on_a_full_fleet(after_ms=70).finding(Bound.B13)
    assert (finding.verdict, finding.worst_margin) == (Verdict.VIOLATED, -70)


def test_b14_is_broken_by_a_second_park_by_a_relax_start_and_by_a_park_for_nobody() -> None:
    made = fast_on_a_full_fleet(after_ms=0)
    assert made.finding(Bound.B14).verdict is Verdict.HOLDS
    made.now_ms += 1_000
    made.end("f0")
    made.submit("r", "late")
    made.start("late", 60 * SECOND, last=True)
    assert made.finding(Bound.B14).violations == 1, "a relax job before the parked run goes on"

    made = Made(workers=2)
    made.account("r")
    made.submit("r", "r0", "r1")
    made.start("r0", 0, last=False)
    made.start("r1", SECOND, worker="w1", last=True)
    made.park("r0")
    made.now_ms += 1
    assert made.finding(Bound.B14).violations == 1, "nothing started in its place"


def test_a_parked_run_on_an_idle_gpu_goes_on_at_once() -> None:
    made = fast_on_a_full_fleet(after_ms=0)
    made.now_ms += 1_000
    made.end("f0")
    made.now_ms += 25
    made.resume("r0")
    assert made.finding(Bound.B8).worst_margin == -25
    assert made.finding(Bound.B15).worst_margin == 1_025
    assert made.finding(Bound.B15).verdict is Verdict.OBSERVED


def test_a_migrated_run_holds_its_new_gpu_and_its_old_charge() -> None:
    made = fast_on_a_full_fleet(after_ms=0, workers=2)
    made.now_ms += 59_000
    made.end("r1")
    made.note(
        AttemptMigrated(
            at_ms=made.now_ms,
            attempt_id=AttemptId("r0"),
            to_attempt_id=AttemptId("r0-again"),
            worker_id=WorkerId("w1"),
        )
    )
    made.jobs["r0-again"] = made.jobs["r0"]
    made.now_ms += 59_000
    made.end("f0")
    made.end("r0-again")
    assert not made.broken()


# --- B9, B10, B11, order, age ---------------------------------------------------------------------------


def test_b9_is_broken_where_a_lost_attempt_stays_charged() -> None:
    for refunded in (True, False):
        made = Made()
        made.account("a")
        made.submit("a", "a0", "a1")
        made.start("a0", 0)
        made.now_ms += 500
        made.lose("a0")
        if not refunded:
            made.used_ms["a"] += 1_000
        made.run("a1", 0)
        finding = made.finding(Bound.B9)
        assert finding.worst_margin == (0 if refunded else -1_000)
        assert finding.verdict is (Verdict.HOLDS if refunded else Verdict.VIOLATED)


def test_b10_is_broken_by_a_start_beyond_the_caps() -> None:
    for relax_running, margin in ((2, 0), (1, -1)):
        made = Made(workers=2)
        made.account("a", limits=Limits(running=3, relax_running=relax_running, accepted=10))
        made.submit("a", "a0", "a1")
        made.start("a0", 0)
        made.start("a1", SECOND, worker="w1", last=True)
        assert made.finding(Bound.B10).worst_margin == margin


def test_b10_is_broken_by_a_job_beyond_the_accepted_ones() -> None:
    made = Made()
    made.account("a", limits=Limits(running=3, relax_running=2, accepted=2))
    made.submit("a", "a0")
    made.start("a0", 0, last=True)
    made.submit("a", "a1")
    assert made.finding(Bound.B10).worst_margin == 0
    made.submit("a", "a2")
    assert made.finding(Bound.B10).worst_margin == -1


def test_b10_judges_by_the_limits_of_the_time() -> None:
    made = Made(workers=2)
    made.account("a", limits=Limits(running=1, relax_running=1, accepted=10))
    made.submit("a", "a0", "a1")
    made.start("a0", 0, last=True)
    made.note(LimitsChanged(at_ms=0, account_id=AccountId("a"), limits=WIDE, weight_milli=1000))
    made.start("a1", SECOND, worker="w1", last=True)
    assert not made.broken()


def test_b11_is_broken_by_two_attempts_on_one_worker() -> None:
    made = Made()
    made.account("a")
    made.submit("a", "a0", "a1")
    made.start("a0", 0)
    made.start("a1", SECOND, last=True)
    assert made.finding(Bound.B11).verdict is Verdict.VIOLATED


def test_b11_lets_the_next_have_the_gpu_of_a_run_that_is_drawn() -> None:
    made = Made()
    for name in "ab":
        made.account(name)
        made.submit(name, f"{name}0")
    made.start("a0", 0, last=True)
    made.now_ms += 900
    made.draw("a0")
    made.start("b0", 0, last=True)
    made.now_ms += 100
    made.end("a0")
    made.now_ms += 900
    made.end("b0")
    assert made.broken() == []
    assert made.finding(Bound.B11).cases == 2


def out_of_order(because: ChosenBecause, *, theta_ms: int) -> Made:
    made = Made(Parameters(memory_span_ms=0, affinity_ms=theta_ms, aging_ms=0))
    for name in "ab":
        made.account(name)
        made.submit(name, *(f"{name}{number}" for number in range(9)))
    made.run("a0", 0, runner_up=("b", 0))
    made.run("b0", 0, runner_up=("a", SECOND))
    made.run("b1", SECOND, because=because, runner_up=("a", SECOND))
    made.run("b2", 2 * SECOND, because=because, runner_up=("a", SECOND))
    return made


def test_the_order_is_broken_by_a_larger_key_but_not_within_theta() -> None:
    made = out_of_order(ChosenBecause.FIRST_IN_ORDER, theta_ms=0)
    assert made.finding(Bound.ORDER).worst_margin == -SECOND
    assert made.finding(Bound.ORDER).verdict is Verdict.VIOLATED
    assert out_of_order(ChosenBecause.MODEL_WARM, theta_ms=1_000).finding(Bound.ORDER).worst_margin == 0
    assert out_of_order(ChosenBecause.MODEL_WARM, theta_ms=999).finding(Bound.ORDER).worst_margin == -1_000


def test_the_order_is_broken_where_an_eligible_account_is_not_even_named() -> None:
    made = Made()
    for name in "ab":
        made.account(name)
        made.submit(name, *(f"{name}{number}" for number in range(3)))
    made.run("a0", 0)
    made.run("a1", SECOND)
    finding = made.finding(Bound.ORDER)
    assert finding.worst_margin == -SECOND
    assert finding.worst is not None
    assert finding.worst.accounts == ("a", "b")


def test_a_part_of_the_time_may_be_started_for_its_age_and_no_more() -> None:
    """One in four: a second for its age, then three others' before the next."""
    for between, margin in ((3, 0), (2, -1_000)):
        made = Made(Parameters(memory_span_ms=0, affinity_ms=0, aging_ms=0, aged_one_in=4))
        made.account("a")
        made.submit("a", *(f"a{number}" for number in range(9)))
        made.run("a0", 0, because=ChosenBecause.AGED)
        for number in range(1, between + 1):
            made.run(f"a{number}", number * SECOND)
        made.run(f"a{between + 1}", (between + 1) * SECOND, because=ChosenBecause.AGED)
        finding = made.finding(Bound.AGED)
        assert finding.worst_margin == margin
        assert finding.verdict is (Verdict.VIOLATED if margin < 0 else Verdict.HOLDS)
