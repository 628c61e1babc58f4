"""Versions of a plan that count at once: their quota is a target, whoever looks in between, and foreseen."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_building import (
    BASIC_MS,
    START,
    a_request,
    adjust,
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

from billing import ledger, plan_undo, plans, refunds, statements
from billing.accounts import lock_terms
from billing.entitlement import PlanTime, Standing, Version, renewed
from billing.periods import Period
from billing.plans import AccountImpact, EffectiveFrom, PlanImpact
from billing.statements import Statement

NOW = EffectiveFrom.NOW


async def use(connection: asyncpg.Connection, ms: int, *, at: datetime, account: str = "ann") -> str:
    """Let a job of the account take so much, and return its id."""
    request = await held(connection, a_request(ms, account=account, at=at))
    await settle(connection, the_end(request, ms))
    return request.job_id


async def quota(connection: asyncpg.Connection, ms: int, *, at: datetime, plan: str = "club") -> None:
    await a_version(connection, plan, at=at, effective_from=NOW, quota_ms=ms)


async def left(connection: asyncpg.Connection, *, at: datetime, account: str = "ann") -> int:
    return (await balance(connection, account, at=at)).available_ms


async def impact(
    connection: asyncpg.Connection,
    plan: str = "club",
    *,
    at: datetime,
    effective_from: EffectiveFrom = NOW,
    **fields: int,
) -> PlanImpact:
    current = await plans.newest(connection, plan)
    return await plans.impact(connection, replace(current, **fields), effective_from, at)


@pytest.fixture
async def ann(connection: asyncpg.Connection) -> asyncpg.Connection:
    """Her plan is `club`, with the quota of Basic."""
    await a_plan(connection, "club")
    await open_account(connection, plan="club")
    return connection


async def test_a_quota_lowered_and_raised_again_and_again_gives_nothing_away(ann: asyncpg.Connection) -> None:
    await use(ann, BASIC_MS, at=START)
    for day in range(1, 7, 2):
        await quota(ann, 1_000_000, at=after(days=day))
        assert await left(ann, at=after(days=day, hours=1)) == 0
        await quota(ann, BASIC_MS, at=after(days=day + 1))
        assert await left(ann, at=after(days=day + 1, hours=1)) == 0
    await assert_sound(ann)


async def test_a_quota_raised_beyond_what_was_used_gives_what_is_missing_to_it(
    ann: asyncpg.Connection,
) -> None:
    await use(ann, 8_000_000, at=START)
    await quota(ann, 1_000_000, at=after(days=1))
    assert await left(ann, at=after(days=1)) == 0
    await quota(ann, 9_000_000, at=after(days=2))
    assert await left(ann, at=after(days=2)) == 1_000_000


async def test_what_an_admin_took_is_not_given_back_by_a_version(ann: asyncpg.Connection) -> None:
    await adjust(ann, -BASIC_MS)
    await quota(ann, BASIC_MS - 1000, at=after(days=1))
    assert await left(ann, at=after(days=1)) == 0
    await quota(ann, BASIC_MS + 1000, at=after(days=2))
    assert await left(ann, at=after(days=2)) == 1000


async def test_a_version_that_changes_only_limits_leaves_what_was_given_back(ann: asyncpg.Connection) -> None:
    job_id = await use(ann, BASIC_MS, at=START)
    await quota(ann, 0, at=after(days=1))
    async with ann.transaction():
        await refunds.refund(
            ann,
            account_id="ann",
            job_id=job_id,
            amount_ms=1000,
            actor="accounts/root",
            reason="test",
            request_id="r",
            at=after(days=1),
        )
    assert (await impact(ann, relax_weight_milli=7, at=after(days=2))).revoked_ms == 0
    await a_version(ann, "club", at=after(days=2), effective_from=NOW, relax_weight_milli=7)
    assert await left(ann, at=after(days=2)) == 1000


@pytest.mark.parametrize("touched", [True, False])
async def test_what_rolls_over_is_of_the_quota_that_the_period_ended_with(
    connection: asyncpg.Connection, touched: bool
) -> None:
    await a_plan(connection, "club", quota_ms=6_000_000, rollover_ms=20_000_000)
    await open_account(connection, plan="club")
    await use(connection, 1_000_000, at=START)
    await quota(connection, BASIC_MS, at=after(days=2))
    if touched:
        await left(connection, at=after(days=3))

    assert await left(connection, at=after(days=40)) == BASIC_MS + BASIC_MS - 1_000_000

    ended = await statement(connection, moment=START, at=after(days=40))
    assert (ended.granted_ms, ended.expired_ms, ended.closing_ms) == (BASIC_MS, BASIC_MS - 1_000_000, 0)
    now = await statement(connection, moment=None, at=after(days=40))
    assert (now.opening_ms, now.granted_ms, now.expired_ms) == (0, 2 * BASIC_MS - 1_000_000, 0)
    await assert_sound(connection)


@pytest.mark.parametrize("touched", [True, False])
async def test_a_cut_in_a_period_that_is_over_leaves_less_to_roll_over(
    connection: asyncpg.Connection, touched: bool
) -> None:
    await a_plan(connection, "club", quota_ms=6_000_000, rollover_ms=20_000_000)
    await open_account(connection, plan="club")
    await quota(connection, 2_000_000, at=after(days=2))
    if touched:
        await left(connection, at=after(days=3))

    assert await left(connection, at=after(days=40)) == 4_000_000

    ended = await statement(connection, moment=START, at=after(days=40))
    assert (ended.granted_ms, ended.revoked_ms, ended.expired_ms) == (6_000_000, 4_000_000, 2_000_000)
    await assert_sound(connection)


@pytest.mark.parametrize("touched", [True, False])
async def test_a_month_that_nobody_touched_leaves_what_a_version_in_it_gave(
    connection: asyncpg.Connection, touched: bool
) -> None:
    await a_plan(connection, "club", quota_ms=6_000_000, rollover_ms=20_000_000)
    await open_account(connection, plan="club")
    await quota(connection, 1_000_000, at=after(days=40))
    if touched:
        await left(connection, at=after(days=50))
    assert await left(connection, at=after(days=62)) == 2_000_000


async def statement(connection: asyncpg.Connection, *, moment: datetime | None, at: datetime) -> Statement:
    async with connection.transaction():
        terms = await lock_terms(connection, "ann", at)
        return await statements.statement(connection, terms, moment, at)


async def test_a_version_of_the_larger_plan_moves_an_upgraded_account_by_its_difference(
    ann: asyncpg.Connection,
) -> None:
    await a_plan(ann, "more", quota_ms=2 * BASIC_MS)
    upgrade = await change_plan(ann, "more", at=after(days=15.5))
    assert upgrade.granted_ms == BASIC_MS // 2
    full_ms = BASIC_MS + upgrade.granted_ms

    await a_version(ann, "more", at=after(days=16), effective_from=NOW, relax_weight_milli=7)
    assert await left(ann, at=after(days=16)) == full_ms
    await quota(ann, 2 * BASIC_MS + 1000, plan="more", at=after(days=17))
    assert await left(ann, at=after(days=17)) == full_ms + 1000
    await quota(ann, 0, plan="more", at=after(days=18))
    assert await left(ann, at=after(days=18)) == 0
    await quota(ann, 2 * BASIC_MS, plan="more", at=after(days=19))
    assert await left(ann, at=after(days=19)) == full_ms
    await assert_sound(ann)


async def test_an_upgrade_that_was_taken_back_is_no_matter_to_later_versions(ann: asyncpg.Connection) -> None:
    await a_plan(ann, "more", quota_ms=2 * BASIC_MS)
    await change_plan(ann, "more", at=after(days=1))
    await quota(ann, 3 * BASIC_MS, plan="more", at=after(days=2))
    async with ann.transaction():
        await plan_undo.undo(
            ann,
            "ann",
            etag="",
            actor="accounts/root",
            reason="test",
            request_id="u",
            at=after(days=3),
        )
    assert await left(ann, at=after(days=3)) == BASIC_MS
    await quota(ann, BASIC_MS + 1000, at=after(days=4))
    assert await left(ann, at=after(days=4)) == BASIC_MS + 1000
    await assert_sound(ann)


async def test_a_dry_run_knows_who_is_on_the_plan_when_periods_are_over(ann: asyncpg.Connection) -> None:
    await a_plan(ann, "less", quota_ms=1_000_000)
    await change_plan(ann, "less", at=after(days=1))
    at = after(days=31, seconds=1)

    assert (await impact(ann, "club", quota_ms=2 * BASIC_MS, at=at)).accounts == 0
    foreseen = await impact(ann, "less", quota_ms=3_000_000, at=at)
    assert (foreseen.accounts, foreseen.granted_ms) == (1, 2_000_000)
    assert foreseen.first == (
        AccountImpact(account_id="ann", available_before_ms=1_000_000, available_after_ms=3_000_000),
    )
    await quota(ann, 3_000_000, plan="less", at=at)
    assert await left(ann, at=at) == 3_000_000


async def test_a_dry_run_of_a_restored_quota_promises_what_it_gives(ann: asyncpg.Connection) -> None:
    await use(ann, BASIC_MS - 1000, at=START)
    await quota(ann, 1_000_000, at=after(days=1))
    foreseen = await impact(ann, quota_ms=BASIC_MS, at=after(days=2))
    assert foreseen.first == (
        AccountImpact(account_id="ann", available_before_ms=0, available_after_ms=1000),
    )
    assert (foreseen.granted_ms, foreseen.cut_short) == (1000, 0)
    await quota(ann, BASIC_MS, at=after(days=2))
    assert await left(ann, at=after(days=2)) == 1000


def test_a_period_never_begins_with_an_older_version_than_the_one_before_it_had() -> None:
    """Though the clock that made the version was ahead of the one by which the account took it up."""
    made = [
        Version(version=number, quota_ms=number, rollover_ms=0, at_once=False, created_at=at)
        for number, at in enumerate([START, after(days=31, seconds=1)], start=1)
    ]
    standing = Standing(
        account_id="ann",
        plan="club",
        version=2,
        scheduled_plan=None,
        anchor=START,
        period=Period(start=START, end=after(days=31)),
        time=PlanTime(given_ms=2, missed_ms=0, unused_ms=2),
        living_ms=2,
    )
    assert renewed(standing, {"club": made}, after(days=31)).version.version == 2


QUOTAS = st.integers(min_value=0, max_value=20)


# One database for all examples, each with a plan and accounts of its own.
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=QUOTAS,
    steps=st.lists(st.tuples(QUOTAS, st.integers(min_value=0, max_value=8)), min_size=1, max_size=6),
)
async def test_what_is_left_is_the_quota_less_what_was_used(
    connection: asyncpg.Connection, first: int, steps: list[tuple[int, int]]
) -> None:
    plan = account = f"p-{uuid4()}"
    await a_plan(connection, plan, quota_ms=first)
    await open_account(connection, account, plan=plan)
    used = 0
    for day, (to, wanted) in enumerate(steps, start=1):
        changed = to != (await plans.newest(connection, plan)).quota_ms
        before = await left(connection, at=after(days=day), account=account)
        await quota(connection, to, at=after(days=day), plan=plan)
        now = await left(connection, at=after(days=day), account=account)
        assert now == (max(to - used, 0) if changed else before)
        if took := min(wanted, now):
            await use(connection, took, at=after(days=day), account=account)
            used += took


EVENTS = st.one_of(
    st.tuples(st.just("now"), QUOTAS),
    st.tuples(st.just("now in the other plan"), QUOTAS),
    st.tuples(st.just("next"), QUOTAS),
    st.tuples(st.just("use"), st.integers(min_value=1, max_value=12)),
    st.tuples(st.just("begin"), st.integers(min_value=1, max_value=12)),
    st.tuples(st.just("end"), st.integers(min_value=0, max_value=12)),
    st.tuples(st.just("change plan"), st.just(0)),
    st.tuples(st.just("touch"), st.just(0)),
)


class Twins:
    """Two accounts to which the same happens, but that only one of them is looked at in between."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.number = uuid4()
        self.accounts = (f"a-{self.number}", f"b-{self.number}")
        self.plans = [f"p-{self.number}", f"q-{self.number}"]
        self.running: list[tuple[ledger.HoldRequest, ...]] = []
        self.at = START

    async def begin(self, quota_ms: int, rollover_ms: int) -> None:
        for plan in self.plans:
            await a_plan(self.connection, plan, quota_ms=quota_ms, rollover_ms=rollover_ms)
        for account in self.accounts:
            await open_account(self.connection, account, plan=self.plans[0])

    async def both_have(self) -> int:
        one, other = [await left(self.connection, at=self.at, account=account) for account in self.accounts]
        assert one == other
        return one

    async def version(self, plan: str, effective_from: EffectiveFrom, quota_ms: int) -> None:
        """Make a version, of which the looked at twin must get what the dry run says of both."""
        foreseen = await impact(
            self.connection, plan, effective_from=effective_from, quota_ms=quota_ms, at=self.at
        )
        told = {one.account_id: one for one in foreseen.first}
        looked_at, other = self.accounts
        if looked_at in told:
            assert replace(told[other], account_id=looked_at) == told[looked_at]
            assert foreseen.granted_ms - foreseen.revoked_ms == 2 * (
                told[other].available_after_ms - told[other].available_before_ms
            )
            before = await left(self.connection, at=self.at, account=looked_at)
            assert before == told[looked_at].available_before_ms
        await a_version(self.connection, plan, at=self.at, effective_from=effective_from, quota_ms=quota_ms)
        if looked_at in told:
            now = await left(self.connection, at=self.at, account=looked_at)
            assert now == told[looked_at].available_after_ms

    async def happens(self, what: str, amount: int) -> None:
        match what:
            case "now":
                await self.version(self.plans[0], NOW, amount)
            case "now in the other plan":
                await self.version(self.plans[1], NOW, amount)
            case "next":
                await self.version(self.plans[0], EffectiveFrom.NEXT_PERIOD, amount)
            case "use" | "begin":
                took = min(amount, await self.both_have())
                if took:
                    requests = tuple(
                        [
                            await held(self.connection, a_request(took, account=account, at=self.at))
                            for account in self.accounts
                        ]
                    )
                    self.running.append(requests)
                    if what == "use":
                        await self.end(took)
            case "end":
                if self.running:
                    await self.end(amount)
            case "change plan":
                for account in self.accounts:
                    await change_plan(self.connection, self.plans[1], at=self.at, account=account)
                self.plans.reverse()
            case "touch":
                await left(self.connection, at=self.at, account=self.accounts[0])

    async def end(self, measured_ms: int) -> None:
        one, other = self.running.pop()
        first, second = [
            (await settle(self.connection, the_end(request, measured_ms, at=self.at)))[0]
            for request in (one, other)
        ]
        assert first.billed_ms == second.billed_ms


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    quota_ms=QUOTAS,
    rollover_ms=st.sampled_from([5, 100, 0]),
    events=st.lists(
        st.tuples(EVENTS, st.sampled_from([timedelta(hours=5), timedelta(days=9), timedelta(days=33)])),
        min_size=2,
        max_size=8,
    ),
)
async def test_it_is_no_matter_who_looked_in_between_and_what_was_foreseen_is_done(
    connection: asyncpg.Connection,
    quota_ms: int,
    rollover_ms: int,
    events: list[tuple[tuple[str, int], timedelta]],
) -> None:
    twins = Twins(connection)
    await twins.begin(quota_ms, rollover_ms)
    for (what, amount), then in events:
        await twins.happens(what, amount)
        twins.at += then
    await twins.both_have()
    # Of what is left by the end some rolls over, but no second time.
    for _ in range(2):
        twins.at += timedelta(days=31)
        await twins.both_have()
