"""What an account's journal says: row by row, and period by period, which adds up to the millisecond.

A statement tells how much fast time there was at both ends of a period and every movement between them. Time
that a lot had left when it ended is gone at that moment, whenever the journal writes so; time that was held
then is gone when it is released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from billing.accounts import Terms
from billing.entries import GPU_MS, Source
from billing.periods import Period, period_at
from billing.prices import ONE_BP
from billing.refusals import OutsidePeriods, UnknownAccount

_US = timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One row of the journal."""

    transfer_id: int
    at: datetime
    kind: str
    code: str
    debit_account: str
    credit_account: str
    amount: int
    unit: str
    """`gpu_ms`, or the currency whose millionths are counted."""
    job_id: UUID | None
    attempt_id: UUID | None
    pending_id: int | None
    """The row that this one ends."""


@dataclass(frozen=True, kw_only=True)
class TransferPlace:
    """Where a page of transfers ended."""

    at: datetime
    transfer_id: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """One movement that a person can read. Times are GPU milliseconds."""

    at: datetime
    sentence: str
    job_id: UUID | None = None
    attempt_id: UUID | None = None
    measured_ms: int = 0
    """Measured GPU time of the attempt, before the multiplier."""
    multiplier_bp: int = 0
    fast_ms: int = 0
    """What it changed of the fast time: negative for charges."""
    metered_ms: int = 0
    """Charged in money for time beyond the lots; negative where it was given back."""
    amount_micros: int = 0
    currency: str = ""
    """Of `amount_micros`; empty where that is 0."""
    relax_ms: int = 0


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One period of an account. Of fast time, opening + granted - used - expired - revoked = closing.

    Times are GPU milliseconds. `fast_ms` of the lines adds up to closing - opening, `metered_ms` and
    `relax_ms` of the lines to those of the statement, and their `amount_micros` to `amounts`, by currency.
    """

    account_id: str
    plan: str
    """The one it had at the end of the period, or has now."""
    period: Period
    opening_ms: int
    granted_ms: int
    used_ms: int
    """Charged to lots, refunds taken off."""
    expired_ms: int
    revoked_ms: int
    closing_ms: int
    held_ms: int
    """Of the closing time."""
    metered_ms: int
    amounts: Mapping[str, int]
    """Charged in money, in millionths, by currency: plans may change theirs, and sums of two mean nothing."""
    currency: str
    """The present plan's."""
    relax_ms: int
    lines: tuple[Line, ...]


async def transfers(
    connection: asyncpg.Connection, account_id: str, *, after: TransferPlace | None, limit: int
) -> list[Transfer]:
    """Return up to `limit` rows of an account's journal, newest first, from behind `after`.

    Locks nothing. Raises UnknownAccount.
    """
    if not await connection.fetchval(
        "SELECT EXISTS (SELECT FROM billing.account WHERE account_id = $1)", account_id
    ):
        raise UnknownAccount(account_id=account_id)
    rows = await connection.fetch(
        """SELECT transfer_id, at, kind, code, debit_account, credit_account, amount, unit, job_id,
                  attempt_id, pending_id
             FROM billing.transfer
            WHERE account_id = $1
              AND ($2::timestamptz IS NULL OR at <= $2 AND (at, transfer_id) < ($2, $3::bigint))
            ORDER BY at DESC, transfer_id DESC LIMIT $4""",
        account_id,
        None if after is None else after.at,
        None if after is None else after.transfer_id,
        limit,
    )
    return [Transfer(**row) for row in rows]


