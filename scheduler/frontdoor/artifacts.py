"""Finished pictures, read from the artifact store in pieces and off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import PurePosixPath

import fsspec

from gpu_worker.contract import ImageFile
from scheduler.refusals import Overloaded, PictureMissing

# A gRPC message may have 4 MB by default, and flow control counts in 64 KB.
CHUNK_BYTES = 64 * 1024


class Artifacts:
    """The artifact store at an fsspec address, read only."""

    def __init__(self, url: str) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)

    async def chunks(self, image: ImageFile) -> AsyncGenerator[bytes, None]:
        """Yield a picture's bytes, up to 64 KiB at a time. Raises PictureMissing or Overloaded."""
        path = PurePosixPath(image.path)
        assert not path.is_absolute(), path
        assert ".." not in path.parts, path
        try:
            file = await asyncio.to_thread(self._files.open, f"{self._root}/{path}", "rb")
            try:
                while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                    yield chunk
            finally:
                await asyncio.to_thread(file.close)
        except FileNotFoundError as missing:
            raise PictureMissing(file_name=image.file_name) from missing
        except OSError as away:
            raise Overloaded(
                sentence="The artifact store does not answer at the moment; try again."
            ) from away
