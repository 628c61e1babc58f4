"""What plans gave, held against their versions and the deeds that put accounts on them: the auditor's part.

Like the rest of the auditor it shares nothing with the code that grants, nor with the queries of
`invariants`: each account's periods, changes of plan and deeds are gone through one after the other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import asyncpg

Finding = tuple[int, str, str]
"""Number of the invariant, what breaks it, and a sentence."""

# Which versions a period can have had, its own time cannot say to the second: the clock of who made a version
# and that of who touched the account differ, and who waits for a lock is behind. So those of the months
# beside it count too.
_BESIDE = timedelta(days=31)
_PREVIEW_HOLDS = timedelta(minutes=10)
_US = timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeriodTime:
    """What a plan gave an account for one period, by the journal, in GPU milliseconds."""

    account_id: str
    start: datetime
    end: datetime
    opened_ms: int
    """With which it began."""
    by_versions_ms: int
    """Granted since for versions at once, less what they took back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deed:
    """An audit event."""

    audit_id: int
    account_id: str
    """Empty: it is about no account."""
    action: str
    at: datetime
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    def says(self, name: str) -> int:
        """Return an amount that was noted with it, 0 if none was."""
        amount: int = self.after.get(name, 0)
        return amount


def deed(row: asyncpg.Record) -> Deed:
    """Return the deed in a row of audit_event whose JSON is read as text."""
    kind, _, account_id = row["target"].partition("/")
    return Deed(
        audit_id=row["audit_id"],
        account_id=account_id.partition("/")[0] if kind == "accounts" else "",
        action=row["action"],
        at=row["at"],
        before=json.loads(row["before"] or "{}") or {},
        after=json.loads(row["after"] or "{}") or {},
    )


def plan_findings(
    *,
    periods: Iterable[PeriodTime],
    subscriptions: Iterable[asyncpg.Record],
    versions: Iterable[asyncpg.Record],
    changes: Iterable[asyncpg.Record],
    deeds: Iterable[Deed],
) -> Iterator[Finding]:
    """Yield what does not agree. Rows are of the tables of those names, with all their columns."""
    plans = _Plans(versions)
    of_account: dict[str, list[Deed]] = defaultdict(list)
    by_audit: dict[int, Deed] = {}
    for one in sorted(deeds, key=lambda deed: deed.audit_id):
        if one.action in ("CreateAccount", "ChangePlan", "UndoPlanChange"):
            of_account[one.account_id].append(one)
            by_audit[one.audit_id] = one
    in_period: dict[tuple[str, datetime], list[asyncpg.Record]] = defaultdict(list)
    for change in sorted(changes, key=lambda change: change["change_id"]):
        in_period[change["account_id"], change["period_start"]].append(change)
    present = {row["account_id"]: row for row in subscriptions}
    seen = set()
    for period in periods:
        row, own = present.get(period.account_id), of_account[period.account_id]
        if row is None:
            yield 8, f"account {period.account_id}", "it has periods and no subscription"
            continue
        of_period = in_period[period.account_id, period.start]
        seen.add((period.account_id, period.start))
        yield from _of_a_period(plans, period, of_period, own, row)
        for change in of_period:
            if change["undoes"] is None and not plans.explain(
                change, period, by_audit.get(change["audit_id"])
            ):
                yield 8, f"change of plan {change['change_id']}", "it is not the rest of the period's share"
    for key in in_period.keys() - seen:
        if in_period[key]:
            yield 8, f"account {key[0]}", f"its plan changed in a period that it did not have, from {key[1]}"
    for account_id, row in present.items():
        if of_account[account_id] and not _is_as_done(of_account[account_id][-1], row):
            yield 23, f"account {account_id}", "nobody gave it the plan that it has, or is to have"


def _of_a_period(
    plans: _Plans,
    period: PeriodTime,
    changes: Sequence[asyncpg.Record],
    deeds: Sequence[Deed],
    subscription: asyncpg.Record,
) -> Iterator[Finding]:
    what = f"account {period.account_id}, period from {period.start}"
    begun_with = _plan_at(deeds, period.start, subscription["plan"])
    if not plans.has(begun_with, period):
        yield 8, what, f"{period.opened_ms} ms is no quota that {begun_with} had then"
    # What the plan has given, and the most that it can have: a version at once brings that up to its quota,
    # less what changes of plan lack to theirs, since they gave for the rest of the period only.
    plan, first = begun_with, plans.newest(begun_with, period.start)
    given_ms, most_ms = period.opened_ms + period.by_versions_ms, period.opened_ms
    lacks_ms: dict[int, int] = {}
    undone = False
    for change in changes:
        if change["at"] >= period.end:
            continue
        highest_ms = plans.highest_ms(plan, first, change["from_version"], period.end)
        most_ms = max(most_ms, highest_ms - sum(lacks_ms.values())) + change["granted_ms"]
        given_ms += change["granted_ms"]
        plan, first = change["to_plan"], change["to_version"]
        if change["undoes"] is None:
            raised_ms = plans.quota_ms(plan, first) - plans.quota_ms(
                change["from_plan"], change["from_version"]
            )
            lacks_ms[change["change_id"]] = raised_ms - change["granted_ms"]
        else:
            lacks_ms.pop(change["undoes"], None)
            undone = True
    is_present = subscription["period_start"] == period.start
    last = subscription["version"] if is_present else None
    if is_present:
        plan = subscription["plan"]
        # What was used of a change that is taken back counts from then on for a quota.
        quota_ms = plans.quota_ms(plan, subscription["version"])
        if not undone and given_ms < quota_ms - sum(lacks_ms.values()):
            yield 8, what, f"its plan has given {given_ms} ms, which is less than its quota"
    highest_ms = plans.highest_ms(plan, first, last, period.end)
    most_ms = max(most_ms, highest_ms - sum(lacks_ms.values()))
    if given_ms > most_ms:
        yield 8, what, f"its plan has given {given_ms} ms, and can have given {most_ms}"


