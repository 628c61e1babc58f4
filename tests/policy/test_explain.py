"""Why a job is where it is: every gate, its place, what ends first, and bounds on its wait that hold."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cell import NEVER_MS, PLAN, REMEMBERING, WIDE, Cell, a_worker

from scheduler.client.terminal import about
from scheduler.policy.events import AttemptLost, RefusedBecause, TierPaused
from scheduler.policy.explain import Before, Explanation, Stage
from scheduler.policy.ids import AttemptId, JobId, Tier
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.status import QueueReason

HOUR_MS = 3_600_000
LARGEST_MS = 60_000


def why(cell: Cell, job_id: str) -> Explanation:
    explanation = cell.board.explain(JobId(job_id), cell.now_ms)
    assert explanation is not None
    return explanation


def attempt_of(cell: Cell, job_id: str) -> AttemptId:
    return next(one.attempt_id for one in cell.running.values() if one.job.job_id == job_id)


# -- gates ------------------------------------------------------------------------------------------


def test_a_job_that_is_not_there_has_no_explanation() -> None:
    assert Cell().board.explain(JobId("nobody's"), 0) is None


def test_all_gates_are_told_first_those_that_others_must_open() -> None:
    cell = Cell(workers=1)
    cell.account("a", limits=Limits(running=1, relax_running=1, accepted=10))
    cell.submit("a", 1000)
    cell.submit("a", 1000, gib=64, name="large")
    cell.decide()
    cell.apply(TierPaused(at_ms=0, tier=Tier.RELAX))
    told = why(cell, "large")
    assert [gate.reason for gate in told.gates] == [
        QueueReason.TIER_PAUSED,
        QueueReason.NO_WORKER,
        QueueReason.CONCURRENCY_LIMIT,
    ]
    assert told.sentences == tuple(gate.sentence for gate in told.gates)
    assert (told.before, told.bound) == (None, None)


def test_a_job_held_for_funds_says_so() -> None:
    cell = Cell(workers=1)
    cell.refuse = lambda start: RefusedBecause.FUNDS
    cell.submit("a", 1000, tier=Tier.FAST, name="fast")
    cell.decide()
    assert [gate.reason for gate in why(cell, "fast").gates] == [QueueReason.FUNDS]


def test_a_job_beyond_the_caps_is_told_which_of_its_own_ends_first() -> None:
    cell = Cell(workers=4)
    cell.account("a", limits=PLAN)
    for cost_ms in (50_000, 20_000, 1000, 1000):
        cell.submit("a", cost_ms, name=f"a{cost_ms}" if cost_ms > 1000 else None)
    cell.submit("b", 5_000)
    cell.run(until_ms=2_000)
    last = sorted(cell.waiting)[-1]
    told = why(cell, last)
    assert [gate.reason for gate in told.gates] == [QueueReason.CONCURRENCY_LIMIT]
    assert told.before == Before(
        own=True, earlier=1, running=2, parked=0, fast_waiting=0, soonest_end_ms=20_000
    )
    assert told.sentences[1:] == (
        "1 earlier job of yours waits before it.",
        "2 jobs of yours run; the first of them will probably end in 18 s.",
    )


def test_a_job_that_lost_its_workers_too_often_says_that_it_is_given_up() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 1000, name="job")
    for _ in range(3):
        cell.decide()
        cell.apply(AttemptLost(at_ms=0, attempt_id=attempt_of(cell, "job")))
        cell.running.clear()
        cell.waiting.add("job")
    told = why(cell, "job")
    assert told.stage is Stage.GIVEN_UP
    assert "lost 3 times" in told.sentences[0]


# -- the order --------------------------------------------------------------------------------------


def test_a_waiting_job_has_its_place_and_its_tag_against_the_one_being_served() -> None:
    cell = Cell(REMEMBERING, workers=1)
    cell.account("light")
    cell.account("heavy", usage_ms=30 * HOUR_MS)
    cell.submit("busy", 30_000)
    cell.decide()
    heavy, light = cell.submit("heavy", 10_000), cell.submit("light", 10_000)
    cell.now_ms = 10_000
    first, second = why(cell, light), why(cell, heavy)
    assert first.place is not None
    assert second.place is not None
    assert (first.place.position, second.place.position, second.place.of) == (1, 2, 2)
    span = REMEMBERING.memory_span_ms
    assert second.place.memory == span * 1000
    assert second.place.tag == first.place.tag + span * 1000
    assert second.place.used_per_weight_ms > 29 * HOUR_MS
    assert second.before == Before(
        own=False, earlier=0, running=1, parked=0, fast_waiting=0, soonest_end_ms=30_000
    )
    assert second.sentences[:3] == (
        "Your job is number 2 in the relax queue.",
        "Jobs go in the order of their tags: relax has served up to 0.0 s, "
        f"and this job has {span / 1000:,.1f} s.",
        f"Your recent use (1,800.0 GPU-min per unit of your weight) counts for {span / 1000:,.1f} s of that.",
    )


def test_no_sentence_names_another_account_or_job() -> None:
    cell = Cell(workers=1)
    names = ["accountant", "brother", "cousin"]
    for name in names:
        cell.submit(name, 10_000, step_ms=500, name=f"{name}s-picture")
    cell.decide()
    cell.submit("dentist", 5_000, tier=Tier.FAST, name="dentists-picture")
    cell.decide()
    for job_id in cell.jobs:
        said = " ".join(why(cell, job_id).sentences)
        assert not re.search("accountant|brother|cousin|dentist|picture", said)


def test_a_relax_job_is_told_of_the_parked_runs_and_fast_jobs_before_it() -> None:
    cell = Cell(workers=4)
    for _ in range(4):
        cell.submit("a", 20_000, step_ms=1000)
    cell.decide()
    for _ in range(4):
        cell.submit("f", 20_000, tier=Tier.FAST)
    cell.decide()
    job_id = cell.submit("b", 1000)
    before = why(cell, job_id).before
    # The floor leaves relax one of the four.
    assert before is not None
    assert (before.running, before.parked, before.fast_waiting) == (4, 3, 1)


# -- runs -------------------------------------------------------------------------------------------


def test_a_run_says_when_it_will_end_and_how_often_it_was_parked() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 20_000, step_ms=1000, name="job")
    cell.run(until_ms=4_000)
    cell.submit("b", 5_000, tier=Tier.FAST)
    cell.run(until_ms=6_000)
    parked = why(cell, "job")
    assert (parked.stage, parked.parks, parked.parked_since_ms) == (Stage.PARKED, 1, 4_000)
    assert parked.ends_ms == 9_000
    assert parked.sentences[:2] == (
        "It has been parked for 2 s, between two steps, as a fast job needed its GPU; no step is done twice.",
        "That job will probably end in 3 s; then it goes on.",
    )
    cell.run(until_ms=10_000)
    running = why(cell, "job")
    assert (running.stage, running.ends_ms, running.started_ms) == (Stage.RUNNING, 25_000, 0)
    assert running.sentences == (
        "It runs, and will probably end in 15 s.",
        "It was parked for fast jobs once, and lost nothing by it but time.",
    )


def test_a_run_that_is_overdue_may_end_at_any_moment() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 1_000, actual_ms=9_000, name="job")
    cell.run(until_ms=4_000)
    assert why(cell, "job").sentences == ("It runs, and will probably end at any moment.",)


def test_a_cancelled_run_says_so_first() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 9_000, name="job")
    cell.decide()
    cell.cancel("job")
    assert why(cell, "job").sentences[0] == "It was cancelled, and ends at its next step."


# -- bounds -----------------------------------------------------------------------------------------

crowds = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1, 4]),
        st.integers(0, 30 * HOUR_MS),
        st.lists(st.integers(LARGEST_MS // 2, LARGEST_MS), min_size=2, max_size=8),
    ),
    min_size=3,
    max_size=8,
)


def crowded(parameters: Parameters, gpus: int, crowd: list[tuple[float, int, list[int]]]) -> Cell:
    cell = Cell(parameters, workers=gpus)
    for number, (weight, usage_ms, costs) in enumerate(crowd):
        cell.account(f"account{number}", weight=weight, usage_ms=usage_ms, limits=WIDE)
        for cost_ms in costs:
            cell.submit(f"account{number}", cost_ms)
    cell.decide()
    return cell


@given(crowd=crowds, gpus=st.integers(3, 5), later_ms=st.integers(0, 60_000))
def test_b2_every_job_starts_within_the_bound_it_was_told(
    crowd: list[tuple[float, int, list[int]]], gpus: int, later_ms: int
) -> None:
    parameters = Parameters(affinity_ms=0, aging_ms=NEVER_MS, max_predicted_ms=LARGEST_MS)
    cell = crowded(parameters, gpus, crowd)
    cell.run(until_ms=later_ms)
    told = {job_id: why(cell, job_id) for job_id in cell.waiting}
    cell.run()
    for job_id, explanation in told.items():
        bound = explanation.bound
        assert (bound is None) == (gpus < 4)
        if bound is not None:
            assert bound.calm_ms is not None
            assert bound.calm_ms <= bound.within_ms
            assert cell.started_ms(job_id) - later_ms <= bound.calm_ms


@given(
    crowd=crowds,
    gpus=st.integers(4, 6),
    later_ms=st.integers(0, 60_000),
    newcomers=st.lists(st.integers(LARGEST_MS // 2, LARGEST_MS), min_size=20, max_size=60),
)
def test_whoever_comes_the_first_job_of_an_account_starts_within_the_bound_of_its_age(
    crowd: list[tuple[float, int, list[int]]], gpus: int, later_ms: int, newcomers: list[int]
) -> None:
    parameters = Parameters(affinity_ms=0, aging_ms=120_000, max_predicted_ms=LARGEST_MS)
    cell = crowded(parameters, gpus, crowd)
    cell.run(until_ms=later_ms)
    told = {job_id: why(cell, job_id).bound for job_id in cell.waiting}
    for number, cost_ms in enumerate(newcomers):
        when_ms = later_ms + number * 5_000
        cell.at(when_ms, lambda number=number, cost_ms=cost_ms: cell.submit(f"new{number}", cost_ms))
    cell.run()
    for job_id, bound in told.items():
        assert bound is not None
        if bound.whatever_ms is not None:
            assert cell.started_ms(job_id) - later_ms <= bound.whatever_ms


def test_a_fleet_without_a_floor_bounds_nothing_for_relax_and_says_what_it_gets() -> None:
    cell = Cell(workers=2)
    for name in "abc":
        cell.submit(name, 10_000, name=name)
    cell.decide()
    told = why(cell, "c")
    assert told.bound is None
    assert "relax gets one start in 10 of those that fast would have" in told.sentences[-1]


@pytest.mark.parametrize("much", ["jobs", "runs"])
def test_where_much_waits_or_runs_a_job_is_told_its_place_and_nothing_that_takes_a_walk(much: str) -> None:
    cell = Cell(workers=20)
    for _ in range(22):
        cell.submit("a", 10_000)
    cell.decide()
    cell.submit("b", 10_000, name="waits")
    whole = why(cell, "waits")
    assert whole.before is not None
    assert whole.bound is not None
    queue, attempts = cell.board.cell.queues[Tier.RELAX], cell.board.cell.attempts
    if much == "jobs":
        queue.could_start += 2_000
    else:
        attempt = next(iter(attempts.values()))
        attempts.update({AttemptId(f"more {number}"): attempt for number in range(2_000)})
    told = why(cell, "waits")
    assert (told.before, told.bound, told.gates) == (None, None, ())
    assert told.place is not None
    assert told.place.tag == (whole.place and whole.place.tag)
    assert len(told.sentences) == 3
    assert not any("surely" in sentence for sentence in told.sentences)


@pytest.mark.parametrize("ms", [400, 1_499, 99_400, 99_600, 190_000, 215_000, 5_999_000, 8_100_000])
def test_a_run_ends_in_the_words_of_the_command_line(ms: int) -> None:
    cell = Cell(workers=1)
    cell.submit("a", ms, name="run")
    cell.decide()
    assert why(cell, "run").sentences == (f"It runs, and will probably end in {about(ms)}.",)


def test_a_bound_counts_only_gpus_that_can_run_the_job_at_the_speed_of_the_slowest() -> None:
    cell = Cell(Parameters(max_predicted_ms=LARGEST_MS), workers=0)
    for number in range(20):
        cell.join(a_worker(f"w{number}", gib=8))
    for number in range(20, 22):
        cell.join(a_worker(f"w{number}", gib=32, speed=500))
    for _ in range(22):
        cell.submit("a", 10_000)
    cell.decide()
    bound = why(cell, cell.submit("b", 10_000)).bound
    assert bound is not None
    assert bound.gpus == 2
    assert bound.within_ms == bound.calm_ms == LARGEST_MS * 2
    cell.submit("c", 10_000, gib=20, name="large")
    # Fast may take 20 of the 22, and the two that could run it among them.
    assert why(cell, "large").bound is None
