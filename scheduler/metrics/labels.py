"""The closed values of the labels: a value that is not here is in no series.

`tier` has those of the policy. Plans and models are configured, and a worker is its slot's stable name; an
account, job, key or prompt is never a label.
"""

from __future__ import annotations

from enum import StrEnum


class SubmissionOutcome(StrEnum):
    """What became of a request to create a job."""

    ACCEPTED = "accepted"
    REPLAYED = "replayed"
    REJECTED = "rejected"


class SubmissionReason(StrEnum):
    """Why a request to create a job was rejected; the lower-case form of the error's reason."""

    NONE = "none"
    """It was not."""
    INVALID_PARAMETER = "invalid_parameter"
    PICTURE_UNREADABLE = "picture_unreadable"
    MODERATION_REJECTED = "moderation_rejected"
    REQUEST_ID_REUSED = "request_id_reused"
    FAST_TIME_EXHAUSTED = "fast_time_exhausted"
    PLAN_LACKS_PRIVATE = "plan_lacks_private"
    FAST_ONLY = "fast_only"
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    IMPOSSIBLE = "impossible"
    SOURCE_NOT_READY = "source_not_ready"
    PICTURES_EXPIRED = "pictures_expired"
    NOT_FOUND_OR_NOT_YOURS = "not_found_or_not_yours"
    UNAUTHENTICATED = "unauthenticated"
    ROLE_REQUIRED = "role_required"
    ACCOUNT_BLOCKED = "account_blocked"
    UNKNOWN_ACCOUNT = "unknown_account"


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
    """Part of an attempt's time: `place` until its worker has it, `deliver` once it needs no GPU more."""

    PLACE = "place"
    LOAD = "load"
    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    UPSCALE = "upscale"
    DELIVER = "deliver"


class RequeueReason(StrEnum):
    """Why an attempt was given up and its job went back to its place."""

    WORKER_LOST = "worker_lost"
    """Its worker died, fell silent, or has it no more."""
    NOT_TAKEN = "not_taken"
    """Its worker refused it, or never got it."""
    FAILED = "failed"
    """Its worker told of a failure that was not its owner's."""
    OOM = "oom"
    """Its worker's GPU was too small for it."""
    TIMEOUT = "timeout"
    """It ran far longer than any job may: its GPU hangs."""
    DRAIN = "drain"
    """Its worker was told to hand it over."""


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
    """It is on its way."""
    IDLE = "idle"
    LOADING = "loading"
    RUNNING = "running"
    DRAINING = "draining"
    """It was told to take nothing more, and has nothing in hand."""
    UNHEALTHY = "unhealthy"
    """It is there and gets nothing: its GPU is not well, or it lost too many jobs in a row."""
    LOST = "lost"
    """It should be there."""


class GpuUse(StrEnum):
    """Where GPU time went: a closed account."""

    FAST = "fast"
    RELAX = "relax"
    LOAD = "load"
    WASTED = "wasted"
    IDLE = "idle"


class HeldBecause(StrEnum):
    """What kept a waiting job from being eligible."""

    CONCURRENCY_LIMIT = "concurrency_limit"
    FUNDS = "funds"
    TIER_PAUSED = "tier_paused"


class LoadResult(StrEnum):
    """How the loading of a model ended."""

    LOADED = "loaded"
    FAILED = "failed"


class RestartReason(StrEnum):
    """Why a slot has another worker than before."""

    DIED = "died"
    SILENT = "silent"
    RESTARTED = "restarted"
    REPLACED = "replaced"


class OrphanResult(StrEnum):
    """What became of something in the artifact store that no row names."""

    NOTED = "noted"
    """It was not noted before."""
    REMOVED = "removed"
    STRAY = "stray"
    """A picture of prompts, that is left to the sweep of strays."""


class BillingKind(StrEnum):
    """What happened to an account's fast time."""

    DEBIT = "debit"
    """Charged for measured time."""
    RELEASE = "release"
    """Held for an attempt, and given back."""
    CREDIT = "credit"
    """Granted with a period, a plan or a purchase, or refunded."""
    ADJUST = "adjust"
    """Given or taken by an admin."""
    EXPIRE = "expire"
    """Ended with its period."""


class CommitResult(StrEnum):
    """What became of a transaction with settlements."""

    COMMITTED = "committed"
    FAILED = "failed"


class ReconcileResult(StrEnum):
    """What a comparison of the ledger with its balances found."""

    CLEAN = "clean"
    DRIFTED = "drifted"
    FAILED = "failed"


class CanaryOutcome(StrEnum):
    """How a job of the canary's ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LATE = "late"
    REFUSED = "refused"


class DbErrorClass(StrEnum):
    """What kind of trouble the database made."""

    AWAY = "away"
    """Not reached, or the connection broke."""
    TIMEOUT = "timeout"
    AGAIN = "again"
    """A deadlock, a conflict or a new schema: the transaction is repeated."""
    REFUSED = "refused"
    """A constraint or a value."""
    OTHER = "other"


class LogLevel(StrEnum):
    """Of a log line."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class DbQuery(StrEnum):
    """A statement with a name, which it begins with: `/* insert_job */ INSERT …`. Others are not measured."""

    FIND_KEYS = "find_keys"
    CLAIM_REQUEST = "claim_request"
    INSERT_JOB = "insert_job"
    READ_JOB = "read_job"
    LIST_JOBS = "list_jobs"
    UNHEEDED_JOBS = "unheeded_jobs"
    NOTICED_JOBS = "noticed_jobs"
    INSERT_HOLDS = "insert_holds"
    START_ATTEMPTS = "start_attempts"
    CLOSE_ATTEMPTS = "close_attempts"
    INSERT_SETTLEMENTS = "insert_settlements"
    OPEN_HOLDS = "open_holds"
    WRITE_JOURNAL = "write_journal"
    RECONCILE = "reconcile"