async def statement(
    connection: asyncpg.Connection,
    terms: Terms,
    moment: datetime | None,
    at: datetime,
    *,
    most_attempts: int = 10_000,
) -> Statement:
    """Return the period of an account that contains `moment`; None: the one of its terms.

    If more than `most_attempts` ended in it, those of a day are one line, of each tier and ending: else it
    would outgrow what can be sent, and what anybody reads. `transfers` has each.

    Reads one moment of the database: the caller's transaction is REPEATABLE READ, or holds the account's
    lock. The last period of an account that was erased runs on. Raises OutsidePeriods.
    """
    account_id, at = terms.account_id, terms.in_period(at)
    anchor: datetime = await connection.fetchval(
        "SELECT anchor FROM billing.subscription WHERE account_id = $1", account_id
    )
    period = Period(start=terms.period_start, end=terms.renews_at)
    if terms.ended_at is not None:
        # It is renewed no more, and what is given back since then is in no later one.
        period = Period(start=terms.period_start, end=max(terms.renews_at, at + _US))
    if moment is not None:
        if not anchor <= moment < period.end:
            raise OutsidePeriods(opened_at=anchor, renews_at=period.end)
        if moment < period.start:
            period = period_at(anchor, moment)
    lots = await _lots(connection, account_id, period)
    # Of the present period, what has ended by now is gone, and what ends later is not.
    until = min(period.end, at)
    opening = [lot.before for lot in lots]
    closing = [lot.after for lot in lots]
    gone = [(lot, lot.after.gone_ms(lot, until) - lot.before.gone_ms(lot, period.start)) for lot in lots]
    lines = [
        *await _movements(connection, account_id, period),
        *await _charges(connection, account_id, period, most_attempts),
        *await _refunds(connection, account_id, period),
        *await _refunds_taken_back(connection, account_id, period),
        *await _thresholds(connection, account_id, period),
        *(_expiry(lot, ms, period) for lot, ms in gone if ms),
    ]
    money = await connection.fetch(
        """SELECT unit,
                  sum(CASE WHEN credit_account = 'revenue' THEN amount ELSE -amount END)::bigint AS micros
             FROM billing.transfer
            WHERE account_id = $1 AND at >= $2 AND at < $3 AND unit <> $4 AND kind IN ('post', 'post_pending')
            GROUP BY unit ORDER BY unit""",
        account_id,
        period.start,
        period.end,
        GPU_MS,
    )
    times = await connection.fetchrow(
        """SELECT COALESCE(sum(CASE WHEN debit_account = 'platform' THEN amount ELSE -amount END)
                           FILTER (WHERE 'platform' IN (debit_account, credit_account)
                                         AND 'consumed' IN (debit_account, credit_account)), 0)::bigint
                      AS metered_ms,
                  COALESCE(sum(amount) FILTER (WHERE code = 'relax'), 0)::bigint AS relax_ms
             FROM billing.transfer WHERE account_id = $1 AND at >= $2 AND at < $3""",
        account_id,
        period.start,
        period.end,
    )
    assert times is not None
    made = Statement(
        account_id=account_id,
        plan=await _plan_of(connection, terms, period),
        period=period,
        opening_ms=sum(lot.before.left_ms(lot, period.start) for lot in lots),
        granted_ms=sum(lot.granted_ms for lot in closing) - sum(lot.granted_ms for lot in opening),
        used_ms=sum(lot.used_ms for lot in closing) - sum(lot.used_ms for lot in opening),
        expired_ms=sum(ms for _, ms in gone),
        revoked_ms=sum(lot.revoked_ms for lot in closing) - sum(lot.revoked_ms for lot in opening),
        closing_ms=sum(lot.after.left_ms(lot, until) for lot in lots),
        held_ms=sum(lot.held_ms for lot in closing),
        metered_ms=times["metered_ms"],
        amounts={row["unit"]: row["micros"] for row in money},
        currency=terms.currency,
        relax_ms=times["relax_ms"],
        lines=tuple(sorted(lines, key=lambda line: line.at)),
    )
    _assert_adds_up(made)
    return made


def _assert_adds_up(made: Statement) -> None:
    moved_ms = made.granted_ms - made.used_ms - made.expired_ms - made.revoked_ms
    assert made.opening_ms + moved_ms == made.closing_ms, "the statement does not close"
    for of_lines, whole in (
        (sum(line.fast_ms for line in made.lines), moved_ms),
        (sum(line.metered_ms for line in made.lines), made.metered_ms),
        (sum(line.relax_ms for line in made.lines), made.relax_ms),
    ):
        assert of_lines == whole, f"the lines add up to {of_lines}, and the period to {whole}"
    amounts = dict.fromkeys(made.amounts, 0)
    for line in made.lines:
        if line.amount_micros:
            amounts[line.currency] += line.amount_micros
    assert amounts == made.amounts, f"the lines add up to {amounts}, and the period to {made.amounts}"


