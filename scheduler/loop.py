"""The cycle: drain, apply, decide, commit, act.

One task runs it and owns the board. Whatever happened comes through the inbox; whatever should happen is
decided by the board, becomes rows in one transaction, is applied as events, and only then are workers
called. If the process dies between any two of these steps, the rows tell the next scheduler the rest.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime

import structlog

from billing import ledger
from gpu_worker.contract import AttemptResult, Blame, Outcome, RenderRequest, RenderSpec, WorkerReport
from gpu_worker.prompt import file_stem
from scheduler.arrivals import Arrivals
from scheduler.clock import LeaderClock, to_ms
from scheduler.fleet import Fleet, RenderRefused, WorkerFound, WorkerGone, WorkerHeard
from scheduler.inbox import AccountsChanged, AttemptSettled, Inbox, Item, JobsChanged
from scheduler.metrics import RequeueReason, SchedulerMetrics, WorkerState
from scheduler.policy import events
from scheduler.policy.board import Board
from scheduler.policy.decisions import GiveUp, Start, Stop
from scheduler.policy.events import (
    AttemptFinished,
    AttemptLost,
    AttemptStarted,
    JobGivenUp,
    ModelEvicted,
    ModelLoaded,
    StartRefused,
    StopAsked,
    TagsStored,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerResumed,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker
from scheduler.settlement import Settlement, end_of, end_of_lost
from scheduler.store import dispatch, endings, leadership, live
from scheduler.store.endings import AttemptEnd, Settled, Verdict
from scheduler.store.jobs import spec_from_json
from scheduler.store.lanes import Lane
from scheduler.updates import JobUpdate, QueueReason, QueueStatus, Updates

_log = structlog.get_logger()

# How often the time is persisted, accounts without funds are looked at, and open holds are shown.
_KEEP_TIME_MS = 5_000
# A report that was made before an attempt arrived does not have it yet.
_RENDER_GRACE_MS = 30_000
# A GPU that hangs answers every heartbeat, since those come from another thread. No admitted job takes this
# many times the largest predicted cost.
_OVERDUE_TIMES = 3


@dataclass(frozen=True, kw_only=True)
class Running:
    """A running attempt as the loop knows it."""

    attempt_id: str
    token: str
    job_id: JobId
    account_id: AccountId
    tier: Tier
    model: str
    worker_id: str
    incarnation: str
    started_ms: int


def render_request(
    attempt: dispatch.PlannedAttempt | live.RunningAttempt, spec: RenderSpec, *, epoch: int
) -> RenderRequest:
    """Return what a worker is given for an attempt that is a row."""
    return RenderRequest(
        job_id=attempt.job_id,
        attempt_id=attempt.attempt_id,
        token=attempt.token,
        epoch=epoch,
        tier=attempt.tier.value,
        spec=spec,
        file_stem=file_stem(spec.prompt),
    )


class Loop:
    """The only owner of the board."""

    def __init__(
        self,
        *,
        board: Board,
        parameters: Parameters,
        epoch: int,
        lane: Lane,
        arrivals: Arrivals,
        inbox: Inbox,
        fleet: Fleet,
        settlement: Settlement,
        updates: Updates,
        clock: LeaderClock,
        metrics: SchedulerMetrics,
        sweep_ms: int,
    ) -> None:
        self._board = board
        self._parameters = parameters
        self._epoch = epoch
        self._lane = lane
        self._arrivals = arrivals
        self._inbox = inbox
        self._fleet = fleet
        self._settlement = settlement
        self._updates = updates
        self._clock = clock
        self._metrics = metrics
        self._sweep_ms = sweep_ms
        self._running: dict[str, Running] = {}
        self._reports: dict[str, WorkerReport] = {}
        self._settling: dict[str, AttemptResult | None] = {}
        self._set_aside: dict[str, datetime] = {}
        self._closed: set[str] = set()
        """Workers that the board gives nothing new, for whatever reason."""
        self._swept_ms = 0
        self._kept_ms = 0

    @property
    def board(self) -> Board:
        """For questions; only the loop changes it."""
        return self._board

    async def run(self) -> None:
        """Turn until cancelled; raises Deposed when another scheduler leads."""
        while True:
            await self._inbox.wait(self._sweep_ms / 1000)
            await self.cycle()

    async def cycle(self) -> None:
        """Turn once."""
        began_ns = time.monotonic_ns()
        notices: set[str] = set()
        accounts: set[str] = set()
        for item in self._inbox.drain():
            self._take(item, notices, accounts)
        now_ms = self._clock.now_ms()
        if now_ms - self._swept_ms >= self._sweep_ms:
            self._swept_ms = now_ms
            notices.update(await self._arrivals.unheeded())
            accounts |= self._arrivals.renewed(now_ms)
        if accounts:
            self._apply(await self._arrivals.of_accounts(accounts))
        if notices:
            self._apply(await self._arrivals.of_jobs(notices))
        while await self._decide():
            pass
        if now_ms - self._kept_ms >= _KEEP_TIME_MS:
            self._kept_ms = now_ms
            # Nothing sweeps accounts: whoever granted time may have died before it could say so.
            self._inbox.put(AccountsChanged(account_ids=tuple(self._board.accounts_held())))
            await self._lane.run(lambda connection: leadership.keep_time(connection, self._epoch, now_ms))
            holds = await self._lane.run(ledger.open_holds)
            self._metrics.holds_seen(holds=holds.count, held_ms=holds.held_ms)
        self._show(began_ns)

    # --- facts in ---------------------------------------------------------------------------------------

    def _take(self, item: Item, notices: set[str], accounts: set[str]) -> None:
        match item:
            case JobsChanged():
                notices.update(item.job_ids)
            case AccountsChanged():
                accounts.update(item.account_ids)
            case WorkerFound():
                self._worker_found(item.report)
            case WorkerHeard():
                self._worker_heard(item.report)
            case WorkerGone():
                self._worker_gone(item)
            case RenderRefused():
                self._render_refused(item)
            case AttemptSettled():
                self._attempt_settled(item)

    def adopt(
        self,
        restored: Iterable[events.Event],
        *,
        running: Iterable[Running],
        requests: Mapping[str, RenderRequest],
        updates: Iterable[JobUpdate],
        set_aside: Mapping[str, datetime],
    ) -> None:
        """Take over what the rows say; called once, before the first cycle.

        The reports of the workers that live are in the inbox already. A running attempt whose worker did not
        report, or reported another life, is lost; one that its worker never got is given to it now.
        """
        self._apply(restored)
        self._running = {one.attempt_id: one for one in running}
        self._set_aside = dict(set_aside)
        for update in updates:
            self._updates.publish(update)
        for item in self._inbox.drain():
            self._take(item, set(), set())
        for one in list(self._running.values()):
            report = self._reports.get(one.worker_id)
            if report is None:
                self._lose(one, "Its GPU worker was lost while the scheduler was away.", executed=True)
            elif one.attempt_id not in self._settling and not _has(report, one.attempt_id):
                # The scheduler died between its row and its call. A worker that gets it twice draws it once.
                self._running[one.attempt_id] = replace(one, started_ms=self._clock.now_ms())
                self._fleet.render(one.worker_id, requests[one.attempt_id])

    def _apply(self, facts: Iterable[events.Event]) -> None:
        for fact in facts:
            self._board.apply(fact)

    def _worker_found(self, report: WorkerReport) -> None:
        now_ms = self._clock.now_ms()
        worker_id = WorkerId(report.worker_id)
        _log.info("worker joined", worker=worker_id, device=report.device, pid=report.pid)
        for running in self._running_on(report.worker_id):
            if running.incarnation != report.incarnation:
                self._lose(running, f"The GPU worker {worker_id} was restarted.", executed=True)
        self._reports[report.worker_id] = report
        self._updates.met_worker(report.memory_bytes)
        self._board.apply(
            WorkerJoined(
                at_ms=now_ms,
                worker=Worker(
                    worker_id=worker_id,
                    memory_bytes=report.memory_bytes,
                    speed_permille=report.speed_permille,
                    warm_models=frozenset(report.warm_models),
                ),
            )
        )
        self._closed.discard(report.worker_id)
        self._compare(report)

    def _worker_heard(self, report: WorkerReport) -> None:
        known = self._reports.get(report.worker_id)
        if known is None or known.incarnation != report.incarnation:
            return  # said before it was given up: its next word comes as WorkerFound
        now_ms = self._clock.now_ms()
        worker_id = WorkerId(report.worker_id)
        for model in set(report.warm_models) - set(known.warm_models):
            self._board.apply(ModelLoaded(at_ms=now_ms, worker_id=worker_id, model=model))
        for model in set(known.warm_models) - set(report.warm_models):
            self._board.apply(ModelEvicted(at_ms=now_ms, worker_id=worker_id, model=model))
        if known.healthy and not report.healthy:
            _log.warning("worker unhealthy", worker=worker_id, sentence=report.sentence)
        self._reports[report.worker_id] = report
        self._compare(report)

    def _compare(self, report: WorkerReport) -> None:
        """Hold a worker's report against the rows: settle its results, end what is not ours."""
        self._metrics.worker_heard(report, self._clock.now_ms())
        for result in report.unacknowledged:
            if result.attempt_id not in self._settling:
                running = self._running.get(result.attempt_id)
                self._settle(running, report.worker_id, end_of(result), result)
        active = None if report.active is None else report.active.attempt_id
        # Not ours, or given up already: its loss is being settled, and what it still does counts for nothing.
        given_up = active in self._settling and self._settling[active] is None
        stranger = active is not None and (active not in self._running or given_up)
        if active is not None and stranger:
            self._fleet.forget(report.worker_id, active)
        for running in self._running_on(report.worker_id):
            age_ms = self._clock.now_ms() - running.started_ms
            if age_ms > _RENDER_GRACE_MS and not _has(report, running.attempt_id):
                self._lose(running, "The GPU worker never got it.", executed=False)
            elif age_ms > _OVERDUE_TIMES * self._parameters.max_predicted_ms:
                self._lose(running, "It ran far longer than any job may: the GPU hangs.", executed=True)
        self._open_or_close(
            report.worker_id,
            # What it has in hand for nobody ends at its next step; until then it would refuse anything else.
            closed=stranger or not report.healthy or self._is_set_aside(report.worker_id),
        )

    def _is_set_aside(self, worker_id: str) -> bool:
        until = self._set_aside.get(worker_id)
        return until is not None and to_ms(until) > self._clock.now_ms()

    def _open_or_close(self, worker_id: str, *, closed: bool) -> None:
        """Let the board give a worker new attempts, or not."""
        if closed == (worker_id in self._closed):
            return
        now_ms = self._clock.now_ms()
        if closed:
            self._closed.add(worker_id)
            self._board.apply(WorkerDraining(at_ms=now_ms, worker_id=WorkerId(worker_id)))
        else:
            self._closed.remove(worker_id)
            self._board.apply(WorkerResumed(at_ms=now_ms, worker_id=WorkerId(worker_id)))

    def _worker_gone(self, gone: WorkerGone) -> None:
        report = self._reports.get(gone.worker_id)
        if report is None or report.incarnation != gone.incarnation:
            return
        _log.warning("worker lost", worker=gone.worker_id, sentence=gone.sentence)
        del self._reports[gone.worker_id]
        self._closed.discard(gone.worker_id)
        self._board.apply(WorkerLost(at_ms=self._clock.now_ms(), worker_id=WorkerId(gone.worker_id)))
        for running in self._running_on(gone.worker_id):
            self._lose(running, gone.sentence, executed=True)

    def _render_refused(self, refused: RenderRefused) -> None:
        running = self._running.get(refused.attempt_id)
        if running is not None:
            _log.warning("render refused", worker=refused.worker_id, sentence=refused.sentence)
            # Its next heartbeat opens it again; until then every other attempt would be refused too.
            self._open_or_close(refused.worker_id, closed=True)
            self._lose(running, refused.sentence, executed=False)

    def _running_on(self, worker_id: str) -> list[Running]:
        return [running for running in self._running.values() if running.worker_id == worker_id]

    def _lose(self, running: Running, sentence: str, *, executed: bool) -> None:
        if running.attempt_id not in self._settling:
            end = end_of_lost(running.attempt_id, running.token, sentence, executed=executed)
            self._settle(running, running.worker_id, end, None)

    def _settle(
        self, running: Running | None, worker_id: str, end: AttemptEnd, result: AttemptResult | None
    ) -> None:
        self._settling[end.attempt_id] = result
        # An end that matches nothing we run is settled all the same:
        # the database knows whether it is late or false.
        self._settlement.put(running.account_id if running else "", worker_id, end)

    def _attempt_settled(self, item: AttemptSettled) -> None:
        attempt_id = item.end.attempt_id
        result = self._settling.pop(attempt_id, None)
        settled = item.outcome if isinstance(item.outcome, Settled) else None
        if result is not None:
            if settled is None or settled.verdict is Verdict.LOST:
                self._fleet.forget(item.worker_id, attempt_id)
            else:
                self._fleet.acknowledge(item.worker_id, result)
        running = self._running.pop(attempt_id, None)
        if running is None or settled is None:
            _log.info("late result dropped", worker=item.worker_id, attempt=attempt_id)
            return
        now_ms = self._clock.now_ms()
        if settled.job_state == "queued":
            self._board.apply(
                AttemptLost(at_ms=now_ms, attempt_id=AttemptId(attempt_id), executed=settled.counts_as_loss)
            )
        else:
            self._board.apply(
                AttemptFinished(
                    at_ms=now_ms,
                    attempt_id=AttemptId(attempt_id),
                    outcome=events.Outcome(settled.job_state),
                    gpu_ms=settled.gpu_ms,
                )
            )
        if settled.set_aside_until is not None:
            _log.error("worker set aside", worker=running.worker_id, until=str(settled.set_aside_until))
            self._set_aside[running.worker_id] = settled.set_aside_until
            self._open_or_close(running.worker_id, closed=True)
        self._updates.publish(
            JobUpdate(job_id=settled.job_id, event_seq=settled.event_seq, state=settled.job_state)
        )
        self._show_end(running, settled, result, now_ms)
        _log.info(
            "attempt ended",
            job=settled.job_id,
            attempt=attempt_id,
            verdict=settled.verdict.value,
            gpu_ms=settled.gpu_ms,
            billed_ms=settled.billed_ms,
            absorbed_ms=settled.absorbed_ms,
            worker=running.worker_id,
        )

    # --- decisions out ----------------------------------------------------------------------------------

    async def _decide(self) -> bool:
        """Decide, commit, act once; returns whether to decide again, because a start was refused."""
        now_ms = self._clock.now_ms()
        decisions = self._board.decide(now_ms)
        for decision in decisions:
            match decision:
                case Stop():
                    self._stop(decision)
                case GiveUp():
                    await self._give_up(decision)
        return await self._start([d for d in decisions if isinstance(d, Start)], now_ms)

    async def _start(self, starts: Sequence[Start], now_ms: int) -> bool:
        tags = self._board.unstored_tags()
        if not starts and not tags:
            return False
        planned = [
            dispatch.PlannedAttempt(
                attempt_id=str(uuid.uuid4()),
                token=str(uuid.uuid4()),
                job_id=start.job_id,
                account_id=start.account_id,
                tier=start.tier,
                worker_id=start.worker_id,
                incarnation=self._reports[start.worker_id].incarnation,
                charge=start.charge,
                decision={"reason": start.reason, "warm": start.warm, **asdict(start.keys)},
                sentence=start.reason,
            )
            for start in starts
        ]
        accounts = {plan.account_id for plan in planned} | {account_id for account_id, _, _ in tags}
        tries = itertools.count()
        outcome = await self._lane.run(
            lambda connection: dispatch.start_attempts(
                connection,
                epoch=self._epoch,
                planned=planned,
                tags=tags,
                running=[r.attempt_id for r in self._running.values() if r.account_id in accounts],
                parameters=self._parameters,
                now_ms=now_ms,
                again=next(tries) > 0,
            )
        )
        for account_id, tier, tag in tags:
            self._board.apply(TagsStored(at_ms=now_ms, account_id=account_id, tier=tier, tag=tag))
        warm = {start.job_id: start.warm for start in starts}
        for started in outcome.started:
            self._act(started, now_ms, warm=warm[started.planned.job_id])
        for refused in outcome.refused:
            _log.info("start refused", job=refused.job_id, because=refused.because.value)
            self._board.apply(StartRefused(at_ms=now_ms, job_id=refused.job_id, reason=refused.because))
        return len(outcome.started) < len(planned)

    def _act(self, started: dispatch.StartedAttempt, now_ms: int, *, warm: bool) -> None:
        plan = started.planned
        spec = spec_from_json(started.spec)
        self._running[plan.attempt_id] = Running(
            attempt_id=plan.attempt_id,
            token=plan.token,
            job_id=plan.job_id,
            account_id=plan.account_id,
            tier=plan.tier,
            model=spec.model,
            worker_id=plan.worker_id,
            incarnation=plan.incarnation,
            started_ms=now_ms,
        )
        self._board.apply(
            AttemptStarted(
                at_ms=now_ms,
                job_id=plan.job_id,
                attempt_id=AttemptId(plan.attempt_id),
                worker_id=WorkerId(plan.worker_id),
                charge=plan.charge,
            )
        )
        self._updates.publish(
            JobUpdate(
                job_id=plan.job_id,
                event_seq=started.event_seq,
                state="running",
                worker_id=plan.worker_id,
                attempt_id=plan.attempt_id,
            )
        )
        self._metrics.attempt_started(tier=plan.tier, warm=warm)
        if started.waited_ms is not None:
            self._metrics.job_started(tier=plan.tier, waited_ms=started.waited_ms)
        _log.info(
            "attempt started",
            job=plan.job_id,
            attempt=plan.attempt_id,
            worker=plan.worker_id,
            tier=plan.tier.value,
        )
        self._fleet.render(
            plan.worker_id,
            render_request(plan, spec, epoch=self._epoch),
        )

    def _stop(self, stop: Stop) -> None:
        running = self._running[stop.attempt_id]
        self._fleet.stop(running.worker_id, running.attempt_id, running.token)
        self._board.apply(StopAsked(at_ms=self._clock.now_ms(), attempt_id=stop.attempt_id))

    async def _give_up(self, decision: GiveUp) -> None:
        now_ms = self._clock.now_ms()
        sequence = await self._lane.run(
            lambda connection: endings.give_up(
                connection, epoch=self._epoch, job_id=decision.job_id, sentence=decision.reason, now_ms=now_ms
            )
        )
        self._board.apply(JobGivenUp(at_ms=now_ms, job_id=decision.job_id))
        if sequence is not None:
            self._updates.publish(JobUpdate(job_id=decision.job_id, event_seq=sequence, state="failed"))

    # --- questions and figures --------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """How many workers have joined and are not lost."""
        return len(self._reports)

    def queue_statuses(self, job_ids: Iterable[str]) -> Mapping[str, QueueStatus]:
        """Return why each of these jobs waits; jobs that do not wait, or are not known yet, are absent."""
        statuses = {}
        for job_id in job_ids:
            status = self._board.status(JobId(job_id))
            if status is not None:
                statuses[job_id] = QueueStatus(
                    reason=QueueReason(status.reason.value),
                    sentence=status.sentence,
                    position=status.position,
                )
        return statuses

    def _show_end(
        self, running: Running, settled: Settled, result: AttemptResult | None, now_ms: int
    ) -> None:
        if result is not None and settled.verdict is not Verdict.LOST:
            self._metrics.attempt_ended(
                tier=running.tier,
                model=running.model,
                run_ms=now_ms - running.started_ms,
                load_ms=result.load_ms,
                times=result.times,
            )
        if settled.job_state == "queued":
            out_of_memory = result is not None and result.failure_reason == "OUT_OF_MEMORY"
            self._metrics.job_requeued(RequeueReason.OOM if out_of_memory else RequeueReason.WORKER_LOST)
        else:
            failed = settled.job_state == "failed"
            self._metrics.job_ended(
                tier=running.tier,
                outcome=Outcome(settled.job_state),
                blame=(result.blame if result else Blame.PLATFORM) if failed else Blame.NONE,
            )
        if running.tier is Tier.FAST:
            self._metrics.settled(
                plan=settled.plan, billed_ms=settled.billed_ms, released_ms=settled.released_ms
            )

    def _show(self, began_ns: int) -> None:
        now_ms = self._clock.now_ms()
        for tier in Tier:
            self._metrics.queue_seen(
                tier=tier,
                queued=self._board.queued(tier),
                running=self._board.running(tier),
                oldest_ms=self._board.oldest_arrival_ms(tier),
                now_ms=now_ms,
            )
        busy = {running.worker_id for running in self._running.values()}
        self._metrics.fleet_seen(
            Counter(
                WorkerState.RUNNING
                if worker_id in busy
                else WorkerState.DRAINING
                if worker_id in self._closed
                else WorkerState.IDLE
                for worker_id in self._reports
            )
        )
        self._metrics.cycle_ended(took_ns=time.monotonic_ns() - began_ns, now_ms=now_ms)


def _has(report: WorkerReport, attempt_id: str) -> bool:
    """Return whether a worker has an attempt in hand, or its result."""
    if report.active is not None and report.active.attempt_id == attempt_id:
        return True
    return any(result.attempt_id == attempt_id for result in report.unacknowledged)
