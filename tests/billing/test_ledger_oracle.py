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
        "money booked as time",
        """INSERT INTO billing.transfer
                  (kind, code, account_id, debit_account, credit_account, unit, amount, at)
           VALUES ('post', 'plan_change', 'ben', 'subscription/ben', 'revenue', 'gpu_ms', 5, now())""",
        {1},
    ),
    Break(
        "nothing booked",
        """INSERT INTO billing.transfer
                  (kind, code, account_id, debit_account, credit_account, unit, amount, at)
           VALUES ('post', 'plan_change', 'ben', 'subscription/ben', 'revenue', 'USD', 0, now())""",
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
        "UPDATE billing.grant_lot SET granted_ms = granted_ms + 1 WHERE source = 'plan'",
        {7},
    ),
    Break("a lot expired by hand", "UPDATE billing.grant_lot SET expired_ms = 1 WHERE lot_id = 2", {7}),
    Break(
        "a period granted twice",
        """INSERT INTO billing.grant_lot
                  (account_id, source, source_key, priority, effective_at, expires_at, granted_ms)
           SELECT account_id, source, 'other', priority, effective_at + interval '1 day', expires_at, 0
             FROM billing.grant_lot WHERE source = 'plan' LIMIT 1""",
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
                WHERE code = 'refund' AND debit_account = 'consumed' RETURNING lot_id)
           UPDATE billing.grant_lot SET used_ms = used_ms - 100 WHERE lot_id IN (SELECT lot_id FROM moved)""",
        {11},
    ),
    Break(
        "a refund that was never moved",
        f"UPDATE billing.refund SET refunded_ms = refunded_ms + 1 WHERE refund_id = {_A_REFUND}",
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
        "UPDATE billing.audit_event SET target = 'accounts/eve' WHERE target = 'accounts/ben'",
        {23},
    ),
]


async def test_what_goes_wrong_is_told_by_its_number(
    connection: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    await busy_ledger.fill(connection)
    await without_its_guards(connection)
    for one in BREAKS:
        with subtests.test(one.what):
            async with undone(connection):
                assert (await connection.execute(one.sql)).split()[-1] != "0", "this changes nothing"

                assert {answer.number for answer in await check(connection)} == one.told
                assert {finding.number for finding in await replay(connection)} == (one.found or one.told)


def test_each_number_is_told_alone_by_some_break() -> None:
    alone = {min(one.told) for one in BREAKS if len(one.told) == 1}
    assert alone == {invariant.number for invariant in INVARIANTS}