async def _plan_of(connection: asyncpg.Connection, terms: Terms, period: Period) -> str:
    """Return the plan that an account had when a period ended, or has now."""
    if period.start == terms.period_start:
        return terms.plan
    changes = await connection.fetch(
        """SELECT at, before ->> 'plan' AS before, after ->> 'plan' AS after,
                  (after ->> 'effective_at')::timestamptz AS effective_at
             FROM billing.audit_event
            WHERE target = 'accounts/' || $1 AND action IN ('ChangePlan', 'UndoPlanChange')
            ORDER BY audit_id""",
        terms.account_id,
    )
    plan: str = changes[0]["before"] if changes else terms.plan
    for change in changes:
        if change["at"] < period.end:
            # It replaced what had been scheduled before, and found this plan until its day.
            plan = change["after"] if change["effective_at"] < period.end else change["before"]
    return plan


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """What had moved of a lot before some moment, by its rows in the journal."""

    granted_ms: int = 0
    used_ms: int = 0
    revoked_ms: int = 0
    held_ms: int = 0

    def gone_ms(self, lot: _Lot, moment: datetime) -> int:
        """Return what ended unused with the lot before or at `moment`."""
        if lot.expires_at is None or moment < lot.expires_at:
            return 0
        return self.granted_ms - self.used_ms - self.revoked_ms - self.held_ms

    def left_ms(self, lot: _Lot, moment: datetime) -> int:
        """Return what can still be used at `moment`, or is held."""
        return self.granted_ms - self.used_ms - self.revoked_ms - self.gone_ms(lot, moment)


@dataclass(kw_only=True, slots=True)
class _Lot:
    lot_id: int
    source: Source
    expires_at: datetime | None
    before: _Sums = field(default_factory=_Sums)
    """What had moved before the period."""
    after: _Sums = field(default_factory=_Sums)
    """And before its end."""


async def _lots(connection: asyncpg.Connection, account_id: str, period: Period) -> list[_Lot]:
    """Return the lots of which something can have been left or moved in a period.

    Of the journal's rows that say a lot ended, none is read: a sweeper writes them when it comes by.
    """
    lots = {
        row["lot_id"]: _Lot(lot_id=row["lot_id"], source=Source(row["source"]), expires_at=row["expires_at"])
        for row in await connection.fetch(
            """SELECT lot_id, source, expires_at FROM billing.grant_lot
                WHERE account_id = $1
                  AND (expires_at IS NULL OR expires_at > $2 OR held_ms > 0
                       OR lot_id IN (SELECT lot_id FROM billing.transfer WHERE account_id = $1 AND at >= $2))
                ORDER BY lot_id""",
            account_id,
            period.start,
        )
    }
    for row in await connection.fetch(
        """SELECT moment.after, transfer.lot_id,
                  COALESCE(sum(transfer.amount) FILTER (
                      WHERE transfer.debit_account = 'issued'), 0)::bigint AS granted_ms,
                  COALESCE(sum(CASE WHEN transfer.credit_account = 'consumed'
                                    THEN transfer.amount ELSE -transfer.amount END) FILTER (
                      WHERE 'consumed' IN (transfer.debit_account, transfer.credit_account)
                            AND transfer.kind IN ('post', 'post_pending')), 0)::bigint AS used_ms,
                  COALESCE(sum(transfer.amount) FILTER (
                      WHERE transfer.credit_account = 'revoked'), 0)::bigint AS revoked_ms,
                  COALESCE(sum(transfer.amount) FILTER (WHERE transfer.kind = 'pending'), 0)::bigint
                      - COALESCE(sum(pending.amount), 0)::bigint AS held_ms
             FROM unnest($2::timestamptz[]) WITH ORDINALITY AS moment (at, after)
             JOIN billing.transfer ON transfer.at < moment.at
                  LEFT JOIN billing.transfer AS pending ON pending.transfer_id = transfer.pending_id
            WHERE transfer.lot_id = ANY($1)
            GROUP BY 1, 2""",
        list(lots),
        [period.start, period.end],
    ):
        sums = _Sums(
            granted_ms=row["granted_ms"],
            used_ms=row["used_ms"],
            revoked_ms=row["revoked_ms"],
            held_ms=row["held_ms"],
        )
        if row["after"] == 1:
            lots[row["lot_id"]].before = sums
        else:
            lots[row["lot_id"]].after = sums
    return list(lots.values())


