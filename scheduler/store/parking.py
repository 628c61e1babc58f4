"""Runs that lose their GPU in the middle and get one again: the rows of parks, resumes and migrations.

And of runs that need theirs no more, which is what lets another have it.

All of it is part of the loop's batch (`dispatch.start_attempts`). A row that does not run any more, because
its attempt was settled and the board has yet to hear of it, is left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from gpu_worker.contract import Checkpoint
from scheduler.clock import from_ms
from scheduler.policy.ids import JobId
from scheduler.store.checkpoints import checkpoint_from_json


@dataclass(frozen=True, kw_only=True)
class DrawnAttempt:
    """An attempt that needs its worker's GPU no more, though it has yet to end."""

    attempt_id: str
    at_ms: int


@dataclass(frozen=True, kw_only=True)
class PlannedResume:
    """A parked run that is to go on where it is."""

    attempt_id: str
    sheltered: bool
    sentence: str


@dataclass(frozen=True, kw_only=True)
class PlannedMigration:
    """A parked run that is to go on elsewhere, as an attempt whose id is chosen before it is written."""

    attempt_id: str
    to_attempt_id: str
    token: str
    worker_id: str
    incarnation: str
    decision: Mapping[str, Any]
    sentence: str


@dataclass(frozen=True, kw_only=True)
class MigratedAttempt:
    """A migration that is a row now."""

    planned: PlannedMigration
    event_seq: int
    spec: Mapping[str, Any]
    checkpoint: Checkpoint


async def let_go(connection: asyncpg.Connection, drawn: Sequence[DrawnAttempt]) -> None:
    """Have these attempts, where they still run, keep their workers from nothing. Locks the attempts."""
    if not drawn:
        return
    await connection.execute(
        """UPDATE scheduler.attempt SET drawn_at = new.at
           FROM unnest($1::uuid[], $2::timestamptz[]) AS new (attempt_id, at)
           WHERE attempt.attempt_id = new.attempt_id AND state = 'running' AND drawn_at IS NULL""",
        [one.attempt_id for one in drawn],
        [from_ms(one.at_ms) for one in drawn],
    )


async def park(connection: asyncpg.Connection, attempt_ids: Sequence[str], at: datetime) -> list[JobId]:
    """Take these attempts' GPUs; returns the jobs of those that still run. Locks the attempts."""
    if not attempt_ids:
        return []
    rows = await connection.fetch(
        """UPDATE scheduler.attempt SET parked_at = $2, parks = parks + 1
           WHERE attempt_id = ANY($1::uuid[]) AND state = 'running' AND parked_at IS NULL
           RETURNING job_id::text""",
        attempt_ids,
        at,
    )
    return [JobId(row["job_id"]) for row in rows]


async def resume(
    connection: asyncpg.Connection, resumes: Sequence[PlannedResume], at: datetime
) -> dict[JobId, PlannedResume]:
    """Give parked attempts their GPUs back; returns, by job, those that still run. Locks the attempts."""
    if not resumes:
        return {}
    rows = await connection.fetch(
        """UPDATE scheduler.attempt
           SET parked_ms = parked_ms + greatest(0, (extract(epoch FROM $3 - parked_at) * 1000)::bigint),
               parked_at = NULL, sheltered = plan.sheltered
           FROM unnest($1::uuid[], $2::boolean[]) AS plan (attempt_id, sheltered)
           WHERE attempt.attempt_id = plan.attempt_id AND state = 'running' AND parked_at IS NOT NULL
           RETURNING attempt.attempt_id::text, job_id::text""",
        [one.attempt_id for one in resumes],
        [one.sheltered for one in resumes],
        at,
    )
    planned = {one.attempt_id: one for one in resumes}
    return {JobId(row["job_id"]): planned[row["attempt_id"]] for row in rows}


async def migrate(
    connection: asyncpg.Connection, epoch: int, migrations: Sequence[PlannedMigration], at: datetime
) -> dict[JobId, PlannedMigration]:
    """Close parked attempts and open the ones that go on with their runs; returns, by job, those that ran.

    The new one takes over what the old was charged, so nothing is charged twice. Locks the attempts.
    """
    if not migrations:
        return {}
    rows = await connection.fetch(
        """WITH closed AS (
               UPDATE scheduler.attempt
               SET state = 'migrated', ended_at = $6, gpu_ms = 0, parked_at = NULL,
                   parked_ms = parked_ms + greatest(0, (extract(epoch FROM $6 - parked_at) * 1000)::bigint)
               FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $7::jsonb[])
                    AS plan (attempt_id, to_attempt_id, token, worker_id, incarnation, decision)
               WHERE attempt.attempt_id = plan.attempt_id AND state = 'running' AND parked_at IS NOT NULL
               RETURNING attempt.attempt_id, job_id, number, predicted_ms, charged_at_ms, weight_milli, parks,
                         sheltered, plan.to_attempt_id, plan.token, plan.worker_id, plan.incarnation,
                         plan.decision)
           INSERT INTO scheduler.attempt (attempt_id, job_id, number, token, epoch, worker_id, incarnation,
                                          started_at, predicted_ms, charged_at_ms, weight_milli, decision,
                                          parks, sheltered, migrated_from, kept_ms)
           SELECT to_attempt_id, job_id, number + 1, token, $8, worker_id, incarnation,
                  $6, closed.predicted_ms, charged_at_ms, weight_milli, decision,
                  parks, sheltered, attempt_id,
                  (SELECT sum(value::integer) FROM jsonb_each_text(checkpoint -> 'kept'))
           FROM closed JOIN scheduler.job USING (job_id) WHERE NOT past
           RETURNING attempt_id::text, job_id::text""",
        [one.attempt_id for one in migrations],
        [one.to_attempt_id for one in migrations],
        [one.token for one in migrations],
        [one.worker_id for one in migrations],
        [one.incarnation for one in migrations],
        at,
        [json.dumps(one.decision) for one in migrations],
        epoch,
    )
    planned = {one.to_attempt_id: one for one in migrations}
    return {JobId(row["job_id"]): planned[row["attempt_id"]] for row in rows}


async def migrated(
    connection: asyncpg.Connection, migrations: Sequence[PlannedMigration]
) -> list[MigratedAttempt]:
    """Return what the workers of these migrations, which are rows, are to be given."""
    if not migrations:
        return []
    rows = {
        row["attempt_id"]: row
        for row in await connection.fetch(
            """SELECT attempt_id::text, spec, checkpoint, event_seq
               FROM scheduler.attempt JOIN scheduler.job USING (job_id)
               WHERE attempt_id = ANY($1::uuid[])""",
            [one.to_attempt_id for one in migrations],
        )
    }
    found = []
    for one in migrations:
        row = rows.get(one.to_attempt_id)
        if row is None:
            continue
        checkpoint = checkpoint_from_json(row["checkpoint"])
        assert checkpoint is not None, "only a run with a checkpoint migrates"
        found.append(
            MigratedAttempt(
                planned=one,
                event_seq=row["event_seq"],
                spec=json.loads(row["spec"]),
                checkpoint=checkpoint,
            )
        )
    return found
