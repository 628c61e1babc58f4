"""Other people's policies, to compare with: small deciders over the same facts, with the same decisions.

All keep the promises that are not about the order: fast before relax, the caps, a warm GPU before a cold one
and a fast GPU class before a slow one, no GPU idle while something could run on it. None parks a run. They
know GPUs that can run any job, no cancels, and no operators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Sequence
from typing import Protocol

from scheduler.policy import usage
from scheduler.policy.decisions import Charge, ChosenBecause, Decision, GiveUp, Standing, Start, StartKeys
from scheduler.policy.events import (
    AccountRestored,
    AttemptFinished,
    AttemptLost,
    AttemptStarted,
    CellRestored,
    CheckpointSaved,
    Event,
    JobGivenUp,
    JobSubmitted,
    ModelEvicted,
    ModelLoaded,
    WorkerJoined,
    WorkerLost,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Checkpoint, Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.ranking import Ranking
from scheduler.policy.retry import give_up_reason
from scheduler.policy.worker import Worker


class Policy(Protocol):
    """What decides in a simulation: a `Board`, or something with its two verbs."""

    def apply(self, event: Event) -> None:
        """Take note of a fact."""

    def decide(self, now_ms: int) -> Sequence[Decision]:
        """Return what should be done now, in the order it is to be done. Changes nothing."""


class _Account:
    __slots__ = ("account_id", "limits", "relax_running", "running", "waiting")

    def __init__(self, account_id: AccountId, limits: Limits) -> None:
        self.account_id = account_id
        self.limits = limits
        self.running = 0
        self.relax_running = 0
        self.waiting: dict[Tier, list[tuple[int, Job]]] = {tier: [] for tier in Tier}
        """By arrival."""

    def count(self, tier: Tier, change: int) -> None:
        self.running += change
        self.relax_running += change * (tier is Tier.RELAX)

    def free(self, tier: Tier) -> int:
        return self.limits.free(tier, running=self.running, relax_running=self.relax_running)


class _Attempt:
    __slots__ = ("charge", "job", "worker_id")

    def __init__(self, job: Job, worker_id: WorkerId, charge: Charge) -> None:
        self.job = job
        self.worker_id = worker_id
        self.charge = charge


class Baseline(ABC):
    """Accounts take turns in the order of a key; a subclass says which."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._accounts: dict[AccountId, _Account] = {}
        self._order: dict[Tier, Ranking[AccountId]] = {tier: Ranking() for tier in (Tier.FAST, Tier.RELAX)}
        """Accounts with something to start: (key, account)."""
        self._attempts: dict[AttemptId, _Attempt] = {}
        self._workers: dict[WorkerId, Worker] = {}
        self._warm: dict[WorkerId, dict[str, None]] = {}
        self._idle: dict[WorkerId, None] = {}
        self._losses: dict[JobId, int] = {}
        self._checkpoints: dict[JobId, Checkpoint] = {}
        self._to_give_up: dict[JobId, tuple[Job, str]] = {}

    @abstractmethod
    def key(self, account: AccountId, tier: Tier, head: Job) -> int | float:
        """Return what an account that has something to start is compared by; the smallest is first."""

    def charged(self, job: Job, cost_ms: int, at_ms: int) -> None:  # noqa: B027 - most forget
        """Note that a job was charged so much at a time; negative to take some of it back."""

    def served(self, account: AccountId, tier: Tier) -> None:  # noqa: B027 - most forget
        """Note that an account had its turn."""

    def apply(self, event: Event) -> None:
        """Take note of a fact."""
        match event:
            case JobSubmitted():
                self._wait(event.job)
            case AttemptStarted():
                self._started(event)
            case AttemptFinished():
                self._ended(event.attempt_id, event.gpu_ms)
            case AttemptLost():
                self._lost(event)
            case CheckpointSaved():
                job = self._attempts[event.attempt_id].job
                self._checkpoints[job.job_id] = event.checkpoint
            case AccountRestored():
                self._accounts[event.account_id] = _Account(event.account_id, event.limits)
            case WorkerJoined():
                worker = event.worker
                self._workers[worker.worker_id] = worker
                self._warm[worker.worker_id] = dict.fromkeys(sorted(worker.warm_models))
                self._idle[worker.worker_id] = None
            case WorkerLost():
                self._workers.pop(event.worker_id)
                self._idle.pop(event.worker_id, None)
            case ModelLoaded():
                self._warm[event.worker_id][event.model] = None
            case ModelEvicted():
                self._warm[event.worker_id].pop(event.model)
            case JobGivenUp():
                del self._to_give_up[event.job_id]
            case CellRestored():
                pass
            case _:
                raise AssertionError(f"no simulation tells of {type(event).__name__}")

    def decide(self, now_ms: int) -> list[Decision]:
        """Return what should be done now. One start at a time: the next is decided when it is known."""
        decisions: list[Decision] = [
            GiveUp(job_id=job_id, reason=reason) for job_id, (_, reason) in self._to_give_up.items()
        ]
        if not self._idle:
            return decisions
        for tier, order in self._order.items():
            first = order.first()
            if first is not None:
                job = self._accounts[first[-1]].waiting[tier][0][1]
                decisions.append(self._start(job, now_ms))
                break
        return decisions

    def _start(self, job: Job, now_ms: int) -> Start:
        worker_id = min(
            self._idle,
            key=lambda one: (job.model not in self._warm[one], -self._workers[one].speed_permille, one),
        )
        checkpoint = self._checkpoints.get(job.job_id)
        fits = checkpoint is not None and checkpoint.device == self._workers[worker_id].device
        standing = Standing(tag=0, usage_per_weight_ms=0.0, arrival=job.arrival, account_id=job.account_id)
        return Start(
            job_id=job.job_id,
            account_id=job.account_id,
            tier=job.tier,
            worker_id=worker_id,
            charge=Charge(
                predicted_ms=job.predicted_ms,
                weight_milli=1000,
                charged_at_ms=now_ms,
                start_tag=0,
                finish_tag=0,
                next_tag=None,
                usage_added=0.0,
                virtual_time=0,
                aged=False,
            ),
            keys=StartKeys(
                because=ChosenBecause.FIRST_IN_ORDER, chosen=standing, runner_up=None, virtual_time=0
            ),
            warm=job.model in self._warm[worker_id],
            resume_from=checkpoint if fits else None,
        )

    def _wait(self, job: Job) -> None:
        account = self._accounts[job.account_id]
        insort(account.waiting[job.tier], (job.arrival, job), key=lambda one: one[0])
        self._rank(account)

    def _started(self, event: AttemptStarted) -> None:
        tier, job = self._find(event.job_id)
        account = self._accounts[job.account_id]
        waiting = account.waiting[tier]
        del waiting[0]
        account.count(tier, 1)
        self._attempts[event.attempt_id] = _Attempt(job, event.worker_id, event.charge)
        del self._idle[event.worker_id]
        self.charged(job, event.charge.predicted_ms, event.charge.charged_at_ms)
        self.served(account.account_id, tier)
        self._rank(account)

    def _find(self, job_id: JobId) -> tuple[Tier, Job]:
        """Return the job that was decided: it is the head of the first account in its tier's order."""
        for tier, order in self._order.items():
            first = order.first()
            if first is not None:
                job = self._accounts[first[-1]].waiting[tier][0][1]
                if job.job_id == job_id:
                    return tier, job
        raise AssertionError(f"{job_id} was not the next")

    def _lost(self, event: AttemptLost) -> None:
        job = self._ended(event.attempt_id, 0)
        self._losses[job.job_id] = losses = self._losses.get(job.job_id, 0) + event.executed
        reason = give_up_reason(losses, self._parameters)
        if reason is None:
            self._wait(job)
        else:
            self._to_give_up[job.job_id] = job, reason

    def _ended(self, attempt_id: AttemptId, gpu_ms: int) -> Job:
        attempt = self._attempts.pop(attempt_id)
        job, charge = attempt.job, attempt.charge
        account = self._accounts[job.account_id]
        account.count(job.tier, -1)
        if attempt.worker_id in self._workers:
            self._idle[attempt.worker_id] = None
        self.charged(job, gpu_ms - charge.predicted_ms, charge.charged_at_ms)
        self._rank(account)
        return job

    def _rank(self, account: _Account) -> None:
        for tier, order in self._order.items():
            waiting = account.waiting[tier]
            if waiting and account.free(tier) > 0:
                head = waiting[0][1]
                key = self.key(account.account_id, tier, head)
                order.put((key, head.arrival, account.account_id))
            else:
                order.discard(account.account_id)


