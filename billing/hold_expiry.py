"""The end of holds that nobody else ends: what they set aside is free again, and nobody is charged.

A settlement ends a hold with its attempt, in one transaction, so none should be left behind. One that is all
the same, by a fault of ours or by a hand in the database, would keep an account from its time for good. So a
hold stands for a while only. Who sweeps puts off those whose attempts run, and expires the others. An attempt
that is settled after that is charged like one without a hold: all it took is beyond what was set aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from billing import accounts
from billing.books import Books
from billing.entries import CONSUMED, GPU_MS, REVENUE, Code, Entry, Kind, lot_account, metered_account
from billing.holds import HOLD_LASTS, Hold, open_with_holds


@dataclass(frozen=True, kw_only=True)
class DueHold:
    """A hold that has stood for as long as it was to."""

    account_id: str
    attempt_id: UUID


async def due(connection: asyncpg.Connection, at: datetime, most: int) -> list[DueHold]:
    """Return up to `most` holds that have stood long enough by `at`, and lock their accounts.

    While those are locked nobody settles their attempts. Does not wait for an account that is locked: who has
    it may be ending the hold. Fewer than `most` may be returned for that reason.
    """
    rows = await connection.fetch(
        """SELECT account_id, attempt_id FROM billing.hold
            WHERE state = 'open' AND stands_until <= $1 ORDER BY stands_until LIMIT $2""",
        at,
        most,
    )
    free = await connection.fetch(
        """SELECT account_id FROM billing.subscription
            WHERE account_id = ANY($1) ORDER BY account_id FOR UPDATE SKIP LOCKED""",
        [row["account_id"] for row in rows],
    )
    ids = {row["account_id"] for row in free}
    await accounts.lock(connection, ids, at)
    # Again: one may have been ended before its account was locked.
    still = await connection.fetch(
        """SELECT account_id, attempt_id FROM billing.hold
            WHERE attempt_id = ANY($1) AND state = 'open' AND stands_until <= $2 ORDER BY attempt_id""",
        [row["attempt_id"] for row in rows if row["account_id"] in ids],
        at,
    )
    return [DueHold(account_id=row["account_id"], attempt_id=row["attempt_id"]) for row in still]


async def put_off(connection: asyncpg.Connection, holds: Sequence[DueHold], at: datetime) -> None:
    """Let holds stand for another while from `at`: their attempts run. `due` has locked their accounts."""
    await connection.execute(
        "UPDATE billing.hold SET stands_until = $2 WHERE attempt_id = ANY($1)",
        [hold.attempt_id for hold in holds],
        at + HOLD_LASTS,
    )


async def expire(connection: asyncpg.Connection, holds: Sequence[DueHold], at: datetime) -> None:
    """End holds whose attempts do not run: all they set aside is free. `due` has locked their accounts."""
    if not holds:
        return
    opened = await open_with_holds(
        connection,
        {hold.account_id for hold in holds},
        [str(hold.attempt_id) for hold in holds],
        since=at,
        until=at,
    )
    for hold in opened.holds.values():
        assert hold.state == "open", "it was due, and its account is locked since"
        _free(opened.books, hold, at)
    await opened.books.write(connection)
    await connection.execute(
        "UPDATE billing.hold SET state = 'expired', ended_at = $2 WHERE attempt_id = ANY($1)",
        [hold.attempt_id for hold in holds],
        at,
    )


def _free(books: Books, hold: Hold, at: datetime) -> None:
    for leg in hold.legs:
        if leg.lot_id is not None:
            books.move_lot(leg.lot_id, held_ms=-leg.held_ms)
            debit, credit, unit, amount = lot_account(leg.lot_id), CONSUMED, GPU_MS, leg.held_ms
        else:
            books.move_metered(hold.metered_key, held_micros=-hold.metered_micros)
            debit, credit = metered_account(hold.account_id), REVENUE
            unit, amount = hold.currency, hold.metered_micros
        books.append(
            Entry(
                kind=Kind.EXPIRE_PENDING,
                code=Code.HOLD_EXPIRY,
                account_id=hold.account_id,
                job_id=hold.job_id,
                attempt_id=hold.attempt_id,
                leg=leg.number,
                debit=debit,
                credit=credit,
                unit=unit,
                amount=amount,
                lot_id=leg.lot_id,
                pending_id=leg.pending_id,
                at=at,
            )
        )
