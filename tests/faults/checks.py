"""What must be so when a run is over: each check returns a sentence for everything that is not.

They go by the rows, the files and what clients wrote down, and trust nothing that the service says of itself,
but for `memory_is_the_database`, which compares just that with the rows, and `the_same_is_decided_again`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import asyncpg
from PIL import Image

from billing import auditor
from scheduler.client.aio import DarkroomClient
from scheduler.clock import to_ms
from scheduler.policy.auditing.audit import audit
from scheduler.policy.auditing.findings import Bound, Finding, Verdict
from scheduler.policy.board import Board
from scheduler.policy.events import FairShare
from scheduler.policy.ids import AccountId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.recorder import recording_of, recordings
from scheduler.recording import Asked, Recording, RecordingWrong, Told
from scheduler.replay import replay
from scheduler.store import invariants, journal
from scheduler.v1 import fleet_pb2, job_pb2
from tests.faults.another_order import InAnotherOrder
from tests.faults.crowd import Deed, Promise

ENDED = ("succeeded", "failed", "cancelled")
_PLAN_RUNNING, _PLAN_RELAX_RUNNING = 3, 2
"""Of every plan of the first release."""
FAIRNESS = (Bound.B7, Bound.B9, Bound.B10, Bound.B11, Bound.B14, Bound.TAGS)
"""Bounds that hold whatever fails. The others are about waits and orders, which a fault may bend."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that a check may look at."""

    connection: asyncpg.Connection
    """Past every proxy. The service is at rest."""
    promises: Sequence[Promise]
    undisturbed: Mapping[int, tuple[str, ...]]
    """Digests of each picture of the gallery, drawn before anything went wrong."""
    store: Path
    recordings: Path
    """Of all schedulers; the last may be written yet."""
    store_mended_s: float = 0.0
    """When the store was last away or full, in seconds since 1970."""


