"""What workers and settlements say, held against what the rows say.

A worker's report is the truth about the worker, the rows are the truth about attempts. Where they differ, the
worker is told to let go of what is not ours, and what it should have and has not is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import structlog

from gpu_worker.contract import AttemptResult, Blame, Outcome, RenderSpec, RunInHand, WorkerReport
from scheduler.arrivals import memory_beyond
from scheduler.clock import to_ms
from scheduler.desk import Desk
from scheduler.fleet import (
    GoneBecause,
    RenderRefused,
    RenderTaken,
    WorkerAwaited,
    WorkerFound,
    WorkerGone,
    WorkerHeard,
    WorkerLeaves,
)
from scheduler.inbox import AttemptSettled, Item
from scheduler.metrics import RequeueReason
from scheduler.policy import events
from scheduler.policy.events import (
    AttemptDrawn,
    AttemptFinished,
    AttemptLost,
    CheckpointSaved,
    MemoryOutgrown,
    ModelEvicted,
    ModelLoaded,
    TierPaused,
    TierResumed,
    WorkerJoined,
    WorkerLost,
)
from scheduler.policy.ids import AttemptId, JobId, Tier, WorkerId
from scheduler.policy.worker import Worker
from scheduler.roster import Roster
from scheduler.running import Running
from scheduler.settlement import Settlement, end_of, end_of_lost, end_of_too_large, ran_out_of_memory
from scheduler.store import checkpoints
from scheduler.store.checkpoints import SavedCheckpoint, as_policy_sees
from scheduler.store.endings import AttemptEnd, Settled, Unknown, Verdict
from scheduler.store.operations import Wishes
from scheduler.tracing import ended, log_fields, noted, trace_id_of
from scheduler.updates import JobUpdate

_log = structlog.get_logger()

# A report that was made before an attempt arrived does not have it yet.
_RENDER_GRACE_MS = 30_000
# A GPU that hangs answers every heartbeat, since those come from another thread. No admitted job takes this
# many times the largest predicted cost.
_OVERDUE_TIMES = 3
_IN_GOOD_ORDER = (Outcome.SUCCEEDED, Outcome.CANCELLED, Outcome.HANDED_OVER)


class RollCall:
    """Takes what is heard, and tells the board."""

    def __init__(self, desk: Desk, settlement: Settlement, roster: Roster) -> None:
        self._desk = desk
        self._settlement = settlement
        self._roster = roster
        self._settling: dict[str, AttemptResult | RequeueReason] = {}
        """Attempts whose end is being settled, with what their workers said, or why they were given up."""
        self._awaited: dict[str, dict[str, RenderSpec]] = {}
        """Workers from before this scheduler led that have yet to answer, with what is to be adopted then."""
        self._paused: frozenset[Tier] = frozenset()
        self._fleet_is_met = False

    def take(
        self,
        item: WorkerAwaited
        | WorkerFound
        | WorkerHeard
        | WorkerLeaves
        | WorkerGone
        | RenderTaken
        | RenderRefused
        | AttemptSettled,
    ) -> None:
        """Take note of one thing that was heard."""
        match item:
            case WorkerAwaited():
                self._awaited[item.worker_id] = {}
            case WorkerFound():
                self._worker_found(item.report, outdated=item.outdated)
            case WorkerHeard():
                self._worker_heard(item.report)
            case WorkerLeaves():
                now_ms = self._desk.clock.now_ms()
                self._desk.workers.departs(item.worker_id, now_ms)
                self._roster.leaves(item.worker_id, now_ms)
            case WorkerGone():
                self._worker_gone(item)
            case RenderTaken():
                self._render_taken(item)
            case RenderRefused():
                self._render_refused(item)
            case AttemptSettled():
                self._attempt_settled(item)

    def fleet_met(self) -> None:
        """Note that the workers that lived before this scheduler led have all joined, or are awaited."""
        self._fleet_is_met = True

    def adopt(self, one: Running, spec: RenderSpec) -> None:
        """Bring a worker in step with the row of an attempt that ran before this scheduler led.

        The last one may have died between its row and its call.
        """
        report = self._desk.workers.report(one.worker_id)
        if report is None and one.worker_id in self._awaited:
            self._awaited[one.worker_id][one.attempt_id] = spec
            return
        if report is None:
            self._lose(one, "Its GPU worker was lost while the scheduler was away.", executed=True)
            return
        if one.attempt_id in self._settling:
            return
        parked = one.parked_since_ms is not None
        if not _has(report, one.attempt_id):
            if parked or one.drawn_ms is not None:
                self._lose(one, "Its GPU worker has it no more.", executed=True)
                return
            # A worker that gets it twice draws it once.
            fits = one.checkpoint is not None and one.checkpoint.device == report.device
            self._desk.give(one, spec, one.checkpoint if fits else None)
        elif not parked and any(run.attempt_id == one.attempt_id for run in report.parked):
            self._desk.fleet.resume(one.worker_id, one.attempt_id)

    def heed(self, wishes: Wishes) -> None:
        """Tell the board what operators want, as far as that is new."""
        now_ms = self._desk.clock.now_ms()
        for tier in sorted(wishes.paused - self._paused):
            _log.info("tier paused", tier=tier.value)
            self._desk.tell(TierPaused(at_ms=now_ms, tier=tier))
        for tier in sorted(self._paused - wishes.paused):
            _log.info("tier resumed", tier=tier.value)
            self._desk.tell(TierResumed(at_ms=now_ms, tier=tier))
        self._paused = wishes.paused
        for worker_id in sorted(self._desk.workers.wanted(wishes.draining, wishes.set_aside)):
            self._desk.look_at(worker_id)
        for worker_id, at in wishes.draining.items():
            if to_ms(at) <= now_ms:
                # Said again with each look at the wishes until they have ended: to ask twice changes nothing.
                for running in self._desk.running.on(worker_id):
                    self._desk.fleet.hand_over(worker_id, running.attempt_id)

    def close_down(self) -> None:
        """Let nothing start any more, and have everything that runs handed over."""
        _log.info("closing down", attempts=len(self._desk.running))
        self._desk.workers.close_all()
        for worker_id in self._desk.workers.ids():
            self._desk.look_at(worker_id)
        self.hand_over()

    def hand_over(self) -> None:
        """Have everything that runs handed over; to ask twice changes nothing."""
        for running in self._desk.running:
            self._desk.fleet.hand_over(running.worker_id, running.attempt_id)

    async def save_checkpoints(self, items: Iterable[Item]) -> None:
        """Write the checkpoints that workers report.

        Before anything else of these items: if one of them tells of a loss, its job goes on from there.
        """
        saved: dict[str, SavedCheckpoint] = {}
        for item in items:
            if not isinstance(item, WorkerFound | WorkerHeard):
                continue
            for run in _with_checkpoints(item.report):
                running = self._desk.running.get(run.attempt_id)
                if (
                    running is not None
                    and run.checkpoint is not None
                    and run.checkpoint != running.checkpoint
                    and run.token == running.token
                ):
                    saved[run.attempt_id] = SavedCheckpoint(
                        attempt_id=run.attempt_id, token=run.token, checkpoint=run.checkpoint
                    )
        if not saved:
            return
        stored = await self._desk.lane.run(
            lambda connection: checkpoints.store_checkpoints(
                connection, epoch=self._desk.epoch, saved=list(saved.values())
            )
        )
        now_ms = self._desk.clock.now_ms()
        for attempt_id, one in saved.items():
            running = self._desk.running.get(attempt_id)
            if attempt_id in stored and running is not None:
                self._desk.running.put(replace(running, checkpoint=one.checkpoint))
                self._desk.metrics.checkpoint_stored(one.checkpoint)
                self._desk.tell(
                    CheckpointSaved(
                        at_ms=now_ms,
                        attempt_id=AttemptId(attempt_id),
                        checkpoint=as_policy_sees(one.checkpoint),
                    )
                )

    def _worker_found(self, report: WorkerReport, *, outdated: bool) -> None:
        now_ms = self._desk.clock.now_ms()
        worker_id = WorkerId(report.worker_id)
        _log.info(
            "worker joined", worker=worker_id, release=report.release, device=report.device, pid=report.pid
        )
        for running in self._desk.running.on(report.worker_id):
            if running.incarnation != report.incarnation:
                self._lose(running, f"The GPU worker {worker_id} was restarted.", executed=True)
        self._roster.began(report, now_ms)
        self._desk.workers.joined(report, now_ms, outdated=outdated)
        to_adopt = self._no_longer_awaited(report.worker_id) or {}
        if not self._awaited:
            self._desk.updates.met_worker(report)
        self._desk.tell(
            WorkerJoined(
                at_ms=now_ms,
                worker=Worker(
                    worker_id=worker_id,
                    memory_bytes=report.memory_bytes,
                    speed_permille=report.speed_permille,
                    warm_models=frozenset(report.warm_models),
                    device=report.device,
                    models=None if report.models is None else frozenset(report.models),
                ),
            )
        )
        self._compare(report)
        for attempt_id, spec in to_adopt.items():
            one = self._desk.running.get(attempt_id)
            if one is not None:
                self.adopt(one, spec)

    def _no_longer_awaited(self, worker_id: str) -> Mapping[str, RenderSpec] | None:
        """Return the attempts to be adopted of a worker that was awaited until now; None: it was not."""
        to_adopt = self._awaited.pop(worker_id, None)
        if to_adopt is not None and not self._awaited:
            # What the fleet could do is told only now: front doors refuse what nobody could.
            for one in self._desk.workers.ids():
                report = self._desk.workers.report(one)
                assert report is not None
                self._desk.updates.met_worker(report)
        return to_adopt

    def _worker_heard(self, report: WorkerReport) -> None:
        known = self._desk.workers.report(report.worker_id)
        if known is None or known.incarnation != report.incarnation:
            return  # said before it was given up: its next word comes as WorkerFound
        now_ms = self._desk.clock.now_ms()
        worker_id = WorkerId(report.worker_id)
        for model in set(report.warm_models) - set(known.warm_models):
            self._desk.tell(ModelLoaded(at_ms=now_ms, worker_id=worker_id, model=model))
        for model in set(known.warm_models) - set(report.warm_models):
            self._desk.tell(ModelEvicted(at_ms=now_ms, worker_id=worker_id, model=model))
        if known.healthy and not report.healthy:
            _log.warning("worker unhealthy", worker=worker_id, sentence=report.sentence)
        self._compare(report)

    def _compare(self, report: WorkerReport) -> None:
        """Hold a worker's report against the rows: settle its results, end what is not ours."""
        self._desk.metrics.worker_heard(report, self._desk.clock.now_ms())
        for result in report.unacknowledged:
            # Whether a larger worker is there is not known before all have joined; its next report says it
            # again.
            too_early = ran_out_of_memory(result) and (not self._fleet_is_met or bool(self._awaited))
            if result.attempt_id not in self._settling and not too_early:
                running = self._desk.running.get(result.attempt_id)
                self._settle(running, report.worker_id, self._end_of(result, report, running), result)
        self._drawn(report)
        at_odds = False
        for run in in_hand(report):
            # Not ours, or given up already: its loss is being settled, and what it does counts for nothing.
            given_up = isinstance(self._settling.get(run.attempt_id), RequeueReason)
            if run.attempt_id not in self._desk.running or given_up:
                # If it stored a checkpoint, its job probably goes on from there.
                self._desk.fleet.forget(report.worker_id, run.attempt_id, kept=run.checkpoint is not None)
                # What has the GPU for nobody ends at its next step; until then all else would be refused.
                at_odds = at_odds or run is report.active
        now_ms = self._desk.clock.now_ms()
        for running in self._desk.running.on(report.worker_id):
            if now_ms - running.given_ms > _RENDER_GRACE_MS and not _has(report, running.attempt_id):
                was_there = running.parked_since_ms is not None or running.drawn_ms is not None
                because = RequeueReason.WORKER_LOST if was_there else RequeueReason.NOT_TAKEN
                self._lose(running, "The GPU worker does not have it.", executed=was_there, because=because)
            elif running.on_gpu_ms(now_ms) > _OVERDUE_TIMES * self._desk.parameters.max_predicted_ms:
                self._lose(
                    running,
                    "It ran far longer than any job may: the GPU hangs.",
                    executed=True,
                    because=RequeueReason.TIMEOUT,
                )
        self._desk.workers.heard(report, at_odds=at_odds)
        self._desk.look_at(report.worker_id)

    def _drawn(self, report: WorkerReport) -> None:
        """Take off a worker's hands what needs its GPU no more.

        What failed stays there until it is settled: that may say that the worker is to have nothing else.
        """
        drawn = {run.attempt_id for run in report.drawn}
        drawn.update(one.attempt_id for one in report.unacknowledged if one.outcome in _IN_GOOD_ORDER)
        running = self._desk.running.with_gpu(report.worker_id)
        if running is not None and running.attempt_id in drawn:
            now_ms = self._desk.clock.now_ms()
            self._desk.running.put(replace(running, drawn_ms=now_ms))
            self._desk.tell(AttemptDrawn(at_ms=now_ms, attempt_id=AttemptId(running.attempt_id)))
            noted(running.span, "drawn", now_ms)

    def _end_of(self, result: AttemptResult, report: WorkerReport, running: Running | None) -> AttemptEnd:
        """Return what a worker's result comes to, by what the fleet has."""
        end = end_of(
            result,
            device=report.device,
            speed_permille=report.speed_permille,
            memory_bytes=report.memory_bytes,
        )
        if not end.outgrew_bytes or running is None:
            return end
        # Decided before it is settled, so that the job fails in the same transaction. Failed after that by a
        # decision of the board, it would wait for ever if the scheduler died in between.
        if self._desk.board.has_memory(running.model, memory_beyond(end.outgrew_bytes)):
            return end
        return end_of_too_large(end, running.model)

    def _worker_gone(self, gone: WorkerGone) -> None:
        report = self._desk.workers.report(gone.worker_id)
        if report is not None and report.incarnation == gone.incarnation:
            now_ms = self._desk.clock.now_ms()
            self._roster.ended(gone, now_ms)
            self._desk.metrics.worker_ended(
                gone.worker_id,
                gone.incarnation,
                busy=bool(self._desk.running.on(gone.worker_id)),
                now_ms=now_ms,
            )
            self._desk.workers.gone(gone.worker_id)
            self._desk.tell(WorkerLost(at_ms=now_ms, worker_id=WorkerId(gone.worker_id)))
        elif self._no_longer_awaited(gone.worker_id) is None:
            return
        if gone.because is GoneBecause.REPLACED:
            _log.info("worker ended", worker=gone.worker_id)
        else:
            _log.warning("worker lost", worker=gone.worker_id, sentence=gone.sentence)
        for running in self._desk.running.on(gone.worker_id):
            self._lose(running, gone.sentence, executed=True)

    def _render_taken(self, taken: RenderTaken) -> None:
        running = self._desk.running.get(taken.attempt_id)
        if running is not None:
            took_ms = self._desk.clock.now_ms() - running.given_ms
            self._desk.metrics.attempt_placed(model=running.model, took_ms=took_ms)

    def _render_refused(self, refused: RenderRefused) -> None:
        running = self._desk.running.get(refused.attempt_id)
        if running is not None:
            _log.warning("render refused", worker=refused.worker_id, sentence=refused.sentence)
            self._desk.workers.refused(refused.worker_id)
            self._desk.look_at(refused.worker_id)
            self._lose(running, refused.sentence, executed=False, because=RequeueReason.NOT_TAKEN)

    def _lose(
        self,
        running: Running,
        sentence: str,
        *,
        executed: bool,
        because: RequeueReason = RequeueReason.WORKER_LOST,
    ) -> None:
        if running.attempt_id not in self._settling:
            end = end_of_lost(running.attempt_id, running.token, sentence, executed=executed)
            self._settle(running, running.worker_id, end, because)
        elif isinstance(self._settling[running.attempt_id], AttemptResult):
            # What its worker said of its end came first, and counts.
            _log.info("given up too late", worker=running.worker_id, attempt=running.attempt_id)

    def _settle(
        self,
        running: Running | None,
        worker_id: str,
        end: AttemptEnd,
        because: AttemptResult | RequeueReason,
    ) -> None:
        self._settling[end.attempt_id] = because
        if running is not None:
            # From here to the end of its span it is being settled.
            now_ms = self._desk.clock.now_ms()
            if isinstance(because, AttemptResult):
                told = {"darkroom.reason": because.failure_reason} if because.failure_reason else {}
                noted(running.span, "ended", now_ms, told)
            else:
                told = {"darkroom.reason": because.value}
                # Why a worker refused is said by the worker, in the words of an error perhaps.
                if because is not RequeueReason.NOT_TAKEN:
                    told["darkroom.sentence"] = end.sentence
                noted(running.span, "lost", now_ms, told)
        # An end that matches nothing we run is settled all the same:
        # the database knows whether it is late or false.
        self._settlement.put(running.account_id if running else "", worker_id, end)

    def _attempt_settled(self, item: AttemptSettled) -> None:
        attempt_id = item.end.attempt_id
        because = self._settling.pop(attempt_id)
        result = because if isinstance(because, AttemptResult) else None
        settled = item.outcome if isinstance(item.outcome, Settled) else None
        running = self._desk.running.pop(attempt_id)
        if result is not None:
            if settled is None or settled.verdict is Verdict.LOST:
                kept = _goes_on_elsewhere(item.outcome) and (
                    running is None or running.checkpoint is not None
                )
                self._desk.fleet.forget(item.worker_id, attempt_id, kept=kept)
            else:
                self._desk.fleet.acknowledge(item.worker_id, result)
        if running is not None:
            self._end_trace(running, settled, result)
        if running is None or settled is None:
            told_again = settled is not None and settled.verdict is item.end.verdict
            event = "result told again" if told_again else "late result dropped"
            _log.info(event, worker=item.worker_id, attempt=attempt_id)
            return
        now_ms = self._desk.clock.now_ms()
        if settled.job_state == "queued":
            if item.end.outgrew_bytes:
                needed_bytes = memory_beyond(item.end.outgrew_bytes)
                self._desk.tell(
                    MemoryOutgrown(at_ms=now_ms, job_id=JobId(running.job_id), memory_bytes=needed_bytes)
                )
            self._desk.tell(
                AttemptLost(at_ms=now_ms, attempt_id=AttemptId(attempt_id), executed=settled.counts_as_loss)
            )
        else:
            self._desk.tell(
                AttemptFinished(
                    at_ms=now_ms,
                    attempt_id=AttemptId(attempt_id),
                    outcome=events.Outcome(settled.job_state),
                    gpu_ms=settled.gpu_ms,
                )
            )
        if settled.set_aside_until is not None:
            _log.error("worker set aside", worker=running.worker_id, until=str(settled.set_aside_until))
            self._desk.workers.set_aside(running.worker_id, settled.set_aside_until)
        self._desk.look_at(running.worker_id)
        self._desk.updates.publish(
            JobUpdate(job_id=settled.job_id, event_seq=settled.event_seq, state=settled.job_state)
        )
        self._show_end(running, settled, because, now_ms)
        _log.info(
            "attempt ended",
            job=settled.job_id,
            attempt=attempt_id,
            verdict=settled.verdict.value,
            gpu_ms=settled.gpu_ms,
            billed_ms=settled.billed_ms,
            absorbed_ms=settled.absorbed_ms,
            repeated=settled.repeated,
            steps_redone=0 if result is None else result.steps_redone,
            worker=running.worker_id,
            **log_fields(running.span),
        )

    def _end_trace(self, running: Running, settled: Settled | None, result: AttemptResult | None) -> None:
        outcome = "lost" if result is None else result.outcome.value
        attributes: dict[str, str | int] = {"darkroom.outcome": outcome}
        if settled is not None:
            attributes["darkroom.job_state"] = settled.job_state
            attributes["darkroom.gpu_ms"] = settled.gpu_ms
            attributes["darkroom.billed_ms"] = settled.billed_ms
        ended(
            running.span,
            self._desk.clock.now_ms(),
            attributes,
            failed=result is None or result.outcome is Outcome.FAILED,
        )

    def _show_end(
        self, running: Running, settled: Settled, because: AttemptResult | RequeueReason, now_ms: int
    ) -> None:
        result = because if isinstance(because, AttemptResult) else None
        if result is not None:
            self._desk.metrics.run_ended(running.model, result)
        if result is not None and settled.verdict is not Verdict.LOST:
            self._desk.metrics.attempt_ended(
                tier=running.tier,
                model=running.model,
                run_ms=running.on_gpu_ms(now_ms),
                load_ms=result.load_ms,
                times=result.times,
                deliver_ms=None if running.drawn_ms is None else now_ms - running.drawn_ms,
                steps=running.steps if result.outcome is Outcome.SUCCEEDED else 0,
                trace_id=trace_id_of(running.span),
            )
        if settled.job_state == "queued":
            self._desk.metrics.job_requeued(_requeue_reason(because))
        else:
            failed = settled.job_state == "failed"
            self._desk.metrics.job_ended(
                tier=running.tier,
                outcome=Outcome(settled.job_state),
                blame=(result.blame if result else Blame.PLATFORM) if failed else Blame.NONE,
            )
        if running.tier is Tier.FAST:
            self._desk.metrics.settled(
                plan=settled.plan,
                due_ms=settled.due_ms,
                billed_ms=settled.billed_ms,
                released_ms=settled.released_ms,
                thresholds=settled.thresholds,
            )


