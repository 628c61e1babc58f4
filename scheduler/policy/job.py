"""A job as the policy sees it: whose it is, when it came, what it needs and what it will probably cost."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from scheduler.policy.ids import AccountId, JobId, Tier


class Fit(NamedTuple):
    """What a job needs of a worker. Jobs that need the same wait in the same line."""

    model: str
    memory_bytes: int
    """Free memory of a worker that runs nothing else. Callers round it up to a coarse step: each decision
    looks at the head of every line, so it is the number of different fits that must stay small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A run cut at a step boundary and stored: a worker of its device type draws the same bits from there."""

    step: int
    """Denoising steps that are done."""
    kept_ms: int
    """GPU time that these steps and what came before them took; none of it is spent again."""
    device: str
    """Device type, as workers name it: another one would finish another picture."""


# Of values that are made a million at a time, at a restart, it is the checker of types who keeps them as they
# are (`Final`): to be frozen makes them two and a half times as expensive.
@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class Job:
    """What is fixed about a job from its acceptance on, but for its tier while it waits, and for the memory
    that it needs, which is more than was thought once it ran out of some."""

    job_id: Final[JobId]
    account_id: Final[AccountId]
    tier: Final[Tier]
    arrival: Final[int]
    """Its place in the order in which jobs were accepted."""
    predicted_ms: Final[int]
    """GPU time it will probably take on a worker of speed 1000."""
    step_ms: Final[int]
    """GPU time that one of its denoising steps will probably take there."""
    model: Final[str]
    memory_bytes: Final[int]
    fit: Fit = field(init=False, compare=False, repr=False)
    """The last two: what it needs of a worker. Asked for so often that it is kept."""

    def __post_init__(self) -> None:
        """Keep the fit."""
        self.fit = _the_fit(self.model, self.memory_bytes)

    def needing(self, memory_bytes: int) -> Job:
        """Return it with a need of at least so much memory."""
        return replace(self, memory_bytes=max(self.memory_bytes, memory_bytes))


@functools.cache
def _the_fit(model: str, memory_bytes: int) -> Fit:
    """Return one value for all jobs that need the same: few, and a lookup by one need not compare it."""
    return Fit(model, memory_bytes)
