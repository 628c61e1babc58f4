"""Accounts that nobody touches are renewed, and lots that are over closed."""

from __future__ import annotations

from datetime import timedelta

from billing import ledger
from billing.prices import ChargeMode, PricingSnapshot
from scheduler.frontdoor.renewals import Renewals
from scheduler.store.pool import open_pool
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Door

STATE_OF = "SELECT state FROM billing.hold WHERE account_id = $1"
LOTS = "SELECT count(*) FROM billing.grant_lot WHERE closed = $1"


async def test_a_sweep_renews_every_account_however_many(door: Door) -> None:
    for number in range(60):
        await door.caller(f"a-{number}")
    before = await door.sql(LOTS, False)

    await Renewals(door.pool, door.scheduler, lambda: door.clock.now + timedelta(days=32)).sweep()

    assert await door.sql(LOTS, True) == before
    assert await door.sql(LOTS, False) == before


async def hold(door: Door, account_id: str, job_id: str, attempt_id: str) -> None:
    """Set fast time aside for an attempt, as its start does."""
    pricing = PricingSnapshot(
        plan="standard",
        plan_version=1,
        charge_mode=ChargeMode.FAST,
        multiplier_bp=10_000,
        overage_allowed=False,
        overage_micros_per_minute=0,
        currency="USD",
    )
    request = ledger.HoldRequest(
        job_id=job_id,
        attempt_id=attempt_id,
        account_id=account_id,
        predicted_ms=1_000,
        pricing=pricing,
        at=door.clock.now,
    )
    async with door.pool.transaction() as connection:
        await ledger.place_holds(connection, [request])


async def test_a_hold_whose_attempt_does_not_run_expires_and_its_account_is_told(door: Door) -> None:
    lost = await (await door.caller("ben")).create(tier=job_pb2.TIER_FAST)
    await hold(door, "ben", lost.uid, await door.start(lost.uid))
    await door.lose(lost.uid)
    running = await (await door.caller("ada")).create(tier=job_pb2.TIER_FAST)
    await hold(door, "ada", running.uid, await door.start(running.uid))
    door.scheduler.told_accounts.clear()
    renewals = Renewals(door.pool, door.scheduler, lambda: door.clock.now + timedelta(hours=2))

    await renewals.sweep()

    assert await door.sql(STATE_OF, "ada") == "open"
    assert await door.sql(STATE_OF, "ben") == "expired"
    assert door.scheduler.told_accounts == ["ben"]


async def test_what_was_refused_a_day_ago_is_forgotten(door: Door) -> None:
    await door.sql(
        """INSERT INTO billing.refused_hold
           SELECT gen_random_uuid(), $1::timestamptz - of * interval '1 minute'
             FROM generate_series(1, 7000) AS of RETURNING 1""",
        door.clock.now,
    )
    await Renewals(door.pool, door.scheduler, lambda: door.clock.now).sweep()
    left = "SELECT count(*) FROM billing.refused_hold WHERE ($1 - at < '1 day') = $2"
    assert (await door.sql(left, door.clock.now, True), await door.sql(left, door.clock.now, False)) == (
        1439,
        0,
    )


async def test_a_sweep_goes_by_while_the_database_is_away(door: Door, database: str) -> None:
    pool = await open_pool(database, 1)
    await pool.close()
    await Renewals(pool, door.scheduler, lambda: door.clock.now).sweep()
