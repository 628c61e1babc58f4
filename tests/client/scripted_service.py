"""A real gRPC server that says what a test tells it to, and remembers what it was asked.

It serves every method of the protos in a thread of its own. A test gives each method a list of answers; one
call takes one answer. Answers are messages, refusals, for streams lists of both, or functions of the request.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from PIL import Image as Pictures

from billing.v1 import admin_pb2_grpc, billing_pb2_grpc
from scheduler.v1 import (
    account_pb2_grpc,
    fleet_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    moderation_pb2_grpc,
)

UID = "1b4e28ba-2fa1-4d3b-9f0c-51d2a6e8c7f4"
JOB = f"accounts/ada/jobs/{UID}"


@dataclass(frozen=True, kw_only=True)
class Refuse:
    """An answer that is an error, as the service gives them."""

    code: grpc.StatusCode
    reason: str | None = None
    sentence: str = "No."
    metadata: dict[str, str] = field(default_factory=dict)
    violations: dict[str, str] = field(default_factory=dict)
    retry_after_ms: int | None = None

    def status(self) -> Any:
        details: list[Message] = []
        if self.reason is not None:
            details.append(
                error_details_pb2.ErrorInfo(reason=self.reason, domain="darkroom", metadata=self.metadata)
            )
        if self.violations:
            request = error_details_pb2.BadRequest()
            for name, sentence in self.violations.items():
                request.field_violations.add(field=name, description=sentence)
            details.append(request)
        if self.retry_after_ms is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(self.retry_after_ms)
            details.append(retry)
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        number = code_pb2.Code.Value(self.code.name)
        return rpc_status.to_status(status_pb2.Status(code=number, message=self.sentence, details=packed))


BUSY = Refuse(code=grpc.StatusCode.UNAVAILABLE, reason="OVERLOADED", sentence="The database is away.")
HANG = object()
"""In a stream: say nothing more, and do not end."""


@dataclass
class ScriptedService:
    """What it will say and what it heard."""

    address: str = ""
    answers: dict[str, list[Any]] = field(default_factory=dict)
    requests: dict[str, list[Any]] = field(default_factory=dict)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    hung_calls_ended: threading.Event = field(default_factory=threading.Event)
    hanging: threading.Event = field(default_factory=threading.Event)

    def says(self, method: str, *answers: Any) -> None:
        """Answer the next calls of `method` with these, one each."""
        self.answers.setdefault(method, []).extend(answers)

    def asked(self, method: str) -> list[Any]:
        """Return the requests that `method` got."""
        return self.requests.get(method, [])

    def heard(self, method: str, request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        self.requests.setdefault(method, []).append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        assert self.answers.get(method), f"the test did not say what {method} answers"
        answer = self.answers[method].pop(0)
        return answer(request) if callable(answer) else answer


def _servicer(base: type, service: ScriptedService) -> Any:
    def method_named(name: str) -> Any:
        async def one(self: object, request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            answer = service.heard(name, request, context)
            if isinstance(answer, Refuse):
                await context.abort_with_status(answer.status())
            return answer

        async def many(
            self: object, request: Message, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            for answer in service.heard(name, request, context):
                if isinstance(answer, Refuse):
                    await context.abort_with_status(answer.status())
                elif answer is HANG:
                    try:
                        service.hanging.set()
                        await asyncio.Event().wait()
                    finally:
                        service.hung_calls_ended.set()
                else:
                    yield answer

        return many if name in ("WatchJob", "DownloadImages") else one

    names = [name for name in vars(base) if name[0].isupper()]
    return type(f"Scripted{base.__name__}", (base,), {name: method_named(name) for name in names})()


@contextmanager
def scripted_service() -> Iterator[ScriptedService]:
    """Serve on a free port of loopback."""
    service = ScriptedService()
    port: Future[int] = Future()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server = grpc.aio.server()
        job_pb2_grpc.add_JobServiceServicer_to_server(
            _servicer(job_pb2_grpc.JobServiceServicer, service), server
        )
        account_pb2_grpc.add_AccountServiceServicer_to_server(
            _servicer(account_pb2_grpc.AccountServiceServicer, service), server
        )
        billing_pb2_grpc.add_BillingServiceServicer_to_server(
            _servicer(billing_pb2_grpc.BillingServiceServicer, service), server
        )
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(
            _servicer(fleet_pb2_grpc.FleetServiceServicer, service), server
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            _servicer(admin_pb2_grpc.AdminServiceServicer, service), server
        )
        moderation_pb2_grpc.add_ModerationServiceServicer_to_server(
            _servicer(moderation_pb2_grpc.ModerationServiceServicer, service), server
        )
        number = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        port.set_result(number)
        await stop.wait()
        await server.stop(None)
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        if calls:
            await asyncio.wait(calls, timeout=10)  # cancelled ones, on their way out

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        service.address = f"127.0.0.1:{port.result(timeout=20)}"
        yield service
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def a_job(**fields: Any) -> job_pb2.Job:
    """A job of ada's, with what the test is about."""
    defaults: dict[str, Any] = {
        "name": JOB,
        "uid": UID,
        "kind": job_pb2.JOB_KIND_IMAGINE,
        "state": job_pb2.JOB_STATE_QUEUED,
        "tier": job_pb2.TIER_RELAX,
        "prompt": "a lighthouse",
        "width": 256,
        "height": 256,
        "steps": 20,
    }
    return job_pb2.Job(**defaults | fields)


def an_event(sequence: int, state: job_pb2.JobState, **fields: Any) -> job_pb2.WatchJobResponse:
    """A state event with the job as it then is."""
    job = a_job(state=state, event_sequence=sequence, **fields)
    event = job_pb2.StateEvent(sequence=sequence, state=state, sentence=f"Event {sequence}.", job=job)
    return job_pb2.WatchJobResponse(event=event)


def an_image(index: int, content: bytes, **fields: Any) -> job_pb2.Image:
    """Picture `index` as the service announces it."""
    defaults: dict[str, Any] = {
        "name": f"{JOB}/images/{index}",
        "file_name": f"{UID}_a-lighthouse_{index}.png",
        "content_type": "image/png",
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return job_pb2.Image(**defaults | fields)


def a_file(index: int, content: bytes, chunk_bytes: int = 64 * 1024, **fields: Any) -> list[Any]:
    """A header and the bytes of one picture, as DownloadImages sends them."""
    header = job_pb2.DownloadImagesResponse(
        header=job_pb2.FileHeader(image=an_image(index, content, **fields))
    )
    chunks = [
        job_pb2.DownloadImagesResponse(chunk=content[at : at + chunk_bytes])
        for at in range(0, len(content), chunk_bytes)
    ]
    return [header, *chunks]


def a_video(kind: str, content: bytes) -> job_pb2.Video:
    """The video of ada's job as the service announces it, `mp4` or `webp`."""
    return job_pb2.Video(
        name=f"{JOB}/videos/{kind}",
        file_name=f"{UID}_a-lighthouse.{kind}",
        content_type="video/mp4" if kind == "mp4" else "image/webp",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        frames=12,
    )


def a_png(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    """The bytes of a picture of one colour."""
    data = io.BytesIO()
    Pictures.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()