async def _charges(connection: asyncpg.Connection, account_id: str, period: Period, most: int) -> list[Line]:
    """Return a line for each attempt that ended in the period, or for those of a day if they are too many."""
    of_period = (account_id, period.start, period.end)
    many = await connection.fetchval(
        f"SELECT count(*) FROM (SELECT FROM ({_ENDED}) AS ended LIMIT $4) AS counted",  # noqa: S608 - a constant
        *of_period,
        most + 1,
    )
    if many > most:
        rows = await connection.fetch(
            f"""SELECT date_trunc('day', at, 'UTC') AS day, max(at) AS at, count(*) AS attempts, tier, ending,
                       sum(measured_ms)::bigint AS measured_ms, sum(billed_ms)::bigint AS billed_ms,
                       COALESCE(sum(metered_ms), 0)::bigint AS metered_ms,
                       sum(absorbed_ms)::bigint AS absorbed_ms, sum(amount_micros)::bigint AS amount_micros,
                       currency
                  FROM ({_ENDED}) AS ended JOIN billing.settlement USING (attempt_id)
                 GROUP BY 1, tier, ending, currency ORDER BY max(at)""",  # noqa: S608 - a constant
            *of_period,
        )
        return [_charges_of_a_day(row) for row in rows]
    rows = await connection.fetch(
        f"""SELECT settlement.*, COALESCE(ended.metered_ms, 0)::bigint AS metered_ms
              FROM ({_ENDED}) AS ended JOIN billing.settlement USING (attempt_id)
             ORDER BY settlement.at, attempt_id""",  # noqa: S608 - a constant
        *of_period,
    )
    return [_charge(row) for row in rows]


_ENDED = """SELECT attempt_id, sum(amount) FILTER (WHERE code = 'metered_time') AS metered_ms
              FROM billing.transfer
             WHERE account_id = $1 AND at >= $2 AND at < $3 AND kind <> 'pending'
                   AND code IN ('settle', 'overrun', 'metered_time', 'relax', 'absorbed')
             GROUP BY attempt_id"""


def _charge(row: asyncpg.Record) -> Line:
    times = "" if row["multiplier_bp"] == ONE_BP else f" × {row['multiplier_bp'] / ONE_BP:g}"
    return Line(
        at=row["at"],
        sentence=_what_it_cost(row, times),
        job_id=row["job_id"],
        attempt_id=row["attempt_id"],
        measured_ms=row["measured_ms"],
        multiplier_bp=row["multiplier_bp"],
        **_amounts(row),
    )


def _charges_of_a_day(row: asyncpg.Record) -> Line:
    tries = "1 try" if row["attempts"] == 1 else f"{row['attempts']:,} tries"
    return Line(
        at=row["at"],
        sentence=f"{tries} of {row['day']:%Y-%m-%d}. {_what_it_cost(row)}",
        job_id=None,
        attempt_id=None,
        measured_ms=row["measured_ms"],
        multiplier_bp=0,
        **_amounts(row),
    )


def _amounts(row: asyncpg.Record) -> dict[str, Any]:
    return {
        "fast_ms": row["metered_ms"] - row["billed_ms"],
        "metered_ms": row["metered_ms"],
        "amount_micros": row["amount_micros"],
        "currency": row["currency"] if row["amount_micros"] else "",
        "relax_ms": row["measured_ms"] if row["tier"] == "relax" else 0,
    }


