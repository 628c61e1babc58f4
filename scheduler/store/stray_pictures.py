"""Pictures of prompts that perhaps no job has: noted before they are stored and when their job is deleted.

They are named by their content, so that jobs of several accounts may have the same one; it goes with the
last of them. Whoever removes a file keeps its row locked until the file is gone, and whoever stores it notes
it first, waiting for that row: so nobody's file is removed right after it was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from scheduler.store.pool import Connection

# Longer than any request takes from storing its pictures to the row of its job.
_UNTOUCHED_FOR = timedelta(hours=1)


async def note(connection: Connection, paths: Sequence[str]) -> None:
    """Note pictures that no row has yet; whoever looks for strays leaves them alone for an hour.

    Waits until files of them that are being removed are gone.
    """
    await connection.execute(
        """INSERT INTO scheduler.stray_picture (path) SELECT DISTINCT unnest($1::text[]) ORDER BY 1
           ON CONFLICT (path) DO UPDATE SET since = now()""",
        paths,
    )


async def due(connection: Connection, *, limit: int) -> list[str]:
    """Return up to `limit` pictures that were noted an hour ago or longer."""
    rows = await connection.fetch(
        "SELECT path FROM scheduler.stray_picture WHERE since < now() - $1::interval ORDER BY since LIMIT $2",
        _UNTOUCHED_FOR,
        limit,
    )
    return [row["path"] for row in rows]


async def try_later(connection: Connection, path: str) -> None:
    """Put off a picture whose file cannot go now: it is due again in an hour."""
    await connection.execute("UPDATE scheduler.stray_picture SET since = now() WHERE path = $1", path)


async def take(connection: Connection, path: str) -> bool:
    """Take a picture off the list; returns whether no job has it, so that its file is to go.

    It goes in the caller's transaction, which holds the lock on its row. False too if it was noted again, or
    if another transaction takes it.
    """
    taken = await connection.fetchval(
        """DELETE FROM scheduler.stray_picture WHERE path = (
               SELECT path FROM scheduler.stray_picture WHERE path = $1 AND since < now() - $2::interval
               FOR UPDATE SKIP LOCKED)
           RETURNING true""",
        path,
        _UNTOUCHED_FOR,
    )
    if not taken:
        return False
    used: bool = await connection.fetchval(
        """SELECT EXISTS (
               SELECT FROM scheduler.job
               WHERE spec -> 'pictures' <> '[]' AND deleted_at IS NULL
                     AND spec -> 'pictures' @> jsonb_build_array(jsonb_build_object('path', $1::text)))""",
        path,
    )
    return not used