class Of(StrEnum):
    """What is wrong, in a word."""

    LOST = "lost"
    DOUBLED = "doubled"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Something that is not as it should be."""

    sentence: str
    of: Of = Of.OTHER

    def __str__(self) -> str:
        return self.sentence


Check = Callable[[Evidence], Awaitable[list[str]]]


# --- jobs -----------------------------------------------------------------------------------------------


async def nothing_is_lost(evidence: Evidence) -> list[str]:
    """Every job that was acknowledged has ended."""
    rows = await evidence.connection.fetch("SELECT job_id::text, state FROM scheduler.job")
    states = {row["job_id"]: row["state"] for row in rows}
    return [
        f"job {job_id} of {account_id} was acknowledged and is {states.get(job_id, 'not there')}"
        for job_id, account_id in _acknowledged(evidence.promises).items()
        if states.get(job_id) not in ENDED
    ]


async def nothing_is_doubled(evidence: Evidence) -> list[str]:
    """A request made one job, and every job was made by one request; nobody was told of two."""
    told: defaultdict[str, set[str]] = defaultdict(set)
    for promise in evidence.promises:
        if promise.deed is Deed.CREATED:
            told[promise.request_id].add(promise.job_id)
    found = [
        f"request {request_id} was answered with jobs {', '.join(sorted(jobs))}"
        for request_id, jobs in told.items()
        if len(jobs) > 1
    ]
    rows = await evidence.connection.fetch(
        """SELECT job_id::text, count(idempotency) AS requests
             FROM scheduler.job
                  LEFT JOIN billing.idempotency
                            ON method = 'CreateJob' AND outcome ->> 'job_id' = job_id::text
            GROUP BY job_id HAVING count(idempotency) <> 1"""
    )
    return found + [f"job {row['job_id']} is of {row['requests']} requests" for row in rows]


async def what_was_seen_is_so(evidence: Evidence) -> list[str]:
    """An end that somebody saw is the end there is; what was deleted is gone; a cancelled job ended."""
    rows = {
        row["job_id"]: row
        for row in await evidence.connection.fetch(
            """SELECT job_id::text, state, tier, images, deleted_at IS NOT NULL AS deleted,
                      cancel_wanted FROM scheduler.job"""
        )
    }
    found = []
    moved: dict[str, Promise] = {}
    for promise in evidence.promises:
        row = rows.get(promise.job_id)
        if row is None:
            found.append(f"job {promise.job_id}, which {promise.account_id} {promise.deed}, is not there")
            continue
        match promise.deed:
            case Deed.SAW_END if promise.state != row["state"]:
                found.append(f"job {promise.job_id} was seen {promise.state} and is {row['state']}")
            case Deed.SAW_END if not row["deleted"] and _digests(row) != promise.sha256:
                found.append(f"job {promise.job_id} has other pictures than were seen")
            case Deed.DELETED if not row["deleted"]:
                found.append(f"job {promise.job_id} was deleted and is there")
            case Deed.MOVED:
                moved[promise.job_id] = promise
            case Deed.CANCELLED if promise.state == "cancelled" and row["state"] != "cancelled":
                found.append(f"job {promise.job_id} was cancelled and is {row['state']}")
            case Deed.CANCELLED if row["state"] != "cancelled" and not row["cancel_wanted"]:
                found.append(f"job {promise.job_id} was to be cancelled, and no row says so")
    return found + [
        f"job {job_id} was to be moved to {promise.asked}, and is {rows[job_id]['tier']}"
        for job_id, promise in moved.items()
        if rows[job_id]["tier"] != promise.asked
    ]


async def caps_held(evidence: Evidence) -> list[str]:
    """At no time did an account run more than its plan allows, as the rows of all attempts tell it."""
    rows = await evidence.connection.fetch(
        """SELECT account_id, tier, attempt.started_at, attempt.ended_at
             FROM scheduler.attempt JOIN scheduler.job USING (job_id)
            WHERE attempt.ended_at > attempt.started_at"""
    )
    steps = sorted(
        chain.from_iterable(
            ((row["started_at"], 1, row), (row["ended_at"], 0, row))
            for row in rows  # ends before starts
        ),
        key=lambda step: step[:2],
    )
    running: Counter[str] = Counter()
    relax: Counter[str] = Counter()
    found = []
    for at, starts, row in steps:
        change = 1 if starts else -1
        running[row["account_id"]] += change
        relax[row["account_id"]] += change * (row["tier"] == "relax")
        if running[row["account_id"]] > _PLAN_RUNNING or relax[row["account_id"]] > _PLAN_RELAX_RUNNING:
            found.append(
                f"{row['account_id']} ran {running[row['account_id']]} jobs at {at}, "
                f"{relax[row['account_id']]} of them relax"
            )
    return found


# --- money ----------------------------------------------------------------------------------------------


async def nobody_is_billed_twice(evidence: Evidence) -> list[str]:
    """By the ledger's journal alone: a job was paid for one attempt at most."""
    return [
        f"{_job(row)} was paid {row['paid_by']} times" for row in await _paid(evidence) if row["paid_by"] > 1
    ]


async def nobody_is_billed_wrongly(evidence: Evidence) -> list[str]:
    """By the ledger's journal alone: a job was paid only where its owner had of it, as its receipt says."""
    found = []
    for row in await _paid(evidence):
        if row["paid_ms"] and (row["state"] == "failed" or row["tier"] == "relax" or not row["tried"]):
            found.append(f"{_job(row)} was billed {row['paid_ms']} ms")
        if row["state"] in ENDED and (row["receipt_ms"] or 0) != row["paid_ms"]:
            found.append(
                f"{_job(row)} was billed {row['paid_ms']} ms, and its receipt says {row['receipt_ms']}"
            )
    return found


async def _paid(evidence: Evidence) -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await evidence.connection.fetch(
        """SELECT job.job_id::text, job.state, job.tier,
                  (job.receipt ->> 'billed_gpu_ms')::bigint AS receipt_ms,
                  EXISTS (SELECT FROM scheduler.attempt WHERE attempt.job_id = job.job_id) AS tried,
                  count(DISTINCT transfer.attempt_id) AS paid_by,
                  COALESCE(sum(transfer.amount), 0) AS paid_ms
             FROM scheduler.job
                  LEFT JOIN billing.transfer ON transfer.job_id = job.job_id AND transfer.unit = 'gpu_ms'
                       AND transfer.kind IN ('post', 'post_pending') AND transfer.credit_account = 'consumed'
            GROUP BY job.job_id, job.state, job.tier, job.receipt"""
    )
    return rows


def _job(row: asyncpg.Record) -> str:
    return f"job {row['job_id']}, {row['state']} in {row['tier']},"


