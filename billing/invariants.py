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


# Every period of every account, and the plan that it began with: the last change before it decides, since
# what is scheduled is done by then. An account that never changed its plan has the one it began with.
_PERIODS = """
        change AS (
            SELECT substr(target, 10) AS account_id, audit_id, at, before ->> 'plan' AS from_plan,
                   CASE WHEN action = 'UndoPlanChange' AND (after ->> 'effective_at')::timestamptz = at
                        THEN COALESCE(before ->> 'scheduled_plan', after ->> 'plan')
                        ELSE after ->> 'plan' END AS to_plan
              FROM billing.audit_event WHERE action IN ('ChangePlan', 'UndoPlanChange')),
        first AS (
            SELECT DISTINCT ON (account_id) account_id, from_plan FROM change ORDER BY account_id, audit_id),
        last AS (
            SELECT DISTINCT ON (lot_id) lot_id, to_plan
              FROM billing.grant_lot JOIN change USING (account_id)
             WHERE source = 'plan' AND change.at < effective_at ORDER BY lot_id, audit_id DESC),
        period AS (
            SELECT lot_id, account_id, effective_at AS period_start, expires_at AS period_end, granted_ms,
                   COALESCE(to_plan, from_plan, subscription.plan) AS plan,
                   subscription.period_start = effective_at AS present,
                   subscription.plan AS present_plan, subscription.version AS present_version
              FROM billing.grant_lot
                   LEFT JOIN billing.subscription USING (account_id)
                   LEFT JOIN last USING (lot_id)
                   LEFT JOIN first USING (account_id)
             WHERE source = 'plan')"""
