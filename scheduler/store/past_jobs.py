"""Jobs that ended a while ago: their rows move to the partition of the month in which they ended.

What the service does all day looks at the rows that live, and says so by `NOT past`. Nobody has to know
where a row is to find it: queries of `scheduler.job` see both. Rows move a few hundred at a time, those
that somebody has locked stay for the next time, and months are made before rows move there.

Whoever meanwhile waits for a row that is being moved is told by PostgreSQL to begin again (SQLSTATE 40001,
also in READ COMMITTED): see `lanes.AGAIN`.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import asyncpg

from scheduler.store.pool import Connection

# Any fixed number, other than that of migrations.
_MONTHS_LOCK = 0x6D6F6E74
# Attaching a month waits for nobody who reads jobs, but for who writes accounts: and all that come after
# would wait behind it.
_LOCK_WITHIN = "500ms"

Busy = asyncpg.LockNotAvailableError
"""Accounts are being written for longer than a month can wait for, or another front door makes months: later
they will be there."""


async def make_months(connection: Connection, *, ended_from: datetime | None, until: datetime) -> list[str]:
    """Make the partitions that are missing, from the oldest job that `move` would move up to that of `until`.

    Returns their names. In the caller's transaction. Raises Busy, also if another front door is at it: until
    its transaction ends, nobody else sees what it makes.
    """
    if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _MONTHS_LOCK):
        raise Busy
    oldest: datetime | None = await connection.fetchval(
        """SELECT min(ended_at) FROM scheduler.job
           WHERE NOT past AND ended_at >= coalesce($1, '-infinity'::timestamptz)""",
        ended_from,
    )
    there = {
        row["name"]
        for row in await connection.fetch(
            """SELECT relname AS name FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
               WHERE inhparent = 'scheduler.past_job'::regclass"""
        )
    }
    made = []
    month = _month_of(until if oldest is None else min(oldest, until))
    while month <= until:
        name, after = f"past_job_{month:%Y_%m}", _month_of(month + timedelta(days=31))
        if name not in there:
            await _make_month(connection, name, month, after)
            made.append(name)
        month = after
    return made


def _month_of(at: datetime) -> datetime:
    return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


async def _make_month(connection: Connection, name: str, start: datetime, end: datetime) -> None:
    # Made alone and then attached: CREATE TABLE … PARTITION OF would wait for everybody who reads past jobs,
    # for hours if that is a backup, and everybody who comes after would wait behind it.
    await connection.execute(
        f"""SET LOCAL lock_timeout = '{_LOCK_WITHIN}';
            CREATE TABLE scheduler.{name}
                (LIKE scheduler.past_job INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE);
            ALTER TABLE scheduler.past_job ATTACH PARTITION scheduler.{name}
                FOR VALUES FROM ('{start:%Y-%m-%d} 00:00Z') TO ('{end:%Y-%m-%d} 00:00Z')"""
    )


async def move(
    connection: Connection, *, ended_before: datetime, ended_from: datetime | None, limit: int
) -> list[datetime]:
    """Move up to `limit` jobs that ended in [ended_from, ended_before), the oldest first; None: however
    long ago.

    Returns when each of them ended. Leaves those that somebody has locked, and those that were cancelled as
    they waited while no scheduler has heard of it. `make_months` comes before.
    """
    rows = await connection.fetch(
        """WITH due AS (
               SELECT job_id FROM scheduler.job
               WHERE NOT past AND ended_at >= coalesce($2, '-infinity'::timestamptz) AND ended_at < $1
                     AND (state <> 'cancelled' OR noticed_epoch > 0)
               ORDER BY ended_at LIMIT $3 FOR UPDATE SKIP LOCKED)
           UPDATE scheduler.job SET past = true FROM due WHERE NOT past AND job.job_id = due.job_id
           RETURNING ended_at""",
        ended_before,
        ended_from,
        limit,
    )
    return [row["ended_at"] for row in rows]
