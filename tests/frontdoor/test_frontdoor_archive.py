"""An account's pictures as one ZIP: whole, in little memory, and with a note where a picture is lost."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import AsyncGenerator, Sequence

import pytest

from scheduler.frontdoor.archive import Entry, zipped
from scheduler.refusals import Overloaded, PictureMissing

CHUNK = 64 * 1024


async def content_of(*chunks: bytes) -> AsyncGenerator[bytes, None]:
    for chunk in chunks:
        yield chunk


async def missing(name: str) -> AsyncGenerator[bytes, None]:
    if name:
        raise PictureMissing(file_name=name)
    yield b""


async def cut_off(*chunks: bytes) -> AsyncGenerator[bytes, None]:
    for chunk in chunks:
        yield chunk
    raise Overloaded(sentence="The artifact store does not answer at the moment; try again.")


async def entries_of(entries: Sequence[Entry]) -> AsyncGenerator[Entry, None]:
    for entry in entries:
        yield entry


async def unpacked(*entries: Entry) -> dict[str, bytes]:
    """Return the files of an archive, each checked against its CRC."""
    content = b"".join([piece async for piece in zipped(entries_of(entries))])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


async def test_every_file_comes_out_as_it_went_in() -> None:
    files = await unpacked(
        Entry(name="a.png", chunks=content_of(b"one", b"two")),
        Entry(name="empty.png", chunks=content_of()),
        Entry(name="größe_1.png", chunks=content_of(b"x" * CHUNK, b"y")),
    )
    assert files == {"a.png": b"onetwo", "empty.png": b"", "größe_1.png": b"x" * CHUNK + b"y"}


async def test_an_archive_of_nothing_is_a_zip() -> None:
    assert await unpacked() == {}


async def test_the_same_files_make_the_same_bytes_and_are_not_deflated() -> None:
    async def one() -> bytes:
        entries = [Entry(name="a.png", chunks=content_of(b"\0" * CHUNK))]
        return b"".join([piece async for piece in zipped(entries_of(entries))])

    first = await one()
    assert first == await one()
    (info,) = zipfile.ZipFile(io.BytesIO(first)).infolist()
    assert info.compress_type == zipfile.ZIP_STORED
    assert info.external_attr >> 16 == 0o644


async def test_a_lost_picture_leaves_a_note_and_the_others() -> None:
    files = await unpacked(
        Entry(name="a.png", chunks=content_of(b"a")),
        Entry(name="b.png", chunks=missing("b.png")),
        Entry(name="c.png", chunks=content_of(b"c")),
    )
    assert list(files) == ["a.png", "b.png.missing.txt", "c.png"]
    assert files["c.png"] == b"c"
    assert files["b.png.missing.txt"].decode().startswith("b.png is not in the artifact store any more.")


async def test_a_store_that_stops_answering_ends_the_stream_and_leaves_no_zip() -> None:
    sent = io.BytesIO()

    async def send() -> None:
        entries = [
            Entry(name="a.png", chunks=content_of(b"a")),
            Entry(name="b.png", chunks=cut_off(b"b" * CHUNK, b"b")),
        ]
        async for piece in zipped(entries_of(entries)):
            sent.write(piece)

    with pytest.raises(Overloaded):
        await send()
    assert sent.tell() == CHUNK, "what was there was sent"
    assert not zipfile.is_zipfile(sent)


async def test_a_stream_that_nobody_reads_on_closes_the_file_it_was_at() -> None:
    closed: list[str] = []

    async def watched() -> AsyncGenerator[bytes, None]:
        try:
            yield bytes(CHUNK)
            yield bytes(CHUNK)
            yield bytes(CHUNK)
        finally:
            closed.append("a.png")

    stream = zipped(entries_of([Entry(name="a.png", chunks=watched())]))
    await anext(stream)
    await stream.aclose()
    assert closed == ["a.png"]


async def test_thousands_of_files_hold_a_line_each() -> None:
    count = 5_000

    async def many() -> AsyncGenerator[Entry, None]:
        for index in range(count):
            yield Entry(name=f"fox_{index}.png", chunks=content_of(b"%d" % index))

    sent = io.BytesIO()
    tracemalloc.start()
    try:
        async for piece in zipped(many()):
            assert len(piece) <= CHUNK, "more than that might not fit a message"
            sent.write(piece)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # With the archive itself, which the test keeps: about 200 bytes a file.
    assert most < count * 2_000, f"{most / count:.0f} bytes a file"
    with zipfile.ZipFile(sent) as archive:
        assert len(archive.namelist()) == count
        assert archive.read("fox_4321.png") == b"4321"


@pytest.mark.parametrize(("files", "chunks_of_each"), [(10, 160), (1_600, 1)])
async def test_memory_does_not_grow_with_what_is_sent(files: int, chunks_of_each: int) -> None:
    async def many() -> AsyncGenerator[Entry, None]:
        for index in range(files):
            yield Entry(name=f"{index}.png", chunks=content_of(*[bytes(CHUNK)] * chunks_of_each))

    size = 0
    tracemalloc.start()
    try:
        async for piece in zipped(many()):
            size += len(piece)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 100 * 1024 * 1024
    assert most < 8 * CHUNK + files * 1_000, f"{most} bytes for an archive of {size}"


@pytest.mark.long
async def test_more_files_than_a_plain_zip_can_count() -> None:
    count = 70_000
    files = await unpacked(
        *(Entry(name=f"{index}.png", chunks=content_of(b"%d" % index)) for index in range(count))
    )
    assert len(files) == count
    assert files["69999.png"] == b"69999"


@pytest.mark.long
async def test_more_bytes_than_a_plain_zip_can_count(tmp_path_factory: pytest.TempPathFactory) -> None:
    chunk = bytes(4 * 1024 * 1024)

    async def gigabyte() -> AsyncGenerator[bytes, None]:
        for _ in range(256):
            yield chunk

    path = tmp_path_factory.mktemp("archive") / "large.zip"
    entries = [Entry(name=f"{index}.png", chunks=gigabyte()) for index in range(5)]
    entries.append(Entry(name="last.png", chunks=content_of(b"last")))
    with path.open("wb") as file:
        async for piece in zipped(entries_of(entries)):
            if piece.count(0) == len(piece):
                file.seek(
                    len(piece), io.SEEK_CUR
                )  # a hole, since five gigabytes are more than a test may write
            else:
                file.write(piece)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("last.png") == b"last"
        assert archive.getinfo("last.png").header_offset > 2**32
    path.unlink()