# Which versions a period can have had, its own time cannot say to the second: the clock of who made a version
# and that of who touched the account differ, and who waits for a lock is behind. So those of the months
# beside it count too.
_BESIDE = "interval '1 month'"

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
                   count(*) FILTER (WHERE ending.expired) AS expired,
                   bool_and(pending.kind = 'pending' AND pending.lot_id IS NOT DISTINCT FROM leg.lot_id
                            AND (leg.lot_id IS NULL OR pending.amount = leg.held_ms)) AS pending
              FROM billing.hold_leg AS leg
                   JOIN billing.transfer AS pending ON pending.transfer_id = leg.pending_id
                   LEFT JOIN (SELECT pending_id, bool_or(kind = 'post_pending') AS posted,
                                     bool_or(kind = 'expire_pending') AS expired
                                FROM billing.transfer WHERE pending_id IS NOT NULL
                               GROUP BY pending_id) AS ending ON ending.pending_id = leg.pending_id
             GROUP BY hold_id)
        SELECT hold_id, attempt_id, hold.state
          FROM billing.hold LEFT JOIN legs USING (hold_id) LEFT JOIN billing.settlement USING (attempt_id)
         WHERE (pending AND held_ms = lots_ms + metered_ms
                AND CASE hold.state
                    WHEN 'open' THEN ended = 0 AND ending IS NULL
                    WHEN 'expired' THEN expired = legs
                    WHEN 'posted' THEN ended = legs AND expired = 0 AND ending = 'post'
                    ELSE ended = legs AND posted + expired = 0 AND ending = 'void' END) IS NOT TRUE
        UNION ALL
        SELECT NULL, attempt_id, 'a pending that belongs to no hold' FROM billing.transfer
         WHERE kind = 'pending' AND NOT EXISTS (
                   SELECT FROM billing.hold_leg WHERE hold_leg.pending_id = transfer.transfer_id)""",
    ),
    Invariant(
        number=7,
        sentence="Granted, expired and revoked time of a lot equals its sums in the journal: lots close. "
        "What was granted is one entry, for the reason that the lot's source names.",
        sql="""
        WITH journal AS (
            SELECT lot_id,
                   sum(amount) FILTER (WHERE debit_account = 'issued') AS granted_ms,
                   count(*) FILTER (WHERE debit_account = 'issued') AS issues,
                   min(code) FILTER (WHERE debit_account = 'issued') AS code,
                   sum(amount) FILTER (WHERE credit_account = 'expired') AS expired_ms,
                   sum(amount) FILTER (WHERE credit_account = 'revoked') AS revoked_ms
              FROM billing.transfer WHERE lot_id IS NOT NULL GROUP BY lot_id)
        SELECT lot_id, source, lot.granted_ms, lot.expired_ms, lot.revoked_ms,
               journal.granted_ms AS issued_ms, issues, code
          FROM billing.grant_lot AS lot LEFT JOIN journal USING (lot_id)
         WHERE lot.granted_ms <> COALESCE(journal.granted_ms, 0)
            OR lot.expired_ms <> COALESCE(journal.expired_ms, 0)
            OR lot.revoked_ms <> COALESCE(journal.revoked_ms, 0)
            OR issues > 1
            OR code <> CASE source WHEN 'plan' THEN 'period' WHEN 'proration' THEN 'plan_change'
                                   ELSE source END""",
    ),
    Invariant(
        number=7,
        sentence="What rolls over into a period is what rolled out of the lots that ended as it began; after "
        "periods of which nothing was granted it is what one of them leaves unused.",
        sql="""
        WITH gone AS (
            SELECT lot.account_id, expires_at AS at, sum(amount) AS ms
              FROM billing.transfer JOIN billing.grant_lot AS lot USING (lot_id)
             WHERE code = 'rollover' AND credit_account = 'expired' GROUP BY 1, 2),
        came AS (
            SELECT account_id, effective_at AS at, sum(granted_ms) AS ms
              FROM billing.grant_lot WHERE source = 'rollover' GROUP BY 1, 2)
        SELECT account_id, at, gone.ms AS gone_ms, came.ms AS came_ms
          FROM gone FULL JOIN came USING (account_id, at)
         WHERE gone.ms IS DISTINCT FROM came.ms
           AND (gone.ms IS NULL
                AND NOT EXISTS (SELECT FROM billing.grant_lot AS before
                                 WHERE before.account_id = came.account_id AND source = 'plan'
                                   AND expires_at = came.at)
                AND EXISTS (SELECT FROM billing.plan_version
                             WHERE came.ms = LEAST(rollover_ms, quota_ms))) IS NOT TRUE""",
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
        number=8,
        sentence="A period begins with the quota of the plan that its account then had, by a version of "
        "about then.",
        sql=f"""
        WITH {_PERIODS},
        version AS (
            SELECT plan, quota_ms, created_at,
                   COALESCE(min(created_at) OVER (PARTITION BY plan ORDER BY version
                                                  ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING),
                            'infinity') AS replaced_at
              FROM billing.plan_version)
        SELECT lot_id, account_id, plan, granted_ms FROM period
         WHERE NOT EXISTS (
                   SELECT FROM version
                    WHERE version.plan = period.plan AND quota_ms = granted_ms
                      AND created_at < period_end + {_BESIDE}
                      AND replaced_at >= period_start - {_BESIDE})""",  # noqa: S608
    ),
    Invariant(
        number=8,
        sentence="What plans gave for a period, less what they took back, is the quota in force, or at most "
        "a larger one that was in force before it in that period.",
        # What changes of plan gave is apart, and so is by how much they raised the quota in force. They
        # divide a period into spans of one plan each. Where a quota falls in a span, what is used stays.
        sql=f"""
        WITH {_PERIODS},
        by_versions AS (
            SELECT lot.account_id, effective_at AS period_start,
                   sum(CASE credit_account WHEN 'revoked' THEN -amount ELSE amount END) AS ms
              FROM billing.transfer JOIN billing.grant_lot AS lot USING (lot_id)
             WHERE code = 'plan_change' AND audit_id IS NULL GROUP BY 1, 2),
        span AS (
            SELECT change.account_id, change.period_start, change.change_id, undoes,
                   old.plan, old.version, old.quota_ms, new.quota_ms - old.quota_ms AS raised_ms,
                   to_plan, to_version, lag(to_version) OVER changes AS first_version
              FROM billing.plan_change AS change
                   JOIN period USING (account_id, period_start)
                   JOIN billing.plan_version AS old
                     ON old.plan = change.from_plan AND old.version = change.from_version
                   JOIN billing.plan_version AS new
                     ON new.plan = change.to_plan AND new.version = change.to_version
             -- What is taken back after its period changes nothing of that.
             WHERE change.at < period_end
            WINDOW changes AS (PARTITION BY change.account_id, change.period_start ORDER BY change_id)),
        spans AS (
            SELECT account_id, period_start, sum(raised_ms) AS apart_ms, count(undoes) AS undone,
                   (array_agg(to_plan ORDER BY change_id DESC))[1] AS plan,
                   (array_agg(to_version ORDER BY change_id DESC))[1] AS version,
                   sum((SELECT max(within.quota_ms) FROM billing.plan_version AS within
                         WHERE within.plan = span.plan AND within.version <= span.version
                           AND within.version >= COALESCE(first_version, (
                               SELECT max(begun.version) FROM billing.plan_version AS begun
                                WHERE begun.plan = span.plan
                                  AND begun.created_at < span.period_start - {_BESIDE}), 1))
                       - span.quota_ms) AS fallen_ms
              FROM span GROUP BY account_id, period_start),
        given AS (
            SELECT account_id, period_start, period_end, present, spans.version AS first_version, fallen_ms,
                   COALESCE(undone, 0) AS undone,
                   granted_ms + COALESCE(by_versions.ms, 0) + COALESCE(apart_ms, 0) AS given_ms,
                   COALESCE(spans.plan, CASE WHEN present THEN present_plan ELSE period.plan END) AS plan,
                   CASE WHEN present THEN present_version END AS last_version, quota_ms
              FROM period
                   LEFT JOIN by_versions USING (account_id, period_start)
                   LEFT JOIN spans USING (account_id, period_start)
                   LEFT JOIN billing.plan_version
                          ON present AND plan_version.plan = present_plan
                         AND plan_version.version = present_version
             WHERE present OR by_versions.ms IS NOT NULL OR spans.plan IS NOT NULL)
        SELECT account_id, period_start, given_ms, quota_ms FROM given
         -- What was used of a change that is taken back counts from then on for a quota.
         WHERE (given_ms < quota_ms AND undone = 0)
            OR (given_ms <= quota_ms) IS NOT TRUE
               AND given_ms > COALESCE(fallen_ms, 0) + (
                   SELECT max(within.quota_ms) FROM billing.plan_version AS within
                    WHERE within.plan = given.plan AND within.created_at < period_end + {_BESIDE}
                      AND (last_version IS NULL OR within.version <= last_version)
                      AND within.version >= COALESCE(first_version, (
                          SELECT max(begun.version) FROM billing.plan_version AS begun
                           WHERE begun.plan = given.plan
                             AND begun.created_at < period_start - {_BESIDE}), 1))""",  # noqa: S608
    ),
    Invariant(
        number=8,
        sentence="A change of plan at once gives and costs the share of the rest of its period, as of when "
        "it was shown.",
        sql="""
        SELECT change_id, change.account_id, change.granted_ms, credit_micros, charge_micros
          FROM billing.plan_change AS change
               JOIN billing.plan_version AS old ON old.plan = from_plan AND old.version = from_version
               JOIN billing.plan_version AS new ON new.plan = to_plan AND new.version = to_version
               JOIN billing.audit_event AS deed ON deed.audit_id = change.audit_id
               LEFT JOIN billing.grant_lot AS lot
                 ON lot.account_id = change.account_id AND source = 'plan' AND effective_at = period_start
               CROSS JOIN LATERAL (
                   SELECT (after ->> 'effective_at')::timestamptz AS shown_at) AS shown
               CROSS JOIN LATERAL (
                   SELECT extract(epoch FROM expires_at - shown_at) * 1000000 AS left_us,
                          NULLIF(extract(epoch FROM expires_at - effective_at) * 1000000, 0) AS of_us) AS us
         WHERE undoes IS NULL
           AND (shown_at BETWEEN change.at - interval '10 minutes' AND change.at
                AND change.granted_ms = div((new.quota_ms - old.quota_ms) * left_us + of_us - 1, of_us)
                AND -credit_micros = div(old.price_micros * left_us + of_us - 1, of_us)
                AND charge_micros = div(new.price_micros * left_us + of_us - 1, of_us)) IS NOT TRUE""",
    ),
    Invariant(
        number=9,
        sentence="A lot is used only by attempts that were dispatched while it lived.",
        sql="""
        SELECT transfer_id, lot_id, placed_at, effective_at, expires_at
          FROM billing.transfer
               JOIN billing.hold USING (attempt_id)
               JOIN billing.grant_lot AS lot USING (lot_id)
         WHERE credit_account = 'consumed' AND (placed_at < effective_at OR placed_at >= expires_at)
           -- A refund gives what had ended as a lot of its own, and is taken back from that.
           AND (code <> 'refund_undo' OR transfer.at < effective_at OR transfer.at >= expires_at)""",
    ),
    Invariant(
        number=10,
        sentence="Nothing was taken from a later-burning lot, or metered, or left unpaid, while an earlier "
        "one had time.",
        sql="""
        WITH taking AS (
            SELECT transfer_id, transfer.account_id, lot_id, placed_at
              FROM billing.transfer JOIN billing.hold USING (attempt_id)
             WHERE code IN ('hold', 'overrun')
            UNION ALL
            SELECT transfer_id, hold.account_id, NULL, placed_at
              FROM billing.settlement
                   JOIN billing.hold USING (attempt_id)
                   JOIN billing.transfer USING (attempt_id)
             WHERE unpaid_ms > 0 AND code = 'absorbed'),
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
        sentence="What is given back of a charge is no more than it was, in time and in money; it is what "
        "refunds say, and went to the lots that were charged.",
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
         WHERE back > there
        UNION ALL
        SELECT attempt_id, 'in all', billed_ms, sum(refunded_ms - COALESCE(taken_ms, 0)), amount_micros,
               sum(refunded_micros - COALESCE(taken_micros, 0))
          FROM billing.refund
               LEFT JOIN billing.refund_undo USING (refund_id)
               LEFT JOIN billing.settlement USING (attempt_id)
         GROUP BY attempt_id, billed_ms, amount_micros
        HAVING (sum(refunded_ms - COALESCE(taken_ms, 0)) <= billed_ms
                AND sum(refunded_micros - COALESCE(taken_micros, 0)) <= amount_micros) IS NOT TRUE""",
    ),
    Invariant(
        number=11,
        sentence="A refund that was taken back is charged again once, as it says: no more than it gave, of "
        "each lot and in money, and all of its money.",
        sql="""
        WITH moved AS (
            SELECT audit_id, sum(amount) FILTER (WHERE credit_account = 'consumed') AS ms,
                   sum(amount) FILTER (WHERE credit_account = 'revenue') AS micros
              FROM billing.transfer WHERE code = 'refund_undo' GROUP BY audit_id),
        lots AS (
            SELECT refund_id, lot_id,
                   sum(CASE WHEN code = 'refund_undo' OR credit_account = 'expired' THEN -amount
                            ELSE amount END) AS left_ms
              FROM billing.refund_undo AS undo
                   JOIN billing.refund USING (refund_id)
                   JOIN billing.transfer ON transfer.audit_id IN (refund.audit_id, undo.audit_id)
             WHERE lot_id IS NOT NULL GROUP BY refund_id, lot_id)
        SELECT undo.refund_id, moved.audit_id, taken_ms, moved.ms AS moved_ms, taken_micros,
               moved.micros AS moved_micros
          FROM billing.refund_undo AS undo
               FULL JOIN moved USING (audit_id)
               LEFT JOIN billing.refund USING (refund_id)
         WHERE (taken_ms = COALESCE(moved.ms, 0) AND taken_micros = COALESCE(moved.micros, 0)
                AND taken_ms <= refunded_ms AND taken_micros = refunded_micros
                AND undo.account_id = refund.account_id) IS NOT TRUE
        UNION ALL
        SELECT refund_id, NULL, lot_id, left_ms, NULL, NULL FROM lots WHERE left_ms < 0""",
    ),
    Invariant(
        number=11,
        sentence="A refund grants anew what it gave back to lots that had ended, and no more.",
        sql="""
        SELECT attempt_id, audit_id, sum(amount) FILTER (WHERE credit_account = 'expired') AS ended_ms,
               sum(amount) FILTER (WHERE debit_account = 'issued') AS anew_ms
          FROM billing.transfer WHERE code = 'refund'
         GROUP BY attempt_id, audit_id
        HAVING sum(amount) FILTER (WHERE credit_account = 'expired')
               IS DISTINCT FROM sum(amount) FILTER (WHERE debit_account = 'issued')""",
    ),
    Invariant(
        number=11,
        sentence="A change of plan moved what it says; its undo moved its money back, and time that it says.",
        sql="""
        WITH moved AS (
            SELECT audit_id,
                   sum(CASE WHEN debit_account = 'issued' THEN amount
                            WHEN credit_account = 'revoked' THEN -amount END) AS ms,
                   -sum(amount) FILTER (WHERE debit_account = 'revenue') AS credit_micros,
                   sum(amount) FILTER (WHERE credit_account = 'revenue') AS charge_micros
              FROM billing.transfer
             WHERE code IN ('plan_change', 'plan_undo') AND audit_id IS NOT NULL GROUP BY audit_id)
        SELECT change.change_id, moved.audit_id, change.granted_ms, moved.ms, moved.credit_micros,
               moved.charge_micros
          FROM billing.plan_change AS change
               LEFT JOIN billing.plan_change AS undone ON undone.change_id = change.undoes
               FULL JOIN moved ON moved.audit_id = change.audit_id
         WHERE (change.granted_ms = COALESCE(moved.ms, 0)
                AND change.credit_micros = COALESCE(moved.credit_micros, 0)
                AND change.charge_micros = COALESCE(moved.charge_micros, 0)
                AND (change.undoes IS NULL
                     OR undone.undoes IS NULL
                        AND (change.account_id, change.currency) = (undone.account_id, undone.currency)
                        AND change.credit_micros = -undone.charge_micros
                        AND change.charge_micros = -undone.credit_micros)) IS NOT TRUE
        UNION ALL
        SELECT undoes, NULL, count(*), NULL, NULL, NULL FROM billing.plan_change
         WHERE undoes IS NOT NULL GROUP BY undoes HAVING count(*) > 1""",
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
        sentence="An attempt is billed ceil(measured * bp / 10000), or less where nobody could pay, and what "
        "is metered of it at the price of its dispatch.",
        sql="""
        SELECT attempt_id, measured_ms, charge.multiplier_bp, hold.multiplier_bp AS multiplier_at_dispatch,
               due_ms, billed_ms, unpaid_ms, sold_ms, amount_micros
          FROM billing.settlement AS charge
               LEFT JOIN billing.hold USING (attempt_id)
               LEFT JOIN (SELECT attempt_id, sum(amount) AS sold_ms FROM billing.transfer
                           WHERE code = 'metered_time' GROUP BY attempt_id) AS metered USING (attempt_id)
         WHERE due_ms <> CASE tier WHEN 'fast' THEN ceil(measured_ms * charge.multiplier_bp / 10000.0)
                                   ELSE 0 END
            OR charge.multiplier_bp <> hold.multiplier_bp
            OR billed_ms < 0 OR billed_ms > due_ms
            OR (billed_ms < due_ms) <> (unpaid_ms > 0)
            OR amount_micros <> COALESCE(ceil(sold_ms * overage_micros_per_minute / 60000.0), 0)""",
    ),
    Invariant(
        number=18,
        sentence="Nothing is unpaid that could be metered: there was no consent, or the cap was reached.",
        sql="""
        WITH unpaid AS (
            SELECT absorbed.transfer_id, hold.account_id, period_start, currency, spend_cap_micros,
                   COALESCE(metered.amount, 0) AS metered_ms, overage_micros_per_minute AS price
              FROM billing.settlement
                   JOIN billing.hold USING (attempt_id, currency)
                   JOIN billing.transfer AS absorbed
                     ON absorbed.attempt_id = hold.attempt_id AND absorbed.code = 'absorbed'
                   LEFT JOIN billing.transfer AS metered
                     ON metered.attempt_id = hold.attempt_id AND metered.code = 'metered_time'
             WHERE unpaid_ms > 0 AND overage_allowed),
        moments AS (
            SELECT change.transfer_id, change.account_id, period_start, change.unit AS currency,
                   CASE WHEN change.kind = 'post_pending' THEN change.amount - pending.amount
                        WHEN change.kind IN ('void_pending', 'expire_pending') THEN -change.amount
                        WHEN change.debit_account = 'revenue' THEN -change.amount
                        ELSE change.amount END AS micros,
                   NULL::bigint AS spend_cap_micros, NULL::bigint AS metered_ms, NULL::bigint AS price
              FROM billing.transfer AS change
                   LEFT JOIN billing.transfer AS pending ON pending.transfer_id = change.pending_id
                   JOIN billing.hold ON hold.attempt_id = change.attempt_id
             WHERE (change.debit_account LIKE 'metered/%' OR change.credit_account LIKE 'metered/%')
               AND change.account_id IN (SELECT account_id FROM unpaid)
            UNION ALL
            SELECT transfer_id, account_id, period_start, currency, 0, spend_cap_micros, metered_ms, price
              FROM unpaid),
        history AS (
            SELECT *, sum(micros) OVER (PARTITION BY account_id, period_start, currency
                                        ORDER BY transfer_id) AS committed_micros FROM moments)
        SELECT transfer_id, account_id, spend_cap_micros, committed_micros, metered_ms, price FROM history
         WHERE spend_cap_micros = 0
            -- One more millisecond would have been within the cap.
            OR committed_micros + ceil((metered_ms + 1) * price / 60000.0)
               - ceil(metered_ms * price / 60000.0) <= spend_cap_micros""",
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
               AND code NOT IN ('refund', 'refund_undo')
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
         WHERE (code IN ('plan_undo', 'admin', 'promo', 'purchase', 'refund', 'refund_undo')
                OR audit_id IS NOT NULL
                OR debit_account LIKE 'subscription/%' OR credit_account LIKE 'subscription/%')
           AND (target = 'accounts/' || account_id
                OR starts_with(target, 'accounts/' || account_id || '/')) IS NOT TRUE
        UNION ALL
        SELECT 'plan ' || plan || ' version ' || version FROM billing.plan_version
         WHERE NOT EXISTS (
                   SELECT FROM billing.audit_event WHERE audit_event.audit_id = plan_version.audit_id
                      AND target = 'plans/' || plan)""",
    ),
    Invariant(
        number=23,
        sentence="What an audit event says was moved is what was moved for it.",
        sql="""
        WITH moved AS (
            SELECT audit_id,
                   sum(CASE WHEN debit_account = 'issued' THEN amount
                            WHEN credit_account = 'revoked' THEN -amount END)
                       FILTER (WHERE code <> 'refund') AS ms,
                   sum(CASE debit_account WHEN 'consumed' THEN amount ELSE -amount END)
                       FILTER (WHERE 'consumed' IN (debit_account, credit_account)) AS given_back_ms,
                   sum(amount) FILTER (WHERE debit_account = 'revenue') AS given_back_micros,
                   sum(amount) FILTER (WHERE credit_account = 'revenue') AS charged_micros
              FROM billing.transfer WHERE audit_id IS NOT NULL GROUP BY audit_id),
        told AS (
            SELECT audit_id, action, after, COALESCE(ms, 0) AS ms,
                   COALESCE(given_back_ms, 0) AS given_back_ms,
                   COALESCE(given_back_micros, 0) AS given_back_micros,
                   COALESCE(charged_micros, 0) AS charged_micros
              FROM billing.audit_event LEFT JOIN moved USING (audit_id))
        SELECT audit_id, action, ms, given_back_ms, given_back_micros, charged_micros, after FROM told
         WHERE (ARRAY[ms, given_back_ms, given_back_micros, charged_micros]
                = CASE action
                  WHEN 'AdjustBalance' THEN ARRAY[(after ->> 'amount_ms')::numeric, 0, 0, 0]
                  WHEN 'RefundJob'
                  THEN ARRAY[0, (after ->> 'amount_ms')::numeric, (after ->> 'amount_micros')::numeric, 0]
                  WHEN 'UndoRefund'
                  THEN ARRAY[0, -(after ->> 'amount_ms')::numeric, 0, (after ->> 'amount_micros')::numeric]
                  WHEN 'ChangePlan'
                  THEN ARRAY[(after ->> 'granted_ms')::numeric, 0, -(after ->> 'credit_micros')::numeric,
                             (after ->> 'charge_micros')::numeric]
                  -- The sides of its money are held against the change that it takes back.
                  WHEN 'UndoPlanChange'
                  THEN ARRAY[-(after ->> 'revoked_ms')::numeric, 0, given_back_micros,
                             given_back_micros + (after ->> 'amount_micros')::numeric]
                  ELSE ARRAY[0, 0, 0, 0]::numeric[] END) IS NOT TRUE""",
    ),
    Invariant(
        number=23,
        sentence="An account has the plan, and is to have the plan, that the last deed about it says.",
        sql="""
        WITH last AS (
            SELECT DISTINCT ON (target) substr(target, 10) AS account_id, at, action,
                   before ->> 'plan' AS before, before ->> 'scheduled_plan' AS scheduled,
                   after ->> 'plan' AS after, (after ->> 'effective_at')::timestamptz AS effective_at
              FROM billing.audit_event
             WHERE action IN ('CreateAccount', 'ChangePlan', 'UndoPlanChange')
             ORDER BY target, audit_id DESC)
        SELECT account_id, plan, scheduled_plan, last.before, last.after
          FROM billing.subscription JOIN last USING (account_id)
         WHERE plan <> CASE WHEN effective_at >= period_end THEN last.before
                            WHEN action = 'UndoPlanChange' AND effective_at = at AND at < period_start
                            THEN COALESCE(last.scheduled, last.after)
                            ELSE last.after END
            OR (ended_at IS NULL
                AND scheduled_plan IS DISTINCT FROM
                    CASE WHEN effective_at >= period_end THEN last.after
                         WHEN action = 'UndoPlanChange' AND at >= period_start
                         THEN NULLIF(last.scheduled, last.after) END)""",
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
