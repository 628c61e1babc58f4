"""Every refusal of the ledger: a stable reason, its numbers, and a sentence a person can act on."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import ClassVar


class Refusal(Exception):
    """Something expected was asked that the ledger will not do. Nothing was changed."""

    reason: ClassVar[str]
    """Stable, for programs."""

    def metadata(self) -> dict[str, str]:
        """Return the numbers a program can act on, as text."""
        return {}


class FastTimeExhausted(Refusal):
    """The account has not enough fast time left and has not agreed to overage."""

    reason = "FAST_TIME_EXHAUSTED"

    def __init__(self, *, remaining_ms: int, renews_at: datetime) -> None:
        self.remaining_ms = remaining_ms
        self.renews_at = renews_at
        super().__init__(
            f"Not enough fast time: {_minutes(remaining_ms)} left, renewed at {_moment(renews_at)}. "
            "Relax jobs are free; or allow overage to go on in fast."
        )

    def metadata(self) -> dict[str, str]:
        """Return `remaining_ms` and `renews_at` (ISO 8601)."""
        return {"remaining_ms": str(self.remaining_ms), "renews_at": self.renews_at.isoformat()}


class SpendCapReached(Refusal):
    """The account agreed to overage, and this job could take it above the cap it set."""

    reason = "FAST_TIME_EXHAUSTED"

    def __init__(
        self,
        *,
        remaining_ms: int,
        renews_at: datetime,
        spend_cap_micros: int,
        committed_micros: int,
        currency: str,
    ) -> None:
        self.remaining_ms = remaining_ms
        self.renews_at = renews_at
        self.spend_cap_micros = spend_cap_micros
        self.committed_micros = committed_micros
        self.currency = currency
        super().__init__(
            f"This job could exceed your spend cap: {_money(committed_micros, currency)} of "
            f"{_money(spend_cap_micros, currency)} are charged or held, with {_minutes(remaining_ms)} "
            f"of fast time left, renewed at {_moment(renews_at)}. Relax jobs are free; or raise the cap."
        )

    def metadata(self) -> dict[str, str]:
        """Return what FastTimeExhausted does, the cap, what is charged or held of it, and the currency."""
        return {
            "remaining_ms": str(self.remaining_ms),
            "renews_at": self.renews_at.isoformat(),
            "spend_cap_micros": str(self.spend_cap_micros),
            "committed_micros": str(self.committed_micros),
            "currency": self.currency,
        }


class HoldRefusedBefore(Refusal):
    """The attempt was refused before; its job starts with another attempt."""

    reason = "FAST_TIME_EXHAUSTED"

    def __init__(self) -> None:
        super().__init__("There was not enough fast time for this attempt. The next one may find some.")


class PlanLacksPrivate(Refusal):
    """Private mode was asked for on a plan that does not include it."""

    reason = "PLAN_LACKS_PRIVATE"

    def __init__(self, *, plan: str) -> None:
        self.plan = plan
        super().__init__(
            f"The plan {plan} has no private mode. Submit it as public, or change to a plan that has it."
        )

    def metadata(self) -> dict[str, str]:
        """Return `plan`."""
        return {"plan": self.plan}


class PlanLacksOverage(Refusal):
    """Consent to be charged beyond the plan's time was given on a plan that has no price for it."""

    reason = "PLAN_LACKS_OVERAGE"

    def __init__(self, *, plan: str) -> None:
        self.plan = plan
        super().__init__(
            f"The plan {plan} has no price for fast time beyond its own, so there is nothing to agree to. "
            "Relax jobs are free; or change to a plan that has one."
        )

    def metadata(self) -> dict[str, str]:
        """Return `plan`."""
        return {"plan": self.plan}


class EtagMismatch(Refusal):
    """What is to be changed is another by now than what the caller read."""

    reason = "ETAG_MISMATCH"

    def __init__(self, *, given: str, current: str) -> None:
        self.given = given
        self.current = current
        super().__init__("What you read has changed since. Read it again and repeat the change.")

    def metadata(self) -> dict[str, str]:
        """Return the etag that was given and the one that holds."""
        return {"given": self.given, "current": self.current}


