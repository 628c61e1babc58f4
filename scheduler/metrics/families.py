"""Every metric of the service is declared here, and nowhere else.

Names begin with `darkroom_`, but for `grpc_server_*`, which every gRPC dashboard knows under these names, and
what the client library shows of its own process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import product

from google.protobuf.descriptor import MethodDescriptor

from billing.thresholds import PERCENTS
from billing.v1 import admin_pb2, billing_pb2
from gpu_worker.contract import Blame, Outcome
from scheduler.metrics.family import Family, Kind, Process
from scheduler.metrics.labels import (
    AdminAction,
    AdminResult,
    BillingKind,
    BillingRejection,
    CanaryOutcome,
    CommitResult,
    DbErrorClass,
    DbQuery,
    DecisionResult,
    GpuUse,
    HeldBecause,
    LoadResult,
    LogLevel,
    OrphanResult,
    PoolState,
    ReconcileResult,
    RequeueReason,
    Residency,
    RestartReason,
    ResumedWhere,
    Stage,
    SubmissionOutcome,
    SubmissionReason,
    WorkerState,
)
from scheduler.policy.ids import Tier
from scheduler.v1 import account_pb2, fleet_pb2, job_pb2, moderation_pb2

_PREFIX = "darkroom_"
_ALL: list[Family] = []

_FRONT_DOOR = frozenset({Process.FRONT_DOOR})
_SCHEDULER = frozenset({Process.SCHEDULER})
_BOTH = _FRONT_DOOR | _SCHEDULER

_Values = type[StrEnum] | tuple[str, ...] | None
_Sets = Iterable[tuple[str, ...]]

# Plans and models are configured, workers and versions are found.
_OPEN = None
_NO_LABELS: Mapping[str, _Values] = {}


def catalogue() -> tuple[Family, ...]:
    """Return every family there is, those of the client library among them."""
    return tuple(_ALL)


def _family(
    processes: frozenset[Process],
    kind: Kind,
    name: str,
    help_text: str,
    labels: Mapping[str, _Values] = _NO_LABELS,
    *,
    buckets: tuple[float, ...] = (),
    exemplars: bool = False,
    sets: _Sets | None = None,
    prefix: str = _PREFIX,
) -> Family:
    family = Family(
        name=prefix + name,
        kind=kind,
        help=help_text,
        labels={label: _values(values) for label, values in labels.items()},
        sets=None if sets is None else tuple(tuple(map(str, one)) for one in sets),
        buckets=buckets,
        exemplars=exemplars,
        processes=processes,
    )
    _ALL.append(family)
    return family


def _values(values: _Values) -> tuple[str, ...] | None:
    return values if values is None or isinstance(values, tuple) else tuple(map(str, values))


def _methods() -> Iterator[MethodDescriptor]:
    for file in (job_pb2, account_pb2, fleet_pb2, moderation_pb2, billing_pb2, admin_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def _grpc_type(method: MethodDescriptor) -> str:
    if method.server_streaming:
        return "bidi_stream" if method.client_streaming else "server_stream"
    return "client_stream" if method.client_streaming else "unary"


# Front door.

_METHODS = tuple(
    (_grpc_type(method), method.containing_service.full_name, method.name) for method in _methods()
)
_METHOD_LABELS: Mapping[str, _Values] = {
    "grpc_type": tuple(dict.fromkeys(one[0] for one in _METHODS)),
    "grpc_service": tuple(dict.fromkeys(one[1] for one in _METHODS)),
    "grpc_method": tuple(dict.fromkeys(one[2] for one in _METHODS)),
}

# The canonical codes as the go-grpc-prometheus names spell them.
GRPC_CODES = (
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
# What the front door's objective is about. A refusal of any other kind is the caller's, and appears with its
# first event: all codes of all methods would be a third of all series of a cell. So do the buckets of what
# only operators and admins call, a few times a day.
_GRPC_CODES_AT_ZERO = ("OK", "Internal", "Unavailable", "DeadlineExceeded")
_EVERYBODYS_SERVICES = (
    "scheduler.v1.JobService",
    "scheduler.v1.AccountService",
    "billing.v1.BillingService",
)

GRPC_STARTED = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "grpc_server_started_total",
    "RPCs begun on the server.",
    _METHOD_LABELS,
    prefix="",
    sets=_METHODS,
)
GRPC_HANDLED = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "grpc_server_handled_total",
    "RPCs completed on the server, whatever the outcome.",
    {**_METHOD_LABELS, "grpc_code": GRPC_CODES},
    prefix="",
    sets=((*method, code) for method, code in product(_METHODS, _GRPC_CODES_AT_ZERO)),
)
GRPC_HANDLING = _family(
    _FRONT_DOOR,
    Kind.HISTOGRAM,
    "grpc_server_handling_seconds",
    "Time a unary RPC took on the server.",
    {
        "grpc_service": _METHOD_LABELS["grpc_service"],
        "grpc_method": tuple(method for grpc_type, _, method in _METHODS if grpc_type == "unary"),
    },
    prefix="",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    exemplars=True,
    sets=(
        (service, method)
        for grpc_type, service, method in _METHODS
        if grpc_type == "unary" and service in _EVERYBODYS_SERVICES
    ),
)
GRPC_MSG_SENT = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "grpc_server_msg_sent_total",
    "Messages sent by the server.",
    _METHOD_LABELS,
    prefix="",
    sets=_METHODS,
)
GRPC_MSG_RECEIVED = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "grpc_server_msg_received_total",
    "Messages received by the server.",
    _METHOD_LABELS,
    prefix="",
    sets=_METHODS,
)
WATCH_STREAMS = _family(_FRONT_DOOR, Kind.GAUGE, "watch_streams", "Open WatchJob streams.")
SUBMISSIONS = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "submissions_total",
    "Requests to create a job, by what became of them.",
    {"tier": Tier, "outcome": SubmissionOutcome, "reason": SubmissionReason},
    sets=(
        (tier, outcome, reason)
        for tier, outcome, reason in product(Tier, SubmissionOutcome, SubmissionReason)
        if (outcome is SubmissionOutcome.REJECTED) != (reason is SubmissionReason.NONE)
    ),
)
ARTIFACT_SENT_BYTES = _family(
    _FRONT_DOOR, Kind.COUNTER, "artifact_sent_bytes_total", "Bytes of pictures sent to clients."
)
ORPHANS = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "orphans_total",
    "Files, or whole folders of jobs, in the artifact store that no row names, by what became of them.",
    {"result": OrphanResult},
)
ORPHAN_REMOVED_BYTES = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "orphan_removed_bytes_total",
    "Bytes of what was removed from the artifact store since no row names it.",
)

# Queues and decisions.

# The limits of the objectives (30 s for fast, 1800 s for relax) are edges: only there is the share of good
# events exact.
_QUEUE_WAIT_S = (0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)

JOBS_QUEUED = _family(_SCHEDULER, Kind.GAUGE, "jobs_queued", "Jobs waiting.", {"tier": Tier})
JOBS_RUNNING = _family(_SCHEDULER, Kind.GAUGE, "jobs_running", "Jobs running.", {"tier": Tier})
JOBS_QUEUED_PEAK = _family(
    _SCHEDULER, Kind.GAUGE, "jobs_queued_peak", "Most jobs waiting within the last minute.", {"tier": Tier}
)
QUEUE_OLDEST_ENQUEUED = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "queue_oldest_enqueued_timestamp_seconds",
    "When the oldest waiting job was accepted; stands still while nothing waits.",
    {"tier": Tier},
)
JOB_QUEUE_WAIT = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "job_queue_wait_seconds",
    "Time before a job's first start in which nothing of its own account's held it.",
    {"tier": Tier},
    buckets=_QUEUE_WAIT_S,
    exemplars=True,
)
JOB_HELD = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "job_held_seconds",
    "Time before a job's first start in which it could not have started on any GPU, by why.",
    {"reason": HeldBecause},
    buckets=(1, 10, 60, 300, 1800, 7200, 43200),
)
JOB_RUN = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "job_run_seconds",
    "Time that an attempt had its GPU, if it ran to its end.",
    {"tier": Tier, "model": _OPEN},
    buckets=(0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600),
    exemplars=True,
)
JOB_STAGE = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "job_stage_seconds",
    "Time of one stage of an attempt.",
    {"stage": Stage, "model": _OPEN},
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120),
)
DENOISE_STEP = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "denoise_step_seconds",
    "Mean time of an attempt's denoising steps.",
    {"model": _OPEN},
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
JOBS = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "jobs_total",
    "Jobs that ended.",
    {
        "tier": Tier,
        "outcome": (Outcome.SUCCEEDED.value, Outcome.FAILED.value, Outcome.CANCELLED.value),
        "blame": Blame,
    },
    sets=(
        (tier, *ending)
        for tier, ending in product(
            Tier,
            (
                (Outcome.SUCCEEDED, Blame.NONE),
                (Outcome.CANCELLED, Blame.NONE),
                (Outcome.FAILED, Blame.CLIENT),
                (Outcome.FAILED, Blame.PLATFORM),
            ),
        )
    ),
)
JOB_REQUEUES = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "job_requeues_total",
    "Jobs that went back to their place in the queue.",
    {"reason": RequeueReason},
)
ETA_ERROR = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "eta_error_ratio",
    "What a job waited for its first start, divided by what was expected when it arrived.",
    {"tier": Tier},
    buckets=(0.1, 0.25, 0.5, 0.8, 1, 1.25, 2, 4, 10),
)
RELAX_ACTIVE_ACCOUNTS = _family(
    _SCHEDULER, Kind.GAUGE, "relax_active_accounts", "Accounts with relax jobs that wait or run."
)
RELAX_FAIRNESS_ERROR = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "relax_fairness_error_ratio",
    "Largest gap between a waiting account's fair and its real share of relax GPU time of late, 0 to 1.",
)
SCHEDULER_CYCLE = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "scheduler_cycle_seconds",
    "Time of one cycle of the loop.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
)
SCHEDULER_DECISIONS = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "scheduler_decisions_total",
    "Starts, and what kept the first of each line of jobs waiting, cycle by cycle.",
    {"tier": Tier, "result": DecisionResult},
)
SCHEDULER_LAST_CYCLE = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "scheduler_last_cycle_timestamp_seconds",
    "When the last cycle of the loop ended.",
)
SCHEDULER_LEADER = _family(_SCHEDULER, Kind.GAUGE, "scheduler_leader", "1 if this scheduler leads, 0 if not.")
PLACEMENTS = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "placements_total",
    "Attempts given to a worker, by whether it had the model.",
    {"tier": Tier, "residency": Residency},
)

# Preemption.

PARKS = _family(_SCHEDULER, Kind.COUNTER, "parks_total", "Relax runs parked for a fast job.")
PARK_WAIT_STEPS = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "park_wait_steps",
    "Steps from being asked to park to being parked.",
    buckets=(0, 1, 2, 3, 5),
)
RUNS_PARKED = _family(_SCHEDULER, Kind.GAUGE, "runs_parked", "Runs that are parked.")
STEPS_REDONE = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "steps_redone_total",
    "Steps done again since the first were lost with a GPU, at most.",
)
MIGRATIONS = _family(
    _SCHEDULER, Kind.COUNTER, "migrations_total", "Parked runs that moved to another worker."
)
CHECKPOINT_SECONDS = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "checkpoint_seconds",
    "Making and storing a checkpoint, beside its run.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
CHECKPOINT_BYTES = _family(
    _SCHEDULER, Kind.COUNTER, "checkpoint_bytes_total", "Content of stored checkpoints."
)
RESUMES = _family(
    _SCHEDULER, Kind.COUNTER, "resumes_total", "Parked runs that went on, by where.", {"where": ResumedWhere}
)

# GPU fleet.

GPU_WORKERS = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "gpu_workers",
    "Workers by state; the states add up to the fleet.",
    {"state": WorkerState},
)
GPU_WORKERS_DESIRED = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "gpu_workers_desired",
    "Workers that the work there is asks for; of a fixed fleet, one for each GPU that was not told to leave.",
)
GPU_TIME = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "gpu_time_seconds_total",
    "GPU time by use; the uses add up to wall time times GPUs.",
    {"use": GpuUse},
)
MODEL_LOADS = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "model_loads_total",
    "Models loaded for an attempt.",
    {"model": _OPEN, "result": LoadResult},
)
MODEL_LOAD = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "model_load_seconds",
    "Time an attempt waited for its model to load.",
    {"model": _OPEN},
    buckets=(0.5, 1, 2, 5, 10, 20, 30, 60, 120),
)
GPU_MEMORY_USED = _family(
    _SCHEDULER, Kind.GAUGE, "gpu_memory_used_bytes", "GPU memory in use.", {"worker": _OPEN}
)
GPU_MEMORY_CAPACITY = _family(
    _SCHEDULER, Kind.GAUGE, "gpu_memory_capacity_bytes", "GPU memory.", {"worker": _OPEN}
)
WORKER_HEARTBEAT = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "worker_heartbeat_timestamp_seconds",
    "When a worker was last heard of.",
    {"worker": _OPEN},
)
WORKER_LOSSES = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "worker_losses_total",
    "Times that a slot's worker died, fell silent or was another without having been told to go.",
    {"worker": _OPEN},
)
WORKER_RESTARTS = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "worker_restarts_total",
    "Workers that took the place of another, by what became of that.",
    {"reason": RestartReason},
)

# Money.

BILLING_GPU_SECONDS = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "billing_gpu_seconds_total",
    "Fast GPU time that the ledger moved.",
    {"plan": _OPEN, "kind": BillingKind},
)
BILLING_MEASURED = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "billing_measured_gpu_seconds_total",
    "Fast GPU time measured that accounts owe, as their plans price it.",
    {"plan": _OPEN},
)
BILLING_HOLDS = _family(_SCHEDULER, Kind.GAUGE, "billing_holds", "Open holds.")
BILLING_HELD = _family(_SCHEDULER, Kind.GAUGE, "billing_held_gpu_seconds", "GPU time in open holds.")
BILLING_OLDEST_HOLD = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "billing_oldest_hold_timestamp_seconds",
    "When the oldest open hold was placed; stands still while there is none.",
)
BILLING_REJECTIONS = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "billing_rejections_total",
    "Jobs the ledger refused at acceptance.",
    {"plan": _OPEN, "reason": BillingRejection},
)
BILLING_REPLAYS = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "billing_replays_total",
    "Requests that were answered with what they did before.",
    {
        "operation": tuple(
            method.name for method in _methods() if "request_id" in method.input_type.fields_by_name
        )
    },
)
BILLING_COMMITS = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "billing_commits_total",
    "Transactions with settlements, by what became of them.",
    {"result": CommitResult},
)
BILLING_COMMIT_SECONDS = _family(
    _SCHEDULER,
    Kind.HISTOGRAM,
    "billing_commit_seconds",
    "Time of a transaction with settlements.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
)
BILLING_THRESHOLDS = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "billing_thresholds_total",
    "Accounts that used up this percent of a period's fast time.",
    {"plan": _OPEN, "percent": tuple(map(str, PERCENTS))},
)
BILLING_DRIFT = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "billing_drift_gpu_seconds",
    "GPU time by which lots differ from the journal, each gap without its sign.",
)
BILLING_RECONCILE_LAST_SUCCESS = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "billing_reconcile_last_success_timestamp_seconds",
    "When the ledger was last compared with its balances, whatever was found.",
)
BILLING_RECONCILE_RUNS = _family(
    _SCHEDULER,
    Kind.COUNTER,
    "billing_reconcile_runs_total",
    "Comparisons of the ledger with its balances.",
    {"result": ReconcileResult},
)
ACCOUNTS = _family(_SCHEDULER, Kind.GAUGE, "accounts", "Accounts that are not erased.", {"plan": _OPEN})
ACCOUNTS_EXHAUSTED = _family(
    _SCHEDULER,
    Kind.GAUGE,
    "accounts_exhausted",
    "Accounts without fast time that have not agreed to overage.",
    {"plan": _OPEN},
)
ADMIN_ACTIONS = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "admin_actions_total",
    "Calls of admins that change something.",
    {"action": AdminAction, "result": AdminResult},
)

# Machinery.

DB_POOL_CONNECTIONS = _family(
    _FRONT_DOOR, Kind.GAUGE, "db_pool_connections", "Connections of the database pool.", {"state": PoolState}
)
DB_POOL_WAIT = _family(
    _FRONT_DOOR,
    Kind.HISTOGRAM,
    "db_pool_wait_seconds",
    "Time a request waited for a database connection.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
)
DB_QUERY = _family(
    _BOTH,
    Kind.HISTOGRAM,
    "db_query_seconds",
    "Time of a statement, of those that have a name.",
    {"query": DbQuery},
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
    # Each process has its own.
    sets=(),
)
DB_ERRORS = _family(
    _BOTH, Kind.COUNTER, "db_errors_total", "Statements and connections that failed.", {"class": DbErrorClass}
)
EVENT_LOOP_LAG = _family(
    _BOTH,
    Kind.HISTOGRAM,
    "event_loop_lag_seconds",
    "How much later than asked for the event loop came to what was due.",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
LOG_MESSAGES = _family(
    _BOTH, Kind.COUNTER, "log_messages_total", "Log lines written, by level.", {"level": LogLevel}
)
CANARY_JOBS = _family(
    _FRONT_DOOR,
    Kind.COUNTER,
    "canary_jobs_total",
    "Jobs that the service gave itself, by how they ended.",
    {"tier": Tier, "outcome": CanaryOutcome},
)
CANARY_LAST_SUCCESS = _family(
    _FRONT_DOOR,
    Kind.GAUGE,
    "canary_last_success_timestamp_seconds",
    "When a job that the service gave itself last succeeded; 0: not yet.",
    {"tier": Tier},
    sets=(),
)
BUILD_INFO = _family(
    _BOTH,
    Kind.GAUGE,
    "build_info",
    "Always 1; what runs is in its labels.",
    dict.fromkeys(("version", "commit", "python", "ray", "torch", "protobuf"), _OPEN),
    sets=(),
)
CONFIG_INFO = _family(
    _BOTH,
    Kind.GAUGE,
    "config_info",
    "Always 1; processes with the same settings have the same hash.",
    {"hash": _OPEN},
    sets=(),
)

_GENERATIONS = ("0", "1", "2")
for _name, _kind, _labels in (
    ("process_virtual_memory_bytes", Kind.GAUGE, {}),
    ("process_resident_memory_bytes", Kind.GAUGE, {}),
    ("process_start_time_seconds", Kind.GAUGE, {}),
    ("process_cpu_seconds_total", Kind.COUNTER, {}),
    ("process_open_fds", Kind.GAUGE, {}),
    ("process_max_fds", Kind.GAUGE, {}),
    ("python_gc_objects_collected_total", Kind.COUNTER, {"generation": _GENERATIONS}),
    ("python_gc_objects_uncollectable_total", Kind.COUNTER, {"generation": _GENERATIONS}),
    ("python_gc_collections_total", Kind.COUNTER, {"generation": _GENERATIONS}),
):
    _ALL.append(
        Family(
            name=_name,
            kind=_kind,
            help="Of the client library, about its process.",
            labels=_labels,
            processes=_BOTH,
            ours=False,
        )
    )