async def the_rows_have_nothing_twice(evidence: Evidence) -> list[str]:
    """The invariants that say that something was done once."""
    once = [one for one in invariants.INVARIANTS if of_invariant(one.number) is Of.DOUBLED]
    return [
        f"invariant broken: {one}" for one in await invariants.check(evidence.connection, invariants=once)
    ]


async def the_ledger_holds(evidence: Evidence) -> list[str]:
    """Every other invariant, those of a service at rest too, and the second auditor's replay."""
    every = [*invariants.INVARIANTS, *invariants.AT_REST]
    others = [one for one in every if of_invariant(one.number) is not Of.DOUBLED]
    broken = await invariants.check(evidence.connection, invariants=others)
    return [f"invariant broken: {one}" for one in broken] + [
        f"the auditor: {finding}" for finding in await auditor.replay(evidence.connection)
    ]


def of_invariant(number: int) -> Of:
    """Return what it is when an invariant of this number is broken."""
    return Of.DOUBLED if number in _ONCE else Of.OTHER


# No pending is resolved twice, no job is charged for two attempts, and each end has one event.
_ONCE = (4, 16, 22)


# --- fairness -------------------------------------------------------------------------------------------


async def audited(evidence: Evidence) -> Sequence[Finding]:
    """Return what the fairness auditor finds in the journal of all schedulers, of bounds that always hold."""
    now = datetime.now(UTC) + timedelta(seconds=1)
    period = await journal.read(evidence.connection, start=now - timedelta(days=1), end=now)
    closing: defaultdict[AccountId, dict[Tier, FairShare]] = defaultdict(dict)
    for row in await evidence.connection.fetch("SELECT * FROM scheduler.fair_share"):
        closing[AccountId(row["account_id"])][Tier(row["tier"])] = FairShare(
            finish_tag=row["finish_tag"], tag=row["tag"], usage=row["usage"]
        )
    findings = audit(replace(period.journal, closing=closing, ended_ms=to_ms(now)), Parameters())
    return [finding for finding in findings if finding.bound in FAIRNESS]


async def the_order_was_kept(evidence: Evidence) -> list[str]:
    """The journal of all schedulers, replayed by the fairness auditor, and held against what is stored."""
    return [_sentence(finding) for finding in await audited(evidence) if finding.verdict is Verdict.VIOLATED]


def _sentence(finding: Finding) -> str:
    return (
        f"{finding.bound} ({finding.promise.sentence}) was broken {finding.violations} times in "
        f"{finding.cases}, by {finding.worst_margin} {finding.promise.unit}: {finding.worst}"
    )


async def the_same_is_decided_again(evidence: Evidence) -> list[str]:
    """B12, by the recordings of all schedulers: asked twice, with dictionaries and sets in other orders."""
    there = recordings(evidence.recordings)
    found = []
    for board in (Board, InAnotherOrder):
        for file in there:
            found += await asyncio.to_thread(_decided_otherwise, file, board)
    if there and not found:
        found += await _decided_otherwise_elsewhere(there)
    if found:
        return found
    rows = await evidence.connection.fetch(
        "SELECT epoch, min(at) AS began_at, max(at) AS ended_at FROM scheduler.journal GROUP BY epoch"
    )
    for epoch, began_at, ended_at in (row.values() for row in rows):
        file = recording_of(evidence.recordings, epoch)
        if file not in there:
            found.append(f"the scheduler of epoch {epoch} left no recording")
        elif (missing_ms := to_ms(ended_at) - _ends_ms(file, to_ms(began_at))) > _RECORDED_WITHIN_MS:
            found.append(f"the recording of epoch {epoch} lacks the last {missing_ms} ms of the journal")
    return found


# Twice a second, if it gets its CPU.
_RECORDED_WITHIN_MS = 5_000


def _ends_ms(file: Path, began_ms: int) -> int:
    """Return when its scheduler was told or asked last.

    Of one that was killed before anything was on disk: when it began. One that was frozen is told what it
    missed long after it was asked last, and may be killed before it is asked again.
    """
    last_ms = began_ms
    for line in Recording(file):
        match line.entry:
            case Told(event=event):
                last_ms = max(last_ms, event.at_ms)
            case Asked(now_ms=now_ms):
                last_ms = max(last_ms, now_ms)
    return last_ms


