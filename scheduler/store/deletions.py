"""Deleted jobs: a row that says so first, files that go after it, and rows that tell which are still to go.

The row of a deleted job stays, without its text and its pictures: the ledger, and jobs that were made of it,
refer to it. Its files stay as long as a live job starts from them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from billing import accounts as ledger_accounts
from scheduler.store.jobs import JobState
from scheduler.store.pool import Connection

# Longer than a worker that was given up goes on writing: what it stores after the files went, goes then.
_WRITTEN_FOR = timedelta(minutes=10)
_TRIED_AGAIN_AFTER = timedelta(minutes=1)


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
    deleted = await _delete(connection, [UUID(job_id)])
    assert deleted == [job_id], "the caller locked a job that has ended"


async def delete_ended_jobs(connection: Connection, account_id: str, *, limit: int) -> list[str]:
    """Delete up to `limit` jobs of an account that have ended, and return which."""
    rows = await connection.fetch(
        """SELECT job_id FROM scheduler.job
           WHERE account_id = $1 AND ended_at IS NOT NULL AND deleted_at IS NULL
           ORDER BY arrival LIMIT $2 FOR UPDATE""",
        account_id,
        limit,
    )
    return await _delete(connection, [row["job_id"] for row in rows])


async def _delete(connection: Connection, job_ids: Collection[UUID]) -> list[str]:
    rows = await connection.fetch(
        """WITH silenced AS (UPDATE scheduler.job_event SET sentence = '' WHERE job_id = ANY($1)),
           strays AS (
               INSERT INTO scheduler.stray_picture (path)
               SELECT DISTINCT part ->> 'path'
               FROM scheduler.job, jsonb_array_elements(spec -> 'pictures') part
               WHERE job_id = ANY($1) ORDER BY 1
               ON CONFLICT (path) DO UPDATE SET since = now())
           UPDATE scheduler.job
           SET deleted_at = now(), files_due_at = now(),
               prompt = '', warnings = '{}', videos = NULL, latents_path = NULL, traceparent = NULL,
               spec = spec || '{"prompt": "", "parts": [], "pictures": []}' || CASE
                   -- Which job it is stays: that one's files may not go before this one has ended. Names of
                   -- files have words of the prompt.
                   WHEN jsonb_typeof(spec -> 'source') = 'object' THEN jsonb_build_object(
                       'source', spec -> 'source' || '{"latents_path": "", "picture_path": ""}')
                   ELSE '{}' END,
               images = CASE WHEN images IS NOT NULL THEN '[]'::jsonb END,
               receipt = receipt || '{"reproduction": {}}', failure_sentence = NULL
           WHERE job_id = ANY($1) AND ended_at IS NOT NULL AND deleted_at IS NULL
           RETURNING job_id::text""",
        job_ids,
    )
    return [row["job_id"] for row in rows]


async def accounts_to_erase(connection: Connection) -> list[str]:
    """Return the accounts that are to be erased and still have their ids."""
    rows = await connection.fetch(
        "SELECT account_id FROM scheduler.account WHERE erasing ORDER BY account_id"
    )
    return [row["account_id"] for row in rows]


async def erase_if_at_rest(connection: Connection, account_id: str, at: datetime) -> str | None:
    """Give an account that is to be erased its other id, and return it; None if that cannot be yet.

    First every job of it has to be deleted, and the scheduler to have written that it is out of both queues:
    from then on, it writes nothing under the id that it knows.
    """
    # The row's lock: two front doors may come at once, and the second finds nothing to erase.
    at_rest = await connection.fetchval(
        """UPDATE scheduler.account SET erasing = false
           WHERE account_id = $1 AND erasing
                 AND NOT EXISTS (SELECT FROM scheduler.job
                                 WHERE job.account_id = account.account_id AND deleted_at IS NULL)
                 AND NOT EXISTS (SELECT FROM scheduler.fair_share
                                 WHERE fair_share.account_id = account.account_id AND tag IS NOT NULL)
           RETURNING true""",
        account_id,
    )
    if not at_rest:
        return None
    # One may have been made meanwhile.
    await connection.execute("DELETE FROM scheduler.api_key WHERE account_id = $1", account_id)
    return await ledger_accounts.erase(connection, account_id, at)


async def deleted_among(connection: Connection, job_ids: Collection[str]) -> set[str]:
    """Return which of these jobs were deleted."""
    rows = await connection.fetch(
        "SELECT job_id::text FROM scheduler.job WHERE job_id = ANY($1::uuid[]) AND deleted_at IS NOT NULL",
        [UUID(job_id) for job_id in job_ids],
    )
    return {row["job_id"] for row in rows}


async def leftovers(connection: Connection, *, limit: int, job_id: str | None = None) -> list[str]:
    """Return up to `limit` deleted jobs, or this one alone, whose files are due and can go now.

    No live job starts from them. Those that were tried come after those that were not.
    """
    rows = await connection.fetch(
        """SELECT job_id::text FROM scheduler.job deleted
           WHERE files_due_at <= now() AND ($2::uuid IS NULL OR job_id = $2)
                 AND NOT EXISTS (
                     SELECT FROM scheduler.job live
                     WHERE NOT live.past AND live.state IN ('queued', 'running')
                           AND live.spec -> 'source' ->> 'job_id' = deleted.job_id::text)
           ORDER BY files_due_at LIMIT $1""",
        limit,
        None if job_id is None else UUID(job_id),
    )
    return [row["job_id"] for row in rows]


async def files_are_gone(connection: Connection, job_id: str) -> None:
    """Note that nothing of a deleted job is left in the artifact store.

    That is for good ten minutes after its deletion; before, they are due once more by then.
    """
    await connection.execute(
        """UPDATE scheduler.job
           SET files_due_at = CASE WHEN now() < deleted_at + $2::interval THEN deleted_at + $2::interval END
           WHERE job_id = $1""",
        UUID(job_id),
        _WRITTEN_FOR,
    )


async def try_later(connection: Connection, job_id: str) -> None:
    """Put off a deleted job whose files cannot go now: they are due in a minute, behind all that are now."""
    await connection.execute(
        "UPDATE scheduler.job SET files_due_at = now() + $2::interval WHERE job_id = $1",
        UUID(job_id),
        _TRIED_AGAIN_AFTER,
    )
