"""What a front door measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scheduler.metrics import families
from scheduler.metrics.family import Registry
from scheduler.metrics.labels import (
    AdminAction,
    AdminResult,
    CanaryOutcome,
    DbQuery,
    OrphanResult,
    PoolState,
    SubmissionOutcome,
    SubmissionReason,
)
from scheduler.metrics.page import Page, exemplar, page_of
from scheduler.metrics.process import ProcessMetrics
from scheduler.policy.ids import Tier

_QUERIES = (
    DbQuery.FIND_KEYS,
    DbQuery.CLAIM_REQUEST,
    DbQuery.INSERT_JOB,
    DbQuery.READ_JOB,
    DbQuery.LIST_JOBS,
)


class FrontDoorMetrics:
    """The families of the process with the gRPC service."""

    def __init__(self, plans: Iterable[str]) -> None:
        """Make them, every known label set at 0."""
        registry = Registry(plan=plans)
        self.registry = registry
        self.process = ProcessMetrics(registry, queries=_QUERIES)
        self.grpc_server_started = registry.counter(families.GRPC_STARTED)
        self.grpc_server_handled = registry.counter(families.GRPC_HANDLED)
        self.grpc_server_handling_seconds = registry.histogram(families.GRPC_HANDLING)
        self.grpc_server_msg_sent = registry.counter(families.GRPC_MSG_SENT)
        self.grpc_server_msg_received = registry.counter(families.GRPC_MSG_RECEIVED)
        self.watch_streams = registry.gauge(families.WATCH_STREAMS)
        self.submissions = registry.counter(families.SUBMISSIONS)
        self.artifact_sent_bytes = registry.counter(families.ARTIFACT_SENT_BYTES)
        self.orphans = registry.counter(families.ORPHANS)
        self.orphan_removed_bytes = registry.counter(families.ORPHAN_REMOVED_BYTES)
        self.billing_rejections = registry.counter(families.BILLING_REJECTIONS)
        self.billing_replays = registry.counter(families.BILLING_REPLAYS)
        self.admin_actions = registry.counter(families.ADMIN_ACTIONS)
        self.db_pool_connections = registry.gauge(families.DB_POOL_CONNECTIONS)
        self.db_pool_wait_seconds = registry.histogram(families.DB_POOL_WAIT)
        self.canary_jobs = registry.counter(families.CANARY_JOBS)
        self.canary_last_success_timestamp_seconds = registry.gauge(families.CANARY_LAST_SUCCESS)

    def call_ended(
        self, *, rpc: tuple[str, str, str], code: str, took_s: float, trace_id: str | None = None
    ) -> None:
        """Count one call. `rpc`: its type, service and method."""
        self.grpc_server_handled.labels(*rpc, code).inc()
        grpc_type, service, method = rpc
        if grpc_type == "unary":
            self.grpc_server_handling_seconds.labels(service, method).observe(took_s, exemplar(trace_id))

    def job_submitted(
        self, *, tier: Tier, outcome: SubmissionOutcome, reason: SubmissionReason = SubmissionReason.NONE
    ) -> None:
        """Count one CreateJob request. Only a rejection has a reason."""
        assert (outcome is SubmissionOutcome.REJECTED) == (reason is not SubmissionReason.NONE)
        self.submissions.labels(tier, outcome, reason).inc()

    def orphans_noted(self, orphans: int) -> None:
        """Count what nobody names in the artifact store and was not noted before."""
        self.orphans.labels(OrphanResult.NOTED).inc(orphans)

    def orphan_removed(self, size_bytes: int) -> None:
        """Count one that was removed."""
        self.orphans.labels(OrphanResult.REMOVED).inc()
        self.orphan_removed_bytes.inc(size_bytes)

    def orphan_is_stray(self) -> None:
        """Count a picture of prompts that the sweep of strays will remove."""
        self.orphans.labels(OrphanResult.STRAY).inc()

    def admin_acted(self, *, action: AdminAction, result: AdminResult) -> None:
        """Count one call of an admin."""
        self.admin_actions.labels(action, result).inc()

    def replayed(self, operation: str) -> None:
        """Count a call that was answered with what the same request did before. `operation`: the method."""
        self.billing_replays.labels(operation).inc()

    def canary_ended(self, *, tier: Tier, outcome: CanaryOutcome, at_s: float) -> None:
        """Count a job of the canary's."""
        self.canary_jobs.labels(tier, outcome).inc()
        if outcome is CanaryOutcome.SUCCEEDED:
            self.canary_last_success_timestamp_seconds.labels(tier).set(at_s)

    def canary_sings(self, *, at_s: float) -> None:
        """Show that there is a canary. Its age counts from now: from 1970 on, a restart would be an alarm."""
        for tier in Tier:
            self.canary_last_success_timestamp_seconds.labels(tier).set(at_s)

    def follow_pool(self, *, most: int, used: Callable[[], int]) -> None:
        """Ask `used` at every scrape. What may still be lent is idle, open or not: of that none is left."""
        self.db_pool_connections.labels(PoolState.IDLE).set_function(lambda: most - used())
        self.db_pool_connections.labels(PoolState.USED).set_function(used)

    def page(self, accept: str = "") -> Page:
        """Return all families, in the format that a scraper's header asks for."""
        return page_of(self.registry, accept)
