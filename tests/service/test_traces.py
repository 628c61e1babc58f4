"""One trace from the call that made a job to its pictures, through all processes of a running service."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Sequence
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from scheduler.client.aio import DarkroomClient
from scheduler.v1 import job_pb2
from tests.service.collector import Collector, Told
from tests.service.people import People, result_of, until_step
from tests.service.process import ServiceProcess

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(240)]

CREATE = "scheduler.v1.JobService/CreateJob"


def named(told: Sequence[Told], name: str) -> list[Told]:
    return [one for one in told if one.name == name]


async def exemplars_of(running: ServiceProcess, page: str, trace_id: str) -> set[str]:
    """Return the series of a page that name a trace."""
    request = urllib.request.Request(
        f"http://{running.ops}{page}", headers={"Accept": "application/openmetrics-text;version=1.0.0"}
    )

    def read() -> str:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    return {
        sample.name
        for family in text_string_to_metric_families(await asyncio.to_thread(read))
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels == {"trace_id": trace_id}
    }


async def test_a_job_is_one_trace_through_all_processes_and_the_loss_of_a_worker(
    running: ServiceProcess, people: People, collector: Collector
) -> None:
    exported = InMemorySpanExporter()
    program = TracerProvider(shutdown_on_exit=False)
    program.add_span_processor(SimpleSpanProcessor(exported))
    key = await people.key("ada")
    with program.get_tracer("a program").start_as_current_span("its own work") as own:
        async with DarkroomClient(running.address, key, tracer_provider=program) as ada:
            handle = await ada.imagine("a lighthouse", tier=job_pb2.TIER_FAST)
            await until_step(handle, 3)
            running.kill_worker(running.last_said("attempt started", handle.id)["worker"])
            job = await result_of(handle)
    assert job.receipt.attempts == 2
    trace_id = format_trace_id(own.get_span_context().trace_id)

    told = collector.until(
        trace_id,
        lambda told: len(named(told, "attempt")) == 2 and bool(named(told, "deliver")),
    )
    by_id = {one.span_id: one for one in told}

    calls = {span.name: span for span in exported.get_finished_spans()}
    assert calls[CREATE].parent == own.get_span_context(), "the caller's own span is the parent"
    assert calls[CREATE].context is not None
    (create,) = named(told, CREATE)
    assert create.parent_id == format_span_id(calls[CREATE].context.span_id)
    assert create.service == "darkroom-frontdoor"
    assert create.attributes["rpc.response.status_code"] == "OK"
    assert str(create.attributes["darkroom.account"]).startswith("ada-")
    assert "scheduler.v1.JobService/WatchJob" in calls

    queued, attempts = named(told, "queue"), named(told, "attempt")
    assert [one.parent_id for one in (*queued, *attempts)] == [create.span_id] * 4
    assert {one.service for one in (*queued, *attempts)} == {"darkroom-scheduler"}
    assert [one.attributes["darkroom.outcome"] for one in attempts] == ["lost", "succeeded"]
    assert [one.failed for one in attempts] == [True, False]
    assert attempts[0].events["lost"]["darkroom.reason"] == "worker_lost"
    for waited, attempt in zip(queued, attempts, strict=True):
        assert waited.began_ns <= waited.ended_ns == attempt.began_ns < attempt.ended_ns
    assert queued[1].began_ns >= queued[0].ended_ns, "the second wait begins with the loss"

    stages = [one for one in told if one.service == "darkroom-worker"]
    of_second = [one for one in stages if by_id[one.parent_id] is attempts[1]]
    assert {"denoise", "deliver"} <= {one.name for one in of_second}
    assert all(by_id[one.parent_id] in attempts for one in stages)
    for before, after in pairwise(of_second):
        assert before.ended_ns <= after.began_ns, "one thing after the other"

    wrote = " ".join(f"{one.name} {one.attributes} {one.events}" for one in told)
    assert "lighthouse" not in wrote
    assert key not in wrote

    for event in ("attempt started", "attempt ended"):
        assert running.said_of(event, handle.id, 2)["trace_id"] == trace_id
    assert await exemplars_of(running, "/metrics", trace_id) == {"grpc_server_handling_seconds_bucket"}
    assert await exemplars_of(running, "/metrics/scheduler", trace_id) == {
        "darkroom_job_queue_wait_seconds_bucket",
        "darkroom_job_run_seconds_bucket",
    }


async def test_a_restarted_scheduler_goes_on_with_the_span_of_what_runs(
    running: ServiceProcess, people: People, collector: Collector
) -> None:
    program = TracerProvider(shutdown_on_exit=False)
    key = await people.key("ada")
    with program.get_tracer("a program").start_as_current_span("its own work") as own:
        async with DarkroomClient(running.address, key, tracer_provider=program) as ada:
            handle = await ada.imagine("a lighthouse", tier=job_pb2.TIER_FAST)
            await until_step(handle, 3)
            running.kill_scheduler()
            await result_of(handle)
    trace_id = format_trace_id(own.get_span_context().trace_id)
    told = collector.until(
        trace_id, lambda told: bool(named(told, "attempt")) and bool(named(told, "deliver"))
    )
    (attempt,), (deliver,) = named(told, "attempt"), named(told, "deliver")
    assert "adopted" in attempt.events
    assert deliver.parent_id == attempt.span_id, "it was told to the worker by the scheduler before"
