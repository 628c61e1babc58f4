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
from typing import NamedTuple, assert_never

from scheduler.policy import retry, status, usage
from scheduler.policy.account import Account
from scheduler.policy.attempt import Attempt
from scheduler.policy.cell import Cell, Live, State
from scheduler.policy.decisions import (
    Decision,
)
from scheduler.policy.demand import TierLoad, tier_load
from scheduler.policy.events import (
    AccountRestored,
    AttemptDrawn,
    AttemptFinished,
    AttemptLost,
    AttemptMigrated,
    AttemptParked,
    AttemptRestored,
    AttemptResumed,
    AttemptStarted,
    CancelWanted,
    CellRestored,
    CheckpointSaved,
    Event,
    FairShare,
    FundsChanged,
    JobGivenUp,
    JobSubmitted,
    LimitsChanged,
    MemoryOutgrown,
    MigrationRefused,
    ModelEvicted,
    ModelLoaded,
    OrderKnown,
    RecoveryEnded,
    RefusedBecause,
    StartRefused,
    StopAsked,
    TagsStored,
    TierChanged,
    TierPaused,
    TierResumed,
    UsageReset,
    WaitingRestored,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerResumed,
)
from scheduler.policy.explain import Explanation, explain
from scheduler.policy.facts import facts
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier
from scheduler.policy.job import Fit, Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.placement import Hands
from scheduler.policy.planning import Plan
from scheduler.policy.preemption import parkable, relax_floor
from scheduler.policy.status import JobStatus

_ABSENT = object()
_NO_JOB = JobId("")


class Sharing(NamedTuple):
    """How the tiers share the GPUs of workers that take jobs."""

    gpus: int
    idle: int
    """Those that have nothing to do, or only a parked run."""
    fast: int
    """Those whose active attempt is a fast one."""
    relax_floor: int
    """What fast leaves to relax while relax work waits or is parked."""


