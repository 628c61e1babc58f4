"""What would come of it if a job were sent otherwise: the same roll-forward, with and without the change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from scheduler.policy.events import AccountRestored, Event, JobSubmitted, LimitsChanged, TierChanged
from scheduler.policy.foresight.eta import Eta, eta_of
from scheduler.policy.foresight.roll_forward import FIRST, Draws, Future, roll_forward
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters

_FELT_MS = 1000
"""A start that is later by less than this delays nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What would be different, as what the board would be told. Changes about one job add up with `+`."""

    job_id: JobId
    """The job that is asked about."""
    events: tuple[Event, ...] = ()

    def __add__(self, other: Change) -> Change:
        assert self.job_id == other.job_id
        return Change(job_id=self.job_id, events=self.events + other.events)


def in_tier(job_id: JobId, tier: Tier, now_ms: int) -> Change:
    """Return the change that moves a waiting job to a tier."""
    return Change(job_id=job_id, events=(TierChanged(at_ms=now_ms, job_id=job_id, tier=tier),))


def submitted(job: Job, now_ms: int, account: AccountRestored | None = None) -> Change:
    """Return the change that a new job comes; with its account, if the board does not know that."""
    known: tuple[Event, ...] = () if account is None else (account,)
    return Change(job_id=job.job_id, events=(*known, JobSubmitted(at_ms=now_ms, job=job)))


def on_plan(job_id: JobId, account_id: AccountId, limits: Limits, weight_milli: int, now_ms: int) -> Change:
    """Return the change that the job's account has another plan."""
    event = LimitsChanged(at_ms=now_ms, account_id=account_id, limits=limits, weight_milli=weight_milli)
    return Change(job_id=job_id, events=(event,))


@dataclass(frozen=True, kw_only=True, slots=True)
class WhatIf:
    """What would come of a change."""

    start: Eta | None
    """Of the job; None: a gate holds it, or it is not waiting."""
    gpu_ms: int
    """What the job will probably take."""
    cost_ms: int
    """What of that is debited as fast time, or metered: nothing in relax."""
    parks_permille: int
    """In how many of a thousand futures it takes the GPU of a relax run."""
    others_delayed: int
    """Waiting jobs of other accounts that start at least a second later; the median of the futures."""
    delay_ms_sum: int
    """By how much others' jobs start later, less what some gain, together; the mean of the futures."""


def what_if(
    facts: Sequence[Event],
    parameters: Parameters,
    draws: Sequence[Draws],
    now_ms: int,
    change: Change,
    first: int = FIRST,
) -> WhatIf:
    """Return what would come of a change. The same chances are played with it and without it.

    The job is on the board and waits, or the change submits it.
    """
    changed = [*facts, *change.events]
    job = _job(changed, change.job_id)
    others = {
        event.job.job_id
        for event in facts
        if isinstance(event, JobSubmitted) and event.job.account_id != job.account_id
    }
    starts: list[int] = []
    parks = 0
    delays: list[Mapping[JobId, int]] = []
    for one in draws:
        future = roll_forward(changed, parameters, one, now_ms, first)
        before = roll_forward(facts, parameters, one, now_ms, first) if change.events else future
        if job.job_id in future.starts:
            starts.append(future.starts[job.job_id])
        parks += job.job_id in future.parking
        delays.append(_later(before, future, others))
    start = None
    if 2 * len(starts) > len(draws):
        start = eta_of(starts)
    felt = sorted(sum(delay >= _FELT_MS for delay in one.values()) for one in delays)
    return WhatIf(
        start=start,
        gpu_ms=job.predicted_ms,
        cost_ms=job.predicted_ms if job.tier is Tier.FAST else 0,
        parks_permille=parks * 1000 // len(draws),
        others_delayed=felt[len(felt) // 2],
        delay_ms_sum=sum(sum(one.values()) for one in delays) // len(delays),
    )


def _later(before: Future, after: Future, jobs: Iterable[JobId]) -> Mapping[JobId, int]:
    """Return by how much each job that starts in both futures starts later in the second."""
    return {
        job_id: after.starts[job_id] - before.starts[job_id]
        for job_id in jobs
        if job_id in before.starts and job_id in after.starts
    }


def _job(facts: Sequence[Event], job_id: JobId) -> Job:
    """Return a waiting job as these facts leave it."""
    found: Job | None = None
    for event in facts:
        match event:
            case JobSubmitted() if event.job.job_id == job_id:
                found = event.job
            case TierChanged() if event.job_id == job_id and found is not None:
                found = replace(found, tier=event.tier)
            case _:
                pass
    assert found is not None, "the job waits, or the change submits it"
    return found
