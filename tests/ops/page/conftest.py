"""The ops page of a front door whose scheduler leads a stub fleet on a real database."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from scheduler.answers import Explained, QueuesView, WorkerView
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.frontdoor.auth import Doorman
from scheduler.metrics import FrontDoorMetrics, GpuUse, Page, SchedulerMetrics
from scheduler.ops import Checks, History, Lookout, OpsPage, ops_server
from scheduler.policy.ids import Tier
from scheduler.settings import Ops
from scheduler.store import accounts
from scheduler.store.accounts import Role
from scheduler.updates import QueueStatus
from tests.loop.conftest import *  # noqa: F403 - a fixture may ask for another
from tests.loop.conftest import DirectLink, Stage


class LeaderLink(DirectLink):
    """What the page asks a leader in the same process; nobody answers while there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        """How often for its queues."""

    async def queues(self) -> QueuesView | None:
        self.asked += 1
        return None if self.leader is None else self.leader.queues()

    async def workers_view(self) -> Sequence[WorkerView] | None:
        return None if self.leader is None else self.leader.workers_view()

    async def queue_statuses(self, job_ids: Sequence[str]) -> Mapping[str, QueueStatus]:
        return {} if self.leader is None else self.leader.queue_statuses(job_ids)

    async def explain(self, job_id: str) -> Explained | None:
        return None if self.leader is None else self.leader.explain(job_id)

    async def scheduler_metrics(self, accept: str) -> Page:
        if self.leader is None:
            raise TimeoutError
        return self.leader.metrics.page(accept)


@dataclass
class Clock:
    """The time of this machine, and what a test adds to it."""

    ahead_s: float = 0.0

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)

    def monotonic_s(self) -> float:
        return self.ahead_s

    def pass_s(self, seconds: float) -> None:
        self.ahead_s += seconds


@dataclass
class Shown:
    """An answer."""

    status: int
    text: str
    headers: Mapping[str, str]
    cookies: Any
    location: str = ""


@dataclass
class OpsPort:
    """A running ops port, and who looks at it."""

    url: str
    stage: Stage
    link: LeaderLink
    page: OpsPage
    history: History
    clock: Clock
    session: aiohttp.ClientSession
    _known: set[str] = field(default_factory=set)

    async def key(self, account_id: str = "olga", role: Role = Role.OPERATOR) -> str:
        """Return a new key of an account."""
        if account_id not in self._known:
            await self.stage.open_account(account_id)
            self._known.add(account_id)
        async with self.stage.pool.transaction() as connection:
            return (await accounts.create_key(connection, account_id, role)).secret

    async def get(self, path: str, **headers: str) -> Shown:
        async with self.session.get(path, headers=headers, allow_redirects=False) as answer:
            return await _shown(answer)

    async def post(self, path: str, data: Mapping[str, str] | None = None, **headers: str) -> Shown:
        async with self.session.post(path, data=data, headers=headers, allow_redirects=False) as answer:
            return await _shown(answer)

    async def log_in(self, key: str | None = None, **headers: str) -> Shown:
        return await self.post("/login", {"key": await self.key() if key is None else key}, **headers)

    async def look(self, path: str = "/") -> str:
        """Return a page that must be shown, as it is now."""
        self.clock.pass_s(3)
        shown = await self.get(path)
        assert shown.status == 200, (shown.status, shown.location)
        return shown.text


async def _shown(answer: aiohttp.ClientResponse) -> Shown:
    return Shown(
        status=answer.status,
        text=await answer.text(),
        headers=answer.headers,
        cookies=answer.cookies,
        location=answer.headers.get("Location", ""),
    )


async def _yes() -> bool:
    return True


@asynccontextmanager
async def opened(stage: Stage, *, plain_text_allowed: bool = False) -> AsyncIterator[OpsPort]:
    """Serve the page of this stage; who leads there is its business."""
    link = LeaderLink()
    stage.link = link
    clock = Clock()
    history = History(link.scheduler_metrics, lambda: clock.now().timestamp())
    page = OpsPage(
        keys=Doorman(stage.pool, requests_per_second=1_000, streams_per_key=5, now_s=clock.monotonic_s),
        lookout=Lookout(
            pool=stage.pool,
            link=link,  # type: ignore[arg-type]
            history=history,
            clock=clock.now,
            monotonic_s=clock.monotonic_s,
        ),
        plain_text_allowed=plain_text_allowed,
        clock=clock.now,
        monotonic_s=clock.monotonic_s,
    )
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            ops_server(
                Ops(port=0),
                checks=Checks(database_answers=_yes, scheduler_leads=_yes),
                metrics=FrontDoorMetrics(("standard",)),
                scheduler_page=link.scheduler_metrics,
                page=page.routes(),
            )
        )
        url = f"http://127.0.0.1:{server.port}"
        session = await stack.enter_async_context(
            aiohttp.ClientSession(url, cookie_jar=aiohttp.CookieJar(unsafe=True))
        )
        yield OpsPort(
            url=url,
            stage=stage,
            link=link,
            page=page,
            history=history,
            clock=clock,
            session=session,
        )


@pytest.fixture
async def port(stage: Stage) -> AsyncIterator[OpsPort]:
    """The ops port of a front door whose scheduler is away."""
    async with opened(stage) as port:
        yield port


@pytest.fixture
def fleet() -> LocalFleet:
    """Four workers, whose attempts run until a test ends them."""
    return LocalFleet(workers=4, take_ms=None)


@pytest.fixture
async def busy(port: OpsPort, fleet: LocalFleet) -> AsyncIterator[OpsPort]:
    """The ops port of a service with something to do: ada has more than her share, ben waits too."""
    stage = port.stage
    for account_id in ("ada", "ben"):
        await stage.open_account(account_id)
    async with stage.leading(fleet) as leader:
        jobs = [await stage.submit("ada", Tier.RELAX) for _ in range(6)]
        jobs += [await stage.submit("ben", tier) for tier in (Tier.FAST, Tier.FAST, Tier.RELAX, Tier.RELAX)]
        await stage.until(leader, lambda: len(fleet.busy) == 4)
        yield port


@functools.cache
def _the_metrics() -> SchedulerMetrics:
    # To make one takes longer than all else: its hundreds of series are born with it.
    return SchedulerMetrics(("standard",), ("small",), now_ms=0)


def a_page_of_counters(*, started: int = 0, **gpu_s: float) -> Page:
    """Return the scheduler's metrics page after so much GPU time, and so many starts of fast jobs."""
    metrics = _the_metrics()
    for use in GpuUse:
        metrics.gpu_time_seconds.labels(use).reset()
        metrics.gpu_time_seconds.labels(use).inc(gpu_s.get(use.value, 0.0))
    warm = metrics.placements.labels(Tier.FAST, "warm")
    warm.reset()
    warm.inc(started)
    return metrics.page()
