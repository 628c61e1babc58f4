"""Spans on their way to a collector: in batches, by a thread of their own, as OTLP over HTTP.

Nobody waits for the collector. While it cannot be reached spans are dropped; a line in the log says so, with
what is the matter, and another one when it can be reached again. To end takes no longer than two tries.

This needs the extra `tracing`, so it is imported only where an address is set: see `tracing.traces`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Tracer

from scheduler.tracing import span_id_wanted

_log = structlog.get_logger()

# A process that is killed takes with it what it has not sent.
_SEND_EVERY_MS = 200
_TRY_S = 5.0
# Where the library says of each batch that it was not sent, of each span that there was no room for it.
_LIBRARY_LOGS = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
)


class Collector:
    """Where the spans of this process go, once they have ended."""

    def __init__(self, endpoint: str, *, sampled_permille: int, service: str, release: str) -> None:
        url = f"{endpoint.rstrip('/')}/v1/traces"
        self._delivery = _Delivery(OTLPSpanExporter(endpoint=url, timeout=_TRY_S), url)
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(sampled_permille / 1000),
            resource=Resource.create(
                {"service.name": service, "service.version": release, "host.name": socket.gethostname()}
            ),
            shutdown_on_exit=False,
            id_generator=_Ids(),
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self._delivery, schedule_delay_millis=_SEND_EVERY_MS)
        )
        self.tracer: Tracer = self._provider.get_tracer("darkroom", release)

    def close(self) -> None:
        """Send what there is, and end. Lasts a few seconds at most, so not on an event loop."""
        self._delivery.hurry()
        self._provider.shutdown()


class _Ids(RandomIdGenerator):
    """Random ones, but for a span that is to have one of its own."""

    def generate_span_id(self) -> int:
        return span_id_wanted.get() or super().generate_span_id()


class _Delivery(SpanExporter):
    """Sends batches, and says when that begins to fail and when it no longer does."""

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self._exporter = exporter
        self._url = url
        self._hurries = False
        self._arrives = True
        for name in _LIBRARY_LOGS:
            logging.getLogger(name).addFilter(self._heard)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._hurries and not self._arrives:
            return SpanExportResult.FAILURE
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS and not self._arrives:
            self._arrives = True
            _log.info("traces arrive again", at=self._url)
        return result

    def hurry(self) -> None:
        """From now on, try nothing again."""
        self._hurries = True
        if not self._arrives:
            self._exporter.shutdown()

    def shutdown(self) -> None:
        self._exporter.shutdown()
        for name in _LIBRARY_LOGS:
            logging.getLogger(name).removeFilter(self._heard)

    def _heard(self, record: logging.LogRecord) -> bool:
        """Make one line of ours of all that the library says; the first says what is the matter."""
        if self._arrives:
            self._arrives = False
            _log.warning("traces do not arrive", at=self._url, trouble=record.getMessage())
        return False
