"""Brings a database to this release's schema: forward only, and in two phases, so that nobody has to stop.

The files of both packages are one sequence by number, and every database gets them in that order. A file
`NNNN_name.sql` is applied while the release before still serves, and takes nothing away from it; a file
`NNNN_name.after.sql` takes away, and is applied once the last process of the release before has ended. So of
one release the files of the second kind come last, and the next release's first file waits for them.

A file that has been applied must not change; its SHA-256 is kept and compared at every start. How to write
one is in migrations/README.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

import billing

# Any fixed number: it only has to differ from other users' advisory locks in this database.
_LOCK = 0x6461726B
_CONNECT_S = 10.0
_LOOK_AGAIN_S = 0.2

# Whoever waits for a table's lock has everybody who comes later wait behind it: so briefly, and again.
_LOCK_MS = 1_000
_TRIES = 30
_TRY_AGAIN_S = 1.0

# A process behind a transaction pooler is seen only while a statement of its is the newest of its connection,
# and every one of ours makes one a second.
_LOOKS = 13
_BETWEEN_LOOKS_S = 0.1

FOLDERS: tuple[tuple[str, Path], ...] = (
    ("billing", Path(billing.__file__).parent / "migrations"),
    ("scheduler", Path(__file__).parent / "migrations"),
)

_AFTER = ".after"
_ALONE = "-- Outside a transaction"
"""How a file begins whose statements are each a transaction, as indexes built CONCURRENTLY must be."""
_CONCURRENTLY = re.compile(r"^(CREATE|DROP|REINDEX) .*\bCONCURRENTLY\b", re.MULTILINE)


class SchemaChanged(Exception):
    """An applied migration's file differs from what was applied:
    restore the file, and add a new one instead.
    """


class SchemaTooNew(Exception):
    """A newer release has taken from the database what this one needs: upgrade this one, or restore the
    database's backup.
    """


class AfterMigrationsWaiting(Exception):
    """An earlier release's last migrations were never applied, and this release's first ones need them."""


class OlderReleaseRuns(Exception):
    """A process of another release still uses what would be taken away: end it first."""


class SchemaBusy(Exception):
    """Other transactions held a table while a migration was tried: find and end them, or try again."""


class DatabaseUnreachable(Exception):
    """PostgreSQL cannot be connected to: check that it runs, the DSN, and the password."""


class DatabaseNotOwned(Exception):
    """The role may connect but not make tables: the database has to be its own."""


@dataclass(frozen=True, kw_only=True)
class Migration:
    """One file of SQL."""

    package: str
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the file."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def is_after(self) -> bool:
        """Whether it waits for the last process of the release before to end."""
        return self.name.endswith(_AFTER)

    @property
    def file(self) -> str:
        """Its path as people know it: package and file name."""
        return f"{self.package}/{self.name}.sql"


@dataclass(frozen=True, kw_only=True)
class Migrated:
    """What was done to a database."""

    applied: tuple[Migration, ...] = ()
    waiting: tuple[Migration, ...] = ()
    """What is left for when no process of an older release runs."""


def migrations() -> list[Migration]:
    """Return every migration in the order they apply."""
    files = [
        Migration(package=package, name=path.stem, sql=path.read_text())
        for package, folder in FOLDERS
        for path in folder.glob("*.sql")
    ]
    return sorted(files, key=lambda migration: (migration.name.partition("_")[0], migration.package))


async def migrate(
    connection: asyncpg.Connection,
    *,
    release: str | None = None,
    known: Sequence[Migration] | None = None,
    lock_ms: int = _LOCK_MS,
    tries: int = _TRIES,
) -> Migrated:
    """Apply everything that is missing; nobody of another release may be there.

    With `release`, see first that no front door or scheduler of any other is: who serves a database of its
    own need not. `known` are the files, if not those of this release. A lock is waited for at most `lock_ms`,
    so often as `tries`; an index that is built or dropped CONCURRENTLY, which keeps nobody waiting, waits as
    long as it takes. Two that start at once wait for each other.

    Raises SchemaChanged, SchemaTooNew, OlderReleaseRuns and DatabaseNotOwned, having changed nothing, and
    SchemaBusy.
    """
    async with _Alone(connection):
        missing = await _missing(connection, migrations() if known is None else known)
        if release is not None and any(migration.is_after for migration in missing):
            await _nobody_of_another_release(connection, release)
        for migration in missing:
            await _apply(connection, migration, lock_ms, tries)
        return Migrated(applied=tuple(missing))


async def migrate_before(
    connection: asyncpg.Connection,
    *,
    known: Sequence[Migration] | None = None,
    lock_ms: int = _LOCK_MS,
    tries: int = _TRIES,
) -> Migrated:
    """Apply what the release before can live with, and leave the rest for `migrate`.

    Raises SchemaChanged, SchemaTooNew, AfterMigrationsWaiting and DatabaseNotOwned, having changed nothing,
    and SchemaBusy.
    """
    async with _Alone(connection):
        missing = await _missing(connection, migrations() if known is None else known)
        first = next((place for place, one in enumerate(missing) if one.is_after), len(missing))
        due, waiting = missing[:first], missing[first:]
        for later in waiting:
            if not later.is_after:
                raise AfterMigrationsWaiting(
                    f"{later.file} comes after {waiting[0].file}, which an earlier release left for when "
                    "nothing older runs. Run `darkroom migrate --after` with that release, then try again; "
                    "or stop every front door and scheduler and run it with this one, which applies all"
                )
        for migration in due:
            await _apply(connection, migration, lock_ms, tries)
        return Migrated(applied=tuple(due), waiting=tuple(waiting))


async def migrate_database(dsn: str, *, release: str | None = None) -> Migrated:
    """Open a connection of its own and `migrate`.

    Give a direct DSN: locks do not pass a transaction pooler. Raises what `migrate` does, and
    DatabaseUnreachable.
    """
    connection = await _connect(dsn)
    try:
        return await migrate(connection, release=release)
    finally:
        await connection.close()


async def migrate_database_before(dsn: str) -> Migrated:
    """Open a connection of its own and `migrate_before`, as `migrate_database` does `migrate`."""
    connection = await _connect(dsn)
    try:
        return await migrate_before(connection)
    finally:
        await connection.close()


def process_name(kind: str, release: str) -> str:
    """Return the application name by which a `frontdoor` or `scheduler` of a release is seen in sessions."""
    return f"darkroom {kind}-{release}"


async def _connect(dsn: str) -> asyncpg.Connection:
    try:
        return await asyncpg.connect(dsn, timeout=_CONNECT_S)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as trouble:
        # The DSN may hold a password, so it is not repeated; and a timeout has no words of its own.
        why = str(trouble) or "it did not answer in time"
        raise DatabaseUnreachable(f"cannot connect to PostgreSQL: {why}") from trouble


class _Alone:
    """Holds off others that would migrate this database, while the context is open."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def __aenter__(self) -> None:
        # Not the form that waits: it waits inside a statement, for whose end an index that is built
        # CONCURRENTLY waits in turn.
        while not await self._connection.fetchval(  # noqa: ASYNC110 - nothing tells that it is free
            "SELECT pg_try_advisory_lock($1)", _LOCK
        ):
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def __aexit__(self, *_: object) -> None:
        await self._connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)


