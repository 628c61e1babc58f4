"""Accounts and what each is entitled to: its plan's terms, and a lot of fast time for each period.

No job runs at midnight. Whoever first touches an account in a new period grants that period's lot, and takes
up the version of its plan; which version a period has depends on when the period began, not on that moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from billing import plans
from billing.books import Grant, grant, open_books, revoke
from billing.entries import Code, Source, burn_order, taken
from billing.periods import period_at
from billing.plans import PlanLimits
from billing.refusals import AccountExists, UnknownAccount


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
    period_start: datetime
    renews_at: datetime

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
    await grant(connection, [_period_grant(account_id, version.quota_ms, period.start, period.end, at)])


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
    locked = await connection.fetch(
        """SELECT account_id FROM billing.subscription
            WHERE account_id = ANY($1) ORDER BY account_id FOR UPDATE""",
        list(ids),
    )
    for missing in sorted(ids - {row["account_id"] for row in locked}):
        raise UnknownAccount(account_id=missing)
    # Not joined to the statement above: what it waited for may have changed the version it would join.
    rows = await _subscriptions(connection, ids, at)
    stale = [row for row in rows if row["stale"]]
    if stale:
        await _renew(connection, stale, at)
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

    Accepted jobs keep the consent in their snapshot; the cap counts at each dispatch. Locks the account.
    Raises UnknownAccount.
    """
    await lock(connection, [account_id], at)
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


async def _subscriptions(
    connection: asyncpg.Connection, account_ids: Iterable[str], at: datetime
) -> list[asyncpg.Record]:
    return await connection.fetch(
        """SELECT *,
                  period_end <= $2 OR EXISTS (
                      SELECT FROM billing.plan_version AS newer
                       WHERE newer.plan = subscription.plan AND newer.version > subscription.version
                         AND newer.at_once) AS stale
             FROM billing.subscription JOIN billing.plan_version USING (plan, version)
            WHERE account_id = ANY($1)""",
        list(account_ids),
        at,
    )


async def _renew(connection: asyncpg.Connection, stale: Sequence[asyncpg.Record], at: datetime) -> None:
    """Bring locked subscriptions to the period that contains `at` and to the version that holds in it."""
    versions: dict[str, list[asyncpg.Record]] = {row["plan"]: [] for row in stale}
    for version in await connection.fetch(
        """SELECT plan, version, quota_ms, at_once, created_at FROM billing.plan_version
            WHERE plan = ANY($1) ORDER BY version""",
        list(versions),
    ):
        versions[version["plan"]].append(version)

    grants: list[Grant] = []
    cuts: dict[str, int] = {}
    updates: list[tuple[str, int, datetime, datetime]] = []
    for row in stale:
        account_id, start, end = row["account_id"], row["period_start"], row["period_end"]
        # Version numbers count from 1 without gaps.
        current = versions[row["plan"]][row["version"] - 1]
        later = versions[row["plan"]][row["version"] :]
        if end <= at:
            period = period_at(row["anchor"], at)
            start, end = period.start, period.end
            current = next((v for v in reversed(later) if v["created_at"] <= start), current)
            grants.append(_period_grant(account_id, current["quota_ms"], start, end, at))
        at_once = next((v for v in reversed(later) if v["at_once"]), current)
        if at_once["version"] > current["version"]:
            gained_ms = at_once["quota_ms"] - current["quota_ms"]
            current = at_once
            if gained_ms > 0:
                grants.append(
                    Grant(
                        account_id=account_id,
                        source=Source.PRORATION,
                        source_key=f"plan_change/{account_id}/{start.isoformat()}/{at_once['version']}",
                        code=Code.PLAN_CHANGE,
                        amount_ms=gained_ms,
                        effective_at=start,
                        expires_at=end,
                        at=at,
                    )
                )
            elif gained_ms < 0:
                cuts[account_id] = -gained_ms
        updates.append((account_id, current["version"], start, end))

    await grant(connection, grants)
    await _cut(connection, cuts, at)
    await connection.execute(
        """UPDATE billing.subscription AS subscription
              SET version = renewed.version,
                  period_start = renewed.period_start, period_end = renewed.period_end
             FROM unnest($1::text[], $2::integer[], $3::timestamptz[], $4::timestamptz[])
                  AS renewed (account_id, version, period_start, period_end)
            WHERE subscription.account_id = renewed.account_id""",
        *(list(column) for column in zip(*updates, strict=True)),
    )


async def _cut(connection: asyncpg.Connection, cuts: dict[str, int], at: datetime) -> None:
    """Take time of the present period's plan back, as far as it is neither used nor held."""
    books = await open_books(connection, cuts, since=at, until=at)
    for account_id, cut_ms in cuts.items():
        lots = [lot for lot in books.lots(account_id) if lot.source in (Source.PLAN, Source.PRORATION)]
        revoke(books, account_id, taken(burn_order(lots, at)[::-1], cut_ms), Code.PLAN_CHANGE, at)
    await books.write(connection)


def _period_grant(account_id: str, quota_ms: int, start: datetime, end: datetime, at: datetime) -> Grant:
    return Grant(
        account_id=account_id,
        source=Source.PLAN,
        source_key=f"period/{account_id}/{start.isoformat()}",
        code=Code.PERIOD,
        amount_ms=quota_ms,
        effective_at=start,
        expires_at=end,
        at=at,
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
        period_start=row["period_start"],
        renews_at=row["period_end"],
    )
