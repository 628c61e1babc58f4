"""A job is durable when `submit` returns: its row, its price and its request id are committed together.

What a client asked for arrives here already translated. One transaction claims the request id, locks the
account, counts its live jobs against its plan, checks softly that it can pay, and writes the job and its
first event. Then the scheduler is told; a notice that is lost costs a moment, because the scheduler sweeps
for rows it was not told of. `cancel` and `move` take the same road; `delete`, of jobs that have ended,
concerns no scheduler.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from billing import accounts as ledger_accounts
from billing import idempotency, ledger
from billing.accounts import Terms
from billing.refusals import FastTimeExhausted, PlanLacksPrivate, SpendCapReached
from gpu_worker.contract import RenderKind, RenderSpec
from scheduler.link import SchedulerLink
from scheduler.metrics import BillingRejection, FrontDoorMetrics, SubmissionOutcome
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.policy.status import CONCURRENCY_LIMIT
from scheduler.refusals import (
    AccountBlocked,
    FastOnly,
    Impossible,
    JobFinished,
    JobNotFinished,
    JobStarted,
    NotFoundOrNotYours,
    PicturesExpired,
    QueueFull,
    SourceNotReady,
)
from scheduler.store import deletions, expiry, jobs
from scheduler.store.accounts import Visibility
from scheduler.store.jobs import JobKind, JobReceipt, JobState, LivePlace, NewJob, StoredJob
from scheduler.store.pool import Connection, Pool
from scheduler.updates import QueueReason, QueueStatus

_ACCEPTED_SENTENCE = "Accepted; its place in the queue follows in a moment."

# Beyond this the place of a job that is only asked about is of no use to anybody, and counting takes time.
_MOST_COUNTED = 1_000


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a client asked for: checked, and free of the wire."""

    request_id: str
    digest: bytes
    """Of the request's content; the same id with another digest is refused."""
    kind: JobKind
    prompt: str
    """As given, parameters included."""
    spec: RenderSpec
    seed_fixed: bool
    tier: Tier | None
    """None: the account's mode."""
    visibility: Visibility | None
    predicted_ms: int
    source_job_id: str | None
    source_image: int | None
    uploads: int = 0
    """Pictures that came with the prompt, beside those that it names."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A job that is in the database, or, of `rehearse`, one that would be."""

    job: StoredJob
    queue_status: QueueStatus | None
    """What can be said before the scheduler has looked at it; None where it has: of a request repeated, or of
    a move that changed nothing."""


async def made_before(
    pool: Pool, metrics: FrontDoorMetrics, *, account_id: str, request_id: str, digest: bytes
) -> StoredJob | None:
    """Return the job that this request made, as it is now; None if it has made none.

    To be asked before the request is checked: what was accepted stays accepted, whatever rule, model or
    source has changed since. Raises RequestIdReused, NotFoundOrNotYours (the job is gone) or Overloaded.
    """
    async with pool.reading() as connection:
        outcome = await idempotency.outcome_of(connection, account_id, "CreateJob", request_id, digest)
        if outcome is None:
            return None
        job = await _first_job(connection, outcome)
    metrics.job_submitted(tier=job.tier, outcome=SubmissionOutcome.REPLAYED)
    metrics.replayed("CreateJob")
    return job


