"""A GPU dies in the middle of a picture: another finishes the same bits, and nobody pays for what was lost.

SIGKILL of one worker's process, and of every process of a node at once, under a real Ray with real diffusers
runs on the stand-in model. Both are aimed by the steps that somebody sees who watches the job.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from gpu_worker.settings import WorkerSettings
from scheduler.client.aio import DarkroomClient, JobHandle
from scheduler.v1 import job_pb2
from tests.service.nodes import a_node, cluster_environment, front_door, stop_everything
from tests.service.people import People, assert_ledger_closes, result_of, until_step
from tests.service.process import ServiceProcess

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(300)]

WHY = "a test"
PROMPT = "a lighthouse in fog --seed 11"
AT_STEP = 8
"""Of 20: past one checkpoint, and not at the next."""
K = WorkerSettings.__dataclass_fields__["checkpoint_every_steps"].default


async def disturbed(handle: JobHandle, kill: Callable[[], None]) -> tuple[job_pb2.Job, int]:
    """Watch a job, kill when it is at AT_STEP; returns it when it is done, and how far it was seen then."""
    at = 0
    async for update in handle.watch():
        if not at and update.progress.step >= AT_STEP:
            at = update.progress.step
            kill()
    assert at, "it was done before anybody saw it at that step"
    return await result_of(handle), at


async def rows(dsn: str, query: str, *arguments: object) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(query, *arguments)
    finally:
        await connection.close()


async def attempts_of(dsn: str, handle: JobHandle) -> list[asyncpg.Record]:
    return await rows(dsn, "SELECT * FROM scheduler.attempt WHERE job_id = $1 ORDER BY number", handle.id)


async def assert_only_one_drawing_is_paid(dsn: str, ada: DarkroomClient, job: job_pb2.Job, seen: int) -> None:
    """Hold receipt, ledger and rows of a job that lost one GPU at step `seen` against each other."""
    handle = await ada.handle(job.name.rpartition("/")[2])
    lost, succeeded = await attempts_of(dsn, handle)
    assert (lost["state"], succeeded["state"]) == ("lost", "succeeded")
    assert succeeded["worker_id"] != lost["worker_id"]

    resumed_at = json.loads(succeeded["decision"])["resumes_at_step"]
    assert 0 < resumed_at <= seen
    assert seen - resumed_at <= K, f"{seen - resumed_at} steps are done again"

    receipt = job.receipt
    times = json.loads(succeeded["times"])
    own_ms = sum(times.values())
    # What the checkpoint kept was drawn on the GPU that died, and what came after it on the other.
    assert receipt.gpu_ms == succeeded["kept_ms"] + own_ms == succeeded["gpu_ms"]
    assert receipt.billed_gpu_ms == receipt.gpu_ms
    assert receipt.attempts == 2
    # Encoding again, to get to where the checkpoint was, is part of neither.
    assert times["encode_ms"] == 0

    settlements = {
        str(row["attempt_id"]): row
        for row in await rows(dsn, "SELECT * FROM billing.settlement WHERE job_id = $1", handle.id)
    }
    voided, posted = settlements[str(lost["attempt_id"])], settlements[str(succeeded["attempt_id"])]
    assert (voided["ending"], voided["billed_ms"]) == ("void", 0)
    assert (posted["ending"], posted["billed_ms"]) == ("post", receipt.billed_gpu_ms)
    # The GPU time that was for nothing is written down, as ours.
    on_gpu_ms = (lost["ended_at"] - lost["started_at"]) // timedelta(milliseconds=1) - lost["parked_ms"]
    assert voided["absorbed_ms"] == pytest.approx(on_gpu_ms - succeeded["kept_ms"], abs=1)
    await assert_ledger_closes(dsn)


async def test_picture_of_a_killed_worker_is_finished_by_another_with_the_same_bits(
    drawing: ServiceProcess,
) -> None:
    people = People(drawing.address, drawing.admin_key)
    async with await people.account("ada") as ada:
        undisturbed = await result_of(await ada.imagine(PROMPT, tier=job_pb2.TIER_FAST))
        before_ms = (await ada.balance()).available_ms
        handle = await ada.imagine(PROMPT, tier=job_pb2.TIER_FAST)

        def kill() -> None:
            drawing.kill_worker(drawing.last_said("attempt started", handle.id)["worker"])

        job, seen = await disturbed(handle, kill)
        assert [one.sha256 for one in job.images] == [one.sha256 for one in undisturbed.images]
        assert before_ms - (await ada.balance()).available_ms == job.receipt.billed_gpu_ms > 0
        await assert_only_one_drawing_is_paid(drawing.dsn, ada, job, seen)
    assert 0 < drawing.said_of("attempt ended", handle.id, times=2)["steps_redone"] <= K


async def test_picture_of_a_node_that_is_gone_is_finished_on_another_with_the_same_bits(
    database: str, data_dir: Path
) -> None:
    environment = cluster_environment()
    head = ("--head", "--port", "0", "--include-dashboard=false", "--temp-dir", str(data_dir / "ray"))
    with (
        a_node("node-a", *head, environment=environment) as first,
        a_node("node-b", "--address", first.address, environment=environment) as second,
        front_door(first.address, database, data_dir, environment, engine="diffusers") as running,
    ):
        for node in (first, second):
            running.wait_for_worker(f"{node.name}/gpu-0")
        async with (
            DarkroomClient(running.address, running.admin_key) as admin,
            await People(running.address, running.admin_key).account("ada") as ada,
        ):
            await admin.drain_worker("node-b/gpu-0", reason=WHY)
            undisturbed = await result_of(await ada.imagine(PROMPT, tier=job_pb2.TIER_FAST))
            await admin.resume_worker("node-b/gpu-0", reason=WHY)
            await admin.drain_worker("node-a/gpu-0", reason=WHY)
            handle = await ada.imagine(PROMPT, tier=job_pb2.TIER_FAST)
            await until_step(handle, 1)
            await admin.resume_worker("node-a/gpu-0", reason=WHY)
            job, seen = await disturbed(handle, second.kill)
            assert [one.sha256 for one in job.images] == [one.sha256 for one in undisturbed.images]
            assert (await ada.balance()).used_ms == (
                undisturbed.receipt.billed_gpu_ms + job.receipt.billed_gpu_ms
            )
            await assert_only_one_drawing_is_paid(database, ada, job, seen)
        assert 0 < running.said_of("attempt ended", handle.id, times=2)["steps_redone"] <= K
        stop_everything(first.address, environment)
