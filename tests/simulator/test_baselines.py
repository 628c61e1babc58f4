"""Other people's policies do what their names say, on cases small enough to work out by hand."""

from __future__ import annotations

import pytest
from simulated import a_request, order, played, waits_ms

from scheduler.policy.ids import Tier
from scheduler.policy.limits import Limits

# One GPU, a second each: a brings four jobs, then b two and c one.
_BURST = [a_request(f"a{number}") for number in range(1, 5)] + [
    a_request("b1", at_ms=1),
    a_request("b2", at_ms=1),
    a_request("c1", at_ms=2),
]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fifo", "a1 a2 a3 a4 b1 b2 c1"),
        ("round-robin", "a1 a2 b1 c1 a3 b2 a4"),
        ("least-used", "a1 b1 c1 a2 b2 a3 a4"),
        ("sfq", "a1 b1 c1 a2 b2 a3 a4"),
    ],
)
def test_the_order_of_a_burst(policy: str, expected: str) -> None:
    """Round robin: a is in the round again, before b and c come, when its first job starts. Least used: of a,
    b and c, who have used a second each when c was served, it is longest ago for a."""
    assert order(played(policy, _BURST)) == expected


@pytest.mark.parametrize("policy", ["fifo", "round-robin", "least-used"])
def test_fast_goes_before_relax(policy: str) -> None:
    requests = [*_BURST[:4], a_request("f", tier=Tier.FAST, at_ms=1)]
    assert order(played(policy, requests)) == "a1 f a2 a3 a4"


@pytest.mark.parametrize("policy", ["fifo", "round-robin", "least-used", "ours"])
def test_caps_hold_a_job_back_and_let_the_next_account_go(policy: str) -> None:
    """Four GPUs, two relax jobs of an account at once."""
    requests = [request for request in _BURST if request.job_id != "a4"]
    simulated = played(policy, requests, gpus=4, limits=Limits(running=3, relax_running=2, accepted=100))
    waits = waits_ms(simulated)
    assert [waits[job] for job in ("a1", "a2", "b1", "b2")] == [0, 0, 0, 0]
    assert waits["a3"] == 1000
    assert waits["c1"] == 998


def test_least_used_first_forgets_by_half_in_a_half_life() -> None:
    """a used two seconds seven days before b used one and a half: a second is left of a's."""
    week_ms = 7 * 24 * 3_600_000
    requests = [
        a_request("a1", cost_ms=2000),
        a_request("b1", at_ms=week_ms, cost_ms=1500),
        a_request("busy", "z", at_ms=week_ms + 10_000),
        a_request("b2", at_ms=week_ms + 10_001),
        a_request("a2", at_ms=week_ms + 10_002),
    ]
    assert order(played("least-used", requests)).split()[-2:] == ["a2", "b2"]
