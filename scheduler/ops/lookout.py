"""What the page shows, gathered from the scheduler and the rows.

However many people look, each source is asked once in two seconds, and less often if it takes long. What
does not answer is absent, and the rest is shown.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Generic, TypeVar

from scheduler.answers import Explained, QueuesView, WorkerView
from scheduler.clock import from_ms
from scheduler.link import SchedulerLink
from scheduler.ops.gpu_time import History, Spent
from scheduler.policy.ids import Tier
from scheduler.refusals import Overloaded
from scheduler.store import operations, overview
from scheduler.store.operations import Pause, Slot
from scheduler.store.overview import Decision, JobMet, Waiting, WaitingAccount
from scheduler.store.pool import Pool
from scheduler.updates import QueueStatus

T = TypeVar("T")

_FRESH_S = 2.0
# Who waits takes a walk over all that waits. To show something may take a twentieth of the time.
_REST = 20
_ACCOUNTS = 50
_DECISIONS = 40

_NO_SLOT = Slot(draining=False, drain_reason="", hand_over_at=None, set_aside_until=None)


class WorkerState(StrEnum):
    """What a worker is about, most urgent first; the words of `darkroom top`."""

    UNHEALTHY = "unhealthy"
    ABSENT = "absent"
    SET_ASIDE = "set aside"
    DRAINING = "draining"
    DRAINED = "drained"
    LEAVING = "leaving"
    RUNNING = "running"
    IDLE = "idle"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker, or a slot of which something is remembered."""

    worker_id: str
    state: WorkerState
    since: datetime | None
    """None: that is not known."""
    view: WorkerView | None
    """None: it is not there."""
    slot: Slot

    @classmethod
    def of(cls, worker_id: str, view: WorkerView | None, slot: Slot, at: datetime) -> Worker:
        """Return what there is to say of a worker at a time."""
        state = _state(view, slot, at)
        since_ms = None
        if view is not None and state is WorkerState.LEAVING:
            since_ms = view.leaves_since_ms
        elif view is not None and state in (WorkerState.RUNNING, WorkerState.IDLE):
            since_ms = view.idle_since_ms if view.active is None else view.active.started_ms
        return cls(
            worker_id=worker_id,
            state=state,
            since=None if since_ms is None else from_ms(since_ms),
            view=view,
            slot=slot,
        )


