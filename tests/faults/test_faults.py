"""Short runs with every kind of fault: what was promised is kept, once. Longer ones: `tests.faults.soak`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.faults.counters import Sometimes
from tests.faults.plan import Kind, plan_of
from tests.faults.run import Report, run
from tests.faults.soak import never, table
from tests.faults.stage import DRAWING, PLAIN, Scene

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.skipif(sys.platform != "linux", reason="limits files, and adopts orphans, by calls of Linux"),
]

_SPAN_MS = 30_000
_EVERY_MS = 1_200
"""So that every kind strikes in a run that is short."""


async def a_run(
    seed: int,
    folder: Path,
    *,
    scene: Scene = PLAIN,
    every_ms: int = _EVERY_MS,
    kinds: Sequence[Kind] = tuple(Kind),
) -> Report:
    plan = plan_of(seed, span_ms=_SPAN_MS, every_ms=every_ms, kinds=kinds)
    report = await run(plan, seed=seed, span_s=_SPAN_MS / 1000, scene=scene, keep_in=folder)
    assert report.findings == (), f"seed {seed}; its logs and promises are in {folder}"
    return report


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.timeout(480)
async def test_nothing_is_lost_and_nothing_is_doubled(seed: int, tmp_path: Path) -> None:
    before = processes_below()
    report = await a_run(seed, tmp_path)
    assert report.promised == report.ended > 0
    assert len(report.faults) > len(Kind) / 2, "most kinds hit something"
    assert processes_below() - before == set(), "a run ends every process that it started"


def processes_below() -> set[str]:
    """Return what runs below this process, however far."""
    return {
        f"{process.pid} {process.name()}"
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
    }


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(900)
async def test_disturbed_pictures_are_the_same_bits_as_undisturbed_ones(tmp_path: Path) -> None:
    kinds = (Kind.KILL_WORKER, Kind.FREEZE_WORKER, Kind.KILL_NODE, Kind.KILL_SCHEDULER)
    report = await a_run(5, tmp_path, scene=DRAWING, every_ms=4_000, kinds=kinds)
    assert report.counters[Sometimes.WENT_ON] > 0


@pytest.mark.long
@pytest.mark.timeout(6_000)
async def test_every_kind_and_everything_rare_comes_up_in_twenty_seeds(tmp_path: Path) -> None:
    reports = [await a_run(seed, tmp_path / str(seed)) for seed in range(100, 120)]
    print(table(reports))
    assert never(reports) == []
