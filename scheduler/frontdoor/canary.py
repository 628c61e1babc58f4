"""A job that the service gives itself, in each tier, now and then: whether all of it works is known.

It takes the way of any other, from the prompt to the committed pictures, and is paid by an account that the
operators set up for it. Its request id says when it was due, so that of several front doors that are set up
alike one makes it, and all of them wait for it. One that is late is cancelled, and so many do not pile up.

Its fast jobs are billed as any other's. Where its plan does not grant enough of them for a whole period, that
is in the log from the start on, with the figures, and not only when the last minute is used.
"""

from __future__ import annotations

import asyncio
from collections import deque
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
from scheduler.refusals import Overloaded
from scheduler.settings import Canary as CanarySettings
from scheduler.store import canary_time
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
_TIME_EVERY_S = 3_600.0
# So many jobs are one figure, and not the luck of one.
_NEWEST = 20
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
        self._billed_ms: deque[int] = deque(maxlen=_NEWEST)
        """Of its newest fast jobs that succeeded."""

    async def run(self) -> None:
        """Give the service its jobs until cancelled."""
        self._metrics.canary_sings(at_s=to_ms(self._clock()) / 1000)
        async with asyncio.TaskGroup() as group:
            for tier in Tier:
                group.create_task(self._sing_on(tier), name=f"canary {tier}")
            group.create_task(self._count_its_time(), name="canary time")

    async def _sing_on(self, tier: Tier) -> None:
        before: str | None = None
        while True:
            await asyncio.sleep((self._every_ms - to_ms(self._clock()) % self._every_ms) / 1000)
            if before is not None:
                await self._delete(before)
            before = await self.sing(tier)

    async def _count_its_time(self) -> None:
        while True:
            # While the database is away there is other trouble.
            with suppress(Overloaded):
                shortage = await self.shortage()
                if shortage is not None:
                    _log.warning("canary will use up its fast time", sentence=str(shortage))
            await asyncio.sleep(_TIME_EVERY_S)

    async def shortage(self) -> canary_time.Shortage | None:
        """Return by how much its plan's fast time is too little; None: it lasts, or there is no account yet.

        By what its newest jobs were billed, and before the first by what one is predicted to take. Raises
        Overloaded.
        """
        async with self._pool.reading() as connection:
            time = await canary_time.read(connection, self._account_id)
        if time is None:
            return None
        billed_ms = self._billed_ms or [self._submission(self._request(Tier.FAST, 0)).predicted_ms]
        return time.shortage(every_s=self._every_ms // 1000, take_ms=-(-sum(billed_ms) // len(billed_ms)))

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
        accepted = await intake.submit(
            self._pool,
            self._link,
            self._metrics,
            account_id=self._account_id,
            submission=self._submission(self._request(tier, turn)),
            parameters=Parameters(),
            at=self._clock(),
        )
        return accepted.job

    def _request(self, tier: Tier, turn: int) -> job_pb2.CreateJobRequest:
        return job_pb2.CreateJobRequest(
            request_id=_request_id(f"{tier} {turn}"),
            tier=_TIERS[tier],
            imagine=job_pb2.Imagine(prompt=_PROMPT),
        )

    def _submission(self, request: job_pb2.CreateJobRequest) -> intake.Submission:
        return translate.imagine(request, self._models, self._estimates.estimator)

    async def _outcome(self, job_id: str, late_ms: int) -> CanaryOutcome:
        while to_ms(self._clock()) < late_ms:
            async with self._pool.reading() as connection:
                job = await read_job(connection, job_id)
            if job is not None and job.state.ended:
                ok = job.state is JobState.SUCCEEDED
                if ok and job.tier is Tier.FAST and job.receipt is not None:
                    self._billed_ms.append(job.receipt.billed_gpu_ms)
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
