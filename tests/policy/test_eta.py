"""The roll-forward plays what then happens, and what is told from it: p50, p90, a glance, and what if."""

from __future__ import annotations

import itertools
import pickle
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cell import GIB, NEVER_MS, PLAN, REMEMBERING, Cell, a_worker

from scheduler.policy.board import Board
from scheduler.policy.events import (
    AccountRestored,
    CancelWanted,
    FairShare,
    JobSubmitted,
    RefusedBecause,
    TierPaused,
)
from scheduler.policy.facts import facts
from scheduler.policy.foresight.eta import Eta, eta_of, etas, quick_eta
from scheduler.policy.foresight.lately import Lately, Recent, resampled
from scheduler.policy.foresight.roll_forward import AS_PREDICTED, Arrival, Draws, Future, roll_forward
from scheduler.policy.foresight.what_if import Change, in_tier, on_plan, submitted, what_if
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters

HOUR_MS = 3_600_000
# Nothing that is counted or aged, which a restored board has forgotten.
EXACT = Parameters(affinity_ms=0, aging_ms=NEVER_MS)
few = settings(max_examples=40)


@st.composite
def cells(draw: st.DrawFn) -> Cell:
    """A cell with a fleet, some accounts and jobs of both tiers, somewhere in the middle of its work."""
    cell = Cell(EXACT, workers=draw(st.integers(1, 6)))
    names = "abcde"[: draw(st.integers(1, 5))]
    for name in names:
        cell.account(
            name,
            limits=draw(st.sampled_from([PLAN, Limits(running=10, relax_running=10, accepted=100)])),
            weight=draw(st.sampled_from([0.5, 1, 4])),
            usage_ms=draw(st.integers(0, 30 * HOUR_MS)),
        )
    for _ in range(draw(st.integers(1, 25))):
        when_ms = draw(st.integers(0, 60_000))
        account, cost_ms = draw(st.sampled_from(names)), draw(st.integers(1, 40_000))
        tier = draw(st.sampled_from([Tier.RELAX, Tier.RELAX, Tier.FAST]))
        cell.at(
            when_ms,
            lambda account=account, cost_ms=cost_ms, tier=tier: cell.submit(
                account, cost_ms, tier=tier, step_ms=cost_ms // 20
            ),
        )
    wake_after_parks(cell, until_ms=60_000)
    return cell


def wake_after_parks(cell: Cell, until_ms: int | None = None) -> None:
    """Go on, and decide also when a parked run's patience ends, as the service does."""
    seen = len(cell.parks)
    cell.decide()
    while True:
        for parked_ms, _ in cell.parks[seen:]:
            cell.at(parked_ms + cell.parameters.park_patience_ms, lambda: None)
        seen = len(cell.parks)
        if until_ms is not None and cell.now_ms >= until_ms:
            return
        if not cell.step():
            return


def future(cell: Cell, draws: Draws = AS_PREDICTED, first: int = 20_000) -> Future:
    return roll_forward(cell.board.facts(cell.now_ms), cell.parameters, draws, cell.now_ms, first)


def starts_of(cell: Cell) -> dict[str, int]:
    return {one.job: one.at_ms for one in cell.served}


# -- the roll-forward -------------------------------------------------------------------------------


@given(cell=cells())
def test_with_exact_costs_and_nobody_coming_it_plays_what_then_happens(cell: Cell) -> None:
    waiting, told = set(cell.waiting), future(cell)
    wake_after_parks(cell)
    then = starts_of(cell)
    assert dict(told.starts) == {job_id: then[job_id] for job_id in waiting}


@few
@given(cell=cells())
def test_the_same_facts_and_chances_give_the_same_future_and_change_nothing(cell: Cell) -> None:
    before = cell.board.facts(cell.now_ms)
    draws = Draws(cost_permille=(700, 1000, 1600))
    assert future(cell, draws) == future(cell, draws)
    assert cell.board.facts(cell.now_ms) == before


@few
@given(cell=cells())
def test_facts_make_a_board_with_the_same_facts_and_cross_to_another_process(cell: Cell) -> None:
    facts = cell.board.facts(cell.now_ms)
    copy = Board(cell.parameters)
    for event in pickle.loads(pickle.dumps(facts)):
        copy.apply(event)
    assert copy.decide(cell.now_ms) == cell.board.decide(cell.now_ms) == []
    assert set(map(repr, copy.facts(cell.now_ms))) == set(map(repr, facts))


