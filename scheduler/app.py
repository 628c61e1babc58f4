"""The composition root: everything `darkroom serve` is made of, started in order and stopped in reverse.

What is not given is embedded: PostgreSQL, Ray and the artifact store on this machine end with this process (the
data stays), while on a given cluster the scheduler and the workers are detached actors and live on.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from billing import plans as billing_plans
from gpu_worker.models import read_models
from scheduler.cluster.ray_link import ray_link
from scheduler.cluster.ray_session import ensure_scheduler, ray_session
from scheduler.frontdoor.server import serve
from scheduler.metrics import FrontDoorMetrics
from scheduler.ops import Checks, ops_server
from scheduler.settings import Settings
from scheduler.store.bootstrap import ensure_admin_key
from scheduler.store.embedded import embedded_postgresql
from scheduler.store.leadership import present_holder
from scheduler.store.migrate import migrate_database
from scheduler.store.pool import Pool, open_pool

_READY_S = 120.0
_ASK_AGAIN_S = 0.1


class AlreadyServing(Exception):
    """Another process serves from the same data folder: stop it, or give this one another `data_dir`."""


class NotReady(Exception):
    """The scheduler did not take the lead in time: its log, in Ray's session folder, says why."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running service."""

    address: str
    """Of the gRPC front door, host:port."""
    ops_address: str
    """Of /metrics, /healthz and /readyz, host:port."""
    admin_key: str | None
    """Made now; shown once. None: the database had one already."""


@asynccontextmanager
async def running(
    settings: Settings, *, show_worker_logs: bool = False, new_admin_key: bool = False
) -> AsyncIterator[Service]:
    """Run the whole service while the context is open; yields once it takes jobs.

    With `new_admin_key` it has one to show even if the database had one before.

    Raises AlreadyServing, NotReady, OSError where a port is taken, and RuntimeError, saying what to do, where Ray or
    PostgreSQL cannot be had.
    """
    models = read_models(settings.models_file)
    async with AsyncExitStack() as stack:
        if settings.database.dsn is None:
            stack.enter_context(_alone_in(settings.data_dir))
        dsn = settings.database.dsn or stack.enter_context(
            embedded_postgresql(settings.data_dir / "database")
        )
        await migrate_database(dsn)
        pool = await open_pool(dsn, settings.database.pool_size)
        stack.push_async_callback(pool.close)
        async with pool.transaction() as connection:
            admin_key = await ensure_admin_key(connection, datetime.now(UTC), anew=new_admin_key)
            plans = [version.plan for version in await billing_plans.all_newest(connection)]
        metrics = FrontDoorMetrics.create(plans)
        metrics.follow_pool(size=lambda: pool.size, idle=lambda: pool.idle)

        stack.enter_context(ray_session(settings.ray, show_logs=show_worker_logs))
        ensure_scheduler(settings, dsn)
        link = await stack.enter_async_context(
            ray_link(namespace=settings.ray.namespace, holder=lambda: _holder(pool))
        )
        front_door = await stack.enter_async_context(
            serve(settings, pool=pool, link=link, models=models, metrics=metrics)
        )
        ops = await stack.enter_async_context(
            ops_server(
                settings.ops,
                checks=Checks(database_answers=lambda: _answers(pool), scheduler_leads=link.scheduler_ready),
                metrics=metrics,
                scheduler_exposition=link.scheduler_metrics,
            )
        )
        await _until_ready(link.scheduler_ready)
        yield Service(
            address=f"{settings.frontdoor.host}:{front_door.port}",
            ops_address=f"{settings.ops.host}:{ops.port}",
            admin_key=admin_key,
        )


@contextmanager
def _alone_in(data_dir: Path) -> Iterator[None]:
    """Hold the data folder: two embedded services in one would depose each other's scheduler all day."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "serving.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise AlreadyServing(
                f"another process serves from {data_dir}: stop it, or choose another folder (--data-dir)"
            ) from held
        yield  # the lock ends with the file, also when the process is killed


async def _holder(pool: Pool) -> str:
    async with pool.reading() as connection:
        return await present_holder(connection)


async def _answers(pool: Pool) -> bool:
    async with pool.reading() as connection:
        return bool(await connection.fetchval("SELECT true"))


async def _until_ready(ready: Callable[[], Awaitable[bool]]) -> None:
    try:
        async with asyncio.timeout(_READY_S):
            while not await ready():
                await asyncio.sleep(_ASK_AGAIN_S)
    except TimeoutError as late:
        raise NotReady(
            f"no scheduler took the lead within {_READY_S:.0f} s; Ray's session logs say why"
        ) from late
