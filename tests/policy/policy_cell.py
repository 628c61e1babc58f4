"""A cell in integer time: a real `Board`, workers that take as long as told, and the rows of a database.

It does what the service's loop does, in the same order: decide, commit, apply. `rows` is written by charges,
stored tags and corrections alone, never read off the board, so that a test may compare the two. After every
decision the promises that hold at any instant are checked.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from scheduler.policy import usage
from scheduler.policy.board import Board
from scheduler.policy.decisions import Decision, GiveUp, Migrate, Resume, Start, Stop
from scheduler.policy.events import (
    AccountRestored,
    AttemptDrawn,
    AttemptFinished,
    AttemptLost,
    AttemptMigrated,
    AttemptParked,
    AttemptResumed,
    AttemptStarted,
    CancelWanted,
    CellRestored,
    CheckpointSaved,
    Event,
    FairShare,
    JobGivenUp,
    JobSubmitted,
    MemoryOutgrown,
    MigrationRefused,
    Outcome,
    RefusedBecause,
    StartRefused,
    StopAsked,
    TagsStored,
    WorkerJoined,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Checkpoint, Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker

GIB = 2**30
WIDE = Limits(running=10_000, relax_running=10_000, accepted=10_000)
PLAN = Limits(running=3, relax_running=2, accepted=10)
NEVER_MS = 10**15

# What the bounds of the order are stated for: no memory of use, nothing out of order.
PLAIN = Parameters(memory_span_ms=0, affinity_ms=0, aging_ms=NEVER_MS)
# The order with its memory, and nothing out of it.
REMEMBERING = Parameters(affinity_ms=0, aging_ms=NEVER_MS)


def a_worker(
    name: str = "w0",
    *,
    gib: int = 16,
    speed: int = 1000,
    warm: tuple[str, ...] = ("m",),
    models: tuple[str, ...] | None = None,
    device: str = "d",
) -> Worker:
    return Worker(
        worker_id=WorkerId(name),
        memory_bytes=gib * GIB,
        speed_permille=speed,
        warm_models=frozenset(warm),
        device=device,
        models=None if models is None else frozenset(models),
    )


@dataclass(frozen=True, kw_only=True)
class Served:
    """A start, as it was decided."""

    at_ms: int
    start: Start

    @property
    def account(self) -> str:
        return self.start.account_id

    @property
    def job(self) -> str:
        return self.start.job_id


@dataclass(frozen=True, kw_only=True)
class Decided:
    """A call of `decide`, in a journal."""

    at_ms: int
    decisions: list[Decision]


@dataclass(frozen=True, kw_only=True)
class Restarted:
    """A new board follows, in a journal."""


@dataclass
class Rows:
    """The fair queue's columns of a database."""

    finish_tag: dict[tuple[str, Tier], int] = field(default_factory=dict)
    tag: dict[tuple[str, Tier], int | None] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=dict)
    virtual_time: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))

    def share(self, account: str, tier: Tier) -> FairShare:
        return FairShare(
            finish_tag=self.finish_tag.get((account, tier), 0),
            tag=self.tag.get((account, tier)),
            usage=self.usage.get(account, 0.0) if tier is Tier.RELAX else 0.0,
        )


@dataclass
class Running:
    """An attempt that a worker has in hand, active, parked or drawn."""

    attempt_id: AttemptId
    job: Job
    start: Start
    worker_id: WorkerId
    started_ms: int
    actual_ms: int
    """GPU time it will have taken in all."""
    done_ms: int = 0
    """Of that, before it last got the GPU."""
    active_since_ms: int | None = 0
    """None: it is parked or drawn."""
    parked_since_ms: int | None = None
    parks: int = 0
    sheltered: bool = False
    checkpoint: Checkpoint | None = None
    stored_ms: int | None = None
    """Of one that is drawn, when its pictures will be there."""

    @property
    def is_drawn(self) -> bool:
        return self.stored_ms is not None

    @property
    def is_parked(self) -> bool:
        return self.active_since_ms is None and not self.is_drawn

    def done_by(self, now_ms: int) -> int:
        """Return the GPU time it has taken so far."""
        return self.done_ms + (0 if self.active_since_ms is None else now_ms - self.active_since_ms)


