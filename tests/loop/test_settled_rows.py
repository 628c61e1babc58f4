"""What an attempt delivered, in the row of its job."""

from __future__ import annotations

from dataclasses import replace

from billing import invariants
from gpu_worker.contract import AttemptResult, Blame, Outcome, StageTimes, VideoFile
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.settlement import end_of, end_of_too_large
from scheduler.store import dispatch, endings, jobs
from scheduler.store.jobs import JobState
from tests.loop.conftest import Stage, a_started_attempt

GIB = 2**30
VIDEO = VideoFile(
    path="p",
    file_name="f",
    content_type="video/mp4",
    size_bytes=3,
    sha256="s",
    width=512,
    height=512,
    frames=20,
)


async def test_videos_and_the_time_an_upscale_took_are_kept_with_the_job(stage: Stage) -> None:
    await stage.open_account("ada")
    epoch, now_ms, planned = await _started(stage)
    result = AttemptResult(
        attempt_id=planned.attempt_id,
        incarnation="first",
        job_id=planned.job_id,
        token=planned.token,
        outcome=Outcome.SUCCEEDED,
        times=StageTimes(encode_ms=10, denoise_ms=100, upscale_ms=2_000),
        videos=(VIDEO, replace(VIDEO, content_type="image/webp")),
    )
    (settled,) = await endings.settle_attempts(
        stage.connection,
        epoch=epoch,
        ends=[end_of(result, device="gpu-a", speed_permille=1_000, memory_bytes=24 * GIB)],
        parameters=Parameters(),
        now_ms=now_ms,
    )
    assert isinstance(settled, endings.Settled)
    assert (settled.gpu_ms, settled.billed_ms) == (2_110, 2_110)
    job = await jobs.read_job(stage.connection, planned.job_id)
    assert job is not None
    assert job.state is JobState.SUCCEEDED
    assert (job.videos, job.latents_path) == (result.videos, None)
    assert job.receipt is not None
    assert (job.receipt.upscale_ms, job.receipt.denoise_ms) == (2_000, 100)
    learned = await stage.connection.fetchrow(
        "SELECT step_us * steps AS steps_us, rest_us FROM scheduler.estimate"
    )
    assert tuple(learned) == (100_000, 2_010_000)


async def test_what_is_released_is_told_as_it_was_held_after_the_multiplier(stage: Stage) -> None:
    await stage.open_account("ada")
    epoch, now_ms, planned = await _started(stage, multiplier_bp=30_000)
    result = AttemptResult(
        attempt_id=planned.attempt_id,
        incarnation="first",
        job_id=planned.job_id,
        token=planned.token,
        outcome=Outcome.SUCCEEDED,
        times=StageTimes(denoise_ms=100),
    )
    (settled,) = await endings.settle_attempts(
        stage.connection,
        epoch=epoch,
        ends=[end_of(result, device="gpu-a", speed_permille=1_000, memory_bytes=24 * GIB)],
        parameters=Parameters(),
        now_ms=now_ms,
    )
    assert isinstance(settled, endings.Settled)
    assert settled.billed_ms == 300
    assert settled.released_ms == 3 * planned.charge.predicted_ms - 300


async def test_a_job_that_ran_out_of_memory_waits_with_what_was_too_little_in_its_row(stage: Stage) -> None:
    await stage.open_account("ada")
    epoch, now_ms, planned = await _started(stage)
    end = end_of(_out_of_memory(planned), device="gpu-a", speed_permille=1_000, memory_bytes=24 * GIB)
    for _ in range(2):  # the second time, its answer was lost
        (settled,) = await endings.settle_attempts(
            stage.connection, epoch=epoch, ends=[end], parameters=Parameters(), now_ms=now_ms
        )
        assert isinstance(settled, endings.Settled)
        assert (settled.verdict, settled.job_state) == (endings.Verdict.LOST, "queued")
        assert not settled.counts_as_loss
    row = await stage.job(planned.job_id)
    assert (row["state"], row["losses"], row["memory_above_bytes"]) == ("queued", 0, 24 * GIB)
    sentence = await stage.connection.fetchval(
        "SELECT sentence FROM scheduler.job_event WHERE job_id = $1 ORDER BY seq DESC LIMIT 1", planned.job_id
    )
    assert sentence == (
        "Too little for it. The job waits at its old place for a GPU with more memory. "
        "It costs nothing so far."
    )
    assert await stage.connection.fetchval("SELECT count(*) FROM scheduler.worker_slot") == 0
    assert await invariants.check(stage.connection) == []


async def test_a_job_that_is_too_large_for_every_worker_fails_with_its_attempt_and_costs_nothing(
    stage: Stage,
) -> None:
    await stage.open_account("ada")
    epoch, now_ms, planned = await _started(stage)
    end = end_of(_out_of_memory(planned), device="gpu-a", speed_permille=1_000, memory_bytes=24 * GIB)
    (settled,) = await endings.settle_attempts(
        stage.connection,
        epoch=epoch,
        ends=[end_of_too_large(end, "sdxl")],
        parameters=Parameters(),
        now_ms=now_ms,
    )
    assert isinstance(settled, endings.Settled)
    assert (settled.job_state, settled.billed_ms, settled.absorbed_ms) == ("failed", 0, 700)
    row = await stage.job(planned.job_id)
    assert row["failure_reason"] == "OUT_OF_MEMORY"
    assert row["failure_sentence"] == (
        "The GPU worker ran out of memory with all of its 24.0 GiB, and no worker for the model sdxl has "
        "noticeably more. The job costs nothing."
    )
    assert await invariants.check(stage.connection) == []


def _out_of_memory(planned: dispatch.PlannedAttempt) -> AttemptResult:
    return AttemptResult(
        attempt_id=planned.attempt_id,
        incarnation="first",
        job_id=planned.job_id,
        token=planned.token,
        outcome=Outcome.FAILED,
        times=StageTimes(denoise_ms=700),
        blame=Blame.PLATFORM,
        failure_reason="OUT_OF_MEMORY",
        failure_sentence="Too little for it.",
    )


async def _started(stage: Stage, *, multiplier_bp: int = 10_000) -> tuple[int, int, dispatch.PlannedAttempt]:
    job_id = await stage.submit("ada", Tier.FAST)
    await stage.connection.execute(
        "UPDATE scheduler.job SET pricing = pricing || jsonb_build_object('multiplier_bp', $1::integer)",
        multiplier_bp,
    )
    lead, planned = await a_started_attempt(stage, job_id)
    return lead.epoch, lead.now_ms, planned
