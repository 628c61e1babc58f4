"""Plans and their versions: a version never changes, and a change of plan is a new version."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum

import asyncpg

from billing import audit
from billing.refusals import EtagMismatch, UnknownPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanLimits:
    """How many jobs an account may have."""

    running: int
    """At once, of any tier."""
    relax_running: int
    """At once, in relax."""
    accepted: int
    """At once, running and waiting."""


@dataclass(frozen=True, kw_only=True)
class PlanFields:
    """What an admin decides about a plan."""

    plan: str
    quota_ms: int
    """Fast time granted for each period, in GPU milliseconds."""
    limits: PlanLimits
    relax_weight_milli: int
    """Share of relax against other plans; 1000 is 1."""
    private_allowed: bool
    private_multiplier_bp: int
    overage_micros_per_minute: int
    """Price of a GPU minute beyond the quota; 0: no overage on this plan."""
    currency: str
    """ISO 4217."""


@dataclass(frozen=True, kw_only=True)
class PlanVersion(PlanFields):
    """One version of a plan."""

    version: int
    at_once: bool
    """Subscribers take it up at once; otherwise with their first period that begins after `created_at`."""
    created_at: datetime

    @property
    def etag(self) -> str:
        """What an update must name to replace this version."""
        return f"v{self.version}"


class EffectiveFrom(StrEnum):
    """When a new version begins to count for those who are on the plan."""

    NEXT_PERIOD = "next_period"
    NOW = "now"


async def newest(connection: asyncpg.Connection, plan: str) -> PlanVersion:
    """Return the newest version of a plan; raises UnknownPlan. Locks nothing."""
    row = await connection.fetchrow(
        "SELECT * FROM billing.plan_version WHERE plan = $1 ORDER BY version DESC LIMIT 1", plan
    )
    if row is None:
        raise UnknownPlan(plan=plan)
    return _plan_version(row)


async def all_newest(connection: asyncpg.Connection) -> list[PlanVersion]:
    """Return the newest version of every plan, by name. Locks nothing."""
    rows = await connection.fetch(
        "SELECT DISTINCT ON (plan) * FROM billing.plan_version ORDER BY plan, version DESC"
    )
    return [_plan_version(row) for row in rows]


async def update(
    connection: asyncpg.Connection,
    fields: PlanFields,
    *,
    etag: str,
    effective_from: EffectiveFrom,
    actor: str,
    reason: str,
    request_id: str,
    at: datetime,
) -> PlanVersion:
    """Make a new version of a plan, with its audit event, and return it.

    With NOW, each subscriber's limits and terms change at the next touch of its account, and its present
    period gains or loses the difference of the quotas, though never what is used or held. So an update costs
    the same for ten subscribers as for a million. Locks the plan. Raises UnknownPlan or EtagMismatch, and
    asyncpg.CheckViolationError for numbers no plan can have: the caller has refused those.
    """
    await connection.execute(
        "SELECT FROM billing.plan_version WHERE plan = $1 AND version = 1 FOR UPDATE", fields.plan
    )
    current = await newest(connection, fields.plan)
    if etag != current.etag:
        raise EtagMismatch(given=etag, current=current.etag)
    audit_id = await audit.record(
        connection,
        actor=actor,
        action="UpdatePlan",
        target=f"plans/{fields.plan}",
        reason=reason,
        request_id=request_id,
        before={"version": current.version, **_as_json(current)},
        after={"version": current.version + 1, **_as_json(fields), "effective_from": effective_from},
        at=at,
    )
    row = await connection.fetchrow(
        """INSERT INTO billing.plan_version (
               plan, version, quota_ms, limit_running, limit_relax_running, limit_accepted,
               relax_weight_milli, private_allowed, private_multiplier_bp, overage_micros_per_minute,
               currency, at_once, created_at, audit_id)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
           RETURNING *""",
        fields.plan,
        current.version + 1,
        fields.quota_ms,
        fields.limits.running,
        fields.limits.relax_running,
        fields.limits.accepted,
        fields.relax_weight_milli,
        fields.private_allowed,
        fields.private_multiplier_bp,
        fields.overage_micros_per_minute,
        fields.currency,
        effective_from is EffectiveFrom.NOW,
        at,
        audit_id,
    )
    assert row is not None
    return _plan_version(row)


def limits_of(row: asyncpg.Record) -> PlanLimits:
    """Return the limits in a row with plan_version's columns."""
    return PlanLimits(
        running=row["limit_running"],
        relax_running=row["limit_relax_running"],
        accepted=row["limit_accepted"],
    )


def _plan_version(row: asyncpg.Record) -> PlanVersion:
    return PlanVersion(
        plan=row["plan"],
        version=row["version"],
        quota_ms=row["quota_ms"],
        limits=limits_of(row),
        relax_weight_milli=row["relax_weight_milli"],
        private_allowed=row["private_allowed"],
        private_multiplier_bp=row["private_multiplier_bp"],
        overage_micros_per_minute=row["overage_micros_per_minute"],
        currency=row["currency"],
        at_once=row["at_once"],
        created_at=row["created_at"],
    )


def _as_json(fields: PlanFields) -> dict[str, object]:
    return {name: asdict(fields)[name] for name in PlanFields.__dataclass_fields__}
