"""A second opinion on the ledger: the journal replayed from its first row, in Python, by rules of its own.

It shares nothing with the code that wrote the journal, nor with the queries of `invariants`: lots, metered
accounts, pendings and attempts are built again from nothing but the rows of `transfer`, in the order of their
numbers, and then held against what the other tables say. Findings bear the numbers of the invariants.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any
from uuid import UUID

import asyncpg

from billing.invariants import one_moment

# Between two of these others have their turn in the event loop: about 20 ms.
_ROWS_AT_ONCE = 500

# Who may pay whom, by the kind of account, why, and in which of the two units.
_MOVEMENTS = {
    ("issued", "lot"): {"period", "rollover", "plan_change", "admin", "promo", "purchase", "refund"},
    ("lot", "revoked"): {"plan_change", "admin"},
    ("lot", "expired"): {"rollover", "expiry", "refund"},
    ("lot", "consumed"): {"hold", "settle", "overrun"},
    ("consumed", "lot"): {"refund"},
    ("platform", "consumed"): {"metered_time"},
    ("consumed", "platform"): {"refund"},
    ("platform", "consumed_relax"): {"relax"},
    ("platform", "absorbed"): {"absorbed"},
    ("metered", "revenue"): {"hold", "settle", "overrun"},
    ("revenue", "metered"): {"refund"},
    ("subscription", "revenue"): {"plan_change"},
    ("revenue", "subscription"): {"plan_change"},
}
_IN_MONEY = {"metered", "revenue", "subscription"}
_KINDS_OF_CODES = {"hold": {"pending"}, "settle": {"post_pending", "void_pending", "expire_pending"}}
_OF_NO_ATTEMPT = {"period", "rollover", "expiry", "plan_change", "admin", "promo", "purchase"}
_AUDITED = {"admin", "promo", "purchase", "refund"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that should not be."""

    number: int
    """Of the invariant that it breaks."""
    what: str
    """Transfer, lot, attempt or account."""
    sentence: str


async def replay(connection: asyncpg.Connection) -> list[Finding]:
    """Replay the whole journal as of one moment; no finding is what is hoped for. Locks nothing.

    It takes one to two minutes for a million rows, and memory for every lot and attempt. A caller may end it
    at any time, with a timeout of its own.
    """
    async with one_moment(connection):
        replayed = _Replay(await connection.fetch("SELECT * FROM billing.grant_lot"))
        for hold in await connection.fetch(
            """SELECT attempt_id, period_start, overage_allowed, spend_cap_micros, overage_micros_per_minute,
                      multiplier_bp
                 FROM billing.hold"""
        ):
            replayed.terms[hold["attempt_id"]] = hold
        replayed.audits = {
            row["audit_id"]: row["target"]
            for row in await connection.fetch("SELECT audit_id, target FROM billing.audit_event")
        }
        async for row in connection.cursor(
            "SELECT * FROM billing.transfer ORDER BY transfer_id", prefetch=_ROWS_AT_ONCE
        ):
            replayed.apply(row)
        replayed.compare_lots()
        replayed.compare_metered(await connection.fetch("SELECT * FROM billing.metered_account"))
        replayed.compare_holds(
            await connection.fetch(
                """SELECT hold.*, settlement.ending, pendings, legs_ms
                     FROM billing.hold
                          LEFT JOIN billing.settlement USING (attempt_id)
                          CROSS JOIN LATERAL (
                              SELECT COALESCE(array_agg(pending_id), '{}') AS pendings,
                                     COALESCE(sum(held_ms), 0)::bigint AS legs_ms
                                FROM billing.hold_leg WHERE hold_leg.hold_id = hold.hold_id) AS legs"""
            )
        )
        replayed.compare_settlements(await connection.fetch("SELECT * FROM billing.settlement"))
        replayed.compare_refunds(await connection.fetch("SELECT * FROM billing.refund"))
        replayed.compare_plan_versions(await connection.fetch("SELECT * FROM billing.plan_version"))
    return replayed.findings


@dataclass(kw_only=True, slots=True)
class _Lot:
    """A lot, by the journal."""

    row: asyncpg.Record
    """What the table says: who has it, how it burns and how long it lives are nowhere else."""
    granted_ms: int = 0
    used_ms: int = 0
    held_ms: int = 0
    expired_ms: int = 0
    revoked_ms: int = 0

    @property
    def left_ms(self) -> int:
        return self.granted_ms - self.used_ms - self.held_ms - self.expired_ms - self.revoked_ms

    @property
    def burns(self) -> tuple[int, float, int]:
        expires_at = self.row["expires_at"]
        never = float("inf")
        return (
            self.row["priority"],
            never if expires_at is None else expires_at.timestamp(),
            self.row["lot_id"],
        )

    def lives(self, at: datetime) -> bool:
        expires_at = self.row["expires_at"]
        return self.row["effective_at"] <= at and (expires_at is None or at < expires_at)


