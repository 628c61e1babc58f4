"""The audit of a period as the API has it: which period, read and audited aside, findings as messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime, timedelta

from scheduler.clock import from_ms
from scheduler.frontdoor import messages
from scheduler.frontdoor.fields import Violations
from scheduler.policy.auditing.audit import audit
from scheduler.policy.auditing.findings import Case, Finding, Verdict
from scheduler.policy.auditing.journal import Dispatch
from scheduler.policy.parameters import Parameters
from scheduler.store import journal
from scheduler.store.pool import Pool
from scheduler.v1 import fleet_pb2

_LONGEST = timedelta(days=7)
# One takes a minute of a core for a day of a large fleet. A front door has one event loop.
_ONE_AT_A_TIME = asyncio.Semaphore(1)

_VERDICT: Mapping[Verdict, fleet_pb2.Verdict.ValueType] = {
    Verdict.HOLDS: fleet_pb2.VERDICT_HOLDS,
    Verdict.VIOLATED: fleet_pb2.VERDICT_VIOLATED,
    Verdict.NO_CASES: fleet_pb2.VERDICT_NO_CASES,
    Verdict.OBSERVED: fleet_pb2.VERDICT_OBSERVED,
}


def period(
    request: fleet_pb2.AuditFairnessRequest, violations: Violations, now: datetime
) -> tuple[datetime, datetime] | None:
    """Return the period that is asked for; None, with a violation, if it is none."""
    if not request.HasField("start_time"):
        violations.add("start_time", "start_time must say where the period begins.")
        return None
    start = violations.time("start_time", request.start_time)
    end = violations.time("end_time", request.end_time) if request.HasField("end_time") else now
    if start is None or end is None:
        return None
    if not timedelta(0) < end - start <= _LONGEST:
        violations.add("end_time", "end_time must lie after start_time, by seven days at most.")
        return None
    return start, end


async def audited(pool: Pool, start: datetime, end: datetime) -> fleet_pb2.AuditFairnessResponse:
    """Return the findings of a period, once the audits asked for before are done. Raises Overloaded."""
    await _ONE_AT_A_TIME.acquire()
    work = asyncio.create_task(_audited(pool, start, end))
    work.add_done_callback(lambda _: _ONE_AT_A_TIME.release())
    # A thread cannot be stopped: whoever hangs up and asks again waits for the one that goes on.
    return await asyncio.shield(work)


async def _audited(pool: Pool, start: datetime, end: datetime) -> fleet_pb2.AuditFairnessResponse:
    async with pool.reading() as connection:
        kept = await journal.read(connection, start=start, end=end)
    # Other calls go on meanwhile.
    findings = await asyncio.to_thread(audit, kept.journal, Parameters())
    return fleet_pb2.AuditFairnessResponse(
        findings=[_finding(one) for one in findings],
        starts=sum(isinstance(record, Dispatch) for record in kept.journal.records),
        unknown=kept.unknown,
    )


def _finding(finding: Finding) -> fleet_pb2.Finding:
    return fleet_pb2.Finding(
        bound=finding.bound.value,
        promise=finding.promise.sentence,
        verdict=_VERDICT[finding.verdict],
        cases=finding.cases,
        violations=finding.violations,
        set_aside=finding.set_aside,
        worst_margin=finding.worst_margin,
        unit=finding.promise.unit,
        worst=None if finding.worst is None else _case(finding.worst),
        widened=finding.widened,
    )


def _case(case: Case) -> fleet_pb2.FindingCase:
    return fleet_pb2.FindingCase(
        time=messages.timestamp(from_ms(case.at_ms)),
        accounts=[f"accounts/{account_id}" for account_id in case.accounts],
        job=case.job_id or "",
        attempt=case.attempt_id or "",
        worker="" if case.worker_id is None else f"workers/{case.worker_id}",
    )
