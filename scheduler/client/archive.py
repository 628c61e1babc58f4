"""A ZIP archive on its way to disk: of a stream that breaks off, the pictures that had arrived whole stay.

An archive that is made while it is sent says a file's size and checksum only behind the file. So what arrived
is looked through for the places where both are right, and cut behind the last of them; the next stream, an
archive of the rest, goes on from there. Its list is at its end, and gets the lines of what was there before.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from scheduler.client.errors import DownloadDamaged
from scheduler.v1.job_pb2 import Archive

# PKWARE's APPNOTE.TXT 6.3.10, 4.3.7 and 4.3.9: what comes before a file, and what behind it.
_HEADER = struct.Struct("<4s5H3L2H")
_HEADER_BEGINS = b"PK\x03\x04"
_BEHIND = struct.Struct("<4s3L")
_BEHIND_BEGINS = b"PK\x07\x08"
_SIZE_IS_BEHIND, _NAME_IS_UTF8 = 0x08, 0x800

_BLOCK_BYTES = 1 << 20


@dataclass(kw_only=True)
class PartArchive:
    """Of one download."""

    announced: Archive
    path: Path
    """Where it will be."""
    part_path: Path
    _whole: list[ZipInfo] = field(default_factory=list)
    """Files of streams that broke off."""
    _whole_bytes: int = 0
    """As far as these reach."""
    _block: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        """Return how many files streams that broke off have left."""
        return len(self._whole)

    async def write(self, chunk: bytes) -> None:
        """Add bytes."""
        self._block += chunk
        if len(self._block) >= _BLOCK_BYTES:
            await asyncio.to_thread(self._write_block)

    async def break_off(self) -> str:
        """Keep the files that are whole, and nothing behind them; return the last one's name, empty: none."""
        await asyncio.to_thread(self._break_off)
        return self._whole[-1].filename if self._whole else ""

    async def begin_again(self) -> None:
        """Keep nothing."""
        self._whole.clear()
        self._whole_bytes = 0
        self._block.clear()
        await asyncio.to_thread(os.truncate, self.part_path, 0)

    async def finish(self) -> Path:
        """Verify and name the archive; return its path. Raises DownloadDamaged if it is none."""
        return await asyncio.to_thread(self._finish)

    async def discard(self) -> None:
        """Leave nothing of it."""
        await asyncio.to_thread(self.part_path.unlink, missing_ok=True)

    def _write_block(self) -> None:
        with self.part_path.open("ab") as file:
            file.write(self._block)
        self._block.clear()

    def _break_off(self) -> None:
        self._write_block()
        with self.part_path.open("r+b") as file:
            if file.seek(0, os.SEEK_END) > self._whole_bytes:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    while (found := _file_at(content, self._whole_bytes)) is not None:
                        info, self._whole_bytes = found
                        self._whole.append(info)
            file.truncate(self._whole_bytes)

    def _finish(self) -> Path:
        self._write_block()
        # Its directory is at its end, so an archive that opens is whole; each file in it has a checksum that
        # whoever unpacks it sees.
        try:
            ZipFile(self.part_path).close()
        except BadZipFile as wrong:
            size_bytes = self.part_path.stat().st_size
            raise DownloadDamaged(
                f"{self.path.name}: the {size_bytes} bytes that arrived are no ZIP archive ({wrong})."
            ) from wrong
        if self._whole:
            with ZipFile(self.part_path, "a") as archive:
                archive.filelist[:0] = self._whole
                archive.comment = b""  # the way to have the list written anew
        os.replace(self.part_path, self.path)
        return self.path


def _file_at(content: mmap.mmap, offset: int) -> tuple[ZipInfo, int] | None:
    """Return the file that begins there, and where it ends; None: none does, or not all of it is there."""
    if len(content) < offset + _HEADER.size:
        return None
    begins, _, flags, method, *_, name_bytes, extra_bytes = _HEADER.unpack_from(content, offset)
    if begins != _HEADER_BEGINS or method != ZIP_STORED or not flags & _SIZE_IS_BEHIND:
        return None
    data = offset + _HEADER.size + name_bytes + extra_bytes
    name = content[offset + _HEADER.size : offset + _HEADER.size + name_bytes]
    crc, counted, behind = 0, data, data
    while (behind := content.find(_BEHIND_BEGINS, behind)) >= 0 and behind + _BEHIND.size <= len(content):
        crc, counted = zlib.crc32(content[counted:behind], crc), behind
        ends = behind + _BEHIND.size
        size_bytes = behind - data
        if _BEHIND.unpack_from(content, behind) == (_BEHIND_BEGINS, crc, size_bytes, size_bytes):
            info = ZipInfo(name.decode("utf-8" if flags & _NAME_IS_UTF8 else "cp437"))
            info.flag_bits = flags
            info.external_attr = 0o644 << 16
            info.header_offset = offset
            info.CRC, info.file_size, info.compress_size = crc, size_bytes, size_bytes
            return info, ends
        behind += 1
    return None
