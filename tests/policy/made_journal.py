"""A journal made by hand: charges follow the formulas unless a test says otherwise, and nobody decides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from scheduler.policy import usage
from scheduler.policy.auditing.audit import audit
from scheduler.policy.auditing.findings import Bound, Finding, Verdict
from scheduler.policy.auditing.journal import Dispatch, Journal, Record
from scheduler.policy.decisions import Charge, ChosenBecause, Standing, StartKeys
from scheduler.policy.events import (
    AccountRestored,
    AttemptDrawn,
    AttemptFinished,
    AttemptLost,
    AttemptParked,
    AttemptResumed,
    AttemptStarted,
    CellRestored,
    FairShare,
    JobSubmitted,
    Outcome,
    WorkerJoined,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker

GIB = 2**30
NEVER_MS = 10**15
PLAIN = Parameters(memory_span_ms=0, affinity_ms=0, aging_ms=NEVER_MS)
REMEMBERING = Parameters(affinity_ms=0, aging_ms=NEVER_MS, half_life_ms=NEVER_MS)
WIDE = Limits(running=100, relax_running=100, accepted=1_000)


@dataclass
class Made:
    """Records in the order in which a test makes them. Relax, jobs of a second, weights of 1 unless said."""

    parameters: Parameters = PLAIN
    workers: int = 1
    now_ms: int = 0
    records: list[Record] = field(default_factory=list)
    used_ms: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    virtual_time: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))

    def __post_init__(self) -> None:
        for tier in Tier:
            self.note(CellRestored(at_ms=0, tier=tier, virtual_time=0, decay_origin_ms=0))
        for number in range(self.workers):
            self.join(f"w{number}")

    def note(self, record: Record) -> None:
        self.records.append(record)

    def join(self, name: str, gib: int = 16) -> None:
        worker = Worker(
            worker_id=WorkerId(name), memory_bytes=gib * GIB, speed_permille=1000, warm_models=frozenset()
        )
        self.note(WorkerJoined(at_ms=self.now_ms, worker=worker))

    def account(
        self,
        name: str,
        *,
        used_ms: float = 0.0,
        weight: float = 1,
        limits: Limits = WIDE,
        finish_tag: int = 0,
    ) -> None:
        self.used_ms[name], self.weights[name] = used_ms, round(weight * 1000)
        self.note(
            AccountRestored(
                at_ms=self.now_ms,
                account_id=AccountId(name),
                limits=limits,
                weight_milli=self.weights[name],
                shares={Tier.RELAX: FairShare(finish_tag=finish_tag, tag=None, usage=used_ms)},
            )
        )

    def submit(self, account: str, *names: str, cost_ms: int = 1_000, tier: Tier = Tier.RELAX) -> None:
        for name in names:
            job = Job(
                job_id=JobId(name),
                account_id=AccountId(account),
                tier=tier,
                arrival=len(self.jobs),
                predicted_ms=cost_ms,
                step_ms=50,
                model="m",
                memory_bytes=GIB,
            )
            self.jobs[name] = job
            self.note(JobSubmitted(at_ms=self.now_ms, job=job))

    def memory(self, account: str) -> int:
        return usage.memory(self.used_ms[account] * 1000 / self.weights[account], self.parameters)

    def start(
        self,
        name: str,
        tag: int,
        *,
        last: bool = False,
        worker: str = "w0",
        because: ChosenBecause = ChosenBecause.FIRST_IN_ORDER,
        runner_up: tuple[str, int] | None = None,
        keys: dict[str, Any] | None = None,
        **charged: Any,
    ) -> None:
        """Start a job with a start tag; `last`: its account is not eligible behind it.

        The attempt is named as the job.
        """
        job = self.jobs[name]
        account, relax = job.account_id, job.tier is Tier.RELAX
        weight = self.weights[account] if relax else usage.FAST_WEIGHT_MILLI
        used_ms = self.used_ms[account]
        aged = because is ChosenBecause.AGED
        before = self.virtual_time[job.tier]
        self.virtual_time[job.tier] = after = before if aged else max(before, tag)
        finish_tag = tag + usage.tag_cost(job.predicted_ms, weight)
        self.used_ms[account] += job.predicted_ms
        remembered = self.memory(account) if relax else 0
        charge = Charge(
            predicted_ms=job.predicted_ms,
            weight_milli=weight,
            charged_at_ms=self.now_ms,
            start_tag=tag,
            finish_tag=finish_tag,
            next_tag=None if last else max(finish_tag, after) + remembered,
            usage_added=job.predicted_ms,
            virtual_time=after,
            aged=aged,
        )
        chosen = self._standing(job, tag, used_ms)
        other = None
        if runner_up is not None:
            other_job = next(one for one in self.jobs.values() if one.account_id == runner_up[0])
            other = self._standing(other_job, runner_up[1], self.used_ms[runner_up[0]])
        started = AttemptStarted(
            at_ms=self.now_ms,
            job_id=job.job_id,
            attempt_id=AttemptId(name),
            worker_id=WorkerId(worker),
            charge=replace(charge, **charged),
        )
        given = StartKeys(because=because, chosen=chosen, runner_up=other, virtual_time=before)
        self.note(Dispatch(started=started, keys=replace(given, **(keys or {}))))

    def _standing(self, job: Job, tag: int, used_ms: float) -> Standing:
        per_weight = used_ms * 1000 / self.weights[job.account_id] if job.tier is Tier.RELAX else 0.0
        return Standing(
            tag=tag, usage_per_weight_ms=per_weight, arrival=job.arrival, account_id=job.account_id
        )

    def end(self, name: str, gpu_ms: int | None = None) -> None:
        job = self.jobs[name]
        actual_ms = job.predicted_ms if gpu_ms is None else gpu_ms
        self.used_ms[job.account_id] += actual_ms - job.predicted_ms
        self.note(
            AttemptFinished(
                at_ms=self.now_ms, attempt_id=AttemptId(name), outcome=Outcome.SUCCEEDED, gpu_ms=actual_ms
            )
        )

    def lose(self, name: str) -> None:
        job = self.jobs[name]
        self.used_ms[job.account_id] -= job.predicted_ms
        self.note(AttemptLost(at_ms=self.now_ms, attempt_id=AttemptId(name)))

    def park(self, name: str) -> None:
        self.note(AttemptParked(at_ms=self.now_ms, attempt_id=AttemptId(name)))

    def resume(self, name: str) -> None:
        self.note(AttemptResumed(at_ms=self.now_ms, attempt_id=AttemptId(name)))

    def draw(self, name: str) -> None:
        self.note(AttemptDrawn(at_ms=self.now_ms, attempt_id=AttemptId(name)))

    def run(self, name: str, tag: int, **how: Any) -> None:
        """Start a job and end it after its time."""
        self.start(name, tag, **how)
        self.now_ms += self.jobs[name].predicted_ms
        self.end(name)

    def finding(self, bound: Bound, **known: Any) -> Finding:
        journal = Journal(records=self.records, ended_ms=self.now_ms, **known)
        return next(one for one in audit(journal, self.parameters) if one.bound is bound)

    def broken(self) -> list[Bound]:
        journal = Journal(records=self.records, ended_ms=self.now_ms)
        return [one.bound for one in audit(journal, self.parameters) if one.verdict is Verdict.VIOLATED]
