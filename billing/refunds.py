"""Refunds: what a job was charged is given back, all of it or a part, and never more than was charged.

In the reverse of burn order: what was paid in money first, then the lots, the one that burnt last before the
one that burnt first. Time goes back to the lot it came from; where that has ended, a new lot takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import asyncpg

from billing import accounts, audit
from billing.books import Books, Grant, MeteredKey, grant, open_books
from billing.entries import (
    CONSUMED,
    EXPIRED,
    GPU_MS,
    PLATFORM,
    REVENUE,
    Code,
    Entry,
    Kind,
    Part,
    Source,
    filled,
    lot_account,
    metered_account,
)
from billing.periods import period_at
from billing.prices import in_proportion
from billing.refusals import NothingCharged, RefundTooLarge, RequestIdReused


@dataclass(frozen=True, kw_only=True)
class Refunded:
    """What was given back of a job's charge."""

    refunded_ms: int
    """What was paid in money included."""
    refunded_micros: int
    currency: str
    refunded_in_all_ms: int
    """Of this job, by this refund and those before it."""
    billed_ms: int


async def refund(
    connection: asyncpg.Connection,
    *,
    account_id: str,
    job_id: str,
    amount_ms: int | None,
    actor: str,
    reason: str,
    request_id: str,
    at: datetime,
) -> Refunded:
    """Give `amount_ms` of a job's billed time back, or all that is left of it, with its audit event.

    Money is given back in proportion to the metered time that is. A request that comes again gets its first
    answer. Locks the account.

    Raises UnknownAccount, NothingCharged, RefundTooLarge or RequestIdReused.
    """
    assert amount_ms is None or amount_ms > 0, "nothing to give back"
    terms = await accounts.lock_terms(connection, account_id, at)
    at = terms.in_period(at)
    before = await _given_back_under(connection, account_id, request_id)
    if before is not None:
        if (before["job_id"], before["asked_ms"]) != (UUID(job_id), amount_ms):
            raise RequestIdReused(request_id=request_id)
        return _refunded(before)
    charge = await _charge(connection, account_id, job_id)
    left_ms = charge.billed_ms - charge.refunded_ms
    refunded_ms = left_ms if amount_ms is None else amount_ms
    if not 0 < refunded_ms <= left_ms:
        raise RefundTooLarge(billed_ms=charge.billed_ms, refunded_ms=charge.refunded_ms, amount_ms=amount_ms)
    metered_ms, *from_lots = filled([charge.metered_left_ms, *(part.ms for part in charge.lots)], refunded_ms)
    parts = [Part(lot_id=part.lot_id, ms=ms) for part, ms in zip(charge.lots, from_lots, strict=True) if ms]
    micros = charge.micros_for(metered_ms)
    audit_id = await audit.record(
        connection,
        actor=actor,
        action="RefundJob",
        target=f"accounts/{account_id}/jobs/{job_id}",
        reason=reason,
        request_id=request_id,
        before={"billed_ms": charge.billed_ms, "refunded_ms": charge.refunded_ms},
        after={
            "refunded_ms": charge.refunded_ms + refunded_ms,
            "amount_ms": refunded_ms,
            "amount_micros": micros,
            "currency": charge.currency,
        },
        at=at,
    )
    deed = _Deed(account_id=account_id, request_id=request_id, audit_id=audit_id, at=at)
    await _move(connection, deed, charge, parts, metered_ms, micros, terms.period_start)
    await connection.execute(
        """INSERT INTO billing.refund (account_id, job_id, attempt_id, request_id, asked_ms, refunded_ms,
                                       refunded_micros, currency, audit_id, at)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)""",
        account_id,
        charge.job_id,
        charge.attempt_id,
        request_id,
        amount_ms,
        refunded_ms,
        micros,
        charge.currency,
        audit_id,
        at,
    )
    return Refunded(
        refunded_ms=refunded_ms,
        refunded_micros=micros,
        currency=charge.currency,
        refunded_in_all_ms=charge.refunded_ms + refunded_ms,
        billed_ms=charge.billed_ms,
    )


