"""What use costs an account in the order, and how it is forgotten.

Tags are integers of GPU-microseconds per unit of weight, so memory and database agree to the last bit. Usage
is GPU-milliseconds, forward decayed: every charge is multiplied by `2^((t - t0) / H)` when it is made and
divided by today's factor when it is read, so nothing is ever swept or sorted again. The road is from
Cormode, Shkapenyuk, Srivastava, Xu: "Forward Decay" (ICDE 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters

FAST_WEIGHT_MILLI = 1000
"""Fast is fair between paying accounts in GPU time: a plan's weight is for relax."""

_ORIGIN_HALF_LIVES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareChange:
    """What the end of an attempt changes: the transaction that settles it and the board apply the same."""

    tag_delta: int
    """To add to the finish tag of the attempt's tier, and to its tag if that is set."""
    usage_delta: float
    """To add to the account's relax usage, which stays at least 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescaling:
    """A newer origin of decay, and what every stored usage is to be multiplied by for it."""

    decay_origin_ms: int
    factor: float


def growth(at_ms: int, *, decay_origin_ms: int, half_life_ms: int) -> float:
    """Return what a charge made at `at_ms` is multiplied by.

    Raises OverflowError 1,024 half-lives past the origin: recovery must have moved it long before.
    """
    return float(2.0 ** ((at_ms - decay_origin_ms) / half_life_ms))


def tag_cost(cost_ms: int, weight_milli: int) -> int:
    """Return what `cost_ms` of GPU time moves a tag by."""
    return cost_ms * 1_000_000 // weight_milli


def usage_cost(
    cost_ms: int, tier: Tier, at_ms: int, *, decay_origin_ms: int, parameters: Parameters
) -> float:
    """Return what `cost_ms` of GPU time, charged at `at_ms`, adds to the account's stored relax usage."""
    factor = parameters.fast_usage_factor if tier is Tier.FAST else 1.0
    return (
        cost_ms
        * factor
        * growth(at_ms, decay_origin_ms=decay_origin_ms, half_life_ms=parameters.half_life_ms)
    )


def memory(usage_per_weight_ms: float, parameters: Parameters) -> int:
    """Return how much later than its turn a relax job is tagged, for decayed use per unit of weight.

    Between 0 and P, in tag units, and linear. A logarithm would cost the first minutes most, and put an
    account that has used little nearly as far back as one that has used all.
    """
    return int(parameters.memory_span_ms * 1000 * min(1.0, usage_per_weight_ms / parameters.memory_full_ms))


def start_of(tag: int, finish_tag: int, virtual_time: int) -> int:
    """Return the point of virtual time from which a start is charged.

    It is where the account stands among the others, its memory left out: that made the job wait, and charging
    it as well would make a small job of a heavy account as dear as a large one. Never beyond the tag, so
    that a job which others went before, for their age or for a model, loses nothing by it.
    """
    return min(tag, max(finish_tag, virtual_time))


def correction(
    *,
    tier: Tier,
    predicted_ms: int,
    weight_milli: int,
    charged_at_ms: int,
    actual_ms: int,
    decay_origin_ms: int,
    parameters: Parameters,
) -> ShareChange:
    """Return what replaces the charge for `predicted_ms` by one for `actual_ms`.

    Weight and decay are those of the charge, so an `actual_ms` of 0 undoes it to the last tag unit.
    """
    return ShareChange(
        tag_delta=tag_cost(actual_ms, weight_milli) - tag_cost(predicted_ms, weight_milli),
        usage_delta=usage_cost(
            actual_ms - predicted_ms,
            tier,
            charged_at_ms,
            decay_origin_ms=decay_origin_ms,
            parameters=parameters,
        ),
    )


def rescaling(*, decay_origin_ms: int, now_ms: int, parameters: Parameters) -> Rescaling | None:
    """Return the origin to move to before a board is restored, or None while the present one is young enough.

    Doubles end at 1,024 half-lives. The origin moves at 64, so that a scheduler which recovers at least once
    in 18 years never meets that end.
    """
    if now_ms - decay_origin_ms < _ORIGIN_HALF_LIVES * parameters.half_life_ms:
        return None
    return Rescaling(
        decay_origin_ms=now_ms,
        factor=float(2.0 ** ((decay_origin_ms - now_ms) / parameters.half_life_ms)),
    )
