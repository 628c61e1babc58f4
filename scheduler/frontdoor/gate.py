"""Every call passes here: who is it, may they, count and trace it, and turn what was refused into a status.

The services behind it raise refusals and never see a status code. Whatever else they raise is a bug: the
traceback goes to the log under an id, and the caller gets the id alone. Bytes that are no message are refused
like any other mistake; left to the library, anybody could fill the log with its tracebacks.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, cast

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from grpc_status import rpc_status
from opentelemetry.context import attach
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode, Tracer, set_span_in_context

from billing.refusals import Refusal
from scheduler.frontdoor.admission import Admission
from scheduler.frontdoor.auth import Doorman, Principal, is_open
from scheduler.frontdoor.errors import code_of, status_of, status_of_bug
from scheduler.metrics import FrontDoorMetrics
from scheduler.refusals import FieldViolation, InvalidRequest, Overloaded
from scheduler.tracing import called_by, trace_id_of

_log = structlog.get_logger()

_caller: ContextVar[Principal] = ContextVar("caller")

# Those of which OpenTelemetry says that a server has failed; the others say something about the caller.
_OUR_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)

OnRefusal: TypeAlias = Callable[[Message, Refusal], None]
"""Told the request and why it was refused."""

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, kw_only=True)
class _Unreadable:
    """Bytes that are no message of the method's kind."""

    empty: Message
    """What the message would be if it said nothing."""


_Given: TypeAlias = "Message | _Unreadable"


def caller() -> Principal:
    """Return who made the call that is being served."""
    return _caller.get()


