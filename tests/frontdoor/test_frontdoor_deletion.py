"""A deleted job: what goes, what stays, and who may."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import grpc
import pytest

from gpu_worker import outputs
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.deletions import Deletions
from scheduler.refusals import Overloaded
from scheduler.store.accounts import Role
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, a_png, refusal

NOT_YOURS = "NOT_FOUND_OR_NOT_YOURS"


async def a_finished_job(
    door: Door, ann: Caller, prompt: str = "a secret fox::2 hare --video"
) -> job_pb2.Job:
    """One with everything that a job may leave in the artifact store."""
    job = await ann.create(prompt)
    attempt_id = await door.start(job.uid)
    await door.succeed(job.uid, videos={"video/mp4": b"moving"})
    for path in (
        f"{outputs.attempt_folder(job.uid, attempt_id)}/latents.safetensors",
        outputs.checkpoint_path(job.uid, attempt_id),
    ):
        (door.artifacts / path).parent.mkdir(parents=True, exist_ok=True)
        (door.artifacts / path).write_bytes(b"x")
    return job


def files(door: Door) -> list[Path]:
    return [path for path in door.artifacts.rglob("*") if path.is_file()]


async def test_a_deleted_job_is_gone_for_everybody(door: Door) -> None:
    ann, mod = await door.caller("ann"), await door.caller("mod", role=Role.MODERATOR)
    job = await a_finished_job(door, ann)
    kept = await ann.create("another")
    await ann.delete(job.name)
    for caller in (ann, mod):
        for call in (
            caller.get(job.name),
            caller.download(job.name),
            caller.download(f"{job.name}/videos/mp4"),
            caller.reroll(job.name),
            caller.vary(f"{job.name}/images/1"),
            caller.upscale(f"{job.name}/images/1"),
            caller.cancel(job.name),
            caller.move(job.name, job_pb2.TIER_RELAX),
            _all(caller.watch(job.name)),
        ):
            assert (await refusal(call)).reason == NOT_YOURS
        listed = await caller.jobs.ListJobs(job_pb2.ListJobsRequest(parent=f"accounts/{caller.account_id}"))
        assert [each.uid for each in listed.jobs] == ([kept.uid] if caller is ann else [])
    ((archive, _),) = await ann.download("accounts/-")
    assert archive.images == 0


async def test_a_deleted_upscale_leaves_the_feed(door: Door) -> None:
    ann = await door.caller("ann")
    grid = await a_finished_job(door, ann)
    job = await ann.upscale(f"{grid.name}/images/1")
    await door.succeed(job.uid, [b"large"])
    assert (await ann.jobs.ListFeed(job_pb2.ListFeedRequest())).jobs
    await ann.delete(job.name)
    assert not (await ann.jobs.ListFeed(job_pb2.ListFeedRequest())).jobs


async def test_nothing_of_it_is_left_in_the_artifact_store_or_in_words(door: Door) -> None:
    ann = await door.caller("ann")
    job = await a_finished_job(door, ann)
    assert len(files(door)) == 7
    await ann.delete(job.name)
    assert files(door) == []
    text = await door.sql("SELECT row_to_json(job)::text FROM scheduler.job")
    assert "secret" not in text
    assert "hare" not in text
    assert 'reproduction": {}' in text
    assert await door.sql("SELECT count(*) FROM scheduler.job WHERE files_deleted_at IS NOT NULL") == 1


async def test_what_it_cost_stays(door: Door) -> None:
    ann = await door.caller("ann")
    job = await a_finished_job(door, ann)
    await ann.delete(job.name)
    assert await door.sql("SELECT (receipt ->> 'billed_gpu_ms')::int FROM scheduler.job") == 4_000
    assert await door.sql("SELECT count(*) FROM scheduler.attempt") == 1


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_a_job_that_ended_without_pictures_can_be_deleted_too(door: Door, end: str) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a secret fox")
    if end == "failed":
        await door.fail(job.uid)
    else:
        await ann.cancel(job.name)
    await ann.delete(job.name)
    assert "secret" not in await door.sql("SELECT row_to_json(job)::text FROM scheduler.job")


async def test_deleting_twice_is_no_error(door: Door) -> None:
    ann = await door.caller("ann")
    job, other = await a_finished_job(door, ann), await a_finished_job(door, ann)
    request_id = str(uuid.uuid4())
    await asyncio.gather(*(ann.delete(job.name, request_id) for _ in range(3)))
    await ann.delete(job.name, request_id)
    await ann.delete(job.name)
    assert (await refusal(ann.delete(other.name, request_id))).reason == "REQUEST_ID_REUSED"
    assert (await ann.get(other.name)).uid


async def test_a_job_that_has_not_ended_is_not_deleted(door: Door) -> None:
    ann = await door.caller("ann")
    waiting, running = await ann.create(), await ann.create()
    await door.start(running.uid)
    for job, state in ((waiting, "queued"), (running, "running")):
        refused = await refusal(ann.delete(job.name))
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_NOT_FINISHED")
        assert refused.metadata == {"job": job.uid, "state": state}
        assert "Cancel it first, or wait." in refused.message


async def test_only_its_author_deletes_a_job(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    mod = await door.caller("mod", role=Role.MODERATOR)
    job = await a_finished_job(door, ann)
    nothing = f"accounts/-/jobs/{uuid.uuid4()}"
    refusals = [
        await refusal(caller.delete(name))
        for caller in (ben, mod)
        for name in (job.name, f"accounts/-/jobs/{job.uid}", nothing)
    ]
    assert {refused.reason for refused in refusals} == {NOT_YOURS}
    assert len({refused.raw for refused in refusals}) == 1
    assert (await refusal(ann.jobs.DeleteJob(job_pb2.DeleteJobRequest(name="x")))).violations.keys() == {
        "name",
        "request_id",
    }


async def test_what_was_made_of_it_lives_on(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_finished_job(door, ann)
    varied = await ann.vary(f"{source.name}/images/1")
    await door.succeed(varied.uid)
    await ann.delete(source.name)
    assert (await ann.get(varied.name)).source_job == source.name
    assert len(await ann.download(varied.name)) == 4
    assert (await ann.vary(f"{varied.name}/images/1")).uid
    # To draw it again takes the picture it was made from.
    refused = await refusal(ann.reroll(varied.name))
    assert (refused.reason, refused.metadata) == (
        "SOURCE_NOT_READY",
        {"job": source.uid, "state": "deleted"},
    )


async def test_files_stay_while_a_live_job_starts_from_them(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_finished_job(door, ann)
    varied = await ann.vary(f"{source.name}/images/1")
    await door.succeed(varied.uid)
    again = await ann.reroll(varied.name)  # also from the first one's picture
    await ann.delete(source.name)
    kept = {path for path in files(door) if source.uid in path.parts}
    assert len(kept) == 7
    await door.start(again.uid)
    await _sweep(door)
    assert kept <= set(files(door))
    await door.succeed(again.uid)
    await _sweep(door)
    assert not kept & set(files(door))


async def test_what_a_crash_or_a_store_that_is_away_left_over_goes_with_a_later_sweep(door: Door) -> None:
    ann = await door.caller("ann")
    first, second = await a_finished_job(door, ann), await a_finished_job(door, ann)
    before = len(files(door))

    class Away(Artifacts):
        """A store that does not answer for the first job."""

        async def delete_job(self, job_id: str) -> None:
            if job_id == first.uid:
                raise Overloaded(sentence="away")
            await super().delete_job(job_id)

    for job in (first, second):
        async with door.pool.transaction() as connection:
            await connection.execute(
                "UPDATE scheduler.job SET deleted_at = now() WHERE job_id = $1", uuid.UUID(job.uid)
            )
    await Deletions(door.pool, Away(f"file://{door.artifacts}")).sweep()
    assert len(files(door)) == before // 2, "one that cannot be removed holds up no other"
    await _sweep(door)
    assert files(door) == []


async def test_a_job_and_the_deletion_of_its_source_at_once_end_in_one_order_or_the_other(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_finished_job(door, ann)
    varied, _ = await asyncio.gather(
        ann.vary(f"{source.name}/images/1"), ann.delete(source.name), return_exceptions=True
    )
    there = any(source.uid in path.parts for path in files(door))
    assert there == isinstance(varied, job_pb2.Job)


async def test_a_picture_of_prompts_goes_an_hour_after_the_last_job_that_has_it(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    mine, same, other = [
        await who.create("a fox", model="seeing", pictures=[a_png(red)])
        for who, red in ((ann, 1), (ben, 1), (ann, 2))
    ]
    shared, own = [(await door.spec(job.uid)).pictures[0].path for job in (mine, other)]
    rerolled = await ben.reroll(same.name)
    for caller, job in ((ann, mine), (ben, same), (ann, other)):
        await caller.cancel(job.name)
        await caller.delete(job.name)
    await _sweep(door)
    assert len(files(door)) == 2, "they were just noted: somebody may be about to submit a job with them"
    await _an_hour_passes(door)
    assert files(door) == [door.artifacts / shared], own
    await ben.cancel(rerolled.name)
    await ben.delete(rerolled.name)
    await _an_hour_passes(door)
    assert files(door) == []
    assert await door.sql("SELECT count(*) FROM scheduler.stray_picture") == 0


async def test_a_picture_whose_request_was_refused_goes_too(door: Door) -> None:
    ann = await door.caller("ann")
    for _ in range(10):
        await ann.create()
    refused = await refusal(ann.create("a fox", model="seeing", pictures=[a_png()]))
    assert refused.reason == "QUEUE_FULL"
    assert len(files(door)) == 1
    await _an_hour_passes(door)
    assert files(door) == []


async def test_a_checkpoint_of_a_job_that_was_cancelled_while_it_waited_goes_after_a_while(
    door: Door,
) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    checkpoint = door.artifacts / outputs.checkpoint_path(job.uid, str(uuid.uuid4()))
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"latents")
    await door.sql(
        """UPDATE scheduler.job SET checkpoint = jsonb_build_object('path', $2::text) WHERE job_id = $1
           RETURNING 1""",
        uuid.UUID(job.uid),
        str(checkpoint.relative_to(door.artifacts)),
    )
    await ann.cancel(job.name)
    await _sweep(door)
    assert files(door) == [checkpoint], "a worker that was given up may be writing it still"
    await door.sql("UPDATE scheduler.stray_checkpoint SET since = since - interval '11 minutes' RETURNING 1")
    await _sweep(door)
    assert files(door) == []
    assert await door.sql("SELECT count(*) FROM scheduler.stray_checkpoint") == 0


async def _an_hour_passes(door: Door) -> None:
    await door.sql("UPDATE scheduler.stray_picture SET since = since - interval '61 minutes' RETURNING 1")
    await _sweep(door)


async def _sweep(door: Door) -> None:
    await Deletions(door.pool, Artifacts(f"file://{door.artifacts}")).sweep()


async def _all(stream: object) -> list[object]:
    return [response async for response in stream]  # type: ignore[attr-defined]
