"""Who leads: one row, one growing number.

A scheduler takes the lead by raising the epoch. Every transaction of a leader begins with `require_leader`,
which locks the row in share mode: a takeover waits for transactions under way and everything the old
leader begins afterwards fails here.

An epoch is the time at which it began, in milliseconds since 1970, or one more than the last. So it is above
all that were handed out from a database that has been lost: one that was restored from a backup does not know
them, and counting on from its own it would come upon the epoch of a scheduler that is still alive, and stay
below what workers have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg


class Deposed(Exception):
    """Another scheduler leads now: this one must stop acting."""


class DatabaseWentBack(Exception):
    """The database is older than what this leader knows, as one restored from a backup is:
    what is in memory is of no use any more.
    """


@dataclass(frozen=True, kw_only=True)
class Leadership:
    """What a takeover yields."""

    epoch: int
    now_ms: int
    """The later of the database's time and the newest time an earlier leader acted at, since 1970."""


async def take_lead(connection: asyncpg.Connection, holder: str) -> Leadership:
    """Become the leader. Waits for the present leader's transactions under way."""
    async with connection.transaction():
        # UPDATE alone locks less than FOR UPDATE
        # and would not wait for the KEY SHARE of a transaction under way.
        await connection.execute("SELECT FROM scheduler.leader FOR UPDATE")
        row = await connection.fetchrow(
            """UPDATE scheduler.leader
               SET epoch = greatest(epoch + 1, (extract(epoch FROM clock_timestamp()) * 1000)::bigint),
                   holder = $1, taken_at = now(),
                   last_now_ms = greatest(last_now_ms, (extract(epoch FROM clock_timestamp()) * 1000)::bigint)
               RETURNING epoch, last_now_ms""",
            holder,
        )
    assert row is not None, "the leader row is made by the first migration"
    return Leadership(epoch=row["epoch"], now_ms=row["last_now_ms"])


async def require_leader(connection: asyncpg.Connection, epoch: int) -> None:
    """Hold the lead until the caller's transaction ends; raises Deposed if another has it.

    KEY SHARE conflicts with nothing that a leader does itself, only with `take_lead`.
    """
    row = await connection.fetchrow(
        "SELECT epoch FROM scheduler.leader WHERE epoch = $1 FOR KEY SHARE", epoch
    )
    if row is None:
        raise Deposed(f"epoch {epoch} was replaced")


async def keep_time(connection: asyncpg.Connection, epoch: int, now_ms: int, *, kept_ms: int = 0) -> None:
    """Remember the newest time this leader acted at; `kept_ms` is what it had remembered before.

    Raises Deposed if another leads, and DatabaseWentBack where that is not remembered any more.
    """
    done = await connection.execute(
        """UPDATE scheduler.leader SET last_now_ms = greatest(last_now_ms, $2)
           WHERE epoch = $1 AND last_now_ms >= $3""",
        epoch,
        now_ms,
        kept_ms,
    )
    if done == "UPDATE 0":
        await require_leader(connection, epoch)
        raise DatabaseWentBack("the database has lost what this scheduler has written: it was restored")


async def present_holder(connection: asyncpg.Connection) -> str:
    """Return the name of the scheduler that leads; empty before the first."""
    holder: str = await connection.fetchval("SELECT holder FROM scheduler.leader")
    return holder
