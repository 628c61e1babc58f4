"""Holds: what a fast attempt is expected to cost is set aside when it is dispatched, or it is not dispatched.

Lots come first, in burn order. What they lack is metered where the terms of the job consent to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID, uuid5

import asyncpg

from billing import accounts
from billing.accounts import Terms
from billing.books import Books, MeteredKey, open_books
from billing.entries import (
    CONSUMED,
    REVENUE,
    Code,
    Entry,
    Kind,
    Part,
    burn_order,
    lot_account,
    metered_account,
    taken,
)
from billing.prices import ChargeMode, PricingSnapshot, billed_ms, price_micros
from billing.refusals import FastTimeExhausted, Refusal, SpendCapReached

# Any fixed UUID: the ids of holds are derived under it.
_HOLDS = UUID("5f1e5e3c-4f0a-4c53-9a55-0d7a1f9a6b11")


@dataclass(frozen=True, kw_only=True)
class HoldRequest:
    """An attempt about to be dispatched in fast. Ids are UUIDs as text."""

    job_id: str
    attempt_id: str
    account_id: str
    predicted_ms: int
    """Expected GPU time, before the multiplier; positive."""
    pricing: PricingSnapshot
    at: datetime


@dataclass(frozen=True, kw_only=True)
class HoldPlaced:
    """The attempt may start: this much is set aside for it, after the multiplier."""

    attempt_id: str
    hold_id: UUID
    lots_ms: int
    metered_ms: int
    metered_micros: int


@dataclass(frozen=True, kw_only=True)
class HoldRefused:
    """The attempt may not start, and nothing is set aside for it."""

    attempt_id: str
    refusal: Refusal


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One part of a hold."""

    number: int
    lot_id: int | None
    """None: the metered leg."""
    held_ms: int
    pending_id: int


@dataclass(frozen=True, kw_only=True)
class Hold:
    """What is set aside for one attempt, and the terms it was dispatched under."""

    hold_id: UUID
    account_id: str
    job_id: UUID
    attempt_id: UUID
    state: str
    predicted_ms: int
    multiplier_bp: int
    lots_ms: int
    metered_ms: int
    metered_micros: int
    overage_allowed: bool
    overage_micros_per_minute: int
    currency: str
    spend_cap_micros: int
    """0: no cap."""
    period_start: datetime
    placed_at: datetime
    legs: tuple[Leg, ...]

    @property
    def metered_key(self) -> MeteredKey:
        """The metered account it draws on, also when it ends in a later period."""
        return MeteredKey(account_id=self.account_id, period_start=self.period_start, currency=self.currency)


class HoldIdReused(Exception):
    """An attempt that has a hold asked for one of other content: every attempt needs an id of its own."""


@dataclass(frozen=True, kw_only=True)
class OpenHolds:
    """What is set aside for attempts that run."""

    count: int
    held_ms: int
    """GPU time after the multiplier, metered time included."""


async def open_holds(connection: asyncpg.Connection) -> OpenHolds:
    """Return what is held now, of all accounts. Locks nothing."""
    row = await connection.fetchrow(
        """SELECT count(*) AS count, coalesce(sum(lots_ms + metered_ms), 0)::bigint AS held_ms
           FROM billing.hold WHERE state = 'open'"""
    )
    assert row is not None
    return OpenHolds(count=row["count"], held_ms=row["held_ms"])


def hold_id(job_id: str, attempt_id: str) -> UUID:
    """Return the id of an attempt's hold: derived, so that a repetition names the same one."""
    return uuid5(_HOLDS, f"{UUID(job_id)}/{UUID(attempt_id)}")


