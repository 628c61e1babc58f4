"""The auditor: holds a journal against every bound that the policy promises.

It trusts the records and nothing else: who was eligible, which tag followed from which charge, which GPU was
free are worked out again (`replay.py`). Where a bound's assumption does not hold (models kept warm, starts
taken for their age, predictions that were wrong, runs that were parked), the bound is widened by what they
can have done, and the finding says so. One pass, O(log n) a record.
"""

from __future__ import annotations

import math
from collections import Counter

from scheduler.policy import usage
from scheduler.policy.auditing.findings import Bound, Case, Finding, Verdict
from scheduler.policy.auditing.journal import Dispatch, Journal, Record
from scheduler.policy.auditing.pairs import Pairs
from scheduler.policy.auditing.replay import Replay
from scheduler.policy.auditing.replay_state import AccountState, Contention, Queue, Run
from scheduler.policy.decisions import ChosenBecause, Standing
from scheduler.policy.events import (
    AttemptMigrated,
    AttemptParked,
    AttemptResumed,
    CellRestored,
    JobSubmitted,
)
from scheduler.policy.ids import AccountId, JobId, Tier, WorkerId
from scheduler.policy.job import Fit, Job
from scheduler.policy.parameters import Parameters

_FOLLOWED = 24
"""Accounts that are compared in pairs: each start costs as many comparisons."""

_SLACK = {
    # Charges are cut to whole tag units and waits to whole milliseconds.
    Bound.B1: 1.0,
    Bound.B2: 1.0,
    Bound.B3: 1.0,
    Bound.B4: 1.0,
    # Sums of doubles in another order.
    Bound.B9: 1.0,
    Bound.O1: 1.0,
    Bound.TAGS: 2.0,
}


def audit(journal: Journal, parameters: Parameters) -> tuple[Finding, ...]:
    """Return a finding for every bound, in the order of `Bound`."""
    return _Audit(journal, parameters).run()


class _Tally:
    """What was seen of one bound so far."""

    __slots__ = ("cases", "set_aside", "violations", "widened", "worst", "worst_margin")

    def __init__(self) -> None:
        self.cases = self.violations = self.set_aside = 0
        self.worst_margin: float | None = None
        self.worst: Case | None = None
        self.widened: Counter[str] = Counter()


