"""Beyond what a front door takes on it refuses at once, says when to come back, and loses nothing it took."""

from __future__ import annotations

import asyncio
import gc
import itertools
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager

import asyncpg
import grpc
import pytest

from scheduler.frontdoor.admission import Admission
from scheduler.frontdoor.auth import Principal
from scheduler.frontdoor.standings import Standings
from scheduler.frontdoor.watch import Watches
from scheduler.refusals import Overloaded
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.settings import Scheduling as SchedulingSettings
from scheduler.store import jobs
from scheduler.store.accounts import Role
from scheduler.store.pool import open_pool
from scheduler.updates import QueueReason, QueueStatus
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, Refused, SmallScheduler, read_refusal, refusal

SUBMISSIONS = 2
CALLS = 8
WATCHES = 4
WAITING = 8


@pytest.fixture
def frontdoor_settings() -> FrontDoorSettings:
    return FrontDoorSettings(
        port=0,
        requests_per_second=1_000,
        submissions_at_once=SUBMISSIONS,
        calls_at_once=CALLS,
        watches_at_once=WATCHES,
        late_max_ms=60_000,
    )


@pytest.fixture
def scheduling_settings() -> SchedulingSettings:
    return SchedulingSettings(waiting_max=WAITING)


@asynccontextmanager
async def locked(door: Door, *callers: Caller) -> AsyncIterator[None]:
    """Keep every submission of these waiting."""
    async with door.pool.transaction() as connection:
        await connection.execute(
            "SELECT FROM billing.subscription WHERE account_id = ANY($1) FOR UPDATE",
            [caller.account_id for caller in callers],
        )
        yield


async def until_waiting(door: Door, calls: int) -> None:
    """Return once so many transactions wait for a lock. The pool's connections are for the door."""
    connection = await asyncpg.connect(door.pool.dsn)
    try:
        async with asyncio.timeout(20):
            while calls != await connection.fetchval(
                """SELECT count(*) FROM pg_stat_activity
                   WHERE wait_event_type = 'Lock' AND datname = current_database()"""
            ):
                pass
    finally:
        await connection.close()


