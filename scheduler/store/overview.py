"""What operators see at a glance: who waits, and what was decided lately. No prompts, no pictures.

The decisions are read from the journal, newest first; why a job was chosen is in its attempt's row.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from scheduler.policy.events import RefusedBecause
from scheduler.policy.ids import Tier
from scheduler.store.pool import Connection

# Jobs that come and end are lines too: a burst of those must not cost a walk over the whole journal.
_LINES_LOOKED_AT = 5_000


@dataclass(frozen=True, kw_only=True)
class WaitingAccount:
    """The jobs of one account that wait in one tier."""

    account_id: str
    tier: Tier
    jobs: int
    oldest_job_id: str
    oldest_at: datetime
    """When that was accepted."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Who waits."""

    accounts: Sequence[WaitingAccount]
    """Those that wait longest first."""
    left_out: int
    """Accounts, counted once in each tier, that wait too and were not asked for."""


class Decided(StrEnum):
    """What was decided about a job, by the journal's names."""

    STARTED = "Dispatch"
    PARKED = "AttemptParked"
    RESUMED = "AttemptResumed"
    MIGRATED = "AttemptMigrated"
    LOST = "AttemptLost"
    REFUSED = "StartRefused"
    GIVEN_UP = "JobGivenUp"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One decision, as it came true."""

    line: str
    """Of the journal: no two have the same."""
    at: datetime
    what: Decided
    job_id: str
    account_id: str
    tier: Tier
    worker_id: str
    """Empty where none is concerned."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class AttemptMade:
    """One try at a job, and why it was made there and then."""

    number: int
    worker_id: str
    state: str
    started_at: datetime
    ended_at: datetime | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class JobMet:
    """What operators may know of a job."""

    job_id: str
    account_id: str
    tier: Tier
    state: str
    created_at: datetime
    failure: str
    """Why it failed; empty if it did not."""
    attempts: Sequence[AttemptMade]


async def waiting(connection: Connection, limit: int) -> Waiting:
    """Return up to `limit` accounts whose jobs wait, for each tier of its own, those that wait longest first.

    Walks over all that waits: a tenth of a second for 300,000 jobs on two cores.
    """
    rows = await connection.fetch(
        """WITH waiting AS (
               SELECT account_id, tier, count(*) AS jobs, min(arrival) AS arrival, count(*) OVER () AS lines
               FROM scheduler.job WHERE state = 'queued' AND NOT past
               GROUP BY account_id, tier ORDER BY min(arrival) LIMIT $1)
           SELECT waiting.account_id, waiting.tier, jobs, lines, job_id, created_at
           FROM waiting JOIN scheduler.job ON job.account_id = waiting.account_id
                AND job.arrival = waiting.arrival AND NOT past
           ORDER BY waiting.arrival""",
        limit,
    )
    accounts = [
        WaitingAccount(
            account_id=row["account_id"],
            tier=Tier(row["tier"]),
            jobs=row["jobs"],
            oldest_job_id=str(row["job_id"]),
            oldest_at=row["created_at"],
        )
        for row in rows
    ]
    return Waiting(accounts=accounts, left_out=max(0, rows[0]["lines"] - limit) if rows else 0)


async def decisions(connection: Connection, limit: int) -> Sequence[Decision]:
    """Return up to `limit` of the newest decisions, the newest first.

    The journal is written about once a second; its newest few thousand lines are looked at.
    """
    rows = await connection.fetch(
        """SELECT epoch, number, at, kind, subject, facts FROM (
               SELECT * FROM scheduler.journal ORDER BY epoch DESC, number DESC LIMIT $1) AS newest
           WHERE kind = ANY($2) ORDER BY epoch DESC, number DESC LIMIT $3""",
        _LINES_LOOKED_AT,
        list(Decided),
        limit,
    )
    subjects = [uuid.UUID(row["subject"]) for row in rows]
    attempts = await _attempts(connection, subjects)
    jobs = await _jobs(connection, subjects + [attempt["job_id"] for attempt in attempts.values()])
    found = []
    for row, subject in zip(rows, subjects, strict=True):
        attempt = attempts.get(subject)
        job = jobs.get(subject if attempt is None else attempt["job_id"])
        if job is None:
            continue  # of a database that was restored: its journal may know more than its rows
        what = Decided(row["kind"])
        found.append(
            Decision(
                line=f"{row['epoch']}-{row['number']}",
                at=row["at"],
                what=what,
                job_id=str(job["job_id"]),
                account_id=job["account_id"],
                tier=Tier(job["tier"]),
                worker_id="" if attempt is None else attempt["worker_id"],
                reason=_reason(what, json.loads(row["facts"]), attempt),
            )
        )
    return found


async def job(connection: Connection, job_id: uuid.UUID) -> JobMet | None:
    """Return a job with its attempts, None if there is none of that id."""
    row = (await _jobs(connection, [job_id])).get(job_id)
    if row is None:
        return None
    attempts = await connection.fetch(
        """SELECT number, worker_id, state, started_at, ended_at, decision ->> 'reason' AS reason
           FROM scheduler.attempt WHERE job_id = $1 ORDER BY number""",
        job_id,
    )
    return JobMet(
        job_id=str(job_id),
        account_id=row["account_id"],
        tier=Tier(row["tier"]),
        state=row["state"],
        created_at=row["created_at"],
        failure=row["failure_sentence"] or "",
        attempts=[AttemptMade(**{**attempt, "reason": attempt["reason"] or ""}) for attempt in attempts],
    )


async def _attempts(connection: Connection, ids: Sequence[uuid.UUID]) -> Mapping[uuid.UUID, Any]:
    rows = await connection.fetch(
        """SELECT attempt_id, job_id, worker_id, decision ->> 'reason' AS reason
           FROM scheduler.attempt WHERE attempt_id = ANY($1)""",
        ids,
    )
    return {row["attempt_id"]: row for row in rows}


async def _jobs(connection: Connection, ids: Sequence[uuid.UUID]) -> Mapping[uuid.UUID, Any]:
    rows = await connection.fetch(
        """SELECT job_id, account_id, tier, state, created_at, failure_sentence
           FROM scheduler.job WHERE job_id = ANY($1)""",
        ids,
    )
    return {row["job_id"]: row for row in rows}


_REFUSED = {
    RefusedBecause.GONE: "Its owner had cancelled it meanwhile.",
    RefusedBecause.FUNDS: "Its account had no fast time left.",
    RefusedBecause.MOVED: "Its owner had moved it to the other tier meanwhile.",
}


def _reason(what: Decided, facts: Mapping[str, Any], attempt: Mapping[str, Any] | None) -> str:
    match what:
        case Decided.STARTED | Decided.MIGRATED:
            return "" if attempt is None else attempt["reason"] or ""
        case Decided.PARKED:
            return "A fast job took its GPU; it keeps its place there, and no step is done twice."
        case Decided.RESUMED:
            return "Its GPU was free again."
        case Decided.LOST if facts["executed"]:
            return "Its worker was lost. It waits again at its old place, and nothing is charged."
        case Decided.LOST:
            return "It was handed over, or never begun. It waits again at its old place."
        case Decided.REFUSED:
            return _REFUSED[RefusedBecause(facts["reason"])]
        case Decided.GIVEN_UP:
            return "It could not be done, and failed."
