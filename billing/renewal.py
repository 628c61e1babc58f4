"""A new period of an account: its plan's lot, what rolls over into it, and the version of its plan.

What comes of a renewal depends on when the periods began, not on when somebody noticed. So a sweeper that is
late, or an account that nobody touched for months, changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from billing.books import Grant, grant, open_books, revoke
from billing.entries import OF_THE_PLAN, Code, Source, burn_order, taken
from billing.periods import Period, period_at

_US = timedelta(microseconds=1)


def period_grant(account_id: str, quota_ms: int, period: Period, at: datetime) -> Grant:
    """Return the plan's lot for a period."""
    return Grant(
        account_id=account_id,
        source=Source.PLAN,
        source_key=f"period/{account_id}/{period.start.isoformat()}",
        code=Code.PERIOD,
        amount_ms=quota_ms,
        effective_at=period.start,
        expires_at=period.end,
        at=at,
    )


async def renew(connection: asyncpg.Connection, stale: Sequence[asyncpg.Record], at: datetime) -> None:
    """Bring subscriptions, which the caller has locked, to the period that contains `at` and its version."""
    versions = await _versions(
        connection, {plan for row in stale for plan in (row["plan"], row["scheduled_plan"]) if plan}
    )
    ended = [row for row in stale if row["period_end"] <= at]
    carried_ms = await _carry(
        connection,
        {
            row["account_id"]: _in_force_at_end(versions[row["plan"]], row).rollover_ms
            for row in ended
            if period_at(row["anchor"], at).start == row["period_end"]
        },
        at,
    )
    grants: list[Grant] = []
    cuts: dict[str, int] = {}
    updates: list[tuple[str, str, int, datetime, datetime, str | None]] = []
    for row in stale:
        account_id, plan, scheduled = row["account_id"], row["plan"], row["scheduled_plan"]
        period = Period(start=row["period_start"], end=row["period_end"])
        # Version numbers count from 1 without gaps.
        current = versions[plan][row["version"] - 1]
        if period.end <= at:
            renewed = period_at(row["anchor"], at)
            plan, scheduled = scheduled or plan, None
            least = current.version if plan == row["plan"] else 1
            rolled_ms = carried_ms.get(account_id, 0)
            if renewed.start > period.end:
                # Of the periods between nothing was used: each left to the next what it may.
                skipped = period_at(row["anchor"], renewed.start - _US)
                last = _in_force(versions[plan], least, skipped.start)
                rolled_ms = min(last.rollover_ms, last.quota_ms)
            period, current = renewed, _in_force(versions[plan], least, renewed.start)
            grants.append(period_grant(account_id, current.quota_ms, period, at))
            if rolled_ms:
                grants.append(_rollover_grant(account_id, rolled_ms, period, at))
        at_once = next(
            (v for v in reversed(versions[plan]) if v.at_once and v.version > current.version), current
        )
        gained_ms = at_once.quota_ms - current.quota_ms
        if gained_ms > 0:
            grants.append(
                Grant(
                    account_id=account_id,
                    source=Source.PRORATION,
                    source_key=f"plan_change/{account_id}/{period.start.isoformat()}/{plan}/{at_once.version}",
                    code=Code.PLAN_CHANGE,
                    amount_ms=gained_ms,
                    effective_at=period.start,
                    expires_at=period.end,
                    at=at,
                )
            )
        elif gained_ms < 0:
            cuts[account_id] = -gained_ms
        updates.append((account_id, plan, at_once.version, period.start, period.end, scheduled))

    await grant(connection, grants)
    await _cut(connection, cuts, at)
    await connection.execute(
        """UPDATE billing.subscription AS subscription
              SET plan = renewed.plan, version = renewed.version, scheduled_plan = renewed.scheduled_plan,
                  period_start = renewed.period_start, period_end = renewed.period_end
             FROM unnest($1::text[], $2::text[], $3::integer[], $4::timestamptz[], $5::timestamptz[],
                         $6::text[])
                  AS renewed (account_id, plan, version, period_start, period_end, scheduled_plan)
            WHERE subscription.account_id = renewed.account_id""",
        *(list(column) for column in zip(*updates, strict=True)),
    )
    await close_lots(connection, [row["account_id"] for row in ended], at)


