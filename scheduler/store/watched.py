"""What connections tell whoever watches them: how long statements with a name took, and what failed.

A statement has a name if it begins with one: `/* insert_job */ INSERT …`. PostgreSQL's own views
(pg_stat_activity, pg_stat_statements) and its log show it too.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import asyncpg

from scheduler.metrics.labels import DbErrorClass, DbQuery

_NAME = re.compile(r"/\* ([a-z_]+) \*/")


class Watcher(Protocol):
    """Somebody who counts."""

    def statement_ended(self, query: DbQuery, took_s: float) -> None:
        """Note a statement with a name."""

    def database_failed(self, kind: DbErrorClass) -> None:
        """Note a transaction or a connection that failed."""


class Watch:
    """What some connections tell one watcher; nobody, before there is one."""

    def __init__(self) -> None:
        self._watcher: Watcher | None = None

    def begin(self, watcher: Watcher) -> None:
        """Tell this watcher from now on."""
        self._watcher = watcher

    def over(self, connection: asyncpg.Connection) -> None:
        """Watch this connection until it is closed."""
        connection.add_query_logger(self._statement_ended)

    def failed(self, kind: DbErrorClass) -> None:
        """Tell of trouble."""
        if self._watcher is not None:
            self._watcher.database_failed(kind)

    def _statement_ended(self, statement: Any) -> None:
        # One that failed says nothing of how long they take.
        if self._watcher is not None and statement.exception is None:
            named = _NAME.match(statement.query)
            if named is not None:
                self._watcher.statement_ended(DbQuery(named.group(1)), statement.elapsed)
