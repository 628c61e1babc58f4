"""Accounts and what each is entitled to: its plan's terms, and a lot of fast time for each period.

No job has to run at midnight. Whoever first touches an account in a new period, or a sweeper (`expiry`),
grants that period's lot and takes up the version of its plan; what comes of it does not depend on who it was,
or when.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from billing import plans
from billing.books import grant
from billing.periods import period_at
from billing.plans import PlanLimits
from billing.refusals import AccountExists, PlanLacksOverage, UnknownAccount
from billing.renewal import period_grant, renew

ERASED = "erased-"
"""What the ids of erased accounts begin with; the schema knows it too."""

_ERASURE_S = 1_800.0


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What an account may do in the present period, and at what price."""

    account_id: str
    plan: str
    plan_version: int
    limits: PlanLimits
    relax_weight_milli: int
    private_allowed: bool
    private_multiplier_bp: int
    overage_allowed: bool
    """The account consents and its plan has a price for it."""
    overage_micros_per_minute: int
    spend_cap_micros: int
    """Most that may be charged for overage in a period; 0: no cap."""
    currency: str
    gpu_class_bp: Mapping[str, int]
    """Multipliers by device type, in basis points; a type that is not named counts 10,000."""
    picture_retention_days: int
    """How long its pictures are kept after the end of their jobs; 0: for ever."""
    scheduled_plan: str | None
    """What the plan changes to at `renews_at`; None: nothing."""
    period_start: datetime
    renews_at: datetime
    ended_at: datetime | None
    """When the account was erased: it is renewed no more."""

    def in_period(self, at: datetime) -> datetime:
        """Return `at`, but not before the period the account is in.

        Callers' clocks differ by a little. Without this, one that is behind would find no lot to take from
        just after an account was opened or renewed by one that is ahead.
        """
        return max(at, self.period_start)


async def create(connection: asyncpg.Connection, account_id: str, plan: str, at: datetime) -> None:
    """Open an account on the newest version of a plan; its periods count from `at`.

    Locks nothing that others wait for. Raises UnknownPlan or AccountExists.
    """
    version = await plans.newest(connection, plan)
    created = await connection.fetchval(
        "INSERT INTO billing.account VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING true", account_id, at
    )
    if not created:
        raise AccountExists(account_id=account_id)
    period = period_at(at, at)
    await connection.execute(
        """INSERT INTO billing.subscription (account_id, plan, version, anchor, period_start, period_end)
           VALUES ($1, $2, $3, $4, $4, $5)""",
        account_id,
        plan,
        version.version,
        period.start,
        period.end,
    )
    await grant(connection, [period_grant(account_id, version.quota_ms, period, at)])


async def lock_terms(connection: asyncpg.Connection, account_id: str, at: datetime) -> Terms:
    """Lock an account until the transaction ends and return its terms. Raises UnknownAccount."""
    return (await lock(connection, [account_id], at))[account_id]


async def lock(connection: asyncpg.Connection, account_ids: Iterable[str], at: datetime) -> dict[str, Terms]:
    """Lock accounts until the transaction ends, in the order of their ids, and return their terms.

    The lock is the subscription's row. It serialises everything that moves the account's time or money, and
    acceptance of its jobs; lots and metered money need no lock beside it. A transaction that locks more than
    once must keep the order. Grants the period's lot at the first touch. Raises UnknownAccount.
    """
    assert connection.is_in_transaction(), "outside a transaction the lock would end with its statement"
    ids = set(account_ids)
    rows = await _subscriptions(connection, ids, at, lock=True)
    if len(rows) < len(ids):
        # One that was changed to another version by whom it waited for is not joined to that, and left out,
        # though it is locked: what the statement joins was there when it began.
        rows = await _subscriptions(connection, ids, at)
        for missing in sorted(ids - {row["account_id"] for row in rows}):
            raise UnknownAccount(account_id=missing)
    stale = [row["account_id"] for row in rows if row["stale"]]
    if stale:
        await renew(connection, stale, at)
        rows = await _subscriptions(connection, ids, at)
    return {row["account_id"]: _terms(row) for row in rows}


async def terms(connection: asyncpg.Connection, account_ids: Iterable[str], at: datetime) -> dict[str, Terms]:
    """Return the terms of accounts. Locks only those whose period or version has to be brought up to date.

    Raises UnknownAccount.
    """
    ids = set(account_ids)
    rows = await _subscriptions(connection, ids, at)
    for missing in sorted(ids - {row["account_id"] for row in rows}):
        raise UnknownAccount(account_id=missing)
    current = {row["account_id"]: _terms(row) for row in rows}
    stale = [row["account_id"] for row in rows if row["stale"]]
    return current | await lock(connection, stale, at) if stale else current


