"""What goes wrong is told by its own number, by the invariants and by the auditor, each for itself.

A break is written as the bug would write it: with everything that would go along with it, so that nothing but
the promise is broken. The numbers that are missing here need jobs and attempts, and are told in their test.
"""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg
import busy_ledger
import pytest
from busy_ledger import undone, without_its_guards

from billing.auditor import replay
from billing.invariants import INVARIANTS, check

_COPY = """INSERT INTO billing.transfer (kind, code, account_id, job_id, attempt_id, leg, debit_account,
                                         credit_account, unit, amount, lot_id, pending_id, audit_id, at)
           SELECT kind, code, account_id, job_id, attempt_id, leg + 50, debit_account, credit_account, unit,
                  amount, lot_id, pending_id, audit_id, at FROM billing.transfer """
_ISSUE = """WITH lot AS (
                INSERT INTO billing.grant_lot
                       (account_id, source, source_key, priority, effective_at, expires_at, granted_ms)
                SELECT account_id, '{source}', 'from nowhere', 20, period_start, period_end, 50000
                  FROM billing.subscription WHERE account_id = '{account}' RETURNING *)
            INSERT INTO billing.transfer (kind, code, account_id, debit_account, credit_account, unit, amount,
                                          lot_id, at)
            SELECT 'post', '{code}', account_id, 'issued', 'lot/' || lot_id, 'gpu_ms', granted_ms, lot_id,
                   now() FROM lot"""
_A_REFUND = "(SELECT min(refund_id) FROM billing.refund WHERE refunded_micros = 0 AND account_id = 'ann')"


@dataclass(frozen=True)
class Break:
    what: str
    sql: str
    told: set[int]
    """By the invariants."""
    found: set[int] | None = None
    """By the auditor; None: the same."""


