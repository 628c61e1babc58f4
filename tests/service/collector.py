"""A collector of traces on loopback: takes OTLP over HTTP, as any does, and keeps what came."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue

_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Told:
    """A span as it came."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: Mapping[str, str | int]
    events: Mapping[str, Mapping[str, str | int]]
    began_ns: int
    ended_ns: int
    failed: bool


class Collector:
    """What came."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self._told: list[Told] = []
        self._came = threading.Condition()

    def take(self, body: bytes) -> None:
        """Keep the spans of a request."""
        request = ExportTraceServiceRequest.FromString(body)
        with self._came:
            self._told += [
                Told(
                    name=span.name,
                    service=str(_plain(of.resource.attributes)["service.name"]),
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    attributes=_plain(span.attributes),
                    events={event.name: _plain(event.attributes) for event in span.events},
                    began_ns=span.start_time_unix_nano,
                    ended_ns=span.end_time_unix_nano,
                    failed=span.status.code == span.status.STATUS_CODE_ERROR,
                )
                for of in request.resource_spans
                for scope in of.scope_spans
                for span in scope.spans
            ]
            self._came.notify_all()

    def of(self, trace_id: str) -> list[Told]:
        """Return the spans of a trace that have come, in the order in which they began."""
        with self._came:
            return sorted(
                (one for one in self._told if one.trace_id == trace_id), key=lambda one: one.began_ns
            )

    def until(self, trace_id: str, enough: Callable[[Sequence[Told]], bool]) -> list[Told]:
        """Return the spans of a trace once there are enough."""
        with self._came:
            came = self._came.wait_for(lambda: enough(self.of(trace_id)), _PATIENCE_S)
        assert came, "\n".join(f"{one.service} {one.name} {one.attributes}" for one in self.of(trace_id))
        return self.of(trace_id)


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """Collect, at that port or any, while the context is open."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        collector = Collector(server.server_port)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        serving.start()
        try:
            yield collector
        finally:
            server.shutdown()
            serving.join()


def _plain(attributes: Sequence[KeyValue]) -> dict[str, str | int]:
    return {
        one.key: one.value.int_value if one.value.HasField("int_value") else one.value.string_value
        for one in attributes
    }
