"""What a fast job may expect of a fleet full of relax work, and what the relax work loses by it: nothing.

Over a real Ray with real diffusers runs on the stand-in model.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

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
        for handle in relax:
            await until_step(handle, 3)
        await result_of(await ada.imagine("a red apple", tier=job_pb2.TIER_FAST))
        disturbed = [await result_of(handle) for handle in relax]
        # As the worker counts them. Whoever watches sees more, where a message takes longer than a step.
        assert await _steps_before_it_was_parked(drawing) <= 1

        again = [
            await client.imagine(PROMPT.format(seed=seed), tier=job_pb2.TIER_RELAX)
            for seed, client in enumerate((ben, eve))
        ]
        undisturbed = [await result_of(handle) for handle in again]
    assert list(map(pictures, disturbed)) == list(map(pictures, undisturbed))
    await assert_ledger_closes(drawing.dsn)


async def _steps_before_it_was_parked(drawing: ServiceProcess) -> float:
    """Return how many steps the one run that was parked still took when its worker had been asked to."""
    with await asyncio.to_thread(urlopen, f"http://{drawing.ops}/metrics/scheduler") as page:
        families = text_string_to_metric_families(page.read().decode())
    (waits,) = (family for family in families if family.name == "darkroom_park_wait_steps")
    figures = {sample.name: sample.value for sample in waits.samples}
    assert figures["darkroom_park_wait_steps_count"] == 1
    return figures["darkroom_park_wait_steps_sum"]