class RequestIdReused(Refusal):
    """A request id came a second time with other content."""

    reason = "REQUEST_ID_REUSED"

    def __init__(self, *, request_id: str) -> None:
        self.request_id = request_id
        super().__init__(
            f"The request id {request_id} was already used for other content. Use a new id for a new request."
        )

    def metadata(self) -> dict[str, str]:
        """Return `request_id`."""
        return {"request_id": self.request_id}


class UnknownPlan(Refusal):
    """There is no plan of that name."""

    reason = "UNKNOWN_PLAN"

    def __init__(self, *, plan: str) -> None:
        self.plan = plan
        super().__init__(f"There is no plan {plan}. List the plans to see their names.")

    def metadata(self) -> dict[str, str]:
        """Return `plan`."""
        return {"plan": self.plan}


class PlanNotSelfService(Refusal):
    """An account may not change to that plan by itself."""

    reason = "PLAN_NOT_SELF_SERVICE"

    def __init__(self, *, plan: str) -> None:
        self.plan = plan
        super().__init__(
            f"Accounts do not change to the plan {plan} by themselves. Ask the people who run this service: "
            "they can change yours."
        )

    def metadata(self) -> dict[str, str]:
        """Return `plan`."""
        return {"plan": self.plan}


class PlanExists(Refusal):
    """A plan of that name is there already."""

    reason = "PLAN_EXISTS"

    def __init__(self, *, plan: str) -> None:
        self.plan = plan
        super().__init__(f"There is already a plan {plan}. Update it, or choose another name.")

    def metadata(self) -> dict[str, str]:
        """Return `plan`."""
        return {"plan": self.plan}