@dataclass(frozen=True, kw_only=True)
class _Charge:
    """What a job was charged, and what of it can still be given back."""

    job_id: UUID
    attempt_id: UUID
    billed_ms: int
    refunded_ms: int
    metered_ms: int
    metered_left_ms: int
    amount_micros: int
    refunded_micros: int
    currency: str
    placed_at: datetime
    period_start: datetime
    """Of the metered account that was charged."""
    lots: Sequence[Part]
    """What is left of each, the last to burn first."""
    entries: int
    """How many the refunds before made."""

    def micros_for(self, metered_ms: int) -> int:
        """Return the money for this much more of the metered time.

        By what is given back in all: many small refunds give no less than one, and the last gives the rest.
        """
        if not metered_ms:
            return 0
        back_ms = self.metered_ms - self.metered_left_ms + metered_ms
        return in_proportion(self.amount_micros, back_ms, self.metered_ms) - self.refunded_micros


async def _given_back_under(
    connection: asyncpg.Connection, account_id: str, request_id: str
) -> asyncpg.Record | None:
    return await connection.fetchrow(
        """SELECT refund.*, billed_ms,
                  (SELECT sum(earlier.refunded_ms - COALESCE(taken_ms, 0))
                     FROM billing.refund AS earlier
                          LEFT JOIN billing.refund_undo AS undone
                                 ON undone.refund_id = earlier.refund_id
                                AND undone.audit_id < refund.audit_id
                    WHERE earlier.attempt_id = refund.attempt_id
                      AND earlier.refund_id <= refund.refund_id)::bigint AS refunded_in_all_ms
             FROM billing.refund JOIN billing.settlement USING (attempt_id)
            WHERE refund.account_id = $1 AND request_id = $2""",
        account_id,
        request_id,
    )


def _refunded(row: asyncpg.Record) -> Refunded:
    return Refunded(
        refunded_ms=row["refunded_ms"],
        refunded_micros=row["refunded_micros"],
        currency=row["currency"],
        refunded_in_all_ms=row["refunded_in_all_ms"],
        billed_ms=row["billed_ms"],
    )


async def _charge(connection: asyncpg.Connection, account_id: str, job_id: str) -> _Charge:
    settlement = await connection.fetchrow(
        """SELECT settlement.*, placed_at, period_start
             FROM billing.settlement JOIN billing.hold USING (attempt_id)
            WHERE settlement.job_id = $1 AND settlement.account_id = $2
              AND ending = 'post' AND billed_ms > 0""",
        UUID(job_id),
        account_id,
    )
    if settlement is None:
        raise NothingCharged(job_id=job_id)
    rows = await connection.fetch(
        """SELECT kind, code, leg, debit_account, credit_account, amount, unit, lot_id
             FROM billing.transfer
            WHERE job_id = $1 AND attempt_id = $2 AND kind IN ('post', 'post_pending')
            ORDER BY transfer_id""",
        settlement["job_id"],
        settlement["attempt_id"],
    )
    # As they were charged: first the legs of the hold, then the overrun, each in burn order.
    left_ms: dict[int, int] = {}
    metered_ms = metered_back_ms = micros_back = entries = 0
    for row in rows:
        lot_id, amount = row["lot_id"], row["amount"]
        if row["code"] == Code.REFUND_UNDO:
            # Charged again, and can be given back again: to a lot that may be the refund's own.
            if row["credit_account"] == REVENUE:
                micros_back -= amount
            elif lot_id is None:
                metered_back_ms -= amount
            else:
                left_ms[lot_id] = left_ms.get(lot_id, 0) + amount
        elif row["code"] == Code.REFUND:
            entries += 1
            if row["debit_account"] == REVENUE:
                micros_back += amount
            elif row["debit_account"] == CONSUMED and lot_id is None:
                metered_back_ms += amount
            elif row["debit_account"] == CONSUMED:
                left_ms[lot_id] -= amount
        elif row["credit_account"] == CONSUMED and lot_id is None:
            metered_ms += amount
        elif row["credit_account"] == CONSUMED:
            left_ms[lot_id] = left_ms.get(lot_id, 0) + amount
    lots = [Part(lot_id=lot_id, ms=ms) for lot_id, ms in reversed(left_ms.items())]
    return _Charge(
        job_id=settlement["job_id"],
        attempt_id=settlement["attempt_id"],
        billed_ms=settlement["billed_ms"],
        refunded_ms=settlement["billed_ms"] - (metered_ms - metered_back_ms) - sum(part.ms for part in lots),
        metered_ms=metered_ms,
        metered_left_ms=metered_ms - metered_back_ms,
        amount_micros=settlement["amount_micros"],
        refunded_micros=micros_back,
        currency=settlement["currency"],
        placed_at=settlement["placed_at"],
        period_start=settlement["period_start"],
        lots=lots,
        entries=entries,
    )