@dataclass(kw_only=True, slots=True)
class _Metered:
    posted_micros: int = 0
    held_micros: int = 0


@dataclass(kw_only=True, slots=True)
class _Attempt:
    """What the journal says of an attempt."""

    job_id: UUID
    account_id: str
    dispatched_at: datetime | None = None
    """From its first pending; relax has none."""
    open: int = 0
    """Pendings that were not ended."""
    posted: int = 0
    from_lots: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    metered_ms: int = 0
    micros: int = 0
    relax_ms: int = 0
    absorbed_ms: int = 0
    given_back_ms: int = 0
    given_back_micros: int = 0

    @property
    def billed_ms(self) -> int:
        return sum(self.from_lots.values()) + self.metered_ms

    @property
    def charged(self) -> bool:
        return self.billed_ms + self.relax_ms + self.micros > 0


class _Replay:
    """The ledger as the journal tells it."""

    def __init__(self, lots: Iterable[asyncpg.Record]) -> None:
        self.findings: list[Finding] = []
        self.terms: dict[UUID, asyncpg.Record] = {}
        self.audits: dict[int, str] = {}
        self._lots = {row["lot_id"]: _Lot(row=row) for row in lots}
        self._lots_of: dict[str, list[_Lot]] = defaultdict(list)
        for lot in self._lots.values():
            self._lots_of[lot.row["account_id"]].append(lot)
        self._metered: dict[tuple[str, Any, str], _Metered] = defaultdict(_Metered)
        self._pendings: dict[int, asyncpg.Record] = {}
        self._ended: set[int] = set()
        self._attempts: dict[UUID, _Attempt] = {}
        self._charged: dict[UUID, UUID] = {}

    def apply(self, row: asyncpg.Record) -> None:
        """Take one row of the journal in."""
        if not self._is_a_movement(row):
            return
        if row["code"] in _AUDITED or row["audit_id"] is not None:
            target = self.audits.get(row["audit_id"])
            if target is None or row["account_id"] not in target.split("/"):
                self._find(23, row, "nobody says who made it and why")
        attempt = self._attempt(row)
        match row["kind"]:
            case "pending":
                self._pend(row, attempt)
            case "post":
                self._move(row, attempt, row["amount"])
            case _:
                self._end(row, attempt)

    def _is_a_movement(self, row: asyncpg.Record) -> bool:
        debit, credit = _kind_of(row["debit_account"]), _kind_of(row["credit_account"])
        in_money = row["unit"] != "gpu_ms"
        if (
            row["amount"] <= 0
            or row["debit_account"] == row["credit_account"]
            or in_money != (debit in _IN_MONEY)
            or in_money != (credit in _IN_MONEY)
        ):
            self._find(1, row, "it moves nothing, or mixes units")
            return False
        reasons = _MOVEMENTS.get((debit, credit))
        if reasons is None:
            number = 1 if row["pending_id"] is None else 5
            self._find(number, row, f"nothing moves from {debit} to {credit}")
            return False
        if row["code"] not in reasons:
            number = 13 if row["code"] == "relax" or credit == "consumed_relax" else 1
            self._find(number, row, f"{row['code']} moves nothing from {debit} to {credit}")
        if row["kind"] not in _KINDS_OF_CODES.get(row["code"], {"post"}):
            self._find(1, row, f"{row['code']} is no {row['kind']}")
            return False
        if (row["attempt_id"] is None) != (row["code"] in _OF_NO_ATTEMPT):
            self._find(1, row, "it names no attempt, or one that it cannot have")
            return False
        for name in (row["debit_account"], row["credit_account"]):
            kind, _, owner = name.partition("/")
            if kind == "lot" and (
                not owner.isdecimal() or int(owner) not in self._lots or int(owner) != row["lot_id"]
            ):
                self._find(1, row, f"there is no {name}, or the row is of another lot")
                return False
            if kind in ("metered", "subscription") and owner != row["account_id"]:
                self._find(1, row, f"{name} is another account's")
                return False
        return True

    def _attempt(self, row: asyncpg.Record) -> _Attempt | None:
        if row["attempt_id"] is None:
            return None
        attempt = self._attempts.setdefault(
            row["attempt_id"], _Attempt(job_id=row["job_id"], account_id=row["account_id"])
        )
        if (attempt.job_id, attempt.account_id) != (row["job_id"], row["account_id"]):
            number = 5 if row["pending_id"] else 16
            self._find(number, row, "its attempt is of another job or account")
        return attempt

    def _pend(self, row: asyncpg.Record, attempt: _Attempt | None) -> None:
        assert attempt is not None, "the constraint asks for an attempt with every hold"
        self._pendings[row["transfer_id"]] = row
        attempt.dispatched_at = attempt.dispatched_at or row["at"]
        attempt.open += 1
        if row["lot_id"] is None:
            self._meter(row).held_micros += row["amount"]
            self._is_within_the_cap(row)
        else:
            self._lots[row["lot_id"]].held_ms += row["amount"]
            self._lives(row, attempt)
        self._is_next(row, attempt)

    def _end(self, row: asyncpg.Record, attempt: _Attempt | None) -> None:
        pending = self._pendings.get(row["pending_id"])
        if row["pending_id"] in self._ended:
            self._find(4, row, f"pending {row['pending_id']} had ended")
            return
        if pending is None:
            self._find(5, row, f"there is no pending {row['pending_id']}")
            return
        self._ended.add(row["pending_id"])
        same = ("account_id", "job_id", "attempt_id", "debit_account", "credit_account", "unit", "lot_id")
        posts = row["kind"] == "post_pending"
        if any(row[name] != pending[name] for name in same) or (
            row["amount"] > pending["amount"] if posts else row["amount"] != pending["amount"]
        ):
            self._find(5, row, f"it is not as pending {row['pending_id']}, which it ends")
        of = self._attempts.get(pending["attempt_id"])
        if of is not None:
            of.open -= 1
        if pending["lot_id"] is None:
            self._meter(pending).held_micros -= pending["amount"]
        else:
            self._lots[pending["lot_id"]].held_ms -= pending["amount"]
        if posts:
            if of is not None:
                of.posted += 1
            self._move(row, attempt, row["amount"])

    def _move(self, row: asyncpg.Record, attempt: _Attempt | None, amount: int) -> None:
        """Move what is posted."""
        lot = None if row["lot_id"] is None else self._lots[row["lot_id"]]
        match _kind_of(row["debit_account"]), _kind_of(row["credit_account"]):
            case ("issued", "lot"):
                assert lot is not None
                lot.granted_ms += amount
            case ("lot", "revoked"):
                assert lot is not None
                lot.revoked_ms += amount
            case ("lot", "expired"):
                assert lot is not None
                lot.expired_ms += amount
            case ("lot", "consumed"):
                assert lot is not None
                assert attempt is not None
                if row["code"] == "overrun":
                    self._is_next(row, attempt)
                lot.used_ms += amount
                attempt.from_lots[lot.row["lot_id"]] += amount
                self._lives(row, attempt)
                self._charge(row)
            case ("consumed", "lot"):
                assert lot is not None
                assert attempt is not None
                lot.used_ms -= amount
                attempt.given_back_ms += amount
                attempt.from_lots[lot.row["lot_id"]] -= amount
                if attempt.from_lots[lot.row["lot_id"]] < 0:
                    self._find(11, row, "more is given back to the lot than was charged to it")
            case ("platform", "consumed"):
                assert attempt is not None
                attempt.metered_ms += amount
                self._charge(row)
            case ("consumed", "platform"):
                assert attempt is not None
                attempt.metered_ms -= amount
                attempt.given_back_ms += amount
                if attempt.metered_ms < 0:
                    self._find(11, row, "more metered time is given back than was charged")
            case ("platform", "consumed_relax"):
                assert attempt is not None
                attempt.relax_ms += amount
                if attempt.dispatched_at is not None:
                    self._find(13, row, "its attempt was dispatched in fast")
                self._charge(row)
            case ("platform", "absorbed"):
                assert attempt is not None
                attempt.absorbed_ms += amount
            case ("metered", "revenue"):
                assert attempt is not None
                attempt.micros += amount
                self._meter(row).posted_micros += amount
                self._is_within_the_cap(row)
                if row["code"] == "overrun":
                    self._is_next(row, attempt)
            case ("revenue", "metered"):
                assert attempt is not None
                attempt.micros -= amount
                attempt.given_back_micros += amount
                self._meter(row).posted_micros -= amount
                if attempt.micros < 0:
                    self._find(11, row, "more money is given back than was charged")
        if lot is not None and lot.left_ms < 0:
            self._find(3, row, f"lot {row['lot_id']} is overdrawn by {-lot.left_ms} ms")

    def _charge(self, row: asyncpg.Record) -> None:
        before = self._charged.get(row["job_id"])
        if before is None or not self._attempts[before].charged:
            self._charged[row["job_id"]] = row["attempt_id"]
        elif before != row["attempt_id"]:
            self._find(16, row, f"job {row['job_id']} is charged for attempt {before} already")

    def _lives(self, row: asyncpg.Record, attempt: _Attempt) -> None:
        lot = self._lots[row["lot_id"]]
        if attempt.dispatched_at is None or not lot.lives(attempt.dispatched_at):
            self._find(9, row, f"lot {row['lot_id']} did not live at the dispatch")
        if lot.left_ms < 0 and row["kind"] == "pending":
            self._find(3, row, f"lot {row['lot_id']} is overdrawn by {-lot.left_ms} ms")

    def _is_next(self, row: asyncpg.Record, attempt: _Attempt) -> None:
        """Ask whether every lot that burns before the one taken from, or before money, was empty."""
        at = attempt.dispatched_at
        lot_id = row["lot_id"]
        for lot in self._lots_of[row["account_id"]]:
            if (
                at is not None
                and lot.lives(at)
                and lot.left_ms > 0
                and (lot_id is None or lot.burns < self._lots[lot_id].burns)
            ):
                self._find(10, row, f"lot {lot.row['lot_id']} burns before and had {lot.left_ms} ms")

    def _meter(self, row: asyncpg.Record) -> _Metered:
        terms = self.terms.get(row["attempt_id"])
        period = None if terms is None else terms["period_start"]
        return self._metered[row["account_id"], period, row["unit"]]

    def _is_within_the_cap(self, row: asyncpg.Record) -> None:
        terms = self.terms.get(row["attempt_id"])
        if terms is None or not terms["overage_allowed"]:
            self._find(12, row, "nobody consented to be charged")
            return
        metered, cap = self._meter(row), terms["spend_cap_micros"]
        takes_more = row["kind"] in ("pending", "post")
        if takes_more and 0 < cap < metered.posted_micros + metered.held_micros:
            self._find(12, row, f"the cap was {cap}")

    def compare_lots(self) -> None:
        """Hold every lot's row against the journal."""
        for lot in self._lots.values():
            row, what = lot.row, f"lot {lot.row['lot_id']}"
            if (row["used_ms"], row["held_ms"]) != (lot.used_ms, lot.held_ms):
                self._say(2, what, f"used and held are {lot.used_ms}, {lot.held_ms}")
            amounts = lot.granted_ms, lot.expired_ms, lot.revoked_ms
            if (row["granted_ms"], row["expired_ms"], row["revoked_ms"]) != amounts:
                self._say(7, what, f"granted, expired and revoked are {amounts}")
        for account_id, lots in self._lots_of.items():
            periods = sorted(
                (lot.row["effective_at"], lot.row["expires_at"])
                for lot in lots
                if lot.row["source"] == "plan"
            )
            for (_, end), (start, _) in pairwise(periods):
                if start < end:
                    self._say(8, f"account {account_id}", f"the period before {start} ends later")

    def compare_metered(self, rows: Iterable[asyncpg.Record]) -> None:
        """Hold every metered account's row against the journal."""
        of_table = {
            (row["account_id"], row["period_start"], row["currency"]): (
                row["posted_micros"],
                row["held_micros"],
            )
            for row in rows
        }
        for key in of_table.keys() | self._metered.keys():
            metered = self._metered[key]
            if of_table.get(key, (0, 0)) != (metered.posted_micros, metered.held_micros):
                self._say(
                    2,
                    f"metered account {key[0]} of {key[1]}",
                    f"posted and held are {metered.posted_micros}, {metered.held_micros}",
                )

    def compare_holds(self, rows: Iterable[asyncpg.Record]) -> None:
        """Hold every hold and its legs against the pendings of its attempt."""
        of_holds: set[int] = set()
        for row in rows:
            pendings = set(row["pendings"])
            of_holds |= pendings
            attempt = self._attempts.get(row["attempt_id"])
            found = [self._pendings[number] for number in pendings if number in self._pendings]
            lots_ms = sum(pending["amount"] for pending in found if pending["lot_id"] is not None)
            micros = sum(pending["amount"] for pending in found if pending["lot_id"] is None)
            ended = len(pendings & self._ended)
            agrees = (
                attempt is not None
                and len(found) == len(pendings)
                and all(pending["attempt_id"] == row["attempt_id"] for pending in found)
                and (lots_ms, micros) == (row["lots_ms"], row["metered_micros"])
                and row["legs_ms"] == row["lots_ms"] + row["metered_ms"]
            )
            match row["state"]:
                case "open":
                    agrees = agrees and ended == 0 and row["ending"] is None
                case "posted":
                    agrees = agrees and ended == len(pendings) and row["ending"] == "post"
                case "voided":
                    agrees = agrees and ended == len(pendings) and row["ending"] == "void"
                    agrees = agrees and attempt is not None and attempt.posted == 0
            if not agrees:
                self._say(
                    6, f"hold of attempt {row['attempt_id']}", "its state or legs are not the journal's"
                )
        for number in self._pendings.keys() - of_holds:
            self._say(6, f"transfer {number}", "this pending belongs to no hold")

    def compare_settlements(self, rows: Iterable[asyncpg.Record]) -> None:
        """Hold every settlement against what its attempt moved, and its arithmetic."""
        settled: set[UUID] = set()
        posted: set[UUID] = set()
        for row in rows:
            what = f"attempt {row['attempt_id']}"
            settled.add(row["attempt_id"])
            attempt = self._attempts.get(row["attempt_id"])
            moved = attempt or _Attempt(job_id=row["job_id"], account_id=row["account_id"])
            fast = row["tier"] == "fast"
            if (moved.job_id, moved.account_id) != (row["job_id"], row["account_id"]):
                self._say(16, what, "the journal has it with another job or account")
            if moved.relax_ms if fast else moved.dispatched_at is not None:
                self._say(13, what, "it was settled in the other tier")
            if row["ending"] == "post" and row["job_id"] in posted:
                self._say(16, what, "its job is charged for another attempt too")
            posted |= {row["job_id"]} if row["ending"] == "post" else set()
            due = (row["measured_ms"] * row["multiplier_bp"] + 9_999) // 10_000 if fast else 0
            billed = moved.billed_ms + moved.given_back_ms
            micros = moved.micros + moved.given_back_micros
            terms = self.terms.get(row["attempt_id"])
            price = 0 if terms is None else terms["overage_micros_per_minute"]
            given_back = moved.given_back_micros or moved.given_back_ms
            if (
                (row["due_ms"], row["billed_ms"], row["amount_micros"]) != (due, billed, micros)
                or (terms is not None and row["multiplier_bp"] != terms["multiplier_bp"])
                or billed > due
                or row["absorbed_ms"] != moved.absorbed_ms
                or moved.relax_ms != (0 if fast else row["measured_ms"])
                or (not given_back and micros != (moved.metered_ms * price + 59_999) // 60_000)
                or (billed < due) != (row["unpaid_ms"] > 0)
            ):
                self._say(18, what, f"it moved {billed} ms, {micros} micros, absorbed {moved.absorbed_ms} ms")
        for attempt_id, attempt in self._attempts.items():
            if attempt_id not in settled and (attempt.posted or attempt.charged or attempt.absorbed_ms):
                self._say(18, f"attempt {attempt_id}", "it was charged and is not settled")

    def compare_refunds(self, rows: Iterable[asyncpg.Record]) -> None:
        """Hold what was given back of each attempt against its refunds."""
        told: dict[UUID, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for row in rows:
            ms, micros = told[row["attempt_id"]]
            told[row["attempt_id"]] = ms + row["refunded_ms"], micros + row["refunded_micros"]
        for attempt_id in told.keys() | self._attempts.keys():
            attempt = self._attempts.get(attempt_id)
            moved = (0, 0) if attempt is None else (attempt.given_back_ms, attempt.given_back_micros)
            if moved != told[attempt_id]:
                self._say(11, f"attempt {attempt_id}", f"{moved} was given back, not {told[attempt_id]}")

    def compare_plan_versions(self, rows: Iterable[asyncpg.Record]) -> None:
        """Ask for the audit event of every plan version."""
        for row in rows:
            if self.audits.get(row["audit_id"]) != f"plans/{row['plan']}":
                self._say(23, f"plan {row['plan']} version {row['version']}", "nobody says who made it")

    def _find(self, number: int, row: asyncpg.Record, sentence: str) -> None:
        self._say(number, f"transfer {row['transfer_id']}", sentence)

    def _say(self, number: int, what: str, sentence: str) -> None:
        self.findings.append(Finding(number=number, what=what, sentence=sentence))


def _kind_of(account: str) -> str:
    return account.partition("/")[0]
