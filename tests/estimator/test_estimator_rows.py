"""What was learned, in the database: counted once, waiting for nobody, read by the front door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from structlog.testing import capture_logs

from scheduler.frontdoor.estimates import Estimates
from scheduler.store.estimates import learn, read_estimates
from scheduler.store.pool import Pool, open_pool
from tests.estimator.estimator_building import MODELS, a_shape, rows_of, seen

_OBSERVED = [
    seen(a_shape(), step_ms=100),
    seen(a_shape(256, 256), step_ms=30, rest_ms=0),
    seen(a_shape(), step_ms=140),
    seen(a_shape(), step_ms=90, device="gpu-b"),
    seen(a_shape(), step_ms=900),
]


@pytest.fixture
async def another(database: str) -> AsyncIterator[asyncpg.Connection]:
    """A second lane's connection."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database, 1)
    yield pool
    await pool.close()


@pytest.mark.parametrize("batch", [1, 2, 5])
async def test_rows_are_what_the_estimator_makes_of_the_observations_however_they_are_batched(
    connection: asyncpg.Connection, batch: int
) -> None:
    for first in range(0, len(_OBSERVED), batch):
        await learn(connection, _OBSERVED[first : first + batch])
    assert set(await read_estimates(connection)) == set(rows_of(_OBSERVED))


async def test_what_is_rolled_back_was_not_learned(connection: asyncpg.Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await learn(connection, _OBSERVED)
    await transaction.rollback()
    assert await read_estimates(connection) == []


async def test_settlement_does_not_wait_for_another_that_learns_of_the_same_shape(
    connection: asyncpg.Connection, another: asyncpg.Connection
) -> None:
    await learn(connection, _OBSERVED)
    elsewhere = seen(a_shape(1024, 1024))
    async with connection.transaction():
        await learn(connection, [seen(a_shape(), step_ms=50)])
        async with asyncio.timeout(5):
            await learn(another, [seen(a_shape(), step_ms=7_000), elsewhere])
    expected = rows_of([*_OBSERVED, seen(a_shape(), step_ms=50), elsewhere])
    assert set(await read_estimates(connection)) == set(expected)


async def test_two_settlements_that_see_a_shape_first_make_one_row_of_it(
    connection: asyncpg.Connection, another: asyncpg.Connection
) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await learn(connection, [seen(a_shape(), step_ms=100)])
    second = asyncio.create_task(learn(another, [seen(a_shape(), step_ms=200)]))
    await transaction.commit()
    await second
    (row,) = await read_estimates(connection)
    assert (row.seen, row.step_us) in [(1, 100_000), (2, 150_000)]


async def test_many_settlements_at_once_lose_observations_at_most_and_spoil_none(database: str) -> None:
    connections = [await asyncpg.connect(database) for _ in range(4)]

    async def settle(connection: asyncpg.Connection) -> None:
        for _ in range(25):
            async with connection.transaction():
                await learn(connection, [seen(a_shape(), step_ms=100), seen(a_shape(64, 64), step_ms=1)])

    await asyncio.gather(*map(settle, connections))
    rows = await read_estimates(connections[0])
    for connection in connections:
        await connection.close()
    assert all(1 <= row.seen <= 100 for row in rows), [row.seen for row in rows]
    assert {row.step_us for row in rows} == {100_000, 1_000}


async def test_kinds_that_only_a_newer_release_knows_are_passed_over(connection: asyncpg.Connection) -> None:
    await learn(connection, _OBSERVED)
    await connection.execute("UPDATE scheduler.estimate SET kind = 'hologram' WHERE device = 'gpu-b'")
    assert {row.device for row in await read_estimates(connection)} == {"gpu-a"}


async def test_front_door_begins_with_the_models_file_and_takes_up_what_was_learned(
    pool: Pool, connection: asyncpg.Connection
) -> None:
    estimates = Estimates(pool, MODELS)
    assert estimates.estimator.predict(a_shape()).cost_ms == 60_000
    await learn(connection, [seen(a_shape(), step_ms=100, rest_ms=500)] * 40)
    await estimates.refresh()
    assert estimates.estimator.predict(a_shape()).cost_ms == 2_500


async def test_without_the_database_the_last_estimates_stand_and_the_log_says_so_once(
    pool: Pool, connection: asyncpg.Connection
) -> None:
    estimates = Estimates(pool, MODELS)
    await learn(connection, [seen(a_shape(), step_ms=100, rest_ms=500)] * 40)
    await estimates.refresh()
    await pool.close()
    with capture_logs() as logs:
        await estimates.refresh()
        await estimates.refresh()
    assert estimates.estimator.predict(a_shape()).cost_ms == 2_500
    assert [entry["event"] for entry in logs] == ["estimates not read, the last ones stand"]