class Board:
    """All live jobs, accounts and workers of one cell. One task owns it."""

    def __init__(self, parameters: Parameters) -> None:
        self._cell = Cell(parameters)

    @property
    def cell(self) -> Cell:
        """What the board knows, for questions that need much of it; only the board changes it."""
        return self._cell

    def apply(self, event: Event) -> None:
        """Take note of a fact."""
        self._cell.positions.clear()
        self._cell.now_ms = event.at_ms
        match event:
            case JobSubmitted():
                self._job_submitted(event)
            case AttemptStarted():
                self._attempt_started(event)
            case AttemptParked():
                self._attempt_parked(event)
            case AttemptResumed():
                self._attempt_resumed(event)
            case AttemptDrawn():
                self._attempt_drawn(event)
            case AttemptMigrated():
                self._attempt_migrated(event)
            case MigrationRefused():
                self._cell.attempts[event.attempt_id].checkpoint = None
            case CheckpointSaved():
                self._checkpoint_saved(event)
            case AttemptFinished():
                self._attempt_ended(event.attempt_id, event.gpu_ms)
            case MemoryOutgrown():
                self._memory_outgrown(event)
            case AttemptLost():
                self._attempt_lost(event)
            case TagsStored():
                if self._cell.accounts[event.account_id].turn(event.tier).tag == event.tag:
                    self._cell.unstored.pop((event.account_id, event.tier), None)
            case StartRefused():
                self._start_refused(event)
            case CancelWanted():
                self._cancel_wanted(event)
            case StopAsked():
                self._cell.to_stop.pop(event.attempt_id, None)
            case JobGivenUp():
                self._forget(self._cell.jobs[event.job_id])
            case TierChanged():
                self._tier_changed(event)
            case FundsChanged():
                self._funds_changed(event)
            case ModelLoaded():
                self._cell.fleet.load(event.worker_id, event.model)
            case ModelEvicted():
                self._cell.fleet.evict(event.worker_id, event.model)
            case WorkerJoined():
                self._worker_joined(event)
            case WorkerLost():
                self._cell.fleet.leave(event.worker_id)
            case WorkerDraining():
                self._cell.fleet.drain(event.worker_id, True)
            case WorkerResumed():
                self._cell.fleet.drain(event.worker_id, False)
            case TierPaused():
                self._cell.paused.add(event.tier)
            case TierResumed():
                self._cell.paused.discard(event.tier)
            case LimitsChanged():
                self._limits_changed(event)
            case UsageReset():
                self._usage_reset(event)
            case CellRestored():
                self._cell_restored(event)
            case AccountRestored():
                self._account_restored(event)
            case WaitingRestored():
                self._waiting_restored(event)
            case AttemptRestored():
                self._attempt_restored(event)
            case OrderKnown():
                self._cell.queues[event.tier].edge = event.edge
            case RecoveryEnded():
                self._recovery_ended()
            case _:
                assert_never(event)

    def decide(self, now_ms: int) -> list[Decision]:
        """Return what should be done now, in the order it is to be committed. Changes nothing.

        What is not committed, refused or asked before the next call is decided again. While the order is not
        known to its end (`OrderKnown`), what is returned is the beginning of what it would be if it were:
        nobody starts whom one that is yet to be read may come before.
        """
        return Plan(self._cell, now_ms).decisions()

    @property
    def is_whole(self) -> bool:
        """Whether all that waits is on the board, and not still being read after a restart."""
        return all(queue.edge is None for queue in self._cell.queues.values())

    def facts(self, now_ms: int) -> list[Event]:
        """Return events that make a board like this one, for whoever rolls a copy of it forward."""
        return facts(self._cell, now_ms)

    def status(self, job_id: JobId) -> JobStatus | None:
        """Return why a job has not started; None: it does not wait here."""
        return status.status(self._cell, job_id)

    def waiting_job(self, job_id: JobId) -> Job | None:
        """Return a job that waits, held ones included; None: it does not wait here."""
        live = self._cell.jobs.get(job_id)
        return live.job if live is not None and live.state in (State.WAITING, State.HELD) else None

    def whose(self, event: Event) -> AccountId | None:
        """Return the account of the live job that an event is about which says only which job; None: of none.

        To be asked before the board is told, which may forget it.
        """
        live = self._cell.jobs.get(getattr(event, "job_id", _NO_JOB))
        return None if live is None else live.job.account_id

    def explain(self, job_id: JobId, now_ms: int) -> Explanation | None:
        """Return why a live job is where it is; None: it is not on the board."""
        return explain(self._cell, job_id, now_ms)

    def load(self, tier: Tier, now_ms: int) -> TierLoad:
        """Return the work of a tier, by which the fleet is sized."""
        return tier_load(self._cell, tier, now_ms)

    def sharing(self) -> Sharing:
        """Return how the tiers share the GPUs."""
        fleet = self._cell.fleet
        return Sharing(
            gpus=fleet.taking,
            idle=fleet.idle,
            fast=fleet.fast_held,
            relax_floor=relax_floor(fleet.taking, self._cell.parameters),
        )

    def held(self, tier: Tier) -> int:
        """Return how many jobs wait for funds. O(these)."""
        held = (job_id for jobs in self._cell.held.values() for job_id in jobs)
        return sum(self._cell.jobs[job_id].job.tier is tier for job_id in held)

    def statuses(self, job_ids: Iterable[JobId]) -> dict[JobId, JobStatus]:
        """Return the status of each of these jobs that waits here.

        The places of a tier are sorted once after an event, so many cost little more than one; beyond 2,000
        they are told by the counts of tags, in no time and nearly right.
        """
        found = ((job_id, self.status(job_id)) for job_id in job_ids)
        return {job_id: one for job_id, one in found if one is not None}

    def could_ever_run(self, model: str, memory_bytes: int, predicted_ms: int) -> str | None:
        """Return what this fleet lacks for such a job, as a sentence; None: it may be accepted.

        Without any worker nothing is lacking: some are about to join, and what they can run is not known.
        """
        if predicted_ms > self._cell.parameters.max_predicted_ms:
            return (
                f"It would take about {predicted_ms / 1000:.0f} GPU-seconds; "
                f"one job may take {self._cell.parameters.max_predicted_ms / 1000:.0f}."
            )
        if self._cell.fleet.is_empty():
            return None
        return self._cell.fleet.lacks(Fit(model, memory_bytes), draining_count=True)

    def has_memory(self, model: str, memory_bytes: int) -> bool:
        """Return whether a worker that could load a model, though it may drain, has this much memory."""
        return self._cell.fleet.lacks(Fit(model, memory_bytes), draining_count=True) is None

    def unstored_tags(self) -> list[tuple[AccountId, Tier, int | None]]:
        """Return the tags that were set or dropped by the board itself and are not known to be stored.

        The loop writes them in its next transaction before the charges of that batch, then applies
        `TagsStored` for each before the batch's `AttemptStarted`.
        """
        return [
            (account_id, tier, self._cell.accounts[account_id].turn(tier).tag)
            for account_id, tier in self._cell.unstored
        ]

    def share(self, account_id: AccountId, tier: Tier) -> FairShare:
        """Return what the fair queue remembers of an account, as the database has it."""
        return self._cell.accounts[account_id].share(tier)

    def limits(self, account_id: AccountId) -> Limits:
        """Return what an account may run at once, as the board was told last."""
        return self._cell.accounts[account_id].limits

    def virtual_time(self, tier: Tier) -> int:
        """Return the largest point of a tier that a start was charged from, aged starts apart."""
        return self._cell.queues[tier].virtual_time

    def knows_account(self, account_id: AccountId) -> bool:
        """Return whether the account was restored; if not, it must be before its first job."""
        return account_id in self._cell.accounts

    def queued(self, tier: Tier) -> int:
        """Return how many jobs wait, whatever holds them."""
        return len(self._cell.not_running[tier])

    def running(self, tier: Tier) -> int:
        """Return how many attempts run, parked ones included."""
        return self._cell.running[tier]

    def parked(self) -> int:
        """Return how many relax runs are parked."""
        return len(self._cell.parked)

    def oldest_arrival_ms(self, tier: Tier) -> int | None:
        """Return when the oldest waiting job was accepted, to a tenth of a second; None: none waits."""
        return self._cell.not_running[tier].first_ms()

    def accounts_held(self) -> list[AccountId]:
        """Return the accounts with jobs that wait for funds."""
        return list(self._cell.held)

    def idle_workers(self) -> int:
        """Return how many workers could start a job now."""
        return self._cell.fleet.idle

    # -- facts about jobs ---------------------------------------------------------------------------

    def _job_submitted(self, event: JobSubmitted) -> None:
        if event.job.job_id in self._cell.jobs:
            return
        accepted_ms = event.at_ms if event.accepted_ms is None else event.accepted_ms
        live = self._cell.jobs[event.job.job_id] = Live(
            event.job, event.losses, accepted_ms, event.checkpoint
        )
        self._wait(live)

    def _waiting_restored(self, event: WaitingRestored) -> None:
        account, jobs = self._cell.accounts[event.account_id], self._cell.jobs
        known = len(jobs)
        for job, losses, accepted_ms, checkpoint in event.jobs:
            live = jobs[job.job_id] = Live(job, losses, accepted_ms, checkpoint)
            if self._admit(live):
                account.turn(job.tier).add(job)
        assert len(jobs) == known + len(event.jobs), "none of them was on the board"
        self._reconcile(account)

    def _admit(self, live: Live) -> bool:
        """Put a job among those that do not run; returns whether it may start: it was not lost too often."""
        job = live.job
        self._cell.not_running[job.tier].add(live.accepted_ms)
        reason = retry.give_up_reason(live.losses, self._cell.parameters)
        if reason is not None:
            live.state = State.GIVEN_UP
            self._cell.to_give_up[job.job_id] = reason
            return False
        live.state = State.WAITING
        return True

    def _wait(self, live: Live) -> None:
        """Put a job in its account's lane, unless it was lost too often."""
        if self._admit(live):
            self._join(live)

    def _join(self, live: Live) -> None:
        job = live.job
        account = self._cell.accounts[job.account_id]
        if self._cell.queues[job.tier].join(account, job, self._cell.now_ms):
            self._cell.unstored[account.account_id, job.tier] = None
        if account.parkable:
            self._rank_parkable(account)

    def _leave(self, live: Live) -> None:
        """Take a job that does not run out of the order, or off what keeps it out."""
        job = live.job
        match live.state:
            case State.WAITING:
                account = self._cell.accounts[job.account_id]
                account.turn(job.tier).remove(job)
                self._reconcile(account)
            case State.HELD:
                held = self._cell.held[job.account_id]
                del held[job.job_id]
                if not held:
                    del self._cell.held[job.account_id]
            case State.GIVEN_UP:
                del self._cell.to_give_up[job.job_id]
            case State.RUNNING:
                raise AssertionError("a running job leaves by the end of its attempt")

    def _forget(self, live: Live) -> None:
        self._leave(live)
        self._cell.not_running[live.job.tier].remove(live.accepted_ms)
        del self._cell.jobs[live.job.job_id]

    def _cancel_wanted(self, event: CancelWanted) -> None:
        live = self._cell.jobs.get(event.job_id)
        if live is None or live.cancel_wanted:
            return
        if live.state is not State.RUNNING:
            self._forget(live)
            return
        assert live.attempt_id is not None
        live.cancel_wanted = True
        self._cell.to_stop[live.attempt_id] = None

    def _tier_changed(self, event: TierChanged) -> None:
        live = self._cell.jobs.get(event.job_id)
        # One whose loss is in the database and not yet here runs here still; its next start is refused then.
        if live is None or live.state is State.RUNNING:
            return
        if live.job.tier is not event.tier:
            self._move(live, event.tier)

    def _move(self, live: Live, tier: Tier) -> None:
        self._leave(live)
        self._cell.not_running[live.job.tier].remove(live.accepted_ms)
        live.job = replace(live.job, tier=tier)
        # It begins anew: what was drawn in one tier is not paid for in the other.
        live.checkpoint = None
        self._wait(live)

    def _start_refused(self, event: StartRefused) -> None:
        live = self._cell.jobs[event.job_id]
        assert live.state is State.WAITING
        match event.reason:
            case RefusedBecause.GONE:
                self._forget(live)
            case RefusedBecause.MOVED:
                self._move(live, Tier.RELAX if live.job.tier is Tier.FAST else Tier.FAST)
            case RefusedBecause.FUNDS:
                self._leave(live)
                live.state = State.HELD
                self._cell.held.setdefault(live.job.account_id, {})[live.job.job_id] = None

    def _funds_changed(self, event: FundsChanged) -> None:
        for job_id in self._cell.held.pop(event.account_id, ()):
            live = self._cell.jobs[job_id]
            live.state = State.WAITING
            self._join(live)

    # -- facts about attempts -----------------------------------------------------------------------

    def _attempt_started(self, event: AttemptStarted) -> None:
        live, charge = self._cell.jobs[event.job_id], event.charge
        assert live.state is State.WAITING
        job = live.job
        account = self._cell.accounts[job.account_id]
        attempt = Attempt(
            event.attempt_id,
            job,
            event.worker_id,
            predicted_ms=charge.predicted_ms,
            weight_milli=charge.weight_milli,
            charged_at_ms=charge.charged_at_ms,
            started_ms=event.at_ms,
        )
        attempt.sheltered = event.sheltered
        checkpoint = live.checkpoint
        if (
            checkpoint is not None
            and self._cell.fleet.is_present(event.worker_id)
            and self._cell.fleet.device(event.worker_id) == checkpoint.device
        ):
            attempt.left_ms = max(0, attempt.left_ms - checkpoint.kept_ms)
            attempt.checkpoint = checkpoint
        self._cell.not_running[job.tier].remove(live.accepted_ms)
        self._cell.running[job.tier] += 1
        if event.sheltered:
            self._cell.fast_since_relax_turn = 0
        elif job.tier is Tier.FAST:
            self._cell.fast_since_relax_turn += 1
        self._cell.queues[job.tier].start(account, job, charge)
        self._run(live, attempt)
        self._reconcile(account)

    def _attempt_restored(self, event: AttemptRestored) -> None:
        job = event.job
        assert job.job_id not in self._cell.jobs
        live = self._cell.jobs[job.job_id] = Live(job, event.losses, event.accepted_ms, event.checkpoint)
        account = self._cell.accounts[job.account_id]
        attempt = Attempt(
            event.attempt_id,
            job,
            event.worker_id,
            predicted_ms=event.predicted_ms,
            weight_milli=event.weight_milli,
            charged_at_ms=event.charged_at_ms,
            started_ms=event.started_ms,
        )
        attempt.parks, attempt.sheltered = event.parks, event.sheltered
        attempt.checkpoint = event.checkpoint
        until_ms = event.at_ms if event.parked_since_ms is None else event.parked_since_ms
        attempt.left_ms = max(0, event.predicted_ms - (until_ms - event.started_ms))
        account.count(job.tier, 1)
        self._cell.running[job.tier] += 1
        attempt.drawn = event.drawn
        self._run(live, attempt, parked_since_ms=event.parked_since_ms)
        self._reconcile(account)

    def _run(self, live: Live, attempt: Attempt, parked_since_ms: int | None = None) -> None:
        attempt_id = attempt.attempt_id
        assert attempt_id not in self._cell.attempts
        live.state, live.attempt_id = State.RUNNING, attempt_id
        self._cell.attempts[attempt_id] = attempt
        hands = self._cell.fleet.hands(attempt.worker_id)
        if attempt.drawn:
            attempt.ends_ms = self._cell.now_ms
            return
        if parked_since_ms is None:
            assert hands.active is None, "a worker runs at most one attempt"
            self._get_gpu(attempt)
        else:
            assert hands.parked is None, "at most one run is parked on a worker"
            attempt.parked_since_ms = parked_since_ms
            self._put_with_parked(attempt, parked_since_ms)
            self._cell.fleet.set_hands(attempt.worker_id, hands._replace(parked=attempt_id))

    def _put_with_parked(self, attempt: Attempt, since_ms: int) -> None:
        # A worker that has not joined yet after a recovery has not said what it is, but the checkpoint does.
        device = "" if attempt.checkpoint is None else attempt.checkpoint.device
        if self._cell.fleet.is_present(attempt.worker_id):
            device = self._cell.fleet.device(attempt.worker_id)
        self._cell.parked.put(attempt, device, since_ms)

    def _get_gpu(self, attempt: Attempt) -> None:
        worker_id = attempt.worker_id
        attempt.gets_gpu(self._cell.now_ms, self._cell.fleet.speed_permille(worker_id))
        fast = attempt.job.tier is Tier.FAST
        self._cell.fleet.set_hands(
            worker_id, self._cell.fleet.hands(worker_id)._replace(active=attempt.attempt_id, fast=fast)
        )
        if not fast and not attempt.sheltered:
            account = self._cell.accounts[attempt.job.account_id]
            account.parkable[attempt.attempt_id] = attempt
            self._rank_parkable(account)

    def _lose_gpu(self, attempt: Attempt) -> None:
        """Take an attempt off its worker, parked or not. One that is drawn is off it already."""
        if attempt.drawn:
            return
        hands = self._cell.fleet.hands(attempt.worker_id)
        if attempt.parked_since_ms is None:
            self._cell.fleet.set_hands(attempt.worker_id, hands._replace(active=None, fast=False))
            self._cell.accounts[attempt.job.account_id].parkable.pop(attempt.attempt_id, None)
        else:
            self._cell.parked.discard(attempt.attempt_id)
            self._cell.fleet.set_hands(attempt.worker_id, hands._replace(parked=None))

    def _attempt_parked(self, event: AttemptParked) -> None:
        attempt = self._cell.attempts[event.attempt_id]
        assert attempt.is_relax, "only relax runs are parked"
        assert attempt.parked_since_ms is None, "it is parked already"
        assert self._cell.fleet.hands(attempt.worker_id).parked is None, (
            "at most one run is parked on a worker"
        )
        self._lose_gpu(attempt)
        attempt.is_parked(event.at_ms, self._cell.fleet.speed_permille(attempt.worker_id))
        self._put_with_parked(attempt, event.at_ms)
        self._cell.fleet.set_hands(attempt.worker_id, Hands(parked=attempt.attempt_id))

    def _attempt_resumed(self, event: AttemptResumed) -> None:
        attempt = self._cell.attempts[event.attempt_id]
        assert attempt.parked_since_ms is not None, "it is not parked"
        assert self._cell.fleet.hands(attempt.worker_id).active is None, "a worker runs at most one attempt"
        if event.sheltered and not attempt.sheltered:
            attempt.sheltered = True
            self._cell.fast_since_relax_turn = 0
        self._lose_gpu(attempt)
        self._get_gpu(attempt)

    def _attempt_drawn(self, event: AttemptDrawn) -> None:
        attempt = self._cell.attempts[event.attempt_id]
        assert not attempt.drawn, "it is drawn already"
        assert attempt.parked_since_ms is None, "a parked run draws nothing"
        self._lose_gpu(attempt)
        attempt.drawn, attempt.ends_ms = True, event.at_ms

    def _attempt_migrated(self, event: AttemptMigrated) -> None:
        attempt = self._cell.attempts.pop(event.attempt_id)
        assert attempt.parked_since_ms is not None, "only parked runs migrate"
        live = self._cell.jobs[attempt.job.job_id]
        self._lose_gpu(attempt)
        moved = Attempt(
            event.to_attempt_id,
            attempt.job,
            event.worker_id,
            predicted_ms=attempt.predicted_ms,
            weight_milli=attempt.weight_milli,
            charged_at_ms=attempt.charged_at_ms,
            started_ms=event.at_ms,
        )
        moved.parks, moved.sheltered = attempt.parks, attempt.sheltered
        moved.left_ms, moved.checkpoint = attempt.left_ms, attempt.checkpoint
        if self._cell.to_stop.pop(event.attempt_id, _ABSENT) is not _ABSENT or live.cancel_wanted:
            self._cell.to_stop[event.to_attempt_id] = None
        self._run(live, moved)
        self._reconcile(self._cell.accounts[attempt.job.account_id])

    def _checkpoint_saved(self, event: CheckpointSaved) -> None:
        attempt = self._cell.attempts.get(event.attempt_id)
        if attempt is not None:
            attempt.checkpoint = event.checkpoint
            self._cell.jobs[attempt.job.job_id].checkpoint = event.checkpoint

    def _memory_outgrown(self, event: MemoryOutgrown) -> None:
        live = self._cell.jobs[event.job_id]
        assert live.state is State.RUNNING, "it waits by what it needs, so that may not change meanwhile"
        live.job = live.job.needing(event.memory_bytes)

    def _attempt_lost(self, event: AttemptLost) -> None:
        live = self._attempt_ended(event.attempt_id, 0)
        if live.cancel_wanted:
            return
        live.attempt_id = None
        live.losses += event.executed
        self._cell.jobs[live.job.job_id] = live
        self._wait(live)

    def _attempt_ended(self, attempt_id: AttemptId, gpu_ms: int) -> Live:
        attempt = self._cell.attempts.pop(attempt_id)
        live = self._cell.jobs.pop(attempt.job.job_id)
        job = live.job
        account = self._cell.accounts[job.account_id]
        self._cell.to_stop.pop(attempt_id, None)
        self._lose_gpu(attempt)
        self._cell.running[job.tier] -= 1
        account.count(job.tier, -1)
        account.correct(
            job.tier,
            usage.correction(
                tier=job.tier,
                predicted_ms=attempt.predicted_ms,
                weight_milli=attempt.weight_milli,
                charged_at_ms=attempt.charged_at_ms,
                actual_ms=gpu_ms,
                decay_origin_ms=self._cell.queues[Tier.RELAX].decay_origin_ms,
                parameters=self._cell.parameters,
            ),
        )
        self._reconcile(account)
        return live

    def _rank_parkable(self, account: Account) -> None:
        """Rank an account's runs among those that may be parked by the tag it has or would have next."""
        turn = account.relax
        tag = turn.tag
        if tag is None:
            tag = turn.finish_tag + self._cell.queues[Tier.RELAX].memory(account, self._cell.now_ms)
        for attempt in account.parkable.values():
            speed = self._cell.fleet.speed_permille(attempt.worker_id)
            self._cell.fleet.set_parkable(
                attempt.worker_id, parkable(attempt, tag, speed, self._cell.parameters)
            )

    # -- facts about accounts and the cell ----------------------------------------------------------

    def _reconcile(self, account: Account) -> None:
        for tier, queue in self._cell.queues.items():
            if queue.reconcile(account, self._cell.now_ms):
                self._cell.unstored[account.account_id, tier] = None
        if account.parkable:
            self._rank_parkable(account)

    def _limits_changed(self, event: LimitsChanged) -> None:
        assert event.weight_milli > 0
        account = self._cell.accounts.get(event.account_id)
        if account is not None:
            account.limits, account.weight_milli = event.limits, event.weight_milli
            self._reconcile(account)

    def _usage_reset(self, event: UsageReset) -> None:
        account = self._cell.accounts.get(event.account_id)
        if account is not None:
            account.usage = 0.0
            self._reconcile(account)

    def _cell_restored(self, event: CellRestored) -> None:
        self._cell.queues[event.tier].virtual_time = event.virtual_time
        if event.tier is Tier.RELAX:
            for queue in self._cell.queues.values():
                queue.decay_origin_ms = event.decay_origin_ms

    def _account_restored(self, event: AccountRestored) -> None:
        assert event.account_id not in self._cell.accounts
        assert event.weight_milli > 0
        account = Account(event.account_id, event.limits, event.weight_milli)
        for tier, share in event.shares.items():
            turn = account.turn(tier)
            turn.finish_tag, turn.restored_tag = share.finish_tag, share.tag
        if Tier.RELAX in event.shares:
            account.usage = event.shares[Tier.RELAX].usage
        self._cell.accounts[event.account_id] = account

    def _worker_joined(self, event: WorkerJoined) -> None:
        worker_id = event.worker.worker_id
        self._cell.fleet.join(event.worker)
        active = self._cell.fleet.hands(worker_id).active
        if active is not None:
            self._rank_parkable(self._cell.accounts[self._cell.attempts[active].job.account_id])

    def _recovery_ended(self) -> None:
        for queue in self._cell.queues.values():
            queue.edge = None
        for account in self._cell.accounts.values():
            for tier in self._cell.queues:
                turn = account.turn(tier)
                if turn.restored_tag is not None:
                    turn.restored_tag = None
                    self._cell.unstored[account.account_id, tier] = None
