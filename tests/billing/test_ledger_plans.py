"""Plans: made once, changed by versions; who a change would touch, and by how much; GPU classes."""

from __future__ import annotations

from datetime import datetime

import asyncpg
import pytest
from ledger_building import (
    BASIC_MS,
    START,
    a_request,
    after,
    assert_sound,
    balance,
    held,
    open_account,
    settle,
    the_end,
)
from ledger_plans import LONG_AGO, a_plan, a_version, plan_fields

from billing import accounts, ledger, plans
from billing.plans import AccountImpact, EffectiveFrom, PlanImpact
from billing.prices import ChargeMode, PricingSnapshot, multiplier_of
from billing.refusals import PlanExists, UnknownPlan


async def use(connection: asyncpg.Connection, account: str, ms: int) -> None:
    await settle(connection, the_end(await held(connection, a_request(ms, account=account)), ms))


async def impact(
    connection: asyncpg.Connection,
    plan: str = "basic",
    *,
    effective_from: EffectiveFrom = EffectiveFrom.NOW,
    at: datetime = START,
    **fields: int,
) -> PlanImpact:
    return await plans.impact(connection, plan_fields(plan, **fields), effective_from, at)


async def test_a_plan_is_made_with_all_its_fields(connection: asyncpg.Connection) -> None:
    made = await a_plan(
        connection, "gold", quota_ms=7, price_micros=5, rollover_ms=3, gpu_class_bp={"H200": 25_000}
    )

    assert (made.version, made.etag, made.at_once) == (1, "v1", False)
    assert (made.price_micros, made.rollover_ms, made.gpu_class_bp) == (5, 3, {"H200": 25_000})
    assert await plans.get(connection, "gold") == made
    await open_account(connection, plan="gold")
    assert (await balance(connection)).available_ms == 7
    await assert_sound(connection)


async def test_a_plan_is_made_once(connection: asyncpg.Connection) -> None:
    with pytest.raises(PlanExists, match="basic"):
        await a_plan(connection, "basic")
    assert (await plans.newest(connection, "basic")).quota_ms == BASIC_MS


async def test_every_version_can_be_read(connection: asyncpg.Connection) -> None:
    first = await plans.newest(connection, "basic")
    second = await a_version(connection, "basic", at=START, quota_ms=5)
    assert await plans.get(connection, "basic", 1) == first
    assert await plans.get(connection, "basic", 2) == second == await plans.newest(connection, "basic")
    with pytest.raises(UnknownPlan, match="basic/versions/3"):
        await plans.get(connection, "basic", 3)


async def test_who_makes_a_plan_is_written_down(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "gold", price_micros=5)
    event = await connection.fetchrow(
        """SELECT actor, before, after->>'price_micros' AS price FROM billing.audit_event
            WHERE action = 'CreatePlan' AND target = 'plans/gold'"""
    )
    assert tuple(event) == ("accounts/root", None, "5")


async def test_an_impact_names_who_is_touched_and_by_how_much(connection: asyncpg.Connection) -> None:
    for account in ("ann", "bob", "cid"):
        await open_account(connection, account)
    await open_account(connection, "dan", plan="pro")
    await use(connection, "bob", BASIC_MS - 1000)

    more = await impact(connection, quota_ms=BASIC_MS + 500)
    assert (more.accounts, more.granted_ms, more.revoked_ms, more.cut_short) == (3, 1500, 0, 0)
    assert more.first[1] == AccountImpact(account_id="bob", available_before_ms=1000, available_after_ms=1500)
    less = await impact(connection, quota_ms=BASIC_MS - 3000)
    assert (less.accounts, less.granted_ms, less.revoked_ms, less.cut_short) == (3, 0, 7000, 1)
    assert less.first[1] == AccountImpact(account_id="bob", available_before_ms=1000, available_after_ms=0)
    later = await impact(connection, quota_ms=5, effective_from=EffectiveFrom.NEXT_PERIOD)
    assert (later.accounts, later.granted_ms, later.revoked_ms, later.cut_short) == (3, 0, 0, 0)
    nobody = await impact(connection, "standard")
    assert nobody == PlanImpact(
        accounts=0,
        granted_ms=0,
        revoked_ms=0,
        cut_short=0,
        behind=0,
        retention_days_before=0,
        retention_days_after=0,
        first=(),
    )
    shorter = await impact(connection, picture_retention_days=30)
    assert (shorter.retention_days_before, shorter.retention_days_after) == (0, 30)
    assert (await plans.newest(connection, "basic")).version == 1


