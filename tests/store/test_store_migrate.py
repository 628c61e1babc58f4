"""The schema only goes forward, and says so when it cannot."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

import asyncpg
import pytest
from typer.testing import CliRunner

from scheduler.__main__ import server
from scheduler.store.embedded import AlreadyServing, embedded_postgresql, with_database
from scheduler.store.migrate import (
    AfterMigrationsWaiting,
    DatabaseNotOwned,
    DatabaseUnreachable,
    Migrated,
    Migration,
    OlderReleaseRuns,
    SchemaBusy,
    SchemaChanged,
    SchemaTooNew,
    migrate,
    migrate_before,
    migrate_database,
    migrate_database_before,
    migrations,
    process_name,
)
from tests.folders import data_folder

# The files of a release after this one: it moves what people say into a table of its own.
ADDS = Migration(package="scheduler", name="0901_words", sql="CREATE TABLE scheduler.word (word text)")
FILLS = Migration(package="billing", name="0902_said", sql="ALTER TABLE scheduler.word ADD said int")
DROPS = Migration(package="scheduler", name="0903_dying.after", sql="DROP TABLE scheduler.dying")
# The table that it takes away was there before, as far as these tests are concerned.
DYING = "CREATE TABLE scheduler.dying (number text, name text)"
# And of the one after that.
LATER = Migration(package="billing", name="0904_later", sql="CREATE TABLE billing.later ()")


@pytest.fixture
async def connection(connection: asyncpg.Connection) -> asyncpg.Connection:
    await connection.execute(DYING)
    return connection


def files(*more: Migration) -> list[Migration]:
    return [*migrations(), *more]


async def test_a_migrated_database_has_nothing_left_to_do(connection: asyncpg.Connection) -> None:
    assert await migrate(connection) == Migrated()
    assert await migrate_before(connection) == Migrated()


async def test_two_that_start_at_once_migrate_once(postgresql: str) -> None:
    server = await asyncpg.connect(postgresql)
    await server.execute("CREATE DATABASE migrated_by_two")
    try:
        dsn = with_database(postgresql, "migrated_by_two")
        done = await asyncio.gather(migrate_database(dsn), migrate_database(dsn))
        assert sorted(len(each.applied) for each in done) == [0, len(migrations())]
    finally:
        await server.execute("DROP DATABASE migrated_by_two WITH (FORCE)")
        await server.close()


async def test_a_role_that_may_not_make_tables_is_told_to_own_the_database(
    connection: asyncpg.Connection,
) -> None:
    await connection.execute("SET ROLE pg_read_all_stats")
    with pytest.raises(DatabaseNotOwned, match=r"permission denied for schema public: .* ALTER DATABASE"):
        await migrate_before(connection)
    await connection.execute("RESET ROLE")


async def test_a_file_that_was_edited_after_it_was_applied_is_refused(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "UPDATE public.darkroom_migration SET sha256 = 'other' WHERE package = 'billing'"
    )
    with pytest.raises(SchemaChanged, match=r"billing/0001_first\.sql"):
        await migrate(connection)


def test_files_of_both_packages_apply_by_number() -> None:
    numbers = [int(migration.name.partition("_")[0]) for migration in migrations()]
    assert numbers == sorted(numbers)
    assert [migration.file for migration in migrations()[:2]] == [
        "billing/0001_first.sql",
        "scheduler/0001_first.sql",
    ]


def test_command_says_what_it_applied_and_then_that_nothing_is_left(postgresql: str) -> None:
    async def on_server(statement: str) -> None:
        server = await asyncpg.connect(postgresql)
        await server.execute(statement)
        await server.close()

    asyncio.run(on_server("CREATE DATABASE migrated_by_command"))
    try:
        command = ["migrate", "--dsn", with_database(postgresql, "migrated_by_command")]
        said = [CliRunner().invoke(server, command).output.splitlines() for _ in range(2)]
        said.append(CliRunner().invoke(server, [*command, "--after"]).output.splitlines())
    finally:
        asyncio.run(on_server("DROP DATABASE migrated_by_command WITH (FORCE)"))
    nothing = ["nothing to do: the schema is this release's"]
    assert said == [[f"applied {one.package}/{one.name}" for one in migrations()], nothing, nothing]


async def test_what_takes_away_waits_until_nothing_older_runs(connection: asyncpg.Connection) -> None:
    release = files(ADDS, FILLS, DROPS)
    assert await migrate_before(connection, known=release) == Migrated(
        applied=(ADDS, FILLS), waiting=(DROPS,)
    )
    await connection.execute("SELECT said FROM scheduler.word")
    await connection.execute("SELECT FROM scheduler.dying")
    assert await migrate_before(connection, known=release) == Migrated(waiting=(DROPS,))
    assert await migrate(connection, known=release) == Migrated(applied=(DROPS,))
    with pytest.raises(asyncpg.UndefinedTableError):
        await connection.execute("SELECT FROM scheduler.dying")


async def test_the_release_before_starts_again_until_something_was_taken_away(
    connection: asyncpg.Connection,
) -> None:
    await migrate_before(connection, known=files(ADDS, FILLS, DROPS))
    assert await migrate_before(connection) == Migrated()
    await migrate(connection, known=files(ADDS, FILLS, DROPS))
    for start in (migrate, migrate_before):
        with pytest.raises(SchemaTooNew, match=r"scheduler/0903_dying\.after"):
            await start(connection)


async def test_the_next_release_waits_for_what_the_one_before_has_left_over(
    connection: asyncpg.Connection,
) -> None:
    await migrate_before(connection, known=files(ADDS, FILLS, DROPS))
    with pytest.raises(AfterMigrationsWaiting) as waiting:
        await migrate_before(connection, known=files(ADDS, FILLS, DROPS, LATER))
    assert "billing/0904_later.sql comes after scheduler/0903_dying.after.sql" in str(waiting.value)
    assert "darkroom migrate --after" in str(waiting.value)
    assert await connection.fetchval("SELECT to_regclass('billing.later')") is None
    # Who stops everything may leave a release out.
    done = await migrate(connection, known=files(ADDS, FILLS, DROPS, LATER))
    assert done == Migrated(applied=(DROPS, LATER))


@pytest.mark.parametrize("kind", ["frontdoor", "scheduler"])
async def test_nothing_is_taken_away_from_a_process_of_another_release(
    database: str, connection: asyncpg.Connection, kind: str
) -> None:
    known = files(ADDS, FILLS, DROPS)
    older = await asyncpg.connect(
        database, server_settings={"application_name": process_name(kind, "0.1.0") + " loop"}
    )
    ours = await asyncpg.connect(database, server_settings={"application_name": process_name(kind, "0.2.0")})
    with pytest.raises(OlderReleaseRuns, match=rf"^{kind}-0\.1\.0.* still uses this database"):
        await migrate(connection, known=known, release="0.2.0")
    assert await connection.fetchval("SELECT to_regclass('scheduler.word')") is None, "nothing was applied"
    await older.close()
    assert (await migrate(connection, known=known, release="0.2.0")).applied == (ADDS, FILLS, DROPS)
    await ours.close()


async def test_a_lock_is_not_waited_for_while_others_wait_behind_it(
    database: str, connection: asyncpg.Connection
) -> None:
    reader = await asyncpg.connect(database)
    transaction = reader.transaction()
    await transaction.start()
    await reader.execute("SELECT FROM scheduler.dying")
    with pytest.raises(
        SchemaBusy, match=r"scheduler/0903_dying\.after\.sql did not get its locks in 1 tries"
    ):
        await migrate(connection, known=files(DROPS), lock_ms=1, tries=1)
    assert await connection.fetchval("SHOW lock_timeout") == "0"

    trying = asyncio.create_task(migrate(connection, known=files(DROPS), lock_ms=100))
    await _until_tried_again(reader)
    await transaction.rollback()
    assert (await trying).applied == (DROPS,)
    await reader.close()


async def _until_tried_again(reader: asyncpg.Connection) -> None:
    """Return once a second transaction waits for the table that the reader holds."""
    waiting = """SELECT virtualtransaction FROM pg_locks
                 WHERE relation = 'scheduler.dying'::regclass AND NOT granted"""
    seen: set[str] = set()
    while len(seen) < 2:
        seen.update(row["virtualtransaction"] for row in await reader.fetch(waiting))


async def test_an_index_is_built_while_others_write_and_again_where_it_failed(
    database: str, connection: asyncpg.Connection
) -> None:
    index = Migration(
        package="scheduler",
        name="0901_index",
        sql="-- Outside a transaction, so that rows can be written meanwhile.\n"
        "DROP INDEX CONCURRENTLY IF EXISTS scheduler.dying_name;\n"
        "CREATE UNIQUE INDEX CONCURRENTLY dying_name ON scheduler.dying (name);\n",
    )
    await connection.execute("INSERT INTO scheduler.dying VALUES ('a', 'same'), ('b', 'same')")
    with pytest.raises(asyncpg.UniqueViolationError):
        await migrate(connection, known=files(index))
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'scheduler.dying_name'::regclass"
    assert await connection.fetchval(valid) is False, "PostgreSQL leaves it there, and keeps it up to date"
    await connection.execute("DELETE FROM scheduler.dying WHERE number = 'b'")
    done = await asyncio.gather(_migrate_alone(database, index), _migrate_alone(database, index))
    assert sorted(len(each.applied) for each in done) == [0, 1]
    assert await connection.fetchval(valid) is True


async def test_an_index_is_built_beside_an_old_transaction_however_long_that_takes(
    database: str, connection: asyncpg.Connection
) -> None:
    index = Migration(
        package="scheduler",
        name="0901_index",
        sql="-- Outside a transaction, so that rows can be written meanwhile.\n"
        "CREATE INDEX CONCURRENTLY dying_name ON scheduler.dying (name);\n"
        "ALTER TABLE scheduler.dying ADD COLUMN IF NOT EXISTS said int;\n",
    )
    backup = await asyncpg.connect(database)
    transaction = backup.transaction(isolation="repeatable_read", readonly=True)
    await transaction.start()
    assert await backup.fetchval("SELECT count(*) FROM billing.account") == 0
    migrating = asyncio.create_task(migrate(connection, known=files(index), lock_ms=1, tries=1))
    waiting = """SELECT now() - query_start > interval '100 ms' FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event_type = 'Lock'"""
    looking = await asyncpg.connect(database)
    while not await looking.fetchval(waiting):
        assert not migrating.done(), migrating.result()
    await transaction.rollback()
    assert (await migrating).applied == (index,)

    # The other statements of such a file stand in others' way, and wait as briefly as any.
    await backup.execute("BEGIN; SELECT FROM scheduler.dying")
    again = Migration(package="scheduler", name="0902_again", sql=index.sql.replace("dying_name", "again"))
    with pytest.raises(SchemaBusy):
        await migrate(connection, known=files(index, again), lock_ms=1, tries=1)
    assert await connection.fetchval("SHOW lock_timeout") == "0"
    await backup.close()
    await looking.close()


async def _migrate_alone(database: str, *more: Migration) -> Migrated:
    connection = await asyncpg.connect(database)
    try:
        return await migrate_before(connection, known=files(*more))
    finally:
        await connection.close()


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


async def test_an_embedded_server_keeps_what_was_written_when_the_same_process_starts_it_again() -> None:
    with tempfile.TemporaryDirectory(prefix="dr-") as folder:
        for _ in range(2):
            with embedded_postgresql(Path(folder) / "data") as dsn:
                connection = await asyncpg.connect(dsn)
                await connection.execute("CREATE TABLE IF NOT EXISTS kept AS SELECT 7 AS number")
                assert await connection.fetchval("SELECT number FROM kept") == 7
                await connection.close()
        with (
            embedded_postgresql(Path(folder) / "data"),
            pytest.raises(AlreadyServing),
            embedded_postgresql(Path(folder) / "data"),
        ):
            pass


_COLLECTS_NOBODY = """
import ctypes, subprocess, sys

ctypes.CDLL(None).prctl({set_child_subreaper}, 1, 0, 0, 0)
sys.exit(subprocess.run([sys.executable, "-c", *sys.argv[1:]]).returncode)
"""
_STARTS_AND_STOPS = """
import sys
from pathlib import Path

from scheduler.store.embedded import embedded_postgresql

with embedded_postgresql(Path(sys.argv[1])):
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="adopts orphans by a call of Linux")
def test_an_embedded_server_has_ended_also_where_nobody_collects_it() -> None:
    program = _COLLECTS_NOBODY.format(set_child_subreaper=36)
    with data_folder() as folder:
        subprocess.run(
            [sys.executable, "-c", program, _STARTS_AND_STOPS, str(folder)], check=True, timeout=100
        )


async def test_a_database_that_does_not_exist_is_unreachable(postgresql: str) -> None:
    with pytest.raises(DatabaseUnreachable, match="no_such_database"):
        await migrate_database_before(with_database(postgresql, "no_such_database"))