def _decided_otherwise(file: Path, kind: type[Board]) -> list[str]:
    recording = Recording(file)
    try:
        difference = replay(recording, kind(recording.header.parameters)).difference
    except RecordingWrong as wrong:
        return [str(wrong)]
    except (AssertionError, LookupError) as impossible:
        return [f"{kind.__name__} breaks by {file.name}: {impossible!r} {impossible.__notes__}"]
    if difference is None:
        return []
    return [f"{kind.__name__} decides {file.name} otherwise: {' '.join(difference.sentences())}"]


async def _decided_otherwise_elsewhere(files: Sequence[Path]) -> list[str]:
    """Ask another process, in which sets have neither this one's order nor the scheduler's."""
    replaying = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scheduler", "replay", *files),
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await replaying.communicate()
    return [f"another process says: {said.decode()}"] if replaying.returncode else []


# --- files ----------------------------------------------------------------------------------------------


async def pictures_are_whole_and_exact(evidence: Evidence) -> list[str]:
    """Each picture is there, can be read, and is the one that is drawn when nothing goes wrong."""
    asked = {one.job_id: one.picture for one in evidence.promises if one.deed is Deed.CREATED}
    rows = await evidence.connection.fetch(
        """SELECT job_id::text, images FROM scheduler.job
            WHERE state = 'succeeded' AND deleted_at IS NULL ORDER BY job_id"""
    )
    found = []
    for row in rows:
        for image in json.loads(row["images"]):
            wrong = _wrong_with(evidence.store / image["path"], image)
            if wrong:
                found.append(f"picture {image['index']} of job {row['job_id']} {wrong}")
        if row["job_id"] in asked and _digests(row) != evidence.undisturbed[asked[row["job_id"]]]:
            found.append(f"job {row['job_id']} has other pictures than one that nothing disturbed")
    # Those of jobs that were deleted since, too.
    seen = [one for one in evidence.promises if one.deed is Deed.SAW_END and one.state == "succeeded"]
    return found + [
        f"job {one.job_id} had other pictures than one that nothing disturbed"
        for one in seen
        if one.sha256 != evidence.undisturbed[one.picture]
    ]


def _wrong_with(path: Path, image: Mapping[str, Any]) -> str:
    if not path.exists():
        return "is not in the store"
    content = path.read_bytes()
    if len(content) != image["size_bytes"] or hashlib.sha256(content).hexdigest() != image["sha256"]:
        return "is another file"
    with Image.open(BytesIO(content)) as picture:
        picture.load()
        return "" if picture.size == (image["width"], image["height"]) else f"is {picture.size} large"


async def no_file_is_left_over(evidence: Evidence) -> list[str]:
    """Everything in the store is named by a row: a picture or latents of a job that is not deleted."""
    return [f"no row names {path}" for path in await left_over(evidence)]


async def left_over(evidence: Evidence) -> list[str]:
    """Return the files in the store that no row names."""
    rows = await evidence.connection.fetch(
        "SELECT images, videos, latents_path FROM scheduler.job WHERE deleted_at IS NULL"
    )
    named: set[str | None] = set()
    for row in rows:
        named.update(one["path"] for one in _json(row["images"]) + _json(row["videos"]))
        named.add(row["latents_path"])
    there = {str(path.relative_to(evidence.store)) for path in evidence.store.rglob("*") if path.is_file()}
    return sorted(there.difference(named))


async def nothing_leaks(evidence: Evidence) -> list[str]:
    """What is left before orphans are looked for is of attempts that a fault kept from cleaning up.

    That is: one that was lost, one whose worker was lost later, or one that began before the store was last
    mended. The sweep for orphans is there for those; whatever else it would find is a leak.
    """
    files = await left_over(evidence)
    jobs = {path: path.split("/")[1] if path.startswith("jobs/") else "" for path in files}
    excused = await evidence.connection.fetch(
        """SELECT DISTINCT job_id::text FROM scheduler.attempt
            WHERE job_id::text = ANY($1::text[])
              AND (state = 'lost' OR started_at < to_timestamp($2)
                   OR EXISTS (SELECT FROM scheduler.journal
                               WHERE kind = 'WorkerLost' AND subject = worker_id
                                     AND journal.at >= attempt.started_at)
                   -- It died while nobody led.
                   OR EXISTS (SELECT FROM scheduler.attempt AS later
                               WHERE later.worker_id = attempt.worker_id
                                     AND later.incarnation <> attempt.incarnation
                                     AND later.started_at > attempt.started_at))""",
        list(jobs.values()),
        evidence.store_mended_s,
    )
    names = {row["job_id"] for row in excused}
    return [f"no fault explains {path}" for path, job_id in jobs.items() if job_id not in names]


