"""Settlements: an attempt ends in the ledger once, its hold posted with the measured time or voided.

Time beyond the hold is a second transfer: from the lots that lived at dispatch, then metered where the job
consented to it and within its cap, else the platform bears it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import asyncpg

# Its UUID is equal to the standard one, and parsed and sent in a tenth of the time.
from asyncpg.pgproto import pgproto

from billing import accounts, thresholds
from billing.accounts import Terms
from billing.balances import Tier
from billing.books import Books
from billing.entries import (
    ABSORBED,
    CONSUMED,
    CONSUMED_RELAX,
    GPU_MS,
    PLATFORM,
    REVENUE,
    Code,
    Entry,
    Kind,
    Part,
    available_ms,
    burn_order,
    filled,
    lot_account,
    metered_account,
    taken,
)
from billing.holds import Hold, open_with_holds
from billing.prices import PricingSnapshot, affordable_ms, billed_ms, paid_ms, price_micros


class Ending(StrEnum):
    """What becomes of the time an attempt took."""

    POST = "post"
    """Its owner has used it: a success, or a cancellation by the owner while it ran."""
    VOID = "void"
    """Nobody is charged: a failure, or a loss."""


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """An attempt that ended. Ids are UUIDs as text."""

    job_id: str
    attempt_id: str
    account_id: str
    tier: Tier
    ending: Ending
    measured_ms: int
    """GPU time to post, before the multiplier. A void posts none, whatever is given here."""
    absorbed_ms: int
    """GPU time the platform bears, apart from what is posted: of a void, usually all that was measured."""
    pricing: PricingSnapshot
    at: datetime


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What an attempt did cost."""

    attempt_id: str
    due_ms: int
    """What the measured time costs, after the multiplier; more than was charged where it ran beyond its hold
    and nothing was left to take."""
    billed_ms: int
    """Charged time, after the multiplier, what was paid in money included. 0 for relax and for a void."""
    amount_micros: int
    """Charged money, for a part of `billed_ms` or all of it."""
    absorbed_ms: int
    """Measured time the platform bears, with that of an overrun nobody could pay."""
    released_ms: int
    """Held for it, after the multiplier, and free again now."""
    balance_before_ms: int
    """Fast time of the account but for this charge; less after it by what the charge took of it."""
    balance_after_ms: int
    currency: str
    thresholds: tuple[int, ...] = ()
    """Percents of the period's fast time that are used up with it and were not told before."""


class AlreadySettled(Exception):
    """An attempt of the batch was settled before: its report came twice. Nothing was charged."""

    def __init__(self, attempt_id: str) -> None:
        self.attempt_id = attempt_id
        super().__init__(f"attempt {attempt_id} was settled before")


async def settle(
    connection: asyncpg.Connection,
    settlements: Sequence[Settlement],
    *,
    locked: Mapping[str, Terms] | None = None,
) -> list[Settled]:
    """End attempts and return what each did cost, in the order given.

    A fast attempt must have a hold, whose multiplier it is charged by. Locks the accounts, unless their terms
    are given, as `accounts.lock` returned them in this transaction. Raises UnknownAccount, or AlreadySettled
    for the first attempt that was settled before, having charged nothing.
    """
    if not settlements:
        return []
    if locked is None:
        locked = await accounts.lock(
            connection,
            {settlement.account_id for settlement in settlements},
            max(settlement.at for settlement in settlements),
        )
    times = [locked[settlement.account_id].in_period(settlement.at) for settlement in settlements]
    opened = await open_with_holds(
        connection,
        {settlement.account_id for settlement in settlements},
        [settlement.attempt_id for settlement in settlements],
        since=min(times),
        until=max(times),
    )
    charges: list[_Charge] = []
    seen = set(opened.settled)
    for settlement, at in zip(settlements, times, strict=True):
        ended = _Ended(
            settlement=settlement,
            job_id=pgproto.UUID(settlement.job_id),
            attempt_id=pgproto.UUID(settlement.attempt_id),
            at=at,
        )
        if ended.attempt_id in seen:
            raise AlreadySettled(settlement.attempt_id)
        seen.add(ended.attempt_id)
        charges.append(_charge(opened.books, ended, opened.holds.get(ended.attempt_id)))
    await opened.books.write(connection)
    # The last charge of an account in the batch tells what all of them reached.
    last = {
        settlement.account_id: place
        for place, settlement in enumerate(settlements)
        if settlement.tier == "fast"
    }
    reached = thresholds.reached_in_periods(
        locked, {account_id: opened.books.lots(account_id) for account_id in last}, max(times)
    )
    settled = [charge.settled for charge in charges]
    for account_id, percent in await _insert(connection, charges, reached, max(times)):
        one = settled[last[account_id]]
        settled[last[account_id]] = replace(one, thresholds=(*one.thresholds, percent))
    return settled


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """A settlement with its ids parsed, and its time in the account's period."""

    settlement: Settlement
    job_id: UUID
    attempt_id: UUID
    at: datetime


