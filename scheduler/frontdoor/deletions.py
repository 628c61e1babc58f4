"""The files of deleted jobs: removed after their rows say so, sooner or later.

A row is deleted first. Its files are tried at once; what a crash, a store that is away or a live job that
starts from them leaves over goes with a later sweep, and what a worker that was given up stores too late, ten
minutes after the deletion. Pictures of prompts, which several jobs may share, go an
hour after the last of them, and checkpoints ten minutes after the last job that could go on from them. Sweeps
of several front doors do each other no harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Protocol

import structlog

from scheduler.frontdoor.artifacts import Artifacts
from scheduler.refusals import Overloaded
from scheduler.store import deletions, stray_checkpoints, stray_pictures
from scheduler.store.pool import Connection, Pool

_log = structlog.get_logger()

_SWEEP_EVERY_S = 60.0
_PAGE = 100
# Rows of one transaction: so few that nobody waits for it.
_MOST_ERASED = 1_000


class Deletions:
    """Removes what is left of deleted jobs and accounts. `clock` returns the present time, aware."""

    def __init__(self, pool: Pool, artifacts: Artifacts, clock: Callable[[], datetime]) -> None:
        self._pool = pool
        self._artifacts = artifacts
        self._clock = clock

    async def run(self) -> None:
        """Sweep every minute until cancelled."""
        while True:
            await self.sweep()
            await asyncio.sleep(_SWEEP_EVERY_S)

    async def sweep(self) -> None:
        """Go on with erasures; remove the files of deleted jobs and the strays of each kind that are due.

        The log says what could not go yet: it is tried again later, behind what was not tried.
        """
        try:
            async with self._pool.reading() as connection:
                erased = await deletions.accounts_to_erase(connection)
            for account_id in erased:
                await self._erase(account_id)
            await self._remove_due(deletions.leftovers, self._remove, deletions.try_later)
            await self._remove_due(
                stray_checkpoints.due, self._remove_checkpoint, stray_checkpoints.try_later
            )
            await self._remove_due(stray_pictures.due, self._remove_picture, stray_pictures.try_later)
        except Overloaded as away:
            _log.warning("files of deleted jobs not looked for", trouble=repr(away.__cause__))

    async def remove(self, job_id: str) -> None:
        """Remove the files of one deleted job, if they can go now: else a later sweep does."""
        try:
            async with self._pool.reading() as connection:
                free = await deletions.leftovers(connection, limit=1, job_id=job_id)
            for each in free:
                await self._remove(each)
        except Overloaded as away:
            _log_kept(job_id, away)

    async def erase(self, account_id: str) -> str | None:
        """Delete the jobs of an account that is to be erased, and the files of up to 100 of them.

        When none is left, the account gets its other id, which is returned; None: it has jobs that run still.
        They, and the other files, are for later sweeps. Raises Overloaded.
        """
        deleted, other_id = await self._erase(account_id)
        for job_id in deleted[:_PAGE]:
            await self.remove(job_id)
        return other_id

    async def _erase(self, account_id: str) -> tuple[list[str], str | None]:
        deleted: list[str] = []
        while True:
            async with self._pool.transaction() as connection:
                batch = await deletions.delete_ended_jobs(connection, account_id, limit=_MOST_ERASED)
            deleted += batch
            if len(batch) < _MOST_ERASED:
                break
        async with self._pool.transaction() as connection:
            return deleted, await deletions.erase_if_at_rest(connection, account_id, self._clock())

    async def _remove_due(
        self,
        due: _Due,
        remove: Callable[[str], Awaitable[None]],
        try_later: Callable[[Connection, str], Awaitable[None]],
    ) -> None:
        """Remove all that is due, page by page; stop at a page of which nothing can go: the store is away."""
        while True:
            async with self._pool.reading() as connection:
                page = await due(connection, limit=_PAGE)
            kept = 0
            for each in page:
                try:
                    await remove(each)
                except Overloaded as away:
                    kept += 1
                    _log_kept(each, away)
                    async with self._pool.reading() as connection:
                        await try_later(connection, each)
            if len(page) < _PAGE or kept == len(page):
                return

    async def _remove(self, job_id: str) -> None:
        await self._artifacts.delete_job(job_id)
        async with self._pool.reading() as connection:
            await deletions.files_are_gone(connection, job_id)

    async def _remove_checkpoint(self, path: str) -> None:
        await self._artifacts.delete(path)
        async with self._pool.reading() as connection:
            await stray_checkpoints.gone(connection, path)

    async def _remove_picture(self, path: str) -> None:
        # The file inside the transaction: if it cannot go, it is still on the list. And whoever is about to
        # store the same picture waits for the row, and writes the file after it went.
        async with self._pool.transaction() as connection:
            if await stray_pictures.take(connection, path):
                await self._artifacts.delete(path)


class _Due(Protocol):
    async def __call__(self, connection: Connection, *, limit: int) -> list[str]: ...


def _log_kept(what: str, away: Overloaded) -> None:
    _log.warning("files not removed yet", of=what, trouble=repr(away.__cause__))