class NothingCharged(Refusal):
    """The account has no job of that id that was charged."""

    reason = "NOTHING_CHARGED"

    def __init__(self, *, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(
            f"The job {job_id} of this account was not charged, so there is nothing to give back."
        )

    def metadata(self) -> dict[str, str]:
        """Return `job_id`."""
        return {"job_id": self.job_id}


class RefundTooLarge(Refusal):
    """A refund would give back more than is left of what the job was charged."""

    reason = "REFUND_TOO_LARGE"

    def __init__(self, *, billed_ms: int, refunded_ms: int, amount_ms: int | None) -> None:
        self.billed_ms = billed_ms
        self.refunded_ms = refunded_ms
        self.amount_ms = amount_ms
        super().__init__(
            f"Cannot give back {'anything more' if amount_ms is None else f'{amount_ms} ms'}: the job was "
            f"charged {billed_ms} ms, and {refunded_ms} ms of it were given back before."
        )

    def metadata(self) -> dict[str, str]:
        """Return `billed_ms`, and `refunded_ms` of it."""
        return {"billed_ms": str(self.billed_ms), "refunded_ms": str(self.refunded_ms)}


class NothingToUndo(Refusal):
    """The account has had no change of plan that counted at once and was not taken back."""

    reason = "NOTHING_TO_UNDO"

    def __init__(self, *, account_id: str) -> None:
        self.account_id = account_id
        super().__init__(
            f"The account {account_id} has no change of plan to take back: there was none that moved time or "
            "money, or each was taken back before."
        )

    def metadata(self) -> dict[str, str]:
        """Return `account`."""
        return {"account": self.account_id}


class NoRefundToUndo(Refusal):
    """The account has no job of that id with a refund that was not taken back."""

    reason = "NO_REFUND_TO_UNDO"

    def __init__(self, *, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(
            f"The job {job_id} of this account has no refund to take back: there was none, or each was taken "
            "back before."
        )

    def metadata(self) -> dict[str, str]:
        """Return `job_id`."""
        return {"job_id": self.job_id}


class RefundSpent(Refusal):
    """Of the time that a refund gave, nothing is left that could be taken back."""

    reason = "REFUND_SPENT"

    def __init__(self, *, job_id: str, refunded_ms: int) -> None:
        self.job_id = job_id
        self.refunded_ms = refunded_ms
        super().__init__(
            f"Nothing of the {refunded_ms} ms that the job {job_id} was given back can be taken: they are "
            "used or held, or gone with the time they were part of. To take other time, adjust the balance."
        )

    def metadata(self) -> dict[str, str]:
        """Return `job_id` and `refunded_ms`."""
        return {"job_id": self.job_id, "refunded_ms": str(self.refunded_ms)}


class UnknownAccount(Refusal):
    """There is no account of that id."""

    reason = "UNKNOWN_ACCOUNT"

    def __init__(self, *, account_id: str) -> None:
        self.account_id = account_id
        super().__init__(f"There is no account {account_id}. Check its id.")

    def metadata(self) -> dict[str, str]:
        """Return `account`."""
        return {"account": self.account_id}


class AccountErased(Refusal):
    """The account was erased: it has no plan to change any more."""

    reason = "ACCOUNT_ERASED"

    def __init__(self, *, account_id: str) -> None:
        self.account_id = account_id
        super().__init__(
            f"The account {account_id} was erased. Its books stay, and what its jobs were charged can still "
            "be given back; it has no plan any more."
        )

    def metadata(self) -> dict[str, str]:
        """Return `account`."""
        return {"account": self.account_id}


class OutsidePeriods(Refusal):
    """A moment was named that lies in no period of the account so far."""

    reason = "OUTSIDE_PERIODS"

    def __init__(self, *, opened_at: datetime, renews_at: datetime) -> None:
        self.opened_at = opened_at
        self.renews_at = renews_at
        super().__init__(
            f"The account was opened at {_moment(opened_at)} and its present period ends at "
            f"{_moment(renews_at)}: name a moment between the two."
        )

    def metadata(self) -> dict[str, str]:
        """Return `opened_at` and `renews_at` (ISO 8601)."""
        return {"opened_at": self.opened_at.isoformat(), "renews_at": self.renews_at.isoformat()}


class AccountExists(Refusal):
    """An account of that id is there already."""

    reason = "ACCOUNT_EXISTS"

    def __init__(self, *, account_id: str) -> None:
        self.account_id = account_id
        super().__init__(f"There is already an account {account_id}. Choose another id.")

    def metadata(self) -> dict[str, str]:
        """Return `account`."""
        return {"account": self.account_id}


class UnknownGrant(Refusal):
    """The account had no grant by an audit event of that number."""

    reason = "UNKNOWN_GRANT"

    def __init__(self, *, account_id: str, number: int) -> None:
        self.account_id = account_id
        self.number = number
        super().__init__(
            f"The audit event {number} granted no fast time to the account {account_id}. List the account's "
            "audit events to find the number of its grant."
        )

    def metadata(self) -> dict[str, str]:
        """Return `account` and `number`."""
        return {"account": self.account_id, "number": str(self.number)}


class AdjustmentTooLarge(Refusal):
    """An adjustment would take more than the account's unused time, or than is left of the grant it names."""

    reason = "ADJUSTMENT_TOO_LARGE"

    def __init__(self, *, available_ms: int, amount_ms: int, of_grant: bool = False) -> None:
        self.available_ms = available_ms
        self.amount_ms = amount_ms
        of = "what was granted" if of_grant else "the account"
        super().__init__(
            f"Cannot take {-amount_ms} ms: only {available_ms} ms of {of} are neither used nor held."
        )

    def metadata(self) -> dict[str, str]:
        """Return `available_ms` and `amount_ms`."""
        return {"available_ms": str(self.available_ms), "amount_ms": str(self.amount_ms)}


def _minutes(ms: int) -> str:
    return f"{ms / 60_000:.1f} GPU-minutes"


def _moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _money(micros: int, currency: str) -> str:
    # All of it, where it is not whole cents: a cap may be one millionth.
    digits = 2 if micros % 10_000 == 0 else 6
    return f"{Decimal(micros) / 1_000_000:.{digits}f} {currency}"
