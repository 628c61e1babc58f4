"""What a client may do with jobs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from scheduler.store.accounts import Role
from scheduler.updates import QueueReason, QueueStatus
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Door, abilities, read_refusal, refusal


async def test_a_job_is_a_row_before_it_is_acknowledged_and_the_scheduler_is_told(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("A fox --w 256 --h 320 --seed 7 --relax")
    assert job.name == f"accounts/ann/jobs/{job.uid}"
    assert (job.state, job.tier, job.seed) == (job_pb2.JOB_STATE_QUEUED, job_pb2.TIER_RELAX, 7)
    assert (job.width, job.height, job.steps, job.model) == (256, 320, 20, "small")
    assert job.price.sentence == "Free: relax jobs cost nothing."
    assert door.scheduler.told_jobs == [job.uid]
    stored = await ann.get(job.name)
    stored.queue_status.CopyFrom(job.queue_status)
    assert stored == job
    assert await door.sql("SELECT count(*) FROM scheduler.job_event WHERE state = 'queued'") == 1


async def test_a_fast_job_says_what_it_is_expected_to_cost(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    assert job.charge_mode == job_pb2.CHARGE_MODE_FAST
    assert job.price.predicted_gpu_ms == job.price.billed_gpu_ms == 4_000
    assert (
        job.price.sentence == "About 4 s of fast time from your plan standard; what is charged is measured."
    )


async def test_a_seed_that_is_not_given_is_drawn(door: Door) -> None:
    ann = await door.caller("ann")
    one, two = await ann.create(), await ann.create()
    assert one.seed != two.seed


@pytest.mark.parametrize(
    ("mode", "flag", "field", "expected"),
    [
        (job_pb2.TIER_FAST, "", job_pb2.TIER_UNSPECIFIED, job_pb2.TIER_FAST),
        (job_pb2.TIER_RELAX, "", job_pb2.TIER_UNSPECIFIED, job_pb2.TIER_RELAX),
        (job_pb2.TIER_RELAX, " --fast", job_pb2.TIER_UNSPECIFIED, job_pb2.TIER_FAST),
        (job_pb2.TIER_FAST, "", job_pb2.TIER_RELAX, job_pb2.TIER_RELAX),
        (job_pb2.TIER_FAST, " --relax", job_pb2.TIER_RELAX, job_pb2.TIER_RELAX),
    ],
)
async def test_the_request_decides_the_tier_then_the_prompt_then_the_account(
    door: Door,
    mode: job_pb2.Tier.ValueType,
    flag: str,
    field: job_pb2.Tier.ValueType,
    expected: job_pb2.Tier.ValueType,
) -> None:
    ann = await door.caller("ann")
    await ann.update(mode=mode)
    assert (await ann.create(f"a fox{flag}", tier=field)).tier == expected


async def test_the_prompt_decides_visibility_before_the_account(door: Door) -> None:
    ann = await door.caller("ann", plan="pro")
    await ann.update(visibility=job_pb2.VISIBILITY_PRIVATE)
    assert (await ann.create()).visibility == job_pb2.VISIBILITY_PRIVATE
    assert (await ann.create("a fox --public")).visibility == job_pb2.VISIBILITY_PUBLIC
    private = await ann.create("a fox --private")
    assert private.price.billed_gpu_ms == 2 * private.price.predicted_gpu_ms


async def test_asking_only_says_price_mode_and_place_and_writes_nothing(door: Door) -> None:
    ann = await door.caller("ann")
    await ann.create("first")
    request_id = str(uuid.uuid4())
    asked = await ann.create(validate_only=True, request_id=request_id)
    assert (asked.name, asked.uid, asked.seed, asked.event_sequence) == ("", "", 0, 0)
    assert asked.charge_mode == job_pb2.CHARGE_MODE_FAST
    assert asked.price.billed_gpu_ms == 4_000
    assert asked.queue_status.position == 2
    assert asked.queue_status.sentence == "1 fast job waits now."
    assert await door.sql("SELECT count(*) FROM scheduler.job") == 1
    assert len(door.scheduler.told_jobs) == 1
    made = await ann.create(request_id=request_id)  # asking has not used up the id
    assert made.uid


async def test_the_same_request_twice_is_one_job(door: Door) -> None:
    ann = await door.caller("ann")
    request_id = str(uuid.uuid4())
    first = await ann.create(request_id=request_id)
    again = await ann.create(request_id=request_id)
    assert again.uid == first.uid
    assert again.seed == first.seed
    assert await door.sql("SELECT count(*) FROM scheduler.job") == 1
    assert door.metrics.registry.get_sample_value(
        "darkroom_submissions_total", {"tier": "fast", "outcome": "replayed", "reason": "none"}
    )


async def test_the_same_request_sent_ten_times_at_once_is_one_job(door: Door) -> None:
    ann = await door.caller("ann")
    request_id = str(uuid.uuid4())
    answers = await asyncio.gather(*(ann.create(request_id=request_id) for _ in range(10)))
    assert len({job.uid for job in answers}) == 1
    assert await door.sql("SELECT count(*) FROM scheduler.job") == 1


async def test_a_repeated_request_returns_its_job_though_it_would_be_refused_by_now(door: Door) -> None:
    ann = await door.caller("ann")
    source = await ann.create("a fox")
    await door.succeed(source.uid)

    async def send(ids: Sequence[str | None], **fields: bool) -> list[Any]:
        calls = (
            ann.create("a purple fox", request_id=ids[0], **fields),
            ann.create("a hare", request_id=ids[1], **fields),
            ann.reroll(source.name, request_id=ids[2], **fields),
            ann.vary(f"{source.name}/images/2", request_id=ids[3], **fields),
        )
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [read_refusal(a) if isinstance(a, grpc.aio.AioRpcError) else a for a in answers]

    ids = [str(uuid.uuid4()) for _ in range(4)]
    first = await send(ids)
    await door.sql("INSERT INTO scheduler.moderation_rule VALUES ('purple', 'gore') RETURNING 1")
    door.clock.pass_s(10)
    door.scheduler.able = abilities(most_memory_bytes=1)
    await door.sql(
        """UPDATE scheduler.job SET spec = jsonb_set(spec, '{model}', '"sd-9"')
           WHERE job_id = $1 RETURNING 1""",
        uuid.UUID(source.uid),
    )
    refused_by_now = ["MODERATION_REJECTED", "IMPOSSIBLE", "IMPOSSIBLE", "IMPOSSIBLE"]
    assert [answer.reason for answer in await send([None] * 4)] == refused_by_now
    assert [answer.uid for answer in await send(ids)] == [job.uid for job in first]
    # To ask what a request would meet is not to repeat it.
    assert [answer.reason for answer in await send(ids, validate_only=True)] == refused_by_now
    assert (await refusal(ann.create("a purple cat", request_id=ids[0]))).reason == "REQUEST_ID_REUSED"
    replayed = {"tier": "fast", "outcome": "replayed", "reason": "none"}
    assert door.metrics.registry.get_sample_value("darkroom_submissions_total", replayed) == 4


async def test_a_refused_request_id_can_be_used_again(door: Door) -> None:
    ann = await door.caller("ann")
    jobs = [await ann.create() for _ in range(10)]
    request_id = str(uuid.uuid4())
    assert (await refusal(ann.create(request_id=request_id))).reason == "QUEUE_FULL"
    await ann.cancel(jobs[0].name)
    assert (await ann.create(request_id=request_id)).uid


async def test_of_twenty_jobs_at_once_ten_are_accepted(door: Door) -> None:
    ann = await door.caller("ann")
    answers = await asyncio.gather(*(ann.create() for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(answer, job_pb2.Job) for answer in answers) == 10
    assert await door.sql("SELECT count(*) FROM scheduler.job") == 10


async def test_submissions_that_race_cancellations_never_exceed_the_limit(door: Door) -> None:
    ann = await door.caller("ann")
    jobs = [await ann.create() for _ in range(10)]
    answers = await asyncio.gather(
        *(ann.cancel(job.name) for job in jobs[:4]),
        *(ann.create() for _ in range(12)),
        return_exceptions=True,
    )
    cancelled, created = answers[:4], answers[4:]
    assert all(isinstance(answer, job_pb2.Job) for answer in cancelled)
    accepted = sum(isinstance(answer, job_pb2.Job) for answer in created)
    assert accepted <= 4
    assert await door.sql("SELECT count(*) FROM scheduler.job WHERE state = 'queued'") == 6 + accepted


async def test_a_job_over_the_running_limit_is_accepted_and_says_so(door: Door) -> None:
    ann = await door.caller("ann")
    waiting = [await ann.create() for _ in range(3)]
    assert {job.queue_status.reason for job in waiting} == {job_pb2.QUEUE_REASON_WAITING_FOR_GPU}
    fourth = await ann.create()
    assert fourth.state == job_pb2.JOB_STATE_QUEUED
    assert fourth.queue_status.reason == job_pb2.QUEUE_REASON_CONCURRENCY_LIMIT
    assert fourth.queue_status.sentence == (
        "Your job will start shortly. You have reached the maximum number of concurrent jobs; "
        "this one starts as soon as another finishes."
    )
    assert (await ann.get(fourth.name)).queue_status == fourth.queue_status


async def test_a_third_relax_job_waits_for_the_relax_limit(door: Door) -> None:
    ann = await door.caller("ann")
    for _ in range(2):
        await ann.create(tier=job_pb2.TIER_RELAX)
    third = await ann.create(tier=job_pb2.TIER_RELAX)
    assert third.queue_status.reason == job_pb2.QUEUE_REASON_CONCURRENCY_LIMIT


async def test_the_scheduler_s_word_on_why_a_job_waits_goes_before_our_own(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    door.scheduler.statuses[job.uid] = QueueStatus(
        reason=QueueReason.TIER_PAUSED, sentence="Fast is paused.", position=0
    )
    status = (await ann.get(job.name)).queue_status
    assert (status.reason, status.sentence) == (job_pb2.QUEUE_REASON_TIER_PAUSED, "Fast is paused.")


async def test_while_no_scheduler_leads_a_waiting_job_says_so(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    door.scheduler.ready = False
    assert (await ann.get(job.name)).queue_status.reason == job_pb2.QUEUE_REASON_SCHEDULER_STARTING


async def test_overage_that_was_agreed_to_makes_a_job_metered_and_names_the_price(door: Door) -> None:
    ann = await door.caller("ann")
    await door.use_up("ann")
    await ann.update(overage_allowed=True)
    job = await ann.create()
    assert job.charge_mode == job_pb2.CHARGE_MODE_METERED_FAST
    assert job.price.amount_micros == 4_445  # 4 s at 66,667 micros a minute, rounded up
    assert "about 0.0044 USD" in job.price.sentence


async def test_a_variation_is_drawn_from_one_picture_with_a_seed_of_its_own(door: Door) -> None:
    ann = await door.caller("ann")
    source = await ann.create("a fox --seed 7 --relax")
    await door.succeed(source.uid)
    varied = await ann.vary(f"{source.name}/images/2")
    assert varied.kind == job_pb2.JOB_KIND_VARIATION
    assert (varied.source_job, varied.source_image) == (source.name, 2)
    assert varied.seed != 7
    assert varied.tier == job_pb2.TIER_RELAX
    assert varied.price.predicted_gpu_ms == 2_500
    spec = await door.spec(varied.uid)
    assert spec.source is not None
    assert (spec.source.index, spec.source.strength_permille) == (2, 500)
    assert spec.source.latents_path == f"jobs/{source.uid}/latents.safetensors"


async def test_a_reroll_is_the_same_job_with_a_new_seed(door: Door) -> None:
    ann = await door.caller("ann")
    source = await ann.create("a fox --w 320 --h 256")
    again = await ann.reroll(source.name, tier=job_pb2.TIER_RELAX)
    assert again.kind == job_pb2.JOB_KIND_REROLL
    assert (again.prompt, again.width, again.height) == (source.prompt, 320, 256)
    assert again.seed != source.seed
    assert again.tier == job_pb2.TIER_RELAX


async def test_a_reroll_keeps_a_seed_that_its_prompt_fixes(door: Door) -> None:
    ann = await door.caller("ann")
    source = await ann.create("a fox --seed 7")
    assert (await ann.reroll(source.name)).seed == 7


async def test_what_is_made_of_a_private_job_is_private_unless_its_request_says_otherwise(door: Door) -> None:
    ann = await door.caller("ann", plan="pro")
    await ann.update(visibility=job_pb2.VISIBILITY_PRIVATE)
    of_account, of_prompt = await ann.create(), await ann.create("a fox --private")
    public = await ann.create("a fox --public")
    await ann.update(visibility=job_pb2.VISIBILITY_PUBLIC)
    of_request = await ann.create(visibility=job_pb2.VISIBILITY_PRIVATE)
    # Of a public job, made private by its request alone: its prompt still says --public.
    of_reroll = await ann.reroll(public.name, visibility=job_pb2.VISIBILITY_PRIVATE)
    for source in (of_account, of_prompt, of_request, of_reroll):
        await door.succeed(source.uid)
        rerolled, varied = await ann.reroll(source.name), await ann.vary(f"{source.name}/images/1")
        shown = await ann.reroll(source.name, visibility=job_pb2.VISIBILITY_PUBLIC)
        assert rerolled.visibility == varied.visibility == job_pb2.VISIBILITY_PRIVATE
        assert rerolled.price.billed_gpu_ms == 2 * rerolled.price.predicted_gpu_ms
        assert shown.visibility == job_pb2.VISIBILITY_PUBLIC
        for job in (rerolled, varied, shown):
            await ann.cancel(job.name)
    assert (await ann.reroll(public.name)).visibility == job_pb2.VISIBILITY_PUBLIC


async def test_a_waiting_job_is_cancelled_at_once_and_costs_nothing(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    door.scheduler.told_jobs.clear()
    cancelled = await ann.cancel(job.name)
    assert cancelled.state == job_pb2.JOB_STATE_CANCELLED
    assert cancelled.receipt.billed_gpu_ms == 0
    assert cancelled.receipt.balance_before_ms == cancelled.receipt.balance_after_ms == 54_000_000
    assert door.scheduler.told_jobs == [job.uid]
    events = [response.event.state async for response in ann.watch(job.name)]
    assert events == [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_CANCELLED]


async def test_a_running_job_is_only_asked_to_end(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await door.start(job.uid)
    cancelled = await ann.cancel(job.name)
    assert cancelled.state == job_pb2.JOB_STATE_RUNNING
    assert cancelled.cancel_requested
    assert door.scheduler.told_jobs[-1] == job.uid


async def test_a_repeated_cancellation_gets_the_first_answer(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    request_id = str(uuid.uuid4())
    first = await ann.cancel(job.name, request_id)
    assert await ann.cancel(job.name, request_id) == first


async def test_jobs_are_listed_newest_first_in_pages_that_miss_none(door: Door) -> None:
    ann = await door.caller("ann")
    made = [(await ann.create()).uid for _ in range(5)]
    listed: list[str] = []
    token = ""
    while True:
        page = await ann.jobs.ListJobs(job_pb2.ListJobsRequest(page_size=2, page_token=token))
        assert len(page.jobs) <= 2
        listed += [job.uid for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert listed == made[::-1]


async def test_jobs_are_listed_by_state(door: Door) -> None:
    ann = await door.caller("ann")
    one, two = await ann.create(), await ann.create()
    await door.succeed(one.uid)
    page = await ann.jobs.ListJobs(
        job_pb2.ListJobsRequest(parent="accounts/-", states=[job_pb2.JOB_STATE_QUEUED])
    )
    assert [job.uid for job in page.jobs] == [two.uid]


async def test_a_finished_job_has_pictures_and_a_receipt(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await door.succeed(job.uid)
    done = await ann.get(job.name)
    assert [image.name for image in done.images] == [f"{job.name}/images/{index}" for index in (1, 2, 3, 4)]
    assert done.images[0].file_name.startswith(job.uid)
    assert (done.receipt.gpu_ms, done.receipt.attempts) == (4_000, 1)
    assert done.receipt.reproduction_json == '{"model": "small"}'
    assert not done.HasField("queue_status")


async def test_moderators_see_the_jobs_of_others_and_cannot_cancel_them(door: Door) -> None:
    ann = await door.caller("ann", plan="pro")
    mod = await door.caller("mod", role=Role.MODERATOR)
    job = await ann.create("a fox --private")
    await door.succeed(job.uid)
    assert (await mod.get(job.name)).uid == job.uid
    assert len(await mod.download(job.name)) == 4
    listed = await mod.jobs.ListJobs(job_pb2.ListJobsRequest(parent="accounts/ann"))
    assert len(listed.jobs) == 1
    assert [response.event.state async for response in mod.watch(job.name)][-1] == job_pb2.JOB_STATE_SUCCEEDED
    assert (await refusal(mod.cancel(job.name))).reason == "NOT_FOUND_OR_NOT_YOURS"


async def test_a_job_can_be_named_without_its_account(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    assert (await ann.get(f"accounts/-/jobs/{job.uid.upper()}")).uid == job.uid


async def test_submissions_are_counted_by_what_became_of_them(door: Door) -> None:
    ann = await door.caller("ann")
    await ann.create()
    await refusal(ann.create("a fox --fish", tier=job_pb2.TIER_RELAX))
    await refusal(door.with_secret("", "dk_none").create())
    count = door.metrics.registry.get_sample_value
    for tier, outcome, reason in (
        ("fast", "accepted", "none"),
        ("relax", "rejected", "invalid_parameter"),
        ("fast", "rejected", "unauthenticated"),
    ):
        labels = {"tier": tier, "outcome": outcome, "reason": reason}
        assert count("darkroom_submissions_total", labels) == 1, labels


async def test_calls_are_counted_and_timed_under_the_usual_names(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await refusal(ann.get("nonsense"))
    await door.succeed(job.uid)
    await ann.download(job.name)
    count = door.metrics.registry.get_sample_value
    get = {"grpc_type": "unary", "grpc_service": "scheduler.v1.JobService", "grpc_method": "GetJob"}
    assert count("grpc_server_started_total", get) == 1
    assert count("grpc_server_handled_total", {**get, "grpc_code": "InvalidArgument"}) == 1
    download = {**get, "grpc_type": "server_stream", "grpc_method": "DownloadImages"}
    assert count("grpc_server_handled_total", {**download, "grpc_code": "OK"}) == 1
    assert count("grpc_server_msg_sent_total", download) == 8
    timed = {"grpc_service": "scheduler.v1.JobService", "grpc_method": "GetJob"}
    assert count("grpc_server_handling_seconds_count", timed) == 1


async def test_a_bug_of_ours_tells_the_caller_an_id_and_nothing_else(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    await door.sql("UPDATE scheduler.job SET spec = '{}' RETURNING true")
    refused = await refusal(ann.get(job.name))
    assert refused.code is grpc.StatusCode.INTERNAL
    assert refused.reason == "INTERNAL"
    assert refused.metadata["error_id"] in refused.message
    assert "source" not in refused.message
