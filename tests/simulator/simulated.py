"""Small workloads and fleets for the tests, in which only what a test is about is named."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.limits import Limits
from scheduler.simulator.policies import CONTESTANTS
from scheduler.simulator.simulation import NO_CAPS, Simulated, simulate
from scheduler.simulator.workload import Request, Workload
from scheduler.simulator.world import Cluster


def a_request(
    name: str,
    account: str = "",
    *,
    tier: Tier = Tier.RELAX,
    at_ms: int = 0,
    think_ms: int = 0,
    cost_ms: int = 1000,
    steps: int = 10,
    model: str = "m",
) -> Request:
    """A job of the account that its name begins with, unless one is named."""
    return Request(
        job_id=JobId(name),
        account_id=AccountId(account or name[0]),
        tier=tier,
        arrival_ms=at_ms,
        think_ms=think_ms,
        cost_ms=cost_ms,
        steps=steps,
        model=model,
    )


def a_workload(*requests: Request, closed: bool = False, span_ms: int = 10_000) -> Workload:
    return Workload(requests=requests, span_ms=span_ms, source="made for a test", closed=closed)


def played(
    policy: str,
    requests: Sequence[Request],
    *,
    gpus: int = 1,
    closed: bool = False,
    limits: Limits = NO_CAPS,
    cluster: Cluster | None = None,
) -> Simulated:
    return simulate(
        CONTESTANTS[policy],
        a_workload(*requests, closed=closed),
        Cluster(gpus=gpus) if cluster is None else cluster,
        limits=limits,
    )


def order(simulated: Simulated) -> str:
    """The jobs in the order in which they were first worked on."""
    first: dict[str, int] = {}
    for spell in simulated.spells:
        job_id = spell.request.job_id
        first[job_id] = min(spell.start_ms, first.get(job_id, spell.start_ms))
    return " ".join(sorted(first, key=lambda job_id: (first[job_id], job_id)))


def waits_ms(simulated: Simulated) -> dict[str, int]:
    return {ended.request.job_id: ended.wait_ms for ended in simulated.jobs}