@dataclass(frozen=True, kw_only=True)
class Waits:
    """An account that waits in a tier, and why its oldest job there does."""

    account: WaitingAccount
    status: QueueStatus | None
    """None: the scheduler has not said."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the database knows."""

    pauses: Mapping[Tier, Pause]
    slots: Mapping[str, Slot]
    decisions: Sequence[Decision]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Everything on the page, of about one moment."""

    at: datetime
    queues: QueuesView | None
    """None: the scheduler does not answer."""
    workers: Sequence[Worker] | None
    """None: the scheduler does not answer."""
    rows: Rows | None
    """None: the database does not answer."""
    waits: Sequence[Waits]
    waiting: Waiting | None
    """None: the database does not answer."""
    waiting_at: datetime
    spent: Spent
    started_a_minute: Mapping[Tier, float | None]


@dataclass(frozen=True, kw_only=True)
class Why:
    """One job, and why it is where it is."""

    job: JobMet
    explained: Explained | None
    """None: it has ended, or the scheduler does not answer."""


class Lookout:
    """Of one front door. `clock` returns the present time, aware; `monotonic_s` is what freshness goes by."""

    def __init__(
        self,
        *,
        pool: Pool,
        link: SchedulerLink,
        history: History,
        clock: Callable[[], datetime],
        monotonic_s: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._link = link
        self._history = history
        self._clock = clock
        self._rows = _Kept(self._read_rows, monotonic_s, clock)
        self._waiting = _Kept(self._read_waiting, monotonic_s, clock, rest=_REST)
        self._queues = _Kept(link.queues, monotonic_s, clock)
        self._views = _Kept(link.workers_view, monotonic_s, clock)
        self._statuses = _Kept(self._ask_statuses, monotonic_s, clock)

    async def seen(self) -> Seen:
        """Return what is known now, or was two seconds ago."""
        queues, views, rows, waiting = await asyncio.gather(
            self._queues.newest(), self._views.newest(), self._rows.newest(), self._waiting.newest()
        )
        # Asked in vain already; a page without reasons is shown sooner.
        statuses = {} if queues is None else await self._statuses.newest()
        at = self._clock()
        return Seen(
            at=at,
            queues=queues,
            workers=None if views is None else _workers(views, {} if rows is None else rows.slots, at),
            rows=rows,
            waits=[
                Waits(account=account, status=statuses.get(account.oldest_job_id))
                for account in (waiting.accounts if waiting is not None else ())
            ],
            waiting=waiting,
            waiting_at=self._waiting.read_at,
            spent=self._history.spent(),
            started_a_minute={tier: self._history.started_a_minute(tier) for tier in Tier},
        )

    async def why(self, job_id: uuid.UUID) -> Why | None:
        """Return what is known of a job, None if there is none of that id. Raises Overloaded."""
        async with self._pool.reading() as connection:
            job = await overview.job(connection, job_id)
        return None if job is None else Why(job=job, explained=await self._link.explain(str(job_id)))

    async def _read_rows(self) -> Rows | None:
        try:
            async with self._pool.reading() as connection:
                return Rows(
                    pauses=await operations.pauses(connection),
                    slots=await operations.slots(connection),
                    decisions=await overview.decisions(connection, _DECISIONS),
                )
        except Overloaded:
            return None

    async def _read_waiting(self) -> Waiting | None:
        try:
            async with self._pool.reading() as connection:
                return await overview.waiting(connection, _ACCOUNTS)
        except Overloaded:
            return None

    async def _ask_statuses(self) -> Mapping[str, QueueStatus]:
        waiting = await self._waiting.newest()
        if waiting is None or not waiting.accounts:
            return {}
        return await self._link.queue_statuses([account.oldest_job_id for account in waiting.accounts])


class _Kept(Generic[T]):
    """The newest answer of a source; one asks it at a time, and the others wait for that answer."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[T]],
        now_s: Callable[[], float],
        clock: Callable[[], datetime],
        *,
        rest: int = 0,
    ) -> None:
        """Make one that asks when it is asked; after an answer it rests for `rest` times what that took."""
        self._ask = ask
        self._now_s = now_s
        self._clock = clock
        self._rest = rest
        self._turn = asyncio.Lock()
        self._answer: list[T] = []
        """None or one."""
        self._fresh_until_s = 0.0
        self.read_at = clock()

    async def newest(self) -> T:
        async with self._turn:
            begun_s = self._now_s()
            if not self._answer or begun_s >= self._fresh_until_s:
                answer = await self._ask()
                self._answer = [answer]
                self.read_at = self._clock()
                ended_s = self._now_s()
                # Who does not answer is asked again soon.
                rest_s = 0.0 if answer is None else self._rest * (ended_s - begun_s)
                self._fresh_until_s = ended_s + max(_FRESH_S, rest_s)
            return self._answer[0]


def _workers(views: Sequence[WorkerView], slots: Mapping[str, Slot], at: datetime) -> Sequence[Worker]:
    by_id = {view.worker_id: view for view in views}
    remembered = {
        worker_id for worker_id, slot in slots.items() if slot.draining or slot.aside_at(at) is not None
    }
    workers = [
        Worker.of(worker_id, by_id.get(worker_id), slots.get(worker_id, _NO_SLOT), at)
        for worker_id in by_id.keys() | remembered
    ]
    order = list(WorkerState)
    return sorted(workers, key=lambda worker: (order.index(worker.state), worker.worker_id))


def _state(view: WorkerView | None, slot: Slot, at: datetime) -> WorkerState:
    if view is None:
        return WorkerState.ABSENT
    if not view.healthy:
        return WorkerState.UNHEALTHY
    if slot.aside_at(at) is not None:
        return WorkerState.SET_ASIDE
    if view.leaves_since_ms is not None:
        return WorkerState.LEAVING
    if slot.draining:
        # Nobody needs to wait for one that has finished what it had.
        return WorkerState.DRAINING if view.active or view.parked else WorkerState.DRAINED
    return WorkerState.IDLE if view.active is None else WorkerState.RUNNING
