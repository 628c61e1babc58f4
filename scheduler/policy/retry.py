"""A job whose worker was lost is tried again, but not for ever."""

from __future__ import annotations

from scheduler.policy.parameters import Parameters


def give_up_reason(losses: int, parameters: Parameters) -> str | None:
    """Return why a job that lost `losses` workers is not tried again; None: it is."""
    if losses < parameters.max_losses:
        return None
    return f"The worker was lost {losses} times while it ran this job, which is as often as it is tried."