# --- memory ---------------------------------------------------------------------------------------------


async def memory_is_the_database(
    admin: DarkroomClient, connection: asyncpg.Connection, exposition: str
) -> list[str]:
    """What the scheduler says of queues, workers and metrics is what the rows say. Jobs may wait."""
    rows = await connection.fetch(
        """SELECT tier, count(*) FILTER (WHERE state = 'queued') AS waiting,
                  count(*) FILTER (WHERE state = 'running') AS running
             FROM scheduler.job WHERE state IN ('queued', 'running') GROUP BY tier"""
    )
    in_rows = dict.fromkeys(("fast", "relax"), (0, 0)) | {
        row["tier"]: (row["waiting"], row["running"]) for row in rows
    }
    queues = {
        job_pb2.Tier.Name(queue.tier).removeprefix("TIER_").lower(): queue
        for queue in (await admin.queues()).tiers
    }
    found = []
    for tier, (waiting, running) in in_rows.items():
        queue = queues[tier]
        # Held ones wait too; parked ones run.
        said = (queue.waiting + queue.held, queue.running + queue.parked)
        if said != (waiting, running):
            found.append(f"of {tier} {waiting} wait and {running} run, and the scheduler says {said}")
        gauges = (_gauge(exposition, "jobs_queued", tier), _gauge(exposition, "jobs_running", tier))
        if gauges != (waiting, running):
            found.append(f"of {tier} {waiting} wait and {running} run, and its metrics say {gauges}")
    workers = await admin.workers()
    found += [
        f"{worker.name} has {worker.active.job or len(worker.parked)} in hand, and no row says so"
        for worker in workers
        if worker.active.job or worker.parked
    ]
    found += [
        f"{worker.name} is {fleet_pb2.WorkerState.Name(worker.state)}"
        for worker in workers
        if worker.state not in (fleet_pb2.WORKER_STATE_IDLE, fleet_pb2.WORKER_STATE_ABSENT)
    ]
    if _gauge(exposition, "billing_holds", "") != 0:
        found.append("its metrics say that something is held")
    return found


def _gauge(exposition: str, name: str, tier: str) -> int | None:
    for line in exposition.splitlines():
        named = line.startswith((f"darkroom_{name}{{", f"darkroom_{name} "))
        if named and (not tier or f'tier="{tier}"' in line):
            return int(float(line.rpartition(" ")[2]))
    return None


CHECKS: Mapping[Check, Of] = {
    nothing_is_lost: Of.LOST,
    nothing_is_doubled: Of.DOUBLED,
    what_was_seen_is_so: Of.OTHER,
    caps_held: Of.OTHER,
    nobody_is_billed_twice: Of.DOUBLED,
    nobody_is_billed_wrongly: Of.OTHER,
    the_rows_have_nothing_twice: Of.DOUBLED,
    the_ledger_holds: Of.OTHER,
    the_order_was_kept: Of.OTHER,
    the_same_is_decided_again: Of.OTHER,
    pictures_are_whole_and_exact: Of.OTHER,
    no_file_is_left_over: Of.OTHER,
}
"""Those that need the rows, the files, recordings and promises alone, and what their findings are of."""


async def findings(evidence: Evidence, checks: Mapping[Check, Of] = CHECKS) -> list[Wrong]:
    """Return what any check finds; nothing is what is hoped for."""
    return [
        Wrong(sentence=f"{check.__name__}: {one}", of=of)
        for check, of in checks.items()
        for one in await check(evidence)
    ]


def _acknowledged(promises: Iterable[Promise]) -> dict[str, str]:
    return {one.job_id: one.account_id for one in promises if one.deed is Deed.CREATED}


def _digests(row: asyncpg.Record) -> tuple[str, ...]:
    return tuple(image["sha256"] for image in _json(row["images"]))


def _json(column: str | None) -> list[dict[str, Any]]:
    return [] if column is None else json.loads(column)
