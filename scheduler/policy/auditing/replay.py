"""A second book-keeping, for the auditor: what a journal says happened, told by the records alone.

It knows nothing of how the board decides. It keeps who waits, who may start, what runs where, the tags that
follow from the charges, and the GPU time that each kind of job could have had, so that every wait can be held
against what others were served meanwhile. All of it is O(log n) a record.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from dataclasses import replace

from scheduler.policy import retry, usage
from scheduler.policy.auditing.journal import AccountMet, CellMet, Dispatch, Record
from scheduler.policy.auditing.replay_state import (
    FAST_RUNS,
    NOTHING,
    AccountState,
    Contention,
    Hands,
    Lane,
    Pool,
    Queue,
    Returned,
    Run,
    Slot,
    Turn,
    Waiting,
)
from scheduler.policy.decisions import ChosenBecause
from scheduler.policy.events import (
    AccountRestored,
    AttemptDrawn,
    AttemptFinished,
    AttemptLost,
    AttemptMigrated,
    AttemptParked,
    AttemptRestored,
    AttemptResumed,
    CancelWanted,
    CellRestored,
    Edge,
    FundsChanged,
    JobGivenUp,
    JobSubmitted,
    LimitsChanged,
    MemoryOutgrown,
    OrderKnown,
    RecoveryEnded,
    RefusedBecause,
    StartRefused,
    TierChanged,
    TierPaused,
    TierResumed,
    UsageReset,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerResumed,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Fit
from scheduler.policy.parameters import Parameters
from scheduler.policy.preemption import relax_floor
from scheduler.policy.worker import Worker


class Replay:
    """The cell as the records have it; `apply` each in turn."""

    def __init__(self, parameters: Parameters, starts: int) -> None:
        self.parameters = parameters
        self.now_ms = 0
        self.accounts: dict[AccountId, AccountState] = {}
        self.waiting: dict[JobId, Waiting] = {}
        self.runs: dict[AttemptId, Run] = {}
        self.running_jobs: dict[JobId, AttemptId] = {}
        self.hands: dict[WorkerId, Hands] = {}
        self.queues = {tier: Queue(tier, starts) for tier in (Tier.FAST, Tier.RELAX)}
        self.paused: set[Tier] = set()
        self.recovering = False
        self.edges: dict[Tier, Edge] = {}
        """Of the tiers whose order is not known to its end: what is behind has yet to be read."""
        self.decay_origin_ms = 0
        self.taking = self.fast_held = 0
        self.parked = 0
        self.resumable: set[WorkerId] = set()
        """Present workers that have nothing but a parked run."""
        self.pools: dict[Fit, Pool] = {}
        self._slots: dict[WorkerId, Slot] = {}
        self._told_ms = 0
        self._returned: dict[tuple[int, Fit], list[Returned]] = {}
        self._cancelled: set[JobId] = set()
        self._losses: dict[JobId, int] = {}
        self._due: list[tuple[int, AttemptId, int]] = []

    # -- questions ------------------------------------------------------------------------------------

    @property
    def closed(self) -> Collection[Tier]:
        """Tiers of which nothing has to start: paused ones, and both while one has yet to be read."""
        return tuple(Tier) if self.edges else self.paused

    def at_floor(self) -> bool:
        """Return whether fast holds all that it may while relax waits."""
        return self.fast_held >= self.taking - relax_floor(self.taking, self.parameters)

    def relax_waits(self) -> bool:
        """Return whether relax work only lacks a GPU, or is parked."""
        return self.parked > 0 or (Tier.RELAX not in self.paused and bool(self.queues[Tier.RELAX].contending))

    def lowest(self, queue: Queue, fit: Fit) -> tuple[int, AccountId] | None:
        """Return the smallest known tag of an account with a job of this fit, and whose it is."""
        heap = queue.tags.get(fit)
        while heap:
            tag, account_id = heap[0]
            turn = self.accounts[account_id].turns[queue.tier]
            lane = turn.lanes.get(fit)
            if turn.tag == tag and lane is not None and lane.waiting:
                return heap[0]
            heapq.heappop(heap)
        return None

    def usage_per_weight(self, account: AccountState, at_ms: int) -> float | None:
        """Return an account's decayed use per unit of weight."""
        if account.usage is None:
            return None
        return account.usage / self.growth(at_ms) * 1000 / account.weight_milli

    def growth(self, at_ms: int) -> float:
        return usage.growth(
            at_ms, decay_origin_ms=self.decay_origin_ms, half_life_ms=self.parameters.half_life_ms
        )

    def memory(self, tier: Tier, account: AccountState, at_ms: int) -> int | None:
        """Return what the account's use adds to its next tag; None: its use is not known."""
        if tier is Tier.FAST:
            return 0
        used_ms = self.usage_per_weight(account, at_ms)
        return None if used_ms is None else usage.memory(used_ms, self.parameters)

    def returned_beside(self, account: AccountState, fit: Fit) -> tuple[Returned | None, Returned | None]:
        """Take out an account that is about to be served; return it, and the first that came back beside it.

        None: its tag or its use has changed since, or nobody did.
        """
        key = account.turns[Tier.RELAX].set_virtual, fit
        heap = self._returned.get(key, [])
        mine = None
        while heap:
            first = heap[0]
            if not self._stands(first, fit):
                heapq.heappop(heap)
            elif first.account_id == account.account_id:
                mine = heapq.heappop(heap)
            else:
                break
        other = heap[0] if heap else None
        if mine is None:
            mine = next((one for one in heap if one.account_id == account.account_id), None)
            if mine is not None and not self._stands(mine, fit):
                mine = None
        if not heap:
            self._returned.pop(key, None)
        return mine, other

    def _stands(self, returned: Returned, fit: Fit) -> bool:
        account = self.accounts[returned.account_id]
        turn = account.turns[Tier.RELAX]
        lane = turn.lanes.get(fit)
        return (
            lane is not None
            and lane.waiting > 0
            and turn.set_number == returned.set_number
            and account.usage is not None
            and account.usage * 1000 / account.weight_milli == returned.stored_usage
        )

    def contentions(self) -> Iterator[tuple[AccountState, Tier, Contention]]:
        """Return every wait that has not ended."""
        for account in self.accounts.values():
            for tier, turn in account.turns.items():
                for lane in turn.lanes.values():
                    if lane.contention is not None:
                        yield account, tier, lane.contention

    # -- time -----------------------------------------------------------------------------------------

    def pass_to(self, at_ms: int) -> None:
        """Let time pass: runs that had what they were charged for count no more as service from then on."""
        while self._due and self._due[0][0] < at_ms:
            due_ms, attempt_id, since_ms = heapq.heappop(self._due)
            run = self.runs.get(attempt_id)
            if run is not None and run.active_since_ms == since_ms and not run.over:
                self.now_ms = max(self.now_ms, due_ms)
                run.over = True
                self._changed(run.worker_id)
        self.now_ms = max(self.now_ms, at_ms)

    # -- records --------------------------------------------------------------------------------------

    def apply(self, record: Record) -> None:
        """Take note of a record."""
        self._told_ms = record.at_ms
        match record:
            case Dispatch():
                self._dispatch(record)
            case JobSubmitted():
                self._job_submitted(record)
            case AttemptFinished():
                self._ended(record.attempt_id, record.gpu_ms)
            case MemoryOutgrown():
                attempt_id = self.running_jobs.get(record.job_id)
                if attempt_id is not None:
                    run = self.runs[attempt_id]
                    run.job = run.job.needing(record.memory_bytes)
            case AttemptLost():
                self._lost(record)
            case AttemptParked():
                self._parked(record)
            case AttemptResumed():
                self._resumed(record)
            case AttemptDrawn():
                self._drawn(record)
            case AttemptMigrated():
                self._migrated(record)
            case CancelWanted():
                self._cancel_wanted(record.job_id)
            case JobGivenUp():
                self._forget(record.job_id)
            case StartRefused():
                self._refused(record)
            case FundsChanged():
                self._funds_changed(record.account_id)
            case TierChanged():
                self._move(record.job_id, record.tier)
            case LimitsChanged():
                account = self.accounts.get(record.account_id)
                if account is not None:
                    account.limits, account.weight_milli = record.limits, record.weight_milli
                    account.heaviest_milli = max(account.heaviest_milli, record.weight_milli)
                    self._reconcile(account)
            case UsageReset():
                account = self.accounts.get(record.account_id)
                if account is not None:
                    account.usage = 0.0
            case WorkerJoined():
                self._joined(record.worker)
            case WorkerLost():
                self._left(record.worker_id)
            case WorkerDraining():
                self._drain(record.worker_id, True)
            case WorkerResumed():
                self._drain(record.worker_id, False)
            case TierPaused():
                self._advance_all()
                self.paused.add(record.tier)
            case TierResumed():
                self._advance_all()
                self.paused.discard(record.tier)
            case CellRestored():
                self._cell_restored(record)
            case AccountRestored():
                self._account_restored(record)
            case AccountMet():
                self.accounts[record.account_id] = AccountState(
                    record.account_id, record.limits, record.weight_milli, known=False
                )
            case CellMet():
                self.decay_origin_ms = record.decay_origin_ms
            case AttemptRestored():
                self._attempt_restored(record)
            case OrderKnown():
                self._advance_all()
                if record.edge is None:
                    self.edges.pop(record.tier, None)
                else:
                    self.edges[record.tier] = record.edge
            case RecoveryEnded():
                self._advance_all()
                self.edges.clear()
                self.recovering = False
                for account in self.accounts.values():
                    for turn in account.turns.values():
                        turn.restored_tag = None

    # -- the cell and its accounts --------------------------------------------------------------------

    def _cell_restored(self, record: CellRestored) -> None:
        queue = self.queues[record.tier]
        queue.virtual_time, queue.aged_wait_ms = record.virtual_time, 0
        self.recovering = True
        if record.tier is Tier.RELAX:
            self.decay_origin_ms = record.decay_origin_ms

    def _account_restored(self, record: AccountRestored) -> None:
        account = AccountState(record.account_id, record.limits, record.weight_milli, known=True)
        for tier, share in record.shares.items():
            turn = account.turns[tier]
            turn.finish_tag, turn.restored_tag = share.finish_tag, share.tag
        if Tier.RELAX in record.shares:
            account.usage = record.shares[Tier.RELAX].usage
        self.accounts[record.account_id] = account

    # -- jobs that wait -------------------------------------------------------------------------------

    def _job_submitted(self, record: JobSubmitted) -> None:
        job = record.job
        if job.job_id in self.waiting or job.job_id in self.running_jobs:
            return
        self.accounts[job.account_id].jobs += 1
        self._wait(Waiting(job, record.losses))

    def _wait(self, waiting: Waiting) -> None:
        job = waiting.job
        self.waiting[job.job_id] = waiting
        if retry.give_up_reason(waiting.losses, self.parameters) is not None:
            waiting.held = True
            return
        account = self.accounts[job.account_id]
        turn = account.turns[job.tier]
        turn.waiting += 1
        weight_milli = account.weight_milli if job.tier is Tier.RELAX else usage.FAST_WEIGHT_MILLI
        turn.most_cost = max(turn.most_cost, usage.tag_cost(job.predicted_ms, weight_milli))
        lane = turn.lanes.get(job.fit)
        if lane is None:
            lane = turn.lanes[job.fit] = Lane()
        lane.waiting += 1
        self._reconcile(account)

    def _leave(self, waiting: Waiting) -> None:
        """Take a job out of its lane, if it is in one."""
        if waiting.held:
            return
        job = waiting.job
        account = self.accounts[job.account_id]
        turn = account.turns[job.tier]
        turn.waiting -= 1
        turn.lanes[job.fit].waiting -= 1
        self._reconcile(account)

    def _forget(self, job_id: JobId) -> None:
        waiting = self.waiting.pop(job_id, None)
        if waiting is not None:
            self._leave(waiting)
            self.accounts[waiting.job.account_id].jobs -= 1
            self._losses.pop(job_id, None)

    def _cancel_wanted(self, job_id: JobId) -> None:
        if job_id in self.running_jobs:
            self._cancelled.add(job_id)
        else:
            self._forget(job_id)

    def _refused(self, record: StartRefused) -> None:
        waiting = self.waiting[record.job_id]
        match record.reason:
            case RefusedBecause.GONE:
                self._forget(record.job_id)
            case RefusedBecause.MOVED:
                self._move(record.job_id, Tier.RELAX if waiting.job.tier is Tier.FAST else Tier.FAST)
            case RefusedBecause.FUNDS:
                self._leave(waiting)
                waiting.held = True

    def _funds_changed(self, account_id: AccountId) -> None:
        account = self.accounts.get(account_id)
        if account is None or account.jobs == account.running:
            return
        for waiting in [one for one in self.waiting.values() if one.job.account_id == account_id]:
            if waiting.held:
                waiting.held = False
                self._wait(waiting)

    def _move(self, job_id: JobId, tier: Tier) -> None:
        waiting = self.waiting.get(job_id)
        if waiting is None or waiting.job.tier is tier:
            return
        self._leave(waiting)
        self._wait(Waiting(replace(waiting.job, tier=tier), waiting.losses))

    # -- attempts -------------------------------------------------------------------------------------

    def _dispatch(self, record: Dispatch) -> None:
        started, charge = record.started, record.started.charge
        waiting = self.waiting.pop(started.job_id)
        job = waiting.job
        account = self.accounts[job.account_id]
        turn, queue = account.turns[job.tier], self.queues[job.tier]
        turn.waiting -= 1
        turn.lanes[job.fit].waiting -= 1
        aged = record.keys.because is ChosenBecause.AGED
        before = record.keys.virtual_time if queue.virtual_time is None else queue.virtual_time
        queue.virtual_time = before if aged else max(before, charge.charged_from)
        self.recovering = bool(self.edges)
        if aged:
            queue.aged_wait_ms = (self.parameters.aged_one_in - 1) * charge.predicted_ms
        elif queue.aged_wait_ms is not None:
            queue.aged_wait_ms = max(0, queue.aged_wait_ms - charge.predicted_ms)
        queue.aged += aged
        queue.warm += record.keys.because is ChosenBecause.MODEL_WARM
        queue.most_cost_ms = max(queue.most_cost_ms, charge.predicted_ms)
        queue.served.serve(account.account_id, account.heaviest_milli if job.tier is Tier.RELAX else 1000)

        if account.usage is None and job.tier is Tier.RELAX:
            per_weight = record.keys.chosen.usage_per_weight_ms
            account.usage = per_weight * account.weight_milli / 1000 * self.growth(charge.charged_at_ms)
        if account.usage is not None:
            account.usage += charge.usage_added
        cost = usage.tag_cost(charge.predicted_ms, charge.weight_milli)
        turn.known = True
        turn.finish_tag = charge.finish_tag
        turn.most_cost = max(turn.most_cost, cost)
        turn.most_memory = max(turn.most_memory, self.memory(job.tier, account, started.at_ms) or 0)
        # Where nothing else is known of the next tag, it lies at least its cost ahead.
        reached = charge.finish_tag if charge.next_tag is None else charge.next_tag
        turn.advance += max(cost, reached - charge.start_tag)
        if turn.only_cost_ms is None or turn.only_cost_ms == charge.predicted_ms:
            turn.only_cost_ms = charge.predicted_ms
        else:
            turn.only_cost_ms = 0
        self._close(queue, turn)
        turn.from_virtual = False
        self._set_tag(queue, account, turn, charge.next_tag)

        run = Run(
            started.attempt_id,
            job,
            started.worker_id,
            predicted_ms=charge.predicted_ms,
            weight_milli=charge.weight_milli,
            charged_at_ms=charge.charged_at_ms,
            sheltered=started.sheltered,
        )
        self._losses[job.job_id] = waiting.losses
        self._count(account, job.tier, 1)
        self._begin(run)
        self._reconcile(account)

    def _attempt_restored(self, record: AttemptRestored) -> None:
        job = record.job
        account = self.accounts[job.account_id]
        account.jobs += 1
        run = Run(
            record.attempt_id,
            job,
            record.worker_id,
            predicted_ms=record.predicted_ms,
            weight_milli=record.weight_milli,
            charged_at_ms=record.charged_at_ms,
            sheltered=record.sheltered,
        )
        until_ms = record.at_ms if record.parked_since_ms is None else record.parked_since_ms
        run.spent_ms = max(0, until_ms - record.started_ms)
        run.left_ms = max(0, record.predicted_ms - run.spent_ms)
        self._losses[job.job_id] = record.losses
        queue = self.queues[job.tier]
        queue.most_cost_ms = max(queue.most_cost_ms, record.predicted_ms)
        self._count(account, job.tier, 1)
        run.drawn = record.drawn
        self._begin(run, record.parked_since_ms)
        self._reconcile(account)

    def _count(self, account: AccountState, tier: Tier, change: int) -> None:
        account.running += change
        if tier is Tier.RELAX:
            account.relax_running += change
        account.most_running = max(account.most_running, account.running)

    def _begin(self, run: Run, parked_since_ms: int | None = None) -> None:
        self.runs[run.attempt_id] = run
        self.running_jobs[run.job.job_id] = run.attempt_id
        hands = self.hands.setdefault(run.worker_id, Hands())
        if run.drawn:
            return
        if parked_since_ms is None:
            self._get_gpu(run, hands)
        else:
            run.parked_since_ms = parked_since_ms
            hands.parked = run.attempt_id
            self.parked += 1
            self._changed(run.worker_id)

    def _get_gpu(self, run: Run, hands: Hands) -> None:
        run.active_since_ms, run.parked_since_ms = self.now_ms, None
        run.over = run.left_ms <= 0
        hands.active = run.attempt_id
        if not run.over:
            heapq.heappush(self._due, (self.now_ms + run.left_ms, run.attempt_id, self.now_ms))
        self._changed(run.worker_id)

    def _lose_gpu(self, run: Run) -> Hands:
        """Take a run off its worker, parked or not, and return what the worker has then."""
        hands = self.hands[run.worker_id]
        if run.drawn:
            return hands
        if run.active_since_ms is not None:
            spent_ms = self.now_ms - run.active_since_ms
            run.spent_ms += spent_ms
            run.left_ms = max(0, run.left_ms - spent_ms)
            run.active_since_ms = None
            if hands.active == run.attempt_id:
                hands.active = None
        else:
            self.parked -= 1
            if hands.parked == run.attempt_id:
                hands.parked = None
        return hands

    def _parked(self, record: AttemptParked) -> None:
        run = self.runs[record.attempt_id]
        hands = self._lose_gpu(run)
        run.parked_since_ms = record.at_ms
        hands.parked = run.attempt_id
        self.parked += 1
        self._changed(run.worker_id)

    def _resumed(self, record: AttemptResumed) -> None:
        run = self.runs[record.attempt_id]
        hands = self._lose_gpu(run)
        run.sheltered = run.sheltered or record.sheltered
        self._get_gpu(run, hands)

    def _drawn(self, record: AttemptDrawn) -> None:
        run = self.runs[record.attempt_id]
        self._lose_gpu(run)
        run.drawn = True
        self._changed(run.worker_id)

    def _migrated(self, record: AttemptMigrated) -> None:
        run = self.runs.pop(record.attempt_id)
        self._lose_gpu(run)
        self._changed(run.worker_id)
        before, after = self._slots.get(run.worker_id), self._slots.get(record.worker_id)
        for pool in after.pools if after is not None else ():
            pool.came += before is None or pool not in before.pools
        run.attempt_id, run.worker_id = record.to_attempt_id, record.worker_id
        self.runs[run.attempt_id] = run
        self.running_jobs[run.job.job_id] = run.attempt_id
        self._get_gpu(run, self.hands.setdefault(run.worker_id, Hands()))

    def _lost(self, record: AttemptLost) -> None:
        run = self._ended(record.attempt_id, 0)
        job = run.job
        losses = self._losses.pop(job.job_id, 0) + record.executed
        if job.job_id in self._cancelled:
            self._cancelled.remove(job.job_id)
            return
        self.accounts[job.account_id].jobs += 1
        self._wait(Waiting(job, losses))

    def _ended(self, attempt_id: AttemptId, gpu_ms: int) -> Run:
        run = self.runs.pop(attempt_id)
        job = run.job
        del self.running_jobs[job.job_id]
        self._lose_gpu(run)
        self._changed(run.worker_id)
        account, queue = self.accounts[job.account_id], self.queues[job.tier]
        account.jobs -= 1
        self._count(account, job.tier, -1)
        queue.refunded_ms += max(0, run.predicted_ms - gpu_ms)
        queue.uncharged_ms += max(0, min(run.spent_ms, run.predicted_ms) - gpu_ms)
        change = usage.correction(
            tier=job.tier,
            predicted_ms=run.predicted_ms,
            weight_milli=run.weight_milli,
            charged_at_ms=run.charged_at_ms,
            actual_ms=gpu_ms,
            decay_origin_ms=self.decay_origin_ms,
            parameters=self.parameters,
        )
        turn = account.turns[job.tier]
        turn.finish_tag += change.tag_delta
        if turn.restored_tag is not None:
            turn.restored_tag += change.tag_delta
        if change.tag_delta:
            turn.most_error = max(turn.most_error, abs(change.tag_delta))
            turn.advance += change.tag_delta
            if turn.tag is not None:
                self._set_tag(queue, account, turn, turn.tag + change.tag_delta)
        if account.usage is not None:
            account.usage = max(0.0, account.usage + change.usage_delta)
        self._reconcile(account)
        return run

    # -- who may start --------------------------------------------------------------------------------

    def _reconcile(self, account: AccountState) -> None:
        for tier, turn in account.turns.items():
            queue = self.queues[tier]
            if turn.waiting == 0 or account.free(tier) <= 0:
                if turn.eligible:
                    self._close(queue, turn)
                    self._set_tag(queue, account, turn, None)
                    turn.eligible = False
                    turn.lanes = {fit: lane for fit, lane in turn.lanes.items() if lane.waiting}
                self._count_unknown(queue, turn)
                continue
            if not turn.eligible:
                turn.eligible, turn.eligible_ms = True, self.now_ms
                turn.spell += 1
            if turn.known and turn.tag is None:
                self._set_first_tag(queue, account, turn)
            self._count_unknown(queue, turn)
            for fit, lane in turn.lanes.items():
                if lane.waiting and lane.contention is None:
                    self._open(queue, account, turn, fit, lane)
                elif not lane.waiting and lane.contention is not None:
                    self._close_lane(queue, fit, lane)

    def _count_unknown(self, queue: Queue, turn: Turn) -> None:
        unknown = turn.eligible and turn.tag is None
        queue.unknown_tags += unknown - turn.unknown
        turn.unknown = unknown

    def _set_first_tag(self, queue: Queue, account: AccountState, turn: Turn) -> None:
        """Set the tag that follows from becoming eligible, as far as it is known."""
        if turn.restored_tag is not None:
            tag: int | None = turn.restored_tag
            turn.restored_tag = None
            turn.from_virtual = False
        else:
            remembered = self.memory(queue.tier, account, self._told_ms)
            virtual = queue.virtual_time
            tag = None
            if remembered is not None and virtual is not None:
                tag = max(turn.finish_tag, virtual) + remembered
                turn.from_virtual = turn.finish_tag <= virtual
                turn.set_virtual, turn.remembered = virtual, remembered
                turn.most_memory = max(turn.most_memory, remembered)
        if turn.only_cost_ms is None and tag is not None and queue.virtual_time is not None:
            # What it ran before the period had such a cost at least.
            turn.most_cost = max(turn.most_cost, turn.finish_tag - queue.virtual_time)
        self._set_tag(queue, account, turn, tag)

    def _set_tag(self, queue: Queue, account: AccountState, turn: Turn, tag: int | None) -> None:
        turn.tag = tag
        turn.set_number += 1
        if tag is None:
            turn.from_virtual = False
            return
        for fit, lane in turn.lanes.items():
            if lane.contention is not None:
                heapq.heappush(queue.tags.setdefault(fit, []), (tag, account.account_id))
                lane.contention.tag = max(tag, lane.contention.tag or tag)

    def _open(self, queue: Queue, account: AccountState, turn: Turn, fit: Fit, lane: Lane) -> None:
        contention = lane.contention = Contention(self.now_ms)
        queue.contending[fit] = queue.contending.get(fit, 0) + 1
        pool = self._pool(fit)
        pool.advance(self.now_ms, self.closed)
        contention.capacity_ms = pool.capacity_ms[queue.tier]
        contention.room, contention.runs = pool.room(queue.tier), pool.runs(queue.tier)
        contention.came = pool.came
        contention.position = queue.served.starts
        contention.aged, contention.warm = queue.aged, queue.warm
        contention.refunded_ms, contention.uncharged_ms = queue.refunded_ms, queue.uncharged_ms
        contention.tag = turn.tag
        if turn.tag is None:
            return
        heapq.heappush(queue.tags.setdefault(fit, []), (turn.tag, account.account_id))
        if queue.virtual_time is not None and not queue.unknown_tags:
            tags = [lowest[0] for other in queue.contending if (lowest := self.lowest(queue, other))]
            edge = self.edges.get(queue.tier)
            contention.low = min(queue.virtual_time, *tags, *(() if edge is None else (edge.tag,)))
            contention.virtual = queue.virtual_time
            contention.from_virtual = turn.from_virtual
            if turn.from_virtual and queue.tier is Tier.RELAX:
                self._enrol(account, turn, fit)
            contention.unused = turn.from_virtual and turn.tag <= queue.virtual_time

    def _enrol(self, account: AccountState, turn: Turn, fit: Fit) -> None:
        used_ms = self.usage_per_weight(account, self._told_ms)
        assert account.usage is not None
        assert used_ms is not None
        heapq.heappush(
            self._returned.setdefault((turn.set_virtual, fit), []),
            Returned(
                turn.remembered,
                account.usage * 1000 / account.weight_milli,
                account.account_id,
                turn.set_number,
                used_ms,
            ),
        )

    def _close(self, queue: Queue, turn: Turn) -> None:
        for fit, lane in turn.lanes.items():
            if lane.contention is not None:
                self._close_lane(queue, fit, lane)

    def _close_lane(self, queue: Queue, fit: Fit, lane: Lane) -> None:
        lane.contention = None
        left = queue.contending[fit] - 1
        if left:
            queue.contending[fit] = left
        else:
            del queue.contending[fit]

    # -- workers --------------------------------------------------------------------------------------

    def _joined(self, worker: Worker) -> None:
        self._left(worker.worker_id)
        slot = self._slots[worker.worker_id] = Slot(worker)
        slot.pools = [pool for fit, pool in self.pools.items() if slot.can_run(fit)]
        self._changed(worker.worker_id)

    def _left(self, worker_id: WorkerId) -> None:
        slot = self._slots.pop(worker_id, None)
        if slot is not None:
            self._stand(slot, NOTHING)
            self.resumable.discard(worker_id)

    def _drain(self, worker_id: WorkerId, draining: bool) -> None:
        slot = self._slots.get(worker_id)
        if slot is not None:
            slot.draining = draining
            self._changed(worker_id)

    def _pool(self, fit: Fit) -> Pool:
        pool = self.pools.get(fit)
        if pool is None:
            pool = self.pools[fit] = Pool(self.now_ms)
            for slot in self._slots.values():
                if slot.can_run(fit):
                    slot.pools.append(pool)
                    pool.change(NOTHING, slot.standing)
        return pool

    def _changed(self, worker_id: WorkerId) -> None:
        slot = self._slots.get(worker_id)
        if slot is None:
            return
        hands = self.hands.get(worker_id)
        active = None if hands is None or hands.active is None else self.runs[hands.active]
        parked = hands is not None and hands.parked is not None
        if parked and active is None:
            self.resumable.add(worker_id)
        else:
            self.resumable.discard(worker_id)
        if slot.draining:
            self._stand(slot, NOTHING)
            return
        fast = active is not None and active.job.tier is Tier.FAST
        relax = active is not None and not fast
        in_time = active is not None and not active.over
        self._stand(
            slot,
            (
                int(active is None and not parked),
                int(active is None and parked),
                int(fast and in_time),
                int(relax and in_time),
                int(fast),
                int(relax) + int(parked),
                int(relax and not parked and active is not None and not active.sheltered),
            ),
        )

    def _stand(self, slot: Slot, standing: tuple[int, ...]) -> None:
        """Count a worker as what it is now in every pool it belongs to."""
        before = slot.standing
        self.taking += any(standing) - any(before)
        self.fast_held += standing[FAST_RUNS] - before[FAST_RUNS]
        if standing != before:
            for pool in slot.pools:
                pool.advance(self.now_ms, self.closed)
                pool.change(before, standing)
        slot.standing = standing

    def _advance_all(self) -> None:
        for pool in self.pools.values():
            pool.advance(self.now_ms, self.closed)
