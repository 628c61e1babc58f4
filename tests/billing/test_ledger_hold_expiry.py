"""Holds that nobody ends: their time comes back, once, and whoever is settled after that is still charged."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta

import asyncpg
import pytest
from ledger_at_once import crowd
from ledger_building import (
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

from billing import hold_expiry
from billing.auditor import replay
from billing.hold_expiry import DueHold
from billing.holds import HOLD_LASTS
from billing.ledger import AlreadySettled, Ending, HoldRequest

LATER = after(hours=2)


async def swept(
    connection: asyncpg.Connection, at: datetime = LATER, *, running: tuple[HoldRequest, ...] = ()
) -> list[DueHold]:
    """Look at what is due as the sweeper does, and return what it expired."""
    alive = {request.attempt_id for request in running}
    async with connection.transaction():
        due = await hold_expiry.due(connection, at, 100)
        left = [one for one in due if str(one.attempt_id) not in alive]
        await hold_expiry.put_off(connection, [one for one in due if one not in left], at)
        await hold_expiry.expire(connection, left, at)
    return left


async def test_a_hold_nobody_ends_gives_its_time_back_when_it_is_due(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=1000)
    await held(connection, a_request(400))

    assert await swept(connection, after(minutes=59)) == []
    assert (await balance(connection)).held_ms == 400
    assert len(await swept(connection, after(hours=1))) == 1
    assert await swept(connection) == []

    now = await balance(connection)
    assert (now.used_ms, now.held_ms, now.available_ms) == (0, 0, 1000)
    rows = await connection.fetch("SELECT kind, code FROM billing.transfer WHERE attempt_id IS NOT NULL")
    assert [tuple(row) for row in rows] == [("pending", "hold"), ("expire_pending", "hold_expiry")]
    await assert_sound(connection)
    assert await replay(connection) == []


async def test_the_hold_of_an_attempt_that_runs_is_put_off_as_long_as_it_does(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    request = await held(connection, a_request(400))

    for hours in range(1, 6):
        assert await swept(connection, after(hours=hours), running=(request,)) == []
    assert await swept(connection, after(hours=5, minutes=59)) == []
    (settled,) = await settle(connection, the_end(request, 300, at=after(hours=6)))

    assert settled.billed_ms == 300
    assert await connection.fetchval("SELECT state FROM billing.hold") == "posted"


async def test_money_that_was_set_aside_is_free_again_too(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=100)
    await overage(connection, cap=10_000)
    await held(connection, a_request(500, pricing=a_pricing(overage=True)))
    assert (await balance(connection)).overage_held_micros > 0

    await swept(connection)

    assert (await balance(connection)).overage_held_micros == 0
    await assert_sound(connection)
    assert await replay(connection) == []


@pytest.mark.parametrize(("measured_ms", "billed_ms"), [(300, 300), (1200, 1000)])
async def test_who_succeeds_after_its_hold_expired_is_charged_as_far_as_there_is_time(
    connection: asyncpg.Connection, measured_ms: int, billed_ms: int
) -> None:
    await open_account(connection, left_ms=1000)
    request = await held(connection, a_request(400))
    await swept(connection)

    (settled,) = await settle(connection, the_end(request, measured_ms, at=LATER))

    assert (settled.billed_ms, settled.absorbed_ms) == (billed_ms, measured_ms - billed_ms)
    assert (await balance(connection)).used_ms == billed_ms
    with pytest.raises(AlreadySettled):
        await settle(connection, the_end(request, measured_ms, at=LATER))
    await assert_sound(connection)
    assert await replay(connection) == []


async def test_who_is_lost_after_its_hold_expired_costs_nothing(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    request = await held(connection, a_request(400))
    await swept(connection)

    await settle(connection, the_end(request, ending=Ending.VOID, absorbed_ms=70, at=LATER))

    assert (await balance(connection)).used_ms == 0
    assert await connection.fetchval("SELECT state FROM billing.hold") == "expired"
    await assert_sound(connection)
    assert await replay(connection) == []


async def test_a_job_whose_hold_expired_may_be_held_for_again(connection: asyncpg.Connection) -> None:
    await open_account(connection, left_ms=400)
    lost = await held(connection, a_request(400))
    await swept(connection)

    again = await held(connection, a_request(400, job=lost.job_id))
    await settle(connection, the_end(again, 400))

    assert (await balance(connection)).used_ms == 400
    await assert_sound(connection)


async def test_a_post_and_an_expiry_at_one_moment_end_each_hold_once(
    database: str, connection: asyncpg.Connection
) -> None:
    accounts = [f"account-{number}" for number in range(5)]
    for account in accounts:
        await open_account(connection, account, left_ms=10_000)
    requests = [
        await held(connection, a_request(100, account=account)) for account in accounts for _ in range(8)
    ]

    async def post(pool: asyncpg.Pool, request: HoldRequest) -> None:
        async with pool.acquire() as one:
            await settle(one, the_end(request, 90, at=LATER))

    async def sweep(pool: asyncpg.Pool) -> int:
        async with pool.acquire() as one:
            return len(await swept(one))

    async with crowd(database) as pool:
        ended = await asyncio.gather(
            *(post(pool, request) for request in requests), *(sweep(pool) for _ in range(20))
        )

    states = dict(
        await connection.fetch("SELECT state, count(*) FROM billing.hold GROUP BY state")  # type: ignore[arg-type]
    )
    assert states.get("expired", 0) == sum(count for count in ended if count is not None)
    assert states.get("expired", 0) + states.get("posted", 0) == len(requests)
    for account in accounts:
        now = await balance(connection, account)
        assert (now.used_ms, now.held_ms) == (8 * 90, 0), "posted or expired first, each is charged once"
    await assert_sound(connection)
    assert await replay(connection) == []


async def test_an_account_that_somebody_has_locked_is_left_for_the_next_sweep(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    await open_account(connection, "bob")
    await held(connection, a_request(100))
    await held(connection, a_request(100, account="bob"))
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute("SELECT FROM billing.subscription WHERE account_id = 'ann' FOR UPDATE")
        assert [one.account_id for one in await swept(connection)] == ["bob"]
    await other.close()
    assert [one.account_id for one in await swept(connection)] == ["ann"]


async def test_a_hold_stands_as_long_as_its_request_says(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    await hold(connection, replace(a_request(100), lasts=timedelta(seconds=60)))

    assert await swept(connection, after(seconds=59)) == []
    assert len(await swept(connection, after(seconds=60))) == 1
    assert timedelta(minutes=10) < HOLD_LASTS, "longer than any job is thought to take"
