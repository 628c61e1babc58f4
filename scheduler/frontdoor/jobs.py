"""JobService: what a client may do with jobs, its own ones; moderators see those of all."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message
from opentelemetry.trace import get_current_span

from billing.refusals import Refusal
from gpu_worker.models import Models
from gpu_worker.prompt import without_urls
from scheduler import intake
from scheduler.frontdoor import foresight, messages, remake, translate
from scheduler.frontdoor.admission import QueueRoom
from scheduler.frontdoor.auth import Principal
from scheduler.frontdoor.deletions import Deletions
from scheduler.frontdoor.downloads import Downloads
from scheduler.frontdoor.estimates import Estimates
from scheduler.frontdoor.fields import (
    AccountName,
    JobName,
    Violations,
    digest,
    page_token,
    read_request_id,
    whole_number,
)
from scheduler.frontdoor.gate import caller
from scheduler.frontdoor.moderation import Moderation
from scheduler.frontdoor.pictures import Pictures
from scheduler.frontdoor.standings import Standings
from scheduler.frontdoor.watch import Watches
from scheduler.intake import Submission
from scheduler.link import SchedulerLink
from scheduler.metrics import FrontDoorMetrics, SubmissionOutcome, SubmissionReason
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.refusals import (
    Impossible,
    ModerationRejected,
    NotFoundOrNotYours,
    RoleRequired,
)
from scheduler.store import jobs as store
from scheduler.store.accounts import Role, Visibility
from scheduler.store.jobs import FeedPlace, JobEvent, JobState, StoredJob
from scheduler.store.pool import Pool
from scheduler.tracing import traceparent_of
from scheduler.v1 import job_pb2, job_pb2_grpc

_log = structlog.get_logger()

_Context = grpc.aio.ServicerContext[Any, Any]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class JobService(job_pb2_grpc.JobServiceServicer):
    """The methods of scheduler.v1.JobService. `clock` returns the present time, aware."""

    pool: Pool
    link: SchedulerLink
    metrics: FrontDoorMetrics
    models: Models
    estimates: Estimates
    moderation: Moderation
    standings: Standings
    watches: Watches
    downloads: Downloads
    pictures: Pictures
    deletions: Deletions
    room: QueueRoom
    parameters: Parameters
    clock: Callable[[], datetime]

    async def CreateJob(self, request: job_pb2.CreateJobRequest, context: _Context) -> job_pb2.Job:  # noqa: N802
        """Accept a job, or say what it would cost."""
        principal = caller()
        first = await self._made_before(request, principal)
        if first is not None:
            return await self._message(first)
        self.room.refuse_if_full()
        submission = await self._submission(request, principal)
        await self._moderate(submission)
        await remake.refuse_hidden(self.pool, principal.account_id, submission)
        self._refuse_impossible(submission)
        if request.validate_only:
            foreseen = await intake.rehearse(
                self.pool,
                self.link,
                self.metrics,
                account_id=principal.account_id,
                submission=submission,
                parameters=self.parameters,
                at=self.clock(),
            )
            return messages.job_not_made(foreseen.job, foreseen.queue_status)
        if request.HasField("imagine") and submission.spec.pictures:
            # Reading pictures is work, which nobody gets for a job that would not be accepted anyway.
            await intake.refuse_early(
                self.pool,
                self.link,
                self.metrics,
                account_id=principal.account_id,
                submission=submission,
                parameters=self.parameters,
                at=self.clock(),
            )
            # Before the transaction: hosts may take their time, and an account is locked in it.
            submission = await translate.with_pictures(
                submission, request.imagine, principal.account_id, self.pictures, self.pool
            )
        accepted = await intake.submit(
            self.pool,
            self.link,
            self.metrics,
            account_id=principal.account_id,
            submission=submission,
            parameters=self.parameters,
            at=self.clock(),
            traceparent=traceparent_of(get_current_span()),
        )
        if accepted.queue_status is None:
            return await self._message(accepted.job)
        return messages.job(accepted.job, accepted.queue_status)

    async def GetJob(self, request: job_pb2.GetJobRequest, context: _Context) -> job_pb2.Job:  # noqa: N802
        """Return one job."""
        violations = Violations()
        name = violations.job("name", request.name)
        violations.refuse()
        return await self._message(await self._seen(name, caller()))

    async def ListJobs(  # noqa: N802
        self, request: job_pb2.ListJobsRequest, context: _Context
    ) -> job_pb2.ListJobsResponse:
        """Return a page of an account's jobs, newest first."""
        principal = caller()
        violations = Violations()
        account_id = violations.account("parent", request.parent, own=principal.account_id)
        limit = violations.page_size(request.page_size)
        for number in request.states:
            if number not in messages.STATE_OF:
                violations.add("states", f"states has a value that no job has: {number}.")
        binding = (account_id, *request.states)
        before_arrival = violations.page_token(request.page_token, binding, _arrival)
        violations.refuse()
        if account_id != principal.account_id:
            if not principal.sees_all:
                raise NotFoundOrNotYours
            _log_look(principal, f"accounts/{account_id}")
        async with self.pool.reading() as connection:
            listed = await store.list_jobs(
                connection,
                account_id,
                states=[messages.STATE_OF[number] for number in request.states],
                before_arrival=before_arrival,
                limit=limit + 1,
            )
        page = listed[:limit]
        statuses = await self.standings.of(page)
        return job_pb2.ListJobsResponse(
            jobs=[messages.job(job, statuses.get(job.job_id)) for job in page],
            next_page_token=page_token({"arrival": page[-1].arrival}, binding) if len(listed) > limit else "",
        )

    async def UpdateJob(self, request: job_pb2.UpdateJobRequest, context: _Context) -> job_pb2.Job:  # noqa: N802
        """Move a waiting job of the caller's own to the other tier."""
        principal = caller()
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        name = violations.job("job.name", request.job.name)
        tier = translate.TIERS.get(request.job.tier)
        if list(request.update_mask.paths) != ["tier"]:
            violations.add("update_mask", "update_mask must be `tier`, the only field that can be changed.")
        if tier is None:
            violations.add("job.tier", "job.tier must be fast or relax.")
        violations.refuse()
        assert name is not None, "whatever made it None is a violation"
        assert tier is not None, "whatever made it None is a violation"
        if not name.is_of(principal.account_id):
            raise NotFoundOrNotYours
        moved = await intake.move(
            self.pool,
            self.link,
            self.metrics,
            account_id=principal.account_id,
            job_id=name.job_id,
            tier=tier,
            request_id=request_id,
            digest=digest(request),
            at=self.clock(),
        )
        if moved.queue_status is None:
            return await self._message(moved.job)
        # Not the scheduler's word: it has not heard of the move, and speaks of the tier before.
        return messages.job(moved.job, moved.queue_status)

    async def CancelJob(self, request: job_pb2.CancelJobRequest, context: _Context) -> job_pb2.Job:  # noqa: N802
        """Cancel a job of the caller's own."""
        principal = caller()
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        name = violations.job("name", request.name)
        violations.refuse()
        assert name is not None, "whatever made it None is a violation"
        if not name.is_of(principal.account_id):
            raise NotFoundOrNotYours
        job = await intake.cancel(
            self.pool,
            self.link,
            self.metrics,
            account_id=principal.account_id,
            job_id=name.job_id,
            request_id=request_id,
            digest=digest(request),
            at=self.clock(),
        )
        return await self._message(job)

    async def DeleteJob(  # noqa: N802
        self, request: job_pb2.DeleteJobRequest, context: _Context
    ) -> job_pb2.DeleteJobResponse:
        """Delete a finished job of the caller's own, and its files after it."""
        principal = caller()
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        name = violations.job("name", request.name)
        violations.refuse()
        assert name is not None, "whatever made it None is a violation"
        if not name.is_of(principal.account_id):
            raise NotFoundOrNotYours
        await intake.delete(
            self.pool,
            self.metrics,
            account_id=principal.account_id,
            job_id=name.job_id,
            request_id=request_id,
            digest=digest(request),
            at=self.clock(),
        )
        await self.deletions.remove(name.job_id)
        return job_pb2.DeleteJobResponse()

    async def WatchJob(  # noqa: N802
        self, request: job_pb2.WatchJobRequest, context: _Context
    ) -> AsyncIterator[job_pb2.WatchJobResponse]:
        """Stream what happens to a job until it ends."""
        violations = Violations()
        name = violations.job("name", request.name)
        if request.after_sequence < 0:
            violations.add("after_sequence", "after_sequence must not be negative; 0 is for all events.")
        violations.refuse()
        with self.watches.place(), self.metrics.watch_streams.track_inprogress():
            async with self.watches.turn:
                job = await self._seen(name, caller())
            watch = self.watches.watch(job.job_id, request.after_sequence, previews=request.previews)
            async with aclosing(watch) as responses:
                async for response in responses:
                    yield response

    async def DownloadImages(  # noqa: N802
        self, request: job_pb2.DownloadImagesRequest, context: _Context
    ) -> AsyncIterator[job_pb2.DownloadImagesResponse]:
        """Stream files: a header before each, then its bytes."""
        principal = caller()
        violations = Violations()
        name = violations.files("name", request.name, own=principal.account_id)
        after = violations.image("after", request.after) if request.after else None
        if after is not None and not (isinstance(name, AccountName) and after.is_of(name.account_id)):
            violations.add("after", "after is an image of the account whose archive is asked for.")
        violations.refuse()
        assert name is not None, "whatever made it None is a violation"
        if isinstance(name, AccountName):
            if name.account_id != principal.account_id:
                if not principal.sees_all:
                    raise NotFoundOrNotYours
                _log_look(principal, f"accounts/{name.account_id}")
            files = iter([await self.downloads.of_account(name.account_id, after)])
        else:
            files = self.downloads.of_job(await self._seen(name, principal, in_feed_too=True), name)
        for header, content in files:
            yield job_pb2.DownloadImagesResponse(header=header)
            async with aclosing(content) as chunks:
                async for chunk in chunks:
                    yield job_pb2.DownloadImagesResponse(chunk=chunk)
                    self.metrics.artifact_sent_bytes.inc(len(chunk))

    async def ListFeed(  # noqa: N802
        self, request: job_pb2.ListFeedRequest, context: _Context
    ) -> job_pb2.ListFeedResponse:
        """Return a page of the public record."""
        violations = Violations()
        limit = violations.page_size(request.page_size)
        binding = ("feed", request.show_hidden)
        after = violations.page_token(request.page_token, binding, _feed_place)
        violations.refuse()
        if request.show_hidden and not caller().sees_all:
            raise RoleRequired(role=Role.MODERATOR.value)
        async with self.pool.reading() as connection:
            listed = await store.feed(
                connection, after=after, limit=limit + 1, hidden_too=request.show_hidden
            )
        page = listed[:limit]
        return job_pb2.ListFeedResponse(
            jobs=[messages.job_in_feed(job) for job in page],
            next_page_token=page_token(_feed_token(page[-1]), binding) if len(listed) > limit else "",
        )

    async def ExplainJob(  # noqa: N802
        self, request: job_pb2.ExplainJobRequest, context: _Context
    ) -> job_pb2.Explanation:
        """Say why a job is where it is."""
        violations = Violations()
        name = violations.job("name", request.name)
        violations.refuse()
        job = await self._seen(name, caller())
        async with self.pool.reading() as connection:
            events = await store.events_after(connection, job.job_id, 0)
        told = None if job.state.ended else await self.link.explain(job.job_id)
        status = told.status if told is not None else (await self.standings.of([job])).get(job.job_id)
        sentences = [] if told is None else list(told.explanation.sentences)
        if not sentences and status is not None:
            sentences.append(status.sentence)
        if job.state is not JobState.QUEUED:
            sentences += _came_to_be_here(job, events)
        return messages.explanation(job, sentences, status, told)

    async def EstimateJob(  # noqa: N802
        self, request: job_pb2.EstimateJobRequest, context: _Context
    ) -> job_pb2.Estimate:
        """Say what a job would be on other terms."""
        principal = caller()
        violations = Violations()
        plan = violations.plan("plan", request.plan) if request.plan else None
        name = violations.job("name", request.name) if request.name else None
        if request.WhichOneof("job") is None:
            violations.add("job", "Say which job: the name of a waiting one, or one to create.")
        violations.refuse()
        if name is not None:
            job = await self._own(name, principal)
            intake.refuse_unless_waiting(job)
            prospect = foresight.of_waiting(job)
        else:
            create = job_pb2.CreateJobRequest()
            create.CopyFrom(request.create)
            create.request_id = str(uuid.uuid4())  # nothing is created, so whatever it was is no matter
            submission = await self._submission(create, principal)
            self._refuse_impossible(submission)
            intake.refuse_too_long(submission.predicted_ms, self.parameters)
            prospect = await foresight.of_submission(self.pool, principal.account_id, submission)
        options = await foresight.options(self.pool, self.link, prospect, plan=plan, at=self.clock())
        return job_pb2.Estimate(options=[messages.estimate_option(option) for option in options])

    async def _made_before(self, request: job_pb2.CreateJobRequest, principal: Principal) -> StoredJob | None:
        request_id = read_request_id(request.request_id)
        if request_id is None or request.validate_only:
            return None
        return await intake.made_before(
            self.pool,
            self.metrics,
            account_id=principal.account_id,
            request_id=request_id,
            digest=digest(request),
        )

    async def _submission(self, request: job_pb2.CreateJobRequest, principal: Principal) -> Submission:
        match request.WhichOneof("spec"):
            case "imagine":
                return translate.imagine(request, self.models, self.estimates.estimator)
            case "variation":
                name = remake.variation_source(request)
                source = await self._own(name, principal)
                assert name.image is not None, "a picture's name has its number"
                return remake.variation(request, source, name.image, self.models, self.estimates.estimator)
            case "upscale":
                name = remake.upscale_source(request)
                source = await self._own(name, principal)
                assert name.image is not None, "a picture's name has its number"
                return remake.upscale(request, source, name.image, self.models, self.estimates.estimator)
            case "reroll":
                source = await self._own(remake.reroll_source(request), principal)
                return remake.reroll(request, source, self.models, self.estimates.estimator)
            case _:
                return translate.nothing(request)

    async def _moderate(self, submission: Submission) -> None:
        """Raise ModerationRejected for what is not drawn here, also of a prompt that was drawn before.

        The prompt as it was typed, and its text alone: weights between words hide none of them.
        """
        text = submission.spec.prompt
        category = await self.moderation.category((without_urls(submission.prompt), text), text)
        if category is not None:
            raise ModerationRejected(category=category, field="prompt")

    def _refuse_impossible(self, submission: Submission) -> None:
        """Raise Impossible for what no worker that the scheduler has met could draw."""
        abilities = self.link.abilities()
        if abilities is None:
            return
        spec = submission.spec
        if abilities.models is not None and spec.model not in abilities.models:
            others = [name for name in self.models.entries if name in abilities.models]
            instead = f"Ask for another model ({', '.join(others)}), or ask" if others else "Ask"
            raise Impossible(
                missing="model",
                sentence=f"No GPU here can load {spec.model}: its files are not there. {instead} the people "
                "who run this service to fetch it.",
            )
        if spec.kind.is_upscale and abilities.lacks_for_upscales:
            raise Impossible(
                missing="upscaler",
                sentence="No GPU here can enlarge a picture. Tell the people who run this service what its "
                f"workers say: {abilities.lacks_for_upscales}.",
            )
        needed = self.models.memory_needed(spec.kind, spec.model, spec.width, spec.height)
        most = abilities.most_memory_bytes
        if needed > most:
            raise Impossible(
                missing="gpu_memory",
                sentence=f"{spec.model} at {spec.width}×{spec.height} needs {needed / 1e9:.1f} GB of GPU "
                f"memory, and the largest GPU here has {most / 1e9:.1f} GB. Ask for a smaller picture or "
                "another model.",
            )

    async def _message(self, job: StoredJob) -> job_pb2.Job:
        return messages.job(job, (await self.standings.of([job])).get(job.job_id))

    async def _own(self, name: JobName, principal: Principal) -> StoredJob:
        """Return a job of the caller's account."""
        async with self.pool.reading() as connection:
            job = await store.read_job(connection, name.job_id)
        if job is None or job.account_id != principal.account_id or not name.is_of(job.account_id):
            raise NotFoundOrNotYours
        return job

    async def _seen(
        self, name: JobName | None, principal: Principal, *, in_feed_too: bool = False
    ) -> StoredJob:
        """Return a job that the caller may see; `in_feed_too`: also one that the feed shows to everybody."""
        assert name is not None, "whatever made it None is a violation"
        async with self.pool.reading() as connection:
            job = await store.read_job(connection, name.job_id)
        mine = job is not None and job.account_id == principal.account_id
        if job is None or not (mine or principal.sees_all or (in_feed_too and _in_feed(job))):
            raise NotFoundOrNotYours
        # `-` means the caller's own account; for those who see all, whoever's it is.
        if not name.is_of(job.account_id):
            raise NotFoundOrNotYours
        if not (mine or _in_feed(job)):
            _log_look(principal, messages.job_name(job.account_id, job.job_id))
        return job


