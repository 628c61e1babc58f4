"""What every test may ask for: a real PostgreSQL, and a fresh migrated database in it.

Every database that a test leaves behind is asked whether the ledger's promises still hold.
"""

from __future__ import annotations

import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before anything imports ray
# Ray is started by fork and exec. Unless told otherwise gRPC starts threads of its own in between, and one of
# them may abort the child (grpc/grpc#43055). A service starts Ray before gRPC; a test run cannot.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# As Ray gives it to a worker. Two threads at networks as small as these mostly wait for each other: beside
# other work a model was warm after 4 s with one, and after 30 s with two.
os.environ["OMP_NUM_THREADS"] = "1"

import asyncio
import itertools
from collections.abc import AsyncIterator, Collection, Iterator

import asyncpg
import pytest
import structlog
from _pytest.nodeid import NodeId
from hypothesis import settings

from scheduler.store import invariants
from scheduler.store.embedded import embedded_postgresql, with_database
from scheduler.store.migrate import migrate
from tests.folders import data_folder

# Ray replaces `print`, by which structlog logs unless told otherwise, by one that keeps the standard output
# of the test that started it.
structlog.configure(logger_factory=structlog.WriteLoggerFactory())

# The same examples in each run: a change is judged by what it changed. `--long` searches elsewhere each time.
settings.register_profile("same", derandomize=True)
settings.load_profile("default" if os.environ.get("DARKROOM_LONG") else "same")

_numbers = itertools.count()

# What takes longest, and mostly waits for processes of its own: when the run is shared between processes, it
# must not come last, where one of them would have nothing to do beside it.
_FIRST = ("service", "faults", "deploy", "ops", "upgrade", "cluster", "structure", "gpu_worker")

_SHARED = ("running", "drawing")
"""Services that tests of several files share."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have what shares a service, and else the tests of a file, stand together, and stay so.

    Without that, each of the processes that share a run would start a service, a Ray and a network of its own
    for every file.
    """
    together: dict[str, list[pytest.Item]] = {}
    for item in sorted(items, key=_folder):
        together.setdefault(_group(item), []).append(item)
    items[:] = [item for group in together.values() for item in group]
    if getattr(config.option, "loadgroup", False):
        for item in items:
            # Where xdist looks for it. Its mark for groups does nothing: what xdist 3.8 writes for that mark,
            # pytest 9.2 does not read, and each test would be a group of its own.
            item._id = NodeId.parse(f"{item.nodeid}@{_group(item)}")


def _folder(item: pytest.Item) -> int:
    return next((place for place, folder in enumerate(_FIRST) if folder in item.path.parts), len(_FIRST))


def _group(item: pytest.Item) -> str:
    used = getattr(item, "fixturenames", ())
    return next((service for service in _SHARED if service in used), item.nodeid.split("::")[0])


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """DSN of a server that lives as long as the test run."""
    with data_folder() as folder, embedded_postgresql(folder / "pg") as dsn:
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
def promises() -> Collection[invariants.Invariant]:
    """What must hold of the database when a test is over; a folder whose tests are of a part asks less."""
    return invariants.INVARIANTS


@pytest.fixture
async def database(
    postgresql: str,
    migrated_template: str,
    promises: Collection[invariants.Invariant],
    request: pytest.FixtureRequest,
) -> AsyncIterator[str]:
    """DSN of an empty, migrated database of this test alone; in the end it must keep the promises.

    A test marked `unsound` breaks some on purpose: those of the numbers it names, or any.
    """
    name = f"test_{next(_numbers)}"
    server = await asyncpg.connect(postgresql)
    await server.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_template}")
    try:
        dsn = with_database(postgresql, name)
        yield dsn
        unsound = request.node.get_closest_marker("unsound")
        if unsound is None or unsound.args:
            excused = () if unsound is None else unsound.args
            await _ask_whether_it_holds(dsn, [one for one in promises if one.number not in excused])
    finally:
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()


async def _ask_whether_it_holds(dsn: str, promises: Collection[invariants.Invariant]) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        # Without an account there is nothing to hold; asking all the same would take as long as such a test.
        if await connection.fetchval("SELECT EXISTS (SELECT FROM billing.account)"):
            assert await invariants.check(connection, invariants=promises) == []
    finally:
        await connection.close()


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    """One connection to this test's database."""
    connection = await asyncpg.connect(database)
    try:
        yield connection
    finally:
        await connection.close()
