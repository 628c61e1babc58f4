"""Movements of every kind by many connections on few accounts, over months: the books stay sound."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from datetime import datetime, timedelta
from uuid import uuid4

import asyncpg
import pytest
from ledger_building import (
    START,
    a_pricing,
    a_request,
    assert_sound,
    hold,
    open_account,
    overage,
    settle,
    the_end,
)
from ledger_plans import a_plan, a_version

from billing import accounts, admin, auditor, expiry, plan_changes, refund_undo, refunds
from billing.entries import Source
from billing.ledger import Ending, HoldPlaced
from billing.plans import EffectiveFrom
from billing.refusals import Refusal

ACCOUNTS = ("ann", "bob", "cid")
PLANS = ("small", "large", "saver")
CONNECTIONS = 8
DEEDS = 40
"""Of each connection, in each round."""
MOST_ROUNDS = 10
EVERY_KIND = {"expiry", "refund", "refund_undo", "plan_change", "promo", "purchase", "rollover"}


class Crowd:
    """One connection's share of it. Time is the same for all and goes on by hours with each deed."""

    passed = timedelta()

    def __init__(self, connection: asyncpg.Connection, seed: int) -> None:
        self._connection = connection
        self._random = random.Random(seed)
        self._jobs: list[tuple[str, str]] = []
        self._refunded: list[tuple[str, str]] = []

    async def act(self) -> None:
        for _ in range(DEEDS):
            Crowd.passed += timedelta(hours=self._random.randint(0, 16))
            deed = self._random.choice(
                [
                    self._run,
                    self._run,
                    self._run,
                    self._refund,
                    self._take_refund_back,
                    self._change,
                    self._adjust,
                    self._sweep,
                    self._update,
                ]
            )
            # What is refused has changed nothing.
            with suppress(Refusal):
                await deed(self._random.choice(ACCOUNTS), START + Crowd.passed)

    async def _run(self, account: str, at: datetime) -> None:
        request = a_request(
            self._random.randint(1, 3000), account=account, pricing=a_pricing(overage=True), at=at
        )
        (outcome,) = await hold(self._connection, request)
        if isinstance(outcome, HoldPlaced):
            await asyncio.sleep(0)
            measured_ms = self._random.randint(0, 4000)
            ending = self._random.choice([Ending.POST, Ending.POST, Ending.VOID])
            await settle(
                self._connection, the_end(request, measured_ms, ending=ending, at=START + Crowd.passed)
            )
            self._jobs.append((account, request.job_id))

    async def _refund(self, _: str, at: datetime) -> None:
        if self._jobs:
            account, job = self._random.choice(self._jobs)
            async with self._connection.transaction():
                await refunds.refund(
                    self._connection,
                    account_id=account,
                    job_id=job,
                    amount_ms=self._random.choice([None, 1, 500]),
                    actor="accounts/root",
                    reason="test",
                    request_id=str(uuid4()),
                    at=at,
                )
            self._refunded.append((account, job))

    async def _take_refund_back(self, _: str, at: datetime) -> None:
        if self._refunded:
            account, job = self._random.choice(self._refunded)
            async with self._connection.transaction():
                await refund_undo.undo(
                    self._connection,
                    account_id=account,
                    job_id=job,
                    etag="",
                    actor="accounts/root",
                    reason="test",
                    request_id=str(uuid4()),
                    at=at,
                )

    async def _change(self, account: str, at: datetime) -> None:
        async with self._connection.transaction():
            await plan_changes.change(
                self._connection,
                account,
                self._random.choice(PLANS),
                etag="",
                actor=f"accounts/{account}",
                reason="test",
                request_id=str(uuid4()),
                at=at,
            )

    async def _adjust(self, account: str, at: datetime) -> None:
        async with self._connection.transaction():
            await admin.adjust_balance(
                self._connection,
                account,
                self._random.choice([-1500, -100, 1, 2500]),
                actor="accounts/root",
                reason="test",
                request_id=str(uuid4()),
                expires_at=self._random.choice([None, at + timedelta(days=5)]),
                at=at,
                source=self._random.choice([Source.ADMIN, Source.PROMO, Source.PURCHASE]),
            )

    async def _sweep(self, _: str, at: datetime) -> None:
        async with self._connection.transaction():
            await expiry.expire(self._connection, at, 2)

    async def _update(self, _: str, at: datetime) -> None:
        # Two at once: the second is an EtagMismatch, which is a refusal.
        await a_version(
            self._connection,
            self._random.choice(PLANS),
            at=at,
            effective_from=self._random.choice(list(EffectiveFrom)),
            quota_ms=self._random.randint(0, 20_000),
            rollover_ms=self._random.randint(0, 5000),
        )


@pytest.mark.parametrize("seed", range(3))
async def test_movements_of_every_kind_leave_the_books_sound(
    database: str, connection: asyncpg.Connection, seed: int
) -> None:
    Crowd.passed = timedelta()
    await a_plan(connection, "small", quota_ms=5000, price_micros=10_000_000)
    await a_plan(connection, "large", quota_ms=15_000, price_micros=20_000_000)
    await a_plan(connection, "saver", quota_ms=5000, price_micros=11_000_000, rollover_ms=3000)
    for account, plan in zip(ACCOUNTS, PLANS, strict=True):
        await open_account(connection, account, plan=plan)
        await overage(connection, account=account, cap=5_000_000)
    clients = [await asyncpg.connect(database) for _ in range(CONNECTIONS)]
    crowd = [Crowd(client, seed * CONNECTIONS + number) for number, client in enumerate(clients)]
    kinds: set[str] = set()
    try:
        # Who comes first decides what is refused: no seed says which kinds one round has.
        for _ in range(MOST_ROUNDS):
            await asyncio.gather(*(each.act() for each in crowd))
            kinds = {code for (code,) in await connection.fetch("SELECT DISTINCT code FROM billing.transfer")}
            if kinds >= EVERY_KIND:
                break
    finally:
        for client in clients:
            await client.close()

    assert kinds >= EVERY_KIND
    await assert_sound(connection)
    # And again when all of it is over.
    later = START + Crowd.passed + timedelta(days=70)
    async with connection.transaction():
        await accounts.lock(connection, ACCOUNTS, later)
        await expiry.expire(connection, later, 100)
    assert (
        await connection.fetchval(
            "SELECT count(*) FROM billing.grant_lot WHERE NOT closed AND expires_at <= $1", later
        )
        == 0
    )
    await assert_sound(connection)
    assert await auditor.replay(connection) == []
