"""What operators ask of a front door over HTTP: `/metrics`, `/healthz` and `/readyz`.

None of the three waits longer than a scraper or a probe does: whatever does not answer in time is reported
as away, and the rest is still served. There is no authentication, so the port is on loopback unless a
setting says otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from aiohttp import web

from scheduler.metrics import CONTENT_TYPE, FrontDoorMetrics
from scheduler.settings import Ops

_log = structlog.get_logger()

# Well below the ten seconds that a Prometheus waits by default, and the one or two a load balancer does.
_SCRAPE_TIMEOUT_S = 3.0
_CHECK_TIMEOUT_S = 0.9


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What must be true before a front door should get work. A check that raises counts as failed."""

    database_answers: Callable[[], Awaitable[bool]]
    scheduler_leads: Callable[[], Awaitable[bool]]


@dataclass(frozen=True, kw_only=True)
class OpsServer:
    """A running ops server."""

    port: int


@asynccontextmanager
async def ops_server(
    settings: Ops,
    *,
    checks: Checks,
    metrics: FrontDoorMetrics,
    scheduler_exposition: Callable[[], Awaitable[str]],
) -> AsyncIterator[OpsServer]:
    """Serve while the context is open.

    `scheduler_exposition` returns the text of SchedulerMetrics, which lives in the scheduler's process.
    Raises OSError if the port is taken.
    """
    routes = _Routes(checks=checks, metrics=metrics, scheduler_exposition=scheduler_exposition)
    application = web.Application()
    application.add_routes(
        [
            web.get("/metrics", routes.metrics_page),
            web.get("/healthz", routes.healthz),
            web.get("/readyz", routes.readyz),
        ]
    )
    # Probes and scrapes every few seconds would bury everything else in the log.
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port).start()
        yield OpsServer(port=runner.addresses[0][1])
    finally:
        await runner.cleanup()


class _Routes:
    def __init__(
        self,
        *,
        checks: Checks,
        metrics: FrontDoorMetrics,
        scheduler_exposition: Callable[[], Awaitable[str]],
    ) -> None:
        self._checks = checks
        self._metrics = metrics
        self._scheduler_exposition = scheduler_exposition

    async def metrics_page(self, request: web.Request) -> web.Response:
        """The front door's families, then the scheduler's if it answers in time."""
        try:
            async with asyncio.timeout(_SCRAPE_TIMEOUT_S):
                scheduler = await self._scheduler_exposition()
        except Exception as away:
            # Whatever it is that keeps the scheduler from answering, now the front door's numbers are wanted.
            _log.warning("scheduler metrics were not fetched", error=repr(away))
            scheduler = ""
        self._metrics.scheduler_metrics_up.set(bool(scheduler))
        text = self._metrics.exposition() + scheduler
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def healthz(self, request: web.Request) -> web.Response:
        """The process is alive and its event loop turns."""
        return web.json_response({"alive": True})

    async def readyz(self, request: web.Request) -> web.Response:
        """200 if every check holds, else 503; the body names what is missing."""
        missing = [
            sentence
            for sentence in await asyncio.gather(
                _missing("the database does not answer", self._checks.database_answers),
                _missing("no scheduler leads", self._checks.scheduler_leads),
            )
            if sentence is not None
        ]
        return web.json_response({"ready": not missing, "missing": missing}, status=503 if missing else 200)


async def _missing(sentence: str, check: Callable[[], Awaitable[bool]]) -> str | None:
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S):
            holds = await check()
    except TimeoutError:
        return f"{sentence} in time"
    except Exception as failure:
        # A probe must answer, whatever a driver raises; the class is enough to look further, the text of an
        # error may hold a password.
        return f"{sentence} ({type(failure).__name__})"
    return None if holds else sentence
