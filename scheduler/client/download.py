"""Files on their way to disk: each gets its name when it is complete and right, and never before.

Bytes go to a hidden file beside the final one, a megabyte at a time in another thread, so that neither a
slow disk nor hashing holds up the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from pathlib import Path

from scheduler.client.archive import PartArchive
from scheduler.client.errors import DownloadDamaged, ServiceFailed
from scheduler.client.names import named
from scheduler.v1.job_pb2 import Archive, FileHeader, Image, Video

_BLOCK_BYTES = 1 << 20
# What an archive has in place of a picture that is lost.
_NOTE = ".missing.txt"


class PartFile:
    """A picture or video, from its header to its last byte."""

    def __init__(self, announced: Image | Video, path: Path) -> None:
        self.announced = announced
        self._path = path
        self._part_path = _part_path(path)
        self._file = self._part_path.open("xb")
        self._block = bytearray()
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

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
        announced = self.announced
        if self._sha256.hexdigest() != announced.sha256 or self._size_bytes != announced.size_bytes:
            raise DownloadDamaged(
                f"{self._path.name}: {self._size_bytes} of {announced.size_bytes} bytes arrived, "
                f"with SHA-256 {self._sha256.hexdigest()} instead of {announced.sha256}."
            )
        os.replace(self._part_path, self._path)
        return self._path

    def _discard(self) -> None:
        self._file.close()
        self._part_path.unlink(missing_ok=True)


class Saving:
    """The files of one download, in a folder that exists, over as many streams as it takes."""

    def __init__(self, folder: Path, file_name: str | None) -> None:
        """`file_name`: what the one file is to be called; None: each as the service calls it."""
        self._folder = folder
        self._file_name = file_name
        self.files: dict[str, Path] = {}
        """Those that are complete, by their resource names; that of an archive is empty."""
        self._part: PartFile | None = None
        self._archive: PartArchive | None = None
        self._skipping = False

    def __len__(self) -> int:
        """Return how much is complete: files, and the pictures that a broken archive has left."""
        return len(self.files) + (0 if self._archive is None else len(self._archive))

    async def begin(self, header: FileHeader) -> None:
        """Begin the next file, unless it is here already.

        Raises ServiceFailed if its name leads out of the folder or the header says nothing, and what `end`
        does.
        """
        await self._end_part()
        announced = _announced(header)
        if isinstance(announced, Archive):
            if self._archive is None:
                path = self._path_of(announced)
                self._archive = PartArchive(announced=announced, path=path, part_path=_part_path(path))
            elif not announced.rest:
                # It may not know yet what it was asked for.
                await self._archive.begin_again()
            return
        self._skipping = announced.name in self.files
        if not self._skipping:
            self._part = await asyncio.to_thread(PartFile, announced, self._path_of(announced))

    async def write(self, chunk: bytes) -> None:
        """Add bytes to the file that was begun last. Raises ServiceFailed if none was."""
        into = self._part or self._archive
        if into is not None:
            await into.write(chunk)
        elif not self._skipping:
            raise ServiceFailed("the service sent bytes of a file before saying which")

    async def end(self) -> None:
        """Verify and name what was begun last. Raises DownloadDamaged if it is wrong."""
        await self._end_part()
        if self._archive is not None:
            self.files[""] = await self._archive.finish()
            self._archive = None

    async def _end_part(self) -> None:
        if self._part is not None:
            self.files[self._part.announced.name] = await self._part.finish()
            self._part = None

    async def broke_off(self) -> str:
        """Keep what is whole, and only that.

        Returns the resource name of the picture behind which an archive is to go on; empty: at its beginning.
        """
        if self._part is not None:
            await self._part.discard()
            self._part = None
        if self._archive is None:
            return ""
        last = await self._archive.break_off()
        try:
            return named(last.removesuffix(_NOTE)).name if last else ""
        except ValueError:
            # It calls its files otherwise, and then nobody can ask for what comes after one.
            await self._archive.begin_again()
            return ""

    async def discard(self) -> None:
        """Leave nothing that is not complete."""
        for part in (self._part, self._archive):
            if part is not None:
                await part.discard()

    def _path_of(self, announced: Image | Video | Archive) -> Path:
        if self._file_name is not None:
            return self._folder / self._file_name
        file_name = announced.file_name
        # The name comes over the network: "../.bashrc" must not be written because a service says so.
        within = Path(file_name).name == file_name != ""
        if not within or file_name.startswith(".") or not file_name.isprintable():
            raise ServiceFailed(f"the service named a file {file_name!r}, which is not a file name")
        return self._folder / file_name


def _part_path(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")


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
