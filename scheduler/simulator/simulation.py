"""One policy, one workload, one fleet: what the service's loop does, in simulated time.

At each moment everything that happens then is told to the policy; then it decides and is told what was
carried out, until it has nothing more to say. Nothing that a policy does is repeated here by hand: it knows
what it was told, and what happens is what it decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from scheduler.policy.auditing.audit import audit
from scheduler.policy.auditing.findings import Finding
from scheduler.policy.auditing.journal import Recorder
from scheduler.policy.decisions import Decision, GiveUp, Migrate, Resume, Start, Stop
from scheduler.policy.events import (
    AccountRestored,
    AttemptFinished,
    AttemptLost,
    AttemptMigrated,
    AttemptParked,
    AttemptResumed,
    AttemptStarted,
    CellRestored,
    CheckpointSaved,
    Event,
    JobGivenUp,
    JobSubmitted,
    ModelEvicted,
    ModelLoaded,
    Outcome,
    WorkerJoined,
    WorkerLost,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Checkpoint, Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker
from scheduler.simulator.kernel import Kernel
from scheduler.simulator.policies import Contestant
from scheduler.simulator.workload import Request, Workload
from scheduler.simulator.world import GIB, Cluster, Loss, Reports, Run, Spell, World

PLAN_CAPS = Limits(running=3, relax_running=2, accepted=10**9)
"""PRODUCT.md's, but that nobody is turned away: refusals would hide waits."""
NO_CAPS = Limits(running=10**9, relax_running=10**9, accepted=10**9)


# What the service's D is to its c_max.
_OLD_AFTER_JOBS = 3


class Stuck(RuntimeError):
    """Jobs wait and nothing will ever happen: the policy lets them wait for ever."""


@dataclass(kw_only=True, slots=True)
class Ended:
    """What became of a request."""

    request: Request
    arrived_ms: int
    prior_use_ms: int
    """GPU time of its account's jobs that had ended when it arrived."""
    ended_ms: int | None = None
    gpu_ms: int = 0
    """GPU time that its picture took."""
    given_up: bool = False

    @property
    def wait_ms(self) -> int:
        """All the time it was not being drawn: queued, loading, parked, or drawn in vain."""
        assert self.ended_ms is not None
        return self.ended_ms - self.arrived_ms - self.gpu_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Backlog:
    """A time in which an account always had a relax job waiting."""

    account_id: AccountId
    start_ms: int
    end_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """All that happened."""

    contestant: Contestant
    cluster: Cluster
    workload: Workload
    jobs: Sequence[Ended]
    """In the order of the workload."""
    spells: Sequence[Spell]
    backlogs: Sequence[Backlog]
    makespan_ms: int
    """When the last job ended."""
    parks: int
    migrations: int
    kills: int
    steps_redone: int
    discarded_ms: int
    loads: int
    loading_ms: int
    deaths: int
    findings: Sequence[Finding]
    """What the auditor says of a policy that promises bounds."""
    events: int
    """Events and decisions the policy was asked for; for measuring speed."""


def parameters_for(workload: Workload) -> Parameters:
    """Return the service's parameters, with the largest job that is admitted as large as the workload's.

    What is old grows with it: where a job takes days, all are old after half an hour, and the order of age,
    which is for the few that would wait for ever, would be the order of everything.
    """
    ours = Parameters()
    return replace(
        ours,
        max_predicted_ms=workload.longest_ms,
        aging_ms=max(ours.aging_ms, _OLD_AFTER_JOBS * workload.longest_ms),
    )


def simulate(
    contestant: Contestant, workload: Workload, cluster: Cluster, *, limits: Limits = PLAN_CAPS, seed: int = 0
) -> Simulated:
    """Run a workload to its end under a policy.

    Raises `Stuck` if the policy leaves jobs waiting for ever.
    """
    return _Simulation(contestant, workload, cluster, limits, seed).run()


