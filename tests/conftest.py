"""What every test may ask for: a real PostgreSQL, and a fresh migrated database in it."""

from __future__ import annotations

import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before anything imports ray

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
import structlog
from hypothesis import settings

from scheduler.store.embedded import embedded_postgresql, with_database
from scheduler.store.migrate import migrate

# Ray replaces `print`, by which structlog logs unless told otherwise, by one that keeps the standard output
# of the test that started it.
structlog.configure(logger_factory=structlog.WriteLoggerFactory())

# The same examples in each run: a change is judged by what it changed. `--long` searches elsewhere each time.
settings.register_profile("same", derandomize=True)
settings.load_profile("default" if os.environ.get("DARKROOM_LONG") else "same")

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """DSN of a server that lives as long as the test run."""
    # A short path: a Unix socket's name ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dr-") as folder, embedded_postgresql(Path(folder) / "pg") as dsn:
        yield dsn


@pytest.fixture(scope="session")
def migrated_template(postgresql: str) -> str:
    """Name of a migrated database that others are copied from: 30 ms each instead of a migration."""

    async def prepare() -> None:
        server = await asyncpg.connect(postgresql)
        await server.execute("CREATE DATABASE darkroom_template")
        await server.close()
        connection = await asyncpg.connect(with_database(postgresql, "darkroom_template"))
        await migrate(connection)
        await connection.close()

    asyncio.run(prepare())
    return "darkroom_template"


@pytest.fixture
async def database(postgresql: str, migrated_template: str) -> AsyncIterator[str]:
    """DSN of an empty, migrated database of this test alone."""
    name = f"test_{next(_numbers)}"
    server = await asyncpg.connect(postgresql)
    await server.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_template}")
    try:
        yield with_database(postgresql, name)
    finally:
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    """One connection to this test's database."""
    connection = await asyncpg.connect(database)
    try:
        yield connection
    finally:
        await connection.close()
