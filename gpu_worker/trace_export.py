"""A worker's spans on their way to a collector: in batches, by a thread of their own, as OTLP over HTTP.

No run waits for the collector. While it cannot be reached spans are dropped; one line in the log says so, and
another one when it can be reached again.

This needs the extra `tracing`, so it is imported only where an address is set: see `tracing.tracer`. The
scheduler's module of this name does the same for its side of the wall.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import DEFAULT_OFF

_log = logging.getLogger(__name__)

# Ray ends a worker without a word, and what it has not sent goes with it.
_SEND_EVERY_MS = 200
_TRY_S = 5.0
# Where the library says of each batch that it was not sent, of each span that there was no room for it.
_LIBRARY_LOGS = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
)


def spans_to(endpoint: str, *, worker_id: str, release: str) -> TracerProvider:
    """Return what has tracers whose spans go to this collector: those in traces that are recorded."""
    provider = TracerProvider(
        sampler=DEFAULT_OFF,
        resource=Resource.create(
            {
                "service.name": "darkroom-worker",
                "service.version": release,
                "service.instance.id": worker_id,
                "host.name": socket.gethostname(),
            }
        ),
        shutdown_on_exit=False,
    )
    url = f"{endpoint.rstrip('/')}/v1/traces"
    delivery = _Delivery(OTLPSpanExporter(endpoint=url, timeout=_TRY_S), url)
    provider.add_span_processor(BatchSpanProcessor(delivery, schedule_delay_millis=_SEND_EVERY_MS))
    return provider


class _Delivery(SpanExporter):
    """Sends batches, and says when that begins to fail and when it no longer does."""

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self._exporter = exporter
        self._url = url
        self._arrives = True
        for name in _LIBRARY_LOGS:
            logging.getLogger(name).addFilter(self._heard)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS and not self._arrives:
            self._arrives = True
            _log.warning("traces arrive again at=%s", self._url)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        for name in _LIBRARY_LOGS:
            logging.getLogger(name).removeFilter(self._heard)

    def _heard(self, record: logging.LogRecord) -> bool:
        """Make one line of ours of all that the library says; the first says what is the matter."""
        if self._arrives:
            self._arrives = False
            _log.warning("traces do not arrive at=%s: %s", self._url, record.getMessage())
        return False
