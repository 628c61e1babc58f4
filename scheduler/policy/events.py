"""Facts that the board is told. Each happened, and is in the database before it is here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from scheduler.policy.decisions import Charge
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Checkpoint, Job
from scheduler.policy.limits import Limits
from scheduler.policy.worker import Worker


@dataclass(frozen=True, kw_only=True, slots=True)
class FairShare:
    """The fair queue's memory of an account in one tier."""

    finish_tag: int
    """Finish tag of the account's last started job."""
    tag: int | None
    """Start tag of its next job; None while it is not eligible: nothing waits, or it is at its caps."""
    usage: float
    """GPU-milliseconds, scaled forward to the decay origin. All of an account's use, fast included, is in its
    relax share; in its fast share it is 0."""


class RefusedBecause(StrEnum):
    """Why the transaction that should have started a job did not."""

    GONE = "gone"
    """The row is no longer waiting."""
    FUNDS = "funds"
    """Fast time is used up, without consent to overage."""
    MOVED = "moved"
    """Its owner has moved it to the other tier."""


class Outcome(StrEnum):
    """How an attempt ended. The board treats all alike; the journal of events tells them apart."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRestored:
    """First of a recovery, once for each tier. Usage of both tiers decays from the relax tier's origin."""

    at_ms: int
    tier: Tier
    virtual_time: int
    decay_origin_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountRestored:
    """An account is known: at recovery or when its first job comes, and before any of its jobs."""

    at_ms: int
    account_id: AccountId
    limits: Limits
    weight_milli: int
    shares: Mapping[Tier, FairShare]
    """As stored; a tier without a row is an account that never ran in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """A place in the order of a tier: before it are smaller tags, and of equal ones earlier arrivals."""

    tag: int
    arrival: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderKnown:
    """In a recovery: all accounts that come before `edge` in a tier's order are on the board, with all their
    jobs. Whoever does not may be behind somebody who is yet to be read, so until that is known nothing starts
    that might not have started."""

    at_ms: int
    tier: Tier
    edge: Edge | None
    """None: the whole order is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryEnded:
    """All rows are on the board: stored tags of accounts that proved not eligible are dropped."""

    at_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsChanged:
    """The account's plan changed. A new weight applies from its next tag on."""

    at_ms: int
    account_id: AccountId
    limits: Limits
    weight_milli: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FundsChanged:
    """The account may have funds again: renewal, a grant, consent."""

    at_ms: int
    account_id: AccountId


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageReset:
    """The account's subscription renewed: its use is forgotten."""

    at_ms: int
    account_id: AccountId


# As a `Job`.
@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class JobSubmitted:
    """A job waits. A job that is on the board already stays as it is: door and sweep may both report it."""

    at_ms: Final[int]
    job: Final[Job]
    losses: Final[int] = 0
    accepted_ms: Final[int | None] = None
    """When its row was committed, if not at `at_ms`."""
    checkpoint: Final[Checkpoint | None] = None
    """The newest of its earlier attempts."""


class Waited(NamedTuple):
    """A job that waited when a scheduler took over. A tuple, since there may be a million."""

    job: Job
    losses: int
    accepted_ms: int
    """When its row was committed."""
    checkpoint: Checkpoint | None
    """The newest of its earlier attempts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingRestored:
    """After a restart: all jobs of an account that wait, in order of arrival, of which the board has none.

    It is as if each were submitted (`submitted`), in less time.
    """

    at_ms: int
    account_id: AccountId
    jobs: tuple[Waited, ...]

    def submitted(self) -> Iterator[JobSubmitted]:
        """Return what it stands for, where each job is noted by itself."""
        for job, losses, accepted_ms, checkpoint in self.jobs:
            yield JobSubmitted(
                at_ms=self.at_ms, job=job, losses=losses, accepted_ms=accepted_ms, checkpoint=checkpoint
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelWanted:
    """The owner wants a job no more. A waiting one's row is cancelled; a running one is to be stopped."""

    at_ms: int
    job_id: JobId


