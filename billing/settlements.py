"""Settlements: an attempt ends in the ledger once, its hold posted with the measured time or voided.

Time beyond the hold is a second transfer: from the lots that lived at dispatch, then metered where the job
consented to it and within its cap, else the platform bears it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import asyncpg

from billing import accounts
from billing.balances import Tier
from billing.books import Books, open_books
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
from billing.holds import Hold, holds_of
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
    billed_ms: int
    """Charged time, after the multiplier, what was paid in money included. 0 for relax and for a void."""
    amount_micros: int
    """Charged money, for a part of `billed_ms` or all of it."""
    absorbed_ms: int
    """Measured time the platform bears, with that of an overrun nobody could pay."""
    balance_before_ms: int
    """Fast time of the account but for this charge; less after it by what the charge took of it."""
    balance_after_ms: int
    currency: str


class AlreadySettled(Exception):
    """An attempt of the batch was settled before: its report came twice. Nothing was charged."""

    def __init__(self, attempt_id: str) -> None:
        self.attempt_id = attempt_id
        super().__init__(f"attempt {attempt_id} was settled before")


async def settle(connection: asyncpg.Connection, settlements: Sequence[Settlement]) -> list[Settled]:
    """End attempts and return what each did cost, in the order given.

    A fast attempt must have a hold. Locks the accounts. Raises UnknownAccount, or AlreadySettled for the
    first attempt that was settled before, having charged nothing.
    """
    if not settlements:
        return []
    terms = await accounts.lock(
        connection,
        {settlement.account_id for settlement in settlements},
        max(settlement.at for settlement in settlements),
    )
    settlements = [
        replace(settlement, at=terms[settlement.account_id].in_period(settlement.at))
        for settlement in settlements
    ]
    times = [settlement.at for settlement in settlements]
    await _refuse_repetitions(connection, settlements)
    holds = await holds_of(
        connection, [settlement.attempt_id for settlement in settlements if settlement.tier == "fast"]
    )
    books = await open_books(
        connection,
        terms,
        since=min([*times, *(hold.placed_at for hold in holds.values())]),
        until=max(times),
        period_starts={hold.period_start for hold in holds.values()},
    )
    charges = [
        _charge(books, settlement, holds.get(UUID(settlement.attempt_id))) for settlement in settlements
    ]
    await books.write(connection)
    await connection.execute(
        """UPDATE billing.hold
              SET state = ended.state, ended_at = ended.at
             FROM unnest($1::uuid[], $2::text[], $3::timestamptz[]) AS ended (attempt_id, state, at)
            WHERE hold.attempt_id = ended.attempt_id""",
        [charge.settlement.attempt_id for charge in charges],
        ["posted" if charge.settlement.ending is Ending.POST else "voided" for charge in charges],
        times,
    )
    await _insert(connection, charges)
    return [charge.settled for charge in charges]


async def _refuse_repetitions(connection: asyncpg.Connection, settlements: Sequence[Settlement]) -> None:
    seen = {
        row["attempt_id"]
        for row in await connection.fetch(
            "SELECT attempt_id FROM billing.settlement WHERE attempt_id = ANY($1::uuid[])",
            [settlement.attempt_id for settlement in settlements],
        )
    }
    for settlement in settlements:
        attempt_id = UUID(settlement.attempt_id)
        if attempt_id in seen:
            raise AlreadySettled(settlement.attempt_id)
        seen.add(attempt_id)


@dataclass(frozen=True, kw_only=True)
class _Charge:
    settlement: Settlement
    measured_ms: int
    due_ms: int
    unpaid_ms: int
    settled: Settled


def _charge(books: Books, settlement: Settlement, hold: Hold | None) -> _Charge:
    """Move in the books what one attempt costs."""
    measured_ms = settlement.measured_ms if settlement.ending is Ending.POST else 0
    due_ms = billed = unpaid_ms = amount_micros = 0
    charged: list[Part] = []
    if settlement.tier == "fast":
        assert hold is not None, "a fast attempt was dispatched without a hold"
        assert hold.account_id == settlement.account_id
        assert hold.multiplier_bp == settlement.pricing.multiplier_bp, "terms changed after dispatch"
        due_ms = billed_ms(measured_ms, hold.multiplier_bp)
        charged, metered_ms = _end_hold(books, settlement, hold, due_ms)
        amount_micros = price_micros(metered_ms, hold.overage_micros_per_minute)
        billed = sum(part.ms for part in charged) + metered_ms
        unpaid_ms = measured_ms - min(measured_ms, paid_ms(billed, hold.multiplier_bp))
    elif measured_ms:
        books.append(
            _entry(settlement, Code.RELAX, debit=PLATFORM, credit=CONSUMED_RELAX, amount=measured_ms)
        )
    absorbed_ms = settlement.absorbed_ms + unpaid_ms
    if absorbed_ms:
        books.append(_entry(settlement, Code.ABSORBED, debit=PLATFORM, credit=ABSORBED, amount=absorbed_ms))

    lots = books.lots(settlement.account_id)
    live = {lot.lot_id for lot in lots if lot.lives(settlement.at)}
    balance_after_ms = available_ms(lots, settlement.at)
    return _Charge(
        settlement=settlement,
        measured_ms=measured_ms,
        due_ms=due_ms,
        unpaid_ms=unpaid_ms,
        settled=Settled(
            attempt_id=settlement.attempt_id,
            billed_ms=billed,
            amount_micros=amount_micros,
            absorbed_ms=absorbed_ms,
            balance_before_ms=balance_after_ms + sum(part.ms for part in charged if part.lot_id in live),
            balance_after_ms=balance_after_ms,
            currency=settlement.pricing.currency,
        ),
    )


def _end_hold(books: Books, settlement: Settlement, hold: Hold, due_ms: int) -> tuple[list[Part], int]:
    """End every leg of a hold and take what is due beyond; return the parts of lots and the metered time."""
    charged: list[Part] = []
    metered_ms = 0
    for leg, ms in zip(hold.legs, filled([leg.held_ms for leg in hold.legs], due_ms), strict=True):
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
                settlement,
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
    parts = taken(burn_order(books.lots(hold.account_id), hold.placed_at), overrun_ms)
    for number, part in enumerate(parts):
        books.move_lot(part.lot_id, used_ms=part.ms)
        books.append(
            _entry(
                settlement,
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
        settlement,
        hold,
        metered_ms=metered_ms,
        overrun_ms=overrun_ms - sum(part.ms for part in parts),
        leg=len(parts),
    )
    if metered_ms:
        books.append(
            _entry(settlement, Code.METERED_TIME, debit=PLATFORM, credit=CONSUMED, amount=metered_ms)
        )
    return charged + parts, metered_ms


def _meter_overrun(
    books: Books, settlement: Settlement, hold: Hold, *, metered_ms: int, overrun_ms: int, leg: int
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
                settlement,
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
    settlement: Settlement,
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
        account_id=settlement.account_id,
        job_id=UUID(settlement.job_id),
        attempt_id=UUID(settlement.attempt_id),
        leg=leg,
        debit=debit,
        credit=credit,
        unit=unit,
        amount=amount,
        lot_id=lot_id,
        pending_id=pending_id,
        at=settlement.at,
    )


async def _insert(connection: asyncpg.Connection, charges: Sequence[_Charge]) -> None:
    await connection.execute(
        """INSERT INTO billing.settlement (
                  attempt_id, job_id, account_id, tier, ending, measured_ms, multiplier_bp, due_ms, billed_ms,
                  unpaid_ms, absorbed_ms, amount_micros, currency, at)
           SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::bigint[],
                                $7::integer[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[],
                                $12::bigint[], $13::text[], $14::timestamptz[])""",
        [charge.settlement.attempt_id for charge in charges],
        [charge.settlement.job_id for charge in charges],
        [charge.settlement.account_id for charge in charges],
        [charge.settlement.tier for charge in charges],
        [charge.settlement.ending for charge in charges],
        [charge.measured_ms for charge in charges],
        [charge.settlement.pricing.multiplier_bp for charge in charges],
        [charge.due_ms for charge in charges],
        [charge.settled.billed_ms for charge in charges],
        [charge.unpaid_ms for charge in charges],
        [charge.settled.absorbed_ms for charge in charges],
        [charge.settled.amount_micros for charge in charges],
        [charge.settled.currency for charge in charges],
        [charge.settlement.at for charge in charges],
    )
