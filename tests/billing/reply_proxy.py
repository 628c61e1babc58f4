"""A door in front of PostgreSQL that loses the one message nobody can do without: the answer to a commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

# Messages of PostgreSQL's protocol: a type, the length of what follows, the content.
_BEGINS = b"BEGIN"
_COMMIT = b"Q\x00\x00\x00\x0cCOMMIT;\x00"
_COMMITTED = b"C\x00\x00\x00\x0bCOMMIT\x00"


class Loses(StrEnum):
    """Where a connection breaks around its commit. To its client both look the same."""

    REQUEST = "request"
    """Before the server heard of it: nothing was done."""
    ANSWER = "answer"
    """After the server has done it."""


class ReplyProxy:
    """Passes everything on, but for the next commit that it was told to lose."""

    def __init__(self, server: Path, database: str, user: str) -> None:
        self._server = server
        self._database = database
        self._user = user
        self._loses: Loses | None = None
        self._of = b""
        self._port = 0
        self.lost = 0
        """Commits lost so far."""

    @property
    def dsn(self) -> str:
        """The server's address by way of here."""
        return f"postgresql://{self._user}@127.0.0.1:{self._port}/{self._database}?sslmode=disable"

    def lose_next(self, loses: Loses, of: bytes = b"") -> None:
        """Break the connection that next commits a transaction in which these bytes were sent."""
        self._loses, self._of = loses, of

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ReplyProxy]:
        """Listen while the context is open."""
        listening = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = listening.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listening.close()
            await listening.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_unix_connection(self._server)
        losing = asyncio.Event()
        with suppress(ConnectionError):
            await asyncio.gather(
                self._pass_requests(reader, back_writer, losing),
                self._pass_answers(back_reader, writer, losing),
            )
        for end in (writer, back_writer):
            end.transport.abort()

    async def _pass_requests(
        self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        sent = b""
        while data := await reader.read(65_536):
            # A driver sends a commit by itself, and what begins a transaction: it has waited for what came
            # before.
            if data[5:].startswith(_BEGINS):
                sent = b""
            elif data != _COMMIT:
                sent += data
            else:
                if self._loses is not None and self._of in sent:
                    if self._loses is Loses.REQUEST:
                        self._lose()
                    losing.set()
                sent = b""
            server.write(data)
            await server.drain()
        server.transport.abort()

    async def _pass_answers(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        while data := await reader.read(65_536):
            if losing.is_set():
                assert data.startswith(_COMMITTED), "a commit was answered by something else"
                self._lose()
            client.write(data)
            await client.drain()
        client.transport.abort()

    def _lose(self) -> None:
        self._loses = None
        self.lost += 1
        raise ConnectionAbortedError


def proxy_of(dsn: str) -> ReplyProxy:
    """Return a proxy of a server that listens on a Unix socket."""
    parts = urlsplit(dsn)
    (socket,) = Path(parse_qs(parts.query)["host"][0]).glob(".s.PGSQL.*[0-9]")
    return ReplyProxy(socket, parts.path.removeprefix("/"), parts.username or "postgres")
