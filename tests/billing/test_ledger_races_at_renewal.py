"""Hundreds act on a few accounts within a microsecond of their renewal: the ledger is sound afterwards."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from random import Random
from uuid import uuid4

import asyncpg
from ledger_at_once import BY_ROOT, crowd, refund
from ledger_building import (
    a_pricing,
    a_request,
    adjust,
    after,
    assert_sound,
    balance,
    hold,
    open_account,
    overage,
    settle,
    the_end,
)

from billing import accounts, expiry, plan_changes, plans
from billing.auditor import replay
from billing.ledger import Ending, HoldPlaced
from billing.plans import EffectiveFrom
from billing.prices import price_micros
from billing.refusals import Refusal

ACCOUNTS = ("ann", "bob", "cid", "dan")
PLANS = ("basic", "standard", "pro")
PRICE = 66_667
RENEWAL = after(days=31)


@dataclass(kw_only=True)
class Actor:
    """One of many, who does one thing to one account, just before or just at its renewal."""

    choice: Random
    account: str = field(init=False)
    at: datetime = field(init=False)

    def __post_init__(self) -> None:
        self.account = self.choice.choice(ACCOUNTS)
        self.at = RENEWAL - timedelta(microseconds=self.choice.choice([0, 1]))

    async def run_a_job(self, one: asyncpg.Connection) -> None:
        terms = a_pricing(
            overage=self.choice.random() < 0.5, multiplier_bp=self.choice.choice([10_000, 13_333])
        )
        job = a_request(self.choice.randint(1, 2_000), account=self.account, pricing=terms, at=self.at)
        (placed,) = await hold(one, job)
        if not isinstance(placed, HoldPlaced):
            return
        ending = self.choice.choice([Ending.POST, Ending.POST, Ending.VOID])
        await settle(one, the_end(job, self.choice.randint(1, 2_500), ending=ending, at=RENEWAL))
        if ending is Ending.POST and self.choice.random() < 0.4:
            await refund(one, replace(job, at=RENEWAL))

    async def run_a_batch(self, one: asyncpg.Connection) -> None:
        """Of several accounts, named in any order."""
        jobs = [
            a_request(self.choice.randint(1, 500), account=account, at=self.at)
            for account in self.choice.sample(ACCOUNTS, 3)
        ]
        outcomes = await hold(one, *jobs)
        placed = [job for job, outcome in zip(jobs, outcomes, strict=True) if isinstance(outcome, HoldPlaced)]
        await settle(one, *(the_end(job, 400, at=self.at) for job in reversed(placed)))

    async def grant_and_take(self, one: asyncpg.Connection) -> None:
        ends = self.choice.choice([None, after(days=32)])
        await adjust(one, self.choice.randint(1, 3_000), account=self.account, expires_at=ends, at=self.at)
        await adjust(one, -self.choice.randint(1, 2_000), account=self.account, at=self.at)

    async def change_plan(self, one: asyncpg.Connection) -> None:
        plan = self.choice.choice(PLANS)
        async with one.transaction():
            shown = await plan_changes.preview(one, self.account, plan, self.at)
        etag = self.choice.choice(["", shown.etag])
        async with one.transaction():
            await plan_changes.change(
                one, self.account, plan, etag=etag, request_id=str(uuid4()), at=self.at, **BY_ROOT
            )

    async def consent(self, one: asyncpg.Connection) -> None:
        cap = price_micros(self.choice.randint(0, 40_000), PRICE)
        async with one.transaction():
            allowed = self.choice.choice([True, False, None])
            await accounts.set_overage(one, self.account, allowed, cap, self.at)

    async def change_a_version(self, one: asyncpg.Connection) -> None:
        read = await plans.newest(one, self.choice.choice(PLANS))
        quota_ms = max(read.quota_ms + self.choice.randint(-5_000, 5_000), 0)
        async with one.transaction():
            await plans.update(
                one,
                replace(read, quota_ms=quota_ms, rollover_ms=self.choice.choice([0, 4_000])),
                etag=read.etag,
                effective_from=self.choice.choice(list(EffectiveFrom)),
                request_id=str(uuid4()),
                at=self.at,
                **BY_ROOT,
            )

    async def sweep(self, one: asyncpg.Connection) -> None:
        async with one.transaction():
            await expiry.expire(one, self.at, self.choice.choice([2, 100]))

    async def look(self, one: asyncpg.Connection) -> None:
        now = await balance(one, self.account, at=self.at)
        assert now.granted_ms == now.used_ms + now.held_ms + now.available_ms


DEEDS = {
    Actor.run_a_job: 6,
    Actor.run_a_batch: 3,
    Actor.grant_and_take: 2,
    Actor.change_plan: 2,
    Actor.consent: 2,
    Actor.change_a_version: 1,
    Actor.sweep: 1,
    Actor.look: 2,
}
"""And how many of each there are."""


async def test_everything_at_once_around_a_renewal_leaves_a_sound_ledger(
    database: str, connection: asyncpg.Connection
) -> None:
    for account in ACCOUNTS:
        await open_account(connection, account, left_ms=8_000)
        await overage(connection, account=account, cap=price_micros(20_000, PRICE))
    done = Counter[str]()

    async def act(pool: asyncpg.Pool, seed: int) -> None:
        choice = Random(seed)
        (deed,) = choice.choices(list(DEEDS), list(DEEDS.values()))
        async with pool.acquire() as one:
            try:
                await deed(Actor(choice=choice), one)
                done[deed.__name__] += 1
            except Refusal:
                done["refused"] += 1

    async with crowd(database) as pool:
        await asyncio.gather(*(act(pool, seed) for seed in range(300)))

    assert len(done) == len(DEEDS) + 1, f"something never happened: {done}"
    await assert_sound(connection)
    assert await replay(connection) == []
    assert await connection.fetchval("SELECT count(*) FROM billing.hold WHERE state = 'open'") == 0
    for account in ACCOUNTS:
        assert (await balance(connection, account, at=RENEWAL)).period_start == RENEWAL