@dataclass(frozen=True, kw_only=True, slots=True)
class TierChanged:
    """A waiting job was moved to `tier`. It keeps its arrival."""

    at_ms: int
    job_id: JobId
    tier: Tier


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRefused:
    """A decided start was not committed."""

    at_ms: int
    job_id: JobId
    reason: RefusedBecause


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptStarted:
    """A decided start was committed, with exactly this charge, and after the park it asked for."""

    at_ms: int
    job_id: JobId
    attempt_id: AttemptId
    worker_id: WorkerId
    charge: Charge
    sheltered: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptParked:
    """A committed start takes a run's GPU: the run stops at its next boundary and keeps its place there."""

    at_ms: int
    attempt_id: AttemptId


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptResumed:
    """A parked run goes on on its own worker."""

    at_ms: int
    attempt_id: AttemptId
    sheltered: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptDrawn:
    """A run does the last that it needs its GPU for, or has done it: its worker can take the next.

    The attempt still runs, and counts as such, until its pictures are there and it is settled.
    """

    at_ms: int
    attempt_id: AttemptId


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptMigrated:
    """A decided migration was committed: `to_attempt_id` goes on with the run, on `worker_id`."""

    at_ms: int
    attempt_id: AttemptId
    to_attempt_id: AttemptId
    worker_id: WorkerId


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationRefused:
    """A decided migration was not committed: the attempt has ended, and that is about to be told."""

    at_ms: int
    attempt_id: AttemptId


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """A newer checkpoint of an attempt is stored."""

    at_ms: int
    attempt_id: AttemptId
    checkpoint: Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptRestored:
    """At recovery: an attempt was running, and its charge is in the account's restored shares already.

    The three numbers are those of its charge. Its worker may join before or after.
    """

    at_ms: int
    job: Job
    losses: int
    accepted_ms: int
    """When its job's row was committed."""
    attempt_id: AttemptId
    worker_id: WorkerId
    predicted_ms: int
    weight_milli: int
    charged_at_ms: int
    started_ms: int
    parked_since_ms: int | None = None
    """None: it has its GPU, unless it is drawn."""
    drawn: bool = False
    """It needs no GPU any more."""
    parks: int = 0
    """How often it was parked so far."""
    sheltered: bool = False
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptFinished:
    """An attempt was settled and its job has ended."""

    at_ms: int
    attempt_id: AttemptId
    outcome: Outcome
    gpu_ms: int
    """What its account is remembered for: measured time, or 0 where the time was wasted by us."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOutgrown:
    """A running attempt ran out of its worker's memory, so its job needs a larger worker. It is lost next.

    An event of its own, of the job: whoever looks up in the journal what a job needs finds it there.
    """

    at_ms: int
    job_id: JobId
    memory_bytes: int
    """As in `Job`: of the next larger kind of worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptLost:
    """An attempt was voided through our fault. Its job waits again at its old place, and nothing is charged.

    If its owner wanted it cancelled, the same transaction has cancelled it, and it leaves the board.
    """

    at_ms: int
    attempt_id: AttemptId
    executed: bool = True
    """False: no worker took it, or it was handed over, or it ran out of memory, so it is none of the losses
    after which a job is given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StopAsked:
    """The worker was told to stop the attempt. It holds its GPU until it answers."""

    at_ms: int
    attempt_id: AttemptId


@dataclass(frozen=True, kw_only=True, slots=True)
class JobGivenUp:
    """A decided give-up was committed: the job has failed."""

    at_ms: int
    job_id: JobId


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerJoined:
    """A worker is there and takes jobs. If it was known, this replaces what was known, draining included."""

    at_ms: int
    worker: Worker


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLost:
    """A worker is gone. What became of its attempt is said by an event of its own."""

    at_ms: int
    worker_id: WorkerId


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerDraining:
    """A worker finishes what it has and takes nothing new."""

    at_ms: int
    worker_id: WorkerId


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerResumed:
    """A draining worker takes jobs again."""

    at_ms: int
    worker_id: WorkerId


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoaded:
    """A model is in the worker's GPU memory."""

    at_ms: int
    worker_id: WorkerId
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEvicted:
    """A model is no longer in the worker's GPU memory."""

    at_ms: int
    worker_id: WorkerId
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TierPaused:
    """Operators let nothing of a tier start. What runs goes on."""

    at_ms: int
    tier: Tier


@dataclass(frozen=True, kw_only=True, slots=True)
class TierResumed:
    """A paused tier starts jobs again."""

    at_ms: int
    tier: Tier


@dataclass(frozen=True, kw_only=True, slots=True)
class TagsStored:
    """A tag that the board had set by itself is in the database, as `tag`."""

    at_ms: int
    account_id: AccountId
    tier: Tier
    tag: int | None


Event = (
    CellRestored
    | AccountRestored
    | OrderKnown
    | RecoveryEnded
    | LimitsChanged
    | FundsChanged
    | UsageReset
    | JobSubmitted
    | WaitingRestored
    | CancelWanted
    | TierChanged
    | StartRefused
    | AttemptStarted
    | AttemptParked
    | AttemptResumed
    | AttemptDrawn
    | AttemptMigrated
    | MigrationRefused
    | CheckpointSaved
    | AttemptRestored
    | AttemptFinished
    | MemoryOutgrown
    | AttemptLost
    | StopAsked
    | JobGivenUp
    | WorkerJoined
    | WorkerLost
    | WorkerDraining
    | WorkerResumed
    | ModelLoaded
    | ModelEvicted
    | TierPaused
    | TierResumed
    | TagsStored
)
