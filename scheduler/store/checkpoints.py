"""Where runs got to, as rows: the newest checkpoint of each live job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import asyncpg

from gpu_worker.contract import Checkpoint, StageTimes
from scheduler.policy import job as policy
from scheduler.store.leadership import require_leader


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint that a worker says it has stored for an attempt."""

    attempt_id: str
    token: str
    checkpoint: Checkpoint


async def store_checkpoints(
    connection: asyncpg.Connection, *, epoch: int, saved: Sequence[SavedCheckpoint]
) -> set[str]:
    """Write the newest checkpoints of running attempts; returns the attempts whose were taken.

    One of an attempt that was given up is not: its job may have gone on from an older one. Locks the jobs.
    Raises Deposed.
    """
    async with connection.transaction():
        await require_leader(connection, epoch)
        rows = await connection.fetch(
            """UPDATE scheduler.job SET checkpoint = new.checkpoint
               FROM unnest($1::uuid[], $2::uuid[], $3::jsonb[]) AS new (attempt_id, token, checkpoint)
                    JOIN scheduler.attempt USING (attempt_id, token)
               WHERE attempt.state = 'running' AND job.job_id = attempt.job_id AND NOT past
                     AND job.state = 'running'
               RETURNING attempt_id::text""",
            [one.attempt_id for one in saved],
            [one.token for one in saved],
            [checkpoint_to_json(one.checkpoint) for one in saved],
        )
    return {row["attempt_id"] for row in rows}


def checkpoint_to_json(checkpoint: Checkpoint) -> str:
    """Return a checkpoint as the `checkpoint` column has it."""
    return json.dumps(asdict(checkpoint))


def checkpoint_from_json(text: str | None) -> Checkpoint | None:
    """Return the checkpoint that `checkpoint_to_json` wrote; None: there is none."""
    if text is None:
        return None
    document: Mapping[str, Any] = json.loads(text)
    return Checkpoint(**{**document, "kept": StageTimes(**document["kept"])})


def as_policy_sees(checkpoint: Checkpoint) -> policy.Checkpoint:
    """Return of a checkpoint what decides where its job goes on."""
    return policy.Checkpoint(step=checkpoint.step, kept_ms=checkpoint.kept.gpu_ms, device=checkpoint.device)
