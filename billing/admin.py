"""What an admin does to an account's time: never without actor, reason and request id."""

from __future__ import annotations

from datetime import datetime

import asyncpg

from billing import accounts
from billing.audit import record, was_done
from billing.balances import Balance, balance
from billing.books import Grant, grant, open_books, revoke
from billing.entries import Code, Lot, Source, burn_order, taken
from billing.refusals import AdjustmentTooLarge, RequestIdReused, UnknownGrant

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
    undoes: int | None = None,
) -> Balance:
    """Grant fast time to an account, or take unused time away, and return its new balance.

    A positive amount becomes a lot of `source` (ADMIN, PROMO or PURCHASE, which decides when it burns) that
    lives until `expires_at` (None: it does not expire). A negative one is taken from the lot that the
    adjustment with the audit event `undoes` made, and from no other; or, if that is None, from the lots in
    the reverse of burn order. It is never taken from what is used or held. A repeated request is for
    `idempotency.claim`, which comes before; what somebody else did to the account under the same request id
    is not done again. Locks the account.

    Raises UnknownAccount, UnknownGrant, AdjustmentTooLarge or RequestIdReused.
    """
    assert amount_ms != 0, "nothing to adjust"
    assert undoes is None or amount_ms < 0, "a grant undoes nothing"
    code = _CODE[source] if amount_ms > 0 else Code.ADMIN
    assert expires_at is None or expires_at > at, "the lot would be dead at birth"
    terms = await accounts.lock_terms(connection, account_id, at)
    at = terms.in_period(at)
    if await was_done(connection, "AdjustBalance", f"accounts/{account_id}", request_id):
        raise RequestIdReused(request_id=request_id)
    before = await balance(connection, account_id, at)
    if before.available_ms + amount_ms < 0:
        raise AdjustmentTooLarge(available_ms=before.available_ms, amount_ms=amount_ms)
    books = await open_books(connection, [account_id], since=at, until=at)
    lots = burn_order(books.lots(account_id), at)[::-1]
    if undoes is not None:
        lots = await _granted(connection, account_id, undoes, lots)
        left_ms = sum(lot.available_ms for lot in lots)
        if left_ms + amount_ms < 0:
            raise AdjustmentTooLarge(available_ms=left_ms, amount_ms=amount_ms, of_grant=True)
    audit_id = await record(
        connection,
        actor=actor,
        action="AdjustBalance",
        target=f"accounts/{account_id}",
        reason=reason,
        request_id=request_id,
        before={"available_ms": before.available_ms},
        after={
            "available_ms": before.available_ms + amount_ms,
            "amount_ms": amount_ms,
            "code": code,
            **({} if undoes is None else {"undoes": undoes}),
        },
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
        revoke(books, account_id, taken(lots, -amount_ms), code, at, audit_id)
        await books.write(connection)
    return await balance(connection, account_id, at)


async def _granted(
    connection: asyncpg.Connection, account_id: str, audit_id: int, living: list[Lot]
) -> list[Lot]:
    """Return the lot that an adjustment made, if it lives. Raises UnknownGrant."""
    lot_id = await connection.fetchval(
        """SELECT lot_id FROM billing.transfer JOIN billing.audit_event USING (audit_id)
            WHERE audit_id = $2 AND account_id = $1 AND action = 'AdjustBalance'
              AND debit_account = 'issued'""",
        account_id,
        audit_id,
    )
    if lot_id is None:
        raise UnknownGrant(account_id=account_id, number=audit_id)
    return [lot for lot in living if lot.lot_id == lot_id]
