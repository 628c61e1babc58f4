"""The end of periods and lots: what rolls over, what expires, and the sweeper that notices."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import asyncpg
import pytest
from ledger_building import (
    BASIC_MS,
    START,
    a_pricing,
    a_request,
    adjust,
    after,
    assert_sound,
    balance,
    held,
    open_account,
    overage,
    settle,
    the_end,
)
from ledger_plans import a_plan, a_version

from billing import expiry
from billing.plans import EffectiveFrom


async def sweep(connection: asyncpg.Connection, at: datetime, most: int = 100) -> int:
    async with connection.transaction():
        return await expiry.expire(connection, at, most)


async def use(connection: asyncpg.Connection, ms: int, *, at: datetime = START, account: str = "ann") -> None:
    await settle(connection, the_end(await held(connection, a_request(ms, at=at, account=account)), ms))


async def lots(connection: asyncpg.Connection) -> list[tuple[str, int, int, bool]]:
    rows = await connection.fetch(
        "SELECT source, granted_ms, expired_ms, closed FROM billing.grant_lot ORDER BY lot_id"
    )
    return [tuple(row) for row in rows]


async def test_at_most_so_much_rolls_over(connection: asyncpg.Connection) -> None:
    """Published case 7: grant 100, use 10, rollover at most 50, reset: 50 are carried."""
    await a_plan(connection, "saver", quota_ms=100, rollover_ms=50)
    await open_account(connection, plan="saver")
    await use(connection, 10)

    now = await balance(connection, at=after(days=31))

    assert now.available_ms == 100 + 50
    assert await lots(connection) == [
        ("plan", 100, 90, True),
        ("plan", 100, 0, False),
        ("rollover", 50, 0, False),
    ]
    await assert_sound(connection)


async def test_no_more_rolls_over_than_is_left(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "saver", quota_ms=100, rollover_ms=50)
    await open_account(connection, plan="saver")
    await use(connection, 70)
    assert (await balance(connection, at=after(days=31))).available_ms == 130
    await use(connection, 30, at=after(days=31))
    # What rolled over burnt first; it does not roll over again.
    assert (await balance(connection, at=after(days=61))).available_ms == 150
    await assert_sound(connection)


async def test_only_the_plans_time_rolls_over(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "saver", quota_ms=100, rollover_ms=1000)
    await open_account(connection, plan="saver")
    await adjust(connection, 7, expires_at=after(days=31))
    await adjust(connection, 500)
    assert (await balance(connection, at=after(days=31))).available_ms == 100 + 100 + 500
    assert (await balance(connection, at=after(days=61))).available_ms == 100 + 100 + 500
    await assert_sound(connection)


async def test_a_rollover_does_not_depend_on_when_it_is_noticed(connection: asyncpg.Connection) -> None:
    await a_plan(connection, "saver", quota_ms=100, rollover_ms=50)
    for account in ("ann", "bob"):
        await open_account(connection, account, plan="saver")
        await use(connection, 90, account=account)
    await balance(connection, "ann", at=after(days=31))
    await balance(connection, "ann", at=after(days=61))
    for account in ("ann", "bob"):
        assert (await balance(connection, account, at=after(days=100))).available_ms == 150
    await assert_sound(connection)


async def test_what_rolls_over_is_for_the_ended_periods_version_to_say(
    connection: asyncpg.Connection,
) -> None:
    await a_plan(connection, "saver", quota_ms=100, rollover_ms=50)
    await open_account(connection, plan="saver")
    await a_version(connection, "saver", at=after(days=3), rollover_ms=0)
    assert (await balance(connection, at=after(days=31))).available_ms == 150
    assert (await balance(connection, at=after(days=61))).available_ms == 100
    await assert_sound(connection)


async def test_a_version_at_once_rules_the_rollover_though_nobody_touched_the_account(
    connection: asyncpg.Connection,
) -> None:
    await a_plan(connection, "saver", quota_ms=100)
    await open_account(connection, plan="saver")
    await a_version(connection, "saver", at=after(days=3), effective_from=EffectiveFrom.NOW, rollover_ms=50)
    assert (await balance(connection, at=after(days=31))).available_ms == 150
    await assert_sound(connection)


async def test_a_running_job_keeps_what_it_holds_and_may_overrun_in_its_own_lot(
    connection: asyncpg.Connection,
) -> None:
    await a_plan(connection, "saver", quota_ms=100, rollover_ms=50)
    await open_account(connection, plan="saver")
    await overage(connection)
    job = await held(connection, a_request(40, at=after(days=30, hours=23), pricing=a_pricing(overage=True)))

    assert (await balance(connection, at=after(days=31))).available_ms == 150
    assert (await lots(connection))[0] == ("plan", 100, 50, False)
    assert await sweep(connection, after(days=31)) == 0
    (settled,) = await settle(connection, the_end(job, 49, at=after(days=31, seconds=5)))
    assert (settled.billed_ms, settled.amount_micros) == (49, 0)
    assert await sweep(connection, after(days=31, seconds=6)) == 1
    assert (await lots(connection))[0] == ("plan", 100, 51, True)
    await assert_sound(connection)


async def test_the_sweeper_renews_whom_nobody_touches(connection: asyncpg.Connection) -> None:
    for account in ("ann", "bob", "cid"):
        await open_account(connection, account)

    assert await sweep(connection, after(days=30)) == 0
    assert await sweep(connection, after(days=31), most=2) == 2
    assert await sweep(connection, after(days=31), most=2) == 1
    assert await sweep(connection, after(days=31), most=2) == 0

    assert await connection.fetchval("SELECT count(*) FROM billing.grant_lot WHERE closed") == 3
    expired = await connection.fetchval(
        "SELECT sum(amount) FROM billing.transfer WHERE code = 'expiry' AND credit_account = 'expired'"
    )
    assert expired == 3 * BASIC_MS
    await assert_sound(connection)


async def test_the_sweeper_closes_a_grant_that_ends_in_mid_period(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=0)
    await adjust(connection, 1000, expires_at=after(days=2))
    await use(connection, 400, at=after(days=1))

    assert await sweep(connection, after(days=1)) == 0
    assert await sweep(connection, after(days=2)) == 1
    assert await sweep(connection, after(days=3)) == 0
    assert (await lots(connection))[1] == ("admin", 1000, 600, True)
    await assert_sound(connection)


async def test_a_lot_that_was_used_up_is_closed_without_an_entry(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=0)
    assert await sweep(connection, after(days=31)) == 1
    assert (await lots(connection))[0] == ("plan", BASIC_MS, 0, True)
    assert await connection.fetchval("SELECT count(*) FROM billing.transfer WHERE code = 'expiry'") == 0
    await assert_sound(connection)


async def test_the_sweeper_may_come_twice_at_once(database: str) -> None:
    connections = [await asyncpg.connect(database) for _ in range(3)]
    try:
        for number in range(20):
            await open_account(connections[0], f"a-{number}")
        await asyncio.gather(*(sweep(connection, after(days=31)) for connection in connections))
        assert await sweep(connections[0], after(days=31)) == 0
        assert await connections[0].fetchval("SELECT count(*) FROM billing.grant_lot") == 40
        await assert_sound(connections[0])
    finally:
        for connection in connections:
            await connection.close()


async def test_the_sweeper_waits_for_nobody(database: str, connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await open_account(connection, "bob")
    busy = await asyncpg.connect(database)
    try:
        async with busy.transaction():
            await busy.execute("SELECT FROM billing.subscription WHERE account_id = 'ann' FOR UPDATE")
            assert await sweep(connection, after(days=31)) == 1
        assert await sweep(connection, after(days=31)) == 1
    finally:
        await busy.close()


@pytest.mark.parametrize("day", [29, 30, 31])
async def test_periods_keep_their_day_under_the_sweeper(connection: asyncpg.Connection, day: int) -> None:
    begun = datetime(2028, 1, day, 12, tzinfo=UTC)
    await open_account(connection, at=begun)
    for month in range(13):
        await sweep(connection, datetime(2028 + (month + 1) // 12, (month + 1) % 12 + 1, 1, tzinfo=UTC))
    starts = await connection.fetch("SELECT effective_at FROM billing.grant_lot ORDER BY effective_at")
    assert [(at.month, at.day) for (at,) in starts[:4]] == [(1, day), (2, 29), (3, day), (4, min(day, 30))]
    assert len(starts) == 13
    await assert_sound(connection)
