"""Files of checkpoints that no row names any more, and that nobody may have deleted.

The database notes them whenever a job's checkpoint is replaced by another file's, or dropped.
"""

from __future__ import annotations

from datetime import timedelta

from scheduler.store.pool import Connection

# Longer than a worker that was given up goes on writing over its checkpoint.
_UNNAMED_FOR = timedelta(minutes=10)


async def due(connection: Connection, *, limit: int) -> list[str]:
    """Return up to `limit` paths that were left behind ten minutes ago or longer, the oldest first."""
    rows = await connection.fetch(
        """SELECT path FROM scheduler.stray_checkpoint WHERE since < now() - $1::interval
           ORDER BY since LIMIT $2""",
        _UNNAMED_FOR,
        limit,
    )
    return [row["path"] for row in rows]


async def try_later(connection: Connection, path: str) -> None:
    """Put off a path whose file cannot go now: it is due again in ten minutes."""
    await connection.execute("UPDATE scheduler.stray_checkpoint SET since = now() WHERE path = $1", path)


async def gone(connection: Connection, path: str) -> None:
    """Take a path off the list: its file is not in the store any more."""
    await connection.execute("DELETE FROM scheduler.stray_checkpoint WHERE path = $1", path)
