"""Workers for tests: each is closed when its test ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from worker_builders import some_settings

from gpu_worker.outputs import Artifacts
from gpu_worker.run import Engine
from gpu_worker.timed_engine import TimedEngine
from gpu_worker.worker import Worker
from tests.stand_in import stand_in_models


@pytest.fixture
async def make_worker(tmp_path: Path) -> AsyncIterator[Callable[..., Worker]]:
    """A maker of workers, on a timed engine where none is given; keyword arguments are settings."""
    workers: list[Worker] = []

    def make(engine: Engine | None = None, **changes: Any) -> Worker:
        settings = some_settings(tmp_path, **changes)
        worker = Worker(
            settings, engine or TimedEngine(stand_in_models(), settings), Artifacts(settings.artifacts_url)
        )
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        await worker.close()


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    """The store that this test's workers write to."""
    return Artifacts(some_settings(tmp_path).artifacts_url)
