"""The latest state of each job, for whoever watches.

Only the newest state of a job is kept: a watcher that is slow skips states, it never makes a queue grow.
A front door asks with the number of the last update it saw and gets everything newer in one batch.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

# Enough for what changes while a front door is briefly away; older states are read from the database.
_KEPT = 50_000


class QueueReason(StrEnum):
    """Why a job is not running yet; the names of proto QueueReason."""

    WAITING_FOR_GPU = "waiting_for_gpu"
    CONCURRENCY_LIMIT = "concurrency_limit"
    FUNDS = "funds"
    TIER_PAUSED = "tier_paused"
    NO_WORKER = "no_worker"
    SCHEDULER_STARTING = "scheduler_starting"
    PARKED = "parked"


@dataclass(frozen=True, kw_only=True)
class StartTimes:
    """When a job will probably start, in milliseconds from now."""

    p50_ms: int
    """Half of such jobs start before it."""
    p90_ms: int
    """Nine in ten do."""


@dataclass(frozen=True, kw_only=True)
class QueueStatus:
    """Why a job is not running and where it stands."""

    reason: QueueReason
    sentence: str
    position: int
    """1 is next; 0 when a gate, not the order, holds the job."""
    start: StartTimes | None = None
    """None: not known yet, or something holds it that no time opens."""


@dataclass(frozen=True, kw_only=True)
class JobUpdate:
    """What changed about one job."""

    job_id: str
    event_seq: int
    """Sequence number of its newest durable event, which is in PostgreSQL; 0: unknown, look there."""
    state: str
    worker_id: str | None = None
    """Where it runs, while it runs."""
    attempt_id: str | None = None
    parked: bool = False
    """Its run waits in the middle for another to end."""


@dataclass(frozen=True, kw_only=True)
class UpdateBatch:
    """The answer of one long poll."""

    epoch: int
    """Of the scheduler that answers; when it differs from the one asked before, the numbers start anew."""
    newest: int
    gap: bool
    """Some updates after the asked number were already dropped."""
    updates: tuple[JobUpdate, ...]
    most_memory_bytes: int | None
    """Of the largest worker this scheduler has met; None: it has met none."""


class Updates:
    """Newest update of each job, numbered; a long poll waits for the next."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._most_memory_bytes: int | None = None
        self._newest = 0
        self._dropped_to = 0
        self._by_job: OrderedDict[str, tuple[int, JobUpdate]] = OrderedDict()
        self._changed = asyncio.Event()

    def met_worker(self, memory_bytes: int) -> None:
        """Remember the largest worker, by which front doors refuse what nobody could ever run."""
        self._most_memory_bytes = max(memory_bytes, self._most_memory_bytes or 0)

    def publish(self, update: JobUpdate) -> None:
        """Make this the newest state of its job."""
        self._newest += 1
        self._by_job[update.job_id] = (self._newest, update)
        self._by_job.move_to_end(update.job_id)
        if len(self._by_job) > _KEPT:
            _, (number, _) = self._by_job.popitem(last=False)
            self._dropped_to = number
        self._changed.set()
        self._changed = asyncio.Event()

    def of(self, job_id: str) -> JobUpdate | None:
        """Return the newest known update of a job."""
        known = self._by_job.get(job_id)
        return None if known is None else known[1]

    async def after(self, number: int, wait_s: float) -> UpdateBatch:
        """Return what is newer than `number`, waiting up to `wait_s` seconds while there is nothing."""
        if self._newest <= number:
            # An empty answer after the wait tells the front door that the scheduler is alive.
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
        newer: list[JobUpdate] = []
        for sequence, update in reversed(self._by_job.values()):
            if sequence <= number:
                break
            newer.append(update)
        return UpdateBatch(
            epoch=self._epoch,
            newest=self._newest,
            gap=number < self._dropped_to,
            updates=tuple(reversed(newer)),
            most_memory_bytes=self._most_memory_bytes,
        )
