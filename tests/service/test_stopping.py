"""A service that is told to stop, twice by somebody in a hurry."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from scheduler.v1 import job_pb2
from tests.service.people import People
from tests.service.process import service

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(300)]


async def test_second_signal_ends_at_once_what_the_first_let_hand_over(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would hand over at the end of a step of five minutes, and be waited for as long.
    monkeypatch.setenv("DARKROOM_SCHEDULING__CLOSE_DOWN_WITHIN_MS", "300000")
    with service(data_dir, gpus=1, timed_step_ms=300_000) as running:
        async with await People(running.address, running.admin_key).account("ada") as ada:
            handle = await ada.imagine("a lighthouse", tier=job_pb2.TIER_FAST)
            async with asyncio.timeout(90):
                async for update in handle.watch():
                    if update.event.state == job_pb2.JOB_STATE_RUNNING:
                        break
        processes = running.processes()
        running.terminate()
        running.wait_for_event("closing down")
        running.terminate()
        assert running.stopped() == 130, running.said
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert [process.name() for process in alive] == [], "what is embedded ends with it"
