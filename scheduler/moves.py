"""What the board decides becomes rows in one transaction, then events, and only then calls to workers.

If the process dies between any two of these, the rows tell the next scheduler the rest.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import structlog

from gpu_worker.contract import WorkerReport
from scheduler.clock import to_ms
from scheduler.desk import Desk
from scheduler.metrics import DecisionResult, ResumedWhere
from scheduler.policy.decisions import GiveUp, Migrate, Resume, Start, Stop
from scheduler.policy.events import (
    AttemptMigrated,
    AttemptParked,
    AttemptResumed,
    AttemptStarted,
    JobGivenUp,
    MigrationRefused,
    RefusedBecause,
    StartRefused,
    StopAsked,
    TagsStored,
)
from scheduler.policy.ids import AttemptId, JobId, WorkerId
from scheduler.running import Running, steps_ahead, traced
from scheduler.store import dispatch, endings
from scheduler.store.jobs import spec_from_json
from scheduler.store.parking import DrawnAttempt, MigratedAttempt, PlannedMigration, PlannedResume
from scheduler.tracing import ended, job_waited, log_fields, noted, trace_id_of
from scheduler.updates import JobUpdate

_log = structlog.get_logger()


class Moves:
    """Decides and carries out."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def make(self) -> bool:
        """Decide, commit, act once; returns whether to decide again, because something was refused."""
        again = await self._decide()
        if not again:
            self._show_left()
        return again

    def _show_left(self) -> None:
        """Count the lines in which somebody waits who could start, by what is missing."""
        cell = self._desk.board.cell
        for tier, queue in cell.queues.items():
            for fit in queue.lines:
                able = cell.fleet.can_take(fit)
                self._desk.metrics.line_waits(
                    tier, DecisionResult.NO_GPU if able else DecisionResult.NO_MODEL_FIT
                )

    async def _decide(self) -> bool:
        now_ms = self._desk.clock.now_ms()
        decisions = self._desk.board.decide(now_ms)
        self._desk.notes.decided(decisions)
        for decision in decisions:
            match decision:
                case Stop():
                    self._stop(decision)
                case GiveUp():
                    await self._give_up(decision)
        return await self._commit([d for d in decisions if isinstance(d, Start | Resume | Migrate)], now_ms)

    async def _commit(self, moves: Sequence[Start | Resume | Migrate], now_ms: int) -> bool:
        tags = self._desk.board.unstored_tags()
        if not moves and not tags:
            return False
        planned = [self._planned(move) for move in moves if isinstance(move, Start)]
        resumes = [
            PlannedResume(attempt_id=move.attempt_id, sheltered=move.sheltered, sentence=move.reason)
            for move in moves
            if isinstance(move, Resume)
        ]
        migrations = [self._planned_migration(move) for move in moves if isinstance(move, Migrate)]
        taken = {move.to if isinstance(move, Migrate) else move.worker_id for move in moves}
        drawn = [
            DrawnAttempt(attempt_id=one.attempt_id, at_ms=one.drawn_ms)
            for worker_id in taken
            for one in self._desk.running.on(worker_id)
            if one.drawn_ms is not None
        ]
        accounts = {plan.account_id for plan in planned} | {account_id for account_id, _, _ in tags}
        tries = itertools.count()
        outcome = await self._desk.lane.run(
            lambda connection: dispatch.start_attempts(
                connection,
                epoch=self._desk.epoch,
                planned=planned,
                resumes=resumes,
                migrations=migrations,
                drawn=drawn,
                tags=tags,
                running=self._desk.running.ids_of(accounts),
                parameters=self._desk.parameters,
                now_ms=now_ms,
                again=next(tries) > 0,
            )
        )
        for account_id, tier, tag in tags:
            self._desk.tell(TagsStored(at_ms=now_ms, account_id=account_id, tier=tier, tag=tag))
        tiers = {plan.job_id: plan.tier for plan in planned}
        started = {one.planned.job_id: one for one in outcome.started}
        migrated = {one.planned.attempt_id: one for one in outcome.migrated}
        for move in moves:
            match move:
                case Start():
                    if move.job_id in started:
                        if move.parks is not None:
                            self._park(move.parks, move.job_id, outcome.event_seqs, now_ms)
                        self._act(move, started[move.job_id], now_ms)
                case Resume():
                    self._resume(move, outcome.event_seqs, now_ms)
                case Migrate():
                    self._migrate(move, migrated.get(move.attempt_id), now_ms)
        for refused in outcome.refused:
            _log.info("start refused", job=refused.job_id, because=refused.because.value)
            if refused.because is RefusedBecause.FUNDS:
                self._desk.metrics.job_held(tiers[refused.job_id])
            self._desk.tell(StartRefused(at_ms=now_ms, job_id=refused.job_id, reason=refused.because))
        return len(started) < len(planned) or len(migrated) < len(migrations)

    def _planned(self, start: Start) -> dispatch.PlannedAttempt:
        limits = self._desk.board.limits(start.account_id)
        decision = {
            "reason": start.reason,
            "warm": start.warm,
            **asdict(start.keys),
            "limit_running": limits.running,
            "limit_relax_running": limits.relax_running,
        }
        if start.parks is not None:
            decision["parks"] = start.parks
        if start.resume_from is not None:
            decision["resumes_at_step"] = start.resume_from.step
        return dispatch.PlannedAttempt(
            attempt_id=str(uuid.uuid4()),
            token=str(uuid.uuid4()),
            job_id=start.job_id,
            account_id=start.account_id,
            tier=start.tier,
            worker_id=start.worker_id,
            incarnation=self._report(start.worker_id).incarnation,
            charge=start.charge,
            decision=decision,
            sentence=start.reason,
            device=self._report(start.worker_id).device,
            parks=start.parks,
            sheltered=start.sheltered,
        )

    def _planned_migration(self, move: Migrate) -> PlannedMigration:
        return PlannedMigration(
            attempt_id=move.attempt_id,
            to_attempt_id=str(uuid.uuid4()),
            token=str(uuid.uuid4()),
            worker_id=move.to,
            incarnation=self._report(move.to).incarnation,
            decision={"reason": move.reason, "migrated_from": move.attempt_id},
            sentence=move.reason,
        )

    def _report(self, worker_id: str) -> WorkerReport:
        report = self._desk.workers.report(worker_id)
        assert report is not None, "the board gives nothing to a worker that is not there"
        return report

    def _act(self, start: Start, started: dispatch.StartedAttempt, now_ms: int) -> None:
        plan = started.planned
        spec = spec_from_json(started.spec)
        self._trace_wait(started, now_ms)
        running = Running(
            attempt_id=plan.attempt_id,
            token=plan.token,
            job_id=plan.job_id,
            account_id=plan.account_id,
            tier=plan.tier,
            model=spec.model,
            worker_id=plan.worker_id,
            incarnation=plan.incarnation,
            started_ms=now_ms,
            given_ms=now_ms,
            checkpoint=started.checkpoint,
            steps=steps_ahead(spec, started.checkpoint if start.resume_from is not None else None),
            traceparent=started.traceparent,
        )
        running = traced(running, self._desk.tracer)
        waited = self._desk.waits.started(plan.job_id, plan.account_id, now_ms)
        self._desk.tell(
            AttemptStarted(
                at_ms=now_ms,
                job_id=plan.job_id,
                attempt_id=AttemptId(plan.attempt_id),
                worker_id=WorkerId(plan.worker_id),
                charge=plan.charge,
                sheltered=plan.sheltered,
            )
        )
        self._desk.metrics.attempt_started(tier=plan.tier, warm=start.warm)
        if started.waited_ms is not None:
            self._desk.metrics.job_started(
                tier=plan.tier,
                waited_ms=started.waited_ms,
                held_ms=waited.held_ms,
                promised_ms=waited.told_ms,
                trace_id=trace_id_of(running.span),
            )
        _log.info(
            "attempt started",
            job=plan.job_id,
            attempt=plan.attempt_id,
            worker=plan.worker_id,
            tier=plan.tier.value,
            parks=start.parks,
            **log_fields(running.span),
        )
        self._desk.give(
            running,
            spec,
            started.checkpoint if start.resume_from is not None else None,
            after_loss=started.after_loss,
        )
        self._publish(running, started.event_seq)

    def _trace_wait(self, started: dispatch.StartedAttempt, now_ms: int) -> None:
        if started.queued_at is not None:
            plan = started.planned
            job_waited(
                self._desk.tracer,
                started.traceparent,
                since_ms=to_ms(started.queued_at),
                until_ms=now_ms,
                attributes={
                    "darkroom.job": plan.job_id,
                    "darkroom.account": plan.account_id,
                    "darkroom.tier": plan.tier.value,
                },
            )

    def _park(self, attempt_id: AttemptId, by: JobId, event_seqs: Mapping[JobId, int], now_ms: int) -> None:
        running = self._desk.running.get(attempt_id)
        assert running is not None, "what the board parks runs"
        running = replace(running, parked_since_ms=now_ms)
        self._desk.running.put(running)
        self._desk.tell(AttemptParked(at_ms=now_ms, attempt_id=attempt_id))
        self._desk.metrics.run_parked()
        noted(running.span, "parked", now_ms, {"darkroom.by": by})
        _log.info(
            "attempt parked",
            job=running.job_id,
            attempt=attempt_id,
            worker=running.worker_id,
            **log_fields(running.span),
        )
        self._publish(running, event_seqs.get(running.job_id))

    def _resume(self, move: Resume, event_seqs: Mapping[JobId, int], now_ms: int) -> None:
        running = self._desk.running.get(move.attempt_id)
        assert running is not None, "what the board resumes runs"
        assert running.parked_since_ms is not None, "what the board resumes is parked"
        parked_ms = running.parked_ms + now_ms - running.parked_since_ms
        running = replace(running, parked_since_ms=None, parked_ms=parked_ms)
        self._desk.running.put(running)
        self._desk.tell(AttemptResumed(at_ms=now_ms, attempt_id=move.attempt_id, sheltered=move.sheltered))
        self._desk.fleet.resume(running.worker_id, running.attempt_id)
        self._desk.look_at(running.worker_id)
        self._desk.metrics.run_resumed(ResumedWhere.SAME_GPU)
        noted(running.span, "resumed", now_ms)
        _log.info(
            "attempt resumed",
            job=running.job_id,
            attempt=move.attempt_id,
            worker=running.worker_id,
            **log_fields(running.span),
        )
        self._publish(running, event_seqs.get(running.job_id))

    def _migrate(self, move: Migrate, migrated: MigratedAttempt | None, now_ms: int) -> None:
        if migrated is None:
            _log.info("migration refused", attempt=move.attempt_id)
            self._desk.tell(MigrationRefused(at_ms=now_ms, attempt_id=move.attempt_id))
            return
        before = self._desk.running.pop(move.attempt_id)
        assert before is not None, "what the board moves runs"
        plan = migrated.planned
        spec = spec_from_json(migrated.spec)
        running = replace(
            before,
            attempt_id=plan.to_attempt_id,
            token=plan.token,
            worker_id=plan.worker_id,
            incarnation=plan.incarnation,
            started_ms=now_ms,
            parked_since_ms=None,
            parked_ms=0,
            checkpoint=migrated.checkpoint,
            steps=steps_ahead(spec, migrated.checkpoint),
        )
        ended(before.span, now_ms, {"darkroom.outcome": "migrated"})
        running = traced(running, self._desk.tracer)
        self._desk.tell(
            AttemptMigrated(
                at_ms=now_ms,
                attempt_id=move.attempt_id,
                to_attempt_id=AttemptId(plan.to_attempt_id),
                worker_id=WorkerId(plan.worker_id),
            )
        )
        self._desk.fleet.forget(before.worker_id, before.attempt_id, kept=True)
        self._desk.give(running, spec, migrated.checkpoint)
        self._desk.metrics.run_resumed(ResumedWhere.OTHER_GPU)
        _log.info(
            "attempt migrated",
            job=running.job_id,
            attempt=running.attempt_id,
            before=before.attempt_id,
            worker=running.worker_id,
            **log_fields(running.span),
        )
        self._publish(running, migrated.event_seq)

    def _publish(self, running: Running, event_seq: int | None) -> None:
        """Tell whoever watches where a job runs; None: its attempt has ended, which is about to be told."""
        if event_seq is not None:
            self._desk.updates.publish(
                JobUpdate(
                    job_id=running.job_id,
                    event_seq=event_seq,
                    state="running",
                    worker_id=running.worker_id,
                    attempt_id=running.attempt_id,
                    parked=running.parked_since_ms is not None,
                )
            )

    def _stop(self, stop: Stop) -> None:
        running = self._desk.running.get(stop.attempt_id)
        assert running is not None, "what the board stops runs"
        self._desk.fleet.stop(running.worker_id, running.attempt_id, running.token)
        self._desk.tell(StopAsked(at_ms=self._desk.clock.now_ms(), attempt_id=stop.attempt_id))

    async def _give_up(self, decision: GiveUp) -> None:
        now_ms = self._desk.clock.now_ms()
        sequence = await self._desk.lane.run(
            lambda connection: endings.give_up(
                connection,
                epoch=self._desk.epoch,
                job_id=decision.job_id,
                sentence=decision.reason,
                now_ms=now_ms,
            )
        )
        self._desk.tell(JobGivenUp(at_ms=now_ms, job_id=decision.job_id))
        if sequence is not None:
            self._desk.updates.publish(JobUpdate(job_id=decision.job_id, event_seq=sequence, state="failed"))
