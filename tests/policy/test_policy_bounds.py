"""The bounds of the policy over random schedules: who goes first, how unequal service and waits can be.

They are stated for exact predictions, without preemption, affinity, aging and binding caps. Ids are those of
the policy page.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from hypothesis import assume, given
from hypothesis import strategies as st
from policy_cell import PLAIN, REMEMBERING, Cell

from scheduler.policy.ids import AccountId, Tier

HOUR_MS = 3_600_000
costs = st.integers(1, 60_000)
uses = st.integers(0, 30 * HOUR_MS)
weights = st.sampled_from([0.5, 1, 1.5, 4])
workers = st.integers(1, 4)


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


def populate(cell: Cell, present: list[Other]) -> None:
    for number, other in enumerate(present):
        name = f"other{number}"
        cell.account(name, weight=other.weight, usage_ms=other.use_ms)
        for when_ms, cost_ms in other.jobs:
            cell.at(when_ms, lambda name=name, cost_ms=cost_ms: cell.submit(name, cost_ms))


def spread(values: list[float]) -> float:
    return max(values) - min(values)


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


@given(more=uses, less=uses, cost_ms=costs, present=others, gpus=workers)
def test_o2_more_use_never_gets_more_than_one_start_more(
    more: int, less: int, cost_ms: int, present: list[Other], gpus: int
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    for name, use in (("more", more), ("less", less)):
        cell.account(name, usage_ms=use)
        for _ in range(25):
            cell.submit(name, cost_ms)
    stored = {"more": float(more), "less": float(less)}
    left = {"more": 25, "less": 25}
    cell.run()
    ahead, lowest = 0, 0
    for one in cell.served:
        if one.account not in stored:
            continue
        if stored["more"] > stored["less"]:
            ahead += 1 if one.account == "more" else -1
            lowest = min(lowest, ahead)
            assert ahead - lowest <= 1
        else:
            ahead = lowest = 0
        stored[one.account] += one.start.charge.usage_added
        left[one.account] -= 1
        if not left[one.account]:
            break


@given(
    first=st.lists(costs, min_size=2, max_size=20),
    second=st.lists(costs, min_size=2, max_size=20),
    first_weight=weights,
    second_weight=weights,
    present=others,
    gpus=workers,
)
def test_b1_service_of_two_waiting_accounts_differs_by_at_most_a_job_each(
    first: list[int],
    second: list[int],
    first_weight: float,
    second_weight: float,
    present: list[Other],
    gpus: int,
) -> None:
    cell = Cell(PLAIN, workers=gpus)
    weight = {"f": first_weight, "g": second_weight}
    left = {"f": len(first), "g": len(second)}
    populate(cell, present)
    for name, jobs in (("f", first), ("g", second)):
        cell.account(name, weight=weight[name])
        for cost_ms in jobs:
            cell.submit(name, cost_ms)
    cell.run()
    difference, differences = 0.0, [0.0]
    for one in cell.served:
        if one.account not in weight:
            continue
        difference += one.start.charge.predicted_ms / weight[one.account] * (1 if one.account == "f" else -1)
        differences.append(difference)
        left[one.account] -= 1
        if not left[one.account]:
            break
    rounding_ms = len(differences) / 1000
    assert spread(differences) <= max(first) / first_weight + max(second) / second_weight + rounding_ms


def wait_and_others(cell: Cell, account: str, cost_ms: int) -> tuple[int, set[str]]:
    """Submit a job, run everything, and return how long it waited and who was served meanwhile."""
    before = len(cell.served)
    submitted_ms = cell.now_ms
    job = cell.submit(account, cost_ms)
    cell.run()
    index = next(index for index, one in enumerate(cell.served) if one.job == job)
    served = {one.account for one in cell.served[before:index]}
    return cell.served[index].at_ms - submitted_ms, served


def largest_cost(cell: Cell) -> int:
    return max((job.predicted_ms for job in cell.jobs.values()), default=0)


@given(use_ms=uses, weight=weights, cost_ms=costs, present=others, gpus=workers)
def test_b2_a_wait_is_bounded_by_the_distance_of_the_tag(
    use_ms: int, weight: float, cost_ms: int, present: list[Other], gpus: int
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    cell.account("u", weight=weight, usage_ms=use_ms)
    cell.run(until_ms=100_000)
    virtual_time = cell.board.virtual_time(Tier.RELAX)
    waited_ms, served = wait_and_others(cell, "u", cost_ms)
    tag = next(one.start.charge.start_tag for one in cell.served if one.account == "u")
    c_max = largest_cost(cell)
    ahead_ms = (tag - virtual_time) / 1000
    bound = c_max + sum(cell.weights[other] / 1000 * ahead_ms + c_max for other in served) / gpus
    assert waited_ms <= bound


@given(cost_ms=costs, present=others, gpus=workers)
def test_b3_a_fresh_account_starts_within_one_job_of_each_other(
    cost_ms: int, present: list[Other], gpus: int
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    cell.run(until_ms=100_000)
    waited_ms, served = wait_and_others(cell, "fresh", cost_ms)
    assert waited_ms <= largest_cost(cell) * (1 + len(served) / gpus)


@given(cost_ms=costs, present=others, gpus=workers)
def test_b4_the_heaviest_account_starts_within_the_span_of_memory(
    cost_ms: int, present: list[Other], gpus: int
) -> None:
    cell = Cell(REMEMBERING, workers=gpus)
    populate(cell, present)
    cell.account("heaviest", usage_ms=10_000 * HOUR_MS)
    cell.run(until_ms=100_000)
    waited_ms, served = wait_and_others(cell, "heaviest", cost_ms)
    span_ms = REMEMBERING.memory_span_ms * sum(cell.weights[other] / 1000 for other in served)
    assert waited_ms <= span_ms / gpus + largest_cost(cell) * (1 + len(served) / gpus)


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


@given(use_ms=uses, weight=weights)
def test_memory_is_between_nothing_and_its_span(use_ms: int, weight: float) -> None:
    cell = Cell(REMEMBERING)
    cell.account("a", weight=weight, usage_ms=use_ms)
    cell.submit("a")
    tag = cell.board.share(AccountId("a"), Tier.RELAX).tag
    assert tag is not None
    assert 0 <= tag <= REMEMBERING.memory_span_ms * 1000
    assert (tag == 0) == (use_ms == 0 or tag < 1)
