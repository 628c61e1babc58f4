"""A leading scheduler: everything between a database and a fleet, put together and taken apart again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from opentelemetry.trace import Tracer

from billing import plans as billing_plans
from gpu_worker.models import Models
from scheduler.answers import Explained, Outlook, QueuesView, WhatIf, WorkerView
from scheduler.arrivals import Arrivals
from scheduler.backlog import Backlog
from scheduler.clock import LeaderClock
from scheduler.figures import Figures
from scheduler.fleet import Fleet
from scheduler.forecasts import Forecasts, ListenedBoard
from scheduler.inbox import AccountsChanged, ClosingDown, FleetChanged, Inbox, JobsChanged
from scheduler.logs import lines_counted
from scheduler.loop import Loop
from scheduler.metrics import SchedulerMetrics
from scheduler.oracle import Oracle
from scheduler.policy.fleet_size import Bounds
from scheduler.policy.foresight.lately import Lately
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.reconciler import Reconciler
from scheduler.recorder import RecordedBoard, start_recording
from scheduler.recovery import restore
from scheduler.settlement import Settlement
from scheduler.store import leadership
from scheduler.store.lanes import Lane
from scheduler.store.pool import Connection
from scheduler.updates import QueueStatus, Updates

# Two lanes keep a commit in flight on each of two connections;
# more only help with more accounts than one disk serves.
_SETTLEMENT_LANES = 2
# What waits is read on several: each answer waits for its turn of a loop that is busy telling, and four are
# enough that there is always something to tell.
_BACKLOG_LANES = 4
# Between two looks at whether anything runs, where nothing happens meanwhile.
_LOOK_AGAIN_S = 0.2


class Leader:
    """What may be asked of a leading scheduler."""

    def __init__(
        self,
        *,
        epoch: int,
        loop: Loop,
        backlog: Backlog,
        settlement: Settlement,
        fleet: Fleet,
        inbox: Inbox,
        updates: Updates,
        metrics: SchedulerMetrics,
        oracle: Oracle,
        figures: Figures,
        reconciler: Reconciler,
    ) -> None:
        self.epoch = epoch
        self.updates = updates
        self.metrics = metrics
        self._loop = loop
        self._backlog = backlog
        self._settlement = settlement
        self._fleet = fleet
        self._inbox = inbox
        self._oracle = oracle
        self._figures = figures
        self._reconciler = reconciler

    async def run(self) -> None:
        """Lead until cancelled. Raises an ExceptionGroup with Deposed when another scheduler leads."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._loop.run(), name="loop")
            for lane in self._backlog.lanes:
                group.create_task(self._backlog.run(lane), name="backlog")
            group.create_task(self._settlement.run(), name="settlement")
            group.create_task(self._fleet.run(), name="fleet")
            group.create_task(self._oracle.run(), name="forecasts")
            group.create_task(self._figures.run(), name="figures")
            group.create_task(self._reconciler.run(), name="reconciler")
            group.create_task(self.metrics.process.watch_event_loop(), name="event loop")

    @property
    def workers(self) -> int:
        """How many workers have joined and are not lost."""
        return self._loop.workers

    def jobs_changed(self, job_ids: Sequence[str]) -> None:
        """Notice committed rows."""
        self._inbox.put(JobsChanged(job_ids=tuple(job_ids)))

    def accounts_changed(self, account_ids: Sequence[str]) -> None:
        """Notice changed plans, limits, funds or consent."""
        self._inbox.put(AccountsChanged(account_ids=tuple(account_ids)))

    def fleet_changed(self) -> None:
        """Notice what operators drained, resumed or paused."""
        self._inbox.put(FleetChanged())

    async def close_down(self, within_s: float) -> bool:
        """Start nothing any more, and hand over what runs; returns whether all of it was within that time.

        For before the workers are ended: what they would lose goes on from where it is, when they are back.
        """
        self._inbox.put(ClosingDown())
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                seen = 0
                while not self._loop.handed_over:
                    seen = (await self.updates.after(seen, _LOOK_AGAIN_S)).newest
        return self._loop.handed_over

    def queue_statuses(self, job_ids: Sequence[str]) -> Mapping[str, QueueStatus]:
        """Return why these jobs wait, and when they will start."""
        return self._oracle.with_start_times(self._loop.queue_statuses(job_ids))

    def explain(self, job_id: str) -> Explained | None:
        """Return why a live job is where it is; None: it is not on the board."""
        return self._oracle.explain(job_id, self.queue_statuses([job_id]).get(job_id))

    async def estimate(self, what_ifs: Sequence[WhatIf]) -> Sequence[Outlook | None]:
        """Return what would come of each, alone; None: it cannot be told."""
        return await self._oracle.estimate(what_ifs)

    def queues(self) -> QueuesView:
        """Return what waits and runs, and how the GPUs are shared."""
        return self._oracle.queues({tier: self._loop.untold(tier) for tier in Tier})

    def workers_view(self) -> Sequence[WorkerView]:
        """Return the workers that have joined and are not lost."""
        return self._loop.worker_views()


