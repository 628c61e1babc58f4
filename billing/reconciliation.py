"""The ledger held against its own journal, a piece at a time, and what came and went in it of late.

All of the journal is read by `invariants`, when somebody asks. This is for every few minutes, on a database
at work: each piece is a bounded number of lots, found by an index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import asyncpg


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What came of comparing some lots with the journal."""

    gaps_ms: Mapping[int, int]
    """Of the lots that differ from it, by how much at most: in what was used, is held, or is available."""
    last_lot_id: int | None
    """The next piece begins behind it; None: this was the last."""


async def drift(
    connection: asyncpg.Connection, *, after_lot_id: int, most: int, again: Sequence[int] = ()
) -> Drift:
    """Compare the `most` lots behind one with the journal, and those `again`. Locks nothing."""
    row = await connection.fetchrow(
        """/* reconcile */
           WITH piece AS (SELECT lot_id FROM billing.grant_lot WHERE lot_id > $1 ORDER BY lot_id LIMIT $2),
           journal AS (
               SELECT piece.lot_id,
                      sum(CASE WHEN entry.kind NOT IN ('post', 'post_pending') THEN 0
                               WHEN entry.credit_account = 'consumed' THEN entry.amount
                               WHEN entry.debit_account = 'consumed' THEN -entry.amount
                               ELSE 0 END) AS used_ms,
                      sum(CASE WHEN entry.kind = 'pending' AND ending.transfer_id IS NULL
                               THEN entry.amount ELSE 0 END) AS held_ms,
                      sum(CASE WHEN entry.kind NOT IN ('post', 'post_pending') THEN 0
                               WHEN entry.credit_account = 'lot/' || piece.lot_id THEN entry.amount
                               ELSE -entry.amount END) AS posted_ms
               FROM (SELECT lot_id FROM piece UNION SELECT unnest($3::bigint[])) AS piece
                    JOIN billing.transfer AS entry ON entry.lot_id = piece.lot_id
                    LEFT JOIN billing.transfer AS ending ON ending.pending_id = entry.transfer_id
               GROUP BY piece.lot_id),
           compared AS (
               SELECT lot.lot_id, greatest(
                          abs(lot.used_ms - coalesce(journal.used_ms, 0)),
                          abs(lot.held_ms - coalesce(journal.held_ms, 0)),
                          abs(lot.granted_ms - lot.used_ms - lot.expired_ms - lot.revoked_ms
                              - coalesce(journal.posted_ms, 0)))::bigint AS gap_ms
               FROM billing.grant_lot AS lot
                    LEFT JOIN journal USING (lot_id)
               WHERE lot.lot_id IN (SELECT lot_id FROM piece UNION SELECT unnest($3::bigint[])))
           SELECT (SELECT array_agg(lot_id ORDER BY lot_id) FROM compared WHERE gap_ms > 0) AS drifting,
                  (SELECT array_agg(gap_ms ORDER BY lot_id) FROM compared WHERE gap_ms > 0) AS gaps_ms,
                  (SELECT max(lot_id) FROM piece) AS last_lot_id,
                  (SELECT count(*) FROM piece) AS lots""",
        after_lot_id,
        most,
        list(again),
    )
    assert row is not None
    return Drift(
        gaps_ms=dict(zip(row["drifting"] or (), row["gaps_ms"] or (), strict=True)),
        last_lot_id=row["last_lot_id"] if row["lots"] == most else None,
    )


class Movement(StrEnum):
    """How fast time came to accounts or went, but for what attempts did."""

    CREDIT = "credit"
    ADJUST = "adjust"
    EXPIRE = "expire"


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Fast time that moved, of all accounts of a plan."""

    plan: str
    movement: Movement
    ms: int


async def newest_entry(connection: asyncpg.Connection) -> int:
    """Return the number of the journal's newest entry; 0: it is empty."""
    newest: int = await connection.fetchval("SELECT coalesce(max(transfer_id), 0) FROM billing.transfer")
    return newest


async def moved(connection: asyncpg.Connection, *, after: int, up_to: int) -> list[Moved]:
    """Return what the entries with numbers behind `after` moved, `up_to` included, by the present plans.

    Entries are numbered when they are written and seen when they are committed: ask for those that were the
    newest a while ago, by which time all before them are there.
    """
    rows = await connection.fetch(
        """SELECT plan, movement, sum(amount)::bigint AS ms
           FROM (SELECT account_id, amount,
                        CASE WHEN credit_account = 'expired' THEN 'expire'
                             WHEN code = 'admin' OR credit_account = 'revoked' THEN 'adjust'
                             ELSE 'credit' END AS movement
                 FROM billing.transfer
                 WHERE transfer_id > $1 AND transfer_id <= $2 AND unit = 'gpu_ms' AND kind = 'post'
                       AND (credit_account IN ('expired', 'revoked')
                            OR debit_account IN ('issued', 'consumed') AND lot_id IS NOT NULL)) AS entry
                JOIN billing.subscription USING (account_id)
           GROUP BY plan, movement ORDER BY plan, movement""",
        after,
        up_to,
    )
    return [Moved(plan=row["plan"], movement=Movement(row["movement"]), ms=row["ms"]) for row in rows]


@dataclass(frozen=True, kw_only=True)
class PlanAccounts:
    """How many are on a plan."""

    plan: str
    accounts: int
    exhausted: int
    """Of these, without fast time in a period that runs, and without consent to overage."""


async def accounts_by_plan(connection: asyncpg.Connection) -> list[PlanAccounts]:
    """Return how many accounts that are not erased each plan has. Locks nothing."""
    rows = await connection.fetch(
        """SELECT plan, count(*) AS accounts,
                  count(*) FILTER (
                      WHERE period_end > now() AND NOT overage_allowed AND coalesce(available_ms, 0) <= 0)
                      AS exhausted
           FROM billing.subscription
                LEFT JOIN (
                    SELECT account_id,
                           sum(granted_ms - used_ms - held_ms - expired_ms - revoked_ms) AS available_ms
                    FROM billing.grant_lot
                    WHERE NOT closed AND effective_at <= now() AND (expires_at IS NULL OR expires_at > now())
                    GROUP BY account_id) AS funds USING (account_id)
           WHERE ended_at IS NULL GROUP BY plan ORDER BY plan"""
    )
    return [PlanAccounts(**row) for row in rows]
