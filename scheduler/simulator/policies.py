"""The policies that can be compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scheduler.policy.board import Board
from scheduler.policy.decisions import Decision
from scheduler.policy.events import AttemptStarted, Event, JobSubmitted
from scheduler.policy.ids import JobId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.simulator.baselines import Fifo, LeastUsedFirst, Policy, RoundRobin


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A policy that can be run."""

    name: str
    what: str
    """For the report."""
    make: Callable[[Parameters], Policy]
    parameters: Callable[[Parameters], Parameters] = lambda parameters: parameters
    """Makes its parameters of the service's."""
    audited: bool = False
    """It promises the policy's bounds, and is held against them."""
    kills: bool = False
    """What it decides to park is killed instead: its work is lost, and its job waits again."""


class WithoutPreemption:
    """Our board, told of every relax run that it is sheltered from fast."""

    def __init__(self, parameters: Parameters) -> None:
        self._board = Board(parameters)
        self._relax: set[JobId] = set()

    def apply(self, event: Event) -> None:
        """Take note of a fact."""
        if isinstance(event, JobSubmitted) and event.job.tier is Tier.RELAX:
            self._relax.add(event.job.job_id)
        if isinstance(event, AttemptStarted) and event.job_id in self._relax:
            event = replace(event, sheltered=True)
        self._board.apply(event)

    def decide(self, now_ms: int) -> Sequence[Decision]:
        """Return what should be done now."""
        return self._board.decide(now_ms)


CONTESTANTS = {
    one.name: one
    for one in (
        Contestant(name="ours", what="the policy of this service", make=Board, audited=True),
        Contestant(
            name="none", what="ours without preemption: fast waits for a free GPU", make=WithoutPreemption
        ),
        Contestant(
            name="kill",
            what="ours with whole-job preemption: the run is killed, its work lost, its job queued again",
            make=Board,
            kills=True,
        ),
        Contestant(
            name="sfq",
            what="plain start-time fair queueing in relax: ours without memory of use and without aging",
            make=Board,
            parameters=lambda ours: replace(ours, memory_span_ms=0, aging_ms=10**15, affinity_ms=0),
            audited=True,
        ),
        Contestant(name="fifo", what="order of arrival, fast first, no preemption", make=Fifo),
        Contestant(
            name="least-used",
            what="the account that used least, fast first, no preemption",
            make=LeastUsedFirst,
        ),
        Contestant(
            name="round-robin", what="accounts take turns, fast first, no preemption", make=RoundRobin
        ),
    )
}
