"""A front door under test, a small scheduler for it to talk to, and callers with keys."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

from billing import accounts as ledger_accounts
from billing import admin, ledger, plans
from billing.plans import EffectiveFrom
from billing.v1 import admin_pb2_grpc, billing_pb2_grpc
from gpu_worker import outputs
from gpu_worker.contract import ImageFile, Progress, RenderSpec, VideoFile
from gpu_worker.prompt import file_stem
from scheduler.answers import Explained, Outlook, QueuesView, WhatIf, WorkerView
from scheduler.frontdoor.auth import Doorman
from scheduler.metrics import FrontDoorMetrics
from scheduler.policy.ids import Tier
from scheduler.store import accounts, jobs
from scheduler.store.accounts import Role
from scheduler.store.jobs import JobReceipt
from scheduler.store.pool import Pool
from scheduler.updates import Abilities, JobUpdate, QueueStatus
from scheduler.v1 import (
    account_pb2,
    account_pb2_grpc,
    fleet_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    moderation_pb2_grpc,
)

PLANS = ("basic", "standard", "pro")
MODELS = """
default = "small"

[models.small]
source = "builtin:stand-in"
steps = 20
guidance_milli = 5000
default_width = 256
default_height = 256
memory_bytes = 50_000_000
memory_bytes_per_pixel = 4_000
imagine_ms = 4_000
variation_ms = 2_500
variation_strength_permille = 500
variation_strong_permille = 900
upscale_ms = 6_000

[models.seeing]
source = "builtin:stand-in"
ip_adapter = "builtin:stand-in"
steps = 20
guidance_milli = 5000
default_width = 512
default_height = 512
memory_bytes = 50_000_000
memory_bytes_per_pixel = 4_000
imagine_ms = 4_000
variation_ms = 2_500

[models.unweighed]
source = "builtin:stand-in"
weighted_parts = false
steps = 20
guidance_milli = 5000
default_width = 256
default_height = 256
memory_bytes = 50_000_000
imagine_ms = 4_000
variation_ms = 2_500
memory_bytes_per_pixel = 4_000
"""
WORKER = "node-a/gpu-0"


def abilities(**changes: Any) -> Abilities:
    """Return what workers could do that can do all there is."""
    able = Abilities(
        most_memory_bytes=10**12, models=None, lacks_for_upscales="", devices=frozenset({"a GPU"})
    )
    return replace(able, **changes)


class SmallScheduler:
    """The scheduler's end of the link: says what a test lets it say, and remembers what it was told."""

    def __init__(self) -> None:
        self.able: Abilities | None = None
        self.ready = True
        self.statuses: dict[str, QueueStatus] = {}
        self.told_jobs: list[str] = []
        self.told_accounts: list[str] = []
        self.told_fleet = 0
        self.explanations: dict[str, Explained] = {}
        self.outlooks: dict[Tier, Outlook] = {}
        self.asked: list[WhatIf] = []
        self.seen_queues: QueuesView | None = None
        self.workers: Sequence[WorkerView] | None = ()
        self._newest: dict[str, JobUpdate] = {}
        self._followers: dict[str, list[asyncio.Queue[JobUpdate]]] = {}
        self._progress: dict[str, asyncio.Queue[Progress | None]] = {}
        self.previews_asked: list[bool] = []

    def jobs_changed(self, job_ids: Sequence[str]) -> None:
        self.told_jobs += job_ids

    def accounts_changed(self, account_ids: Sequence[str]) -> None:
        self.told_accounts += account_ids

    def fleet_changed(self) -> None:
        self.told_fleet += 1

    async def explain(self, job_id: str) -> Explained | None:
        return self.explanations.get(job_id)

    async def estimate(self, what_ifs: Sequence[WhatIf]) -> Sequence[Outlook | None]:
        self.asked += what_ifs
        return [self.outlooks.get(what_if.tier) for what_if in what_ifs]

    async def queues(self) -> QueuesView | None:
        return self.seen_queues

    async def workers_view(self) -> Sequence[WorkerView] | None:
        return self.workers

    async def queue_statuses(self, job_ids: Sequence[str]) -> Mapping[str, QueueStatus]:
        return {job_id: self.statuses[job_id] for job_id in job_ids if job_id in self.statuses}

    def abilities(self) -> Abilities | None:
        return self.able

    async def scheduler_ready(self) -> bool:
        return self.ready

    async def follow(self, job_id: str) -> AsyncIterator[JobUpdate]:
        queue: asyncio.Queue[JobUpdate] = asyncio.Queue()
        self._followers.setdefault(job_id, []).append(queue)
        if job_id in self._newest:
            queue.put_nowait(self._newest[job_id])
        while True:
            yield await queue.get()

    async def progress(self, worker_id: str, attempt_id: str, previews: bool) -> AsyncIterator[Progress]:
        assert worker_id == WORKER
        self.previews_asked.append(previews)
        queue = self._progress.setdefault(attempt_id, asyncio.Queue())
        while (progress := await queue.get()) is not None:
            yield progress

    def update(self, job_id: str, state: str = "running") -> None:
        """Say that a job changed."""
        self._newest[job_id] = JobUpdate(job_id=job_id, event_seq=0, state=state)
        for queue in self._followers.get(job_id, ()):
            queue.put_nowait(self._newest[job_id])

    def not_in_hand(self, attempt_id: str) -> None:
        """End the progress of an attempt once, as a worker does that was not asked to render it yet."""
        self._progress.setdefault(attempt_id, asyncio.Queue()).put_nowait(None)

    def step(self, attempt_id: str, step: int, preview: bytes = b"") -> None:
        """Say that a running attempt did a step of twenty."""
        queue = self._progress.setdefault(attempt_id, asyncio.Queue())
        queue.put_nowait(
            Progress(
                attempt_id=attempt_id,
                step=step,
                steps=20,
                preview=preview,
                preview_content_type="image/jpeg" if preview else "",
            )
        )


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A refusal as a client reads it."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: Mapping[str, str]
    violations: Mapping[str, str]
    """Of BadRequest: sentence by field."""
    quota: str
    """Of QuotaFailure: its first subject."""
    precondition: str
    """Of PreconditionFailure: its first subject."""
    retry_s: float | None
    raw: bytes
    """The whole status."""


