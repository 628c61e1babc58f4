"""The journal of what the board was told, as rows, and a period of it as an auditor reads it.

The loop takes every event down and writes them about once a second; while one write does not take
them all, in every cycle. A line holds the whole event, so that a period can be audited long after its jobs
were deleted.
"""

from __future__ import annotations

import asyncio
import json
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple

import asyncpg
import structlog

from scheduler.clock import from_ms, to_ms
from scheduler.policy.auditing.journal import (
    OF_NO_CONCERN,
    AccountMet,
    CellMet,
    Dispatch,
    Journal,
    Record,
    Recorder,
)
from scheduler.policy.decisions import Decision
from scheduler.policy.events import (
    AccountRestored,
    AttemptDrawn,
    AttemptFinished,
    AttemptLost,
    AttemptMigrated,
    AttemptParked,
    AttemptRestored,
    AttemptResumed,
    CancelWanted,
    CellRestored,
    Event,
    FundsChanged,
    JobGivenUp,
    JobSubmitted,
    LimitsChanged,
    MemoryOutgrown,
    RefusedBecause,
    StartRefused,
    TierChanged,
    TierPaused,
    TierResumed,
    WaitingRestored,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerResumed,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.store.leadership import require_leader

_log = structlog.get_logger()

# Encoding one takes about 10 us, and nothing else is decided meanwhile.
_MOST_LINES = 500
# Twice what a recovery of a million live jobs takes down, and about a gigabyte. Beyond it the database has
# been too slow for minutes, and a scheduler that runs out of memory decides nothing at all.
_MOST_KEPT = 2_000_000
# A month of lines at once would take minutes, and nothing else is decided meanwhile.
_MOST_FORGOTTEN = 5_000
# No event: in the place of those that were dropped. The space keeps it apart from every id.
_GAP = "lines lost"

GRACE_MS = 2_000
"""From a fact to the row of what was decided for it: a cycle and its commit, on a busy database."""

_OF_THE_CELL = (WorkerJoined, WorkerLost, WorkerDraining, WorkerResumed, TierPaused, TierResumed)
_KINDS: Mapping[str, type[Any]] = {kind.__name__: kind for kind in (*typing.get_args(Event), Dispatch)}


@dataclass(frozen=True, kw_only=True)
class Line:
    """An event, ready to be written."""

    number: int
    at_ms: int
    kind: str
    subject: str
    facts: str
    """JSON."""


class Notes:
    """What the board of one leader was told and is not written yet; of more than `most`, the newest."""

    def __init__(self, most: int = _MOST_KEPT) -> None:
        self._most = most
        self._recorder = Recorder()
        self._records: deque[_Noted] = deque()
        self._put_off: dict[AccountId, _PutOff] = {}
        """What waited when this scheduler took over, of accounts of which nothing else was told so far."""
        self._lines_put_off = 0
        self._number = 0
        self._behind = False

    def decided(self, decisions: Iterable[Decision]) -> None:
        """Remember by what numbers jobs were chosen."""
        self._recorder.decided(decisions)

    def note(self, event: Event, whose: AccountId | None = None) -> None:
        """Take an event down, and what was put off of that account before it.

        `whose`: the account of the job that it is about, where it says only which job. What says only which
        attempt comes behind the start of that.
        """
        if self._put_off and not isinstance(event, OF_NO_CONCERN):
            job: Job | None = getattr(event, "job", None)
            account_id = getattr(event, "account_id", whose) if job is None else job.account_id
            if account_id in self._put_off:
                self._records += self._taken_up(account_id)
        self._recorder.note(event)

    def put_off(self, events: Sequence[Event]) -> None:
        """Take down all that was restored of one account and waits, to be written when there is time.

        Its lines alone may be a million. They are written before anything else that is told of the account.
        """
        if not events:
            return
        self._take_down()
        *standing, restored = events
        assert isinstance(restored, WaitingRestored)
        put_off = self._put_off[restored.account_id] = _PutOff(self._number + 1, standing, restored)
        self._number += put_off.lines
        self._lines_put_off += put_off.lines

    @property
    def behind(self) -> bool:
        """Whether `lines` left some for the next time."""
        return self._behind

    def lines(self, *, without_waiting: bool = False) -> Sequence[Line]:
        """Return the next lines that were taken down and not returned so far.

        `without_waiting`: what was put off stays so, but for accounts of which something else was told. It is
        the numbers that order the lines, not when they are written.
        """
        self._take_down()
        lines: list[Line] = []
        too_many = len(self._records) + self._lines_put_off - self._most
        if too_many > 0:
            lines.append(self._gap(too_many))
        while self._put_off and not without_waiting and len(self._records) < _MOST_LINES:
            self._records += self._taken_up(next(reversed(self._put_off)))
        noted = [self._records.popleft() for _ in range(min(len(self._records), _MOST_LINES))]
        self._behind = bool(self._records) or (bool(self._put_off) and not without_waiting)
        for number, record in noted:
            facts = json.dumps(_fields(record), default=_plain)
            lines.append(
                Line(
                    number=number,
                    at_ms=record.at_ms,
                    kind=type(record).__name__,
                    subject=_subject(record),
                    facts=facts,
                )
            )
        return lines

    def _take_down(self) -> None:
        for record in self._recorder.take():
            self._number += 1
            self._records.append(_Noted(self._number, record))

    def _taken_up(self, account_id: AccountId) -> list[_Noted]:
        """Take what was put off of an account out."""
        put_off = self._put_off.pop(account_id)
        self._lines_put_off -= put_off.lines
        return [_Noted(number, event) for number, event in enumerate(put_off.events(), put_off.first_number)]

    def _gap(self, too_many: int) -> Line:
        """Drop at least so many records, what was put off first and then the oldest, and return the line that
        says so."""
        dropped: list[_Noted] = []
        while len(dropped) < too_many and self._put_off:
            dropped += self._taken_up(next(reversed(self._put_off)))
        dropped += [self._records.popleft() for _ in range(too_many - len(dropped))]
        began_ms = min(noted.record.at_ms for noted in dropped)
        until_ms = max(noted.record.at_ms for noted in dropped)
        _log.error("journal lines lost", lines=len(dropped), from_ms=began_ms, until_ms=until_ms)
        facts = {"lines": len(dropped), "from_ms": began_ms, "until_ms": until_ms}
        return Line(
            number=dropped[-1].number, at_ms=until_ms, kind=_GAP, subject=_GAP, facts=json.dumps(facts)
        )


class _PutOff(NamedTuple):
    """All that was restored of an account of which nothing ran. A tuple, since there may be 200,000."""

    first_number: int
    standing: Sequence[Event]
    restored: WaitingRestored

    @property
    def lines(self) -> int:
        return len(self.standing) + len(self.restored.jobs)

    def events(self) -> list[Event]:
        """Return what gets a line each: what happened to a job is found by its id."""
        return [*self.standing, *self.restored.submitted()]


class _Noted(NamedTuple):
    number: int
    record: Record


async def write(connection: asyncpg.Connection, *, epoch: int, lines: Sequence[Line]) -> None:
    """Write lines; those that are there already, because an answer was lost, stay. Raises Deposed."""
    if not lines:
        return
    async with connection.transaction():
        await require_leader(connection, epoch)
        await connection.execute(
            """/* write_journal */ INSERT INTO scheduler.journal (epoch, number, at, kind, subject, facts)
               SELECT $1, * FROM unnest($2::bigint[], $3::timestamptz[], $4::text[], $5::text[], $6::jsonb[])
               ON CONFLICT DO NOTHING""",
            epoch,
            [line.number for line in lines],
            [from_ms(line.at_ms) for line in lines],
            [line.kind for line in lines],
            [line.subject for line in lines],
            [line.facts for line in lines],
        )


async def forget(connection: asyncpg.Connection, *, epoch: int, before: datetime) -> bool:
    """Delete some of the lines from before a time, oldest first; returns whether there may be more.

    Raises Deposed.
    """
    async with connection.transaction():
        await require_leader(connection, epoch)
        done = await connection.execute(
            """DELETE FROM scheduler.journal
               WHERE (epoch, number) IN
                     (SELECT epoch, number FROM scheduler.journal ORDER BY epoch, number LIMIT $2)
                     AND at < $1""",
            before,
            _MOST_FORGOTTEN,
        )
    return bool(done == f"DELETE {_MOST_FORGOTTEN}")


@dataclass(frozen=True, kw_only=True)
class Period:
    """A period of the journal, and what cannot be told of it."""

    journal: Journal
    unknown: tuple[str, ...]
    """In sentences."""


async def read(connection: asyncpg.Connection, *, start: datetime, end: datetime) -> Period:
    """Return what the board was told from `start` to before `end`.

    What was there at `start` is looked up in earlier lines as far as the period speaks of it; where accounts
    stood in the queues then shows with their first starts.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        cursor = await connection.cursor(
            """SELECT epoch, number, kind, facts FROM scheduler.journal
               WHERE at >= $1 AND at < $2 AND kind <> $3 ORDER BY epoch, number""",
            start,
            end,
            _GAP,
        )
        lines: list[_Told] = []
        while rows := await cursor.fetch(_DECODED_AT_ONCE):
            lines += await asyncio.to_thread(_decoded, rows)
        before = await _Before.of(connection, start, end, lines)
        lost = await _lost(connection, before.start_ms if before.cell is None else before.cell.at_ms, end)
    records, dropped = await asyncio.to_thread(before.joined_to, lines)
    unknown = []
    if lost:
        unknown.append(
            f"{lost} lines of this time, or of before under the same scheduler, could not be kept: what they "
            "told is missing, and findings that touch on it may be wrong."
        )
    if before.cell is None:
        unknown.append("Nothing is known from before the period: it begins with the first takeover in it.")
    if dropped:
        unknown.append(f"{dropped} lines speak of jobs or accounts that no earlier line tells of.")
    return Period(
        journal=Journal(records=records, ended_ms=to_ms(end), grace_ms=GRACE_MS), unknown=tuple(unknown)
    )


class _Told(NamedTuple):
    epoch: int
    number: int
    record: Record


# Whoever reads serves others meanwhile: decoding a day of a large fleet takes a minute.
_DECODED_AT_ONCE = 5_000


def _decoded(rows: Iterable[asyncpg.Record]) -> list[_Told]:
    return [_Told(row["epoch"], row["number"], _decode(row["kind"], row["facts"])) for row in rows]


async def _lost(connection: asyncpg.Connection, start_ms: int, end: datetime) -> int:
    """Return how many lines of a time were dropped, counting whole every gap that reaches into it."""
    rows = await connection.fetch("SELECT facts FROM scheduler.journal WHERE subject = $1", _GAP)
    gaps = [json.loads(row["facts"]) for row in rows]
    return sum(gap["lines"] for gap in gaps if gap["from_ms"] < to_ms(end) and gap["until_ms"] >= start_ms)


@dataclass(kw_only=True)
class _Before:
    """What was so when a period began, as far as the period speaks of it."""

    start_ms: int
    cell: CellRestored | None = None
    """How the leader of that time began; None: none is known."""
    fleet: list[Record] = field(default_factory=list)
    accounts: dict[AccountId, AccountMet] = field(default_factory=dict)
    jobs: dict[JobId, Job] = field(default_factory=dict)
    held: set[JobId] = field(default_factory=set)
    attempts: dict[AttemptId, AttemptRestored] = field(default_factory=dict)

    @classmethod
    async def of(
        cls, connection: asyncpg.Connection, start: datetime, end: datetime, lines: Sequence[_Told]
    ) -> _Before:
        """Look up what these lines do not tell themselves."""
        before = cls(start_ms=to_ms(start))
        row = await connection.fetchrow(
            """SELECT epoch, facts FROM scheduler.journal
               WHERE kind = 'CellRestored' AND subject = 'relax' AND at < $1
               ORDER BY epoch DESC, number DESC LIMIT 1""",
            start,
        )
        if row is None:
            return before
        before.cell = _decode("CellRestored", row["facts"])
        earlier = _Earlier(connection, row["epoch"], start)
        before.fleet = await _fleet(earlier)
        of_this_leader = [told.record for told in lines if told.epoch == row["epoch"]]
        jobs, attempts = _spoken_of(of_this_leader)
        # Those that lived through the whole period, and that no line of it need speak of.
        rows = await connection.fetch(
            """SELECT job.job_id::text, attempt_id::text FROM scheduler.job
               LEFT JOIN scheduler.attempt
                         ON attempt.job_id = job.job_id AND attempt.started_at < $1
                            AND (attempt.ended_at IS NULL OR attempt.ended_at >= $2)
               WHERE job.created_at < $1 AND (job.ended_at IS NULL OR job.ended_at >= $2)""",
            start,
            end,
        )
        for one in rows:
            if one["attempt_id"] is None:
                jobs.add(JobId(one["job_id"]))
            else:
                attempts.add(AttemptId(one["attempt_id"]))
        await before._attempts(earlier, attempts)
        running = {one.job.job_id for one in before.attempts.values()}
        await before._jobs(earlier, jobs - running)
        await before._accounts(earlier, of_this_leader)
        return before

    async def _attempts(self, earlier: _Earlier, wanted: set[AttemptId]) -> None:
        """Restore the attempts that ran then."""
        begun: dict[AttemptId, Dispatch | AttemptRestored] = {}
        parked: dict[AttemptId, int | None] = {}
        drawn: set[AttemptId] = set()
        places: dict[AttemptId, WorkerId] = {}
        asked = {attempt_id: attempt_id for attempt_id in wanted}
        while asked:
            lines = await earlier.lines(asked)
            further: dict[AttemptId, AttemptId] = {}
            for told in lines:
                match told.record:
                    case Dispatch(started=started):
                        begun[asked[started.attempt_id]] = told.record
                    case AttemptRestored(attempt_id=attempt_id):
                        begun[asked[attempt_id]] = told.record
                    case AttemptMigrated():
                        newest = asked[told.record.to_attempt_id]
                        places.setdefault(newest, told.record.worker_id)
                        further[told.record.attempt_id] = newest
                    case AttemptParked(attempt_id=attempt_id) if asked[attempt_id] == attempt_id:
                        parked[attempt_id] = told.record.at_ms
                    case AttemptResumed(attempt_id=attempt_id) if asked[attempt_id] == attempt_id:
                        parked[attempt_id] = None
                    case AttemptDrawn(attempt_id=attempt_id):
                        drawn.add(attempt_id)
            asked = further
        jobs = await self._submitted(
            earlier, {one.started.job_id for one in begun.values() if isinstance(one, Dispatch)}
        )
        for attempt_id, one in begun.items():
            restored = one if isinstance(one, AttemptRestored) else _restored(one, jobs)
            if restored is not None:
                self.attempts[attempt_id] = replace(
                    restored,
                    at_ms=self.start_ms,
                    attempt_id=attempt_id,
                    worker_id=places.get(attempt_id, restored.worker_id),
                    parked_since_ms=parked.get(attempt_id, restored.parked_since_ms),
                    drawn=attempt_id in drawn or restored.drawn,
                )

    async def _jobs(self, earlier: _Earlier, wanted: set[JobId]) -> None:
        """Restore the jobs that waited then."""
        self.jobs = await self._submitted(earlier, wanted, held=self.held)

    async def _submitted(
        self, earlier: _Earlier, wanted: set[JobId], held: set[JobId] | None = None
    ) -> dict[JobId, Job]:
        """Return jobs as they were last told of; adds those that waited for funds to `held`."""
        jobs: dict[JobId, Job] = {}
        refused: dict[JobId, int] = {}
        for told in await earlier.lines(wanted):
            match told.record:
                case JobSubmitted(job=job) | AttemptRestored(job=job):
                    jobs[job.job_id] = job
                case TierChanged(job_id=job_id, tier=tier) if job_id in jobs:
                    jobs[job_id] = replace(jobs[job_id], tier=tier)
                case MemoryOutgrown(job_id=job_id, memory_bytes=memory_bytes) if job_id in jobs:
                    jobs[job_id] = jobs[job_id].needing(memory_bytes)
                case StartRefused(job_id=job_id, reason=RefusedBecause.MOVED) if job_id in jobs:
                    tier = Tier.RELAX if jobs[job_id].tier is Tier.FAST else Tier.FAST
                    jobs[job_id] = replace(jobs[job_id], tier=tier)
                case StartRefused(job_id=job_id, reason=RefusedBecause.FUNDS) if job_id in jobs:
                    refused[job_id] = told.number
        if held is not None and refused:
            woken = {
                told.record.account_id: told.number
                for told in await earlier.lines({jobs[job_id].account_id for job_id in refused})
                if isinstance(told.record, FundsChanged)
            }
            held |= {
                job_id for job_id, number in refused.items() if woken.get(jobs[job_id].account_id, 0) < number
            }
        return jobs

    async def _accounts(self, earlier: _Earlier, records: Iterable[Record]) -> None:
        """Look up the limits of every account that the period speaks of."""
        wanted = {job.account_id for job in self.jobs.values()}
        wanted |= {one.job.account_id for one in self.attempts.values()}
        for record in records:
            match record:
                case JobSubmitted(job=job):
                    wanted.add(job.account_id)
                case Dispatch(keys=keys):
                    wanted.add(keys.chosen.account_id)
        for told in await earlier.lines(wanted):
            match told.record:
                case AccountRestored() | LimitsChanged() as one:
                    self.accounts[one.account_id] = AccountMet(
                        at_ms=self.start_ms,
                        account_id=one.account_id,
                        limits=one.limits,
                        weight_milli=one.weight_milli,
                    )

    def joined_to(self, lines: Sequence[_Told]) -> tuple[Sequence[Record], int]:
        """Return the records of the period behind what was before it, and how many had to be left out."""
        records: list[Record] = []
        if self.cell is not None:
            records.append(CellMet(at_ms=self.start_ms, decay_origin_ms=self.cell.decay_origin_ms))
            records += self.fleet
            records += self.accounts.values()
            records += (one for one in self.attempts.values() if one.job.account_id in self.accounts)
            for job in self.jobs.values():
                if job.account_id in self.accounts:
                    records.append(JobSubmitted(at_ms=self.start_ms, job=job))
            records += (
                StartRefused(at_ms=self.start_ms, job_id=job_id, reason=RefusedBecause.FUNDS)
                for job_id in self.held
                if self.jobs[job_id].account_id in self.accounts
            )
        known = _Known(records)
        dropped = 0
        begun = self.cell is not None
        for told in lines:
            begun = begun or isinstance(told.record, CellRestored)
            if begun and known.of(told.record):
                records.append(told.record)
            else:
                dropped += begun
        return records, dropped


class _Known:
    """Whom the records told of so far."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._accounts: set[AccountId] = set()
        self._waiting: set[JobId] = set()
        self._running: dict[AttemptId, JobId] = {}
        for record in records:
            self.of(record)

    def of(self, record: Record) -> bool:
        """Return whether a record can be understood by those before it, and learn from it."""
        match record:
            case CellRestored(tier=Tier.RELAX):
                self._waiting.clear()
                self._running.clear()
                self._accounts.clear()
            case AccountMet(account_id=account_id) | AccountRestored(account_id=account_id):
                self._accounts.add(account_id)
            case JobSubmitted(job=job):
                if job.account_id not in self._accounts:
                    return False
                self._waiting.add(job.job_id)
            case AttemptRestored(job=job, attempt_id=attempt_id):
                if job.account_id not in self._accounts:
                    return False
                self._running[attempt_id] = job.job_id
            case Dispatch(started=started):
                if started.job_id not in self._waiting:
                    return False
                self._waiting.remove(started.job_id)
                self._running[started.attempt_id] = started.job_id
            case AttemptMigrated():
                if record.attempt_id not in self._running:
                    return False
                self._running[record.to_attempt_id] = self._running.pop(record.attempt_id)
            case (
                AttemptParked(attempt_id=attempt_id)
                | AttemptResumed(attempt_id=attempt_id)
                | AttemptDrawn(attempt_id=attempt_id)
            ):
                return attempt_id in self._running
            case AttemptFinished(attempt_id=attempt_id):
                return self._running.pop(attempt_id, None) is not None
            case AttemptLost(attempt_id=attempt_id):
                if attempt_id not in self._running:
                    return False
                self._waiting.add(self._running.pop(attempt_id))
            case StartRefused(job_id=job_id):
                return job_id in self._waiting
        return True


class _Earlier:
    """The lines of one leader before a time."""

    def __init__(self, connection: asyncpg.Connection, epoch: int, start: datetime) -> None:
        self._connection = connection
        self._epoch = epoch
        self._start = start

    async def lines(self, subjects: Iterable[str]) -> list[_Told]:
        """Return what was told of these, in that order."""
        return self._told(
            await self._connection.fetch(
                """SELECT number, kind, facts FROM scheduler.journal
                   WHERE subject = ANY($1::text[]) AND epoch = $2 AND at < $3 ORDER BY number""",
                list(subjects),
                self._epoch,
                self._start,
            )
        )

    async def of_the_cell(self) -> list[_Told]:
        """Return what was told of workers and of pauses, in that order."""
        return self._told(
            await self._connection.fetch(
                """SELECT number, kind, facts FROM scheduler.journal
                   WHERE kind = ANY($1::text[]) AND epoch = $2 AND at < $3 ORDER BY number""",
                [kind.__name__ for kind in _OF_THE_CELL],
                self._epoch,
                self._start,
            )
        )

    def _told(self, rows: Iterable[asyncpg.Record]) -> list[_Told]:
        return [_Told(self._epoch, row["number"], _decode(row["kind"], row["facts"])) for row in rows]


async def _fleet(earlier: _Earlier) -> list[Record]:
    """Return the workers there were then, which of them drained, and the tiers that were paused."""
    workers: dict[WorkerId, WorkerJoined] = {}
    draining: dict[WorkerId, WorkerDraining] = {}
    paused: dict[Tier, TierPaused] = {}
    for told in await earlier.of_the_cell():
        match told.record:
            case WorkerJoined(worker=worker):
                workers[worker.worker_id] = told.record
                draining.pop(worker.worker_id, None)
            case WorkerLost(worker_id=worker_id):
                workers.pop(worker_id, None)
                draining.pop(worker_id, None)
            case WorkerDraining(worker_id=worker_id):
                draining[worker_id] = told.record
            case WorkerResumed(worker_id=worker_id):
                draining.pop(worker_id, None)
            case TierPaused(tier=tier):
                paused[tier] = told.record
            case TierResumed(tier=tier):
                paused.pop(tier, None)
    return [*workers.values(), *draining.values(), *paused.values()]


def _spoken_of(records: Iterable[Record]) -> tuple[set[JobId], set[AttemptId]]:
    """Return the waiting jobs and the attempts that records speak of without having told how they began."""
    known_jobs: set[JobId] = set()
    known: set[AttemptId] = set()
    jobs: set[JobId] = set()
    attempts: set[AttemptId] = set()
    for record in records:
        match record:
            case JobSubmitted(job=job):
                known_jobs.add(job.job_id)
            case Dispatch(started=started):
                jobs.add(started.job_id)
                known.add(started.attempt_id)
            case AttemptMigrated():
                attempts.add(record.attempt_id)
                known.add(record.to_attempt_id)
            case (
                AttemptFinished(attempt_id=attempt_id)
                | AttemptLost(attempt_id=attempt_id)
                | AttemptParked(attempt_id=attempt_id)
                | AttemptResumed(attempt_id=attempt_id)
                | AttemptDrawn(attempt_id=attempt_id)
            ):
                attempts.add(attempt_id)
            case (
                StartRefused(job_id=job_id)
                | TierChanged(job_id=job_id)
                | CancelWanted(job_id=job_id)
                | JobGivenUp(job_id=job_id)
            ):
                jobs.add(job_id)
    return jobs - known_jobs, attempts - known


def _restored(dispatch: Dispatch, jobs: Mapping[JobId, Job]) -> AttemptRestored | None:
    started, charge = dispatch.started, dispatch.started.charge
    job = jobs.get(started.job_id)
    if job is None:
        return None
    return AttemptRestored(
        at_ms=started.at_ms,
        job=job,
        losses=0,
        accepted_ms=started.at_ms,
        attempt_id=started.attempt_id,
        worker_id=started.worker_id,
        predicted_ms=charge.predicted_ms,
        weight_milli=charge.weight_milli,
        charged_at_ms=charge.charged_at_ms,
        started_ms=started.at_ms,
        sheltered=started.sheltered,
    )


# --- lines and records --------------------------------------------------------------------------------


def _subject(record: Record) -> str:
    """Return what a record is about, as its line is looked up."""
    match record:
        case Dispatch():
            return record.started.attempt_id
        case AttemptMigrated():
            return record.to_attempt_id
        case JobSubmitted():
            return record.job.job_id
        case WorkerJoined():
            return record.worker.worker_id
    for name in ("attempt_id", "job_id", "account_id", "worker_id", "tier"):
        subject = getattr(record, name, None)
        if subject is not None:
            return str(subject)
    return ""


_NAMES: dict[type[Any], tuple[str, ...]] = {}


def _fields(value: Any) -> dict[str, Any]:
    """Return a dataclass as JSON has it, what is in it not yet; `asdict` takes four times as long."""
    kind = type(value)
    names = _NAMES.get(kind)
    if names is None:
        # What follows from other fields is no argument, and need not be kept.
        names = _NAMES[kind] = tuple(one.name for one in fields(kind) if one.init)
    return {name: getattr(value, name) for name in names}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, Set) else _fields(value)


def _decode(kind: str, facts: str) -> Any:
    kept: Any = _KINDS[kind]
    return _decoder(kept)(json.loads(facts))


@cache
def _decoder(hint: Any) -> Callable[[Any], Any]:
    """Return what makes a value of a type of what JSON made of one."""
    while isinstance(hint, typing.NewType) or typing.get_origin(hint) is typing.Final:
        hint = hint.__supertype__ if isinstance(hint, typing.NewType) else typing.get_args(hint)[0]
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass_decoder(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        (inner,) = (_decoder(one) for one in arguments if one is not types.NoneType)
        return lambda value: None if value is None else inner(value)
    if origin is frozenset:
        return frozenset
    if origin is not None:
        key, item = (_decoder(one) for one in arguments)
        return lambda value: {key(name): item(one) for name, one in value.items()}
    return lambda value: value


def _dataclass_decoder(kind: type[Any]) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(kind)
    # What follows from other fields is no argument; a field that is newer than its line has its default.
    decoders = {one.name: _decoder(hints[one.name]) for one in fields(kind) if one.init}
    return lambda value: kind(
        **{name: decoder(value[name]) for name, decoder in decoders.items() if name in value}
    )