class Cell:
    """A board and the world around it."""

    def __init__(self, parameters: Parameters = PLAIN, *, workers: int = 1, now_ms: int = 0) -> None:
        self.parameters = parameters
        self.board = Board(parameters)
        self.now_ms = now_ms
        self.decay_origin_ms = now_ms
        self.rows = Rows()
        self.served: list[Served] = []
        self.jobs: dict[str, Job] = {}
        self.actual_ms: dict[str, int] = {}
        self.accepted_ms: dict[str, int] = {}
        self.limits: dict[str, Limits] = {}
        self.weights: dict[str, int] = {}
        self.losses: dict[str, int] = {}
        self.waiting: set[str] = set()
        self.running: dict[AttemptId, Running] = {}
        self.devices: dict[str, str] = {}
        self.checkpoints: dict[str, Checkpoint] = {}
        self.unwanted: set[str] = set()
        """Running jobs that their owners cancelled."""
        self.parks: list[tuple[int, AttemptId]] = []
        self.migrations: list[tuple[int, Migrate]] = []
        self.executed_ms = 0
        self.given_up: list[str] = []
        self.on_end: Callable[[Running], None] = lambda running: None
        self.refuse: Callable[[Start], RefusedBecause | None] = lambda start: None
        self.refuse_migration: Callable[[Migrate], bool] = lambda migrate: False
        self.stores_checkpoints = True
        """At each park."""
        self.journal: list[Event | Decided | Restarted] = []
        self._ends: list[tuple[int, int, AttemptId]] = []
        self._calls: list[tuple[int, int, Callable[[], object]]] = []
        self._count = 0
        for tier in Tier:
            self.apply(
                CellRestored(at_ms=now_ms, tier=tier, virtual_time=0, decay_origin_ms=self.decay_origin_ms)
            )
        for number in range(workers):
            self.join(a_worker(f"w{number}"))

    # -- what a test does -----------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        self.journal.append(event)
        self.board.apply(event)

    def join(self, worker: Worker) -> None:
        self.devices[worker.worker_id] = worker.device
        self.apply(WorkerJoined(at_ms=self.now_ms, worker=worker))

    def account(
        self,
        name: str,
        *,
        weight: float = 1,
        limits: Limits = WIDE,
        usage_ms: float = 0,
        finish_tag: int = 0,
    ) -> str:
        self.limits[name] = limits
        self.weights[name] = round(weight * 1000)
        stored = usage_ms * usage.growth(
            self.now_ms, decay_origin_ms=self.decay_origin_ms, half_life_ms=self.parameters.half_life_ms
        )
        self.rows.usage[name] = stored
        self.rows.finish_tag[name, Tier.RELAX] = finish_tag
        shares = {Tier.RELAX: FairShare(finish_tag=finish_tag, tag=None, usage=stored)}
        self.apply(
            AccountRestored(
                at_ms=self.now_ms,
                account_id=AccountId(name),
                limits=limits,
                weight_milli=self.weights[name],
                shares=shares,
            )
        )
        return name

    def submit(
        self,
        account: str,
        cost_ms: int = 1000,
        *,
        actual_ms: int | None = None,
        tier: Tier = Tier.RELAX,
        model: str = "m",
        gib: int = 1,
        step_ms: int = 0,
        name: str | None = None,
    ) -> str:
        if account not in self.limits:
            self.account(account)
        self._count += 1
        job_id = name if name is not None else f"{account}-{self._count}"
        job = Job(
            job_id=JobId(job_id),
            account_id=AccountId(account),
            tier=tier,
            arrival=self._count,
            predicted_ms=cost_ms,
            step_ms=step_ms,
            model=model,
            memory_bytes=gib * GIB,
        )
        self.jobs[job_id] = job
        self.actual_ms[job_id] = cost_ms if actual_ms is None else actual_ms
        self.accepted_ms[job_id] = self.now_ms
        self.waiting.add(job_id)
        self.apply(JobSubmitted(at_ms=self.now_ms, job=job))
        return job_id

    def cancel(self, job_id: str) -> None:
        self.waiting.discard(job_id)
        if any(one.job.job_id == job_id for one in self.running.values()):
            self.unwanted.add(job_id)
        self.apply(CancelWanted(at_ms=self.now_ms, job_id=JobId(job_id)))

    def at(self, at_ms: int, call: Callable[[], object]) -> None:
        """Have something happen at a time to come, before anything is decided then."""
        self._count += 1
        heapq.heappush(self._calls, (at_ms, self._count, call))

    def decide(self) -> list[Served]:
        """One cycle: decide, commit, apply."""
        decisions = self.board.decide(self.now_ms)
        self.journal.append(Decided(at_ms=self.now_ms, decisions=decisions))
        self.store_tags()
        served = []
        refused: set[str] = set()
        for decision in decisions:
            match decision:
                case Stop():
                    self.apply(StopAsked(at_ms=self.now_ms, attempt_id=decision.attempt_id))
                case GiveUp():
                    self.given_up.append(decision.job_id)
                    self.waiting.remove(decision.job_id)
                    self.apply(JobGivenUp(at_ms=self.now_ms, job_id=decision.job_id))
                case Resume():
                    self._resume(decision)
                case Migrate():
                    self._migrate(decision)
                case Start():
                    if decision.account_id in refused:
                        continue
                    because = self.refuse(decision)
                    if because is None:
                        served.append(self._start(decision))
                        continue
                    refused.add(decision.account_id)
                    if because is RefusedBecause.GONE:
                        self.waiting.remove(decision.job_id)
                    elif because is RefusedBecause.MOVED:
                        self.move(decision.job_id)
                    self.apply(StartRefused(at_ms=self.now_ms, job_id=decision.job_id, reason=because))
            self.check()
        # Workers answer after the batch.
        for decision in decisions:
            if isinstance(decision, Stop):
                self.stop(self.running[decision.attempt_id])
        return served

    def store_tags(self) -> None:
        for account_id, tier, tag in self.board.unstored_tags():
            self.rows.tag[account_id, tier] = tag
            self.apply(TagsStored(at_ms=self.now_ms, account_id=account_id, tier=tier, tag=tag))
        assert not self.board.unstored_tags()

    def end(self, attempt_id: AttemptId, gpu_ms: int, outcome: Outcome = Outcome.SUCCEEDED) -> None:
        """Settle an attempt."""
        running = self.running.pop(attempt_id)
        self.unwanted.discard(running.job.job_id)
        self.executed_ms += gpu_ms
        self._correct(running, gpu_ms)
        self.apply(AttemptFinished(at_ms=self.now_ms, attempt_id=attempt_id, outcome=outcome, gpu_ms=gpu_ms))
        self.on_end(running)

    def lose(self, attempt_id: AttemptId) -> None:
        """Void an attempt through our fault."""
        running = self.running.pop(attempt_id)
        job_id = running.job.job_id
        self._correct(running, 0)
        self.losses[job_id] = self.losses.get(job_id, 0) + 1
        if job_id in self.unwanted:
            self.unwanted.remove(job_id)
        else:
            self.waiting.add(job_id)
        self.apply(AttemptLost(at_ms=self.now_ms, attempt_id=attempt_id))

    def draw(self, attempt_id: AttemptId, stored_in_ms: int = 1) -> None:
        """Have an active run need its GPU no more, and be settled so much later."""
        running = self.running[attempt_id]
        assert running.active_since_ms is not None
        running.actual_ms = running.done_ms = running.done_by(self.now_ms)
        running.active_since_ms = None
        running.stored_ms = self.now_ms + stored_in_ms
        self._count += 1
        heapq.heappush(self._ends, (running.stored_ms, self._count, attempt_id))
        self.apply(AttemptDrawn(at_ms=self.now_ms, attempt_id=attempt_id))

    def outgrow(self, attempt_id: AttemptId, gib: int) -> None:
        """Void an attempt that ran out of memory; its job needs so much from now on."""
        running = self.running.pop(attempt_id)
        job_id = running.job.job_id
        self._correct(running, 0)
        if job_id in self.unwanted:
            self.unwanted.remove(job_id)
        else:
            self.waiting.add(job_id)
        self.apply(MemoryOutgrown(at_ms=self.now_ms, job_id=job_id, memory_bytes=gib * GIB))
        self.apply(AttemptLost(at_ms=self.now_ms, attempt_id=attempt_id, executed=False))

    def stop(self, running: Running) -> None:
        """Have a worker answer at once that it stopped."""
        done_ms = running.done_by(self.now_ms)
        self.actual_ms[running.job.job_id] = done_ms
        self.end(running.attempt_id, done_ms, Outcome.CANCELLED)

    def move(self, job_id: str) -> None:
        """Change the tier in the row of a waiting job."""
        job = self.jobs[job_id]
        self.jobs[job_id] = replace(job, tier=Tier.RELAX if job.tier is Tier.FAST else Tier.FAST)
        self.checkpoints.pop(job_id, None)

    def save_checkpoint(self, attempt_id: AttemptId) -> None:
        """Store what a run has done so far."""
        running = self.running[attempt_id]
        device = self.devices[running.worker_id]
        running.checkpoint = Checkpoint(step=1, kept_ms=running.done_by(self.now_ms), device=device)
        self.checkpoints[running.job.job_id] = running.checkpoint
        self.apply(CheckpointSaved(at_ms=self.now_ms, attempt_id=attempt_id, checkpoint=running.checkpoint))

    def step(self) -> bool:
        """Go on to the next thing that happens, and decide. False: nothing will."""
        self._forget_ended()
        times = [queue[0][0] for queue in (self._ends, self._calls) if queue]
        if not times:
            return False
        self.now_ms = max(self.now_ms, min(times))
        while self._calls and self._calls[0][0] <= self.now_ms:
            heapq.heappop(self._calls)[2]()
        while self._ends and self._ends[0][0] <= self.now_ms:
            entry = heapq.heappop(self._ends)
            if self._ends_as(entry):
                running = self.running[entry[2]]
                assert running.done_by(self.now_ms) == running.actual_ms, "no time is lost or doubled"
                self.end(entry[2], running.actual_ms)
        self.decide()
        return True

    def run(self, until_ms: int | None = None, starts: int | None = None) -> Cell:
        """Decide now and go on until a time, a number of starts, or the end of everything."""
        self.decide()
        while starts is None or len(self.served) < starts:
            self._forget_ended()
            if until_ms is not None:
                times = [queue[0][0] for queue in (self._ends, self._calls) if queue]
                if not times or min(times) > until_ms:
                    self.now_ms = until_ms
                    break
            if not self.step():
                break
        return self

    # -- what a test asks -----------------------------------------------------------------------------

    def order(self) -> str:
        """Whose jobs were started, in order."""
        return " ".join(one.account for one in self.served)

    def started_ms(self, job_id: str) -> int:
        return next(one.at_ms for one in self.served if one.job == job_id)

    def attempt(self, job_id: str) -> AttemptId:
        """Return the attempt that runs a job now."""
        return next(key for key, one in self.running.items() if one.job.job_id == job_id)

    def worker_of(self, job_id: str) -> str:
        """Return where a job runs or is parked."""
        return self.running[self.attempt(job_id)].worker_id

    def is_parked(self, job_id: str) -> bool:
        return self.running[self.attempt(job_id)].is_parked

    def starts_of(self, account: str) -> int:
        return sum(one.account == account for one in self.served)

    def used_ms(self, account: str) -> float:
        """Decayed use."""
        grown = usage.growth(
            self.now_ms, decay_origin_ms=self.decay_origin_ms, half_life_ms=self.parameters.half_life_ms
        )
        return self.board.share(AccountId(account), Tier.RELAX).usage / grown

    def check(self) -> None:
        """Check what must hold at any instant: caps, one attempt a GPU and a job, no GPU counted twice."""
        active = [one.worker_id for one in self.running.values() if one.active_since_ms is not None]
        assert len(set(active)) == len(active), "a worker runs at most one attempt"
        parked = [one.worker_id for one in self.running.values() if one.is_parked]
        assert len(set(parked)) == len(parked), "at most one is parked on it"
        assert all(one.job.tier is Tier.RELAX for one in self.running.values() if one.is_parked)
        assert self.board.parked() == len(parked)
        jobs = [one.job.job_id for one in self.running.values()]
        assert len(set(jobs)) == len(jobs)
        assert not self.waiting & set(jobs)
        for tier in Tier:
            assert self.board.running(tier) == sum(one.job.tier is tier for one in self.running.values())
            assert self.board.queued(tier) == sum(self.jobs[job_id].tier is tier for job_id in self.waiting)

    def check_rows(self) -> None:
        """Check that memory and database say the same, once the tags that are due are stored."""
        self.store_tags()
        for account in self.limits:
            for tier in Tier:
                assert self.board.share(AccountId(account), tier) == self.rows.share(account, tier)
        for tier in Tier:
            assert self.board.virtual_time(tier) == self.rows.virtual_time[tier]

    # -- how it is done -------------------------------------------------------------------------------

    def _start(self, start: Start) -> Served:
        charge, key = start.charge, (str(start.account_id), start.tier)
        self.rows.finish_tag[key] = charge.finish_tag
        self.rows.tag[key] = charge.next_tag
        self.rows.usage[start.account_id] = self.rows.usage.get(start.account_id, 0.0) + charge.usage_added
        self.rows.virtual_time[start.tier] = max(self.rows.virtual_time[start.tier], charge.virtual_time)
        if start.parks is not None:
            self._park(start.parks)
        self._count += 1
        attempt_id = AttemptId(f"attempt-{self._count}")
        self.apply(
            AttemptStarted(
                at_ms=self.now_ms,
                job_id=start.job_id,
                attempt_id=attempt_id,
                worker_id=start.worker_id,
                charge=charge,
                sheltered=start.sheltered,
            )
        )
        job = self.jobs[start.job_id]
        self.waiting.remove(start.job_id)
        kept = start.resume_from
        if kept is not None:
            assert kept == self.checkpoints[start.job_id]
            assert kept.device == self.devices[start.worker_id]
        self.running[attempt_id] = Running(
            attempt_id,
            job,
            start,
            start.worker_id,
            self.now_ms,
            self.actual_ms[start.job_id],
            done_ms=0 if kept is None else kept.kept_ms,
            sheltered=start.sheltered,
            checkpoint=kept,
        )
        self._go_on(attempt_id)
        mine = [one for one in self.running.values() if one.job.account_id == start.account_id]
        limits = self.limits[start.account_id]
        assert len(mine) <= limits.running
        if start.tier is Tier.RELAX:
            assert sum(one.job.tier is Tier.RELAX for one in mine) <= limits.relax_running
        served = Served(at_ms=self.now_ms, start=start)
        self.served.append(served)
        return served

    def _go_on(self, attempt_id: AttemptId) -> None:
        running = self.running[attempt_id]
        running.active_since_ms, running.parked_since_ms = self.now_ms, None
        self._count += 1
        heapq.heappush(
            self._ends, (self.now_ms + running.actual_ms - running.done_ms, self._count, attempt_id)
        )

    def _park(self, attempt_id: AttemptId) -> None:
        running = self.running[attempt_id]
        assert running.active_since_ms is not None
        assert not running.sheltered, "what had its turn before fast is not parked"
        running.done_ms = running.done_by(self.now_ms)
        running.active_since_ms, running.parked_since_ms = None, self.now_ms
        running.parks += 1
        self.parks.append((self.now_ms, attempt_id))
        self.apply(AttemptParked(at_ms=self.now_ms, attempt_id=attempt_id))
        if self.stores_checkpoints:
            self.save_checkpoint(attempt_id)

    def _resume(self, resume: Resume) -> None:
        running = self.running[resume.attempt_id]
        assert running.worker_id == resume.worker_id
        running.sheltered = resume.sheltered
        self.apply(
            AttemptResumed(at_ms=self.now_ms, attempt_id=resume.attempt_id, sheltered=resume.sheltered)
        )
        self._go_on(resume.attempt_id)

    def _migrate(self, migrate: Migrate) -> None:
        if self.refuse_migration(migrate):
            running = self.running[migrate.attempt_id]
            self.apply(MigrationRefused(at_ms=self.now_ms, attempt_id=migrate.attempt_id))
            self.end(migrate.attempt_id, running.done_by(self.now_ms), Outcome.FAILED)
            return
        running = self.running.pop(migrate.attempt_id)
        assert running.worker_id == migrate.worker_id
        assert migrate.checkpoint == self.checkpoints[running.job.job_id]
        assert self.devices[migrate.to] == migrate.checkpoint.device
        self._count += 1
        attempt_id = AttemptId(f"attempt-{self._count}")
        self.running[attempt_id] = replace(
            running,
            attempt_id=attempt_id,
            worker_id=migrate.to,
            done_ms=migrate.checkpoint.kept_ms,
            checkpoint=migrate.checkpoint,
        )
        self.apply(
            AttemptMigrated(
                at_ms=self.now_ms,
                attempt_id=migrate.attempt_id,
                to_attempt_id=attempt_id,
                worker_id=migrate.to,
            )
        )
        self._go_on(attempt_id)
        self.migrations.append((self.now_ms, migrate))

    def _correct(self, running: Running, gpu_ms: int) -> None:
        charge, tier, account = running.start.charge, running.job.tier, str(running.job.account_id)
        change = usage.correction(
            tier=tier,
            predicted_ms=charge.predicted_ms,
            weight_milli=charge.weight_milli,
            charged_at_ms=charge.charged_at_ms,
            actual_ms=gpu_ms,
            decay_origin_ms=self.decay_origin_ms,
            parameters=self.parameters,
        )
        self.rows.finish_tag[account, tier] += change.tag_delta
        tag = self.rows.tag.get((account, tier))
        if tag is not None:
            self.rows.tag[account, tier] = tag + change.tag_delta
        self.rows.usage[account] = max(0.0, self.rows.usage[account] + change.usage_delta)

    def _forget_ended(self) -> None:
        while self._ends and not self._ends_as(self._ends[0]):
            heapq.heappop(self._ends)

    def _ends_as(self, entry: tuple[int, int, AttemptId]) -> bool:
        """Return whether an attempt still ends as was foreseen, and was neither parked nor ended before."""
        running = self.running.get(entry[2])
        if running is None or running.is_parked:
            return False
        if running.active_since_ms is None:
            return entry[0] == running.stored_ms
        return entry[0] == running.active_since_ms + running.actual_ms - running.done_ms
