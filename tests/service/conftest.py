"""Two running services for the tests that can share them, one with stub engines and one that draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.folders import data_folder
from tests.service.collector import Collector, collecting
from tests.service.people import People
from tests.service.process import ServiceProcess, assert_promises_hold, service

_shared: dict[str, ExitStack] = {}
"""What ends each shared service that runs, by the name of its fixture."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End a shared service after the last test that uses it.

    Those stand together, and the session, which it would live as long as, goes on for a quarter of an hour: a
    service without work takes a tenth of a core.
    """
    for name in shared_by(item) - shared_by(nextitem):
        _shared[name].close()


def shared_by(item: pytest.Item | None) -> set[str]:
    """Return the shared services that run and that a test uses."""
    return _shared.keys() & getattr(item, "fixturenames", ())


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder of this test for the data of a service."""
    with data_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where the shared service sends the traces that its callers record."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def running(collector: Collector) -> Iterator[ServiceProcess]:
    """A service with three workers whose stub engine takes 2 s a job (20 steps of 100 ms).

    Whoever uses it leaves it as it was: nothing waits or runs, no tier is paused and no worker drains.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(data_folder())
        traced = service(folder, gpus=3, timed_step_ms=100, traces_to=collector.address)
        _shared["running"] = stack
        yield stack.enter_context(traced)


@pytest.fixture(scope="session")
def drawing() -> Iterator[ServiceProcess]:
    """A service with two workers that draw, left as `running` is; but one may be about to come back."""
    with ExitStack() as stack:
        folder = stack.enter_context(data_folder())
        _shared["drawing"] = stack
        yield stack.enter_context(service(folder, gpus=2, engine="diffusers"))


@pytest.fixture
def people(running: ServiceProcess) -> People:
    return People(running.address, running.admin_key)


@pytest.fixture(autouse=True)
def promises_hold(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ask after each test of a shared service whether all that it promises of the ledger still holds."""
    shared = [
        request.getfixturevalue(name) for name in ("running", "drawing") if name in request.fixturenames
    ]
    yield
    for each in shared:
        assert_promises_hold(each.dsn)
