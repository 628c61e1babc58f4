"""How many GPUs the fleet should have, from the work there is, the waits aimed at and a budget.

A pure answer to one moment: the same load gives the same number. Growing at once and shrinking only after a
while (hysteresis), and which worker to take away, are for whoever applies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from scheduler.policy.cell import Cell
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.policy.preemption import relax_floor


@dataclass(frozen=True, kw_only=True, slots=True)
class TierLoad:
    """The work of one tier. GPU-milliseconds are those of a worker of speed 1000."""

    waiting_jobs: int
    """Jobs that only want a GPU. A job that another gate holds, as its account's caps, would not use one."""
    waiting_ms: int
    """GPU time they will probably take."""
    running: int
    """Attempts that run, parked ones included: each wants a GPU."""
    running_ms: int
    """GPU time these will probably take yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Aims:
    """What the fleet is sized for."""

    wait_ms: Mapping[Tier, int]
    """Work that waits now should have started after this time; above 0."""
    at_least: int
    """GPUs to have when there is no work."""
    at_most: int
    """The budget."""
    speed_permille: int = 1000
    """Speed of the GPUs that are added, or of the fleet."""

    def __post_init__(self) -> None:
        """Refuse, as a bug of the caller, aims that no fleet can have."""
        assert all(self.wait_ms[tier] > 0 for tier in Tier)
        assert 0 <= self.at_least <= self.at_most
        assert self.speed_permille > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """How many GPUs the fleet should have, and why."""

    gpus: int
    by_tier: Mapping[Tier, int]
    """What the work of each tier asks for, before floor and budget."""
    beyond_budget: int
    """GPUs that the work asks for and the budget does not give."""
    reason: str
    """A sentence for an operator."""


def tier_load(cell: Cell, tier: Tier, now_ms: int) -> TierLoad:
    """Return the work of a tier. O(accounts that could start something + attempts).

    Jobs count that no worker of this fleet could run: there may be none yet. A paused tier asks for nothing
    more than it has.
    """
    waiting = [
        job.predicted_ms
        for account in (cell.queues[tier].accounts() if tier not in cell.paused else ())
        for job in islice(account.turn(tier).jobs(), account.free(tier))
    ]
    running = [one for one in cell.attempts.values() if one.job.tier is tier and not one.drawn]
    return TierLoad(
        waiting_jobs=len(waiting),
        waiting_ms=sum(waiting),
        running=len(running),
        running_ms=sum(
            attempt.left_ms
            if attempt.parked_since_ms is not None
            else max(0, attempt.ends_ms - now_ms) * cell.fleet.speed_permille(attempt.worker_id) // 1000
            for attempt in running
        ),
    )


def demand(loads: Mapping[Tier, TierLoad], aims: Aims, parameters: Parameters) -> Demand:
    """Return how many GPUs the fleet should have.

    A tier with W ms of work waiting in j jobs, R ms left in r attempts, and an aim of t ms asks for

        n = min(r + j, max(r, ceil((W + R) / t)))

    GPUs: together they do `n t` ms of work within the aim, which is what must be out of the way before the
    last of the waiting jobs starts; the GPUs in use now are kept, as the load that filled them goes on; and
    no job uses two. The tiers' numbers are added. While relax has work, fast may not hold the relax floor, so
    the fleet is at least as large as gives fast its number beside the floor. Last come `at_least` and the
    budget.
    """
    by_tier = {tier: _asked(loads[tier], aims.wait_ms[tier], aims.speed_permille) for tier in Tier}
    total = sum(by_tier.values())
    floored = total
    if by_tier[Tier.RELAX] and by_tier[Tier.FAST]:
        floored = max(total, _with_floor(by_tier[Tier.FAST], parameters))
    wanted = max(floored, aims.at_least)
    gpus = min(wanted, aims.at_most)
    return Demand(
        gpus=gpus,
        by_tier=by_tier,
        beyond_budget=wanted - gpus,
        reason=_reason(by_tier, loads, aims, gpus=gpus, total=total, floored=floored, wanted=wanted),
    )


def _asked(load: TierLoad, wait_ms: int, speed_permille: int) -> int:
    work_ms = (load.waiting_ms + load.running_ms) * 1000
    in_time = -(-work_ms // (wait_ms * speed_permille))
    return min(load.running + load.waiting_jobs, max(load.running, in_time))


def _with_floor(fast: int, parameters: Parameters) -> int:
    """Return the smallest fleet of which fast may hold `fast` GPUs while relax has work."""
    gpus = fast
    while gpus - relax_floor(gpus, parameters) < fast:
        gpus += 1
    return gpus


def _reason(
    by_tier: Mapping[Tier, int],
    loads: Mapping[Tier, TierLoad],
    aims: Aims,
    *,
    gpus: int,
    total: int,
    floored: int,
    wanted: int,
) -> str:
    parts = [
        f"{tier} asks for {by_tier[tier]} ({loads[tier].running} in use; "
        f"{loads[tier].waiting_jobs} jobs with {loads[tier].waiting_ms / 60_000:,.1f} GPU-min waiting, "
        f"to start within {aims.wait_ms[tier] / 1000:,.0f} s)"
        for tier in (Tier.FAST, Tier.RELAX)
        if by_tier[tier]
    ]
    said = "; ".join(parts) if parts else "no work is there"
    if floored > total:
        said += f"; {floored - total} more keep the relax floor"
    if wanted > floored:
        said += f"; at least {aims.at_least} are kept"
    if wanted > gpus:
        said += f"; the budget ends at {aims.at_most}, {wanted - gpus} fewer than asked for"
    return f"{gpus} GPUs: {said}."