@dataclass(frozen=True, kw_only=True)
class _Charge:
    ended: _Ended
    multiplier_bp: int
    measured_ms: int
    due_ms: int
    unpaid_ms: int
    settled: Settled


def _charge(books: Books, ended: _Ended, hold: Hold | None) -> _Charge:
    """Move in the books what one attempt costs."""
    settlement = ended.settlement
    multiplier_bp = settlement.pricing.multiplier_bp
    measured_ms = settlement.measured_ms if settlement.ending is Ending.POST else 0
    due_ms = billed = unpaid_ms = amount_micros = released_ms = 0
    charged: list[Part] = []
    if settlement.tier == "fast":
        assert hold is not None, "a fast attempt was dispatched without a hold"
        assert hold.account_id == settlement.account_id
        multiplier_bp = hold.multiplier_bp
        due_ms = billed_ms(measured_ms, multiplier_bp)
        if hold.state == "open":
            released_ms = max(hold.lots_ms + hold.metered_ms - due_ms, 0)
        charged, metered_ms = _end_hold(books, ended, hold, due_ms)
        amount_micros = price_micros(metered_ms, hold.overage_micros_per_minute)
        billed = sum(part.ms for part in charged) + metered_ms
        unpaid_ms = measured_ms - min(measured_ms, paid_ms(billed, multiplier_bp))
    elif measured_ms:
        books.append(_entry(ended, Code.RELAX, debit=PLATFORM, credit=CONSUMED_RELAX, amount=measured_ms))
    absorbed_ms = settlement.absorbed_ms + unpaid_ms
    if absorbed_ms:
        books.append(_entry(ended, Code.ABSORBED, debit=PLATFORM, credit=ABSORBED, amount=absorbed_ms))

    lots = books.lots(settlement.account_id)
    live = {lot.lot_id for lot in lots if lot.lives(ended.at)}
    balance_after_ms = available_ms(lots, ended.at)
    return _Charge(
        ended=ended,
        multiplier_bp=multiplier_bp,
        measured_ms=measured_ms,
        due_ms=due_ms,
        unpaid_ms=unpaid_ms,
        settled=Settled(
            attempt_id=settlement.attempt_id,
            due_ms=due_ms,
            billed_ms=billed,
            amount_micros=amount_micros,
            absorbed_ms=absorbed_ms,
            released_ms=released_ms,
            balance_before_ms=balance_after_ms + sum(part.ms for part in charged if part.lot_id in live),
            balance_after_ms=balance_after_ms,
            currency=settlement.pricing.currency,
        ),
    )


def _end_hold(books: Books, ended: _Ended, hold: Hold, due_ms: int) -> tuple[list[Part], int]:
    """End every leg of a hold and take what is due beyond; return the parts of lots and the metered time."""
    charged: list[Part] = []
    metered_ms = 0
    # Of a hold that has expired nothing is set aside any more: all that is due is beyond it.
    legs = hold.legs if hold.state == "open" else ()
    for leg, ms in zip(legs, filled([leg.held_ms for leg in legs], due_ms), strict=True):
        if leg.lot_id is not None:
            books.move_lot(leg.lot_id, used_ms=ms, held_ms=-leg.held_ms)
            debit, credit, unit = lot_account(leg.lot_id), CONSUMED, GPU_MS
            held, posted = leg.held_ms, ms
            charged.append(Part(lot_id=leg.lot_id, ms=ms))
        else:
            held, posted = hold.metered_micros, price_micros(ms, hold.overage_micros_per_minute)
            books.move_metered(hold.metered_key, posted_micros=posted, held_micros=-held)
            debit, credit, unit = metered_account(hold.account_id), REVENUE, hold.currency
            metered_ms = ms
        books.append(
            _entry(
                ended,
                Code.SETTLE,
                # A leg of which nothing is posted is voided: the journal has no rows of zero.
                kind=Kind.POST_PENDING if posted else Kind.VOID_PENDING,
                amount=posted or held,
                debit=debit,
                credit=credit,
                unit=unit,
                leg=leg.number,
                lot_id=leg.lot_id,
                pending_id=leg.pending_id,
            )
        )
    overrun_ms = due_ms - sum(part.ms for part in charged) - metered_ms
    # Judged by dispatch: a period that opened while the job ran does not pay for it.
    parts = taken(burn_order(books.lots(hold.account_id), hold.placed_at), overrun_ms) if overrun_ms else []
    for number, part in enumerate(parts):
        books.move_lot(part.lot_id, used_ms=part.ms)
        books.append(
            _entry(
                ended,
                Code.OVERRUN,
                debit=lot_account(part.lot_id),
                credit=CONSUMED,
                amount=part.ms,
                leg=number,
                lot_id=part.lot_id,
            )
        )
    metered_ms += _meter_overrun(
        books,
        ended,
        hold,
        metered_ms=metered_ms,
        overrun_ms=overrun_ms - sum(part.ms for part in parts),
        leg=len(parts),
    )
    if metered_ms:
        books.append(_entry(ended, Code.METERED_TIME, debit=PLATFORM, credit=CONSUMED, amount=metered_ms))
    return charged + parts, metered_ms


