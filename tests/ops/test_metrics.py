"""The catalogue keeps its rules, and the few calculations behind a metric are right."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from gpu_worker.contract import Blame, GpuTime, Outcome, StageTimes, WorkerReport
from scheduler.metrics import (
    DbQuery,
    FrontDoorMetrics,
    GpuTimeAccount,
    Kind,
    Process,
    RollingPeak,
    SchedulerMetrics,
    SubmissionOutcome,
    SubmissionReason,
    catalogue,
)
from scheduler.policy.ids import Tier

PLANS = ("basic", "standard", "pro")
MODELS = ("stand-in", "sdxl")


@pytest.fixture
def front_door() -> FrontDoorMetrics:
    return FrontDoorMetrics(PLANS)


@pytest.fixture
def scheduler() -> SchedulerMetrics:
    return SchedulerMetrics(PLANS, MODELS, now_ms=0)


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


def shown(*metrics: FrontDoorMetrics | SchedulerMetrics) -> list[Metric]:
    return [family for one in metrics for family in text_string_to_metric_families(one.page().text)]


def test_every_family_of_the_catalogue_is_born_as_it_says(
    front_door: FrontDoorMetrics, scheduler: SchedulerMetrics
) -> None:
    pages = {Process.FRONT_DOOR: shown(front_door), Process.SCHEDULER: shown(scheduler)}
    for process, page in pages.items():
        born = {(family.name, family.type): family.documentation for family in page}
        declared = {
            (one.name.removesuffix("_total") if one.kind is Kind.COUNTER else one.name, one.kind.value): one
            for one in catalogue()
            if process in one.processes
        }
        assert born.keys() == declared.keys()
        assert all(born[name] == one.help for name, one in declared.items() if one.ours)


def test_no_series_has_a_label_or_a_value_that_its_family_does_not_declare(
    front_door: FrontDoorMetrics, scheduler: SchedulerMetrics
) -> None:
    scheduler.worker_heard(a_report(), now_ms=1)
    declared = {series: family for family in catalogue() for series in family.series}
    for family in shown(front_door, scheduler):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "le"}
            assert labels.keys() == declared[sample.name].labels.keys(), sample
            for name, known in declared[sample.name].labels.items():
                assert known is None or labels[name] in known, sample


def test_every_family_has_the_prefix_a_help_text_and_base_units() -> None:
    names = [family.name for family in catalogue()]
    assert len(names) == len(set(names))
    for family in catalogue():
        assert re.match(r"darkroom_|grpc_server_|process_|python_gc_", family.name), family.name
        assert family.help, family.name
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb)(_|$)", family.name), family.name
        assert (family.kind is Kind.COUNTER) == family.name.endswith("_total"), family.name
        assert (family.kind is Kind.HISTOGRAM) == bool(family.buckets), family.name


def test_no_label_names_a_person_a_job_or_a_process() -> None:
    assert {label for family in catalogue() for label in family.labels} == {
        *("tier", "plan", "model", "worker", "outcome", "reason", "blame", "state", "stage", "result"),
        *("residency", "where", "use", "kind", "action", "percent", "operation", "query", "class", "level"),
        *("grpc_type", "grpc_service", "grpc_method", "grpc_code", "hash"),
        *("version", "commit", "python", "ray", "torch", "protobuf", "generation"),
    }


def test_known_label_sets_start_at_zero(front_door: FrontDoorMetrics, scheduler: SchedulerMetrics) -> None:
    ours = [
        sample
        for family in shown(front_door, scheduler)
        for sample in family.samples
        if sample.name.startswith(("darkroom_", "grpc_")) and not sample.name.endswith("_info")
    ]
    assert {sample.value for sample in ours} == {0.0}
    shown_sets = {(sample.name, frozenset(sample.labels.values())) for sample in ours}
    assert {
        ("darkroom_jobs_queued", frozenset({"relax"})),
        ("darkroom_billing_gpu_seconds_total", frozenset({"pro", "expire"})),
        ("darkroom_model_loads_total", frozenset({"sdxl", "failed"})),
    } <= shown_sets


def test_a_trace_is_named_in_the_bucket_that_it_fell_into(
    front_door: FrontDoorMetrics, scheduler: SchedulerMetrics
) -> None:
    scheduler.job_started(
        tier=Tier.FAST, waited_ms=7_000, held_ms={}, promised_ms=None, trace_id="4bf92f3577b34da6"
    )
    rpc = ("unary", "scheduler.v1.JobService", "CreateJob")
    front_door.call_ended(rpc=rpc, code="OK", took_s=0.02, trace_id="00f067aa0ba902b7")
    accept = "application/openmetrics-text;version=1.0.0"
    found = {
        (sample.name, sample.exemplar.labels["trace_id"], sample.exemplar.value)
        for text in (front_door.page(accept).text, scheduler.page(accept).text)
        for family in openmetrics_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert found == {
        ("darkroom_job_queue_wait_seconds_bucket", "4bf92f3577b34da6", 7.0),
        ("grpc_server_handling_seconds_bucket", "00f067aa0ba902b7", 0.02),
    }
    assert "4bf92f3577b34da6" not in scheduler.page().text, "the plain text has no place for it"
    declared = {series for family in catalogue() if family.exemplars for series in family.series}
    assert {name for name, _, _ in found} <= declared


def test_every_method_of_the_api_is_known_before_its_first_call(front_door: FrontDoorMetrics) -> None:
    text = front_door.page().text
    watch = {"grpc_service": "scheduler.v1.JobService", "grpc_method": "WatchJob"}
    assert value(text, "grpc_server_started_total", grpc_type="server_stream", **watch) == 0
    assert value(text, "grpc_server_handled_total", grpc_code="Unavailable", **watch) == 0
    handled = families(text)["grpc_server_handling_seconds"].samples
    methods = {sample.labels["grpc_method"] for sample in handled}
    assert "CreateJob" in methods
    assert "WatchJob" not in methods, "how long a stream was open is not how fast it was answered"


def test_the_limits_of_the_objectives_are_bucket_edges(scheduler: SchedulerMetrics) -> None:
    for tier, waited_ms in ((Tier.FAST, 30_000), (Tier.RELAX, 1_800_001)):
        scheduler.job_started(tier=tier, waited_ms=waited_ms, held_ms={}, promised_ms=None)
    text = scheduler.page().text
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
    used = 3
    front_door.follow_pool(most=8, used=lambda: used)
    assert value(front_door.page().text, "darkroom_db_pool_connections", state="used") == 3
    used = 8
    assert value(front_door.page().text, "darkroom_db_pool_connections", state="idle") == 0


def test_a_stage_that_did_not_happen_is_not_observed(scheduler: SchedulerMetrics) -> None:
    cancelled = StageTimes(encode_ms=10, denoise_ms=400, decode_ms=0)
    scheduler.attempt_ended(
        tier=Tier.FAST, model="stand-in", run_ms=410, load_ms=0, times=cancelled, deliver_ms=None, steps=0
    )
    text = scheduler.page().text
    count = "darkroom_job_stage_seconds_count"
    assert value(text, count, stage="denoise", model="stand-in") == 1
    assert value(text, count, stage="decode", model="stand-in") == 0
    assert value(text, count, stage="load", model="stand-in") == 0


def test_gpu_time_adds_up_over_workers_and_their_restarts(scheduler: SchedulerMetrics) -> None:
    scheduler.worker_heard(a_report(fast_ms=1_000, idle_ms=500), now_ms=2_000)
    scheduler.worker_heard(a_report(fast_ms=1_500, idle_ms=500), now_ms=2_500)
    scheduler.worker_heard(a_report(incarnation="second", load_ms=200), now_ms=3_000)
    scheduler.worker_heard(a_report("node-a/gpu-1", "other", relax_ms=700), now_ms=3_000)
    text = scheduler.page().text
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


def test_a_worker_that_died_busy_wasted_what_it_did_not_tell() -> None:
    account = GpuTimeAccount(since_ms=0)
    account.add("node-a/gpu-0", "first", GpuTime(idle_ms=1_000, open_ms=500), 2_000)
    gone = account.close("node-a/gpu-0", "first", busy=True, now_ms=4_000)
    assert gone == GpuTime(wasted_ms=2_500), "the open run, and the silence after it was last heard of"


def test_what_was_written_off_of_a_worker_that_comes_back_is_not_counted_twice() -> None:
    account = GpuTimeAccount(since_ms=0)
    account.add("node-a/gpu-0", "first", GpuTime(idle_ms=1_000, open_ms=500), 2_000)
    account.close("node-a/gpu-0", "first", busy=True, now_ms=12_000)
    back = account.add("node-a/gpu-0", "first", GpuTime(idle_ms=3_000, fast_ms=9_500), 13_000)
    assert back.idle_ms + back.fast_ms == 1_000, (
        "it lived 1 s since it was given up, whatever it did meanwhile"
    )


def test_gpu_time_of_lives_that_are_forgotten_stays_counted(scheduler: SchedulerMetrics) -> None:
    for life in range(50):
        scheduler.worker_began("node-a/gpu-0", f"life-{life}")
        scheduler.worker_heard(a_report(incarnation=f"life-{life}", fast_ms=100), now_ms=1_000)
        assert len(scheduler.gpu_time) == 1
    assert value(scheduler.page().text, "darkroom_gpu_time_seconds_total", use="fast") == pytest.approx(5)
    scheduler.worker_forgotten("node-a/gpu-0")
    assert len(scheduler.gpu_time) == 0
    assert 'worker="' not in scheduler.page().text
    assert value(scheduler.page().text, "darkroom_gpu_time_seconds_total", use="fast") == pytest.approx(5)


def test_a_worker_that_was_adopted_counts_its_open_run_and_no_more_of_its_past() -> None:
    account = GpuTimeAccount(since_ms=1_000_000)
    account.add("node-a/gpu-0", "old", GpuTime(relax_ms=2_000_000, open_ms=700), 1_000_100)
    assert account.close("node-a/gpu-0", "old", busy=True, now_ms=1_000_400) == GpuTime(wasted_ms=1_000)


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
    assert value(scheduler.page().text, "darkroom_jobs_queued_peak", tier="relax") == 90
    scheduler.queue_seen(tier=Tier.RELAX, queued=1, running=0, oldest_ms=None, now_ms=61_001)
    assert value(scheduler.page().text, "darkroom_jobs_queued_peak", tier="relax") == 1


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 100)), min_size=1))
def test_the_peak_is_the_highest_value_of_the_window(steps: list[tuple[int, int]]) -> None:
    peak = RollingPeak(window_ms=60)
    now_ms, seen = 0, []
    for later_ms, number in steps:
        now_ms += later_ms
        seen.append((now_ms, number))
        assert peak.saw(number, now_ms) == max(n for at_ms, n in seen if at_ms > now_ms - 60)


def test_every_named_query_is_one_statement_and_the_other_way_round() -> None:
    root = Path(__file__).resolve().parents[2]
    found = [
        name
        for package in ("billing", "scheduler/store")
        for path in (root / package).glob("*.py")
        for name in re.findall(r'"""/\* ([a-z_]+) \*/|"/\* ([a-z_]+) \*/', path.read_text())
    ]
    assert sorted(first or second for first, second in found) == sorted(query.value for query in DbQuery)
