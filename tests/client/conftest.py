"""A scripted service, and a client of it that does not wait between repeats but says how long it would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from scheduler.client.aio import DarkroomClient
from tests.client.scripted_service import ScriptedService, scripted_service


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with scripted_service() as running:
        yield running


@pytest.fixture
def pauses() -> list[float]:
    """Seconds that the client paused before each repeat."""
    return []


@pytest.fixture
async def client(service: ScriptedService, pauses: list[float]) -> AsyncIterator[DarkroomClient]:
    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async with DarkroomClient(service.address, "dk_ada_secret", pause=pause) as client:
        yield client
