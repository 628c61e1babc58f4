"""What each process of ours measures of itself: its machine, its database, its event loop, its log."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import platform
from collections.abc import Callable

from prometheus_client import GCCollector, ProcessCollector

from scheduler.metrics import families
from scheduler.metrics.family import Registry
from scheduler.metrics.labels import DbErrorClass, DbQuery, LogLevel

# Four times a second see what people notice, and cost nothing.
_LOOK_EVERY_S = 0.25


class ProcessMetrics:
    """The families that both processes have."""

    def __init__(self, registry: Registry, *, queries: tuple[DbQuery, ...]) -> None:
        """Make them. `queries` are those that this process asks, which begin at 0."""
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.db_query_seconds = registry.histogram(families.DB_QUERY)
        for query in queries:
            self.db_query_seconds.labels(query)
        self.db_errors = registry.counter(families.DB_ERRORS)
        self.event_loop_lag_seconds = registry.histogram(families.EVENT_LOOP_LAG)
        self.log_messages = registry.counter(families.LOG_MESSAGES)
        self._config_info = registry.gauge(families.CONFIG_INFO)
        registry.gauge(families.BUILD_INFO).labels(**_build()).set(1)

    def configured_as(self, fingerprint: str) -> None:
        """Show by which settings this process runs."""
        self._config_info.labels(fingerprint).set(1)

    def statement_ended(self, query: DbQuery, took_s: float) -> None:
        """Observe a statement that has a name."""
        self.db_query_seconds.labels(query).observe(took_s)

    def database_failed(self, kind: DbErrorClass) -> None:
        """Count a statement or a connection that failed."""
        self.db_errors.labels(kind).inc()

    def logged(self, level: str) -> None:
        """Count a log line."""
        self.log_messages.labels(LogLevel(level)).inc()

    async def watch_event_loop(self) -> None:
        """Observe how late this process's event loop is, until cancelled."""
        clock: Callable[[], float] = asyncio.get_running_loop().time
        while True:
            due_s = clock() + _LOOK_EVERY_S
            await asyncio.sleep(_LOOK_EVERY_S)
            self.event_loop_lag_seconds.observe(max(0.0, clock() - due_s))


def _build() -> dict[str, str]:
    return {
        "version": _version("darkroom"),
        "commit": _commit(),
        "python": platform.python_version(),
        "ray": _version("ray"),
        "torch": _version("torch"),
        "protobuf": _version("protobuf"),
    }


def _version(package: str) -> str:
    """Return the installed version; empty where it is not installed (a front door needs no torch)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit pip installed from, which it records (PEP 610); empty for a release or a checkout."""
    record = importlib.metadata.distribution("darkroom").read_text("direct_url.json")
    commit: str = json.loads(record or "{}").get("vcs_info", {}).get("commit_id", "")
    return commit
