"""Refunds taken back: charged again, once each, newest first, and never more than was given back."""

from __future__ import annotations

import asyncio
from datetime import datetime
from uuid import uuid4

import asyncpg
import pytest
from ledger_at_once import crowd
from ledger_building import (
    PRICE,
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
    refund,
    settle,
    the_end,
)
from test_ledger_refunds import charged, lots, metered

from billing import accounts, refund_undo, statements
from billing.auditor import replay
from billing.prices import price_micros
from billing.refund_undo import RefundUndone
from billing.refusals import EtagMismatch, NoRefundToUndo, RefundSpent, RefundTooLarge


async def undo(
    connection: asyncpg.Connection, job: str, *, etag: str = "", account: str = "ann", at: datetime = START
) -> RefundUndone:
    async with connection.transaction():
        return await refund_undo.undo(
            connection,
            account_id=account,
            job_id=job,
            etag=etag,
            actor="accounts/root",
            reason="a mistake",
            request_id=str(uuid4()),
            at=at,
        )


async def sound(connection: asyncpg.Connection) -> None:
    await assert_sound(connection)
    assert await replay(connection) == []


async def test_time_that_was_given_back_is_charged_again_to_the_lots_it_went_to(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=1000)
    await adjust(connection, 500)
    job = await charged(connection, a_request(1400), 1400)
    before = await balance(connection)
    await refund(connection, job, 600)

    undone = await undo(connection, job)

    assert (undone.taken_ms, undone.kept_ms, undone.taken_micros) == (600, 0, 0)
    assert (undone.refunded_in_all_ms, undone.billed_ms) == (0, 1400)
    assert await lots(connection) == [("plan", 1000), ("admin", 400)]
    assert await balance(connection) == before
    await sound(connection)


async def test_all_of_the_money_is_owed_again_whatever_the_cap_is_by_now(
    connection: asyncpg.Connection,
) -> None:
    job = await metered(connection, over_ms=60_001)
    paid = price_micros(60_001, PRICE)
    await refund(connection, job)
    assert (await balance(connection)).overage_posted_micros == 0
    await overage(connection, cap=1)

    undone = await undo(connection, job)

    assert (undone.taken_ms, undone.taken_micros, undone.currency) == (61_001, paid, "USD")
    now = await balance(connection)
    assert (now.overage_posted_micros, now.available_ms) == (paid, 0)
    await sound(connection)


async def test_what_was_used_of_it_or_is_held_stays_and_nothing_else_is_touched(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=1000)
    job = await charged(connection, a_request(1000), 1000)
    await refund(connection, job)
    await charged(connection, a_request(300), 300)
    running = await held(connection, a_request(250))
    await adjust(connection, 5000)

    undone = await undo(connection, job)

    assert (undone.taken_ms, undone.kept_ms, undone.refunded_in_all_ms) == (450, 550, 550)
    assert (await balance(connection)).available_ms == 5000
    await settle(connection, the_end(running, 250))
    await sound(connection)
    with pytest.raises(NoRefundToUndo):
        await undo(connection, job)


async def test_of_a_refund_that_is_all_used_nothing_can_be_taken_and_it_can_be_tried_again(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=1000)
    job = await charged(connection, a_request(1000), 1000)
    await refund(connection, job)
    running = await held(connection, a_request(1000))
    with pytest.raises(RefundSpent) as refused:
        await undo(connection, job)
    assert refused.value.metadata() == {"job_id": job, "refunded_ms": "1000"}

    await settle(connection, the_end(running, 400))
    assert (await undo(connection, job)).taken_ms == 600
    await sound(connection)


async def test_refunds_are_taken_back_newest_first_once_each_and_can_be_given_anew(
    connection: asyncpg.Connection,
) -> None:
    job = await metered(connection, over_ms=60_001)
    paid = price_micros(60_001, PRICE)
    await refund(connection, job, 30_000)
    await refund(connection, job)

    first = await undo(connection, job)
    assert (first.taken_ms, first.refunded_in_all_ms) == (31_001, 30_000)
    again = await refund(connection, job, 1_000)
    assert again.refunded_in_all_ms == 31_000
    assert [(await undo(connection, job)).taken_ms for _ in range(2)] == [1_000, 30_000]
    with pytest.raises(NoRefundToUndo):
        await undo(connection, job)
    assert (await balance(connection)).overage_posted_micros == paid

    assert (await refund(connection, job)).refunded_micros == paid
    with pytest.raises(RefundTooLarge):
        await refund(connection, job)
    await sound(connection)


