"""A picture on its way to disk: it gets its name when it is complete and right, and never before.

Bytes go to a hidden file beside the final one, a megabyte at a time in another thread, so that neither a
slow disk nor hashing holds up the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from pathlib import Path
from typing import Self

from scheduler.client.errors import DownloadDamaged, ServiceFailed
from scheduler.v1.job_pb2 import Image

_BLOCK_BYTES = 1 << 20


class PartFile:
    """One file of a download, from its header to its last byte."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.image = image
        self._path = folder / image.file_name
        self._part_path = folder / f".{image.file_name[:40]}.{secrets.token_hex(4)}.part"
        self._file = self._part_path.open("xb")
        self._block = bytearray()
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

    @classmethod
    async def open(cls, folder: Path, image: Image) -> Self:
        """Begin a file in `folder`, which exists. Raises ServiceFailed if its name leads out of there."""
        file_name = image.file_name
        # The name comes over the network: "../.bashrc" must not be written because a service says so.
        within = Path(file_name).name == file_name != ""
        if not within or file_name.startswith(".") or not file_name.isprintable():
            raise ServiceFailed(f"the service named a picture {file_name!r}, which is not a file name")
        return await asyncio.to_thread(cls, image, folder)

    async def write(self, chunk: bytes) -> None:
        """Add bytes."""
        self._block += chunk
        if len(self._block) >= _BLOCK_BYTES:
            await asyncio.to_thread(self._write_block)

    async def finish(self) -> Path:
        """Verify and name the file; return its path. Raises DownloadDamaged if it is wrong."""
        return await asyncio.to_thread(self._finish)

    async def discard(self) -> None:
        """Leave nothing of it."""
        await asyncio.to_thread(self._discard)

    def _write_block(self) -> None:
        self._size_bytes += self._file.write(self._block)
        self._sha256.update(self._block)
        self._block.clear()

    def _finish(self) -> Path:
        self._write_block()
        self._file.close()
        if self._sha256.hexdigest() != self.image.sha256 or self._size_bytes != self.image.size_bytes:
            raise DownloadDamaged(
                f"{self.image.file_name}: {self._size_bytes} of {self.image.size_bytes} bytes arrived, "
                f"with SHA-256 {self._sha256.hexdigest()} instead of {self.image.sha256}."
            )
        os.replace(self._part_path, self._path)
        return self._path

    def _discard(self) -> None:
        self._file.close()
        self._part_path.unlink(missing_ok=True)
