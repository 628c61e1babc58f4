"""Lots, metered money and journal of some accounts: read once, changed in memory, written together.

Whoever opens books holds the lock of every account in them (`accounts.lock`), so nothing moves under the
reader and what is written may be absolute. Reading costs one statement and writing another, however many
accounts and movements there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from billing.entries import (
    ISSUED,
    PRIORITY,
    REVENUE,
    REVOKED,
    Code,
    Entry,
    Kind,
    Lot,
    Part,
    Source,
    lot_account,
    subscription_account,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeteredKey:
    """Names one metered account."""

    account_id: str
    period_start: datetime
    currency: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Metered:
    """Money of one metered account, in millionths of its currency."""

    posted_micros: int = 0
    held_micros: int = 0

    @property
    def committed_micros(self) -> int:
        """What is charged and what may yet be."""
        return self.posted_micros + self.held_micros


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Time to be given to an account as a lot of its own."""

    account_id: str
    source: Source
    source_key: str
    """What was granted once under a key cannot be granted again."""
    code: Code
    amount_ms: int
    effective_at: datetime
    expires_at: datetime | None
    at: datetime
    audit_id: int | None = None
    job_id: UUID | None = None
    """With `attempt_id` and `leg`, what its entry is of: given where time of an attempt is given back."""
    attempt_id: UUID | None = None
    leg: int = 0


class Books:
    """The accounts of one batch. What is moved here reaches the database with `write`."""

    def __init__(self, *, lots: Iterable[Lot], metered: dict[MeteredKey, Metered]) -> None:
        self._lots = {lot.lot_id: lot for lot in lots}
        self._lots_of: dict[str, list[int]] = {}
        for lot in self._lots.values():
            self._lots_of.setdefault(lot.account_id, []).append(lot.lot_id)
        self._metered = metered
        self._moved_lots: set[int] = set()
        self._moved_metered: set[MeteredKey] = set()
        self._entries: list[Entry] = []

    def lots(self, account_id: str) -> list[Lot]:
        """Return the account's lots as they stand after what was moved so far."""
        return [self._lots[lot_id] for lot_id in self._lots_of.get(account_id, ())]

    def metered(self, key: MeteredKey) -> Metered:
        """Return a metered account as it stands after what was moved so far."""
        return self._metered.get(key, Metered())

    def move_lot(
        self, lot_id: int, *, used_ms: int = 0, held_ms: int = 0, expired_ms: int = 0, revoked_ms: int = 0
    ) -> None:
        """Change a lot by these amounts; the entries that say so are the caller's to append."""
        self._lots[lot_id] = self._lots[lot_id].plus(
            used_ms=used_ms, held_ms=held_ms, expired_ms=expired_ms, revoked_ms=revoked_ms
        )
        self._moved_lots.add(lot_id)

    def move_metered(self, key: MeteredKey, *, posted_micros: int = 0, held_micros: int = 0) -> None:
        """Change a metered account by these amounts; the entries that say so are the caller's to append."""
        metered = self.metered(key)
        self._metered[key] = Metered(
            posted_micros=metered.posted_micros + posted_micros,
            held_micros=metered.held_micros + held_micros,
        )
        self._moved_metered.add(key)

    def append(self, entry: Entry) -> None:
        """Add an entry to the journal, after those appended before."""
        self._entries.append(entry)

    async def write(self, connection: asyncpg.Connection) -> dict[tuple[UUID, int], int]:
        """Write what was moved; return the journal's numbers of the new pendings by attempt and leg."""
        lots = [self._lots[lot_id] for lot_id in sorted(self._moved_lots)]
        keys = list(self._moved_metered)
        metered = [self._metered[key] for key in keys]
        rows = await connection.fetch(
            f"""WITH lot AS (
                    UPDATE billing.grant_lot AS lot
                       SET used_ms = moved.used_ms, held_ms = moved.held_ms,
                           expired_ms = moved.expired_ms, revoked_ms = moved.revoked_ms
                      FROM unnest($15::bigint[], $16::bigint[], $17::bigint[], $18::bigint[], $19::bigint[])
                           AS moved (lot_id, used_ms, held_ms, expired_ms, revoked_ms)
                     WHERE lot.lot_id = moved.lot_id),
                metered AS (
                    INSERT INTO billing.metered_account
                           (account_id, period_start, currency, posted_micros, held_micros)
                    SELECT * FROM unnest($20::text[], $21::timestamptz[], $22::text[], $23::bigint[],
                                         $24::bigint[])
                    ON CONFLICT (account_id, period_start, currency) DO UPDATE
                       SET posted_micros = excluded.posted_micros, held_micros = excluded.held_micros),
                entry AS ({_APPEND} RETURNING transfer_id, kind, attempt_id, leg)
                SELECT transfer_id, attempt_id, leg FROM entry WHERE kind = 'pending'""",  # noqa: S608 - a constant
            *_columns(self._entries),
            [lot.lot_id for lot in lots],
            [lot.used_ms for lot in lots],
            [lot.held_ms for lot in lots],
            [lot.expired_ms for lot in lots],
            [lot.revoked_ms for lot in lots],
            [key.account_id for key in keys],
            [key.period_start for key in keys],
            [key.currency for key in keys],
            [one.posted_micros for one in metered],
            [one.held_micros for one in metered],
        )
        return {(row["attempt_id"], row["leg"]): row["transfer_id"] for row in rows}


