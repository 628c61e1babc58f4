"""Pictures are kept as long as the plan says; ended jobs move out of the way; old answers are forgotten."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import grpc
import pytest

from billing import accounts as ledger_accounts
from billing.v1 import admin_pb2, billing_pb2
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.deletions import Deletions
from scheduler.frontdoor.lifetimes import Lifetimes
from scheduler.settings import Lifetimes as LifetimesSettings
from scheduler.store import past_jobs
from scheduler.store.accounts import Role
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, read_refusal, refusal

ENDED = datetime(2026, 11, 10, 12, tzinfo=UTC)
DAYS_30 = timedelta(days=30)
EXPIRED = "PICTURES_EXPIRED"
WAITING = """SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock'"""


@pytest.fixture
async def ann(door: Door) -> Caller:
    """Somebody whose plan keeps pictures for 30 days."""
    await door.plan("month", picture_retention_days=30)
    return await door.caller("ann", plan="month")


async def a_finished_job(door: Door, who: Caller, prompt: str = "a fox --video") -> job_pb2.Job:
    job = await who.create(prompt)
    await finish(door, job)
    return job


async def finish(door: Door, job: job_pb2.Job) -> None:
    await door.start(job.uid)
    await door.succeed(job.uid, videos={"video/mp4": b"moving"})
    await door.sql(
        "UPDATE scheduler.job SET ended_at = $2 WHERE job_id = $1 RETURNING 1", uuid.UUID(job.uid), ENDED
    )


async def sweep_at(door: Door, at: datetime) -> None:
    """Do all that is due at a time: rows, then files."""
    await Lifetimes(door.pool, lambda: at, LifetimesSettings()).sweep()
    await Deletions(door.pool, Artifacts(f"file://{door.artifacts}"), lambda: at).sweep()


def files(door: Door, job: job_pb2.Job) -> list[Path]:
    return [path for path in door.artifacts.rglob("*") if path.is_file() and job.uid in path.parts]


async def test_pictures_are_there_until_the_last_moment_and_then_gone(door: Door, ann: Caller) -> None:
    job = await a_finished_job(door, ann)
    expires = ENDED + DAYS_30
    assert (await ann.get(job.name)).pictures_expire_time.ToDatetime(UTC) == expires
    await sweep_at(door, expires - timedelta(microseconds=1))
    assert len(await ann.download(job.name)) == 4
    await sweep_at(door, expires)
    assert files(door, job) == []
    shown = await ann.get(job.name)
    assert (shown.prompt, list(shown.images), list(shown.videos)) == ("a fox --video", [], [])
    assert shown.state == job_pb2.JOB_STATE_SUCCEEDED
    assert shown.receipt.gpu_ms > 0
    assert shown.pictures_expire_time.ToDatetime(UTC) == expires
    for call in (
        ann.download(job.name),
        ann.download(f"{job.name}/images/1"),
        ann.download(f"{job.name}/videos/mp4"),
        ann.vary(f"{job.name}/images/1"),
        ann.upscale(f"{job.name}/images/1"),
    ):
        refused = await refusal(call)
        assert (refused.reason, refused.metadata["job"]) == (EXPIRED, job.uid)
    assert (await ann.reroll(job.name, exact=True)).seed == shown.seed
    await ann.delete(job.name)
    assert (await refusal(ann.get(job.name))).reason == "NOT_FOUND_OR_NOT_YOURS"


async def test_the_feed_and_the_archive_leave_out_what_expired(door: Door, ann: Caller) -> None:
    grid = await a_finished_job(door, ann, "a fox")
    upscale = await ann.upscale(f"{grid.name}/images/1")
    await finish(door, upscale)
    (shown,) = (await ann.jobs.ListFeed(job_pb2.ListFeedRequest())).jobs
    assert not shown.HasField("pictures_expire_time"), "what plan somebody is on is nobody else's business"
    await sweep_at(door, ENDED + DAYS_30)
    assert not (await ann.jobs.ListFeed(job_pb2.ListFeedRequest())).jobs
    ((archive, _),) = await ann.download("accounts/-")
    assert archive.images == 0
    listed = await ann.jobs.ListJobs(job_pb2.ListJobsRequest(parent="accounts/ann"))
    assert [job.uid for job in listed.jobs] == [upscale.uid, grid.uid]