async def _missing(connection: asyncpg.Connection, known: Sequence[Migration]) -> list[Migration]:
    try:
        await connection.execute(
            """CREATE TABLE IF NOT EXISTS public.darkroom_migration (
                   package text, name text, sha256 text NOT NULL,
                   applied_at timestamptz NOT NULL DEFAULT now(),
                   PRIMARY KEY (package, name))"""
        )
    except asyncpg.InsufficientPrivilegeError as denied:
        raise DatabaseNotOwned(
            f"{denied}: the role has to own the database. A superuser says ALTER DATABASE … OWNER TO …"
        ) from denied
    applied = {
        (row["package"], row["name"]): row["sha256"]
        for row in await connection.fetch("SELECT package, name, sha256 FROM public.darkroom_migration")
    }
    unknown = applied.keys() - {(migration.package, migration.name) for migration in known}
    # What a newer release added while this one served, this one can do without noticing.
    if too_new := sorted(f"{package}/{name}" for package, name in unknown if name.endswith(_AFTER)):
        raise SchemaTooNew(
            f"a newer release has migrated this database, and this one cannot use it: {too_new}"
        )
    for migration in known:
        if applied.get((migration.package, migration.name)) not in (None, migration.sha256):
            raise SchemaChanged(f"{migration.file} is not the file that was applied")
    return [migration for migration in known if (migration.package, migration.name) not in applied]


async def _nobody_of_another_release(connection: asyncpg.Connection, release: str) -> None:
    for _ in range(_LOOKS):
        seen = await connection.fetch(
            """SELECT DISTINCT substring(application_name from '^darkroom (.*)') AS process
               FROM pg_stat_activity
               WHERE datname = current_database() AND application_name ~ '^darkroom (frontdoor|scheduler)-'
                 AND substring(application_name from '-([0-9.]+)') <> $1""",
            release,
        )
        if seen:
            raise OlderReleaseRuns(
                f"{', '.join(sorted(row['process'] for row in seen))} still uses this database: end every "
                f"process of a release other than {release} first"
            )
        await asyncio.sleep(_BETWEEN_LOOKS_S)


async def _apply(connection: asyncpg.Connection, migration: Migration, lock_ms: int, tries: int) -> None:
    try:
        for _ in range(tries - 1):
            try:
                return await _apply_once(connection, migration, lock_ms)
            except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
                await asyncio.sleep(_TRY_AGAIN_S)
        await _apply_once(connection, migration, lock_ms)
    except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as held:
        raise SchemaBusy(
            f"{migration.file} did not get its locks in {tries} tries: {held}. Look for old transactions in "
            "pg_stat_activity"
        ) from held
    finally:
        await connection.execute("RESET lock_timeout")


async def _apply_once(connection: asyncpg.Connection, migration: Migration, lock_ms: int) -> None:
    await connection.execute(f"SET lock_timeout = {lock_ms}")
    if migration.sql.startswith(_ALONE):
        for statement in migration.sql.strip().split(";\n"):
            # It waits for every older transaction, a backup perhaps, and that is a lock's wait too. But
            # nobody who reads or writes waits behind it, and given up it would have to begin anew.
            await connection.execute(
                f"SET lock_timeout = {0 if _CONCURRENTLY.search(statement) else lock_ms}"
            )
            await connection.execute(statement)
        await _note(connection, migration)
        return
    async with connection.transaction():
        await connection.execute(migration.sql)
        await _note(connection, migration)


async def _note(connection: asyncpg.Connection, migration: Migration) -> None:
    await connection.execute(
        "INSERT INTO public.darkroom_migration (package, name, sha256) VALUES ($1, $2, $3)",
        migration.package,
        migration.name,
        migration.sha256,
    )
