"""A writer's connection breaks, and its work is done once all the same."""

from __future__ import annotations

import asyncpg
import pytest

from scheduler.store.lanes import Lane


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
