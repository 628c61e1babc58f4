"""Every metric of the service is born here, and nowhere else.

Two processes produce them: the front door (`FrontDoorMetrics`) and the scheduler's actor
(`SchedulerMetrics`). No family belongs to both, so that the ops page can serve the two texts one after the
other. Workers have no metrics of their own: their numbers come with results and heartbeats.

Names begin with `darkroom_`, but for `grpc_server_*`, which every gRPC dashboard knows under these names.
Labels are closed enumerations, and a label set that is known beforehand starts at 0: a series that appears
with its first event is invisible to `rate` until the second. An account, job, key or prompt is never a label.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import prometheus_client
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

from billing.thresholds import PERCENTS
from billing.v1 import admin_pb2, billing_pb2
from gpu_worker.contract import AttemptResult, Blame, Checkpoint, GpuTime, Outcome, StageTimes, WorkerReport
from scheduler.policy.ids import Tier
from scheduler.v1 import account_pb2, job_pb2

# `_created` doubles the series of every counter and histogram, and no dashboard reads it. The library has
# only this one switch for the whole process.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
"""Of the text that `exposition` returns."""

_PREFIX = "darkroom"

# Buckets as the catalogue fixes them. The limits of the objectives (30 s for fast, 1800 s for relax) are
# edges: only there is the share of good events exact.
_HANDLING_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_QUEUE_WAIT_S = (0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)
_RUN_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_STAGE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)
_CYCLE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_CHECKPOINT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_FEW_STEPS = (0, 1, 2, 3, 5)
_POOL_WAIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

PEAK_WINDOW_MS = 60_000
"""A gauge read at each scrape misses bursts between two of them; the highest value of a minute does not."""


class SubmissionOutcome(StrEnum):
    """What became of a request to create a job."""

    ACCEPTED = "accepted"
    REPLAYED = "replayed"
    REJECTED = "rejected"


class SubmissionReason(StrEnum):
    """Why a request to create a job was rejected."""

    NONE = "none"
    QUOTA = "quota"
    QUEUE_FULL = "queue_full"
    INVALID = "invalid"
    IMPOSSIBLE = "impossible"
    AUTH = "auth"
    DRAINING = "draining"


class BillingRejection(StrEnum):
    """Why the ledger refused; the lower-case form of the error's reason."""

    FAST_TIME_EXHAUSTED = "fast_time_exhausted"
    PLAN_LACKS_PRIVATE = "plan_lacks_private"


class AdminAction(StrEnum):
    """What an admin did."""

    CREATE_ACCOUNT = "create_account"
    ERASE_ACCOUNT = "erase_account"
    CREATE_API_KEY = "create_api_key"
    REVOKE_API_KEY = "revoke_api_key"
    CREATE_PLAN = "create_plan"
    UPDATE_PLAN = "update_plan"
    ADJUST_BALANCE = "adjust_balance"
    REFUND_JOB = "refund_job"
    UNDO_REFUND = "undo_refund"
    UNDO_PLAN_CHANGE = "undo_plan_change"
    DRAIN_WORKER = "drain_worker"
    RESUME_WORKER = "resume_worker"
    PAUSE_TIER = "pause_tier"
    RESUME_TIER = "resume_tier"
    UPDATE_RULES = "update_rules"
    HIDE_JOB = "hide_job"
    UNHIDE_JOB = "unhide_job"
    BLOCK_ACCOUNT = "block_account"
    UNBLOCK_ACCOUNT = "unblock_account"


class AdminResult(StrEnum):
    """How an admin's action ended."""

    DONE = "done"
    REPLAYED = "replayed"
    REFUSED = "refused"


class PoolState(StrEnum):
    """What a connection of the database pool is doing."""

    IDLE = "idle"
    USED = "used"


class Stage(StrEnum):
    """Part of an attempt's time, as the worker measures it."""

    LOAD = "load"
    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    UPSCALE = "upscale"


class RequeueReason(StrEnum):
    """Why an attempt was given up and its job went back to its place."""

    WORKER_LOST = "worker_lost"
    OOM = "oom"
    TIMEOUT = "timeout"
    DRAIN = "drain"


