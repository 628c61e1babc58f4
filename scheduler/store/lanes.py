"""A connection of its own for each hot writer, and retries while the database is away.

A pool would run reset statements at every release; the loop and the settlement lanes write all day. What they
write is keyed (by attempt), so work whose answer was lost is simply done again: it finds what it did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import asyncpg
import structlog

from scheduler.metrics.labels import DbErrorClass
from scheduler.store.watched import Watch, Watcher

T = TypeVar("T")

_log = structlog.get_logger()

# A restarted PostgreSQL is back within seconds, and asking twice a second costs nothing.
_LONGEST_WAIT_S = 0.5

AWAY = (
    OSError,
    asyncpg.InterfaceError,
    # What the driver makes of a connection that the server cut between two of its messages.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    # It was there when this process started: a backup is being put in its place.
    asyncpg.InvalidCatalogNameError,
    # What was a transaction of ours has been rolled back meanwhile, and its connection is gone.
    asyncpg.IdleInTransactionSessionTimeoutError,
)
"""What says that the database is away or was, not that the work is wrong. OSError includes TimeoutError."""

IDLE_IN_TRANSACTION_MS = 10_000
"""A process that stopped in the middle of a transaction holds its locks no longer than this."""

# Longer than reading a million waiting jobs takes, which is the longest statement there is.
_STATEMENT_S = 60.0

AGAIN = (
    asyncpg.DeadlockDetectedError,
    # A row that it waited for has moved to another partition meanwhile.
    asyncpg.SerializationError,
    # A migration has added a column to what it reads: the driver prepares its statements anew.
    asyncpg.InvalidCachedStatementError,
)
"""What ends a transaction that has done nothing wrong."""


def kind_of(error: Exception) -> DbErrorClass:
    """Return what kind of trouble an error of the driver is."""
    match error:
        case TimeoutError():
            return DbErrorClass.TIMEOUT
        case _ if isinstance(error, AWAY):
            return DbErrorClass.AWAY
        case _ if isinstance(error, AGAIN):
            return DbErrorClass.AGAIN
        case asyncpg.IntegrityConstraintViolationError() | asyncpg.DataError():
            return DbErrorClass.REFUSED
        case _:
            return DbErrorClass.OTHER


@contextmanager
def connecting() -> Iterator[None]:
    """Make of a database that lets nobody in, as a backup is being put in its place, one that is away.

    Its error is no member of AWAY: locks that were not to be had are among those of its class.
    """
    try:
        yield
    except asyncpg.ObjectNotInPrerequisiteStateError as closed:
        raise asyncpg.CannotConnectNowError(str(closed)) from closed


def session_settings(
    application: str, idle_in_transaction_ms: int = IDLE_IN_TRANSACTION_MS
) -> dict[str, str]:
    """Return what every session of ours asks of the server: a name, and an end when its client is gone.

    A frozen client is told by the idle transaction, a vanished machine by TCP (after 25 s at most; by the
    defaults it would be two hours). On a Unix socket the TCP settings are ignored.
    """
    return {
        "application_name": application,
        "idle_in_transaction_session_timeout": str(idle_in_transaction_ms),
        "tcp_keepalives_idle": "10",
        "tcp_keepalives_interval": "5",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "25000",
    }


class Lane:
    """One writer's connection to PostgreSQL, opened at first use and again after it broke."""

    def __init__(self, dsn: str, name: str, *, idle_in_transaction_ms: int = IDLE_IN_TRANSACTION_MS) -> None:
        self._dsn = dsn
        self._name = name
        self._idle_in_transaction_ms = idle_in_transaction_ms
        self._connection: asyncpg.Connection | None = None
        self._watch = Watch()

    def watched_by(self, watcher: Watcher) -> None:
        """Tell `watcher` of statements and of trouble from now on."""
        self._watch.begin(watcher)

    async def run(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Do `work`, again and again while the database is away. It must be keyed, so that twice is once."""
        wait_s = 0.02
        while True:
            try:
                return await work(await self._connected())
            except AWAY as trouble:
                self._watch.failed(kind_of(trouble))
                _log.warning(
                    "database away", lane=self._name, trouble=type(trouble).__name__, text=str(trouble)
                )
                await self.close()
            except AGAIN as trouble:
                self._watch.failed(kind_of(trouble))
                _log.info("transaction repeated", lane=self._name, trouble=type(trouble).__name__)
            except asyncpg.PostgresError as trouble:
                self._watch.failed(kind_of(trouble))
                raise
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def close(self) -> None:
        """Drop the connection at once; the next `run` opens another."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _connected(self) -> asyncpg.Connection:
        if self._connection is None or self._connection.is_closed():
            with connecting():
                self._connection = await asyncpg.connect(
                    self._dsn,
                    timeout=5,
                    command_timeout=_STATEMENT_S,
                    server_settings=session_settings(f"darkroom {self._name}", self._idle_in_transaction_ms),
                )
            self._watch.over(self._connection)
        return self._connection
