"""The bounds of the policy over random schedules: who goes first, how unequal service and waits can be.

Ids are those of the policy page. Those up to B5 are stated for exact predictions, without preemption,
affinity, aging and binding caps; beside them stands how far each of these moves them. B9 and B12, which need
a whole history, are in `test_policy_chaos`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from policy_cell import NEVER_MS, PLAIN, REMEMBERING, Cell, Decided, Running, a_worker
from policy_chaos import Chaos, Step, faults, parameters, plans

from scheduler.policy import usage
from scheduler.policy.decisions import Migrate, Resume, Start
from scheduler.policy.events import AttemptFinished, AttemptStarted, LimitsChanged
from scheduler.policy.ids import AccountId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.policy.preemption import relax_floor

pytestmark = pytest.mark.timeout(900)

HOUR_MS = 3_600_000
costs = st.integers(1, 60_000)
uses = st.integers(0, 30 * HOUR_MS)
weights = st.sampled_from([0.5, 1, 1.5, 4])
workers = st.integers(1, 4)
thetas = st.sampled_from([1_000, 60_000])
fast_loads = st.lists(st.tuples(st.integers(0, 300_000), costs), max_size=20)
"""(when, cost)"""


@dataclass(frozen=True)
class Other:
    """An account that is there, with jobs that come at given times."""

    weight: float
    use_ms: int
    jobs: list[tuple[int, int]]
    """(when, cost)"""


others = st.lists(
    st.builds(
        Other,
        weight=weights,
        use_ms=uses,
        jobs=st.lists(st.tuples(st.integers(0, 300_000), costs), min_size=1, max_size=12),
    ),
    max_size=5,
)


def populate(cell: Cell, present: list[Other], models: str = "m", error: int = 0) -> None:
    """Have the accounts send their jobs, every other one `error` longer than predicted, the rest shorter."""
    for number, other in enumerate(present):
        name = f"other{number}"
        cell.account(name, weight=other.weight, usage_ms=other.use_ms)
        for index, (when_ms, cost_ms) in enumerate(other.jobs):
            took = max(0, cost_ms + (error if index % 2 else -error))
            model = models[index % len(models)]
            cell.at(when_ms, partial(cell.submit, name, cost_ms, actual_ms=took, model=model, step_ms=1000))


def send_fast(cell: Cell, load: list[tuple[int, int]]) -> None:
    for number, (when_ms, cost_ms) in enumerate(load):
        cell.at(when_ms, partial(cell.submit, f"payer{number % 3}", cost_ms, tier=Tier.FAST))


def a_fleet_of_many_models(parameters: Parameters, gpus: int) -> Cell:
    """Every worker has another model loaded, and can load any."""
    cell = Cell(parameters, workers=0)
    for number in range(gpus):
        cell.join(a_worker(f"w{number}", warm=("mno"[number % 3],)))
    return cell


def spread(values: list[float]) -> float:
    return max(values) - min(values)


def rise(values: list[float]) -> float:
    """Return the most that a later value is above an earlier one."""
    lowest, most = values[0], 0.0
    for value in values:
        lowest = min(lowest, value)
        most = max(most, value - lowest)
    return most


@given(
    first_use=uses, second_use=uses, first_weight=weights, second_weight=weights, present=others, gpus=workers
)
def test_o1_less_use_per_weight_is_served_first_whichever_came_first(
    first_use: int,
    second_use: int,
    first_weight: float,
    second_weight: float,
    present: list[Other],
    gpus: int,
) -> None:
    assume(first_use / first_weight != second_use / second_weight)
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    cell.run(until_ms=100_000)
    cell.account("f", weight=first_weight, usage_ms=first_use)
    cell.account("g", weight=second_weight, usage_ms=second_use)
    cell.submit("f")
    cell.submit("g")
    cell.run()
    order = [one.account for one in cell.served if one.account in "fg"]
    assert order[0] == ("f" if first_use / first_weight < second_use / second_weight else "g")


def most_starts_ahead(cell: Cell, more: int, less: int, cost_ms: int, models: str = "m") -> int:
    """Return how many starts more the account with more use got over any interval in which both had jobs."""
    stored = {"more": float(more), "less": float(less)}
    left = dict.fromkeys(stored, 25)
    for name, use in stored.items():
        cell.account(name, usage_ms=use)
        for number in range(left[name]):
            cell.submit(name, cost_ms, model=models[number % len(models)], step_ms=1000)
    cell.run()
    ahead, lowest, most = 0, 0, 0
    for one in cell.served:
        if one.account not in stored:
            continue
        if stored["more"] > stored["less"]:
            ahead += 1 if one.account == "more" else -1
            lowest = min(lowest, ahead)
            most = max(most, ahead - lowest)
        else:
            ahead = lowest = 0
        stored[one.account] += one.start.charge.usage_added
        left[one.account] -= 1
        if not left[one.account]:
            break
    return most


@given(more=uses, less=uses, cost_ms=costs, present=others, gpus=workers)
def test_o2_more_use_never_gets_more_than_one_start_more(
    more: int, less: int, cost_ms: int, present: list[Other], gpus: int
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    assert most_starts_ahead(cell, more, less, cost_ms) <= 1


@given(more=uses, less=uses, cost_ms=costs, present=others, gpus=st.integers(1, 8), fast=fast_loads)
def test_o2_is_not_moved_by_preemption(
    more: int, less: int, cost_ms: int, present: list[Other], gpus: int, fast: list[tuple[int, int]]
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    send_fast(cell, fast)
    assert most_starts_ahead(cell, more, less, cost_ms) <= 1


@given(more=uses, less=uses, cost_ms=costs, present=others, gpus=workers, theta_ms=thetas)
def test_o2_is_moved_by_affinity_at_most_by_the_jobs_in_theta_each_way(
    more: int, less: int, cost_ms: int, present: list[Other], gpus: int, theta_ms: int
) -> None:
    cell = a_fleet_of_many_models(Parameters(affinity_ms=theta_ms, aging_ms=NEVER_MS), gpus)
    populate(cell, present, models="mno")
    assert most_starts_ahead(cell, more, less, cost_ms, models="mno") <= 1 + 2 * -(-theta_ms // cost_ms)


@dataclass(frozen=True)
class Pair:
    """Two accounts that keep jobs waiting, f and g."""

    jobs: dict[str, list[int]]
    weight: dict[str, float]


pairs = st.builds(
    lambda f, g, weight_f, weight_g: Pair({"f": f, "g": g}, {"f": weight_f, "g": weight_g}),
    f=st.lists(costs, min_size=2, max_size=20),
    g=st.lists(costs, min_size=2, max_size=20),
    weight_f=weights,
    weight_g=weights,
)


def submit_pair(
    cell: Cell, pair: Pair, *, models: str = "m", took: Callable[[str, int], int] = lambda name, ms: ms
) -> None:
    """Submit all jobs of both; `took` says what a job takes, by account and predicted cost."""
    for name, jobs in pair.jobs.items():
        cell.account(name, weight=pair.weight[name])
        for number, cost_ms in enumerate(jobs):
            model = models[number % len(models)]
            cell.submit(name, cost_ms, actual_ms=took(name, cost_ms), model=model, step_ms=1000)


def service_differences(cell: Cell, pair: Pair) -> list[float]:
    """Return what f was charged more than g per weight, at each start and end while both had jobs waiting."""
    left = {name: len(jobs) for name, jobs in pair.jobs.items()}
    charges: dict[str, tuple[str, int]] = {}
    differences = [0.0]

    def charge(name: str, cost_ms: int) -> None:
        change = cost_ms / pair.weight[name]
        differences.append(differences[-1] + (change if name == "f" else -change))

    for entry in cell.journal:
        match entry:
            case AttemptStarted() if (name := cell.jobs[entry.job_id].account_id) in left:
                charges[entry.attempt_id] = (name, entry.charge.predicted_ms)
                charge(name, entry.charge.predicted_ms)
                left[name] -= 1
                if not left[name]:
                    break
            case AttemptFinished() if entry.attempt_id in charges:
                name, predicted_ms = charges[entry.attempt_id]
                charge(name, entry.gpu_ms - predicted_ms)
    return differences


def a_job_each(pair: Pair) -> float:
    """Return the bound of B1, and a millisecond for all the starts that round tags to microseconds."""
    return sum(max(pair.jobs[name]) / pair.weight[name] for name in "fg") + 1


@given(pair=pairs, present=others, gpus=workers)
def test_b1_service_of_two_waiting_accounts_differs_by_at_most_a_job_each(
    pair: Pair, present: list[Other], gpus: int
) -> None:
    cell = Cell(PLAIN, workers=gpus)
    populate(cell, present)
    submit_pair(cell, pair)
    cell.run()
    assert spread(service_differences(cell, pair)) <= a_job_each(pair)


@given(pair=pairs, present=others, gpus=st.integers(1, 8), fast=fast_loads)
def test_b1_is_not_moved_by_preemption(
    pair: Pair, present: list[Other], gpus: int, fast: list[tuple[int, int]]
) -> None:
    """A park delays who was served already; who is served next does not hang on it."""
    cell = Cell(PLAIN, workers=gpus)
    populate(cell, present)
    send_fast(cell, fast)
    submit_pair(cell, pair)
    cell.run()
    assert spread(service_differences(cell, pair)) <= a_job_each(pair)


@given(pair=pairs, present=others, gpus=workers, theta_ms=thetas)
def test_b1_is_moved_by_affinity_at_most_theta_each_way(
    pair: Pair, present: list[Other], gpus: int, theta_ms: int
) -> None:
    """Who passes to save a load is at most theta behind who is passed."""
    cell = a_fleet_of_many_models(Parameters(memory_span_ms=0, affinity_ms=theta_ms, aging_ms=NEVER_MS), gpus)
    populate(cell, present, models="mno")
    submit_pair(cell, pair, models="mno")
    cell.run()
    assert spread(service_differences(cell, pair)) <= a_job_each(pair) + 2 * theta_ms


@given(pair=pairs, present=others, gpus=workers, longer=costs)
def test_b1_is_moved_by_jobs_that_take_longer_by_what_runs_at_once(
    pair: Pair, present: list[Other], gpus: int, longer: int
) -> None:
    """Until it ends, a run is charged too little by its error."""
    cell = Cell(PLAIN, workers=gpus)
    populate(cell, present)
    submit_pair(cell, pair, took=lambda name, ms: ms + longer)
    cell.run()
    error = gpus * longer / min(pair.weight.values())
    assert spread(service_differences(cell, pair)) <= a_job_each(pair) + 2 * error


@given(pair=pairs, present=others, gpus=workers, shorter=costs)
def test_b1_lets_jobs_that_take_less_than_predicted_gain_no_more_than_what_runs_at_once(
    pair: Pair, present: list[Other], gpus: int, shorter: int
) -> None:
    """They give the rest back when they end.

    If `V` has passed their account by then, a part of it is lost to the account: it may fall behind this
    bound, but never gets ahead of it.
    """
    cell = Cell(PLAIN, workers=gpus)
    populate(cell, present)
    submit_pair(cell, pair, took=lambda name, ms: max(0, ms - shorter) if name == "f" else ms)
    cell.run()
    error = gpus * shorter / pair.weight["f"]
    assert rise(service_differences(cell, pair)) <= a_job_each(pair) + 2 * error


@dataclass(frozen=True)
class Wait:
    """How an account's job waited, and what its bounds are made of."""

    waited_ms: int
    ahead_ms: float
    """Of its tag to virtual time, when it came."""
    weights: list[float]
    """Of the other accounts that were served meanwhile."""
    c_max: int
    in_hand: int
    """Relax runs there were when it came, active and parked."""

    def bound(self, gpus: int, *, behind_ms: float | None = None) -> float:
        """Return the bound of B2 for `gpus` that fast may never take."""
        behind = self.ahead_ms if behind_ms is None else behind_ms
        return self.c_max + sum(weight * behind + self.c_max for weight in self.weights) / gpus