class Gate(grpc.aio.ServerInterceptor):
    """Stands before every method but the open ones. Of these, a stream is open for `strangers_streams_s`."""

    def __init__(
        self,
        doorman: Doorman,
        admission: Admission,
        metrics: FrontDoorMetrics,
        on_refusal: Mapping[str, OnRefusal],
        *,
        strangers_streams_s: float,
        tracer: Tracer,
    ) -> None:
        self._doorman = doorman
        self._admission = admission
        self._metrics = metrics
        self._on_refusal = on_refusal
        self._strangers_streams_s = strangers_streams_s
        self._tracer = tracer
        self._guarded: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Return the method's handler with everything of this module around it."""
        path = handler_call_details.method
        if path not in self._guarded:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._guarded[path] = self._watch_over(handler) if is_open(path) else self._guard(path, handler)
        return self._guarded[path]

    def _guard(self, path: str, handler: _Handler) -> _Handler:
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._guarded_stream(path, handler),
                request_deserializer=_tolerant(handler),
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guarded_unary(path, handler),
            request_deserializer=_tolerant(handler),
            response_serializer=handler.response_serializer,
        )

    def _watch_over(self, handler: _Handler) -> _Handler:
        """Return the handler of an open method, with nothing around it but what keeps strangers harmless."""
        behaviour: Any
        if handler.request_streaming:
            made, behaviour = grpc.stream_stream_rpc_method_handler, self._open_talk(handler)
        elif handler.response_streaming:
            made, behaviour = grpc.unary_stream_rpc_method_handler, self._open_stream(handler)
        else:
            made, behaviour = grpc.unary_unary_rpc_method_handler, _open_unary(handler)
        return made(
            behaviour,
            request_deserializer=_tolerant(handler),
            response_serializer=handler.response_serializer,
        )

    def _open_talk(self, handler: _Handler) -> Callable[[Any, _Context], AsyncIterator[Message]]:
        serve: Any = handler.stream_stream

        async def watched(given: AsyncIterator[_Given], context: _Context) -> AsyncIterator[Message]:
            async with _refusals_told(context):
                with self._doorman.stream_of_a_stranger(context.peer()):
                    ends_s = asyncio.get_running_loop().time() + self._strangers_streams_s
                    async with aclosing(serve(_all_read(given), context)) as responses:
                        while True:
                            # Not around the yield: what is cancelled there is the library.
                            async with _until(ends_s):
                                response = await anext(responses, None)
                            if response is None:
                                break
                            yield response

        return watched

    def _open_stream(self, handler: _Handler) -> Callable[[_Given, _Context], Awaitable[None]]:
        # Of the library's only one, the health watch, which writes to the context and yields nothing.
        serve: Any = handler.unary_stream

        async def watched(given: _Given, context: _Context) -> None:
            async with _refusals_told(context):
                with self._doorman.stream_of_a_stranger(context.peer()):
                    async with _until(asyncio.get_running_loop().time() + self._strangers_streams_s):
                        await serve(_read(given), context)

        return watched

    def _guarded_unary(
        self, path: str, handler: _Handler
    ) -> Callable[[_Given, _Context], Awaitable[Message]]:
        # The stubs know only the handlers of threaded servers.
        serve = cast(Callable[[Message, _Context], Awaitable[Message]], handler.unary_unary)
        counters = _Counters.of(self._metrics, path, streaming=False)

        async def guarded(given: _Given, context: _Context) -> Message:
            async with self._call(path, counters, given, context) as principal:
                with self._admission.entered(path, principal):
                    response = await serve(_read(given), context)
                counters.sent()
                return response

        return guarded

    def _guarded_stream(
        self, path: str, handler: _Handler
    ) -> Callable[[_Given, _Context], AsyncIterator[Message]]:
        serve = cast(Callable[[Message, _Context], AsyncGenerator[Message, None]], handler.unary_stream)
        counters = _Counters.of(self._metrics, path, streaming=True)

        async def guarded(given: _Given, context: _Context) -> AsyncIterator[Message]:
            async with self._call(path, counters, given, context) as principal:
                with self._doorman.stream_of(principal) as stream:
                    # Closed here, not by the garbage collector: a dropped call ends what it started.
                    async with aclosing(serve(_read(given), context)) as responses:
                        while True:
                            # Not around the yield: what is cancelled there is the library.
                            async with stream.kept():
                                response = await anext(responses, None)
                            if response is None:
                                break
                            counters.sent()
                            yield response

        return guarded

    @asynccontextmanager
    async def _call(
        self, path: str, counters: _Counters, given: _Given, context: _Context
    ) -> AsyncIterator[Principal]:
        began_s = time.perf_counter()
        counters.started()
        code = grpc.StatusCode.OK
        # Of callers that are not let in there is none: strangers could fill whatever keeps traces.
        span: Span = INVALID_SPAN
        began_ns = time.time_ns()
        metadata = context.invocation_metadata() or ()
        try:
            self._admission.refuse_if_late(path)
            principal = await self._doorman.admit(path, metadata)
            _caller.set(principal)
            span = self._begun_span(path, metadata, principal, began_ns)
            yield principal
        except Refusal as refusal:
            code = code_of(refusal)
            tell = self._on_refusal.get(path)
            if tell is not None:
                tell(given.empty if isinstance(given, _Unreadable) else given, refusal)
            await _abort(context, status_of(refusal))
        except (asyncio.CancelledError, GeneratorExit):
            code = _why_cancelled(context)
            raise
        except Exception:
            code = grpc.StatusCode.INTERNAL
            error_id = secrets.token_hex(8)
            span.set_attribute("darkroom.error_id", error_id)
            _log.exception("call failed by a bug", method=path, error_id=error_id)
            await _abort(context, status_of_bug(error_id))
        finally:
            span.set_attribute("rpc.response.status_code", code.name)
            if code in _OUR_FAULTS:
                span.set_status(StatusCode.ERROR)
            span.end()
            counters.ended(code, time.perf_counter() - began_s, trace_id_of(span))

    def _begun_span(
        self, path: str, metadata: Iterable[tuple[str, Any]], principal: Principal, began_ns: int
    ) -> Span:
        """Begin the span of a call, whose own task is within it from now on."""
        span = self._tracer.start_span(
            path[1:],
            called_by(metadata),
            SpanKind.SERVER,
            {
                "rpc.system.name": "grpc",
                "rpc.method": path[1:],
                "darkroom.account": principal.account_id,
            },
            start_time=began_ns,
        )
        attach(set_span_in_context(span))
        return span


