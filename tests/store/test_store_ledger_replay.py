"""The second auditor runs aside: it finds the same, in its time or not at all, and nobody waits for it."""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime

import asyncpg
import pytest

from billing import accounts
from billing.auditor import replay
from scheduler.refusals import Overloaded
from scheduler.store.ledger_replay import replayed

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
async def ledger(connection: asyncpg.Connection) -> asyncpg.Connection:
    async with connection.transaction():
        await accounts.create(connection, "ann", "basic", NOW)
    return connection


async def test_a_sound_ledger_gives_no_findings(database: str, ledger: asyncpg.Connection) -> None:
    assert await replayed(database, 60) == []


@pytest.mark.unsound(2)
async def test_what_it_finds_is_what_is_found_in_this_process(
    database: str, ledger: asyncpg.Connection
) -> None:
    await ledger.execute("UPDATE billing.grant_lot SET used_ms = 5")
    found = await replayed(database, 60)
    assert found == await replay(ledger)
    assert [finding.number for finding in found] == [2]


async def test_it_is_ended_when_its_time_is_over(database: str, ledger: asyncpg.Connection) -> None:
    transaction = ledger.transaction()
    await transaction.start()
    await ledger.execute("LOCK TABLE billing.grant_lot")  # whoever reads it waits
    with pytest.raises(TimeoutError):
        await replayed(database, 2)
    await transaction.rollback()
    for _ in itertools.count():
        left = await ledger.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'darkroom ledger replay'"
        )
        if not left:
            break


async def test_a_database_that_is_away_is_told() -> None:
    with pytest.raises(Overloaded):
        await replayed("postgresql://postgres@/postgres?host=/nowhere", 60)


async def test_the_event_loop_goes_on_meanwhile(database: str, ledger: asyncpg.Connection) -> None:
    """Each turn of this loop takes microseconds; a replay in it would take them all."""
    task = asyncio.create_task(replayed(database, 60))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert await task == []
    assert turns > 100
