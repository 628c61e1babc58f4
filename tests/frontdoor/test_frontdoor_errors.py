"""Every row of the error table: status, reason, sentence and details, as a client meets them."""

from __future__ import annotations

import base64
import json
import uuid
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest

import billing.refusals
import scheduler.refusals
from billing.refusals import Refusal
from billing.v1 import admin_pb2
from scheduler.frontdoor.errors import code_of, status_of
from scheduler.frontdoor.fields import page_token
from scheduler.frontdoor.jobs import submission_refused
from scheduler.metrics import FrontDoorMetrics, SubmissionReason
from scheduler.refusals import FieldViolation, Impossible, InvalidRequest, RateLimited
from scheduler.store.accounts import Role
from scheduler.v1 import account_pb2, job_pb2
from tests.frontdoor.door import Door, abilities, refusal

Code = grpc.StatusCode


async def test_too_many_accepted_jobs(door: Door) -> None:
    ann = await door.caller("ann")
    for _ in range(10):
        await ann.create()
    refused = await refusal(ann.create())
    assert (refused.code, refused.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert refused.metadata == {"depth": "10", "limit": "10"}
    assert refused.quota == "accounts/ann"
    assert refused.retry_s == 5
    assert refused.message == (
        "Your queue is full: 10 jobs are running or waiting and your plan allows 10. "
        "Send this one again when one of them has finished, or cancel one."
    )


async def test_no_fast_time_and_no_consent_to_overage(door: Door) -> None:
    ann = await door.caller("ann")
    await door.use_up("ann")
    refused = await refusal(ann.create())
    assert (refused.code, refused.reason) == (Code.RESOURCE_EXHAUSTED, "FAST_TIME_EXHAUSTED")
    assert refused.metadata["remaining_ms"] == "0"
    assert datetime.fromisoformat(refused.metadata["renews_at"]) == datetime(2026, 12, 10, 12, tzinfo=UTC)
    assert refused.retry_s is None
    assert "Relax jobs are free" in refused.message
    counted = door.metrics.registry.get_sample_value(
        "darkroom_billing_rejections_total", {"plan": "standard", "reason": "fast_time_exhausted"}
    )
    assert counted == 1


async def test_a_spend_cap_that_the_job_would_exceed(door: Door) -> None:
    ann = await door.caller("ann")
    await door.use_up("ann")
    await ann.update(overage_allowed=True, spend_cap_micros=100)
    refused = await refusal(ann.create())
    assert (refused.code, refused.reason) == (Code.RESOURCE_EXHAUSTED, "FAST_TIME_EXHAUSTED")
    assert refused.metadata["spend_cap_micros"] == "100"
    assert refused.retry_s is None
    assert "raise the cap" in refused.message


async def test_private_is_not_in_the_plan(door: Door) -> None:
    ann = await door.caller("ann")
    for call in (
        ann.create("a fox --private"),
        ann.create(visibility=job_pb2.VISIBILITY_PRIVATE),
        ann.update(visibility=job_pb2.VISIBILITY_PRIVATE),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (Code.FAILED_PRECONDITION, "PLAN_LACKS_PRIVATE")
        assert refused.metadata == {"plan": "standard"}
        assert refused.precondition == "plans/standard"
        assert refused.message.startswith("The plan standard has no private mode.")


@pytest.mark.parametrize("state", ["queued", "running", "failed", "cancelled"])
async def test_a_source_that_has_not_succeeded(door: Door, state: str) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    if state == "running":
        await door.start(job.uid)
    elif state == "failed":
        await door.fail(job.uid)
    elif state == "cancelled":
        await ann.cancel(job.name)
    for call in (ann.vary(f"{job.name}/images/1"), ann.download(job.name)):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (Code.FAILED_PRECONDITION, "SOURCE_NOT_READY")
        assert refused.metadata == {"job": job.uid, "state": state}
        assert f"Job {job.uid} is {state}" in refused.message


async def test_a_source_without_that_picture(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await door.succeed(job.uid, [b"only one"])
    for call in (ann.vary(f"{job.name}/images/2"), ann.download(f"{job.name}/images/2")):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (Code.FAILED_PRECONDITION, "SOURCE_NOT_READY")
        assert refused.message == f"Job {job.uid} has no picture 2."


async def test_a_role_that_does_not_reach(door: Door) -> None:
    ann = await door.caller("ann", role=Role.OPERATOR)
    refused = await refusal(ann.admin.ListPlans(admin_pb2.ListPlansRequest()))
    assert (refused.code, refused.reason) == (Code.PERMISSION_DENIED, "ROLE_REQUIRED")
    assert refused.metadata == {"role": "admin"}
    assert "needs a key with the role admin" in refused.message


async def test_somebody_else_s_job_and_no_job_answer_with_the_same_bytes(door: Door) -> None:
    ann, ben = await door.caller("ann", plan="pro"), await door.caller("ben")
    job = await ann.create("a fox --private")
    await door.succeed(job.uid)
    nothing = f"accounts/ann/jobs/{uuid.uuid4()}"
    answers = []
    for name in (job.name, nothing, f"accounts/-/jobs/{job.uid}", f"accounts/ben/jobs/{job.uid}"):
        answers += [
            await refusal(ben.get(name)),
            await refusal(ben.cancel(name)),
            await refusal(ben.reroll(name)),
            await refusal(ben.vary(f"{name}/images/1")),
            await refusal(ben.download(name)),
            await refusal(ben.download(f"{name}/images/1")),
            await refusal(_all(ben.watch(name))),
        ]
    answers.append(await refusal(ben.jobs.ListJobs(job_pb2.ListJobsRequest(parent="accounts/ann"))))
    answers.append(await refusal(ben.accounts.GetAccount(account_pb2.GetAccountRequest(name="accounts/ann"))))
    answers.append(await refusal(ben.accounts.GetAccount(account_pb2.GetAccountRequest(name="accounts/zoe"))))
    assert {(answer.code, answer.reason) for answer in answers} == {
        (Code.PERMISSION_DENIED, "NOT_FOUND_OR_NOT_YOURS")
    }
    assert len({answer.raw for answer in answers}) == 1
    assert "check the name, and whose key this is" in answers[0].message


@pytest.mark.parametrize(
    ("prompt", "category"),
    [("a G.O.R.E scene", "gore"), ("NUD3 figure", "adult"), ("please kill yourself", "harassment")],
)
async def test_moderation_names_the_category(door: Door, prompt: str, category: str) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create(prompt))
    assert (refused.code, refused.reason) == (Code.INVALID_ARGUMENT, "MODERATION_REJECTED")
    assert refused.metadata == {"category": category}
    assert f"rejected by moderation ({category})" in refused.violations["prompt"]
    assert prompt.encode() not in refused.raw


async def test_moderation_also_knows_the_rules_in_the_table(door: Door) -> None:
    ann = await door.caller("ann")
    await door.sql(
        "INSERT INTO scheduler.moderation_rule VALUES ('Purple  Dinosaur', 'harassment') RETURNING 1"
    )
    assert (await refusal(ann.create("a púrple-dinosaur!"))).metadata == {"category": "harassment"}


async def test_a_source_is_moderated_by_the_rules_of_today(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a purple dinosaur")
    await door.sql("INSERT INTO scheduler.moderation_rule VALUES ('dinosaur', 'gore') RETURNING 1")
    door.clock.pass_s(10)
    assert (await refusal(ann.reroll(job.name))).reason == "MODERATION_REJECTED"


async def test_all_violations_of_a_request_come_at_once(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(
        ann.create(
            "a fox --w 65 --h 4096 --fish --relax",
            request_id="not-a-uuid",
            tier=job_pb2.TIER_FAST,
            model="no-such-model",
        )
    )
    assert (refused.code, refused.reason) == (Code.INVALID_ARGUMENT, "INVALID_PARAMETER")
    assert refused.violations.keys() == {"request_id", "imagine.model", "--w", "--fish"}
    assert "nearest known one" in refused.violations["--fish"]
    assert "a fox" not in refused.message


async def test_a_contradiction_and_an_impossible_size_come_together(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create("a fox --w 1024 --h 4096 --relax --public", tier=job_pb2.TIER_FAST))
    assert refused.violations.keys() == {"tier", "--w", "--h"}
    assert (
        refused.violations["tier"] == "The request says fast and its prompt --relax; leave one of them out."
    )
    assert "multiples of 64 up to 960" in refused.violations["--h"]


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (job_pb2.CreateJobRequest(), {"request_id", "spec"}),
        (
            job_pb2.CreateJobRequest(variation=job_pb2.Variation(source_image="fox"), tier=9),  # type: ignore[arg-type]
            {"request_id", "variation.source_image", "tier"},
        ),
        (
            job_pb2.CreateJobRequest(reroll=job_pb2.Reroll(source_job="accounts/ann/jobs/7")),
            {"request_id", "reroll.source_job"},
        ),
        (
            job_pb2.CreateJobRequest(imagine=job_pb2.Imagine(prompt=" --seed")),
            {"request_id", "prompt", "--seed"},
        ),
    ],
)
async def test_bad_fields_of_create_job(
    door: Door, request_: job_pb2.CreateJobRequest, fields: set[str]
) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.jobs.CreateJob(request_))
    assert (refused.code, refused.reason) == (Code.INVALID_ARGUMENT, "INVALID_PARAMETER")
    assert refused.violations.keys() == fields


async def test_bad_fields_of_the_other_methods(door: Door) -> None:
    ann = await door.caller("ann")
    for call, fields in (
        (ann.get("accounts/ann"), {"name"}),
        (ann.jobs.CancelJob(job_pb2.CancelJobRequest(name="x")), {"name", "request_id"}),
        (_all(ann.watch("x", after_sequence=-1)), {"name", "after_sequence"}),
        (ann.download("accounts/ann/jobs/x/images/5"), {"name"}),
        (ann.jobs.ListFeed(job_pb2.ListFeedRequest(page_size=-1)), {"page_size"}),
        (
            ann.jobs.ListJobs(
                job_pb2.ListJobsRequest(parent="x", page_size=-1, page_token="x", states=[77])  # type: ignore[list-item]
            ),
            {"parent", "page_size", "page_token", "states"},
        ),
        (
            ann.accounts.UpdateAccount(account_pb2.UpdateAccountRequest()),
            {"request_id", "update_mask"},
        ),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (Code.INVALID_ARGUMENT, "INVALID_PARAMETER")
        assert refused.violations.keys() == fields


async def test_a_page_token_is_good_for_its_own_request_only(door: Door) -> None:
    ann = await door.caller("ann")
    for _ in range(2):
        await ann.create()
    page = await ann.jobs.ListJobs(job_pb2.ListJobsRequest(page_size=1))
    refused = await refusal(
        ann.jobs.ListJobs(
            job_pb2.ListJobsRequest(page_token=page.next_page_token, states=[job_pb2.JOB_STATE_QUEUED])
        )
    )
    assert (refused.reason, refused.violations.keys()) == ("INVALID_PARAMETER", {"page_token"})
    assert (
        await refusal(ann.jobs.ListFeed(job_pb2.ListFeedRequest(page_token=page.next_page_token)))
    ).violations


@pytest.mark.parametrize(
    "after",
    [
        {},
        [],
        {"arrival": "x"},
        {"arrival": 1.5},
        {"arrival": True},
        {"arrival": 2**70},
        {"ended_us": 1, "job": 7},
        {"ended_us": 1.5, "job": "00000000-0000-0000-0000-000000000000"},
        {"ended_us": 10**30},
    ],
)
async def test_a_forged_page_token_is_refused_and_breaks_nothing(door: Door, after: Any) -> None:
    ann = await door.caller("ann")
    for call, binding in (
        (lambda token: ann.jobs.ListJobs(job_pb2.ListJobsRequest(page_token=token)), ("ann",)),
        (lambda token: ann.jobs.ListFeed(job_pb2.ListFeedRequest(page_token=token)), ("feed",)),
    ):
        token = page_token({"after": after}, binding)
        forged = json.loads(base64.urlsafe_b64decode(token))
        forged["after"] = after
        refused = await refusal(call(base64.urlsafe_b64encode(json.dumps(forged).encode()).decode()))
        assert (refused.reason, refused.violations.keys()) == ("INVALID_PARAMETER", {"page_token"})


@pytest.mark.parametrize(
    "token", ["[" * 100_000, '{"of":' * 100_000, '"' + "1" * 5_000 + '"', "9" * 5_000, "\0"]
)
async def test_a_page_token_of_any_bytes_is_refused_and_breaks_nothing(door: Door, token: str) -> None:
    ann = await door.caller("ann")
    encoded = base64.urlsafe_b64encode(token.encode()).decode()
    for call in (
        ann.jobs.ListJobs(job_pb2.ListJobsRequest(page_token=encoded)),
        ann.jobs.ListFeed(job_pb2.ListFeedRequest(page_token=encoded)),
    ):
        refused = await refusal(call)
        assert (refused.reason, refused.violations.keys()) == ("INVALID_PARAMETER", {"page_token"})


async def test_a_job_whose_model_is_gone(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await door.sql("UPDATE scheduler.job SET spec = jsonb_set(spec, '{model}', '\"sd-9\"') RETURNING 1")
    refused = await refusal(ann.reroll(job.name))
    assert (refused.code, refused.reason) == (Code.FAILED_PRECONDITION, "IMPOSSIBLE")
    assert refused.metadata == {"missing": "model"}
    assert refused.message == f"Job {job.uid} was drawn by sd-9, which is not offered any more."


async def test_a_picture_too_large_for_every_gpu(door: Door) -> None:
    ann = await door.caller("ann")
    door.scheduler.able = abilities(most_memory_bytes=1_000_000)
    refused = await refusal(ann.create("a fox"))
    assert (refused.code, refused.reason) == (Code.FAILED_PRECONDITION, "IMPOSSIBLE")
    assert refused.metadata == {"missing": "gpu_memory"}
    assert "the largest GPU here has 0.0 GB" in refused.message
    door.scheduler.able = None
    assert (await ann.create("a fox")).uid, "while no GPU is known, nothing is impossible"


async def test_a_finished_job_is_not_cancelled(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await door.succeed(job.uid)
    refused = await refusal(ann.cancel(job.name))
    assert (refused.code, refused.reason) == (Code.FAILED_PRECONDITION, "JOB_FINISHED")
    assert refused.metadata == {"job": job.uid, "state": "succeeded"}
    assert refused.message == f"Job {job.uid} has already ended (succeeded); nothing about it can be changed."


async def test_a_request_id_with_other_content(door: Door) -> None:
    ann = await door.caller("ann")
    request_id = str(uuid.uuid4())
    job = await ann.create("a fox", request_id=request_id)
    other = await ann.create("a hare")
    await ann.cancel(other.name, request_id)  # the same id of another method is another request
    for call in (ann.create("a cat", request_id=request_id), ann.cancel(job.name, request_id)):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (Code.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
        assert refused.metadata == {"request_id": request_id}
        assert "Use a new id for a new request." in refused.violations["request_id"]


async def test_a_blocked_account(door: Door) -> None:
    ann = await door.caller("ann")
    await door.sql("UPDATE scheduler.account SET blocked = true RETURNING 1")
    refused = await refusal(ann.create())
    assert (refused.code, refused.reason) == (Code.PERMISSION_DENIED, "ACCOUNT_BLOCKED")
    assert refused.message == "This account is blocked; ask the people who run this service why."


async def test_a_picture_that_the_store_has_lost(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await door.succeed(job.uid)
    (door.artifacts / f"jobs/{job.uid}/{job.uid}_a_fox_1.png").unlink()
    refused = await refusal(ann.download(job.name))
    assert (refused.code, refused.reason) == (Code.DATA_LOSS, "PICTURE_MISSING")
    assert refused.metadata == {"file": f"{job.uid}_a_fox_1.png"}


REFUSALS = tuple(
    kind
    for module in (billing.refusals, scheduler.refusals)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Refusal) and kind is not Refusal
)

NEVER_OF_CREATE_JOB = {
    *("ACCOUNT_ERASED", "ACCOUNT_EXISTS", "ACCOUNT_PROTECTED", "ADJUSTMENT_TOO_LARGE", "ETAG_MISMATCH"),
    *("JOB_FINISHED", "JOB_NOT_FINISHED", "JOB_STARTED", "NOTHING_CHARGED", "NOTHING_TO_UNDO"),
    *("NO_REFUND_TO_UNDO", "OUTSIDE_PERIODS", "PICTURE_MISSING", "PLAN_EXISTS", "PLAN_LACKS_OVERAGE"),
    *("PLAN_NOT_SELF_SERVICE", "REFUND_SPENT", "REFUND_TOO_LARGE", "SECRET_SHOWN_ONCE", "UNKNOWN_GRANT"),
    *("UNKNOWN_KEY", "UNKNOWN_PLAN", "UNKNOWN_WORKER"),
}


def test_every_refusal_has_a_row() -> None:
    for kind in REFUSALS:
        code_of(kind.__new__(kind))


def test_every_refusal_is_counted_as_what_it_is_or_is_never_the_answer_to_a_new_job() -> None:
    counted = {reason.value.upper() for reason in SubmissionReason} - {"NONE"}
    assert counted & NEVER_OF_CREATE_JOB == set()
    assert counted | NEVER_OF_CREATE_JOB == {kind.reason for kind in REFUSALS}


async def test_what_refuses_a_job_is_what_it_is_counted_as(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    await refusal(ann.create("a fox --private"))
    await door.use_up("ben")
    await refusal(ben.create())
    for _ in range(10):
        await ann.create(tier=job_pb2.TIER_RELAX)
    await refusal(ann.create())
    counted = {
        (sample.labels["tier"], sample.labels["reason"]): sample.value
        for sample in next(iter(door.metrics.submissions.collect())).samples
        if sample.labels["outcome"] == "rejected" and sample.value
    }
    assert counted == {
        ("fast", "plan_lacks_private"): 1,
        ("fast", "fast_time_exhausted"): 1,
        ("fast", "queue_full"): 1,
    }


def test_a_caller_that_is_too_quick_is_counted_as_that() -> None:
    metrics = FrontDoorMetrics(())
    too_quick = RateLimited(sentence="Slower.", retry_after_ms=1)
    submission_refused(metrics)(job_pb2.CreateJobRequest(tier=job_pb2.TIER_RELAX), too_quick)
    labels = {"tier": "relax", "outcome": "rejected", "reason": "rate_limited"}
    assert metrics.registry.get_sample_value("darkroom_submissions_total", labels) == 1


@pytest.mark.parametrize("letter", ["x", "字", "\N{GRINNING FACE}"])
def test_details_stay_below_four_kilobytes_and_sixteen_violations(letter: str) -> None:
    violations = [FieldViolation(field=letter * 500, sentence=letter * 5_000) for _ in range(100)]
    status = status_of(InvalidRequest(violations))
    assert status.ByteSize() <= 4_096
    assert len(status.details) == 2
    assert status_of(Impossible(missing=letter * 9_000, sentence=letter * 9_000)).ByteSize() <= 4_096


async def test_a_hundred_violations_arrive_as_sixteen(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create("a fox" + "".join(f" --fish{number}" for number in range(100))))
    assert len(refused.violations) == 16
    assert any("more" in sentence for sentence in refused.violations.values())


async def _all(stream: object) -> list[object]:
    return [response async for response in stream]  # type: ignore[attr-defined]
