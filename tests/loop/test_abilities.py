"""What front doors are told of the fleet, by which they refuse what nobody in it could draw."""

from __future__ import annotations

from typing import Any

from gpu_worker.contract import GpuTime, WorkerReport
from scheduler.updates import Abilities, Updates


def a_report(**changes: Any) -> WorkerReport:
    fixed: dict[str, Any] = {
        "worker_id": "node-a/gpu-0",
        "incarnation": "first",
        "pid": 1,
        "release": "1",
        "epoch": 1,
        "device": "a GPU",
        "speed_permille": 1000,
        "memory_bytes": 8,
        "memory_used_bytes": 0,
        "warm_models": (),
        "active": None,
        "unacknowledged": (),
        "gpu_time": GpuTime(),
    }
    return WorkerReport(**{**fixed, **changes})


async def abilities_of(*reports: WorkerReport) -> Abilities | None:
    updates = Updates(epoch=1)
    for report in reports:
        updates.met_worker(report)
    return (await updates.after(0, 0)).abilities


async def test_nothing_is_known_of_a_fleet_before_a_worker_was_met() -> None:
    assert await abilities_of() is None


async def test_a_fleet_can_do_what_one_of_its_workers_can() -> None:
    lacks = "the package is not installed; install it"
    small = a_report(models=("sd",), lacks_for_upscales=lacks)
    large = a_report(memory_bytes=80, models=("sd", "sdxl"), device="a larger GPU")
    for reports in ((small, large), (large, small)):
        assert await abilities_of(*reports) == Abilities(
            most_memory_bytes=80,
            models=frozenset({"sd", "sdxl"}),
            lacks_for_upscales="",
            devices=frozenset({"a GPU", "a larger GPU"}),
        )
    anything = await abilities_of(small, a_report())
    assert anything is not None
    assert anything.models is None


async def test_what_all_workers_lack_is_said_as_the_newest_says_it() -> None:
    reports = [a_report(lacks_for_upscales=lacks) for lacks in ("no package", "no file")]
    abilities = await abilities_of(*reports)
    assert abilities is not None
    assert abilities.lacks_for_upscales == "no file"
