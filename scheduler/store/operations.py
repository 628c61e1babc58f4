"""What operators ask of the fleet, as rows: workers to be drained, tiers to be paused.

A wish is a row before anybody acts on it, so it outlives front door and scheduler alike. The scheduler reads
all wishes at once, when it is told that they changed and now and then anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from scheduler.policy.ids import Tier
from scheduler.store.pool import Connection


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What holds now."""

    draining: Mapping[str, datetime]
    """Workers that are to take nothing new, and when they are to hand over what they have not finished."""
    paused: frozenset[Tier]
    """Tiers of which nothing is to start."""
    set_aside: Mapping[str, datetime]
    """Workers that lost too much, until when they get nothing: no wish, but operators can end it."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What is known of a worker's slot, whether or not the worker is there."""

    draining: bool
    drain_reason: str
    """Empty if it does not drain."""
    hand_over_at: datetime | None
    """None if it does not drain."""
    set_aside_until: datetime | None
    """It lost several jobs in a row; may lie in the past."""

    def aside_at(self, at: datetime) -> datetime | None:
        """Return until when it is set aside at `at`, None if it is not."""
        return self.set_aside_until if self.set_aside_until and self.set_aside_until > at else None


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Whether a tier is paused, and why."""

    paused: bool
    reason: str
    """Empty if it is not."""


async def wishes(connection: Connection) -> Wishes:
    """Return everything that operators want now. Locks nothing."""
    slots = await connection.fetch(
        """SELECT worker_id, draining, hand_over_at, set_aside_until FROM scheduler.worker_slot
           WHERE draining OR set_aside_until > now()"""
    )
    paused = await connection.fetch("SELECT tier FROM scheduler.cell WHERE paused")
    return Wishes(
        draining={row["worker_id"]: row["hand_over_at"] for row in slots if row["draining"]},
        paused=frozenset(Tier(row["tier"]) for row in paused),
        set_aside={
            row["worker_id"]: row["set_aside_until"] for row in slots if row["set_aside_until"] is not None
        },
    )


async def slots(connection: Connection) -> Mapping[str, Slot]:
    """Return every slot of which something was asked or lost, by worker. Locks nothing."""
    rows = await connection.fetch(
        "SELECT worker_id, draining, drain_reason, hand_over_at, set_aside_until FROM scheduler.worker_slot"
    )
    return {
        row["worker_id"]: Slot(
            draining=row["draining"],
            drain_reason=row["drain_reason"],
            hand_over_at=row["hand_over_at"],
            set_aside_until=row["set_aside_until"],
        )
        for row in rows
    }


async def lock_slot(connection: Connection, worker_id: str) -> Slot | None:
    """Return a worker's slot and lock its row, None if nothing was ever asked of it or lost by it."""
    row = await connection.fetchrow(
        """SELECT draining, drain_reason, hand_over_at, set_aside_until FROM scheduler.worker_slot
           WHERE worker_id = $1 FOR UPDATE""",
        worker_id,
    )
    return None if row is None else Slot(**row)


async def lock_pause(connection: Connection, tier: Tier) -> Pause:
    """Return whether a tier is paused and lock its row."""
    row = await connection.fetchrow(
        "SELECT paused, pause_reason FROM scheduler.cell WHERE tier = $1 FOR UPDATE", tier
    )
    assert row is not None, "both tiers have a row from the first migration on"
    return Pause(paused=row["paused"], reason=row["pause_reason"])


async def pauses(connection: Connection) -> Mapping[Tier, Pause]:
    """Return whether each tier is paused. Locks nothing."""
    rows = await connection.fetch("SELECT tier, paused, pause_reason FROM scheduler.cell")
    return {Tier(row["tier"]): Pause(paused=row["paused"], reason=row["pause_reason"]) for row in rows}


async def drain_worker(connection: Connection, worker_id: str, reason: str, *, within: timedelta) -> None:
    """Want a worker to take nothing new, and to hand over what it has not finished `within` that time.

    Locks its slot's row.
    """
    await connection.execute(
        """INSERT INTO scheduler.worker_slot (worker_id, draining, drain_reason, hand_over_at)
           VALUES ($1, true, $2, now() + $3)
           ON CONFLICT (worker_id) DO UPDATE SET draining = true, drain_reason = EXCLUDED.drain_reason,
                                                 hand_over_at = EXCLUDED.hand_over_at""",
        worker_id,
        reason,
        within,
    )


async def resume_worker(connection: Connection, worker_id: str) -> None:
    """Want a worker to take jobs again, whatever kept it from that. Locks its slot's row.

    What it lost before is forgotten: whoever resumes a worker says that it is in order.
    """
    await connection.execute(
        """UPDATE scheduler.worker_slot
           SET draining = false, drain_reason = '', hand_over_at = NULL, set_aside_until = NULL,
               losses_in_row = 0, last_lost_job = NULL
           WHERE worker_id = $1""",
        worker_id,
    )


async def pause_tier(connection: Connection, tier: Tier, reason: str) -> None:
    """Want nothing of a tier to start. Locks the tier's row."""
    await connection.execute(
        "UPDATE scheduler.cell SET paused = true, pause_reason = $2 WHERE tier = $1", tier, reason
    )


async def resume_tier(connection: Connection, tier: Tier) -> None:
    """Want jobs of a tier to start again. Locks the tier's row."""
    await connection.execute(
        "UPDATE scheduler.cell SET paused = false, pause_reason = '' WHERE tier = $1", tier
    )
