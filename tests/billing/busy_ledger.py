"""A ledger in which everything has happened once, and ways to break it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from uuid import uuid4

import asyncpg
from ledger_building import (
    PRICE,
    START,
    a_pricing,
    a_request,
    adjust,
    after,
    balance,
    change_plan,
    held,
    open_account,
    overage,
    refund,
    settle,
    the_end,
)

from billing import admin, expiry, hold_expiry, plan_changes, plan_undo, refund_undo
from billing.entries import Source
from billing.ledger import Ending
from billing.prices import ChargeMode, price_micros


async def fill(connection: asyncpg.Connection) -> None:
    """Every kind of movement: ends of holds, several lots, metered, overrun, relax, absorbed, refunds to lots
    that live and that ended, an upgrade, an expiry, two periods; a hold that nobody ended, an upgrade that
    was taken back; overruns that are paid, and that nobody could pay, for want of consent and of room in a
    cap; a refund that was taken back. Accounts: ann, ben, cid, dan, eve, fay, gil.
    """
    await open_account(connection, left_ms=1000)
    await adjust(connection, 500)
    await overage(connection, cap=price_micros(10_000, PRICE))
    await settle(connection, the_end(await held(connection, a_request(1200)), 1150))
    lost = await held(connection, a_request(100))
    await settle(connection, the_end(lost, ending=Ending.VOID, absorbed_ms=70))
    again = await held(connection, a_request(100, job=lost.job_id))
    await settle(connection, the_end(again, 120))
    consenting = a_pricing(overage=True)
    metered = await held(connection, a_request(900, pricing=consenting))
    await settle(connection, the_end(metered, 950))
    await held(connection, a_request(300, pricing=consenting))
    relax = a_request(pricing=a_pricing(mode=ChargeMode.RELAX))
    await settle(connection, the_end(relax, 800, tier="relax"))
    await refund(connection, again.job_id, 50)
    await refund(connection, metered.job_id, 600)
    await held(connection, a_request(100, at=after(days=31)))

    await open_account(connection, "ben")
    await grant_promo(connection, "ben", 1_000)
    await upgrade(connection, "ben", "standard", after(days=10))
    first = await held(connection, a_request(1500, account="ben", at=after(days=10)))
    await settle(connection, the_end(first, 1500))
    async with connection.transaction():
        await expiry.expire(connection, after(days=40), 100)
    await refund(connection, first.job_id, 1_200, account="ben", at=after(days=40))

    await open_account(connection, "cid")
    await upgrade(connection, "cid", "standard", after(days=5))
    await held(connection, a_request(1_000, account="cid", at=after(days=5)))
    async with connection.transaction():
        due = [
            one for one in await hold_expiry.due(connection, after(days=6), 100) if one.account_id == "cid"
        ]
        await hold_expiry.expire(connection, due, after(days=6))
        await plan_undo.undo(
            connection,
            "cid",
            etag="",
            actor="accounts/root",
            reason="test",
            request_id=str(uuid4()),
            at=after(days=6),
        )

    await open_account(connection, "dan")
    await settle(connection, the_end(await held(connection, a_request(100, account="dan")), 130))
    await balance(connection, "dan", at=after(days=31))

    await open_account(connection, "eve", left_ms=100)
    await settle(connection, the_end(await held(connection, a_request(90, account="eve")), 130))

    await open_account(connection, "fay", left_ms=0)
    await overage(connection, account="fay", cap=price_micros(120, PRICE))
    capped = await held(connection, a_request(100, account="fay", pricing=consenting))
    await settle(connection, the_end(capped, 130))

    await open_account(connection, "gil")
    taken_back = await held(connection, a_request(100, account="gil"))
    await settle(connection, the_end(taken_back, 100))
    await refund(connection, taken_back.job_id, 60, account="gil")
    async with connection.transaction():
        await refund_undo.undo(
            connection,
            account_id="gil",
            job_id=taken_back.job_id,
            etag="",
            actor="accounts/root",
            reason="test",
            request_id=str(uuid4()),
            at=START,
        )


async def upgrade(connection: asyncpg.Connection, account: str, plan: str, at: datetime) -> None:
    async with connection.transaction():
        planned = await plan_changes.preview(connection, account, plan, at)
    await change_plan(connection, plan, at=at, etag=planned.etag, account=account)


async def grant_promo(connection: asyncpg.Connection, account: str, amount_ms: int) -> None:
    async with connection.transaction():
        await admin.adjust_balance(
            connection,
            account,
            amount_ms,
            actor="accounts/root",
            reason="test",
            request_id=str(uuid4()),
            expires_at=after(days=20),
            at=START,
            source=Source.PROMO,
        )


async def without_its_guards(connection: asyncpg.Connection) -> None:
    """Drop every constraint, unique index and trigger of the ledger's tables that is in the way."""
    await connection.execute("SET session_replication_role = replica")
    for constraint in await connection.fetch(
        """SELECT conrelid::regclass::text AS "table", conname FROM pg_constraint
            WHERE connamespace = 'billing'::regnamespace AND contype IN ('c', 'u')"""
    ):
        await connection.execute(
            f'ALTER TABLE {constraint["table"]} DROP CONSTRAINT "{constraint["conname"]}" CASCADE'
        )
    for index in await connection.fetch(
        """SELECT indexrelid::regclass::text AS name FROM pg_index
            WHERE indrelid::regclass::text LIKE 'billing.%' AND indisunique AND NOT indisprimary"""
    ):
        await connection.execute(f"DROP INDEX {index['name']}")


@asynccontextmanager
async def undone(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Undo what is done in the context, whether it succeeds or fails."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()
