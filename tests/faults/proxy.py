"""A wire that can be told to fail: a TCP proxy in front of a front door or of PostgreSQL.

It passes bytes on, late if told so, until it is told to break a connection: both ways at once, one way only,
or by swallowing what the server answers, so that its client cannot tell what was done. Of PostgreSQL's
protocol it reads two things: who connects, and commits. So it can lose the one message that nobody can do
without: the answer to a commit that was made.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

# Messages of PostgreSQL's protocol: a type, the length of what follows, the content.
_COMMIT = b"Q\x00\x00\x00\x0cCOMMIT;\x00"
_COMMITTED = b"C\x00\x00\x00\x0bCOMMIT\x00"
_APPLICATION = b"\x00application_name\x00"

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class _Passage:
    """One connection, and the one behind it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.application = ""
        """What PostgreSQL's clients call themselves; empty of others."""
        self.half_closed = False
        """Its server was told that the client has nothing more to say."""
        self.commits = False
        """A commit is under way whose answer is to be lost."""

    def cut(self) -> None:
        """End it both ways, without a word."""
        self.client.transport.abort()
        self.server.transport.abort()


class Proxy:
    """Passes everything on to whatever `connect` reaches, but for what it was told."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._passages: set[_Passage] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._commits_to_lose = 0
        self._commits_of = ""
        self.delay_s = 0.0
        """How much later every piece arrives, each way."""
        self.swallows_answers = False
        """What the server says is thrown away."""
        self.port = 0
        self.answers_lost: Counter[str] = Counter()
        """Commits that were made and whose answer was lost, by application."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Proxy]:
        """Listen on a free port of loopback while the context is open."""
        listening = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = listening.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listening.close()
            self.cut()
            await asyncio.gather(*self._serving)

    def cut(self) -> None:
        """Break every connection there is."""
        for passage in list(self._passages):
            passage.cut()

    def half_close(self) -> None:
        """Tell every server that its client has nothing more to say; what they answer still passes."""
        for passage in self._passages:
            passage.half_closed = True
            passage.server.write_eof()

    def lose_commit_answers(self, commits: int, of: str = "") -> None:
        """Break each connection that makes one of the next so many commits, once it is made.

        Of applications whose name begins with `of`.
        """
        self._commits_to_lose, self._commits_of = commits, of

    def listen_again(self) -> None:
        """Swallow no more. Connections whose answers were thrown away are broken."""
        self.swallows_answers = False
        self.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._serving.add(serving)
        try:
            back_reader, back_writer = await self._connect()
        except OSError:
            # Nobody is there, as the client is to find out.
            writer.transport.abort()
            self._serving.discard(serving)
            return
        passage = _Passage(writer, back_writer)
        self._passages.add(passage)
        directions = (
            asyncio.create_task(self._pass_requests(reader, passage)),
            asyncio.create_task(self._pass_answers(back_reader, passage)),
        )
        try:
            await asyncio.gather(*directions)
        except OSError:
            pass  # one end is gone: so is the other, below
        finally:
            for direction in directions:
                direction.cancel()
            passage.cut()
            self._passages.discard(passage)
            self._serving.discard(serving)

    async def _pass_requests(self, reader: asyncio.StreamReader, passage: _Passage) -> None:
        first = True
        while data := await reader.read(65_536):
            if first:
                passage.application, first = _application(data), False
            # A driver sends a commit by itself: it has waited for what came before.
            wanted = self._commits_to_lose and passage.application.startswith(self._commits_of)
            if data == _COMMIT and wanted:
                self._commits_to_lose -= 1
                passage.commits = True
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if passage.half_closed:
                return
            passage.server.write(data)
            await passage.server.drain()
        passage.server.write_eof()

    async def _pass_answers(self, reader: asyncio.StreamReader, passage: _Passage) -> None:
        while data := await reader.read(65_536):
            if passage.commits:
                # It may have been refused, which its client is to hear.
                passage.commits = False
                if data.startswith(_COMMITTED):
                    self.answers_lost[passage.application] += 1
                    break
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if not self.swallows_answers:
                passage.client.write(data)
                await passage.client.drain()
        passage.cut()


def _application(startup: bytes) -> str:
    """Return the application's name in a startup message of PostgreSQL's protocol."""
    _, found, rest = startup.partition(_APPLICATION)
    return rest.split(b"\x00", 1)[0].decode() if found else ""
