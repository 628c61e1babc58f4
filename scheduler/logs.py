"""Structured logs: past-tense facts with fields. JSON lines for machines, colours for a terminal."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logs(level: str = "info") -> None:
    """Send this process's logs to standard error. Prompts are only ever logged at `debug`."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # Written, not printed: in a driver Ray replaces `print` by one of its own. And to what standard error
        # is then, which a test or a daemon may have replaced.
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),
    )
