"""Step 4 of the cycle: what was decided becomes rows, in one transaction, before any worker is called.

Attempts, holds, the fair queue's charges and the tags of accounts that became eligible are written
together, and the runs that are parked, go on or move. A start that the database refuses (cancelled or moved
meanwhile, no fast time left) ends the starts just before it: the charges behind it were computed as if it
had happened, so they are decided again. Runs that go on or move charge nothing, and do so all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import asyncpg

from billing import ledger
from billing.prices import PricingSnapshot
from gpu_worker.contract import Checkpoint
from scheduler.clock import from_ms
from scheduler.policy.decisions import Charge
from scheduler.policy.events import RefusedBecause
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.store import parking
from scheduler.store.checkpoints import checkpoint_from_json
from scheduler.store.leadership import require_leader
from scheduler.store.parking import DrawnAttempt, MigratedAttempt, PlannedMigration, PlannedResume
from scheduler.store.shares import TagChange, ends_unheard_of, store_charges, store_tags

# What was handed over was saved before; who ran out of memory was not.
_AFTER_LOSS = "(job.losses > 0 OR job.memory_above_bytes > 0) AS after_loss"
_PARKED_SENTENCE = (
    "A fast job has its GPU for a while. It goes on from where it is, and nothing is drawn twice."
)


@dataclass(frozen=True, kw_only=True)
class PlannedAttempt:
    """A start as decided. Its id is chosen before it is written, so a repeated batch is recognised."""

    attempt_id: str
    token: str
    job_id: JobId
    account_id: AccountId
    tier: Tier
    worker_id: str
    incarnation: str
    charge: Charge
    decision: Mapping[str, Any]
    sentence: str
    device: str = ""
    """The type of the worker's GPU, which may have a price of its own."""
    parks: str | None = None
    """The attempt whose GPU it takes."""
    sheltered: bool = False


@dataclass(frozen=True, kw_only=True)
class StartedAttempt:
    """A start that is a row now."""

    planned: PlannedAttempt
    event_seq: int
    spec: Mapping[str, Any]
    checkpoint: Checkpoint | None
    """The newest of its job."""
    after_loss: bool
    """An attempt at its job was lost before, with what it had done since its newest checkpoint."""
    waited_ms: int | None
    """From acceptance to its first start; None for a later one."""
    traceparent: str | None
    """The span of the call that made its job; None: it is not traced."""
    queued_at: datetime | None
    """Of one that is traced: since when it waited, this time."""


@dataclass(frozen=True, kw_only=True)
class RefusedStart:
    """A start that the database did not take."""

    job_id: JobId
    because: RefusedBecause
    sentence: str


@dataclass(frozen=True, kw_only=True)
class StartOutcome:
    """What became of a batch. Starts in neither list were not tried: they are decided again.

    A migration that is not here was refused: the attempt has ended. A park and a resume never are.
    """

    started: Sequence[StartedAttempt] = field(default_factory=tuple)
    refused: Sequence[RefusedStart] = field(default_factory=tuple)
    migrated: Sequence[MigratedAttempt] = field(default_factory=tuple)
    event_seqs: Mapping[JobId, int] = field(default_factory=dict)
    """Numbers of the newest events of the jobs concerned, parked and resumed ones included."""


class _Changed(Exception):
    """A job was cancelled or moved between being read and being updated: look again."""


async def start_attempts(
    connection: asyncpg.Connection,
    *,
    epoch: int,
    planned: Sequence[PlannedAttempt],
    resumes: Sequence[PlannedResume] = (),
    migrations: Sequence[PlannedMigration] = (),
    drawn: Sequence[DrawnAttempt] = (),
    tags: Sequence[TagChange],
    running: Sequence[str],
    parameters: Parameters,
    now_ms: int,
    again: bool,
) -> StartOutcome:
    """Write a batch. One that is done `again`, because its answer was lost, returns what it did.

    `drawn` are attempts that the workers concerned had before, and `running` those that the board takes for
    running, at least of the accounts concerned. Locks the leader row in share mode, then what the ledger
    locks, attempts that are drawn, park, go on or move, the jobs, and the accounts' shares. Raises Deposed.
    """
    while True:
        try:
            async with connection.transaction():
                await require_leader(connection, epoch)
                before = await _outcome_of_before(connection, planned, migrations) if again else None
                if before is not None:
                    return before
                outcome = await _write_all(
                    connection, epoch, planned, resumes, migrations, drawn, from_ms(now_ms)
                )
                started = [one.planned for one in outcome.started]
                accounts = {tag[0] for tag in tags} | {plan.account_id for plan in started}
                if accounts:
                    unheard = await ends_unheard_of(connection, running, accounts, parameters)
                    await store_tags(connection, tags, unheard)
                    await store_charges(
                        connection, [(plan.account_id, plan.tier, plan.charge) for plan in started], unheard
                    )
                return outcome
        except _Changed:
            continue


