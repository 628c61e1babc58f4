"""Every invariant notices when what it guards is broken by hand, and nothing else makes it speak."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import busy_ledger
import pytest
from busy_ledger import undone, without_its_guards
from ledger_building import after, assert_sound, balance, open_account

import billing
from billing import entries
from billing.invariants import INVARIANTS, check

SECOND_END = """
    INSERT INTO billing.transfer (kind, code, account_id, job_id, attempt_id, leg, debit_account,
                                  credit_account, unit, amount, lot_id, pending_id, at)
    SELECT kind, code, account_id, job_id, attempt_id, leg + 50, debit_account, credit_account,
           unit, amount, lot_id, pending_id, at
      FROM billing.transfer WHERE kind = 'post_pending' LIMIT 1"""

BREAKS: list[tuple[int, str]] = [
    (1, "UPDATE billing.transfer SET amount = -amount WHERE code = 'relax'"),
    (1, "UPDATE billing.transfer SET credit_account = debit_account WHERE code = 'relax'"),
    (1, "UPDATE billing.transfer SET unit = 'USD' WHERE code = 'relax'"),
    (1, "UPDATE billing.transfer SET unit = 'gpu_ms' WHERE credit_account = 'revenue'"),
    (2, "UPDATE billing.grant_lot SET used_ms = used_ms + 1"),
    (2, "UPDATE billing.grant_lot SET held_ms = held_ms - 1 WHERE held_ms > 0"),
    (2, "UPDATE billing.metered_account SET posted_micros = posted_micros - 1"),
    (2, "UPDATE billing.metered_account SET held_micros = held_micros + 1"),
    (2, "DELETE FROM billing.metered_account"),
    (3, "UPDATE billing.grant_lot SET expired_ms = granted_ms + 1"),
    (3, "UPDATE billing.grant_lot SET revoked_ms = -1"),
    (4, SECOND_END),
    (5, "UPDATE billing.transfer SET amount = amount + 1000000 WHERE kind = 'post_pending'"),
    (5, "UPDATE billing.transfer SET amount = amount - 1 WHERE kind = 'void_pending'"),
    (5, "UPDATE billing.transfer SET attempt_id = gen_random_uuid() WHERE kind = 'post_pending'"),
    (5, "UPDATE billing.transfer SET job_id = gen_random_uuid() WHERE kind = 'post_pending'"),
    (5, "UPDATE billing.transfer SET debit_account = 'platform' WHERE kind = 'post_pending'"),
    (6, "UPDATE billing.hold SET state = 'voided' WHERE state = 'posted'"),
    (6, "UPDATE billing.hold SET state = 'open' WHERE state = 'voided'"),
    (6, "UPDATE billing.hold SET state = 'posted' WHERE state = 'open'"),
    (6, "UPDATE billing.hold SET lots_ms = lots_ms + 1"),
    (6, "DELETE FROM billing.hold_leg WHERE leg = 0"),
    (6, "UPDATE billing.settlement SET ending = 'void' WHERE tier = 'fast'"),
    (7, "UPDATE billing.grant_lot SET granted_ms = granted_ms + 1"),
    (7, "UPDATE billing.grant_lot SET expired_ms = 1"),
    (7, "UPDATE billing.grant_lot SET revoked_ms = revoked_ms + 1"),
    (8, "UPDATE billing.grant_lot SET effective_at = effective_at - interval '1 day' WHERE source = 'plan'"),
    (8, "UPDATE billing.grant_lot SET source = 'promo' WHERE source = 'plan'"),
    (9, "UPDATE billing.grant_lot SET expires_at = effective_at"),
    (9, "UPDATE billing.hold SET placed_at = placed_at - interval '1 day'"),
    (10, "UPDATE billing.transfer SET amount = amount - 1 WHERE kind = 'pending' AND leg = 0"),
    (10, "UPDATE billing.grant_lot SET priority = 15 WHERE source = 'admin'"),
    (11, "UPDATE billing.refund SET refunded_ms = refunded_ms + 1"),
    (11, "UPDATE billing.refund SET refunded_micros = refunded_micros - 1 WHERE refunded_micros > 0"),
    (11, "UPDATE billing.transfer SET amount = amount * 100 WHERE code = 'refund'"),
    (11, "DELETE FROM billing.refund"),
    (11, "UPDATE billing.refund_undo SET taken_ms = taken_ms - 1"),
    (11, "DELETE FROM billing.refund_undo"),
    (12, "UPDATE billing.hold SET overage_allowed = false"),
    (12, "UPDATE billing.hold SET spend_cap_micros = 1"),
    (12, "DELETE FROM billing.hold WHERE metered_ms > 0"),
    (13, "UPDATE billing.settlement SET tier = 'relax' WHERE tier = 'fast'"),
    (13, "UPDATE billing.settlement SET tier = 'fast' WHERE tier = 'relax'"),
    (13, "UPDATE billing.transfer SET code = 'relax' WHERE kind = 'pending'"),
    (16, "UPDATE billing.settlement SET job_id = '00000000-0000-0000-0000-000000000000'"),
    (16, "UPDATE billing.transfer SET job_id = '00000000-0000-0000-0000-000000000000' WHERE kind = 'post'"),
    (18, "UPDATE billing.settlement SET due_ms = due_ms + 1 WHERE tier = 'fast'"),
    (18, "UPDATE billing.settlement SET measured_ms = measured_ms + 1"),
    (18, "UPDATE billing.settlement SET billed_ms = billed_ms - 1 WHERE billed_ms > 0"),
    (18, "UPDATE billing.settlement SET absorbed_ms = absorbed_ms + 1"),
    (18, "UPDATE billing.settlement SET amount_micros = amount_micros + 1"),
    (18, "DELETE FROM billing.settlement WHERE tier = 'relax'"),
    (23, "UPDATE billing.transfer SET audit_id = NULL WHERE code = 'admin'"),
    (23, "DELETE FROM billing.audit_event WHERE target = 'plans/basic'"),
    (23, "UPDATE billing.audit_event SET target = 'accounts/bob' WHERE target = 'accounts/ann'"),
]


@pytest.fixture
async def a_busy_ledger(connection: asyncpg.Connection) -> asyncpg.Connection:
    await busy_ledger.fill(connection)
    return connection


async def test_a_sound_ledger_breaks_nothing(a_busy_ledger: asyncpg.Connection) -> None:
    await assert_sound(a_busy_ledger)
    now = await balance(a_busy_ledger, at=after(days=31))
    assert (now.held_ms, now.used_ms) == (100, 0)


async def test_an_invariant_notices_when_it_is_broken(
    a_busy_ledger: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    await without_its_guards(a_busy_ledger)
    for number, sql in BREAKS:
        with subtests.test(number=number, sql=sql):
            async with undone(a_busy_ledger):
                assert (await a_busy_ledger.execute(sql)).split()[-1] != "0", "this break changes nothing"

                violations = await check(a_busy_ledger)

                assert number in {violation.number for violation in violations}


def test_every_invariant_is_broken_by_a_test_above() -> None:
    assert {number for number, _ in BREAKS} == {invariant.number for invariant in INVARIANTS}


@pytest.mark.unsound(8)
async def test_lots_that_overlap_are_noticed(a_busy_ledger: asyncpg.Connection) -> None:
    await a_busy_ledger.execute(
        """INSERT INTO billing.grant_lot
                  (account_id, source, source_key, priority, effective_at, expires_at, granted_ms)
           SELECT account_id, source, 'other', priority, effective_at + interval '1 day', expires_at, 0
             FROM billing.grant_lot WHERE source = 'plan' LIMIT 1"""
    )
    assert {violation.number for violation in await check(a_busy_ledger)} == {8}


GUARDED: list[tuple[str, str]] = [
    ("transfer_resolved_once", SECOND_END),
    (
        "transfer_once_an_attempt",
        """INSERT INTO billing.transfer (kind, code, account_id, job_id, attempt_id, debit_account,
                                         credit_account, unit, amount, at)
           SELECT kind, code, account_id, job_id, attempt_id, debit_account,
                  credit_account, unit, amount, at
             FROM billing.transfer WHERE code = 'relax'""",
    ),
    ("grant_lot_not_overdrawn", "UPDATE billing.grant_lot SET held_ms = granted_ms + 1 WHERE NOT closed"),
    ("grant_lot_closed_is_empty", "UPDATE billing.grant_lot SET used_ms = 0 WHERE closed"),
    ("grant_lot_used_ms_check", "UPDATE billing.grant_lot SET used_ms = -1 WHERE NOT closed"),
    (
        "grant_lot_one_a_period",
        """INSERT INTO billing.grant_lot
                  (account_id, source, source_key, priority, effective_at, expires_at, granted_ms)
           SELECT account_id, source, 'other', priority, effective_at, expires_at, granted_ms
             FROM billing.grant_lot WHERE source = 'plan'""",
    ),
    (
        "grant_lot_granted_once",
        """INSERT INTO billing.grant_lot
                  (account_id, source, source_key, priority, effective_at, expires_at, granted_ms)
           SELECT account_id, 'promo', source_key, priority, effective_at, expires_at, granted_ms
             FROM billing.grant_lot WHERE source = 'plan'""",
    ),
    ("hold_meters_by_consent", "UPDATE billing.hold SET overage_allowed = false"),
    ("hold_covers_the_prediction", "UPDATE billing.hold SET lots_ms = lots_ms + 1"),
    (
        "hold_one_open_a_job",
        """INSERT INTO billing.hold
           SELECT (h).* FROM (
               SELECT jsonb_populate_record(hold, jsonb_build_object(
                          'hold_id', gen_random_uuid(), 'attempt_id', gen_random_uuid())) AS h
                 FROM billing.hold WHERE state = 'open') AS another""",
    ),
    (
        "settlement_one_charge_a_job",
        """INSERT INTO billing.settlement
           SELECT (s).* FROM (
               SELECT jsonb_populate_record(settlement, jsonb_build_object(
                          'attempt_id', gen_random_uuid())) AS s
                 FROM billing.settlement WHERE ending = 'post') AS another""",
    ),
    (
        "settlement_pkey",
        "INSERT INTO billing.settlement SELECT * FROM billing.settlement WHERE ending = 'void'",
    ),
]

MEANINGLESS: list[tuple[str, dict[str, object]]] = [
    ("transfer_amount_positive", {"amount": 0}),
    ("transfer_sides_differ", {"credit_account": "platform"}),
    ("transfer_one_unit", {"unit": "USD"}),
    ("transfer_one_unit", {"credit_account": "revenue"}),
    ("transfer_names_its_lot", {"debit_account": "lot/1"}),
    ("transfer_resolves_a_pending", {"kind": "post_pending"}),
    ("transfer_names_job_and_attempt", {"attempt_id": None}),
    ("transfer_names_job_and_attempt", {"code": "period"}),
    ("transfer_admin_is_audited", {"code": "admin", "job_id": None, "attempt_id": None}),
]


async def test_a_constraint_guards_it_before_any_check(
    a_busy_ledger: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    for guard, sql in GUARDED:
        refused = pytest.raises(asyncpg.IntegrityConstraintViolationError, match=guard)
        with subtests.test(guard=guard), refused:
            await a_busy_ledger.execute(sql)


async def test_the_journal_takes_no_row_that_means_nothing(
    connection: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    await open_account(connection)
    row = {
        "kind": "post",
        "code": "relax",
        "account_id": "ann",
        "job_id": "00000000-0000-0000-0000-000000000001",
        "attempt_id": "00000000-0000-0000-0000-000000000002",
        "debit_account": "platform",
        "credit_account": "consumed_relax",
        "unit": "gpu_ms",
        "amount": 1,
        "at": after(days=0),
    }
    insert = (
        f"INSERT INTO billing.transfer ({', '.join(row)}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
    )
    for guard, change in MEANINGLESS:
        refused = pytest.raises(asyncpg.CheckViolationError, match=guard)
        with subtests.test(guard=guard, change=change), refused:
            await connection.execute(insert, *(row | change).values())


def test_the_readme_names_every_account_of_the_journal() -> None:
    readme = (Path(billing.__file__).parent / "README.md").read_text()
    for account in (
        entries.ISSUED,
        entries.PLATFORM,
        entries.CONSUMED,
        entries.CONSUMED_RELAX,
        entries.EXPIRED,
        entries.REVOKED,
        entries.ABSORBED,
        entries.REVENUE,
        "lot/",
        "metered/",
        "subscription/",
    ):
        assert f"`{account}" in readme, account