def _log_look(principal: Principal, name: str) -> None:
    """Note that somebody looks at what only its owner and moderators see.

    It changes nothing, so it is no deed with a reason in the audit record; but it can be found out.
    """
    _log.info("moderator looked", by=principal.actor, at=name)


def _in_feed(job: StoredJob) -> bool:
    return (
        job.state is JobState.SUCCEEDED
        and job.visibility is Visibility.PUBLIC
        and job.spec.kind.is_upscale
        and job.hidden is None
    )


def submission_refused(metrics: FrontDoorMetrics) -> Callable[[Message, Refusal], None]:
    """Return what counts a refused CreateJob, under the tier that the request names, or else fast."""

    def count(request: Message, refusal: Refusal) -> None:
        assert isinstance(request, job_pb2.CreateJobRequest)
        metrics.job_submitted(
            tier=translate.TIERS.get(request.tier) or Tier.FAST,
            outcome=SubmissionOutcome.REJECTED,
            reason=SubmissionReason(refusal.reason.lower()),
        )

    return count


def _feed_token(job: StoredJob) -> dict[str, Any]:
    assert job.ended_at is not None, "a job in the feed has ended"
    # Whole microseconds: PostgreSQL's own precision, so that no job is shown twice or skipped.
    return {"ended_us": (job.ended_at - _EPOCH) // timedelta(microseconds=1), "job": job.job_id}


def _came_to_be_here(job: StoredJob, events: Sequence[JobEvent]) -> Iterator[str]:
    """Yield why a job started, that it went on where it was parked or lost and why, and how it ended."""
    runs = [event.sentence for event in events if event.state is JobState.RUNNING]
    yield from runs[:1]
    yield from (f"Since then: {sentence}" for sentence in runs[1:][-1:])
    if job.state.ended:
        yield from [event.sentence for event in events if event.state is job.state][-1:]


def _feed_place(token: Mapping[str, Any]) -> FeedPlace:
    return FeedPlace(
        ended_at=_EPOCH + timedelta(microseconds=whole_number(token["ended_us"])),
        job_id=str(uuid.UUID(str(token["job"]))),
    )


def _arrival(token: Mapping[str, Any]) -> int:
    arrival = whole_number(token["arrival"])
    if not 0 < arrival < 2**63:
        raise ValueError("no row has this number")
    return arrival