async def test_a_refund_after_its_lots_ended_is_taken_from_the_lot_it_made_and_can_be_given_anew(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=1000)
    job = await charged(connection, a_request(1000), 1000)
    later = after(days=40)
    await refund(connection, job, 800, at=later)
    before = await balance(connection, at=later)

    undone = await undo(connection, job, at=later)

    assert (undone.taken_ms, undone.kept_ms) == (800, 0)
    now = await balance(connection, at=later)
    assert now.available_ms == before.available_ms - 800
    await sound(connection)
    assert (await refund(connection, job, at=later)).refunded_ms == 1000
    await sound(connection)
    assert (await balance(connection, at=later)).available_ms == before.available_ms + 200


async def test_of_an_earlier_period_it_leaves_the_balance_as_it_was(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=1000)
    await adjust(connection, 500)
    job = await charged(connection, a_request(1400), 1400)
    later = after(days=40)
    before = await balance(connection, at=later)
    await refund(connection, job, at=later)
    await undo(connection, job, at=later)
    assert await balance(connection, at=later) == before
    await sound(connection)


async def test_what_is_gone_with_its_lot_stays_given_back(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=1000)
    await adjust(connection, 500, expires_at=after(days=2))
    job = await charged(connection, a_request(1500), 1500)
    await refund(connection, job)
    undone = await undo(connection, job, at=after(days=3))
    assert (undone.taken_ms, undone.kept_ms) == (1000, 500)
    await sound(connection)


async def test_the_etag_names_the_refund_so_that_two_who_undo_it_undo_one(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    job = await charged(connection, a_request(1000), 1000)
    await refund(connection, job, 100)
    await refund(connection, job, 200)
    transaction = connection.transaction()
    await transaction.start()
    shown = await undo(connection, job)
    await transaction.rollback()

    async def by_another(pool: asyncpg.Pool) -> RefundUndone | EtagMismatch:
        async with pool.acquire() as other:
            try:
                return await undo(other, job, etag=shown.etag)
            except EtagMismatch as refused:
                return refused

    async with crowd(database) as pool:
        done = await asyncio.gather(*(by_another(pool) for _ in range(4)))

    assert [one for one in done if not isinstance(one, EtagMismatch)] == [shown]
    assert (await balance(connection)).used_ms == 900
    await sound(connection)


async def test_a_job_without_a_refund_and_one_of_another_account_have_nothing_to_take_back(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    await open_account(connection, "ben")
    job = await charged(connection, a_request(1000), 1000)
    with pytest.raises(NoRefundToUndo):
        await undo(connection, job)
    await refund(connection, job)
    with pytest.raises(NoRefundToUndo) as refused:
        await undo(connection, job, account="ben")
    assert refused.value.metadata() == {"job_id": job}


async def test_a_statement_tells_it_and_adds_up(connection: asyncpg.Connection) -> None:
    job = await metered(connection, over_ms=60_000)
    await refund(connection, job)
    await undo(connection, job)
    async with connection.transaction():
        terms = await accounts.lock_terms(connection, "ann", START)
        told = await statements.statement(connection, terms, None, START)
    assert told.amounts == {"USD": price_micros(60_000, PRICE)}
    assert (told.used_ms, told.metered_ms) == (1_000, 60_000)
    (line,) = [line for line in told.lines if line.sentence.startswith("Charged again")]
    assert line.sentence == (
        "Charged again, what had been given back: 1.000 s of fast time; and 0.0667 USD for 60.000 s."
    )
    assert str(line.job_id) == job


async def test_it_is_on_record_and_follows_its_account_when_that_is_erased(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    job = await charged(connection, a_request(1000, pricing=a_pricing()), 1000)
    await refund(connection, job)
    await undo(connection, job)
    event = await connection.fetchrow("SELECT * FROM billing.audit_event WHERE action = 'UndoRefund'")
    assert event is not None
    assert (event["actor"], event["reason"]) == ("accounts/root", "a mistake")
    assert event["target"] == f"accounts/ann/jobs/{job}"
    async with connection.transaction():
        pseudonym = await accounts.erase(connection, "ann", START)
    assert await connection.fetchval("SELECT account_id FROM billing.refund_undo") == pseudonym
    await sound(connection)
