"""A worker as the policy sees it: one GPU, what it can hold, how fast it is and what it has loaded."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.policy.ids import WorkerId


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """A worker at the moment it joined."""

    worker_id: WorkerId
    memory_bytes: int
    speed_permille: int
    """Speed against the reference class: 1000 is 1."""
    warm_models: frozenset[str]
    """In GPU memory now."""
    device: str = ""
    """Device type: only workers of equal types finish each other's pictures to the same bits."""
    models: frozenset[str] | None = None
    """What it could load; None: anything."""
