"""One look at the money, in one short transaction that only reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from billing import reconciliation
from billing.reconciliation import Drift, Moved, PlanAccounts

# Each of them ends within seconds on a database that is well.
_STATEMENT_MS = 20_000


class TookTooLong(Exception):
    """The database is too busy for a look at the money."""


@dataclass(frozen=True, kw_only=True)
class Books:
    """What one look found."""

    drift: Drift
    newest_entry: int
    moved: Sequence[Moved]
    plans: Sequence[PlanAccounts]


async def look(
    connection: asyncpg.Connection,
    *,
    after_lot_id: int,
    lots: int,
    again: Sequence[int],
    counted_to: int,
    count_to: int,
) -> Books:
    """Compare lots, sum up the entries behind `counted_to` up to `count_to`, count accounts.

    Locks nothing. Raises TookTooLong.
    """
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL statement_timeout = {_STATEMENT_MS}")
            return Books(
                drift=await reconciliation.drift(
                    connection, after_lot_id=after_lot_id, most=lots, again=again
                ),
                newest_entry=await reconciliation.newest_entry(connection),
                moved=await reconciliation.moved(connection, after=counted_to, up_to=count_to),
                plans=await reconciliation.accounts_by_plan(connection),
            )
    except asyncpg.QueryCanceledError as late:
        raise TookTooLong from late
