"""The five boards, each a question that nine panels at most answer.

    python -m deploy.grafana.boards

writes them to deploy/grafana/boards/, which is committed; a test compares. Alerts link to a panel by its
number, which is its place: a new panel goes to the end.
"""

from __future__ import annotations

from pathlib import Path

from deploy.grafana.drawing import GREEN, RED, YELLOW, Board, Panel, Query, Shape, as_json

FOLDER = Path(__file__).resolve().with_suffix("")

_OURS = 'job=~"$job", cluster=~"$cluster"'
_RAYS = 'cluster=~"$cluster"'  # Ray's nodes are another job


def ask(expr: str, legend: str, *, exemplars: bool = False, unit: str | None = None) -> Query:
    """Return a query; `@` in it stands for the selectors of the board's variables, `@ray` for Ray's."""
    asked = expr.replace("@ray", _RAYS).replace("@", _OURS)
    return Query(expr=asked, legend=legend, exemplars=exemplars, unit=unit)


def budget(slo: str) -> tuple[Query]:
    """Return the query for what is left of an objective's errors."""
    return (ask(f'min(cluster_job:darkroom_slo_budget_left:ratio30d{{slo="{slo}", @}})', "left"),)


_BUDGET = ((None, RED), (0, YELLOW), (0.25, GREEN))
_BUDGET_MEANS = (
    " 100 %: nothing went wrong in 30 days, or as long as Prometheus remembers; "
    "below 0 %: the objective is missed."
)

HEALTH = Board(
    uid="darkroom-health",
    question="Is it healthy?",
    means="The four promises and what is left of them, what comes in, and what is wrong at the moment.",
    panels=(
        Panel(
            question="Do FAST jobs start within 30 s?",
            means="Budget left of the objective that 99 % of FAST jobs start within 30 s of being "
            "eligible." + _BUDGET_MEANS,
            unit="percentunit",
            queries=budget("fast-start"),
            shape=Shape.TILE,
            limits=_BUDGET,
        ),
        Panel(
            question="Do RELAX jobs start within 30 min?",
            means="Budget left of the objective that 95 % of RELAX jobs start within 30 min of being "
            "eligible." + _BUDGET_MEANS,
            unit="percentunit",
            queries=budget("relax-start"),
            shape=Shape.TILE,
            limits=_BUDGET,
        ),
        Panel(
            question="Do jobs end well?",
            means="Budget left of the objective that 99.5 % of jobs end without a failure of the "
            "platform's." + _BUDGET_MEANS,
            unit="percentunit",
            queries=budget("job-success"),
            shape=Shape.TILE,
            limits=_BUDGET,
        ),
        Panel(
            question="Does the front door answer?",
            means="Budget left of the objective that 99.9 % of unary calls end within 1 s and without "
            "an error of the service's." + _BUDGET_MEANS,
            unit="percentunit",
            queries=budget("front-door"),
            shape=Shape.TILE,
            limits=_BUDGET,
        ),
        Panel(
            question="What becomes of what people submit?",
            means="Requests to create a job, by what became of them and, where rejected, why.",
            unit="reqps",
            queries=(
                ask(
                    "sum by (outcome, reason) (rate(darkroom_submissions_total{@}[$__rate_interval]))",
                    "{{outcome}} {{reason}}",
                ),
            ),
            shape=Shape.STACK,
        ),
        Panel(
            question="How long do jobs wait?",
            means="Eligible time before a job's first start: what its account's own limits held is not "
            "in it. A dot is a job whose trace is recorded, and leads to it.",
            unit="s",
            queries=tuple(
                ask(
                    f"histogram_quantile({quantile}, sum by (le, tier) "
                    "(rate(darkroom_job_queue_wait_seconds_bucket{@}[$__rate_interval])))",
                    f"{{{{tier}}}} p{quantile * 100:.0f}",
                    exemplars=True,
                )
                for quantile in (0.5, 0.99)
            ),
        ),
        Panel(
            question="Which alerts fire?",
            means="Alerts of Prometheus at the moment. Watchdog always fires: without it the alerting "
            "itself is broken. What to do is in the runbook, under the alert's name.",
            unit="short",
            queries=(
                ask(
                    "sum by (alertname, severity, cluster, instance, worker, tier) "
                    '(ALERTS{alertstate="firing", cluster=~"$cluster|"})',
                    "",
                ),
            ),
            shape=Shape.TABLE,
        ),
        Panel(
            question="What runs?",
            means="Versions of each process. During an upgrade there are two, afterwards one.",
            unit="short",
            queries=(
                ask(
                    "sum by (instance, version, commit, python, ray, torch, protobuf) "
                    "(darkroom_build_info{@})",
                    "",
                ),
            ),
            shape=Shape.TABLE,
        ),
    ),
)