async def place_holds(
    connection: asyncpg.Connection, requests: Sequence[HoldRequest]
) -> list[HoldPlaced | HoldRefused]:
    """Set aside what each attempt is expected to cost; return the outcomes in the order of the requests.

    Earlier requests of the batch take before later ones, and one that is refused (FastTimeExhausted,
    SpendCapReached) leaves its neighbours alone. A request that comes again gets its first outcome. Locks
    the accounts. Raises UnknownAccount or HoldIdReused.
    """
    if not requests:
        return []
    terms = await accounts.lock(
        connection, {request.account_id for request in requests}, max(request.at for request in requests)
    )
    requests = [replace(request, at=terms[request.account_id].in_period(request.at)) for request in requests]
    books = await open_books(
        connection,
        terms,
        since=min(request.at for request in requests),
        until=max(request.at for request in requests),
        period_starts={account.period_start for account in terms.values()},
    )
    placed_before = await holds_of(connection, [request.attempt_id for request in requests])
    outcomes: list[HoldPlaced | HoldRefused] = []
    new: list[_NewHold] = []
    for request in requests:
        before = placed_before.get(UUID(request.attempt_id))
        if before is not None:
            outcomes.append(_first_outcome(before, request))
            continue
        hold = _place(books, terms[request.account_id], request)
        if isinstance(hold, Refusal):
            outcomes.append(HoldRefused(attempt_id=request.attempt_id, refusal=hold))
        else:
            outcomes.append(hold.placed)
            new.append(hold)
    if new:
        await _insert(connection, new, await books.write(connection))
    return outcomes


async def holds_of(connection: asyncpg.Connection, attempt_ids: Iterable[str]) -> dict[UUID, Hold]:
    """Return the holds of attempts that have one, by attempt. The caller holds the locks of the accounts."""
    holds = await connection.fetch(
        "SELECT * FROM billing.hold WHERE attempt_id = ANY($1::uuid[])", list(attempt_ids)
    )
    legs: dict[UUID, list[Leg]] = {hold["hold_id"]: [] for hold in holds}
    for leg in await connection.fetch(
        "SELECT * FROM billing.hold_leg WHERE hold_id = ANY($1) ORDER BY hold_id, leg", list(legs)
    ):
        legs[leg["hold_id"]].append(
            Leg(
                number=leg["leg"],
                lot_id=leg["lot_id"],
                held_ms=leg["held_ms"],
                pending_id=leg["pending_id"],
            )
        )
    return {hold["attempt_id"]: _hold(hold, legs[hold["hold_id"]]) for hold in holds}


@dataclass(frozen=True, kw_only=True)
class _NewHold:
    request: HoldRequest
    terms: Terms
    placed: HoldPlaced
    parts: Sequence[Part]


def _place(books: Books, terms: Terms, request: HoldRequest) -> _NewHold | Refusal:
    """Take the attempt's expected cost from the books, or return why that cannot be."""
    pricing = request.pricing
    assert pricing.charge_mode is not ChargeMode.RELAX, "a relax attempt holds nothing"
    parts = taken(
        burn_order(books.lots(request.account_id), request.at),
        billed_ms(request.predicted_ms, pricing.multiplier_bp),
    )
    lots_ms = sum(part.ms for part in parts)
    metered_ms = billed_ms(request.predicted_ms, pricing.multiplier_bp) - lots_ms
    metered_micros = price_micros(metered_ms, pricing.overage_micros_per_minute)
    key = MeteredKey(
        account_id=request.account_id, period_start=terms.period_start, currency=pricing.currency
    )
    if metered_ms and not pricing.overage_allowed:
        return FastTimeExhausted(remaining_ms=lots_ms, renews_at=terms.renews_at)
    committed_micros = books.metered(key).committed_micros
    if metered_ms and 0 < terms.spend_cap_micros < committed_micros + metered_micros:
        return SpendCapReached(
            remaining_ms=lots_ms,
            renews_at=terms.renews_at,
            spend_cap_micros=terms.spend_cap_micros,
            committed_micros=committed_micros,
            currency=pricing.currency,
        )
    for number, part in enumerate(parts):
        books.move_lot(part.lot_id, held_ms=part.ms)
        books.append(
            Entry(
                kind=Kind.PENDING,
                code=Code.HOLD,
                account_id=request.account_id,
                job_id=UUID(request.job_id),
                attempt_id=UUID(request.attempt_id),
                leg=number,
                debit=lot_account(part.lot_id),
                credit=CONSUMED,
                amount=part.ms,
                lot_id=part.lot_id,
                at=request.at,
            )
        )
    if metered_ms:
        books.move_metered(key, held_micros=metered_micros)
        books.append(
            Entry(
                kind=Kind.PENDING,
                code=Code.HOLD,
                account_id=request.account_id,
                job_id=UUID(request.job_id),
                attempt_id=UUID(request.attempt_id),
                leg=len(parts),
                debit=metered_account(request.account_id),
                credit=REVENUE,
                unit=pricing.currency,
                amount=metered_micros,
                at=request.at,
            )
        )
    placed = HoldPlaced(
        attempt_id=request.attempt_id,
        hold_id=hold_id(request.job_id, request.attempt_id),
        lots_ms=lots_ms,
        metered_ms=metered_ms,
        metered_micros=metered_micros,
    )
    return _NewHold(request=request, terms=terms, placed=placed, parts=parts)


