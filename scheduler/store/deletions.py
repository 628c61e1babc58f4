"""Deleted jobs: a row that says so first, files that go after it, and rows that tell which are still to go.

The row of a deleted job stays, without its text and its pictures: the ledger, and jobs that were made of it,
refer to it. Its files stay as long as a live job starts from them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from scheduler.store.jobs import JobState
from scheduler.store.pool import Connection


@dataclass(frozen=True, kw_only=True)
class Deletable:
    """What decides whether a job may be deleted."""

    account_id: str
    state: JobState
    deleted: bool


async def lock_for_deletion(connection: Connection, job_id: str) -> Deletable | None:
    """Return a job, deleted or not, and lock its row; None if there is none of that id."""
    row = await connection.fetchrow(
        """SELECT account_id, state, deleted_at IS NOT NULL AS deleted FROM scheduler.job
           WHERE job_id = $1 FOR UPDATE""",
        UUID(job_id),
    )
    if row is None:
        return None
    return Deletable(account_id=row["account_id"], state=JobState(row["state"]), deleted=row["deleted"])


async def delete_job(connection: Connection, job_id: str) -> None:
    """Take everything out of a job that its owner wrote or was drawn for them; the caller has locked its row.

    What it cost stays. A sentence about how it ended may repeat what was asked for, so it goes too.
    """
    done = await connection.execute(
        """WITH silenced AS (UPDATE scheduler.job_event SET sentence = '' WHERE job_id = $1),
           strays AS (
               INSERT INTO scheduler.stray_picture (path)
               SELECT DISTINCT part ->> 'path'
               FROM scheduler.job, jsonb_array_elements(spec -> 'pictures') part
               WHERE job_id = $1 ORDER BY 1
               ON CONFLICT (path) DO UPDATE SET since = now())
           UPDATE scheduler.job
           SET deleted_at = now(), prompt = '', warnings = '{}', videos = NULL, latents_path = NULL,
               spec = spec || '{"prompt": "", "parts": [], "pictures": []}',
               images = CASE WHEN images IS NOT NULL THEN '[]'::jsonb END,
               receipt = receipt || '{"reproduction": {}}', failure_sentence = NULL
           WHERE job_id = $1 AND ended_at IS NOT NULL AND deleted_at IS NULL""",
        UUID(job_id),
    )
    assert done == "UPDATE 1", "the caller locked a job that has ended"


async def deleted_among(connection: Connection, job_ids: Collection[str]) -> set[str]:
    """Return which of these jobs were deleted."""
    rows = await connection.fetch(
        "SELECT job_id::text FROM scheduler.job WHERE job_id = ANY($1::uuid[]) AND deleted_at IS NOT NULL",
        [UUID(job_id) for job_id in job_ids],
    )
    return {row["job_id"] for row in rows}


async def leftovers(connection: Connection, *, limit: int, job_id: str | None = None) -> list[str]:
    """Return up to `limit` deleted jobs, or this one alone, whose files can go now.

    No live job starts from them.
    """
    rows = await connection.fetch(
        """SELECT job_id::text FROM scheduler.job deleted
           WHERE deleted_at IS NOT NULL AND files_deleted_at IS NULL AND ($2::uuid IS NULL OR job_id = $2)
                 AND NOT EXISTS (
                     SELECT FROM scheduler.job live
                     WHERE live.state IN ('queued', 'running')
                           AND live.spec -> 'source' ->> 'job_id' = deleted.job_id::text)
           ORDER BY deleted_at LIMIT $1""",
        limit,
        None if job_id is None else UUID(job_id),
    )
    return [row["job_id"] for row in rows]


async def files_are_gone(connection: Connection, job_id: str) -> None:
    """Note that nothing of a deleted job is left in the artifact store."""
    await connection.execute(
        "UPDATE scheduler.job SET files_deleted_at = now() WHERE job_id = $1", UUID(job_id)
    )