def test_a_run_that_takes_longer_than_was_predicted_is_given_a_cost_that_fits() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 10_000, actual_ms=100_000)
    cell.submit("b", 10_000)
    cell.run(until_ms=15_000)
    draws = Draws(cost_permille=(1000, 1200, 1800, 900))
    assert dict(future(cell, draws).starts) == {JobId("b-2"): 18_000}


def test_a_run_beyond_all_that_was_seen_goes_on_for_a_part_of_its_time_so_far() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 10_000, actual_ms=100_000)
    cell.submit("b", 10_000)
    cell.run(until_ms=15_000)
    assert dict(future(cell).starts) == {JobId("b-2"): 30_000}
    assert dict(future(cell, Draws(beyond_permille=(200,))).starts) == {JobId("b-2"): 18_000}


def test_nobody_is_told_to_start_at_once_after_a_run_beyond_all_that_was_seen() -> None:
    cell, chance = Cell(workers=1), random.Random(5).random
    cell.submit("a", 60_000, actual_ms=HOUR_MS)
    cell.submit("b", 10_000)
    cell.run(until_ms=180_000)
    draws = [resampled(Lately(0).seen(cell.now_ms), chance) for _ in range(19)]
    told = etas(cell.board.facts(cell.now_ms), cell.parameters, draws, cell.now_ms)[JobId("b-2")]
    assert 20_000 < told.p50_ms - cell.now_ms < 200_000
    assert 150_000 < told.p90_ms - cell.now_ms < 3_000_000


def test_facts_may_leave_out_accounts_that_have_nothing_there() -> None:
    cell = Cell(workers=1)
    for name in ("running", "waiting", "lately", "gone"):
        cell.account(name)
    cell.submit("running", 10_000)
    cell.decide()
    cell.submit("waiting", 10_000)
    for name in ("lately", "gone"):
        job_id = JobId(cell.submit(name, 10_000))
        cell.apply(CancelWanted(at_ms=0, job_id=job_id))
        cell.waiting.discard(job_id)
    known = facts(cell.board.cell, 0, [AccountId("lately"), AccountId("unknown"), AccountId("running")])
    told = [fact.account_id for fact in known if isinstance(fact, AccountRestored)]
    assert sorted(told) == ["lately", "running", "waiting"]
    arrivals = (an_arrival("gone", after_ms=1), an_arrival("lately", after_ms=2))
    draws = Draws(arrivals=arrivals)
    assert roll_forward(known, cell.parameters, draws, 0).starts == future(cell, draws).starts


def test_of_many_arrivals_the_newest_are_seen_and_the_time_they_came_in() -> None:
    lately = Lately(0)
    for at_ms in range(100):
        lately.apply(JobSubmitted(at_ms=at_ms, job=a_job(f"job{at_ms}")))
    recent = lately.seen(200, 10)
    assert (recent.span_ms, [at_ms for at_ms, _ in recent.jobs]) == (110, list(range(10)))
    assert [job.job_id for _, job in recent.jobs] == [f"job{at_ms}" for at_ms in range(90, 100)]


def test_who_comes_later_and_has_used_less_goes_first() -> None:
    cell = Cell(REMEMBERING, workers=1)
    for name, usage_ms in (("a", 0), ("heavy", 20 * HOUR_MS), ("light", 0)):
        cell.account(name, usage_ms=usage_ms)
    cell.submit("a", 10_000)
    cell.submit("heavy", 10_000)
    cell.run(until_ms=0)
    alone = future(cell).starts
    arrival = an_arrival("light", after_ms=5_000)
    assert future(cell, Draws(arrivals=(arrival,))).starts == {
        job_id: start_ms + 10_000 for job_id, start_ms in alone.items()
    }


def test_a_newcomer_is_like_the_account_it_is_drawn_from() -> None:
    cell = Cell(REMEMBERING, workers=1)
    cell.account("heavy", usage_ms=20 * HOUR_MS)
    cell.account("light")
    for name in ("light", "light", "light"):
        cell.submit(name, 10_000)
    cell.run(until_ms=0)
    last = JobId("light-3")
    newcomer = replace(an_arrival("x", after_ms=0), like=AccountId("heavy"))
    assert future(cell, Draws(arrivals=(newcomer,))).starts[last] == 20_000
    newcomer = replace(an_arrival("x", after_ms=0), like=AccountId("light"))
    assert future(cell, Draws(arrivals=(newcomer,))).starts[last] == 30_000


