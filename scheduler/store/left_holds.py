"""Holds that were left behind: their attempt does not run, and nobody settled it.

An attempt and its hold begin in one transaction and end in one, so there should be none. Whatever else
becomes of the rows, an account gets its time back within the hour, and the log says of which attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from billing import hold_expiry
from billing.hold_expiry import DueHold
from scheduler.store.pool import Connection


@dataclass(frozen=True, kw_only=True)
class HoldsLookedAt:
    """What came of a look at holds that have stood for long."""

    looked_at: int
    expired: tuple[DueHold, ...]


async def expire_left_holds(connection: Connection, at: datetime, most: int) -> HoldsLookedAt:
    """Look at up to `most` holds that are due: put off those whose attempts run, expire the others.

    Never one whose attempt runs: whoever starts or settles an attempt has its account's lock, which is taken
    here before the attempts are read.
    """
    due = await hold_expiry.due(connection, at, most)
    running = {
        row["attempt_id"]
        for row in await connection.fetch(
            "SELECT attempt_id FROM scheduler.attempt WHERE attempt_id = ANY($1) AND state = 'running'",
            [hold.attempt_id for hold in due],
        )
    }
    left = [hold for hold in due if hold.attempt_id not in running]
    await hold_expiry.put_off(connection, [hold for hold in due if hold.attempt_id in running], at)
    await hold_expiry.expire(connection, left, at)
    return HoldsLookedAt(looked_at=len(due), expired=tuple(left))
