"""What a look at a database tells about how well it is. It reads, and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from scheduler.store import canary_time
from scheduler.store.canary_time import CanaryTime
from scheduler.store.lanes import AWAY, session_settings
from scheduler.store.migrate import DatabaseUnreachable, Migration, migrations

_CONNECT_S = 5.0
_STATEMENT_S = 10.0
_TABLE = "public.darkroom_migration"


@dataclass(frozen=True, kw_only=True)
class CheckedDatabase:
    """What was seen of a database."""

    version: str
    """PostgreSQL's own, such as `18.6`."""
    missing: Sequence[Migration]
    """Migrations of this release that it does not have."""
    changed: Sequence[str]
    """Migrations that it has with other contents."""
    newer: Sequence[str]
    """Migrations that it has and this release does not."""
    ahead_ms: int
    """How far its clock is ahead of this machine's; negative: behind. Known to about half of `took_ms`."""
    took_ms: int
    """For one answer."""
    connections: int
    """Open ones of the whole server."""
    most_connections: int
    """That it allows to others than superusers."""
    pooled: bool
    """Something between here and PostgreSQL hands connections out."""
    safe: bool
    """What it has acknowledged survives a crash of its machine."""
    leader: str
    """The scheduler that leads; empty before the first."""
    leader_silent_ms: int | None
    """For how long that one has written nothing; None: before the first."""
    processes: Sequence[str]
    """Front doors and schedulers that are connected, with their releases: `frontdoor-0.1.0`."""
    canary: CanaryTime | None
    """None: none was asked for, it has no account, or the schema is not there."""
    canary_take_ms: int | None
    """What its newest fast jobs were billed each; None: there are none."""

    @property
    def has_schema(self) -> bool:
        """Whether this release can use the schema: what waits until nothing older runs may be missing."""
        return _has_schema(self.missing)


async def look_at_database(dsn: str, *, canary: str | None = None) -> CheckedDatabase:
    """Return how well the database is, and what the account `canary` has. Raises DatabaseUnreachable."""
    try:
        connection = await asyncpg.connect(
            dsn,
            timeout=_CONNECT_S,
            command_timeout=_STATEMENT_S,
            # Behind a transaction pooler the next statement may be another connection's.
            statement_cache_size=0,
            server_settings=session_settings("darkroom doctor"),
        )
    except (*AWAY, asyncpg.PostgresError) as trouble:
        # The DSN may hold a password, so it is not repeated; and a timeout has no words of its own.
        why = str(trouble) or "it did not answer in time"
        raise DatabaseUnreachable(f"cannot connect to PostgreSQL: {why}") from trouble
    try:
        return await _look(connection, canary)
    except (*AWAY, asyncpg.PostgresError) as trouble:
        # It went away meanwhile; or the role may not read what the service's own may.
        raise DatabaseUnreachable(f"PostgreSQL did not say how it is: {trouble}") from trouble
    finally:
        connection.terminate()  # not a word more: it may hang


def embedded_dsn(data_dir: Path) -> str | None:
    """Return the DSN of the embedded server that runs on `data_dir`/postgresql; None: none does."""
    note = data_dir / "postgresql" / "postmaster.pid"
    try:
        pid, *_, socket_folder = note.read_text().splitlines()[:5]
    except (OSError, ValueError):
        return None
    if not Path("/proc", pid.strip()).exists():
        return None  # a note that a killed one left
    return f"postgresql://postgres@/postgres?host={socket_folder.strip()}"


async def _look(connection: asyncpg.Connection, canary: str | None) -> CheckedDatabase:
    began_s = time.time()
    row = await connection.fetchrow(
        """SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now_ms,
                  current_setting('server_version') AS version,
                  current_setting('max_connections')::int
                    - current_setting('superuser_reserved_connections')::int AS most,
                  current_setting('fsync')::bool AND current_setting('full_page_writes')::bool
                    AND current_setting('synchronous_commit') <> 'off' AS safe,
                  (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS open,
                  pg_backend_pid() AS pid,
                  (SELECT array_agg(DISTINCT name) FILTER (WHERE name IS NOT NULL)
                     FROM pg_stat_activity,
                          substring(application_name from '^darkroom ((?:frontdoor|scheduler)-[0-9.]+)') name
                    WHERE datname = current_database()) AS processes"""
    )
    ended_s = time.time()
    assert row is not None, "it selects one row of nothing"
    missing, changed, newer = await _schema(connection)
    leader = await _leader(connection)
    granted = take_ms = None
    if canary is not None and _has_schema(missing):
        granted = await canary_time.read(connection, canary)
        take_ms = await canary_time.take_ms(connection, canary)
    return CheckedDatabase(
        version=row["version"].split()[0],
        missing=missing,
        changed=changed,
        newer=newer,
        ahead_ms=round(row["now_ms"] - (began_s + ended_s) / 2 * 1000),
        took_ms=round((ended_s - began_s) * 1000),
        connections=row["open"],
        most_connections=row["most"],
        # A pooler makes up the process that it presents as ours.
        pooled=connection.get_server_pid() != row["pid"],
        safe=row["safe"],
        leader=leader[0],
        leader_silent_ms=leader[1],
        processes=sorted(row["processes"] or ()),
        canary=granted,
        canary_take_ms=take_ms,
    )


async def _schema(connection: asyncpg.Connection) -> tuple[list[Migration], list[str], list[str]]:
    known = {(one.package, one.name): one for one in migrations()}
    if await connection.fetchval("SELECT to_regclass($1)", _TABLE) is None:
        return list(known.values()), [], []
    rows = await connection.fetch(f"SELECT package, name, sha256 FROM {_TABLE}")  # noqa: S608
    applied = {(row["package"], row["name"]): row["sha256"] for row in rows}
    changed = [
        known[key].file for key, sha256 in applied.items() if key in known and known[key].sha256 != sha256
    ]
    newer = sorted(f"{package}/{name}" for package, name in applied.keys() - known.keys())
    return [one for key, one in known.items() if key not in applied], changed, newer


def _has_schema(missing: Iterable[Migration]) -> bool:
    return all(one.is_after for one in missing)


async def _leader(connection: asyncpg.Connection) -> tuple[str, int | None]:
    if await connection.fetchval("SELECT to_regclass('scheduler.leader')") is None:
        return "", None
    row = await connection.fetchrow(
        """SELECT holder, (extract(epoch FROM clock_timestamp()) * 1000)::bigint - last_now_ms AS silent_ms
             FROM scheduler.leader"""
    )
    if row is None or not row["holder"]:
        return "", None
    return row["holder"], max(row["silent_ms"], 0)
