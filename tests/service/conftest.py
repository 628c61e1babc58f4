"""A running service with stub engines for the tests that can share it, and accounts in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.people import People
from tests.service.process import ServiceProcess, assert_promises_hold, service


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder of this test. Not tmp_path: pytest closes its parents, and PostgreSQL's own user must pass."""
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def running() -> Iterator[ServiceProcess]:
    """A service with three workers whose stub engine takes 2 s a job (20 steps of 100 ms).

    Whoever uses it leaves it as it was: nothing waits or runs, no tier is paused and no worker drains.
    """
    with (
        tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder,
        service(Path(folder), gpus=3, timed_step_ms=100) as running,
    ):
        yield running


@pytest.fixture
def people(running: ServiceProcess) -> People:
    return People(running.address, running.admin_key)


@pytest.fixture(autouse=True)
def promises_hold(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ask after each test of the shared service whether all that it promises of the ledger still holds."""
    shared = request.getfixturevalue("running") if "running" in request.fixturenames else None
    yield
    if shared is not None:
        assert_promises_hold(shared.dsn)
