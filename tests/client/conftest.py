"""A scripted service, and a client of it that does not wait between repeats but says how long it would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from scheduler.client.aio import DarkroomClient
from tests.client.scripted_service import ScriptedService, scripted_service


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with scripted_service() as running:
        yield running


@pytest.fixture
def environment(service: ScriptedService, tmp_path: Path) -> dict[str, str]:
    """Of a command that finds the service, and no configuration of anybody's."""
    return {
        "DARKROOM_ADDRESS": service.address,
        "DARKROOM_KEY": "dk_ada_secret",
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the command."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
