"""AuditFairness: an operator asks whether the policy's bounds held, and is told what cannot be told."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from scheduler.clock import to_ms
from scheduler.policy.board import Board
from scheduler.policy.decisions import Start
from scheduler.policy.events import (
    AccountRestored,
    AttemptFinished,
    AttemptStarted,
    CellRestored,
    Event,
    JobSubmitted,
    Outcome,
    WorkerJoined,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker
from scheduler.store import journal
from scheduler.store.accounts import Role
from scheduler.v1 import fleet_pb2, job_pb2
from tests.frontdoor.door import Caller, Door, refusal

START = datetime(2026, 11, 10, tzinfo=UTC)
LATE_MS = 5_000
"""Longer than a decision may take."""


@pytest.fixture
async def operator(door: Door) -> Caller:
    return await door.caller("olga", role=Role.OPERATOR)


async def note_two_jobs(door: Door, *, idle_ms: int) -> None:
    """A worker draws two jobs of an account, and idles so long between them."""
    at_ms = to_ms(START)
    board, notes = Board(Parameters()), journal.Notes()

    def tell(event: Event) -> None:
        board.apply(event)
        notes.note(event)

    for tier in Tier:
        tell(CellRestored(at_ms=at_ms, tier=tier, virtual_time=0, decay_origin_ms=at_ms))
    worker = Worker(
        worker_id=WorkerId("w"), memory_bytes=2**30, speed_permille=1000, warm_models=frozenset("m")
    )
    tell(WorkerJoined(at_ms=at_ms, worker=worker))
    limits = Limits(running=3, relax_running=2, accepted=10)
    ann = AccountId("ann")
    tell(AccountRestored(at_ms=at_ms, account_id=ann, limits=limits, weight_milli=1000, shares={}))
    for number in range(2):
        job = Job(
            job_id=JobId(f"job-{number}"),
            account_id=ann,
            tier=Tier.RELAX,
            arrival=number,
            predicted_ms=1_000,
            step_ms=50,
            model="m",
            memory_bytes=1,
        )
        tell(JobSubmitted(at_ms=at_ms, job=job))
    for number in range(2):
        decisions = board.decide(at_ms)
        notes.decided(decisions)
        (start,) = (one for one in decisions if isinstance(one, Start))
        attempt_id = AttemptId(f"attempt-{number}")
        tell(
            AttemptStarted(
                at_ms=at_ms,
                job_id=start.job_id,
                attempt_id=attempt_id,
                worker_id=start.worker_id,
                charge=start.charge,
            )
        )
        at_ms += 1_000
        tell(AttemptFinished(at_ms=at_ms, attempt_id=attempt_id, outcome=Outcome.SUCCEEDED, gpu_ms=1_000))
        at_ms += idle_ms
    async with door.pool.reading() as connection:
        epoch = await connection.fetchval("SELECT epoch FROM scheduler.leader")
        await journal.write(connection, epoch=epoch, lines=notes.lines())


def period(start: datetime = START, hours: float = 1) -> fleet_pb2.AuditFairnessRequest:
    request = fleet_pb2.AuditFairnessRequest()
    request.start_time.FromDatetime(start)
    request.end_time.FromDatetime(start + timedelta(hours=hours))
    return request


async def audited(caller: Caller, request: Any) -> dict[str, fleet_pb2.Finding]:
    answer = await caller.fleet.AuditFairness(request)
    return {one.bound: one for one in answer.findings}


async def test_a_fair_period_breaks_no_bound_and_counts_its_starts(door: Door, operator: Caller) -> None:
    await note_two_jobs(door, idle_ms=0)
    answer = await operator.fleet.AuditFairness(period())
    assert answer.starts == 2
    verdicts = {one.bound: one.verdict for one in answer.findings}
    assert fleet_pb2.VERDICT_VIOLATED not in verdicts.values()
    assert verdicts["tags"] == fleet_pb2.VERDICT_HOLDS
    assert verdicts["B5"] == fleet_pb2.VERDICT_NO_CASES
    assert verdicts["B15"] == fleet_pb2.VERDICT_OBSERVED
    assert "from before the period" in answer.unknown[0]


async def test_a_broken_bound_is_told_with_its_margin_and_its_place(door: Door, operator: Caller) -> None:
    await note_two_jobs(door, idle_ms=LATE_MS)
    finding = (await audited(operator, period()))["B8"]
    assert (finding.verdict, finding.violations, finding.unit) == (fleet_pb2.VERDICT_VIOLATED, 1, "ms")
    assert finding.worst_margin == journal.GRACE_MS - LATE_MS
    assert finding.worst.time.ToMilliseconds() == to_ms(START) + 1_000


async def test_a_period_without_an_end_ends_now_and_an_empty_one_has_no_cases(
    door: Door, operator: Caller
) -> None:
    request = fleet_pb2.AuditFairnessRequest()
    request.start_time.FromDatetime(door.clock.now - timedelta(seconds=1))
    findings = await audited(operator, request)
    assert {one.verdict for one in findings.values()} == {fleet_pb2.VERDICT_NO_CASES}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (fleet_pb2.AuditFairnessRequest(), "start_time"),
        (period(hours=0), "end_time"),
        (period(hours=24 * 7 + 1), "end_time"),
    ],
)
async def test_a_period_that_is_none_is_refused(
    operator: Caller, request_: fleet_pb2.AuditFairnessRequest, field: str
) -> None:
    assert field in (await refusal(operator.fleet.AuditFairness(request_))).violations


async def test_audits_wait_for_one_another(door: Door, operator: Caller) -> None:
    await note_two_jobs(door, idle_ms=0)

    async def reading() -> int:
        for _ in range(10):  # whoever would read as well gets its turns
            await operator.jobs.ListFeed(job_pb2.ListFeedRequest())
        readers: int = await door.sql("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return readers

    async with door.pool.transaction() as connection:
        await connection.execute("LOCK TABLE scheduler.journal")
        audits = [asyncio.ensure_future(operator.fleet.AuditFairness(period())) for _ in range(3)]
        assert await reading() == 1
        audits[0].cancel()
        assert await reading() == 1, "whoever hangs up makes no room before the work is done"
    assert [(await one).starts for one in audits[1:]] == [2, 2]


async def test_users_may_not_ask(door: Door) -> None:
    ann = await door.caller("ann")
    assert (await refusal(ann.fleet.AuditFairness(period()))).reason == "ROLE_REQUIRED"