@dataclass(frozen=True, kw_only=True)
class _Deed:
    """Whose refund it is."""

    account_id: str
    request_id: str
    audit_id: int
    at: datetime


class Move(NamedTuple):
    """An entry to be, less what all entries of one refund have in common."""

    debit: str
    credit: str
    amount: int
    unit: str = GPU_MS
    lot_id: int | None = None


def post(
    books: Books,
    moves: Sequence[Move],
    *,
    code: Code,
    account_id: str,
    job_id: UUID,
    attempt_id: UUID,
    first_leg: int,
    audit_id: int,
    at: datetime,
) -> None:
    """Put the entries of a refund, or of one that is taken back, into the books."""
    for leg, move in enumerate(moves, start=first_leg):
        books.append(
            Entry(
                kind=Kind.POST,
                code=code,
                account_id=account_id,
                job_id=job_id,
                attempt_id=attempt_id,
                leg=leg,
                debit=move.debit,
                credit=move.credit,
                unit=move.unit,
                amount=move.amount,
                lot_id=move.lot_id,
                audit_id=audit_id,
                at=at,
            )
        )


async def _move(
    connection: asyncpg.Connection,
    deed: _Deed,
    charge: _Charge,
    parts: Sequence[Part],
    metered_ms: int,
    micros: int,
    present_period_start: datetime,
) -> None:
    books = await open_books(
        connection,
        [deed.account_id],
        since=charge.placed_at,
        until=deed.at,
        period_starts=[charge.period_start],
    )
    living = {lot.lot_id for lot in books.lots(deed.account_id) if lot.lives(deed.at)}
    ended_ms = sum(part.ms for part in parts if part.lot_id not in living)
    moves: list[Move] = []
    if metered_ms:
        moves.append(Move(CONSUMED, PLATFORM, metered_ms))
    if micros:
        moves.append(Move(REVENUE, metered_account(deed.account_id), micros, unit=charge.currency))
        key = MeteredKey(
            account_id=deed.account_id, period_start=charge.period_start, currency=charge.currency
        )
        books.move_metered(key, posted_micros=-micros)
    for part in parts:
        moves.append(Move(CONSUMED, lot_account(part.lot_id), part.ms, lot_id=part.lot_id))
        if part.lot_id in living:
            books.move_lot(part.lot_id, used_ms=-part.ms)
        else:
            moves.append(Move(lot_account(part.lot_id), EXPIRED, part.ms, lot_id=part.lot_id))
            books.move_lot(part.lot_id, used_ms=-part.ms, expired_ms=part.ms)
    post(
        books,
        moves,
        code=Code.REFUND,
        account_id=deed.account_id,
        job_id=charge.job_id,
        attempt_id=charge.attempt_id,
        first_leg=charge.entries,
        audit_id=deed.audit_id,
        at=deed.at,
    )
    await books.write(connection)
    if ended_ms:
        lot = Grant(
            account_id=deed.account_id,
            source=Source.REFUND,
            source_key=f"refund/{deed.account_id}/{deed.request_id}",
            code=Code.REFUND,
            amount_ms=ended_ms,
            effective_at=present_period_start,
            # A month of its own: what is left of the present period may be an hour.
            expires_at=period_at(deed.at, deed.at).end,
            at=deed.at,
            audit_id=deed.audit_id,
            job_id=charge.job_id,
            attempt_id=charge.attempt_id,
            leg=charge.entries + len(moves),
        )
        await grant(connection, [lot])
