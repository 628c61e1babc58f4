"""What must hold of the ledger at any moment, under load: each is a query that returns no rows.

The numbers are those of the whole system's list; the ones that need more than the ledger's tables are checked
beside those tables. Constraints guard many of these too: a check that agrees with its constraint is the proof
that the constraint is there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

NOT_ASKED = -1
"""In the place of a count: there was no time left to ask, or to hear the answer."""

# Enough to see what is wrong; a promise broken for every row would fill an answer with all of them.
_FIRST = 3
# The server is to end a query that takes too long, so the driver waits a little longer than it.
_DRIVER_WAITS_LONGER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Invariant:
    """One promise, and the query that finds what breaks it."""

    number: int
    sentence: str
    sql: str


@dataclass(frozen=True, kw_only=True)
class InvariantResult:
    """What came of asking one."""

    number: int
    sentence: str
    violations: int
    """How many rows break it; NOT_ASKED where that is not known."""
    first: tuple[Mapping[str, Any], ...]
    """Up to three of them, as JSON values."""
    took_ms: int


INVARIANTS: tuple[Invariant, ...] = (
    Invariant(
        number=1,
        sentence="A transfer moves a positive amount of one unit between two accounts.",
        sql="""
        SELECT transfer_id, debit_account, credit_account, unit, amount FROM billing.transfer
         WHERE amount <= 0 OR debit_account = credit_account
            OR (unit <> 'gpu_ms') <> (debit_account ~ '^(revenue$|metered/|subscription/)')
            OR (unit <> 'gpu_ms') <> (credit_account ~ '^(revenue$|metered/|subscription/)')""",
    ),
    Invariant(
        number=2,
        sentence="A lot's used and held time equal its sums in the journal.",
        sql="""
        WITH journal AS (
            SELECT entry.lot_id,
                   sum(entry.amount) FILTER (WHERE entry.kind IN ('post', 'post_pending')
                                             AND entry.credit_account = 'consumed') AS posted_ms,
                   sum(entry.amount) FILTER (WHERE entry.debit_account = 'consumed') AS refunded_ms,
                   sum(entry.amount) FILTER (WHERE entry.kind = 'pending'
                                             AND ending.transfer_id IS NULL) AS pending_ms
              FROM billing.transfer AS entry
                   LEFT JOIN billing.transfer AS ending ON ending.pending_id = entry.transfer_id
             WHERE entry.lot_id IS NOT NULL
             GROUP BY entry.lot_id)
        SELECT lot_id, used_ms, held_ms, posted_ms, refunded_ms, pending_ms
          FROM billing.grant_lot LEFT JOIN journal USING (lot_id)
         WHERE used_ms <> COALESCE(posted_ms, 0) - COALESCE(refunded_ms, 0)
            OR held_ms <> COALESCE(pending_ms, 0)""",
    ),
    Invariant(
        number=2,
        sentence="A metered account's posted and held money equal its sums in the journal.",
        sql="""
        WITH journal AS (
            SELECT entry.account_id, hold.period_start, entry.unit AS currency,
                   sum(CASE WHEN entry.credit_account = 'revenue' THEN entry.amount ELSE -entry.amount END)
                       FILTER (WHERE entry.kind IN ('post', 'post_pending')) AS posted_micros,
                   sum(entry.amount) FILTER (WHERE entry.kind = 'pending'
                                             AND ending.transfer_id IS NULL) AS held_micros
              FROM billing.transfer AS entry
                   LEFT JOIN billing.hold ON hold.attempt_id = entry.attempt_id
                   LEFT JOIN billing.transfer AS ending ON ending.pending_id = entry.transfer_id
             WHERE entry.debit_account LIKE 'metered/%' OR entry.credit_account LIKE 'metered/%'
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
            SELECT hold_id, sum(leg.held_ms) AS held_ms, count(*) AS legs, count(ending.posted) AS ended,
                   count(*) FILTER (WHERE ending.posted) AS posted,
                   bool_and(pending.kind = 'pending' AND pending.lot_id IS NOT DISTINCT FROM leg.lot_id
                            AND (leg.lot_id IS NULL OR pending.amount = leg.held_ms)) AS pending
              FROM billing.hold_leg AS leg
                   JOIN billing.transfer AS pending ON pending.transfer_id = leg.pending_id
                   LEFT JOIN (SELECT pending_id, bool_or(kind = 'post_pending') AS posted
                                FROM billing.transfer WHERE pending_id IS NOT NULL
                               GROUP BY pending_id) AS ending ON ending.pending_id = leg.pending_id
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
         WHERE credit_account = 'consumed' AND (placed_at < effective_at OR placed_at >= expires_at)""",
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
                   < (later.priority, COALESCE(later.expires_at, 'infinity'), later.lot_id)),
        moments AS (
            SELECT change.lot_id, change.transfer_id, false AS passed_over,
                   CASE WHEN change.kind = 'post_pending' THEN pending.amount - change.amount
                        WHEN change.kind IN ('void_pending', 'expire_pending') THEN change.amount
                        WHEN change.debit_account = 'lot/' || change.lot_id THEN -change.amount
                        ELSE change.amount END AS change_ms
              FROM billing.transfer AS change
                   LEFT JOIN billing.transfer AS pending ON pending.transfer_id = change.pending_id
             WHERE change.lot_id IN (SELECT lot_id FROM passed_over)
            UNION ALL
            SELECT lot_id, transfer_id, true, 0 FROM passed_over),
        history AS (
            SELECT *, sum(change_ms) OVER (PARTITION BY lot_id ORDER BY transfer_id) AS left_ms FROM moments)
        SELECT transfer_id, lot_id AS lot_with_time, left_ms FROM history
         WHERE passed_over AND left_ms > 0""",
    ),
    Invariant(
        number=11,
        sentence="What is given back of a charge is no more than it was, in time and in money.",
        sql="""
        SELECT attempt_id, billed_ms, amount_micros, sum(refunded_ms) AS refunded_ms,
               sum(refunded_micros) AS refunded_micros
          FROM billing.refund LEFT JOIN billing.settlement USING (attempt_id)
         GROUP BY attempt_id, billed_ms, amount_micros
        HAVING (sum(refunded_ms) <= billed_ms AND sum(refunded_micros) <= amount_micros) IS NOT TRUE""",
    ),
    Invariant(
        number=11,
        sentence="Refunds say what the journal gave back, and it went to the lots that were charged.",
        sql="""
        WITH moved AS (
            SELECT attempt_id,
                   sum(amount) FILTER (WHERE debit_account = 'consumed') AS ms,
                   sum(amount) FILTER (WHERE debit_account = 'revenue') AS micros
              FROM billing.transfer WHERE code = 'refund' GROUP BY attempt_id),
        told AS (
            SELECT attempt_id, sum(refunded_ms) AS ms, sum(refunded_micros) AS micros
              FROM billing.refund GROUP BY attempt_id)
        SELECT attempt_id, NULL AS from_or_to, moved.ms AS moved_ms, told.ms AS told_ms,
               moved.micros AS moved_micros, told.micros AS told_micros
          FROM moved FULL JOIN told USING (attempt_id)
         WHERE COALESCE(moved.ms, 0) <> COALESCE(told.ms, 0)
            OR COALESCE(moved.micros, 0) <> COALESCE(told.micros, 0)
        UNION ALL
        SELECT attempt_id, side, back, there, NULL, NULL FROM (
            SELECT attempt_id, CASE WHEN code = 'refund' THEN credit_account ELSE debit_account END AS side,
                   sum(amount) FILTER (WHERE code = 'refund') AS back,
                   COALESCE(sum(amount) FILTER (WHERE code <> 'refund'), 0) AS there
              FROM billing.transfer
             WHERE (code = 'refund' AND debit_account IN ('consumed', 'revenue'))
                OR (kind IN ('post', 'post_pending') AND credit_account IN ('consumed', 'revenue')
                    AND attempt_id IS NOT NULL)
             GROUP BY 1, 2) AS sides
         WHERE back > there""",
    ),
    Invariant(
        number=12,
        sentence="Nothing is metered without consent, nor above the spend cap of its dispatch.",
        sql="""
        WITH committed AS (
            SELECT change.transfer_id, change.kind, change.code, overage_allowed, spend_cap_micros, hold_id,
                   sum(CASE WHEN change.kind = 'post_pending' THEN change.amount - pending.amount
                            WHEN change.kind IN ('void_pending', 'expire_pending') THEN -change.amount
                            WHEN change.debit_account = 'revenue' THEN -change.amount
                            ELSE change.amount END)
                       OVER (PARTITION BY change.account_id, period_start, change.unit
                             ORDER BY change.transfer_id) AS committed_micros
              FROM billing.transfer AS change
                   LEFT JOIN billing.transfer AS pending ON pending.transfer_id = change.pending_id
                   LEFT JOIN billing.hold ON hold.attempt_id = change.attempt_id
             WHERE change.debit_account LIKE 'metered/%' OR change.credit_account LIKE 'metered/%')
        SELECT transfer_id, spend_cap_micros, committed_micros FROM committed
         WHERE hold_id IS NULL OR NOT overage_allowed
            OR (code IN ('hold', 'overrun') AND committed_micros > NULLIF(spend_cap_micros, 0))""",
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
        SELECT attempt_id, measured_ms, charge.multiplier_bp, hold.multiplier_bp AS multiplier_at_dispatch,
               due_ms, billed_ms, unpaid_ms
          FROM billing.settlement AS charge LEFT JOIN billing.hold USING (attempt_id)
         WHERE due_ms <> CASE tier WHEN 'fast' THEN ceil(measured_ms * charge.multiplier_bp / 10000.0)
                                   ELSE 0 END
            OR charge.multiplier_bp <> hold.multiplier_bp
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
             WHERE attempt_id IS NOT NULL AND kind IN ('post', 'post_pending') AND code <> 'refund'
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
        sentence="Every transfer that somebody made, and every plan version, has its audit event.",
        sql="""
        SELECT 'transfer ' || transfer_id AS what
          FROM billing.transfer LEFT JOIN billing.audit_event USING (audit_id)
         WHERE (code IN ('admin', 'promo', 'purchase', 'refund') OR audit_id IS NOT NULL)
           AND (target = 'accounts/' || account_id
                OR starts_with(target, 'accounts/' || account_id || '/')) IS NOT TRUE
        UNION ALL
        SELECT 'plan ' || plan || ' version ' || version FROM billing.plan_version
         WHERE NOT EXISTS (
                   SELECT FROM billing.audit_event WHERE audit_event.audit_id = plan_version.audit_id
                      AND target = 'plans/' || plan)""",
    ),
)


