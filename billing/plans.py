"""Plans and their versions: a version never changes, and a change of plan is a new version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum

import asyncpg

from billing import audit
from billing.entitlement import renewed
from billing.refusals import EtagMismatch, PlanExists, UnknownPlan
from billing.renewal import standings, versions_of

# Through text: the caller's connection may decode JSON, or not.
_COLUMNS = "plan_version.*, gpu_class_bp::text AS gpu_classes"

_SHOWN = 100
"""Accounts that an impact names."""
# Accounts that an impact looks at with one statement: between two the event loop has its turn.
_AT_ONCE = 1_000


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
    price_micros: int = 0
    """Price of a period."""
    rollover_ms: int = 0
    """Most unused time of the plan that a period leaves to the next."""
    gpu_class_bp: Mapping[str, int] = field(default_factory=dict)
    """Multipliers by device type, beside the private one; a type that is not named counts 10,000."""
    self_service: bool = False
    """Accounts may change to it by themselves; otherwise only admins change theirs to it."""
    picture_retention_days: int = 0
    """How long pictures are kept after the end of their job; 0: for ever."""


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


@dataclass(frozen=True, kw_only=True)
class AccountImpact:
    """What a new version of a plan does to one account, in GPU milliseconds."""

    account_id: str
    available_before_ms: int
    available_after_ms: int


@dataclass(frozen=True, kw_only=True)
class PlanImpact:
    """What a new version of a plan does to those who are on it."""

    accounts: int
    granted_ms: int
    """In the present period, over all accounts, as `revoked_ms`; 0 where it counts from the next."""
    revoked_ms: int
    cut_short: int
    """Accounts from which not all that the quota fell by can be taken: it is used or held."""
    behind: int
    """Accounts that would take up at once what earlier versions were to change with their next period."""
    retention_days_before: int
    """How long pictures are kept by the newest version; 0: for ever."""
    retention_days_after: int
    first: tuple[AccountImpact, ...]
    """The first hundred accounts by id."""


async def newest(connection: asyncpg.Connection, plan: str) -> PlanVersion:
    """Return the newest version of a plan; raises UnknownPlan. Locks nothing."""
    return await get(connection, plan)


async def get(connection: asyncpg.Connection, plan: str, version: int | None = None) -> PlanVersion:
    """Return one version of a plan, the newest unless another is named; raises UnknownPlan. Locks nothing."""
    row = await connection.fetchrow(
        f"""SELECT {_COLUMNS} FROM billing.plan_version
             WHERE plan = $1 AND version = COALESCE($2, version) ORDER BY version DESC LIMIT 1""",  # noqa: S608
        plan,
        version,
    )
    if row is None:
        raise UnknownPlan(plan=plan if version is None else f"{plan}/versions/{version}")
    return _plan_version(row)


async def all_newest(connection: asyncpg.Connection) -> list[PlanVersion]:
    """Return the newest version of every plan, by name. Locks nothing."""
    rows = await connection.fetch(
        f"SELECT DISTINCT ON (plan) {_COLUMNS} FROM billing.plan_version ORDER BY plan, version DESC"  # noqa: S608
    )
    return [_plan_version(row) for row in rows]


async def create(
    connection: asyncpg.Connection,
    fields: PlanFields,
    *,
    actor: str,
    reason: str,
    request_id: str,
    at: datetime,
) -> PlanVersion:
    """Make a plan, with its audit event, and return its first version.

    Raises PlanExists, and asyncpg.CheckViolationError for numbers no plan can have: the caller has refused
    those. Locks nothing that others wait for.
    """
    audit_id = await audit.record(
        connection,
        actor=actor,
        action="CreatePlan",
        target=f"plans/{fields.plan}",
        reason=reason,
        request_id=request_id,
        before=None,
        after={"version": 1, **_as_json(fields)},
        at=at,
    )
    version = await _insert(connection, fields, 1, at_once=False, at=at, audit_id=audit_id)
    if version is None:
        raise PlanExists(plan=fields.plan)
    return version


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

    With NOW, each subscriber's limits and terms change at the next touch of its account, and a new quota is
    that of its present period too: what is missing to it is granted, and what is too much taken back, though
    never what is used or held. So an update costs the same for ten subscribers as for a million. Locks the
    plan. Raises UnknownPlan or EtagMismatch, and
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
    version = await _insert(
        connection,
        fields,
        current.version + 1,
        at_once=effective_from is EffectiveFrom.NOW,
        at=at,
        audit_id=audit_id,
    )
    assert version is not None, "the plan is locked"
    return version


async def impact(
    connection: asyncpg.Connection, fields: PlanFields, effective_from: EffectiveFrom, at: datetime
) -> PlanImpact:
    """Return what `update` with these fields would do to the plan's subscribers. Changes and locks nothing.

    Each counts as it will be once it is touched, by the rule of the renewal that does it: with the versions
    at once made since it was, and, where its period has ended, in its new period, on the plan it changes to.
    Raises UnknownPlan.
    """
    current = await newest(connection, fields.plan)
    accounts = granted_ms = revoked_ms = cut_short = behind_newest = 0
    first: list[AccountImpact] = []
    behind = ""
    while ids := await _subscribers(connection, fields.plan, behind, at):
        found = await standings(connection, ids, at)
        versions = await versions_of(connection, found)
        for standing in found:
            step = renewed(standing, versions, at)
            available_ms = standing.living_ms
            if step.period == standing.period:
                available_ms += step.moved_ms
            else:
                available_ms += step.version.quota_ms + step.rolled_ms
            moved_ms = 0
            if effective_from is EffectiveFrom.NOW and fields.quota_ms != step.version.quota_ms:
                moved_ms = step.time.to(fields.quota_ms)
                cut_short += moved_ms > step.time.short_of(fields.quota_ms)
            if effective_from is EffectiveFrom.NOW:
                behind_newest += step.version.version < current.version
            accounts += 1
            granted_ms += max(moved_ms, 0)
            revoked_ms += max(-moved_ms, 0)
            if len(first) < _SHOWN:
                first.append(
                    AccountImpact(
                        account_id=standing.account_id,
                        available_before_ms=available_ms,
                        available_after_ms=available_ms + moved_ms,
                    )
                )
        behind = ids[-1]
    return PlanImpact(
        accounts=accounts,
        granted_ms=granted_ms,
        revoked_ms=revoked_ms,
        cut_short=cut_short,
        behind=behind_newest,
        retention_days_before=current.picture_retention_days,
        retention_days_after=fields.picture_retention_days,
        first=tuple(first),
    )


async def _subscribers(connection: asyncpg.Connection, plan: str, behind: str, at: datetime) -> list[str]:
    """Return the next accounts that are on a plan at `at`, or will be found on it, by their ids."""
    rows = await connection.fetch(
        """SELECT account_id FROM billing.subscription
            WHERE account_id > $2 AND ended_at IS NULL
              AND $1 = CASE WHEN period_end <= $3 THEN COALESCE(scheduled_plan, plan) ELSE plan END
            ORDER BY account_id LIMIT $4""",
        plan,
        behind,
        at,
        _AT_ONCE,
    )
    return [row["account_id"] for row in rows]


def limits_of(row: asyncpg.Record) -> PlanLimits:
    """Return the limits in a row with plan_version's columns."""
    return PlanLimits(
        running=row["limit_running"],
        relax_running=row["limit_relax_running"],
        accepted=row["limit_accepted"],
    )