def _tolerant(handler: _Handler) -> Callable[[bytes], _Given]:
    """Return a deserializer that never fails: the library makes UNKNOWN and a traceback of one that does."""
    deserialize = handler.request_deserializer
    assert deserialize is not None, "every method has messages"

    def tolerant(wire: bytes) -> _Given:
        try:
            return cast(Message, deserialize(wire))
        except DecodeError:
            return _Unreadable(empty=cast(Message, deserialize(b"")))

    return tolerant


def _read(given: _Given) -> Message:
    """Return the message that was given. Raises InvalidRequest if it was none."""
    if isinstance(given, _Unreadable):
        name = given.empty.DESCRIPTOR.full_name
        raise InvalidRequest([FieldViolation(field="request", sentence=f"request is no {name}.")])
    return given


async def _all_read(given: AsyncIterator[_Given]) -> AsyncIterator[Message]:
    async for each in given:
        yield _read(each)


@asynccontextmanager
async def _until(ends_s: float) -> AsyncIterator[None]:
    """Leave the context at a time of the event loop. Raises Overloaded then."""
    limit = asyncio.timeout_at(ends_s)
    try:
        async with limit:
            yield
    except TimeoutError as late:
        if not limit.expired():
            raise
        raise Overloaded(
            sentence="Streams without a key end after a while, so that others get a turn: open another."
        ) from late


def _open_unary(handler: _Handler) -> Callable[[_Given, _Context], Awaitable[Message]]:
    serve: Any = handler.unary_unary

    async def watched(given: _Given, context: _Context) -> Message:
        async with _refusals_told(context):
            return cast(Message, await serve(_read(given), context))
        raise AssertionError("an abort does not return")

    return watched


@asynccontextmanager
async def _refusals_told(context: _Context) -> AsyncIterator[None]:
    try:
        yield
    except Refusal as refusal:
        await _abort(context, status_of(refusal))


async def _abort(context: _Context, status: status_pb2.Status) -> NoReturn:
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("an abort does not return")


def _why_cancelled(context: _Context) -> grpc.StatusCode:
    left_s = context.time_remaining()
    return (
        grpc.StatusCode.DEADLINE_EXCEEDED if left_s is not None and left_s <= 0 else grpc.StatusCode.CANCELLED
    )


@dataclass(frozen=True, kw_only=True)
class _Counters:
    """The metric families of grpc_server_*, bound to one method."""

    metrics: FrontDoorMetrics
    rpc: tuple[str, str, str]
    """grpc_type, grpc_service, grpc_method"""

    @classmethod
    def of(cls, metrics: FrontDoorMetrics, path: str, *, streaming: bool) -> _Counters:
        _, service, method = path.split("/")
        return cls(metrics=metrics, rpc=("server_stream" if streaming else "unary", service, method))

    def started(self) -> None:
        self.metrics.grpc_server_started.labels(*self.rpc).inc()
        self.metrics.grpc_server_msg_received.labels(*self.rpc).inc()

    def sent(self) -> None:
        self.metrics.grpc_server_msg_sent.labels(*self.rpc).inc()

    def ended(self, code: grpc.StatusCode, took_s: float, trace_id: str | None) -> None:
        self.metrics.call_ended(rpc=self.rpc, code=_CODE_NAMES[code], took_s=took_s, trace_id=trace_id)


def _code_name(code: grpc.StatusCode) -> str:
    """Return a code as the dashboards of go-grpc-prometheus spell it: `NotFound`, but `Canceled`."""
    if code is grpc.StatusCode.CANCELLED:
        return "Canceled"
    if code is grpc.StatusCode.OK:
        return "OK"
    return code.name.replace("_", " ").title().replace(" ", "")


_CODE_NAMES: Mapping[grpc.StatusCode, str] = {code: _code_name(code) for code in grpc.StatusCode}
