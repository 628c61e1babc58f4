"""Somebody else's client: written against the protos and their README, and on nothing of ours.

`python -I client_of_protos.py PROTO_FOLDER ADDRESS`, with the admin's key on standard input. It makes its own
stubs, does everything the API offers, says each thing that worked, and fails at the first that did not.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

PROTOS, ADDRESS = Path(sys.argv[1]), sys.argv[2]

# The generated packages have our packages' names. This program runs isolated, so that the checkout is not on
# its path, and `nothing_of_the_service_is_imported` looks.
with tempfile.TemporaryDirectory(prefix="dr-") as generated:
    sources = sorted(path.relative_to(PROTOS) for path in PROTOS.rglob("*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-I", "-m", "grpc_tools.protoc", f"-I{PROTOS}"),
            *(f"--python_out={generated}", f"--grpc_python_out={generated}", *sources),
        ],
        check=True,
    )
    sys.path.insert(0, generated)
    from billing.v1 import admin_pb2, admin_pb2_grpc, billing_pb2, billing_pb2_grpc
    from scheduler.v1 import (
        account_pb2,
        account_pb2_grpc,
        fleet_pb2,
        fleet_pb2_grpc,
        job_pb2,
        job_pb2_grpc,
        moderation_pb2,
        moderation_pb2_grpc,
    )

PATIENCE_S = 60
CHUNK_BYTES = 64 * 1024
PNG = b"\x89PNG\r\n\x1a\n"
EVERY_SERVICE = {
    service.full_name: file
    for file in (job_pb2, account_pb2, fleet_pb2, moderation_pb2, billing_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
}


class Api:
    """The service as the owner of one key meets it. Each call takes `**self.call`."""

    def __init__(self, channel: grpc.Channel, key: str) -> None:
        self.jobs = job_pb2_grpc.JobServiceStub(channel)
        self.accounts = account_pb2_grpc.AccountServiceStub(channel)
        self.fleet = fleet_pb2_grpc.FleetServiceStub(channel)
        self.moderation = moderation_pb2_grpc.ModerationServiceStub(channel)
        self.billing = billing_pb2_grpc.BillingServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.call = {"metadata": [("authorization", f"Bearer {key}")], "timeout": PATIENCE_S}

    def imagine(self, prompt: str, **fields: object) -> job_pb2.Job:
        return self.jobs.CreateJob(
            job_pb2.CreateJobRequest(request_id=new_id(), imagine=job_pb2.Imagine(prompt=prompt), **fields),
            **self.call,
        )

    def watch(self, job: job_pb2.Job, **fields: object) -> Iterator[job_pb2.WatchJobResponse]:
        return self.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name, **fields), **self.call)

    def ended(self, job: job_pb2.Job) -> job_pb2.Job:
        """Watch a job to its end and return it."""
        return events(self.watch(job))[-1].job

    def cancel(self, job: job_pb2.Job) -> job_pb2.Job:
        return self.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name, request_id=new_id()), **self.call)

    def balance(self) -> billing_pb2.Balance:
        return self.billing.GetBalance(billing_pb2.GetBalanceRequest(), **self.call)

    def download(self, name: str) -> dict[str, bytes]:
        """Return files by the names of their images, checked against their headers."""
        pictures: dict[str, tuple[job_pb2.Image, bytearray]] = {}
        for part in self.jobs.DownloadImages(job_pb2.DownloadImagesRequest(name=name), **self.call):
            if part.HasField("header"):
                image, content = part.header.image, bytearray()
                pictures[image.name] = (image, content)
            else:
                assert len(part.chunk) <= CHUNK_BYTES
                content.extend(part.chunk)
        for image, content in pictures.values():
            assert len(content) == image.size_bytes
            assert hashlib.sha256(content).hexdigest() == image.sha256
            assert content.startswith(PNG), image.content_type
        return {name: bytes(content) for name, (_, content) in pictures.items()}


def new_id() -> str:
    return str(uuid.uuid4())


def events(updates: Iterable[job_pb2.WatchJobResponse]) -> list[job_pb2.StateEvent]:
    return [update.event for update in updates if update.HasField("event")]


def refused(
    api: Api,
    call: grpc.UnaryUnaryMultiCallable | grpc.UnaryStreamMultiCallable,
    request: Message,
    code: StatusCode,
    reason: str,
) -> dict[str, Message]:
    """Ask that a call is refused for this reason; return the error's details by the names of their types."""
    try:
        answer = call(request, **api.call)
        if isinstance(call, grpc.UnaryStreamMultiCallable):
            answer = next(answer)
    except grpc.RpcError as refusal:
        error = refusal
    else:
        raise AssertionError(f"not refused: {answer}")
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    details = {}
    for packed in status.details:
        kind = packed.TypeName().removeprefix("google.rpc.")
        details[kind] = getattr(error_details_pb2, kind)()
        packed.Unpack(details[kind])
    info = details["ErrorInfo"]
    assert (error.code(), info.domain, info.reason) == (code, "darkroom", reason), error
    assert error.details() == status.message != ""
    return details


