"""The simulator on recorded workloads, where they are at hand: a folder `shared/data` beside the checkout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scheduler.policy.auditing.findings import Verdict
from scheduler.simulator.policies import CONTESTANTS
from scheduler.simulator.report import Groups, figures
from scheduler.simulator.simulation import NO_CAPS, simulate
from scheduler.simulator.workload import Cut, FastRule, read_trace
from scheduler.simulator.world import Cluster

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def trace(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not at hand: recorded workloads are not part of the repository")
    return path


@pytest.mark.parametrize("closed", [False, True])
def test_on_recorded_image_jobs_fast_is_ahead_of_waiting_and_fairness_of_arrival(closed: bool) -> None:
    """Twelve hours of a tenth of the users on eight GPUs at capacity."""
    recorded = read_trace(
        trace("sdbeta_w1.csv.gz"), cut=Cut(from_hours=24, hours=12, users_share=0.1), fast=FastRule(), seed=1
    )
    workload = replace(recorded.at_load(1.0, 8), closed=closed)
    groups = Groups.of(workload)
    ours, none, fifo = (
        figures(simulate(CONTESTANTS[name], workload, Cluster(gpus=8), limits=NO_CAPS), groups)
        for name in ("ours", "none", "fifo")
    )
    assert ours.fast is not None
    assert none.fast is not None
    assert ours.fast.p99_ms < 0.2 * none.fast.p99_ms
    light, by_arrival = ours.relax_of["light"], fifo.relax_of["light"]
    assert light is not None
    assert by_arrival is not None
    assert light.mean_ms < 0.5 * by_arrival.mean_ms
    assert ours.steps_redone == 0
    assert abs(ours.utilisation_permille - fifo.utilisation_permille) <= 0.01 * fifo.utilisation_permille


def test_the_bounds_hold_on_recorded_training_jobs() -> None:
    """Four days of teams whose jobs take from a second to a day."""
    workload = read_trace(
        trace("philly_vc.csv.gz"),
        cut=Cut(from_hours=504, hours=96, divide_cost=100),
        fast=FastRule(),
        seed=1,
    ).at_load(1.0, 6)
    simulated = simulate(CONTESTANTS["ours"], workload, Cluster(gpus=6), limits=NO_CAPS)
    assert [one.bound for one in simulated.findings if one.verdict is Verdict.VIOLATED] == []
