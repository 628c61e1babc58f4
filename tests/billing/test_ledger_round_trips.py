"""What a batch costs in round trips, and what callers may leave out to cost less: locks, and what comes after
the first refusal. And what a GPU class costs, which is fixed when the hold is placed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import asyncpg
import pytest
from ledger_building import (
    START,
    a_pricing,
    a_request,
    after,
    balance,
    held,
    hold,
    open_account,
    settle,
    the_end,
)

from billing import accounts, holds, ledger
from billing.ledger import HoldPlaced, HoldRefused

# BEGIN, lock, read, books, hold or settlement, COMMIT.
MOST_ROUND_TRIPS = 6


async def round_trips(connection: asyncpg.Connection, act: Callable[[], Awaitable[object]]) -> int:
    sent: list[object] = []
    with connection.query_logger(sent.append):
        await act()
        await asyncio.sleep(0)  # the last query is told behind its answer
    return len(sent)


@pytest.fixture
async def warm(connection: asyncpg.Connection) -> asyncpg.Connection:
    """A connection that has done it before: the driver asks once what the columns' types are."""
    await open_account(connection)
    await settle(connection, the_end(await held(connection, a_request(1000)), 900))
    return connection


@pytest.mark.parametrize("size", [1, 100])
async def test_a_batch_of_holds_and_its_settlement_take_six_round_trips_each(
    warm: asyncpg.Connection, size: int
) -> None:
    for number in range(size):
        await open_account(warm, f"account-{number}")
    requests = [a_request(1000, account=f"account-{number}") for number in range(size)]
    ends = [the_end(request, 900) for request in requests]

    assert await round_trips(warm, lambda: hold(warm, *requests)) == MOST_ROUND_TRIPS
    assert await round_trips(warm, lambda: settle(warm, *ends)) == MOST_ROUND_TRIPS


async def test_what_is_told_of_used_up_time_takes_no_round_trip_of_its_own(warm: asyncpg.Connection) -> None:
    await open_account(warm, "bob", left_ms=1000)

    for measured_ms, reached in ((600, (50,)), (100, ()), (300, (80, 100))):
        request = await held(warm, a_request(measured_ms, account="bob"))
        ended: list[ledger.Settled] = []

        async def end(request: ledger.HoldRequest = request, ended: list[ledger.Settled] = ended) -> None:
            ended += await settle(warm, the_end(request, request.predicted_ms))

        assert await round_trips(warm, end) == MOST_ROUND_TRIPS
        assert ended[0].thresholds == reached


async def test_who_has_locked_the_accounts_is_spared_the_lock(warm: asyncpg.Connection) -> None:
    request = a_request(1000)
    end = the_end(request, 900)

    async with warm.transaction():
        locked = await accounts.lock(warm, ["ann"], START)
        assert await round_trips(warm, lambda: ledger.place_holds(warm, [request], locked=locked)) == 3
        assert await round_trips(warm, lambda: ledger.settle(warm, [end], locked=locked)) == 3


async def test_a_batch_until_refused_holds_nothing_behind_the_first_refusal(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection, left_ms=100)
    await open_account(connection, "bob")
    requests = [a_request(60), a_request(60), a_request(60, account="bob")]

    async with connection.transaction():
        outcomes = await ledger.place_holds(connection, requests, until_refused=True)

    assert [type(outcome) for outcome in outcomes] == [HoldPlaced, HoldRefused]
    assert (await balance(connection)).held_ms == 60
    assert (await balance(connection, "bob")).held_ms == 0


async def test_an_account_whose_version_changes_while_it_is_waited_for_has_the_new_terms(
    database: str, connection: asyncpg.Connection
) -> None:
    await open_account(connection)
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute("UPDATE billing.subscription SET plan = 'pro' WHERE account_id = 'ann'")
        # Sent and waiting before the other commits: it yields until the row is free.
        waiting = asyncio.create_task(_locked(connection))
        await _until_waited_for(other)
    terms = await waiting

    assert terms["ann"].plan == "pro"
    await connection.execute("UPDATE billing.subscription SET plan = 'basic' WHERE account_id = 'ann'")
    await other.close()


async def _locked(connection: asyncpg.Connection) -> dict[str, accounts.Terms]:
    async with connection.transaction():
        return await accounts.lock(connection, ["ann"], START)


async def _until_waited_for(connection: asyncpg.Connection) -> None:
    while not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
        pass


async def test_a_gpu_class_multiplies_the_hold_and_the_charge(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    pricing = replace(a_pricing(multiplier_bp=15_000), gpu_class_bp={"H200": 20_001})
    request = replace(a_request(1000, pricing=pricing), device="H200")

    await held(connection, request)
    assert (await balance(connection)).held_ms == 3001  # ceil(1.5 * 2.0001 * 10000) is 30002 basis points
    (settled,) = await settle(connection, the_end(request, 500))

    assert settled.billed_ms == 1501
    billed_bp = await connection.fetchval("SELECT multiplier_bp FROM billing.settlement")
    assert billed_bp == 30_002


async def test_a_class_that_the_plan_does_not_name_costs_what_it_did(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    pricing = replace(a_pricing(), gpu_class_bp={"H200": 20_000})

    await held(connection, replace(a_request(1000, pricing=pricing), device="RTX 4090"))

    assert (await balance(connection)).held_ms == 1000


async def test_a_hold_that_comes_again_for_another_class_is_refused(connection: asyncpg.Connection) -> None:
    await open_account(connection)
    pricing = replace(a_pricing(), gpu_class_bp={"H200": 20_000})
    request = await held(connection, a_request(1000, pricing=pricing))

    with pytest.raises(holds.HoldIdReused):
        await hold(connection, replace(request, device="H200", at=after(seconds=1)))