WAITING = Board(
    uid="darkroom-waiting",
    question="Why are jobs waiting?",
    means="The queues, what the scheduler finds for those in them, and whether it is fair and honest.",
    panels=(
        Panel(
            question="How many jobs wait and run?",
            means="Jobs by tier. The peak is the most that waited at once within a minute: a burst "
            "between two scrapes is seen in it.",
            unit="short",
            queries=(
                ask("sum by (tier) (darkroom_jobs_queued{@})", "{{tier}} waiting"),
                ask("sum by (tier) (darkroom_jobs_queued_peak{@})", "{{tier}} waiting, peak"),
                ask("sum by (tier) (darkroom_jobs_running{@})", "{{tier}} running"),
            ),
        ),
        Panel(
            question="How old is the oldest waiting job?",
            means="Time since it was accepted; 0 while none waits. A job that its account's own limits "
            "hold grows old too: compare with the next panel and the last.",
            unit="s",
            queries=(
                ask(
                    "time() - min by (tier) (darkroom_queue_oldest_enqueued_timestamp_seconds{@})"
                    " and on (tier) sum by (tier) (darkroom_jobs_queued{@}) > 0"
                    " or on (tier) 0 * sum by (tier) (darkroom_jobs_queued{@})",
                    "{{tier}}",
                ),
            ),
        ),
        Panel(
            question="How are the waits spread?",
            means="Jobs that started, by the eligible time they had waited. The objectives' limits, 30 "
            "s and 30 min, are edges.",
            unit="s",
            queries=(
                ask(
                    "sum by (le) (increase(darkroom_job_queue_wait_seconds_bucket{@}[$__rate_interval]))",
                    "{{le}}",
                ),
            ),
            shape=Shape.HEATMAP,
        ),
        Panel(
            question="What does the scheduler find for waiting jobs?",
            means="placed: it got a GPU. no_gpu: all are taken. no_model_fit: none that is free can "
            "hold its model. held: its account's own limits are in the way.",
            unit="ops",
            queries=(
                ask(
                    "sum by (tier, result) (rate(darkroom_scheduler_decisions_total{@}[$__rate_interval]))",
                    "{{tier}} {{result}}",
                ),
            ),
        ),
        Panel(
            question="Are we honest about when a job will start?",
            means="Actual wait over the wait that was promised: 1 is exact, 2 took twice as long.",
            unit="short",
            queries=tuple(
                ask(
                    f"histogram_quantile({quantile}, sum by (le, tier) "
                    "(rate(darkroom_eta_error_ratio_bucket{@}[$__rate_interval])))",
                    f"{{{{tier}}}} p{quantile * 100:.0f}",
                )
                for quantile in (0.5, 0.9)
            ),
            limits=((None, GREEN), (2, RED)),
        ),
        Panel(
            question="Is RELAX fair?",
            means="The largest gap between a waiting account's fair share of GPU time and what it got, "
            "0 to 1, over the policy's window.",
            unit="percentunit",
            queries=(ask("max(darkroom_relax_fairness_error_ratio{@})", "largest gap"),),
            limits=((None, GREEN), (0.3, RED)),
        ),
        Panel(
            question="How many accounts share RELAX?",
            means="Accounts with a RELAX job that waits or runs. Each one's share is one part of them, "
            "by weight.",
            unit="short",
            queries=(ask("sum(darkroom_relax_active_accounts{@})", "accounts"),),
        ),
        Panel(
            question="How much of the waiting is the accounts' own?",
            means="Mean time that jobs were held before they were eligible: by the running limit of "
            "their account, for want of fast time, or because an operator paused the tier.",
            unit="s",
            queries=(
                ask(
                    "sum by (reason) (rate(darkroom_job_held_seconds_sum{@}[$__rate_interval]))"
                    " / sum by (reason) (rate(darkroom_job_held_seconds_count{@}[$__rate_interval]))",
                    "{{reason}}",
                ),
            ),
        ),
    ),
)

