"""A program that records traces finds the client's calls in them, and the service is told whose they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from opentelemetry.trace import SpanKind, StatusCode

from scheduler.client import sync
from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import QueueFull
from scheduler.v1 import job_pb2
from tests.client.scripted_service import BUSY, UID, Refuse, ScriptedService, a_file, a_job, an_event
from tests.spans import Spans, ids_of

CREATE = "scheduler.v1.JobService/CreateJob"


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
async def traced(service: ScriptedService, spans: Spans) -> AsyncIterator[DarkroomClient]:
    async def no_pause(seconds: float) -> None:
        """Do not wait."""

    async with DarkroomClient(
        service.address, "dk_ada_secret", pause=no_pause, tracer_provider=spans.provider
    ) as client:
        yield client


async def test_a_call_with_its_repeats_is_one_span_under_the_callers_own(
    service: ScriptedService, traced: DarkroomClient, spans: Spans
) -> None:
    service.says("CreateJob", BUSY, BUSY, a_job())
    with spans.tracer.start_as_current_span("its own work") as own:
        await traced.imagine("a secret lighthouse")
    (call,) = spans.of(CREATE)
    assert call.parent == own.get_span_context()
    assert call.kind is SpanKind.CLIENT
    trace_id, span_id, _ = ids_of(call)
    named = {metadata["traceparent"].rpartition("-")[0] for metadata in service.metadata}
    assert named == {f"00-{trace_id}-{span_id}"}
    assert len(service.metadata) == 3
    assert "secret" not in call.to_json()


async def test_a_refusal_is_in_the_span_by_its_reason(
    service: ScriptedService, traced: DarkroomClient, spans: Spans
) -> None:
    service.says("CreateJob", Refuse(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL"))
    with pytest.raises(QueueFull):
        await traced.imagine("a lighthouse")
    (call,) = spans.of(CREATE)
    assert (call.attributes or {})["error.type"] == "QUEUE_FULL"
    assert call.status.status_code is StatusCode.ERROR


async def test_a_watch_and_a_download_are_spans_that_are_nobodys_parents_in_between(
    service: ScriptedService, traced: DarkroomClient, spans: Spans, tmp_path: Path
) -> None:
    service.says(
        "WatchJob",
        [an_event(1, job_pb2.JOB_STATE_QUEUED), BUSY],
        [an_event(2, job_pb2.JOB_STATE_SUCCEEDED)],
    )
    service.says("DownloadImages", a_file(1, b"picture"))
    async for _ in traced.watch(UID):
        between = spans.tracer.start_span("what the program does meanwhile")
        between.end()
    await traced.download(UID, tmp_path, image=1)
    (watch,), (download,) = (
        spans.of(f"scheduler.v1.JobService/{name}") for name in ("WatchJob", "DownloadImages")
    )
    assert [metadata["traceparent"][36:52] for metadata in service.metadata] == [
        ids_of(watch)[1],
        ids_of(watch)[1],
        ids_of(download)[1],
    ], "the broken watch was resumed under the same span"
    assert {span.parent for span in spans.of("what the program does meanwhile")} == {None}


async def test_the_sync_face_is_in_the_trace_of_the_thread_that_calls_it(
    service: ScriptedService, spans: Spans
) -> None:
    service.says("CreateJob", a_job())

    def call() -> None:
        with (
            spans.tracer.start_as_current_span("its own work"),
            sync.DarkroomClient(service.address, "dk_ada_secret", tracer_provider=spans.provider) as client,
        ):
            client.imagine("a lighthouse")

    await asyncio.to_thread(call)
    (own,), (made,) = spans.of("its own work"), spans.of(CREATE)
    assert made.parent == own.context


async def test_a_program_that_records_nothing_names_nothing(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says("CreateJob", a_job())
    await client.imagine("a lighthouse")
    assert "traceparent" not in service.metadata[0]
