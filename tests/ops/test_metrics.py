"""The catalogue keeps its rules, and the few calculations behind a metric are right."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from gpu_worker.contract import Blame, GpuTime, Outcome, StageTimes, WorkerReport
from scheduler.metrics import (
    AdminAction,
    AdminResult,
    FrontDoorMetrics,
    GpuTimeAccount,
    RequeueReason,
    RollingPeak,
    SchedulerMetrics,
    SubmissionOutcome,
    SubmissionReason,
    WorkerState,
)
from scheduler.policy.ids import Tier

PLANS = ("basic", "standard", "pro")
MODELS = ("stand-in", "sdxl")

# The two texts of a cell with three plans and two models stay below the 2,000 series of the catalogue.
_SERIES_BUDGET = 1_700


@pytest.fixture
def front_door() -> FrontDoorMetrics:
    return FrontDoorMetrics.create(PLANS)


@pytest.fixture
def scheduler() -> SchedulerMetrics:
    return SchedulerMetrics.create(PLANS, MODELS, now_ms=0)


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(text: str, name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, f"{name} {labels}: {found}"
    return found[0]


def a_report(worker_id: str = "node-a/gpu-0", incarnation: str = "first", **gpu_time: int) -> WorkerReport:
    return WorkerReport(
        worker_id=worker_id,
        incarnation=incarnation,
        pid=4711,
        release="0.1.0",
        epoch=1,
        device="cpu",
        speed_permille=1000,
        memory_bytes=8_000,
        memory_used_bytes=3_000,
        warm_models=(),
        active=None,
        unacknowledged=(),
        gpu_time=GpuTime(**gpu_time),
    )


def test_the_two_texts_share_no_family(front_door: FrontDoorMetrics, scheduler: SchedulerMetrics) -> None:
    both = families(front_door.exposition()).keys() & families(scheduler.exposition()).keys()
    assert both == set()


def test_every_family_has_the_prefix_a_help_text_and_base_units(
    front_door: FrontDoorMetrics, scheduler: SchedulerMetrics
) -> None:
    for family in families(front_door.exposition() + scheduler.exposition()).values():
        assert re.match(r"darkroom_|grpc_server_|process_|python_gc_", family.name), family.name
        assert family.documentation, family.name
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb)(_|$)", family.name), family.name


def test_no_label_names_a_person_a_job_or_a_process(
    front_door: FrontDoorMetrics, scheduler: SchedulerMetrics
) -> None:
    scheduler.worker_heard(a_report(), now_ms=1)
    labels = {
        label
        for family in families(front_door.exposition() + scheduler.exposition()).values()
        for sample in family.samples
        for label in sample.labels
    }
    assert labels <= {
        *(
            "tier",
            "plan",
            "model",
            "worker",
            "outcome",
            "reason",
            "blame",
            "state",
            "stage",
            "result",
            "percent",
        ),
        *("residency", "where", "use", "kind", "action", "le"),
        *("grpc_type", "grpc_service", "grpc_method", "grpc_code"),
        *("version", "commit", "python", "ray", "torch", "protobuf", "generation"),
    }


def test_known_label_sets_start_at_zero_and_the_series_stay_within_the_budget(
    front_door: FrontDoorMetrics, scheduler: SchedulerMetrics
) -> None:
    samples = [
        sample
        for family in families(front_door.exposition() + scheduler.exposition()).values()
        for sample in family.samples
    ]
    assert len(samples) < _SERIES_BUDGET
    ours = [
        s for s in samples if s.name.startswith(("darkroom_", "grpc_")) and s.name != "darkroom_build_info"
    ]
    assert {s.value for s in ours} == {0.0}

    front_door.job_submitted(tier=Tier.FAST, outcome=SubmissionOutcome.ACCEPTED)
    for reason in set(SubmissionReason) - {SubmissionReason.NONE}:
        front_door.job_submitted(tier=Tier.RELAX, outcome=SubmissionOutcome.REJECTED, reason=reason)
    for action in AdminAction:
        front_door.admin_acted(action=action, result=AdminResult.DONE)
    for tier in Tier:
        scheduler.queue_seen(tier=tier, queued=1, running=1, oldest_ms=1, now_ms=1)
        scheduler.attempt_started(tier=tier, warm=True)
        scheduler.job_started(tier=tier, waited_ms=5)
        times = StageTimes(encode_ms=1, denoise_ms=1, decode_ms=1, upscale_ms=1)
        scheduler.attempt_ended(tier=tier, model="sdxl", run_ms=3, load_ms=1, times=times)
        scheduler.job_ended(tier=tier, outcome=Outcome.SUCCEEDED)
        scheduler.job_ended(tier=tier, outcome=Outcome.FAILED, blame=Blame.PLATFORM)
    scheduler.cycle_ended(took_ns=1, now_ms=1)
    scheduler.job_requeued(RequeueReason.WORKER_LOST)
    scheduler.fleet_seen({WorkerState.IDLE: 1})
    scheduler.settled(plan="pro", billed_ms=1, released_ms=1)
    scheduler.holds_seen(holds=1, held_ms=1)
    after = families(front_door.exposition() + scheduler.exposition()).values()
    assert sum(len(family.samples) for family in after) == len(samples), (
        "an event made a series that was not there"
    )


def test_every_method_of_the_api_is_known_before_its_first_call(front_door: FrontDoorMetrics) -> None:
    text = front_door.exposition()
    watch = {"grpc_service": "scheduler.v1.JobService", "grpc_method": "WatchJob"}
    assert value(text, "grpc_server_started_total", grpc_type="server_stream", **watch) == 0
    assert value(text, "grpc_server_handled_total", grpc_code="Unavailable", **watch) == 0
    handled = families(text)["grpc_server_handling_seconds"].samples
    methods = {sample.labels["grpc_method"] for sample in handled}
    assert "CreateJob" in methods
    assert "WatchJob" not in methods, "how long a stream was open is not how fast it was answered"


def test_the_limits_of_the_objectives_are_bucket_edges(scheduler: SchedulerMetrics) -> None:
    scheduler.job_started(tier=Tier.FAST, waited_ms=30_000)
    scheduler.job_started(tier=Tier.RELAX, waited_ms=1_800_001)
    text = scheduler.exposition()
    bucket = "darkroom_job_queue_wait_seconds_bucket"
    assert value(text, bucket, tier="fast", le="30.0") == 1
    assert value(text, bucket, tier="relax", le="1800.0") == 0
    assert value(text, bucket, tier="relax", le="3600.0") == 1


def test_a_rejection_needs_a_reason_and_only_a_rejection_has_one(front_door: FrontDoorMetrics) -> None:
    with pytest.raises(AssertionError):
        front_door.job_submitted(tier=Tier.FAST, outcome=SubmissionOutcome.REJECTED)
    with pytest.raises(AssertionError):
        front_door.job_submitted(
            tier=Tier.FAST, outcome=SubmissionOutcome.ACCEPTED, reason=SubmissionReason.QUEUE_FULL
        )


def test_a_job_that_did_not_fail_has_nobody_to_blame(scheduler: SchedulerMetrics) -> None:
    with pytest.raises(AssertionError):
        scheduler.job_ended(tier=Tier.FAST, outcome=Outcome.SUCCEEDED, blame=Blame.PLATFORM)


def test_the_pool_is_asked_at_each_scrape(front_door: FrontDoorMetrics) -> None:
    size, idle = 8, 5
    front_door.follow_pool(size=lambda: size, idle=lambda: idle)
    assert value(front_door.exposition(), "darkroom_db_pool_connections", state="used") == 3
    idle = 8
    assert value(front_door.exposition(), "darkroom_db_pool_connections", state="used") == 0


def test_a_stage_that_did_not_happen_is_not_observed(scheduler: SchedulerMetrics) -> None:
    cancelled = StageTimes(encode_ms=10, denoise_ms=400, decode_ms=0)
    scheduler.attempt_ended(tier=Tier.FAST, model="stand-in", run_ms=410, load_ms=0, times=cancelled)
    text = scheduler.exposition()
    count = "darkroom_job_stage_seconds_count"
    assert value(text, count, stage="denoise", model="stand-in") == 1
    assert value(text, count, stage="decode", model="stand-in") == 0
    assert value(text, count, stage="load", model="stand-in") == 0


def test_gpu_time_adds_up_over_workers_and_their_restarts(scheduler: SchedulerMetrics) -> None:
    scheduler.worker_heard(a_report(fast_ms=1_000, idle_ms=500), now_ms=2_000)
    scheduler.worker_heard(a_report(fast_ms=1_500, idle_ms=500), now_ms=2_500)
    scheduler.worker_heard(a_report(incarnation="second", load_ms=200), now_ms=3_000)
    scheduler.worker_heard(a_report("node-a/gpu-1", "other", relax_ms=700), now_ms=3_000)
    text = scheduler.exposition()
    used = {
        use: value(text, "darkroom_gpu_time_seconds_total", use=use)
        for use in ("fast", "relax", "load", "idle")
    }
    assert used == {"fast": 1.5, "relax": 0.7, "load": 0.2, "idle": 0.5}
    assert value(text, "darkroom_gpu_memory_used_bytes", worker="node-a/gpu-1") == 3_000
    assert value(text, "darkroom_worker_heartbeat_timestamp_seconds", worker="node-a/gpu-0") == 3


def test_an_adopted_worker_does_not_bring_its_past_along() -> None:
    account = GpuTimeAccount(since_ms=1_000_000)
    hours = GpuTime(relax_ms=900_000, idle_ms=50_000)
    assert account.add("node-a/gpu-0", "old", hours, 1_000_100) == GpuTime()
    later = GpuTime(relax_ms=900_000, idle_ms=53_000)
    assert account.add("node-a/gpu-0", "old", later, 1_003_100) == GpuTime(idle_ms=3_000)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 5_000)), max_size=40),
    st.randoms(use_true_random=False),
)
def test_gpu_time_is_counted_once_in_whatever_order_reports_arrive(
    steps: list[tuple[int, int, int]], shuffled: Random
) -> None:
    """Each step is more idle time of one incarnation of one worker, reported as its new total."""
    totals: dict[tuple[str, str], int] = {}
    reports = []
    for worker, incarnation, idle_ms in steps:
        key = (f"node/gpu-{worker}", f"{worker}-{incarnation}")
        totals[key] = totals.get(key, 0) + idle_ms
        reports.append((*key, GpuTime(idle_ms=totals[key])))
    shuffled.shuffle(reports)
    account = GpuTimeAccount(since_ms=0)
    counted = [account.add(*report, now_ms=10_000_000) for report in reports]
    assert all(new.idle_ms >= 0 for new in counted)
    assert sum(new.idle_ms for new in counted) == sum(totals.values())


def test_a_burst_between_two_scrapes_is_seen_for_a_minute(scheduler: SchedulerMetrics) -> None:
    for now_ms, queued in ((0, 2), (1_000, 90), (2_000, 0)):
        scheduler.queue_seen(tier=Tier.RELAX, queued=queued, running=0, oldest_ms=None, now_ms=now_ms)
    assert value(scheduler.exposition(), "darkroom_jobs_queued_peak", tier="relax") == 90
    scheduler.queue_seen(tier=Tier.RELAX, queued=1, running=0, oldest_ms=None, now_ms=61_001)
    assert value(scheduler.exposition(), "darkroom_jobs_queued_peak", tier="relax") == 1


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 100)), min_size=1))
def test_the_peak_is_the_highest_value_of_the_window(steps: list[tuple[int, int]]) -> None:
    peak = RollingPeak(window_ms=60)
    now_ms, seen = 0, []
    for later_ms, number in steps:
        now_ms += later_ms
        seen.append((now_ms, number))
        assert peak.saw(number, now_ms) == max(n for at_ms, n in seen if at_ms > now_ms - 60)
