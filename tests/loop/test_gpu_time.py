"""Where the GPUs' time went is a closed account: the uses add up to wall time times GPUs.

Real workers draw for a real loop, with models that load, a run that is parked and goes on, one that is
cancelled, and workers that die with and without a run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scheduler.leader import Leader
from scheduler.metrics import GpuUse
from scheduler.policy.ids import Tier
from tests.loop.conftest import Stage
from tests.loop.worker_fleet import WorkerFleet

FIRST, SECOND = "here/gpu-0", "here/gpu-1"


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[WorkerFleet]:
    fleet = WorkerFleet(tmp_path, workers=2, step_ms=15, load_s=0.2)
    yield fleet
    await fleet.close()


def spent_s(leader: Leader) -> dict[str, float]:
    sample = leader.metrics.registry.get_sample_value
    return {use.value: sample("darkroom_gpu_time_seconds_total", {"use": use}) or 0 for use in GpuUse}


async def test_the_uses_add_up_to_the_wall_time_of_all_gpus(stage: Stage, fleet: WorkerFleet) -> None:
    for account in ("ada", "ben", "eve"):
        await stage.open_account(account)
    async with stage.leading(fleet) as leader:
        relax = [await stage.submit(account, Tier.RELAX) for account in ("ben", "eve")]
        for job_id in relax:
            await stage.until_state(leader, job_id, "running")
        fast = await stage.submit("ada", Tier.FAST)
        for job_id in (fast, *relax):
            await stage.until_state(leader, job_id, "succeeded")

        cancelled = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, cancelled, "running")
        await stage.cancel("ada", cancelled)
        await stage.until_state(leader, cancelled, "cancelled")

        lost = await stage.submit("eve", Tier.RELAX)
        await stage.until_state(leader, lost, "running")
        for worker_id in (FIRST, SECOND):
            fleet.kill(worker_id)
        await stage.until_state(leader, lost, "succeeded")
        await stage.until(leader, lambda: fleet.settled and not leader._loop._desk.running)
        # What was told last has yet to come to the account.
        await stage.until(leader, lambda: sum(spent_s(leader).values()) > 0.995 * fleet.lived_s)
        uses, lived_s = spent_s(leader), fleet.lived_s
        parks = leader.metrics.registry.get_sample_value("darkroom_parks_total")
    print(f"{lived_s:.3f} s of two GPUs: {uses}")
    assert parks == 1
    assert sum(uses.values()) == pytest.approx(lived_s, rel=0.01), uses
    for use, at_least_s in {"fast": 0.2, "relax": 0.5, "load": 0.55, "wasted": 0.001, "idle": 0.1}.items():
        assert uses[use] >= at_least_s, uses
