"""A writer's connection breaks, and its work is done once all the same."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from scheduler.metrics import DbErrorClass, DbQuery
from scheduler.store.lanes import AWAY, Lane
from scheduler.store.leadership import Deposed, require_leader, take_lead
from scheduler.store.pool import open_pool


async def test_work_is_done_again_on_a_new_connection_when_the_database_cut_it(
    database: str, connection: asyncpg.Connection
) -> None:
    lane = Lane(database, "test")
    backends = []

    async def work(lanes_own: asyncpg.Connection) -> int:
        backend: int = await lanes_own.fetchval("SELECT pg_backend_pid()")
        backends.append(backend)
        if len(backends) == 1:
            await connection.execute("SELECT pg_terminate_backend($1)", backend)
        answer: int = await lanes_own.fetchval("SELECT 1")
        return answer

    try:
        assert await lane.run(work) == 1
    finally:
        await lane.close()
    assert len(set(backends)) == 2


async def test_work_is_done_again_when_a_migration_has_changed_what_it_reads(
    database: str, connection: asyncpg.Connection
) -> None:
    lane = Lane(database, "test")

    async def work(lanes_own: asyncpg.Connection) -> int:
        async with lanes_own.transaction():
            row = await lanes_own.fetchrow("SELECT * FROM scheduler.leader")
        assert row is not None
        return len(row)

    columns = await lane.run(work)
    await connection.execute("ALTER TABLE scheduler.leader ADD COLUMN another integer")
    assert await lane.run(work) == columns + 1
    await lane.close()


async def test_a_bug_is_not_repeated(database: str) -> None:
    lane = Lane(database, "test")
    times = 0

    async def work(lanes_own: asyncpg.Connection) -> None:
        nonlocal times
        times += 1
        await lanes_own.execute("SELECT no_such_column")

    with pytest.raises(asyncpg.UndefinedColumnError):
        await lane.run(work)
    await lane.close()
    assert times == 1


async def test_leader_that_fell_silent_in_a_transaction_does_not_keep_the_lead(
    database: str, connection: asyncpg.Connection
) -> None:
    lane = Lane(database, "frozen", idle_in_transaction_ms=200)
    first = await take_lead(connection, "first")
    troubles = []

    async def freeze(lanes_own: asyncpg.Connection) -> None:
        try:
            async with lanes_own.transaction():
                await require_leader(lanes_own, first.epoch)
                await take_lead(connection, "second")
                await lanes_own.execute("SELECT 'it wakes up'")
        except AWAY as trouble:
            troubles.append(trouble)
            raise

    async with asyncio.timeout(10):
        with pytest.raises(Deposed):
            await lane.run(freeze)
    await lane.close()
    assert len(troubles) == 1, "what it had begun is rolled back, and the next try finds it deposed"


async def test_front_door_that_fell_silent_in_a_transaction_loses_its_locks_too(database: str) -> None:
    pool = await open_pool(database, 1)
    async with pool.reading() as connection:
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "10s"
    await pool.close()


async def test_trouble_and_named_statements_are_told_to_whoever_watches(
    database: str, connection: asyncpg.Connection
) -> None:
    told: list[object] = []

    class Told:
        def statement_ended(self, query: DbQuery, took_s: float) -> None:
            assert took_s > 0
            told.append(query)

        def database_failed(self, kind: DbErrorClass) -> None:
            told.append(kind)

    lane = Lane(database, "test")
    lane.watched_by(Told())
    tries = 0

    async def cut_once(lanes_own: asyncpg.Connection) -> None:
        nonlocal tries
        tries += 1
        await lanes_own.fetchval("SELECT 'nobody named this'")
        await lanes_own.fetchval("/* open_holds */ SELECT 1")
        if tries == 1:
            await connection.execute(
                "SELECT pg_terminate_backend($1)", await lanes_own.fetchval("SELECT pg_backend_pid()")
            )
        await lanes_own.fetchval("SELECT 1")

    await lane.run(cut_once)
    for statement in (
        "SELECT 1 / 0",
        "SELECT no_such_column",
        "INSERT INTO billing.account VALUES (NULL, now())",
    ):
        with pytest.raises(asyncpg.PostgresError):
            await lane.run(lambda lanes_own, one=statement: lanes_own.execute(one))  # type: ignore[misc]
    await lane.close()
    assert told == [
        *(DbQuery.OPEN_HOLDS, DbErrorClass.AWAY, DbQuery.OPEN_HOLDS),
        *(DbErrorClass.REFUSED, DbErrorClass.OTHER, DbErrorClass.REFUSED),
    ]
