"""Cases that other systems publish of themselves: a ledger that is right gives the same answers.

Those that need faults, 9 and 10, are in a file of their own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

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
from ledger_plans import a_plan

from billing import accounts, expiry, hold_expiry, plan_changes
from billing.ledger import Ending, HoldIdReused, HoldPlaced, HoldRefused
from billing.refusals import FastTimeExhausted

# Of these accounts' first month, which has 31 days.
HALF = timedelta(days=15, hours=12)


@pytest.mark.parametrize(
    ("ending", "measured_ms", "charged_ms"),
    [(Ending.POST, 123, 123), (Ending.POST, 100, 100), (Ending.VOID, 0, 0)],
)
async def test_a_hold_of_123_ends_posted_in_full_in_part_or_voided(
    connection: asyncpg.Connection, ending: Ending, measured_ms: int, charged_ms: int
) -> None:
    """Case 1. TigerBeetle, "Two-Phase Transfers": a pending of 123 is posted, posted with 100, or voided."""
    await open_account(connection, left_ms=1000)
    request = await held(connection, a_request(123))
    assert (await balance(connection)).available_ms == 877

    await settle(connection, the_end(request, measured_ms, ending=ending))

    now = await balance(connection)
    assert (now.used_ms, now.held_ms, now.available_ms) == (charged_ms, 0, 1000 - charged_ms)
    await assert_sound(connection)


async def test_with_70_of_100_posted_a_hold_of_50_does_not_fit(connection: asyncpg.Connection) -> None:
    """Case 2. TigerBeetle, `debits_must_not_exceed_credits`: posted and pending debits count alike."""
    await open_account(connection, left_ms=100)
    await settle(connection, the_end(await held(connection, a_request(70)), 70))

    (refused,) = await hold(connection, a_request(50))

    assert isinstance(refused, HoldRefused)
    assert isinstance(refused.refusal, FastTimeExhausted)
    assert refused.refusal.remaining_ms == 30
    assert isinstance((await hold(connection, a_request(30)))[0], HoldPlaced)
    assert isinstance((await hold(connection, a_request(1)))[0], HoldRefused)
    await assert_sound(connection)


async def test_no_post_exceeds_its_hold_and_the_overrun_is_another_transfer(
    connection: asyncpg.Connection,
) -> None:
    """Case 3. TigerBeetle, `exceeds_pending_transfer_amount`."""
    await open_account(connection)
    request = await held(connection, a_request(100))

    await settle(connection, the_end(request, 130))

    rows = await connection.fetch(
        """SELECT kind, code, amount FROM billing.transfer
            WHERE attempt_id = $1 ORDER BY transfer_id""",
        request.attempt_id,
    )
    assert [tuple(row) for row in rows] == [
        ("pending", "hold", 100),
        ("post_pending", "settle", 100),
        ("post", "overrun", 30),
    ]
    await assert_sound(connection)


async def test_a_key_again_is_the_first_result_and_with_another_amount_an_error(
    connection: asyncpg.Connection,
) -> None:
    """Case 4. TigerBeetle, `exists` and `exists_with_different_amount`."""
    await open_account(connection)
    request = a_request(100)
    (first,) = await hold(connection, request)

    assert await hold(connection, request) == [first]
    with pytest.raises(HoldIdReused):
        await hold(connection, a_request(101, job=request.job_id, attempt=request.attempt_id))

    assert (await balance(connection)).held_ms == 100
    await assert_sound(connection)


async def test_a_key_that_failed_fails_after_a_top_up_and_a_new_one_succeeds(
    connection: asyncpg.Connection,
) -> None:
    """Case 5. TigerBeetle, `id_already_failed`: whoever was refused may have acted on it."""
    await open_account(connection, left_ms=10)
    request = a_request(100)
    assert isinstance((await hold(connection, request))[0], HoldRefused)
    await adjust(connection, 1000)

    (again,) = await hold(connection, request)
    (anew,) = await hold(connection, a_request(100, job=request.job_id))

    assert isinstance(again, HoldRefused)
    assert isinstance(anew, HoldPlaced)
    assert (await balance(connection)).held_ms == 100
    await assert_sound(connection)


async def test_ten_units_are_held_by_ten_and_come_back_after_a_minute(
    connection: asyncpg.Connection,
) -> None:
    """Case 6. TigerBeetle, "Rate Limiting": ten requests a minute, each a pending that times out."""
    await open_account(connection, left_ms=10)
    for _ in range(10):
        await held(connection, replace(a_request(1), lasts=timedelta(seconds=60)))
    assert isinstance((await hold(connection, a_request(1, at=after(seconds=59))))[0], HoldRefused)

    async with connection.transaction():
        due = await hold_expiry.due(connection, after(seconds=60), 100)
        await hold_expiry.expire(connection, due, after(seconds=60))

    again = await hold(connection, *(a_request(1, at=after(seconds=60)) for _ in range(11)))
    assert [type(outcome) for outcome in again] == [HoldPlaced] * 10 + [HoldRefused]
    await assert_sound(connection)


async def test_of_90_unused_at_most_50_roll_over(connection: asyncpg.Connection) -> None:
    """Case 7. OpenMeter, grants: the balance after a reset is the one before, up to `maxRolloverAmount`."""
    await a_plan(connection, "saver", quota_ms=100, rollover_ms=50)
    await open_account(connection, plan="saver")
    await settle(connection, the_end(await held(connection, a_request(10)), 10))

    assert (await balance(connection, at=after(days=31))).available_ms == 50 + 100

    rolled = await connection.fetchval("SELECT granted_ms FROM billing.grant_lot WHERE source = 'rollover'")
    assert rolled == 50
    await assert_sound(connection)


async def test_a_larger_plan_at_half_the_month_gives_and_costs_half_the_difference(
    connection: asyncpg.Connection,
) -> None:
    """Case 8. Midjourney's plans of 200 and of 900 minutes; Stripe, "Prorations": 10 to 20 is -5 + 10."""
    await a_plan(connection, "small", quota_ms=200 * 60_000, price_micros=10_000_000)
    await a_plan(connection, "large", quota_ms=900 * 60_000, price_micros=20_000_000)
    await open_account(connection, plan="small")
    async with connection.transaction():
        shown = await plan_changes.preview(connection, "ann", "large", START + HALF)
        done = await plan_changes.change(
            connection,
            "ann",
            "large",
            etag=shown.etag,
            actor="accounts/ann",
            reason="test",
            request_id="r1",
            at=START + HALF,
        )

    assert done == shown
    assert done.granted_ms == 350 * 60_000
    assert (done.credit_micros, done.charge_micros, done.amount_micros) == (-5_000_000, 10_000_000, 5_000_000)
    assert (await balance(connection, at=START + HALF)).available_ms == (200 + 350) * 60_000
    owed = await connection.fetchval(
        """SELECT sum(CASE WHEN credit_account = 'revenue' THEN amount ELSE -amount END)::bigint
             FROM billing.transfer WHERE unit = 'USD'"""
    )
    assert owed == 5_000_000
    await assert_sound(connection)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """When, and by whose clock, somebody subscribed."""

    account: str
    begun: datetime


