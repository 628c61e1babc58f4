"""When a waiting job will probably start: by several futures played forward, or at a glance from totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduler.policy.cell import Cell
from scheduler.policy.events import Event
from scheduler.policy.foresight.roll_forward import FIRST, Draws, roll_forward
from scheduler.policy.ids import JobId, Tier
from scheduler.policy.job import Job
from scheduler.policy.parameters import Parameters
from scheduler.policy.preemption import relax_floor

_LATE_PERMILLE = 3000
"""What nine of ten waits are below, of a wait told at a glance: measured on a replayed trace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Eta:
    """When a job will start."""

    p50_ms: int
    """As likely before as after it."""
    p90_ms: int
    """Nine of ten start before it."""


def etas(
    facts: Sequence[Event], parameters: Parameters, draws: Sequence[Draws], now_ms: int, first: int = FIRST
) -> Mapping[JobId, Eta]:
    """Return when each waiting job will start, for each that starts in most futures.

    Nine draws are enough to tell a p90, nineteen tell it with less noise.
    """
    starts: dict[JobId, list[int]] = {}
    for one in draws:
        for job_id, start_ms in roll_forward(facts, parameters, one, now_ms, first).starts.items():
            starts.setdefault(job_id, []).append(start_ms)
    found: dict[JobId, Eta] = {}
    for job_id, times in starts.items():
        if 2 * len(times) > len(draws):
            found[job_id] = eta_of(times)
    return found


def eta_of(starts: Sequence[int]) -> Eta:
    """Return what the next start of the same kind is before with chance 1/2, and with chance 9/10.

    Of n values in order, a next one falls below the r-th with chance r / (n + 1).
    """
    ordered, next_of = sorted(starts), len(starts) + 1
    late = min(len(ordered), -(-9 * next_of // 10))
    return Eta(p50_ms=ordered[next_of // 2 - 1], p90_ms=ordered[late - 1])


def quick_eta(cell: Cell, job: Job, mean_ms: int, now_ms: int) -> Eta | None:
    """Return when a job starts that waits, or would wait from now on, at a glance; None: a gate holds it.

    The jobs with smaller tags, told by the queue's counts of tags, over the GPUs of its tier, at `mean_ms` of
    GPU time each; and its own account's jobs beyond its caps, over the caps. Nothing is played forward, and
    nothing is said of who comes meanwhile but by the spread. O(spans of tags) and the account's own jobs.
    """
    fleet, queue = cell.fleet, cell.queues[job.tier]
    if job.tier in cell.paused or not fleet.can_take(job.fit):
        return None
    account = cell.accounts.get(job.account_id)
    tag, own, slots = queue.virtual_time, 0, 1
    if account is not None:
        turn = account.turn(job.tier)
        older = [other for other in turn.jobs() if other.arrival < job.arrival]
        tag = queue.next_tag(account, now_ms) + sum(map(queue.steps(account, now_ms), older))
        own = max(0, len(older) + 1 - account.free(job.tier))
        slots = max(1, account.limits.free(job.tier, running=0, relax_running=0))
    most_fast = fleet.taking - relax_floor(fleet.taking, cell.parameters)
    ahead = queue.before(tag)
    if job.tier is Tier.FAST:
        gpus = most_fast
        at_once = fleet.fast_held + ahead < most_fast
    else:
        gpus = fleet.taking - min(fleet.fast_held, most_fast)
        ahead += cell.queues[Tier.FAST].could_start + len(cell.parked)
        at_once = ahead < fleet.open
    wait_ms = 0 if at_once else (ahead + 1) * mean_ms // max(1, gpus)
    if own:
        wait_ms = max(wait_ms, own * (mean_ms + wait_ms) // slots)
    return Eta(p50_ms=now_ms + wait_ms, p90_ms=now_ms + wait_ms * _LATE_PERMILLE // 1000)
