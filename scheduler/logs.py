"""Structured logs: past-tense facts with fields. JSON lines for machines, colours for a terminal.

What people wrote stays out of them, but at `debug`. So does what an error of PostgreSQL says beyond its name:
it shows the rows and the values that it is about, and a prompt may be one.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from opentelemetry.trace import get_current_span
from structlog.typing import EventDict, WrappedLogger

from scheduler.tracing import log_fields

_counters: list[Callable[[str], None]] = []


@contextmanager
def lines_counted(count: Callable[[str], None]) -> Iterator[None]:
    """Tell `count` the level of every line that this process logs while the context is open."""
    _counters.append(count)
    try:
        yield
    finally:
        _counters.remove(count)


def configure_logs(level: str = "info") -> None:
    """Send this process's logs to standard error. Prompts are only ever logged at `debug`."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _traced,
            _counted,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if level == "debug" else [_values_left_out]),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # Written, not printed: in a driver Ray replaces `print` by one of its own. And to what standard error
        # is then, which a test or a daemon may have replaced.
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),
    )


def _traced(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Say of a line within a call that is traced which trace it is part of."""
    return {**log_fields(get_current_span()), **event}


def _counted(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for count in _counters:
        count(event["level"])
    return event


def _values_left_out(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Leave of PostgreSQL's errors, also of those that led to the one that is logged, what has no values."""
    for one in _all_of(_error_of(event)):
        # By its class's home: the driver is not for this module to import.
        if type(one).__module__.startswith("asyncpg"):
            facts = ("sqlstate", "schema_name", "table_name", "column_name", "constraint_name")
            known = {name: getattr(one, name, None) for name in facts}
            said = ", ".join(f"{name} {value}" for name, value in known.items() if value)
            one.args = (f"{said} (its own words are logged at debug)",)
            for values in ("detail", "hint"):
                if getattr(one, values, None):
                    setattr(one, values, None)
    return event


def _error_of(event: EventDict) -> BaseException | None:
    given = event.get("exc_info")
    if isinstance(given, tuple):
        given = given[1]
    return given if isinstance(given, BaseException) else sys.exc_info()[1] if given else None


def _all_of(error: BaseException | None) -> Iterator[BaseException]:
    if error is None:
        return
    yield error
    yield from _all_of(error.__cause__)
    # Whoever sets a cause has said all there is to say of the context.
    yield from _all_of(error.__context__ if error.__cause__ is None else None)
    for inner in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield from _all_of(inner)
