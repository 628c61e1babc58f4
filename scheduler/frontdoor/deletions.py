"""The files of deleted jobs: removed after their rows say so, sooner or later.

A row is deleted first. Its files are tried at once; what a crash, a store that is away or a live job that
starts from them leaves over goes with a later sweep. Pictures of prompts, which several jobs may share, go an
hour after the last of them, and checkpoints ten minutes after the last job that could go on from them. Sweeps
of several front doors do each other no harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from scheduler.frontdoor.artifacts import Artifacts
from scheduler.refusals import Overloaded
from scheduler.store import deletions, stray_checkpoints, stray_pictures
from scheduler.store.pool import Pool

_log = structlog.get_logger()

_SWEEP_EVERY_S = 60.0
_MOST_SWEPT = 100


class Deletions:
    """Removes what is left of deleted jobs from the artifact store."""

    def __init__(self, pool: Pool, artifacts: Artifacts) -> None:
        self._pool = pool
        self._artifacts = artifacts

    async def run(self) -> None:
        """Sweep every minute until cancelled."""
        while True:
            await self.sweep()
            await asyncio.sleep(_SWEEP_EVERY_S)

    async def sweep(self) -> None:
        """Remove files of up to 100 deleted jobs, and 100 strays of each kind.

        The log says what could not go yet.
        """
        try:
            async with self._pool.reading() as connection:
                job_ids = await deletions.leftovers(connection, limit=_MOST_SWEPT)
                pictures = await stray_pictures.due(connection, limit=_MOST_SWEPT)
                checkpoints = await stray_checkpoints.due(connection, limit=_MOST_SWEPT)
        except Overloaded as away:
            _log.warning("files of deleted jobs not looked for", trouble=repr(away.__cause__))
            return
        for job_id in job_ids:
            with _logged(f"jobs/{job_id}"):
                await self._remove(job_id)
        for path in checkpoints:
            with _logged(path):
                await self._artifacts.delete(path)
                async with self._pool.reading() as connection:
                    await stray_checkpoints.gone(connection, path)
        for path in pictures:
            with _logged(path):
                # The file inside the transaction: if it cannot go, it is still on the list.
                # Danger: a request that stores the same bytes in this very moment may lose them. Nobody has
                # had them for an hour.
                async with self._pool.transaction() as connection:
                    if await stray_pictures.take(connection, path):
                        await self._artifacts.delete(path)

    async def remove(self, job_id: str) -> None:
        """Remove the files of one deleted job, if they can go now: else a later sweep does."""
        with _logged(f"jobs/{job_id}"):
            async with self._pool.reading() as connection:
                free = await deletions.leftovers(connection, limit=1, job_id=job_id)
            for each in free:
                await self._remove(each)

    async def _remove(self, job_id: str) -> None:
        await self._artifacts.delete_job(job_id)
        async with self._pool.reading() as connection:
            await deletions.files_are_gone(connection, job_id)


@contextmanager
def _logged(path: str) -> Iterator[None]:
    try:
        yield
    except Overloaded as away:
        _log.warning("file not removed yet", path=path, trouble=repr(away.__cause__))