ANCHORS = [
    Anchor(account="last-of-january", begun=datetime(2027, 1, 31, 12, tzinfo=UTC)),
    Anchor(account="leap-day", begun=datetime(2028, 2, 29, 23, 59, 59, tzinfo=UTC)),
    Anchor(account="thirtieth", begun=datetime(2027, 12, 30, tzinfo=UTC)),
    Anchor(account="new-year", begun=datetime(2028, 1, 1, tzinfo=UTC)),
    # Half past two comes twice on this night, and does not come on the one in spring.
    Anchor(account="autumn", begun=datetime(2027, 10, 31, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1)),
    Anchor(account="spring", begun=datetime(2028, 3, 26, 3, 30, tzinfo=ZoneInfo("Europe/Berlin"))),
    Anchor(account="southern", begun=datetime(2028, 4, 2, 1, 59, tzinfo=ZoneInfo("Pacific/Auckland"))),
]


async def test_periods_meet_over_years_of_month_ends_leap_days_and_summer_times(
    connection: asyncpg.Connection,
) -> None:
    """Case 11. Stripe, `billing_cycle_anchor`: a short month's last day stands in, and the day comes back."""
    for anchor in ANCHORS:
        await open_account(connection, anchor.account, at=anchor.begun)
    choice = random.Random(11)
    zones = [ZoneInfo("America/New_York"), ZoneInfo("Europe/Berlin"), ZoneInfo("Pacific/Auckland"), UTC]
    moment, end = datetime(2028, 4, 3, tzinfo=UTC), datetime(2033, 4, 3, tzinfo=UTC)
    while moment < end:
        at = moment.astimezone(choice.choice(zones))
        async with connection.transaction():
            if choice.random() < 0.5:
                await expiry.expire(connection, at, 100)
            else:
                await accounts.lock(connection, [anchor.account for anchor in ANCHORS], at)
        moment += timedelta(days=choice.randint(5, 20), hours=choice.randint(0, 23))

    for anchor in ANCHORS:
        rows = await connection.fetch(
            """SELECT effective_at, expires_at FROM billing.grant_lot
                WHERE account_id = $1 AND source = 'plan' AND effective_at >= '2028-05-04'
                ORDER BY effective_at""",
            anchor.account,
        )
        assert len(rows) in (58, 59), "one period a month, and no more"
        assert [row["expires_at"] for row in rows[:-1]] == [row["effective_at"] for row in rows[1:]]
        begun = anchor.begun.astimezone(UTC)
        for start, _ in rows:
            assert start.timetz() == begun.timetz()
            next_day = start + timedelta(days=1)
            assert start.day == begun.day or (start.day < begun.day and next_day.day == 1)
    await assert_sound(connection)
    assert (await balance(connection, "leap-day", at=end)).available_ms == BASIC_MS
