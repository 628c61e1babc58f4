"""Every call passes here: who is it, may they, count it, and turn what was refused into a status.

The services behind it raise refusals and never see a status code. Whatever else they raise is a bug: the
traceback goes to the log under an id, and the caller gets the id alone.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, cast

import grpc
import structlog
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from billing.refusals import Refusal
from scheduler.frontdoor.auth import Doorman, Principal, is_open
from scheduler.frontdoor.errors import code_of, status_of, status_of_bug
from scheduler.metrics import FrontDoorMetrics

_log = structlog.get_logger()

_caller: ContextVar[Principal] = ContextVar("caller")

OnRefusal: TypeAlias = Callable[[Message, Refusal], None]
"""Told the request and why it was refused."""

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def caller() -> Principal:
    """Return who made the call that is being served."""
    return _caller.get()


class Gate(grpc.aio.ServerInterceptor):
    """Stands before every method but the open ones."""

    def __init__(
        self, doorman: Doorman, metrics: FrontDoorMetrics, on_refusal: Mapping[str, OnRefusal]
    ) -> None:
        self._doorman = doorman
        self._metrics = metrics
        self._on_refusal = on_refusal
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
            if handler is None or is_open(path):
                return handler
            self._guarded[path] = self._guard(path, handler)
        return self._guarded[path]

    def _guard(self, path: str, handler: _Handler) -> _Handler:
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._guarded_stream(path, handler),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guarded_unary(path, handler),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guarded_unary(
        self, path: str, handler: _Handler
    ) -> Callable[[Message, _Context], Awaitable[Message]]:
        # The stubs know only the handlers of threaded servers.
        serve = cast(Callable[[Message, _Context], Awaitable[Message]], handler.unary_unary)
        counters = _Counters.of(self._metrics, path, streaming=False)

        async def guarded(request: Message, context: _Context) -> Message:
            async with self._call(path, counters, request, context):
                response = await serve(request, context)
                counters.sent()
                return response

        return guarded

    def _guarded_stream(
        self, path: str, handler: _Handler
    ) -> Callable[[Message, _Context], AsyncIterator[Message]]:
        serve = cast(Callable[[Message, _Context], AsyncGenerator[Message, None]], handler.unary_stream)
        counters = _Counters.of(self._metrics, path, streaming=True)

        async def guarded(request: Message, context: _Context) -> AsyncIterator[Message]:
            async with self._call(path, counters, request, context) as principal:
                self._doorman.open_stream(principal.key_id)
                try:
                    # Closed here, not by the garbage collector: a dropped call ends what it started.
                    async with aclosing(serve(request, context)) as responses:
                        async for response in responses:
                            counters.sent()
                            yield response
                finally:
                    self._doorman.close_stream(principal.key_id)

        return guarded

    @asynccontextmanager
    async def _call(
        self, path: str, counters: _Counters, request: Message, context: _Context
    ) -> AsyncIterator[Principal]:
        began_s = time.perf_counter()
        counters.started()
        code = grpc.StatusCode.OK
        try:
            principal = await self._doorman.admit(path, context.invocation_metadata() or ())
            _caller.set(principal)
            yield principal
        except Refusal as refusal:
            code = code_of(refusal)
            tell = self._on_refusal.get(path)
            if tell is not None:
                tell(request, refusal)
            await _abort(context, status_of(refusal))
        except (asyncio.CancelledError, GeneratorExit):
            code = _why_cancelled(context)
            raise
        except Exception:
            code = grpc.StatusCode.INTERNAL
            error_id = secrets.token_hex(8)
            _log.exception("call failed by a bug", method=path, error_id=error_id)
            await _abort(context, status_of_bug(error_id))
        finally:
            counters.ended(code, time.perf_counter() - began_s)


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

    def ended(self, code: grpc.StatusCode, took_s: float) -> None:
        self.metrics.grpc_server_handled.labels(*self.rpc, _CODE_NAMES[code]).inc()
        grpc_type, service, method = self.rpc
        if grpc_type == "unary":
            self.metrics.grpc_server_handling_seconds.labels(service, method).observe(took_s)


def _code_name(code: grpc.StatusCode) -> str:
    """Return a code as the dashboards of go-grpc-prometheus spell it: `NotFound`, but `Canceled`."""
    if code is grpc.StatusCode.CANCELLED:
        return "Canceled"
    if code is grpc.StatusCode.OK:
        return "OK"
    return code.name.replace("_", " ").title().replace(" ", "")


_CODE_NAMES: Mapping[grpc.StatusCode, str] = {code: _code_name(code) for code in grpc.StatusCode}
