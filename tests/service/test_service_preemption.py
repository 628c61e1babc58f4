"""What a fast job may expect of a fleet full of relax work, and what the relax work loses by it: nothing.

Over a real Ray with real diffusers runs on the stand-in model.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from scheduler.client.aio import JobHandle
from scheduler.v1 import job_pb2
from tests.service.people import People, assert_ledger_closes, result_of, until_step
from tests.service.process import ServiceProcess, service

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

GPUS = 2
PROMPT = "a lighthouse --seed {seed}"


@pytest.fixture(scope="module")
def drawing() -> Iterator[ServiceProcess]:
    """A service whose workers draw."""
    with (
        tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder,
        service(Path(folder), gpus=GPUS, engine="diffusers") as running,
    ):
        yield running


class Steps:
    """The steps of a job as somebody sees them who watches it, and when."""

    def __init__(self, handle: JobHandle) -> None:
        self._handle = handle
        self.seen: list[tuple[datetime, int]] = []

    async def follow(self) -> None:
        async for update in self._handle.watch():
            if update.HasField("progress"):
                self.seen.append((datetime.now(UTC), update.progress.step))

    def at(self, moment: datetime) -> int:
        """Return how far it was."""
        return max((step for when, step in self.seen if when <= moment), default=0)


def pictures(job: job_pb2.Job) -> list[str]:
    return [image.sha256 for image in job.images]


async def test_fast_job_gets_a_gpu_within_a_step_and_the_parked_picture_is_the_same(
    drawing: ServiceProcess,
) -> None:
    people = People(drawing.address, drawing.admin_key)
    async with (
        await people.account("ada") as ada,
        await people.account("ben") as ben,
        await people.account("eve") as eve,
    ):
        relax = [
            await client.imagine(PROMPT.format(seed=seed), tier=job_pb2.TIER_RELAX)
            for seed, client in enumerate((ben, eve))
        ]
        watched = [Steps(handle) for handle in relax]
        async with asyncio.TaskGroup() as group:
            for steps in watched:
                group.create_task(steps.follow())
            for handle in relax:
                await until_step(handle, 3)
            fast = await ada.imagine("a red apple", tier=job_pb2.TIER_FAST)
            await until_step(fast, 1)
            began = datetime.now(UTC)
            fast_job = await result_of(fast)
            disturbed = [await result_of(handle) for handle in relax]

        started = fast_job.start_time.ToDatetime(UTC)
        mine = [handle.id for handle in relax].index(await _parked(drawing.dsn))
        went_on = watched[mine].at(began) - watched[mine].at(started)
        # One step to the boundary, and one that may have been on its way to whoever watches.
        assert went_on <= 2, f"{went_on} steps of relax between the fast job's start and its first step"

        again = [
            await client.imagine(PROMPT.format(seed=seed), tier=job_pb2.TIER_RELAX)
            for seed, client in enumerate((ben, eve))
        ]
        undisturbed = [await result_of(handle) for handle in again]
    assert list(map(pictures, disturbed)) == list(map(pictures, undisturbed))
    await assert_ledger_closes(drawing.dsn)


async def _parked(dsn: str) -> str:
    """Return the job whose run was parked; it may have moved to another worker since."""
    connection = await asyncpg.connect(dsn)
    try:
        (row,) = await connection.fetch("SELECT DISTINCT job_id::text FROM scheduler.attempt WHERE parks > 0")
    finally:
        await connection.close()
    job_id: str = row["job_id"]
    return job_id
