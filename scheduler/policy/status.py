"""Why a waiting job has not started: the gate that holds it, or its place in the order of its tier."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import StrEnum

from scheduler.policy import usage
from scheduler.policy.account import Account
from scheduler.policy.cell import Cell, State
from scheduler.policy.fair_queue import FairQueue
from scheduler.policy.ids import JobId, Tier
from scheduler.policy.job import Job
from scheduler.policy.placement import Fleet

# Beyond so many jobs that could start, places are counted by spans of tags instead of sorted.
_MOST_SORTED = 2_000


class QueueReason(StrEnum):
    """What a waiting job waits for. If several gates hold it, the first of these that others must open."""

    TIER_PAUSED = "tier_paused"
    FUNDS = "funds"
    NO_WORKER = "no_worker"
    CONCURRENCY_LIMIT = "concurrency_limit"
    WAITING_FOR_GPU = "waiting_for_gpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """Where a waiting job stands."""

    reason: QueueReason
    position: int
    """In its tier's order among the jobs that could start; 1 is next, 0: a gate holds it, not the order."""
    sentence: str


CONCURRENCY_LIMIT = JobStatus(
    reason=QueueReason.CONCURRENCY_LIMIT,
    position=0,
    sentence=(
        "Your job will start shortly. You have reached the maximum number of concurrent jobs; "
        "this one starts as soon as another finishes."
    ),
)

FUNDS = JobStatus(
    reason=QueueReason.FUNDS,
    position=0,
    sentence=(
        "Your fast time is used up. Your job starts when it renews or when you agree to overage; "
        "relax is free."
    ),
)


def status(cell: Cell, job_id: JobId) -> JobStatus | None:
    """Return why a job has not started; None: it does not wait here."""
    live = cell.jobs.get(job_id)
    if live is None or live.state not in (State.WAITING, State.HELD):
        return None
    job = live.job
    if job.tier in cell.paused:
        return tier_paused(job.tier)
    if live.state is State.HELD:
        return FUNDS
    lack = cell.fleet.lacks(job.fit, draining_count=False)
    if lack is not None:
        return no_worker(lack)
    queue = cell.queues[job.tier]
    about = queue.could_start > _MOST_SORTED
    if about:
        position = position_about(queue, cell.accounts[job.account_id], job, cell.now_ms)
    else:
        places = cell.positions.get(job.tier)
        if places is None:
            places = cell.positions[job.tier] = positions(queue, cell.fleet, cell.now_ms)
        position = places.get(job_id)
    return CONCURRENCY_LIMIT if position is None else waiting_for_gpu(job.tier, position, about=about)


def tier_paused(tier: Tier) -> JobStatus:
    """Return the status of every job of a tier that operators have paused."""
    return JobStatus(
        reason=QueueReason.TIER_PAUSED,
        position=0,
        sentence=f"The {tier} tier is paused by an operator. Your job keeps its place.",
    )


def no_worker(lack: str) -> JobStatus:
    """Return the status of a job that no worker can take at the moment."""
    return JobStatus(
        reason=QueueReason.NO_WORKER,
        position=0,
        sentence=f"{lack} Your job keeps its place until such a worker is there.",
    )


def waiting_for_gpu(tier: Tier, position: int, *, about: bool) -> JobStatus:
    """Return the status of a job that only others are before; `about`: its place is an estimate."""
    number = f"about number {position:,}" if about else f"number {position:,}"
    return JobStatus(
        reason=QueueReason.WAITING_FOR_GPU,
        position=position,
        sentence=f"Your job is {'next' if position == 1 else number} in the {tier} queue.",
    )


def position_about(queue: FairQueue, account: Account, job: Job, now_ms: int) -> int | None:
    """Return about which place a job has, without looking at all others; None: beyond its account's caps."""
    turn = account.turn(queue.tier)
    if turn.tag is None:
        return None
    tag, step = turn.tag, queue.steps(account, now_ms)
    for earlier, other in enumerate(turn.jobs()):
        if earlier == account.free(queue.tier):
            return None
        if other.job_id == job.job_id:
            return queue.before(tag) + 1
        tag += step(other)
    raise AssertionError("the job does not wait in its account's lanes")


def positions(queue: FairQueue, fleet: Fleet, now_ms: int) -> dict[JobId, int]:
    """Return the places of the jobs of one tier that could start: those no gate holds.

    The order is played as if one after the other started now. Jobs beyond an account's caps have no place,
    as they wait for a job of their own account.
    """
    virtual_time = queue.virtual_time
    able = {fit: fleet.lacks(fit, draining_count=False) is None for fit in queue.lines}
    fronts = []
    for account in queue.accounts():
        turn = account.turn(queue.tier)
        jobs = [job for job in turn.jobs() if able[job.fit]][: account.free(queue.tier)]
        if jobs:
            assert turn.tag is not None
            stored = account.usage
            used = queue.usage_per_weight(account, stored)
            fronts.append((turn.tag, used, jobs[0].arrival, turn.finish_tag, stored, account, jobs))
    heapq.heapify(fronts)
    places: dict[JobId, int] = {}
    while fronts:
        tag, _, _, finish_tag, stored, account, (job, *others) = heapq.heappop(fronts)
        places[job.job_id] = len(places) + 1
        start = usage.start_of(tag, finish_tag, virtual_time)
        virtual_time = max(virtual_time, start)
        if others:
            finish_tag = start + usage.tag_cost(job.predicted_ms, queue.weight_milli(account))
            stored += job.predicted_ms * queue.growth(now_ms)
            tag = max(finish_tag, virtual_time) + queue.memory(account, now_ms, stored)
            used = queue.usage_per_weight(account, stored)
            heapq.heappush(fronts, (tag, used, others[0].arrival, finish_tag, stored, account, others))
    return places
