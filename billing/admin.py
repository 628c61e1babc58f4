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

_CODE = {Source.ADMIN: Code.ADMIN, Source.PROMO: Code.PROMO, Source.PURCHASE: Code.PURCHASE}


async def adjust_balance(
    connection: asyncpg.Connection,
    account_id: str,
    amount_ms: int,
    actor: str,
    reason: str,
    request_id: str,
    expires_at: datetime | None,
    at: datetime,
    source: Source = Source.ADMIN,
) -> Balance:
    """Grant fast time to an account, or take unused time away, and return its new balance.

    A positive amount becomes a lot of `source` (ADMIN, PROMO or PURCHASE, which decides when it burns) that
    lives until `expires_at` (None: it does not expire). A negative one is taken from the lots in the reverse
    of burn order, so that taking an admin's grant or a purchase back undoes it, and never from what is used
    or held. Repeating a request id on an account raises asyncpg.UniqueViolationError: `idempotency.claim`
    comes before. Locks the account.

    Raises UnknownAccount or AdjustmentTooLarge.
    """
    assert amount_ms != 0, "nothing to adjust"
    code = _CODE[source] if amount_ms > 0 else Code.ADMIN
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
        after={"available_ms": before.available_ms + amount_ms, "amount_ms": amount_ms, "code": code},
        at=at,
    )
    if amount_ms > 0:
        lot = Grant(
            account_id=account_id,
            source=source,
            source_key=f"admin/{account_id}/{request_id}",
            code=code,
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
        revoke(books, account_id, parts, code, at, audit_id)
        await books.write(connection)
    return await balance(connection, account_id, at)