GPUS = Board(
    uid="darkroom-gpus",
    question="Where do the GPUs go?",
    means="Every GPU-second is in exactly one use; and what loading, parking and losing workers cost.",
    panels=(
        Panel(
            question="What is the GPU time used for?",
            means="A closed account: the uses add up to wall time times GPUs. wasted is what was drawn "
            "for nothing, by our fault.",
            unit="percentunit",
            queries=(
                ask(
                    "sum by (use) (rate(darkroom_gpu_time_seconds_total{@}[$__rate_interval]))"
                    " / on () group_left () sum(rate(darkroom_gpu_time_seconds_total{@}[$__rate_interval]))",
                    "{{use}}",
                ),
            ),
            shape=Shape.SHARES,
        ),
        Panel(
            question="Are all workers there?",
            means="Workers by state, and how many there should be. lost: one that should be there, also on a "
            "machine that is gone. unhealthy: it is there and gets no job.",
            unit="short",
            queries=(
                ask("sum by (state) (darkroom_gpu_workers{@})", "{{state}}"),
                ask("sum(darkroom_gpu_workers_desired{@})", "wanted"),
            ),
        ),
        Panel(
            question="Do jobs meet their model loaded?",
            means="Attempts given to a worker that had the model in its memory (warm), and to one that "
            "had to load it (cold).",
            unit="ops",
            queries=(
                ask(
                    "sum by (tier, residency) (rate(darkroom_placements_total{@}[$__rate_interval]))",
                    "{{tier}} {{residency}}",
                ),
            ),
            shape=Shape.STACK,
        ),
        Panel(
            question="How long does loading a model take?",
            means="95 % of loads took no longer. A load that becomes slow is the disk's or the network's.",
            unit="s",
            queries=(
                ask(
                    "histogram_quantile(0.95, sum by (le, model) "
                    "(rate(darkroom_model_load_seconds_bucket{@}[$__rate_interval])))",
                    "{{model}} p95",
                ),
            ),
        ),
        Panel(
            question="What is an attempt's time made of?",
            means="Mean time of each stage for an attempt that ran to its end, from being given to a "
            "worker to being delivered.",
            unit="s",
            queries=(
                ask(
                    "sum by (stage) (rate(darkroom_job_stage_seconds_sum{@}[$__rate_interval]))"
                    " / on () group_left () sum(rate(darkroom_job_run_seconds_count{@}[$__rate_interval]))",
                    "{{stage}}",
                ),
            ),
            shape=Shape.STACK,
        ),
        Panel(
            question="How full is each GPU's memory?",
            means="Memory in use over memory there is, as the worker's torch sees it.",
            unit="percentunit",
            queries=(
                ask(
                    "max by (worker) (darkroom_gpu_memory_used_bytes{@})"
                    " / on (worker) max by (worker) (darkroom_gpu_memory_capacity_bytes{@})",
                    "{{worker}}",
                ),
            ),
            limits=((None, GREEN), (0.95, RED)),
        ),
        Panel(
            question="Why did slots get another worker, and jobs another try?",
            means="Restarts of workers, and jobs that went back to their place in the queue, within "
            "five minutes.",
            unit="short",
            queries=(
                ask("sum by (reason) (increase(darkroom_worker_restarts_total{@}[5m]))", "worker {{reason}}"),
                ask("sum by (reason) (increase(darkroom_job_requeues_total{@}[5m]))", "job {{reason}}"),
            ),
        ),
        Panel(
            question="Does parking keep its promise?",
            means="A RELAX run gives its GPU to a FAST job at its next step, and goes on where it was: "
            "99 % parked within so many steps, and none should be done again but after a loss.",
            unit="short",
            queries=(
                ask(
                    "histogram_quantile(0.99, sum by (le) "
                    "(rate(darkroom_park_wait_steps_bucket{@}[$__rate_interval])))",
                    "steps until parked, p99",
                ),
                ask("sum(darkroom_runs_parked{@})", "parked now"),
                ask("sum(increase(darkroom_parks_total{@}[5m]))", "parked in 5 min"),
                ask("sum(increase(darkroom_migrations_total{@}[5m]))", "moved to another GPU in 5 min"),
                ask("sum(increase(darkroom_steps_redone_total{@}[5m]))", "steps done again in 5 min"),
            ),
        ),
    ),
)