class Fifo(Baseline):
    """In each tier, the job that came first."""

    def key(self, account: AccountId, tier: Tier, head: Job) -> int:
        """Return the arrival of the account's oldest job."""
        return head.arrival


class LeastUsedFirst(Baseline):
    """In each tier, the account that has used least: decayed as ours, without bound and without aging."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._used: dict[AccountId, float] = {}
        """Scaled forward to time 0, so that the order does not change as it decays."""

    def key(self, account: AccountId, tier: Tier, head: Job) -> float:
        """Return the account's use."""
        return self._used.get(account, 0.0)

    def charged(self, job: Job, cost_ms: int, at_ms: int) -> None:
        """Remember it."""
        grown = usage.growth(at_ms, decay_origin_ms=0, half_life_ms=self._parameters.half_life_ms)
        used = self._used.get(job.account_id, 0.0) + cost_ms * grown
        self._used[job.account_id] = max(0.0, used)


class RoundRobin(Baseline):
    """In each tier, accounts take turns, a job each; one that comes or comes back goes to the end."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._turns = 0
        self._turn: dict[tuple[AccountId, Tier], int] = {}
        """The places in the round of accounts with waiting jobs."""

    def key(self, account: AccountId, tier: Tier, head: Job) -> int:
        """Return the account's place in the round."""
        return self._turn[account, tier]

    def served(self, account: AccountId, tier: Tier) -> None:
        """Send it to the end."""
        del self._turn[account, tier]
        if self._accounts[account].waiting[tier]:
            self._join(account, tier)

    def _wait(self, job: Job) -> None:
        if (job.account_id, job.tier) not in self._turn:
            self._join(job.account_id, job.tier)
        super()._wait(job)

    def _join(self, account: AccountId, tier: Tier) -> None:
        self._turns += 1
        self._turn[account, tier] = self._turns
