"""Accounts that nobody touches are renewed, and lots that are over closed."""

from __future__ import annotations

from datetime import timedelta

from scheduler.frontdoor.renewals import Renewals
from scheduler.store.pool import open_pool
from tests.frontdoor.door import Door

LOTS = "SELECT count(*) FROM billing.grant_lot WHERE closed = $1"


async def test_a_sweep_renews_every_account_however_many(door: Door) -> None:
    for number in range(60):
        await door.caller(f"a-{number}")
    before = await door.sql(LOTS, False)

    await Renewals(door.pool, lambda: door.clock.now + timedelta(days=32)).sweep()

    assert await door.sql(LOTS, True) == before
    assert await door.sql(LOTS, False) == before


async def test_a_sweep_goes_by_while_the_database_is_away(door: Door, database: str) -> None:
    pool = await open_pool(database, 1)
    await pool.close()
    await Renewals(pool, lambda: door.clock.now).sweep()
