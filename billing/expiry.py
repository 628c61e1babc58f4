"""The sweeper of periods and lots: what is over is brought to an end though nobody touches the account."""

from __future__ import annotations

from datetime import datetime

import asyncpg

from billing import accounts
from billing.renewal import close_lots


async def expire(connection: asyncpg.Connection, at: datetime, most: int) -> int:
    """Renew up to `most` accounts whose period is over, and close lots that are; return how many accounts.

    Fewer than `most`: nothing is left to do, or others are at it. Unused time of a lot goes to `expired`, but
    for what rolls over. It changes nothing of what an account may use, so it may come at any time, or twice
    at once. Locks the accounts, without waiting for any: who has one locked touches it, which is as good.
    """
    due = await connection.fetch(
        """(SELECT account_id FROM billing.subscription
             WHERE ended_at IS NULL AND period_end <= $1 ORDER BY period_end LIMIT $2)
           UNION
           (SELECT DISTINCT account_id FROM billing.grant_lot AS lot
             WHERE NOT closed AND expires_at <= $1
               AND NOT EXISTS (
                   SELECT FROM billing.hold
                    WHERE state = 'open' AND hold.account_id = lot.account_id AND placed_at < lot.expires_at)
             LIMIT $2)
           LIMIT $2""",
        at,
        most,
    )
    free = await connection.fetch(
        """SELECT account_id FROM billing.subscription
            WHERE account_id = ANY($1) ORDER BY account_id FOR UPDATE SKIP LOCKED""",
        [row["account_id"] for row in due],
    )
    ids = [row["account_id"] for row in free]
    await accounts.lock(connection, ids, at)
    await close_lots(connection, ids, at)
    return len(ids)