MONEY = Board(
    uid="darkroom-money",
    question="Is the money right?",
    means="What the ledger moved, whether it fits what the GPUs measured, and whether it fits itself.",
    panels=(
        Panel(
            question="What is charged, by plan?",
            means="GPU-seconds of fast time debited in a second: as many GPUs are at paid work.",
            unit="short",
            queries=(
                ask(
                    "sum by (plan) "
                    '(rate(darkroom_billing_gpu_seconds_total{kind="debit", @}[$__rate_interval]))',
                    "{{plan}}",
                ),
            ),
            shape=Shape.STACK,
        ),
        Panel(
            question="Is exactly what was measured charged?",
            means="GPU time of FAST jobs that is to be paid, and what was debited, within an hour. The "
            "gap should be 0: both move with the same settlement.",
            unit="s",
            queries=(
                ask("sum(increase(darkroom_billing_measured_gpu_seconds_total{@}[1h]))", "measured"),
                ask('sum(increase(darkroom_billing_gpu_seconds_total{kind="debit", @}[1h]))', "debited"),
                ask(
                    "sum(increase(darkroom_billing_measured_gpu_seconds_total{@}[1h]))"
                    ' - sum(increase(darkroom_billing_gpu_seconds_total{kind="debit", @}[1h]))',
                    "gap",
                ),
            ),
            signed=True,
        ),
        Panel(
            question="How much is set aside, and since when?",
            means="Fast time held for attempts that run, and the age of the oldest hold; 0 while there "
            "is none. A hold should end with its attempt.",
            unit="s",
            queries=(
                ask("sum(darkroom_billing_held_gpu_seconds{@})", "held GPU time"),
                ask(
                    "time() - min(darkroom_billing_oldest_hold_timestamp_seconds{@})"
                    " and on () sum(darkroom_billing_holds{@}) > 0"
                    " or on () 0 * sum(darkroom_billing_holds{@})",
                    "age of the oldest hold",
                ),
            ),
        ),
        Panel(
            question="Do balances fit the ledger?",
            means="Sum of all differences between balances and what the ledger's entries add up to, and "
            "the time since they were last compared. A drift is 0, or a page.",
            unit="s",
            queries=(
                ask("max(darkroom_billing_drift_gpu_seconds{@})", "drift in GPU-seconds"),
                ask(
                    "time() - max(darkroom_billing_reconcile_last_success_timestamp_seconds{@})",
                    "since last compared",
                ),
            ),
        ),
        Panel(
            question="Whom does the ledger refuse, and why?",
            means="Jobs refused at acceptance within five minutes, and requests that came twice and "
            "were answered from the first (replays).",
            unit="short",
            queries=(
                ask(
                    "sum by (plan, reason) (increase(darkroom_billing_rejections_total{@}[5m]))",
                    "{{plan}} {{reason}}",
                ),
                ask("sum(increase(darkroom_billing_replays_total{@}[5m]))", "replays"),
            ),
        ),
        Panel(
            question="Who has used up the plan?",
            means="Share of each plan's accounts that have no fast time left. Most of them, long before "
            "the period ends: the plan is too small, or something charges too much.",
            unit="percentunit",
            queries=(
                ask(
                    "sum by (plan) (darkroom_accounts_exhausted{@})"
                    " / on (plan) clamp_min(sum by (plan) (darkroom_accounts{@}), 1)",
                    "{{plan}}",
                ),
            ),
        ),
        Panel(
            question="Do settlements get through?",
            means="99 % of transactions with settlements took no longer, and the share that failed and "
            "is tried again.",
            unit="s",
            queries=(
                ask(
                    "histogram_quantile(0.99, sum by (le) "
                    "(rate(darkroom_billing_commit_seconds_bucket{@}[$__rate_interval])))",
                    "commit p99",
                ),
                ask(
                    'sum(rate(darkroom_billing_commits_total{result="failed", @}[$__rate_interval]))'
                    " / clamp_min(sum(rate(darkroom_billing_commits_total{@}[$__rate_interval])), 1e-9)",
                    "share that failed",
                    unit="percentunit",
                ),
            ),
        ),
        Panel(
            question="What do admins do?",
            means="Calls of admins that change something, within an hour. By whom and why: `darkroom "
            "admin audit`.",
            unit="short",
            queries=(
                ask(
                    "sum by (action, result) (increase(darkroom_admin_actions_total{@}[1h])) > 0",
                    "{{action}} {{result}}",
                ),
                ask("sum(increase(darkroom_admin_actions_total{@}[1h]))", "all"),
            ),
        ),
    ),
    events=(
        ask(
            'sum by (action) (increase(darkroom_admin_actions_total{result="done", @}[2m])) > 0',
            "Actions of admins",
        ),
    ),
)