def test_an_account_that_has_all_its_jobs_accepted_gets_no_more_in() -> None:
    cell = Cell(workers=1)
    cell.account("a", limits=Limits(running=1, relax_running=1, accepted=1))
    cell.submit("a", 10_000)
    cell.account("b", usage_ms=HOUR_MS)
    cell.submit("b", 10_000)
    cell.run(until_ms=0)
    crowd = tuple(an_arrival("a", after_ms=after_ms) for after_ms in range(9))
    assert dict(future(cell, Draws(arrivals=crowd)).starts) == {JobId("b-2"): 10_000}


def test_jobs_that_no_time_lets_start_are_not_told() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 1000)
    cell.decide()
    cell.submit("a", 1000, name="next")
    cell.submit("b", 1000, gib=64)
    cell.refuse = lambda start: RefusedBecause.FUNDS
    cell.submit("c", 1000, tier=Tier.FAST)
    cell.now_ms = 1
    cell.decide()
    assert list(future(cell).starts) == ["next"]
    cell.apply(TierPaused(at_ms=1, tier=Tier.RELAX))
    assert not future(cell).starts


def test_beyond_the_first_starts_it_goes_by_tags_and_in_their_order() -> None:
    cell = Cell(workers=2)
    for name, _ in itertools.product("abcdef", range(10)):
        cell.submit(name, 10_000)
    cell.decide()
    played, told = future(cell), future(cell, first=12)
    assert set(played.starts) == set(told.starts)
    order = sorted(told.starts, key=lambda job_id: (told.starts[job_id], job_id))
    for job_id, at_ms in told.starts.items():
        assert at_ms == pytest.approx(played.starts[job_id], abs=60_000)
    assert [played.starts[job_id] for job_id in order] == sorted(played.starts.values())


def test_a_fast_job_that_parks_a_run_is_told_of_and_the_run_goes_on() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 10_000)
    cell.decide()
    cell.now_ms = 4_000
    cell.submit("a", 5_000, name="next")
    cell.submit("b", 5_000, tier=Tier.FAST, name="fast")
    told = future(cell)
    assert dict(told.starts) == {JobId("fast"): 4_000, JobId("next"): 15_000}
    assert told.parking == {"fast"}


def test_a_load_of_a_model_takes_its_time_and_makes_room() -> None:
    cell = Cell(EXACT, workers=0)
    cell.join(a_worker(gib=16, warm=()))
    for name, model in (("a", "m"), ("b", "n"), ("c", "m")):
        cell.submit(name, 1_000, model=model, gib=10, name=name)
    # Level accounts may change places to save a load; the model that is loaded has to go for the other.
    assert dict(future(cell, Draws(load_ms=500)).starts) == {"a": 0, "c": 1_500, "b": 2_500}


# -- chances ----------------------------------------------------------------------------------------


def test_lately_knows_what_came_in_the_last_hour_and_what_jobs_took() -> None:
    cell, lately = Cell(workers=1), Lately(0)
    cell.submit("a", 1_000, actual_ms=1_500)
    cell.run()
    cell.now_ms = 2 * HOUR_MS
    cell.submit("b", 1_000, actual_ms=800)
    cell.run()
    for event in cell.journal:
        if not hasattr(event, "decisions"):
            lately.apply(event)
    recent = lately.seen(2 * HOUR_MS + 600_000)
    assert [(at_ms, job.account_id) for at_ms, job in recent.jobs] == [(HOUR_MS - 600_000, "b")]
    assert recent.cost_permille == (1500, 800)
    assert recent.span_ms == HOUR_MS


@given(uniforms=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=200))
def test_what_is_drawn_came_lately(uniforms: list[float]) -> None:
    jobs = tuple((at_ms, a_job(f"job{at_ms}", account="abc"[at_ms % 3])) for at_ms in range(0, 900, 7))
    recent = Recent(span_ms=1_000, jobs=jobs, cost_permille=(900, 1100))
    draws = resampled(recent, itertools.cycle(uniforms).__next__)
    assert all(0 <= one.after_ms <= 1_000 and one.like in ("a", "b", "c") for one in draws.arrivals)
    assert [one.after_ms for one in draws.arrivals] == sorted(one.after_ms for one in draws.arrivals)
    assert set(draws.cost_permille) <= {900, 1100}


def test_what_came_a_moment_ago_comes_again_in_a_moment() -> None:
    jobs = ((100, a_job("first")), (900, a_job("second", account="b")), (990, a_job("third", account="c")))
    recent = Recent(span_ms=1_000, jobs=jobs, cost_permille=())
    half_the_span_and_all_stay = resampled(recent, lambda: 0.5)
    told = [(one.after_ms, one.account_id) for one in half_the_span_and_all_stay.arrivals]
    assert told == [(10, "c"), (100, "b")]
    assert half_the_span_and_all_stay.repeat_ms == 500