def _what_it_cost(row: asyncpg.Record, times: str = "") -> str:
    borne = f" {_seconds(row['absorbed_ms'])} were our loss." if row["absorbed_ms"] else ""
    if row["ending"] == "void":
        return f"Not charged: failed or lost.{borne}"
    if row["tier"] == "relax":
        return f"Drawn in relax, which is free: {_seconds(row['measured_ms'])}.{borne}"
    parts = []
    fast_ms = row["billed_ms"] - row["metered_ms"]
    if fast_ms or not row["metered_ms"]:
        parts.append(f"{_seconds(fast_ms)} of fast time")
    if row["metered_ms"]:
        money = _money(row["amount_micros"], row["currency"])
        parts.append(f"{_seconds(row['metered_ms'])} beyond it for {money}")
    return f"Charged {' and '.join(parts)}: {_seconds(row['measured_ms'])} of GPU time{times}.{borne}"


async def _refunds(connection: asyncpg.Connection, account_id: str, period: Period) -> list[Line]:
    """Return a line for each refund in the period."""
    rows = await connection.fetch(
        """SELECT min(at) AS at, job_id, attempt_id, max(unit) FILTER (WHERE unit <> $4) AS currency,
                  COALESCE(sum(amount) FILTER (WHERE debit_account = 'consumed' AND lot_id IS NOT NULL),
                           0)::bigint AS lots_ms,
                  COALESCE(sum(amount) FILTER (WHERE debit_account = 'consumed' AND lot_id IS NULL),
                           0)::bigint AS metered_ms,
                  COALESCE(sum(amount) FILTER (WHERE debit_account = 'revenue'), 0)::bigint AS micros,
                  COALESCE(sum(amount) FILTER (WHERE debit_account = 'issued'), 0)::bigint AS anew_ms
             FROM billing.transfer
            WHERE account_id = $1 AND at >= $2 AND at < $3 AND code = 'refund'
            GROUP BY audit_id, job_id, attempt_id
            ORDER BY min(transfer_id)""",
        account_id,
        period.start,
        period.end,
        GPU_MS,
    )
    lines = []
    for row in rows:
        parts = []
        if row["lots_ms"]:
            anew = ", as time of its own: what it was charged to has ended" if row["anew_ms"] else ""
            parts.append(f"{_seconds(row['lots_ms'])} of fast time{anew}")
        if row["metered_ms"] or row["micros"]:
            parts.append(f"{_money(row['micros'], row['currency'])} for {_seconds(row['metered_ms'])}")
        lines.append(
            Line(
                at=row["at"],
                sentence=f"Given back: {'; and '.join(parts)}.",
                job_id=row["job_id"],
                attempt_id=row["attempt_id"],
                # With what was granted anew; what went back to a lot that has ended is gone with it.
                fast_ms=row["lots_ms"] + row["anew_ms"],
                metered_ms=-row["metered_ms"],
                amount_micros=-row["micros"],
                currency=row["currency"] if row["micros"] else "",
            )
        )
    return lines


async def _refunds_taken_back(connection: asyncpg.Connection, account_id: str, period: Period) -> list[Line]:
    """Return a line for each refund that was taken back in the period."""
    rows = await connection.fetch(
        """SELECT min(at) AS at, job_id, attempt_id, max(unit) FILTER (WHERE unit <> $4) AS currency,
                  COALESCE(sum(amount) FILTER (WHERE lot_id IS NOT NULL), 0)::bigint AS lots_ms,
                  COALESCE(sum(amount) FILTER (WHERE debit_account = 'platform'), 0)::bigint AS metered_ms,
                  COALESCE(sum(amount) FILTER (WHERE credit_account = 'revenue'), 0)::bigint AS micros
             FROM billing.transfer
            WHERE account_id = $1 AND at >= $2 AND at < $3 AND code = 'refund_undo'
            GROUP BY audit_id, job_id, attempt_id
            ORDER BY min(transfer_id)""",
        account_id,
        period.start,
        period.end,
        GPU_MS,
    )
    lines = []
    for row in rows:
        parts = []
        if row["lots_ms"]:
            parts.append(f"{_seconds(row['lots_ms'])} of fast time")
        if row["metered_ms"] or row["micros"]:
            money = _money(row["micros"], row["currency"] or "")
            parts.append(f"{money} for {_seconds(row['metered_ms'])}")
        lines.append(
            Line(
                at=row["at"],
                sentence=f"Charged again, what had been given back: {'; and '.join(parts)}.",
                job_id=row["job_id"],
                attempt_id=row["attempt_id"],
                fast_ms=-row["lots_ms"],
                metered_ms=row["metered_ms"],
                amount_micros=row["micros"],
                currency=row["currency"] if row["micros"] else "",
            )
        )
    return lines


