"""Changes of plan taken back: their money in full, what is left of their time, once each, newest first."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from uuid import uuid4

import asyncpg
import pytest
from ledger_at_once import crowd
from ledger_building import (
    START,
    a_request,
    after,
    assert_sound,
    balance,
    change_plan,
    held,
    open_account,
    settle,
    the_end,
)
from ledger_plans import a_plan, a_version

from billing import accounts, plan_undo, statements
from billing.auditor import replay
from billing.plan_undo import PlanUndo
from billing.plans import EffectiveFrom
from billing.refusals import EtagMismatch, NothingToUndo

MINUTE = 60_000
HALF = START + timedelta(days=15, hours=12)
"""Half of the month that the accounts of these tests begin with."""
LATER = HALF + timedelta(hours=1)


@pytest.fixture
async def upgraded(connection: asyncpg.Connection) -> asyncpg.Connection:
    """A ledger in which ann changed from small to large at half the month: +350 minutes, -5 and +10 USD."""
    await a_plan(connection, "small", quota_ms=200 * MINUTE, price_micros=10_000_000)
    await a_plan(connection, "large", quota_ms=900 * MINUTE, price_micros=20_000_000)
    await open_account(connection, plan="small")
    await change_plan(connection, "large", at=HALF)
    return connection


async def undo(connection: asyncpg.Connection, at: datetime = LATER, *, etag: str = "") -> PlanUndo:
    async with connection.transaction():
        return await plan_undo.undo(
            connection,
            "ann",
            etag=etag,
            actor="accounts/root",
            reason="a mistake",
            request_id=str(uuid4()),
            at=at,
        )


async def owed_micros(connection: asyncpg.Connection) -> int:
    owed: int = await connection.fetchval(
        """SELECT COALESCE(sum(CASE WHEN credit_account = 'revenue' THEN amount ELSE -amount END), 0)::bigint
             FROM billing.transfer WHERE 'subscription/ann' IN (debit_account, credit_account)"""
    )
    return owed


async def sound(connection: asyncpg.Connection) -> None:
    await assert_sound(connection)
    assert await replay(connection) == []


async def use(connection: asyncpg.Connection, ms: int, at: datetime) -> None:
    await settle(connection, the_end(await held(connection, a_request(ms, at=at)), ms))


async def test_an_unused_change_is_undone_to_the_last_millisecond_and_cent(
    upgraded: asyncpg.Connection,
) -> None:
    undone = await undo(upgraded)

    assert (undone.from_plan, undone.to_plan, undone.at_once) == ("large", "small", True)
    assert (undone.revoked_ms, undone.kept_ms) == (350 * MINUTE, 0)
    assert (undone.amount_micros, undone.currency) == (-5_000_000, "USD")
    now = await balance(upgraded, at=LATER)
    assert (now.plan, now.available_ms) == ("small", 200 * MINUTE)
    assert await owed_micros(upgraded) == 0
    rows = await upgraded.fetch(
        """SELECT kind, debit_account, credit_account, amount FROM billing.transfer
            WHERE code = 'plan_undo' ORDER BY transfer_id"""
    )
    assert [tuple(row)[2:] for row in rows] == [
        ("revoked", 350 * MINUTE),
        ("subscription/ann", 10_000_000),
        ("revenue", 5_000_000),
    ]
    assert (await balance(upgraded, at=after(days=31))).available_ms == 200 * MINUTE
    await sound(upgraded)


async def test_what_was_used_of_it_stays_and_the_money_goes_back_all_the_same(
    upgraded: asyncpg.Connection,
) -> None:
    await use(upgraded, 300 * MINUTE, HALF)
    running = await held(upgraded, a_request(50 * MINUTE, at=HALF))

    undone = await undo(upgraded)

    assert (undone.revoked_ms, undone.kept_ms) == (200 * MINUTE, 150 * MINUTE)
    assert await owed_micros(upgraded) == 0
    now = await balance(upgraded, at=LATER)
    assert (now.used_ms, now.held_ms, now.available_ms) == (300 * MINUTE, 50 * MINUTE, 0)
    await settle(upgraded, the_end(running, 50 * MINUTE, at=LATER))
    await sound(upgraded)


async def test_a_change_is_undone_once_and_those_before_it_after_it(upgraded: asyncpg.Connection) -> None:
    await a_plan(upgraded, "huge", quota_ms=9_000 * MINUTE, price_micros=90_000_000)
    await change_plan(upgraded, "huge", at=LATER)

    assert [(await undo(upgraded)).to_plan for _ in range(2)] == ["large", "small"]
    with pytest.raises(NothingToUndo):
        await undo(upgraded)

    assert (await balance(upgraded, at=LATER)).available_ms == 200 * MINUTE
    assert await owed_micros(upgraded) == 0
    await sound(upgraded)


async def test_the_etag_names_the_change_so_that_two_who_undo_it_undo_one(
    database: str, upgraded: asyncpg.Connection
) -> None:
    await a_plan(upgraded, "huge", quota_ms=9_000 * MINUTE, price_micros=90_000_000)
    await change_plan(upgraded, "huge", at=LATER)
    transaction = upgraded.transaction()
    await transaction.start()
    shown = await undo(upgraded)
    await transaction.rollback()

    async def act(pool: asyncpg.Pool) -> PlanUndo:
        async with pool.acquire() as one:
            return await undo(one, etag=shown.etag)

    async with crowd(database) as pool:
        done = await asyncio.gather(*(act(pool) for _ in range(8)), return_exceptions=True)

    assert [one for one in done if not isinstance(one, EtagMismatch)] == [shown]
    assert (await balance(upgraded, at=LATER)).plan == "large"
    await sound(upgraded)


async def test_after_its_period_the_money_goes_back_and_the_plan_with_the_next_one(
    upgraded: asyncpg.Connection,
) -> None:
    next_period = after(days=32)

    undone = await undo(upgraded, next_period)

    assert (undone.to_plan, undone.at_once, undone.effective_at) == ("small", False, after(days=61))
    assert (undone.revoked_ms, undone.kept_ms, undone.amount_micros) == (0, 350 * MINUTE, -5_000_000)
    assert (await balance(upgraded, at=next_period)).available_ms == 900 * MINUTE
    assert (await balance(upgraded, at=after(days=61))).available_ms == 200 * MINUTE
    assert await owed_micros(upgraded) == 0
    await sound(upgraded)


async def test_an_account_that_has_gone_to_another_plan_since_stays_on_that(
    upgraded: asyncpg.Connection,
) -> None:
    await change_plan(upgraded, "basic", at=LATER)

    undone = await undo(upgraded, after(days=32))

    assert (undone.from_plan, undone.to_plan, undone.amount_micros) == ("basic", "basic", -5_000_000)
    assert (await balance(upgraded, at=after(days=62))).plan == "basic"
    await sound(upgraded)


async def test_a_change_that_was_to_come_stays_unless_it_comes_to_the_same(
    upgraded: asyncpg.Connection,
) -> None:
    async def scheduled() -> str | None:
        return await upgraded.fetchval("SELECT scheduled_plan FROM billing.subscription")

    await change_plan(upgraded, "small", at=LATER)
    await undo(upgraded)
    assert await scheduled() is None
    await change_plan(upgraded, "large", at=LATER)
    await change_plan(upgraded, "basic", at=LATER)
    await undo(upgraded)
    assert await scheduled() == "basic"
    await sound(upgraded)


async def test_what_a_new_version_gave_on_the_larger_plan_goes_with_it(upgraded: asyncpg.Connection) -> None:
    await a_version(upgraded, "large", at=HALF, quota_ms=1_000 * MINUTE, effective_from=EffectiveFrom.NOW)
    assert (await balance(upgraded, at=LATER)).available_ms == 650 * MINUTE

    assert (await undo(upgraded)).revoked_ms == 450 * MINUTE

    assert (await balance(upgraded, at=LATER)).available_ms == 200 * MINUTE
    await a_version(upgraded, "small", at=LATER, quota_ms=210 * MINUTE, effective_from=EffectiveFrom.NOW)
    assert (await balance(upgraded, at=LATER)).available_ms == 210 * MINUTE
    await sound(upgraded)


async def test_a_change_that_only_cost_money_is_undone_too(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "small", quota_ms=200 * MINUTE, price_micros=10_000_000)
    await a_plan(connection, "dear", quota_ms=200 * MINUTE, price_micros=30_000_000)
    await open_account(connection, plan="small")
    await change_plan(connection, "dear", at=HALF)

    undone = await undo(connection)

    assert (undone.revoked_ms, undone.amount_micros) == (0, -10_000_000)
    assert await owed_micros(connection) == 0
    await sound(connection)


async def test_an_account_without_such_a_change_has_nothing_to_undo(connection: asyncpg.Connection) -> None:
    await open_account(connection, plan="standard")
    await change_plan(connection, "basic", at=HALF)
    with pytest.raises(NothingToUndo):
        await undo(connection)


async def test_the_statement_says_what_was_done_and_adds_up(upgraded: asyncpg.Connection) -> None:
    await undo(upgraded)

    async with upgraded.transaction():
        terms = (await accounts.terms(upgraded, ["ann"], LATER))["ann"]
        found = await statements.statement(upgraded, terms, None, LATER)

    assert (found.plan, found.granted_ms, found.revoked_ms) == ("small", 550 * MINUTE, 350 * MINUTE)
    assert found.amounts == {"USD": 0}
    said = " ".join(line.sentence for line in found.lines)
    assert "Given back 10.0000 USD, which a change of plan that was taken back had charged." in said
    assert "Taken back 350.0 GPU-minutes, with the change of plan that had given them." in said
