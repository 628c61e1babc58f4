"""What the scheduler's process measures: queues, decisions, the fleet, and what settlements move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gpu_worker.contract import (
    AttemptResult,
    Blame,
    Checkpoint,
    GpuTime,
    Outcome,
    StageTimes,
    WorkerReport,
)
from scheduler.metrics import families
from scheduler.metrics.family import Registry
from scheduler.metrics.gpu_time import GpuTimeAccount, RollingPeak, spent_ms
from scheduler.metrics.labels import (
    BillingKind,
    CommitResult,
    DbQuery,
    DecisionResult,
    GpuUse,
    HeldBecause,
    LoadResult,
    ReconcileResult,
    RequeueReason,
    Residency,
    RestartReason,
    ResumedWhere,
    Stage,
    WorkerState,
)
from scheduler.metrics.page import Page, exemplar, page_of
from scheduler.metrics.process import ProcessMetrics
from scheduler.policy.ids import Tier

PEAK_WINDOW_MS = 60_000
"""A gauge read at each scrape misses bursts between two of them; the highest value of a minute does not."""

_QUERIES = (
    DbQuery.UNHEEDED_JOBS,
    DbQuery.NOTICED_JOBS,
    DbQuery.INSERT_HOLDS,
    DbQuery.START_ATTEMPTS,
    DbQuery.CLOSE_ATTEMPTS,
    DbQuery.INSERT_SETTLEMENTS,
    DbQuery.OPEN_HOLDS,
    DbQuery.WRITE_JOURNAL,
    DbQuery.RECONCILE,
)


_UNLOADABLE = ("MODEL_MISSING", "MODEL_UNUSABLE")


class SchedulerMetrics:
    """The families of the process with the loop."""

    def __init__(self, plans: Iterable[str], models: Iterable[str], *, now_ms: int) -> None:
        """Make those of a scheduler that starts at `now_ms`, every known label set at 0.

        The slots of a fleet are not known beforehand: a worker's series begin with its first report.
        """
        registry = Registry(plan=plans, model=models)
        self.registry = registry
        self.process = ProcessMetrics(registry, queries=_QUERIES)
        self.gpu_time = GpuTimeAccount(since_ms=now_ms)
        self.peaks = {tier: RollingPeak(PEAK_WINDOW_MS) for tier in Tier}
        self.jobs_queued = registry.gauge(families.JOBS_QUEUED)
        self.jobs_running = registry.gauge(families.JOBS_RUNNING)
        self.jobs_queued_peak = registry.gauge(families.JOBS_QUEUED_PEAK)
        self.queue_oldest_enqueued_timestamp_seconds = registry.gauge(families.QUEUE_OLDEST_ENQUEUED)
        self.job_queue_wait_seconds = registry.histogram(families.JOB_QUEUE_WAIT)
        self.job_held_seconds = registry.histogram(families.JOB_HELD)
        self.job_run_seconds = registry.histogram(families.JOB_RUN)
        self.job_stage_seconds = registry.histogram(families.JOB_STAGE)
        self.denoise_step_seconds = registry.histogram(families.DENOISE_STEP)
        self.jobs = registry.counter(families.JOBS)
        self.job_requeues = registry.counter(families.JOB_REQUEUES)
        self.eta_error_ratio = registry.histogram(families.ETA_ERROR)
        self.relax_active_accounts = registry.gauge(families.RELAX_ACTIVE_ACCOUNTS)
        self.relax_fairness_error_ratio = registry.gauge(families.RELAX_FAIRNESS_ERROR)
        self.scheduler_cycle_seconds = registry.histogram(families.SCHEDULER_CYCLE)
        self.scheduler_decisions = registry.counter(families.SCHEDULER_DECISIONS)
        self.scheduler_last_cycle_timestamp_seconds = registry.gauge(families.SCHEDULER_LAST_CYCLE)
        self.scheduler_leader = registry.gauge(families.SCHEDULER_LEADER)
        self.placements = registry.counter(families.PLACEMENTS)
        self.parks = registry.counter(families.PARKS)
        self.park_wait_steps = registry.histogram(families.PARK_WAIT_STEPS)
        self.runs_parked = registry.gauge(families.RUNS_PARKED)
        self.steps_redone = registry.counter(families.STEPS_REDONE)
        self.migrations = registry.counter(families.MIGRATIONS)
        self.checkpoint_seconds = registry.histogram(families.CHECKPOINT_SECONDS)
        self.checkpoint_bytes = registry.counter(families.CHECKPOINT_BYTES)
        self.resumes = registry.counter(families.RESUMES)
        self.gpu_workers = registry.gauge(families.GPU_WORKERS)
        self.gpu_workers_desired = registry.gauge(families.GPU_WORKERS_DESIRED)
        self.gpu_time_seconds = registry.counter(families.GPU_TIME)
        self.model_loads = registry.counter(families.MODEL_LOADS)
        self.model_load_seconds = registry.histogram(families.MODEL_LOAD)
        self.gpu_memory_used_bytes = registry.gauge(families.GPU_MEMORY_USED)
        self.gpu_memory_capacity_bytes = registry.gauge(families.GPU_MEMORY_CAPACITY)
        self.worker_heartbeat_timestamp_seconds = registry.gauge(families.WORKER_HEARTBEAT)
        self.worker_losses = registry.counter(families.WORKER_LOSSES)
        self.worker_restarts = registry.counter(families.WORKER_RESTARTS)
        self.billing_gpu_seconds = registry.counter(families.BILLING_GPU_SECONDS)
        self.billing_measured_gpu_seconds = registry.counter(families.BILLING_MEASURED)
        self.billing_holds = registry.gauge(families.BILLING_HOLDS)
        self.billing_held_gpu_seconds = registry.gauge(families.BILLING_HELD)
        self.billing_oldest_hold_timestamp_seconds = registry.gauge(families.BILLING_OLDEST_HOLD)
        self.billing_commits = registry.counter(families.BILLING_COMMITS)
        self.billing_commit_seconds = registry.histogram(families.BILLING_COMMIT_SECONDS)
        self.billing_thresholds = registry.counter(families.BILLING_THRESHOLDS)
        self.billing_drift_gpu_seconds = registry.gauge(families.BILLING_DRIFT)
        self.billing_reconcile_last_success_timestamp_seconds = registry.gauge(
            families.BILLING_RECONCILE_LAST_SUCCESS
        )
        self.billing_reconcile_runs = registry.counter(families.BILLING_RECONCILE_RUNS)
        self.accounts = registry.gauge(families.ACCOUNTS)
        self.accounts_exhausted = registry.gauge(families.ACCOUNTS_EXHAUSTED)

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

    def line_waits(self, tier: Tier, result: DecisionResult) -> None:
        """Count one line of jobs that need the same, in which somebody waits at the end of a cycle."""
        self.scheduler_decisions.labels(tier, result).inc()

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

    def run_ended(self, model: str, result: AttemptResult) -> None:
        """Count what being parked, loading and going on elsewhere came to, however the attempt ended."""
        self.steps_redone.inc(result.steps_redone)
        for steps in result.park_waits:
            self.park_wait_steps.observe(steps)
        if result.failure_reason in _UNLOADABLE:
            self.model_loads.labels(model, LoadResult.FAILED).inc()
        elif result.load_ms:
            self.model_loads.labels(model, LoadResult.LOADED).inc()
            self.model_load_seconds.labels(model).observe(result.load_ms / 1000)

    def job_started(
        self,
        *,
        tier: Tier,
        waited_ms: int,
        held_ms: Mapping[HeldBecause, int],
        promised_ms: int | None,
        trace_id: str | None = None,
    ) -> None:
        """Observe how long a job waited for its first start, and what of that its own account held it.

        `promised_ms` is how long it was told to wait when it came; None: it was told nothing, or no wait.
        """
        for reason, ms in held_ms.items():
            self.job_held_seconds.labels(reason).observe(ms / 1000)
        # The two are measured by two clocks.
        eligible_ms = max(0, waited_ms - sum(held_ms.values()))
        self.job_queue_wait_seconds.labels(tier).observe(eligible_ms / 1000, exemplar(trace_id))
        if promised_ms:
            self.eta_error_ratio.labels(tier).observe(waited_ms / promised_ms)

    def attempt_placed(self, *, model: str, took_ms: int) -> None:
        """Observe how long a worker took to take an attempt that it was given."""
        self.job_stage_seconds.labels(Stage.PLACE, model).observe(took_ms / 1000)

    def attempt_ended(
        self,
        *,
        tier: Tier,
        model: str,
        run_ms: int,
        load_ms: int,
        times: StageTimes,
        deliver_ms: int | None,
        steps: int,
        trace_id: str | None = None,
    ) -> None:
        """Observe an attempt that ran to its end. A stage of 0 ms did not happen and is not observed.

        `deliver_ms` is None where it was not seen to deliver. `steps` are the denoising steps that it did, 0
        where nobody knows how many.
        """
        self.job_run_seconds.labels(tier, model).observe(run_ms / 1000, exemplar(trace_id))
        for stage, took_ms in (
            (Stage.LOAD, load_ms),
            (Stage.ENCODE, times.encode_ms),
            (Stage.DENOISE, times.denoise_ms),
            (Stage.DECODE, times.decode_ms),
            (Stage.UPSCALE, times.upscale_ms),
        ):
            if took_ms:
                self.job_stage_seconds.labels(stage, model).observe(took_ms / 1000)
        if deliver_ms is not None:
            self.job_stage_seconds.labels(Stage.DELIVER, model).observe(deliver_ms / 1000)
        if steps:
            self.denoise_step_seconds.labels(model).observe(times.denoise_ms / steps / 1000)

    def job_requeued(self, reason: RequeueReason) -> None:
        """Count a job that went back to its place."""
        self.job_requeues.labels(reason).inc()

    def job_ended(self, *, tier: Tier, outcome: Outcome, blame: Blame = Blame.NONE) -> None:
        """Count a job at its end. Exactly the failed ones have somebody to blame."""
        assert (outcome is Outcome.FAILED) == (blame is not Blame.NONE), (outcome, blame)
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
        self._spent(self.gpu_time.add(report.worker_id, report.incarnation, report.gpu_time, now_ms))

    def worker_began(self, worker_id: str, incarnation: str) -> None:
        """Show that a slot has a worker. What its earlier lives told has been added."""
        self.worker_losses.labels(worker_id)
        self.gpu_time.forget(worker_id, but=incarnation)

    def worker_lost(self, worker_id: str) -> None:
        """Count the end of a slot's worker that nobody had asked for."""
        self.worker_losses.labels(worker_id).inc()

    def worker_restarted(self, reason: RestartReason) -> None:
        """Count a worker in the place of another."""
        self.worker_restarts.labels(reason).inc()

    def worker_ended(self, worker_id: str, incarnation: str, *, busy: bool, now_ms: int) -> None:
        """Add the time of a worker that it will not tell of any more. `busy`: it had something in hand."""
        self._spent(self.gpu_time.close(worker_id, incarnation, busy=busy, now_ms=now_ms))

    def worker_forgotten(self, worker_id: str) -> None:
        """Show nothing any more of a slot that is gone for good; what its lives took stays counted."""
        for family in (
            self.worker_heartbeat_timestamp_seconds,
            self.gpu_memory_used_bytes,
            self.gpu_memory_capacity_bytes,
            self.worker_losses,
        ):
            family.remove(worker_id)
        self.gpu_time.forget(worker_id)

    def _spent(self, time: GpuTime) -> None:
        for use in GpuUse:
            self.gpu_time_seconds.labels(use).inc(spent_ms(time, use) / 1000)

    def settlement_committed(self, took_s: float) -> None:
        """Observe a transaction with settlements."""
        self.billing_commits.labels(CommitResult.COMMITTED).inc()
        self.billing_commit_seconds.observe(took_s)

    def settlement_failed(self) -> None:
        """Count a transaction with settlements that was rolled back, or whose answer was lost."""
        self.billing_commits.labels(CommitResult.FAILED).inc()

    def settled(
        self, *, plan: str, due_ms: int, billed_ms: int, released_ms: int, thresholds: Iterable[int] = ()
    ) -> None:
        """Add what one settlement debited from the plan's fast time, and what of its hold it gave back.

        `due_ms` is what its measured time costs. `thresholds` are the percents of its account's time that are
        used up with it.
        """
        self.billing_measured_gpu_seconds.labels(plan).inc(due_ms / 1000)
        for percent in thresholds:
            self.billing_thresholds.labels(plan, str(percent)).inc()
        self.billing_gpu_seconds.labels(plan, BillingKind.DEBIT).inc(billed_ms / 1000)
        self.billing_gpu_seconds.labels(plan, BillingKind.RELEASE).inc(released_ms / 1000)

    def holds_seen(self, *, holds: int, held_ms: int, oldest_ms: int | None) -> None:
        """Show the ledger's open holds. `oldest_ms` is when the oldest was placed; None: there is none."""
        self.billing_holds.set(holds)
        self.billing_held_gpu_seconds.set(held_ms / 1000)
        if oldest_ms is not None:
            self.billing_oldest_hold_timestamp_seconds.set(oldest_ms / 1000)

    def reconciled(self, *, drift_ms: int, now_ms: int) -> None:
        """Show by how much the ledger and its balances differ, as far as they have been compared."""
        self.billing_drift_gpu_seconds.set(drift_ms / 1000)
        self.billing_reconcile_last_success_timestamp_seconds.set(now_ms / 1000)
        result = ReconcileResult.DRIFTED if drift_ms else ReconcileResult.CLEAN
        self.billing_reconcile_runs.labels(result).inc()

    def not_reconciled(self) -> None:
        """Count a comparison that did not come to an end."""
        self.billing_reconcile_runs.labels(ReconcileResult.FAILED).inc()

    def fast_time_moved(self, *, plan: str, kind: BillingKind, ms: int) -> None:
        """Add fast time that came to accounts of a plan, or went, but for what settlements moved."""
        self.billing_gpu_seconds.labels(plan, kind).inc(ms / 1000)

    def accounts_seen(self, *, plan: str, accounts: int, exhausted: int) -> None:
        """Show how many accounts are on a plan, and how many of them can start nothing fast."""
        self.accounts.labels(plan).set(accounts)
        self.accounts_exhausted.labels(plan).set(exhausted)

    def relax_seen(self, *, active_accounts: int, fairness_error: float) -> None:
        """Show how relax is shared. `fairness_error` is from 0 to 1."""
        self.relax_active_accounts.set(active_accounts)
        self.relax_fairness_error_ratio.set(fairness_error)

    def page(self, accept: str = "") -> Page:
        """Return all families, in the format that a scraper's header asks for."""
        return page_of(self.registry, accept)
