"""Purchases and promotions beside an admin's grants; and accounts that are erased."""

from __future__ import annotations

import json
from datetime import datetime
from uuid import uuid4

import asyncpg
import pytest
from ledger_building import (
    BASIC_MS,
    START,
    a_pricing,
    a_request,
    adjust,
    after,
    assert_sound,
    balance,
    held,
    open_account,
    overage,
    settle,
    the_end,
)

from billing import (
    accounts,
    admin,
    audit,
    expiry,
    idempotency,
    plan_changes,
    plan_undo,
    refunds,
    statements,
)
from billing.entries import Source
from billing.refusals import (
    AccountErased,
    AdjustmentTooLarge,
    OutsidePeriods,
    UnknownAccount,
    UnknownGrant,
)


async def give(
    connection: asyncpg.Connection, amount_ms: int, source: Source, *, expires_at: datetime | None = None
) -> None:
    async with connection.transaction():
        await admin.adjust_balance(
            connection,
            "ann",
            amount_ms,
            actor="accounts/root",
            reason="test",
            request_id=str(uuid4()),
            expires_at=expires_at,
            at=START,
            source=source,
        )


async def erase(connection: asyncpg.Connection, account: str = "ann", *, at: datetime = START) -> str:
    async with connection.transaction():
        return await accounts.erase(connection, account, at)


async def texts(connection: asyncpg.Connection) -> str:
    """Return every row of the ledger as text."""
    tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'billing'")
    found = [
        await connection.fetchval(f"SELECT string_agg(row::text, ' ') FROM billing.{table} AS row")
        for (table,) in tables
    ]
    return " ".join(text for text in found if text)


async def test_a_promotion_burns_first_and_a_purchase_last(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=100)
    await give(connection, 100, Source.PURCHASE)
    await give(connection, 100, Source.ADMIN)
    await give(connection, 100, Source.PROMO, expires_at=after(days=10))
    await settle(connection, the_end(await held(connection, a_request(350)), 350))

    rows = await connection.fetch(
        "SELECT source, used_ms FROM billing.grant_lot ORDER BY priority, expires_at, lot_id"
    )
    assert [tuple(row) for row in rows] == [("promo", 100), ("plan", 100), ("admin", 100), ("purchase", 50)]
    await assert_sound(connection)