class _Simulation:
    def __init__(
        self, contestant: Contestant, workload: Workload, cluster: Cluster, limits: Limits, seed: int
    ) -> None:
        self._contestant = contestant
        self._workload = workload
        self._cluster = cluster
        self._limits = limits
        self._parameters = contestant.parameters(parameters_for(workload))
        self._recorder = Recorder() if contestant.audited else None
        self._policy = contestant.make(self._parameters)
        self._kernel = Kernel()
        reports = Reports(
            joined=self._joined,
            died=self._died,
            loaded=self._loaded,
            evicted=self._evicted,
            checkpointed=self._checkpointed,
            finished=self._finished,
        )
        faults = Random(f"faults {seed}")  # noqa: S311 - not a secret
        self._world = World(self._kernel, cluster, reports, faults)
        self._jobs: dict[JobId, Ended] = {}
        self._checkpoints: dict[JobId, Checkpoint] = {}
        self._attempts: dict[AttemptId, JobId] = {}
        self._used_ms: dict[AccountId, int] = {}
        self._waiting: dict[AccountId, int] = {}
        """Relax jobs of each account that wait."""
        self._waiting_since: dict[AccountId, int] = {}
        self._backlogs: list[Backlog] = []
        self._to_come = _by_account(workload.requests) if workload.closed else {}
        self._unfinished = len(workload.requests)
        self._arrived = 0
        self._attempted = 0
        self._migrations = 0
        self._kills = 0
        self._told = 0
        self._asked = 0
        self._makespan_ms = 0

    def run(self) -> Simulated:
        for tier in Tier:
            self._tell(CellRestored(at_ms=0, tier=tier, virtual_time=0, decay_origin_ms=0))
        self._world.start(self._workload.models)
        if self._workload.closed:
            for account_id in self._to_come:
                self._next_of(account_id, first=True)
        else:
            for request in self._workload.requests:
                self._plan(request, request.arrival_ms)
        while self._unfinished:
            if not self._kernel.advance():
                raise Stuck(f"{self._contestant.name}: {self._unfinished} jobs wait for ever")
            self._cycle()
        return Simulated(
            contestant=self._contestant,
            cluster=self._cluster,
            workload=self._workload,
            jobs=[self._jobs[request.job_id] for request in self._workload.requests],
            spells=self._world.spells,
            backlogs=self._backlogs,
            makespan_ms=self._makespan_ms,
            parks=self._world.parks,
            migrations=self._migrations,
            kills=self._kills,
            steps_redone=self._world.steps_redone,
            discarded_ms=self._world.discarded_ms,
            loads=self._world.loads,
            loading_ms=self._world.loading_ms,
            deaths=self._world.deaths,
            findings=() if self._recorder is None else audit(self._recorder.journal(), self._parameters),
            events=self._told + self._asked,
        )

    # -- users ------------------------------------------------------------------------------------------

    def _next_of(self, account_id: AccountId, *, first: bool = False) -> None:
        """Have a user of a closed loop send the next job, once it was thought about."""
        request = next(self._to_come[account_id], None)
        if request is not None:
            self._plan(request, request.arrival_ms if first else self._kernel.now_ms + request.think_ms)

    def _plan(self, request: Request, at_ms: int) -> None:
        self._kernel.at(at_ms, lambda: self._submit(request))

    def _submit(self, request: Request) -> None:
        account_id, now_ms = request.account_id, self._kernel.now_ms
        if account_id not in self._used_ms:
            self._used_ms[account_id] = 0
            self._tell(
                AccountRestored(
                    at_ms=now_ms, account_id=account_id, limits=self._limits, weight_milli=1000, shares={}
                )
            )
        self._jobs[request.job_id] = Ended(
            request=request, arrived_ms=now_ms, prior_use_ms=self._used_ms[account_id]
        )
        self._arrived += 1
        self._count_waiting(request, 1)
        job = Job(
            job_id=request.job_id,
            account_id=account_id,
            tier=request.tier,
            arrival=self._arrived,
            predicted_ms=request.cost_ms,
            step_ms=max(1, request.cost_ms // request.steps),
            model=request.model,
            memory_bytes=GIB,
        )
        self._tell(JobSubmitted(at_ms=now_ms, job=job))

    def _end(self, ended: Ended) -> None:
        ended.ended_ms = self._makespan_ms = self._kernel.now_ms
        self._unfinished -= 1
        if self._workload.closed:
            self._next_of(ended.request.account_id)

    def _count_waiting(self, request: Request, change: int) -> None:
        if request.tier is not Tier.RELAX:
            return
        account_id, now_ms = request.account_id, self._kernel.now_ms
        before = self._waiting.get(account_id, 0)
        self._waiting[account_id] = before + change
        if before == 0:
            self._waiting_since[account_id] = now_ms
        elif before + change == 0:
            since_ms = self._waiting_since[account_id]
            if now_ms > since_ms:
                self._backlogs.append(Backlog(account_id=account_id, start_ms=since_ms, end_ms=now_ms))

    # -- the loop ---------------------------------------------------------------------------------------

    def _cycle(self) -> None:
        while decisions := self._decide():
            left_out: set[AccountId] = set()
            for decision in decisions:
                self._carry_out(decision, left_out)
        self._world.settle()

    def _decide(self) -> Sequence[Decision]:
        self._asked += 1
        decisions = self._policy.decide(self._kernel.now_ms)
        if self._recorder is not None:
            self._recorder.decided(decisions)
        return decisions

    def _tell(self, event: Event) -> None:
        self._told += 1
        self._policy.apply(event)
        if self._recorder is not None:
            self._recorder.note(event)

    def _carry_out(self, decision: Decision, left_out: set[AccountId]) -> None:
        now_ms = self._kernel.now_ms
        match decision:
            case Start():
                # Its charge builds on one that a kill has just taken back.
                if decision.account_id not in left_out:
                    self._start(decision, left_out)
            case Resume():
                self._tell(
                    AttemptResumed(at_ms=now_ms, attempt_id=decision.attempt_id, sheltered=decision.sheltered)
                )
                self._world.resume(decision.attempt_id)
            case Migrate():
                self._migrate(decision)
            case GiveUp():
                ended = self._jobs[decision.job_id]
                ended.given_up = True
                self._drop_checkpoint(decision.job_id)
                self._count_waiting(ended.request, -1)
                self._tell(JobGivenUp(at_ms=now_ms, job_id=decision.job_id))
                self._end(ended)
            case Stop():
                raise AssertionError("nobody cancels here")

    def _start(self, start: Start, left_out: set[AccountId]) -> None:
        now_ms, request = self._kernel.now_ms, self._jobs[start.job_id].request
        attempt_id = self._new_attempt(start.job_id)
        if start.parks is not None:
            if self._contestant.kills:
                left_out.add(self._kill(start.parks))
            else:
                self._tell(AttemptParked(at_ms=now_ms, attempt_id=start.parks))
                # A parked run may move then, and something has to happen for the policy to be asked.
                self._kernel.at(now_ms + self._parameters.park_patience_ms, _nothing)
        if start.resume_from is None:
            self._drop_checkpoint(start.job_id)
        self._count_waiting(request, -1)
        self._tell(
            AttemptStarted(
                at_ms=now_ms,
                job_id=start.job_id,
                attempt_id=attempt_id,
                worker_id=start.worker_id,
                charge=start.charge,
                sheltered=start.sheltered,
            )
        )
        self._world.begin(start.worker_id, attempt_id, request, start.resume_from)

    def _kill(self, attempt_id: AttemptId) -> AccountId:
        request = self._jobs[self._attempts.pop(attempt_id)].request
        self._kills += 1
        self._tell(AttemptLost(at_ms=self._kernel.now_ms, attempt_id=attempt_id, executed=False))
        self._world.discard(attempt_id)
        self._count_waiting(request, 1)
        return request.account_id

    def _migrate(self, migrate: Migrate) -> None:
        job_id = self._attempts.pop(migrate.attempt_id)
        attempt_id = self._new_attempt(job_id)
        self._migrations += 1
        self._tell(
            AttemptMigrated(
                at_ms=self._kernel.now_ms,
                attempt_id=migrate.attempt_id,
                to_attempt_id=attempt_id,
                worker_id=migrate.to,
            )
        )
        self._world.migrate(migrate.attempt_id, migrate.to, attempt_id, migrate.checkpoint)

    def _new_attempt(self, job_id: JobId) -> AttemptId:
        self._attempted += 1
        attempt_id = AttemptId(f"attempt-{self._attempted}")
        self._attempts[attempt_id] = job_id
        return attempt_id

    def _drop_checkpoint(self, job_id: JobId) -> None:
        checkpoint = self._checkpoints.pop(job_id, None)
        if checkpoint is not None:
            self._world.throw_away(checkpoint)

    # -- what the world reports -------------------------------------------------------------------------

    def _joined(self, worker: Worker) -> None:
        self._tell(WorkerJoined(at_ms=self._kernel.now_ms, worker=worker))

    def _died(self, worker_id: WorkerId, losses: Sequence[Loss]) -> None:
        now_ms = self._kernel.now_ms
        self._tell(WorkerLost(at_ms=now_ms, worker_id=worker_id))
        for loss in losses:
            job_id = self._attempts[loss.attempt_id]
            if loss.checkpoint is not None:
                self._checkpointed(loss.attempt_id, loss.checkpoint)
            self._tell(AttemptLost(at_ms=now_ms, attempt_id=loss.attempt_id, executed=loss.executed))
            del self._attempts[loss.attempt_id]
            self._count_waiting(self._jobs[job_id].request, 1)

    def _loaded(self, worker_id: WorkerId, model: str) -> None:
        self._tell(ModelLoaded(at_ms=self._kernel.now_ms, worker_id=worker_id, model=model))

    def _evicted(self, worker_id: WorkerId, model: str) -> None:
        self._tell(ModelEvicted(at_ms=self._kernel.now_ms, worker_id=worker_id, model=model))

    def _checkpointed(self, attempt_id: AttemptId, checkpoint: Checkpoint) -> None:
        self._checkpoints[self._attempts[attempt_id]] = checkpoint
        self._tell(CheckpointSaved(at_ms=self._kernel.now_ms, attempt_id=attempt_id, checkpoint=checkpoint))

    def _finished(self, run: Run) -> None:
        ended = self._jobs[self._attempts.pop(run.attempt_id)]
        ended.gpu_ms = run.done_ms()
        self._checkpoints.pop(ended.request.job_id, None)
        self._used_ms[ended.request.account_id] += ended.gpu_ms
        self._tell(
            AttemptFinished(
                at_ms=self._kernel.now_ms,
                attempt_id=run.attempt_id,
                outcome=Outcome.SUCCEEDED,
                gpu_ms=ended.gpu_ms,
            )
        )
        self._end(ended)


def _by_account(requests: Sequence[Request]) -> dict[AccountId, Iterator[Request]]:
    found: dict[AccountId, list[Request]] = {}
    for request in requests:
        found.setdefault(request.account_id, []).append(request)
    return {account_id: iter(of) for account_id, of in found.items()}


def _nothing() -> None:
    pass