def _first_outcome(before: Hold, request: HoldRequest) -> HoldPlaced:
    if (
        before.hold_id != hold_id(request.job_id, request.attempt_id)
        or before.account_id != request.account_id
        or before.predicted_ms != request.predicted_ms
        or before.multiplier_bp != request.pricing.multiplier_bp
    ):
        raise HoldIdReused(f"attempt {request.attempt_id} has a hold of other content")
    return HoldPlaced(
        attempt_id=request.attempt_id,
        hold_id=before.hold_id,
        lots_ms=before.lots_ms,
        metered_ms=before.metered_ms,
        metered_micros=before.metered_micros,
    )


async def _insert(
    connection: asyncpg.Connection, new: Sequence[_NewHold], pendings: Mapping[tuple[UUID, int], int]
) -> None:
    await connection.execute(
        """INSERT INTO billing.hold (
                  hold_id, account_id, job_id, attempt_id, predicted_ms, multiplier_bp, lots_ms, metered_ms,
                  metered_micros, overage_allowed, overage_micros_per_minute, currency, spend_cap_micros,
                  period_start, placed_at)
           SELECT * FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::uuid[], $5::bigint[], $6::integer[],
                                $7::bigint[], $8::bigint[], $9::bigint[], $10::boolean[], $11::bigint[],
                                $12::text[], $13::bigint[], $14::timestamptz[], $15::timestamptz[])""",
        [hold.placed.hold_id for hold in new],
        [hold.request.account_id for hold in new],
        [hold.request.job_id for hold in new],
        [hold.request.attempt_id for hold in new],
        [hold.request.predicted_ms for hold in new],
        [hold.request.pricing.multiplier_bp for hold in new],
        [hold.placed.lots_ms for hold in new],
        [hold.placed.metered_ms for hold in new],
        [hold.placed.metered_micros for hold in new],
        [hold.request.pricing.overage_allowed for hold in new],
        [hold.request.pricing.overage_micros_per_minute for hold in new],
        [hold.request.pricing.currency for hold in new],
        [hold.terms.spend_cap_micros for hold in new],
        [hold.terms.period_start for hold in new],
        [hold.request.at for hold in new],
    )
    legs: list[tuple[UUID, int, int | None, int, int]] = []
    for hold in new:
        parts: list[tuple[int | None, int]] = [(part.lot_id, part.ms) for part in hold.parts]
        if hold.placed.metered_ms:
            parts.append((None, hold.placed.metered_ms))
        for number, (lot_id, ms) in enumerate(parts):
            pending_id = pendings[UUID(hold.request.attempt_id), number]
            legs.append((hold.placed.hold_id, number, lot_id, ms, pending_id))
    await connection.execute(
        """INSERT INTO billing.hold_leg (hold_id, leg, lot_id, held_ms, pending_id)
           SELECT * FROM unnest($1::uuid[], $2::smallint[], $3::bigint[], $4::bigint[], $5::bigint[])""",
        *(list(column) for column in zip(*legs, strict=True)),
    )


def _hold(row: asyncpg.Record, legs: Sequence[Leg]) -> Hold:
    return Hold(
        hold_id=row["hold_id"],
        account_id=row["account_id"],
        job_id=row["job_id"],
        attempt_id=row["attempt_id"],
        state=row["state"],
        predicted_ms=row["predicted_ms"],
        multiplier_bp=row["multiplier_bp"],
        lots_ms=row["lots_ms"],
        metered_ms=row["metered_ms"],
        metered_micros=row["metered_micros"],
        overage_allowed=row["overage_allowed"],
        overage_micros_per_minute=row["overage_micros_per_minute"],
        currency=row["currency"],
        spend_cap_micros=row["spend_cap_micros"],
        period_start=row["period_start"],
        placed_at=row["placed_at"],
        legs=tuple(legs),
    )