async def test_the_journal_tells_where_granted_time_came_from(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await give(connection, 1, Source.PURCHASE)
    await give(connection, 2, Source.PROMO)
    await give(connection, 3, Source.ADMIN)
    rows = await connection.fetch(
        "SELECT code, amount FROM billing.transfer WHERE audit_id IS NOT NULL ORDER BY transfer_id"
    )
    assert [tuple(row) for row in rows] == [("purchase", 1), ("promo", 2), ("admin", 3)]


async def test_a_purchase_is_taken_back_by_a_negative_adjustment(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await give(connection, 500, Source.PURCHASE)
    await adjust(connection, -500)
    purchase = await connection.fetchrow(
        "SELECT granted_ms, revoked_ms FROM billing.grant_lot WHERE source = 'purchase'"
    )
    assert tuple(purchase) == (500, 500)
    await assert_sound(connection)


async def numbers(connection: asyncpg.Connection) -> list[int]:
    """Return the audit events of adjustments, in their order."""
    rows = await connection.fetch(
        "SELECT audit_id FROM billing.audit_event WHERE action = 'AdjustBalance' ORDER BY audit_id"
    )
    return [row["audit_id"] for row in rows]


async def take(connection: asyncpg.Connection, ms: int, undoes: int, account: str = "ann") -> None:
    async with connection.transaction():
        await admin.adjust_balance(
            connection,
            account,
            -ms,
            actor="accounts/root",
            reason="a mistake",
            request_id=str(uuid4()),
            expires_at=None,
            at=START,
            undoes=undoes,
        )


async def test_what_is_taken_of_a_grant_that_is_named_is_taken_of_nothing_else(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    await open_account(connection, "ben")
    await give(connection, 600, Source.PURCHASE)
    await give(connection, 300, Source.PROMO)
    _, promo = await numbers(connection)
    await settle(connection, the_end(await held(connection, a_request(100)), 100))

    await take(connection, 50, promo)
    with pytest.raises(AdjustmentTooLarge) as refused:
        await take(connection, 151, promo)
    assert refused.value.metadata() == {"available_ms": "150", "amount_ms": "-151"}
    assert "of what was granted" in str(refused.value)
    await take(connection, 150, promo)

    rows = await connection.fetch("SELECT source, revoked_ms FROM billing.grant_lot WHERE account_id = 'ann'")
    assert dict(tuple(row) for row in rows) == {"plan": 0, "purchase": 0, "promo": 200}
    taking = (await numbers(connection))[-1]
    noted = await connection.fetchval(
        "SELECT after::text FROM billing.audit_event WHERE audit_id = $1", taking
    )
    assert json.loads(noted)["undoes"] == promo
    for account, number in (("ben", promo), ("ann", taking), ("ann", 10**9)):
        with pytest.raises(UnknownGrant):
            await take(connection, 1, number, account)
    await assert_sound(connection)


async def test_an_erased_account_has_no_plan_to_change(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    pseudonym = await erase(connection, at=after(days=2))
    for day in (3, 45):
        async with connection.transaction():
            with pytest.raises(AccountErased) as refused:
                await plan_changes.preview(connection, pseudonym, "pro", after(days=day))
        assert refused.value.metadata() == {"account": pseudonym}
        by_root = {"actor": "accounts/root", "reason": "r", "request_id": str(uuid4()), "at": after(days=day)}
        with pytest.raises(AccountErased):
            async with connection.transaction():
                await plan_changes.change(connection, pseudonym, "pro", etag="", **by_root)
        with pytest.raises(AccountErased):
            async with connection.transaction():
                await plan_undo.undo(connection, pseudonym, etag="", **by_root)
    assert (await balance(connection, pseudonym, at=after(days=2))).granted_ms == BASIC_MS
    await assert_sound(connection)


async def test_the_last_statement_of_an_erased_account_runs_on(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    job = await held(connection, a_request(4000))
    await settle(connection, the_end(job, 4000))
    pseudonym = await erase(connection, at=after(days=2))
    at, now = after(days=50), after(days=51)
    async with connection.transaction():
        await refunds.refund(
            connection,
            account_id=pseudonym,
            job_id=job.job_id,
            amount_ms=None,
            actor="accounts/root",
            reason="r",
            request_id=str(uuid4()),
            at=at,
        )
        terms = await accounts.lock_terms(connection, pseudonym, now)
        for moment in (None, at, after(days=1)):
            told = await statements.statement(connection, terms, moment, now)
            assert (told.period.start, told.used_ms) == (START, 0)
            assert any(line.sentence.startswith("Given back") for line in told.lines)
        with pytest.raises(OutsidePeriods):
            await statements.statement(connection, terms, after(days=52), now)


async def test_erasing_an_account_leaves_its_entries_and_none_of_its_name(
    connection: asyncpg.Connection,
) -> None:
    account = "mary-smith"
    await open_account(connection, account, left_ms=100)
    await overage(connection, account=account)
    job = a_request(5000, account=account, pricing=a_pricing(overage=True))
    await settle(connection, the_end(await held(connection, job), 4000))
    async with connection.transaction():
        await refunds.refund(
            connection,
            account_id=account,
            job_id=job.job_id,
            amount_ms=10,
            actor="accounts/root",
            reason="test",
            request_id="r",
            at=START,
        )
        await plan_changes.change(
            connection,
            account,
            "standard",
            etag="",
            actor=f"accounts/{account}",
            reason="test",
            request_id="p",
            at=START,
        )
    await audit.record(
        connection,
        actor="accounts/root/keys/k",
        action="CreateAccount",
        target=f"accounts/{account}",
        reason="test",
        request_id="r1",
        before=None,
        after=None,
        at=START,
    )
    for caller, outcome in ((account, {}), ("root", {"name": f"accounts/{account}", "key": "k"})):
        await idempotency.claim(connection, caller, "CreateAccount", "r1", b"one")
        await idempotency.store(connection, caller, "CreateAccount", "r1", outcome)
    sums = "SELECT debit_account LIKE 'lot/%', unit, code, sum(amount) FROM billing.transfer GROUP BY 1, 2, 3"
    before = set(await connection.fetch(sums))
    assert account in await texts(connection)

    pseudonym = await erase(connection, account)

    assert account not in await texts(connection)
    assert set(await connection.fetch(sums)) == before
    assert await connection.fetchval("SELECT erased_at FROM billing.account") == START
    assert await connection.fetchval("SELECT count(*) FROM billing.idempotency") == 1
    assert (await balance(connection, pseudonym)).used_ms == 100
    assert await connection.fetchval(
        "SELECT EXISTS (SELECT FROM billing.transfer WHERE debit_account = $1)", f"metered/{pseudonym}"
    )
    await assert_sound(connection)


async def test_a_name_that_is_part_of_another_is_left_alone(connection: asyncpg.Connection) -> None:
    for account in ("ann", "anna", "ann-b"):
        await open_account(connection, account, left_ms=5)
    pseudonym = await erase(connection, "ann")
    targets = await connection.fetch(
        "SELECT DISTINCT target FROM billing.audit_event WHERE target LIKE 'accounts/%' ORDER BY target"
    )
    assert {target for (target,) in targets} == {
        f"accounts/{pseudonym}",
        "accounts/anna",
        "accounts/ann-b",
    }
    assert (await balance(connection, "anna")).available_ms == 5
    await assert_sound(connection)


async def test_an_erased_account_is_renewed_no_more(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await open_account(connection, "bob")
    pseudonym = await erase(connection)
    for _ in range(2):
        async with connection.transaction():
            await expiry.expire(connection, after(days=40), 100)

    assert await connection.fetchval("SELECT count(*) FROM billing.grant_lot") == 3
    assert (await balance(connection, pseudonym, at=after(days=40))).available_ms == 0
    async with connection.transaction():
        assert await expiry.expire(connection, after(days=40), 100) == 0
    await assert_sound(connection)


async def test_an_account_is_erased_once_and_its_id_is_free_again(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    pseudonym = await erase(connection)
    with pytest.raises(UnknownAccount, match="ann"):
        await erase(connection)
    with pytest.raises(UnknownAccount, match=pseudonym):
        await erase(connection, pseudonym)
    await open_account(connection)
    assert (await balance(connection)).available_ms == BASIC_MS
    await assert_sound(connection)


async def test_nothing_but_a_pseudonym_may_be_written_over_an_entry(
    connection: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    await open_account(connection)
    await open_account(connection, "bob")
    await connection.execute("INSERT INTO billing.account VALUES ('erased-x', now())")
    await settle(connection, the_end(await held(connection, a_request()), 10))
    pseudonym = await erase(connection, "bob")

    for statement in (
        "UPDATE billing.transfer SET account_id = account_id",
        "UPDATE billing.transfer SET account_id = 'bob' WHERE account_id = 'ann'",
        "UPDATE billing.transfer SET account_id = 'erased-x', amount = amount + 1 WHERE account_id = 'ann'",
        "UPDATE billing.transfer SET account_id = 'erased-x', debit_account = 'issued'",
        f"UPDATE billing.transfer SET account_id = 'erased-x' WHERE account_id = '{pseudonym}'",
        "UPDATE billing.settlement SET account_id = 'erased-x', billed_ms = 0",
        "UPDATE billing.audit_event SET target = 'accounts/bob'",
        "UPDATE billing.audit_event SET target = 'accounts/erased-x', reason = ''",
    ):
        with subtests.test(statement), pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
            await connection.execute(statement)
