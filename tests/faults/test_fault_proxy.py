"""What a wire does to what passes it: nothing, until it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from tests.faults.proxy import Proxy


@asynccontextmanager
async def to_an_echo() -> AsyncIterator[Proxy]:
    """A proxy of somebody who answers each line with itself, and whoever hangs up with `bye`."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.write(b"bye\n")
        writer.close()

    listening = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening, Proxy(lambda: asyncio.open_connection("127.0.0.1", port)).open() as proxy:
        yield proxy


async def said(reader: asyncio.StreamReader) -> bytes:
    """Return the next line; empty at the end, however it came."""
    try:
        async with asyncio.timeout(10):
            return await reader.readline()
    except ConnectionError:
        return b""


async def test_everything_passes_and_an_end_passes_too() -> None:
    async with to_an_echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a fox\n")
        assert await said(reader) == b"a fox\n"
        writer.write_eof()
        assert [await said(reader), await said(reader)] == [b"bye\n", b""]
        writer.close()


async def test_a_cut_ends_every_connection_and_no_later_one() -> None:
    async with to_an_echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a fox\n")
        await said(reader)
        proxy.cut()
        assert await said(reader) == b""
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a fox\n")
        assert await said(reader) == b"a fox\n"
        writer.close()


async def test_a_half_closed_one_still_brings_what_is_answered() -> None:
    async with to_an_echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a fox\n")
        await said(reader)
        proxy.half_close()
        assert await said(reader) == b"bye\n"
        writer.close()


async def test_swallowed_answers_are_gone_and_their_connection_is_cut_in_the_end() -> None:
    async with to_an_echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a fox\n")
        await said(reader)
        proxy.swallows_answers = True
        writer.write(b"another\n")
        proxy.listen_again()
        assert await said(reader) == b""
        writer.close()


async def test_who_cannot_be_reached_is_a_connection_that_ends() -> None:
    async def nobody() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raise ConnectionRefusedError

    async with Proxy(nobody).open() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await said(reader) == b""
        writer.close()


def socket_of(dsn: str) -> Path:
    (socket,) = Path(parse_qs(urlsplit(dsn).query)["host"][0]).glob(".s.PGSQL.*[0-9]")
    return socket


async def test_the_answer_to_a_commit_is_lost_and_the_commit_is_not(database: str) -> None:
    server = urlsplit(database)
    async with Proxy(lambda: asyncio.open_unix_connection(socket_of(database))).open() as proxy:
        address = f"postgresql://postgres@127.0.0.1:{proxy.port}{server.path}?sslmode=disable"
        connection = await asyncpg.connect(address, server_settings={"application_name": "a loop"})
        await connection.execute("CREATE TABLE fox (name text)")
        proxy.lose_commit_answers(1)
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            async with connection.transaction():
                await connection.execute("INSERT INTO fox VALUES ('red')")
        assert proxy.answers_lost == {"a loop": 1}
        connection = await asyncpg.connect(address)
        async with connection.transaction():
            assert await connection.fetchval("SELECT name FROM fox") == "red"
        await connection.close()
        assert proxy.answers_lost == {"a loop": 1}, "it was to lose one"


async def test_the_answer_to_a_commit_is_lost_of_those_alone_of_whom_it_is_to_be(database: str) -> None:
    server = urlsplit(database)
    async with Proxy(lambda: asyncio.open_unix_connection(socket_of(database))).open() as proxy:
        address = f"postgresql://postgres@127.0.0.1:{proxy.port}{server.path}?sslmode=disable"
        one, other = [
            await asyncpg.connect(address, server_settings={"application_name": name})
            for name in ("a settlement 1", "a loop")
        ]
        proxy.lose_commit_answers(1, of="a settlement")
        async with other.transaction():
            await other.execute("SELECT 1")
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            async with one.transaction():
                await one.execute("SELECT 1")
        await other.close()
        assert proxy.answers_lost == {"a settlement 1": 1}