def classes_of(text: str) -> dict[str, int]:
    """Return the multipliers by device type of a plan_version's gpu_class_bp, read as text."""
    classes: dict[str, int] = json.loads(text)
    return classes


async def _insert(
    connection: asyncpg.Connection,
    fields: PlanFields,
    version: int,
    *,
    at_once: bool,
    at: datetime,
    audit_id: int,
) -> PlanVersion | None:
    """Insert a version and return it, None if there is one of that number."""
    row = await connection.fetchrow(
        f"""INSERT INTO billing.plan_version (
                plan, version, quota_ms, limit_running, limit_relax_running, limit_accepted,
                relax_weight_milli, private_allowed, private_multiplier_bp, overage_micros_per_minute,
                currency, price_micros, rollover_ms, gpu_class_bp, at_once, created_at, audit_id,
                self_service, picture_retention_days)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14::text::jsonb, $15, $16, $17,
                    $18, $19)
            ON CONFLICT DO NOTHING RETURNING {_COLUMNS}""",  # noqa: S608
        fields.plan,
        version,
        fields.quota_ms,
        fields.limits.running,
        fields.limits.relax_running,
        fields.limits.accepted,
        fields.relax_weight_milli,
        fields.private_allowed,
        fields.private_multiplier_bp,
        fields.overage_micros_per_minute,
        fields.currency,
        fields.price_micros,
        fields.rollover_ms,
        json.dumps(dict(fields.gpu_class_bp)),
        at_once,
        at,
        audit_id,
        fields.self_service,
        fields.picture_retention_days,
    )
    return None if row is None else _plan_version(row)


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
        price_micros=row["price_micros"],
        rollover_ms=row["rollover_ms"],
        gpu_class_bp=classes_of(row["gpu_classes"]),
        self_service=row["self_service"],
        picture_retention_days=row["picture_retention_days"],
        at_once=row["at_once"],
        created_at=row["created_at"],
    )


def _as_json(fields: PlanFields) -> dict[str, object]:
    return {name: asdict(fields)[name] for name in PlanFields.__dataclass_fields__}
