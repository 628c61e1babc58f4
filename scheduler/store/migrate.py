"""Brings a database to the newest schema: forward only, one transaction a file, the ledger's files first.

A file that has been applied must not change; its SHA-256 is kept and compared at every start.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import asyncpg

import billing

# Any fixed number: it only has to differ from other users' advisory locks in this database.
_LOCK = 0x6461726B
_CONNECT_S = 10.0

FOLDERS: tuple[tuple[str, Path], ...] = (
    ("billing", Path(billing.__file__).parent / "migrations"),
    ("scheduler", Path(__file__).parent / "migrations"),
)


class SchemaChanged(Exception):
    """An applied migration's file differs from what was applied:
    restore the file, and add a new one instead.
    """


class SchemaTooNew(Exception):
    """The database was migrated by a newer release: upgrade this one, or restore the database's backup."""


class DatabaseUnreachable(Exception):
    """PostgreSQL cannot be connected to: check that it runs, the DSN, and the password."""


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


def migrations() -> list[Migration]:
    """Return every migration in the order they apply."""
    return [
        Migration(package=package, name=path.stem, sql=path.read_text())
        for package, folder in FOLDERS
        for path in sorted(folder.glob("*.sql"))
    ]


async def migrate(connection: asyncpg.Connection) -> list[Migration]:
    """Apply what is missing and return it. Two that start at once wait for each other.

    Raises SchemaChanged or SchemaTooNew, having changed nothing.
    """
    await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
    try:
        await connection.execute(
            """CREATE TABLE IF NOT EXISTS public.darkroom_migration (
                   package text, name text, sha256 text NOT NULL,
                   applied_at timestamptz NOT NULL DEFAULT now(),
                   PRIMARY KEY (package, name))"""
        )
        applied = {
            (row["package"], row["name"]): row["sha256"]
            for row in await connection.fetch("SELECT package, name, sha256 FROM public.darkroom_migration")
        }
        known = migrations()
        unknown = applied.keys() - {(migration.package, migration.name) for migration in known}
        if unknown:
            raise SchemaTooNew(f"the database has migrations this release does not know: {sorted(unknown)}")
        for migration in known:
            sha256 = applied.get((migration.package, migration.name))
            if sha256 not in (None, migration.sha256):
                raise SchemaChanged(
                    f"{migration.package}/{migration.name}.sql is not the file that was applied"
                )
        missing = [migration for migration in known if (migration.package, migration.name) not in applied]
        for migration in missing:
            async with connection.transaction():
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO public.darkroom_migration (package, name, sha256) VALUES ($1, $2, $3)",
                    migration.package,
                    migration.name,
                    migration.sha256,
                )
        return missing
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)


async def migrate_database(dsn: str) -> list[Migration]:
    """Open a connection of its own and `migrate`.

    Give a direct DSN: locks do not pass a transaction pooler. Raises what `migrate` does, and
    DatabaseUnreachable.
    """
    try:
        connection = await asyncpg.connect(dsn, timeout=_CONNECT_S)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as trouble:
        # The DSN may hold a password, so it is not repeated; and a timeout has no words of its own.
        why = str(trouble) or "it did not answer in time"
        raise DatabaseUnreachable(f"cannot connect to PostgreSQL: {why}") from trouble
    try:
        return await migrate(connection)
    finally:
        await connection.close()