class DecisionResult(StrEnum):
    """What the loop found for a waiting job. `held`: one of the account's caps is in the way."""

    PLACED = "placed"
    NO_GPU = "no_gpu"
    NO_MODEL_FIT = "no_model_fit"
    HELD = "held"


class Residency(StrEnum):
    """Whether a job met its model loaded."""

    WARM = "warm"
    COLD = "cold"


class ResumedWhere(StrEnum):
    """Where a parked run went on."""

    SAME_GPU = "same_gpu"
    OTHER_GPU = "other_gpu"


class WorkerState(StrEnum):
    """What a worker is doing; the states add up to the fleet."""

    STARTING = "starting"
    IDLE = "idle"
    LOADING = "loading"
    RUNNING = "running"
    DRAINING = "draining"
    LOST = "lost"


class GpuUse(StrEnum):
    """Where GPU time went: a closed account."""

    FAST = "fast"
    RELAX = "relax"
    LOAD = "load"
    WASTED = "wasted"
    IDLE = "idle"


class BillingKind(StrEnum):
    """What a settlement did with held GPU time."""

    DEBIT = "debit"
    RELEASE = "release"


@dataclass(frozen=True, kw_only=True)
class FrontDoorMetrics:
    """What the process with the gRPC service measures, and the process itself."""

    registry: CollectorRegistry

    grpc_server_started: Counter
    """grpc_type, grpc_service, grpc_method"""
    grpc_server_handled: Counter
    """grpc_type, grpc_service, grpc_method, grpc_code"""
    grpc_server_handling_seconds: Histogram
    """grpc_service, grpc_method; unary methods only"""
    grpc_server_msg_sent: Counter
    """grpc_type, grpc_service, grpc_method"""
    grpc_server_msg_received: Counter
    """grpc_type, grpc_service, grpc_method"""
    watch_streams: Gauge
    submissions: Counter
    """tier, outcome, reason"""
    artifact_sent_bytes: Counter
    billing_rejections: Counter
    """plan, reason"""
    admin_actions: Counter
    """action, result"""
    db_pool_connections: Gauge
    """state"""
    db_pool_wait_seconds: Histogram
    scheduler_metrics_up: Gauge
    """Whether the page that shows this gauge also has the scheduler's families."""

    @classmethod
    def create(cls, plans: Iterable[str]) -> FrontDoorMetrics:
        """Return the families of one process, every known label set at 0."""
        registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        _build_info(registry)
        method = ("grpc_type", "grpc_service", "grpc_method")
        metrics = cls(
            registry=registry,
            grpc_server_started=Counter(
                "grpc_server_started_total", "RPCs begun on the server.", method, registry=registry
            ),
            grpc_server_handled=Counter(
                "grpc_server_handled_total",
                "RPCs completed on the server, whatever the outcome.",
                (*method, "grpc_code"),
                registry=registry,
            ),
            grpc_server_handling_seconds=Histogram(
                "grpc_server_handling_seconds",
                "Time a unary RPC took on the server.",
                ("grpc_service", "grpc_method"),
                buckets=_HANDLING_S,
                registry=registry,
            ),
            grpc_server_msg_sent=Counter(
                "grpc_server_msg_sent_total", "Messages sent by the server.", method, registry=registry
            ),
            grpc_server_msg_received=Counter(
                "grpc_server_msg_received_total",
                "Messages received by the server.",
                method,
                registry=registry,
            ),
            watch_streams=_gauge(registry, "watch_streams", "Open WatchJob streams."),
            submissions=_counter(
                registry,
                "submissions",
                "Requests to create a job, by what became of them.",
                "tier",
                "outcome",
                "reason",
            ),
            artifact_sent_bytes=_counter(
                registry, "artifact_sent_bytes", "Bytes of pictures sent to clients."
            ),
            billing_rejections=_counter(
                registry, "billing_rejections", "Jobs the ledger refused at acceptance.", "plan", "reason"
            ),
            admin_actions=_counter(
                registry, "admin_actions", "Calls of admins that change something.", "action", "result"
            ),
            db_pool_connections=_gauge(
                registry, "db_pool_connections", "Connections of the database pool.", "state"
            ),
            db_pool_wait_seconds=_histogram(
                registry,
                "db_pool_wait_seconds",
                "Time a request waited for a database connection.",
                _POOL_WAIT_S,
            ),
            scheduler_metrics_up=_gauge(
                registry,
                "scheduler_metrics_up",
                "1 if the scheduler's families are on this page, 0 if it did not answer.",
            ),
        )
        metrics._start_at_zero(plans)
        return metrics

    def _start_at_zero(self, plans: Iterable[str]) -> None:
        for rpc in _METHODS:
            for counter in (
                self.grpc_server_started,
                self.grpc_server_msg_sent,
                self.grpc_server_msg_received,
            ):
                counter.labels(rpc.grpc_type, rpc.service, rpc.method)
            for code in _GRPC_CODES:
                self.grpc_server_handled.labels(rpc.grpc_type, rpc.service, rpc.method, code)
            if rpc.grpc_type == "unary":
                self.grpc_server_handling_seconds.labels(rpc.service, rpc.method)
        for tier in Tier:
            self.submissions.labels(tier, SubmissionOutcome.ACCEPTED, SubmissionReason.NONE)
            self.submissions.labels(tier, SubmissionOutcome.REPLAYED, SubmissionReason.NONE)
            for reason in SubmissionReason:
                if reason is not SubmissionReason.NONE:
                    self.submissions.labels(tier, SubmissionOutcome.REJECTED, reason)
        for plan in plans:
            for rejection in BillingRejection:
                self.billing_rejections.labels(plan, rejection)
        for action in AdminAction:
            for result in AdminResult:
                self.admin_actions.labels(action, result)
        for state in PoolState:
            self.db_pool_connections.labels(state)

    def job_submitted(
        self, *, tier: Tier, outcome: SubmissionOutcome, reason: SubmissionReason = SubmissionReason.NONE
    ) -> None:
        """Count one CreateJob request. Only a rejection has a reason."""
        assert (outcome is SubmissionOutcome.REJECTED) == (reason is not SubmissionReason.NONE)
        self.submissions.labels(tier, outcome, reason).inc()

    def admin_acted(self, *, action: AdminAction, result: AdminResult) -> None:
        """Count one call of an admin."""
        self.admin_actions.labels(action, result).inc()

    def follow_pool(self, *, size: Callable[[], int], idle: Callable[[], int]) -> None:
        """Ask these two for the pool's connections at every scrape."""
        self.db_pool_connections.labels(PoolState.IDLE).set_function(idle)
        self.db_pool_connections.labels(PoolState.USED).set_function(lambda: size() - idle())

    def exposition(self) -> str:
        """Return all families as text of `CONTENT_TYPE`."""
        return prometheus_client.generate_latest(self.registry).decode()


