"""What a fast job may expect of a fleet full of relax work, and what the relax work loses by it: nothing.

Over a real Ray with real diffusers runs on the stand-in model.
"""

from __future__ import annotations

import asyncio
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler.v1 import job_pb2
from tests.service.people import People, assert_ledger_closes, result_of, until_step
from tests.service.process import ServiceProcess

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROMPT = "a lighthouse --seed {seed}"


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
        parks_before, steps_before = await _parks_and_their_steps(drawing)
        await result_of(await ada.imagine("a red apple", tier=job_pb2.TIER_FAST))
        disturbed = [await result_of(handle) for handle in relax]
        parks, steps = await _parks_and_their_steps(drawing)
        assert parks - parks_before == 1
        assert steps - steps_before <= 1

        again = [
            await client.imagine(PROMPT.format(seed=seed), tier=job_pb2.TIER_RELAX)
            for seed, client in enumerate((ben, eve))
        ]
        undisturbed = [await result_of(handle) for handle in again]
    assert list(map(pictures, disturbed)) == list(map(pictures, undisturbed))
    await assert_ledger_closes(drawing.dsn)


async def _parks_and_their_steps(drawing: ServiceProcess) -> tuple[float, float]:
    """Return how often a run was parked, and how many steps it took in all once its worker had been asked to.

    Steps as workers count them: whoever watches sees more, where a message takes longer than a step. They are
    told with the run's result, and of a run that another GPU goes on with not at all.
    """
    with await asyncio.to_thread(urlopen, f"http://{drawing.ops}/metrics/scheduler") as page:
        families = text_string_to_metric_families(page.read().decode())
    figures = {sample.name: sample.value for family in families for sample in family.samples}
    return figures["darkroom_parks_total"], figures["darkroom_park_wait_steps_sum"]
