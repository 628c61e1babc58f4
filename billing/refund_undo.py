"""Refunds taken back: what a refund gave is charged again, once for each refund, a job's newest first.

Nothing is unsaid: it is answered by compensating entries of the same attempt. All of the money is owed again.
Of the time, what the lots that it went to have left is taken; what is used, held or gone with its lot stays,
and nothing else of the account is touched for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg

from billing import accounts, audit
from billing.books import Books, MeteredKey, open_books
from billing.entries import (
    CONSUMED,
    EXPIRED,
    ISSUED,
    PLATFORM,
    REVENUE,
    Code,
    Part,
    lot_account,
    metered_account,
)
from billing.refunds import Move, post
from billing.refusals import EtagMismatch, NoRefundToUndo, RefundSpent


@dataclass(frozen=True, kw_only=True)
class RefundUndone:
    """What taking a refund back charges again."""

    refunded_at: datetime
    taken_ms: int
    """What is charged in money included."""
    kept_ms: int
    """Of the time that the refund gave: what is used or held, or gone with its lot."""
    taken_micros: int
    currency: str
    refunded_in_all_ms: int
    """Of this job, what stays given back."""
    billed_ms: int
    etag: str
    """Names the refund."""


async def undo(
    connection: asyncpg.Connection,
    *,
    account_id: str,
    job_id: str,
    etag: str,
    actor: str,
    reason: str,
    request_id: str,
    at: datetime,
) -> RefundUndone:
    """Take back the newest refund of a job, with an audit event; return what that charged again.

    With an etag it is the refund that this names or none; with an empty one, whichever is the newest. Locks
    the account; a repeated request is for `idempotency.claim`.

    Raises UnknownAccount, NoRefundToUndo, RefundSpent or EtagMismatch.
    """
    terms = await accounts.lock_terms(connection, account_id, at)
    at = terms.in_period(at)
    refund = await _newest(connection, account_id, job_id)
    if etag and etag != _etag(refund):
        raise EtagMismatch(given=etag, current=_etag(refund))
    given = await _given(connection, refund)
    books = await open_books(
        connection, [account_id], since=at, until=at, period_starts=[refund["period_start"]]
    )
    left_ms = {lot.lot_id: lot.available_ms for lot in books.lots(account_id) if lot.lives(at)}
    parts = [
        Part(lot_id=part.lot_id, ms=ms)
        for part in given.lots
        if (ms := min(part.ms, left_ms.get(part.lot_id, 0)))
    ]
    taken_ms = given.metered_ms + sum(part.ms for part in parts)
    if not taken_ms:
        raise RefundSpent(job_id=job_id, refunded_ms=refund["refunded_ms"])
    undone = RefundUndone(
        refunded_at=refund["at"],
        taken_ms=taken_ms,
        kept_ms=refund["refunded_ms"] - taken_ms,
        taken_micros=refund["refunded_micros"],
        currency=refund["currency"],
        refunded_in_all_ms=refund["refunded_in_all_ms"] - taken_ms,
        billed_ms=refund["billed_ms"],
        etag=_etag(refund),
    )
    audit_id = await audit.record(
        connection,
        actor=actor,
        action="UndoRefund",
        target=f"accounts/{account_id}/jobs/{job_id}",
        reason=reason,
        request_id=request_id,
        before={"billed_ms": undone.billed_ms, "refunded_ms": refund["refunded_in_all_ms"]},
        after={
            "refunded_ms": undone.refunded_in_all_ms,
            "amount_ms": undone.taken_ms,
            "amount_micros": undone.taken_micros,
            "currency": undone.currency,
            "undoes": refund["refund_id"],
        },
        at=at,
    )
    _move(books, refund, given.metered_ms, parts, audit_id, at)
    await books.write(connection)
    await connection.execute(
        """INSERT INTO billing.refund_undo (refund_id, account_id, taken_ms, taken_micros, audit_id, at)
           VALUES ($1, $2, $3, $4, $5, $6)""",
        refund["refund_id"],
        account_id,
        undone.taken_ms,
        undone.taken_micros,
        audit_id,
        at,
    )
    return undone


async def _newest(connection: asyncpg.Connection, account_id: str, job_id: str) -> asyncpg.Record:
    """Return the newest refund that was not taken back, with what it is of."""
    refund = await connection.fetchrow(
        """SELECT refund.*, billed_ms, period_start,
                  (SELECT sum(every.refunded_ms - COALESCE(taken_ms, 0))
                     FROM billing.refund AS every LEFT JOIN billing.refund_undo USING (refund_id)
                    WHERE every.attempt_id = refund.attempt_id)::bigint AS refunded_in_all_ms,
                  (SELECT count(*) FROM billing.transfer
                    WHERE transfer.job_id = refund.job_id AND transfer.attempt_id = refund.attempt_id
                      AND code = 'refund_undo') AS entries
             FROM billing.refund
                  JOIN billing.settlement USING (attempt_id)
                  JOIN billing.hold USING (attempt_id)
            WHERE refund.account_id = $1 AND refund.job_id = $2
              AND NOT EXISTS (SELECT FROM billing.refund_undo WHERE refund_undo.refund_id = refund.refund_id)
            ORDER BY refund_id DESC LIMIT 1""",
        account_id,
        UUID(job_id),
    )
    if refund is None:
        raise NoRefundToUndo(job_id=job_id)
    return refund


def _etag(refund: asyncpg.Record) -> str:
    return f"refund-{refund['refund_id']}"


@dataclass(frozen=True, kw_only=True)
class _Given:
    metered_ms: int
    lots: Sequence[Part]


async def _given(connection: asyncpg.Connection, refund: asyncpg.Record) -> _Given:
    """Return what a refund gave, and to which lots: a new one in the place of those that had ended."""
    metered_ms = 0
    lots: dict[int, int] = {}
    for row in await connection.fetch(
        """SELECT debit_account, credit_account, amount, lot_id FROM billing.transfer
            WHERE job_id = $1 AND attempt_id = $2 AND code = 'refund' AND audit_id = $3 AND unit = 'gpu_ms'
            ORDER BY transfer_id""",
        refund["job_id"],
        refund["attempt_id"],
        refund["audit_id"],
    ):
        if row["lot_id"] is None:
            metered_ms += row["amount"]
        elif row["debit_account"] in (CONSUMED, ISSUED):
            lots[row["lot_id"]] = row["amount"]
        elif row["credit_account"] == EXPIRED:
            del lots[row["lot_id"]]
    return _Given(metered_ms=metered_ms, lots=[Part(lot_id=lot_id, ms=ms) for lot_id, ms in lots.items()])


def _move(
    books: Books,
    refund: asyncpg.Record,
    metered_ms: int,
    parts: Sequence[Part],
    audit_id: int,
    at: datetime,
) -> None:
    account_id, micros, currency = refund["account_id"], refund["refunded_micros"], refund["currency"]
    moves: list[Move] = []
    for part in parts:
        moves.append(Move(lot_account(part.lot_id), CONSUMED, part.ms, lot_id=part.lot_id))
        books.move_lot(part.lot_id, used_ms=part.ms)
    if metered_ms:
        moves.append(Move(PLATFORM, CONSUMED, metered_ms))
    if micros:
        moves.append(Move(metered_account(account_id), REVENUE, micros, unit=currency))
        # Whatever the cap is by now: it was within the one of its dispatch.
        key = MeteredKey(account_id=account_id, period_start=refund["period_start"], currency=currency)
        books.move_metered(key, posted_micros=micros)
    post(
        books,
        moves,
        code=Code.REFUND_UNDO,
        account_id=account_id,
        job_id=refund["job_id"],
        attempt_id=refund["attempt_id"],
        first_leg=refund["entries"],
        audit_id=audit_id,
        at=at,
    )