async def submit(
    pool: Pool,
    link: SchedulerLink,
    metrics: FrontDoorMetrics,
    *,
    account_id: str,
    submission: Submission,
    parameters: Parameters,
    at: datetime,
    traceparent: str | None = None,
) -> Accepted:
    """Accept a job, or return the one that this request id made before.

    `traceparent` names the span whose children are what is done for it; None: it is not traced.

    Locks the request id, then the account. Raises Impossible, QueueFull, FastOnly, FastTimeExhausted,
    SpendCapReached, PlanLacksPrivate, SourceNotReady (what it starts from was deleted meanwhile),
    PicturesExpired (or its pictures went), RequestIdReused, NotFoundOrNotYours (its source, or the first
    answer's job, is gone) or Overloaded.
    """
    async with pool.transaction() as connection:
        outcome = await idempotency.claim(
            connection, account_id, "CreateJob", submission.request_id, submission.digest
        )
        if outcome is None:
            accepted = await _accept(
                connection, metrics, account_id, submission, parameters, devices_of(link), at, traceparent
            )
            await idempotency.store(
                connection, account_id, "CreateJob", submission.request_id, {"job_id": accepted.job.job_id}
            )
        else:
            accepted = Accepted(job=await _first_job(connection, outcome), queue_status=None)
    if outcome is None:
        link.jobs_changed([accepted.job.job_id])
    else:
        metrics.replayed("CreateJob")
    metrics.job_submitted(
        tier=accepted.job.tier,
        outcome=SubmissionOutcome.ACCEPTED if outcome is None else SubmissionOutcome.REPLAYED,
    )
    return accepted


async def rehearse(
    pool: Pool,
    link: SchedulerLink,
    metrics: FrontDoorMetrics,
    *,
    account_id: str,
    submission: Submission,
    parameters: Parameters,
    at: datetime,
) -> Accepted:
    """Return what `submit` would, and write nothing: the whole transaction is done and rolled back.

    The position is the end of the tier's line, counted up to 1,000. Raises what `submit` does, but for the
    request id's.
    """
    async with pool.rehearsal() as connection:
        accepted = await _accept(
            connection, metrics, account_id, submission, parameters, devices_of(link), at
        )
        assert accepted.queue_status is not None, "a job just accepted waits"
        if accepted.queue_status.reason is QueueReason.CONCURRENCY_LIMIT:
            return accepted
        tier = accepted.job.tier
        place = await jobs.waiting_in_tier(connection, tier, _MOST_COUNTED)  # with the job itself
    ahead = place - 1
    number = f"{_MOST_COUNTED:,} or more" if place == _MOST_COUNTED else f"{ahead:,}"
    sentence = f"{number} {tier} {'job waits' if number == '1' else 'jobs wait'} now."
    return Accepted(
        job=accepted.job,
        queue_status=QueueStatus(reason=QueueReason.WAITING_FOR_GPU, sentence=sentence, position=place),
    )


async def refuse_early(
    pool: Pool,
    link: SchedulerLink,
    metrics: FrontDoorMetrics,
    *,
    account_id: str,
    submission: Submission,
    parameters: Parameters,
    at: datetime,
) -> None:
    """Raise what `submit` would raise now, and write nothing: for before work that would then be in vain.

    A request that made a job meanwhile is not refused, whatever has changed since.
    """
    async with pool.rehearsal() as connection:
        outcome = await idempotency.claim(
            connection, account_id, "CreateJob", submission.request_id, submission.digest
        )
        if outcome is None:
            await _accept(connection, metrics, account_id, submission, parameters, devices_of(link), at)


async def cancel(
    pool: Pool,
    link: SchedulerLink,
    metrics: FrontDoorMetrics,
    *,
    account_id: str,
    job_id: str,
    request_id: str,
    digest: bytes,
    at: datetime,
) -> StoredJob:
    """End a waiting job at once, or note on a running one that its owner wants it to end; return it.

    Locks the request id, then the account, then the job. Raises NotFoundOrNotYours, JobFinished,
    RequestIdReused or Overloaded.
    """
    async with pool.transaction() as connection:
        outcome = await idempotency.claim(connection, account_id, "CancelJob", request_id, digest)
        if outcome is None:
            await _cancel(connection, account_id, job_id, at)
            await idempotency.store(connection, account_id, "CancelJob", request_id, {"job_id": job_id})
        job = await jobs.read_job(connection, job_id)
    if outcome is not None:
        metrics.replayed("CancelJob")
    if job is None:
        raise NotFoundOrNotYours
    link.jobs_changed([job_id])
    return job