async def set_overage(
    connection: asyncpg.Connection,
    account_id: str,
    allowed: bool | None,
    spend_cap_micros: int | None,
    at: datetime,
) -> Terms:
    """Set consent to overage, the spend cap, or both; None leaves one as it is, a cap of 0 removes it.

    Accepted jobs keep the consent in their snapshot. The cap counts at each dispatch, and what is dispatched
    keeps the one it found: lowered while a job runs, it does not stop what that takes beyond its hold. Locks
    the account. Raises UnknownAccount, or PlanLacksOverage for a consent that would be to any price.
    """
    terms = await lock_terms(connection, account_id, at)
    if allowed and not terms.overage_micros_per_minute:
        raise PlanLacksOverage(plan=terms.plan)
    await connection.execute(
        """UPDATE billing.subscription
              SET overage_allowed = COALESCE($2, overage_allowed),
                  spend_cap_micros = COALESCE($3, spend_cap_micros)
            WHERE account_id = $1""",
        account_id,
        allowed,
        spend_cap_micros,
    )
    return await lock_terms(connection, account_id, at)


async def erase(connection: asyncpg.Connection, account_id: str, at: datetime) -> str:
    """Give an account another id, which says nothing, wherever the database names it; return that id.

    Its entries stay, under that id; its subscription is renewed no more, and what it had been answered is
    forgotten. Reasons that people wrote are kept as they wrote them. The caller has seen to it that none of
    its jobs is left that could be started or settled under the old id. Locks the account. Raises
    UnknownAccount, also for one that was erased before.
    """
    await lock(connection, [account_id], at)
    # Not derived from the old id: who can guess that could then prove it.
    pseudonym = f"{ERASED}{secrets.token_hex(8)}"
    erased = await connection.fetchval(
        """UPDATE billing.account SET account_id = $2, erased_at = $3
            WHERE account_id = $1 AND erased_at IS NULL RETURNING true""",
        account_id,
        pseudonym,
        at,
        # Every row that names it follows: of an account with 100,000 fast jobs, 400,000 in 20 s.
        timeout=_ERASURE_S,
    )
    if not erased:
        raise UnknownAccount(account_id=account_id)
    await connection.execute(
        "UPDATE billing.subscription SET ended_at = $2, scheduled_plan = NULL WHERE account_id = $1",
        pseudonym,
        at,
    )
    await connection.execute(
        """UPDATE billing.grant_lot SET source_key = replace(source_key, '/' || $2 || '/', '/' || $1 || '/')
            WHERE account_id = $1""",
        pseudonym,
        account_id,
    )
    await connection.execute("DELETE FROM billing.idempotency WHERE account_id = $1", account_id)
    # What admins were answered about it, found by what they did: all answers there are would be too many to
    # look through. A new version of a plan names some who were on it.
    await connection.execute(
        """UPDATE billing.idempotency
              SET outcome = regexp_replace(outcome::text, $3, '"accounts/' || $4 || '\\1', 'g')::jsonb
             FROM (SELECT DISTINCT split_part(actor, '/', 2) AS account_id, action, request_id
                     FROM billing.audit_event
                    WHERE target = $1 OR target ^@ $2 OR target ^@ 'plans/' AND action = 'UpdatePlan') AS deed
            WHERE idempotency.account_id = deed.account_id AND method = action
              AND idempotency.request_id = deed.request_id AND outcome::text ~ $3""",
        f"accounts/{account_id}",
        f"accounts/{account_id}/",
        f'"accounts/{account_id}(["/])',
        pseudonym,
    )
    await connection.execute(
        """UPDATE billing.audit_event
              SET actor = regexp_replace(actor, $3, 'accounts/' || $4 || '\\1'),
                  target = regexp_replace(target, $3, 'accounts/' || $4 || '\\1')
            WHERE actor = $1 OR actor ^@ $2 OR target = $1 OR target ^@ $2""",
        f"accounts/{account_id}",
        f"accounts/{account_id}/",
        f"^accounts/{account_id}(/|$)",
        pseudonym,
    )
    return pseudonym


async def _subscriptions(
    connection: asyncpg.Connection, account_ids: Iterable[str], at: datetime, *, lock: bool = False
) -> list[asyncpg.Record]:
    return await connection.fetch(
        f"""SELECT *, gpu_class_bp::text AS gpu_classes,
                  ended_at IS NULL AND (period_end <= $2 OR EXISTS (
                      SELECT FROM billing.plan_version AS newer
                       WHERE newer.plan = subscription.plan AND newer.version > subscription.version
                         AND newer.at_once)) AS stale
             FROM billing.subscription JOIN billing.plan_version USING (plan, version)
            WHERE account_id = ANY($1)
            {"ORDER BY account_id FOR UPDATE OF subscription" if lock else ""}""",  # noqa: S608 - constants
        list(account_ids),
        at,
    )


def _terms(row: asyncpg.Record) -> Terms:
    return Terms(
        account_id=row["account_id"],
        plan=row["plan"],
        plan_version=row["version"],
        limits=plans.limits_of(row),
        relax_weight_milli=row["relax_weight_milli"],
        private_allowed=row["private_allowed"],
        private_multiplier_bp=row["private_multiplier_bp"],
        overage_allowed=row["overage_allowed"] and row["overage_micros_per_minute"] > 0,
        overage_micros_per_minute=row["overage_micros_per_minute"],
        spend_cap_micros=row["spend_cap_micros"],
        currency=row["currency"],
        gpu_class_bp=plans.classes_of(row["gpu_classes"]),
        picture_retention_days=row["picture_retention_days"],
        scheduled_plan=row["scheduled_plan"],
        period_start=row["period_start"],
        renews_at=row["period_end"],
        ended_at=row["ended_at"],
    )
