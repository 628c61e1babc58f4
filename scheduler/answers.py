"""What the scheduler answers when it is asked about a job, its queues or its workers: plain values.

The front door asks through `scheduler.link`. None of this is stored anywhere: it is true of one scheduler at
one moment, and absent while there is none. Times are milliseconds, points in time those of the scheduler's
clock since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.contract import RenderKind
from scheduler.policy.explain import Explanation
from scheduler.policy.ids import Tier
from scheduler.policy.limits import Limits
from scheduler.updates import QueueStatus, StartTimes


@dataclass(frozen=True, kw_only=True)
class WorkerRun:
    """An attempt that a worker has in hand."""

    attempt_id: str
    job_id: str
    account_id: str
    tier: Tier
    started_ms: int
    parked_since_ms: int | None = None
    """None: it has the GPU, or gets it at the next boundary of the run that is parked for it."""
    step: int = 0
    """Denoising steps that are done, as its worker said last; 0: none, or it has not said."""
    steps: int = 0
    """Of so many; 0: not known."""


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """A worker that has joined and is not lost. Whether it drains or is set aside is in its row."""

    worker_id: str
    idle_since_ms: int | None
    """Since when it has had no active attempt; None: it has one."""
    healthy: bool
    sentence: str
    """Why it is not healthy."""
    device: str
    speed_permille: int
    memory_bytes: int
    memory_used_bytes: int
    warm_models: tuple[str, ...]
    active: WorkerRun | None
    parked: tuple[WorkerRun, ...]
    """The newest last."""
    leaves_since_ms: int | None = None
    """Since when it is being emptied, to end then; None: it is not."""
    leaves_because: str = ""
    """A sentence; empty: it is not."""


@dataclass(frozen=True, kw_only=True)
class TierView:
    """What waits and runs in one tier."""

    tier: Tier
    waiting: int
    """Without those held."""
    held: int
    """For funds."""
    running: int
    """Attempts that have a GPU."""
    parked: int
    oldest_wait_ms: int
    """0 if none waits."""


@dataclass(frozen=True, kw_only=True)
class QueuesView:
    """What waits and runs, and how the GPUs are shared. Whether a tier is paused is in its row."""

    tiers: tuple[TierView, ...]
    gpus: int
    """Workers that take jobs."""
    idle_gpus: int
    fast_gpus: int
    """Whose active attempt is a fast one."""
    relax_floor_gpus: int
    """What fast leaves to relax while relax work waits or is parked."""
    wanted_gpus: int | None
    """What the fleet should have for what waits now; None: not known."""


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Why a live job is where it is."""

    at_ms: int
    """When it was asked, by the clock that the times in `explanation` are of."""
    explanation: Explanation
    status: QueueStatus | None
    """None: it has a GPU, or is given up."""


@dataclass(frozen=True, kw_only=True)
class PlanTerms:
    """What of a plan decides when a job starts."""

    limits: Limits
    weight_milli: int


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """A job on other terms: one that waits, or one that is only thought of."""

    account_id: str
    tier: Tier
    job_id: str | None
    """None: it would be submitted now."""
    kind: RenderKind
    model: str
    width: int
    height: int
    steps: int
    """Of the estimator: what its denoising steps take, in plain ones."""
    predicted_ms: int
    plan: PlanTerms | None
    """None: the account's own."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What would come of it."""

    start: StartTimes | None
    """None: not known, or something holds it that no time opens."""
    delayed_jobs: int
    """Waiting jobs of others that would start later for it."""
    delayed_ms: int
    """By how much together."""
