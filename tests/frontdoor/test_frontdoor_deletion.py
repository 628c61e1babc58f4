"""A deleted job: what goes, what stays, and who may."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import grpc
import pytest

from billing import accounts as ledger_accounts
from gpu_worker import outputs
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.deletions import Deletions
from scheduler.refusals import Overloaded
from scheduler.store import stray_pictures
from scheduler.store.accounts import Role
from scheduler.store.pool import Pool, open_pool
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, a_png, read_refusal, refusal

NOT_YOURS = "NOT_FOUND_OR_NOT_YOURS"
WAITING = """SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock'"""


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
    varied, upscaled = await ann.vary(f"{job.name}/images/1"), await ann.upscale(f"{job.name}/images/1")
    for made in (varied, upscaled):
        await door.succeed(made.uid)
    for each in (varied, upscaled, job):
        await ann.delete(each.name)
    assert files(door) == []
    text = await door.sql("SELECT json_agg(job)::text FROM scheduler.job")
    assert "secret" not in text
    assert "hare" not in text
    assert 'reproduction": {}' in text


async def test_what_a_worker_that_was_given_up_stores_too_late_goes_ten_minutes_after_the_deletion(
    door: Door,
) -> None:
    ann = await door.caller("ann")
    job = await a_finished_job(door, ann)
    await ann.delete(job.name)
    late = door.artifacts / f"jobs/{job.uid}/late/latents.safetensors"
    late.parent.mkdir(parents=True)
    late.write_bytes(b"x")
    await _sweep(door)
    assert files(door) == [late]
    await _ten_minutes_pass(door)
    assert files(door) == []
    assert await door.sql("SELECT count(*) FROM scheduler.job WHERE files_due_at IS NOT NULL") == 0


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


class Away(Artifacts):
    """A store that does not answer for some paths."""

    def __init__(self, folder: Path, away: Callable[[str], bool]) -> None:
        super().__init__(f"file://{folder}")
        self._is_away = away
        self.asked = 0

    async def delete(self, path: str) -> None:
        self.asked += 1
        if self._is_away(path):
            raise Overloaded(sentence="away")
        await super().delete(path)


async def test_what_a_crash_or_a_store_that_is_away_left_over_goes_with_a_later_sweep(door: Door) -> None:
    ann = await door.caller("ann")
    first, second = await a_finished_job(door, ann), await a_finished_job(door, ann)
    before = len(files(door))
    for job in (first, second):
        async with door.pool.transaction() as connection:
            await connection.execute(
                "UPDATE scheduler.job SET deleted_at = now(), files_due_at = now() WHERE job_id = $1",
                uuid.UUID(job.uid),
            )
    await _sweep(door, Away(door.artifacts, lambda path: first.uid in path))
    assert len(files(door)) == before // 2, "one that cannot be removed holds up no other"
    await _ten_minutes_pass(door)
    assert files(door) == []


@dataclass(frozen=True, kw_only=True)
class Strays:
    """A database with 250 strays of each kind, more than two pages, where nobody else sweeps."""

    pool: Pool
    folder: Path

    async def sweep(self, away: Callable[[str], bool]) -> int:
        """Sweep with a store that does not answer for some paths; returns how often it was asked."""
        store = Away(self.folder, away)
        await Deletions(self.pool, store, lambda: datetime.now(UTC)).sweep()
        return store.asked

    async def left(self) -> list[list[str]]:
        async with self.pool.reading() as connection:
            return [
                await connection.fetchval(f"SELECT array_agg(path) FROM scheduler.{table}")
                for table in ("stray_picture", "stray_checkpoint")
            ]


@pytest.fixture
async def strays(dsn: str, tmp_path: Path) -> AsyncIterator[Strays]:
    pool = await open_pool(dsn, 1)
    async with pool.reading() as connection:
        for table in ("stray_picture", "stray_checkpoint"):
            await connection.execute(
                f"""INSERT INTO scheduler.{table} (path, since)
                    SELECT 'strays/' || n, now() - interval '2 hours' FROM generate_series(1, 250) n"""
            )
    yield Strays(pool=pool, folder=tmp_path)
    await pool.close()


async def test_one_sweep_removes_all_that_is_due_but_what_cannot_go(strays: Strays) -> None:
    assert await strays.sweep(lambda path: path.endswith("7")) == 2 * 250, "each of them once"
    for left in await strays.left():
        assert len(left) == 25
        assert all(path.endswith("7") for path in left)


async def test_a_store_that_is_away_is_not_asked_for_everything_and_nothing_is_stuck_behind_it(
    strays: Strays,
) -> None:
    assert await strays.sweep(lambda _: True) == 2 * 100, "a page of each"
    assert await strays.sweep(lambda _: False) == 2 * 150, "those that were tried have another time"
    assert [len(left) for left in await strays.left()] == [100, 100]


