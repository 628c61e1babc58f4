"""The checks can fail: each is shown a service at rest in which what it looks for was made wrong."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import re
import shutil
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import asyncpg
import pytest

from scheduler.client.aio import DarkroomClient
from scheduler.recorder import recordings
from scheduler.store.embedded import embedded_postgresql, with_database
from scheduler.v1 import job_pb2
from tests.faults import checks
from tests.faults.checks import Check, Evidence
from tests.faults.counters import Sometimes, count
from tests.faults.crowd import Crowd, Deed, Promise
from tests.faults.run import written_down
from tests.folders import data_folder
from tests.service.process import ServiceProcess, service

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(300)]

_ENOUGH = 60
"""Promises: by then everybody has done most of what he does."""
_copies = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What a service left behind that was used for a while and stopped."""

    dsn: str
    promises: tuple[Promise, ...]
    undisturbed: Mapping[int, tuple[str, ...]]
    store: Path
    recordings: Path
    told: list[str]
    """What was said of a memory that is not the database."""

    @asynccontextmanager
    async def evidence(self, doctored: str = "SELECT") -> AsyncIterator[Evidence]:
        """Lend a copy of it in which the database was changed by hand."""
        name = f"copy_{next(_copies)}"
        server = await asyncpg.connect(self.dsn)
        try:
            await server.execute(f"CREATE DATABASE {name} TEMPLATE darkroom_at_rest")
            connection = await asyncpg.connect(with_database(self.dsn, name))
            try:
                # Past the triggers that keep hands off the ledger.
                await connection.execute(f"SET session_replication_role = replica; {doctored}")
                yield Evidence(
                    connection=connection,
                    promises=self.promises,
                    undisturbed=self.undisturbed,
                    store=self.store,
                    recordings=self.recordings,
                )
            finally:
                await connection.close()
        finally:
            await server.close()


@pytest.fixture(scope="module")
def at_rest() -> Iterator[Rest]:
    with data_folder() as folder:
        with service(folder, gpus=2, timed_step_ms=2, record_to=folder / "recordings") as running:
            crowd, undisturbed, told = asyncio.run(used(running))
        with embedded_postgresql(folder / "database") as dsn:
            asyncio.run(set_aside(dsn))
            yield Rest(
                dsn=with_database(dsn, "template1"),
                promises=tuple(crowd.promises),
                undisturbed=undisturbed,
                store=folder / "artifacts",
                recordings=folder / "recordings",
                told=told,
            )


async def used(running: ServiceProcess) -> tuple[Crowd, Mapping[int, tuple[str, ...]], list[str]]:
    """Let people use a service until it has something to show."""
    crowd = Crowd([running.address], running.admin_key, seed=0)
    await crowd.open_accounts()
    try:
        undisturbed = await crowd.draw_undisturbed()
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.run())
            while len(crowd.promises) < _ENOUGH:  # noqa: ASYNC110 - others fill it
                await asyncio.sleep(0.1)
            crowd.stop()
        await crowd.let_everything_run()
        assert await crowd.see_the_ends(within_s=120) == crowd.broken == crowd.told_again == []
        told = await told_of_a_memory_that_is_not_the_database(running, crowd)
        connection = await asyncpg.connect(running.dsn)
        await written_down(connection)
        await connection.close()
    finally:
        await crowd.close()
    return crowd, undisturbed, told


async def told_of_a_memory_that_is_not_the_database(running: ServiceProcess, crowd: Crowd) -> list[str]:
    """Compare a scheduler that has a job with a database that has none."""
    server = await asyncpg.connect(running.dsn)
    await server.execute("CREATE DATABASE nothing")
    nothing = await asyncpg.connect(with_database(running.dsn, "nothing"))
    await nothing.execute("CREATE SCHEMA scheduler; CREATE TABLE scheduler.job (tier text, state text)")
    async with DarkroomClient(running.address, running.admin_key) as admin:
        await admin.pause_tier(job_pb2.TIER_RELAX, reason="a test")
        job_id = await crowd.members[0].create(0, job_pb2.TIER_RELAX)
        while not (await admin.queues()).tiers[1].waiting:  # noqa: ASYNC110 - its scheduler takes it up
            await asyncio.sleep(0.1)
        with await asyncio.to_thread(urlopen, f"http://{running.ops}/metrics/scheduler") as exposition:
            told = await checks.memory_is_the_database(admin, nothing, exposition.read().decode())
        await admin.resume_tier(job_pb2.TIER_RELAX, reason="a test")
        await crowd.members[0].watch(0, job_id)
    await nothing.close()
    await server.close()
    return told


