"""Pictures that their account's plan keeps no longer: their job's row says so first, then their files go.

What counts is the plan that the account is on when it is looked at, not the one of the day they were made:
whoever moves to a plan that keeps them longer saves those that are still there, and whoever moves to one
that keeps them shorter has been told so by the preview of that change. The row stays with everything but its
pictures, videos and latents, so that the job can still be shown and rerolled; pictures that were sent along
with its prompt stay with the prompt. `deletions.leftovers` then has the files, and leaves them as long as a
live job starts from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from scheduler.store.pool import Connection


async def accounts_behind(
    connection: Connection, account_id: str, *, limit: int
) -> Sequence[tuple[str, int]]:
    """Return the next `limit` accounts with ids behind this one, and how many days each has pictures kept.

    0 days are for ever. As of its newest period: who is due is asked again under its lock.
    """
    rows = await connection.fetch(
        """SELECT account_id, picture_retention_days
           FROM billing.subscription JOIN billing.plan_version USING (plan, version)
           WHERE account_id > $1 ORDER BY account_id LIMIT $2""",
        account_id,
        limit,
    )
    return [(row["account_id"], row["picture_retention_days"]) for row in rows]


async def with_expired(
    connection: Connection, accounts: Sequence[tuple[str, int]], at: datetime
) -> list[str]:
    """Return those of these accounts that have pictures of jobs which ended so many days before `at`, or
    more.
    """
    kept = [(account_id, days) for account_id, days in accounts if days > 0]
    rows = await connection.fetch(
        """SELECT account_id FROM unnest($1::text[], $2::timestamptz[]) AS kept (account_id, until)
           WHERE EXISTS (
               SELECT FROM scheduler.job
               WHERE past AND job.account_id = kept.account_id AND state = 'succeeded' AND deleted_at IS NULL
                     AND expired_at IS NULL AND ended_at <= until)""",
        [account_id for account_id, _ in kept],
        [at - timedelta(days=days) for _, days in kept],
    )
    return [row["account_id"] for row in rows]


async def expire(
    connection: Connection, account_id: str, *, ended_by: datetime, at: datetime, limit: int
) -> list[str]:
    """Let the pictures of up to `limit` past jobs of an account go, the oldest first; return the jobs.

    Those that ended at `ended_by` or before. The caller has locked the account, so that no job is accepted
    meanwhile that starts from one of them.
    """
    rows = await connection.fetch(
        """WITH due AS (
               SELECT job_id FROM scheduler.job
               WHERE past AND account_id = $1 AND state = 'succeeded' AND deleted_at IS NULL
                     AND expired_at IS NULL AND ended_at <= $2
               ORDER BY ended_at LIMIT $4 FOR UPDATE SKIP LOCKED)
           UPDATE scheduler.job
           SET expired_at = $3, files_due_at = now(), images = '[]', videos = NULL, latents_path = NULL
           FROM due WHERE past AND job.job_id = due.job_id
           RETURNING job.job_id::text""",
        account_id,
        ended_by,
        at,
        limit,
    )
    return [row["job_id"] for row in rows]


async def expired_at(connection: Connection, job_id: str) -> datetime | None:
    """Return when the pictures of a job went by its account's plan; None: they did not."""
    at: datetime | None = await connection.fetchval(
        "SELECT expired_at FROM scheduler.job WHERE job_id = $1", UUID(job_id)
    )
    return at