async def test_a_plan_that_says_nothing_keeps_pictures_for_ever(door: Door, ann: Caller) -> None:
    ben = await door.caller("ben")
    kept = await a_finished_job(door, ben)
    await a_finished_job(door, ann)
    assert not (await ben.get(kept.name)).HasField("pictures_expire_time")
    await sweep_at(door, ENDED + 100 * DAYS_30)
    assert len(await ben.download(kept.name)) == 4


async def test_what_counts_is_the_plan_of_the_day(door: Door, ann: Caller) -> None:
    job = await a_finished_job(door, ann)
    await door.plan("month", picture_retention_days=60)
    # Its terms are those of the new version from the next touch of the account on.
    await ann.create("touched")
    await sweep_at(door, ENDED + timedelta(days=59))
    assert len(await ann.download(job.name)) == 4
    await door.plan("month", picture_retention_days=1)
    await ann.create("touched")
    await sweep_at(door, ENDED + timedelta(days=59))
    assert (await refusal(ann.download(job.name))).reason == EXPIRED


async def test_pictures_that_a_live_job_starts_from_stay_until_it_ended(door: Door, ann: Caller) -> None:
    source = await a_finished_job(door, ann)
    varied = await ann.vary(f"{source.name}/images/2")
    await sweep_at(door, ENDED + DAYS_30)
    assert files(door, source), "the worker has yet to read them"
    assert (await refusal(ann.download(source.name))).reason == EXPIRED
    await finish(door, varied)
    assert (await refusal(ann.reroll(varied.name))).reason == EXPIRED, "it would start from them too"
    await sweep_at(door, ENDED + DAYS_30)
    assert files(door, source) == []


@pytest.mark.parametrize("first", ["variation", "expiry"])
async def test_a_job_and_the_expiry_of_its_source_at_once_end_in_one_order_or_the_other(
    door: Door, dsn: str, ann: Caller, first: str
) -> None:
    source = await a_finished_job(door, ann)
    at = ENDED + DAYS_30
    # Past already, so that only its expiry is left to be done.
    await Lifetimes(door.pool, lambda: at - DAYS_30 / 2, LifetimesSettings()).sweep()
    calls: dict[str, Callable[[], Coroutine[None, None, str | None]]] = {
        "variation": lambda: _outcome(ann.vary(f"{source.name}/images/1")),
        "expiry": lambda: Lifetimes(door.pool, lambda: at, LifetimesSettings()).sweep(),
    }
    tasks: dict[str, asyncio.Task[str | None]] = {}
    connection = await asyncpg.connect(dsn)
    try:
        async with asyncio.TaskGroup() as group, connection.transaction():
            await ledger_accounts.lock(connection, ["ann"], door.clock.now)
            for number, name in enumerate(sorted(calls, key=lambda name: name != first), start=1):
                tasks[name] = group.create_task(calls[name]())
                while await door.sql(WAITING) < number:
                    assert not tasks[name].done(), tasks[name].result()
    finally:
        await connection.close()
    assert tasks["variation"].result() == ("" if first == "variation" else EXPIRED)
    await sweep_at(door, at)
    assert bool(files(door, source)) == (first == "variation")


