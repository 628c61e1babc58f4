"""A job as the policy sees it: whose it is, when it came, what it needs and what it will probably cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scheduler.policy.ids import AccountId, JobId, Tier


class Fit(NamedTuple):
    """What a job needs of a worker. Jobs that need the same wait in the same line."""

    model: str
    memory_bytes: int
    """Free memory of a worker that runs nothing else. Callers round it up to a coarse step: each decision
    looks at the head of every line, so it is the number of different fits that must stay small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is fixed about a job from its acceptance on, but for its tier while it waits."""

    job_id: JobId
    account_id: AccountId
    tier: Tier
    arrival: int
    """Its place in the order in which jobs were accepted."""
    predicted_ms: int
    """GPU time it will probably take."""
    model: str
    memory_bytes: int

    @property
    def fit(self) -> Fit:
        """What it needs of a worker."""
        return Fit(self.model, self.memory_bytes)
