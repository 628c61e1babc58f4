"""A new period of an account: its plan's lot, what rolls over into it, and the version of its plan.

What comes of a renewal depends on when the periods began and the versions were made, not on when somebody
noticed. So a sweeper that is late, or an account that nobody touched for months, changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta

import asyncpg

from billing.books import Grant, grant, open_books, revoke
from billing.entitlement import PlanTime, Renewed, Standing, Version, renewed
from billing.entries import OF_THE_PLAN, Code, Source, burn_order, taken
from billing.periods import Period

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


async def renew(connection: asyncpg.Connection, account_ids: Iterable[str], at: datetime) -> None:
    """Bring accounts, which the caller has locked, to the period that contains `at` and its version."""
    before = await standings(connection, account_ids, at)
    versions = await versions_of(connection, before)
    steps = [(standing, renewed(standing, versions, at)) for standing in before]
    opened = [(standing, step) for standing, step in steps if step.period != standing.period]

    await _move(connection, steps, at)
    if opened:
        await _open(connection, opened, at)
    await connection.execute(
        """UPDATE billing.subscription AS subscription
              SET plan = renewed.plan, version = renewed.version, scheduled_plan = renewed.scheduled_plan,
                  period_start = renewed.period_start, period_end = renewed.period_end
             FROM unnest($1::text[], $2::text[], $3::integer[], $4::text[], $5::timestamptz[],
                         $6::timestamptz[])
                  AS renewed (account_id, plan, version, scheduled_plan, period_start, period_end)
            WHERE subscription.account_id = renewed.account_id""",
        [standing.account_id for standing in before],
        [step.plan for _, step in steps],
        [step.version.version for _, step in steps],
        [step.scheduled_plan for _, step in steps],
        [step.period.start for _, step in steps],
        [step.period.end for _, step in steps],
    )


async def standings(
    connection: asyncpg.Connection, account_ids: Iterable[str], at: datetime
) -> list[Standing]:
    """Return how accounts were left, and what of their lots lives at `at`. Locks nothing."""
    rows = await connection.fetch(
        """SELECT subscription.*, of_plan.*, living.*, missed.*
             FROM billing.subscription
                  CROSS JOIN LATERAL (
                      SELECT COALESCE(sum(granted_ms) FILTER (WHERE source = 'plan'), 0)::bigint
                                 + COALESCE(sum(later.ms), 0)::bigint AS given_ms,
                             COALESCE(sum(granted_ms - used_ms - held_ms - expired_ms - revoked_ms),
                                      0)::bigint AS unused_ms
                        FROM billing.grant_lot AS lot
                             CROSS JOIN LATERAL (
                                 SELECT sum(CASE credit_account WHEN 'revoked' THEN -amount ELSE amount END)
                                            AS ms
                                   FROM billing.transfer
                                  WHERE transfer.lot_id = lot.lot_id
                                    AND code IN ('plan_change', 'plan_undo')
                                    -- Most came with their period and were never cut: no need to look.
                                    AND (lot.source <> 'plan' OR lot.revoked_ms > 0)) AS later
                       WHERE lot.account_id = subscription.account_id AND source = ANY($3)
                         AND effective_at = period_start AND expires_at = period_end) AS of_plan
                  CROSS JOIN LATERAL (
                      SELECT COALESCE(sum(granted_ms - used_ms - held_ms - expired_ms - revoked_ms),
                                      0)::bigint AS living_ms
                        FROM billing.grant_lot AS lot
                       WHERE lot.account_id = subscription.account_id
                         AND effective_at <= $2 AND (expires_at IS NULL OR expires_at > $2)) AS living
                  CROSS JOIN LATERAL (
                      SELECT COALESCE(sum(new.quota_ms - old.quota_ms - granted_ms), 0)::bigint AS missed_ms
                        FROM billing.plan_change AS change
                             JOIN billing.plan_version AS old
                                  ON (old.plan, old.version) = (change.from_plan, change.from_version)
                             JOIN billing.plan_version AS new
                                  ON (new.plan, new.version) = (change.to_plan, change.to_version)
                       WHERE change.account_id = subscription.account_id
                         AND change.period_start = subscription.period_start AND undoes IS NULL
                         AND NOT EXISTS (SELECT FROM billing.plan_change AS undo
                                          WHERE undo.undoes = change.change_id)) AS missed
            WHERE account_id = ANY($1) ORDER BY account_id""",
        list(account_ids),
        at,
        list(OF_THE_PLAN),
    )
    return [
        Standing(
            account_id=row["account_id"],
            plan=row["plan"],
            version=row["version"],
            scheduled_plan=row["scheduled_plan"],
            anchor=row["anchor"],
            period=Period(start=row["period_start"], end=row["period_end"]),
            time=PlanTime(given_ms=row["given_ms"], missed_ms=row["missed_ms"], unused_ms=row["unused_ms"]),
            living_ms=row["living_ms"],
        )
        for row in rows
    ]


async def versions_of(
    connection: asyncpg.Connection, accounts: Iterable[Standing]
) -> dict[str, list[Version]]:
    """Return every version of the plans that accounts have, or change to, by plan. Locks nothing."""
    versions: dict[str, list[Version]] = {}
    for standing in accounts:
        versions[standing.plan] = []
        if standing.scheduled_plan is not None:
            versions[standing.scheduled_plan] = []
    for row in await connection.fetch(
        """SELECT plan, version, quota_ms, rollover_ms, at_once, created_at FROM billing.plan_version
            WHERE plan = ANY($1) ORDER BY version""",
        list(versions),
    ):
        versions[row["plan"]].append(
            Version(
                version=row["version"],
                quota_ms=row["quota_ms"],
                rollover_ms=row["rollover_ms"],
                at_once=row["at_once"],
                created_at=row["created_at"],
            )
        )
    return versions


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


async def _move(
    connection: asyncpg.Connection, steps: Sequence[tuple[Standing, Renewed]], at: datetime
) -> None:
    """Grant, or take back, what versions at once move in the periods that accounts were in."""
    raises = [_raise(standing, step, at) for standing, step in steps if step.moved_ms > 0]
    if raises:
        await grant(connection, raises)
    cuts = [(standing, step) for standing, step in steps if step.moved_ms < 0]
    if cuts:
        await _cut(connection, cuts, at)


def _within(period: Period, at: datetime) -> datetime:
    """Return `at`, or the last moment of a period that is over: what moves in it is of its statement."""
    return min(at, period.end - _US)


def _raise(standing: Standing, step: Renewed, at: datetime) -> Grant:
    account_id, period = standing.account_id, standing.period
    return Grant(
        account_id=account_id,
        source=Source.PRORATION,
        source_key=f"plan_change/{account_id}/{period.start.isoformat()}/{standing.plan}/{step.moved_by}",
        code=Code.PLAN_CHANGE,
        amount_ms=step.moved_ms,
        effective_at=period.start,
        expires_at=period.end,
        at=_within(period, at),
    )


def _rollover_grant(account_id: str, step: Renewed, at: datetime) -> Grant:
    return Grant(
        account_id=account_id,
        source=Source.ROLLOVER,
        source_key=f"rollover/{account_id}/{step.period.start.isoformat()}",
        code=Code.ROLLOVER,
        amount_ms=step.rolled_ms,
        effective_at=step.period.start,
        expires_at=step.period.end,
        at=at,
    )


async def _cut(
    connection: asyncpg.Connection, cuts: Sequence[tuple[Standing, Renewed]], at: datetime
) -> None:
    starts = [standing.period.start for standing, _ in cuts]
    books = await open_books(
        connection, [standing.account_id for standing, _ in cuts], since=min(starts), until=max(starts)
    )
    for standing, step in cuts:
        account_id, period = standing.account_id, standing.period
        lots = [
            lot
            for lot in books.lots(account_id)
            if lot.source in OF_THE_PLAN and (lot.effective_at, lot.expires_at) == (period.start, period.end)
        ]
        parts = taken(burn_order(lots, period.start)[::-1], -step.moved_ms)
        revoke(books, account_id, parts, Code.PLAN_CHANGE, _within(period, at))
    await books.write(connection)


async def _open(
    connection: asyncpg.Connection, opened: Sequence[tuple[Standing, Renewed]], at: datetime
) -> None:
    """Begin the new periods of accounts, and close what ended with those that they were in."""
    await _carry(
        connection,
        {
            standing.account_id: step.rolled_ms
            for standing, step in opened
            if step.period.start == standing.period.end
        },
        at,
    )
    grants: list[Grant] = []
    for standing, step in opened:
        grants.append(period_grant(standing.account_id, step.version.quota_ms, step.period, at))
        if step.rolled_ms:
            grants.append(_rollover_grant(standing.account_id, step, at))
    await grant(connection, grants)
    await close_lots(connection, [standing.account_id for standing, _ in opened], at)


async def _carry(connection: asyncpg.Connection, rolled_ms: Mapping[str, int], at: datetime) -> None:
    """Take what rolls over out of the lots of the plan whose period ended.

    What a job still holds does not roll over: it is not known yet whether it is used.
    """
    carried_ms = await connection.fetchval(
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
           SELECT COALESCE(sum(ms), 0)::bigint FROM part""",
        list(rolled_ms),
        list(rolled_ms.values()),
        list(OF_THE_PLAN),
        at,
    )
    assert carried_ms == sum(rolled_ms.values()), "more was to roll over than is left"