def health_and_reflection(channel: grpc.Channel) -> None:
    """Both need no key, and reflection tells of the very protos this program was made from."""
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", *EVERY_SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in EVERY_SERVICE),
    ]
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed, *files = reflection.ServerReflectionInfo(iter(requests), timeout=PATIENCE_S)
    assert {service.name for service in listed.list_services_response.service} == {
        *EVERY_SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    for answer, module in zip(files, EVERY_SERVICE.values(), strict=True):
        assert module.DESCRIPTOR.serialized_pb in answer.file_descriptor_response.file_descriptor_proto
    print("health and reflection: without a key, of these protos")


def plans(admin: Api) -> admin_pb2.Plan:
    """Change the plan that allows private mode, but only from the version that was read."""
    listed = admin.admin.ListPlans(admin_pb2.ListPlansRequest(), **admin.call).plans
    quotas_min = {plan.name: plan.quota_ms // 60_000 for plan in listed}
    assert quotas_min["plans/basic"] == 200
    assert quotas_min["plans/standard"] == 15 * 60
    plan = next(plan for plan in listed if plan.private_allowed)
    wanted = admin_pb2.Plan()
    wanted.CopyFrom(plan)
    wanted.quota_ms += 60_000
    request = admin_pb2.UpdatePlanRequest(
        request_id=new_id(), plan=wanted, effective_from=admin_pb2.EFFECTIVE_FROM_NOW, reason="a trial"
    )
    changed = admin.admin.UpdatePlan(request, **admin.call)
    assert (changed.version, changed.quota_ms) == (plan.version + 1, plan.quota_ms + 60_000)
    assert changed.etag != plan.etag
    assert admin.admin.UpdatePlan(request, **admin.call) == changed, "a repetition changes nothing"
    request.request_id = new_id()
    details = refused(admin, admin.admin.UpdatePlan, request, StatusCode.ABORTED, "ETAG_MISMATCH")
    assert dict(details["ErrorInfo"].metadata) == {"given": plan.etag, "current": changed.etag}
    print("ListPlans, UpdatePlan: changed once, and refused with the etag of the version before")
    return changed


def an_account(channel: grpc.Channel, admin: Api, plan: admin_pb2.Plan) -> Api:
    """Open an account with a key and a grant, each sent twice and done once."""
    request = admin_pb2.CreateAccountRequest(request_id=new_id(), plan=plan.name, reason="a trial")
    account = admin.admin.CreateAccount(request, **admin.call)
    assert admin.admin.CreateAccount(request, **admin.call) == account
    request.plan = "plans/basic"
    refused(admin, admin.admin.CreateAccount, request, StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")

    request = admin_pb2.CreateApiKeyRequest(
        request_id=new_id(), account=account.name, role=admin_pb2.ROLE_USER, reason="a trial"
    )
    key = admin.admin.CreateApiKey(request, **admin.call)
    refused(admin, admin.admin.CreateApiKey, request, StatusCode.FAILED_PRECONDITION, "SECRET_SHOWN_ONCE")

    request = admin_pb2.AdjustBalanceRequest(
        request_id=new_id(), account=account.name, amount_ms=5_000, reason="a trial"
    )
    balance = admin.admin.AdjustBalance(request, **admin.call)
    assert admin.admin.AdjustBalance(request, **admin.call) == balance
    owner = Api(channel, key.secret)
    assert owner.balance() == balance
    assert balance.available_ms == balance.granted_ms == plan.quota_ms + 5_000
    print(f"CreateAccount, CreateApiKey, AdjustBalance: {account.name}, each sent twice and done once")
    return owner


def refusals(channel: grpc.Channel, owner: Api) -> None:
    """Programs look at the reason; everything that is wrong is said at once."""
    request = job_pb2.CreateJobRequest(
        request_id="x", imagine=job_pb2.Imagine(prompt="a fox --w 100 --sede 7")
    )
    details = refused(owner, owner.jobs.CreateJob, request, StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
    violations = details["BadRequest"].field_violations
    assert details["ErrorInfo"].metadata["violations"] == str(len(violations)) == "3", violations
    stranger = Api(channel, "dk_0000000000000000_" + 64 * "0")
    refused(stranger, stranger.jobs.CreateJob, request, StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    request = admin_pb2.ListPlansRequest()
    details = refused(owner, owner.admin.ListPlans, request, StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
    assert details["ErrorInfo"].metadata["role"] == "admin"
    request = job_pb2.GetJobRequest(name=f"accounts/-/jobs/{new_id()}")
    refused(owner, owner.jobs.GetJob, request, StatusCode.PERMISSION_DENIED, "NOT_FOUND_OR_NOT_YOURS")
    print("refusals: with reason, numbers and every violation")


def asking_for_the_price(owner: Api, plan: admin_pb2.Plan) -> None:
    """Nothing is created, whatever is asked."""
    fast = owner.imagine("a fox", validate_only=True, tier=job_pb2.TIER_FAST)
    assert fast.price.charge_mode == job_pb2.CHARGE_MODE_FAST
    assert fast.price.billed_gpu_ms == fast.price.predicted_gpu_ms > 0
    assert (fast.queue_status.position, fast.price.amount_micros) == (1, 0)
    private = owner.imagine("a fox --private", validate_only=True, tier=job_pb2.TIER_FAST)
    assert private.price.billed_gpu_ms * 10_000 == fast.price.billed_gpu_ms * plan.private_multiplier_bp
    relax = owner.imagine("a fox --relax", validate_only=True)
    assert (relax.price.charge_mode, relax.price.billed_gpu_ms) == (job_pb2.CHARGE_MODE_RELAX, 0)
    assert (fast.name, private.name, relax.name) == ("", "", "")
    assert not owner.jobs.ListJobs(job_pb2.ListJobsRequest(), **owner.call).jobs
    print("validate_only: price, mode and place, and no job")


def a_relax_job(owner: Api) -> job_pb2.Job:
    """Send it twice under one id, and watch the one job there is to its end."""
    request = job_pb2.CreateJobRequest(
        request_id=new_id(),
        imagine=job_pb2.Imagine(prompt="a lighthouse in fog --w 128 --h 192"),
        tier=job_pb2.TIER_RELAX,
    )
    job = owner.jobs.CreateJob(request, **owner.call)
    assert owner.jobs.CreateJob(request, **owner.call).name == job.name
    request.imagine.prompt = "something else"
    refused(owner, owner.jobs.CreateJob, request, StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")

    updates = list(owner.watch(job))
    happened = events(updates)
    assert [event.state for event in happened] == [
        job_pb2.JOB_STATE_QUEUED,
        job_pb2.JOB_STATE_RUNNING,
        job_pb2.JOB_STATE_SUCCEEDED,
    ]
    sequences = [event.sequence for event in happened]
    assert sequences == sorted(set(sequences))
    progress = [update.progress for update in updates if update.HasField("progress")]
    steps = [each.step for each in progress]
    assert steps == sorted(set(steps))
    assert len(steps) > 1
    assert all(each.percent == 100 * each.step // each.steps and not each.preview for each in progress)
    assert updates[-1].event == happened[-1], "the stream ends after the event that ends the job"

    later = list(owner.watch(job, after_sequence=sequences[0]))
    assert [update.event.sequence for update in later] == sequences[1:]
    done = happened[-1].job
    assert done == owner.jobs.GetJob(job_pb2.GetJobRequest(name=job.name), **owner.call)
    assert (done.receipt.billed_gpu_ms, done.receipt.attempts) == (0, 1)
    assert done.receipt.gpu_ms > 0
    assert json.loads(done.receipt.reproduction_json)
    assert [(image.width, image.height) for image in done.images] == 4 * [(128, 192)]
    print("CreateJob, WatchJob, GetJob: a relax job, sent twice, drawn once, free")
    return done


def a_fast_job(owner: Api) -> job_pb2.Job:
    """Its watch breaks in the middle, and goes on behind the last thing seen."""
    before = owner.balance()
    job = owner.imagine("a red apple --seed 7", tier=job_pb2.TIER_FAST)
    stream = owner.watch(job, previews=True)
    seen = []
    for update in stream:
        if update.HasField("event"):
            seen.append(update.event)
        if update.progress.preview:
            assert update.progress.preview.startswith(PNG), update.progress.preview_content_type
            break
    stream.cancel()
    assert [event.state for event in seen] == [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING]
    (last,) = events(owner.watch(job, after_sequence=seen[-1].sequence))
    assert last.state == job_pb2.JOB_STATE_SUCCEEDED
    receipt, after = last.job.receipt, owner.balance()
    assert receipt.billed_gpu_ms == receipt.gpu_ms > 0
    assert receipt.balance_after_ms == receipt.balance_before_ms - receipt.billed_gpu_ms
    assert (after.used_ms, after.held_ms) == (before.used_ms + receipt.billed_gpu_ms, 0)
    assert after.available_ms == receipt.balance_after_ms
    print("CreateJob, WatchJob: a fast job, watched with previews, resumed after a break, charged once")
    return last.job


def from_a_finished_job(owner: Api, source: job_pb2.Job) -> list[job_pb2.Job]:
    """Vary a picture, privately, roll the job again, and enlarge a picture, publicly and privately."""
    variation = owner.jobs.CreateJob(
        job_pb2.CreateJobRequest(
            request_id=new_id(),
            variation=job_pb2.Variation(source_image=source.images[1].name),
            tier=job_pb2.TIER_RELAX,
            visibility=job_pb2.VISIBILITY_PRIVATE,
        ),
        **owner.call,
    )
    reroll = owner.jobs.CreateJob(
        job_pb2.CreateJobRequest(
            request_id=new_id(), reroll=job_pb2.Reroll(source_job=source.name), tier=job_pb2.TIER_RELAX
        ),
        **owner.call,
    )
    made = [owner.ended(variation), owner.ended(reroll)]
    assert [job.kind for job in made] == [job_pb2.JOB_KIND_VARIATION, job_pb2.JOB_KIND_REROLL]
    assert [(job.source_job, job.source_image) for job in made] == [(source.name, 2), (source.name, 0)]
    for job in made:
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert (job.width, job.height, job.prompt) == (source.width, source.height, source.prompt)
    assert made[1].seed != source.seed
    print("CreateJob: a variation and a reroll")
    return made


def enlarged(owner: Api, source: job_pb2.Job) -> list[job_pb2.Job]:
    """Enlarge a picture, for all to see and for oneself; the largest size is for those who pay."""
    request = job_pb2.CreateJobRequest(
        upscale=job_pb2.Upscale(
            source_image=source.images[0].name, algorithm=job_pb2.UPSCALE_ALGORITHM_LIGHT
        ),
        tier=job_pb2.TIER_RELAX,
    )
    made = []
    for visibility in (job_pb2.VISIBILITY_PUBLIC, job_pb2.VISIBILITY_PRIVATE):
        request.request_id, request.visibility = new_id(), visibility
        made.append(owner.ended(owner.jobs.CreateJob(request, **owner.call)))
    for job in made:
        assert (job.state, job.kind) == (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_KIND_UPSCALE)
        assert [(image.width, image.height) for image in job.images] == [(512, 768)]
        assert job.receipt.upscale_ms > 0
    request.request_id, request.upscale.algorithm = new_id(), job_pb2.UPSCALE_ALGORITHM_MAX
    refused(owner, owner.jobs.CreateJob, request, StatusCode.FAILED_PRECONDITION, "FAST_ONLY")
    print("CreateJob: upscales")
    return made


def downloads(owner: Api, job: job_pb2.Job) -> None:
    """One picture, and all of a job's."""
    every = owner.download(job.name)
    assert list(every) == [image.name for image in job.images]
    assert len(every) == 4
    assert all(image.file_name.startswith(job.uid) for image in job.images)
    third = job.images[2].name
    assert owner.download(third) == {third: every[third]}
    print("DownloadImages: one and all, with the sums they should have")


def lists(owner: Api, stranger: Api, jobs: list[job_pb2.Job]) -> None:
    """Page through one's own jobs, and through the public record, which shows nobody's business."""
    names: list[str] = []
    request = job_pb2.ListJobsRequest(parent="accounts/-", page_size=3, states=[job_pb2.JOB_STATE_SUCCEEDED])
    while not names or request.page_token:
        page = owner.jobs.ListJobs(request, **owner.call)
        assert 0 < len(page.jobs) <= 3
        names += [job.name for job in page.jobs]
        request.page_token = page.next_page_token
    assert names == [job.name for job in reversed(jobs)]

    shown: list[job_pb2.Job] = []
    request = job_pb2.ListFeedRequest(page_size=2)
    while not shown or request.page_token:
        page = stranger.jobs.ListFeed(request, **stranger.call)
        shown += page.jobs
        request.page_token = page.next_page_token
    upscales = [job for job in jobs if job.kind == job_pb2.JOB_KIND_UPSCALE]
    public = {job.name for job in upscales if job.visibility == job_pb2.VISIBILITY_PUBLIC}
    assert len(public) == len(upscales) - 1
    assert {job.name for job in shown} & {job.name for job in jobs} == public
    assert not any(job.HasField("price") or job.HasField("receipt") for job in shown)
    ends_ns = [job.end_time.ToNanoseconds() for job in shown]
    assert ends_ns == sorted(ends_ns, reverse=True)
    for job in jobs:
        if job.name in public:
            assert stranger.download(job.name) == owner.download(job.name)
        else:
            request, call = job_pb2.DownloadImagesRequest(name=job.name), stranger.jobs.DownloadImages
            refused(stranger, call, request, StatusCode.PERMISSION_DENIED, "NOT_FOUND_OR_NOT_YOURS")
    print("ListJobs, ListFeed: page by page, newest first; strangers see what is public, and only that")


def deleting(owner: Api, stranger: Api, job: job_pb2.Job) -> None:
    """A job that has ended goes for good, also from the public record; what it cost stays."""
    before = owner.balance()
    request = job_pb2.DeleteJobRequest(name=job.name, request_id=new_id())
    refused(
        stranger, stranger.jobs.DeleteJob, request, StatusCode.PERMISSION_DENIED, "NOT_FOUND_OR_NOT_YOURS"
    )
    for _ in range(2):
        owner.jobs.DeleteJob(request, **owner.call)
    get = job_pb2.GetJobRequest(name=job.name)
    refused(owner, owner.jobs.GetJob, get, StatusCode.PERMISSION_DENIED, "NOT_FOUND_OR_NOT_YOURS")
    shown = stranger.jobs.ListFeed(job_pb2.ListFeedRequest(page_size=100), **stranger.call).jobs
    assert job.name not in {each.name for each in shown}
    assert owner.balance() == before
    print("DeleteJob: gone for everybody, sent twice and done once")


def cancelling(owner: Api) -> None:
    """A waiting job ends at once and costs nothing, a running one at its next step and for what it ran."""
    busy = [owner.imagine(f"a fox {number}", tier=job_pb2.TIER_RELAX) for number in (1, 2)]
    waits = owner.imagine("a fox 3", tier=job_pb2.TIER_RELAX)
    assert waits.queue_status.reason == job_pb2.QUEUE_REASON_CONCURRENCY_LIMIT
    request = job_pb2.CancelJobRequest(name=waits.name, request_id=new_id())
    cancelled = owner.jobs.CancelJob(request, **owner.call)
    assert cancelled.state == job_pb2.JOB_STATE_CANCELLED
    assert not cancelled.HasField("start_time")
    assert owner.jobs.CancelJob(request, **owner.call) == cancelled
    request.request_id = new_id()
    details = refused(owner, owner.jobs.CancelJob, request, StatusCode.FAILED_PRECONDITION, "JOB_FINISHED")
    assert details["ErrorInfo"].metadata["state"] == "cancelled"
    assert [owner.ended(job).state for job in busy] == 2 * [job_pb2.JOB_STATE_SUCCEEDED]

    before = owner.balance()
    runs = owner.imagine("a harbour", tier=job_pb2.TIER_FAST)
    last_step = 0
    for update in owner.watch(runs):
        if last_step == 0 and update.progress.step:
            assert owner.cancel(runs).cancel_requested
        last_step = update.progress.step or last_step
    ended = update.event.job
    assert ended.state == job_pb2.JOB_STATE_CANCELLED
    assert 0 < last_step < ended.steps
    assert ended.receipt.billed_gpu_ms > 0
    assert owner.balance().used_ms == before.used_ms + ended.receipt.billed_gpu_ms
    print(f"CancelJob: a waiting job, and a running one at step {last_step} of {ended.steps}")


def the_fleet(admin: Api, owner: Api) -> None:
    """Pause a tier, see who waits for it and why, and move that job to where jobs still start."""
    workers = admin.fleet.ListWorkers(fleet_pb2.ListWorkersRequest(), **admin.call).workers
    assert workers
    relax = {"tier": job_pb2.TIER_RELAX, "reason": "a test"}
    paused = admin.fleet.PauseTier(fleet_pb2.PauseTierRequest(request_id=new_id(), **relax), **admin.call)
    assert paused.paused
    waiting = owner.imagine("a lighthouse --relax")
    for update in owner.watch(waiting):
        if update.queue_status.reason == job_pb2.QUEUE_REASON_TIER_PAUSED:
            break
    why = owner.jobs.ExplainJob(job_pb2.ExplainJobRequest(name=waiting.name), **owner.call)
    assert any("paused" in sentence for sentence in why.sentences)
    moved = owner.jobs.UpdateJob(
        job_pb2.UpdateJobRequest(
            job=job_pb2.Job(name=waiting.name, tier=job_pb2.TIER_FAST),
            update_mask={"paths": ["tier"]},
            request_id=new_id(),
        ),
        **owner.call,
    )
    assert moved.tier == job_pb2.TIER_FAST
    assert owner.ended(waiting).state == job_pb2.JOB_STATE_SUCCEEDED
    resumed = admin.fleet.ResumeTier(fleet_pb2.ResumeTierRequest(request_id=new_id(), **relax), **admin.call)
    assert not resumed.paused
    queues = admin.fleet.GetQueues(fleet_pb2.GetQueuesRequest(), **admin.call)
    assert (queues.gpus, len(queues.tiers)) == (len(workers), 2)
    print("FleetService, ExplainJob, UpdateJob: what waits is explained and moved")


def moderating(admin: Api, owner: Api, upscale: job_pb2.Job) -> None:
    """Make a rule and take it back, hide a job from the feed, and block an account for a while."""
    deed = {"reason": "a test"}
    prompt = job_pb2.Imagine(prompt="a zeppelin over a harbour")
    before = admin.moderation.ListRules(moderation_pb2.ListRulesRequest(), **admin.call)
    rule = moderation_pb2.Rule(pattern="zeppelin", category="airships")
    made = admin.moderation.UpdateRules(
        moderation_pb2.UpdateRulesRequest(request_id=new_id(), etag=before.etag, add=[rule], **deed),
        **admin.call,
    )
    request = job_pb2.CreateJobRequest(request_id=new_id(), imagine=prompt)
    details = refused(
        owner, owner.jobs.CreateJob, request, StatusCode.INVALID_ARGUMENT, "MODERATION_REJECTED"
    )
    assert details["ErrorInfo"].metadata["category"] == "airships"
    stale = moderation_pb2.UpdateRulesRequest(
        request_id=new_id(), etag=before.etag, remove=["zeppelin"], **deed
    )
    refused(admin, admin.moderation.UpdateRules, stale, StatusCode.ABORTED, "ETAG_MISMATCH")
    stale.etag = made.etag
    assert admin.moderation.UpdateRules(stale, **admin.call).removed == ["zeppelin"]
    hidden = admin.moderation.HideJob(
        moderation_pb2.HideJobRequest(name=upscale.name, request_id=new_id(), category="adult", **deed),
        **admin.call,
    )
    assert hidden.hidden.category == "adult"
    feed = job_pb2.ListFeedRequest()
    assert upscale.uid not in str(owner.jobs.ListFeed(feed, **owner.call))
    shown = admin.moderation.UnhideJob(
        moderation_pb2.UnhideJobRequest(name=upscale.name, request_id=new_id(), **deed), **admin.call
    )
    assert not shown.HasField("hidden")
    assert upscale.uid in str(owner.jobs.ListFeed(feed, **owner.call))
    account = owner.accounts.GetAccount(account_pb2.GetAccountRequest(), **owner.call).name
    blocked = admin.moderation.BlockAccount(
        moderation_pb2.BlockAccountRequest(name=account, request_id=new_id(), **deed), **admin.call
    )
    assert blocked.blocked
    refused(owner, owner.jobs.CreateJob, request, StatusCode.PERMISSION_DENIED, "ACCOUNT_BLOCKED")
    admin.moderation.UnblockAccount(
        moderation_pb2.UnblockAccountRequest(name=account, request_id=new_id(), **deed), **admin.call
    )
    assert owner.balance()
    print("ModerationService: a rule, a hidden job, a blocked account, and all of it taken back")


def the_account_itself(owner: Api, plan: admin_pb2.Plan) -> None:
    """Change what the mask names, and nothing else."""
    account = owner.accounts.GetAccount(account_pb2.GetAccountRequest(), **owner.call)
    assert account.balance == owner.balance()
    assert (account.limits, account.balance.plan) == (plan.limits, plan.name)
    assert (account.jobs_running, account.jobs_waiting, account.blocked) == (0, 0, False)
    assert (account.mode, account.visibility) == (job_pb2.TIER_FAST, job_pb2.VISIBILITY_PUBLIC)
    request = account_pb2.UpdateAccountRequest(
        account=account_pb2.Account(
            mode=job_pb2.TIER_RELAX,
            visibility=job_pb2.VISIBILITY_PRIVATE,
            overage_allowed=True,
            spend_cap_micros=5_000_000,
        ),
        update_mask=FieldMask(paths=["mode", "spend_cap_micros"]),
        request_id=new_id(),
    )
    changed = owner.accounts.UpdateAccount(request, **owner.call)
    account.mode = job_pb2.TIER_RELAX
    account.spend_cap_micros = account.balance.spend_cap_micros = 5_000_000
    assert changed == account == owner.accounts.UpdateAccount(request, **owner.call)
    assert owner.imagine("a fox", validate_only=True).tier == job_pb2.TIER_RELAX
    print("GetAccount, UpdateAccount, GetBalance: what the mask names, and nothing else")


def nothing_of_the_service_is_imported() -> None:
    packages = ("scheduler", "billing", "gpu_worker")
    foreign = [
        name
        for name, module in sys.modules.items()
        if name.partition(".")[0] in packages
        and module.__file__ is not None
        and not module.__file__.startswith(generated)
    ]
    forbidden = {"scheduler.client", "scheduler.settings", "ray", "asyncpg", "torch", "pydantic"}
    assert (foreign, forbidden & sys.modules.keys()) == ([], set())
    print("imported: gRPC and what it made of the protos")


def main() -> None:
    with grpc.insecure_channel(ADDRESS) as channel:
        admin = Api(channel, sys.stdin.readline().strip())
        health_and_reflection(channel)
        plan = plans(admin)
        owner = an_account(channel, admin, plan)
        refusals(channel, owner)
        asking_for_the_price(owner, plan)
        relax = a_relax_job(owner)
        fast = a_fast_job(owner)
        derived = from_a_finished_job(owner, relax)
        upscales = enlarged(owner, relax)
        downloads(owner, relax)
        stranger = an_account(channel, admin, plan)
        lists(owner, stranger, [relax, fast, *derived, *upscales])
        moderating(admin, owner, upscales[0])
        deleting(owner, stranger, upscales[0])
        cancelling(owner)
        the_fleet(admin, owner)
        the_account_itself(owner, plan)
    nothing_of_the_service_is_imported()
    print("everything worked")


main()
