"""What an admin does to an account's time: never without actor, reason and request id."""

from __future__ import annotations

from datetime import datetime

import asyncpg

from billing import accounts
from billing.audit import record
from billing.balances import Balance, balance
from billing.books import Grant, grant, open_books, revoke
from billing.entries import Code, Source, burn_order, taken
from billing.refusals import AdjustmentTooLarge

__all__ = ["adjust_balance", "record"]


async def adjust_balance(
    connection: asyncpg.Connection,
    account_id: str,
    amount_ms: int,
    actor: str,
    reason: str,
    request_id: str,
    expires_at: datetime | None,
    at: datetime,
) -> Balance:
    """Grant fast time to an account, or take unused time away, and return its new balance.

    A positive amount becomes a lot that burns after the plan's, until `expires_at` (None: it does not
    expire). A negative one is taken from the lots in the reverse of burn order, so that taking a grant back
    undoes it, and never from what is used or held. Repeating a request id on an account raises
    asyncpg.UniqueViolationError: `idempotency.claim` comes before. Locks the account.

    Raises UnknownAccount or AdjustmentTooLarge.
    """
    assert amount_ms != 0, "nothing to adjust"
    assert expires_at is None or expires_at > at, "the lot would be dead at birth"
    terms = await accounts.lock_terms(connection, account_id, at)
    at = terms.in_period(at)
    before = await balance(connection, account_id, at)
    if before.available_ms + amount_ms < 0:
        raise AdjustmentTooLarge(available_ms=before.available_ms, amount_ms=amount_ms)
    audit_id = await record(
        connection,
        actor=actor,
        action="AdjustBalance",
        target=f"accounts/{account_id}",
        reason=reason,
        request_id=request_id,
        before={"available_ms": before.available_ms},
        after={"available_ms": before.available_ms + amount_ms, "amount_ms": amount_ms},
        at=at,
    )
    if amount_ms > 0:
        lot = Grant(
            account_id=account_id,
            source=Source.ADMIN,
            source_key=f"admin/{account_id}/{request_id}",
            code=Code.ADMIN,
            amount_ms=amount_ms,
            # Not from `at`: a scheduler whose clock is behind would miss it, and nobody tells it twice.
            effective_at=terms.period_start,
            expires_at=expires_at,
            at=at,
            audit_id=audit_id,
        )
        await grant(connection, [lot])
    else:
        books = await open_books(connection, [account_id], since=at, until=at)
        parts = taken(burn_order(books.lots(account_id), at)[::-1], -amount_ms)
        revoke(books, account_id, parts, Code.ADMIN, at, audit_id)
        await books.write(connection)
    return await balance(connection, account_id, at)