async def _outcome_of_before(
    connection: asyncpg.Connection,
    planned: Sequence[PlannedAttempt],
    migrations: Sequence[PlannedMigration],
) -> StartOutcome | None:
    """Return the outcome of this batch if it was committed though its answer was lost.

    Which of the others were refused was in the lost answer; they stand in neither list and are decided again.
    A batch that opened no attempt can be written twice: what goes on already is left as it is.
    """
    rows = {
        row["attempt_id"]: row
        for row in await connection.fetch(
            f"""SELECT attempt_id::text, job.spec, job.checkpoint, job.event_seq, traceparent, {_AFTER_LOSS}
               FROM scheduler.attempt JOIN scheduler.job USING (job_id) WHERE attempt_id = ANY($1::uuid[])""",  # noqa: S608
            [plan.attempt_id for plan in planned] + [one.to_attempt_id for one in migrations],
        )
    }
    if not rows:
        return None
    started = [
        StartedAttempt(
            planned=plan,
            event_seq=rows[plan.attempt_id]["event_seq"],
            spec=json.loads(rows[plan.attempt_id]["spec"]),
            checkpoint=checkpoint_from_json(rows[plan.attempt_id]["checkpoint"]),
            after_loss=rows[plan.attempt_id]["after_loss"],
            waited_ms=None,
            traceparent=rows[plan.attempt_id]["traceparent"],
            queued_at=None,
        )
        for plan in planned
        if plan.attempt_id in rows
    ]
    return StartOutcome(started=started, migrated=await parking.migrated(connection, migrations))


async def _write_all(
    connection: asyncpg.Connection,
    epoch: int,
    planned: Sequence[PlannedAttempt],
    resumes: Sequence[PlannedResume],
    migrations: Sequence[PlannedMigration],
    drawn: Sequence[DrawnAttempt],
    at: datetime,
) -> StartOutcome:
    rows = await _job_rows(connection, planned)
    prefix, refused = _still_wanted(planned, rows)
    prefix, unfunded = await _hold(connection, prefix, rows, at)
    # Attempts before jobs, as a settlement locks them; and who leaves a worker before who gets it.
    await parking.let_go(connection, drawn)
    moved = await parking.migrate(connection, epoch, migrations, at)
    gone_on = await parking.resume(connection, resumes, at)
    parked = await parking.park(connection, [plan.parks for plan in prefix if plan.parks is not None], at)
    await _insert(connection, epoch, prefix, rows, at)
    sequences = await record_events(
        connection,
        [(plan.job_id, "running", plan.sentence) for plan in prefix]
        + [(job_id, "running", _PARKED_SENTENCE) for job_id in parked]
        + [(job_id, "running", one.sentence) for job_id, one in (gone_on | moved).items()],
        at,
    )
    return StartOutcome(
        started=[
            StartedAttempt(
                planned=plan,
                event_seq=sequences[plan.job_id],
                spec=json.loads(rows[plan.job_id]["spec"]),
                checkpoint=checkpoint_from_json(rows[plan.job_id]["checkpoint"]),
                after_loss=rows[plan.job_id]["after_loss"],
                waited_ms=rows[plan.job_id]["waited_ms"],
                traceparent=rows[plan.job_id]["traceparent"],
                queued_at=rows[plan.job_id]["queued_at"],
            )
            for plan in prefix
        ],
        refused=[*refused, *unfunded],
        migrated=await parking.migrated(connection, list(moved.values())),
        event_seqs=sequences,
    )


def _still_wanted(
    planned: Sequence[PlannedAttempt], rows: Mapping[str, asyncpg.Record]
) -> tuple[Sequence[PlannedAttempt], list[RefusedStart]]:
    """Return the starts before the first whose job waits no more in its tier, and all such refusals."""
    refused = []
    first = len(planned)
    for index, plan in enumerate(planned):
        row = rows.get(plan.job_id)
        if row is None or row["state"] != "queued":
            because, sentence = RefusedBecause.GONE, "cancelled"
        elif row["tier"] != plan.tier:
            because, sentence = RefusedBecause.MOVED, f"moved to {row['tier']}"
        else:
            continue
        first = min(first, index)
        refused.append(RefusedStart(job_id=plan.job_id, because=because, sentence=sentence))
    return planned[:first], refused


async def _job_rows(
    connection: asyncpg.Connection, planned: Sequence[PlannedAttempt]
) -> dict[str, asyncpg.Record]:
    if not planned:
        return {}
    rows = await connection.fetch(
        f"""SELECT job_id::text, state, tier, pricing, spec, checkpoint, {_AFTER_LOSS},
                  CASE WHEN started_at IS NULL
                       THEN (extract(epoch FROM now() - created_at) * 1000)::bigint END AS waited_ms,
                  traceparent,
                  CASE WHEN traceparent IS NOT NULL THEN coalesce(
                       (SELECT max(ended_at) FROM scheduler.attempt WHERE attempt.job_id = job.job_id),
                       created_at) END AS queued_at
           FROM scheduler.job WHERE job_id = ANY($1::uuid[]) AND NOT past""",  # noqa: S608
        [plan.job_id for plan in planned],
    )
    return {row["job_id"]: row for row in rows}


