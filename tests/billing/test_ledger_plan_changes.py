"""Changes of plan: more at once and prorated, less when the period ends; a preview is what happens."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from datetime import datetime, timedelta
from uuid import uuid4

import asyncpg
import pytest
from ledger_building import (
    BASIC_MS,
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

from billing import accounts, plan_changes, plans
from billing.plan_changes import PlanChange
from billing.plans import EffectiveFrom
from billing.refusals import (
    EtagMismatch,
    PlanNotSelfService,
    RequestIdReused,
    UnknownAccount,
    UnknownPlan,
)

STANDARD_MS = 54_000_000
HALF = timedelta(days=15, hours=12)
"""Of the month that the accounts of these tests begin with."""


async def preview(connection: asyncpg.Connection, plan: str, at: datetime) -> PlanChange:
    async with connection.transaction():
        return await plan_changes.preview(connection, "ann", plan, at)


async def money(connection: asyncpg.Connection) -> list[tuple[str, str, int]]:
    rows = await connection.fetch(
        """SELECT debit_account, credit_account, amount FROM billing.transfer
            WHERE code = 'plan_change' AND unit = 'USD' ORDER BY transfer_id"""
    )
    return [tuple(row) for row in rows]


async def test_a_larger_plan_at_half_the_period_adds_half_the_difference(
    connection: asyncpg.Connection,
) -> None:
    """Published case 8: 200 to 900 minutes at half period gives 350; 10 to 20 in money: -5 + 10 = +5."""
    await a_plan(connection, "small", quota_ms=200 * 60_000, price_micros=10_000_000)
    await a_plan(connection, "large", quota_ms=900 * 60_000, price_micros=20_000_000)
    await open_account(connection, plan="small")

    done = await change_plan(connection, "large", START + HALF)

    assert (done.at_once, done.effective_at, done.granted_ms) == (True, START + HALF, 350 * 60_000)
    assert (done.credit_micros, done.charge_micros, done.amount_micros) == (-5_000_000, 10_000_000, 5_000_000)
    now = await balance(connection, at=START + HALF)
    assert (now.plan, now.available_ms, now.renews_at) == ("large", 550 * 60_000, after(days=31))
    assert await money(connection) == [
        ("revenue", "subscription/ann", 5_000_000),
        ("subscription/ann", "revenue", 10_000_000),
    ]
    assert (await balance(connection, at=after(days=31))).available_ms == 900 * 60_000
    await assert_sound(connection)


async def test_a_change_does_what_its_preview_showed_though_time_has_passed(
    connection: asyncpg.Connection,
) -> None:
    await a_plan(connection, "gold", quota_ms=99_000_001, price_micros=7_777_777)
    await open_account(connection)
    shown = await preview(connection, "gold", after(days=3, seconds=1))

    done = await change_plan(connection, "gold", after(days=3, minutes=9), etag=shown.etag)

    assert done == shown
    assert (await balance(connection, at=after(days=4))).available_ms == BASIC_MS + shown.granted_ms
    await assert_sound(connection)


async def test_a_preview_changes_nothing(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await preview(connection, "standard", after(days=3))
    assert (await balance(connection, at=after(days=3))).available_ms == BASIC_MS
    assert await connection.fetchval("SELECT count(*) FROM billing.transfer") == 1


async def test_a_preview_holds_for_ten_minutes_and_for_its_plan_and_account(
    connection: asyncpg.Connection, subtests: pytest.Subtests
) -> None:
    await open_account(connection)
    await open_account(connection, "bob")
    at = after(days=3)
    async with connection.transaction():
        of_bob = await plan_changes.preview(connection, "bob", "standard", at)
    stale = {
        "ten minutes old": (await preview(connection, "standard", at - timedelta(minutes=11))).etag,
        "from the future": (await preview(connection, "standard", at + timedelta(seconds=1))).etag,
        "of another plan": (await preview(connection, "pro", at)).etag,
        "of another account": of_bob.etag,
        "made up": "made up",
        "beyond all time": "f" * 40 + "-0",
    }
    for what, etag in stale.items():
        with subtests.test(what), pytest.raises(EtagMismatch):
            await change_plan(connection, "standard", at, etag=etag)
    assert (await balance(connection, at=at)).plan == "basic"


async def test_a_preview_is_stale_once_its_change_was_made(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    shown = await preview(connection, "standard", after(days=3))
    await change_plan(connection, "standard", after(days=3), etag=shown.etag)
    with pytest.raises(EtagMismatch):
        await change_plan(connection, "standard", after(days=3), etag=shown.etag)


async def test_a_new_version_of_the_plan_makes_its_previews_stale(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    shown = await preview(connection, "standard", after(days=1))
    current = await plans.newest(connection, "standard")
    async with connection.transaction():
        await plans.update(
            connection,
            current,
            etag=current.etag,
            effective_from=EffectiveFrom.NEXT_PERIOD,
            actor="accounts/root",
            reason="test",
            request_id="r",
            at=after(days=1),
        )
    with pytest.raises(EtagMismatch):
        await change_plan(connection, "standard", after(days=1), etag=shown.etag)


async def test_a_smaller_plan_waits_for_the_end_of_the_period(connection: asyncpg.Connection) -> None:
    await open_account(connection, plan="standard")

    done = await change_plan(connection, "basic", after(days=3))

    assert (done.at_once, done.effective_at) == (False, after(days=31))
    assert (done.granted_ms, done.amount_micros) == (0, 0)
    async with connection.transaction():
        assert (await accounts.lock_terms(connection, "ann", after(days=3))).scheduled_plan == "basic"
    soon = await balance(connection, at=after(days=30))
    assert (soon.plan, soon.available_ms) == ("standard", STANDARD_MS)
    then = await balance(connection, at=after(days=31))
    assert (then.plan, then.available_ms) == ("basic", BASIC_MS)
    async with connection.transaction():
        assert (await accounts.lock_terms(connection, "ann", after(days=31))).scheduled_plan is None
    await assert_sound(connection)


async def test_a_scheduled_change_is_taken_back_by_naming_the_present_plan(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, plan="standard")
    await change_plan(connection, "basic", after(days=3))

    back = await change_plan(connection, "standard", after(days=4))

    assert (back.from_plan, back.to_plan, back.granted_ms, back.amount_micros) == (
        "standard",
        "standard",
        0,
        0,
    )
    assert (await balance(connection, at=after(days=31))).plan == "standard"
    await assert_sound(connection)


async def test_a_change_at_once_takes_a_scheduled_one_back(connection: asyncpg.Connection) -> None:
    await open_account(connection, plan="standard")
    await change_plan(connection, "basic", after(days=3))
    await change_plan(connection, "pro", after(days=4))
    assert (await balance(connection, at=after(days=31))).plan == "pro"
    await assert_sound(connection)


async def test_a_scheduled_plan_counts_from_its_day_however_late_it_is_noticed(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, plan="standard")
    await change_plan(connection, "basic", after(days=3))
    now = await balance(connection, at=after(days=200))
    assert (now.plan, now.available_ms) == ("basic", BASIC_MS)
    await assert_sound(connection)


async def test_as_much_time_for_more_money_counts_at_once(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "basic-private", quota_ms=BASIC_MS, price_micros=31_000_000)
    await open_account(connection)
    done = await change_plan(connection, "basic-private", after(days=30))
    assert (done.at_once, done.granted_ms, done.amount_micros) == (True, 0, 1_000_000)
    await assert_sound(connection)


async def test_prices_in_another_currency_wait_for_a_new_period(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "euro", quota_ms=STANDARD_MS, currency="EUR")
    await open_account(connection)
    assert not (await change_plan(connection, "euro", after(days=3))).at_once
    assert (await balance(connection, at=after(days=31))).currency == "EUR"


async def test_two_changes_in_a_period_add_up(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    first = await change_plan(connection, "standard", after(days=10))
    second = await change_plan(connection, "pro", after(days=20))
    assert (await balance(connection, at=after(days=20))).available_ms == (
        BASIC_MS + first.granted_ms + second.granted_ms
    )
    await assert_sound(connection)


async def test_time_of_a_change_serves_the_next_job(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=0)
    await change_plan(connection, "standard", after(days=30))
    job = await held(connection, a_request(60_000, at=after(days=30)))
    await settle(connection, the_end(job, 60_000))
    await assert_sound(connection)


async def test_a_change_needs_an_account_and_a_plan(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    with pytest.raises(UnknownPlan, match="gold"):
        await change_plan(connection, "gold", START)
    with pytest.raises(UnknownAccount, match="nobody"):
        await change_plan(connection, "basic", START, account="nobody")


async def test_a_change_leaves_its_audit_event(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await change_plan(connection, "standard", after(days=3))
    event = await connection.fetchrow(
        """SELECT actor, target, before->>'plan' AS before, after->>'plan' AS after
             FROM billing.audit_event WHERE action = 'ChangePlan'"""
    )
    assert tuple(event) == ("accounts/ann", "accounts/ann", "basic", "standard")


async def test_of_changes_at_once_by_one_preview_one_is_made(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    shown = await preview(connection, "standard", after(days=3))
    clients = [await asyncpg.connect(database) for _ in range(4)]
    try:
        answers = await asyncio.gather(
            *(change_plan(client, "standard", after(days=3), etag=shown.etag) for client in clients),
            return_exceptions=True,
        )
    finally:
        for client in clients:
            await client.close()
    assert sorted(isinstance(answer, EtagMismatch) for answer in answers) == [False, True, True, True]
    assert (await balance(connection, at=after(days=3))).available_ms == BASIC_MS + shown.granted_ms
    await assert_sound(connection)


async def test_a_change_races_with_the_end_of_the_period(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    clients = [await asyncpg.connect(database) for _ in range(4)]
    moments = [after(days=30, hours=23, minutes=59), after(days=31), after(days=31, seconds=1)]
    try:
        await asyncio.gather(
            change_plan(clients[0], "standard", moments[0]),
            *(balance(client, at=at) for client, at in zip(clients[1:], moments, strict=True)),
        )
    finally:
        for client in clients:
            await client.close()
    now = await balance(connection, at=after(days=31, seconds=2))
    assert (now.plan, now.period_start) == ("standard", after(days=31))
    await assert_sound(connection)


async def test_an_account_by_itself_has_only_the_plans_that_are_open_to_it(
    connection: asyncpg.Connection,
) -> None:
    await a_plan(connection, "closed", quota_ms=1)
    await a_plan(connection, "open", quota_ms=2, self_service=True)
    await open_account(connection, plan="closed")

    async def changed(plan: str, **by: bool) -> None:
        async with connection.transaction():
            shown = await plan_changes.preview(connection, "ann", plan, START, **by)
            await plan_changes.change(
                connection,
                "ann",
                plan,
                etag=shown.etag,
                actor="accounts/ann",
                reason="test",
                request_id=str(uuid4()),
                at=START,
                **by,
            )

    # To stay, too: an admin may have scheduled that it does not.
    for plan in ("closed", "pro"):
        with pytest.raises(PlanNotSelfService) as refused:
            await changed(plan, by_itself=True)
        assert refused.value.metadata() == {"plan": plan}
    await changed("open", by_itself=True)
    await a_version(connection, "open", at=START, self_service=False)
    with pytest.raises(PlanNotSelfService):
        await changed("open", by_itself=True)
    await changed("pro")
    await assert_sound(connection)


async def test_one_request_id_of_two_callers_changes_one_plan(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    request_id = str(uuid4())
    for plan, refused in (("standard", False), ("pro", True)):
        with pytest.raises(RequestIdReused) if refused else nullcontext():
            async with connection.transaction():
                await plan_changes.change(
                    connection,
                    "ann",
                    plan,
                    etag="",
                    actor="accounts/ann",
                    reason="test",
                    request_id=request_id,
                    at=START,
                )
    assert (await balance(connection)).plan == "standard"
