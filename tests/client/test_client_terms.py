"""Moving, explaining and estimating jobs, and what operators see and do, from the command line."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from scheduler.client.aio import DarkroomClient
from scheduler.client.sync import DarkroomClient as SyncClient
from scheduler.client.terminal import JobView, about
from scheduler.v1 import fleet_pb2, job_pb2
from scheduler.v1.account_pb2 import Account
from scheduler.v1.fleet_pb2 import ListWorkersResponse, Queues, TierQueue, Worker, WorkerRun
from scheduler.v1.job_pb2 import (
    Estimate,
    EstimateOption,
    Explanation,
    Failure,
    ListJobsResponse,
    Price,
    QueueStatus,
    WatchJobResponse,
)
from tests.client.scripted_service import JOB, UID, Refuse, ScriptedService, a_job
from tests.client.typed_commands import darkroom, lines

STARTS = QueueStatus(sentence="Number 3.", position=3, start_p50_ms=20_400, start_p90_ms=400_000)
WHY = ("--reason", "a new fan")


def test_fast_and_relax_with_a_job_move_it_and_leave_the_account_alone(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("UpdateJob", a_job(tier=job_pb2.TIER_FAST), a_job())
    assert ["tier", "fast"] in lines(darkroom(environment, "fast", UID))
    assert ["tier", "relax"] in lines(darkroom(environment, "relax", JOB))
    fast, relax = service.asked("UpdateJob")
    assert (fast.job.name, fast.job.tier) == (f"accounts/-/jobs/{UID}", job_pb2.TIER_FAST)
    assert (relax.job.name, relax.job.tier) == (JOB, job_pb2.TIER_RELAX)
    assert [list(request.update_mask.paths) for request in (fast, relax)] == [["tier"]] * 2
    assert fast.request_id != relax.request_id
    assert service.asked("UpdateAccount") == []


def test_fast_and_relax_without_a_job_choose_the_accounts_mode(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("UpdateAccount", *[Account(name="accounts/ada", mode=job_pb2.TIER_FAST)] * 2)
    assert darkroom(environment, "fast").exit_code == 0
    assert darkroom(environment, "relax").exit_code == 0
    assert [request.account.mode for request in service.asked("UpdateAccount")] == [
        job_pb2.TIER_FAST,
        job_pb2.TIER_RELAX,
    ]
    assert service.asked("UpdateJob") == []
    assert darkroom(environment, "fast", "lighthouse").exit_code == 2


def test_a_running_job_is_not_moved(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says(
        "UpdateJob",
        Refuse(code=grpc.StatusCode.FAILED_PRECONDITION, reason="JOB_STARTED", sentence="It runs."),
    )
    result = darkroom(environment, "fast", UID)
    assert result.exit_code == 1
    assert "It runs." in result.stderr


def test_an_explanation_begins_with_its_sentences_and_then_gives_the_numbers(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    told = Explanation(
        job=JOB,
        state=job_pb2.JOB_STATE_QUEUED,
        tier=job_pb2.TIER_RELAX,
        sentences=["Two accounts have used less."],
        queue_status=STARTS,
        place=job_pb2.Place(position=3, of=9, tag_ms=12_345, served_ms=9_000),
        bound=job_pb2.WaitBound(within_ms=600_000),
    )
    service.says("ExplainJob", told)
    assert lines(darkroom(environment, "explain", UID)) == [
        ["Two accounts have used less."],
        ["state", "queued in relax"],
        ["place", "3 of 9"],
        ["starts", "in about 20 s (9 of 10 within 7 min)"],
        ["at the latest", "in 10 min"],
        ["its tag", "12.3 s"],
        ["served so far", "9.0 s"],
    ]
    running = Explanation(
        state=job_pb2.JOB_STATE_RUNNING, tier=job_pb2.TIER_FAST, sentences=["It runs."], end_ms=5_000
    )
    service.says("ExplainJob", running)
    assert lines(darkroom(environment, "explain", UID)) == [
        ["It runs."],
        ["state", "running in fast"],
        ["ends", "in about 5 s"],
    ]
    service.says("ExplainJob", told)
    document = json.loads(darkroom(environment, "explain", UID, "--json").stdout)
    assert document["queueStatus"]["startP50Ms"] == "20400"


AN_ESTIMATE = Estimate(
    options=[
        EstimateOption(
            tier=job_pb2.TIER_RELAX,
            plan="plans/basic",
            present=True,
            price=Price(sentence="Free."),
            start_p50_ms=60_000,
            start_p90_ms=90_000,
            delayed_jobs=0,
            delayed_ms=0,
        ),
        EstimateOption(
            tier=job_pb2.TIER_FAST,
            plan="plans/basic",
            price=Price(sentence="About 4 s."),
            delayed_jobs=2,
            delayed_ms=8_000,
        ),
        EstimateOption(
            tier=job_pb2.TIER_FAST,
            plan="plans/pro",
            refusal=Failure(reason="QUEUE_FULL", sentence="Your queue is full."),
        ),
    ]
)


def test_an_estimate_is_a_line_for_each_way_to_have_the_job(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("EstimateJob", AN_ESTIMATE)
    assert lines(darkroom(environment, "estimate", "a", "red", "cat", "--w", "256", "--plan", "Pro")) == [
        ["relax (as it is)", "basic", "Free.", "in about 60 s (9 of 10 within 90 s)", "nobody"],
        ["fast", "basic", "About 4 s.", "not known", "2 jobs, by 8 s together"],
        ["fast", "pro", "Your queue is full.", "never", "not known"],
    ]
    (request,) = service.asked("EstimateJob")
    assert request.create.imagine.prompt == "a red cat --w 256"
    assert request.plan == "plans/pro"


def test_an_id_is_estimated_as_the_job_it_names(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("EstimateJob", AN_ESTIMATE)
    result = darkroom(environment, "estimate", UID, "--json")
    assert len(json.loads(result.stdout)["options"]) == 3
    (request,) = service.asked("EstimateJob")
    assert request.name == f"accounts/-/jobs/{UID}"


def test_jobs_and_show_say_when_a_job_will_start_and_that_one_is_parked(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    parked = QueueStatus(reason=job_pb2.QUEUE_REASON_PARKED, sentence="A fast job has its GPU.")
    running = a_job(state=job_pb2.JOB_STATE_RUNNING, queue_status=parked)
    service.says("ListJobs", ListJobsResponse(jobs=[a_job(queue_status=STARTS), running, a_job()]))
    rows = lines(darkroom(environment, "jobs"))
    assert [(row[1], row[5]) for row in rows] == [
        ("queued", "in about 20 s (9 of 10 within 7 min)"),
        ("parked", ""),
        ("queued", ""),
    ]
    service.says("GetJob", a_job(queue_status=STARTS))
    told = ["waits because", "Number 3. (place 3) Starts in about 20 s (9 of 10 within 7 min)."]
    assert told in lines(darkroom(environment, "show", UID))


def test_a_live_line_shows_the_expected_start_and_when_its_run_is_parked() -> None:
    view = JobView(a_job(queue_status=STARTS))
    assert view.status().plain == "place 3: Number 3. Starts in about 20 s (9 of 10 within 7 min)."
    view = JobView(a_job(state=job_pb2.JOB_STATE_RUNNING))
    step = WatchJobResponse(progress=job_pb2.Progress(step=5, steps=20))
    view.apply(step)
    parked = QueueStatus(reason=job_pb2.QUEUE_REASON_PARKED, sentence="A fast job has its GPU.")
    view.apply(WatchJobResponse(queue_status=parked))
    assert view.status().plain == "A fast job has its GPU."
    view.apply(step)
    assert view.status().plain == "step 5 of 20"


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (0, "0 s"),
        (-5, "0 s"),
        (20_400, "20 s"),
        (99_400, "99 s"),
        (100_000, "2 min"),
        (5_900_000, "98 min"),
        (6_000_000, "1 h 40 min"),
        (7_200_000, "2 h"),
    ],
)
def test_expected_times_are_no_finer_than_anybody_can_know_them(ms: int, words: str) -> None:
    assert about(ms) == words


def a_run(**fields: Any) -> WorkerRun:
    defaults: dict[str, Any] = {"attempt": "a", "job": JOB, "tier": job_pb2.TIER_RELAX}
    return WorkerRun(**defaults | fields)


def test_workers_are_listed_with_what_they_have_in_hand(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    draining = Worker(name="workers/node-a/gpu-1", state=fleet_pb2.WORKER_STATE_DRAINING, sentence="New fan.")
    busy = Worker(
        name="workers/node-a/gpu-0",
        state=fleet_pb2.WORKER_STATE_RUNNING,
        active=a_run(tier=job_pb2.TIER_FAST),
        parked=[a_run()],
        device="cpu",
        speed_permille=1_500,
        memory_bytes=8 * 2**30,
        memory_bytes_used=2**30,
        warm_models=["small"],
    )
    emptying = Worker(
        name="workers/c", state=fleet_pb2.WORKER_STATE_DRAINING, active=a_run(), sentence="New fan."
    )
    service.says("ListWorkers", ListWorkersResponse(workers=[busy, draining, emptying]))
    assert lines(darkroom(environment, "admin", "workers")) == [
        [
            "node-a/gpu-0",
            "running",
            "",
            f"fast {UID}",
            f"relax {UID}",
            "cpu",
            "1.5",
            "1.0/8.0 GiB",
            "small",
            "",
        ],
        ["node-a/gpu-1", "drained", "", "", "", "", "", "", "", "New fan."],
        ["c", "draining", "", f"relax {UID}", "", "", "", "", "", "New fan."],
    ]


def test_queues_are_shown_by_tier_with_how_the_gpus_are_shared(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    queues = Queues(
        tiers=[
            TierQueue(tier=job_pb2.TIER_FAST, running=3),
            TierQueue(
                tier=job_pb2.TIER_RELAX,
                waiting=7,
                held=1,
                parked=2,
                oldest_wait_ms=90_000,
                paused=True,
                pause_reason="too hot",
            ),
        ],
        gpus=8,
        idle_gpus=1,
        fast_gpus=3,
        relax_floor_gpus=1,
        wanted_gpus=12,
    )
    service.says("GetQueues", queues, queues)
    assert lines(darkroom(environment, "admin", "queues")) == [
        ["fast", "0", "0", "3", "0", "", "open"],
        ["relax", "7", "1", "0", "2", "90 s", "paused: too hot"],
        ["GPUs", "8, 1 idle, 3 with fast, 12 wanted"],
        ["kept for relax", "1"],
    ]
    assert json.loads(darkroom(environment, "admin", "queues", "--json").stdout)["wantedGpus"] == 12


@pytest.mark.parametrize(
    ("typed", "asked_ms"), [((), None), (("--within", "60s"), 60_000), (("--within", "5m"), 300_000)]
)
def test_a_drain_may_say_how_long_it_waits(
    service: ScriptedService, environment: dict[str, str], typed: tuple[str, ...], asked_ms: int | None
) -> None:
    service.says("DrainWorker", Worker(name="workers/node-a/gpu-0", state=fleet_pb2.WORKER_STATE_DRAINING))
    darkroom(environment, "admin", "drain", "node-a/gpu-0", *WHY, *typed)
    (request,) = service.asked("DrainWorker")
    assert (request.within_ms if request.HasField("within_ms") else None) == asked_ms


def test_operators_drain_and_pause_with_a_reason_and_take_it_back(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    for method in ("DrainWorker", "ResumeWorker"):
        service.says(method, Worker(name="workers/node-a/gpu-0", state=fleet_pb2.WORKER_STATE_IDLE))
    for method in ("PauseTier", "ResumeTier"):
        service.says(method, TierQueue(tier=job_pb2.TIER_RELAX, paused=method == "PauseTier"))
    for command in (("drain", "node-a/gpu-0"), ("undrain", "workers/node-a/gpu-0")):
        assert lines(darkroom(environment, "admin", *command, *WHY))[0][0] == "node-a/gpu-0"
    for command in (("pause", "relax"), ("unpause", "relax")):
        result = darkroom(environment, "admin", *command, *WHY, "--json")
        assert json.loads(result.stdout)["tier"] == "TIER_RELAX"
    (drained,), (resumed,) = service.asked("DrainWorker"), service.asked("ResumeWorker")
    assert {drained.name, resumed.name} == {"workers/node-a/gpu-0"}
    (paused,), (opened,) = service.asked("PauseTier"), service.asked("ResumeTier")
    assert {paused.tier, opened.tier} == {job_pb2.TIER_RELAX}
    requests = [drained, resumed, paused, opened]
    assert {request.reason for request in requests} == {"a new fan"}
    assert len({request.request_id for request in requests}) == 4


@pytest.mark.parametrize("command", [["drain", "a"], ["pause", "relax"], ["pause", "slow", *WHY]])
def test_what_operators_leave_out_is_not_understood(environment: dict[str, str], command: list[str]) -> None:
    assert darkroom(environment, "admin", *command).exit_code == 2


async def test_a_handle_moves_and_explains_its_job(service: ScriptedService, client: DarkroomClient) -> None:
    service.says("GetJob", a_job())
    service.says("UpdateJob", a_job(tier=job_pb2.TIER_FAST))
    service.says("ExplainJob", Explanation(job=JOB, sentences=["It is next."]))
    handle = await client.handle(UID)
    await handle.move(job_pb2.TIER_FAST)
    assert handle.job.tier == job_pb2.TIER_FAST
    assert (await handle.explain()).sentences == ["It is next."]


def test_programs_without_an_event_loop_can_do_the_same(service: ScriptedService) -> None:
    idle = Worker(name="workers/a")
    service.says("GetJob", a_job())
    service.says("UpdateJob", a_job(), a_job())
    service.says("ExplainJob", *[Explanation(job=JOB)] * 2)
    service.says("EstimateJob", AN_ESTIMATE, AN_ESTIMATE)
    service.says("ListWorkers", ListWorkersResponse(workers=[idle]))
    service.says("DrainWorker", idle)
    service.says("ResumeWorker", idle)
    service.says("GetQueues", Queues(gpus=2))
    service.says("PauseTier", TierQueue(paused=True))
    service.says("ResumeTier", TierQueue())
    with SyncClient(service.address, "dk_ada_secret") as client:
        handle = client.handle(UID)
        assert handle.move(job_pb2.TIER_FAST).uid == client.move(UID, job_pb2.TIER_RELAX).uid == UID
        assert handle.explain().job == client.explain(UID).job == JOB
        assert client.estimate("a cat") == client.estimate_job(UID, plan="pro") == AN_ESTIMATE
        assert client.workers() == [idle]
        assert client.drain_worker("a", reason="r") == client.resume_worker("a", reason="r") == idle
        assert client.queues().gpus == 2
        assert client.pause_tier(job_pb2.TIER_FAST, reason="r").paused
        assert not client.resume_tier(job_pb2.TIER_FAST, reason="r").paused
