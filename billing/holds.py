"""Holds: what a fast attempt is expected to cost is set aside when it is dispatched, or it is not dispatched.

Lots come first, in burn order. What they lack is metered where the terms of the job consent to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

import asyncpg

# Its UUID is equal to the standard one, and parsed and sent in a tenth of the time.
from asyncpg.pgproto import pgproto

from billing import accounts
from billing.accounts import Terms
from billing.books import Books, MeteredKey, books_columns, books_of
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
from billing.prices import ChargeMode, PricingSnapshot, billed_ms, multiplier_of, price_micros
from billing.refusals import FastTimeExhausted, HoldRefusedBefore, Refusal, SpendCapReached

HOLD_LASTS = timedelta(hours=1)
"""How long a hold stands, unless it is ended before or `hold_expiry` puts it off."""

_REFUSALS_LAST = timedelta(days=1)

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
    device: str = ""
    """Type of the GPU it will run on, which may have a multiplier of its own."""
    lasts: timedelta = HOLD_LASTS
    """When nobody has ended the hold by then, it is due to expire."""


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
    oldest_at: datetime | None
    """When the oldest was placed; None: there is none."""


async def open_holds(connection: asyncpg.Connection) -> OpenHolds:
    """Return what is held now, of all accounts. Locks nothing."""
    row = await connection.fetchrow(
        """/* open_holds */
           SELECT count(*) AS count, coalesce(sum(lots_ms + metered_ms), 0)::bigint AS held_ms,
                  min(placed_at) AS oldest_at
           FROM billing.hold WHERE state = 'open'"""
    )
    assert row is not None
    return OpenHolds(count=row["count"], held_ms=row["held_ms"], oldest_at=row["oldest_at"])


def hold_id(job_id: UUID, attempt_id: UUID) -> UUID:
    """Return the id of an attempt's hold: derived, so that a repetition names the same one."""
    return uuid5(_HOLDS, f"{job_id}/{attempt_id}")


async def place_holds(
    connection: asyncpg.Connection,
    requests: Sequence[HoldRequest],
    *,
    locked: Mapping[str, Terms] | None = None,
    until_refused: bool = False,
) -> list[HoldPlaced | HoldRefused]:
    """Set aside what each attempt is expected to cost; return the outcomes in the order of the requests.

    Earlier requests of the batch take before later ones, and one that is refused (FastTimeExhausted,
    SpendCapReached) leaves its neighbours alone; or, with `until_refused`, it is the last: those behind it
    are not tried and have no outcome. A request that comes again gets its first outcome; one that was refused
    is refused again, also if there is time by now: a new attempt may have it.

    Locks the accounts, unless their terms are given, as `accounts.lock` returned them in this transaction.
    Raises UnknownAccount or HoldIdReused.
    """
    if not requests:
        return []
    if locked is None:
        locked = await accounts.lock(
            connection, {request.account_id for request in requests}, max(request.at for request in requests)
        )
    times = [locked[request.account_id].in_period(request.at) for request in requests]
    opened = await open_with_holds(
        connection,
        {request.account_id for request in requests},
        [request.attempt_id for request in requests],
        since=min(times),
        until=max(times),
        period_starts={locked[request.account_id].period_start for request in requests},
    )
    outcomes: list[HoldPlaced | HoldRefused] = []
    new: list[_NewHold] = []
    refused: list[tuple[str, datetime]] = []
    for request, at in zip(requests, times, strict=True):
        if pgproto.UUID(request.attempt_id) in opened.refused:
            outcomes.append(HoldRefused(attempt_id=request.attempt_id, refusal=HoldRefusedBefore()))
            if until_refused:
                break
            continue
        before = opened.holds.get(pgproto.UUID(request.attempt_id))
        if before is not None:
            outcomes.append(_first_outcome(before, request))
            continue
        hold = _place(opened.books, locked[request.account_id], request, at)
        if isinstance(hold, Refusal):
            outcomes.append(HoldRefused(attempt_id=request.attempt_id, refusal=hold))
            refused.append((request.attempt_id, at))
            if until_refused:
                break
        else:
            outcomes.append(hold.placed)
            new.append(hold)
    if new:
        await _insert(connection, new, await opened.books.write(connection))
    if refused:
        await connection.executemany(
            "INSERT INTO billing.refused_hold VALUES ($1, $2) ON CONFLICT DO NOTHING", refused
        )
    return outcomes


