"""Files that no row names: what was found in the artifact store, held against the rows of jobs.

Nothing is judged by the time at which a file was written, which not every store can tell, and no two clocks
agree about. What nobody names is noted, and goes when it is still there and unnamed a week later: by then
no attempt is left that may be writing it, and somebody who restored the wrong backup has noticed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import timedelta
from uuid import UUID

from scheduler.store.jobs import JobState
from scheduler.store.pool import Connection

JOBS = "jobs"
"""The folder of what attempts deliver, and of their checkpoints: a folder for each job."""
PICTURES = "pictures"
"""The folder of the pictures of prompts."""


async def unnamed_of_jobs(connection: Connection, paths: Collection[str]) -> set[str]:
    """Return those of these files, each in the folder of a job, that no row names; or its folder for all of
    them.

    Of a job that lives, all are named: its attempts may be writing. What is in no folder that could be a
    job's is somebody else's.
    """
    by_job: dict[UUID, list[str]] = {}
    for path in paths:
        _, folder, *file = path.split("/", 2)
        if file and (job_id := _as_uuid(folder)) is not None:
            by_job.setdefault(job_id, []).append(path)
    rows = await connection.fetch(
        """SELECT job_id, state, deleted_at IS NOT NULL OR expired_at IS NOT NULL AS emptied,
                  files_due_at IS NOT NULL AS is_due,
                  array(SELECT jsonb_array_elements(images) ->> 'path')
                  || array(SELECT jsonb_array_elements(videos) ->> 'path')
                  || array[latents_path, checkpoint ->> 'path'] AS named
           FROM scheduler.job WHERE job_id = ANY($1)""",
        list(by_job),
    )
    known = {row["job_id"]: row for row in rows}
    unnamed: set[str] = set()
    for job_id, files in by_job.items():
        row = known.get(job_id)
        if row is None or (row["emptied"] and not row["is_due"]):
            unnamed.add(f"{JOBS}/{job_id}/")
        elif JobState(row["state"]).ended and not row["is_due"]:
            unnamed |= set(files) - set(row["named"])
    return unnamed


async def unnamed_pictures(connection: Connection, pictures: Collection[str]) -> set[str]:
    """Return those of these pictures of prompts that no job has and that are not listed as strays."""
    rows = await connection.fetch(
        """SELECT path FROM unnest($1::text[]) AS found (path)
           WHERE NOT EXISTS (SELECT FROM scheduler.stray_picture WHERE stray_picture.path = found.path)
             AND NOT EXISTS (
               SELECT FROM scheduler.job
               WHERE spec -> 'pictures' <> '[]' AND deleted_at IS NULL
                     AND spec -> 'pictures' @> jsonb_build_array(jsonb_build_object('path', found.path)))""",
        list(pictures),
    )
    return {row["path"] for row in rows}


def _as_uuid(text: str) -> UUID | None:
    try:
        job_id = UUID(text)
    except ValueError:
        return None
    return job_id if str(job_id) == text else None


async def note(connection: Connection, prefix: str, unnamed: Iterable[str]) -> int:
    """Note what of the files whose paths begin with `prefix` nobody names; the rest of them is noted no more.

    Returns how many were not noted before.
    """
    paths = list(unnamed)
    await connection.execute(
        "DELETE FROM scheduler.orphan_file WHERE path ^@ $1 AND path <> ALL($2)", prefix, paths
    )
    done: str = await connection.execute(
        """INSERT INTO scheduler.orphan_file (path) SELECT DISTINCT unnest($1::text[]) ORDER BY 1
           ON CONFLICT DO NOTHING""",
        paths,
    )
    return int(done.rpartition(" ")[2])


async def due(connection: Connection, prefix: str, *, noted_for: timedelta) -> Sequence[str]:
    """Return those whose paths begin with `prefix` that were noted so long ago, or longer, in their order."""
    rows = await connection.fetch(
        """SELECT path FROM scheduler.orphan_file WHERE path ^@ $1 AND since <= now() - $2::interval
           ORDER BY path""",
        prefix,
        noted_for,
    )
    return [row["path"] for row in rows]


async def gone(connection: Connection, path: str) -> bool:
    """Take a path off the list: it is not in the store any more. Returns whether it was on it."""
    done: str = await connection.execute("DELETE FROM scheduler.orphan_file WHERE path = $1", path)
    return done != "DELETE 0"