async def test_deleted_jobs_whose_files_cannot_go_are_behind_those_that_were_not_tried(door: Door) -> None:
    ann = await door.caller("ann")
    jobs = [await a_finished_job(door, ann) for _ in range(2)]
    away = Away(door.artifacts, lambda _: True)
    await door.sql(
        "UPDATE scheduler.job SET deleted_at = now(), files_due_at = now() WHERE job_id = $1 RETURNING 1",
        uuid.UUID(jobs[0].uid),
    )
    await _sweep(door, away)
    await door.sql(
        "UPDATE scheduler.job SET deleted_at = now(), files_due_at = now() WHERE job_id = $1 RETURNING 1",
        uuid.UUID(jobs[1].uid),
    )
    order = "SELECT array_agg(job_id::text ORDER BY files_due_at) FROM scheduler.job"
    assert await door.sql(order) == [jobs[1].uid, jobs[0].uid]
    await _sweep(door, away)
    assert away.asked == 2, "the first is not due yet"


@pytest.mark.parametrize("first", ["variation", "deletion"])
async def test_a_job_and_the_deletion_of_its_source_at_once_end_in_one_order_or_the_other(
    door: Door, dsn: str, first: str
) -> None:
    ann = await door.caller("ann")
    source = await a_finished_job(door, ann)
    calls = {
        "variation": lambda: ann.vary(f"{source.name}/images/1"),
        "deletion": lambda: ann.delete(source.name),
    }
    tasks = {}
    connection = await asyncpg.connect(dsn)
    try:
        async with asyncio.TaskGroup() as group, connection.transaction():
            # Both have seen that the source is there, and stand in line for the account.
            await ledger_accounts.lock(connection, ["ann"], door.clock.now)
            for number, name in enumerate(sorted(calls, key=lambda name: name != first), start=1):
                tasks[name] = group.create_task(_outcome(calls[name]()))
                while await door.sql(WAITING) < number:
                    assert not tasks[name].done(), tasks[name].result()
    finally:
        await connection.close()
    assert tasks["deletion"].result() == ""
    assert tasks["variation"].result() == ("" if first == "variation" else NOT_YOURS)
    there = any(source.uid in path.parts for path in files(door))
    assert there == (first == "variation")


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


async def test_a_picture_that_no_job_came_to_have_goes_too(door: Door) -> None:
    async with door.pool.reading() as connection:
        await stray_pictures.note(connection, ["pictures/a.png", "pictures/never_stored.png"])
    (door.artifacts / "pictures").mkdir()
    (door.artifacts / "pictures/a.png").write_bytes(a_png())
    await _an_hour_passes(door)
    assert files(door) == []
    assert await door.sql("SELECT count(*) FROM scheduler.stray_picture") == 0


async def test_a_picture_that_is_stored_again_while_it_is_removed_is_there(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox", model="seeing", pictures=[a_png()])
    (picture,) = files(door)
    await ann.cancel(job.name)
    await ann.delete(job.name)

    class Slow(Artifacts):
        """A store that takes its time to remove a file."""

        def _delete(self, path: str) -> None:
            removing.set()
            assert on.wait(timeout=20)
            super()._delete(path)

    removing, on = threading.Event(), threading.Event()
    await door.sql("UPDATE scheduler.stray_picture SET since = since - interval '2 hours' RETURNING 1")
    async with asyncio.TaskGroup() as group:
        group.create_task(_sweep(door, Slow(f"file://{door.artifacts}")))
        assert await asyncio.to_thread(removing.wait, 20)
        again = group.create_task(ann.create("a fox", model="seeing", pictures=[a_png()]))
        while await door.sql(WAITING) < 1:
            pass
        on.set()
    assert (await door.spec(again.result().uid)).pictures
    assert files(door) == [picture]


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
    # The door's own sweep may be at what this one left to it: wait for its rows.
    await door.sql("SELECT count(*) FROM (SELECT FROM scheduler.stray_picture FOR UPDATE) AS swept")


async def _ten_minutes_pass(door: Door) -> None:
    await door.sql(
        """UPDATE scheduler.job SET deleted_at = deleted_at - interval '10 minutes',
                                    files_due_at = files_due_at - interval '10 minutes' RETURNING 1"""
    )
    await _sweep(door)


async def _sweep(door: Door, artifacts: Artifacts | None = None) -> None:
    artifacts = artifacts or Artifacts(f"file://{door.artifacts}")
    await Deletions(door.pool, artifacts, lambda: door.clock.now).sweep()


async def _outcome(call: Awaitable[object]) -> str:
    """Return the reason of the refusal that a call ends with; empty: it is not refused."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return read_refusal(error).reason
    return ""


async def _all(stream: object) -> list[object]:
    return [response async for response in stream]  # type: ignore[attr-defined]
