"""What an account has, and on what terms a job of it is accepted. Nothing is held or charged here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

import asyncpg

from billing import accounts
from billing.accounts import Terms
from billing.books import MeteredKey, open_books
from billing.entries import available_ms
from billing.prices import (
    ONE_BP,
    ChargeMode,
    PricingSnapshot,
    billed_ms,
    foreseen_bp,
    price_micros,
    priced_for,
)
from billing.refusals import FastTimeExhausted, PlanLacksPrivate, SpendCapReached

Tier = Literal["fast", "relax"]


@dataclass(frozen=True, kw_only=True)
class Balance:
    """An account's fast time in the present period, in GPU milliseconds, and its overage, in money.

    It closes: granted = used + held + available. Used is without what was given back. Of a lot that outlives
    a period, what was used before the period is not shown.
    """

    account_id: str
    plan: str
    granted_ms: int
    used_ms: int
    held_ms: int
    available_ms: int
    period_start: datetime
    renews_at: datetime
    overage_allowed: bool
    overage_posted_micros: int
    overage_held_micros: int
    spend_cap_micros: int
    """0: no cap."""
    currency: str
    relax_used_ms: int


async def balance(connection: asyncpg.Connection, account_id: str, at: datetime) -> Balance:
    """Return an account's balance. Locks the account only to open a new period. Raises UnknownAccount."""
    terms = (await accounts.terms(connection, [account_id], at))[account_id]
    at = terms.in_period(at)
    row = await connection.fetchrow(
        """WITH live AS (
               SELECT * FROM billing.grant_lot
                WHERE account_id = $1 AND effective_at <= $2 AND (expires_at IS NULL OR expires_at > $2)),
           totals AS (
               SELECT COALESCE(sum(held_ms), 0)::bigint AS held_ms,
                      COALESCE(sum(granted_ms - used_ms - held_ms - expired_ms - revoked_ms), 0)::bigint
                          AS available_ms
                 FROM live)
           SELECT totals.*,
                  (SELECT COALESCE(sum(CASE credit_account WHEN 'consumed' THEN amount ELSE -amount END), 0)
                     FROM billing.transfer JOIN live USING (lot_id)
                    WHERE transfer.account_id = $1 AND at >= $3 AND kind IN ('post', 'post_pending')
                      AND (credit_account = 'consumed' AND code <> 'refund_undo'
                           -- Of an earlier period's use, which is not shown, nor is what is given back,
                           -- and what of that is taken again.
                           OR code IN ('refund', 'refund_undo') AND EXISTS (
                               SELECT FROM billing.settlement
                                WHERE settlement.attempt_id = transfer.attempt_id AND settlement.at >= $3))
                  )::bigint AS used_ms,
                  (SELECT COALESCE(sum(amount), 0) FROM billing.transfer
                    WHERE account_id = $1 AND at >= $3 AND code = 'relax')::bigint AS relax_used_ms,
                  COALESCE(metered.posted_micros, 0) AS posted_micros,
                  COALESCE(metered.held_micros, 0) AS held_micros
             FROM totals LEFT JOIN billing.metered_account AS metered
                  ON metered.account_id = $1 AND metered.period_start = $3 AND metered.currency = $4""",
        account_id,
        at,
        terms.period_start,
        terms.currency,
    )
    assert row is not None
    return Balance(
        account_id=account_id,
        plan=terms.plan,
        granted_ms=row["used_ms"] + row["held_ms"] + row["available_ms"],
        used_ms=row["used_ms"],
        held_ms=row["held_ms"],
        available_ms=row["available_ms"],
        period_start=terms.period_start,
        renews_at=terms.renews_at,
        overage_allowed=terms.overage_allowed,
        overage_posted_micros=row["posted_micros"],
        overage_held_micros=row["held_micros"],
        spend_cap_micros=terms.spend_cap_micros,
        currency=terms.currency,
        relax_used_ms=row["relax_used_ms"],
    )


async def price(
    connection: asyncpg.Connection,
    terms: Terms,
    tier: Tier,
    private: bool,
    predicted_ms: int,
    waiting_ms: int,
    at: datetime,
    devices: Collection[str] = (),
) -> PricingSnapshot:
    """Return the terms on which a job is accepted: the soft check, before anything is held.

    `predicted_ms` is GPU time before the multiplier; `waiting_ms` is what the account's waiting fast jobs are
    expected to cost, after theirs. `devices` are the types of GPU there are; empty: not known, so any. What
    can still be taken, less what already waits, must cover the job on the dearest of them, or the account
    have agreed to overage within its cap: what is accepted can then start on any. Locks nothing; with the
    account locked (`accounts.lock_terms`) two acceptances at once cannot both count on the same time.

    Raises PlanLacksPrivate, FastTimeExhausted or SpendCapReached.
    """
    if private and not terms.private_allowed:
        raise PlanLacksPrivate(plan=terms.plan)
    of_relax = PricingSnapshot(
        plan=terms.plan,
        plan_version=terms.plan_version,
        charge_mode=ChargeMode.RELAX,
        multiplier_bp=terms.private_multiplier_bp if private else ONE_BP,
        overage_allowed=terms.overage_allowed,
        overage_micros_per_minute=terms.overage_micros_per_minute,
        currency=terms.currency,
        gpu_class_bp=terms.gpu_class_bp,
    )
    if tier == "relax":
        return of_relax
    pricing = priced_for(of_relax, devices)
    _, dearest_bp = foreseen_bp(pricing)
    cost_ms = waiting_ms + billed_ms(predicted_ms, dearest_bp)
    charge_mode = await _fast_mode(connection, terms, cost_ms, waiting_ms, terms.in_period(at))
    return replace(pricing, charge_mode=charge_mode)


async def _fast_mode(
    connection: asyncpg.Connection, terms: Terms, cost_ms: int, waiting_ms: int, at: datetime
) -> ChargeMode:
    """Return who would pay for `cost_ms`, of which `waiting_ms` is that of jobs accepted before."""
    books = await open_books(
        connection, [terms.account_id], since=at, until=at, period_starts=[terms.period_start]
    )
    left_ms = available_ms(books.lots(terms.account_id), at)
    missing_ms = cost_ms - left_ms
    if missing_ms <= 0:
        return ChargeMode.FAST
    remaining_ms = max(left_ms - waiting_ms, 0)
    if not terms.overage_allowed:
        raise FastTimeExhausted(remaining_ms=remaining_ms, renews_at=terms.renews_at)
    metered = books.metered(
        MeteredKey(account_id=terms.account_id, period_start=terms.period_start, currency=terms.currency)
    )
    wanted_micros = price_micros(missing_ms, terms.overage_micros_per_minute)
    if 0 < terms.spend_cap_micros < metered.committed_micros + wanted_micros:
        raise SpendCapReached(
            remaining_ms=remaining_ms,
            renews_at=terms.renews_at,
            spend_cap_micros=terms.spend_cap_micros,
            committed_micros=metered.committed_micros,
            currency=terms.currency,
        )
    return ChargeMode.METERED_FAST
