"""What should be done now, as data: each decision carries its reason and the numbers that were compared."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Checkpoint
from scheduler.policy.usage import tag_cost


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """Everything a dispatch changes in the fair queue; the loop writes it with the attempt.

    Several starts of one account in a batch build on each other, so they are written in their order; if
    one is refused, those of the same account behind it are to be left for the next cycle, or the account
    pays for a job that never started.
    """

    predicted_ms: int
    weight_milli: int
    """Of the tag: the plan's in relax, 1000 in fast."""
    charged_at_ms: int
    start_tag: int
    """The tag it was chosen by, memory included."""
    finish_tag: int
    """The account's new finish tag in the tier: where it stood, memory apart, and the cost."""
    next_tag: int | None
    """The account's new tag in the tier; None: this start ends its eligibility."""
    usage_added: float
    """To add to the account's relax usage, whatever the tier."""
    virtual_time: int
    """The tier's virtual time becomes the greatest of this and what it is."""
    aged: bool
    """Taken for its age, out of the order."""

    @property
    def charged_from(self) -> int:
        """Where in virtual time the account stood, memory apart: where its finish tag is counted from."""
        return self.finish_tag - tag_cost(self.predicted_ms, self.weight_milli)


class ChosenBecause(StrEnum):
    """What put a job before the others."""

    FIRST_IN_ORDER = "first_in_order"
    AGED = "aged"
    MODEL_WARM = "model_warm"
    RELAX_TURN = "relax_turn"
    """One start in a few of those that fast would have had, where the fleet is too small for a floor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What an account's head job is compared by, in this order."""

    tag: int
    """GPU-microseconds per unit of weight."""
    usage_per_weight_ms: float
    """Decayed GPU-milliseconds; 0 in fast, where it is not compared."""
    arrival: int
    account_id: AccountId


@dataclass(frozen=True, kw_only=True, slots=True)
class StartKeys:
    """The numbers that decided a start."""

    because: ChosenBecause
    chosen: Standing
    runner_up: Standing | None
    """The first of the other accounts, those left out that no idle worker could take; None: nobody else."""
    virtual_time: int
    """Of the tier, before this start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Begin an attempt at a waiting job, on an idle worker or in place of a run that is parked for it."""

    job_id: JobId
    account_id: AccountId
    tier: Tier
    worker_id: WorkerId
    charge: Charge
    keys: StartKeys
    warm: bool
    """The worker has the job's model loaded."""
    parks: AttemptId | None = None
    """The relax run that the worker is to park at its next boundary. A run that waits parked on an idle
    worker already is not named."""
    resume_from: Checkpoint | None = None
    """Where an earlier attempt at the job got to, if this worker can go on from there."""
    sheltered: bool = False
    """It had its turn before fast, so no fast job parks it."""

    @property
    def reason(self) -> str:
        """Why this job goes first, for a person. Other accounts are not named: its owner may see it."""
        why = _why_first(self.keys, self.tier)
        return why if self.parks is None else f"{why} A relax job makes room for it."


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """Let a parked run go on on its own worker, which is free."""

    attempt_id: AttemptId
    worker_id: WorkerId
    sheltered: bool
    """It had its turn before fast, so no fast job parks it again."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Migrate:
    """Go on with a parked run on another worker: its attempt is closed as migrated and the next one opened.

    What was charged for the first attempt counts for the second.
    """

    attempt_id: AttemptId
    worker_id: WorkerId
    """Where it is parked."""
    to: WorkerId
    checkpoint: Checkpoint
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Tell a worker to stop an attempt at its next step. Decided until it is known to be asked."""

    attempt_id: AttemptId
    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GiveUp:
    """Fail a job that waits. Decided until it is known to be done."""

    job_id: JobId
    reason: str


Decision = Start | Resume | Migrate | Stop | GiveUp


def _why_first(keys: StartKeys, tier: Tier) -> str:
    chosen, other = keys.chosen, keys.runner_up
    if other is None:
        return f"No other account waited in {tier} for a GPU that was free."
    tags = f"tag {_seconds(chosen.tag)} against {_seconds(other.tag)} of the next account"
    used = f"{_minutes(chosen.usage_per_weight_ms)} used lately against {_minutes(other.usage_per_weight_ms)}"
    use_counts = tier is Tier.RELAX
    if keys.because is ChosenBecause.AGED:
        return f"It had waited longest, and one start in a few goes by age ({tags})."
    if keys.because is ChosenBecause.RELAX_TURN:
        return f"Relax had waited long, and takes one start in a few before fast ({tags})."
    if keys.because is ChosenBecause.MODEL_WARM:
        return f"A free GPU had its model loaded, and it was close enough to the first in {tier} ({tags})."
    if chosen.tag != other.tag:
        return f"First in {tier}: {tags}" + (f", {used}." if use_counts else ".")
    if use_counts and chosen.usage_per_weight_ms != other.usage_per_weight_ms:
        return (
            f"Level in {tier} with the next account ({_seconds(chosen.tag)}), and it has used less: {used}."
        )
    return f"Level in {tier} with the next account ({_seconds(chosen.tag)}), and this job came earlier."


def _seconds(tag: int) -> str:
    return f"{tag / 1_000_000:,.1f} s"


def _minutes(usage_ms: float) -> str:
    return f"{usage_ms / 60_000:,.1f} GPU-min"