@asynccontextmanager
async def lead(
    *,
    dsn: str,
    holder: str,
    fleet: Fleet,
    models: Models,
    sweep_ms: int,
    drain_within_ms: int = 60_000,
    reconcile_every_ms: int = 300_000,
    scaling: Bounds | None = None,
    workers_min: int = 0,
    parameters: Parameters | None = None,
    tracer: Tracer | None = None,
    record_to: Path | None = None,
    record_bytes_max: int = 2**30,
) -> AsyncIterator[Leader]:
    """Take the lead, find the workers and restore the board; yields a leader that is ready to `run`.

    Workers of another release have `drain_within_ms` each to finish what they have before they are replaced,
    and so have those that are not needed. Without `scaling` the fleet is what the cluster has, which should
    be `workers_min` at least, and without `tracer` nothing is traced. With a folder `record_to`, all that the
    board is told and decides is taken down there. Waits while the database is away. Raises Deposed if yet
    another scheduler takes the lead meanwhile.
    """
    parameters = parameters or Parameters()
    # By this connection's name `darkroom migrate --after` sees that a scheduler of that release is there.
    lane = Lane(dsn, f"{holder} loop")
    backlog_lanes = [Lane(dsn, f"backlog {number}") for number in range(_BACKLOG_LANES)]
    questions = Lane(dsn, "questions")
    reconciling = Lane(dsn, "reconciler")
    recorder = None
    try:
        taken = await lane.run(lambda connection: leadership.take_lead(connection, holder))
        clock = LeaderClock(started_ms=taken.now_ms)
        inbox = Inbox()
        updates = Updates(taken.epoch)
        metrics = SchedulerMetrics(await lane.run(_plan_names), models.entries, now_ms=clock.now_ms())
        for watched in (lane, *backlog_lanes, questions, reconciling):
            watched.watched_by(metrics.process)
        settlement = Settlement(
            dsn=dsn,
            lanes=_SETTLEMENT_LANES,
            epoch=taken.epoch,
            inbox=inbox,
            clock=clock,
            parameters=parameters,
            metrics=metrics,
        )
        arrivals = Arrivals(lane=lane, epoch=taken.epoch, clock=clock, models=models)
        lately = Lately(clock.now_ms())
        if record_to is not None:
            recorder = start_recording(
                record_to, epoch=taken.epoch, parameters=parameters, bytes_max=record_bytes_max
            )
        if recorder is None:
            board = ListenedBoard(parameters, lately)
        else:
            board = RecordedBoard(parameters, lately, recorder)
        oracle = Oracle(
            board=board,
            forecasts=Forecasts(board=board, lately=lately, parameters=parameters, clock=clock),
            parameters=parameters,
            clock=clock,
            models=models,
            lane=questions,
            bounds=scaling,
        )
        loop = Loop(
            board=board,
            parameters=parameters,
            epoch=taken.epoch,
            lane=lane,
            arrivals=arrivals,
            inbox=inbox,
            fleet=fleet,
            settlement=settlement,
            updates=updates,
            clock=clock,
            metrics=metrics,
            sweep_ms=sweep_ms,
            drain_within_ms=drain_within_ms,
            wanted_gpus=None if scaling is None else oracle.wanted_gpus,
            workers_min=workers_min,
            tracer=tracer,
        )
        await fleet.open(taken.epoch, inbox.put)
        backlog = await restore(
            loop,
            arrivals=arrivals,
            lane=lane,
            backlog_lanes=backlog_lanes,
            epoch=taken.epoch,
            clock=clock,
            parameters=parameters,
            tell=inbox.put,
        )
        metrics.scheduler_leader.set(1)
        with lines_counted(metrics.process.logged):
            yield Leader(
                epoch=taken.epoch,
                loop=loop,
                backlog=backlog,
                settlement=settlement,
                fleet=fleet,
                inbox=inbox,
                updates=updates,
                metrics=metrics,
                oracle=oracle,
                figures=Figures(
                    board=board,
                    running=loop.desk.running,
                    waits=loop.desk.waits,
                    oracle=oracle,
                    # A fleet that nobody can grow is to stay as large as it is: what the work asks for beyond
                    # is a reason to wait, not to wake somebody.
                    wanted_workers=oracle.wanted_gpus if scaling else lambda: loop.expected_workers,
                    clock=clock,
                    metrics=metrics,
                ),
                reconciler=Reconciler(
                    lane=reconciling,
                    clock=clock,
                    metrics=metrics,
                    every_ms=reconcile_every_ms,
                    may_begin=lambda: board.is_whole,
                ),
            )
    finally:
        if recorder is not None:
            recorder.close()
        await lane.close()
        for backlog_lane in backlog_lanes:
            await backlog_lane.close()
        await questions.close()
        await reconciling.close()


async def _plan_names(connection: Connection) -> list[str]:
    return [version.plan for version in await billing_plans.all_newest(connection)]
