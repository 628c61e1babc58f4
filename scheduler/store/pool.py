"""Connections to PostgreSQL for the front door: borrowed for one transaction, given back clean.

A database that is away, or that ended a transaction only for another's sake, becomes one refusal,
`Overloaded`, which clients retry by themselves; every other error of PostgreSQL is a bug of ours and passes
through.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias, cast

import asyncpg

from scheduler.refusals import Overloaded
from scheduler.store.lanes import AGAIN, AWAY, connecting, kind_of, session_settings
from scheduler.store.watched import Watch, Watcher

Connection: TypeAlias = asyncpg.Connection
"""One connection, inside the caller's transaction."""

# A caller that waits longer than this for a connection is better served by another front door.
_ACQUIRE_S = 5.0
# No statement of the front door takes a tenth of this on a database that is well.
_STATEMENT_S = 15.0


class Pool:
    """A bounded number of connections to one database."""

    def __init__(self, pool: asyncpg.Pool, dsn: str, watch: Watch) -> None:
        self.dsn = dsn
        """Of the database, for who needs a connection that is not lent."""
        self._pool = pool
        self._observe_wait: Callable[[float], None] = lambda _: None
        self._watch = watch

    @property
    def most(self) -> int:
        """Connections that may be open."""
        return self._pool.get_max_size()

    @property
    def used(self) -> int:
        """Connections that are lent."""
        return self._pool.get_size() - self._pool.get_idle_size()

    def observe_waits(self, observe: Callable[[float], None]) -> None:
        """Tell `observe` how many seconds each later borrower waited for its connection."""
        self._observe_wait = observe

    def watched_by(self, watcher: Watcher) -> None:
        """Tell `watcher` of statements and of trouble from now on."""
        self._watch.begin(watcher)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Connection]:
        """Lend a connection for single statements, each its own transaction. Raises Overloaded."""
        async with self._lent() as connection:
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Lend a connection in a READ COMMITTED transaction: committed if the block ends, else rolled back.

        Raises Overloaded. If the connection breaks during the commit nobody can tell whether it happened,
        which is why every request that changes something carries an id.
        """
        async with self._lent() as connection, connection.transaction():
            yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Connection]:
        """Lend a connection in a transaction that only reads, and reads one moment all through.

        Raises Overloaded.
        """
        async with (
            self._lent() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            yield connection

    @asynccontextmanager
    async def rehearsal(self) -> AsyncIterator[Connection]:
        """Like `transaction`, but whatever was written is rolled back. Raises Overloaded."""
        async with self._lent() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                yield connection
            finally:
                await transaction.rollback()

    @asynccontextmanager
    async def _lent(self) -> AsyncIterator[Connection]:
        begun = asyncio.get_running_loop().time()
        with _database_away_is_a_refusal(self._watch):
            with connecting():
                lent = await self._pool.acquire(timeout=_ACQUIRE_S)
            try:
                self._observe_wait(asyncio.get_running_loop().time() - begun)
                # The pool's proxy has the connection's methods; the ledger's signatures ask for the
                # connection.
                yield cast(Connection, lent)
            finally:
                await self._pool.release(lent)

    async def close(self) -> None:
        """Close every connection, waiting for those that are lent."""
        await self._pool.close()


@contextmanager
def _database_away_is_a_refusal(watch: Watch) -> Any:
    try:
        yield
    except (*AWAY, TimeoutError) as trouble:
        watch.failed(kind_of(trouble))
        raise Overloaded(
            sentence="The database does not answer at the moment. Send the same request again."
        ) from trouble
    except AGAIN as trouble:
        watch.failed(kind_of(trouble))
        raise Overloaded(
            sentence="Somebody else changed the same at the same moment. Send the same request again."
        ) from trouble
    except asyncpg.PostgresError as trouble:
        watch.failed(kind_of(trouble))
        raise


async def open_pool(dsn: str, size: int, *, application: str = "darkroom frontdoor") -> Pool:
    """Open up to `size` connections; `application` is the name PostgreSQL shows for them.

    Values of type jsonb are text on these connections as on all others, so that the ledger's code meets the
    same connection everywhere. Raises Overloaded if the database is away.
    """
    watch = Watch()

    async def open_one(connection: Connection) -> None:
        watch.over(connection)

    with _database_away_is_a_refusal(watch), connecting():
        return Pool(
            await asyncpg.create_pool(
                dsn,
                min_size=1,
                max_size=size,
                timeout=_ACQUIRE_S,
                command_timeout=_STATEMENT_S,
                server_settings=session_settings(application),
                init=open_one,
                reset=_nothing_to_reset,
            ),
            dsn,
            watch,
        )


async def _nothing_to_reset(_: object) -> None:
    """Spare the reset statements: nothing of ours outlives its transaction in a session."""
