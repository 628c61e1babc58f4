"""The arithmetic of the ledger, without a database: which lot is taken from, and what is written for it.

Lots and entries are plain values. What is decided here is stored by `books`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from uuid import UUID

_NEVER = datetime.max.replace(tzinfo=UTC)

GPU_MS = "gpu_ms"
"""The unit of time entries. The unit of money entries is their currency."""

ISSUED = "issued"
PLATFORM = "platform"
CONSUMED = "consumed"
CONSUMED_RELAX = "consumed_relax"
EXPIRED = "expired"
REVOKED = "revoked"
ABSORBED = "absorbed"
REVENUE = "revenue"


def lot_account(lot_id: int) -> str:
    """Return the journal's name of a lot."""
    return f"lot/{lot_id}"


def metered_account(account_id: str) -> str:
    """Return the journal's name of what an account owes beyond its lots."""
    return f"metered/{account_id}"


def subscription_account(account_id: str) -> str:
    """Return the journal's name of what an account owes for changes of its plan; negative: is owed."""
    return f"subscription/{account_id}"


class Source(StrEnum):
    """Where a lot's time came from."""

    PLAN = "plan"
    """The plan's, for a period."""
    PRORATION = "proration"
    """The plan's, for the rest of a period in which it changed."""
    ROLLOVER = "rollover"
    """Left over of the plan's in the period before."""
    PROMO = "promo"
    REFUND = "refund"
    """Given back of a charge to a lot that has ended."""
    ADMIN = "admin"
    PURCHASE = "purchase"


# What is lost soonest if unused burns first, and what was paid for by itself burns last. Time that rolled
# over does not roll over again, so it burns before the plan's. A change of plan and a refund replace plan
# time, so they burn with it.
PRIORITY: Mapping[Source, int] = {
    Source.PROMO: 10,
    Source.ROLLOVER: 15,
    Source.PLAN: 20,
    Source.PRORATION: 20,
    Source.REFUND: 20,
    Source.ADMIN: 30,
    Source.PURCHASE: 40,
}

OF_THE_PLAN = (Source.PLAN, Source.PRORATION)
"""What a plan grants for a period: a lower quota takes of it, and what is left of it may roll over."""


class Kind(StrEnum):
    """What an entry does to its amount: moves it, sets it aside, or ends what was set aside."""

    POST = "post"
    PENDING = "pending"
    POST_PENDING = "post_pending"
    VOID_PENDING = "void_pending"
    EXPIRE_PENDING = "expire_pending"


class Code(StrEnum):
    """Why an entry was made, and between which accounts (debit → credit)."""

    PERIOD = "period"
    """A period began: issued → lot."""
    ROLLOVER = "rollover"
    """Unused time of the plan went into the next period: lot → expired, and issued → lot."""
    EXPIRY = "expiry"
    """A lot ended with time unused: lot → expired."""
    PLAN_CHANGE = "plan_change"
    """The account's plan, or its plan's version, changed in mid-period. Time: issued → lot, or lot → revoked.
    Money: subscription → revenue for the new plan, revenue → subscription for the old one."""
    PLAN_UNDO = "plan_undo"
    """A change of plan was taken back: lot → revoked, and its money the other way."""
    ADMIN = "admin"
    """An admin's adjustment: issued → lot, or lot → revoked."""
    PROMO = "promo"
    """As an admin's grant, of this source: issued → lot."""
    PURCHASE = "purchase"
    """As an admin's grant, of this source: issued → lot."""
    REFUND = "refund"
    """Given back of an attempt's charge, each row with its job and attempt: consumed → lot, and if that lot
    has ended also lot → expired and issued → a new lot; of what was metered, consumed → platform and, in
    money, revenue → metered."""
    REFUND_UNDO = "refund_undo"
    """A refund was taken back, each row with its job and attempt: lot → consumed; of what was metered,
    platform → consumed and, in money, metered → revenue."""
    HOLD = "hold"
    HOLD_EXPIRY = "hold_expiry"
    SETTLE = "settle"
    OVERRUN = "overrun"
    METERED_TIME = "metered_time"
    RELAX = "relax"
    ABSORBED = "absorbed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One row of the journal: `amount` of `unit` from `debit` to `credit`."""

    kind: Kind
    code: Code
    account_id: str
    debit: str
    credit: str
    amount: int
    at: datetime
    unit: str = GPU_MS
    job_id: UUID | None = None
    attempt_id: UUID | None = None
    leg: int = 0
    lot_id: int | None = None
    pending_id: int | None = None
    audit_id: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lot:
    """Time granted to an account for one span, and what has become of it."""

    lot_id: int
    account_id: str
    source: Source
    priority: int
    effective_at: datetime
    expires_at: datetime | None
    granted_ms: int
    used_ms: int
    held_ms: int
    expired_ms: int
    revoked_ms: int

    @property
    def available_ms(self) -> int:
        """What can still be taken, while the lot lives."""
        return self.granted_ms - self.used_ms - self.held_ms - self.expired_ms - self.revoked_ms

    def lives(self, at: datetime) -> bool:
        """Whether the lot may be taken from by a job dispatched at `at`."""
        return self.effective_at <= at and (self.expires_at is None or at < self.expires_at)

    def plus(self, *, used_ms: int = 0, held_ms: int = 0, expired_ms: int = 0, revoked_ms: int = 0) -> Lot:
        """Return the lot after a movement; amounts may be negative."""
        # Not dataclasses.replace: every hold and every charge moves a lot, and it takes three times as long.
        return Lot(
            lot_id=self.lot_id,
            account_id=self.account_id,
            source=self.source,
            priority=self.priority,
            effective_at=self.effective_at,
            expires_at=self.expires_at,
            granted_ms=self.granted_ms,
            used_ms=self.used_ms + used_ms,
            held_ms=self.held_ms + held_ms,
            expired_ms=self.expired_ms + expired_ms,
            revoked_ms=self.revoked_ms + revoked_ms,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """An amount of one lot."""

    lot_id: int
    ms: int


def burn_order(lots: Iterable[Lot], at: datetime) -> list[Lot]:
    """Return the lots that live at `at` in the order they are used up.

    By priority, then by earlier expiry (never is last), then by creation.
    """
    return sorted(
        (lot for lot in lots if lot.lives(at)),
        key=lambda lot: (lot.priority, lot.expires_at or _NEVER, lot.lot_id),
    )


def available_ms(lots: Iterable[Lot], at: datetime) -> int:
    """Return what a job dispatched at `at` could take from all of `lots`."""
    return sum(lot.available_ms for lot in lots if lot.lives(at))


def taken(lots: Sequence[Lot], amount_ms: int) -> list[Part]:
    """Return how much of each lot, in the order given, makes up `amount_ms`; less where they have less."""
    amounts = filled([lot.available_ms for lot in lots], amount_ms)
    return [Part(lot_id=lot.lot_id, ms=ms) for lot, ms in zip(lots, amounts, strict=True) if ms]


def filled(capacities: Sequence[int], amount: int) -> list[int]:
    """Return how much of `amount` each capacity takes when they are filled in order."""
    amounts = []
    for capacity in capacities:
        amounts.append(min(capacity, amount))
        amount -= amounts[-1]
    return amounts