async def refusal(call: Awaitable[Any]) -> Refused:
    """Return the refusal that a call must end with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


def read_refusal(error: grpc.aio.AioRpcError) -> Refused:
    status = rpc_status.from_call(error)
    assert status is not None, f"no status details: {error}"
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    quota = error_details_pb2.QuotaFailure()
    precondition = error_details_pb2.PreconditionFailure()
    retry = error_details_pb2.RetryInfo()
    kinds = {
        message.DESCRIPTOR.full_name: message for message in (info, bad_request, quota, precondition, retry)
    }
    seen = set()
    for detail in status.details:
        name = detail.type_url.rpartition("/")[2]
        detail.Unpack(kinds[name])
        seen.add(name)
    assert info.domain == "darkroom"
    return Refused(
        code=error.code(),
        reason=info.reason,
        message=status.message,
        metadata=dict(info.metadata),
        violations={v.field: v.description for v in bad_request.field_violations},
        quota=quota.violations[0].subject if quota.violations else "",
        precondition=precondition.violations[0].subject if precondition.violations else "",
        retry_s=retry.retry_delay.ToTimedelta().total_seconds() if "google.rpc.RetryInfo" in seen else None,
        raw=status.SerializeToString(),
    )


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Somebody with a key."""

    account_id: str
    secret: str
    jobs: job_pb2_grpc.JobServiceAsyncStub
    accounts: account_pb2_grpc.AccountServiceAsyncStub
    fleet: fleet_pb2_grpc.FleetServiceAsyncStub
    moderation: moderation_pb2_grpc.ModerationServiceAsyncStub
    billing: billing_pb2_grpc.BillingServiceAsyncStub
    admin: admin_pb2_grpc.AdminServiceAsyncStub

    async def create(self, prompt: str = "a fox", **fields: Any) -> job_pb2.Job:
        request_id = fields.pop("request_id", None) or str(uuid.uuid4())
        imagine = job_pb2.Imagine(
            prompt=prompt, model=fields.pop("model", ""), pictures=fields.pop("pictures", ())
        )
        return await self.jobs.CreateJob(
            job_pb2.CreateJobRequest(request_id=request_id, imagine=imagine, **fields)
        )

    async def update(self, **fields: Any) -> account_pb2.Account:
        return await self.accounts.UpdateAccount(
            account_pb2.UpdateAccountRequest(
                request_id=str(uuid.uuid4()),
                account=account_pb2.Account(**fields),
                update_mask=FieldMask(paths=list(fields)),
            )
        )

    async def vary(self, source_image: str, **fields: Any) -> job_pb2.Job:
        request_id = fields.pop("request_id", None) or str(uuid.uuid4())
        variation = job_pb2.Variation(source_image=source_image, strong=fields.pop("strong", False))
        return await self.jobs.CreateJob(
            job_pb2.CreateJobRequest(request_id=request_id, variation=variation, **fields)
        )

    async def upscale(self, source_image: str, **fields: Any) -> job_pb2.Job:
        request_id = fields.pop("request_id", None) or str(uuid.uuid4())
        upscale = job_pb2.Upscale(source_image=source_image, algorithm=fields.pop("algorithm", 0))
        return await self.jobs.CreateJob(
            job_pb2.CreateJobRequest(request_id=request_id, upscale=upscale, **fields)
        )

    async def reroll(self, source_job: str, **fields: Any) -> job_pb2.Job:
        request_id = fields.pop("request_id", None) or str(uuid.uuid4())
        reroll = job_pb2.Reroll(source_job=source_job, exact=fields.pop("exact", False))
        return await self.jobs.CreateJob(
            job_pb2.CreateJobRequest(request_id=request_id, reroll=reroll, **fields)
        )

    async def get(self, name: str) -> job_pb2.Job:
        return await self.jobs.GetJob(job_pb2.GetJobRequest(name=name))

    async def move(self, name: str, tier: job_pb2.Tier, request_id: str | None = None) -> job_pb2.Job:
        return await self.jobs.UpdateJob(
            job_pb2.UpdateJobRequest(
                job=job_pb2.Job(name=name, tier=tier),
                update_mask=FieldMask(paths=["tier"]),
                request_id=request_id or str(uuid.uuid4()),
            )
        )

    async def estimate(self, **fields: Any) -> list[job_pb2.EstimateOption]:
        estimate = await self.jobs.EstimateJob(job_pb2.EstimateJobRequest(**fields))
        return list(estimate.options)

    async def cancel(self, name: str, request_id: str | None = None) -> job_pb2.Job:
        return await self.jobs.CancelJob(
            job_pb2.CancelJobRequest(name=name, request_id=request_id or str(uuid.uuid4()))
        )

    async def delete(self, name: str, request_id: str | None = None) -> None:
        await self.jobs.DeleteJob(
            job_pb2.DeleteJobRequest(name=name, request_id=request_id or str(uuid.uuid4()))
        )

    def watch(self, name: str, **fields: Any) -> Any:
        return self.jobs.WatchJob(job_pb2.WatchJobRequest(name=name, **fields))

    async def download(self, name: str, *, after: str = "") -> list[tuple[Any, bytes]]:
        files: list[tuple[Any, bytes]] = []
        async for part in self.jobs.DownloadImages(job_pb2.DownloadImagesRequest(name=name, after=after)):
            if part.WhichOneof("part") == "header":
                kind = part.header.WhichOneof("file")
                assert kind is not None
                files.append((getattr(part.header, kind), b""))
            else:
                image, so_far = files[-1]
                files[-1] = (image, so_far + part.chunk)
        return files


