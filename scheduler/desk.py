"""What the parts of the loop have before them: the board, and all that is known beside it.

One task uses it. Whatever the board is told goes through here, so that it is taken down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from opentelemetry.trace import NoOpTracer, Tracer

from gpu_worker.contract import Checkpoint, RenderRequest, RenderSpec
from gpu_worker.prompt import file_stem
from scheduler.clock import LeaderClock
from scheduler.fleet import Fleet
from scheduler.metrics import SchedulerMetrics
from scheduler.policy.board import Board
from scheduler.policy.events import Event, WorkerDraining, WorkerResumed
from scheduler.policy.ids import WorkerId
from scheduler.policy.parameters import Parameters
from scheduler.running import Running, RunningAttempts
from scheduler.store import journal
from scheduler.store.lanes import Lane
from scheduler.tracing import traceparent_of
from scheduler.updates import Updates
from scheduler.waits import Waits
from scheduler.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Of one leader."""

    board: Board
    parameters: Parameters
    epoch: int
    lane: Lane
    fleet: Fleet
    updates: Updates
    clock: LeaderClock
    metrics: SchedulerMetrics
    tracer: Tracer = field(default_factory=NoOpTracer)
    running: RunningAttempts = field(default_factory=RunningAttempts)
    workers: Workers = field(default_factory=Workers)
    notes: journal.Notes = field(default_factory=journal.Notes)
    waits: Waits = field(init=False)

    def __post_init__(self) -> None:
        """Watch the waiting."""
        object.__setattr__(self, "waits", Waits(self.board))

    def tell(self, *facts: Event) -> None:
        """Tell the board what happened, and take it down."""
        for fact in facts:
            concerned = self.waits.concerned(fact)
            whose = self.board.whose(fact)
            self.board.apply(fact)
            self.notes.note(fact, whose)
            self.waits.heard(fact, concerned)

    def tell_of_waiting(self, facts: Sequence[Event]) -> None:
        """Tell the board all about an account that waited before this scheduler led, and take it down.

        Its waiting is not watched: that begins when the whole queue is known.
        """
        for fact in facts:
            self.board.apply(fact)
        self.notes.put_off(facts)

    def look_at(self, worker_id: str) -> None:
        """Let the board give a worker new attempts, or not, if that has changed."""
        now_ms = self.clock.now_ms()
        busy = self.running.with_gpu(worker_id) is not None
        takes_jobs = self.workers.looked_at(worker_id, busy=busy, now_ms=now_ms)
        if takes_jobs is True:
            self.tell(WorkerResumed(at_ms=now_ms, worker_id=WorkerId(worker_id)))
        elif takes_jobs is False:
            self.tell(WorkerDraining(at_ms=now_ms, worker_id=WorkerId(worker_id)))

    def give(
        self, running: Running, spec: RenderSpec, checkpoint: Checkpoint | None, *, after_loss: bool = False
    ) -> None:
        """Give an attempt that is a row to its worker, whose GPU it has from now on.

        `after_loss`: an attempt before it was lost, with what it had done since its newest checkpoint.
        """
        self.running.put(replace(running, given_ms=self.clock.now_ms()))
        self.look_at(running.worker_id)
        # Also what the board thinks is parked already: the worker lets it go on by itself in between.
        parked = self.running.parked_on(running.worker_id)
        self.fleet.render(
            running.worker_id,
            RenderRequest(
                job_id=running.job_id,
                attempt_id=running.attempt_id,
                token=running.token,
                epoch=self.epoch,
                tier=running.tier.value,
                spec=spec,
                file_stem=file_stem(spec.prompt),
                parks=parked[-1].attempt_id if parked else None,
                checkpoint=checkpoint,
                after_loss=after_loss,
                traceparent=traceparent_of(running.span),
            ),
        )