@dataclass(frozen=True, kw_only=True)
class SchedulerMetrics:
    """What the scheduler's actor measures: queues, decisions, the fleet, and what settlements move."""

    registry: CollectorRegistry
    gpu_time: GpuTimeAccount
    peaks: Mapping[Tier, RollingPeak]

    jobs_queued: Gauge
    """tier"""
    jobs_running: Gauge
    """tier"""
    jobs_queued_peak: Gauge
    """tier"""
    queue_oldest_enqueued_timestamp_seconds: Gauge
    """tier; stands still while nothing waits, so read it only where jobs_queued > 0"""
    job_queue_wait_seconds: Histogram
    """tier"""
    job_run_seconds: Histogram
    """tier, model"""
    job_stage_seconds: Histogram
    """stage, model"""
    jobs: Counter
    """tier, outcome, blame"""
    job_requeues: Counter
    """reason"""
    scheduler_cycle_seconds: Histogram
    scheduler_decisions: Counter
    """tier, result"""
    scheduler_last_cycle_timestamp_seconds: Gauge
    scheduler_leader: Gauge
    placements: Counter
    """tier, residency"""
    parks: Counter
    resumes: Counter
    """where"""
    migrations: Counter
    park_wait_steps: Histogram
    runs_parked: Gauge
    steps_redone: Counter
    checkpoint_seconds: Histogram
    checkpoint_bytes: Counter
    gpu_workers: Gauge
    """state"""
    gpu_time_seconds: Counter
    """use"""
    gpu_memory_used_bytes: Gauge
    """worker"""
    gpu_memory_capacity_bytes: Gauge
    """worker"""
    worker_heartbeat_timestamp_seconds: Gauge
    """worker"""
    billing_gpu_seconds: Counter
    """plan, kind"""
    billing_thresholds: Counter
    """plan, percent"""
    billing_holds: Gauge
    billing_held_gpu_seconds: Gauge

    @classmethod
    def create(cls, plans: Iterable[str], models: Iterable[str], *, now_ms: int) -> SchedulerMetrics:
        """Return the families of a scheduler that starts at `now_ms`, every known label set at 0.

        The slots of a fleet are not known beforehand: a worker's series begin with its first report.
        """
        registry = CollectorRegistry(auto_describe=True)
        metrics = cls(
            registry=registry,
            gpu_time=GpuTimeAccount(since_ms=now_ms),
            peaks={tier: RollingPeak(PEAK_WINDOW_MS) for tier in Tier},
            jobs_queued=_gauge(registry, "jobs_queued", "Jobs waiting.", "tier"),
            jobs_running=_gauge(registry, "jobs_running", "Jobs running.", "tier"),
            jobs_queued_peak=_gauge(
                registry, "jobs_queued_peak", "Most jobs waiting within the last minute.", "tier"
            ),
            queue_oldest_enqueued_timestamp_seconds=_gauge(
                registry,
                "queue_oldest_enqueued_timestamp_seconds",
                "When the oldest waiting job was accepted.",
                "tier",
            ),
            job_queue_wait_seconds=_histogram(
                registry,
                "job_queue_wait_seconds",
                "Eligible time before a job's first start.",
                _QUEUE_WAIT_S,
                "tier",
            ),
            job_run_seconds=_histogram(
                registry,
                "job_run_seconds",
                "Time from an attempt's start to its end.",
                _RUN_S,
                "tier",
                "model",
            ),
            job_stage_seconds=_histogram(
                registry, "job_stage_seconds", "Time of one stage of an attempt.", _STAGE_S, "stage", "model"
            ),
            jobs=_counter(registry, "jobs", "Jobs that ended.", "tier", "outcome", "blame"),
            job_requeues=_counter(
                registry, "job_requeues", "Jobs that went back to their place in the queue.", "reason"
            ),
            scheduler_cycle_seconds=_histogram(
                registry, "scheduler_cycle_seconds", "Time of one cycle of the loop.", _CYCLE_S
            ),
            scheduler_decisions=_counter(
                registry,
                "scheduler_decisions",
                "Decisions about waiting jobs, by what was found.",
                "tier",
                "result",
            ),
            scheduler_last_cycle_timestamp_seconds=_gauge(
                registry, "scheduler_last_cycle_timestamp_seconds", "When the last cycle of the loop ended."
            ),
            scheduler_leader=_gauge(registry, "scheduler_leader", "1 if this scheduler leads, 0 if not."),
            placements=_counter(
                registry,
                "placements",
                "Attempts given to a worker, by whether it had the model.",
                "tier",
                "residency",
            ),
            parks=_counter(registry, "parks", "Relax runs parked for a fast job."),
            resumes=_counter(registry, "resumes", "Parked runs that went on, by where.", "where"),
            migrations=_counter(registry, "migrations", "Parked runs that moved to another worker."),
            park_wait_steps=_histogram(
                registry, "park_wait_steps", "Steps from being asked to park to being parked.", _FEW_STEPS
            ),
            runs_parked=_gauge(registry, "runs_parked", "Runs that are parked."),
            steps_redone=_counter(
                registry, "steps_redone", "Steps done again since the first were lost with a GPU, at most."
            ),
            checkpoint_seconds=_histogram(
                registry,
                "checkpoint_seconds",
                "Making and storing a checkpoint, beside its run.",
                _CHECKPOINT_S,
            ),
            checkpoint_bytes=_counter(registry, "checkpoint_bytes", "Content of stored checkpoints."),
            gpu_workers=_gauge(registry, "gpu_workers", "Workers by state.", "state"),
            gpu_time_seconds=_counter(
                registry,
                "gpu_time_seconds",
                "GPU time by use; the uses add up to wall time times GPUs.",
                "use",
            ),
            gpu_memory_used_bytes=_gauge(registry, "gpu_memory_used_bytes", "GPU memory in use.", "worker"),
            gpu_memory_capacity_bytes=_gauge(registry, "gpu_memory_capacity_bytes", "GPU memory.", "worker"),
            worker_heartbeat_timestamp_seconds=_gauge(
                registry, "worker_heartbeat_timestamp_seconds", "When a worker was last heard of.", "worker"
            ),
            billing_gpu_seconds=_counter(
                registry, "billing_gpu_seconds", "Fast GPU time moved by settlements.", "plan", "kind"
            ),
            billing_thresholds=_counter(
                registry,
                "billing_thresholds",
                "Accounts that used up this percent of a period's fast time.",
                "plan",
                "percent",
            ),
            billing_holds=_gauge(registry, "billing_holds", "Open holds."),
            billing_held_gpu_seconds=_gauge(registry, "billing_held_gpu_seconds", "GPU time in open holds."),
        )
        metrics._start_at_zero(tuple(plans), tuple(models))
        return metrics

    def _start_at_zero(self, plans: tuple[str, ...], models: tuple[str, ...]) -> None:
        for tier in Tier:
            for gauge in (self.jobs_queued, self.jobs_running, self.jobs_queued_peak):
                gauge.labels(tier)
            self.queue_oldest_enqueued_timestamp_seconds.labels(tier)
            self.job_queue_wait_seconds.labels(tier)
            for model in models:
                self.job_run_seconds.labels(tier, model)
            for outcome, blame in _ENDINGS:
                self.jobs.labels(tier, outcome, blame)
            for decision in DecisionResult:
                self.scheduler_decisions.labels(tier, decision)
            for residency in Residency:
                self.placements.labels(tier, residency)
        for stage in Stage:
            for model in models:
                self.job_stage_seconds.labels(stage, model)
        for reason in RequeueReason:
            self.job_requeues.labels(reason)
        for where in ResumedWhere:
            self.resumes.labels(where)
        for state in WorkerState:
            self.gpu_workers.labels(state)
        for use in GpuUse:
            self.gpu_time_seconds.labels(use)
        for plan in plans:
            for kind in BillingKind:
                self.billing_gpu_seconds.labels(plan, kind)
            for percent in PERCENTS:
                self.billing_thresholds.labels(plan, str(percent))

    def queue_seen(
        self, *, tier: Tier, queued: int, running: int, oldest_ms: int | None, now_ms: int
    ) -> None:
        """Show one tier's queue as it is now. `oldest_ms` is when its oldest waiting job was accepted."""
        self.jobs_queued.labels(tier).set(queued)
        self.jobs_running.labels(tier).set(running)
        self.jobs_queued_peak.labels(tier).set(self.peaks[tier].saw(queued, now_ms))
        if oldest_ms is not None:
            self.queue_oldest_enqueued_timestamp_seconds.labels(tier).set(oldest_ms / 1000)

    def cycle_ended(self, *, took_ns: int, now_ms: int) -> None:
        """Show that the loop turned once more."""
        self.scheduler_cycle_seconds.observe(took_ns / 1e9)
        self.scheduler_last_cycle_timestamp_seconds.set(now_ms / 1000)

    def attempt_started(self, *, tier: Tier, warm: bool) -> None:
        """Count one attempt given to a worker."""
        self.scheduler_decisions.labels(tier, DecisionResult.PLACED).inc()
        self.placements.labels(tier, Residency.WARM if warm else Residency.COLD).inc()

    def job_held(self, tier: Tier) -> None:
        """Count one start that was decided and held back: its account has no fast time left."""
        self.scheduler_decisions.labels(tier, DecisionResult.HELD).inc()

    def run_parked(self) -> None:
        """Count one relax run that gave its GPU to a fast job."""
        self.parks.inc()

    def run_resumed(self, where: ResumedWhere) -> None:
        """Count one parked run that goes on; on another GPU it has migrated."""
        self.resumes.labels(where).inc()
        if where is ResumedWhere.OTHER_GPU:
            self.migrations.inc()

    def checkpoint_stored(self, checkpoint: Checkpoint) -> None:
        """Count a checkpoint that a worker told of."""
        self.checkpoint_bytes.inc(checkpoint.size_bytes)
        self.checkpoint_seconds.observe(checkpoint.stored_in_ms / 1000)

    def run_ended(self, result: AttemptResult) -> None:
        """Count what being parked and going on elsewhere came to, however the attempt ended."""
        self.steps_redone.inc(result.steps_redone)
        for steps in result.park_waits:
            self.park_wait_steps.observe(steps)

    def job_started(self, *, tier: Tier, waited_ms: int) -> None:
        """Observe how long a job waited for its first start, without the time its own caps held it."""
        self.job_queue_wait_seconds.labels(tier).observe(waited_ms / 1000)

    def attempt_ended(self, *, tier: Tier, model: str, run_ms: int, load_ms: int, times: StageTimes) -> None:
        """Observe an attempt that ran to its end. A stage of 0 ms did not happen and is not observed."""
        self.job_run_seconds.labels(tier, model).observe(run_ms / 1000)
        for stage, took_ms in (
            (Stage.LOAD, load_ms),
            (Stage.ENCODE, times.encode_ms),
            (Stage.DENOISE, times.denoise_ms),
            (Stage.DECODE, times.decode_ms),
            (Stage.UPSCALE, times.upscale_ms),
        ):
            if took_ms:
                self.job_stage_seconds.labels(stage, model).observe(took_ms / 1000)

    def job_requeued(self, reason: RequeueReason) -> None:
        """Count a job that went back to its place."""
        self.job_requeues.labels(reason).inc()

    def job_ended(self, *, tier: Tier, outcome: Outcome, blame: Blame = Blame.NONE) -> None:
        """Count a job at its end. Exactly the failed ones have somebody to blame."""
        assert (outcome, blame) in _ENDINGS, (outcome, blame)
        self.jobs.labels(tier, outcome, blame).inc()

    def parked_seen(self, runs: int) -> None:
        """Show how many runs are parked."""
        self.runs_parked.set(runs)

    def fleet_seen(self, workers: Mapping[WorkerState, int]) -> None:
        """Show how many workers are in each state; absent states have none."""
        for state in WorkerState:
            self.gpu_workers.labels(state).set(workers.get(state, 0))

    def worker_heard(self, report: WorkerReport, now_ms: int) -> None:
        """Show a worker's report and add the GPU time that is new in it."""
        self.worker_heartbeat_timestamp_seconds.labels(report.worker_id).set(now_ms / 1000)
        self.gpu_memory_used_bytes.labels(report.worker_id).set(report.memory_used_bytes)
        self.gpu_memory_capacity_bytes.labels(report.worker_id).set(report.memory_bytes)
        new = self.gpu_time.add(report.worker_id, report.incarnation, report.gpu_time, now_ms)
        for use in GpuUse:
            self.gpu_time_seconds.labels(use).inc(_spent_ms(new, use) / 1000)

    def settled(self, *, plan: str, billed_ms: int, released_ms: int, thresholds: Iterable[int] = ()) -> None:
        """Add what one settlement debited from the plan's fast time, and what of its hold it gave back.

        `thresholds` are the percents of its account's time that are used up with it.
        """
        for percent in thresholds:
            self.billing_thresholds.labels(plan, str(percent)).inc()
        self.billing_gpu_seconds.labels(plan, BillingKind.DEBIT).inc(billed_ms / 1000)
        self.billing_gpu_seconds.labels(plan, BillingKind.RELEASE).inc(released_ms / 1000)

    def holds_seen(self, *, holds: int, held_ms: int) -> None:
        """Show the ledger's open holds."""
        self.billing_holds.set(holds)
        self.billing_held_gpu_seconds.set(held_ms / 1000)

    def exposition(self) -> str:
        """Return all families as text of `CONTENT_TYPE`."""
        return prometheus_client.generate_latest(self.registry).decode()


