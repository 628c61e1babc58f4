"""The report's numbers, on cases small enough to work out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated import a_request, a_workload, played

from scheduler.policy.ids import Tier
from scheduler.simulator.plots import draw
from scheduler.simulator.policies import CONTESTANTS
from scheduler.simulator.report import Groups, compare, figures
from scheduler.simulator.simulation import Simulated, simulate
from scheduler.simulator.world import Cluster


def a_comparison() -> tuple[Simulated, Simulated, Groups]:
    requests = [a_request(f"h{number}", cost_ms=1000) for number in range(8)] + [
        a_request("a", at_ms=1),
        a_request("b", at_ms=1),
        a_request("f", tier=Tier.FAST, at_ms=1500, cost_ms=1000),
    ]
    return played("ours", requests), played("fifo", requests), Groups.of(a_workload(*requests))


def test_groups_are_by_the_time_asked_for() -> None:
    requests = [
        a_request(f"{account}1", cost_ms=cost) for account, cost in zip("abcd", (1, 2, 3, 10), strict=True)
    ]
    groups = Groups.of(a_workload(*requests))
    assert (groups.light, groups.middle, groups.heavy) == ({"a", "b"}, {"c"}, {"d"})
    # With d it would be more than half.
    assert groups.lighter_half_of_use == {"a", "b", "c"}


def test_waits_are_all_the_time_a_job_is_not_drawn() -> None:
    """Ten steps of 100 ms each. Served: h0, a (parked for f from 1500 to 2500), b, then the rest of h."""
    ours, fifo, groups = a_comparison()
    found = figures(ours, groups)
    assert found.fast is not None
    assert (found.fast.jobs, found.fast.mean_ms, found.fast.p99_ms) == (1, 0, 0)
    light = found.relax_of["light"]
    assert light is not None
    # a waited 999 for its turn and 1000 parked, b 1000 more.
    assert (light.jobs, light.p50_ms, light.max_ms) == (2, 1999, 2999)
    by_arrival = figures(fifo, groups).relax_of["light"]
    assert by_arrival is not None
    assert by_arrival.mean_ms == 9499


def test_utilisation_counts_what_was_kept_while_jobs_came() -> None:
    simulated = played("kill", [a_request("r"), a_request("f", tier=Tier.FAST, at_ms=250, cost_ms=500)])
    found = figures(simulated, Groups.of(simulated.workload))
    # 1500 ms of 10 s; the 300 ms that were killed are wasted.
    assert found.utilisation_permille == 150
    assert found.wasted_permille == 200
    assert found.makespan_ms == 1800


def test_jains_index_compares_those_that_always_had_work_waiting() -> None:
    """Two flooders, slices of two seconds, jobs of one: each has one of them, or the first has both."""
    requests = [a_request(f"{account}{number}") for account in "ab" for number in range(60)]
    workload = a_workload(*requests, span_ms=96_000)
    fair, unfair = (
        figures(simulate(CONTESTANTS[policy], workload, Cluster(gpus=1)), Groups.of(workload)).jain_permille
        for policy in ("ours", "fifo")
    )
    assert (fair, unfair) == (1000, 500)


def test_a_difference_is_told_from_chance() -> None:
    requests = [a_request(f"h{number}", cost_ms=2000) for number in range(40)] + [
        a_request("x", account=f"light-{number}", at_ms=1) for number in range(30)
    ]
    requests = [
        a_request(f"{one.job_id}-{number}", one.account_id, at_ms=one.arrival_ms, cost_ms=one.cost_ms)
        for number, one in enumerate(requests)
    ]
    ours, fifo = played("ours", requests), played("fifo", requests)
    groups = Groups.of(a_workload(*requests))
    against = compare(ours, fifo, groups, utilisation_permille=(1000, 1000), seed=0)
    light = against.differences["light mean wait"]
    assert light is not None
    assert light.verdict == "ahead"
    assert light.low <= light.mine - light.other <= light.high
    assert against.differences["fast p99 wait"] is None
    itself = compare(ours, ours, groups, utilisation_permille=(1000, 1000), seed=0).differences[
        "light mean wait"
    ]
    assert itself is not None
    assert (itself.verdict, itself.low, itself.high) == ("level", 0, 0)


def test_plots_are_the_same_to_the_last_byte(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'darkroom[simulator]'")
    ours, fifo, groups = a_comparison()
    first, again = (draw([ours, fifo], groups, tmp_path / name) for name in ("first", "again"))
    assert [path.name for path in first] == ["waits.svg", "service.svg", "utilisation.svg"]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.read_text().startswith("<?xml")