async def forget_refusals(connection: asyncpg.Connection, at: datetime, most: int) -> int:
    """Forget up to `most` refusals that nobody asks about any more, and return how many they were.

    Whoever waits for fast time is refused every few seconds, each time as another attempt. Of an attempt that
    was refused a day ago no request is on its way. Locks none that others have locked.
    """
    forgotten: int = await connection.fetchval(
        """WITH old AS (
               SELECT attempt_id FROM billing.refused_hold WHERE at <= $1 LIMIT $2 FOR UPDATE SKIP LOCKED),
           forgotten AS (
               DELETE FROM billing.refused_hold USING old
                WHERE refused_hold.attempt_id = old.attempt_id RETURNING true)
           SELECT count(*) FROM forgotten""",
        at - _REFUSALS_LAST,
        most,
    )
    return forgotten


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the ledger has on some accounts and attempts."""

    books: Books
    holds: Mapping[UUID, Hold]
    """By attempt; of those that have one."""
    settled: frozenset[UUID]
    """The attempts that were settled before."""
    refused: frozenset[UUID]
    """The attempts whose hold was refused before."""


_HOLD_COLUMNS = tuple(one.name for one in fields(Hold) if one.name != "legs")
_OPEN = f"""
    WITH held AS MATERIALIZED (
        SELECT placed_at, period_start,
               ROW({", ".join(_HOLD_COLUMNS)}) AS columns,
               ARRAY(SELECT ROW(leg, lot_id, held_ms, pending_id) FROM billing.hold_leg
                      WHERE hold_leg.hold_id = hold.hold_id ORDER BY leg) AS legs
          FROM billing.hold WHERE attempt_id = ANY($5::uuid[]))
    SELECT ARRAY(SELECT ROW(columns, legs) FROM held) AS holds,
           ARRAY(SELECT attempt_id FROM billing.settlement WHERE attempt_id = ANY($5::uuid[])) AS settled,
           ARRAY(SELECT attempt_id FROM billing.refused_hold WHERE attempt_id = ANY($5::uuid[])) AS refused,
           {
    books_columns(
        since="least($3::timestamptz, (SELECT min(placed_at) FROM held))",
        period_starts="$4::timestamptz[] || ARRAY(SELECT DISTINCT period_start FROM held)",
    )
}"""  # noqa: S608 - constants


async def open_with_holds(
    connection: asyncpg.Connection,
    account_ids: Iterable[str],
    attempt_ids: Sequence[str],
    *,
    since: datetime,
    until: datetime,
    period_starts: Iterable[datetime] = (),
) -> Opened:
    """Open the books of accounts, with the holds of attempts, in one round trip.

    The books have the lots that live at some moment from `since`, or from when the first of the holds was
    placed, to `until`, and the metered money of the periods given and of those that the holds draw on. The
    caller holds the locks of the accounts.
    """
    row = await connection.fetchrow(_OPEN, list(account_ids), until, since, list(period_starts), attempt_ids)
    assert row is not None
    holds = [_hold(columns, legs) for columns, legs in row["holds"]]
    return Opened(
        books=books_of(row),
        holds={hold.attempt_id: hold for hold in holds},
        settled=frozenset(row["settled"]),
        refused=frozenset(row["refused"]),
    )


@dataclass(frozen=True, kw_only=True)
class _NewHold:
    request: HoldRequest
    job_id: UUID
    attempt_id: UUID
    terms: Terms
    multiplier_bp: int
    placed: HoldPlaced
    parts: Sequence[Part]
    at: datetime


def _place(books: Books, terms: Terms, request: HoldRequest, at: datetime) -> _NewHold | Refusal:
    """Take the attempt's expected cost from the books, or return why that cannot be."""
    pricing = request.pricing
    assert pricing.charge_mode is not ChargeMode.RELAX, "a relax attempt holds nothing"
    multiplier_bp = multiplier_of(pricing, request.device)
    cost_ms = billed_ms(request.predicted_ms, multiplier_bp)
    parts = taken(burn_order(books.lots(request.account_id), at), cost_ms)
    lots_ms = sum(part.ms for part in parts)
    metered_ms = cost_ms - lots_ms
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
    job_id, attempt_id = pgproto.UUID(request.job_id), pgproto.UUID(request.attempt_id)
    for number, part in enumerate(parts):
        books.move_lot(part.lot_id, held_ms=part.ms)
        books.append(
            Entry(
                kind=Kind.PENDING,
                code=Code.HOLD,
                account_id=request.account_id,
                job_id=job_id,
                attempt_id=attempt_id,
                leg=number,
                debit=lot_account(part.lot_id),
                credit=CONSUMED,
                amount=part.ms,
                lot_id=part.lot_id,
                at=at,
            )
        )
    if metered_ms:
        books.move_metered(key, held_micros=metered_micros)
        books.append(
            Entry(
                kind=Kind.PENDING,
                code=Code.HOLD,
                account_id=request.account_id,
                job_id=job_id,
                attempt_id=attempt_id,
                leg=len(parts),
                debit=metered_account(request.account_id),
                credit=REVENUE,
                unit=pricing.currency,
                amount=metered_micros,
                at=at,
            )
        )
    placed = HoldPlaced(
        attempt_id=request.attempt_id,
        hold_id=hold_id(job_id, attempt_id),
        lots_ms=lots_ms,
        metered_ms=metered_ms,
        metered_micros=metered_micros,
    )
    return _NewHold(
        request=request,
        job_id=job_id,
        attempt_id=attempt_id,
        terms=terms,
        multiplier_bp=multiplier_bp,
        placed=placed,
        parts=parts,
        at=at,
    )


