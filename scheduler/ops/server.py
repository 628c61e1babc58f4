"""The ops port of a front door: `/metrics`, `/metrics/scheduler`, `/healthz`, `/readyz`, and the page.

None of the four waits longer than a scraper or a probe does: whatever does not answer in time is reported
as away. They ask for no key, so the port is on loopback unless a setting says otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from aiohttp import web

from scheduler.metrics import FrontDoorMetrics, Page
from scheduler.settings import Ops

_log = structlog.get_logger()

# Well below the ten seconds that a Prometheus waits by default, and the one or two a load balancer does.
_SCRAPE_TIMEOUT_S = 3.0
_CHECK_TIMEOUT_S = 0.9
# The largest is a key that somebody logs in with.
_LARGEST_REQUEST_BYTES = 16 * 1024


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
    scheduler_page: Callable[[str], Awaitable[Page]],
    page: Iterable[web.AbstractRouteDef] = (),
) -> AsyncIterator[OpsServer]:
    """Serve while the context is open.

    `scheduler_page` returns that of SchedulerMetrics, which live in the scheduler's process, for a scraper's
    Accept header. `page` are the routes of the page for people. Raises OSError if the port is taken.
    """
    routes = _Routes(checks=checks, metrics=metrics, scheduler_page=scheduler_page)
    application = web.Application(client_max_size=_LARGEST_REQUEST_BYTES)
    application.add_routes(
        [
            web.get("/metrics", routes.metrics_page),
            web.get("/metrics/scheduler", routes.scheduler_metrics_page),
            web.get("/healthz", routes.healthz),
            web.get("/readyz", routes.readyz),
            *page,
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
        scheduler_page: Callable[[str], Awaitable[Page]],
    ) -> None:
        self._checks = checks
        self._metrics = metrics
        self._scheduler_page = scheduler_page

    async def metrics_page(self, request: web.Request) -> web.Response:
        """This process's families."""
        return _shown(self._metrics.page(request.headers.get("Accept", "")))

    async def scheduler_metrics_page(self, request: web.Request) -> web.Response:
        """The leading scheduler's families; 503 if it does not answer in time."""
        try:
            async with asyncio.timeout(_SCRAPE_TIMEOUT_S):
                page = await self._scheduler_page(request.headers.get("Accept", ""))
        except Exception as away:
            # Whatever it is that keeps the scheduler from answering: a scraper sees that it is down.
            _log.warning("scheduler metrics were not fetched", error=repr(away))
            return web.Response(status=503, text="the scheduler does not answer")
        return _shown(page)

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


def _shown(page: Page) -> web.Response:
    return web.Response(body=page.text.encode(), headers={"Content-Type": page.content_type})


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
