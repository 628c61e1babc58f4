"""Changes of plan: to one with more fast time at once, to one with less when the period ends.

At once means for the rest of the period: its share of the difference in fast time is granted, its share of
the old price given back and of the new one charged. A preview names the moment and the state it was made
for, so that the change that names the preview is exactly what was shown, or is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import asyncpg

from billing import accounts, audit, plans
from billing.accounts import Terms
from billing.books import Books, Grant, grant, settle_plan_change
from billing.entries import Code, Source
from billing.periods import Period
from billing.plans import PlanVersion
from billing.prices import prorated
from billing.refusals import AccountErased, EtagMismatch, PlanNotSelfService, RequestIdReused

# How long what a preview showed can be had. In that time its share shrinks by a 4,000th of the period.
_PREVIEW_HOLDS = timedelta(minutes=10)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US = timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True)
class PlanChange:
    """What a change of plan gives and costs."""

    account_id: str
    from_plan: str
    to_plan: str
    """The same: nothing changes, and a change that was scheduled is taken back."""
    to_version: int
    """Of the new plan: the newest. A scheduled change takes the newest of its day."""
    effective_at: datetime
    at_once: bool
    granted_ms: int
    """Fast time it adds to the present period."""
    credit_micros: int
    """For the rest of the period at the old price: 0 or negative."""
    charge_micros: int
    """For the rest of the period at the new price."""
    currency: str
    retention_days_before: int
    """How long pictures are kept on the old plan; 0: for ever."""
    retention_days_after: int
    etag: str
    """Names the moment and the state this was made for."""

    @property
    def amount_micros(self) -> int:
        """What is to be paid now; negative: what is owed to the account."""
        return self.credit_micros + self.charge_micros


async def preview(
    connection: asyncpg.Connection, account_id: str, plan: str, at: datetime, *, by_itself: bool = False
) -> PlanChange:
    """Return what a change to the newest version of `plan` would give and cost at `at`.

    An account that changes its plan `by_itself` has those that are open to that; to keep its plan, and so
    take back what is scheduled, is such a change too, because an admin may have scheduled it. Locks the
    account only to open a new period.

    Raises UnknownAccount, AccountErased, UnknownPlan or PlanNotSelfService.
    """
    terms = (await accounts.terms(connection, [account_id], at))[account_id]
    return await _foreseen(connection, terms, plan, terms.in_period(at), by_itself=by_itself)


async def change(
    connection: asyncpg.Connection,
    account_id: str,
    plan: str,
    *,
    etag: str,
    actor: str,
    reason: str,
    request_id: str,
    at: datetime,
    by_itself: bool = False,
) -> PlanChange:
    """Change an account's plan, with an audit event, and return what that gave and cost.

    With the etag of a preview it is exactly what that showed, if the preview is at most ten minutes old and
    neither the account's plan nor the terms of either have changed since; with an empty one it is what a
    preview at `at` would show. Locks the account; a repeated request is for `idempotency.claim`.

    Raises what `preview` does, EtagMismatch or RequestIdReused.
    """
    terms = await accounts.lock_terms(connection, account_id, at)
    at = terms.in_period(at)
    if await audit.was_done(connection, "ChangePlan", f"accounts/{account_id}", request_id):
        raise RequestIdReused(request_id=request_id)
    moment = (_previewed_at(etag, terms, at) or at) if etag else at
    planned = await _foreseen(connection, terms, plan, moment, by_itself=by_itself)
    if etag and planned.etag != etag:
        raise EtagMismatch(given=etag, current=planned.etag)
    audit_id = await audit.record(
        connection,
        actor=actor,
        action="ChangePlan",
        target=f"accounts/{account_id}",
        reason=reason,
        request_id=request_id,
        before={"plan": terms.plan, "scheduled_plan": terms.scheduled_plan},
        after={
            "plan": plan,
            "effective_at": planned.effective_at.isoformat(),
            "granted_ms": planned.granted_ms,
            "credit_micros": planned.credit_micros,
            "charge_micros": planned.charge_micros,
            "currency": planned.currency,
        },
        at=at,
    )
    if planned.from_plan == planned.to_plan:
        await _schedule(connection, account_id, None)
    elif planned.at_once:
        await _change_now(connection, terms, planned, request_id, audit_id, at)
        await _record(connection, terms, planned, audit_id, at)
    else:
        await _schedule(connection, account_id, plan)
    return planned


async def _foreseen(
    connection: asyncpg.Connection, terms: Terms, plan: str, at: datetime, *, by_itself: bool
) -> PlanChange:
    if terms.ended_at is not None:
        raise AccountErased(account_id=terms.account_id)
    old = await plans.get(connection, terms.plan, terms.plan_version)
    new = await plans.newest(connection, plan)
    if by_itself and not new.self_service:
        raise PlanNotSelfService(plan=plan)
    change = PlanChange(
        account_id=terms.account_id,
        from_plan=terms.plan,
        to_plan=plan,
        to_version=new.version,
        effective_at=at,
        at_once=True,
        granted_ms=0,
        credit_micros=0,
        charge_micros=0,
        currency=terms.currency,
        retention_days_before=old.picture_retention_days,
        retention_days_after=new.picture_retention_days,
        etag=_etag(terms, new, at),
    )
    if plan == terms.plan:
        return replace(change, retention_days_after=old.picture_retention_days)
    if not _gives_more(new, old):
        return replace(change, effective_at=terms.renews_at, at_once=False)
    period = Period(start=terms.period_start, end=terms.renews_at)
    return replace(
        change,
        granted_ms=prorated(new.quota_ms - old.quota_ms, period, at),
        # Both rounded up, so that between plans of one price nothing is to be paid.
        credit_micros=-prorated(old.price_micros, period, at),
        charge_micros=prorated(new.price_micros, period, at),
    )


def _gives_more(new: PlanVersion, old: PlanVersion) -> bool:
    """Whether a change counts at once: more fast time, or as much for more money.

    Prices in another currency cannot be set off against each other, so such a change waits for a new period.
    """
    return new.currency == old.currency and (new.quota_ms, new.price_micros) > (
        old.quota_ms,
        old.price_micros,
    )


def _etag(terms: Terms, new: PlanVersion, at: datetime) -> str:
    state = (
        terms.account_id,
        terms.plan,
        terms.plan_version,
        terms.scheduled_plan,
        terms.period_start.isoformat(),
        new.plan,
        new.version,
    )
    return f"{(at - _EPOCH) // _US:x}-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}"


def _previewed_at(etag: str, terms: Terms, at: datetime) -> datetime | None:
    """Return the moment a preview was made for, None if that is not one whose change can be had at `at`."""
    try:
        moment = _EPOCH + int(etag.partition("-")[0], 16) * _US
    except (ValueError, OverflowError):
        return None
    return moment if max(terms.period_start, at - _PREVIEW_HOLDS) <= moment <= at else None


async def _change_now(
    connection: asyncpg.Connection,
    terms: Terms,
    change: PlanChange,
    request_id: str,
    audit_id: int,
    at: datetime,
) -> None:
    account_id = terms.account_id
    await connection.execute(
        """UPDATE billing.subscription SET plan = $2, version = $3, scheduled_plan = NULL
            WHERE account_id = $1""",
        account_id,
        change.to_plan,
        change.to_version,
    )
    if change.granted_ms:
        lot = Grant(
            account_id=account_id,
            source=Source.PRORATION,
            source_key=f"upgrade/{account_id}/{request_id}",
            code=Code.PLAN_CHANGE,
            amount_ms=change.granted_ms,
            # Not from `at`: a scheduler whose clock is behind would miss it, and nobody tells it twice.
            effective_at=terms.period_start,
            expires_at=terms.renews_at,
            at=at,
            audit_id=audit_id,
        )
        await grant(connection, [lot])
    money = Books(lots=(), metered={})
    settle_plan_change(
        money,
        account_id,
        credit_micros=change.credit_micros,
        charge_micros=change.charge_micros,
        currency=change.currency,
        code=Code.PLAN_CHANGE,
        at=at,
        audit_id=audit_id,
    )
    await money.write(connection)


async def _record(
    connection: asyncpg.Connection, terms: Terms, change: PlanChange, audit_id: int, at: datetime
) -> None:
    """Write what a change at once gave and cost, so that it can be taken back: see `plan_undo`."""
    await connection.execute(
        """INSERT INTO billing.plan_change (account_id, from_plan, from_version, to_plan, to_version,
                  period_start, granted_ms, credit_micros, charge_micros, currency, audit_id, at)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)""",
        change.account_id,
        terms.plan,
        terms.plan_version,
        change.to_plan,
        change.to_version,
        terms.period_start,
        change.granted_ms,
        change.credit_micros,
        change.charge_micros,
        change.currency,
        audit_id,
        at,
    )


async def _schedule(connection: asyncpg.Connection, account_id: str, plan: str | None) -> None:
    await connection.execute(
        "UPDATE billing.subscription SET scheduled_plan = $2 WHERE account_id = $1", account_id, plan
    )
