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

from gpu_worker.contract import WorkerReport

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
class Abilities:
    """What at least one of the workers that this scheduler has met could do.

    Front doors refuse by it what nobody could ever run. A worker that left still counts: it may come back.
    """

    most_memory_bytes: int
    models: frozenset[str] | None
    """What they could load; None: any."""
    lacks_for_upscales: str
    """Why none of them can draw an upscale and what to do about it; empty: one can."""
    devices: frozenset[str]
    """Their device types, which plans may price apart."""


@dataclass(frozen=True, kw_only=True)
class UpdateBatch:
    """The answer of one long poll."""

    epoch: int
    """Of the scheduler that answers; when it differs from the one asked before, the numbers start anew."""
    newest: int
    gap: bool
    """Some updates after the asked number were already dropped."""
    updates: tuple[JobUpdate, ...]
    abilities: Abilities | None
    """None: this scheduler has met no worker."""


class Updates:
    """Newest update of each job, numbered; a long poll waits for the next."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._abilities: Abilities | None = None
        self._newest = 0
        self._dropped_to = 0
        self._by_job: OrderedDict[str, tuple[int, JobUpdate]] = OrderedDict()
        self._changed = asyncio.Event()

    def met_worker(self, report: WorkerReport) -> None:
        """Remember what it could do."""
        known = self._abilities
        models = None if report.models is None else frozenset(report.models)
        if known is None:
            self._abilities = Abilities(
                most_memory_bytes=report.memory_bytes,
                models=models,
                lacks_for_upscales=report.lacks_for_upscales,
                devices=frozenset({report.device}),
            )
        else:
            self._abilities = Abilities(
                most_memory_bytes=max(report.memory_bytes, known.most_memory_bytes),
                models=None if models is None or known.models is None else models | known.models,
                lacks_for_upscales=known.lacks_for_upscales and report.lacks_for_upscales,
                devices=known.devices | {report.device},
            )

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
            abilities=self._abilities,
        )