class GpuTimeAccount:
    """Adds up the GPU time of a fleet whose workers each count their own, from their start.

    A worker that starts again counts from 0 under a new incarnation, so each incarnation is counted for
    itself, and reports may arrive late or in any order.
    """

    def __init__(self, *, since_ms: int) -> None:
        self._since_ms = since_ms
        self._counted: dict[tuple[str, str], GpuTime] = {}

    def add(self, worker_id: str, incarnation: str, total: GpuTime, now_ms: int) -> GpuTime:
        """Return what is new in `total`, the time of this incarnation since its start, heard at `now_ms`.

        Of a worker older than this account only the time after its first report is new. The rest was counted
        by the scheduler before; a counter that begins with hours in it reads as hours of work in a second.
        """
        counted = self._counted.get((worker_id, incarnation))
        if counted is None:
            older_than_account = _wall_ms(total) > now_ms - self._since_ms
            counted = total if older_than_account else GpuTime()
        newest = _each_use(max, total, counted)
        self._counted[worker_id, incarnation] = newest
        return _each_use(int.__sub__, newest, counted)


class RollingPeak:
    """The highest value seen within a window.

    It is not reset when it is read: of two scrapers each would rob the other.
    """

    def __init__(self, window_ms: int) -> None:
        self._window_ms = window_ms
        # Times rise and values fall from left to right: what is older and lower never becomes the peak.
        self._falling: deque[tuple[int, int]] = deque()

    def saw(self, value: int, now_ms: int) -> int:
        """Return the highest value of the window that ends at `now_ms`, with this one."""
        while self._falling and self._falling[-1][1] <= value:
            self._falling.pop()
        self._falling.append((now_ms, value))
        while self._falling[0][0] <= now_ms - self._window_ms:
            self._falling.popleft()
        return self._falling[0][1]