async def close_lots(connection: asyncpg.Connection, account_ids: Iterable[str], at: datetime) -> None:
    """Expire what is unused of the ended lots of these accounts, whose locks the caller holds.

    A lot is left open while the account has an attempt that was dispatched in the lot's life: should it run
    beyond its hold, the time it takes is that lot's still.
    """
    await connection.execute(
        """WITH ended AS (
               SELECT lot_id, account_id,
                      granted_ms - used_ms - held_ms - expired_ms - revoked_ms AS unused_ms
                 FROM billing.grant_lot AS lot
                WHERE account_id = ANY($1) AND expires_at <= $2 AND NOT closed
                  AND NOT EXISTS (
                      SELECT FROM billing.hold
                       WHERE state = 'open' AND hold.account_id = lot.account_id
                         AND placed_at < lot.expires_at)),
           closed AS (
               UPDATE billing.grant_lot AS lot SET expired_ms = expired_ms + unused_ms, closed = true
                 FROM ended WHERE lot.lot_id = ended.lot_id)
           INSERT INTO billing.transfer (
                  kind, code, account_id, debit_account, credit_account, unit, amount, lot_id, at)
           SELECT 'post', 'expiry', account_id, 'lot/' || lot_id, 'expired', 'gpu_ms', unused_ms, lot_id, $2
             FROM ended WHERE unused_ms > 0 ORDER BY lot_id""",
        list(account_ids),
        at,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Version:
    """What of a plan's version a renewal goes by."""

    version: int
    quota_ms: int
    rollover_ms: int
    at_once: bool
    created_at: datetime


async def _versions(connection: asyncpg.Connection, names: Iterable[str]) -> dict[str, list[_Version]]:
    versions: dict[str, list[_Version]] = {plan: [] for plan in names}
    for row in await connection.fetch(
        """SELECT plan, version, quota_ms, rollover_ms, at_once, created_at FROM billing.plan_version
            WHERE plan = ANY($1) ORDER BY version""",
        list(versions),
    ):
        versions[row["plan"]].append(
            _Version(
                version=row["version"],
                quota_ms=row["quota_ms"],
                rollover_ms=row["rollover_ms"],
                at_once=row["at_once"],
                created_at=row["created_at"],
            )
        )
    return versions


def _in_force(versions: Sequence[_Version], least: int, start: datetime) -> _Version:
    """Return the version that a period beginning at `start` has: the newest of then, from `least` on."""
    newest = next((version for version in reversed(versions) if version.created_at <= start), versions[0])
    return versions[max(newest.version, least) - 1]


def _in_force_at_end(versions: Sequence[_Version], row: asyncpg.Record) -> _Version:
    """Return the version that held when the period of a subscription ended."""
    return next(
        (
            version
            for version in reversed(versions)
            if version.at_once and version.version > row["version"] and version.created_at < row["period_end"]
        ),
        versions[row["version"] - 1],
    )


def _rollover_grant(account_id: str, rolled_ms: int, period: Period, at: datetime) -> Grant:
    return Grant(
        account_id=account_id,
        source=Source.ROLLOVER,
        source_key=f"rollover/{account_id}/{period.start.isoformat()}",
        code=Code.ROLLOVER,
        amount_ms=rolled_ms,
        effective_at=period.start,
        expires_at=period.end,
        at=at,
    )


async def _carry(connection: asyncpg.Connection, most_ms: Mapping[str, int], at: datetime) -> dict[str, int]:
    """Take what rolls over out of the lots of the plan whose period ended; return how much, by account.

    What a job still holds does not roll over: it is not known yet whether it is used.
    """
    rows = await connection.fetch(
        """WITH most AS (
               SELECT * FROM unnest($1::text[], $2::bigint[]) AS most (account_id, ms) WHERE ms > 0),
           lot AS (
               SELECT lot_id, account_id,
                      granted_ms - used_ms - held_ms - expired_ms - revoked_ms AS unused_ms
                 FROM billing.grant_lot JOIN most USING (account_id)
                      JOIN billing.subscription USING (account_id)
                WHERE source = ANY($3) AND effective_at = period_start AND expires_at = period_end),
           reached AS (
               SELECT *,
                      sum(unused_ms) OVER (PARTITION BY account_id ORDER BY lot_id) - unused_ms AS before_ms
                 FROM lot),
           part AS (
               SELECT lot_id, account_id, LEAST(unused_ms, most.ms - before_ms)::bigint AS ms
                 FROM reached JOIN most USING (account_id)
                WHERE unused_ms > 0 AND before_ms < most.ms),
           moved AS (
               UPDATE billing.grant_lot AS lot SET expired_ms = expired_ms + part.ms
                 FROM part WHERE lot.lot_id = part.lot_id),
           entry AS (
               INSERT INTO billing.transfer (
                      kind, code, account_id, debit_account, credit_account, unit, amount, lot_id, at)
               SELECT 'post', 'rollover', account_id, 'lot/' || lot_id, 'expired', 'gpu_ms', ms, lot_id, $4
                 FROM part ORDER BY lot_id)
           SELECT account_id, sum(ms)::bigint AS ms FROM part GROUP BY account_id""",
        list(most_ms),
        list(most_ms.values()),
        list(OF_THE_PLAN),
        at,
    )
    return {row["account_id"]: row["ms"] for row in rows}


async def _cut(connection: asyncpg.Connection, cuts: dict[str, int], at: datetime) -> None:
    """Take time of the present period's plan back, as far as it is neither used nor held."""
    books = await open_books(connection, cuts, since=at, until=at)
    for account_id, cut_ms in cuts.items():
        lots = [lot for lot in books.lots(account_id) if lot.source in OF_THE_PLAN]
        revoke(books, account_id, taken(burn_order(lots, at)[::-1], cut_ms), Code.PLAN_CHANGE, at)
    await books.write(connection)
