"""What will probably happen: a copy of the board, played forward by the board's own code.

The copy is made from facts and given chances drawn elsewhere, so the same arguments give the same future. It
knows no faults, no cancels and no plans that change; runs park at once, not at their next boundary, which is
less than one step of error; and the time in which a model loads is the same for all.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from scheduler.policy.board import Board
from scheduler.policy.decisions import GiveUp, Migrate, Resume, Start, Stop
from scheduler.policy.events import (
    AccountRestored,
    AttemptFinished,
    AttemptMigrated,
    AttemptParked,
    AttemptRestored,
    AttemptResumed,
    AttemptStarted,
    CheckpointSaved,
    Event,
    FairShare,
    JobGivenUp,
    JobSubmitted,
    LimitsChanged,
    ModelEvicted,
    ModelLoaded,
    Outcome,
    StopAsked,
    WorkerJoined,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Checkpoint, Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.status import QueueReason
from scheduler.policy.worker import Worker

FIRST = 20_000
"""Starts that are played. What comes later is told from tags: so far off, chance has more say than detail."""

_HORIZON_MS = 24 * 3_600_000
"""Nothing is played beyond: a load of a day ahead is not foreseen by that of the last hour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A job that has not come yet."""

    after_ms: int
    account_id: AccountId
    """Unknown to the board: a newcomer."""
    like: AccountId
    """The account whose limits, weight and use a newcomer has; of one that is known, the account itself. If
    the facts do not tell of it, the job does not come."""
    tier: Tier
    predicted_ms: int
    step_ms: int
    model: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """The chances of one future."""

    arrivals: tuple[Arrival, ...] = ()
    """By `after_ms`."""
    repeat_ms: int = _HORIZON_MS
    """The arrivals come again after so long, and again."""
    cost_permille: tuple[int, ...] = (1000,)
    """What jobs take of what was predicted. A job has its own of these, by its arrival number, so that it is
    the same in all futures that are compared; a run has the next that its time so far does not rule out."""
    beyond_permille: tuple[int, ...] = (1000,)
    """What a run takes yet that has taken longer than any of these costs, of its time so far. Each job has
    its own, as of the costs."""
    load_ms: int = 0
    """What a start adds where the model is not loaded."""


AS_PREDICTED = Draws()
"""Nothing comes, and everything takes what was predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Future:
    """One way in which it may go on."""

    starts: Mapping[JobId, int]
    """When each job that waits now starts, ms. Those are missing that a gate holds which no time opens."""
    parking: frozenset[JobId]
    """Of these, fast jobs that take the GPU of a relax run."""


def roll_forward(
    facts: Iterable[Event], parameters: Parameters, draws: Draws, now_ms: int, first: int = FIRST
) -> Future:
    """Return how it goes on from these facts, with these chances.

    Ends once every job that waits has started, or after `first` starts; a job that is left then starts after
    the distance of its tag from its tier's virtual time, over the rate at which that moved until then.
    """
    roll = _Roll(facts, parameters, draws, now_ms)
    roll.play(first)
    return Future(starts=roll.starts, parking=frozenset(roll.parking))


class _Run:
    """A running attempt. Its times are those of a worker of speed 1000."""

    __slots__ = ("attempt_id", "ends_ms", "job", "since_ms", "total_ms", "worked_ms", "worker_id")

    def __init__(
        self, attempt_id: AttemptId, job: Job, worker_id: WorkerId, total_ms: int, worked_ms: int
    ) -> None:
        self.attempt_id = attempt_id
        self.job = job
        self.worker_id = worker_id
        self.total_ms = total_ms
        self.worked_ms = worked_ms
        """Until `since_ms`."""
        self.since_ms = 0
        self.ends_ms: int | None = None
        """None: it is parked."""


