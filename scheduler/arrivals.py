"""Rows into events: what the database says of jobs and accounts, as the board is told it.

The loop is told which rows changed; what they say now is read here. A notice that was lost is found by the
sweep, and an account is read when its first job comes and again when its period ends.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from gpu_worker.contract import RenderKind
from gpu_worker.models import Models, UnknownModel
from scheduler.clock import LeaderClock, to_ms
from scheduler.policy.events import (
    AccountRestored,
    CancelWanted,
    Event,
    FundsChanged,
    JobSubmitted,
    LimitsChanged,
    TierChanged,
    UsageReset,
)
from scheduler.policy.job import Job
from scheduler.store import live
from scheduler.store.checkpoints import as_policy_sees
from scheduler.store.lanes import Lane

# Rows that nobody told of are read in bites, so that a flood of them does not hold up a cycle.
_MOST_SWEPT = 5_000
# Jobs of one model whose needs differ by less wait in one line: the board looks at every line's head each
# time.
_MEMORY_STEP = 256 * 1024 * 1024
_MORE_THAN_ANY_GPU = 2**60


class Arrivals:
    """Reads rows for one leader, on the loop's own connection."""

    def __init__(self, *, lane: Lane, epoch: int, clock: LeaderClock, models: Models) -> None:
        self._lane = lane
        self._epoch = epoch
        self._clock = clock
        self._models = models
        self._renews_ms: dict[str, int] = {}
        """Every account on the board, and when its period ends."""
        self._renewals: list[tuple[int, str]] = []

    async def unheeded(self) -> list[str]:
        """Return jobs whose notice was lost."""
        return await self._lane.run(
            lambda connection: live.unheeded(connection, epoch=self._epoch, most=_MOST_SWEPT)
        )

    def renewed(self, now_ms: int) -> set[str]:
        """Return the accounts whose period has ended since this was last asked."""
        due: set[str] = set()
        while self._renewals and self._renewals[0][0] <= now_ms:
            due.add(heapq.heappop(self._renewals)[1])
        return due

    async def of_jobs(self, job_ids: Iterable[str]) -> list[Event]:
        """Return what these jobs' rows say, and stamp the waiting ones as seen. Raises Deposed."""
        rows = await self._lane.run(
            lambda connection: live.noticed_jobs(connection, epoch=self._epoch, job_ids=sorted(job_ids))
        )
        strangers = {row.account_id for row in rows} - self._renews_ms.keys()
        known = await self.of_new_accounts(strangers) if strangers else []
        now_ms = self._clock.now_ms()
        # One that was on the board before may have been moved since.
        tiers = [
            TierChanged(at_ms=now_ms, job_id=row.job_id, tier=row.tier)
            for row in rows
            if row.state == "queued"
        ]
        return [*known, *self.of_rows(rows), *tiers]

    def of_rows(self, rows: Sequence[live.LiveJob]) -> list[Event]:
        """Return what these rows say of jobs that wait, or that their owners want no more."""
        now_ms = self._clock.now_ms()
        events: list[Event] = []
        for row in rows:
            if row.state == "queued":
                events.append(
                    JobSubmitted(
                        at_ms=now_ms,
                        job=self.job(row),
                        losses=row.losses,
                        accepted_ms=to_ms(row.created_at),
                        checkpoint=None if row.checkpoint is None else as_policy_sees(row.checkpoint),
                    )
                )
            elif row.state == "cancelled" or (row.state == "running" and row.cancel_wanted):
                events.append(CancelWanted(at_ms=now_ms, job_id=row.job_id))
        return events

    async def of_accounts(self, account_ids: Iterable[str]) -> list[Event]:
        """Return what the accounts among these that the board knows may have now. Raises Deposed."""
        standings = await self._standings(set(account_ids) & self._renews_ms.keys())
        now_ms = self._clock.now_ms()
        events: list[Event] = []
        for standing in standings:
            events += (
                LimitsChanged(
                    at_ms=now_ms,
                    account_id=standing.account_id,
                    limits=standing.limits,
                    weight_milli=standing.weight_milli,
                ),
                FundsChanged(at_ms=now_ms, account_id=standing.account_id),
            )
        return [*events, *await self._usage_forgotten(standings)]

    async def of_new_accounts(self, account_ids: Iterable[str]) -> list[Event]:
        """Return where these accounts, which the board does not know yet, stand. Raises Deposed."""
        standings = await self._standings(account_ids)
        events: list[Event] = [
            AccountRestored(
                at_ms=self._clock.now_ms(),
                account_id=standing.account_id,
                limits=standing.limits,
                weight_milli=standing.weight_milli,
                shares=standing.shares,
            )
            for standing in standings
        ]
        return [*events, *await self._usage_forgotten(standings)]

    def job(self, row: live.LiveJob) -> Job:
        """Return a row's job as the policy sees it."""
        job = Job(
            job_id=row.job_id,
            account_id=row.account_id,
            tier=row.tier,
            arrival=row.arrival,
            predicted_ms=row.predicted_ms,
            step_ms=max(1, row.predicted_ms // row.steps),
            model=row.model,
            memory_bytes=memory_wanted(self._models, row.kind, row.model, row.width, row.height),
        )
        return job.needing(memory_beyond(row.memory_above_bytes)) if row.memory_above_bytes else job

    async def _standings(self, account_ids: Iterable[str]) -> list[live.AccountStanding]:
        now_ms = self._clock.now_ms()
        standings = await self._lane.run(
            lambda connection: live.standings(connection, sorted(account_ids), now_ms)
        )
        for standing in standings:
            renews_ms = to_ms(standing.renews_at)
            if self._renews_ms.get(standing.account_id) != renews_ms:
                self._renews_ms[standing.account_id] = renews_ms
                heapq.heappush(self._renewals, (renews_ms, standing.account_id))
        return standings

    async def _usage_forgotten(self, standings: Iterable[live.AccountStanding]) -> list[Event]:
        expired = [standing for standing in standings if standing.usage_expired]
        if expired:
            await self._lane.run(
                lambda connection: live.forget_usage(connection, epoch=self._epoch, expired=expired)
            )
        now_ms = self._clock.now_ms()
        return [UsageReset(at_ms=now_ms, account_id=standing.account_id) for standing in expired]


def memory_wanted(models: Models, kind: RenderKind, model: str, width: int, height: int) -> int:
    """Return the free memory of a worker that a job of this kind, model and size needs, in coarse steps."""
    try:
        needed = models.memory_needed(kind, model, width, height)
    except UnknownModel:
        # It was offered when the job was accepted. The job waits and says that no worker can run it.
        needed = _MORE_THAN_ANY_GPU
    return -(-needed // _MEMORY_STEP) * _MEMORY_STEP


def memory_beyond(memory_bytes: int) -> int:
    """Return the memory that a worker needs where this much was too little: the next coarse step.

    GPUs of one model differ by some MiB, and to try one after the other would tell nothing new.
    """
    return (memory_bytes // _MEMORY_STEP + 1) * _MEMORY_STEP