async def open_books(
    connection: asyncpg.Connection,
    account_ids: Iterable[str],
    *,
    since: datetime,
    until: datetime,
    period_starts: Iterable[datetime] = (),
) -> Books:
    """Read the lots that live at some moment from `since` to `until`, and the metered money of those periods.

    The caller holds the locks of the accounts.
    """
    row = await connection.fetchrow(_OPEN, list(account_ids), until, since, list(period_starts))
    assert row is not None
    return books_of(row)


# Read as rows without a type: the driver need not ask for the type of a table, and a column that a later
# release adds is not in them.
_LOT_COLUMNS = tuple(one.name for one in fields(Lot))


def books_columns(*, since: str, period_starts: str) -> str:
    """Return the columns that `books_of` takes, of a query whose $1 are accounts and whose $2 is `until`.

    The others are its expressions for what `open_books` takes by these names. Each column is an array of
    rows, so that one round trip brings several tables.
    """
    return f"""ARRAY(SELECT ROW({", ".join(_LOT_COLUMNS)}) FROM billing.grant_lot
                      WHERE account_id = ANY($1::text[]) AND effective_at <= $2::timestamptz
                        AND (expires_at IS NULL OR expires_at > {since})
                      ORDER BY lot_id) AS lots,
               ARRAY(SELECT ROW(account_id, period_start, currency, posted_micros, held_micros)
                       FROM billing.metered_account
                      WHERE account_id = ANY($1::text[])
                        AND period_start = ANY({period_starts})) AS metered"""  # noqa: S608 - constants


_OPEN = f"SELECT {books_columns(since='$3::timestamptz', period_starts='$4::timestamptz[]')}"


def books_of(row: asyncpg.Record) -> Books:
    """Return the books in a row that has `books_columns`."""
    return Books(
        lots=[_lot(lot) for lot in row["lots"]],
        metered={
            MeteredKey(account_id=account_id, period_start=period_start, currency=currency): Metered(
                posted_micros=posted_micros, held_micros=held_micros
            )
            for account_id, period_start, currency, posted_micros, held_micros in row["metered"]
        },
    )


