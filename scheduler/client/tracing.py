"""A span for each call of the client, so that what the service does for it is in the caller's trace.

It is the child of whatever span is the caller's present one, and named to the service by the call's metadata
(`traceparent`). Where the caller's program records no traces, this does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from opentelemetry.trace import SpanKind, StatusCode, Tracer, TracerProvider, get_tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from scheduler.client.errors import DarkroomError

_W3C = TraceContextTextMapPropagator()


def client_tracer(provider: TracerProvider | None) -> Tracer:
    """Return what begins the spans of a client; without `provider` they go where the program's own go."""
    return get_tracer("darkroom.client", tracer_provider=provider)


@contextmanager
def traced_call(tracer: Tracer, request: Message) -> Iterator[Sequence[tuple[str, str]]]:
    """Have a span for the call that sends this request, its repeats included; yields what names it.

    The span does not become the present one: a stream is read between other things of the caller's.
    """
    method = _method_of(request.DESCRIPTOR)
    span = tracer.start_span(
        method, kind=SpanKind.CLIENT, attributes={"rpc.system.name": "grpc", "rpc.method": method}
    )
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span))
    try:
        yield tuple(carrier.items())
    except DarkroomError as error:
        span.set_attribute("error.type", error.stable_reason)
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.end()


@functools.cache
def _method_of(request: Descriptor) -> str:
    """Return the method that takes such a message: each has one of its own."""
    (method,) = (
        f"{service.full_name}/{method.name}"
        for service in request.file.services_by_name.values()
        for method in service.methods
        if method.input_type.full_name == request.full_name
    )
    return method
