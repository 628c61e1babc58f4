"""The board: every live job, account and worker of one cell, what happened to them, what should be done.

`apply` is told facts and is the only thing that changes the board. `decide` answers what should be done now
and changes nothing: a batch that fails to commit leaves nothing to undo, and one that commits comes back as
facts.

What only the loop can say is trusted to be said once and in order; an attempt nobody started is a bug. What
comes from outside (a cancel, a plan, a worker's news) may be about something that is not on the board, and
then changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import Enum, auto
from typing import assert_never

from scheduler.policy import retry, status, usage
from scheduler.policy.account import Account
from scheduler.policy.decisions import ChosenBecause, Decision, GiveUp, Start, StartKeys, Stop
from scheduler.policy.events import (
    AccountRestored,
    AttemptFinished,
    AttemptLost,
    AttemptRestored,
    AttemptStarted,
    CancelWanted,
    CellRestored,
    Event,
    FairShare,
    FundsChanged,
    JobGivenUp,
    JobSubmitted,
    LimitsChanged,
    ModelEvicted,
    ModelLoaded,
    RecoveryEnded,
    RefusedBecause,
    StartRefused,
    StopAsked,
    TagsStored,
    TierChanged,
    TierPaused,
    TierResumed,
    UsageReset,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerResumed,
)
from scheduler.policy.fair_queue import FairQueue, Head
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Fit, Job
from scheduler.policy.parameters import Parameters
from scheduler.policy.placement import Fleet, Placement
from scheduler.policy.ranking import Ranking
from scheduler.policy.status import JobStatus
from scheduler.policy.trial import Trial


class _State(Enum):
    WAITING = auto()
    HELD = auto()
    """For funds: out of the order until they change."""
    RUNNING = auto()
    GIVEN_UP = auto()
    """Until that is committed."""


class _Live:
    """A job on the board."""

    __slots__ = ("accepted_ms", "attempt_id", "cancel_wanted", "job", "losses", "state")

    def __init__(self, job: Job, losses: int, accepted_ms: int) -> None:
        self.job = job
        self.losses = losses
        self.accepted_ms = accepted_ms
        self.attempt_id: AttemptId | None = None
        self.cancel_wanted = False
        self.state = _State.WAITING


class _Attempt:
    """A running attempt, with what its charge is corrected by at its end."""

    __slots__ = ("charged_at_ms", "job_id", "predicted_ms", "weight_milli", "worker_id")

    def __init__(
        self, job_id: JobId, worker_id: WorkerId, predicted_ms: int, weight_milli: int, charged_at_ms: int
    ) -> None:
        self.job_id = job_id
        self.worker_id = worker_id
        self.predicted_ms = predicted_ms
        self.weight_milli = weight_milli
        self.charged_at_ms = charged_at_ms


class Board:
    """All live jobs, accounts and workers of one cell. One task owns it."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._accounts: dict[AccountId, Account] = {}
        self._jobs: dict[JobId, _Live] = {}
        self._attempts: dict[AttemptId, _Attempt] = {}
        self._fleet = Fleet()
        # Fast first, wherever tiers are gone through.
        self._queues = {tier: FairQueue(tier, self._accounts, parameters) for tier in (Tier.FAST, Tier.RELAX)}
        self._paused: set[Tier] = set()
        self._held: dict[AccountId, dict[JobId, None]] = {}
        self._to_stop: dict[AttemptId, None] = {}
        self._to_give_up: dict[JobId, str] = {}
        self._unstored: dict[tuple[AccountId, Tier], None] = {}
        self._running = dict.fromkeys(Tier, 0)
        self._not_running: dict[Tier, Ranking[JobId]] = {tier: Ranking() for tier in Tier}
        """Jobs that wait, held ones included, by the time of their acceptance."""
        self._positions: dict[Tier, dict[JobId, int]] = {}
        self._now_ms = 0

    def apply(self, event: Event) -> None:
        """Take note of a fact."""
        self._positions.clear()
        self._now_ms = event.at_ms
        match event:
            case JobSubmitted():
                self._job_submitted(event)
            case AttemptStarted():
                self._attempt_started(event)
            case AttemptFinished():
                self._attempt_ended(event.attempt_id, event.gpu_ms)
            case AttemptLost():
                self._attempt_lost(event)
            case TagsStored():
                if self._accounts[event.account_id].turn(event.tier).tag == event.tag:
                    self._unstored.pop((event.account_id, event.tier), None)
            case StartRefused():
                self._start_refused(event)
            case CancelWanted():
                self._cancel_wanted(event)
            case StopAsked():
                self._to_stop.pop(event.attempt_id, None)
            case JobGivenUp():
                self._forget(self._jobs[event.job_id])
            case TierChanged():
                self._tier_changed(event)
            case FundsChanged():
                self._funds_changed(event)
            case ModelLoaded():
                self._fleet.load(event.worker_id, event.model)
            case ModelEvicted():
                self._fleet.evict(event.worker_id, event.model)
            case WorkerJoined():
                self._fleet.join(event.worker)
            case WorkerLost():
                self._fleet.leave(event.worker_id)
            case WorkerDraining():
                self._fleet.drain(event.worker_id, True)
            case WorkerResumed():
                self._fleet.drain(event.worker_id, False)
            case TierPaused():
                self._paused.add(event.tier)
            case TierResumed():
                self._paused.discard(event.tier)
            case LimitsChanged():
                self._limits_changed(event)
            case UsageReset():
                self._usage_reset(event)
            case CellRestored():
                self._cell_restored(event)
            case AccountRestored():
                self._account_restored(event)
            case AttemptRestored():
                self._attempt_restored(event)
            case RecoveryEnded():
                self._recovery_ended()
            case _:
                assert_never(event)

    def decide(self, now_ms: int) -> list[Decision]:
        """Return what should be done now, in the order it is to be committed. Changes nothing.

        What is not committed, refused or asked before the next call is decided again.
        """
        decisions: list[Decision] = []
        for attempt_id in self._to_stop:
            worker_id = self._attempts[attempt_id].worker_id
            if self._fleet.is_present(worker_id):
                decisions.append(
                    Stop(attempt_id=attempt_id, worker_id=worker_id, reason="Its owner cancelled the job.")
                )
        decisions.extend(GiveUp(job_id=job_id, reason=reason) for job_id, reason in self._to_give_up.items())
        trial = Trial(self._queues, self._fleet, now_ms)
        try:
            for tier, queue in self._queues.items():
                if tier not in self._paused:
                    decisions.extend(self._starts(queue, trial, now_ms))
        finally:
            trial.take_back()
        return decisions

    def status(self, job_id: JobId) -> JobStatus | None:
        """Return why a job has not started; None: it does not wait here."""
        live = self._jobs.get(job_id)
        if live is None or live.state not in (_State.WAITING, _State.HELD):
            return None
        job = live.job
        if job.tier in self._paused:
            return status.tier_paused(job.tier)
        if live.state is _State.HELD:
            return status.FUNDS
        position = self._places(job.tier).get(job_id)
        if position is not None:
            return status.waiting_for_gpu(job.tier, position)
        lack = self._fleet.lacks(job.fit, draining_count=False)
        return status.CONCURRENCY_LIMIT if lack is None else status.no_worker(lack)

    def statuses(self, job_ids: Iterable[JobId]) -> dict[JobId, JobStatus]:
        """Return the status of each of these jobs that waits here.

        The places of a tier are sorted once after an event, so many cost little more than one.
        """
        found = ((job_id, self.status(job_id)) for job_id in job_ids)
        return {job_id: one for job_id, one in found if one is not None}

    def could_ever_run(self, model: str, memory_bytes: int, predicted_ms: int) -> str | None:
        """Return what this fleet lacks for such a job, as a sentence; None: it may be accepted.

        Without any worker nothing is lacking: some are about to join, and what they can run is not known.
        """
        if predicted_ms > self._parameters.max_predicted_ms:
            return (
                f"It would take about {predicted_ms / 1000:.0f} GPU-seconds; "
                f"one job may take {self._parameters.max_predicted_ms / 1000:.0f}."
            )
        if self._fleet.is_empty():
            return None
        return self._fleet.lacks(Fit(model, memory_bytes), draining_count=True)

    def unstored_tags(self) -> list[tuple[AccountId, Tier, int | None]]:
        """Return the tags that were set or dropped by the board itself and are not known to be stored.

        The loop writes them in its next transaction before the charges of that batch, then applies
        `TagsStored` for each before the batch's `AttemptStarted`.
        """
        return [
            (account_id, tier, self._accounts[account_id].turn(tier).tag)
            for account_id, tier in self._unstored
        ]

    def share(self, account_id: AccountId, tier: Tier) -> FairShare:
        """Return what the fair queue remembers of an account, as the database has it."""
        return self._accounts[account_id].share(tier)

    def virtual_time(self, tier: Tier) -> int:
        """Return the largest start tag served so far in a tier, aged starts apart."""
        return self._queues[tier].virtual_time

    def knows_account(self, account_id: AccountId) -> bool:
        """Return whether the account was restored; if not, it must be before its first job."""
        return account_id in self._accounts

    def queued(self, tier: Tier) -> int:
        """Return how many jobs wait, whatever holds them."""
        return len(self._not_running[tier])

    def running(self, tier: Tier) -> int:
        """Return how many attempts run."""
        return self._running[tier]

    def oldest_arrival_ms(self, tier: Tier) -> int | None:
        """Return when the oldest waiting job was accepted; None: none waits."""
        oldest = self._not_running[tier].first()
        return None if oldest is None else oldest[0]

    def accounts_held(self) -> list[AccountId]:
        """Return the accounts with jobs that wait for funds."""
        return list(self._held)

    def idle_workers(self) -> int:
        """Return how many workers could start a job now."""
        return self._fleet.idle()

    # -- planning -----------------------------------------------------------------------------------

    def _starts(self, queue: FairQueue, trial: Trial, now_ms: int) -> list[Start]:
        starts: list[Start] = []
        fits = queue.fits() if self._fleet.idle() else []
        while fits:
            head = queue.choose(fits, now_ms)
            if head is None:
                break
            placement = self._fleet.place(head.job.fit)
            if placement is None:
                fits.remove(head.job.fit)
                continue
            if not placement.warm and head.because is ChosenBecause.FIRST_IN_ORDER:
                head, placement = self._to_save_a_load(queue, fits, head, placement)
            start = Start(
                job_id=head.job.job_id,
                account_id=head.account.account_id,
                tier=queue.tier,
                worker_id=placement.worker_id,
                charge=queue.charge(head, now_ms),
                keys=StartKeys(
                    because=head.because,
                    chosen=queue.standing(head, now_ms),
                    runner_up=queue.runner_up(fits, head.account.account_id, now_ms),
                    virtual_time=queue.virtual_time,
                ),
                warm=placement.warm,
            )
            starts.append(start)
            trial.start(head, start)
        return starts

    def _to_save_a_load(
        self, queue: FairQueue, fits: list[Fit], first: Head, cold: Placement
    ) -> tuple[Head, Placement]:
        """Return a job that the worker has the model for, if one is close enough behind the first."""
        loaded = self._fleet.warm_models(cold.worker_id)
        warm_fits = [
            fit for fit in fits if fit.model in loaded and self._fleet.can_run_on(cold.worker_id, fit)
        ]
        warm = queue.choose_warm(warm_fits, first)
        if warm is None:
            return first, cold
        placement = self._fleet.place(warm.job.fit)
        assert placement is not None
        return warm, placement

    # -- facts about jobs ---------------------------------------------------------------------------

    def _job_submitted(self, event: JobSubmitted) -> None:
        if event.job.job_id in self._jobs:
            return
        accepted_ms = event.at_ms if event.accepted_ms is None else event.accepted_ms
        live = self._jobs[event.job.job_id] = _Live(event.job, event.losses, accepted_ms)
        self._wait(live)

    def _wait(self, live: _Live) -> None:
        """Put a job in its account's lane, unless it was lost too often."""
        job = live.job
        self._not_running[job.tier].put((live.accepted_ms, job.job_id))
        reason = retry.give_up_reason(live.losses, self._parameters)
        if reason is not None:
            live.state = _State.GIVEN_UP
            self._to_give_up[job.job_id] = reason
            return
        live.state = _State.WAITING
        account = self._accounts[job.account_id]
        account.turn(job.tier).add(job)
        self._reconcile(account)

    def _leave(self, live: _Live) -> None:
        """Take a job that does not run out of the order, or off what keeps it out."""
        job = live.job
        match live.state:
            case _State.WAITING:
                account = self._accounts[job.account_id]
                account.turn(job.tier).remove(job)
                self._reconcile(account)
            case _State.HELD:
                held = self._held[job.account_id]
                del held[job.job_id]
                if not held:
                    del self._held[job.account_id]
            case _State.GIVEN_UP:
                del self._to_give_up[job.job_id]
            case _State.RUNNING:
                raise AssertionError("a running job leaves by the end of its attempt")

    def _forget(self, live: _Live) -> None:
        self._leave(live)
        self._not_running[live.job.tier].discard(live.job.job_id)
        del self._jobs[live.job.job_id]

    def _cancel_wanted(self, event: CancelWanted) -> None:
        live = self._jobs.get(event.job_id)
        if live is None or live.cancel_wanted:
            return
        if live.state is not _State.RUNNING:
            self._forget(live)
            return
        assert live.attempt_id is not None
        live.cancel_wanted = True
        self._to_stop[live.attempt_id] = None

    def _tier_changed(self, event: TierChanged) -> None:
        live = self._jobs.get(event.job_id)
        if live is None or live.job.tier is event.tier:
            return
        self._leave(live)
        self._not_running[live.job.tier].discard(event.job_id)
        live.job = replace(live.job, tier=event.tier)
        self._wait(live)

    def _start_refused(self, event: StartRefused) -> None:
        live = self._jobs[event.job_id]
        assert live.state is _State.WAITING
        match event.reason:
            case RefusedBecause.GONE:
                self._forget(live)
            case RefusedBecause.FUNDS:
                self._leave(live)
                live.state = _State.HELD
                self._held.setdefault(live.job.account_id, {})[live.job.job_id] = None

    def _funds_changed(self, event: FundsChanged) -> None:
        for job_id in self._held.pop(event.account_id, ()):
            self._wait(self._jobs[job_id])

    # -- facts about attempts -----------------------------------------------------------------------

    def _attempt_started(self, event: AttemptStarted) -> None:
        live, charge = self._jobs[event.job_id], event.charge
        assert live.state is _State.WAITING
        job = live.job
        account = self._accounts[job.account_id]
        self._run(
            live,
            event.attempt_id,
            _Attempt(
                job.job_id, event.worker_id, charge.predicted_ms, charge.weight_milli, charge.charged_at_ms
            ),
        )
        self._not_running[job.tier].discard(job.job_id)
        self._queues[job.tier].start(account, job, charge)
        self._reconcile(account)

    def _attempt_restored(self, event: AttemptRestored) -> None:
        job = event.job
        assert job.job_id not in self._jobs
        live = self._jobs[job.job_id] = _Live(job, event.losses, event.accepted_ms)
        account = self._accounts[job.account_id]
        self._run(
            live,
            event.attempt_id,
            _Attempt(
                job.job_id, event.worker_id, event.predicted_ms, event.weight_milli, event.charged_at_ms
            ),
        )
        account.count(job.tier, 1)
        self._reconcile(account)

    def _run(self, live: _Live, attempt_id: AttemptId, attempt: _Attempt) -> None:
        assert attempt_id not in self._attempts
        live.state, live.attempt_id = _State.RUNNING, attempt_id
        self._attempts[attempt_id] = attempt
        self._fleet.occupy(attempt.worker_id, attempt_id)
        self._running[live.job.tier] += 1

    def _attempt_lost(self, event: AttemptLost) -> None:
        live = self._attempt_ended(event.attempt_id, 0)
        if live.cancel_wanted:
            return
        live.attempt_id = None
        live.losses += event.executed
        self._jobs[live.job.job_id] = live
        self._wait(live)

    def _attempt_ended(self, attempt_id: AttemptId, gpu_ms: int) -> _Live:
        attempt = self._attempts.pop(attempt_id)
        live = self._jobs.pop(attempt.job_id)
        job = live.job
        account = self._accounts[job.account_id]
        self._to_stop.pop(attempt_id, None)
        self._fleet.release(attempt.worker_id)
        self._running[job.tier] -= 1
        account.count(job.tier, -1)
        account.correct(
            job.tier,
            usage.correction(
                tier=job.tier,
                predicted_ms=attempt.predicted_ms,
                weight_milli=attempt.weight_milli,
                charged_at_ms=attempt.charged_at_ms,
                actual_ms=gpu_ms,
                decay_origin_ms=self._queues[Tier.RELAX].decay_origin_ms,
                parameters=self._parameters,
            ),
        )
        self._reconcile(account)
        return live

    # -- facts about accounts and the cell ----------------------------------------------------------

    def _reconcile(self, account: Account) -> None:
        for tier, queue in self._queues.items():
            if queue.reconcile(account, self._now_ms):
                self._unstored[account.account_id, tier] = None

    def _limits_changed(self, event: LimitsChanged) -> None:
        assert event.weight_milli > 0
        account = self._accounts.get(event.account_id)
        if account is not None:
            account.limits, account.weight_milli = event.limits, event.weight_milli
            self._reconcile(account)

    def _usage_reset(self, event: UsageReset) -> None:
        account = self._accounts.get(event.account_id)
        if account is not None:
            account.usage = 0.0
            self._reconcile(account)

    def _cell_restored(self, event: CellRestored) -> None:
        self._queues[event.tier].virtual_time = event.virtual_time
        if event.tier is Tier.RELAX:
            for queue in self._queues.values():
                queue.decay_origin_ms = event.decay_origin_ms

    def _account_restored(self, event: AccountRestored) -> None:
        assert event.account_id not in self._accounts
        assert event.weight_milli > 0
        account = Account(event.account_id, event.limits, event.weight_milli)
        for tier, share in event.shares.items():
            turn = account.turn(tier)
            turn.finish_tag, turn.restored_tag = share.finish_tag, share.tag
        if Tier.RELAX in event.shares:
            account.usage = event.shares[Tier.RELAX].usage
        self._accounts[event.account_id] = account

    def _recovery_ended(self) -> None:
        for account in self._accounts.values():
            for tier in self._queues:
                turn = account.turn(tier)
                if turn.restored_tag is not None:
                    turn.restored_tag = None
                    self._unstored[account.account_id, tier] = None

    def _places(self, tier: Tier) -> dict[JobId, int]:
        places = self._positions.get(tier)
        if places is None:
            places = status.positions(self._queues[tier], self._accounts.values(), self._fleet, self._now_ms)
            self._positions[tier] = places
        return places