@dataclass
class Door:
    """A front door under test."""

    address: str
    pool: Pool
    scheduler: SmallScheduler
    metrics: FrontDoorMetrics
    artifacts: Path
    doorman: Doorman
    clock: Clock
    close: Callable[[], Awaitable[object]]
    """Stop serving now, and not at the end of the test."""
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    async def caller(self, account_id: str, *, plan: str = "standard", role: Role = Role.USER) -> Caller:
        """Open an account, if there is none of that id, and return somebody with a new key of it."""
        async with self.pool.transaction() as connection:
            if await accounts.settings(connection, account_id) is None:
                await ledger_accounts.create(connection, account_id, plan, self.clock.now)
                await accounts.create_account(connection, account_id)
            key = await accounts.create_key(connection, account_id, role)
        return self.with_secret(account_id, key.secret)

    def with_secret(self, account_id: str, secret: str) -> Caller:
        channel = self.channel(f"Bearer {secret}")
        return Caller(
            account_id=account_id,
            secret=secret,
            jobs=job_pb2_grpc.JobServiceStub(channel),  # type: ignore[arg-type]
            accounts=account_pb2_grpc.AccountServiceStub(channel),  # type: ignore[arg-type]
            fleet=fleet_pb2_grpc.FleetServiceStub(channel),  # type: ignore[arg-type]
            moderation=moderation_pb2_grpc.ModerationServiceStub(channel),  # type: ignore[arg-type]
            billing=billing_pb2_grpc.BillingServiceStub(channel),  # type: ignore[arg-type]
            admin=admin_pb2_grpc.AdminServiceStub(channel),  # type: ignore[arg-type]
        )

    def channel(self, authorization: str | None) -> grpc.aio.Channel:
        interceptors = [] if authorization is None else [*_with_metadata(authorization)]
        channel = grpc.aio.insecure_channel(self.address, interceptors=interceptors)
        self._channels.append(channel)
        return channel

    async def close_channels(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def start(self, job_id: str) -> str:
        """Let a waiting job run, as the loop's transaction does; returns the attempt's id."""
        attempt_id = str(uuid.uuid4())
        async with self.pool.transaction() as connection:
            await connection.execute(
                """INSERT INTO scheduler.attempt (
                       attempt_id, job_id, number, token, epoch, worker_id, incarnation, started_at,
                       predicted_ms, charged_at_ms, weight_milli, decision)
                   SELECT $1, $2, 1 + count(*), $1, 1, $3, 'i', now(), 1, 0, 1000, '{}'
                   FROM scheduler.attempt WHERE job_id = $2""",
                uuid.UUID(attempt_id),
                uuid.UUID(job_id),
                WORKER,
            )
            await connection.execute(
                "UPDATE scheduler.job SET state = 'running', started_at = now() WHERE job_id = $1",
                uuid.UUID(job_id),
            )
            await self.event(connection, job_id, "running", "It was next.")
        return attempt_id

    async def succeed(
        self,
        job_id: str,
        pictures: Sequence[bytes] = (b"one", b"two", b"three", b"four"),
        videos: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Let a job end with these pictures in the artifact store, as settlement does."""
        stem = file_stem((await self.spec(job_id)).prompt)
        images = []
        for index, content in enumerate(pictures, start=1):
            name = outputs.image_name(job_id, stem, index)
            path = f"jobs/{job_id}/{name}"
            (self.artifacts / path).parent.mkdir(parents=True, exist_ok=True)
            (self.artifacts / path).write_bytes(content)
            images.append(
                ImageFile(
                    index=index,
                    path=path,
                    file_name=name,
                    content_type="image/png",
                    size_bytes=len(content),
                    sha256=hashlib.sha256(content).hexdigest(),
                    width=256,
                    height=256,
                    seed=index,
                )
            )
        films = []
        for content_type, content in videos.items():
            name = f"{job_id}_{stem}.{content_type.rpartition('/')[2]}"
            (self.artifacts / f"jobs/{job_id}/{name}").write_bytes(content)
            films.append(
                VideoFile(
                    path=f"jobs/{job_id}/{name}",
                    file_name=name,
                    content_type=content_type,
                    size_bytes=len(content),
                    sha256=hashlib.sha256(content).hexdigest(),
                    width=512,
                    height=512,
                    frames=20,
                )
            )
        await self._end(job_id, "succeeded", images=images, videos=films)

    async def fail(self, job_id: str) -> None:
        """Let a job end without pictures."""
        await self._end(job_id, "failed")

    async def lose(self, job_id: str) -> None:
        """Let a running job go back to its place, as settlement of a lost attempt does."""
        async with self.pool.transaction() as connection:
            await connection.execute(
                """UPDATE scheduler.attempt SET state = 'lost', ended_at = now(), gpu_ms = 0
                   WHERE job_id = $1 AND state = 'running'""",
                uuid.UUID(job_id),
            )
            await connection.execute(
                "UPDATE scheduler.job SET state = 'queued', losses = losses + 1 WHERE job_id = $1",
                uuid.UUID(job_id),
            )
            await self.event(connection, job_id, "queued", "Its worker was lost.")

    async def _end(
        self, job_id: str, state: str, images: Sequence[ImageFile] = (), videos: Sequence[VideoFile] = ()
    ) -> None:
        failed = state == "failed"
        async with self.pool.transaction() as connection:
            await connection.execute(
                """UPDATE scheduler.attempt SET state = $2, ended_at = now(), gpu_ms = 1 WHERE job_id = $1""",
                uuid.UUID(job_id),
                state,
            )
            await connection.execute(
                """UPDATE scheduler.job
                   SET state = $2, ended_at = now(), images = $3, receipt = $5,
                       latents_path = CASE WHEN spec ->> 'kind' IN ('imagine', 'variation') THEN $4 END,
                       failure_reason = $6, failure_sentence = $7, videos = $8 WHERE job_id = $1""",
                uuid.UUID(job_id),
                state,
                None if failed else json.dumps(jobs.images_to_json(images)),
                None if failed else f"jobs/{job_id}/latents.safetensors",
                json.dumps(jobs.receipt_to_json(A_RECEIPT)),
                "ENGINE_ERROR" if failed else None,
                "The engine failed." if failed else None,
                json.dumps(jobs.videos_to_json(videos)) if videos else None,
            )
            await self.event(connection, job_id, state, "It ended.")

    async def event(self, connection: asyncpg.Connection, job_id: str, state: str, sentence: str) -> None:
        """Let a job have an event, as every change of it does."""
        await connection.execute(
            """WITH event AS (INSERT INTO scheduler.job_event (job_id, state, sentence) VALUES ($1, $2, $3)
                              RETURNING seq)
               UPDATE scheduler.job SET event_seq = seq FROM event WHERE job_id = $1""",
            uuid.UUID(job_id),
            state,
            sentence,
        )

    async def use_up(self, account_id: str) -> None:
        """Take all fast time of an account away."""
        await self.leave(account_id, 0)

    async def leave(self, account_id: str, left_ms: int) -> None:
        """Take all but so much of an account's fast time away."""
        now = self.clock.now
        async with self.pool.transaction() as connection:
            taken_ms = (await ledger.balance(connection, account_id, now)).available_ms - left_ms
            await admin.adjust_balance(
                connection, account_id, -taken_ms, "test", "used up", str(uuid.uuid4()), None, now
            )

    async def plan(self, name: str, **fields: Any) -> None:
        """Make a plan like basic but for these fields; of one that is there a version that counts at once."""
        told = {"actor": "test", "reason": "test", "request_id": str(uuid.uuid4()), "at": self.clock.now}
        async with self.pool.transaction() as connection:
            known = {version.plan: version for version in await plans.all_newest(connection)}
            if name in known:
                await plans.update(
                    connection,
                    replace(known[name], **fields),
                    etag=known[name].etag,
                    effective_from=EffectiveFrom.NOW,
                    **told,
                )
            else:
                await plans.create(connection, replace(known["basic"], plan=name, **fields), **told)

    async def spec(self, job_id: str) -> RenderSpec:
        """Return what a worker would be asked to draw."""
        async with self.pool.reading() as connection:
            job = await jobs.read_job(connection, job_id)
        assert job is not None
        return job.spec

    async def sql(self, statement: str, *arguments: Any) -> Any:
        """Return the first value of a statement."""
        async with self.pool.reading() as connection:
            return await connection.fetchval(statement, *arguments)


A_RECEIPT = JobReceipt(
    gpu_ms=4_000,
    billed_gpu_ms=4_000,
    amount_micros=0,
    currency_code="USD",
    balance_before_ms=54_000_000,
    balance_after_ms=53_996_000,
    attempts=1,
    worker=WORKER,
    waited_ms=10,
    encode_ms=100,
    denoise_ms=3_000,
    decode_ms=900,
    upscale_ms=0,
    reproduction={"model": "small"},
)


def a_png(red: int = 0) -> bytes:
    """Return a small picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 10, 12, 0, tzinfo=UTC)
        self.monotonic_s = 1_000.0

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.monotonic_s += seconds


def _with_metadata(authorization: str) -> list[Any]:
    def details(given: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(given.metadata or ()), ("authorization", authorization))
        return grpc.aio.ClientCallDetails(
            given.method, given.timeout, metadata, given.credentials, given.wait_for_ready
        )

    class Unary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc, type-arg]
        async def intercept_unary_unary(self, continuation: Any, given: Any, request: Any) -> Any:
            return await continuation(details(given), request)

    class Stream(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc, type-arg]
        async def intercept_unary_stream(self, continuation: Any, given: Any, request: Any) -> Any:
            return await continuation(details(given), request)

    return [Unary(), Stream()]