async def move(
    pool: Pool,
    link: SchedulerLink,
    metrics: FrontDoorMetrics,
    *,
    account_id: str,
    job_id: str,
    tier: Tier,
    request_id: str,
    digest: bytes,
    at: datetime,
) -> Accepted:
    """Move a waiting job to `tier` and return it; one that is there already stays as it is.

    Its price becomes that of a job submitted there now. It keeps its age, but not its place: the other tier
    has an order of its own. Nor does it go on from a checkpoint: relax never debits fast time. Locks the
    request id, then the account, then the job. Raises NotFoundOrNotYours, JobStarted, JobFinished,
    FastOnly, FastTimeExhausted, SpendCapReached, PlanLacksPrivate, RequestIdReused or Overloaded.
    """
    async with pool.transaction() as connection:
        outcome = await idempotency.claim(connection, account_id, "UpdateJob", request_id, digest)
        status = None
        if outcome is None:
            status = await _move(connection, metrics, account_id, job_id, tier, devices_of(link), at)
            await idempotency.store(connection, account_id, "UpdateJob", request_id, {"job_id": job_id})
        job = await jobs.read_job(connection, job_id)
    if outcome is not None:
        metrics.replayed("UpdateJob")
    if job is None:
        raise NotFoundOrNotYours
    link.jobs_changed([job_id])
    return Accepted(job=job, queue_status=status)


async def delete(
    pool: Pool,
    metrics: FrontDoorMetrics,
    *,
    account_id: str,
    job_id: str,
    request_id: str,
    digest: bytes,
    at: datetime,
) -> None:
    """Delete a finished job's row but for what the ledger refers to; one that is deleted stays as it is.

    Its files are there still. Locks the request id, then the account, then the job. Raises
    NotFoundOrNotYours, JobNotFinished, RequestIdReused or Overloaded.
    """
    async with pool.transaction() as connection:
        outcome = await idempotency.claim(connection, account_id, "DeleteJob", request_id, digest)
        if outcome is None:
            await _delete(connection, account_id, job_id, at)
            await idempotency.store(connection, account_id, "DeleteJob", request_id, {"job_id": job_id})
    if outcome is not None:
        metrics.replayed("DeleteJob")


def expected_status(tier: Tier, place: LivePlace, terms: Terms) -> QueueStatus:
    """Return what an account's own jobs say about a waiting one, while the scheduler has said nothing."""
    at_limit = place.ahead >= terms.limits.running
    at_relax_limit = tier is Tier.RELAX and place.relax_ahead >= terms.limits.relax_running
    if at_limit or at_relax_limit:
        return QueueStatus(
            reason=QueueReason.CONCURRENCY_LIMIT, sentence=CONCURRENCY_LIMIT.sentence, position=0
        )
    return QueueStatus(reason=QueueReason.WAITING_FOR_GPU, sentence=_ACCEPTED_SENTENCE, position=0)


def devices_of(link: SchedulerLink) -> frozenset[str]:
    """Return the types of GPU that a job may come to run on; empty while they are not known."""
    abilities = link.abilities()
    return frozenset() if abilities is None else abilities.devices


def refuse_too_long(predicted_ms: int, parameters: Parameters) -> None:
    """Raise Impossible for a job that would take more GPU time than one may."""
    if predicted_ms > parameters.max_predicted_ms:
        raise Impossible(
            missing="gpu_time",
            sentence=f"This job would take about {predicted_ms // 1000} s of GPU time; at most "
            f"{parameters.max_predicted_ms // 1000} s are allowed. Make the pictures smaller.",
        )


def refuse_relax_max_upscale(spec: RenderSpec, tier: Tier) -> None:
    """Raise FastOnly for a max upscale in relax."""
    if spec.kind is RenderKind.UPSCALE_MAX and tier is Tier.RELAX:
        raise FastOnly


def refuse_unless_waiting(job: StoredJob) -> None:
    """Raise JobStarted or JobFinished for a job that cannot be moved to another tier any more."""
    match job.state:
        case JobState.QUEUED:
            return
        case JobState.RUNNING:
            raise JobStarted(job_id=job.job_id)
        case JobState.SUCCEEDED | JobState.FAILED | JobState.CANCELLED:
            raise JobFinished(job_id=job.job_id, state=job.state.value)
        case _:
            assert_never(job.state)


