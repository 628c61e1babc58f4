"""Pictures that are given with a prompt: read once, at submission, and stored as plain PNGs.

After that nobody needs the URL or the uploaded file again: an attempt, a retry and a reroll in a year all
draw after the same bytes, whose hash is their name.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeAlias

from aiohttp.abc import AbstractResolver

from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.picture_files import Unreadable, as_stored
from scheduler.frontdoor.picture_urls import PictureUrls, Reachable, is_public
from scheduler.refusals import FieldViolation, Overloaded, PictureUnreadable
from scheduler.settings import Pictures as PictureSettings

PICTURES_MAX = 5
"""Of one job."""

# Of requests with pictures, each with up to five files of `bytes_max`: what they may hold of memory together.
_REQUESTS_AT_ONCE = 8
# Beside those: a request that waits holds the files that came with it.
_WAITING_AT_MOST = 8
# Of either kind: whatever one account sends, the others' pictures are read. Once some have to wait, one: so a
# few accounts together do not take all the places.
_OF_AN_ACCOUNT = 2
# Each takes up to 17 bytes a pixel (an animated WebP; a PNG with alpha 13) and a core for about a second.
_DECODED_AT_ONCE = 2


Note: TypeAlias = Callable[[Sequence[str]], Awaitable[None]]
"""Writes down paths in the artifact store, durably."""


class Pictures:
    """The pictures of prompts in an artifact store. `reachable` says which addresses may be fetched from."""

    def __init__(
        self,
        artifacts: Artifacts,
        settings: PictureSettings,
        *,
        reachable: Reachable = is_public,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._artifacts = artifacts
        self._settings = settings
        self._urls = PictureUrls(settings, reachable=reachable, resolver=resolver)
        self._turns = asyncio.Semaphore(_REQUESTS_AT_ONCE)
        self._requests: Counter[str] = Counter()
        """Of each account, with those that wait for their turn."""
        self._decoders = ThreadPoolExecutor(_DECODED_AT_ONCE, thread_name_prefix="pictures")

    async def stored(
        self, account_id: str, uploads: Sequence[bytes], urls: Sequence[str], note: Note
    ) -> tuple[str, ...]:
        """Store an account's pictures and return their paths in the artifact store, uploads first.

        The same pixels have the same path. Nothing is stored if one picture is unreadable; `note` is told of
        the paths before any is written, so that none is there of which nobody knows. Raises
        PictureUnreadable, which names all that are; Overloaded where too many are read, at once if two of
        the account's own requests are.
        """
        assert 0 < len(uploads) + len(urls) <= PICTURES_MAX, "whoever read the prompt has counted them"
        async with self._turn(account_id):
            async with asyncio.TaskGroup() as group:
                tasks = [
                    *(
                        group.create_task(
                            self._png(
                                account_id,
                                upload,
                                f"imagine.pictures[{index}]",
                                f"Uploaded picture {index + 1}",
                            )
                        )
                        for index, upload in enumerate(uploads)
                    ),
                    *(
                        group.create_task(self._png(account_id, url, "prompt", f"Picture URL {index + 1}"))
                        for index, url in enumerate(urls)
                    ),
                ]
            outcomes = [task.result() for task in tasks]
            violations = [outcome for outcome in outcomes if isinstance(outcome, FieldViolation)]
            if violations:
                raise PictureUnreadable(violations)
            files = [(_path(png), png) for png in outcomes if isinstance(png, bytes)]
            await note([path for path, _ in files])
            for path, png in files:
                await self._artifacts.put(path, png)
            return tuple(path for path, _ in files)

    @asynccontextmanager
    async def _turn(self, account_id: str) -> AsyncIterator[None]:
        crowded = self._requests.total() >= _REQUESTS_AT_ONCE
        if self._requests[account_id] >= (1 if crowded else _OF_AN_ACCOUNT):
            raise Overloaded(
                sentence="Pictures of other requests of yours are being read; try again in a moment."
            )
        if self._requests.total() >= _REQUESTS_AT_ONCE + _WAITING_AT_MOST:
            raise _too_many()
        self._requests[account_id] += 1
        try:
            async with self._own_turn():
                yield
        finally:
            self._requests -= Counter((account_id,))  # which drops an account that has none left

    @asynccontextmanager
    async def _own_turn(self) -> AsyncIterator[None]:
        try:
            # What is ahead needs about as long as fetching may take.
            async with asyncio.timeout(self._settings.fetch_ms / 1_000):
                await self._turns.acquire()
        except TimeoutError as late:
            raise _too_many() from late
        try:
            yield
        finally:
            self._turns.release()

    async def _png(
        self, account_id: str, given: bytes | str, field: str, name: str
    ) -> bytes | FieldViolation:
        try:
            content = await self._urls.content(given, account_id) if isinstance(given, str) else given
            return await asyncio.get_running_loop().run_in_executor(
                self._decoders, as_stored, content, self._settings.pixels_max
            )
        except Unreadable as unreadable:
            return FieldViolation(field=field, sentence=f"{name} {unreadable}")


def _path(png: bytes) -> str:
    return f"pictures/{hashlib.sha256(png).hexdigest()}.png"


def _too_many() -> Overloaded:
    return Overloaded(sentence="Too many pictures are being read at the moment; try again.")