async def results(
    connection: asyncpg.Connection, within_ms: int, invariants: Iterable[Invariant] = INVARIANTS
) -> list[InvariantResult]:
    """Ask every invariant of one moment of the database, and return the answers in their order.

    What other transactions do meanwhile is not seen, so a service that runs gives no false alarm; inside a
    transaction of the caller's that is as its isolation has it. All of it takes `within_ms`: a query that has
    not ended by then is ended, and it and those after it are NOT_ASKED. Locks nothing.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + within_ms / 1000
    answers = []
    async with one_moment(connection):
        # Most queries are costly by the planner's guess and done in a millisecond: compiling takes longer.
        await connection.execute("SET LOCAL jit = off")
        for invariant in invariants:
            begun_s = loop.time()
            violations, first = await _ask(connection, invariant, round((until_s - begun_s) * 1000))
            answers.append(
                InvariantResult(
                    number=invariant.number,
                    sentence=invariant.sentence,
                    violations=violations,
                    first=first,
                    took_ms=round((loop.time() - begun_s) * 1000),
                )
            )
    return answers


async def check(
    connection: asyncpg.Connection, *, within_ms: int = 60_000, invariants: Iterable[Invariant] = INVARIANTS
) -> list[InvariantResult]:
    """Return what `results` does of the invariants that do not hold or were not asked: none is hoped for."""
    return [answer for answer in await results(connection, within_ms, invariants) if answer.violations != 0]


@asynccontextmanager
async def one_moment(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Read one moment of the database while the context is open, or what the caller's transaction sees."""
    transaction = (
        connection.transaction()
        if connection.is_in_transaction()
        else connection.transaction(isolation="repeatable_read", readonly=True)
    )
    await transaction.start()
    try:
        yield
    finally:
        # Nothing was written; and what was set for these queries is as it was for the caller.
        await transaction.rollback()


async def _ask(
    connection: asyncpg.Connection, invariant: Invariant, left_ms: int
) -> tuple[int, tuple[Mapping[str, Any], ...]]:
    if left_ms <= 0:
        return NOT_ASKED, ()
    try:
        # A savepoint: a query that is ended ends the transaction around it, and the moment with it.
        async with connection.transaction():
            await connection.execute(f"SET LOCAL statement_timeout = {left_ms}")
            rows = await connection.fetch(
                f"""SELECT count(*) OVER () AS violations, to_jsonb(broken)::text AS first
                      FROM ({invariant.sql}) AS broken LIMIT {_FIRST}""",  # noqa: S608
                timeout=left_ms / 1000 + _DRIVER_WAITS_LONGER_S,
            )
    except asyncpg.QueryCanceledError:
        return NOT_ASKED, ()
    return rows[0]["violations"] if rows else 0, tuple(json.loads(row["first"]) for row in rows)
