"""Cases other systems publish for fair queues and decayed use: `P = 0`, caps off, one-second jobs.

They are the nine of section 10 of the policy page. Where a case could be traced, its source is named beside
it; what has none is the page's alone.
"""

from __future__ import annotations

import math

import pytest
from policy_cell import PLAIN, REMEMBERING, Cell

from scheduler.policy.parameters import Parameters

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


@pytest.mark.parametrize(("days", "left"), [(1, 5.0), (2, 2.5)])
def test_use_halves_each_half_life_while_nothing_runs(days: int, left: float) -> None:
    """Case 1: usage 10 with a half-life of one day.

    The half-life of Grid Engine's share tree and of Slurm's multifactor priority (PriorityDecayHalfLife).
    """
    cell = Cell(Parameters(half_life_ms=DAY_MS))
    cell.account("a", usage_ms=10)
    cell.now_ms = days * DAY_MS
    assert cell.used_ms("a") == pytest.approx(left)


@pytest.mark.parametrize("step_ms", [HOUR_MS // 3, 3 * HOUR_MS])
def test_decayed_use_at_a_constant_rate_approaches_the_rate(step_ms: int) -> None:
    """Case 2: a half-life of 168 hours, at a constant rate; however long a step is.

    The decay of Kueue's admission fair sharing (KEP-4136, `usageHalfLifeTime`).
    """
    half_life_ms = 168 * HOUR_MS
    cell = Cell(Parameters(memory_span_ms=0, half_life_ms=half_life_ms))
    rates: dict[int, float] = {}

    def one_more() -> None:
        rate = cell.used_ms("a") * math.log(2) / half_life_ms
        assert rate <= 1
        rates[cell.now_ms] = rate
        if cell.now_ms < 3 * half_life_ms:
            cell.submit("a", step_ms)

    cell.on_end = lambda _: one_more()
    cell.submit("a", step_ms)
    cell.run()
    for half_lives, share in ((1, 1 / 2), (2, 3 / 4), (3, 7 / 8)):
        assert rates[half_lives * half_life_ms] == pytest.approx(share, rel=0.01)


def test_the_second_place_goes_to_the_second_account() -> None:
    """Case 3: two places, a1 a2 b1 b2 submitted in that order: a1 and b1 start.

    What admission charges for at once, Kueue calls the entry penalty (KEP-4136, issue 5339): without it two
    queues of equal usage are served in order of arrival until usage is sampled again.
    """
    cell = Cell(PLAIN, workers=2)
    for name in ("a1", "a2", "b1", "b2"):
        cell.submit(name[0], name=name)
    assert [one.job for one in cell.decide()] == ["a1", "b1"]


def test_less_use_goes_before_an_earlier_arrival() -> None:
    """Case 4, with the default memory: A has used 8 hours, B 2; A's job comes first while the GPU is busy."""
    cell = Cell(REMEMBERING)
    cell.account("A", usage_ms=8 * HOUR_MS)
    cell.account("B", usage_ms=2 * HOUR_MS)
    cell.submit("busy")
    cell.decide()
    cell.submit("A")
    cell.submit("B")
    assert cell.run().order() == "busy B A"


def test_a_single_job_does_not_wait_for_a_backlog() -> None:
    """Case 5, first part: a a a a b on one server. Start-time fair queueing (Goyal, Vin, Cheng 1996)."""
    cell = Cell(PLAIN)
    for account in "aaaab":
        cell.submit(account)
    assert cell.run().order() == "a b a a a"


def test_who_comes_during_the_service_is_level_with_who_is_served() -> None:
    """Case 5, second part: a a a a b, two served, then c c. Start-time fair queueing: who comes gets `V`."""
    cell = Cell(PLAIN)
    for account in "aaaab":
        cell.submit(account)
    cell.run(starts=2)
    cell.submit("c")
    cell.submit("c")
    assert cell.run().order() == "a b c a c a a"


def test_five_times_the_weight_gets_five_times_the_starts() -> None:
    """Case 6: 20 tasks of a (weight 1) and 20 of b (weight 5).

    Temporal's task queue fairness documents dispatch in proportion to the weights of fairness keys.
    """
    cell = Cell(PLAIN)
    cell.account("a", weight=1)
    cell.account("b", weight=5)
    for _ in range(20):
        cell.submit("a")
        cell.submit("b")
    order = cell.run().order().split()
    while_both_wait = order[: len(order) - order[::-1].index("b")]
    assert while_both_wait.count("b") == 20
    assert while_both_wait.count("a") in (4, 5)
    for end in range(6, len(while_both_wait)):
        assert while_both_wait[end - 6 : end].count("a") == 1


def test_a_newcomers_backlog_does_not_push_the_others_out() -> None:
    """Case 7: a newcomer with a long backlog joins four busy accounts: about 5 of the next 20.

    A tenant with a backlog that hogs the workers is what Temporal's documents give as the reason for
    fairness keys.
    """
    cell = Cell(PLAIN)
    for account in "abcd":
        for _ in range(30):
            cell.submit(account)
    cell.run(starts=40)
    for _ in range(50):
        cell.submit("new")
    cell.run(starts=60)
    assert 4 <= sum(one.account == "new" for one in cell.served[40:60]) <= 6


def test_sleeping_earns_no_credit() -> None:
    """Case 8: an account that works 1 s and sleeps 1 s beside one that always works: 33 %.

    Work comes in slices of 10 ms, as a queue of whole jobs has no finer share than a job.
    """
    cell = Cell(PLAIN)
    left = 0

    def wake() -> None:
        nonlocal left
        left = 100
        for _ in range(left):
            cell.submit("sleeper", 10)

    def ended(account: str) -> None:
        nonlocal left
        if account == "sleeper":
            left -= 1
            if not left:
                cell.at(cell.now_ms + 1000, wake)
        else:
            cell.submit("worker", 10)

    cell.on_end = lambda running: ended(running.job.account_id)
    cell.submit("worker", 10)
    cell.submit("worker", 10)
    wake()
    cell.run(until_ms=60_000)
    share = cell.starts_of("sleeper") / len(cell.served)
    assert share == pytest.approx(1 / 3, abs=0.01)


def test_light_accounts_hardly_wait_behind_a_heavy_one() -> None:
    """Case 9: 120 jobs of one account and 10 each of four on 4 servers, against order of arrival."""
    cell = Cell(PLAIN, workers=4)
    jobs = [cell.submit("heavy") for _ in range(120)]
    light = [cell.submit(account) for _ in range(10) for account in "abcd"]
    cell.run()
    fair = sum(cell.started_ms(job) for job in light) / len(light)
    by_arrival = sum(index // 4 * 1000 for index in range(len(jobs), len(jobs) + len(light))) / len(light)
    assert fair <= 0.3 * by_arrival
    assert cell.now_ms == (len(jobs) + len(light)) // 4 * 1000
