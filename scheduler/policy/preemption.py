"""When a fast job takes the GPU of a relax run, and what relax is left.

A run that is parked loses nothing but time: it keeps its latents, and goes on to the same bits when the fast
job has ended. Those about to end, and those that were parked often, only if there is no other; then first
those of the account that is furthest ahead, and of these the one that began last.
"""

from __future__ import annotations

from typing import NamedTuple

from scheduler.policy.attempt import Attempt
from scheduler.policy.ids import WorkerId
from scheduler.policy.parameters import Parameters


class Parkable(NamedTuple):
    """A relax run that has its worker's GPU and may lose it."""

    rank: tuple[bool, int, int, WorkerId]
    """Smallest first: spared, largest tag of its account, latest start."""
    worth_until_ms: int
    """After this it has too few steps left beyond the park to be worth it."""
    ends_ms: int
    """When it will probably end."""


def parkable(attempt: Attempt, account_tag: int, speed_permille: int, parameters: Parameters) -> Parkable:
    """Return how a run stands among those that could be parked.

    `account_tag` is the tag that the next relax job of its account has or would have.
    """
    # One more step to the boundary at which it parks, then those that must be left.
    steps_ms = (1 + parameters.steps_worth_parking) * attempt.job.step_ms * 1000 // speed_permille
    return Parkable(
        rank=(
            attempt.parks >= parameters.parks_before_spared,
            -account_tag,
            -attempt.started_ms,
            attempt.worker_id,
        ),
        worth_until_ms=attempt.ends_ms - steps_ms,
        ends_ms=attempt.ends_ms,
    )


def relax_floor(gpus: int, parameters: Parameters) -> int:
    """Return how many of the GPUs fast leaves to relax while relax work waits or is parked."""
    if gpus < parameters.relax_floor_from_gpus:
        return 0
    return max(1, -(-gpus * parameters.relax_floor_permille // 1000))