def is_overloaded(refused: Refused) -> bool:
    return (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")


async def test_submissions_beyond_the_limit_are_refused_at_once_and_those_within_are_all_there(
    door: Door,
) -> None:
    ann, eve, ben = [await door.caller(name) for name in ("ann", "eve", "ben")]
    async with locked(door, ann, eve):
        within = [asyncio.create_task(caller.create()) for caller in (ann, eve)]
        await until_waiting(door, SUBMISSIONS)
        refused = [await refusal(ben.create()) for _ in range(10)]
    assert all(map(is_overloaded, refused))
    assert all(one.retry_s is not None and 0 < one.retry_s <= 2 for one in refused)
    assert len({one.retry_s for one in refused}) > 1, "who was refused is not to come back all at once"
    accepted = {(await task).uid for task in within}
    async with door.pool.reading() as connection:
        rows = await connection.fetch("SELECT job_id::text FROM scheduler.job")
    assert {row["job_id"] for row in rows} == accepted
    assert (await ben.create()).uid, "there is room again"


async def test_while_submissions_are_full_other_calls_are_answered(door: Door) -> None:
    ann, eve, ben = [await door.caller(name) for name in ("ann", "eve", "ben")]
    job = await ben.create()
    async with locked(door, ann, eve):
        waiting = [asyncio.create_task(caller.create()) for caller in (ann, eve)]
        await until_waiting(door, SUBMISSIONS)
        assert (await ben.get(job.name)).uid == job.uid
    await asyncio.gather(*waiting)


async def test_one_account_does_not_take_all_the_places(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    async with locked(door, ann):
        waiting = asyncio.create_task(ann.create())
        await until_waiting(door, 1)
        refused = await refusal(ann.create())
        assert is_overloaded(refused)
        assert "of your account" in refused.message
        assert (await ben.create()).uid
    assert (await waiting).uid
    assert (await ann.create()).uid, "it has its place again"


def test_accounts_that_fill_a_front_door_leave_places_for_who_can_block_them() -> None:
    admission = Admission(FrontDoorSettings(calls_at_once=32), late_ms=lambda: 0)

    def enter(name: str, role: Role) -> None:
        who = Principal(account_id=name, key_id="k", role=role)
        calls.enter_context(admission.entered("/scheduler.v1.JobService/GetJob", who))

    def fill(role: Role) -> int:
        """Return how many calls of such accounts come in until one is refused."""
        for number in itertools.count():
            try:
                enter(f"{role}-{number // 8}", role)
            except Overloaded:
                return number
        raise AssertionError("somebody is refused")

    with ExitStack() as calls:
        assert fill(Role.USER) == 30
        assert fill(Role.MODERATOR) == 2
    with ExitStack() as calls:
        assert fill(Role.ADMIN) == 32


async def test_a_burst_of_thousands_is_answered_or_refused_call_by_call(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    answers = await asyncio.gather(*(ann.get(job.name) for _ in range(3_000)), return_exceptions=True)
    refused = [one for one in answers if isinstance(one, grpc.aio.AioRpcError)]
    assert all(is_overloaded(read_refusal(error)) for error in refused)
    assert 0 < len(refused) < len(answers)


async def test_a_full_queue_takes_no_more_but_answers_for_what_it_took(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    request_id = str(uuid.uuid4())
    job = await ann.create(request_id=request_id)
    for _ in range(WAITING - 1):
        await ben.create()
    refused = await _until_refused(ann)
    assert is_overloaded(refused)
    assert refused.retry_s == 30
    assert (await ann.create(request_id=request_id)).uid == job.uid
    await ann.cancel(job.name)
    async with asyncio.timeout(20):
        while True:
            try:
                await ann.create(validate_only=True)
            except grpc.aio.AioRpcError:
                continue
            break


async def _until_refused(caller: Caller) -> Refused:
    """Ask until the door has counted what waits."""
    async with asyncio.timeout(20):
        while True:
            try:
                await caller.create(validate_only=True)
            except grpc.aio.AioRpcError:
                return await refusal(caller.create(validate_only=True))


async def test_watches_beyond_the_limit_are_refused_until_one_ends(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    watches = [ann.watch(job.name) for _ in range(WATCHES)]
    for watch in watches:
        await anext(aiter(watch))
    # Before anything is asked of the database: whether there is such a job, nobody has looked.
    for name in (job.name, f"accounts/ann/jobs/{uuid.uuid4()}"):
        assert is_overloaded(await refusal(anext(aiter(ann.watch(name)))))
    watches[0].cancel()
    async with asyncio.timeout(20):
        while True:
            try:
                assert (await anext(aiter(ann.watch(job.name)))).event.sequence
            except grpc.aio.AioRpcError:
                continue
            break


async def test_a_watcher_that_does_not_read_costs_the_newest_state_alone(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    attempt_id = await door.start(job.uid)
    watches = Watches(
        door.pool, door.scheduler, Standings(door.pool, door.scheduler, lambda: door.clock.now), 1
    )
    watch = watches.watch(job.uid, 0, previews=True)
    while (await anext(watch)).event.state != job_pb2.JOB_STATE_RUNNING:
        pass
    door.scheduler.step(attempt_id, 1, b"the first picture")
    assert (await anext(watch)).progress.step == 1
    # From here on nobody reads, while thousands of pictures come.
    for step in range(2_000):
        door.scheduler.step(attempt_id, step % 20, b"%d" % step + bytes(10_000))
    await _until_taken(door, attempt_id)
    gc.collect()
    held = [one for one in gc.get_objects() if type(one) is bytes and len(one) > 10_000]
    assert len(held) <= 2
    progress = (await anext(watch)).progress
    assert progress.preview.startswith(b"1999")
    await watch.aclose()


async def _until_taken(door: Door, attempt_id: str) -> None:
    """Let the watch take all that the worker has said."""
    async with asyncio.timeout(20):
        while door.scheduler._progress[attempt_id].qsize():  # noqa: ASYNC110 - nobody says it is empty
            await asyncio.sleep(0)  # the watch's turn


class Counting(SmallScheduler):
    """Tells every job's place, and counts how many it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_about: list[int] = []

    async def queue_statuses(self, job_ids: Sequence[str]) -> Mapping[str, QueueStatus]:
        self.asked_about.append(len(job_ids))
        status = QueueStatus(reason=QueueReason.WAITING_FOR_GPU, sentence="", position=1)
        return dict.fromkeys(job_ids, status)


class Slow(Counting):
    """Answers once it is let, and then that it knows none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.let = asyncio.Event()

    async def queue_statuses(self, job_ids: Sequence[str]) -> Mapping[str, QueueStatus]:
        self.asked_about.append(len(job_ids))
        await self.let.wait()
        return {}


async def test_watches_that_look_all_at_once_ask_together(door: Door) -> None:
    ann = await door.caller("ann")
    uids = [(await ann.create()).uid for _ in range(3)]
    scheduler = Slow()
    standings = Standings(door.pool, scheduler, lambda: door.clock.now)
    watches = Watches(door.pool, scheduler, standings, 1)
    read: list[float] = []
    door.pool.observe_waits(read.append)
    first, *others = [asyncio.create_task(watches.look(uid, 0)) for uid in 20 * uids]
    async with asyncio.timeout(20):
        while len(read) < 60:  # noqa: ASYNC110 - nobody tells that all have
            await asyncio.sleep(0)
    assert scheduler.asked_about == [1], "what it does not answer is not asked again and again"
    # Whose watch ends meanwhile answers nobody; the others are answered all the same.
    first.cancel()
    scheduler.let.set()
    statuses = [status for _, _, status in await asyncio.gather(*others)]
    assert {status and status.reason for status in statuses} == {QueueReason.WAITING_FOR_GPU}
    assert len(scheduler.asked_about) < 10


async def test_a_database_that_is_away_is_told_to_all_who_asked_together(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    async with door.pool.reading() as connection:
        waiting = await jobs.read_job(connection, job.uid)
    assert waiting is not None
    away = await open_pool(door.pool.dsn, 1)
    await away.close()
    scheduler = Slow()
    standings = Standings(away, scheduler, lambda: door.clock.now)
    asking = [asyncio.create_task(standings.of_watched(waiting)) for _ in range(50)]
    while not scheduler.asked_about:  # noqa: ASYNC110 - its turn
        await asyncio.sleep(0)
    scheduler.let.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(answer, Overloaded) for answer in answers)
    assert len(scheduler.asked_about) <= 2


async def test_of_very_many_waiting_jobs_the_scheduler_is_asked_by_turns(door: Door) -> None:
    scheduler = Counting()
    standings = Standings(door.pool, scheduler, lambda: door.clock.now)
    told: list[int] = []
    with ExitStack() as stack:
        for number in range(1_200):
            stack.enter_context(
                standings.listen(f"job-{number}", lambda _, number=number: told.append(number))
            )  # type: ignore[misc]
        for _ in range(3):
            await standings.ask()
    assert scheduler.asked_about == [500, 500, 500]
    assert sorted(set(told)) == list(range(1_200))