async def _accept(
    connection: Connection,
    metrics: FrontDoorMetrics,
    account_id: str,
    submission: Submission,
    parameters: Parameters,
    devices: Collection[str],
    at: datetime,
    traceparent: str | None = None,
) -> Accepted:
    refuse_too_long(submission.predicted_ms, parameters)
    terms = await ledger_accounts.lock_terms(connection, account_id, at)
    found = await jobs.settings_and_live_jobs(connection, account_id)
    assert found is not None, "a key's account has its settings"
    settings, live = found
    if settings.blocked:
        # Whoever let the caller in had looked a moment before: and an erased account must stay empty.
        raise AccountBlocked
    if live.accepted >= terms.limits.accepted:
        raise QueueFull(account_id=account_id, depth=live.accepted, limit=terms.limits.accepted)
    tier = submission.tier or settings.mode
    refuse_relax_max_upscale(submission.spec, tier)
    await _refuse_sources_that_went(connection, submission)
    visibility = submission.visibility or settings.visibility
    with _rejections_counted(metrics, terms):
        pricing = await ledger.price(
            connection,
            terms,
            tier.value,
            visibility is Visibility.PRIVATE,
            submission.predicted_ms,
            live.waiting_fast_ms,
            at,
            devices,
        )
    job = await jobs.insert_job(
        connection,
        NewJob(
            job_id=str(uuid.uuid4()),
            account_id=account_id,
            kind=submission.kind,
            tier=tier,
            visibility=visibility,
            prompt=submission.prompt,
            seed_fixed=submission.seed_fixed,
            spec=submission.spec,
            pricing=pricing,
            predicted_ms=submission.predicted_ms,
            source_job_id=submission.source_job_id,
            source_image=submission.source_image,
            uploads=submission.uploads,
            warnings=submission.warnings,
            traceparent=traceparent,
        ),
        "Accepted.",
    )
    status = expected_status(tier, LivePlace(ahead=live.accepted, relax_ahead=live.relax), terms)
    return Accepted(job=job, queue_status=status)


async def _refuse_sources_that_went(connection: Connection, submission: Submission) -> None:
    """Raise NotFoundOrNotYours if the source was deleted, SourceNotReady if it was what that started from.

    And PicturesExpired if the pictures it would start from went. The caller has locked the account, as does
    whoever deletes a job or lets its pictures expire; sources are the account's own.
    """
    origin = None if submission.spec.source is None else submission.spec.source.job_id
    named = {job_id for job_id in (submission.source_job_id, origin) if job_id is not None}
    deleted = await deletions.deleted_among(connection, named) if named else set()
    if submission.source_job_id in deleted:
        raise NotFoundOrNotYours
    if origin is not None and origin in deleted:
        raise SourceNotReady(job_id=origin, state="deleted")
    if origin is not None and (at := await expiry.expired_at(connection, origin)) is not None:
        raise PicturesExpired(job_id=origin, expired_at=at)


@contextmanager
def _rejections_counted(metrics: FrontDoorMetrics, terms: Terms) -> Iterator[None]:
    try:
        yield
    except (FastTimeExhausted, SpendCapReached, PlanLacksPrivate) as refusal:
        metrics.billing_rejections.labels(terms.plan, BillingRejection(refusal.reason.lower())).inc()
        raise


async def _first_job(connection: Connection, outcome: Mapping[str, str]) -> StoredJob:
    job = await jobs.read_job(connection, outcome["job_id"])
    if job is None:
        raise NotFoundOrNotYours
    return job


async def withdraw_all(connection: Connection, account_id: str, at: datetime, sentence: str) -> list[str]:
    """End an account's waiting jobs, which say `sentence`, note on its running ones that they are to end, and
    return them all.

    Of the caller's transaction; `link.jobs_changed` belongs behind its commit. Locks the account, then the
    jobs. Raises UnknownAccount.
    """
    terms = await ledger_accounts.lock_terms(connection, account_id, at)
    withdrawn = []
    for job_id in await jobs.live_jobs(connection, account_id):
        # A waiting job that lost too many attempts is given up without the account's lock.
        with suppress(JobFinished):
            await _withdraw(connection, terms, job_id, at, sentence)
            withdrawn.append(job_id)
    return withdrawn


