"""Every metric of the service: `catalogue()` has their names, types and labels, and one module declares them.

Two processes produce them. A front door shows its own at `/metrics`; scrape every replica. The leading
scheduler has no port: any front door asks it and shows its families at `/metrics/scheduler`. Scrape that page
once, through one address, with a constant `instance`: then no rule and no panel has to take several copies of
one counter apart. Without a scheduler the page answers 503, and `up` of that target is 0.

Workers have no metrics of their own: their numbers come with results and heartbeats.

Labels are closed enumerations (`labels`), and a label set that is known beforehand starts at 0. Trace ids are
in exemplars, which a scraper gets that asks for OpenMetrics.

To add a metric: declare its family in `families`, make it in `front_door`, `scheduler` or `process`, let its
producer count, and let a test drive it through that producer.
"""

from scheduler.metrics.families import catalogue
from scheduler.metrics.family import Family, Kind, Process
from scheduler.metrics.front_door import FrontDoorMetrics
from scheduler.metrics.gpu_time import GpuTimeAccount, RollingPeak
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
from scheduler.metrics.page import Page
from scheduler.metrics.process import ProcessMetrics
from scheduler.metrics.scheduler import SchedulerMetrics

__all__ = [
    "AdminAction",
    "AdminResult",
    "BillingKind",
    "BillingRejection",
    "CanaryOutcome",
    "CommitResult",
    "DbErrorClass",
    "DbQuery",
    "DecisionResult",
    "Family",
    "FrontDoorMetrics",
    "GpuTimeAccount",
    "GpuUse",
    "HeldBecause",
    "Kind",
    "LoadResult",
    "LogLevel",
    "OrphanResult",
    "Page",
    "PoolState",
    "Process",
    "ProcessMetrics",
    "ReconcileResult",
    "RequeueReason",
    "Residency",
    "RestartReason",
    "ResumedWhere",
    "RollingPeak",
    "SchedulerMetrics",
    "Stage",
    "SubmissionOutcome",
    "SubmissionReason",
    "WorkerState",
    "catalogue",
]