def _plan_at(deeds: Sequence[Deed], start: datetime, present: str) -> str:
    """Return the plan that a period begins with."""
    plan: str | None = None
    for deed in deeds:
        if plan is None:
            plan = deed.before.get("plan", deed.after["plan"])
        if deed.at >= start:
            break
        plan = deed.after["plan"]
        if deed.action == "UndoPlanChange" and _counted_at_once(deed):
            plan = deed.before["scheduled_plan"] or plan
    return plan or present


def _is_as_done(last: Deed, subscription: asyncpg.Record) -> bool:
    """Whether an account has, and is to have, the plan that its last deed gave it."""
    plan, to_be = last.after["plan"], None
    if last.action == "UndoPlanChange" and _counted_at_once(last):
        scheduled = last.before["scheduled_plan"]
        if last.at < subscription["period_start"]:
            plan = scheduled or plan
        elif scheduled != plan:
            to_be = scheduled
    elif (
        last.action != "CreateAccount"
        and datetime.fromisoformat(last.after["effective_at"]) >= subscription["period_end"]
    ):
        plan, to_be = last.before["plan"], plan
    ended = subscription["ended_at"] is not None
    return (subscription["plan"], subscription["scheduled_plan"]) == (plan, None if ended else to_be)


def _counted_at_once(deed: Deed) -> bool:
    return datetime.fromisoformat(deed.after["effective_at"]) == deed.at


class _Plans:
    """The versions of all plans."""

    def __init__(self, rows: Iterable[asyncpg.Record]) -> None:
        self._of: dict[str, dict[int, asyncpg.Record]] = defaultdict(dict)
        for row in rows:
            self._of[row["plan"]][row["version"]] = row

    def quota_ms(self, plan: str, version: int) -> int:
        quota_ms: int = self._of[plan][version]["quota_ms"]
        return quota_ms

    def newest(self, plan: str, start: datetime) -> int:
        """Return the number of the version that surely was there at `start`, or 1."""
        return max(
            (number for number, row in self._of[plan].items() if row["created_at"] < start - _BESIDE),
            default=1,
        )

    def has(self, plan: str, period: PeriodTime) -> bool:
        """Whether a period could begin with what it did."""
        return any(
            row["quota_ms"] == period.opened_ms
            for row in self._between(plan, self.newest(plan, period.start), None, period.end)
        )

    def highest_ms(self, plan: str, first: int, last: int | None, end: datetime) -> int:
        """Return the largest quota of the versions `first` to `last`, or to the end of a period."""
        return max((row["quota_ms"] for row in self._between(plan, first, last, end)), default=0)

    def explain(self, change: asyncpg.Record, period: PeriodTime, deed: Deed | None) -> bool:
        """Whether a change of plan at once gave and cost what falls to the rest of the period."""
        if deed is None or "effective_at" not in deed.after:
            return False
        shown_at = datetime.fromisoformat(deed.after["effective_at"])
        old = self._of[change["from_plan"]][change["from_version"]]
        new = self._of[change["to_plan"]][change["to_version"]]
        left, whole = (period.end - shown_at) // _US, (period.end - period.start) // _US

        def rest(amount: int) -> int:
            return (amount * left + whole - 1) // whole

        was_shown: bool = change["at"] - _PREVIEW_HOLDS <= shown_at <= change["at"]
        return was_shown and (change["granted_ms"], -change["credit_micros"], change["charge_micros"]) == (
            rest(new["quota_ms"] - old["quota_ms"]),
            rest(old["price_micros"]),
            rest(new["price_micros"]),
        )

    def _between(self, plan: str, first: int, last: int | None, end: datetime) -> Iterator[asyncpg.Record]:
        for number, row in self._of[plan].items():
            if number >= first and (last is None or number <= last) and row["created_at"] < end + _BESIDE:
                yield row
