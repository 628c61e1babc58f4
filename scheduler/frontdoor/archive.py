"""Many files as one ZIP, made while it is sent: of one file a chunk is in memory, of those before it a line.

Files are stored and not deflated, since PNGs would not get smaller. Their sizes are not known when they
begin and stand behind them, so whoever unpacks needs the whole archive, as nearly all that unpack ZIPs do.
The same files make the same bytes: every entry has the date at which ZIP's time begins.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from scheduler.frontdoor.artifacts import CHUNK_BYTES
from scheduler.refusals import PictureMissing

# What unpackers make of the file: its owner reads and writes, others read.
_MODE = 0o644 << 16


_NAME = re.compile(r"[\w-][\w.-]{0,200}")


class UnsafeName(ValueError):
    """A name that is not plainly a file's."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file of an archive."""

    name: str
    """In the archive, of letters, digits, dots, dashes and underscores; no two are alike."""
    chunks: AsyncGenerator[bytes, None]
    """Its bytes, up to 2 GiB. Raises PictureMissing before the first of them where there are none."""


async def zipped(entries: AsyncIterable[Entry]) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of a ZIP of all entries, 64 KiB at a time and the rest.

    In place of a file that is missing there is a note that says so, `<name>.missing.txt`: one lost picture
    must not cost all others. Any other error of an entry ends the stream, and what was sent opens as no ZIP.
    """
    unsent = _Unsent()
    with ZipFile(unsent, "w", ZIP_STORED) as archive:
        async for entry in entries:
            async with aclosing(entry.chunks) as chunks:
                try:
                    # Asked for before the entry is begun, which could not be taken back.
                    first = await anext(chunks, b"")
                except PictureMissing as missing:
                    archive.writestr(_info(f"{entry.name}.missing.txt"), f"{missing}\n")
                else:
                    with archive.open(_info(entry.name), "w") as file:
                        file.write(first)
                        async for chunk in chunks:
                            file.write(chunk)
                            for piece in unsent.pieces():
                                yield piece
            for piece in unsent.pieces():
                yield piece
    # The list of all entries, which may be long too.
    for piece in unsent.pieces(at_least=1):
        yield piece


def _info(name: str) -> ZipInfo:
    # Some who unpack follow a name to wherever it leads. Ours are made of ids; a worker reports them.
    if not _NAME.fullmatch(name):
        raise UnsafeName(name)
    info = ZipInfo(name)
    info.external_attr = _MODE
    return info


class _Unsent:
    """What a ZipFile writes to, and cannot seek in: holds what nobody has taken yet."""

    def __init__(self) -> None:
        self._content = bytearray()

    def write(self, written: bytes, /) -> int:
        """Keep what was written."""
        self._content += written
        return len(written)

    def flush(self) -> None:
        """Do nothing: it has arrived."""

    def close(self) -> None:
        """Do nothing: a ZipFile closes only what it opened itself."""

    def pieces(self, at_least: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield what it holds, the oldest first, and forget it; stops when there is less than `at_least`."""
        while len(self._content) >= at_least:
            piece = bytes(self._content[:CHUNK_BYTES])
            del self._content[:CHUNK_BYTES]
            yield piece
