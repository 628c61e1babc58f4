"""Calls: one request id however often it is sent, repeats for UNAVAILABLE alone."""

from __future__ import annotations

import uuid

import grpc
import pytest

from billing.v1 import admin_pb2
from billing.v1.admin_pb2 import AdminAccount, ApiKey, ListPlansResponse, Plan
from billing.v1.billing_pb2 import Balance
from scheduler.client.aio import DarkroomClient, RetryPolicy
from scheduler.client.errors import (
    DarkroomError,
    JobCancelled,
    JobFailed,
    Overloaded,
    ServiceUnreachable,
    TlsFailed,
)
from scheduler.v1 import job_pb2
from scheduler.v1.account_pb2 import Account
from scheduler.v1.job_pb2 import Failure, ListFeedResponse, ListJobsResponse
from tests.client.scripted_service import BUSY, JOB, UID, Refuse, ScriptedService, a_job, an_event


async def test_an_unavailable_service_is_asked_again_under_the_same_request_id(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says("CreateJob", BUSY, BUSY, a_job())
    handle = await client.imagine("a lighthouse", tier=job_pb2.TIER_FAST)
    sent = service.asked("CreateJob")
    assert handle.id == UID
    assert [request.imagine.prompt for request in sent] == ["a lighthouse"] * 3
    assert len({request.request_id for request in sent}) == 1
    assert uuid.UUID(sent[0].request_id)


async def test_two_submissions_have_two_request_ids(service: ScriptedService, client: DarkroomClient) -> None:
    service.says("CreateJob", a_job(), a_job())
    await client.imagine("a lighthouse")
    await client.imagine("a lighthouse")
    first, second = service.asked("CreateJob")
    assert first.request_id != second.request_id


@pytest.mark.parametrize(
    "code", sorted(set(grpc.StatusCode) - {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, key=str)
)
async def test_nothing_but_unavailable_is_asked_again(
    service: ScriptedService, client: DarkroomClient, code: grpc.StatusCode
) -> None:
    service.says("CreateJob", Refuse(code=code, reason="QUEUE_FULL", retry_after_ms=10))
    with pytest.raises(DarkroomError):
        await client.imagine("a lighthouse")
    assert len(service.asked("CreateJob")) == 1


async def test_a_repeat_waits_at_least_as_long_as_the_service_asks(
    service: ScriptedService, client: DarkroomClient, pauses: list[float]
) -> None:
    patient = Refuse(code=grpc.StatusCode.UNAVAILABLE, reason="OVERLOADED", retry_after_ms=7_000)
    service.says("GetJob", patient, BUSY, a_job())
    await client.get(UID)
    assert pauses[0] == 7.0
    assert 0.2 <= pauses[1] <= 0.4


def test_pauses_double_up_to_a_limit_and_are_spread() -> None:
    policy = RetryPolicy(first_ms=200, longest_ms=5_000)
    assert [policy.delay_ms(repeat, None, 1.0) for repeat in range(1, 8)] == [
        200,
        400,
        800,
        1600,
        3200,
        5000,
        5000,
    ]
    assert policy.delay_ms(1, None, 0.0) == 100
    assert policy.delay_ms(9, 60_000, 0.0) == 60_000


async def test_patience_ends(service: ScriptedService, client: DarkroomClient) -> None:
    service.says("GetJob", *[BUSY] * 5)
    with pytest.raises(Overloaded, match="The database is away"):
        await client.get(UID)
    assert len(service.asked("GetJob")) == 5


async def test_nobody_at_the_address_is_said_with_the_address_and_what_to_check() -> None:
    async def pause(_: float) -> None:
        return

    async with DarkroomClient("127.0.0.1:1", "dk_ada_secret", pause=pause) as client:
        with pytest.raises(ServiceUnreachable) as caught:
            await client.get(UID)
    assert "127.0.0.1:1" in str(caught.value)
    assert "darkroom serve" in str(caught.value)


async def test_every_call_carries_the_key(service: ScriptedService, client: DarkroomClient) -> None:
    service.says("GetJob", a_job())
    service.says("WatchJob", [an_event(1, job_pb2.JOB_STATE_SUCCEEDED)])
    await client.get(UID)
    async for _ in client.watch(UID):
        pass
    assert [each["authorization"] for each in service.metadata] == ["Bearer dk_ada_secret"] * 2


async def test_a_key_never_travels_in_plain_text_beyond_loopback_unasked(service: ScriptedService) -> None:
    port = service.address.rpartition(":")[2]
    retries = RetryPolicy(times=0)
    # 0.0.0.0 reaches the scripted service, which speaks plain text, but is not written like loopback.
    async with DarkroomClient(f"0.0.0.0:{port}", "dk_ada_secret", retries=retries) as client:
        with pytest.raises(TlsFailed, match="does not speak TLS"):
            await client.get(UID)
    assert service.metadata == []
    service.says("GetJob", a_job())
    async with DarkroomClient(f"0.0.0.0:{port}", "dk_ada_secret", plain_text=True) as client:
        await client.get(UID)


async def test_jobs_are_named_by_id_or_by_resource_name(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says("GetJob", a_job(), a_job(), a_job())
    for text in (UID, JOB, f"{JOB}/images/3"):
        await client.get(text)
    assert [request.name for request in service.asked("GetJob")] == [f"accounts/-/jobs/{UID}", JOB, JOB]
    with pytest.raises(ValueError, match="'lighthouse' is not a job"):
        await client.get("lighthouse")


async def test_variations_and_rerolls_name_their_source(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says("CreateJob", a_job(), a_job())
    await client.vary(UID, 3, visibility=job_pb2.VISIBILITY_PRIVATE)
    await client.reroll(JOB, tier=job_pb2.TIER_RELAX)
    variation, reroll = service.asked("CreateJob")
    assert variation.variation.source_image == f"accounts/-/jobs/{UID}/images/3"
    assert variation.visibility == job_pb2.VISIBILITY_PRIVATE
    assert reroll.reroll.source_job == JOB
    assert reroll.tier == job_pb2.TIER_RELAX
    with pytest.raises(ValueError, match="no picture 5"):
        await client.vary(UID, 5)


async def test_validate_creates_nothing(service: ScriptedService, client: DarkroomClient) -> None:
    service.says("CreateJob", a_job())
    await client.validate("a lighthouse")
    assert service.asked("CreateJob")[0].validate_only


async def test_lists_ask_for_pages_as_they_are_needed(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says(
        "ListJobs",
        ListJobsResponse(jobs=[a_job(), a_job()], next_page_token="more"),
        ListJobsResponse(jobs=[a_job()]),
    )
    service.says("ListFeed", ListFeedResponse(jobs=[a_job()], next_page_token="more"))
    listed = [job async for job in client.jobs(states=[job_pb2.JOB_STATE_QUEUED], page_size=2)]
    assert len(listed) == 3
    assert [request.page_token for request in service.asked("ListJobs")] == ["", "more"]
    assert service.asked("ListJobs")[1].states == [job_pb2.JOB_STATE_QUEUED]
    async for _ in client.feed():
        break
    assert len(service.asked("ListFeed")) == 1


async def test_an_account_changes_in_what_is_given_and_nothing_else(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says("UpdateAccount", Account(), Account())
    await client.update_account(mode=job_pb2.TIER_RELAX)
    await client.update_account(overage_allowed=False, spend_cap_micros=0)
    mode, overage = service.asked("UpdateAccount")
    assert (list(mode.update_mask.paths), mode.account.mode) == (["mode"], job_pb2.TIER_RELAX)
    assert list(overage.update_mask.paths) == ["overage_allowed", "spend_cap_micros"]
    assert mode.request_id != overage.request_id


async def test_admin_calls_carry_reason_and_request_id(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says("CreateAccount", AdminAccount(name="accounts/ada"))
    service.says("CreateApiKey", ApiKey(secret="dk_x_y"))
    service.says("ListPlans", ListPlansResponse(plans=[Plan(name="plans/basic", etag="7")]))
    service.says("UpdatePlan", Plan())
    service.says("AdjustBalance", Balance())
    service.says("GetBalance", Balance(available_ms=5))
    await client.create_account(plan="Basic", account_id="ada", reason="new")
    await client.create_api_key("ada", role=admin_pb2.ROLE_USER, reason="new")
    (plan,) = await client.plans()
    await client.update_plan(plan, effective_from=admin_pb2.EFFECTIVE_FROM_NOW, reason="new")
    await client.adjust_balance("ada", amount_ms=-60_000, reason="new")
    assert (await client.balance()).available_ms == 5
    methods = ("CreateAccount", "CreateApiKey", "UpdatePlan", "AdjustBalance")
    sent = [service.asked(method)[0] for method in methods]
    assert [request.reason for request in sent] == ["new"] * 4
    assert len({request.request_id for request in sent}) == 4
    assert sent[0].plan == "plans/basic"
    assert sent[1].account == "accounts/ada"
    assert sent[2].plan.etag == "7"
    assert sent[3].amount_ms == -60_000


async def test_a_result_is_the_finished_job_with_its_receipt(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says("CreateJob", a_job())
    done = an_event(3, job_pb2.JOB_STATE_SUCCEEDED, receipt=job_pb2.Receipt(gpu_ms=3_400))
    service.says("WatchJob", [an_event(1, job_pb2.JOB_STATE_QUEUED), done])
    handle = await client.imagine("a lighthouse")
    assert handle.receipt is None
    assert (await handle.result()).state == job_pb2.JOB_STATE_SUCCEEDED
    assert handle.receipt is not None
    assert handle.receipt.gpu_ms == 3_400


async def test_a_job_that_failed_or_was_cancelled_has_no_result(
    service: ScriptedService, client: DarkroomClient
) -> None:
    failure = Failure(reason="OUT_OF_MEMORY", sentence="The GPU had no memory left.")
    service.says("GetJob", a_job(state=job_pb2.JOB_STATE_FAILED, failure=failure))
    service.says("GetJob", a_job(state=job_pb2.JOB_STATE_RUNNING))
    service.says("CancelJob", a_job(state=job_pb2.JOB_STATE_CANCELLED))
    failed = await client.handle(UID)
    with pytest.raises(JobFailed, match="no memory left") as caught:
        await failed.result()
    assert caught.value.job.failure.reason == "OUT_OF_MEMORY"
    cancelled = await client.handle(UID)
    await cancelled.cancel()
    with pytest.raises(JobCancelled):
        await cancelled.result()
