"""What waiting jobs were told when they came, and how much of their waiting their own accounts caused.

A job is eligible while nothing but the order and the GPUs keeps it: it is within its account's caps, there is
fast time for it, and its tier is open. All other time it is held, and no promise is about that. Only time
since this scheduler knows the whole queue is told apart; before, a job that waited counts as eligible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice

from scheduler.metrics import HeldBecause
from scheduler.policy.account import Account
from scheduler.policy.board import Board
from scheduler.policy.events import (
    AttemptFinished,
    AttemptLost,
    AttemptStarted,
    CancelWanted,
    Event,
    FundsChanged,
    JobSubmitted,
    LimitsChanged,
    StartRefused,
    TierChanged,
    TierPaused,
    TierResumed,
)
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.job import Job

# To tell a job when it will start takes a look at the queue. Of a burst, so many in a cycle say enough.
_MOST_TOLD = 20
_TOLD_KEPT = 100_000


@dataclass(kw_only=True, slots=True)
class _Wait:
    """Of one job that is or was eligible."""

    tier: Tier
    since_ms: int
    """Since when it is as it is."""
    paused_ms: int
    """How long its tier had been paused by then."""
    because: HeldBecause | None = None
    """What holds it; None: it is eligible."""
    held_ms: dict[HeldBecause, int] = field(default_factory=dict)

    def hold(self, because: HeldBecause, ms: int) -> None:
        if ms > 0:
            self.held_ms[because] = self.held_ms.get(because, 0) + ms


class Waits:
    """Watches what the board is told."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._waits: dict[AccountId, dict[JobId, _Wait]] = {}
        self._whole_since_ms: int | None = None
        self._paused_since_ms: dict[Tier, int] = {}
        self._paused_ms = dict.fromkeys(Tier, 0)
        self._came: list[Job] = []
        self._told_ms: dict[JobId, int] = {}

    def concerned(self, event: Event) -> AccountId | None:
        """Return whose waiting an event that is about to be told may change."""
        match event:
            case JobSubmitted():
                return event.job.account_id
            case CancelWanted() | TierChanged() | StartRefused() | AttemptStarted():
                return self._board.whose(event)
            case AttemptFinished() | AttemptLost():
                attempt = self._board.cell.attempts.get(event.attempt_id)
                return None if attempt is None else attempt.job.account_id
            case LimitsChanged() | FundsChanged():
                return event.account_id
            case _:
                return None

    def heard(self, event: Event, concerned: AccountId | None) -> None:
        """Take note of an event that the board was told, and that concerned this account."""
        match event:
            case TierPaused():
                self._paused_since_ms.setdefault(event.tier, event.at_ms)
            case TierResumed():
                since_ms = self._paused_since_ms.pop(event.tier, event.at_ms)
                self._paused_ms[event.tier] += event.at_ms - since_ms
        if not self._board.is_whole:
            return
        if self._whole_since_ms is None:
            self._whole_since_ms = event.at_ms
        if isinstance(event, JobSubmitted) and len(self._came) < _MOST_TOLD:
            self._came.append(event.job)
        if concerned is not None:
            self._look_at(concerned, event.at_ms, came=event.job if isinstance(event, JobSubmitted) else None)

    def tell(self, expected_ms: Callable[[Job], int | None]) -> None:
        """Note what jobs that came since the last time, and did not start at once, are told."""
        for job in self._came:
            if self._board.waiting_job(job.job_id) is not None and len(self._told_ms) < _TOLD_KEPT:
                told_ms = expected_ms(job)
                if told_ms:
                    self._told_ms[job.job_id] = told_ms
        self._came.clear()

    def started(self, job_id: JobId, account_id: AccountId, now_ms: int) -> Started:
        """Return what came of a job's waiting, which ends now: before the board is told."""
        told_ms = self._told_ms.pop(job_id, None)
        wait = self._waits.get(account_id, {}).get(job_id)
        if wait is None:
            return Started(held_ms={}, told_ms=told_ms)
        self._close(wait, now_ms)
        return Started(held_ms=wait.held_ms, told_ms=told_ms)

    def _look_at(self, account_id: AccountId, now_ms: int, *, came: Job | None) -> None:
        """Begin and end the eligible times of an account's jobs. `came`: the one that is heard of now."""
        waits = self._waits.setdefault(account_id, {})
        account = self._board.cell.accounts.get(account_id)
        eligible = {} if account is None else _eligible(account)
        for job_id, tier in eligible.items():
            wait = waits.get(job_id)
            if wait is None:
                heard_of = came is not None and job_id == came.job_id
                waits[job_id] = self._first(job_id, tier, now_ms, held=not heard_of)
            elif wait.because is not None or wait.tier is not tier:
                self._close(wait, now_ms)
                self._open(wait, tier, None, now_ms)
        held = self._board.cell.held.get(account_id, ())
        for job_id in waits.keys() - eligible.keys():
            if self._board.waiting_job(job_id) is None:
                del waits[job_id]
                self._told_ms.pop(job_id, None)
            elif waits[job_id].because is None or job_id in held:
                because = HeldBecause.FUNDS if job_id in held else HeldBecause.CONCURRENCY_LIMIT
                if because is not waits[job_id].because:
                    self._close(waits[job_id], now_ms)
                    self._open(waits[job_id], waits[job_id].tier, because, now_ms)
        if not waits:
            del self._waits[account_id]

    def _first(self, job_id: JobId, tier: Tier, now_ms: int, *, held: bool) -> _Wait:
        """Return the waiting of a job that is eligible for the first time, as far as is known.

        One that is so when it is heard of was not `held` before: until then the fleet had not looked at it.
        """
        accepted_ms = self._board.cell.jobs[job_id].accepted_ms
        wait = _Wait(tier=tier, since_ms=now_ms, paused_ms=self._paused(tier, now_ms))
        if held and self._whole_since_ms is not None and accepted_ms >= self._whole_since_ms:
            wait.hold(HeldBecause.CONCURRENCY_LIMIT, now_ms - accepted_ms)
        return wait

    def _close(self, wait: _Wait, now_ms: int) -> None:
        """Add up the time since it is as it is."""
        if wait.because is None:
            wait.hold(HeldBecause.TIER_PAUSED, self._paused(wait.tier, now_ms) - wait.paused_ms)
        else:
            wait.hold(wait.because, now_ms - wait.since_ms)

    def _open(self, wait: _Wait, tier: Tier, because: HeldBecause | None, now_ms: int) -> None:
        wait.tier, wait.because, wait.since_ms = tier, because, now_ms
        wait.paused_ms = self._paused(tier, now_ms)

    def _paused(self, tier: Tier, now_ms: int) -> int:
        since_ms = self._paused_since_ms.get(tier)
        return self._paused_ms[tier] + (0 if since_ms is None else now_ms - since_ms)


@dataclass(frozen=True, kw_only=True)
class Started:
    """What came of a job's waiting."""

    held_ms: Mapping[HeldBecause, int]
    """Time in which it was not eligible, by why."""
    told_ms: int | None
    """How long it was told to wait when it came; None: nothing, or not at all."""


def _eligible(account: Account) -> dict[JobId, Tier]:
    """Return the jobs that an account's caps let start: the oldest in each tier."""
    found: dict[JobId, Tier] = {}
    for tier in Tier:
        free, turn = account.free(tier), account.turn(tier)
        if free > 0 and turn.waiting:
            lanes = [lane.jobs for lane in turn.lanes.values() if lane.jobs]
            oldest = lanes[0] if len(lanes) == 1 else merge(*lanes, key=lambda job: (job.arrival, job.job_id))
            found.update((job.job_id, tier) for job in islice(oldest, free))
    return found