async def _movements(connection: asyncpg.Connection, account_id: str, period: Period) -> list[Line]:
    """Return a line for each grant, each time that was taken back, and each price of a change of plan."""
    rows = await connection.fetch(
        """SELECT transfer.at, code, debit_account, credit_account, amount, unit, source
             FROM billing.transfer LEFT JOIN billing.grant_lot USING (lot_id)
            WHERE transfer.account_id = $1 AND transfer.at >= $2 AND transfer.at < $3
              AND code IN ('period', 'rollover', 'plan_change', 'plan_undo', 'admin', 'promo', 'purchase')
              AND credit_account <> 'expired'
            ORDER BY transfer_id""",
        account_id,
        period.start,
        period.end,
    )
    return [_movement(row) for row in rows]


_GRANTED = {
    Source.PLAN: "the plan's fast time for this period",
    Source.PRORATION: "more fast time for the rest of the period, after a change of the plan",
    Source.ROLLOVER: "unused time of the period before",
    Source.PROMO: "a promotion",
    Source.REFUND: "time given back",
    Source.ADMIN: "by the people who run this service",
    Source.PURCHASE: "bought",
}


_TAKEN_BACK = {
    "plan_change": "after a change of the plan",
    "plan_undo": "with the change of plan that had given them",
}
# By code, and whether it is owed.
_MONEY_OF_PLANS = {
    ("plan_change", True): "Charged {} for the rest of the period on the new plan.",
    ("plan_change", False): "Credited {} for the rest of the period on the old plan.",
    ("plan_undo", True): "Charged {} again, which a change of plan that was taken back had credited.",
    ("plan_undo", False): "Given back {}, which a change of plan that was taken back had charged.",
}


def _movement(row: asyncpg.Record) -> Line:
    amount = row["amount"]
    if row["unit"] != GPU_MS:
        owed = row["credit_account"] == "revenue"
        money = _money(amount, row["unit"])
        return Line(
            at=row["at"],
            sentence=_MONEY_OF_PLANS[row["code"], owed].format(money),
            amount_micros=amount if owed else -amount,
            currency=row["unit"],
        )
    if row["credit_account"] == "revoked":
        why = _TAKEN_BACK.get(row["code"], "by the people who run this service")
        return Line(at=row["at"], sentence=f"Taken back {_minutes(amount)}, {why}.", fast_ms=-amount)
    return Line(
        at=row["at"],
        sentence=f"Granted {_minutes(amount)}: {_GRANTED[Source(row['source'])]}.",
        fast_ms=amount,
    )


async def _thresholds(connection: asyncpg.Connection, account_id: str, period: Period) -> list[Line]:
    rows = await connection.fetch(
        """SELECT at, percent FROM billing.threshold_event
            WHERE account_id = $1 AND period_start = $2 ORDER BY percent""",
        account_id,
        period.start,
    )
    return [
        Line(at=row["at"], sentence=f"{row['percent']} % of this period's fast time were used by then.")
        for row in rows
    ]


def _expiry(lot: _Lot, gone_ms: int, period: Period) -> Line:
    assert lot.expires_at is not None, "a lot without an end does not end"
    at = max(lot.expires_at, period.start)
    if gone_ms < 0:
        sentence = f"Used after all, by a job that had begun before the time ended: {_minutes(-gone_ms)}."
    else:
        sentence = f"Ended unused: {_minutes(gone_ms)}."
    return Line(at=at, sentence=sentence, fast_ms=-gone_ms)


def _seconds(ms: int) -> str:
    return f"{ms / 1_000:,.3f} s"


def _minutes(ms: int) -> str:
    return f"{ms / 60_000:,.1f} GPU-minutes"


def _money(micros: int, currency: str) -> str:
    return f"{micros / 1_000_000:.4f} {currency}"