async def _hold(
    connection: asyncpg.Connection,
    planned: Sequence[PlannedAttempt],
    rows: Mapping[str, asyncpg.Record],
    at: datetime,
) -> tuple[Sequence[PlannedAttempt], list[RefusedStart]]:
    """Place the holds of fast starts.

    Returns the starts before the first that has no funds, and its refusal.
    """
    fast = [plan for plan in planned if plan.tier is Tier.FAST]
    if not fast:
        return planned, []

    outcomes = await ledger.place_holds(
        connection,
        [
            ledger.HoldRequest(
                job_id=plan.job_id,
                attempt_id=plan.attempt_id,
                account_id=plan.account_id,
                predicted_ms=plan.charge.predicted_ms,
                pricing=PricingSnapshot.from_json(json.loads(rows[plan.job_id]["pricing"])),
                at=at,
                device=plan.device,
            )
            for plan in fast
        ],
        until_refused=True,
    )
    last = outcomes[-1]
    if isinstance(last, ledger.HoldPlaced):
        return planned, []
    first = fast[len(outcomes) - 1]
    refused = RefusedStart(job_id=first.job_id, because=RefusedBecause.FUNDS, sentence=str(last.refusal))
    return planned[: planned.index(first)], [refused]


async def _insert(
    connection: asyncpg.Connection,
    epoch: int,
    planned: Sequence[PlannedAttempt],
    rows: Mapping[str, asyncpg.Record],
    at: datetime,
) -> None:
    """Write attempts and move their jobs. Raises _Changed if one waits no more in its tier."""
    if not planned:
        return
    job_ids = [plan.job_id for plan in planned]
    checkpoints = [checkpoint_from_json(rows[job_id]["checkpoint"]) for job_id in job_ids]
    inserted = await connection.execute(
        """/* start_attempts */ WITH started AS (
               UPDATE scheduler.job SET state = 'running', started_at = coalesce(started_at, $10)
               FROM unnest($2::uuid[], $14::text[]) AS plan (job_id, tier)
               WHERE job.job_id = plan.job_id AND NOT past AND state = 'queued' AND job.tier = plan.tier
               RETURNING job.job_id)
           INSERT INTO scheduler.attempt (attempt_id, job_id, number, token, epoch, worker_id, incarnation,
                                          started_at, predicted_ms, charged_at_ms, weight_milli, decision,
                                          sheltered, kept_ms)
           SELECT attempt_id, job_id,
                  1 + (SELECT count(*) FROM scheduler.attempt a WHERE a.job_id = new.job_id),
                  token, $11, worker_id, incarnation, $10, predicted_ms, charged_at_ms, weight_milli,
                  decision, sheltered, kept_ms
           FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::integer[],
                       $7::bigint[], $8::integer[], $9::jsonb[], $12::boolean[], $13::integer[])
                AS new (attempt_id, job_id, token, worker_id, incarnation, predicted_ms, charged_at_ms,
                        weight_milli, decision, sheltered, kept_ms)
           JOIN started USING (job_id)""",
        [plan.attempt_id for plan in planned],
        job_ids,
        [plan.token for plan in planned],
        [plan.worker_id for plan in planned],
        [plan.incarnation for plan in planned],
        [plan.charge.predicted_ms for plan in planned],
        [plan.charge.charged_at_ms for plan in planned],
        [plan.charge.weight_milli for plan in planned],
        [json.dumps(plan.decision) for plan in planned],
        at,
        epoch,
        [plan.sheltered for plan in planned],
        [0 if checkpoint is None else checkpoint.kept.gpu_ms for checkpoint in checkpoints],
        [plan.tier.value for plan in planned],
    )
    if inserted != f"INSERT 0 {len(planned)}":
        raise _Changed


async def record_events(
    connection: asyncpg.Connection, events: Sequence[tuple[str, str, str]], at: datetime
) -> dict[JobId, int]:
    """Write (job, state, sentence) events, stamp them on the jobs, and return each job's number."""
    if not events:
        return {}
    rows = await connection.fetch(
        """WITH event AS (
               INSERT INTO scheduler.job_event (job_id, state, sentence, at)
               SELECT job_id, state, sentence, $4 FROM unnest($1::uuid[], $2::text[], $3::text[])
                      AS new (job_id, state, sentence)
               RETURNING job_id, seq)
           UPDATE scheduler.job SET event_seq = event.seq FROM event
           WHERE job.job_id = event.job_id AND NOT past
           RETURNING job.job_id::text, event.seq""",
        [job_id for job_id, _, _ in events],
        [state for _, state, _ in events],
        [sentence for _, _, sentence in events],
        at,
    )
    return {JobId(row["job_id"]): row["seq"] for row in rows}