def in_hand(report: WorkerReport) -> Iterator[RunInHand]:
    """Return what a worker has begun and not ended."""
    yield from report.drawn
    if report.active is not None:
        yield report.active
    yield from report.parked


def _requeue_reason(because: AttemptResult | RequeueReason) -> RequeueReason:
    if isinstance(because, RequeueReason):
        return because
    if because.outcome is Outcome.HANDED_OVER:
        return RequeueReason.DRAIN
    return RequeueReason.OOM if ran_out_of_memory(because) else RequeueReason.FAILED


def _with_checkpoints(report: WorkerReport) -> Iterator[RunInHand | AttemptResult]:
    """Return what a worker may have stored a checkpoint of, whose job is to go on from it."""
    yield from in_hand(report)
    for result in report.unacknowledged:
        if result.outcome is Outcome.HANDED_OVER:
            yield result


def _has(report: WorkerReport, attempt_id: str) -> bool:
    """Return whether a worker has an attempt in hand, or its result."""
    return any(run.attempt_id == attempt_id for run in in_hand(report)) or any(
        result.attempt_id == attempt_id for result in report.unacknowledged
    )


def _goes_on_elsewhere(outcome: Settled | Unknown) -> bool:
    """Return whether an attempt whose end counts for nothing has a job that lives, or may live."""
    return isinstance(outcome, Unknown) or outcome.job_state in ("queued", "running")