MACHINE = Board(
    uid="darkroom-machine",
    question="Is the machine right?",
    means="The front door, the database, the loop, the canary, and Ray.",
    panels=(
        Panel(
            question="How do calls end?",
            means="RPCs by status. Internal, Unknown, Unavailable and DeadlineExceeded count against "
            "the objective; the others are refusals that the client can do something about.",
            unit="reqps",
            queries=(
                ask(
                    "sum by (grpc_code) (rate(grpc_server_handled_total{@}[$__rate_interval])) > 0"
                    " or sum by (grpc_code) "
                    '(rate(grpc_server_handled_total{grpc_code="OK", @}[$__rate_interval]))',
                    "{{grpc_code}}",
                ),
            ),
            shape=Shape.STACK,
        ),
        Panel(
            question="Which methods are slow?",
            means="99 % of a unary method's calls took no longer: the ten slowest. The objective's "
            "limit is 1 s. A dot is a call whose trace is recorded, and leads to it.",
            unit="s",
            queries=(
                ask(
                    "topk(10, histogram_quantile(0.99, sum by (le, grpc_service, grpc_method) "
                    "(rate(grpc_server_handling_seconds_bucket{@}[$__rate_interval]))) >= 0)",
                    "{{grpc_method}}",
                    exemplars=True,
                ),
            ),
            limits=((None, GREEN), (1, RED)),
        ),
        Panel(
            question="Does anything block the event loops?",
            means="99 % of turns of a process's event loop came no later than this. Above 250 ms "
            "everybody waits.",
            unit="s",
            queries=(
                ask(
                    "histogram_quantile(0.99, sum by (le, instance) "
                    "(rate(darkroom_event_loop_lag_seconds_bucket{@}[$__rate_interval])))",
                    "{{instance}} p99",
                ),
            ),
            limits=((None, GREEN), (0.25, RED)),
        ),
        Panel(
            question="Are there enough database connections?",
            means="Connections of the front doors' pools by state. Without an idle one, requests wait.",
            unit="short",
            queries=(
                ask("sum by (instance, state) (darkroom_db_pool_connections{@})", "{{instance}} {{state}}"),
                ask(
                    "histogram_quantile(0.99, sum by (le, instance) "
                    "(rate(darkroom_db_pool_wait_seconds_bucket{@}[$__rate_interval])))",
                    "{{instance}} wait p99",
                    unit="s",
                ),
            ),
        ),
        Panel(
            question="Which queries are slow?",
            means="99 % of a named query's runs took no longer: the ten slowest; and errors of the "
            "database in a second.",
            unit="s",
            queries=(
                ask(
                    "topk(10, histogram_quantile(0.99, sum by (le, query) "
                    "(rate(darkroom_db_query_seconds_bucket{@}[$__rate_interval]))) >= 0)",
                    "{{query}}",
                ),
                ask(
                    "sum by (class) (rate(darkroom_db_errors_total{@}[$__rate_interval]))",
                    "errors: {{class}}",
                    unit="ops",
                ),
            ),
        ),
        Panel(
            question="Does the scheduler keep turning?",
            means="99 % of the loop's cycles took no longer, the time since the last one ended, and how "
            "many schedulers lead: one should.",
            unit="s",
            queries=(
                ask(
                    "histogram_quantile(0.99, sum by (le) "
                    "(rate(darkroom_scheduler_cycle_seconds_bucket{@}[$__rate_interval])))",
                    "cycle p99",
                ),
                ask(
                    "time() - max(darkroom_scheduler_last_cycle_timestamp_seconds{@})",
                    "since the last cycle",
                ),
                ask("sum(darkroom_scheduler_leader{@})", "schedulers that lead", unit="short"),
            ),
        ),
        Panel(
            question="Does a job get through from end to end?",
            means="Time since the canary's last job succeeded, by tier. Somebody is told after 10 minutes "
            "in fast and after 65 in relax. Empty where no canary is set up.",
            unit="s",
            queries=(
                ask(
                    "time() - max by (tier) (darkroom_canary_last_success_timestamp_seconds{@})",
                    "{{tier}}",
                ),
            ),
            limits=((None, GREEN), (600, YELLOW), (3_900, RED)),
        ),
        Panel(
            question="Does Ray have its nodes, and room for what it is asked for?",
            means="Nodes of the Ray cluster, and tasks and actors that no node could ever take. Both "
            "come from Ray's own metrics, which have to be scraped from its nodes.",
            unit="short",
            queries=(
                ask("count(sum by (ip) (ray_node_cpu_count{@ray}))", "nodes"),
                ask(
                    'sum(ray_scheduler_unscheduleable_tasks{Reason="Infeasible", @ray})',
                    "could never be placed",
                ),
            ),
        ),
        Panel(
            question="What lies in the artifact store that no row names?",
            means="Files, or whole folders of jobs, within a day: noted when they were first seen, removed "
            "a week later; strays are pictures of prompts, which another sweep removes. Very many at once: "
            "the database is not the one that belongs to this store.",
            unit="short",
            queries=(
                ask("sum by (result) (increase(darkroom_orphans_total{@}[1d]))", "{{result}}"),
                ask("sum(increase(darkroom_orphan_removed_bytes_total{@}[1d]))", "removed", unit="bytes"),
            ),
        ),
    ),
)

BOARDS = (HEALTH, WAITING, GPUS, MONEY, MACHINE)


def main() -> None:
    """Write all boards."""
    for board in BOARDS:
        others = [other for other in BOARDS if other is not board]
        (FOLDER / f"{board.uid}.json").write_text(as_json(board, others))


if __name__ == "__main__":
    main()
