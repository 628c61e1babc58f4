"""Caps are gates before the order: what an account may run at once, whatever its place."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.policy.ids import Tier


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The numbers of an account's plan."""

    running: int
    """Attempts of any tier at once."""
    relax_running: int
    """Of these, relax."""
    accepted: int
    """Jobs running and waiting. The transaction that accepts a job enforces it; here it is only known."""

    def free(self, tier: Tier, *, running: int, relax_running: int) -> int:
        """Return how many more attempts of `tier` may start now.

        It is negative while more run than a plan made smaller allows.
        """
        free = self.running - running
        return free if tier is Tier.FAST else min(free, self.relax_running - relax_running)
