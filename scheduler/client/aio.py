"""The asyncio client: every call of the service, made safe to repeat.

Every request that changes something carries a request id, chosen here. A call that the service could not
take (UNAVAILABLE, and nothing else) is sent again under the same id, after the delay that the service asks
for; so an answer is one job, however often it had to be asked for. A watch that breaks goes on after the
last event it saw; a download that breaks starts its unfinished files again, an archive its unfinished
picture, and a picture appears under its name only when its SHA-256 is right.

Answers are the protobuf messages of scheduler.v1 and billing.v1. Errors are the classes of `errors`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import ssl
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from opentelemetry.trace import TracerProvider

from billing.v1 import admin_pb2
from billing.v1.admin_pb2 import (
    AdjustBalanceRequest,
    AdminAccount,
    ApiKey,
    AuditEvent,
    CheckInvariantsRequest,
    CheckInvariantsResponse,
    CreateAccountRequest,
    CreateApiKeyRequest,
    CreatePlanRequest,
    EffectiveFrom,
    EraseAccountRequest,
    GetPlanRequest,
    GrantSource,
    ListAccountsRequest,
    ListApiKeysRequest,
    ListAuditEventsRequest,
    ListPlansRequest,
    Plan,
    PlanUndo,
    Refund,
    RefundJobRequest,
    RefundUndo,
    RevokeApiKeyRequest,
    Role,
    UndoPlanChangeRequest,
    UndoRefundRequest,
    UpdatePlanRequest,
)
from billing.v1.admin_pb2_grpc import AdminServiceStub
from billing.v1.billing_pb2 import (
    Balance,
    ChangePlanRequest,
    GetBalanceRequest,
    GetStatementRequest,
    ListTransfersRequest,
    PlanChange,
    PreviewPlanChangeRequest,
    Statement,
    Transfer,
)
from billing.v1.billing_pb2_grpc import BillingServiceStub
from scheduler.client.download import Saving
from scheduler.client.errors import (
    CannotSave,
    ConfigUnreadable,
    DarkroomError,
    JobCancelled,
    JobFailed,
    NoAnswerInTime,
    NotFoundOrNotYours,
    ServiceFailed,
    raised_for,
)
from scheduler.client.names import (
    OWN_ACCOUNT,
    account_name,
    image_name,
    job_name,
    key_name,
    last_part,
    named,
    plan_name,
    worker_name,
)
from scheduler.client.tracing import client_tracer, traced_call
from scheduler.client.uploads import contents
from scheduler.v1 import job_pb2
from scheduler.v1.account_pb2 import Account, GetAccountRequest, UpdateAccountRequest
from scheduler.v1.account_pb2_grpc import AccountServiceStub
from scheduler.v1.fleet_pb2 import (
    AuditFairnessRequest,
    AuditFairnessResponse,
    Decision,
    DrainWorkerRequest,
    GetQueuesRequest,
    ListDecisionsRequest,
    ListWorkersRequest,
    PauseTierRequest,
    Queues,
    ResumeTierRequest,
    ResumeWorkerRequest,
    TierQueue,
    Worker,
)
from scheduler.v1.fleet_pb2_grpc import FleetServiceStub
from scheduler.v1.job_pb2 import (
    CancelJobRequest,
    CreateJobRequest,
    DeleteJobRequest,
    DownloadImagesRequest,
    DownloadImagesResponse,
    Estimate,
    EstimateJobRequest,
    ExplainJobRequest,
    Explanation,
    GetJobRequest,
    Imagine,
    Job,
    JobState,
    ListFeedRequest,
    ListJobsRequest,
    Receipt,
    Reroll,
    Tier,
    UpdateJobRequest,
    Upscale,
    UpscaleAlgorithm,
    Variation,
    Video,
    Visibility,
    WatchJobRequest,
    WatchJobResponse,
)
from scheduler.v1.job_pb2_grpc import JobServiceStub
from scheduler.v1.moderation_pb2 import (
    AccountBlock,
    BlockAccountRequest,
    HideJobRequest,
    ListRulesRequest,
    ListRulesResponse,
    Rule,
    RulesUpdate,
    UnblockAccountRequest,
    UnhideJobRequest,
    UpdateRulesRequest,
)
from scheduler.v1.moderation_pb2_grpc import ModerationServiceStub

ENDED: frozenset[JobState.ValueType] = frozenset(
    {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED}
)
"""States that nothing follows."""

_DEADLINE_S = 15.0
_RULES_A_PAGE = 1_000
# A day of a large fleet is replayed in about a minute.
_AUDIT_DEADLINE_S = 600.0
# How long a service looks at its invariants that is not told.
_CHECK_WITHIN = timedelta(seconds=60)
_ERASE_DEADLINE_S = 120.0  # every picture of the account is deleted
_UPDATE_PLAN_DEADLINE_S = 60.0  # everybody on the plan is counted
_STATEMENT_DEADLINE_S = 60.0  # a month of a busy account has a line for each of its jobs
_ESTIMATE_DEADLINE_S = 30.0  # futures are played forward, which takes seconds where much waits
_CREATE_DEADLINE_S = 60.0  # the front door may first fetch pictures that the prompt names

_CHANNEL_OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Retries are ours: gRPC's own know neither request ids nor where a watch had got to.
    ("grpc.enable_retries", 0),
    # The library's growing pauses between connection attempts (up to 2 minutes) would outlive our own.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

Request = TypeVar("Request", bound=Message, contravariant=True)
Answer = TypeVar("Answer", covariant=True)


class _Method(Protocol[Request, Answer]):
    def __call__(
        self, request: Request, /, *, timeout: float, metadata: Sequence[tuple[str, str]]
    ) -> Awaitable[Answer]: ...


@dataclass(frozen=True, kw_only=True)
class Tls:
    """How to talk to a service behind TLS."""

    ca_file: Path | None = None
    """PEM of the authority to trust; None: the ones that gRPC ships with."""
    certificate_file: Path | None = None
    """PEM of the client's own certificate, for services that want one (mTLS)."""
    private_key_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How patiently a call is repeated that the service could not take."""

    times: int = 4
    """Repeats of a single call."""
    silence_s: float = 60.0
    """A download that brings nothing for so long is begun again where it was, and given up the second time in
    a row. A watch may be silent."""
    stream_times: int = 20
    """Repeats of a stream without anything new: about a minute, in which a service can restart."""
    first_ms: int = 200
    longest_ms: int = 5_000

    def delay_ms(self, repeat: int, retry_after_ms: int | None, spread: float) -> int:
        """Return the pause before repeat 1, 2, …: doubling, and never shorter than the service asked for.

        `spread` from 0 to 1 moves it by up to half, so that clients do not come back together.
        """
        doubled = min(self.first_ms * 2 ** (repeat - 1), self.longest_ms)
        return max(int(doubled * (0.5 + spread / 2)), retry_after_ms or 0)


class DarkroomClient:
    """One connection to the service, for one key. Use it as an async context manager, in one event loop.

    Plain text is spoken to loopback only, because the key travels with every call; every other address gets
    TLS, unless `plain_text` says that something else protects the way.
    """

    def __init__(
        self,
        address: str,
        key: str,
        *,
        tls: Tls | None = None,
        plain_text: bool = False,
        retries: RetryPolicy | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        """Without `tracer_provider`, the spans of calls go where the program's own go, if it has any."""
        self.address = address
        self._retries = retries or RetryPolicy()
        self._pause = pause
        self._tracer = client_tracer(tracer_provider)
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        if tls is None and (plain_text or _is_loopback(address)):
            self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(
                address, _credentials(tls or Tls()), options=_CHANNEL_OPTIONS
            )
        self._jobs = JobServiceStub(self._channel)
        self._accounts = AccountServiceStub(self._channel)
        self._fleet = FleetServiceStub(self._channel)
        self._moderation = ModerationServiceStub(self._channel)
        self._billing = BillingServiceStub(self._channel)
        self._admin = AdminServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call on it."""
        await self._channel.close()

    # Jobs

    async def imagine(
        self,
        prompt: str,
        *,
        pictures: Sequence[Path | bytes] = (),
        model: str = "",
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit a grid of four pictures made from text; it is durable when this returns.

        `pictures` are files, or their bytes, to draw after, beside those that the prompt names by URL. Raises
        PictureNotSendable, before anything is sent, if they could not be taken.
        """
        request = await _imagined(prompt, pictures, model=model, tier=tier, visibility=visibility)
        return await self._create(request)

    async def vary(
        self,
        job: str,
        image: int,
        *,
        strong: bool = False,
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit a new grid close to picture `image`, 1 to 4, of a finished job; `strong`: less close."""
        variation = Variation(source_image=image_name(job, image), strong=strong)
        return await self._create(CreateJobRequest(variation=variation, tier=tier, visibility=visibility))

    async def upscale(
        self,
        job: str,
        image: int,
        *,
        algorithm: UpscaleAlgorithm.ValueType = job_pb2.UPSCALE_ALGORITHM_UNSPECIFIED,
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit picture `image`, 1 to 4, of a finished job to be enlarged.

        Without an algorithm it is light where the prompt of the source says --uplight, else detailed.
        """
        upscale = Upscale(source_image=image_name(job, image), algorithm=algorithm)
        return await self._create(CreateJobRequest(upscale=upscale, tier=tier, visibility=visibility))

    async def reroll(
        self,
        job: str,
        *,
        exact: bool = False,
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit the same job again with a new seed, unless its prompt fixes one.

        `exact` keeps the seed: the same bits should come out, which `verify.compare` tells.
        """
        reroll = Reroll(source_job=job_name(job), exact=exact)
        return await self._create(CreateJobRequest(reroll=reroll, tier=tier, visibility=visibility))

    async def redo(
        self,
        job: str,
        *,
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit an upscale again with the other algorithm, light or detailed; reroll any other job.

        What is made of a private job is private unless `visibility` says otherwise.
        """
        source = await self.get(job)
        light = source.upscale_algorithm == job_pb2.UPSCALE_ALGORITHM_LIGHT
        if source.visibility == job_pb2.VISIBILITY_PRIVATE and visibility == job_pb2.VISIBILITY_UNSPECIFIED:
            # Its grid may be public, and that is what a new upscale would go by.
            visibility = job_pb2.VISIBILITY_PRIVATE
        if source.upscale_algorithm == job_pb2.UPSCALE_ALGORITHM_UNSPECIFIED:
            return await self.reroll(job, tier=tier, visibility=visibility)
        while source.kind == job_pb2.JOB_KIND_REROLL:
            source = await self.get(source.source_job)
        other = job_pb2.UPSCALE_ALGORITHM_DETAILED if light else job_pb2.UPSCALE_ALGORITHM_LIGHT
        return await self.upscale(
            source.source_job, source.source_image, algorithm=other, tier=tier, visibility=visibility
        )

    async def validate(
        self,
        prompt: str,
        *,
        pictures: Sequence[Path | bytes] = (),
        model: str = "",
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> Job:
        """Return what `imagine` would get, with price and place in the queue, without submitting it."""
        request = await _imagined(prompt, pictures, model=model, tier=tier, visibility=visibility)
        request.validate_only = True
        request.request_id = _new_request_id()
        return await self._call(self._jobs.CreateJob, request, _CREATE_DEADLINE_S)

    async def _create(self, request: CreateJobRequest) -> JobHandle:
        request.request_id = _new_request_id()
        return JobHandle(self, await self._call(self._jobs.CreateJob, request, _CREATE_DEADLINE_S))

    async def get(self, job: str) -> Job:
        """Return one job."""
        return await self._call(self._jobs.GetJob, GetJobRequest(name=job_name(job)))

    async def handle(self, job: str) -> JobHandle:
        """Return a handle of a job that was submitted before, perhaps by another client."""
        return JobHandle(self, await self.get(job))

    async def jobs(
        self, *, states: Sequence[JobState.ValueType] = (), account: str = "", page_size: int = 50
    ) -> AsyncIterator[Job]:
        """Yield an account's jobs, newest first, asking for pages as they are needed; empty: the own one's.

        Moderators may ask for any account's.
        """
        token = ""
        while True:
            request = ListJobsRequest(
                parent=_account_or_own(account), page_size=page_size, page_token=token, states=states
            )
            page = await self._call(self._jobs.ListJobs, request)
            for job in page.jobs:
                yield job
            token = page.next_page_token
            if not token:
                return

    async def feed(self, *, show_hidden: bool = False, page_size: int = 50) -> AsyncIterator[Job]:
        """Yield finished public upscales of all accounts, newest first, asking for pages as needed.

        Moderators may ask for the hidden ones too, which say so.
        """
        token = ""
        while True:
            request = ListFeedRequest(page_size=page_size, page_token=token, show_hidden=show_hidden)
            page = await self._call(self._jobs.ListFeed, request)
            for job in page.jobs:
                yield job
            token = page.next_page_token
            if not token:
                return

    async def cancel(self, job: str) -> Job:
        """Cancel a waiting job at once, a running one at its next step; return it as it is now."""
        request = CancelJobRequest(name=job_name(job), request_id=_new_request_id())
        return await self._call(self._jobs.CancelJob, request)

    async def delete(self, job: str) -> None:
        """Delete a finished job, its pictures and its text. One that is deleted already is no error."""
        request = DeleteJobRequest(name=job_name(job), request_id=_new_request_id())
        await self._call(self._jobs.DeleteJob, request)

    async def move(self, job: str, tier: Tier.ValueType) -> Job:
        """Move a waiting job to `tier`, at the price of a job submitted there now; return it."""
        request = UpdateJobRequest(
            job=Job(name=job_name(job), tier=tier),
            update_mask=FieldMask(paths=["tier"]),
            request_id=_new_request_id(),
        )
        return await self._call(self._jobs.UpdateJob, request)

    async def explain(self, job: str) -> Explanation:
        """Return why a job is where it is, what has to end before it starts, and when that will be."""
        return await self._call(self._jobs.ExplainJob, ExplainJobRequest(name=job_name(job)))

    async def estimate(
        self,
        prompt: str,
        *,
        pictures: Sequence[Path | bytes] = (),
        model: str = "",
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
        plan: str = "",
    ) -> Estimate:
        """Return what `imagine` would cost, when it would start and whom it would delay, in each tier.

        `plan` names one with which the same is to be said. Nothing is submitted.
        """
        create = await _imagined(prompt, pictures, model=model, tier=tier, visibility=visibility)
        return await self._estimate(EstimateJobRequest(create=create), plan)

    async def estimate_job(self, job: str, *, plan: str = "") -> Estimate:
        """Return the same of a job that waits."""
        return await self._estimate(EstimateJobRequest(name=job_name(job)), plan)

    async def _estimate(self, request: EstimateJobRequest, plan: str) -> Estimate:
        request.plan = plan_name(plan) if plan else ""
        return await self._call(self._jobs.EstimateJob, request, _ESTIMATE_DEADLINE_S)

    async def watch(
        self, job: str, *, after_sequence: int = 0, previews: bool = False
    ) -> AsyncGenerator[WatchJobResponse, None]:
        """Yield what happens to a job until it has ended.

        Every state event comes once and in order, also over broken connections; of queue places and progress
        only the newest is sent.
        """
        request = WatchJobRequest(name=job_name(job), after_sequence=after_sequence, previews=previews)
        repeats = 0
        with traced_call(self._tracer, request) as span:
            while True:
                call = self._jobs.WatchJob(request, metadata=(*self._metadata, *span))
                broken: DarkroomError | None = None
                try:
                    async for update in call:
                        repeats = 0
                        if update.WhichOneof("update") == "event":
                            request.after_sequence = update.event.sequence
                        yield update
                        if update.event.state in ENDED:
                            return
                except grpc.aio.AioRpcError as failure:
                    broken = raised_for(failure, self.address)
                    if not broken.retried or repeats == self._retries.stream_times:
                        raise broken from failure
                finally:
                    call.cancel()
                if broken is None:
                    # The service ended the stream without an end of the job: either it was asked for events
                    # after the last one, or it is closing down.
                    now = await self.get(request.name)
                    if now.state in ENDED and now.event_sequence <= request.after_sequence:
                        return
                repeats += 1
                await self._wait_before(repeats, broken)

    async def download(self, name: str, folder: Path, *, image: int | None = None) -> list[Path]:
        """Save all pictures and videos of a job, or one of them, in `folder`; return their paths.

        It is one where `name` means a picture or a video, or `image`, 1 to 4, says which picture. A file has
        its name only once it is complete and its SHA-256 is right; one that was there is replaced. Raises
        DownloadDamaged if what arrived is not what was announced, CannotSave if the folder is no good.
        """
        meant = named(name)
        if image is not None:
            return list((await self._download(image_name(name, image), folder)).values())
        saved = await self._download(meant.name, folder)
        if meant.name == meant.job:
            saved |= await self._download_videos(await self._videos_of(meant.job), folder)
        return list(saved.values())

    async def download_all(self, folder: Path, *, file_name: str | None = None) -> Path:
        """Save all pictures of the account as one ZIP archive in `folder`, and return its path.

        It is called as the service calls it, or `file_name`. One that breaks off goes on behind the last
        picture that had arrived whole. Raises DownloadDamaged and CannotSave as `download` does.
        """
        saved = await self._download(OWN_ACCOUNT, folder, file_name)
        if len(saved) != 1:
            raise ServiceFailed(f"{self.address} sent {len(saved)} files instead of one archive")
        return next(iter(saved.values()))

    async def _videos_of(self, job: str) -> Sequence[Video]:
        try:
            return (await self.get(job)).videos
        except NotFoundOrNotYours:
            # Its pictures could be had all the same: they are in the feed, where there are only upscales,
            # which have no videos.
            return ()

    async def _download_videos(self, videos: Sequence[Video], folder: Path) -> dict[str, Path]:
        saved: dict[str, Path] = {}
        for video in videos:
            saved |= await self._download(video.name, folder)
        return saved

    async def _download(self, name: str, folder: Path, file_name: str | None = None) -> dict[str, Path]:
        """Save what `name` stands for; return the paths, by resource name."""
        request = DownloadImagesRequest(name=name)
        saving = Saving(folder, file_name)
        repeats = 0
        with traced_call(self._tracer, request) as span:
            try:
                await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
                while True:
                    before = len(saving)
                    call = self._jobs.DownloadImages(request, metadata=(*self._metadata, *span))
                    try:
                        await self._download_rest(call, saving)
                    except (grpc.aio.AioRpcError, NoAnswerInTime) as failure:
                        request.after = await saving.broke_off()
                        repeats = 1 if len(saving) > before else repeats + 1
                        error, most = self._broken(failure, has_some=len(saving) > 0)
                        if repeats > most:
                            raise error from failure
                        await self._wait_before(repeats, error)
                    else:
                        return saving.files
            except OSError as failure:
                raise CannotSave(f"{folder}: {failure.strerror}.") from failure
            finally:
                await saving.discard()

    def _broken(
        self, failure: grpc.aio.AioRpcError | NoAnswerInTime, *, has_some: bool
    ) -> tuple[DarkroomError, int]:
        """Return what broke a download that has some files or none, and how often it is begun again."""
        if isinstance(failure, NoAnswerInTime):
            # A wire that was cut may say nothing, nor does a service that was stopped. Each silence is long.
            return failure, 1
        error = raised_for(failure, self.address)
        if not error.retried:
            return error, 0
        # What is half there is worth the wait for a service that restarts.
        return error, self._retries.stream_times if has_some else self._retries.times

    async def _download_rest(
        self,
        call: grpc.aio.UnaryStreamCall[DownloadImagesRequest, DownloadImagesResponse],
        saving: Saving,
    ) -> None:
        """Read one stream, and save the files in it."""
        try:
            parts = aiter(call)
            while (answer := await self._next_part(parts)) is not None:
                if answer.WhichOneof("part") == "header":
                    await saving.begin(answer.header)
                else:
                    await saving.write(answer.chunk)
            await saving.end()
        finally:
            call.cancel()

    async def _next_part(self, parts: AsyncIterator[DownloadImagesResponse]) -> DownloadImagesResponse | None:
        """Return the next part of a download; None at its end. Raises NoAnswerInTime if none comes."""
        try:
            async with asyncio.timeout(self._retries.silence_s):
                return await anext(parts, None)
        except TimeoutError as silent:
            sentence = f"{self.address} sent nothing more for {self._retries.silence_s:g} s."
            raise NoAnswerInTime(sentence) from silent

    # The account

    async def account(self) -> Account:
        """Return the key's own account: plan, fast time, mode, limits, jobs."""
        return await self._call(self._accounts.GetAccount, GetAccountRequest())

    async def update_account(
        self,
        *,
        mode: Tier.ValueType | None = None,
        visibility: Visibility.ValueType | None = None,
        overage_allowed: bool | None = None,
        spend_cap_micros: int | None = None,
    ) -> Account:
        """Change what is given of the key's own account, and nothing else; return it."""
        changes = {
            "mode": mode,
            "visibility": visibility,
            "overage_allowed": overage_allowed,
            "spend_cap_micros": spend_cap_micros,
        }
        given: dict[str, Any] = {path: value for path, value in changes.items() if value is not None}
        request = UpdateAccountRequest(
            account=Account(name="accounts/-", **given),
            update_mask=FieldMask(paths=list(given)),
            request_id=_new_request_id(),
        )
        return await self._call(self._accounts.UpdateAccount, request)

    async def balance(self) -> Balance:
        """Return the key's own fast time: granted, used, held, left."""
        return await self._call(self._billing.GetBalance, GetBalanceRequest())

    async def list_transfers(self, account: str = "", *, page_size: int = 100) -> AsyncIterator[Transfer]:
        """Yield the journal's rows of an account, newest first, asking for pages as they are needed.

        `account`, here and in the calls below, is the key's own unless it is given; only admins may give it.
        """
        token = ""
        while True:
            request = ListTransfersRequest(
                account=_account_or_own(account), page_size=page_size, page_token=token
            )
            page = await self._call(self._billing.ListTransfers, request)
            for transfer in page.transfers:
                yield transfer
            token = page.next_page_token
            if not token:
                return

    async def statement(self, account: str = "", *, at: datetime | None = None) -> Statement:
        """Return the period of an account that holds the moment `at`, aware; None: the present one."""
        request = GetStatementRequest(account=_account_or_own(account))
        if at is not None:
            request.at.FromDatetime(at)
        return await self._call(self._billing.GetStatement, request, _STATEMENT_DEADLINE_S)

    async def preview_plan_change(self, plan: str, *, account: str = "") -> PlanChange:
        """Return what a change to `plan` would give and cost now."""
        request = PreviewPlanChangeRequest(account=_account_or_own(account), plan=plan_name(plan))
        return await self._call(self._billing.PreviewPlanChange, request)

    async def change_plan(
        self, plan: str, *, etag: str = "", account: str = "", reason: str = ""
    ) -> PlanChange:
        """Change to `plan`: at once to one with more fast time, else at the end of the period.

        With the `etag` of a preview it is done as that said, or refused with EtagMismatch. Naming the present
        plan takes back a change that was to come. For another account than the key's own, say the `reason`.
        """
        request = ChangePlanRequest(
            request_id=_new_request_id(),
            account=_account_or_own(account),
            plan=plan_name(plan),
            etag=etag,
            reason=reason,
        )
        return await self._call(self._billing.ChangePlan, request)

    # What operators do. The reason is kept with the audit event.

    async def workers(self) -> list[Worker]:
        """Return every worker: what it is, what it does, and what it has in hand."""
        return list((await self._call(self._fleet.ListWorkers, ListWorkersRequest())).workers)

    async def drain_worker(self, worker: str, *, reason: str, within: timedelta | None = None) -> Worker:
        """Let a worker finish what it has and give it nothing new.

        What it has not finished `within` that time goes on elsewhere; None: as the service is set up.
        """
        request = DrainWorkerRequest(name=worker_name(worker), request_id=_new_request_id(), reason=reason)
        if within is not None:
            request.within_ms = within // timedelta(milliseconds=1)
        return await self._call(self._fleet.DrainWorker, request)

    async def resume_worker(self, worker: str, *, reason: str) -> Worker:
        """Give a worker jobs again that drains or was set aside."""
        request = ResumeWorkerRequest(name=worker_name(worker), request_id=_new_request_id(), reason=reason)
        return await self._call(self._fleet.ResumeWorker, request)

    async def queues(self) -> Queues:
        """Return what waits and runs in each tier, and how the GPUs are shared."""
        return await self._call(self._fleet.GetQueues, GetQueuesRequest())

    async def decisions(self, *, most: int = 25) -> list[Decision]:
        """Return what the scheduler decided lately, newest first: up to `most`, 100 at most."""
        request = ListDecisionsRequest(page_size=most)
        return list((await self._call(self._fleet.ListDecisions, request)).decisions)

    async def pause_tier(self, tier: Tier.ValueType, *, reason: str) -> TierQueue:
        """Let nothing of a tier start; what runs goes on."""
        request = PauseTierRequest(tier=tier, request_id=_new_request_id(), reason=reason)
        return await self._call(self._fleet.PauseTier, request)

    async def resume_tier(self, tier: Tier.ValueType, *, reason: str) -> TierQueue:
        """Let jobs of a paused tier start again."""
        request = ResumeTierRequest(tier=tier, request_id=_new_request_id(), reason=reason)
        return await self._call(self._fleet.ResumeTier, request)

    async def audit_fairness(self, *, start: datetime, end: datetime | None = None) -> AuditFairnessResponse:
        """Hold what was decided in a period, of seven days at most, against the policy's bounds."""
        request = AuditFairnessRequest()
        request.start_time.FromDatetime(start)
        if end is not None:
            request.end_time.FromDatetime(end)
        return await self._call(self._fleet.AuditFairness, request, _AUDIT_DEADLINE_S)

    # What moderators do. The reason is kept with the audit event.

    async def rules(self, *, category: str = "") -> ListRulesResponse:
        """Return the rules that prompts are held against, all pages as one; empty: of every category.

        Its etag is of the first page: what changed while the others were read makes a change by it fail.
        """
        every = ListRulesResponse()
        while True:
            request = ListRulesRequest(
                page_size=_RULES_A_PAGE, page_token=every.next_page_token, category=category
            )
            page = await self._call(self._moderation.ListRules, request)
            every.rules.extend(page.rules)
            every.etag = every.etag or page.etag
            every.next_page_token = page.next_page_token
            if not page.next_page_token:
                return every

    async def update_rules(
        self,
        *,
        add: Sequence[Rule] = (),
        remove: Sequence[str] = (),
        reason: str,
        etag: str = "",
        validate_only: bool = False,
    ) -> RulesUpdate:
        """Remove the rules of these patterns and add others, all or none of them.

        With an `etag`, of `rules` or of a preview, only if nobody has changed them since. With
        `validate_only` nothing is changed, and the answer's `trial` says which of the newest prompts would
        have been refused.
        """
        request = UpdateRulesRequest(
            request_id=_new_request_id(),
            reason=reason,
            etag=etag,
            add=add,
            remove=remove,
            validate_only=validate_only,
        )
        return await self._call(self._moderation.UpdateRules, request)

    async def hide(self, job: str, *, category: str, reason: str) -> Job:
        """Keep a job out of the feed; its owner is told the category."""
        request = HideJobRequest(
            name=job_name(job), request_id=_new_request_id(), category=category, reason=reason
        )
        return await self._call(self._moderation.HideJob, request)

    async def unhide(self, job: str, *, reason: str) -> Job:
        """Let the feed show a job again."""
        request = UnhideJobRequest(name=job_name(job), request_id=_new_request_id(), reason=reason)
        return await self._call(self._moderation.UnhideJob, request)

    async def block_account(self, account: str, *, reason: str, validate_only: bool = False) -> AccountBlock:
        """Let nobody in with any key of an account, and cancel its jobs; or say how many those would be."""
        request = BlockAccountRequest(
            name=account_name(account),
            request_id=_new_request_id(),
            reason=reason,
            validate_only=validate_only,
        )
        return await self._call(self._moderation.BlockAccount, request)

    async def unblock_account(self, account: str, *, reason: str) -> AccountBlock:
        """Let an account in again; its jobs stay cancelled."""
        request = UnblockAccountRequest(
            name=account_name(account), request_id=_new_request_id(), reason=reason
        )
        return await self._call(self._moderation.UnblockAccount, request)

    # What admins do. The reason is kept with the audit event.

    async def create_account(self, *, plan: str, account_id: str = "", reason: str) -> AdminAccount:
        """Open an account on a plan; without an id it gets a random one."""
        request = CreateAccountRequest(
            request_id=_new_request_id(), account_id=account_id, plan=plan_name(plan), reason=reason
        )
        return await self._call(self._admin.CreateAccount, request)

    async def admin_account(self, account: str) -> AdminAccount:
        """Return an account as admins see it, with its balance."""
        request = admin_pb2.GetAccountRequest(name=account_name(account))
        return await self._call(self._admin.GetAccount, request)

    async def accounts(self, *, plan: str = "", page_size: int = 100) -> AsyncIterator[AdminAccount]:
        """Yield all accounts, or those of a plan, without balances, in the order of their ids."""
        token = ""
        while True:
            request = ListAccountsRequest(
                page_size=page_size, page_token=token, plan=plan_name(plan) if plan else ""
            )
            page = await self._call(self._admin.ListAccounts, request)
            for account in page.accounts:
                yield account
            token = page.next_page_token
            if not token:
                return

    async def erase_account(self, account: str, *, reason: str) -> AdminAccount:
        """Delete an account's prompts, pictures and keys for good; the ledger keeps a pseudonym."""
        request = EraseAccountRequest(request_id=_new_request_id(), name=account_name(account), reason=reason)
        return await self._call(self._admin.EraseAccount, request, _ERASE_DEADLINE_S)

    async def create_api_key(self, account: str, *, role: Role.ValueType, reason: str) -> ApiKey:
        """Make a key of an account. Its secret is in this answer and nowhere else."""
        request = CreateApiKeyRequest(
            request_id=_new_request_id(), account=account_name(account), role=role, reason=reason
        )
        return await self._call(self._admin.CreateApiKey, request)

    async def api_keys(self, account: str) -> list[ApiKey]:
        """Return an account's keys, without their secrets."""
        request = ListApiKeysRequest(account=account_name(account))
        return list((await self._call(self._admin.ListApiKeys, request)).keys)

    async def revoke_api_key(self, account: str, key: str, *, reason: str) -> ApiKey:
        """End a key of an account, given by its id or its resource name."""
        request = RevokeApiKeyRequest(
            request_id=_new_request_id(), name=key_name(account, key), reason=reason
        )
        return await self._call(self._admin.RevokeApiKey, request)

    async def plans(self) -> list[Plan]:
        """Return the newest version of every plan."""
        return list((await self._call(self._admin.ListPlans, ListPlansRequest())).plans)

    async def plan(self, plan: str, *, version: int | None = None) -> Plan:
        """Return the newest version of a plan, or the one that is given."""
        name = plan_name(plan) + (f"/versions/{version}" if version is not None else "")
        return await self._call(self._admin.GetPlan, GetPlanRequest(name=name))

    async def create_plan(self, plan: Plan, *, reason: str, validate_only: bool = False) -> Plan:
        """Make a plan; `plan` is taken whole, without version and etag.

        With `validate_only` nothing is made: it is answered, or refused, as it would be.
        """
        request = CreatePlanRequest(
            request_id=_new_request_id(), plan=plan, reason=reason, validate_only=validate_only
        )
        return await self._call(self._admin.CreatePlan, request)

    async def update_plan(
        self,
        plan: Plan,
        *,
        effective_from: EffectiveFrom.ValueType,
        reason: str,
        validate_only: bool = False,
    ) -> Plan:
        """Make a new version of a plan; `plan` is taken whole, and its etag must be the one that was read.

        Its `impact` says who is touched. With `validate_only` it only says so, and nothing is changed.
        """
        request = UpdatePlanRequest(
            request_id=_new_request_id(),
            plan=plan,
            effective_from=effective_from,
            reason=reason,
            validate_only=validate_only,
        )
        return await self._call(self._admin.UpdatePlan, request, _UPDATE_PLAN_DEADLINE_S)

    async def adjust_balance(
        self,
        account: str,
        *,
        amount_ms: int,
        reason: str,
        expires: datetime | None = None,
        source: GrantSource.ValueType = admin_pb2.GRANT_SOURCE_UNSPECIFIED,
        undoes: int = 0,
    ) -> Balance:
        """Grant an account GPU milliseconds of fast time, or take unused ones away; return its balance.

        `source` says what is granted, which decides when it burns; what is not used when it `expires`, an
        aware time, is gone. What is taken is taken of the grant whose audit event has the number `undoes`;
        0: of whatever burns last.
        """
        request = AdjustBalanceRequest(
            request_id=_new_request_id(),
            account=account_name(account),
            amount_ms=amount_ms,
            reason=reason,
            source=source,
            undoes=undoes,
        )
        if expires is not None:
            request.expire_time.FromDatetime(expires)
        return await self._call(self._admin.AdjustBalance, request)

    async def refund(self, job: str, *, reason: str, amount_ms: int = 0) -> Refund:
        """Give back `amount_ms` of the time a job was billed; 0: all that is not given back yet."""
        request = RefundJobRequest(
            request_id=_new_request_id(), job=job_name(job), reason=reason, amount_ms=amount_ms
        )
        return await self._call(self._admin.RefundJob, request)

    async def undo_refund(
        self, job: str, *, reason: str, etag: str = "", validate_only: bool = False
    ) -> RefundUndo:
        """Take back the newest refund of a job; or say what that would charge again.

        With the `etag` of such an answer it is that refund, or refused with EtagMismatch.
        """
        request = UndoRefundRequest(
            request_id=_new_request_id(),
            job=job_name(job),
            etag=etag,
            reason=reason,
            validate_only=validate_only,
        )
        return await self._call(self._admin.UndoRefund, request)

    async def undo_plan_change(
        self, account: str, *, reason: str, etag: str = "", validate_only: bool = False
    ) -> PlanUndo:
        """Take back the newest change of an account's plan that counted at once; or say what that would do.

        With the `etag` of such an answer it is that change, or refused with EtagMismatch.
        """
        request = UndoPlanChangeRequest(
            request_id=_new_request_id(),
            account=account_name(account),
            etag=etag,
            reason=reason,
            validate_only=validate_only,
        )
        return await self._call(self._admin.UndoPlanChange, request)

    async def audit_events(
        self,
        *,
        target: str = "",
        actor: str = "",
        start: datetime | None = None,
        end: datetime | None = None,
        page_size: int = 100,
    ) -> AsyncIterator[AuditEvent]:
        """Yield what admins and operators did, newest first, asking for pages as they are needed.

        `target` is a resource name and stands for all below it; `start` and `end` are aware.
        """
        request = ListAuditEventsRequest(page_size=page_size, target=target, actor=actor)
        if start is not None:
            getattr(request, "from").FromDatetime(start)  # the field's name is a keyword here
        if end is not None:
            request.until.FromDatetime(end)
        while True:
            page = await self._call(self._admin.ListAuditEvents, request)
            for event in page.events:
                yield event
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def check_invariants(
        self, *, within: timedelta | None = None, replay: bool = False
    ) -> CheckInvariantsResponse:
        """Ask every invariant of the ledger of the live database, within a time; None: a minute.

        What was not asked by then has -1 violations. `replay` also replays the whole journal by a second
        program, in the time that is left.
        """
        request = CheckInvariantsRequest(replay=replay)
        if within is not None:
            request.within_ms = within // timedelta(milliseconds=1)
        deadline_s = (within or _CHECK_WITHIN).total_seconds() + _DEADLINE_S
        return await self._call(self._admin.CheckInvariants, request, deadline_s)

    # Calls

    async def _call(
        self, method: _Method[Request, Answer], request: Request, deadline_s: float = _DEADLINE_S
    ) -> Answer:
        repeats = 0
        with traced_call(self._tracer, request) as span:
            metadata = (*self._metadata, *span)
            while True:
                try:
                    return await method(request, timeout=deadline_s, metadata=metadata)
                except grpc.aio.AioRpcError as failure:
                    error = raised_for(failure, self.address)
                    if not error.retried or repeats == self._retries.times:
                        raise error from failure
                repeats += 1
                await self._wait_before(repeats, error)

    async def _wait_before(self, repeat: int, error: DarkroomError | None) -> None:
        asked_ms = error.details.retry_after_ms if error is not None else None
        # Not for secrets: it only keeps clients from coming back in step.
        await self._pause(self._retries.delay_ms(repeat, asked_ms, random.random()) / 1000)  # noqa: S311


class JobHandle:
    """A job that was submitted: watch it, wait for it, cancel it, save its pictures."""

    def __init__(self, client: DarkroomClient, job: Job) -> None:
        self._client = client
        self.job = job
        """As last seen."""

    @property
    def id(self) -> str:
        """Its UUID."""
        return self.job.uid or last_part(self.job.name)

    @property
    def receipt(self) -> Receipt | None:
        """What it cost, once it has ended."""
        return self.job.receipt if self.job.HasField("receipt") else None

    async def watch(self, *, previews: bool = False) -> AsyncGenerator[WatchJobResponse, None]:
        """Yield everything that happens to it until it has ended; `job` follows."""
        stream = self._client.watch(self.job.name, previews=previews)
        try:
            async for update in stream:
                if update.WhichOneof("update") == "event":
                    self.job = update.event.job
                yield update
        finally:
            await stream.aclose()

    async def result(self) -> Job:
        """Wait for its end and return it with its pictures. Raises JobFailed or JobCancelled."""
        if self.job.state not in ENDED:
            async for _ in self.watch():
                pass
        return succeeded(self.job)

    async def cancel(self) -> Job:
        """Cancel it; return it as it is now."""
        self.job = await self._client.cancel(self.job.name)
        return self.job

    async def move(self, tier: Tier.ValueType) -> Job:
        """Move it to `tier` while it waits; return it as it is now."""
        self.job = await self._client.move(self.job.name, tier)
        return self.job

    async def explain(self) -> Explanation:
        """Return why it is where it is."""
        return await self._client.explain(self.job.name)

    async def save(self, folder: Path) -> list[Path]:
        """Save its pictures and videos in `folder`; return their paths in order, pictures first."""
        return await self._client.download(self.job.name, folder)


def succeeded(job: Job) -> Job:
    """Return the job if it has its pictures; raise JobFailed or JobCancelled if it ended without."""
    if job.state == job_pb2.JOB_STATE_FAILED:
        why = job.failure.sentence or job.failure.reason or "The service gave no reason."
        raise JobFailed(f"Job {job.uid} failed: {why}", job)
    if job.state == job_pb2.JOB_STATE_CANCELLED:
        raise JobCancelled(f"Job {job.uid} was cancelled.", job)
    return job


async def _imagined(
    prompt: str,
    pictures: Sequence[Path | bytes],
    *,
    model: str,
    tier: Tier.ValueType,
    visibility: Visibility.ValueType,
) -> CreateJobRequest:
    imagine = Imagine(prompt=prompt, model=model, pictures=await contents(pictures))
    return CreateJobRequest(imagine=imagine, tier=tier, visibility=visibility)


def _account_or_own(account: str) -> str:
    return account_name(account) if account else OWN_ACCOUNT


def _new_request_id() -> str:
    return str(uuid.uuid4())


def _is_loopback(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    def content(path: Path | None) -> bytes | None:
        return path.read_bytes() if path is not None else None

    if (tls.certificate_file is None) != (tls.private_key_file is None):
        raise ConfigUnreadable("certificate_file and private_key_file go together: give both or neither.")
    # gRPC would take anything, and then say of every call that it was cut off.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if tls.ca_file is not None:
            context.load_verify_locations(tls.ca_file)
        if tls.certificate_file is not None:
            # With a password, or it would ask the terminal for that of a key that has one.
            context.load_cert_chain(tls.certificate_file, tls.private_key_file, password="")
    except ssl.SSLError as wrong:
        files = [tls.ca_file, tls.certificate_file, tls.private_key_file]
        named = ", ".join(str(file) for file in files if file is not None)
        raise ConfigUnreadable(f"These TLS files are no PEM that can be used together: {named}.") from wrong
    return grpc.ssl_channel_credentials(
        root_certificates=content(tls.ca_file),
        private_key=content(tls.private_key_file),
        certificate_chain=content(tls.certificate_file),
    )
