"""Makes the plans that tests of plans need, naming only what a test is about."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg

from billing import plans
from billing.plans import EffectiveFrom, PlanFields, PlanLimits, PlanVersion

LONG_AGO = datetime(2026, 1, 2, tzinfo=UTC)


def plan_fields(plan: str, **fields: Any) -> PlanFields:
    """Return a plan with the first release's numbers but for these fields."""
    like_basic = PlanFields(
        plan=plan,
        quota_ms=12_000_000,
        limits=PlanLimits(running=3, relax_running=2, accepted=10),
        relax_weight_milli=1000,
        private_allowed=False,
        private_multiplier_bp=20_000,
        overage_micros_per_minute=66_667,
        currency="USD",
    )
    return replace(like_basic, **fields)


async def a_plan(
    connection: asyncpg.Connection, plan: str, *, at: datetime = LONG_AGO, **fields: Any
) -> PlanVersion:
    """Make a plan."""
    async with connection.transaction():
        return await plans.create(
            connection,
            plan_fields(plan, **fields),
            actor="accounts/root",
            reason="test",
            request_id=str(uuid4()),
            at=at,
        )


async def a_version(
    connection: asyncpg.Connection,
    plan: str,
    *,
    at: datetime,
    effective_from: EffectiveFrom = EffectiveFrom.NEXT_PERIOD,
    **fields: Any,
) -> PlanVersion:
    """Make a new version of a plan that differs in these fields."""
    current = await plans.newest(connection, plan)
    async with connection.transaction():
        return await plans.update(
            connection,
            replace(current, **fields),
            etag=current.etag,
            effective_from=effective_from,
            actor="accounts/root",
            reason="test",
            request_id=str(uuid4()),
            at=at,
        )
