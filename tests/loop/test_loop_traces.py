"""The scheduler's part of a trace: how long a job waited, each attempt at it, and what became of that."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace.sampling import DEFAULT_OFF
from opentelemetry.trace import StatusCode

from gpu_worker.contract import Blame, Outcome
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from tests.loop.conftest import Stage
from tests.spans import RECORDED, SPAN_ID, TRACE_ID, Spans, events_of, ids_of

PICTURE_MS = 1_000
WORKER = "here/gpu-0"


@pytest.fixture
def spans() -> Spans:
    """No trace begins at a scheduler."""
    return Spans(DEFAULT_OFF)


async def test_a_job_waits_and_runs_in_the_trace_of_its_call(stage: Stage, spans: Spans) -> None:
    await stage.open_account("ada")
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet, tracer=spans.tracer) as leader:
        job_id = await stage.submit("ada", Tier.FAST, traceparent=RECORDED)
        await stage.until_state(leader, job_id, "running")
        assert spans.names() == ["queue"]
        given = fleet.busy[WORKER].traceparent
        fleet.finish(WORKER)
        await stage.until_state(leader, job_id, "succeeded")
    (waits,), (attempt,) = spans.of("queue"), spans.of("attempt")
    assert ids_of(waits)[::2] == ids_of(attempt)[::2] == (TRACE_ID, SPAN_ID)
    assert given is not None
    assert given.startswith(f"00-{TRACE_ID}-{ids_of(attempt)[1]}-"), "the worker tells under the attempt"
    (row,) = await stage.attempts(job_id)
    assert attempt.attributes == {
        "darkroom.attempt": str(row["attempt_id"]),
        "darkroom.job": job_id,
        "darkroom.account": "ada",
        "darkroom.tier": "fast",
        "darkroom.model": "stand-in",
        "darkroom.worker": WORKER,
        "darkroom.outcome": "succeeded",
        "darkroom.job_state": "succeeded",
        "darkroom.gpu_ms": PICTURE_MS,
        "darkroom.billed_ms": PICTURE_MS,
    }
    accepted = (await stage.job(job_id))["created_at"]
    assert (waits.start_time or 0) // 1_000_000 == int(accepted.timestamp() * 1_000)
    assert waits.end_time == attempt.start_time
    assert (attempt.start_time or 0) // 1_000_000 == int(row["started_at"].timestamp() * 1_000)
    assert "ended" in events_of(attempt)


async def test_what_is_not_traced_leaves_no_span(stage: Stage, spans: Spans) -> None:
    await stage.open_account("ada")
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet, tracer=spans.tracer) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        assert fleet.busy[WORKER].traceparent is None
        fleet.finish(WORKER)
        await stage.until_state(leader, job_id, "succeeded")
    assert spans.ended() == []


async def test_without_a_tracer_the_call_is_handed_on_to_the_worker(stage: Stage) -> None:
    await stage.open_account("ada")
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST, traceparent=RECORDED)
        await stage.until(leader, lambda: fleet.busy)
        assert fleet.busy[WORKER].traceparent == RECORDED
        fleet.finish(WORKER)
        await stage.until_state(leader, job_id, "succeeded")


async def test_each_attempt_is_told_of_and_why_it_was_not_the_last(stage: Stage, spans: Spans) -> None:
    await stage.open_account("ada")
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet, tracer=spans.tracer) as leader:
        job_id = await stage.submit("ada", Tier.FAST, traceparent=RECORDED)
        await stage.until_attempts(leader, job_id, 1)
        fleet.kill(WORKER)
        await stage.until_attempts(leader, job_id, 2)
        fleet.finish(WORKER, outcome=Outcome.FAILED, blame=Blame.PLATFORM)
        await stage.until_attempts(leader, job_id, 3)
        fleet.finish(WORKER)
        await stage.until_state(leader, job_id, "succeeded")
    attempts = sorted(spans.of("attempt"), key=lambda span: span.start_time or 0)
    assert [(span.attributes or {})["darkroom.outcome"] for span in attempts] == [
        "lost",
        "failed",
        "succeeded",
    ]
    assert [span.status.status_code for span in attempts] == [
        StatusCode.ERROR,
        StatusCode.ERROR,
        StatusCode.UNSET,
    ]
    assert [events_of(span).get("lost", events_of(span).get("ended")) for span in attempts] == [
        {"darkroom.reason": "worker_lost", "darkroom.sentence": "The stub was killed."},
        {"darkroom.reason": "ENGINE_ERROR"},
        {},
    ]
    assert len(spans.of("queue")) == 3
    assert {ids_of(span)[2] for span in spans.ended()} == {SPAN_ID}


async def test_what_a_worker_says_when_it_refuses_is_not_told(stage: Stage, spans: Spans) -> None:
    await stage.open_account("ada")
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    fleet.refuse_next = 1
    async with stage.leading(fleet, tracer=spans.tracer) as leader:
        await stage.submit("ada", Tier.FAST, traceparent=RECORDED)
        await stage.until(leader, lambda: spans.of("attempt"))
    (refused,) = spans.of("attempt")
    assert events_of(refused)["lost"] == {"darkroom.reason": "not_taken"}


async def test_a_run_that_is_parked_and_moves_is_two_attempts_of_one_trace(
    stage: Stage, spans: Spans
) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    impatient = Parameters(park_patience_ms=0)
    for name in ("ada", "ben", "eve"):
        await stage.open_account(name)
    async with stage.leading(fleet, parameters=impatient, tracer=spans.tracer) as leader:
        relax = [await stage.submit(name, traceparent=RECORDED) for name in ("ben", "eve")]
        await stage.until(leader, lambda: len(fleet.busy) == 2)
        for worker in fleet.busy:
            fleet.work(worker, 300)
        fast = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fast in {one.job_id for one in fleet.busy.values()})
        taken = next(worker for worker, one in fleet.busy.items() if one.job_id == fast)
        other = next(worker for worker in fleet.busy if worker != taken)
        parked = fleet.parked(taken)[0].job_id
        fleet.finish(other)
        await stage.until(leader, lambda: other in fleet.busy and fleet.busy[other].job_id == parked)
        fleet.finish(other)
        fleet.finish(taken)
        for job_id in (*relax, fast):
            await stage.until_state(leader, job_id, "succeeded")
    before, after = (
        span for span in spans.of("attempt") if (span.attributes or {})["darkroom.job"] == parked
    )
    assert (before.attributes or {})["darkroom.outcome"] == "migrated"
    assert events_of(before)["parked"] == {"darkroom.by": fast}
    assert (after.attributes or {})["darkroom.worker"] == other
    assert before.end_time == after.start_time
    assert ids_of(before)[::2] == ids_of(after)[::2] == (TRACE_ID, SPAN_ID)


async def test_a_run_that_goes_on_says_since_when(stage: Stage, spans: Spans) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet, tracer=spans.tracer) as leader:
        relax = await stage.submit("ben", traceparent=RECORDED)
        await stage.until(leader, lambda: fleet.busy)
        fast = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy[WORKER].job_id == fast)
        fleet.finish(WORKER)
        await stage.until_state(leader, fast, "succeeded")
    async with stage.leading(fleet, tracer=spans.tracer) as leader:
        await stage.until(leader, lambda: fleet.busy[WORKER].job_id == relax)
        fleet.finish(WORKER)
        await stage.until_state(leader, relax, "succeeded")
    (attempt,) = spans.of("attempt")
    (row,) = await stage.attempts(relax)
    assert "adopted" in events_of(attempt)
    assert (attempt.start_time or 0) // 1_000_000 == int(row["started_at"].timestamp() * 1_000), (
        "the span of a scheduler that died is begun again"
    )