def test_as_much_is_drawn_in_the_mean_as_came() -> None:
    jobs = tuple((at_ms, a_job(f"job{at_ms}", account=f"account{at_ms % 50}")) for at_ms in range(1_000))
    recent = Recent(span_ms=1_000, jobs=jobs, cost_permille=())
    chance = random.Random(7).random
    drawn = [resampled(recent, chance) for _ in range(200)]
    rates = [len(one.arrivals) / one.repeat_ms for one in drawn]
    assert sum(rates) / len(rates) == pytest.approx(1, abs=0.05)


def test_of_nothing_nothing_is_drawn() -> None:
    draws = resampled(Recent(span_ms=1, jobs=(), cost_permille=()), lambda: 0.5)
    assert (draws.arrivals, set(draws.cost_permille)) == ((), {1000})


# -- what is told -----------------------------------------------------------------------------------


def test_nine_futures_tell_the_middle_and_the_ninth() -> None:
    assert eta_of([3, 1, 2, 9, 8, 7, 4, 5, 6]) == Eta(p50_ms=5, p90_ms=9)
    assert eta_of(range(1, 20)) == Eta(p50_ms=10, p90_ms=18)


@few
@given(cell=cells(), costs=st.lists(st.integers(500, 2000), min_size=9, max_size=9))
def test_p50_is_never_after_p90_and_nothing_starts_before_now(cell: Cell, costs: list[int]) -> None:
    facts = cell.board.facts(cell.now_ms)
    draws = [Draws(cost_permille=(cost,)) for cost in costs]
    told = etas(facts, cell.parameters, draws, cell.now_ms)
    assert set(told) == cell.waiting
    assert all(cell.now_ms <= one.p50_ms <= one.p90_ms for one in told.values())


def test_at_a_glance_a_job_starts_at_once_where_a_gpu_is_free() -> None:
    cell = Cell(workers=2)
    cell.submit("a", 10_000)
    cell.decide()
    assert glance(cell, "b", Tier.RELAX) == Eta(p50_ms=0, p90_ms=0)


def test_at_a_glance_a_fast_job_starts_at_once_where_relax_runs() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 10_000, step_ms=100)
    cell.decide()
    assert glance(cell, "b", Tier.FAST) == Eta(p50_ms=0, p90_ms=0)


def test_at_a_glance_more_before_it_is_a_longer_wait() -> None:
    cell = Cell(workers=2)
    waits = []
    for number in range(6):
        cell.submit(f"x{number}", 10_000)
        cell.decide()
        told = glance(cell, "b", Tier.RELAX)
        assert told is not None
        waits.append(told.p50_ms)
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert waits[-1] > 0


def test_at_a_glance_a_job_beyond_the_caps_waits_for_its_own() -> None:
    cell = Cell(workers=9)
    cell.account("a", limits=Limits(running=1, relax_running=1, accepted=10))
    assert glance(cell, "a", Tier.RELAX) == Eta(p50_ms=0, p90_ms=0)
    cell.submit("a", 10_000)
    cell.decide()
    told = glance(cell, "a", Tier.RELAX)
    assert told is not None
    assert told.p50_ms == 10_000


def test_at_a_glance_nothing_is_said_where_a_gate_holds() -> None:
    cell = Cell(workers=0)
    assert glance(cell, "a", Tier.RELAX) is None
    cell.join(a_worker())
    cell.apply(TierPaused(at_ms=0, tier=Tier.RELAX))
    assert glance(cell, "a", Tier.RELAX) is None


# -- what if ----------------------------------------------------------------------------------------


@few
@given(cell=cells())
def test_no_change_changes_nothing(cell: Cell) -> None:
    facts, told = cell.board.facts(cell.now_ms), future(cell)
    for job_id in sorted(cell.waiting)[:1]:
        outcome = what_if(facts, cell.parameters, [AS_PREDICTED], cell.now_ms, Change(job_id=JobId(job_id)))
        start_ms = told.starts[JobId(job_id)]
        assert outcome.start == Eta(p50_ms=start_ms, p90_ms=start_ms)
        assert (outcome.others_delayed, outcome.delay_ms_sum) == (0, 0)


