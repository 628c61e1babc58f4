"""A waiting job moved to the other tier, explained, and estimated on other terms."""

from __future__ import annotations

import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from scheduler.answers import Explained, Outlook
from scheduler.policy.explain import Before, Bound, Explanation, Place, Stage
from scheduler.policy.ids import JobId, Tier
from scheduler.store.accounts import Role
from scheduler.updates import QueueReason, QueueStatus, StartTimes
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Door, abilities, refusal

FAST, RELAX = job_pb2.TIER_FAST, job_pb2.TIER_RELAX
Code = grpc.StatusCode


async def test_a_waiting_job_moves_to_fast_at_the_price_of_fast(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    door.scheduler.told_jobs.clear()
    moved = await ann.move(job.name, FAST)
    assert (moved.tier, moved.charge_mode) == (FAST, job_pb2.CHARGE_MODE_FAST)
    assert moved.price.billed_gpu_ms == moved.price.predicted_gpu_ms > 0
    assert moved.event_sequence > job.event_sequence
    assert moved.create_time == job.create_time
    assert door.scheduler.told_jobs == [job.uid]
    assert await door.sql("SELECT sentence FROM scheduler.job_event ORDER BY seq DESC LIMIT 1") == (
        "Moved to fast by its owner."
    )


async def test_the_answer_to_a_move_says_nothing_of_the_place_in_the_tier_before(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    door.scheduler.statuses[job.uid] = QueueStatus(
        reason=QueueReason.WAITING_FOR_GPU, sentence="Number 12 in relax.", position=12
    )
    request_id = str(uuid.uuid4())
    moved = await ann.move(job.name, FAST, request_id)
    assert (moved.queue_status.position, "relax" in moved.queue_status.sentence) == (0, False)
    again = await ann.move(job.name, FAST, request_id)
    assert again.queue_status.position == 12, "a repeat asks the scheduler, which may have heard by now"


@pytest.mark.parametrize("to", [FAST, RELAX])
async def test_a_job_begins_anew_in_its_new_tier(door: Door, to: job_pb2.Tier) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax" if to == FAST else "a fox --fast")
    await door.sql("""UPDATE scheduler.job SET checkpoint = '{"step": 3}' RETURNING 1""")
    await ann.move(job.name, to)
    assert await door.sql("SELECT checkpoint FROM scheduler.job") is None


async def test_a_cancelled_job_keeps_no_checkpoint(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    await door.sql("""UPDATE scheduler.job SET checkpoint = '{"step": 3}' RETURNING 1""")
    await ann.cancel(job.name)
    assert await door.sql("SELECT checkpoint FROM scheduler.job") is None


async def test_a_moved_job_is_found_by_the_sweep_if_nobody_was_told(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    await door.sql("UPDATE scheduler.job SET noticed_epoch = 7 RETURNING 1")
    await ann.move(job.name, FAST)
    assert await door.sql("SELECT noticed_epoch FROM scheduler.job") == 0


async def test_a_waiting_job_moves_to_relax_and_costs_nothing(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --fast")
    await door.use_up("ann")
    moved = await ann.move(job.name, RELAX)
    assert (moved.tier, moved.charge_mode) == (RELAX, job_pb2.CHARGE_MODE_RELAX)
    assert moved.price.billed_gpu_ms == 0


async def test_a_move_to_where_it_is_changes_nothing(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    assert (await ann.move(job.name, RELAX)).event_sequence == job.event_sequence


async def test_a_repeated_move_is_not_done_again(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    request_id = str(uuid.uuid4())
    await ann.move(job.name, FAST, request_id)
    await ann.move(job.name, RELAX)
    assert (await ann.move(job.name, FAST, request_id)).tier == RELAX, "as it is now"
    refused = await refusal(ann.move(job.name, RELAX, request_id))
    assert refused.reason == "REQUEST_ID_REUSED"


async def test_fast_needs_funds_when_moving_as_when_submitting(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    await door.leave("ann", 1)
    refused = await refusal(ann.move(job.name, FAST))
    assert (refused.code, refused.reason) == (Code.RESOURCE_EXHAUSTED, "FAST_TIME_EXHAUSTED")
    assert (await ann.get(job.name)).tier == RELAX
    assert door.metrics.registry.get_sample_value(
        "darkroom_billing_rejections_total", {"plan": "standard", "reason": "fast_time_exhausted"}
    )
    await ann.update(overage_allowed=True)
    moved = await ann.move(job.name, FAST)
    assert moved.charge_mode == job_pb2.CHARGE_MODE_METERED_FAST
    assert moved.price.amount_micros > 0


async def test_two_moves_cannot_both_count_on_the_same_time(door: Door) -> None:
    ann = await door.caller("ann")
    first, second = await ann.create("a fox --relax"), await ann.create("a hare --relax")
    await door.leave("ann", first.price.predicted_gpu_ms)
    await ann.move(first.name, FAST)
    assert (await refusal(ann.move(second.name, FAST))).reason == "FAST_TIME_EXHAUSTED"


async def test_only_a_waiting_job_is_moved(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    await door.start(job.uid)
    refused = await refusal(ann.move(job.name, FAST))
    assert (refused.code, refused.reason) == (Code.FAILED_PRECONDITION, "JOB_STARTED")
    assert refused.metadata == {"job": job.uid}
    await door.succeed(job.uid)
    refused = await refusal(ann.move(job.name, FAST))
    assert (refused.code, refused.reason) == (Code.FAILED_PRECONDITION, "JOB_FINISHED")


async def test_nobody_moves_or_estimates_the_job_of_another(door: Door) -> None:
    ann, moderator = await door.caller("ann"), await door.caller("bob", role=Role.MODERATOR)
    job = await ann.create("a fox --relax")
    for call in (moderator.move(job.name, FAST), moderator.estimate(name=job.name)):
        assert (await refusal(call)).reason == "NOT_FOUND_OR_NOT_YOURS"


async def test_only_the_tier_can_be_changed(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    for paths in ([], ["prompt"], ["tier", "visibility"]):
        request = job_pb2.UpdateJobRequest(
            job=job_pb2.Job(name=job.name),
            update_mask=FieldMask(paths=paths),
            request_id=str(uuid.uuid4()),
        )
        refused = await refusal(ann.jobs.UpdateJob(request))
        assert set(refused.violations) == {"update_mask", "job.tier"}


async def test_an_explanation_shows_what_the_order_compares_and_when_it_starts(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    door.scheduler.explanations[job.uid] = Explained(
        at_ms=5_000,
        explanation=an_explanation(
            job.uid,
            place=Place(
                position=3, of=9, tag=12_345_678, served=9_000_000, used_per_weight_ms=60_000.4, memory=2_000
            ),
            before=Before(own=False, earlier=1, running=2, parked=1, fast_waiting=4, soonest_end_ms=7_500),
            bound=Bound(within_ms=120_000, newcomer_ms=4_000, whatever_ms=None, gpus=2, calm_ms=90_000),
            sentences=("Two accounts have used less.",),
        ),
        status=QueueStatus(
            reason=QueueReason.WAITING_FOR_GPU,
            sentence="Number 3 of 9.",
            position=3,
            start=StartTimes(p50_ms=20_000, p90_ms=60_000),
        ),
    )
    told = await ann.jobs.ExplainJob(job_pb2.ExplainJobRequest(name=job.name))
    assert (told.job, told.state, told.tier) == (job.name, job_pb2.JOB_STATE_QUEUED, RELAX)
    assert list(told.sentences) == ["Two accounts have used less."]
    assert (told.queue_status.position, told.queue_status.start_p50_ms) == (3, 20_000)
    assert told.queue_status.start_p90_ms == 60_000
    assert told.place == job_pb2.Place(
        position=3, of=9, tag_ms=12_345, served_ms=9_000, memory_ms=2, used_ms=60_000
    )
    assert told.ahead == job_pb2.Ahead(
        earlier_jobs=1, running=2, parked=1, fast_waiting=4, soonest_end_ms=2_500
    )
    assert told.bound == job_pb2.WaitBound(within_ms=120_000, newcomer_ms=4_000, gpus=2, calm_ms=90_000)
    assert not told.bound.HasField("whatever_ms")
    assert not told.HasField("end_ms")


def an_explanation(job_id: str, **fields: Any) -> Explanation:
    nothing = dict.fromkeys(("place", "before", "bound", "started_ms", "ends_ms", "parked_since_ms"))
    return Explanation(
        **{
            "job_id": JobId(job_id),
            "tier": Tier.RELAX,
            "stage": Stage.WAITING,
            "gates": (),
            "parks": 0,
            "sentences": (),
            **nothing,
            **fields,
        }
    )


async def test_a_running_job_is_explained_by_why_it_started_and_when_it_ends(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    await door.start(job.uid)
    door.scheduler.explanations[job.uid] = Explained(
        at_ms=5_000,
        explanation=an_explanation(job.uid, stage=Stage.RUNNING, ends_ms=6_000, sentences=("It runs.",)),
        status=None,
    )
    told = await ann.jobs.ExplainJob(job_pb2.ExplainJobRequest(name=job.name))
    assert list(told.sentences) == ["It runs.", "It was next."]
    assert told.end_ms == 1_000
    assert not told.HasField("queue_status")


async def test_a_job_the_scheduler_does_not_know_is_explained_by_what_the_rows_say(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    waiting = await ann.jobs.ExplainJob(job_pb2.ExplainJobRequest(name=job.name))
    assert list(waiting.sentences) == [waiting.queue_status.sentence]
    assert not waiting.HasField("place")
    assert not waiting.HasField("bound")
    await door.start(job.uid)
    running = await ann.jobs.ExplainJob(job_pb2.ExplainJobRequest(name=job.name))
    assert list(running.sentences) == ["It was next."]
    assert not running.HasField("queue_status")
    await door.succeed(job.uid)
    ended = await ann.jobs.ExplainJob(job_pb2.ExplainJobRequest(name=job.name))
    assert (ended.state, list(ended.sentences)) == (
        job_pb2.JOB_STATE_SUCCEEDED,
        ["It was next.", "It ended."],
    )


async def test_a_job_that_was_parked_is_explained_by_why_it_first_started_and_why_it_went_on(
    door: Door,
) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    await door.start(job.uid)
    async with door.pool.transaction() as connection:
        for sentence in ("A fast job took its GPU.", "The fast job has ended."):
            await door.event(connection, job.uid, "running", sentence)
    told = await ann.jobs.ExplainJob(job_pb2.ExplainJobRequest(name=job.name))
    assert list(told.sentences) == ["It was next.", "Since then: The fast job has ended."]
    await door.succeed(job.uid)
    told = await ann.jobs.ExplainJob(job_pb2.ExplainJobRequest(name=job.name))
    assert list(told.sentences) == ["It was next.", "Since then: The fast job has ended.", "It ended."]


async def test_a_parked_job_says_so(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    await door.start(job.uid)
    await door.sql("UPDATE scheduler.attempt SET parked_at = now() RETURNING 1")
    parked = await ann.get(job.name)
    assert (parked.state, parked.queue_status.reason) == (
        job_pb2.JOB_STATE_RUNNING,
        job_pb2.QUEUE_REASON_PARKED,
    )
    (listed,) = (await ann.jobs.ListJobs(job_pb2.ListJobsRequest())).jobs
    assert listed.queue_status == parked.queue_status


async def test_an_estimate_says_price_start_and_effect_in_both_tiers(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    door.scheduler.outlooks = {
        Tier.RELAX: Outlook(start=StartTimes(p50_ms=50, p90_ms=90), delayed_jobs=0, delayed_ms=0),
        Tier.FAST: Outlook(start=None, delayed_jobs=4, delayed_ms=16_000),
    }
    relax, fast = await ann.estimate(name=job.name)
    assert (relax.tier, relax.plan, relax.present) == (RELAX, "plans/standard", True)
    assert (relax.start_p50_ms, relax.start_p90_ms, relax.delayed_jobs) == (50, 90, 0)
    assert (fast.tier, fast.present, fast.delayed_jobs, fast.delayed_ms) == (FAST, False, 4, 16_000)
    assert not fast.HasField("start_p50_ms")
    assert fast.price.billed_gpu_ms > relax.price.billed_gpu_ms == 0
    assert [(what_if.job_id, what_if.tier) for what_if in door.scheduler.asked] == [
        (job.uid, Tier.RELAX),
        (job.uid, Tier.FAST),
    ]
    assert (await ann.get(job.name)).tier == RELAX, "nothing is changed"


async def test_an_estimate_of_a_job_that_is_not_there(door: Door) -> None:
    ann = await door.caller("ann")
    create = job_pb2.CreateJobRequest(imagine=job_pb2.Imagine(prompt="a fox --w 512 --h 512"), tier=RELAX)
    relax, fast = await ann.estimate(create=create)
    assert (relax.present, fast.present) == (True, False)
    assert not relax.HasField("delayed_jobs"), "what the scheduler does not say is not shown as none"
    assert {(asked.job_id, asked.width, asked.predicted_ms) for asked in door.scheduler.asked} == {
        (None, 512, fast.price.predicted_gpu_ms)
    }
    assert await door.sql("SELECT count(*) FROM scheduler.job") == 0


async def test_an_estimate_shows_the_refusal_that_an_option_would_meet(door: Door) -> None:
    ann = await door.caller("ann")
    await door.use_up("ann")
    create = job_pb2.CreateJobRequest(imagine=job_pb2.Imagine(prompt="a fox"))
    relax, fast = await ann.estimate(create=create)
    assert not relax.HasField("refusal")
    assert fast.refusal.reason == "FAST_TIME_EXHAUSTED"
    assert not fast.HasField("price")
    assert [asked.tier for asked in door.scheduler.asked] == [Tier.RELAX]


async def test_a_waiting_fast_job_does_not_stand_in_its_own_way(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --fast")
    await door.leave("ann", job.price.billed_gpu_ms)
    _, fast = await ann.estimate(name=job.name)
    assert (fast.present, fast.HasField("refusal")) == (True, False)


async def test_an_estimate_with_another_plan(door: Door) -> None:
    ann = await door.caller("ann", plan="basic")
    job = await ann.create("a fox --relax")
    options = await ann.estimate(name=job.name, plan="plans/pro")
    assert [(option.plan, option.tier, option.present) for option in options] == [
        ("plans/basic", RELAX, True),
        ("plans/basic", FAST, False),
        ("plans/pro", RELAX, False),
        ("plans/pro", FAST, False),
    ]
    plans = [what_if.plan for what_if in door.scheduler.asked]
    assert plans[:2] == [None, None]
    assert plans[2] is not None
    assert plans[2].weight_milli > 0
    refused = await refusal(ann.estimate(name=job.name, plan="plans/gold"))
    assert (refused.code, refused.reason) == (Code.NOT_FOUND, "UNKNOWN_PLAN")


async def test_a_price_is_that_of_the_gpus_there_are(door: Door) -> None:
    await door.plan("club", gpu_class_bp={"H200": 30_000, "L4": 5_000})
    ann = await door.caller("ann", plan="club")
    for devices, sentence, billed_ms in (
        (
            {"H200", "L4"},
            "About 2 to 12 s of fast time from your plan club, depending on the type of GPU;",
            12_000,
        ),
        ({"L4"}, "About 2 s of fast time from your plan club;", 2_000),
        ({"H200"}, "About 12 s of fast time from your plan club;", 12_000),
    ):
        door.scheduler.able = abilities(devices=frozenset(devices))
        job = await ann.create("a fox --fast")
        assert job.price.sentence == f"{sentence} what is charged is measured."
        assert job.price.billed_gpu_ms == billed_ms
    assert (await ann.get(job.name)).price == job.price

    await door.leave("ann", 12_000 + 2_000 + 12_000 + 11_999)
    _, fast = await ann.estimate(name=(await ann.create("a hare --relax")).name)
    assert fast.refusal.reason == "FAST_TIME_EXHAUSTED", "what waits counts as dear as it may be"
    await ann.update(overage_allowed=True)
    door.scheduler.able = abilities(devices=frozenset({"H200", "L4"}))
    metered = await ann.create("an owl --fast")
    assert metered.price.sentence == (
        "Your plan's fast time is used up, and you allow overage. About 2 to 12 s of fast time at "
        "0.0667 USD a GPU-minute: about 0.0022 USD to 0.0133 USD, depending on the type of GPU; "
        "what is charged is measured."
    )
    assert metered.price.amount_micros == 13_334


async def test_a_full_queue_refuses_what_is_not_there_but_not_what_is(door: Door) -> None:
    ann = await door.caller("ann")
    jobs = [await ann.create("a fox --relax") for _ in range(10)]
    create = job_pb2.CreateJobRequest(imagine=job_pb2.Imagine(prompt="a fox"))
    assert {option.refusal.reason for option in await ann.estimate(create=create)} == {"QUEUE_FULL"}
    assert {option.refusal.reason for option in await ann.estimate(name=jobs[0].name)} == {""}


@pytest.mark.parametrize("fields", [{}, {"name": "x"}, {"plan": "gold"}])
async def test_an_estimate_needs_to_know_of_what(door: Door, fields: dict[str, str]) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.estimate(**fields))
    assert (refused.code, refused.reason) == (Code.INVALID_ARGUMENT, "INVALID_PARAMETER")


async def test_an_impossible_job_is_refused_and_not_estimated(door: Door) -> None:
    ann = await door.caller("ann")
    door.scheduler.able = abilities(most_memory_bytes=1)
    create = job_pb2.CreateJobRequest(imagine=job_pb2.Imagine(prompt="a fox"))
    assert (await refusal(ann.estimate(create=create))).reason == "IMPOSSIBLE"


async def test_a_watch_says_that_its_job_was_moved_and_when_it_is_parked(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox --relax")
    call = ann.watch(job.name, after_sequence=job.event_sequence)
    await ann.move(job.name, FAST)
    door.scheduler.update(job.uid, "queued")
    async for response in call:
        if response.WhichOneof("update") == "event":
            assert response.event.job.tier == FAST
            break
    await door.start(job.uid)
    for _ in range(2):
        await door.sql("UPDATE scheduler.attempt SET parked_at = now() RETURNING 1")
        door.scheduler.update(job.uid)
        async for response in call:
            if response.queue_status.reason == job_pb2.QUEUE_REASON_PARKED:
                break
        await door.sql("UPDATE scheduler.attempt SET parked_at = NULL RETURNING 1")
        door.scheduler.update(job.uid)
        door.scheduler.step(str(await door.sql("SELECT attempt_id FROM scheduler.attempt")), 5)
        async for response in call:
            if response.WhichOneof("update") == "progress":
                break
    call.cancel()