class _Roll:
    def __init__(self, facts: Iterable[Event], parameters: Parameters, draws: Draws, now_ms: int) -> None:
        self._parameters = parameters
        self._board = Board(parameters)
        self._draws = draws
        self._begin_ms = self._now_ms = now_ms
        self._workers: dict[WorkerId, Worker] = {}
        self._loaded: dict[WorkerId, list[str]] = {}
        """The model that was used last at the end."""
        self._needs: dict[str, int] = {}
        """The most memory a job of a model was seen to need."""
        self._accounts: dict[AccountId, AccountRestored] = {}
        self._limits: dict[AccountId, Limits] = {}
        self._accepted: dict[AccountId, int] = {}
        self._jobs: dict[JobId, Job] = {}
        """Those that wait."""
        self._runs: dict[AttemptId, _Run] = {}
        self._events: list[tuple[int, int, _Run | None]] = []
        """Ends of runs, and times at which there may be something to decide, soonest first."""
        self._count = 0
        self._last_arrival = 0
        self._starts = 0
        self.starts: dict[JobId, int] = {}
        self.parking: set[JobId] = set()
        running: list[AttemptRestored] = []
        stopping: list[AttemptId] = []
        for event in facts:
            self._board.apply(event)
            match event:
                case JobSubmitted():
                    self._jobs[event.job.job_id] = event.job
                    self._accept(event.job)
                case AccountRestored():
                    self._accounts[event.account_id] = event
                    self._limits[event.account_id] = event.limits
                case LimitsChanged():
                    self._limits[event.account_id] = event.limits
                case AttemptRestored():
                    running.append(event)
                    self._accept(event.job)
                case WorkerJoined():
                    self._workers[event.worker.worker_id] = event.worker
                    self._loaded[event.worker.worker_id] = sorted(event.worker.warm_models)
                case StopAsked():
                    stopping.append(event.attempt_id)
                case _:
                    pass
        self._waiting = {
            job_id
            for job_id, status in self._board.statuses(self._jobs).items()
            if status.reason in (QueueReason.WAITING_FOR_GPU, QueueReason.CONCURRENCY_LIMIT)
        }
        self._virtual_time = {tier: self._board.virtual_time(tier) for tier in Tier}
        for attempt in running:
            self._go_on(attempt)
        for attempt_id in stopping:
            self._stop(self._runs[attempt_id])

    def play(self, first: int) -> None:
        arrivals = self._arrivals()
        arrival = next(arrivals, None)
        until_ms = self._begin_ms + _HORIZON_MS
        self._decide()
        while self._waiting and self._starts < first:
            at_ms = min(
                self._events[0][0] if self._events else until_ms, until_ms if arrival is None else arrival[0]
            )
            if at_ms >= until_ms:
                break
            self._now_ms = at_ms
            while arrival is not None and arrival[0] <= at_ms:
                self._arrive(arrival[1])
                arrival = next(arrivals, None)
            while self._events and self._events[0][0] <= at_ms:
                run = heapq.heappop(self._events)[2]
                if run is not None and run.ends_ms == at_ms and run.attempt_id in self._runs:
                    self._end(run)
            self._decide()
        self._tell_the_rest()

    def _decide(self) -> None:
        now_ms, board = self._now_ms, self._board
        for decision in board.decide(now_ms):
            match decision:
                case Start():
                    self._start(decision)
                case Resume():
                    run = self._runs[decision.attempt_id]
                    board.apply(
                        AttemptResumed(at_ms=now_ms, attempt_id=run.attempt_id, sheltered=decision.sheltered)
                    )
                    self._get_gpu(run)
                case Migrate():
                    self._migrate(decision)
                case Stop():
                    board.apply(StopAsked(at_ms=now_ms, attempt_id=decision.attempt_id))
                    self._stop(self._runs[decision.attempt_id])
                case GiveUp():
                    board.apply(JobGivenUp(at_ms=now_ms, job_id=decision.job_id))

    # -- runs ---------------------------------------------------------------------------------------

    def _start(self, start: Start) -> None:
        now_ms = self._now_ms
        if start.parks is not None:
            self._park(self._runs[start.parks])
        job = self._jobs.pop(start.job_id)
        attempt_id = AttemptId(f"~{self._starts}")
        self._starts += 1
        self._board.apply(
            AttemptStarted(
                at_ms=now_ms,
                job_id=start.job_id,
                attempt_id=attempt_id,
                worker_id=start.worker_id,
                charge=start.charge,
                sheltered=start.sheltered,
            )
        )
        if start.job_id in self._waiting:
            self._waiting.remove(start.job_id)
            self.starts[start.job_id] = now_ms
            if start.parks is not None:
                self.parking.add(start.job_id)
        kept_ms = 0 if start.resume_from is None else start.resume_from.kept_ms
        run = _Run(attempt_id, job, start.worker_id, self._total_ms(job, kept_ms), kept_ms)
        self._runs[attempt_id] = run
        self._get_gpu(run)
        self._load(job, start.worker_id)

    def _get_gpu(self, run: _Run) -> None:
        speed = self._speed(run.worker_id)
        # Loading counts for nobody, so that it comes before the run's own time begins.
        run.since_ms = self._now_ms
        if run.job.model not in self._loaded.get(run.worker_id, ()):
            run.since_ms += self._draws.load_ms
        run.ends_ms = run.since_ms + max(0, run.total_ms - run.worked_ms) * 1000 // speed
        self._wake(run.ends_ms, run)

    def _park(self, run: _Run) -> None:
        now_ms = self._now_ms
        run.worked_ms += max(0, now_ms - run.since_ms) * self._speed(run.worker_id) // 1000
        run.ends_ms = None
        self._board.apply(AttemptParked(at_ms=now_ms, attempt_id=run.attempt_id))
        worker = self._workers.get(run.worker_id)
        if worker is not None:
            kept = Checkpoint(
                step=run.worked_ms // max(1, run.job.step_ms), kept_ms=run.worked_ms, device=worker.device
            )
            self._board.apply(CheckpointSaved(at_ms=now_ms, attempt_id=run.attempt_id, checkpoint=kept))
        self._wake(now_ms + self._parameters.park_patience_ms, None)

    def _migrate(self, migrate: Migrate) -> None:
        run = self._runs.pop(migrate.attempt_id)
        run.attempt_id = AttemptId(f"{run.attempt_id}>")
        run.worker_id = migrate.to
        self._runs[run.attempt_id] = run
        self._board.apply(
            AttemptMigrated(
                at_ms=self._now_ms,
                attempt_id=migrate.attempt_id,
                to_attempt_id=run.attempt_id,
                worker_id=migrate.to,
            )
        )
        self._get_gpu(run)
        self._load(run.job, migrate.to)

    def _stop(self, run: _Run) -> None:
        """Let a run end at its next step."""
        if run.ends_ms is None:
            self._end(run)
        else:
            run.ends_ms = min(run.ends_ms, self._now_ms + run.job.step_ms)
            self._wake(run.ends_ms, run)

    def _end(self, run: _Run) -> None:
        del self._runs[run.attempt_id]
        gpu_ms = run.worked_ms * 1000 // self._speed(run.worker_id)
        if run.ends_ms is not None:
            gpu_ms += max(0, self._now_ms - run.since_ms)
        self._board.apply(
            AttemptFinished(
                at_ms=self._now_ms, attempt_id=run.attempt_id, outcome=Outcome.SUCCEEDED, gpu_ms=gpu_ms
            )
        )
        self._accepted[run.job.account_id] -= 1

    def _go_on(self, attempt: AttemptRestored) -> None:
        """Take over a run as it is."""
        until_ms = self._begin_ms if attempt.parked_since_ms is None else attempt.parked_since_ms
        speed = self._speed(attempt.worker_id)
        worked_ms = max(0, until_ms - attempt.started_ms)
        run = _Run(
            attempt.attempt_id,
            attempt.job,
            attempt.worker_id,
            worked_ms if attempt.drawn else self._total_ms(attempt.job, worked_ms),
            worked_ms,
        )
        self._runs[run.attempt_id] = run
        if attempt.parked_since_ms is None:
            run.since_ms = self._begin_ms
            run.ends_ms = self._begin_ms + (run.total_ms - worked_ms) * 1000 // speed
            self._wake(run.ends_ms, run)
        else:
            self._wake(max(self._begin_ms, attempt.parked_since_ms + self._parameters.park_patience_ms), None)

    def _total_ms(self, job: Job, worked_ms: int) -> int:
        """Return what a job takes in all, given that it is not done after `worked_ms`."""
        chances = self._draws.cost_permille
        for number in range(len(chances)):
            total_ms = job.predicted_ms * chances[(job.arrival + number) % len(chances)] // 1000
            if total_ms > worked_ms:
                return total_ms
        beyond = self._draws.beyond_permille
        return worked_ms + max(1, worked_ms * beyond[job.arrival % len(beyond)] // 1000)

    def _wake(self, at_ms: int, run: _Run | None) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_ms, self._count, run))

    # -- workers ------------------------------------------------------------------------------------

    def _speed(self, worker_id: WorkerId) -> int:
        worker = self._workers.get(worker_id)
        return 1000 if worker is None else worker.speed_permille

    def _load(self, job: Job, worker_id: WorkerId) -> None:
        """Have the job's model on the worker, and those of the others that leave room for it."""
        loaded = self._loaded[worker_id]
        if job.model in loaded:
            loaded.remove(job.model)
        else:
            free = self._workers[worker_id].memory_bytes - self._needs[job.model]
            while loaded and sum(self._needs.get(model, 0) for model in loaded) > free:
                self._board.apply(ModelEvicted(at_ms=self._now_ms, worker_id=worker_id, model=loaded.pop(0)))
            self._board.apply(ModelLoaded(at_ms=self._now_ms, worker_id=worker_id, model=job.model))
        loaded.append(job.model)

    # -- arrivals -----------------------------------------------------------------------------------

    def _arrivals(self) -> Iterator[tuple[int, Arrival]]:
        at_ms = self._begin_ms
        while self._draws.arrivals:
            for arrival in self._draws.arrivals:
                yield at_ms + arrival.after_ms, arrival
            at_ms += self._draws.repeat_ms

    def _arrive(self, arrival: Arrival) -> None:
        """Accept a job, unless its account has as many as it may."""
        account_id = arrival.account_id
        if account_id not in self._limits:
            like = self._accounts.get(arrival.like)
            if like is None:
                return
            self._newcomer(account_id, like)
        if self._accepted.get(account_id, 0) >= self._limits[account_id].accepted:
            return
        number = self._last_arrival + 1
        job = Job(
            job_id=JobId(f"~{number}"),
            account_id=account_id,
            tier=arrival.tier,
            arrival=number,
            predicted_ms=arrival.predicted_ms,
            step_ms=arrival.step_ms,
            model=arrival.model,
            memory_bytes=arrival.memory_bytes,
        )
        self._jobs[job.job_id] = job
        self._accept(job)
        self._board.apply(JobSubmitted(at_ms=self._now_ms, job=job))

    def _newcomer(self, account_id: AccountId, like: AccountRestored) -> None:
        self._limits[account_id] = like.limits
        self._board.apply(
            AccountRestored(
                at_ms=self._now_ms,
                account_id=account_id,
                limits=like.limits,
                weight_milli=like.weight_milli,
                shares={
                    tier: FairShare(finish_tag=0, tag=None, usage=share.usage)
                    for tier, share in like.shares.items()
                },
            )
        )

    def _accept(self, job: Job) -> None:
        self._last_arrival = max(self._last_arrival, job.arrival)
        self._accepted[job.account_id] = self._accepted.get(job.account_id, 0) + 1
        self._needs[job.model] = max(self._needs.get(job.model, 0), job.memory_bytes)

    # -- what is not played -------------------------------------------------------------------------

    def _tell_the_rest(self) -> None:
        if not self._waiting:
            return
        elapsed_ms = max(1, self._now_ms - self._begin_ms)
        for tier in Tier:
            now = self._board.virtual_time(tier)
            rate = (now - self._virtual_time[tier]) / elapsed_ms
            if rate <= 0:
                continue
            for job_id, tag in self._tags(tier):
                if job_id in self._waiting:
                    self.starts[job_id] = self._now_ms + int(max(0, tag - now) / rate)

    def _tags(self, tier: Tier) -> Iterator[tuple[JobId, int]]:
        """Return the tags that the waiting jobs have or will have if nothing else changes."""
        queue = self._board.cell.queues[tier]
        for account in self._board.cell.accounts.values():
            tag, step = queue.next_tag(account, self._now_ms), queue.steps(account, self._now_ms)
            for job in account.turn(tier).jobs():
                yield job.job_id, tag
                tag += step(job)
