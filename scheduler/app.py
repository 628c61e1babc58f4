"""The composition root: everything `darkroom serve` is made of, started in order and stopped in reverse.

What is not given is embedded: PostgreSQL, Ray and the artifact store on this machine end with this process
(the data stays), while on a given cluster the scheduler and the workers are detached actors and live on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog

from billing import plans as billing_plans
from gpu_worker.models import read_models
from scheduler.cluster.ray_fleet import actor_name
from scheduler.cluster.ray_link import RayLink, ray_link
from scheduler.cluster.ray_session import ensure_scheduler, ray_session, start_scheduler
from scheduler.frontdoor.auth import Doorman
from scheduler.frontdoor.server import serve
from scheduler.local_gpus import settled, usable_gpus
from scheduler.logs import lines_counted
from scheduler.metrics import FrontDoorMetrics
from scheduler.ops import Checks, History, Lookout, OpsPage, ops_server
from scheduler.settings import Settings
from scheduler.store.bootstrap import ensure_admin_key
from scheduler.store.embedded import embedded_postgresql
from scheduler.store.leadership import present_holder
from scheduler.store.migrate import migrate_database, migrate_database_before, process_name
from scheduler.store.pool import Pool, open_pool
from scheduler.tracing import Traces, traces

T = TypeVar("T")

_log = structlog.get_logger()

_READY_S = 120.0
_ASK_AGAIN_S = 0.1


class NotReady(Exception):
    """The scheduler or the workers did not come up in time: their logs, in Ray's session folder, say why."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running service."""

    address: str
    """Of the gRPC front door, host:port."""
    ops_address: str
    """Of the page for operators, /metrics, /metrics/scheduler, /healthz and /readyz, host:port."""
    admin_key: str | None
    """Made now; shown once. None: the database had one already."""
    background: tuple[asyncio.Task[None], ...]
    """What the service does by itself; each ends only by failing."""

    async def unless_it_fails(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` and return its result; raise what the service failed of if it does so meanwhile."""
        return await _unless_failed(work, self.background)


@asynccontextmanager
async def running(
    settings: Settings, *, show_worker_logs: bool = False, new_admin_key: bool = False
) -> AsyncIterator[Service]:
    """Run the whole service while the context is open; yields once it takes jobs.

    In the end it takes no more calls, lets those in progress end, and, if the workers are its own, has what
    runs handed over, each within the limit that is set. If its task is cancelled meanwhile, it ends at once.

    With `new_admin_key` it has one to show even if the database had one before.

    Raises AlreadyServing, NotReady, ModelsFileWrong, what `migrate_before` raises, DatabaseUnreachable,
    Overloaded where the database went away meanwhile, OSError where a port is taken, and RuntimeError,
    saying what to do, where Ray, PostgreSQL, what sends traces, or GPUs that are demanded cannot be had.
    """
    models = read_models(settings.models_file)
    settings = settled(settings, usable_gpus)
    async with AsyncExitStack() as stack:
        # What takes seconds is told before, for whoever sits in front of it.
        if settings.database.dsn is None:
            _log.info("starting PostgreSQL", folder=str(settings.data_dir / "database"))
            dsn = stack.enter_context(embedded_postgresql(settings.data_dir / "database"))
            await migrate_database(dsn)
        else:
            dsn = settings.database.dsn
            await _migrate_beside_others(dsn)
        pool = await open_pool(
            dsn, settings.database.pool_size, application=process_name("frontdoor", settings.release)
        )
        stack.push_async_callback(pool.close)
        async with pool.transaction() as connection:
            plans = [version.plan for version in await billing_plans.all_newest(connection)]
        metrics = FrontDoorMetrics(plans)
        metrics.process.configured_as(settings.fingerprint)
        stack.enter_context(lines_counted(metrics.process.logged))

        if settings.ray.address is None:
            _log.info("starting Ray", gpus=settings.ray.local_gpus)
        else:
            _log.info("joining Ray", address=settings.ray.address)
        stack.enter_context(ray_session(settings.ray, show_logs=show_worker_logs))
        # Not before: what sends spans starts a thread of its own in each fork of this process, and Ray forks.
        spans = traces(settings.tracing, service="darkroom-frontdoor", release=settings.release)
        stack.push_async_callback(_send_rest, spans)
        ensure_scheduler(settings, dsn, leads=await _holder(pool))
        link = await stack.enter_async_context(
            ray_link(namespace=settings.ray.namespace, holder=lambda: _holder(pool), release=settings.release)
        )
        if settings.ray.address is None:
            # Once the front door has closed. On a cluster the workers live on.
            stack.push_async_callback(_hand_over, link, settings.scheduling.close_down_within_ms / 1000)
        front_door = await stack.enter_async_context(
            serve(settings, pool=pool, link=link, models=models, metrics=metrics, tracer=spans.tracer)
        )
        history = History(link.scheduler_metrics, time.time)
        reading = await stack.enter_async_context(_meanwhile(history.run()))
        ops = await stack.enter_async_context(
            ops_server(
                settings.ops,
                checks=Checks(database_answers=lambda: _answers(pool), scheduler_leads=link.scheduler_ready),
                metrics=metrics,
                scheduler_page=link.scheduler_metrics,
                page=_ops_page(settings, pool, link, front_door.doorman, history).routes(),
            )
        )
        background = (link.background, front_door.background, reading)
        _log.info("waiting for the scheduler and its workers")
        await _unless_failed(_until(link.scheduler_ready, "no scheduler took the lead"), background)
        if settings.ray.address is None:
            # On a cluster workers come and go; here a service without its workers has not started.
            joined = _until(lambda: _joined(link, settings.ray.local_gpus), "not all GPU workers started")
            await _unless_failed(joined, background)
        async with pool.transaction() as connection:
            # Last: a start that fails on the way to here would leave a key behind that nobody was shown.
            admin_key = await ensure_admin_key(connection, datetime.now(UTC), anew=new_admin_key)
        yield Service(
            address=f"{settings.frontdoor.host}:{front_door.port}",
            ops_address=f"{settings.ops.host}:{ops.port}",
            admin_key=admin_key,
            background=background,
        )


def _ops_page(settings: Settings, pool: Pool, link: RayLink, doorman: Doorman, history: History) -> OpsPage:
    def now() -> datetime:
        return datetime.now(UTC)

    return OpsPage(
        keys=doorman,
        lookout=Lookout(pool=pool, link=link, history=history, clock=now, monotonic_s=time.monotonic),
        # Where something else is to end TLS for the keys of gRPC, it is to do so here.
        plain_text_allowed=settings.frontdoor.insecure,
        clock=now,
        monotonic_s=time.monotonic,
    )


async def take_lead(settings: Settings) -> str:
    """Let this release's scheduler lead on a cluster, whichever leads now; returns its name once it does.

    For going back to an older release: a newer one takes the lead when its first front door starts. Raises
    NotReady, Overloaded where the database is away, and RuntimeError where the cluster cannot be joined.
    """
    assert settings.database.dsn is not None, "settings refuse a cluster without one"
    dsn = settings.database.dsn
    name = actor_name("scheduler", release=settings.release)
    with ray_session(settings.ray):
        pool = await open_pool(dsn, 1, application=process_name("lead", settings.release))
        try:

            async def leads() -> bool:
                # Each time: one that was deposed just before may be there still, about to end.
                await asyncio.to_thread(start_scheduler, settings, dsn)
                return await _holder(pool) == name

            await _until(leads, f"{name} did not take the lead")
        finally:
            await pool.close()
    return name


async def _migrate_beside_others(dsn: str) -> None:
    migrated = await migrate_database_before(dsn)
    if migrated.waiting:
        _log.warning(
            "migrations wait until nothing older runs; then run `darkroom migrate --after`",
            files=[migration.file for migration in migrated.waiting],
        )


@asynccontextmanager
async def _meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Do `work` while the context is open."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _holder(pool: Pool) -> str:
    async with pool.reading() as connection:
        return await present_holder(connection)


async def _answers(pool: Pool) -> bool:
    async with pool.reading() as connection:
        return bool(await connection.fetchval("SELECT true"))


async def _hand_over(link: RayLink, within_s: float) -> None:
    task = asyncio.current_task()
    assert task is not None
    # A service that was told twice to stop is being cancelled, and waits for nothing any more.
    if not task.cancelling():
        await link.close_down(within_s)


async def _send_rest(spans: Traces) -> None:
    task = asyncio.current_task()
    assert task is not None
    # As above.
    if not task.cancelling():
        await asyncio.to_thread(spans.close)


async def _joined(link: RayLink, wanted: int) -> bool:
    return await link.workers() >= wanted


async def _unless_failed(work: Coroutine[Any, Any, T], background: tuple[asyncio.Task[None], ...]) -> T:
    doing = asyncio.create_task(work)
    try:
        done, _ = await asyncio.wait({doing, *background}, return_when=asyncio.FIRST_COMPLETED)
        for failed in done - {doing}:
            failed.result()
        return doing.result()
    finally:
        doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)


async def _until(holds: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    try:
        async with asyncio.timeout(_READY_S):
            while not await holds():  # noqa: ASYNC110 - what it asks of is in another process
                await asyncio.sleep(_ASK_AGAIN_S)
    except TimeoutError as late:
        raise NotReady(f"{otherwise} within {_READY_S:.0f} s; Ray's session logs say why") from late