async def set_aside(dsn: str) -> None:
    """Give the database at rest a name from which others are copied."""
    server = await asyncpg.connect(with_database(dsn, "template1"))
    await server.execute("ALTER DATABASE postgres RENAME TO darkroom_at_rest")
    await server.close()


async def test_a_service_that_nothing_happened_to_passes(at_rest: Rest) -> None:
    async with at_rest.evidence() as evidence:
        assert await checks.findings(evidence) == []


def test_a_memory_that_is_not_the_database_is_told(at_rest: Rest) -> None:
    assert any("of relax 0 wait and 0 run, and the scheduler says (1, 0)" in one for one in at_rest.told)


# Not one that its owner has deleted: no row says that of a job that has not ended.
_ONE = """(SELECT job_id FROM scheduler.job WHERE state = 'succeeded' AND tier = 'fast' AND deleted_at IS NULL
    ORDER BY job_id LIMIT 1)"""


@pytest.mark.parametrize(
    ("check", "doctored"),
    [
        (
            checks.nothing_is_lost,
            "UPDATE scheduler.job SET state = 'running', ended_at = NULL, images = NULL "
            f"WHERE job_id = {_ONE}",
        ),
        (checks.nothing_is_lost, f"DELETE FROM scheduler.job WHERE job_id = {_ONE}"),
        (
            checks.nothing_is_doubled,
            "INSERT INTO billing.idempotency (account_id, method, request_id, input_hash, outcome) "
            "SELECT account_id, method, 'again', input_hash, outcome FROM billing.idempotency "
            "WHERE method = 'CreateJob' LIMIT 1",
        ),
        (
            checks.what_was_seen_is_so,
            "UPDATE scheduler.job SET state = 'failed', failure_reason = 'NONE', images = NULL "
            f"WHERE job_id = {_ONE}",
        ),
        (checks.what_was_seen_is_so, "UPDATE scheduler.job SET deleted_at = NULL, files_due_at = NULL"),
        (
            checks.caps_held,
            "UPDATE scheduler.attempt SET started_at = (SELECT min(started_at) FROM scheduler.attempt)",
        ),
        (
            checks.nobody_is_billed_wrongly,
            f"UPDATE billing.transfer SET amount = amount + 1 WHERE job_id = {_ONE} AND code = 'settle'",
        ),
        (
            checks.nobody_is_billed_wrongly,
            f"UPDATE scheduler.job SET tier = 'relax' WHERE job_id = {_ONE}",
        ),
        (
            checks.nobody_is_billed_wrongly,
            """UPDATE scheduler.job SET state = 'cancelled', images = NULL, receipt =
               jsonb_set(receipt, '{billed_gpu_ms}', to_jsonb((receipt ->> 'billed_gpu_ms')::bigint + 1))
               WHERE job_id = """
            + _ONE,
        ),
        (checks.nobody_is_billed_wrongly, f"DELETE FROM scheduler.attempt WHERE job_id = {_ONE}"),
        (
            checks.nobody_is_billed_twice,
            f"UPDATE billing.transfer SET job_id = {_ONE} WHERE kind = 'post_pending'",
        ),
        (checks.the_ledger_holds, "UPDATE billing.grant_lot SET used_ms = used_ms + 1"),
        (
            checks.the_rows_have_nothing_twice,
            "DELETE FROM scheduler.job_event WHERE state = 'succeeded'",
        ),
        (checks.the_order_was_kept, "UPDATE scheduler.fair_share SET usage = usage + 1e9"),
        (
            checks.the_order_was_kept,
            "DELETE FROM scheduler.journal WHERE kind = 'AttemptFinished' AND number % 2 = 0",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_what_is_made_wrong_in_the_rows_is_told(at_rest: Rest, check: Check, doctored: str) -> None:
    async with at_rest.evidence(doctored) as evidence:
        assert await check(evidence)


async def test_two_answers_to_one_request_are_told(at_rest: Rest) -> None:
    async with at_rest.evidence() as evidence:
        first, second = [one for one in evidence.promises if one.deed is Deed.CREATED][:2]
        lied = replace(second, request_id=first.request_id)
        assert await checks.nothing_is_doubled(replace(evidence, promises=[first, lied]))


async def test_an_end_that_was_not_so_is_told(at_rest: Rest) -> None:
    async with at_rest.evidence() as evidence:
        seen = next(one for one in evidence.promises if one.deed is Deed.SAW_END)
        lied = replace(seen, state="failed")
        assert await checks.what_was_seen_is_so(replace(evidence, promises=[lied]))


@pytest.mark.parametrize("answered", ["cancelled", "running"])
async def test_a_cancel_that_was_answered_and_forgotten_is_told(at_rest: Rest, answered: str) -> None:
    async with at_rest.evidence() as evidence:
        seen = next(one for one in evidence.promises if one.deed is Deed.SAW_END and one.state == "succeeded")
        nobody_wants = "UPDATE scheduler.job SET cancel_wanted = false WHERE job_id = $1"
        await evidence.connection.execute(nobody_wants, seen.job_id)
        lied = replace(seen, deed=Deed.CANCELLED, state=answered)
        assert await checks.what_was_seen_is_so(replace(evidence, promises=[lied]))


async def test_a_move_that_was_answered_and_not_made_is_told(at_rest: Rest) -> None:
    async with at_rest.evidence() as evidence:
        seen = next(one for one in evidence.promises if one.deed is Deed.SAW_END)
        other = "relax" if seen.tier == "fast" else "fast"
        # Its answer says what the row says, which is not what was asked for.
        lied = replace(seen, deed=Deed.MOVED, asked=other)
        assert await checks.what_was_seen_is_so(replace(evidence, promises=[lied]))


def without_a_picture(picture: Path) -> None:
    picture.unlink()


def with_a_broken_picture(picture: Path) -> None:
    picture.write_bytes(picture.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [without_a_picture, with_a_broken_picture])
async def test_a_damaged_picture_is_told(
    at_rest: Rest, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    async with at_rest.evidence() as evidence:
        store = shutil.copytree(at_rest.store, tmp_path / "artifacts")
        path = await evidence.connection.fetchval(
            "SELECT images -> 0 ->> 'path' FROM scheduler.job WHERE images <> '[]' LIMIT 1"
        )
        damage(store / path)
        assert await checks.pictures_are_whole_and_exact(replace(evidence, store=store))


async def test_a_picture_that_is_not_the_undisturbed_one_is_told(at_rest: Rest) -> None:
    async with at_rest.evidence() as evidence:
        other = dict.fromkeys(evidence.undisturbed, ("0" * 64,) * 4)
        assert await checks.pictures_are_whole_and_exact(replace(evidence, undisturbed=other))


async def test_a_file_that_no_row_names_is_told(at_rest: Rest, tmp_path: Path) -> None:
    async with at_rest.evidence() as evidence:
        store = shutil.copytree(at_rest.store, tmp_path / "artifacts")
        (store / "jobs" / "left").write_text("over")
        assert await checks.no_file_is_left_over(replace(evidence, store=store)) == ["no row names jobs/left"]


async def test_a_file_that_no_fault_explains_is_told(at_rest: Rest, tmp_path: Path) -> None:
    async with at_rest.evidence() as evidence:
        store = shutil.copytree(at_rest.store, tmp_path / "artifacts")
        one = await evidence.connection.fetchval(
            "SELECT job_id::text FROM scheduler.attempt ORDER BY job_id LIMIT 1"
        )
        (store / "jobs" / one).mkdir(exist_ok=True)
        (store / "jobs" / one / "left").write_text("over")
        left = replace(evidence, store=store)
        assert await checks.nothing_leaks(left) == [f"no fault explains jobs/{one}/left"]
        assert await checks.nothing_leaks(replace(left, store_mended_s=time.time())) == []
        await evidence.connection.execute(
            "UPDATE scheduler.attempt SET state = 'lost' WHERE job_id = $1::uuid", one
        )
        assert await checks.nothing_leaks(left) == [], "its worker did not live to remove it"


def without(kind: bytes, lines: list[bytes]) -> list[bytes]:
    """Leave out the lines of a kind. One alone may have led to nothing."""
    return [line for line in lines if not line.startswith(b'{"%b"' % kind)]


def without_one(kind: bytes, lines: list[bytes]) -> list[bytes]:
    """Leave out the middle one of the lines of a kind."""
    places = [place for place, line in enumerate(lines) if line.startswith(b'{"%b"' % kind)]
    place = places[len(places) // 2]
    return [*lines[:place], *lines[place + 1 :]]


def with_another_decision(lines: list[bytes]) -> list[bytes]:
    return [line.replace(b'"warm":true', b'"warm":false') for line in lines]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (partial(without, b"JobSubmitted"), "Board "),
        (partial(without, b"AttemptFinished"), "Board "),
        (partial(without_one, b"decided"), "has no answer"),
        (with_another_decision, "Board decides"),
    ],
)
async def test_a_recording_that_was_made_wrong_is_told(
    at_rest: Rest, change: Callable[[list[bytes]], list[bytes]], told: str, tmp_path: Path
) -> None:
    (recording,) = recordings(at_rest.recordings)
    lines = zlib.decompressobj(wbits=31).decompress(recording.read_bytes()).splitlines(keepends=True)
    (tmp_path / recording.name).write_bytes(gzip.compress(b"".join(change(lines))))
    async with at_rest.evidence() as evidence:
        found = await checks.the_same_is_decided_again(replace(evidence, recordings=tmp_path))
    assert any(told in one for one in found), found


async def test_a_recording_that_ends_before_its_scheduler_is_told(at_rest: Rest) -> None:
    later = "UPDATE scheduler.journal SET at = at + interval '1 hour'"
    async with at_rest.evidence(later) as evidence:
        (told,) = await checks.the_same_is_decided_again(evidence)
        assert "lacks the last" in told


async def test_a_scheduler_that_led_for_a_moment_has_nothing_recorded_yet(
    at_rest: Rest, tmp_path: Path
) -> None:
    (recording,) = recordings(at_rest.recordings)
    header, *_ = zlib.decompressobj(wbits=31).decompress(recording.read_bytes()).splitlines(keepends=True)
    (tmp_path / recording.name).write_bytes(gzip.compress(header))
    at_once = "UPDATE scheduler.journal SET at = now()"
    for doctored, told in ((at_once, 0), (f"{at_once} + number * interval '1 minute'", 1)):
        async with at_rest.evidence(doctored) as evidence:
            found = await checks.the_same_is_decided_again(replace(evidence, recordings=tmp_path))
        assert len(found) == told


async def test_a_recording_goes_as_far_as_what_its_scheduler_was_told(at_rest: Rest, tmp_path: Path) -> None:
    (recording,) = recordings(at_rest.recordings)
    lines = zlib.decompressobj(wbits=31).decompress(recording.read_bytes()).splitlines(keepends=True)
    told = next(line for line in lines if line.startswith(b'{"AccountRestored"'))
    last_s = 2_000_000_000
    ends_then = f"""UPDATE scheduler.journal SET at = to_timestamp({last_s})
        - ((SELECT max(number) FROM scheduler.journal) - number) * interval '1 minute'"""
    for missing_s, wrong in ((1, 0), (60, 1)):
        at_ms = (last_s - missing_s) * 1000
        content = lines[0] + re.sub(rb'"at_ms":\d+', b'"at_ms":%d' % at_ms, told, count=1)
        (tmp_path / recording.name).write_bytes(gzip.compress(content))
        async with at_rest.evidence(ends_then) as evidence:
            found = await checks.the_same_is_decided_again(replace(evidence, recordings=tmp_path))
        assert len(found) == wrong


async def test_a_scheduler_that_left_no_recording_is_told(at_rest: Rest, tmp_path: Path) -> None:
    async with at_rest.evidence() as evidence:
        (found,) = await checks.the_same_is_decided_again(replace(evidence, recordings=tmp_path))
    assert found.endswith("left no recording")


async def test_only_an_end_that_was_settled_before_is_a_commit_that_nobody_knew_of(at_rest: Rest) -> None:
    async with at_rest.evidence() as evidence:
        for repeated in (True, False):
            said = [{"event": "attempt ended", "repeated": repeated}]
            counted = await count(evidence.connection, said=said, promises=())
            assert counted[Sometimes.COMMIT_UNKNOWN] == repeated


async def test_only_a_hold_of_a_loss_is_one_that_a_loss_released(at_rest: Rest) -> None:
    of_a_drain = "UPDATE billing.hold SET state = 'voided'; UPDATE scheduler.attempt SET state = 'lost'"
    of_a_loss = f"{of_a_drain}, counts_as_loss = true"
    for doctored, some in ((of_a_drain, False), (of_a_loss, True)):
        async with at_rest.evidence(doctored) as evidence:
            counted = await count(evidence.connection, said=(), promises=())
            assert (counted[Sometimes.HOLD_RELEASED] > 0) == some


async def test_a_result_that_is_told_again_is_no_zombies(at_rest: Rest) -> None:
    async with at_rest.evidence() as evidence:
        said = [{"event": event} for event in ("result told again", "late result dropped")]
        counted = await count(evidence.connection, said=said, promises=())
        assert counted[Sometimes.ZOMBIE_FENCED] == 1