def _first_outcome(before: Hold, request: HoldRequest) -> HoldPlaced:
    if (
        before.hold_id != hold_id(pgproto.UUID(request.job_id), pgproto.UUID(request.attempt_id))
        or before.account_id != request.account_id
        or before.predicted_ms != request.predicted_ms
        or before.multiplier_bp != multiplier_of(request.pricing, request.device)
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
    legs: list[tuple[UUID, int, int | None, int, int]] = []
    for hold in new:
        parts: list[tuple[int | None, int]] = [(part.lot_id, part.ms) for part in hold.parts]
        if hold.placed.metered_ms:
            parts.append((None, hold.placed.metered_ms))
        legs.extend(
            (hold.placed.hold_id, number, lot_id, ms, pendings[hold.attempt_id, number])
            for number, (lot_id, ms) in enumerate(parts)
        )
    await connection.execute(
        """/* insert_holds */ WITH hold AS (
               INSERT INTO billing.hold (
                      hold_id, account_id, job_id, attempt_id, predicted_ms, multiplier_bp, lots_ms,
                      metered_ms, metered_micros, overage_allowed, overage_micros_per_minute, currency,
                      spend_cap_micros, period_start, placed_at, stands_until)
               SELECT * FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::uuid[], $5::bigint[],
                                    $6::integer[], $7::bigint[], $8::bigint[], $9::bigint[], $10::boolean[],
                                    $11::bigint[], $12::text[], $13::bigint[], $14::timestamptz[],
                                    $15::timestamptz[], $16::timestamptz[]))
           INSERT INTO billing.hold_leg (hold_id, leg, lot_id, held_ms, pending_id)
           SELECT * FROM unnest($17::uuid[], $18::smallint[], $19::bigint[], $20::bigint[], $21::bigint[])""",
        [hold.placed.hold_id for hold in new],
        [hold.request.account_id for hold in new],
        [hold.job_id for hold in new],
        [hold.attempt_id for hold in new],
        [hold.request.predicted_ms for hold in new],
        [hold.multiplier_bp for hold in new],
        [hold.placed.lots_ms for hold in new],
        [hold.placed.metered_ms for hold in new],
        [hold.placed.metered_micros for hold in new],
        [hold.request.pricing.overage_allowed for hold in new],
        [hold.request.pricing.overage_micros_per_minute for hold in new],
        [hold.request.pricing.currency for hold in new],
        [hold.terms.spend_cap_micros for hold in new],
        [hold.terms.period_start for hold in new],
        [hold.at for hold in new],
        [hold.at + hold.request.lasts for hold in new],
        *(list(column) for column in zip(*legs, strict=True)),
    )


def _hold(row: tuple[Any, ...], legs: Iterable[tuple[int, int | None, int, int]]) -> Hold:
    return Hold(
        **dict(zip(_HOLD_COLUMNS, row, strict=True)),
        legs=tuple(
            Leg(number=number, lot_id=lot_id, held_ms=held_ms, pending_id=pending_id)
            for number, lot_id, held_ms, pending_id in legs
        ),
    )
