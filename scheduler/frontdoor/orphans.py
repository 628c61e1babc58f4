"""Files in the artifact store that no row names: found slowly, noted, and removed a week later.

What is left behind knowingly is listed as such (`deletions`, `stray_checkpoints`, `stray_pictures`) and
goes within the hour. Here is the net below: a process that died between writing a file and its row, a
database that was restored to an earlier day, a worker that nobody heard of again. The store is read in
4,096 parts by the first letters of its names, one a minute, so that a pass takes three days, and little
memory however large it is.

Pictures of prompts too are noted for that long first. As several jobs may share one, also one that is about
to be accepted, whoever then removes it is the sweep of strays, an hour later.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from scheduler.frontdoor.artifacts import Artifacts
from scheduler.metrics import FrontDoorMetrics
from scheduler.refusals import Overloaded
from scheduler.store import orphans, stray_pictures
from scheduler.store.pool import Pool

_log = structlog.get_logger()

_SWEEP_EVERY_S = 60.0
# Ids of jobs are random, and pictures are named by their hash: each part has as many as any other.
_PARTS = 16**3
# Files whose rows are asked for at once.
_AT_ONCE = 10_000
# What a process that died has left of a file that it wrote to a local folder.
_UNFINISHED = ".unfinished-"
_PICTURE = re.compile(rf"{orphans.PICTURES}/[0-9a-f]{{64}}\.png")
# Of what was removed, the log names so many.
_MOST_LOGGED = 10


@dataclass(frozen=True, kw_only=True)
class Orphan:
    """Something in the store that no row names."""

    path: str
    """Of a file; or of the folder of a job, with a slash at its end."""
    is_due: bool
    """It was noted so long ago that it goes."""


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep did."""

    noted: int
    """Orphans that were not noted before."""
    removed: tuple[str, ...]
    """What went, and the pictures of prompts that are strays from now on."""


class Orphans:
    """Looks for what no row names. `clock` returns the present time, aware; `kept` is how long it stays
    noted.
    """

    def __init__(
        self,
        pool: Pool,
        artifacts: Artifacts,
        metrics: FrontDoorMetrics,
        clock: Callable[[], datetime],
        kept: timedelta,
    ) -> None:
        self._pool = pool
        self._artifacts = artifacts
        self._metrics = metrics
        self._clock = clock
        self._kept = kept

    async def run(self) -> None:
        """Sweep a part a minute until cancelled, from one that the time tells: a restart goes on
        elsewhere.
        """
        part = int(self._clock().timestamp() // _SWEEP_EVERY_S)
        while True:
            try:
                await self.sweep(f"{part % _PARTS:03x}")
            except Overloaded as away:
                _log.warning("orphans not looked for", trouble=repr(away.__cause__))
            part += 1
            await asyncio.sleep(_SWEEP_EVERY_S)

    async def sweep(self, prefix: str) -> Swept:
        """Note the orphans whose names begin so, and remove those that are due. Raises Overloaded."""
        noted = 0
        removed: list[str] = []
        for folder, first in _places(prefix):
            unnamed = await self._unnamed(folder, first)
            place = f"{folder}/{first}"
            async with self._pool.transaction() as connection:
                new = await orphans.note(connection, place, unnamed)
                due = await orphans.due(connection, place, noted_for=self._kept)
            self._metrics.orphans_noted(new)
            noted += new
            for path in due:
                await self._remove(path)
                removed.append(path)
        if noted or removed:
            _log.info(
                "orphans seen", prefix=prefix, noted=noted, removed=len(removed), first=removed[:_MOST_LOGGED]
            )
        return Swept(noted=noted, removed=tuple(removed))

    async def found(self, prefix: str) -> AsyncIterator[Orphan]:
        """Yield what `sweep` would note or remove, and change nothing. Raises Overloaded."""
        for folder, first in _places(prefix):
            unnamed = await self._unnamed(folder, first)
            async with self._pool.reading() as connection:
                due = await orphans.due(connection, f"{folder}/{first}", noted_for=self._kept)
            for path in sorted(unnamed):
                yield Orphan(path=path, is_due=path in due)

    async def _remove(self, path: str) -> None:
        if _PICTURE.fullmatch(path):
            async with self._pool.transaction() as connection:
                await stray_pictures.note(connection, [path])
                was_listed = await orphans.gone(connection, path)
            if was_listed:
                self._metrics.orphan_is_stray()
            return
        file_or_folder = path.removesuffix("/")
        size_bytes = await self._artifacts.size_bytes(file_or_folder)
        await self._artifacts.delete(file_or_folder)
        async with self._pool.reading() as connection:
            was_listed = await orphans.gone(connection, path)
        # Of several front doors that are at the same part, one counts it.
        if was_listed:
            self._metrics.orphan_removed(size_bytes)

    async def _unnamed(self, folder: str, first: str) -> set[str]:
        # Before the rows: a file that is written meanwhile is of an attempt whose job lives, or has it in
        # its row.
        paths = await self._artifacts.listed(folder, first)
        unnamed: set[str] = set()
        if folder == orphans.PICTURES:
            unfinished = f"{orphans.PICTURES}/{_UNFINISHED}"
            unnamed |= {path for path in paths if path.startswith(unfinished)}
            paths = [path for path in paths if _PICTURE.fullmatch(path)]
        of = orphans.unnamed_pictures if folder == orphans.PICTURES else orphans.unnamed_of_jobs
        for begin in range(0, len(paths), _AT_ONCE):
            async with self._pool.reading() as connection:
                unnamed |= await of(connection, paths[begin : begin + _AT_ONCE])
        return unnamed


def _places(prefix: str) -> list[tuple[str, str]]:
    """Return folders, and how the names begin there: what was left unfinished belongs to the first part."""
    is_first = prefix != "" and not prefix.strip("0")
    unfinished = [(orphans.PICTURES, _UNFINISHED)] if is_first else []
    return [(orphans.JOBS, prefix), (orphans.PICTURES, prefix), *unfinished]
