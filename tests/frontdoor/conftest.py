"""A front door on a real socket and a real database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from billing import invariants as ledger_invariants
from gpu_worker.models import Models, read_models
from scheduler.frontdoor.server import serve
from scheduler.metrics import FrontDoorMetrics
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.settings import Moderation as ModerationSettings
from scheduler.settings import Scheduling as SchedulingSettings
from scheduler.settings import Settings
from scheduler.store import invariants
from scheduler.store.pool import open_pool
from tests.frontdoor.door import MODELS, PLANS, Clock, Door, SmallScheduler
from tests.spans import Spans


@pytest.fixture
def promises() -> Collection[invariants.Invariant]:
    """The ledger's own, and that requests have their jobs: jobs start and end here by the hand of the test,
    which holds and charges nothing.
    """
    return [one for one in invariants.INVARIANTS if one in ledger_invariants.INVARIANTS or one.number == 24]


@pytest.fixture
def frontdoor_settings() -> FrontDoorSettings:
    """Settings of the door; a test module may ask for others."""
    # Beside other work a machine is late at any time, and a test is about something else.
    return FrontDoorSettings(port=0, requests_per_second=1_000, late_max_ms=60_000)


@pytest.fixture
def scheduling_settings() -> SchedulingSettings:
    """Settings of the cell; a test module may ask for others."""
    return SchedulingSettings()


@pytest.fixture
def moderation_settings() -> ModerationSettings:
    """How prompts are judged; a test module may ask for a classifier."""
    return ModerationSettings()


@pytest.fixture
def spans() -> Spans:
    """What it traces; a test module may ask for others. Here nothing is recorded, and nothing kept."""
    return Spans(ALWAYS_OFF)


@pytest.fixture
def dsn(database: str) -> str:
    """Where the door finds its database; a test module may put something in between."""
    return database


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """One model, whose figures the tests know."""
    path = tmp_path / "models.toml"
    path.write_text(MODELS)
    return read_models(path)


@pytest.fixture
async def door(
    dsn: str,
    tmp_path: Path,
    models: Models,
    frontdoor_settings: FrontDoorSettings,
    moderation_settings: ModerationSettings,
    scheduling_settings: SchedulingSettings,
    spans: Spans,
) -> AsyncIterator[Door]:
    """A front door that answers."""
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    settings = Settings(
        data_dir=tmp_path,
        artifacts_url=f"file://{artifacts}",
        frontdoor=frontdoor_settings,
        moderation=moderation_settings,
        scheduling=scheduling_settings,
    )
    pool = await open_pool(dsn, 4)
    scheduler, metrics, clock = SmallScheduler(), FrontDoorMetrics(PLANS), Clock()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(pool.close)
        service = await stack.enter_async_context(AsyncExitStack())
        front_door = await service.enter_async_context(
            serve(
                settings,
                pool,
                scheduler,
                models,
                metrics,
                clock=lambda: clock.now,
                monotonic_s=lambda: clock.monotonic_s,
                tracer=spans.tracer,
            )
        )
        door = Door(
            address=front_door.address,
            pool=pool,
            scheduler=scheduler,
            metrics=metrics,
            artifacts=artifacts,
            doorman=front_door.doorman,
            clock=clock,
            close=service.aclose,
        )
        yield door
        await door.close_channels()
