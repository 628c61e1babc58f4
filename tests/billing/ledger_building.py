"""Builds what the ledger's tests need, naming only what a test is about."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import asyncpg

from billing import accounts, admin, ledger, plan_changes, refunds
from billing.invariants import check
from billing.ledger import (
    Balance,
    Ending,
    HoldPlaced,
    HoldRefused,
    HoldRequest,
    Settled,
    Settlement,
)
from billing.plan_changes import PlanChange
from billing.prices import ChargeMode, PricingSnapshot
from billing.refunds import Refunded

START = datetime(2026, 3, 1, tzinfo=UTC)
BASIC_MS = 12_000_000
PRICE = 66_667
"""Of a metered minute, in millionths of a dollar."""


def after(**span: float) -> datetime:
    """Return a moment this long after the accounts of these tests begin."""
    return START + timedelta(**span)


def a_pricing(
    *,
    multiplier_bp: int = 10_000,
    overage: bool = False,
    price: int = PRICE,
    mode: ChargeMode = ChargeMode.FAST,
) -> PricingSnapshot:
    return PricingSnapshot(
        plan="basic",
        plan_version=1,
        charge_mode=mode,
        multiplier_bp=multiplier_bp,
        overage_allowed=overage,
        overage_micros_per_minute=price,
        currency="USD",
    )


def a_request(
    predicted_ms: int = 60_000,
    *,
    account: str = "ann",
    job: str | None = None,
    attempt: str | None = None,
    pricing: PricingSnapshot | None = None,
    at: datetime = START,
) -> HoldRequest:
    return HoldRequest(
        job_id=job or str(uuid4()),
        attempt_id=attempt or str(uuid4()),
        account_id=account,
        predicted_ms=predicted_ms,
        pricing=pricing or a_pricing(),
        at=at,
    )


def the_end(
    request: HoldRequest,
    measured_ms: int = 0,
    *,
    ending: Ending = Ending.POST,
    tier: ledger.Tier = "fast",
    absorbed_ms: int = 0,
    at: datetime | None = None,
) -> Settlement:
    return Settlement(
        job_id=request.job_id,
        attempt_id=request.attempt_id,
        account_id=request.account_id,
        tier=tier,
        ending=ending,
        measured_ms=measured_ms,
        absorbed_ms=absorbed_ms,
        pricing=request.pricing,
        at=at or request.at,
    )


async def open_account(
    connection: asyncpg.Connection,
    account: str = "ann",
    *,
    plan: str = "basic",
    left_ms: int | None = None,
    at: datetime = START,
) -> None:
    """Open an account; with `left_ms`, an admin takes time away until that is left."""
    async with connection.transaction():
        await accounts.create(connection, account, plan, at)
    if left_ms is not None:
        quota_ms = (await balance(connection, account, at=at)).available_ms
        await adjust(connection, left_ms - quota_ms, account=account, at=at)


async def adjust(
    connection: asyncpg.Connection,
    amount_ms: int,
    *,
    account: str = "ann",
    request_id: str | None = None,
    expires_at: datetime | None = None,
    at: datetime = START,
) -> Balance:
    async with connection.transaction():
        return await admin.adjust_balance(
            connection,
            account,
            amount_ms,
            actor="accounts/root",
            reason="test",
            request_id=request_id or str(uuid4()),
            expires_at=expires_at,
            at=at,
        )


async def refund(
    connection: asyncpg.Connection,
    job: str,
    amount_ms: int | None = None,
    *,
    account: str = "ann",
    request_id: str | None = None,
    at: datetime = START,
) -> Refunded:
    async with connection.transaction():
        return await refunds.refund(
            connection,
            account_id=account,
            job_id=job,
            amount_ms=amount_ms,
            actor="accounts/root",
            reason="test",
            request_id=request_id or str(uuid4()),
            at=at,
        )


async def change_plan(
    connection: asyncpg.Connection, plan: str, at: datetime, *, etag: str = "", account: str = "ann"
) -> PlanChange:
    async with connection.transaction():
        return await plan_changes.change(
            connection,
            account,
            plan,
            etag=etag,
            actor=f"accounts/{account}",
            reason="test",
            request_id=str(uuid4()),
            at=at,
        )


async def hold(connection: asyncpg.Connection, *requests: HoldRequest) -> list[HoldPlaced | HoldRefused]:
    async with connection.transaction():
        return await ledger.place_holds(connection, requests)


async def held(connection: asyncpg.Connection, request: HoldRequest) -> HoldRequest:
    """Place a hold that must succeed, and return its request."""
    (outcome,) = await hold(connection, request)
    assert isinstance(outcome, HoldPlaced), outcome
    return request


async def settle(connection: asyncpg.Connection, *settlements: Settlement) -> list[Settled]:
    async with connection.transaction():
        return await ledger.settle(connection, settlements)


async def balance(connection: asyncpg.Connection, account: str = "ann", *, at: datetime = START) -> Balance:
    async with connection.transaction():
        return await ledger.balance(connection, account, at)


async def overage(
    connection: asyncpg.Connection, *, account: str = "ann", cap: int | None = None, at: datetime = START
) -> None:
    async with connection.transaction():
        await accounts.set_overage(connection, account, True, cap, at)


async def assert_sound(connection: asyncpg.Connection) -> None:
    assert await check(connection) == []