@dataclass(frozen=True, kw_only=True)
class _Rpc:
    grpc_type: str
    service: str
    method: str


def _rpcs(files: Iterable[FileDescriptor]) -> Iterator[_Rpc]:
    for file in files:
        for service in file.services_by_name.values():
            for method in service.methods:
                yield _Rpc(grpc_type=_grpc_type(method), service=service.full_name, method=method.name)


def _grpc_type(method: MethodDescriptor) -> str:
    if method.server_streaming:
        return "bidi_stream" if method.client_streaming else "server_stream"
    return "client_stream" if method.client_streaming else "unary"


_METHODS = tuple(
    _rpcs((job_pb2.DESCRIPTOR, account_pb2.DESCRIPTOR, billing_pb2.DESCRIPTOR, admin_pb2.DESCRIPTOR))
)

# The canonical codes as the go-grpc-prometheus names spell them.
_GRPC_CODES = (
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
)

_ENDINGS = (
    (Outcome.SUCCEEDED, Blame.NONE),
    (Outcome.CANCELLED, Blame.NONE),
    (Outcome.FAILED, Blame.CLIENT),
    (Outcome.FAILED, Blame.PLATFORM),
)


def _spent_ms(time: GpuTime, use: GpuUse) -> int:
    spent_ms: int = getattr(time, f"{use}_ms")
    return spent_ms


