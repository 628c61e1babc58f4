"""The scheduler as a Ray actor: detached, named, restarted by Ray; it hosts the loop.

Whoever was here before, it begins the same way: take the lead, find the workers, read the live rows, turn.
Any trouble ends the process, that of being deposed too, and Ray starts it anew. One that Ray starts anew
while another release leads stays ended: the two would depose each other for ever.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Mapping, Sequence

import ray
import structlog

from gpu_worker.models import read_models
from gpu_worker.settings import WorkerSettings
from scheduler.answers import Explained, Outlook, QueuesView, WhatIf, WorkerView
from scheduler.cluster.ray_fleet import RayFleet, actor_name
from scheduler.leader import Leader, lead
from scheduler.logs import configure_logs
from scheduler.metrics import Page
from scheduler.policy.fleet_size import Bounds
from scheduler.recovery import collect_seldom
from scheduler.settings import Settings
from scheduler.store.lanes import Lane
from scheduler.store.leadership import Deposed, present_holder
from scheduler.tracing import Traces, traces
from scheduler.updates import JobUpdate, QueueStatus, UpdateBatch

_log = structlog.get_logger()


class AnotherLeads(Exception):
    """The scheduler of another release leads, and lives: this one has nothing to do any more."""


class StillStarting(Exception):
    """The scheduler is reading its rows: ask again."""


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)
class SchedulerActor:
    """What front doors call. Everything else is in `leader`."""

    def __init__(self, settings_json: str, dsn: str) -> None:
        self._settings = Settings.model_validate_json(settings_json)
        configure_logs(self._settings.log_level)
        self._dsn = dsn
        self._leader: Leader | None = None
        self._traces: Traces | None = None
        # Ray makes an async actor on its running event loop.
        self._main = asyncio.get_event_loop().create_task(self._run(), name="scheduler")

    async def jobs_changed(self, job_ids: Sequence[str]) -> None:
        """Notice committed rows."""
        self._ready().jobs_changed(job_ids)

    async def accounts_changed(self, account_ids: Sequence[str]) -> None:
        """Notice changed plans, limits, funds or consent."""
        self._ready().accounts_changed(account_ids)

    async def fleet_changed(self) -> None:
        """Notice what operators drained, resumed or paused."""
        self._ready().fleet_changed()

    async def close_down(self, within_s: float) -> bool:
        """Hand over what runs and start nothing more; returns whether all was within that time."""
        handed_over = await self._ready().close_down(within_s)
        assert self._traces is not None, "it leads"
        # It is about to be ended, without a word.
        await asyncio.to_thread(self._traces.close)
        return handed_over

    async def updates_after(self, number: int, wait_s: float) -> UpdateBatch:
        """Long poll for what changed about jobs."""
        return await self._ready().updates.after(number, wait_s)

    async def update_of(self, job_id: str) -> JobUpdate | None:
        """Return the newest known update of a job; None if nothing happened to it under this leader."""
        return self._ready().updates.of(job_id)

    async def queue_statuses(self, job_ids: Sequence[str]) -> Mapping[str, QueueStatus]:
        """Return why these jobs wait."""
        return self._ready().queue_statuses(job_ids)

    async def explain(self, job_id: str) -> Explained | None:
        """Return why a live job is where it is; None: it is not on the board."""
        return self._ready().explain(job_id)

    async def estimate(self, what_ifs: Sequence[WhatIf]) -> Sequence[Outlook | None]:
        """Return what would come of each, alone."""
        return await self._ready().estimate(what_ifs)

    async def queues(self) -> QueuesView:
        """Return what waits and runs."""
        return self._ready().queues()

    async def workers_view(self) -> Sequence[WorkerView]:
        """Return the workers that have joined and are not lost."""
        return self._ready().workers_view()

    async def metrics(self, accept: str) -> Page:
        """Return the scheduler's metrics, in the format that a scraper's Accept header asks for."""
        return self._ready().metrics.page(accept)

    async def epoch(self) -> int:
        """Return the epoch it leads with; raises StillStarting before it does."""
        return self._ready().epoch

    async def workers(self) -> int:
        """Return how many workers have joined."""
        return self._ready().workers

    def pid(self) -> int:
        """Return its process id."""
        return os.getpid()

    def _ready(self) -> Leader:
        if self._leader is None:
            raise StillStarting
        return self._leader

    async def _run(self) -> None:
        settings = self._settings
        holder = actor_name("scheduler", release=settings.release)
        try:
            self._traces = traces(settings.tracing, service="darkroom-scheduler", release=settings.release)
            if _started_anew():
                await self._depose_if_another_leads(holder)
            async with lead(
                dsn=self._dsn,
                holder=holder,
                fleet=RayFleet(
                    worker=worker_settings(settings),
                    namespace=settings.ray.namespace,
                    heartbeat_ms=settings.worker.heartbeat_ms,
                    is_scaled=bounds(settings) is not None,
                ),
                models=read_models(settings.models_file),
                sweep_ms=settings.scheduling.sweep_ms,
                drain_within_ms=settings.scheduling.drain_within_ms,
                reconcile_every_ms=settings.scheduling.reconcile_every_ms,
                scaling=bounds(settings),
                tracer=self._traces.tracer,
                workers_min=0 if settings.ray.address is None else settings.scaling.min_workers,
                record_to=settings.scheduling.record_to,
                record_bytes_max=settings.scheduling.record_bytes_max,
            ) as leader:
                leader.metrics.process.configured_as(settings.fingerprint)
                self._leader = leader
                collect_seldom()
                await leader.run()
        except* AnotherLeads as another:
            _log.warning("another release leads", reason=str(another.exceptions[0]))
            ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
        except* Deposed as deposed:
            # The actor itself may be well: where this process's node was taken for dead and woke up, Ray has
            # started the actor elsewhere, and to end it would end the one that leads. Otherwise Ray starts it
            # anew, and it finds that another release leads.
            _log.warning("deposed", reason=str(deposed.exceptions[0]))
            os._exit(1)
        except* Exception:
            _log.exception("scheduler failed; it is started anew")
            os._exit(1)

    async def _depose_if_another_leads(self, name: str) -> None:
        lane = Lane(self._dsn, name)
        try:
            holder = await lane.run(present_holder)
        finally:
            await lane.close()
        if holder != name and await asyncio.to_thread(lives, holder, self._settings.ray.namespace):
            raise AnotherLeads(f"{holder} leads")


def _started_anew() -> bool:
    with warnings.catch_warnings():
        # Ray's own code uses there what it warns of.
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def lives(name: str, namespace: str) -> bool:
    """Return whether there is an actor of this name, be it that Ray is just starting it anew."""
    try:
        ray.get_actor(name, namespace=namespace)
    except ValueError:
        return False  # Ray's way of saying that there is none
    return True


def bounds(settings: Settings) -> Bounds | None:
    """Return within which bounds the fleet follows its work; None: it is what the cluster has."""
    scaling = settings.scaling
    if scaling.max_workers is None or settings.ray.address is None:
        return None
    return Bounds(
        at_least=scaling.min_workers,
        at_most=scaling.max_workers,
        shrinks_after_ms=scaling.shrink_after_ms,
    )


def worker_settings(settings: Settings) -> WorkerSettings:
    """Return what every worker is told; the fleet fills in each one's slot."""
    return WorkerSettings(
        worker_id="",
        release=settings.release,
        artifacts_url=settings.artifacts,
        cache_dir=settings.data_dir / "models",
        models_path=settings.models_file,
        engine=settings.worker.engine,
        device=settings.worker.device,
        threads=settings.worker.threads,
        timed_step_ms=settings.worker.timed_step_ms,
        checkpoint_every_steps=settings.worker.checkpoint_every_steps,
        most_parked=settings.worker.most_parked,
        traces_endpoint=settings.tracing.endpoint,
    )