def wait_of(cell: Cell, account: str, cost_ms: int, model: str = "m") -> Wait:
    """Submit a job at 100 s, run everything, and return how it waited."""
    cell.run(until_ms=100_000)
    before, virtual_time = len(cell.served), cell.board.virtual_time(Tier.RELAX)
    in_hand = sum(one.job.tier is Tier.RELAX for one in cell.running.values())
    job = cell.submit(account, cost_ms, model=model, step_ms=1000)
    cell.run()
    index = next(index for index, one in enumerate(cell.served) if one.job == job)
    relaxed = [one for one in cell.served[before:index] if one.start.tier is Tier.RELAX]
    return Wait(
        waited_ms=cell.served[index].at_ms - 100_000,
        ahead_ms=(cell.served[index].start.charge.start_tag - virtual_time) / 1000,
        weights=[cell.weights[other] / 1000 for other in {one.account for one in relaxed} - {account}],
        c_max=max(cell.actual_ms[key] for key, one in cell.jobs.items() if one.tier is Tier.RELAX),
        in_hand=in_hand,
    )


@given(use_ms=uses, weight=weights, cost_ms=costs, present=others, gpus=workers)
def test_b2_a_wait_is_bounded_by_the_distance_of_the_tag(
    use_ms: int, weight: float, cost_ms: int, present: list[Other], gpus: int
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    cell.account("u", weight=weight, usage_ms=use_ms)
    wait = wait_of(cell, "u", cost_ms)
    assert wait.waited_ms <= wait.bound(gpus)


@given(cost_ms=costs, present=others, gpus=workers)
def test_b3_a_fresh_account_starts_within_one_job_of_each_other(
    cost_ms: int, present: list[Other], gpus: int
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    wait = wait_of(cell, "fresh", cost_ms)
    assert wait.waited_ms <= wait.c_max * (1 + len(wait.weights) / gpus)


@given(cost_ms=costs, present=others, gpus=workers)
def test_b4_the_heaviest_account_starts_within_the_span_of_memory(
    cost_ms: int, present: list[Other], gpus: int
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    cell.account("heaviest", usage_ms=10_000 * HOUR_MS)
    wait = wait_of(cell, "heaviest", cost_ms)
    span_ms = REMEMBERING.memory_span_ms * sum(wait.weights)
    assert wait.waited_ms <= span_ms / gpus + wait.c_max * (1 + len(wait.weights) / gpus)


@given(
    use_ms=uses, cost_ms=costs, present=others, gpus=workers, theta_ms=thetas, model=st.sampled_from("mno")
)
def test_b2_to_b4_are_moved_by_affinity_at_most_theta_of_service_twice(
    use_ms: int, cost_ms: int, present: list[Other], gpus: int, theta_ms: int, model: str
) -> None:
    """Others pass while they are within theta of the job, and who was passed before is theta behind `V`."""
    cell = a_fleet_of_many_models(Parameters(affinity_ms=theta_ms, aging_ms=NEVER_MS), gpus)
    populate(cell, present, models="mno")
    cell.account("u", usage_ms=use_ms)
    wait = wait_of(cell, "u", cost_ms, model)
    assert wait.waited_ms <= wait.bound(gpus) + 2 * theta_ms * sum(wait.weights) / gpus


@given(use_ms=uses, cost_ms=costs, present=others, gpus=workers, error=costs)
def test_b2_to_b4_are_moved_by_wrong_predictions_by_what_others_have_running(
    use_ms: int, cost_ms: int, present: list[Other], gpus: int, error: int
) -> None:
    """Each other account may be charged wrongly for all it has running, then and while the job waits."""
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present, error=error)
    cell.account("u", usage_ms=use_ms)
    wait = wait_of(cell, "u", cost_ms)
    assert wait.waited_ms <= wait.bound(gpus) + 2 * error * len(wait.weights)


@given(use_ms=uses, cost_ms=costs, present=others, gpus=st.integers(4, 24), fast=fast_loads)
def test_b2_to_b4_are_moved_by_preemption_by_the_runs_in_hand(
    use_ms: int, cost_ms: int, present: list[Other], gpus: int, fast: list[tuple[int, int]]
) -> None:
    """N is what the floor leaves, and the runs in hand, parked ones too, end there before the job starts.

    If fast had more than its part when the job came, as it may where relax had no work, its first job to end
    makes room.
    """
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    send_fast(cell, fast)
    cell.account("u", usage_ms=use_ms)
    wait = wait_of(cell, "u", cost_ms)
    floor = relax_floor(gpus, REMEMBERING)
    longest_fast_ms = max((cost_ms for _, cost_ms in fast), default=0)
    assert wait.waited_ms <= wait.bound(floor) + wait.in_hand * wait.c_max / floor + longest_fast_ms


@given(use_ms=uses, cost_ms=costs, gpus=workers, away_ms=st.integers(0, 600_000))
def test_b5_who_returns_gets_at_most_half_beside_one_rival_of_equal_use(
    use_ms: int, cost_ms: int, gpus: int, away_ms: int
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    cell.account("rival", usage_ms=use_ms)
    cell.on_end = lambda running: (
        cell.submit(running.job.account_id, cost_ms) if len(cell.served) < 80 else None
    )
    for _ in range(2 * gpus):
        cell.submit("rival", cost_ms)
    cell.run(until_ms=min(away_ms, 20 * cost_ms))
    cell.account("returned", usage_ms=cell.used_ms("rival"))
    before = len(cell.served)
    for _ in range(2 * gpus):
        cell.submit("returned", cost_ms)
    cell.run(starts=80)
    share = [one.account == "returned" for one in cell.served[before:80]]
    for count in range(1, len(share) + 1):
        assert sum(share[:count]) <= count / 2 + 1


@given(parameters=parameters, plan=plans(faults))
def test_b7_virtual_time_never_goes_back_and_all_tags_are_finite(
    parameters: Parameters, plan: list[Step]
) -> None:
    cell = Chaos(parameters)
    before = dict.fromkeys(Tier, 0)
    for step in plan:
        cell.play([step])
        for tier in Tier:
            assert cell.board.virtual_time(tier) >= before[tier]
            before[tier] = cell.board.virtual_time(tier)
            for name in cell.limits:
                share = cell.board.share(AccountId(name), tier)
                assert isinstance(share.finish_tag, int)
                assert share.tag is None or isinstance(share.tag, int)
                assert 0 <= share.usage < math.inf


@pytest.mark.parametrize("weight_milli", [0, -1])
def test_b7_a_weight_that_is_not_positive_is_refused(weight_milli: int) -> None:
    cell = Cell()
    name = cell.account("a")
    with pytest.raises(AssertionError):
        cell.board.apply(
            LimitsChanged(
                at_ms=0, account_id=AccountId(name), limits=cell.limits[name], weight_milli=weight_milli
            )
        )


@given(jobs=st.lists(costs, min_size=1, max_size=40), gpus=workers)
def test_b8_a_single_account_drains_as_fast_as_first_come_first_served(jobs: list[int], gpus: int) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    for cost_ms in jobs:
        cell.submit("a", cost_ms)
    cell.run()
    free = [0] * gpus
    for cost_ms in jobs:
        heapq.heappush(free, heapq.heappop(free) + cost_ms)
    assert cell.now_ms == max(free)


@given(parameters=parameters, plan=plans(faults), seed=st.integers(0, 9))
def test_b10_caps_are_never_exceeded_by_a_start_also_in_a_recovery(
    parameters: Parameters, plan: list[Step], seed: int
) -> None:
    """Parked runs count. A smaller plan stops nothing: more may run than it allows, but nothing starts."""
    cell = Chaos(parameters)
    for step in [*plan, ("restart", seed)]:
        cell.take(*step)
        before = dict(cell.running)
        cell.cycle()
        for name, limits in cell.limits.items():
            mine = [one for one in cell.running.values() if one.job.account_id == name]
            kept = [one for one in before.values() if one.job.account_id == name]
            assert len(mine) <= max(limits.running, len(kept))
            relaxed = sum(one.job.tier is Tier.RELAX for one in mine)
            assert relaxed <= max(limits.relax_running, sum(one.job.tier is Tier.RELAX for one in kept))


@given(parameters=parameters, plan=plans(faults))
def test_b11_a_worker_runs_one_attempt_a_job_has_one_and_a_parked_one_has_its_worker(
    parameters: Parameters, plan: list[Step]
) -> None:
    cell = Chaos(parameters)
    for step in plan:
        cell.play([step])
        active = [one.worker_id for one in cell.running.values() if one.active_since_ms is not None]
        parked = [one.worker_id for one in cell.running.values() if one.is_parked]
        jobs = [one.job.job_id for one in cell.running.values()]
        for unique in (active, parked, jobs):
            assert len(set(unique)) == len(unique)
        assert set(active) | set(parked) <= set(cell.present), "what is lost is nobody's attempt"
        assert (cell.board.parked(), cell.board.idle_workers()) == (
            len(parked),
            len(set(cell.present) - cell.draining - set(active)),
        )


@given(
    gpus=st.integers(1, 24),
    relaxed=st.lists(st.tuples(uses, costs), min_size=24, max_size=24),
    fast=st.lists(costs, min_size=1, max_size=30),
    passed_ms=st.integers(0, 20_000),
)
def test_b13_a_fast_job_on_a_fleet_full_of_relax_starts_in_the_cycle_it_came_in(
    gpus: int, relaxed: list[tuple[int, int]], fast: list[int], passed_ms: int
) -> None:
    """Up to the floor, one after the other, each by parking the run that the page names."""
    cell = Cell(REMEMBERING, workers=gpus)
    for number, (use_ms, cost_ms) in enumerate(relaxed[:gpus]):
        cell.account(f"a{number}", usage_ms=use_ms)
        cell.submit(f"a{number}", 60_000 + cost_ms, step_ms=1000)
    cell.decide()
    cell.now_ms = passed_ms
    for number, cost_ms in enumerate(fast):
        expected = _best_to_park(cell)
        cell.submit("paying", cost_ms, tier=Tier.FAST)
        served = cell.decide()
        if number < gpus - relax_floor(gpus, REMEMBERING):
            assert [one.start.parks for one in served] == [expected]
        else:
            assert served == []


def _best_to_park(cell: Cell) -> str | None:
    """Return the run of the account with the largest tag, as all came at once and none is about to end."""
    able = [
        one for one in cell.running.values() if one.job.tier is Tier.RELAX and one.active_since_ms is not None
    ]

    def rank(run: Running) -> tuple[int, str]:
        share = cell.board.share(run.job.account_id, Tier.RELAX)
        memory = usage.memory(cell.used_ms(run.job.account_id), cell.parameters)
        return -(share.finish_tag + memory), run.worker_id

    return min(able, key=rank).attempt_id if able else None


@given(parameters=parameters, plan=plans(faults))
def test_b14_one_fast_job_parks_one_run_and_what_is_parked_parks_nobody(
    parameters: Parameters, plan: list[Step]
) -> None:
    cell = Chaos(parameters).play(plan)
    for entry in cell.journal:
        if not isinstance(entry, Decided):
            continue
        starts = [one for one in entry.decisions if isinstance(one, Start)]
        parked = [one.parks for one in starts if one.parks is not None]
        assert all(one.tier is Tier.FAST for one in starts if one.parks is not None)
        assert len(set(parked)) == len(parked), "nobody is parked for two"
        taken = [one.worker_id for one in starts]
        taken += [one.to for one in entry.decisions if isinstance(one, Migrate)]
        taken += [one.worker_id for one in entry.decisions if isinstance(one, Resume)]
        assert len(set(taken)) == len(taken), "what goes on gets a GPU that nobody else got"


SMALL, LARGE = 4, 12
fleets = st.lists(
    st.tuples(st.sampled_from([8, 8, 8, 16]), st.sampled_from("ddde"), st.sampled_from([500, 1000])),
    min_size=1,
    max_size=7,
)


@given(
    fleet=fleets,
    jobs=st.lists(st.tuples(st.sampled_from([SMALL, LARGE]), st.integers(1, 60_000)), min_size=1, max_size=6),
    fast_ms=st.lists(st.integers(1_000, 30_000), min_size=1, max_size=8),
    relax_too=st.booleans(),
    stores_checkpoints=st.booleans(),
)
def test_b15_nothing_of_relax_waits_for_ever_whatever_fast_does(
    fleet: list[tuple[int, str, int]],
    jobs: list[tuple[int, int]],
    fast_ms: list[int],
    relax_too: bool,
    stores_checkpoints: bool,
) -> None:
    """Fast work never ends, on fleets of any mixture; nor does other relax work, if it is there.

    The bound is of this test: each run may have to wait until it is old, then for its turn among all.
    """
    aging_ms, turn = 60_000, 10
    cell = Cell(Parameters(aging_ms=aging_ms, aged_one_in=turn), workers=0)
    cell.stores_checkpoints = stores_checkpoints
    for number, (gib, device, speed) in enumerate(fleet):
        cell.join(a_worker(f"w{number}", gib=gib, device=device, speed=speed))
    largest = max(gib for gib, _, _ in fleet)
    mine = [
        cell.submit(f"mine{number}", cost_ms, gib=min(gib, largest), step_ms=1000)
        for number, (gib, cost_ms) in enumerate(jobs)
    ]
    sent = 0

    def send(tier: Tier) -> None:
        nonlocal sent
        sent += 1
        cost_ms = fast_ms[sent % len(fast_ms)]
        cell.submit(f"{tier}{sent % 5}", cost_ms, tier=tier, gib=SMALL, step_ms=1000)

    def ended(running: Running) -> None:
        if running.job.job_id not in mine:
            send(running.job.tier)

    cell.on_end = ended
    cell.decide()
    for _ in range(2 * len(fleet)):
        send(Tier.FAST)
        if relax_too:
            send(Tier.RELAX)
    bound_ms = (len(mine) + 1) * (aging_ms + 4 * turn * len(fleet) * 60_000)
    while set(mine) & cell.waiting or any(one.job.job_id in mine for one in cell.running.values()):
        assert cell.now_ms <= bound_ms, "it waits for ever"
        cell.step()


@given(use_ms=uses, weight=weights)
def test_memory_is_between_nothing_and_its_span(use_ms: int, weight: float) -> None:
    cell = Cell(REMEMBERING)
    cell.account("a", weight=weight, usage_ms=use_ms)
    cell.submit("a")
    tag = cell.board.share(AccountId("a"), Tier.RELAX).tag
    assert tag is not None
    assert 0 <= tag <= REMEMBERING.memory_span_ms * 1000
    assert (tag == 0) == (use_ms == 0 or tag < 1)
