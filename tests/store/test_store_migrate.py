"""The schema only goes forward, and says so when it cannot."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from scheduler.store.embedded import with_database
from scheduler.store.migrate import (
    DatabaseUnreachable,
    SchemaChanged,
    SchemaTooNew,
    migrate,
    migrate_database,
    migrations,
)


async def test_a_migrated_database_has_nothing_left_to_do(connection: asyncpg.Connection) -> None:
    assert await migrate(connection) == []


async def test_two_that_start_at_once_migrate_once(postgresql: str) -> None:
    server = await asyncpg.connect(postgresql)
    await server.execute("CREATE DATABASE migrated_by_two")
    try:
        dsn = with_database(postgresql, "migrated_by_two")
        done = await asyncio.gather(migrate_database(dsn), migrate_database(dsn))
        assert sorted(len(applied) for applied in done) == [0, len(migrations())]
    finally:
        await server.execute("DROP DATABASE migrated_by_two WITH (FORCE)")
        await server.close()


async def test_a_file_that_was_edited_after_it_was_applied_is_refused(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "UPDATE public.darkroom_migration SET sha256 = 'other' WHERE package = 'billing'"
    )
    with pytest.raises(SchemaChanged, match=r"billing/0001_first\.sql"):
        await migrate(connection)


async def test_a_database_of_a_newer_release_is_refused(connection: asyncpg.Connection) -> None:
    await connection.execute("INSERT INTO public.darkroom_migration VALUES ('scheduler', '9999_later', '')")
    with pytest.raises(SchemaTooNew, match="9999_later"):
        await migrate(connection)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://ann:secret@127.0.0.1:1/darkroom",
        "postgresql://ann:secret@/darkroom?host=/nowhere",
        "nonsense",
    ],
)
async def test_a_server_that_is_not_there_is_unreachable_and_no_password_is_repeated(dsn: str) -> None:
    with pytest.raises(DatabaseUnreachable) as unreachable:
        await migrate_database(dsn)
    assert "secret" not in str(unreachable.value)


async def test_a_database_that_does_not_exist_is_unreachable(postgresql: str) -> None:
    with pytest.raises(DatabaseUnreachable, match="no_such_database"):
        await migrate_database(with_database(postgresql, "no_such_database"))
