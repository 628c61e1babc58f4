"""Rows into events: what the database says of jobs and accounts, as the board is told it.

The loop is told which rows changed; what they say now is read here. A notice that was lost is found by the
sweep, and an account is read when its first job comes and again when its period ends.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
    Waited,
    WaitingRestored,
)
from scheduler.policy.ids import AccountId
from scheduler.policy.job import Checkpoint, Job
from scheduler.store import live
from scheduler.store.checkpoints import as_policy_sees
from scheduler.store.lanes import Lane

MOST_SWEPT = 1_000
"""Rows that nobody told of are read in bites, so that a flood of them does not hold up a cycle."""

# What is lost is nearly always of a moment ago. A job that waits for long can be lost too, when it is moved
# to the other tier; and where the look takes long, it may take no more than a hundredth of the time.
_EVERYWHERE_MS = 60_000
_EVERYWHERE_SHARE = 100
# Jobs of one model whose needs differ by less wait in one line: the board looks at every line's head each
# time.
_MEMORY_STEP = 256 * 1024 * 1024
_MORE_THAN_ANY_GPU = 2**60


@dataclass(frozen=True, kw_only=True)
class Portion:
    """What the rows said of some accounts: where each stands, and all its live jobs in order of arrival."""

    accounts: Mapping[AccountId, tuple[live.AccountStanding, list[live.LiveJob]]]


@dataclass(frozen=True, kw_only=True)
class WaitingPortion:
    """What the rows said of some accounts of which nothing runs: where each stands, and all that waits of it,
    in order of arrival."""

    accounts: Mapping[AccountId, tuple[live.AccountStanding, list[Waited]]]


class Arrivals:
    """Reads rows for one leader, on the loop's own connection where none is named.

    The board knows an account with all its live jobs or not at all: who is told of some jobs of an account
    only would give it turns by them.
    """

    def __init__(self, *, lane: Lane, epoch: int, clock: LeaderClock, models: Models) -> None:
        self._lane = lane
        self._epoch = epoch
        self._clock = clock
        # Asked for of each job anew, and there are few sizes.
        self._memory_wanted = functools.lru_cache(live.MOST_WORKS)(
            lambda work: memory_wanted(models, work.kind, work.model, work.width, work.height)
        )
        self._renews_ms: dict[str, int] = {}
        """Every account on the board, and when its period ends."""
        self._renewals: list[tuple[int, str]] = []
        self._everywhere_at_ms = 0

    def knows(self, account_id: str) -> bool:
        """Return whether an account was told of, with all its jobs."""
        return account_id in self._renews_ms

    async def unheeded(self) -> list[str]:
        """Return jobs whose notice was lost, up to `MOST_SWEPT` of each kind."""
        now_ms = self._clock.now_ms()
        everywhere = now_ms >= self._everywhere_at_ms
        found = await self._lane.run(
            lambda connection: live.unheeded(connection, most=MOST_SWEPT, everywhere=everywhere)
        )
        if everywhere and len(found) < MOST_SWEPT:
            took_ms = self._clock.now_ms() - now_ms
            self._everywhere_at_ms = now_ms + max(_EVERYWHERE_MS, _EVERYWHERE_SHARE * took_ms)
        return found

    def renewed(self, now_ms: int) -> set[str]:
        """Return the accounts whose period has ended since this was last asked."""
        due: set[str] = set()
        while self._renewals and self._renewals[0][0] <= now_ms:
            due.add(heapq.heappop(self._renewals)[1])
        return due

    async def of_jobs(self, job_ids: Iterable[str]) -> list[Event]:
        """Return what these jobs' rows say, and stamp the waiting ones as seen. Raises Deposed.

        Of an account that was not told of before, all live jobs are told of with it.
        """
        rows = await self._lane.run(
            lambda connection: live.noticed_jobs(connection, epoch=self._epoch, job_ids=sorted(job_ids))
        )
        strangers = {row.account_id for row in rows} - self._renews_ms.keys()
        known: list[Event] = []
        if strangers:
            portion = await self.read(self._lane, strangers)
            for account_id in portion.accounts:
                known += self.of_account(portion, account_id)
        rows = [row for row in rows if self.knows(row.account_id)]
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
                        accepted_ms=row.accepted_ms,
                        checkpoint=checkpoint_of(row),
                    )
                )
            elif row.state == "cancelled" or (row.state == "running" and row.cancel_wanted):
                events.append(CancelWanted(at_ms=now_ms, job_id=row.job_id))
        return events

    async def of_accounts(self, account_ids: Iterable[str]) -> list[Event]:
        """Return what the accounts among these that the board knows may have now. Raises Deposed."""
        known = set(account_ids) & self._renews_ms.keys()
        standings = await self._standings(self._lane, known)
        now_ms = self._clock.now_ms()
        events: list[Event] = []
        for standing in standings:
            self._note_renewal(standing)
            events += (
                LimitsChanged(
                    at_ms=now_ms,
                    account_id=standing.account_id,
                    limits=standing.limits,
                    weight_milli=standing.weight_milli,
                ),
                FundsChanged(at_ms=now_ms, account_id=standing.account_id),
            )
        return [*events, *(self._reset(standing) for standing in standings if standing.usage_expired)]

    async def read(self, lane: Lane, account_ids: Iterable[str]) -> Portion:
        """Read what the rows say of accounts, on any lane; nothing is told by it. Raises Deposed."""
        wanted = sorted(account_ids)
        standings = await self._standings(lane, wanted)
        portion = Portion(accounts={one.account_id: (one, []) for one in standings})
        for row in await lane.run(lambda connection: live.live_jobs(connection, wanted)):
            # Of one that was erased in between there are no live jobs: it was cancelled first.
            if row.account_id in portion.accounts:
                portion.accounts[row.account_id][1].append(row)
        return portion

    def of_account(
        self,
        portion: Portion,
        account_id: AccountId,
        running: Iterable[Event] = (),
    ) -> list[Event]:
        """Return all that a portion says of an account; nothing if that was told of meanwhile.

        `running` tells of those of its jobs that run.
        """
        if self.knows(account_id):
            return []
        standing, rows = portion.accounts[account_id]
        return [*self._restored(standing), *running, *self.of_rows(rows)]

    async def read_waiting(self, lane: Lane, account_ids: Iterable[str]) -> WaitingPortion:
        """Read what the rows say of accounts of which nothing runs, on any lane; nothing is told by it.

        Raises Deposed.
        """
        wanted = sorted(account_ids)
        standings = await self._standings(lane, wanted)
        waiting = WaitingPortion(accounts={one.account_id: (one, []) for one in standings})
        # Each is made ready at once, while the processor has it at hand: later it takes twice as long.
        for row in await lane.run(lambda connection: live.live_jobs(connection, wanted)):
            if row.state == "queued" and row.account_id in waiting.accounts:
                waited = Waited(self.job(row), row.losses, row.accepted_ms, checkpoint_of(row))
                waiting.accounts[row.account_id][1].append(waited)
        return waiting

    def of_waiting_account(self, waiting: WaitingPortion, account_id: AccountId) -> list[Event]:
        """Return all that was read of an account; nothing if that was told of meanwhile."""
        if self.knows(account_id):
            return []
        standing, jobs = waiting.accounts[account_id]
        return [
            *self._restored(standing),
            WaitingRestored(at_ms=self._clock.now_ms(), account_id=account_id, jobs=tuple(jobs)),
        ]

    def _restored(self, standing: live.AccountStanding) -> list[Event]:
        self._note_renewal(standing)
        events: list[Event] = [
            AccountRestored(
                at_ms=self._clock.now_ms(),
                account_id=standing.account_id,
                limits=standing.limits,
                weight_milli=standing.weight_milli,
                shares=standing.shares,
            )
        ]
        if standing.usage_expired:
            events.append(self._reset(standing))
        return events

    def job(self, row: live.LiveJob) -> Job:
        """Return a row's job as the policy sees it."""
        work, predicted_ms = row.work, row.predicted_ms
        job = Job(
            job_id=row.job_id,
            account_id=row.account_id,
            tier=row.tier,
            arrival=row.arrival,
            predicted_ms=predicted_ms,
            step_ms=max(1, predicted_ms // work.steps),
            model=work.model,
            memory_bytes=self._memory_wanted(work),
        )
        return job.needing(memory_beyond(row.memory_above_bytes)) if row.memory_above_bytes else job

    async def _standings(self, lane: Lane, account_ids: Iterable[str]) -> list[live.AccountStanding]:
        """Return how accounts stand. Usage that has expired is forgotten in its row."""
        now_ms = self._clock.now_ms()
        standings = await lane.run(lambda connection: live.standings(connection, sorted(account_ids), now_ms))
        expired = [standing for standing in standings if standing.usage_expired]
        if expired:
            await lane.run(
                lambda connection: live.forget_usage(connection, epoch=self._epoch, expired=expired)
            )
        return standings

    def _note_renewal(self, standing: live.AccountStanding) -> None:
        renews_ms = to_ms(standing.renews_at)
        if self._renews_ms.get(standing.account_id) != renews_ms:
            self._renews_ms[standing.account_id] = renews_ms
            heapq.heappush(self._renewals, (renews_ms, standing.account_id))

    def _reset(self, standing: live.AccountStanding) -> UsageReset:
        return UsageReset(at_ms=self._clock.now_ms(), account_id=standing.account_id)


def checkpoint_of(row: live.LiveJob) -> Checkpoint | None:
    """Return the newest checkpoint of a row's job as the policy sees it; None: it begins anew."""
    checkpoint = row.checkpoint
    return None if checkpoint is None else as_policy_sees(checkpoint)


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
