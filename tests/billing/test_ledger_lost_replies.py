"""The answer to a commit is lost: who asks again gets the first outcome, and everything was done once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import asyncpg
import pytest
from ledger_building import (
    BASIC_MS,
    START,
    a_pricing,
    a_request,
    after,
    assert_sound,
    balance,
    held,
    hold,
    open_account,
    overage,
    settle,
    the_end,
)
from ledger_plans import a_plan, plan_fields
from reply_proxy import Loses, ReplyProxy, proxy_of

from billing import accounts, admin, expiry, idempotency, plan_changes, plans, refunds
from billing.auditor import replay
from billing.entries import Source
from billing.ledger import AlreadySettled, Ending, HoldRequest
from billing.plans import EffectiveFrom
from billing.refusals import AccountExists
from scheduler.store.lanes import AWAY, Lane

ACTOR = {"actor": "accounts/root", "reason": "test"}


@pytest.fixture
async def proxy(database: str) -> AsyncIterator[ReplyProxy]:
    async with proxy_of(database).open() as proxy:
        yield proxy


@dataclass(kw_only=True)
class Ledger:
    """A ledger behind the proxy, with a job that was charged and one that runs."""

    connection: asyncpg.Connection
    """Directly, to look at what was really done."""
    proxy: ReplyProxy
    charged: HoldRequest
    running: HoldRequest
    outcomes: list[Any] = field(default_factory=list)
    """Of each time, though only the last one reached its caller."""

    async def once(self, act: Callable[[asyncpg.Connection], Awaitable[Any]]) -> Any:
        """Do `act` three times: its commit is lost, then the answer to it, then all goes well.

        Return what arrived in the end. It must be the outcome that was lost, and the first and third time
        must do nothing.
        """
        before = await self.rows()
        await self._lost(Loses.REQUEST, act)
        assert await self.rows() == before
        await self._lost(Loses.ANSWER, act)
        done = await self.rows()
        assert done != before

        outcome = await self._do(act)

        assert outcome == self.outcomes[-2], "the first outcome"
        assert await self.rows() == done
        await assert_sound(self.connection)
        assert await replay(self.connection) == []
        return outcome

    async def _lost(self, loses: Loses, act: Callable[[asyncpg.Connection], Awaitable[Any]]) -> None:
        self.proxy.lose_next(loses)
        lost = self.proxy.lost
        with pytest.raises(AWAY):
            await self._do(act)
        assert self.proxy.lost == lost + 1

    async def _do(self, act: Callable[[asyncpg.Connection], Awaitable[Any]]) -> Any:
        connection = await asyncpg.connect(self.proxy.dsn)
        try:
            async with connection.transaction():
                self.outcomes.append(await act(connection))
            return self.outcomes[-1]
        finally:
            connection.terminate()

    async def rows(self) -> list[Any]:
        """Return whatever a deed that is done twice would add to or move."""
        return await self.connection.fetch(
            """SELECT 'transfer', count(*), sum(amount) FROM billing.transfer
               UNION ALL SELECT 'audit', count(*), 0 FROM billing.audit_event
               UNION ALL SELECT 'hold', count(*), count(ended_at) FROM billing.hold
               UNION ALL SELECT 'lot', count(*), sum(used_ms + held_ms + revoked_ms + expired_ms)
                           FROM billing.grant_lot
               UNION ALL SELECT 'plan', count(*), max(version) FROM billing.plan_version
               UNION ALL SELECT 'consent', count(*), sum(spend_cap_micros) FROM billing.subscription
               UNION ALL SELECT 'erased', count(erased_at), count(*) FROM billing.account"""
        )


@pytest.fixture
async def ledger(connection: asyncpg.Connection, proxy: ReplyProxy) -> Ledger:
    await open_account(connection)
    charged = await held(connection, a_request(60_000))
    await settle(connection, the_end(charged, 50_000))
    running = await held(connection, a_request(60_000))
    return Ledger(connection=connection, proxy=proxy, charged=charged, running=running)


def keyed(
    method: str, act: Callable[[asyncpg.Connection], Awaitable[dict[str, Any]]]
) -> Callable[[asyncpg.Connection], Awaitable[dict[str, Any]]]:
    """Do `act` as every door does: claim its request id first, store its answer last."""

    async def claimed(connection: asyncpg.Connection) -> dict[str, Any]:
        first = await idempotency.claim(connection, "root", method, "r1", b"same")
        if first is not None:
            return first
        answer = await act(connection)
        await idempotency.store(connection, "root", method, "r1", answer)
        return answer

    return claimed


async def test_a_hold_is_placed_once(ledger: Ledger) -> None:
    requests = [a_request(1000), a_request(2000)]
    await ledger.once(lambda connection: hold(connection, *requests))
    assert (await balance(ledger.connection)).held_ms == 60_000 + 3000


async def test_an_attempt_is_charged_once(ledger: Ledger) -> None:
    await ledger.once(lambda connection: settled_or_before(connection, ledger.running, 40_000))
    assert (await balance(ledger.connection)).used_ms == 50_000 + 40_000


async def test_an_attempt_that_was_lost_is_voided_once(ledger: Ledger) -> None:
    await ledger.once(
        lambda connection: settled_or_before(connection, ledger.running, 0, absorbed_ms=7_000),
    )
    assert (await balance(ledger.connection)).available_ms == BASIC_MS - 50_000


async def settled_or_before(
    connection: asyncpg.Connection, request: HoldRequest, measured_ms: int, absorbed_ms: int = 0
) -> int:
    """End an attempt as a lane does, to which `AlreadySettled` is an answer; return what it was billed."""
    ending = Ending.VOID if absorbed_ms else Ending.POST
    with suppress(AlreadySettled):
        await settle(connection, the_end(request, measured_ms, ending=ending, absorbed_ms=absorbed_ms))
    billed: int = await connection.fetchval(
        "SELECT billed_ms FROM billing.settlement WHERE attempt_id = $1", request.attempt_id
    )
    return billed


@pytest.mark.parametrize("amount_ms", [500_000, -500_000])
async def test_a_balance_is_adjusted_once(ledger: Ledger, amount_ms: int) -> None:
    async def adjusted(connection: asyncpg.Connection) -> dict[str, Any]:
        after_it = await admin.adjust_balance(
            connection, "ann", amount_ms, request_id="r1", expires_at=None, at=START, **ACTOR
        )
        return {"available_ms": after_it.available_ms}

    outcome = await ledger.once(keyed("AdjustBalance", adjusted))

    assert outcome == {"available_ms": (await balance(ledger.connection)).available_ms}


async def test_a_purchase_is_granted_once(ledger: Ledger) -> None:
    async def bought(connection: asyncpg.Connection) -> dict[str, Any]:
        after_it = await admin.adjust_balance(
            connection,
            "ann",
            3_600_000,
            request_id="r1",
            expires_at=after(days=365),
            at=START,
            source=Source.PURCHASE,
            **ACTOR,
        )
        return {"available_ms": after_it.available_ms}

    await ledger.once(keyed("AdjustBalance", bought))
    assert (await balance(ledger.connection)).available_ms == BASIC_MS + 3_600_000 - 110_000


async def test_a_refund_is_made_once(ledger: Ledger) -> None:
    outcome = await ledger.once(
        lambda connection: refunds.refund(
            connection,
            account_id="ann",
            job_id=ledger.charged.job_id,
            amount_ms=20_000,
            request_id="r1",
            at=START,
            **ACTOR,
        ),
    )
    assert (outcome.refunded_ms, outcome.refunded_in_all_ms) == (20_000, 20_000)


@pytest.mark.parametrize(("plan", "at_once"), [("gold", True), ("tin", False)])
async def test_a_plan_is_changed_once(ledger: Ledger, plan: str, at_once: bool) -> None:
    await a_plan(ledger.connection, "gold", quota_ms=2 * BASIC_MS, price_micros=30_000_000)
    await a_plan(ledger.connection, "tin", quota_ms=BASIC_MS // 2)
    async with ledger.connection.transaction():
        shown = await plan_changes.preview(ledger.connection, "ann", plan, after(days=3))

    async def changed(connection: asyncpg.Connection) -> dict[str, Any]:
        done = await plan_changes.change(
            connection, "ann", plan, etag=shown.etag, request_id="r1", at=after(days=3), **ACTOR
        )
        return {**asdict(done), "effective_at": done.effective_at.isoformat()}

    outcome = await ledger.once(keyed("ChangePlan", changed))

    assert (outcome["at_once"], outcome["granted_ms"]) == (at_once, shown.granted_ms)


async def test_a_plan_gets_one_new_version(ledger: Ledger) -> None:
    read = await plans.newest(ledger.connection, "basic")

    async def updated(connection: asyncpg.Connection) -> dict[str, Any]:
        version = await plans.update(
            connection,
            replace(read, quota_ms=BASIC_MS + 1),
            etag=read.etag,
            effective_from=EffectiveFrom.NOW,
            request_id="r1",
            at=START,
            **ACTOR,
        )
        return {"etag": version.etag}

    assert await ledger.once(keyed("UpdatePlan", updated)) == {"etag": "v2"}


async def test_a_plan_is_made_once(ledger: Ledger) -> None:
    async def made(connection: asyncpg.Connection) -> dict[str, Any]:
        version = await plans.create(connection, plan_fields("gold"), request_id="r1", at=START, **ACTOR)
        return {"etag": version.etag}

    assert await ledger.once(keyed("CreatePlan", made)) == {"etag": "v1"}


async def test_consent_is_set_once(ledger: Ledger) -> None:
    async def consented(connection: asyncpg.Connection) -> dict[str, Any]:
        terms = await accounts.set_overage(connection, "ann", True, 5_000_000, START)
        return {"overage_allowed": terms.overage_allowed, "spend_cap_micros": terms.spend_cap_micros}

    outcome = await ledger.once(keyed("SetOverage", consented))
    assert outcome == {"overage_allowed": True, "spend_cap_micros": 5_000_000}


async def test_an_account_is_opened_once(ledger: Ledger) -> None:
    async def opened(connection: asyncpg.Connection) -> dict[str, Any]:
        await accounts.create(connection, "bob", "basic", START)
        return {"account": "bob"}

    await ledger.once(keyed("CreateAccount", opened))
    with pytest.raises(AccountExists):
        await open_account(ledger.connection, "bob")


async def test_a_period_is_ended_once(ledger: Ledger) -> None:
    """Who sweeps has no key: what is over and was ended is not found again."""
    counted: list[int] = []

    async def swept(connection: asyncpg.Connection) -> None:
        counted.append(await expiry.expire(connection, after(days=31), 10))

    await ledger.once(swept)

    assert counted == [1, 1, 0]
    assert (await balance(ledger.connection, at=after(days=31))).available_ms == BASIC_MS


async def test_a_lane_asks_again_by_itself(ledger: Ledger) -> None:
    """Twelve jobs through a lane whose every commit is lost, in turn before and after it was done."""
    await overage(ledger.connection)
    lane = Lane(ledger.proxy.dsn, "test")
    jobs = [a_request(1_200_000, pricing=a_pricing(overage=True)) for _ in range(12)]
    for request, loses in zip(jobs, [*Loses] * 6, strict=True):
        ledger.proxy.lose_next(loses)
        await lane.run(lambda connection, request=request: hold(connection, request))
        ledger.proxy.lose_next(loses)
        await lane.run(lambda connection, request=request: settled_or_before(connection, request, 1_210_000))
    await lane.close()

    assert ledger.proxy.lost == 24
    now = await balance(ledger.connection)
    assert (now.used_ms, now.held_ms, now.available_ms) == (BASIC_MS - 60_000, 60_000, 0)
    billed_ms = await ledger.connection.fetchval("SELECT sum(billed_ms)::bigint FROM billing.settlement")
    assert billed_ms == 50_000 + 12 * 1_210_000
    await assert_sound(ledger.connection)
    assert await replay(ledger.connection) == []
