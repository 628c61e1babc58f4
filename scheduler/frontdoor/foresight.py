"""What if: a job on other terms, priced by the ledger and placed in time by the scheduler. Changes nothing.

Each of its options is one that could be asked for: as relax and as fast, and the same two with another plan.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime

from billing import accounts as ledger_accounts
from billing import ledger, plans, prices
from billing.accounts import Terms
from billing.plans import PlanVersion
from billing.prices import PricingSnapshot
from billing.refusals import FastTimeExhausted, PlanLacksPrivate, Refusal, SpendCapReached
from gpu_worker.contract import RenderSpec
from scheduler.answers import Outlook, PlanTerms, WhatIf
from scheduler.estimator import shape_of
from scheduler.intake import Submission, devices_of, refuse_relax_max_upscale
from scheduler.link import SchedulerLink
from scheduler.policy.ids import Tier
from scheduler.policy.limits import Limits
from scheduler.refusals import FastOnly, QueueFull
from scheduler.store import jobs
from scheduler.store.accounts import Visibility
from scheduler.store.jobs import LiveJobs, StoredJob
from scheduler.store.pool import Connection, Pool


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """The job that is asked about."""

    account_id: str
    job_id: str | None
    """None: it is only thought of."""
    spec: RenderSpec
    predicted_ms: int
    private: bool
    tier: Tier
    """Where it is, or would be as it was asked for."""
    counted_ms: int
    """What of the account's waiting fast time is its own."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """The job on certain terms."""

    tier: Tier
    plan: str
    present: bool
    """These are the terms it has."""
    predicted_ms: int
    pricing: PricingSnapshot | Refusal
    outlook: Outlook | None
    """None: it would be refused, or the scheduler cannot tell."""


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """An option as far as the ledger knows it."""

    tier: Tier
    plan: PlanTerms | None
    """None: the account's own."""
    plan_name: str
    pricing: PricingSnapshot | Refusal


def of_waiting(job: StoredJob) -> Prospect:
    """Return a waiting job as one to ask about."""
    counted_ms = 0
    if job.tier is Tier.FAST:
        _, dearest_bp = prices.foreseen_bp(job.pricing)
        counted_ms = prices.billed_ms(job.predicted_ms, dearest_bp)
    return Prospect(
        account_id=job.account_id,
        job_id=job.job_id,
        spec=job.spec,
        predicted_ms=job.predicted_ms,
        private=job.visibility is Visibility.PRIVATE,
        tier=job.tier,
        counted_ms=counted_ms,
    )


async def of_submission(pool: Pool, account_id: str, submission: Submission) -> Prospect:
    """Return a job that could be submitted as one to ask about. Raises Overloaded."""
    async with pool.reading() as connection:
        found = await jobs.settings_and_live_jobs(connection, account_id)
    assert found is not None, "a key's account has its settings"
    settings, _ = found
    return Prospect(
        account_id=account_id,
        job_id=None,
        spec=submission.spec,
        predicted_ms=submission.predicted_ms,
        private=(submission.visibility or settings.visibility) is Visibility.PRIVATE,
        tier=submission.tier or settings.mode,
        counted_ms=0,
    )


async def options(
    pool: Pool, link: SchedulerLink, prospect: Prospect, *, plan: str | None, at: datetime
) -> list[Option]:
    """Return the job as relax and as fast, and, if `plan` names one, the same with that plan.

    Raises UnknownPlan or Overloaded.
    """
    # Rolled back: looking at an account may open its new period, which is not for a question to do.
    async with pool.rehearsal() as connection:
        priced = await _priced(connection, link, prospect, plan, at)
    able = [each for each in priced if not isinstance(each.pricing, Refusal)]
    answers = await link.estimate([_what_if(prospect, each) for each in able])
    outlooks = {(each.tier, each.plan): answer for each, answer in zip(able, answers, strict=True)}
    return [
        Option(
            tier=each.tier,
            plan=each.plan_name,
            present=each.tier is prospect.tier and each.plan is None,
            predicted_ms=prospect.predicted_ms,
            pricing=each.pricing,
            outlook=outlooks.get((each.tier, each.plan)),
        )
        for each in priced
    ]


async def _priced(
    connection: Connection, link: SchedulerLink, prospect: Prospect, plan: str | None, at: datetime
) -> list[_Terms]:
    own = (await ledger_accounts.terms(connection, [prospect.account_id], at))[prospect.account_id]
    found = await jobs.settings_and_live_jobs(connection, prospect.account_id)
    assert found is not None, "a key's account has its settings"
    _, live = found
    asked: list[tuple[Terms, PlanTerms | None]] = [(own, None)]
    if plan is not None:
        other = _with_plan(own, await plans.newest(connection, plan))
        asked.append((other, _plan_terms(other)))
    return [
        _Terms(
            tier=tier,
            plan=plan_terms,
            plan_name=terms.plan,
            pricing=await _price(connection, prospect, terms, tier, live, devices_of(link), at),
        )
        for terms, plan_terms in asked
        for tier in (Tier.RELAX, Tier.FAST)
    ]


async def _price(
    connection: Connection,
    prospect: Prospect,
    terms: Terms,
    tier: Tier,
    live: LiveJobs,
    devices: Collection[str],
    at: datetime,
) -> PricingSnapshot | Refusal:
    """Return the terms on which the job would be accepted, or the refusal it would meet."""
    if prospect.job_id is None and live.accepted >= terms.limits.accepted:
        return QueueFull(account_id=terms.account_id, depth=live.accepted, limit=terms.limits.accepted)
    try:
        refuse_relax_max_upscale(prospect.spec, tier)
        return await ledger.price(
            connection,
            terms,
            tier.value,
            prospect.private,
            prospect.predicted_ms,
            live.waiting_fast_ms - prospect.counted_ms,
            at,
            devices,
        )
    except (FastOnly, FastTimeExhausted, SpendCapReached, PlanLacksPrivate) as refusal:
        return refusal


def _with_plan(own: Terms, version: PlanVersion) -> Terms:
    """Return the account's terms as they would be with another plan, and the fast time it has now."""
    return replace(
        own,
        plan=version.plan,
        plan_version=version.version,
        limits=version.limits,
        relax_weight_milli=version.relax_weight_milli,
        private_allowed=version.private_allowed,
        private_multiplier_bp=version.private_multiplier_bp,
        overage_allowed=own.overage_allowed and version.overage_micros_per_minute > 0,
        overage_micros_per_minute=version.overage_micros_per_minute,
        currency=version.currency,
        gpu_class_bp=version.gpu_class_bp,
    )


def _plan_terms(terms: Terms) -> PlanTerms:
    return PlanTerms(
        limits=Limits(
            running=terms.limits.running,
            relax_running=terms.limits.relax_running,
            accepted=terms.limits.accepted,
        ),
        weight_milli=terms.relax_weight_milli,
    )


def _what_if(prospect: Prospect, terms: _Terms) -> WhatIf:
    return WhatIf(
        account_id=prospect.account_id,
        tier=terms.tier,
        job_id=prospect.job_id,
        kind=prospect.spec.kind,
        model=prospect.spec.model,
        width=prospect.spec.width,
        height=prospect.spec.height,
        steps=shape_of(prospect.spec).steps,
        predicted_ms=prospect.predicted_ms,
        plan=terms.plan,
    )
