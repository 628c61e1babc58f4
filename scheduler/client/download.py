"""A file on its way to disk: it gets its name when it is complete and right, and never before.

Bytes go to a hidden file beside the final one, a megabyte at a time in another thread, so that neither a
slow disk nor hashing holds up the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import zipfile
from pathlib import Path
from typing import Self

from scheduler.client.errors import DownloadDamaged, ServiceFailed
from scheduler.v1.job_pb2 import Archive, FileHeader, Image, Video

_BLOCK_BYTES = 1 << 20


class PartFile:
    """One file of a download, from its header to its last byte."""

    def __init__(self, announced: Image | Video | Archive, path: Path) -> None:
        self.announced = announced
        self._path = path
        self._part_path = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
        self._file = self._part_path.open("xb")
        self._block = bytearray()
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

    @classmethod
    async def open(cls, header: FileHeader, folder: Path, file_name: str | None = None) -> Self:
        """Begin a file in `folder`, which exists, under `file_name` or else the one that the service gives.

        Raises ServiceFailed if that leads out of there, or the header says nothing.
        """
        announced = _announced(header)
        if file_name is None:
            file_name = announced.file_name
            # The name comes over the network: "../.bashrc" must not be written because a service says so.
            within = Path(file_name).name == file_name != ""
            if not within or file_name.startswith(".") or not file_name.isprintable():
                raise ServiceFailed(f"the service named a file {file_name!r}, which is not a file name")
        return await asyncio.to_thread(cls, announced, folder / file_name)

    @property
    def name(self) -> str:
        """Its resource name; empty: an archive has none."""
        return "" if isinstance(self.announced, Archive) else self.announced.name

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
        if isinstance(self.announced, Archive):
            self._verify_archive()
        else:
            self._verify_sum(self.announced)
        os.replace(self._part_path, self._path)
        return self._path

    def _verify_sum(self, announced: Image | Video) -> None:
        if self._sha256.hexdigest() != announced.sha256 or self._size_bytes != announced.size_bytes:
            raise DownloadDamaged(
                f"{self._path.name}: {self._size_bytes} of {announced.size_bytes} bytes arrived, "
                f"with SHA-256 {self._sha256.hexdigest()} instead of {announced.sha256}."
            )

    def _verify_archive(self) -> None:
        # Made while it was sent, it has no sum to be known before. Its directory is at its end, so an archive
        # that opens is whole; each file in it has a checksum that whoever unpacks it sees.
        try:
            zipfile.ZipFile(self._part_path).close()
        except zipfile.BadZipFile as wrong:
            raise DownloadDamaged(
                f"{self._path.name}: the {self._size_bytes} bytes that arrived are no ZIP archive ({wrong})."
            ) from wrong

    def _discard(self) -> None:
        self._file.close()
        self._part_path.unlink(missing_ok=True)


def announced_name(header: FileHeader) -> str:
    """Return the resource name of the file that a header is of; empty: an archive has none."""
    announced = _announced(header)
    return "" if isinstance(announced, Archive) else announced.name


def _announced(header: FileHeader) -> Image | Video | Archive:
    match header.WhichOneof("file"):
        case "image":
            return header.image
        case "video":
            return header.video
        case "archive":
            return header.archive
        case _:
            raise ServiceFailed("the service sent a file without saying what it is")
