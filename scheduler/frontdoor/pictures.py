"""Pictures that are given with a prompt: read once, at submission, and stored as plain PNGs.

After that nobody needs the URL or the uploaded file again: an attempt, a retry and a reroll in a year all
draw after the same bytes, whose hash is their name.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from aiohttp.abc import AbstractResolver

from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.picture_files import Unreadable, as_stored
from scheduler.frontdoor.picture_urls import PictureUrls, Reachable, is_public
from scheduler.refusals import FieldViolation, InvalidRequest, Overloaded, PictureUnreadable
from scheduler.settings import Pictures as PictureSettings

PICTURES_MAX = 5
"""Of one job."""

# Of requests with pictures, each with up to five files of `bytes_max`: what they may hold of memory together.
_REQUESTS_AT_ONCE = 8
# Each takes up to 17 bytes a pixel (an animated WebP; a PNG with alpha 13) and a core for about a second.
_DECODED_AT_ONCE = 2


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
        self._requests = asyncio.Semaphore(_REQUESTS_AT_ONCE)
        self._decoders = ThreadPoolExecutor(_DECODED_AT_ONCE, thread_name_prefix="pictures")

    async def stored(self, uploads: Sequence[bytes], urls: Sequence[str]) -> tuple[str, ...]:
        """Store a request's pictures and return their paths in the artifact store, uploads first.

        The same pixels have the same path. Nothing is stored if one picture is unreadable. Raises
        PictureUnreadable, which names all that are; InvalidRequest for more than PICTURES_MAX; Overloaded.
        """
        if len(uploads) + len(urls) > PICTURES_MAX:
            field = "imagine.pictures" if uploads else "prompt"
            sentence = f"At most {PICTURES_MAX} pictures can be drawn after, uploaded ones and URLs together."
            raise InvalidRequest([FieldViolation(field=field, sentence=sentence)])
        if not uploads and not urls:
            return ()
        async with self._turn():
            async with asyncio.TaskGroup() as group:
                tasks = [
                    *(
                        group.create_task(
                            self._png(upload, f"imagine.pictures[{index}]", f"Uploaded picture {index + 1}")
                        )
                        for index, upload in enumerate(uploads)
                    ),
                    *(
                        group.create_task(self._png(url, "prompt", f"Picture URL {index + 1}"))
                        for index, url in enumerate(urls)
                    ),
                ]
            outcomes = [task.result() for task in tasks]
            violations = [outcome for outcome in outcomes if isinstance(outcome, FieldViolation)]
            if violations:
                raise PictureUnreadable(violations)
            return tuple([await self._put(png) for png in outcomes if isinstance(png, bytes)])

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            # What is ahead needs about as long as fetching may take.
            async with asyncio.timeout(self._settings.fetch_ms / 1_000):
                await self._requests.acquire()
        except TimeoutError as late:
            raise Overloaded(sentence="Too many pictures are being read at the moment; try again.") from late
        try:
            yield
        finally:
            self._requests.release()

    async def _png(self, given: bytes | str, field: str, name: str) -> bytes | FieldViolation:
        try:
            content = await self._urls.content(given) if isinstance(given, str) else given
            return await asyncio.get_running_loop().run_in_executor(
                self._decoders, as_stored, content, self._settings.pixels_max
            )
        except Unreadable as unreadable:
            return FieldViolation(field=field, sentence=f"{name} {unreadable}")

    async def _put(self, png: bytes) -> str:
        path = f"pictures/{hashlib.sha256(png).hexdigest()}.png"
        await self._artifacts.put(path, png)
        return path
