"""The front door's part of a trace: whose child a call is, what its span says, and what a job gets of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import StatusCode, get_current_span

from scheduler.logs import configure_logs
from scheduler.store.jobs import read_job
from scheduler.tracing import called_by, child_of, traceparent_of
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, refusal
from tests.spans import RECORDED, SPAN_ID, TRACE_ID, UNRECORDED, Spans, ids_of

REQUEST_ID = "6b1ff0d5-7d0b-4f0e-9c2c-2b9d5a3f1c11"
CREATE = "scheduler.v1.JobService/CreateJob"


@pytest.fixture
def spans() -> Spans:
    """As a front door has them: of its own traces none is recorded, of others what their callers record."""
    return Spans(ParentBasedTraceIdRatio(0))


async def create(caller: Caller, *named: str) -> job_pb2.Job:
    request = job_pb2.CreateJobRequest(request_id=REQUEST_ID, imagine=job_pb2.Imagine(prompt="a fox"))
    job: Any = await caller.jobs.CreateJob(request, metadata=[("traceparent", one) for one in named])
    return job  # type: ignore[no-any-return]


async def the_ended(spans: Spans) -> ReadableSpan:
    """Return the one span that ends. A caller may have its answer before that."""
    while True:
        if ended := spans.ended():
            (span,) = ended
            return span
        await asyncio.sleep(0.01)


async def stored(door: Door, job: job_pb2.Job) -> str | None:
    traceparent: str | None = await door.sql(
        "SELECT traceparent FROM scheduler.job WHERE job_id = $1::uuid", job.uid
    )
    return traceparent


async def test_a_job_is_given_the_span_of_the_call_that_made_it(door: Door, spans: Spans) -> None:
    ann = await door.caller("ann")
    job = await create(ann, RECORDED)
    span = await the_ended(spans)
    assert span.name == CREATE
    trace_id, span_id, parent_id = ids_of(span)
    assert (trace_id, parent_id) == (TRACE_ID, SPAN_ID)
    assert span.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": CREATE,
        "rpc.response.status_code": "OK",
        "darkroom.account": "ann",
    }
    given = await stored(door, job)
    assert given is not None
    assert given.startswith(f"00-{TRACE_ID}-{span_id}-")

    again = await create(ann, RECORDED.replace(TRACE_ID, "1" * 32))
    assert (again.uid, await stored(door, again)) == (job.uid, given), (
        "a job is in one trace, that of its first call"
    )

    await door.succeed(job.uid)
    await ann.delete(job.name)
    assert await stored(door, job) is None
    async with door.pool.reading() as connection:
        assert await read_job(connection, job.uid) is None


@pytest.mark.parametrize(
    "named",
    [
        pytest.param([], id="none"),
        pytest.param([UNRECORDED], id="unrecorded"),
        pytest.param([RECORDED.upper()], id="upper case"),
        pytest.param([RECORDED + "-more"], id="longer than the version"),
        pytest.param(["ff" + RECORDED[2:]], id="no version"),
        pytest.param(["00-" + "0" * 32 + RECORDED[35:]], id="no trace"),
        pytest.param(["cc-" + RECORDED[3:] + "-" + "x" * 4_000], id="too long"),
        pytest.param(["; DROP TABLE scheduler.job"], id="nonsense"),
    ],
)
async def test_a_call_that_names_no_recorded_trace_is_served_like_any_other(
    door: Door, spans: Spans, named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    job = await create(await door.caller("ann"), *named)
    assert await stored(door, job) is None
    assert spans.ended() == []
    assert caplog.messages == [], "strangers cannot fill the log"


async def test_a_refusal_is_the_callers_fault_and_strangers_leave_no_trace(door: Door, spans: Spans) -> None:
    request, metadata = job_pb2.GetJobRequest(name="x"), [("traceparent", RECORDED)]
    await refusal(door.with_secret("", "dk_none").jobs.GetJob(request, metadata=metadata))
    assert spans.ended() == []
    ann = await door.caller("ann")
    await refusal(ann.jobs.GetJob(request, metadata=metadata))
    span = await the_ended(spans)
    assert (span.attributes or {})["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert span.status.status_code is StatusCode.UNSET


async def test_a_bug_is_ours_and_its_line_names_the_trace(
    door: Door, spans: Spans, capsys: pytest.CaptureFixture[str]
) -> None:
    ann = await door.caller("ann")
    job = await create(ann)
    async with door.pool.transaction() as connection:
        await connection.execute("UPDATE scheduler.job SET spec = spec - 'model'")
    before = structlog.get_config()
    configure_logs("info")
    try:
        get = job_pb2.GetJobRequest(name=job.name)
        refused = await refusal(ann.jobs.GetJob(get, metadata=[("traceparent", RECORDED)]))
    finally:
        structlog.configure(**before)
    assert refused.code is grpc.StatusCode.INTERNAL
    span = await the_ended(spans)
    assert span.status.status_code is StatusCode.ERROR
    said = capsys.readouterr().err.splitlines()
    (line,) = [json.loads(one) for one in said if "call failed by a bug" in one]
    assert (line["trace_id"], line["error_id"]) == (TRACE_ID, (span.attributes or {})["darkroom.error_id"])


@settings(max_examples=50)
@given(
    st.one_of(st.text(max_size=80), st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.{0,9}"))
)
def test_whatever_is_named_is_a_trace_or_is_ignored(named: str) -> None:
    span = get_current_span(child_of(named))
    given = traceparent_of(span)
    if given is not None:
        again = get_current_span(child_of(given)).get_span_context()
        assert (again.trace_id, again.span_id) == (
            span.get_span_context().trace_id,
            span.get_span_context().span_id,
        )


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["traceparent", "x"]), st.one_of(st.text(), st.binary()))))
def test_metadata_of_any_kind_is_read_without_an_error(metadata: list[tuple[str, Any]]) -> None:
    called_by(metadata)


def test_a_call_that_names_two_traces_is_in_neither() -> None:
    two = [("traceparent", RECORDED), ("traceparent", RECORDED.replace(TRACE_ID, "1" * 32))]
    assert not get_current_span(called_by(two)).get_span_context().is_valid
    assert get_current_span(called_by(two[:1])).get_span_context().is_valid