@pytest.mark.parametrize("quota_ms", [BASIC_MS + 5000, BASIC_MS - 5000, 0])
@pytest.mark.parametrize("pending_ms", [None, BASIC_MS + 2000, BASIC_MS - 2000])
async def test_an_update_does_what_its_impact_said(
    connection: asyncpg.Connection, quota_ms: int, pending_ms: int | None
) -> None:
    for account, used_ms in {"ann": 1, "bob": BASIC_MS - 1000, "cid": BASIC_MS}.items():
        await open_account(connection, account)
        await use(connection, account, used_ms)
    at = after(days=1)
    if pending_ms is not None:
        await a_version(connection, "basic", at=START, effective_from=EffectiveFrom.NOW, quota_ms=pending_ms)
    foreseen = await impact(connection, quota_ms=quota_ms, at=at)

    before = {}
    for account in ("ann", "bob"):
        before[account] = (await balance(connection, account, at=at)).available_ms
    await a_version(connection, "basic", at=at, effective_from=EffectiveFrom.NOW, quota_ms=quota_ms)

    for one in foreseen.first:
        if one.account_id in before:
            assert one.available_before_ms == before[one.account_id]
            now = await balance(connection, one.account_id, at=at)
            assert now.available_ms == one.available_after_ms
    await assert_sound(connection)


async def test_an_impact_lists_the_first_hundred(connection: asyncpg.Connection) -> None:
    for number in range(101):
        await open_account(connection, f"a-{number:03}")
    told = await impact(connection, quota_ms=BASIC_MS + 1)
    assert (told.accounts, told.granted_ms, len(told.first)) == (101, 101, 100)
    assert (told.first[0].account_id, told.first[-1].account_id) == ("a-000", "a-099")


async def test_an_impact_counts_whom_earlier_versions_reach_with_it(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await a_version(connection, "basic", at=after(days=1), quota_ms=1_000_000)
    await open_account(connection, "ben", at=after(days=2))

    basic = await plans.newest(connection, "basic")
    told = {when: await plans.impact(connection, basic, when, after(days=2)) for when in EffectiveFrom}

    assert (told[EffectiveFrom.NOW].accounts, told[EffectiveFrom.NOW].behind) == (2, 1)
    assert told[EffectiveFrom.NOW].revoked_ms == BASIC_MS - 1_000_000
    assert told[EffectiveFrom.NEXT_PERIOD].behind == 0


async def test_a_plans_gpu_classes_are_in_the_terms_of_its_jobs(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "gold", private_allowed=True, gpu_class_bp={"H200": 25_000, "L4": 5_000})
    await open_account(connection, plan="gold")
    async with connection.transaction():
        terms = await accounts.lock_terms(connection, "ann", START)
        pricing = await ledger.price(connection, terms, "fast", True, 1000, 0, START)

    assert PricingSnapshot.from_json(pricing.to_json()) == pricing
    assert multiplier_of(pricing, "H200") == 50_000
    assert multiplier_of(pricing, "L4") == 10_000
    assert multiplier_of(pricing, "some other") == 20_000


def test_a_multiplier_is_rounded_up() -> None:
    pricing = PricingSnapshot(
        plan="gold",
        plan_version=1,
        charge_mode=ChargeMode.FAST,
        multiplier_bp=10_001,
        overage_allowed=False,
        overage_micros_per_minute=0,
        currency="USD",
        gpu_class_bp={"L4": 1},
    )
    assert multiplier_of(pricing, "L4") == 2


def test_a_snapshot_from_before_gpu_classes_names_none() -> None:
    stored = PricingSnapshot(
        plan="basic",
        plan_version=1,
        charge_mode=ChargeMode.FAST,
        multiplier_bp=10_000,
        overage_allowed=False,
        overage_micros_per_minute=0,
        currency="USD",
    ).to_json()
    del stored["gpu_class_bp"]
    assert multiplier_of(PricingSnapshot.from_json(stored), "H200") == 10_000


async def test_the_terms_follow_a_class_that_changes_at_once(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await a_version(
        connection, "basic", at=after(days=1), effective_from=EffectiveFrom.NOW, gpu_class_bp={"L4": 5_000}
    )
    async with connection.transaction():
        assert (await accounts.lock_terms(connection, "ann", after(days=1))).gpu_class_bp == {"L4": 5_000}


async def test_a_plan_made_long_ago_serves_accounts_of_any_day(connection: asyncpg.Connection) -> None:
    assert (await a_plan(connection, "gold")).created_at == LONG_AGO
    await open_account(connection, plan="gold", at=after(days=400))
    await assert_sound(connection)
