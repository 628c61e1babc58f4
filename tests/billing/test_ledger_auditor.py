"""The auditor and the invariants, which share nothing, agree about every ledger there is."""

from __future__ import annotations

import asyncio

import asyncpg
import busy_ledger
from ledger_building import (
    a_pricing,
    a_request,
    adjust,
    assert_sound,
    held,
    open_account,
    overage,
    refund,
    settle,
    the_end,
)

from billing.auditor import replay
from billing.invariants import NOT_ASKED, check, results
from billing.ledger import Ending


async def test_a_ledger_in_which_everything_happened_gives_no_findings(
    connection: asyncpg.Connection,
) -> None:
    await busy_ledger.fill(connection)
    await assert_sound(connection)
    assert await replay(connection) == []


async def test_an_empty_ledger_gives_no_findings(connection: asyncpg.Connection) -> None:
    assert await replay(connection) == []


async def test_what_cannot_be_asked_in_time_is_named_and_ends_nothing_else(
    connection: asyncpg.Connection,
) -> None:
    await open_account(connection)
    assert {answer.violations for answer in await results(connection, 0)} == {NOT_ASKED}
    assert {answer.violations for answer in await results(connection, 60_000)} == {0}


async def test_the_checks_write_nothing_and_leave_the_connection_as_it_was(
    connection: asyncpg.Connection,
) -> None:
    before = await connection.fetchval("SHOW statement_timeout")
    async with connection.transaction():
        await results(connection, 60_000)
        assert await connection.fetchval("SHOW statement_timeout") == before
    await results(connection, 60_000)
    assert await connection.fetchval("SHOW statement_timeout") == before
    assert await connection.fetchval("SHOW jit") == await connection.fetchval(
        "SELECT reset_val FROM pg_settings WHERE name = 'jit'"
    )


async def test_nothing_is_told_of_a_ledger_that_is_in_use(
    database: str, connection: asyncpg.Connection
) -> None:
    for account in ("ann", "ben"):
        await open_account(connection, account, left_ms=3_000)
        await adjust(connection, 2_000, account=account)
        await overage(connection, account=account)

    async def customer(account: str) -> None:
        other = await asyncpg.connect(database)
        try:
            for turn in range(15):
                request = await held(
                    other,
                    a_request(200, account=account, pricing=a_pricing(overage=True, multiplier_bp=15_000)),
                )
                ending = Ending.VOID if turn % 5 == 4 else Ending.POST
                await settle(other, the_end(request, 150 + 20 * turn, ending=ending, absorbed_ms=turn))
                if ending is Ending.POST and turn % 3 == 0:
                    await refund(other, request.job_id, 100, account=account)
        finally:
            await other.close()

    customers = [asyncio.create_task(customer(account)) for account in ("ann", "ben", "ann", "ben")]
    asked = 0
    while not all(done.done() for done in customers):
        assert await check(connection) == []
        assert await replay(connection) == []
        asked += 1
    await asyncio.gather(*customers)
    assert asked > 1, "the customers were done before anybody looked"