BREAKS = [
    Break(
        "time booked as money",
        """INSERT INTO billing.transfer
                  (kind, code, account_id, debit_account, credit_account, unit, amount, at)
           VALUES ('post', 'expiry', 'ben', 'issued', 'expired', 'USD', 5, now())""",
        {1},
    ),
    Break(
        "nothing booked",
        """INSERT INTO billing.transfer
                  (kind, code, account_id, debit_account, credit_account, unit, amount, at)
           VALUES ('post', 'expiry', 'ben', 'platform', 'expired', 'gpu_ms', 0, now())""",
        {1},
    ),
    Break(
        "a lot's row altered",
        "UPDATE billing.grant_lot SET used_ms = used_ms - 1 WHERE used_ms > 0 AND NOT closed",
        {2},
    ),
    Break("money not added up", "UPDATE billing.metered_account SET posted_micros = posted_micros - 1", {2}),
    Break("money forgotten", "DELETE FROM billing.metered_account", {2}),
    Break(
        "more taken back than there was",
        """WITH lot AS (UPDATE billing.grant_lot SET revoked_ms = revoked_ms + granted_ms
                         WHERE source = 'admin' RETURNING *)
           INSERT INTO billing.transfer
                  (kind, code, account_id, debit_account, credit_account, unit, amount, lot_id, at)
           SELECT 'post', 'plan_change', account_id, 'lot/' || lot_id, 'revoked', 'gpu_ms', granted_ms,
                  lot_id, now() FROM lot""",
        {3},
    ),
    Break("a hold given back twice", _COPY + "WHERE kind = 'void_pending' AND unit = 'gpu_ms'", {4}),
    Break("a settle run twice", _COPY + "WHERE kind = 'post_pending'", {2, 4, 18}, {4}),
    Break(
        "less given back than was held",
        "UPDATE billing.transfer SET amount = amount - 1 WHERE kind = 'void_pending'",
        {5},
    ),
    Break(
        "a hold ended for another attempt",
        "UPDATE billing.transfer SET attempt_id = gen_random_uuid() WHERE kind = 'void_pending'",
        {5},
    ),
    Break(
        "a void forgotten",
        """WITH voided AS (UPDATE billing.hold SET state = 'voided', ended_at = placed_at
                            WHERE state = 'open' RETURNING *)
           INSERT INTO billing.settlement
           SELECT attempt_id, job_id, account_id, 'fast', 'void', 0, multiplier_bp, 0, 0, 0, 0, 0, currency,
                  placed_at FROM voided""",
        {6},
    ),
    Break("a settled hold left open", "UPDATE billing.hold SET state = 'open' WHERE state = 'voided'", {6}),
    Break("a leg forgotten", "DELETE FROM billing.hold_leg WHERE leg = 0", {6}),
    Break(
        "time from nowhere",
        "UPDATE billing.grant_lot SET granted_ms = granted_ms + 1 WHERE source = 'admin'",
        {7},
    ),
    Break("a lot expired by hand", "UPDATE billing.grant_lot SET expired_ms = 1 WHERE lot_id = 2", {7}),
    Break(
        "a period granted twice",
        """WITH lot AS (
               INSERT INTO billing.grant_lot
                      (account_id, source, source_key, priority, effective_at, expires_at, granted_ms)
               SELECT account_id, source, 'other', priority, effective_at + interval '1 day', expires_at,
                      granted_ms
                 FROM billing.grant_lot WHERE source = 'plan' AND account_id = 'dan' LIMIT 1 RETURNING *)
           INSERT INTO billing.transfer (kind, code, account_id, debit_account, credit_account, unit, amount,
                                         lot_id, at)
           SELECT 'post', 'period', account_id, 'issued', 'lot/' || lot_id, 'gpu_ms', granted_ms, lot_id,
                  now() FROM lot""",
        {8},
    ),
    Break(
        "a lot used before its time",
        """UPDATE billing.grant_lot SET effective_at = effective_at + interval '1 hour'
            WHERE source = 'admin'""",
        {9},
    ),
    Break(
        "the order of burning not kept",
        "UPDATE billing.grant_lot SET priority = 5 WHERE source = 'admin'",
        {10},
    ),
    Break(
        "a refund larger than its charge",
        f"""WITH again AS (
               INSERT INTO billing.refund (account_id, job_id, attempt_id, request_id, refunded_ms,
                                           refunded_micros, currency, audit_id, at)
               SELECT account_id, job_id, attempt_id, 'again', 100, 0, currency, audit_id, at
                 FROM billing.refund WHERE refund_id = {_A_REFUND} RETURNING *),
           moved AS (
               INSERT INTO billing.transfer (kind, code, account_id, job_id, attempt_id, leg, debit_account,
                                             credit_account, unit, amount, lot_id, audit_id, at)
               SELECT kind, code, account_id, job_id, attempt_id, leg + 50, debit_account, credit_account,
                      unit, 100, lot_id, transfer.audit_id, transfer.at
                 FROM billing.transfer JOIN again USING (account_id, job_id, attempt_id)
                WHERE code = 'refund' AND debit_account = 'consumed' RETURNING lot_id, audit_id),
           told AS (
               UPDATE billing.audit_event
                  SET after = after || jsonb_build_object('amount_ms', (after -> 'amount_ms')::bigint + 100)
                WHERE audit_id IN (SELECT audit_id FROM moved))
           UPDATE billing.grant_lot SET used_ms = used_ms - 100 WHERE lot_id IN (SELECT lot_id FROM moved)""",
        {11},
    ),
    Break(
        "a refund that was never moved",
        f"UPDATE billing.refund SET refunded_ms = refunded_ms + 1 WHERE refund_id = {_A_REFUND}",
        {11},
    ),
    Break(
        "a refund taken back that says less than was moved",
        "UPDATE billing.refund_undo SET taken_ms = taken_ms - 1",
        {11},
    ),
    Break(
        "more taken back than the refund gave",
        """WITH told AS (
               UPDATE billing.audit_event
                  SET after = after || jsonb_build_object('amount_ms', (after -> 'amount_ms')::bigint + 10)
                WHERE action = 'UndoRefund'),
           moved AS (
               UPDATE billing.transfer SET amount = amount + 10 WHERE code = 'refund_undo' RETURNING lot_id),
           undo AS (UPDATE billing.refund_undo SET taken_ms = taken_ms + 10)
           UPDATE billing.grant_lot SET used_ms = used_ms + 10 WHERE lot_id IN (SELECT lot_id FROM moved)""",
        {11},
    ),
    Break(
        "an expired hold that was posted",
        "UPDATE billing.hold SET state = 'posted' WHERE state = 'expired'",
        {6},
    ),
    Break(
        "a hold expired and voided",
        """INSERT INTO billing.transfer (kind, code, account_id, job_id, attempt_id, leg, debit_account,
                                         credit_account, unit, amount, lot_id, pending_id, at)
           SELECT 'void_pending', 'settle', account_id, job_id, attempt_id, leg, debit_account,
                  credit_account, unit, amount, lot_id, pending_id, at
             FROM billing.transfer WHERE kind = 'expire_pending'""",
        {4},
    ),
    Break(
        "more time taken back than with the change of plan that was undone",
        "UPDATE billing.plan_change SET granted_ms = granted_ms + 1 WHERE undoes IS NOT NULL",
        {11},
    ),
    Break(
        "a change of plan undone twice",
        """INSERT INTO billing.plan_change (account_id, from_plan, from_version, to_plan, to_version,
                  period_start, granted_ms, credit_micros, charge_micros, currency, undoes, audit_id, at)
           SELECT account_id, from_plan, from_version, to_plan, to_version, period_start, granted_ms,
                  credit_micros, charge_micros, currency, undoes, audit_id, at
             FROM billing.plan_change WHERE undoes IS NOT NULL""",
        {11},
    ),
    Break(
        "an undo of another account's change",
        "UPDATE billing.plan_change SET account_id = 'ben' WHERE undoes IS NOT NULL",
        {11},
    ),
    Break(
        "a change of plan of which nothing is on record",
        "DELETE FROM billing.plan_change WHERE account_id = 'ben'",
        {11},
    ),
    Break("consent missing", "UPDATE billing.hold SET overage_allowed = false", {12}),
    Break("a cap not kept", "UPDATE billing.hold SET spend_cap_micros = 1 WHERE metered_ms > 0", {12}),
    Break(
        "relax booked for a fast attempt",
        """UPDATE billing.transfer SET code = 'relax'
            WHERE transfer_id = (SELECT min(transfer_id) FROM billing.transfer WHERE code = 'absorbed')""",
        {13},
    ),
    Break(
        "a job charged for two attempts",
        """WITH two AS (SELECT attempt_id, min(job_id::text) OVER ()::uuid AS job_id
                          FROM billing.settlement WHERE ending = 'post' AND tier = 'fast'
                                AND account_id = 'ann' ORDER BY at LIMIT 2),
           a AS (UPDATE billing.transfer SET job_id = two.job_id FROM two
                  WHERE transfer.attempt_id = two.attempt_id),
           b AS (UPDATE billing.hold SET job_id = two.job_id FROM two
                  WHERE hold.attempt_id = two.attempt_id),
           c AS (UPDATE billing.refund SET job_id = two.job_id FROM two
                  WHERE refund.attempt_id = two.attempt_id)
           UPDATE billing.settlement SET job_id = two.job_id FROM two
            WHERE settlement.attempt_id = two.attempt_id""",
        {16},
    ),
    Break(
        "measured and not billed",
        "UPDATE billing.settlement SET measured_ms = measured_ms + 1 WHERE ending = 'post' AND tier = 'fast'",
        {18},
    ),
    Break(
        "a charge by other terms than those of its dispatch",
        "UPDATE billing.hold SET multiplier_bp = 20000 WHERE state = 'posted'",
        {18},
    ),
    Break("a charge without a settlement", "DELETE FROM billing.settlement WHERE tier = 'relax'", {18}),
    Break(
        "a transfer's amount changed",
        "UPDATE billing.transfer SET amount = amount + 1 WHERE code = 'metered_time'",
        {18},
    ),
    Break(
        "the amount of what a lot lost changed",
        "UPDATE billing.transfer SET amount = amount - 1 WHERE code = 'overrun' AND unit = 'gpu_ms'",
        {2, 10, 18},
    ),
    Break(
        "an adjustment of nobody's",
        "UPDATE billing.transfer SET audit_id = NULL WHERE code = 'admin'",
        {23},
    ),
    Break("a plan of nobody's", "DELETE FROM billing.audit_event WHERE target = 'plans/basic'", {23}),
    Break(
        "an adjustment of another account's",
        """UPDATE billing.audit_event SET target = 'accounts/eve'
            WHERE target = 'accounts/ben' AND action = 'AdjustBalance'""",
        {23},
    ),
    Break(
        "a lot issued in two entries",
        """WITH less AS (
               UPDATE billing.transfer SET amount = amount - 100
                WHERE code = 'period' AND account_id = 'dan' AND at > '2026-03-15' RETURNING *)
           INSERT INTO billing.transfer (kind, code, account_id, debit_account, credit_account, unit, amount,
                                         lot_id, audit_id, at)
           SELECT kind, code, account_id, debit_account, credit_account, unit, 100, lot_id, audit_id, at
             FROM less""",
        {7},
    ),
    Break(
        "a period's time issued again",
        """WITH lot AS (UPDATE billing.grant_lot SET granted_ms = granted_ms + 12000000
                         WHERE account_id = 'cid' AND source = 'plan' RETURNING *)
           INSERT INTO billing.transfer (kind, code, account_id, debit_account, credit_account, unit, amount,
                                         lot_id, at)
           SELECT 'post', 'period', account_id, 'issued', 'lot/' || lot_id, 'gpu_ms', 12000000, lot_id, now()
             FROM lot""",
        {7, 8},
    ),
    Break("a rollover of nothing", _ISSUE.format(account="ben", source="rollover", code="rollover"), {7}),
    Break(
        "a period that began with another quota",
        """WITH lot AS (UPDATE billing.grant_lot SET granted_ms = granted_ms + 1
                         WHERE account_id = 'dan' AND source = 'plan' AND expires_at < '2026-04-15'
                        RETURNING *)
           UPDATE billing.transfer SET amount = amount + 1 FROM lot
            WHERE transfer.lot_id = lot.lot_id AND code = 'period'""",
        {8},
    ),
    Break(
        "a plan's time from nowhere",
        _ISSUE.format(account="ben", source="proration", code="plan_change"),
        {8},
    ),
    Break(
        "an account put on another plan by hand",
        "UPDATE billing.subscription SET plan = 'pro', version = 1 WHERE account_id = 'ann'",
        {8},
    ),
    Break(
        "a change of plan that gave twice its share",
        """WITH change AS (UPDATE billing.plan_change SET granted_ms = granted_ms * 2
                            WHERE account_id = 'cid' AND undoes IS NULL RETURNING *),
           told AS (UPDATE billing.audit_event
                       SET after = jsonb_set(after, '{granted_ms}', to_jsonb(granted_ms))
                      FROM change WHERE change.audit_id = audit_event.audit_id),
           entry AS (UPDATE billing.transfer SET amount = amount * 2 FROM change
                      WHERE change.audit_id = transfer.audit_id AND debit_account = 'issued' RETURNING lot_id)
           UPDATE billing.grant_lot SET granted_ms = granted_ms * 2
            WHERE lot_id IN (SELECT lot_id FROM entry)""",
        {8},
    ),
    Break(
        "an overrun that nobody was charged for, though there was time",
        """WITH over AS (DELETE FROM billing.transfer WHERE code = 'overrun' AND account_id = 'dan'
                          RETURNING *),
           settled AS (UPDATE billing.settlement
                          SET billed_ms = billed_ms - amount, unpaid_ms = amount, absorbed_ms = amount
                         FROM over WHERE settlement.attempt_id = over.attempt_id),
           lot AS (UPDATE billing.grant_lot SET used_ms = used_ms - amount FROM over
                    WHERE grant_lot.lot_id = over.lot_id)
           INSERT INTO billing.transfer (transfer_id, kind, code, account_id, job_id, attempt_id,
                                         debit_account, credit_account, unit, amount, at)
                  OVERRIDING SYSTEM VALUE
           SELECT transfer_id, 'post', 'absorbed', account_id, job_id, attempt_id, 'platform', 'absorbed',
                  unit, amount, at FROM over""",
        {10},
    ),
    Break(
        "a refund granted anew twice over",
        """WITH lot AS (UPDATE billing.grant_lot SET granted_ms = granted_ms * 2 WHERE source = 'refund'
                         RETURNING *)
           UPDATE billing.transfer SET amount = amount * 2 FROM lot
            WHERE transfer.lot_id = lot.lot_id AND debit_account = 'issued'""",
        {11},
    ),
    Break(
        "an overrun that nobody was charged for, though it was agreed to",
        "UPDATE billing.hold SET spend_cap_micros = spend_cap_micros * 2 WHERE account_id = 'fay'",
        {18},
    ),
    Break(
        "metered above its price",
        """WITH over AS (UPDATE billing.transfer SET amount = amount + 1
                          WHERE code = 'overrun' AND unit = 'USD' AND account_id = 'ann' RETURNING *),
           settled AS (UPDATE billing.settlement SET amount_micros = amount_micros + 1 FROM over
                        WHERE settlement.attempt_id = over.attempt_id)
           UPDATE billing.metered_account SET posted_micros = posted_micros + 1 WHERE account_id = 'ann'""",
        {18},
    ),
    Break(
        "a change of plan that was paid to nobody's account",
        """INSERT INTO billing.transfer
                  (kind, code, account_id, debit_account, credit_account, unit, amount, at)
           VALUES ('post', 'plan_change', 'ben', 'subscription/ben', 'revenue', 'USD', 99000000, now())""",
        {23},
    ),
    Break(
        "an adjustment of another amount than its audit event's",
        """UPDATE billing.audit_event SET after = jsonb_set(after, '{amount_ms}', '1')
            WHERE action = 'AdjustBalance'""",
        {23},
    ),
    Break(
        "a plan that nobody asked for",
        "UPDATE billing.subscription SET scheduled_plan = 'pro' WHERE account_id = 'ben'",
        {23},
    ),
]


async def test_what_goes_wrong_is_told_by_its_number(
    connection: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    await busy_ledger.fill(connection)
    await without_its_guards(connection)
    alone: set[str] = set()
    for one in BREAKS:
        with subtests.test(one.what):
            async with undone(connection):
                assert (await connection.execute(one.sql)).split()[-1] != "0", "this changes nothing"

                answers = await check(connection)
                assert {answer.number for answer in answers} == one.told
                assert {finding.number for finding in await replay(connection)} == (one.found or one.told)
                alone |= {answer.sentence for answer in answers} if len(answers) == 1 else set()
    assert alone == {invariant.sentence for invariant in INVARIANTS}, "each query is told alone by some break"
