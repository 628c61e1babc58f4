"""Accounts, their periods, their plans' versions, and what admins do to them."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

import asyncpg
import pytest
from ledger_building import (
    BASIC_MS,
    START,
    a_request,
    adjust,
    after,
    assert_sound,
    balance,
    held,
    hold,
    open_account,
    settle,
    the_end,
)

from billing import accounts, admin, idempotency, plans
from billing.accounts import Terms
from billing.ledger import HoldPlaced
from billing.plans import EffectiveFrom, PlanFields, PlanLimits, PlanVersion
from billing.refusals import (
    AccountExists,
    AdjustmentTooLarge,
    EtagMismatch,
    RequestIdReused,
    UnknownAccount,
    UnknownPlan,
)


async def terms_of(connection: asyncpg.Connection, account: str = "ann", *, at: datetime = START) -> Terms:
    async with connection.transaction():
        return (await accounts.terms(connection, [account], at))[account]


async def update_plan(
    connection: asyncpg.Connection,
    effective_from: EffectiveFrom,
    *,
    quota_ms: int | None = None,
    running: int | None = None,
    at: datetime = START,
) -> PlanVersion:
    current = await plans.newest(connection, "basic")
    fields = PlanFields(
        plan="basic",
        quota_ms=current.quota_ms if quota_ms is None else quota_ms,
        limits=replace(current.limits, running=running or current.limits.running),
        relax_weight_milli=current.relax_weight_milli,
        private_allowed=current.private_allowed,
        private_multiplier_bp=current.private_multiplier_bp,
        overage_micros_per_minute=current.overage_micros_per_minute,
        currency=current.currency,
    )
    async with connection.transaction():
        return await plans.update(
            connection,
            fields,
            etag=current.etag,
            effective_from=effective_from,
            actor="accounts/root",
            reason="test",
            request_id=str(uuid4()),
            at=at,
        )


async def test_the_first_release_has_three_plans(connection: asyncpg.Connection) -> None:
    by_name = {version.plan: version for version in await plans.all_newest(connection)}

    assert {plan: version.quota_ms for plan, version in by_name.items()} == {
        "basic": 200 * 60_000,
        "standard": 15 * 3_600_000,
        "pro": 30 * 3_600_000,
    }
    assert {version.limits for version in by_name.values()} == {
        PlanLimits(running=3, relax_running=2, accepted=10)
    }
    assert [plan for plan, version in by_name.items() if version.private_allowed] == ["pro"]
    assert by_name["pro"].private_multiplier_bp == 20_000


async def test_a_new_account_has_its_plans_terms_and_first_lot(connection: asyncpg.Connection) -> None:
    await open_account(connection)

    terms = await terms_of(connection)
    assert (terms.plan, terms.plan_version, terms.limits.running) == ("basic", 1, 3)
    assert (terms.overage_allowed, terms.spend_cap_micros, terms.currency) == (False, 0, "USD")
    assert (terms.period_start, terms.renews_at) == (START, after(days=31))
    now = await balance(connection)
    assert (now.granted_ms, now.available_ms) == (BASIC_MS, BASIC_MS)
    await assert_sound(connection)


async def test_an_account_needs_a_plan_and_an_id_of_its_own(connection: asyncpg.Connection) -> None:
    with pytest.raises(UnknownPlan, match="gold"):
        await open_account(connection, plan="gold")
    await open_account(connection)
    with pytest.raises(AccountExists, match="ann"):
        await open_account(connection)
    with pytest.raises(UnknownAccount, match="nobody"):
        await terms_of(connection, "nobody")
    async with connection.transaction():
        with pytest.raises(UnknownAccount, match="nobody"):
            await accounts.lock(connection, ["ann", "nobody"], START)


async def test_terms_of_many_accounts_come_at_once(connection: asyncpg.Connection) -> None:
    for account in ("ann", "bob", "cid"):
        await open_account(connection, account)
    async with connection.transaction():
        found = await accounts.terms(connection, ["cid", "ann", "bob"], after(days=40))
    assert {account: terms.period_start for account, terms in found.items()} == dict.fromkeys(
        ("ann", "bob", "cid"), after(days=31)
    )


async def test_a_new_period_is_granted_at_the_first_touch_and_the_old_rest_is_gone(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    await settle(connection, the_end(await held(connection, a_request(1000)), 1000))

    now = await balance(connection, at=after(days=31))

    assert (now.granted_ms, now.used_ms, now.available_ms) == (BASIC_MS, 0, BASIC_MS)
    assert (now.period_start, now.renews_at) == (after(days=31), after(days=61))
    await assert_sound(connection)


async def test_months_nobody_touched_grant_nothing(connection: asyncpg.Connection) -> None:
    at = datetime(2026, 1, 31, tzinfo=UTC)
    await open_account(connection, at=at)

    now = await balance(connection, at=datetime(2026, 7, 30, tzinfo=UTC))

    assert (now.available_ms, now.period_start) == (BASIC_MS, datetime(2026, 6, 30, tzinfo=UTC))
    assert await connection.fetchval("SELECT count(*) FROM billing.grant_lot") == 2
    await assert_sound(connection)


async def test_a_granted_lot_outlives_the_period_and_shows_what_is_left_of_it(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=0)
    await adjust(connection, 1000)
    await settle(connection, the_end(await held(connection, a_request(400)), 400))

    now = await balance(connection, at=after(days=31))

    assert (now.granted_ms, now.used_ms, now.available_ms) == (BASIC_MS + 600, 0, BASIC_MS + 600)


async def test_a_plan_version_waits_for_the_next_period(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await update_plan(connection, EffectiveFrom.NEXT_PERIOD, quota_ms=5000, running=7, at=after(days=3))

    soon, next_period = after(days=30), after(days=31)
    assert (await terms_of(connection, at=soon)).limits.running == 3
    assert (await balance(connection, at=soon)).granted_ms == BASIC_MS
    assert (await terms_of(connection, at=next_period)).limits.running == 7
    assert (await balance(connection, at=next_period)).granted_ms == 5000
    await assert_sound(connection)


async def test_the_version_of_a_period_does_not_depend_on_when_it_is_first_touched(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    await update_plan(connection, EffectiveFrom.NEXT_PERIOD, quota_ms=5000, at=after(days=33))

    assert (await balance(connection, at=after(days=40))).granted_ms == BASIC_MS
    assert (await balance(connection, at=after(days=61))).granted_ms == 5000


async def test_a_plan_version_at_once_adds_the_difference_once(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await update_plan(connection, EffectiveFrom.NOW, quota_ms=BASIC_MS + 500, running=5, at=after(days=1))

    for _ in range(2):
        now = await balance(connection, at=after(days=2))
        assert (now.granted_ms, now.available_ms) == (BASIC_MS + 500, BASIC_MS + 500)
    assert (await terms_of(connection, at=after(days=2))).limits.running == 5
    assert (await balance(connection, at=after(days=31))).granted_ms == BASIC_MS + 500
    await assert_sound(connection)


async def test_a_plan_version_at_once_takes_nothing_that_is_used_or_held(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    await settle(connection, the_end(await held(connection, a_request(2000)), 2000))
    running = await held(connection, a_request(3000))
    await update_plan(connection, EffectiveFrom.NOW, quota_ms=4000, at=after(days=1))

    now = await balance(connection, at=after(days=1))
    assert (now.granted_ms, now.used_ms, now.held_ms, now.available_ms) == (5000, 2000, 3000, 0)
    await settle(connection, the_end(running, 3000, at=after(days=1)))
    await assert_sound(connection)


async def test_a_plan_is_changed_only_by_who_read_its_newest_version(connection: asyncpg.Connection) -> None:
    read = await plans.newest(connection, "basic")
    await update_plan(connection, EffectiveFrom.NOW, running=9)

    with pytest.raises(EtagMismatch) as refused:
        await plans.update(
            connection,
            read,
            etag=read.etag,
            effective_from=EffectiveFrom.NOW,
            actor="accounts/root",
            reason="late",
            request_id="late",
            at=START,
        )
    assert refused.value.metadata() == {"given": "v1", "current": "v2"}
    assert (await plans.newest(connection, "basic")).limits.running == 9
    with pytest.raises(UnknownPlan):
        await plans.newest(connection, "gold")


async def test_a_plan_update_leaves_an_audit_event_with_before_and_after(
    connection: asyncpg.Connection,
) -> None:
    await update_plan(connection, EffectiveFrom.NOW, running=9)

    event = await connection.fetchrow(
        """SELECT actor, reason, before->'limits'->>'running' AS before, after->'limits'->>'running' AS after
             FROM billing.audit_event WHERE action = 'UpdatePlan' AND target = 'plans/basic'"""
    )
    assert tuple(event) == ("accounts/root", "test", "3", "9")


async def test_consent_and_cap_change_one_by_one(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    async with connection.transaction():
        assert (await accounts.set_overage(connection, "ann", True, None, START)).overage_allowed
        capped = await accounts.set_overage(connection, "ann", None, 5_000_000, START)
        assert (capped.overage_allowed, capped.spend_cap_micros) == (True, 5_000_000)
        uncapped = await accounts.set_overage(connection, "ann", False, 0, START)
    assert (uncapped.overage_allowed, uncapped.spend_cap_micros) == (False, 0)
    assert await terms_of(connection) == uncapped


async def test_an_adjustment_grants_and_takes_back(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    assert (await adjust(connection, 500)).available_ms == BASIC_MS + 500
    assert (await adjust(connection, -500)).available_ms == BASIC_MS
    plan_lot = await connection.fetchrow("SELECT source, revoked_ms FROM billing.grant_lot ORDER BY lot_id")
    assert tuple(plan_lot) == ("plan", 0)
    events = await connection.fetch(
        "SELECT after->>'amount_ms' FROM billing.audit_event WHERE target = 'accounts/ann' ORDER BY audit_id"
    )
    assert [event[0] for event in events] == ["500", "-500"]
    await assert_sound(connection)


async def test_an_adjustment_takes_only_unused_time(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=1000)
    await held(connection, a_request(400))

    with pytest.raises(AdjustmentTooLarge) as refused:
        await adjust(connection, -601)
    assert refused.value.metadata() == {"available_ms": "600", "amount_ms": "-601"}

    assert (await adjust(connection, -600)).available_ms == 0
    await assert_sound(connection)


@pytest.mark.parametrize("amount_ms", [500, -500])
async def test_an_adjustment_is_made_once_for_a_request_id(
    connection: asyncpg.Connection, amount_ms: int
) -> None:
    await open_account(connection)
    await adjust(connection, amount_ms, request_id="r1")
    # The second is another admin's, who chose the same id: each claims it for itself.
    with pytest.raises(RequestIdReused):
        await adjust(connection, amount_ms, request_id="r1")
    assert (await balance(connection)).available_ms == BASIC_MS + amount_ms


async def test_a_grant_wakes_who_had_no_time(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=0)
    await adjust(connection, 1000, expires_at=after(days=1))
    assert isinstance((await hold(connection, a_request(1000)))[0], HoldPlaced)
    await assert_sound(connection)


async def test_what_was_written_is_never_changed(
    connection: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    await open_account(connection)
    await settle(connection, the_end(await held(connection, a_request()), 10))

    for table, column in {
        "transfer": "amount",
        "settlement": "billed_ms",
        "audit_event": "reason",
        "plan_version": "quota_ms",
    }.items():
        for statement in (
            f"UPDATE billing.{table} SET {column} = {column}",
            f"DELETE FROM billing.{table}",
            f"TRUNCATE billing.{table} CASCADE",
        ):
            refused = pytest.raises(asyncpg.RestrictViolationError, match=r"billing\.\w+ is append-only")
            with subtests.test(statement=statement), refused:
                await connection.execute(statement)


async def test_a_request_id_gets_its_first_outcome(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        assert await idempotency.claim(connection, "ann", "CreateJob", "r1", b"one") is None
        await idempotency.store(connection, "ann", "CreateJob", "r1", {"job": "j1"})

    async with connection.transaction():
        assert await idempotency.claim(connection, "ann", "CreateJob", "r1", b"one") == {"job": "j1"}
        with pytest.raises(RequestIdReused, match="r1"):
            await idempotency.claim(connection, "ann", "CreateJob", "r1", b"other")
        for account, method in (("bob", "CreateJob"), ("ann", "CancelJob")):
            assert await idempotency.claim(connection, account, method, "r1", b"other") is None


async def test_a_refused_request_leaves_its_id_free(connection: asyncpg.Connection) -> None:
    async def create_account(plan: str) -> None:
        async with connection.transaction():
            assert await idempotency.claim(connection, "root", "CreateAccount", "r1", b"one") is None
            await accounts.create(connection, "ann", plan, START)

    with pytest.raises(UnknownPlan):
        await create_account("gold")
    await create_account("basic")


async def test_json_reaches_the_ledger_whatever_codec_the_connection_has(
    connection: asyncpg.Connection,
) -> None:
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    await idempotency.claim(connection, "ann", "CreateJob", "r1", b"one")
    await idempotency.store(connection, "ann", "CreateJob", "r1", {"job": "j1"})
    assert await idempotency.claim(connection, "ann", "CreateJob", "r1", b"one") == {"job": "j1"}
    audit_id = await admin.record(
        connection,
        actor="a",
        action="b",
        target="c",
        reason="d",
        request_id="e",
        before=None,
        after={"x": 1},
        at=START,
    )
    assert await connection.fetchval(
        "SELECT after FROM billing.audit_event WHERE audit_id = $1", audit_id
    ) == {"x": 1}
