"""What a worker tells of a traced attempt: each piece of its run, under the attempt's own span."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import DEFAULT_OFF
from worker_builders import a_request, some_settings

from gpu_worker.contract import RenderRequest
from gpu_worker.outputs import Artifacts
from gpu_worker.run import Stage, WallStageClock
from gpu_worker.timed_engine import TimedEngine
from gpu_worker.tracing import Piece, RunTrace, TracedClock, tracer
from gpu_worker.worker import Worker
from tests.spans import RECORDED, SPAN_ID, TRACE_ID, Spans, ids_of
from tests.stand_in import stand_in_models

MS = 1_000_000


@pytest.fixture
def recorded() -> Spans:
    """As a worker has them: no trace begins there."""
    return Spans(DEFAULT_OFF)


@pytest.fixture
async def worker(tmp_path: Path, recorded: Spans) -> AsyncIterator[Worker]:
    """One whose steps take 10 ms."""
    settings = some_settings(tmp_path, timed_step_ms=10)
    engine = TimedEngine(stand_in_models(), settings)
    worker = Worker(settings, engine, Artifacts(settings.artifacts_url), recorded.tracer)
    yield worker
    await worker.close()


async def all_ended(worker: Worker, count: int) -> None:
    async with asyncio.timeout(20):
        while len((await worker.heartbeat(1, 10_000)).report.unacknowledged) < count:
            pass


def of(recorded: Spans, request: RenderRequest) -> list[ReadableSpan]:
    """Return the pieces of an attempt, in their order."""
    pieces = [
        span
        for span in recorded.ended()
        if (span.attributes or {}).get("darkroom.attempt") == request.attempt_id
    ]
    return sorted(pieces, key=lambda span: span.start_time or 0)


async def test_a_parked_run_is_told_of_piece_by_piece(worker: Worker, recorded: Spans) -> None:
    relax = a_request(tier="relax", spec={"steps": 8}, traceparent=RECORDED)
    worker.render(relax)
    progress = worker.watch(relax.attempt_id, previews=False)
    await anext(progress)
    await progress.aclose()  # type: ignore[attr-defined]
    fast = a_request(parks=relax.attempt_id, spec={"steps": 5}, traceparent=RECORDED)
    worker.render(fast)
    await all_ended(worker, 2)
    pieces = of(recorded, relax)
    # On a busy machine any piece may last long enough to be told of.
    assert [span.name for span in pieces if span.name in ("denoise", "parked")] == [
        "denoise",
        "parked",
        "denoise",
    ]
    assert "load" in {span.name for span in pieces}
    assert {ids_of(span)[::2] for span in recorded.ended()} == {(TRACE_ID, SPAN_ID)}
    for before, after in pairwise(pieces):
        assert before.end_time is not None
        assert after.start_time is not None
        assert before.end_time <= after.start_time
    parked = next(span for span in pieces if span.name == "parked")
    drawn = next(span for span in of(recorded, fast) if span.name == "denoise")
    assert parked.start_time is not None
    assert drawn.start_time is not None
    assert parked.start_time <= drawn.start_time


@pytest.mark.parametrize("traceparent", [None, RECORDED[:-2] + "00", "nonsense", "", "00-" + "0" * 52])
async def test_an_attempt_that_is_not_traced_is_drawn_and_not_told_of(
    worker: Worker, recorded: Spans, traceparent: str | None
) -> None:
    worker.render(a_request(traceparent=traceparent))
    await all_ended(worker, 1)
    assert recorded.ended() == []


async def test_a_request_of_the_release_before_is_drawn(worker: Worker, recorded: Spans) -> None:
    older = replace(a_request())
    del older.__dict__["traceparent"]
    worker.render(older)
    await all_ended(worker, 1)
    assert recorded.ended() == []


def test_pieces_follow_each_other_and_what_took_no_time_did_not_happen(recorded: Spans) -> None:
    now_ns = 0
    trace = RunTrace(recorded.tracer, a_request(traceparent=RECORDED), lambda: now_ns)
    clock = TracedClock(WallStageClock(lambda: now_ns), trace)
    trace.turn_to(Piece.FETCH)
    trace.turn_to(Piece.WAIT)
    now_ns += 5 * MS
    clock.enter(Stage.DENOISE)
    now_ns += 7 * MS
    clock.pause()
    trace.turn_to(Piece.PARKED)
    now_ns += 11 * MS
    clock.resume()
    clock.enter(Stage.DENOISE)
    now_ns += 13 * MS
    trace.turn_to(None)
    told = [
        (span.name, (span.start_time or 0) // MS, (span.end_time or 0) // MS) for span in recorded.ended()
    ]
    assert told == [("wait", 0, 5), ("denoise", 5, 12), ("parked", 12, 23), ("denoise", 23, 36)]
    assert clock.times().denoise_ms == 7 + 13


def test_without_a_collector_nothing_is_begun(tmp_path: Path) -> None:
    span = tracer(some_settings(tmp_path)).start_span("a piece")
    assert not span.is_recording()
