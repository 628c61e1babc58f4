"""What must hold of the ledger at any moment, under load: each is a query that returns no rows.

The numbers are those of the whole system's list; the ones that need more than the ledger's tables are checked
beside those tables. Constraints guard many of these too: a check that agrees with its constraint is the proof
that the constraint is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg


@dataclass(frozen=True, kw_only=True)
class Invariant:
    """One promise, and the query that finds what breaks it."""

    number: int
    sentence: str
    sql: str


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One row that breaks a promise."""

    number: int
    sentence: str
    row: Mapping[str, Any]


INVARIANTS: tuple[Invariant, ...] = (
    Invariant(
        number=1,
        sentence="A transfer moves a positive amount of one unit between two accounts.",
        sql="""
        SELECT transfer_id, debit_account, credit_account, unit, amount FROM billing.transfer
         WHERE amount <= 0 OR debit_account = credit_account
            OR (unit <> 'gpu_ms') <> (credit_account = 'revenue')
            OR (unit <> 'gpu_ms') <> (debit_account LIKE 'metered/%')""",
    ),
    Invariant(
        number=2,
        sentence="A lot's used and held time equal its sums in the journal.",
        sql="""
        WITH journal AS (
            SELECT lot_id,
                   sum(amount) FILTER (WHERE kind IN ('post', 'post_pending')) AS used_ms,
                   sum(amount) FILTER (WHERE kind = 'pending' AND NOT EXISTS (
                       SELECT FROM billing.transfer AS ending
                        WHERE ending.pending_id = transfer.transfer_id)) AS held_ms
              FROM billing.transfer
             WHERE lot_id IS NOT NULL AND credit_account = 'consumed'
             GROUP BY lot_id)
        SELECT lot_id, lot.used_ms, lot.held_ms, journal.used_ms AS posted_ms, journal.held_ms AS pending_ms
          FROM billing.grant_lot AS lot LEFT JOIN journal USING (lot_id)
         WHERE lot.used_ms <> COALESCE(journal.used_ms, 0) OR lot.held_ms <> COALESCE(journal.held_ms, 0)""",
    ),
    Invariant(
        number=2,
        sentence="A metered account's posted and held money equal its sums in the journal.",
        sql="""
        WITH journal AS (
            SELECT transfer.account_id, hold.period_start, transfer.unit AS currency,
                   sum(amount) FILTER (WHERE kind IN ('post', 'post_pending')) AS posted_micros,
                   sum(amount) FILTER (WHERE kind = 'pending' AND NOT EXISTS (
                       SELECT FROM billing.transfer AS ending
                        WHERE ending.pending_id = transfer.transfer_id)) AS held_micros
              FROM billing.transfer LEFT JOIN billing.hold USING (attempt_id)
             WHERE credit_account = 'revenue'
             GROUP BY 1, 2, 3)
        SELECT account_id, period_start, currency, metered.posted_micros, metered.held_micros,
               journal.posted_micros AS journal_posted, journal.held_micros AS journal_held
          FROM billing.metered_account AS metered
               FULL JOIN journal USING (account_id, period_start, currency)
         WHERE COALESCE(metered.posted_micros, 0) <> COALESCE(journal.posted_micros, 0)
            OR COALESCE(metered.held_micros, 0) <> COALESCE(journal.held_micros, 0)""",
    ),
    Invariant(
        number=3,
        sentence="No lot is overdrawn.",
        sql="""
        SELECT lot_id, granted_ms, used_ms, held_ms, expired_ms, revoked_ms FROM billing.grant_lot
         WHERE used_ms + held_ms + expired_ms + revoked_ms > granted_ms
            OR least(granted_ms, used_ms, held_ms, expired_ms, revoked_ms) < 0""",
    ),
    Invariant(
        number=4,
        sentence="No pending is resolved twice.",
        sql="""
        SELECT pending_id, count(*) FROM billing.transfer
         WHERE pending_id IS NOT NULL GROUP BY pending_id HAVING count(*) > 1""",
    ),
    Invariant(
        number=5,
        sentence="A resolution is within its pending, of the same accounts, job and attempt.",
        sql="""
        SELECT ending.transfer_id, ending.pending_id
          FROM billing.transfer AS ending
               JOIN billing.transfer AS pending ON pending.transfer_id = ending.pending_id
         WHERE pending.kind <> 'pending'
            OR ending.amount > pending.amount
            OR (ending.kind <> 'post_pending' AND ending.amount <> pending.amount)
            OR (ending.account_id, ending.job_id, ending.attempt_id, ending.debit_account,
                ending.credit_account, ending.unit, ending.lot_id)
               IS DISTINCT FROM
               (pending.account_id, pending.job_id, pending.attempt_id, pending.debit_account,
                pending.credit_account, pending.unit, pending.lot_id)""",
    ),
    Invariant(
        number=6,
        sentence="A hold's state agrees with its legs, their ends in the journal, and its settlement.",
        sql="""
        WITH legs AS (
            SELECT hold_id, sum(leg.held_ms) AS held_ms, count(*) AS legs, count(ending.transfer_id) AS ended,
                   count(*) FILTER (WHERE ending.kind = 'post_pending') AS posted,
                   bool_and(pending.kind = 'pending' AND pending.lot_id IS NOT DISTINCT FROM leg.lot_id
                            AND (leg.lot_id IS NULL OR pending.amount = leg.held_ms)) AS pending
              FROM billing.hold_leg AS leg
                   JOIN billing.transfer AS pending ON pending.transfer_id = leg.pending_id
                   LEFT JOIN billing.transfer AS ending ON ending.pending_id = leg.pending_id
             GROUP BY hold_id)
        SELECT hold_id, attempt_id, hold.state
          FROM billing.hold LEFT JOIN legs USING (hold_id) LEFT JOIN billing.settlement USING (attempt_id)
         WHERE (pending AND held_ms = lots_ms + metered_ms
                AND CASE hold.state
                    WHEN 'open' THEN ended = 0 AND ending IS NULL
                    WHEN 'posted' THEN ended = legs AND ending = 'post'
                    ELSE ended = legs AND posted = 0 AND ending = 'void' END) IS NOT TRUE
        UNION ALL
        SELECT NULL, attempt_id, 'a pending that belongs to no hold' FROM billing.transfer
         WHERE kind = 'pending' AND NOT EXISTS (
                   SELECT FROM billing.hold_leg WHERE hold_leg.pending_id = transfer.transfer_id)""",
    ),
    Invariant(
        number=7,
        sentence="Granted, expired and revoked time of a lot equals its sums in the journal: lots close.",
        sql="""
        WITH journal AS (
            SELECT lot_id,
                   sum(amount) FILTER (WHERE debit_account = 'issued') AS granted_ms,
                   sum(amount) FILTER (WHERE credit_account = 'expired') AS expired_ms,
                   sum(amount) FILTER (WHERE credit_account = 'revoked') AS revoked_ms
              FROM billing.transfer WHERE lot_id IS NOT NULL GROUP BY lot_id)
        SELECT lot_id, lot.granted_ms, lot.expired_ms, lot.revoked_ms, journal.granted_ms AS issued_ms
          FROM billing.grant_lot AS lot LEFT JOIN journal USING (lot_id)
         WHERE lot.granted_ms <> COALESCE(journal.granted_ms, 0)
            OR lot.expired_ms <> COALESCE(journal.expired_ms, 0)
            OR lot.revoked_ms <> COALESCE(journal.revoked_ms, 0)""",
    ),
    Invariant(
        number=8,
        sentence="An account has one plan lot for its period, and its periods do not overlap.",
        sql="""
        SELECT first.account_id, first.lot_id, second.lot_id AS overlapping
          FROM billing.grant_lot AS first
               JOIN billing.grant_lot AS second
                 ON second.account_id = first.account_id AND second.lot_id > first.lot_id
                AND second.effective_at < first.expires_at AND first.effective_at < second.expires_at
         WHERE first.source = 'plan' AND second.source = 'plan'
        UNION ALL
        SELECT account_id, NULL, NULL FROM billing.subscription
         WHERE NOT EXISTS (
                   SELECT FROM billing.grant_lot AS lot
                    WHERE lot.account_id = subscription.account_id AND lot.source = 'plan'
                      AND lot.effective_at = subscription.period_start
                      AND lot.expires_at = subscription.period_end)""",
    ),
    Invariant(
        number=9,
        sentence="A lot is used only by attempts that were dispatched while it lived.",
        sql="""
        SELECT transfer_id, lot_id, placed_at, effective_at, expires_at
          FROM billing.transfer
               JOIN billing.hold USING (attempt_id)
               JOIN billing.grant_lot AS lot USING (lot_id)
         WHERE placed_at < effective_at OR placed_at >= expires_at""",
    ),
    Invariant(
        number=10,
        sentence="Nothing was taken from a later-burning lot, or metered, while an earlier one had time.",
        sql="""
        WITH taking AS (
            SELECT transfer_id, transfer.account_id, lot_id, placed_at
              FROM billing.transfer JOIN billing.hold USING (attempt_id)
             WHERE code IN ('hold', 'overrun')),
        passed_over AS (
            SELECT taking.transfer_id, earlier.lot_id
              FROM taking
                   JOIN billing.grant_lot AS earlier
                     ON earlier.account_id = taking.account_id
                    AND earlier.effective_at <= placed_at
                    AND (earlier.expires_at IS NULL OR earlier.expires_at > placed_at)
                   LEFT JOIN billing.grant_lot AS later ON later.lot_id = taking.lot_id
             WHERE later.lot_id IS NULL
                OR (earlier.priority, COALESCE(earlier.expires_at, 'infinity'), earlier.lot_id)
                   < (later.priority, COALESCE(later.expires_at, 'infinity'), later.lot_id))
        SELECT passed_over.transfer_id, passed_over.lot_id AS lot_with_time, left_ms
          FROM passed_over CROSS JOIN LATERAL (
                   SELECT sum(CASE WHEN change.kind = 'post_pending' THEN pending.amount - change.amount
                                   WHEN change.kind IN ('void_pending', 'expire_pending') THEN change.amount
                                   WHEN change.debit_account = 'issued' THEN change.amount
                                   ELSE -change.amount END) AS left_ms
                     FROM billing.transfer AS change
                          LEFT JOIN billing.transfer AS pending
                                 ON pending.transfer_id = change.pending_id
                    WHERE change.lot_id = passed_over.lot_id
                      AND change.transfer_id < passed_over.transfer_id) AS at_that_moment
         WHERE left_ms > 0""",
    ),
    Invariant(
        number=12,
        sentence="Nothing is metered without consent, nor above the spend cap of its dispatch.",
        sql="""
        WITH committed AS (
            SELECT change.transfer_id, change.kind, overage_allowed, spend_cap_micros, hold_id,
                   sum(CASE WHEN change.kind = 'post_pending' THEN change.amount - pending.amount
                            WHEN change.kind IN ('void_pending', 'expire_pending') THEN -change.amount
                            ELSE change.amount END)
                       OVER (PARTITION BY change.account_id, period_start, change.unit
                             ORDER BY change.transfer_id) AS committed_micros
              FROM billing.transfer AS change
                   LEFT JOIN billing.transfer AS pending ON pending.transfer_id = change.pending_id
                   LEFT JOIN billing.hold ON hold.attempt_id = change.attempt_id
             WHERE change.credit_account = 'revenue')
        SELECT transfer_id, spend_cap_micros, committed_micros FROM committed
         WHERE hold_id IS NULL OR NOT overage_allowed
            OR (kind IN ('pending', 'post') AND committed_micros > NULLIF(spend_cap_micros, 0))""",
    ),
    Invariant(
        number=13,
        sentence="A relax attempt has no fast transfer, a fast attempt no relax row.",
        sql="""
        SELECT transfer_id, attempt_id, code, tier
          FROM billing.transfer JOIN billing.settlement USING (attempt_id)
         WHERE (tier = 'relax' AND code NOT IN ('relax', 'absorbed')) OR (tier = 'fast' AND code = 'relax')
        UNION ALL
        SELECT transfer_id, attempt_id, code, NULL
          FROM billing.transfer JOIN billing.hold USING (attempt_id) WHERE code = 'relax'""",
    ),
    Invariant(
        number=16,
        sentence="No job is charged for two attempts.",
        sql="""
        SELECT job_id, count(DISTINCT attempt_id) AS attempts
          FROM billing.transfer
         WHERE kind IN ('post', 'post_pending') AND job_id IS NOT NULL
           AND credit_account IN ('consumed', 'consumed_relax', 'revenue')
         GROUP BY job_id HAVING count(DISTINCT attempt_id) > 1
        UNION ALL
        SELECT job_id, count(*) FROM billing.settlement WHERE ending = 'post'
         GROUP BY job_id HAVING count(*) > 1""",
    ),
    Invariant(
        number=18,
        sentence="An attempt is billed ceil(measured * bp / 10000), or less where nobody could pay.",
        sql="""
        SELECT attempt_id, measured_ms, multiplier_bp, due_ms, billed_ms, unpaid_ms FROM billing.settlement
         WHERE due_ms <> CASE WHEN tier = 'fast' THEN ceil(measured_ms * multiplier_bp / 10000.0) ELSE 0 END
            OR billed_ms < 0 OR billed_ms > due_ms
            OR (billed_ms < due_ms) <> (unpaid_ms > 0)""",
    ),
    Invariant(
        number=18,
        sentence="What a settlement says was billed, charged and absorbed is what the journal moved.",
        sql="""
        WITH journal AS (
            SELECT attempt_id,
                   sum(amount) FILTER (WHERE credit_account = 'consumed') AS billed_ms,
                   sum(amount) FILTER (WHERE credit_account = 'consumed_relax') AS relax_ms,
                   sum(amount) FILTER (WHERE credit_account = 'absorbed') AS absorbed_ms,
                   sum(amount) FILTER (WHERE credit_account = 'revenue') AS amount_micros
              FROM billing.transfer
             WHERE attempt_id IS NOT NULL AND kind IN ('post', 'post_pending')
             GROUP BY attempt_id)
        SELECT attempt_id, journal.billed_ms AS journal_billed, settlement.billed_ms
          FROM billing.settlement FULL JOIN journal USING (attempt_id)
         WHERE settlement.billed_ms IS DISTINCT FROM COALESCE(journal.billed_ms, 0)
            OR settlement.absorbed_ms <> COALESCE(journal.absorbed_ms, 0)
            OR settlement.amount_micros <> COALESCE(journal.amount_micros, 0)
            OR CASE WHEN tier = 'relax' THEN measured_ms ELSE 0 END <> COALESCE(journal.relax_ms, 0)""",
    ),
    Invariant(
        number=23,
        sentence="Every transfer of an admin and every plan version has its audit event.",
        sql="""
        SELECT 'transfer ' || transfer_id AS what FROM billing.transfer
         WHERE code = 'admin' AND NOT EXISTS (
                   SELECT FROM billing.audit_event WHERE audit_event.audit_id = transfer.audit_id
                      AND target = 'accounts/' || account_id)
        UNION ALL
        SELECT 'plan ' || plan || ' version ' || version FROM billing.plan_version
         WHERE NOT EXISTS (
                   SELECT FROM billing.audit_event WHERE audit_event.audit_id = plan_version.audit_id
                      AND target = 'plans/' || plan)""",
    ),
)


async def check(connection: asyncpg.Connection) -> list[Violation]:
    """Return every row that breaks a promise of the ledger; none is the answer hoped for. Locks nothing.

    Each query sees one moment of the database, so what other transactions do meanwhile is no violation.
    """
    return [
        Violation(number=invariant.number, sentence=invariant.sentence, row=dict(row))
        for invariant in INVARIANTS
        for row in await connection.fetch(invariant.sql)
    ]