@few
@given(cell=cells(), data=st.data())
def test_a_job_that_comes_out_of_nothing_delays_others_and_hurries_none_of_one_gpu(
    cell: Cell, data: st.DataObject
) -> None:
    job = a_job("new", account="z", predicted_ms=data.draw(st.integers(1, 40_000)))
    outcome = what_if(
        cell.board.facts(cell.now_ms),
        cell.parameters,
        [AS_PREDICTED],
        cell.now_ms,
        submitted(job, cell.now_ms, an_account("z")),
    )
    assert outcome.start is not None
    assert outcome.cost_ms == 0
    assert outcome.gpu_ms == job.predicted_ms
    if cell.board.sharing().gpus == 1:
        assert outcome.delay_ms_sum >= 0


def test_as_fast_it_starts_at_once_costs_its_time_and_parks_a_run() -> None:
    cell = Cell(workers=1)
    for name in "abc":
        cell.submit(name, 10_000)
    cell.decide()
    cell.now_ms = 1_000
    facts = cell.board.facts(1_000)
    as_it_is = what_if(facts, cell.parameters, [AS_PREDICTED] * 9, 1_000, Change(job_id=JobId("c-3")))
    assert as_it_is.start == Eta(p50_ms=20_000, p90_ms=20_000)
    change = in_tier(JobId("c-3"), Tier.FAST, 1_000)
    as_fast = what_if(facts, cell.parameters, [AS_PREDICTED] * 9, 1_000, change)
    assert as_fast.start == Eta(p50_ms=1_000, p90_ms=1_000)
    assert as_fast.cost_ms == 10_000
    assert as_fast.parks_permille == 1000
    assert (as_fast.others_delayed, as_fast.delay_ms_sum) == (1, 10_000)


def test_as_relax_it_costs_nothing_and_others_gain() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 10_000, tier=Tier.FAST)
    cell.decide()
    cell.submit("b", 10_000, tier=Tier.FAST, name="b")
    cell.submit("c", 10_000, tier=Tier.FAST, name="c")
    change = in_tier(JobId("b"), Tier.RELAX, 0)
    outcome = what_if(cell.board.facts(0), cell.parameters, [AS_PREDICTED], 0, change)
    assert outcome.start == Eta(p50_ms=20_000, p90_ms=20_000)
    assert (outcome.gpu_ms, outcome.cost_ms) == (10_000, 0)
    assert (outcome.others_delayed, outcome.delay_ms_sum) == (0, -10_000)


def test_on_a_plan_with_higher_caps_a_job_starts_that_its_caps_held() -> None:
    cell = Cell(workers=2)
    cell.account("a", limits=Limits(running=1, relax_running=1, accepted=10))
    for _ in range(2):
        cell.submit("a", 10_000)
    cell.decide()
    facts, job_id = cell.board.facts(0), JobId("a-2")
    held = what_if(facts, cell.parameters, [AS_PREDICTED], 0, Change(job_id=job_id))
    assert held.start == Eta(p50_ms=10_000, p90_ms=10_000)
    change = on_plan(job_id, AccountId("a"), PLAN, 1000, 0)
    assert what_if(facts, cell.parameters, [AS_PREDICTED], 0, change).start == Eta(p50_ms=0, p90_ms=0)


# -- builders ---------------------------------------------------------------------------------------


def a_job(name: str, *, account: str = "a", tier: Tier = Tier.RELAX, predicted_ms: int = 10_000) -> Job:
    return Job(
        job_id=JobId(name),
        account_id=AccountId(account),
        tier=tier,
        arrival=1_000_000,
        predicted_ms=predicted_ms,
        step_ms=predicted_ms // 20,
        model="m",
        memory_bytes=GIB,
    )


def an_account(name: str) -> AccountRestored:
    share = FairShare(finish_tag=0, tag=None, usage=0.0)
    return AccountRestored(
        at_ms=0, account_id=AccountId(name), limits=PLAN, weight_milli=1000, shares={Tier.RELAX: share}
    )


def an_arrival(account: str, *, after_ms: int, predicted_ms: int = 10_000) -> Arrival:
    return Arrival(
        after_ms=after_ms,
        account_id=AccountId(account),
        like=AccountId(account),
        tier=Tier.RELAX,
        predicted_ms=predicted_ms,
        step_ms=predicted_ms // 20,
        model="m",
        memory_bytes=GIB,
    )


def glance(cell: Cell, account: str, tier: Tier) -> Eta | None:
    return quick_eta(cell.board.cell, a_job("new", account=account, tier=tier), 10_000, cell.now_ms)