class _Audit:
    """One pass over a journal."""

    def __init__(self, journal: Journal, parameters: Parameters) -> None:
        self._journal = journal
        self._parameters = parameters
        self._tallies = {bound: _Tally() for bound in Bound}
        self._starts = sum(isinstance(record, Dispatch) for record in journal.records)
        # Those that were served most, and those that asked most: who starves is not served.
        accounts = Counter(
            record.keys.chosen.account_id if isinstance(record, Dispatch) else record.job.account_id
            for record in journal.records
            if isinstance(record, Dispatch | JobSubmitted)
        )
        self._followed = [account_id for account_id, _ in accounts.most_common(_FOLLOWED)]
        self._begin()

    def _begin(self) -> None:
        """Begin with a board that nothing is known of."""
        self._replay = Replay(self._parameters, self._starts)
        self._pairs = Pairs(self._replay, self._followed, self._check)
        self._stretches: dict[tuple[Bound, str], int] = {}
        self._parks: dict[WorkerId, int] = {}

    def run(self) -> tuple[Finding, ...]:
        """Go through the records and return what was found."""
        restored: set[Tier] = set()
        at_ms = self._journal.records[0].at_ms if self._journal.records else self._journal.ended_ms
        self._replay.now_ms = at_ms
        for record in self._journal.records:
            if isinstance(record, CellRestored):
                if record.tier in restored:
                    # What the records of the epoch before left undone was so at their end, not only now.
                    self._look(at_ms)
                    self._close(record.at_ms)
                    self._begin()
                    restored.clear()
                    self._replay.now_ms = at_ms = record.at_ms
                restored.add(record.tier)
            if record.at_ms > at_ms:
                self._look(at_ms)
                at_ms = record.at_ms
            self._replay.pass_to(at_ms)
            self._before(record)
            self._replay.apply(record)
            self._after(record)
        self._look(at_ms)
        self._replay.pass_to(self._journal.ended_ms)
        self._close(self._journal.ended_ms)
        self._compare_closing()
        return tuple(self._finding(bound) for bound in Bound)

    # -- what is found --------------------------------------------------------------------------------

    def _check(self, bound: Bound, margin: float, case: Case) -> None:
        tally = self._tallies[bound]
        tally.cases += 1
        if tally.worst_margin is None or margin < tally.worst_margin:
            tally.worst_margin, tally.worst = margin, case
        if margin < -_SLACK.get(bound, 0.0):
            tally.violations += 1

    def _observe(self, bound: Bound, value: float, case: Case) -> None:
        tally = self._tallies[bound]
        tally.cases += 1
        if tally.worst_margin is None or value > tally.worst_margin:
            tally.worst_margin, tally.worst = value, case

    def _widen(self, bound: Bound, why: str) -> None:
        self._tallies[bound].widened[why] += 1

    def _finding(self, bound: Bound) -> Finding:
        tally = self._tallies[bound]
        if not tally.cases:
            verdict = Verdict.NO_CASES
        elif bound is Bound.B15:
            verdict = Verdict.OBSERVED
        else:
            verdict = Verdict.VIOLATED if tally.violations else Verdict.HOLDS
        return Finding(
            bound=bound,
            verdict=verdict,
            cases=tally.cases,
            violations=tally.violations,
            set_aside=tally.set_aside,
            worst_margin=tally.worst_margin,
            worst=tally.worst,
            widened=tuple(f"{why} ({count} cases)" for why, count in sorted(tally.widened.items())),
        )

    # -- records --------------------------------------------------------------------------------------

    def _before(self, record: Record) -> None:
        """Check a record against what was so before it."""
        match record:
            case Dispatch():
                self._dispatch(record)
            case AttemptParked():
                run = self._replay.runs[record.attempt_id]
                hands = self._replay.hands[run.worker_id]
                self._check_park(record.at_ms, run, already=hands.parked is not None)
            case AttemptResumed():
                run = self._replay.runs[record.attempt_id]
                self._gets_gpu(record.at_ms, run.worker_id, run.job.job_id, besides=None)
                self._observe_park(record.at_ms, run)
            case AttemptMigrated():
                run = self._replay.runs[record.attempt_id]
                self._gets_gpu(record.at_ms, record.worker_id, run.job.job_id, besides=None)
                self._observe_park(record.at_ms, run)

    def _after(self, record: Record) -> None:
        """Check what is so behind a record."""
        match record:
            case Dispatch():
                account = self._replay.accounts[record.keys.chosen.account_id]
                self._check_caps(record, account)
                self._check_next_tag(record, account)
            case JobSubmitted() if not self._replay.recovering:
                account = self._replay.accounts[record.job.account_id]
                self._check(
                    Bound.B10,
                    account.limits.accepted - account.jobs,
                    Case(at_ms=record.at_ms, accounts=(account.account_id,), job_id=record.job.job_id),
                )

    def _dispatch(self, record: Dispatch) -> None:
        replay, started = self._replay, record.started
        waiting = replay.waiting.get(started.job_id)
        assert waiting is not None, f"{started.job_id} started, and the journal does not say that it waits"
        job = waiting.job
        account, queue = replay.accounts[job.account_id], replay.queues[job.tier]
        case = Case(
            at_ms=record.at_ms,
            accounts=(account.account_id,),
            job_id=job.job_id,
            attempt_id=started.attempt_id,
            worker_id=started.worker_id,
        )
        self._check_start_of_worker(record, queue.tier, case)
        self._check_virtual_time(record, queue, case)
        self._check_tag(record, account, queue, case)
        self._check_order(record, account, queue, job.fit, case)
        self._check_use(record, account, queue, case)
        self._check_together(record, account, queue, job.fit, case)
        self._pairs.dispatched(record, account, queue.tier)
        lane = account.turns[queue.tier].lanes[job.fit]
        if lane.contention is not None:
            self._check_wait(lane.contention, account, queue, job, case)
        if queue.tier is Tier.FAST and self._parks.pop(started.worker_id, 0):
            since_ms = case.at_ms if lane.contention is None else lane.contention.at_ms
            stretch = self._stretches.get((Bound.B13, _name(job.fit)))
            late_ms = 0 if stretch is None else case.at_ms - max(stretch, since_ms)
            self._check(Bound.B13, self._journal.grace_ms - late_ms, case)

    # -- waits ----------------------------------------------------------------------------------------

    def _check_wait(
        self, contention: Contention, account: AccountState, queue: Queue, job: Job, case: Case
    ) -> None:
        """B2, B3, B4: the GPU time that went by, against what others could have been served in it."""
        replay = self._replay
        waited_ms = max(0, case.at_ms - contention.at_ms)
        if queue.tier is Tier.RELAX:
            self._observe(Bound.B15, waited_ms, case)
        pool = replay.pools[job.fit]
        pool.advance(case.at_ms, replay.closed)
        spent_ms = pool.capacity_ms[queue.tier] - contention.capacity_ms
        gpus = spent_ms / waited_ms if waited_ms else contention.room
        if contention.low is None or contention.tag is None or gpus <= 0:
            self._tallies[Bound.B2].set_aside += 1
            return
        others, weights_milli = queue.served.since(contention.position)
        weights = weights_milli / 1000
        ahead_ms: float = (contention.tag - contention.low) / 1000
        c_max = max(queue.most_cost_ms, job.predicted_ms)
        allowed_ms: float = (max(contention.room, contention.runs) + others) * c_max
        # While a start is on its way to its row, its GPU is open and serves nobody: with the first workers
        # that join after a night without any, that is all the time that there was.
        allowed_ms += self._journal.grace_ms * pool.room(queue.tier)
        # Each of the starts may lack less than a tag unit of what it cost.
        allowed_ms += (queue.served.starts - contention.position) * account.heaviest_milli / 1_000_000
        widened = []
        if queue.warm > contention.warm:
            allowed_ms += self._parameters.affinity_ms * weights
            widened.append("warm models: theta times the weights of the others")
        if queue.aged > contention.aged:
            allowed_ms += (queue.aged - contention.aged) * c_max
            widened.append("aging: a job for each start taken for its age")
        errors_ms = queue.refunded_ms - contention.refunded_ms + queue.uncharged_ms - contention.uncharged_ms
        if errors_ms:
            allowed_ms += errors_ms
            widened.append("predictions: what was charged and not used, and held and not charged")
        came = pool.came - contention.came
        if came:
            allowed_ms += came * c_max
            widened.append("preemption: a job for each run that came from GPUs that do not count")
        if contention.runs > contention.room:
            widened.append("preemption and overruns: a job for each run beyond the GPUs that count")
        span_ms: float = self._parameters.memory_span_ms if queue.tier is Tier.RELAX else 0
        span_ms = max(ahead_ms, span_ms + (contention.virtual - contention.low) / 1000)
        for bound, applies, distance_ms in (
            (Bound.B2, True, ahead_ms),
            (Bound.B3, contention.unused, ahead_ms),
            (Bound.B4, contention.from_virtual, span_ms),
        ):
            if applies:
                self._check(bound, (allowed_ms + weights * distance_ms - spent_ms) / gpus, case)
                for why in widened:
                    self._widen(bound, why)

    def _observe_park(self, at_ms: int, run: Run) -> None:
        if run.parked_since_ms is not None:
            self._observe(Bound.B15, at_ms - run.parked_since_ms, _case_of(at_ms, run))

    # -- workers --------------------------------------------------------------------------------------

    def _check_park(self, at_ms: int, run: Run, *, already: bool) -> None:
        self._parks[run.worker_id] = self._parks.get(run.worker_id, 0) + 1
        relax = run.job.tier is Tier.RELAX
        fine = relax and not already and not run.sheltered
        self._check(Bound.B14, 1 - self._parks[run.worker_id] if fine else -1, _case_of(at_ms, run))

    def _check_start_of_worker(self, record: Dispatch, tier: Tier, case: Case) -> None:
        worker_id = record.started.worker_id
        parked = self._parks.get(worker_id, 0)
        hands = self._replay.hands.get(worker_id)
        if tier is Tier.RELAX:
            # Nobody is parked for relax, and who is parked goes on before any new relax job.
            beside = hands is not None and hands.parked is not None
            self._check(Bound.B14, -1 if parked or beside else 0, case)
            self._parks.pop(worker_id, None)
        self._gets_gpu(record.at_ms, worker_id, record.started.job_id, besides=record)

    def _gets_gpu(self, at_ms: int, worker_id: WorkerId, job_id: JobId, *, besides: Dispatch | None) -> None:
        """B11: whoever gets a worker's GPU is alone on it, and its job runs nowhere else."""
        hands = self._replay.hands.get(worker_id)
        active = hands is not None and hands.active is not None
        twice = besides is not None and job_id in self._replay.running_jobs
        self._check(
            Bound.B11, -1 if active or twice else 0, Case(at_ms=at_ms, worker_id=worker_id, job_id=job_id)
        )

    def _check_caps(self, record: Dispatch, account: AccountState) -> None:
        left = account.limits.running - account.running
        run = self._replay.runs[record.started.attempt_id]
        if run.job.tier is Tier.RELAX:
            left = min(left, account.limits.relax_running - account.relax_running)
        self._check(Bound.B10, left, _case_of(record.at_ms, run))

    # -- tags -----------------------------------------------------------------------------------------

    def _check_virtual_time(self, record: Dispatch, queue: Queue, case: Case) -> None:
        charge, keys = record.started.charge, record.keys
        numbers = charge.usage_added, keys.chosen.usage_per_weight_ms
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or charge.weight_milli <= 0:
            self._check(Bound.B7, -math.inf, case)
            return
        before = keys.virtual_time if queue.virtual_time is None else queue.virtual_time
        after = before if charge.aged else max(before, charge.charged_from)
        self._check(
            Bound.B7, 0 - max(abs(keys.virtual_time - before), abs(charge.virtual_time - after)), case
        )

    def _check_tag(self, record: Dispatch, account: AccountState, queue: Queue, case: Case) -> None:
        charge = record.started.charge
        tag = account.turns[queue.tier].tag
        if tag is not None:
            self._check(Bound.TAGS, -abs(charge.start_tag - tag), case)
        turn = account.turns[queue.tier]
        if turn.known and queue.virtual_time is not None:
            start = usage.start_of(charge.start_tag, turn.finish_tag, queue.virtual_time)
            self._check(Bound.TAGS, -abs(charge.charged_from - start), case)
        else:
            self._check(Bound.TAGS, charge.start_tag - charge.charged_from, case)
        self._check(Bound.TAGS, -abs(record.keys.chosen.tag - charge.start_tag), case)

    def _check_next_tag(self, record: Dispatch, account: AccountState) -> None:
        """Check that an account which stays eligible is tagged behind what it was just charged."""
        charge = record.started.charge
        run = self._replay.runs[record.started.attempt_id]
        tier = run.job.tier
        turn = account.turns[tier]
        case = _case_of(record.at_ms, run)
        if turn.eligible != (charge.next_tag is not None):
            if account.known:
                self._check(Bound.TAGS, -math.inf, case)
            return
        remembered = self._replay.memory(tier, account, charge.charged_at_ms)
        if charge.next_tag is not None and remembered is not None:
            tag = max(charge.finish_tag, charge.virtual_time) + remembered
            self._check(Bound.TAGS, -abs(charge.next_tag - tag), case)

    def _check_order(
        self, record: Dispatch, account: AccountState, queue: Queue, fit: Fit, case: Case
    ) -> None:
        keys = record.keys
        self._check_age(keys.because, queue, case)
        if keys.because is ChosenBecause.AGED:
            return
        warm = keys.because is ChosenBecause.MODEL_WARM
        theta = self._parameters.affinity_ms * 1000 if warm else 0
        lowest = self._replay.lowest(queue, fit)
        if lowest is not None:
            rival = () if lowest[1] == account.account_id else (lowest[1],)
            self._check(
                Bound.ORDER,
                lowest[0] + theta - keys.chosen.tag,
                Case(at_ms=case.at_ms, job_id=case.job_id, accounts=(account.account_id, *rival)),
            )
        if keys.runner_up is not None:
            margin: float = keys.runner_up.tag + theta - keys.chosen.tag
            if not warm and margin == 0 and _key(keys.runner_up) < _key(keys.chosen):
                margin = -1
            self._check(Bound.ORDER, margin, case)

    def _check_age(self, because: ChosenBecause, queue: Queue, case: Case) -> None:
        if because is ChosenBecause.AGED and queue.aged_wait_ms is not None:
            self._check(Bound.AGED, -queue.aged_wait_ms, case)

    def _check_use(self, record: Dispatch, account: AccountState, queue: Queue, case: Case) -> None:
        """B9: what the account is remembered for is what it executed."""
        if queue.tier is Tier.FAST:
            return
        used_ms = self._replay.usage_per_weight(account, record.started.charge.charged_at_ms)
        if used_ms is None:
            return
        seen_ms = record.keys.chosen.usage_per_weight_ms
        difference = abs(used_ms - seen_ms)
        self._check(Bound.B9, -difference * account.weight_milli / 1000, case)
        if difference > 1:
            # Told once; what follows from it is not told again.
            growth = self._replay.growth(record.started.charge.charged_at_ms)
            account.usage = seen_ms * account.weight_milli / 1000 * growth

    def _check_together(
        self, record: Dispatch, account: AccountState, queue: Queue, fit: Fit, case: Case
    ) -> None:
        """O1: of those that came back while virtual time stood where it stood for this one."""
        turn = account.turns[queue.tier]
        in_order = record.keys.because not in (ChosenBecause.AGED, ChosenBecause.MODEL_WARM)
        if queue.tier is Tier.FAST or not turn.from_virtual or not in_order:
            return
        mine, other = self._replay.returned_beside(account, fit)
        if mine is None or other is None:
            return
        margin = other.used_ms - mine.used_ms
        if other[:2] >= mine[:2]:
            # Equal tags, and what was read a moment apart had decayed a little.
            margin = max(0.0, margin)
        self._check(
            Bound.O1,
            margin,
            Case(at_ms=case.at_ms, job_id=case.job_id, accounts=(account.account_id, other.account_id)),
        )

    # -- between records ------------------------------------------------------------------------------

    def _look(self, at_ms: int) -> None:
        """Look at what is left undone at the end of an instant: nobody may wait for what is free."""
        replay = self._replay
        for worker_id, parks in self._parks.items():
            self._check(Bound.B14, -parks, Case(at_ms=at_ms, worker_id=worker_id))
        self._parks.clear()
        undone: set[tuple[Bound, str]] = set()
        if replay.resumable and not replay.edges:
            undone.add((Bound.B8, "a parked run on an idle GPU"))
        for tier, queue in replay.queues.items():
            if tier in replay.closed or not queue.contending:
                continue
            at_floor = tier is Tier.FAST and replay.at_floor()
            kept_for_relax = at_floor and replay.relax_waits()
            for fit in queue.contending:
                pool = replay.pools[fit]
                if (pool.open if tier is Tier.RELAX else pool.idle) and not kept_for_relax:
                    undone.add((Bound.B8, f"{tier} {_name(fit)}"))
                if tier is Tier.FAST and not at_floor and pool.parkable:
                    undone.add((Bound.B13, _name(fit)))
            tally = self._tallies[Bound.B8]
            tally.cases += 1
            if tally.worst_margin is None:
                tally.worst_margin, tally.worst = self._journal.grace_ms, Case(at_ms=at_ms)
        for key in self._stretches.keys() - undone:
            self._end_stretch(key, at_ms)
        for key in undone:
            self._stretches.setdefault(key, at_ms)

    def _end_stretch(self, key: tuple[Bound, str], at_ms: int) -> None:
        since_ms = self._stretches.pop(key)
        self._check(key[0], self._journal.grace_ms - (at_ms - since_ms), Case(at_ms=since_ms))

    def _close(self, at_ms: int) -> None:
        """End what still goes on when a board's records end."""
        for key in list(self._stretches):
            self._end_stretch(key, at_ms)
        for account, tier, contention in self._replay.contentions():
            if tier is Tier.RELAX and tier not in self._replay.paused:
                self._observe(
                    Bound.B15,
                    at_ms - contention.at_ms,
                    Case(at_ms=at_ms, accounts=(account.account_id,)),
                )
        for run in self._replay.runs.values():
            self._observe_park(at_ms, run)

    def _compare_closing(self) -> None:
        """Hold what is stored of accounts against what the records come to."""
        for account_id, shares in self._journal.closing.items():
            account = self._replay.accounts.get(account_id)
            if account is None:
                continue
            case = Case(at_ms=self._journal.ended_ms, accounts=(account_id,))
            for tier, share in shares.items():
                turn = account.turns[tier]
                if turn.known:
                    self._check(Bound.TAGS, -abs(share.finish_tag - turn.finish_tag), case)
                if tier is Tier.RELAX and account.usage is not None:
                    growth = self._replay.growth(self._journal.ended_ms)
                    self._check(Bound.B9, -abs(share.usage - account.usage) / growth, case)


def _key(standing: Standing) -> tuple[int, float, int, AccountId]:
    return standing.tag, standing.usage_per_weight_ms, standing.arrival, standing.account_id


def _case_of(at_ms: int, run: Run) -> Case:
    return Case(
        at_ms=at_ms,
        accounts=(run.job.account_id,),
        job_id=run.job.job_id,
        attempt_id=run.attempt_id,
        worker_id=run.worker_id,
    )


def _name(fit: Fit) -> str:
    return f"{fit.model} {fit.memory_bytes}"
