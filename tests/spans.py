"""Spans that a test has recorded in its own process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler
from opentelemetry.trace import format_span_id, format_trace_id

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
RECORDED = f"00-{TRACE_ID}-{SPAN_ID}-01"
"""A `traceparent` of somebody who records."""
UNRECORDED = f"00-{TRACE_ID}-{SPAN_ID}-00"


class Spans:
    """A tracer, and the spans that were begun with it and have ended."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    def ended(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def names(self) -> list[str]:
        return [span.name for span in self.ended()]

    def of(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.ended() if span.name == name]


def events_of(span: ReadableSpan) -> dict[str, Mapping[str, Any]]:
    return {event.name: dict(event.attributes or {}) for event in span.events}


def ids_of(span: ReadableSpan) -> tuple[str, str, str]:
    """Return a span's trace, its own id, and its parent's (empty: it has none)."""
    assert span.context is not None
    parent = "" if span.parent is None else format_span_id(span.parent.span_id)
    return format_trace_id(span.context.trace_id), format_span_id(span.context.span_id), parent
