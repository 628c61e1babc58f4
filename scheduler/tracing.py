"""One trace for a job: from the call that made it to its pictures, in every process that has a part in it.

A call is part of the trace that it names (`traceparent`, as the W3C has it), or begins one; of these a
setting says how many are recorded. A job's row has whose child it is, so that what is done for the job hours
later, after whatever restarts, is in the same trace. What is not recorded is not passed on.

Here is OpenTelemetry's API, which does nothing by itself; what sends spans somewhere is in `trace_export`. No
span has a prompt, a key, or the words of an error, which may quote one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol
from uuid import UUID

from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    NoOpTracer,
    Span,
    StatusCode,
    Tracer,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from scheduler.settings import Tracing

_W3C = TraceContextTextMapPropagator()
_NAME = "traceparent"
# Of the version that there is; those to come may be longer. The library logs a line for one that is too long,
# and strangers could fill the log.
_LONGEST = 512
_NS_PER_MS = 1_000_000

span_id_wanted: ContextVar[int | None] = ContextVar("span_id_wanted", default=None)
"""The id that the next span is to have; None: any."""


class TracingNotInstalled(RuntimeError):
    """Traces are to be sent somewhere, and what sends them is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "tracing.endpoint is set, but what sends traces is not installed here: "
            "pip install -c constraints.txt '.[tracing]', or leave tracing.endpoint out"
        )


class Traces(Protocol):
    """Where the spans of a process go."""

    tracer: Tracer
    """What begins them."""

    def close(self) -> None:
        """Send what there is, and end. Lasts a few seconds at most, so not on an event loop."""


class _Nowhere:
    def __init__(self) -> None:
        self.tracer: Tracer = NoOpTracer()

    def close(self) -> None:
        """There is nothing."""


def traces(settings: Tracing, *, service: str, release: str) -> Traces:
    """Return where the spans of this process go, which is a `service`; nowhere if no collector is set.

    For composition roots: once a process, which closes it at its orderly end. Raises TracingNotInstalled.
    """
    if settings.endpoint is None:
        return _Nowhere()
    try:
        from scheduler.trace_export import Collector
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise TracingNotInstalled from missing
    return Collector(
        settings.endpoint, sampled_permille=settings.sampled_permille, service=service, release=release
    )


def called_by(metadata: Iterable[tuple[str, Any]]) -> Context:
    """Return as whose child a call is to be traced, by its metadata; nobody's where it names none.

    Whatever is no `traceparent` is ignored, and so are two of them.
    """
    named = [value for key, value in metadata if key == _NAME]
    return child_of(named[0] if len(named) == 1 and isinstance(named[0], str) else None)


def child_of(traceparent: str | None) -> Context:
    """Return a context with the span that this names and nothing else; without any where it names none."""
    if traceparent is None or len(traceparent) > _LONGEST:
        return Context()
    return _W3C.extract({_NAME: traceparent}, Context())


def traceparent_of(span: Span) -> str | None:
    """Return what names this span to its children; None: it is not recorded, and nor are they to be."""
    if not _is_recorded(span):
        return None
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span, Context()))
    return carrier[_NAME]


def trace_id_of(span: Span) -> str | None:
    """Return the trace that this span is part of; None: it is not recorded."""
    return format_trace_id(span.get_span_context().trace_id) if _is_recorded(span) else None


def log_fields(span: Span) -> Mapping[str, str]:
    """Return what a log line says of this span: its trace, where that is recorded."""
    trace_id = trace_id_of(span)
    return {} if trace_id is None else {"trace_id": trace_id}


def job_waited(
    tracer: Tracer, traceparent: str | None, *, since_ms: int, until_ms: int, attributes: Attributes
) -> None:
    """Tell of a job that it waited. Times are milliseconds since 1970."""
    if traceparent is not None:
        waited = tracer.start_span(
            "queue", child_of(traceparent), attributes=attributes, start_time=since_ms * _NS_PER_MS
        )
        # A clock may have been set back.
        waited.end(max(since_ms, until_ms) * _NS_PER_MS)


def attempt_started(
    tracer: Tracer, traceparent: str | None, *, attempt_id: str, at_ms: int, attributes: Attributes
) -> Span:
    """Return the span of an attempt at a job; the invalid one where the job is not traced.

    Its id is made of the attempt's. So a scheduler that is started anew goes on with the span that the one
    before it began, under which the worker has told of its stages meanwhile.
    """
    if traceparent is None:
        return INVALID_SPAN
    with _next_span_id(UUID(attempt_id).int & (2**64 - 1)):
        return tracer.start_span(
            "attempt", child_of(traceparent), attributes=attributes, start_time=at_ms * _NS_PER_MS
        )


def noted(span: Span, event: str, at_ms: int, attributes: Attributes = None) -> None:
    """Note on a span what happened at that time, in milliseconds since 1970."""
    span.add_event(event, attributes, at_ms * _NS_PER_MS)


def ended(span: Span, at_ms: int, attributes: Mapping[str, Any], *, failed: bool = False) -> None:
    """End a span at that time, in milliseconds since 1970."""
    span.set_attributes(attributes)
    if failed:
        span.set_status(StatusCode.ERROR)
    span.end(at_ms * _NS_PER_MS)


@contextmanager
def _next_span_id(span_id: int) -> Iterator[None]:
    token = span_id_wanted.set(span_id or None)
    try:
        yield
    finally:
        span_id_wanted.reset(token)


def _is_recorded(span: Span) -> bool:
    context = span.get_span_context()
    return context.is_valid and context.trace_flags.sampled
