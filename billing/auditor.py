"""A second opinion on the ledger: the journal replayed from its first row, in Python, by rules of its own.

It shares nothing with the code that wrote the journal, nor with the queries of `invariants`: lots, metered
accounts, pendings and attempts are built again from nothing but the rows of `transfer`, in the order of their
numbers, and then held against what the other tables say. Findings bear the numbers of the invariants.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any
from uuid import UUID

import asyncpg

from billing.invariants import one_moment
from billing.plan_auditor import Deed, PeriodTime, deed, plan_findings

# Of a cursor's round trip; all rows at once would be all in memory.
_ROWS_AT_ONCE = 500

# Who may pay whom, by the kind of account, why, and in which of the two units.
_MOVEMENTS = {
    ("issued", "lot"): {"period", "rollover", "plan_change", "admin", "promo", "purchase", "refund"},
    ("lot", "revoked"): {"plan_change", "plan_undo", "admin"},
    ("lot", "expired"): {"rollover", "expiry", "refund"},
    ("lot", "consumed"): {"hold", "hold_expiry", "settle", "overrun", "refund_undo"},
    ("consumed", "lot"): {"refund"},
    ("platform", "consumed"): {"metered_time", "refund_undo"},
    ("consumed", "platform"): {"refund"},
    ("platform", "consumed_relax"): {"relax"},
    ("platform", "absorbed"): {"absorbed"},
    ("metered", "revenue"): {"hold", "hold_expiry", "settle", "overrun", "refund_undo"},
    ("revenue", "metered"): {"refund"},
    ("subscription", "revenue"): {"plan_change", "plan_undo"},
    ("revenue", "subscription"): {"plan_change", "plan_undo"},
}
_IN_MONEY = {"metered", "revenue", "subscription"}
_KINDS_OF_CODES = {
    "hold": {"pending"},
    "hold_expiry": {"expire_pending"},
    "settle": {"post_pending", "void_pending"},
}
_OF_NO_ATTEMPT = {"period", "rollover", "expiry", "plan_change", "plan_undo", "admin", "promo", "purchase"}
_REASONS = {"plan": "period", "proration": "plan_change"}
"""Why a lot is issued, by its source; of the other sources it is their own name."""
_AUDITED = {"plan_undo", "admin", "promo", "purchase", "refund", "refund_undo"}


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

    It takes one to two minutes of a core for a million rows, and memory for every lot and attempt: not for an
    event loop that has others waiting. A caller may end it with a timeout of its own.
    """
    async with one_moment(connection):
        replayed = _Replay(await connection.fetch("SELECT * FROM billing.grant_lot"))
        for hold in await connection.fetch(
            """SELECT attempt_id, period_start, overage_allowed, spend_cap_micros, overage_micros_per_minute,
                      currency, multiplier_bp
                 FROM billing.hold"""
        ):
            replayed.terms[hold["attempt_id"]] = hold
        deeds: list[Deed] = []
        for row in await connection.fetch(
            """SELECT audit_id, target, action, at, before::text AS before, after::text AS after
                 FROM billing.audit_event"""
        ):
            replayed.audits[row["audit_id"]] = row["target"]
            deeds.append(deed(row))
        replayed.unpaid = {
            row["attempt_id"]
            for row in await connection.fetch(
                "SELECT attempt_id FROM billing.settlement WHERE billed_ms < due_ms"
            )
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
        replayed.compare_refunds(
            await connection.fetch("SELECT * FROM billing.refund"),
            await connection.fetch("SELECT * FROM billing.refund_undo"),
        )
        changes = await connection.fetch("SELECT * FROM billing.plan_change")
        versions = await connection.fetch("SELECT * FROM billing.plan_version")
        replayed.compare_plan_changes(changes)
        replayed.compare_plan_versions(versions)
        replayed.compare_rollover(versions)
        replayed.compare_deeds(deeds)
        for number, what, sentence in plan_findings(
            periods=replayed.periods(),
            subscriptions=await connection.fetch("SELECT * FROM billing.subscription"),
            versions=versions,
            changes=changes,
            deeds=deeds,
        ):
            replayed.findings.append(Finding(number=number, what=what, sentence=sentence))
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
    issued: bool = False
    """Its time came into it."""

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
    metered_back_ms: int = 0
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


@dataclass(kw_only=True, slots=True)
class _PlanChange:
    """What the journal says of a change of plan, or of one that takes another back."""

    granted_ms: int = 0
    credit_micros: int = 0
    charge_micros: int = 0


@dataclass(kw_only=True, slots=True)
class _Moved:
    """What was moved for one audit event."""

    ms: int = 0
    """Granted, less what was revoked."""
    given_back_ms: int = 0
    given_back_micros: int = 0
    charged_micros: int = 0
    ended_ms: int = 0
    """Given back to lots that had ended."""
    anew_ms: int = 0
    """Granted in their place."""
    of_lots: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """By a refund: what it left in each lot; by what takes one back, negative."""


class _Replay:
    """The ledger as the journal tells it."""

    def __init__(self, lots: Iterable[asyncpg.Record]) -> None:
        self.findings: list[Finding] = []
        self.terms: dict[UUID, asyncpg.Record] = {}
        self.audits: dict[int, str] = {}
        self.unpaid: set[UUID] = set()
        """Attempts of which less was billed than was due."""
        self._lots = {row["lot_id"]: _Lot(row=row) for row in lots}
        self._lots_of: dict[str, list[_Lot]] = defaultdict(list)
        for lot in self._lots.values():
            self._lots_of[lot.row["account_id"]].append(lot)
        self._metered: dict[tuple[str, Any, str], _Metered] = defaultdict(_Metered)
        self._pendings: dict[int, asyncpg.Record] = {}
        self._ended: dict[int, str] = {}
        """How each pending that has ended did."""
        self._attempts: dict[UUID, _Attempt] = {}
        self._charged: dict[UUID, UUID] = {}
        self._plan_changes: dict[int, _PlanChange] = defaultdict(_PlanChange)
        """By audit event."""
        self._moved: dict[int, _Moved] = defaultdict(_Moved)
        """By audit event."""
        self._by_versions_ms: dict[tuple[str, datetime], int] = defaultdict(int)
        """By account and start of the period."""
        self._rolled_ms: dict[tuple[str, datetime], list[int]] = defaultdict(lambda: [0, 0])
        """Out of the lots that ended at a time, and into those that began then, by account and that time."""

    def apply(self, row: asyncpg.Record) -> None:
        """Take one row of the journal in."""
        if not self._is_a_movement(row):
            return
        paid_for = "subscription" in (_kind_of(row["debit_account"]), _kind_of(row["credit_account"]))
        if row["code"] in _AUDITED or paid_for or row["audit_id"] is not None:
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
        self._ended[row["pending_id"]] = row["kind"]
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
        if row["code"] in ("plan_change", "plan_undo") and row["audit_id"] is not None:
            self._change_plan(row, self._plan_changes[row["audit_id"]])
        if row["audit_id"] is not None:
            _add(row, self._moved[row["audit_id"]])
        lot = None if row["lot_id"] is None else self._lots[row["lot_id"]]
        match _kind_of(row["debit_account"]), _kind_of(row["credit_account"]):
            case ("issued", "lot"):
                assert lot is not None
                self._issue(row, lot)
                lot.granted_ms += amount
            case ("lot", "revoked"):
                assert lot is not None
                lot.revoked_ms += amount
                if row["code"] == "plan_change" and row["audit_id"] is None:
                    self._by_versions_ms[row["account_id"], lot.row["effective_at"]] -= amount
            case ("lot", "expired"):
                assert lot is not None
                lot.expired_ms += amount
                if row["code"] == "rollover":
                    self._rolled_ms[row["account_id"], lot.row["expires_at"]][0] += amount
            case (_, _) if row["code"] == "refund_undo":
                assert attempt is not None
                self._take_back(row, attempt, lot)
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
                attempt.metered_back_ms += amount
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
                if row["attempt_id"] in self.unpaid:
                    self._is_next(row, attempt)
                    self._cannot_be_metered(row, attempt)
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

    def _take_back(self, row: asyncpg.Record, attempt: _Attempt, lot: _Lot | None) -> None:
        """Charge again what a refund had given back."""
        amount = row["amount"]
        if row["credit_account"] == "revenue":
            attempt.micros += amount
            attempt.given_back_micros -= amount
            self._meter(row).posted_micros += amount
            return
        attempt.given_back_ms -= amount
        if lot is None:
            attempt.metered_ms += amount
            attempt.metered_back_ms -= amount
        else:
            lot.used_ms += amount
            attempt.from_lots[lot.row["lot_id"]] += amount
            if not lot.lives(row["at"]):
                self._find(9, row, f"lot {row['lot_id']} did not live when this was taken back")
        self._charge(row)

    def _issue(self, row: asyncpg.Record, lot: _Lot) -> None:
        source = lot.row["source"]
        if lot.issued or row["code"] != _REASONS.get(source, source):
            self._find(7, row, f"it is not the one {source} that lot {row['lot_id']} is made of")
        lot.issued = True
        start = lot.row["effective_at"]
        if row["code"] == "rollover":
            self._rolled_ms[row["account_id"], start][1] += row["amount"]
        elif row["code"] == "plan_change" and row["audit_id"] is None:
            self._by_versions_ms[row["account_id"], start] += row["amount"]

    def _change_plan(self, row: asyncpg.Record, change: _PlanChange) -> None:
        match _kind_of(row["debit_account"]), _kind_of(row["credit_account"]):
            case ("issued", "lot"):
                change.granted_ms += row["amount"]
            case ("lot", "revoked"):
                change.granted_ms -= row["amount"]
            case ("revenue", "subscription"):
                change.credit_micros -= row["amount"]
            case ("subscription", "revenue"):
                change.charge_micros += row["amount"]

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

    def _cannot_be_metered(self, row: asyncpg.Record, attempt: _Attempt) -> None:
        terms = self.terms.get(row["attempt_id"])
        if terms is None or not terms["overage_allowed"]:
            return
        price, cap = terms["overage_micros_per_minute"], terms["spend_cap_micros"]
        metered = self._metered[row["account_id"], terms["period_start"], terms["currency"]]
        one_more_micros = _price(attempt.metered_ms + 1, price) - _price(attempt.metered_ms, price)
        if not cap or metered.posted_micros + metered.held_micros + one_more_micros <= cap:
            self._find(18, row, "its account had agreed to be charged for this, and the cap was not reached")

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
            ends = [self._ended[number] for number in pendings if number in self._ended]
            expired = ends.count("expire_pending")
            agrees = (
                attempt is not None
                and len(found) == len(pendings)
                and all(pending["attempt_id"] == row["attempt_id"] for pending in found)
                and (lots_ms, micros) == (row["lots_ms"], row["metered_micros"])
                and row["legs_ms"] == row["lots_ms"] + row["metered_ms"]
            )
            match row["state"]:
                case "open":
                    agrees = agrees and not ends and row["ending"] is None
                case "expired":
                    agrees = agrees and expired == len(pendings)
                case "posted":
                    agrees = agrees and len(ends) == len(pendings) and row["ending"] == "post"
                    agrees = agrees and expired == 0
                case "voided":
                    agrees = agrees and ends.count("void_pending") == len(pendings)
                    agrees = agrees and row["ending"] == "void"
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
            if (
                (row["due_ms"], row["billed_ms"], row["amount_micros"]) != (due, billed, micros)
                or (terms is not None and row["multiplier_bp"] != terms["multiplier_bp"])
                or billed > due
                or row["absorbed_ms"] != moved.absorbed_ms
                or moved.relax_ms != (0 if fast else row["measured_ms"])
                or micros != _price(moved.metered_ms + moved.metered_back_ms, price)
                or (billed < due) != (row["unpaid_ms"] > 0)
            ):
                self._say(18, what, f"it moved {billed} ms, {micros} micros, absorbed {moved.absorbed_ms} ms")
        for attempt_id, attempt in self._attempts.items():
            if attempt_id not in settled and (attempt.posted or attempt.charged or attempt.absorbed_ms):
                self._say(18, f"attempt {attempt_id}", "it was charged and is not settled")

    def compare_refunds(self, rows: Iterable[asyncpg.Record], undos: Iterable[asyncpg.Record]) -> None:
        """Hold what was given back of each attempt against its refunds, and what took these back."""
        refunds = {row["refund_id"]: row for row in rows}
        undone = {row["refund_id"]: row for row in undos}
        told: dict[UUID, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for refund_id, row in refunds.items():
            ms, micros = row["refunded_ms"], row["refunded_micros"]
            undo = undone.get(refund_id)
            if undo is not None:
                self._compare_refund_undo(row, undo)
                ms, micros = ms - undo["taken_ms"], micros - undo["taken_micros"]
            of_ms, of_micros = told[row["attempt_id"]]
            told[row["attempt_id"]] = of_ms + ms, of_micros + micros
        for refund_id in undone.keys() - refunds.keys():
            self._say(11, f"refund {refund_id}", "it was taken back, and there is none")
        for attempt_id in told.keys() | self._attempts.keys():
            attempt = self._attempts.get(attempt_id)
            moved = (0, 0) if attempt is None else (attempt.given_back_ms, attempt.given_back_micros)
            if moved != told[attempt_id]:
                self._say(11, f"attempt {attempt_id}", f"{moved} was given back, not {told[attempt_id]}")

    def _compare_refund_undo(self, refund: asyncpg.Record, undo: asyncpg.Record) -> None:
        gave, took = self._moved[refund["audit_id"]], self._moved[undo["audit_id"]]
        as_said = (-took.given_back_ms, took.charged_micros) == (undo["taken_ms"], undo["taken_micros"])
        within = undo["taken_ms"] <= refund["refunded_ms"] and all(
            -ms <= gave.of_lots[lot_id] for lot_id, ms in took.of_lots.items()
        )
        all_money = undo["taken_micros"] == refund["refunded_micros"]
        if not (as_said and within and all_money and undo["account_id"] == refund["account_id"]):
            self._say(11, f"refund {refund['refund_id']}", f"{took} took it back, of {gave}")

    def compare_plan_changes(self, rows: Iterable[asyncpg.Record]) -> None:
        """Hold changes of plan against what they moved, and what took them back against them."""
        told = {row["change_id"]: row for row in rows}
        undone: set[int] = set()
        for row in told.values():
            what = f"change of plan {row['change_id']}"
            moved = self._plan_changes.pop(row["audit_id"], _PlanChange())
            if (row["granted_ms"], row["credit_micros"], row["charge_micros"]) != (
                moved.granted_ms,
                moved.credit_micros,
                moved.charge_micros,
            ):
                self._say(11, what, f"it moved {moved}")
            if row["undoes"] is None:
                continue
            of = told.get(row["undoes"])
            if (
                of is None
                or of["undoes"] is not None
                or row["undoes"] in undone
                or (row["account_id"], row["currency"]) != (of["account_id"], of["currency"])
                or (row["credit_micros"], row["charge_micros"])
                != (-of["charge_micros"], -of["credit_micros"])
            ):
                self._say(11, what, f"it is not what takes change {row['undoes']} back, once")
            undone.add(row["undoes"])
        for audit_id in self._plan_changes:
            self._say(11, f"audit event {audit_id}", "it moved time or money and is no change of plan")

    def compare_plan_versions(self, rows: Iterable[asyncpg.Record]) -> None:
        """Ask for the audit event of every plan version."""
        for row in rows:
            if self.audits.get(row["audit_id"]) != f"plans/{row['plan']}":
                self._say(23, f"plan {row['plan']} version {row['version']}", "nobody says who made it")

    def compare_rollover(self, versions: Iterable[asyncpg.Record]) -> None:
        """Ask where every rollover came from."""
        ended = {
            (lot.row["account_id"], lot.row["expires_at"])
            for lot in self._lots.values()
            if lot.row["source"] == "plan"
        }
        # What a period leaves of which nothing was ever granted, because nobody touched the account in it.
        untouched = {min(row["rollover_ms"], row["quota_ms"]) for row in versions}
        for key, (gone_ms, came_ms) in self._rolled_ms.items():
            if gone_ms != came_ms and (gone_ms or key in ended or came_ms not in untouched):
                self._say(7, f"account {key[0]}", f"{gone_ms} ms rolled over, and {came_ms} came of it")

    def compare_deeds(self, deeds: Iterable[Deed]) -> None:
        """Hold what admins and accounts did against what was moved for it."""
        for one in deeds:
            moved = self._moved[one.audit_id]
            what = f"audit event {one.audit_id}"
            said = 0, 0, 0, 0
            match one.action:
                case "AdjustBalance":
                    said = one.says("amount_ms"), 0, 0, 0
                case "RefundJob":
                    said = 0, one.says("amount_ms"), one.says("amount_micros"), 0
                case "UndoRefund":
                    said = 0, -one.says("amount_ms"), 0, one.says("amount_micros")
                case "ChangePlan":
                    said = one.says("granted_ms"), 0, -one.says("credit_micros"), one.says("charge_micros")
                case "UndoPlanChange":
                    # The two sides of its money are held against the change that it takes back.
                    back_micros = moved.given_back_micros
                    charged_micros = back_micros + one.says("amount_micros")
                    said = -one.says("revoked_ms"), 0, back_micros, charged_micros
            if said != (moved.ms, moved.given_back_ms, moved.given_back_micros, moved.charged_micros):
                self._say(23, what, f"it says {said}, and {moved} was moved for it")
            if moved.ended_ms != moved.anew_ms:
                self._say(11, what, f"{moved.anew_ms} ms was granted for {moved.ended_ms} ms that had ended")

    def periods(self) -> Iterator[PeriodTime]:
        """Yield what plans gave for every period."""
        for lot in self._lots.values():
            row = lot.row
            if row["source"] == "plan":
                key = row["account_id"], row["effective_at"]
                yield PeriodTime(
                    account_id=row["account_id"],
                    start=row["effective_at"],
                    end=row["expires_at"],
                    opened_ms=lot.granted_ms,
                    by_versions_ms=self._by_versions_ms.get(key, 0),
                )

    def _find(self, number: int, row: asyncpg.Record, sentence: str) -> None:
        self._say(number, f"transfer {row['transfer_id']}", sentence)

    def _say(self, number: int, what: str, sentence: str) -> None:
        self.findings.append(Finding(number=number, what=what, sentence=sentence))


def _kind_of(account: str) -> str:
    return account.partition("/")[0]


def _price(ms: int, micros_per_minute: int) -> int:
    return (ms * micros_per_minute + 59_999) // 60_000


def _add(row: asyncpg.Record, moved: _Moved) -> None:
    """Add a row to what was moved for its audit event."""
    amount, anew = row["amount"], row["code"] == "refund"
    if row["lot_id"] is not None and row["code"] in ("refund", "refund_undo"):
        left = _kind_of(row["credit_account"]) == "lot"
        moved.of_lots[row["lot_id"]] += amount if left else -amount
    match _kind_of(row["debit_account"]), _kind_of(row["credit_account"]):
        case ("issued", "lot") if anew:
            moved.anew_ms += amount
        case ("issued", "lot"):
            moved.ms += amount
        case ("lot", "revoked"):
            moved.ms -= amount
        case ("lot", "expired"):
            moved.ended_ms += amount
        case ("consumed", _):
            moved.given_back_ms += amount
        case (_, "consumed"):
            moved.given_back_ms -= amount
        case ("revenue", _):
            moved.given_back_micros += amount
        case (_, "revenue"):
            moved.charged_micros += amount
