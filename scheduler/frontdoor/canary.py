"""A job that the service gives itself, in each tier, now and then: whether all of it works is known.

It takes the way of any other, from the prompt to the committed pictures, and is paid by an account that the
operators set up for it. Its request id says when it was due, so that of several front doors that are set up
alike one makes it, and all of them wait for it. One that is late is cancelled, and so many do not pile up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from uuid import UUID, uuid5

import structlog

from billing.refusals import Refusal
from gpu_worker.models import Models
from scheduler import intake
from scheduler.clock import to_ms
from scheduler.frontdoor import translate
from scheduler.frontdoor.deletions import Deletions
from scheduler.frontdoor.estimates import Estimates
from scheduler.frontdoor.fields import digest
from scheduler.link import SchedulerLink
from scheduler.metrics import CanaryOutcome, FrontDoorMetrics
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.settings import Canary as CanarySettings
from scheduler.store.jobs import JobState, StoredJob, read_job
from scheduler.store.pool import Pool
from scheduler.v1 import job_pb2

_log = structlog.get_logger()

# The fewest steps that still are a picture: it is about the way, and GPUs are for people.
_PROMPT = "a canary in a coal mine --stop 10"
_TIERS = {Tier.FAST: job_pb2.TIER_FAST, Tier.RELAX: job_pb2.TIER_RELAX}
# What the service promises, and as long again.
_LATE_AFTER_MS = {Tier.FAST: 120_000, Tier.RELAX: 3_600_000}
_LOOK_EVERY_S = 0.5
_REQUESTS = UUID("8d5a6b0e-5f0c-4a39-9a86-0d6a2c6f4c11")


class Canary:
    """Of one front door. `clock` returns the present time, aware."""

    def __init__(
        self,
        settings: CanarySettings,
        *,
        account_id: str,
        pool: Pool,
        link: SchedulerLink,
        metrics: FrontDoorMetrics,
        models: Models,
        estimates: Estimates,
        deletions: Deletions,
        clock: Callable[[], datetime],
    ) -> None:
        self._every_ms = settings.every_s * 1000
        self._account_id = account_id
        self._pool = pool
        self._link = link
        self._metrics = metrics
        self._models = models
        self._estimates = estimates
        self._deletions = deletions
        self._clock = clock

    async def run(self) -> None:
        """Give the service its jobs until cancelled."""
        self._metrics.canary_sings(at_s=to_ms(self._clock()) / 1000)
        async with asyncio.TaskGroup() as group:
            for tier in Tier:
                group.create_task(self._sing_on(tier), name=f"canary {tier}")

    async def _sing_on(self, tier: Tier) -> None:
        before: str | None = None
        while True:
            await asyncio.sleep((self._every_ms - to_ms(self._clock()) % self._every_ms) / 1000)
            if before is not None:
                await self._delete(before)
            before = await self.sing(tier)

    async def sing(self, tier: Tier) -> str | None:
        """Give one job, and count how it ended; return its id, None if it was refused."""
        began_ms = to_ms(self._clock())
        job_id = None
        try:
            job = await self._submitted(tier, began_ms // self._every_ms)
            job_id = job.job_id
            outcome = await self._outcome(job_id, began_ms + _LATE_AFTER_MS[tier])
        except Refusal as refusal:
            _log.warning("canary refused", tier=tier.value, reason=refusal.reason, sentence=str(refusal))
            outcome = CanaryOutcome.REFUSED
        else:
            if outcome is not CanaryOutcome.SUCCEEDED:
                _log.warning("canary failed", tier=tier.value, job=job_id, outcome=outcome.value)
        self._metrics.canary_ended(tier=tier, outcome=outcome, at_s=to_ms(self._clock()) / 1000)
        return job_id

    async def _submitted(self, tier: Tier, turn: int) -> StoredJob:
        request = job_pb2.CreateJobRequest(
            request_id=_request_id(f"{tier} {turn}"),
            tier=_TIERS[tier],
            imagine=job_pb2.Imagine(prompt=_PROMPT),
        )
        accepted = await intake.submit(
            self._pool,
            self._link,
            self._metrics,
            account_id=self._account_id,
            submission=translate.imagine(request, self._models, self._estimates.estimator),
            parameters=Parameters(),
            at=self._clock(),
        )
        return accepted.job

    async def _outcome(self, job_id: str, late_ms: int) -> CanaryOutcome:
        while to_ms(self._clock()) < late_ms:
            async with self._pool.reading() as connection:
                job = await read_job(connection, job_id)
            if job is not None and job.state.ended:
                ok = job.state is JobState.SUCCEEDED
                return CanaryOutcome.SUCCEEDED if ok else CanaryOutcome.FAILED
            await asyncio.sleep(_LOOK_EVERY_S)
        await self._cancel(job_id)
        return CanaryOutcome.LATE

    async def _cancel(self, job_id: str) -> None:
        request = job_pb2.CancelJobRequest(request_id=_request_id(f"late {job_id}"))
        # It may have ended at this moment.
        with suppress(Refusal):
            await intake.cancel(
                self._pool,
                self._link,
                self._metrics,
                account_id=self._account_id,
                job_id=job_id,
                request_id=request.request_id,
                digest=digest(request),
                at=self._clock(),
            )

    async def _delete(self, job_id: str) -> None:
        request = job_pb2.DeleteJobRequest(request_id=_request_id(f"done {job_id}"))
        # One that was cancelled too late is left to the account's list, where it says what happened.
        with suppress(Refusal):
            await intake.delete(
                self._pool,
                self._metrics,
                account_id=self._account_id,
                job_id=job_id,
                request_id=request.request_id,
                digest=digest(request),
                at=self._clock(),
            )
            await self._deletions.remove(job_id)


def _request_id(of: str) -> str:
    """Return the same id wherever the same is asked for."""
    return str(uuid5(_REQUESTS, of))
