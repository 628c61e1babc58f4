"""Whether the fast time of the canary's account lasts, before it does not.

The canary sends a fast job at each turn of a period, and a job that is refused for want of time says nothing
about the service. What its jobs take is measured; what the account gets is its plan's: what operators granted
beside it is gone with the next period.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import asyncpg

# The longest there is: a period is a month.
_PERIOD_MS = 31 * 24 * 3_600_000
_MINUTE_MS = 60_000
# So many jobs are one figure, and not the luck of one.
_NEWEST = 20


@dataclass(frozen=True, kw_only=True)
class CanaryTime:
    """What the canary's account gets for each period from the next one on."""

    plan: str
    quota_ms: int
    """GPU time."""
    has_overage: bool
    """Beyond it, the account pays: nothing ends."""

    def shortage(self, *, every_s: int, take_ms: int) -> Shortage | None:
        """Return by how much that is too little for a fast job of `take_ms`, as billed, every `every_s`.

        None: it lasts.
        """
        jobs = _PERIOD_MS // (every_s * 1000)
        if self.has_overage or jobs * take_ms <= self.quota_ms:
            return None
        return Shortage(time=self, every_s=every_s, take_ms=take_ms, jobs=jobs)


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """That the fast time does not last for a period, with the figures that say so."""

    time: CanaryTime
    every_s: int
    take_ms: int
    jobs: int
    """In a period."""

    def __str__(self) -> str:
        needed, granted = self.needed_minutes, self.time.quota_ms // _MINUTE_MS
        days = self.time.quota_ms // self.take_ms * self.every_s // 86_400
        each = f"A fast job every {self.every_s} s at {self.take_ms / 1000:.1f} s each"
        return (
            f"{each} is {self.jobs:,} jobs and {needed:,} min in 31 days. The plan {self.time.plan} grants "
            f"{granted:,} min, which are used up after {days} days, and then nobody knows whether fast works."
        )

    @property
    def needed_minutes(self) -> int:
        """What the plan would have to grant, in whole minutes."""
        return math.ceil(self.jobs * self.take_ms / _MINUTE_MS)


async def read(connection: asyncpg.Connection, account_id: str) -> CanaryTime | None:
    """Return what the account gets; None: there is no such account."""
    row = await connection.fetchrow(
        """SELECT version.plan, version.quota_ms,
                  subscription.overage_allowed AND version.overage_micros_per_minute > 0 AS has_overage
             FROM billing.subscription
             CROSS JOIN LATERAL (SELECT * FROM billing.plan_version
                                  WHERE plan = coalesce(subscription.scheduled_plan, subscription.plan)
                                  ORDER BY version DESC LIMIT 1) AS version
            WHERE account_id = $1 AND ended_at IS NULL""",
        account_id,
    )
    return None if row is None else CanaryTime(**row)


async def take_ms(connection: asyncpg.Connection, account_id: str) -> int | None:
    """Return what its newest fast jobs were billed each; None: there are none. Reads all that it ever had."""
    mean: int | None = await connection.fetchval(
        """SELECT ceil(avg(billed_ms))::bigint FROM (
               SELECT billed_ms FROM billing.settlement
                WHERE account_id = $1 AND tier = 'fast' AND ending = 'post'
                ORDER BY at DESC LIMIT $2) AS newest""",
        account_id,
        _NEWEST,
    )
    return mean