def _wall_ms(time: GpuTime) -> int:
    return sum(_spent_ms(time, use) for use in GpuUse)


def _each_use(operation: Callable[[int, int], int], left: GpuTime, right: GpuTime) -> GpuTime:
    return GpuTime(**{f"{use}_ms": operation(_spent_ms(left, use), _spent_ms(right, use)) for use in GpuUse})


def _counter(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Counter:
    return Counter(f"{name}_total", text, labels, namespace=_PREFIX, registry=registry)


def _gauge(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, namespace=_PREFIX, registry=registry)


def _histogram(
    registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...], *labels: str
) -> Histogram:
    return Histogram(name, text, labels, namespace=_PREFIX, buckets=buckets, registry=registry)


def _build_info(registry: CollectorRegistry) -> None:
    build = {
        "version": _version("darkroom"),
        "commit": _commit(),
        "python": platform.python_version(),
        "ray": _version("ray"),
        "torch": _version("torch"),
        "protobuf": _version("protobuf"),
    }
    _gauge(registry, "build_info", "Always 1; what runs is in its labels.", *build).labels(**build).set(1)


def _version(package: str) -> str:
    """Return the installed version; empty where it is not installed (a front door needs no torch)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit pip installed from, which it records (PEP 610); empty for a release or a checkout."""
    record = importlib.metadata.distribution("darkroom").read_text("direct_url.json")
    commit: str = json.loads(record or "{}").get("vcs_info", {}).get("commit_id", "")
    return commit