def _meter_overrun(
    books: Books, ended: _Ended, hold: Hold, *, metered_ms: int, overrun_ms: int, leg: int
) -> int:
    """Charge money for time beyond the hold, as far as consent and cap go; return the time charged for.

    `metered_ms` was charged before; both are priced together, so that money is rounded once an attempt.
    """
    if not overrun_ms or not hold.overage_allowed:
        return 0
    price = hold.overage_micros_per_minute
    before_micros = price_micros(metered_ms, price)
    if hold.spend_cap_micros:
        room_micros = hold.spend_cap_micros - books.metered(hold.metered_key).committed_micros
        affordable = affordable_ms(before_micros + max(room_micros, 0), price) - metered_ms
        overrun_ms = min(overrun_ms, affordable)
    micros = price_micros(metered_ms + overrun_ms, price) - before_micros
    if micros:
        books.move_metered(hold.metered_key, posted_micros=micros)
        books.append(
            _entry(
                ended,
                Code.OVERRUN,
                debit=metered_account(hold.account_id),
                credit=REVENUE,
                unit=hold.currency,
                amount=micros,
                leg=leg,
            )
        )
    return overrun_ms


def _entry(
    ended: _Ended,
    code: Code,
    *,
    debit: str,
    credit: str,
    amount: int,
    kind: Kind = Kind.POST,
    unit: str = GPU_MS,
    leg: int = 0,
    lot_id: int | None = None,
    pending_id: int | None = None,
) -> Entry:
    return Entry(
        kind=kind,
        code=code,
        account_id=ended.settlement.account_id,
        job_id=ended.job_id,
        attempt_id=ended.attempt_id,
        leg=leg,
        debit=debit,
        credit=credit,
        unit=unit,
        amount=amount,
        lot_id=lot_id,
        pending_id=pending_id,
        at=ended.at,
    )


async def _insert(
    connection: asyncpg.Connection,
    charges: Sequence[_Charge],
    reached: Sequence[tuple[str, datetime, int]],
    at: datetime,
) -> list[tuple[str, int]]:
    """Write the settlements, and of the thresholds that are `reached` those that were not told before.

    Returns these, as account and percent, in the order of the percents.
    """
    rows = await connection.fetch(
        # Which holds are open is not asked in a WHERE: the index of those would then be read whole for it.
        """/* insert_settlements */ WITH ended AS (
               UPDATE billing.hold
                  SET state = CASE WHEN hold.state = 'expired' THEN 'expired'
                                   WHEN ending = 'post' THEN 'posted' ELSE 'voided' END,
                      ended_at = COALESCE(ended_at, ended.at)
                 FROM unnest($1::uuid[], $5::text[], $14::timestamptz[]) AS ended (attempt_id, ending, at)
                WHERE hold.attempt_id = ended.attempt_id),
           settled AS (
               INSERT INTO billing.settlement (
                      attempt_id, job_id, account_id, tier, ending, measured_ms, multiplier_bp, due_ms,
                      billed_ms, unpaid_ms, absorbed_ms, amount_micros, currency, at)
               SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::bigint[],
                                    $7::integer[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[],
                                    $12::bigint[], $13::text[], $14::timestamptz[])),
           told AS (
               INSERT INTO billing.threshold_event (account_id, period_start, percent, at)
               SELECT account_id, period_start, percent, $18
                 FROM unnest($15::text[], $16::timestamptz[], $17::smallint[])
                      AS reached (account_id, period_start, percent)
               ON CONFLICT DO NOTHING RETURNING account_id, percent)
           SELECT account_id, percent FROM told ORDER BY percent""",
        [charge.ended.attempt_id for charge in charges],
        [charge.ended.job_id for charge in charges],
        [charge.ended.settlement.account_id for charge in charges],
        [charge.ended.settlement.tier for charge in charges],
        [charge.ended.settlement.ending for charge in charges],
        [charge.measured_ms for charge in charges],
        [charge.multiplier_bp for charge in charges],
        [charge.due_ms for charge in charges],
        [charge.settled.billed_ms for charge in charges],
        [charge.unpaid_ms for charge in charges],
        [charge.settled.absorbed_ms for charge in charges],
        [charge.settled.amount_micros for charge in charges],
        [charge.settled.currency for charge in charges],
        [charge.ended.at for charge in charges],
        [account_id for account_id, _, _ in reached],
        [period_start for _, period_start, _ in reached],
        [percent for _, _, percent in reached],
        at,
    )
    return [(row["account_id"], row["percent"]) for row in rows]