async def grant(connection: asyncpg.Connection, grants: Sequence[Grant]) -> None:
    """Make a lot of each grant, with its entry. The caller holds the locks of the accounts.

    Raises asyncpg.UniqueViolationError where a key was used before.
    """
    rows = await connection.fetch(
        """INSERT INTO billing.grant_lot
                  (account_id, source, source_key, priority, effective_at, expires_at, granted_ms)
           SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::smallint[], $5::timestamptz[],
                                $6::timestamptz[], $7::bigint[])
           RETURNING lot_id, source_key""",
        [grant.account_id for grant in grants],
        [grant.source for grant in grants],
        [grant.source_key for grant in grants],
        [PRIORITY[grant.source] for grant in grants],
        [grant.effective_at for grant in grants],
        [grant.expires_at for grant in grants],
        [grant.amount_ms for grant in grants],
    )
    lot_ids = {row["source_key"]: row["lot_id"] for row in rows}
    await connection.execute(
        _APPEND,
        *_columns(
            [
                Entry(
                    kind=Kind.POST,
                    code=grant.code,
                    account_id=grant.account_id,
                    debit=ISSUED,
                    credit=lot_account(lot_ids[grant.source_key]),
                    amount=grant.amount_ms,
                    at=grant.at,
                    lot_id=lot_ids[grant.source_key],
                    audit_id=grant.audit_id,
                    job_id=grant.job_id,
                    attempt_id=grant.attempt_id,
                    leg=grant.leg,
                )
                for grant in grants
                # A plan without fast time still has its period's lot; there is nothing to move into it.
                if grant.amount_ms
            ]
        ),
    )


def revoke(
    books: Books,
    account_id: str,
    parts: Iterable[Part],
    code: Code,
    at: datetime,
    audit_id: int | None = None,
) -> None:
    """Take parts of an account's lots away."""
    for part in parts:
        books.move_lot(part.lot_id, revoked_ms=part.ms)
        books.append(
            Entry(
                kind=Kind.POST,
                code=code,
                account_id=account_id,
                debit=lot_account(part.lot_id),
                credit=REVOKED,
                amount=part.ms,
                at=at,
                lot_id=part.lot_id,
                audit_id=audit_id,
            )
        )


def settle_plan_change(
    books: Books,
    account_id: str,
    *,
    credit_micros: int,
    charge_micros: int,
    currency: str,
    code: Code,
    at: datetime,
    audit_id: int,
) -> None:
    """Put into the books what a change of plan gives back (negative) and what it charges, where it does."""
    owed = subscription_account(account_id)
    for amount, debit, credit in ((-credit_micros, REVENUE, owed), (charge_micros, owed, REVENUE)):
        if amount:
            books.append(
                Entry(
                    kind=Kind.POST,
                    code=code,
                    account_id=account_id,
                    debit=debit,
                    credit=credit,
                    unit=currency,
                    amount=amount,
                    at=at,
                    audit_id=audit_id,
                )
            )


_APPEND = """INSERT INTO billing.transfer (
                    kind, code, account_id, job_id, attempt_id, leg, debit_account, credit_account,
                    unit, amount, lot_id, pending_id, audit_id, at)
             SELECT kind, code, account_id, job_id, attempt_id, leg, debit_account, credit_account,
                    unit, amount, lot_id, pending_id, audit_id, at
               FROM unnest($1::text[], $2::text[], $3::text[], $4::uuid[], $5::uuid[], $6::smallint[],
                           $7::text[], $8::text[], $9::text[], $10::bigint[], $11::bigint[], $12::bigint[],
                           $13::bigint[], $14::timestamptz[])
                    WITH ORDINALITY AS entry (
                        kind, code, account_id, job_id, attempt_id, leg, debit_account, credit_account,
                        unit, amount, lot_id, pending_id, audit_id, at, place)
              ORDER BY place"""


def _columns(entries: Sequence[Entry]) -> tuple[list[object], ...]:
    """Return the values of entries, column by column."""
    return (
        [entry.kind for entry in entries],
        [entry.code for entry in entries],
        [entry.account_id for entry in entries],
        [entry.job_id for entry in entries],
        [entry.attempt_id for entry in entries],
        [entry.leg for entry in entries],
        [entry.debit for entry in entries],
        [entry.credit for entry in entries],
        [entry.unit for entry in entries],
        [entry.amount for entry in entries],
        [entry.lot_id for entry in entries],
        [entry.pending_id for entry in entries],
        [entry.audit_id for entry in entries],
        [entry.at for entry in entries],
    )


def _lot(row: tuple[Any, ...]) -> Lot:
    columns = dict(zip(_LOT_COLUMNS, row, strict=True))
    columns["source"] = Source(columns["source"])
    return Lot(**columns)