async def _cancel(connection: Connection, account_id: str, job_id: str, at: datetime) -> None:
    # Before the job's row: everybody locks accounts before jobs.
    terms = await ledger_accounts.lock_terms(connection, account_id, at)
    await _withdraw(connection, terms, job_id, at, "Cancelled by its owner before it started.")


async def _withdraw(connection: Connection, terms: Terms, job_id: str, at: datetime, sentence: str) -> None:
    """End a waiting job, which says `sentence`, or note on a running one; the account is locked."""
    account_id = terms.account_id
    job = await jobs.lock_job(connection, job_id)
    if job is None or job.account_id != account_id:
        raise NotFoundOrNotYours
    match job.state:
        case JobState.QUEUED:
            balance = await ledger.balance(connection, account_id, at)
            receipt = _receipt_of_nothing(balance.available_ms, terms.currency, at, job)
            await jobs.cancel_waiting(connection, job_id, receipt, sentence)
        case JobState.RUNNING:
            await jobs.want_cancel(connection, job_id)
        case JobState.SUCCEEDED | JobState.FAILED | JobState.CANCELLED:
            raise JobFinished(job_id=job_id, state=job.state.value)
        case _:
            assert_never(job.state)


async def _move(
    connection: Connection,
    metrics: FrontDoorMetrics,
    account_id: str,
    job_id: str,
    tier: Tier,
    devices: Collection[str],
    at: datetime,
) -> QueueStatus | None:
    """Return what can be said of it in its new tier; None: it is there already."""
    # Before the job's row: everybody locks accounts before jobs.
    terms = await ledger_accounts.lock_terms(connection, account_id, at)
    job = await jobs.lock_job(connection, job_id)
    if job is None or job.account_id != account_id:
        raise NotFoundOrNotYours
    refuse_unless_waiting(job)
    if job.tier is tier:
        return None
    refuse_relax_max_upscale(job.spec, tier)
    found = await jobs.settings_and_live_jobs(connection, account_id)
    assert found is not None, "a job's account has its settings"
    _, live = found
    with _rejections_counted(metrics, terms):
        pricing = await ledger.price(
            connection,
            terms,
            tier.value,
            job.visibility is Visibility.PRIVATE,
            job.predicted_ms,
            live.waiting_fast_ms,
            at,
            devices,
        )
    await jobs.move_waiting(connection, job_id, tier, pricing, f"Moved to {tier} by its owner.")
    return expected_status(tier, (await jobs.live_places(connection, [job_id]))[job_id], terms)


async def _delete(connection: Connection, account_id: str, job_id: str, at: datetime) -> None:
    # Before the job's row: everybody locks accounts before jobs. And under this lock no job is accepted that
    # starts from one which is being deleted.
    await ledger_accounts.lock_terms(connection, account_id, at)
    job = await deletions.lock_for_deletion(connection, job_id)
    if job is None or job.account_id != account_id:
        raise NotFoundOrNotYours
    if not job.state.ended:
        raise JobNotFinished(job_id=job_id, state=job.state.value)
    if not job.deleted:
        await deletions.delete_job(connection, job_id)


def _receipt_of_nothing(available_ms: int, currency: str, at: datetime, job: StoredJob) -> JobReceipt:
    return JobReceipt(
        gpu_ms=0,
        billed_gpu_ms=0,
        amount_micros=0,
        currency_code=currency,
        balance_before_ms=available_ms,
        balance_after_ms=available_ms,
        attempts=0,
        worker="",
        waited_ms=max(0, int((at - job.created_at).total_seconds() * 1000)),
        encode_ms=0,
        denoise_ms=0,
        decode_ms=0,
        reproduction={},
    )
