"""The four objectives, and the rules that watch how fast their budgets are spent.

    python -m deploy.prometheus.slo

writes deploy/prometheus/slo_rules.yml, which is committed; a test compares.

An objective allows a share of bad events within 30 days: its budget. The burn rate is the share of bad events
over that share, so at 1 the budget lasts exactly 30 days. Alerts look at two windows at once (Site
Reliability Workbook, chapter 5): the long one says that it matters, the short one that it still goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).resolve().with_name("slo_rules.yml")

BY = "cluster, job"
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
EVERY_S = 60
"""The longer windows are made of what was recorded this often: three days of every call's own series are not
looked through each minute."""

ENOUGH_ERRORS = 5
"""Bad events in the long window, below which nobody is called: at a few jobs an hour one failure is a burn
rate of hundreds. Not a number of all events: five of five calls that fail in a quiet hour are an outage."""

_NOT_NOTHING = "1e-9"
"""What 0 is divided by where nothing happened, so that nothing is spent: 0 of 0 is no number."""

# The names are those of every gRPC service in the world.
_SERVICES = 'grpc_service=~"(scheduler|billing)[.]v1[.].*"'
_CALLS = f'grpc_type="unary", {_SERVICES}'
_OUR_FAULT = 'grpc_code=~"Internal|Unavailable|Unknown|DeadlineExceeded"'
_IN_A_SECOND = 'le="1.0"'


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which share of events is to be good. `errors` and `events` are rates over five minutes."""

    name: str
    alert: str
    panel: int
    """On the board darkroom-health."""
    good_permille: int
    what: str
    errors: str
    events: str

    @property
    def budget(self) -> float:
        """Share of events that may be bad."""
        return (1000 - self.good_permille) / 1000

    @property
    def selector(self) -> str:
        """Of what is recorded for it."""
        return f'{{slo="{self.name}"}}'


@dataclass(frozen=True, kw_only=True)
class Burn:
    """How fast, over which windows, is worth whose attention."""

    factor: float
    long: str
    short: str
    severity: str


def _sum(selector: str) -> str:
    return f"sum by ({BY}) (rate({selector}[5m]))"


def _late(tier: str, limit: str) -> str:
    """Return the rate of jobs of a tier that started later than an edge of the histogram's."""
    started = f'darkroom_job_queue_wait_seconds_count{{tier="{tier}"}}'
    in_time = f'darkroom_job_queue_wait_seconds_bucket{{tier="{tier}", le="{limit}"}}'
    return f"{_sum(started)}\n- {_sum(in_time)}"


OBJECTIVES = (
    Objective(
        name="fast-start",
        alert="FastStartBudgetBurn",
        panel=1,
        good_permille=990,
        what="FAST jobs that start later than 30 s",
        errors=_late("fast", "30.0"),
        events=_sum('darkroom_job_queue_wait_seconds_count{tier="fast"}'),
    ),
    Objective(
        name="relax-start",
        alert="RelaxStartBudgetBurn",
        panel=2,
        good_permille=950,
        what="RELAX jobs that start later than 30 min",
        errors=_late("relax", "1800.0"),
        events=_sum('darkroom_job_queue_wait_seconds_count{tier="relax"}'),
    ),
    Objective(
        name="job-success",
        alert="JobSuccessBudgetBurn",
        panel=3,
        good_permille=995,
        what="jobs that fail by our fault",
        errors=_sum('darkroom_jobs_total{blame="platform"}'),
        events=_sum("darkroom_jobs_total"),
    ),
    Objective(
        name="front-door",
        alert="FrontDoorBudgetBurn",
        panel=4,
        good_permille=999,
        what="calls that fail by our fault or take longer than a second",
        # A call that fails after more than a second counts twice: no series says which those are.
        errors=(
            f"{_sum(f'grpc_server_handled_total{{{_CALLS}, {_OUR_FAULT}}}')}"
            f"\n+ {_sum(f'grpc_server_handling_seconds_count{{{_SERVICES}}}')}"
            f"\n- {_sum(f'grpc_server_handling_seconds_bucket{{{_SERVICES}, {_IN_A_SECOND}}}')}"
        ),
        events=_sum(f"grpc_server_handled_total{{{_CALLS}}}"),
    ),
)

BURNS = (
    Burn(factor=14.4, long="1h", short="5m", severity="page"),
    Burn(factor=6, long="6h", short="30m", severity="page"),
    Burn(factor=3, long="1d", short="2h", severity="ticket"),
    Burn(factor=1, long="3d", short="6h", severity="ticket"),
)

_ERRORS = "cluster_job:darkroom_slo_errors:rate5m"
_EVENTS = "cluster_job:darkroom_slo_events:rate5m"
_RATIO = "cluster_job:darkroom_slo_errors:ratio_rate"
_LEFT = "cluster_job:darkroom_slo_budget_left:ratio30d"


def as_yaml(*, every_s: int = EVERY_S) -> str:
    """Return the rule file, for rules that are evaluated so often."""
    lines = ["# Written by `python -m deploy.prometheus.slo`: change that, not this.", "groups:"]
    for objective in OBJECTIVES:
        lines += [f"  - name: darkroom-slo-{objective.name}", f"    interval: {every_s}s", "    rules:"]
        for record, expr in _recorded(objective):
            lines += [f"      - record: {record}", "        expr: |-"]
            lines += [f"          {line}" for line in expr.splitlines()]
            lines += [f"        labels: {{slo: {objective.name}}}"]
        for burn in BURNS:
            lines += [f"      - alert: {objective.alert}", "        expr: |-"]
            lines += [f"          {line}" for line in _burns(objective, burn, every_s).splitlines()]
            lines += [f"        labels: {{severity: {burn.severity}, window: {burn.long}}}"]
            lines += ["        annotations:"]
            lines += [f"          {name}: {value!r}" for name, value in _annotations(objective, burn)]
    return "\n".join(lines) + "\n"


def _recorded(objective: Objective) -> Iterator[tuple[str, str]]:
    yield _ERRORS, objective.errors
    yield _EVENTS, objective.events
    for window in WINDOWS:
        yield f"{_RATIO}{window}", _ratio(objective, window)
    yield _LEFT, f"1 - (\n{_ratio(objective, '30d')}\n) / {objective.budget:g}"


def _ratio(objective: Objective, window: str) -> str:
    errors, events = f"{_ERRORS}{objective.selector}", f"{_EVENTS}{objective.selector}"
    if window != "5m":
        errors, events = f"sum_over_time({errors}[{window}])", f"sum_over_time({events}[{window}])"
    return f"{errors}\n/ clamp_min({events}, {_NOT_NOTHING})"


def _burns(objective: Objective, burn: Burn, every_s: int) -> str:
    of, budget = objective.selector, f"{objective.budget:g}"
    return (
        f"{_RATIO}{burn.long}{of} / {budget} > {burn.factor:g}\n"
        f"and {_RATIO}{burn.short}{of} / {budget} > {burn.factor:g}\n"
        f"and sum_over_time({_ERRORS}{of}[{burn.long}]) * {every_s} >= {ENOUGH_ERRORS}"
    )


def _annotations(objective: Objective, burn: Burn) -> Iterator[tuple[str, str]]:
    rate = "{{ $value | humanize }}"
    yield "summary", f"{rate} times as many {objective.what} as the budget allows, over {burn.long} and still"
    yield "dashboard_url", f"/d/darkroom-health?viewPanel={objective.panel}"
    yield "runbook_url", f"/deploy/runbook.md#{objective.alert.lower()}"


if __name__ == "__main__":
    FILE.write_text(as_yaml())