async def _outcome(call: Awaitable[object]) -> str:
    """Return why a call was refused; empty if it was not."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return read_refusal(error).reason
    return ""


async def test_an_erased_account_has_nothing_left_to_expire(door: Door, ann: Caller) -> None:
    job = await a_finished_job(door, ann)
    boss = await door.caller("boss", role=Role.ADMIN)
    await boss.admin.EraseAccount(
        admin_pb2.EraseAccountRequest(request_id=str(uuid.uuid4()), name="accounts/ann", reason="asked")
    )
    await sweep_at(door, ENDED + DAYS_30)
    assert files(door, job) == []
    assert await door.sql("SELECT count(*) FROM scheduler.job WHERE expired_at IS NOT NULL") == 0
    assert await door.sql("SELECT count(*) FROM scheduler.account WHERE account_id = 'ann'") == 0


async def test_jobs_that_ended_move_ten_minutes_later_and_the_next_month_is_there_before_its_jobs(
    door: Door, ann: Caller
) -> None:
    job, waiting = await a_finished_job(door, ann), await ann.create("another")
    where = "SELECT tableoid::regclass::text FROM scheduler.job WHERE job_id = $1"
    lifetimes = Lifetimes(door.pool, lambda: at, LifetimesSettings())
    at = ENDED + timedelta(minutes=10)
    await lifetimes.sweep()
    assert await door.sql(where, uuid.UUID(job.uid)) == "scheduler.live_job"
    at += timedelta(microseconds=1)
    await lifetimes.sweep()
    assert await door.sql(where, uuid.UUID(job.uid)) == "scheduler.past_job_2026_11"
    assert await door.sql(where, uuid.UUID(waiting.uid)) == "scheduler.live_job"
    at = datetime(2026, 11, 24, 1, tzinfo=UTC)
    await lifetimes.sweep()
    assert await door.sql("SELECT to_regclass('scheduler.past_job_2026_12')::text") is not None


async def test_who_would_have_pictures_kept_for_less_time_is_told_before(door: Door, ann: Caller) -> None:
    boss = await door.caller("boss", role=Role.ADMIN)

    async def preview(plan: str) -> billing_pb2.PlanChange:
        request = billing_pb2.PreviewPlanChangeRequest(account="accounts/ann", plan=f"plans/{plan}")
        return await boss.billing.PreviewPlanChange(request)

    await door.plan("week", picture_retention_days=7)
    less, more, same = await preview("week"), await preview("standard"), await preview("month")
    for change, days in ((less, 7), (more, 0), (same, 30)):
        assert change.picture_retention_days_before == 30
        assert change.picture_retention_days_after == days
    assert less.sentence.endswith(
        " Pictures are then kept for 7 days from the end of their job, no longer for 30 days from the end of "
        "their job: those that are older are gone for good."
    )
    assert more.sentence.endswith(
        " Pictures are then kept for ever, no longer for 30 days from the end of their job."
    )
    assert "ictures" not in same.sentence


async def test_a_front_door_moves_nothing_while_another_makes_the_months(door: Door, ann: Caller) -> None:
    job = await a_finished_job(door, ann)
    # In a month that is not there yet.
    ended_at = datetime(2020, 1, 10, tzinfo=UTC)
    await door.sql(
        "UPDATE scheduler.job SET ended_at = $2 WHERE job_id = $1 RETURNING 1", uuid.UUID(job.uid), ended_at
    )
    at = ended_at + timedelta(days=1)
    lifetimes = Lifetimes(door.pool, lambda: at, LifetimesSettings())
    where = "SELECT tableoid::regclass::text FROM scheduler.job WHERE job_id = $1"
    async with door.pool.transaction() as other:
        assert await past_jobs.make_months(other, ended_from=None, until=at) == ["past_job_2020_01"]
        await lifetimes.sweep()
        assert await door.sql(where, uuid.UUID(job.uid)) == "scheduler.live_job"
    await lifetimes.sweep()
    assert await door.sql(where, uuid.UUID(job.uid)) == "scheduler.past_job_2020_01"


async def test_a_request_has_its_first_answer_for_a_month(door: Door, ann: Caller) -> None:
    request_id = str(uuid.uuid4())
    first = await ann.create("a fox", request_id=request_id)
    answered: datetime = await door.sql("SELECT created_at FROM billing.idempotency WHERE account_id = 'ann'")
    await sweep_at(door, answered + DAYS_30)
    assert (await ann.create("a fox", request_id=request_id)).uid == first.uid
    await sweep_at(door, answered + DAYS_30 + timedelta(microseconds=1))
    assert (await ann.create("a fox", request_id=request_id)).uid != first.uid
