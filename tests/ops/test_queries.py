"""No panel and no rule asks for what nobody makes: every name, label, value and type is in the catalogue."""

from __future__ import annotations

import pytest

from tests.ops.known import KNOWN, OF_RAY
from tests.ops.promql import faults, selectors
from tests.ops.shipped import Asked, asked_by_boards, asked_by_rules, substituted


@pytest.mark.parametrize("asked", list(asked_by_rules()), ids=lambda asked: asked.where)
def test_a_rule_asks_for_what_is_there(asked: Asked) -> None:
    assert faults(asked.expr, KNOWN) == []


@pytest.mark.parametrize("asked", list(asked_by_boards()), ids=lambda asked: asked.where)
def test_a_panel_asks_for_what_is_there_and_of_the_cluster_that_is_chosen(asked: Asked) -> None:
    assert faults(substituted(asked.expr), KNOWN, legend=asked.legend) == []
    for selector in selectors(substituted(asked.expr)):
        chosen = {matcher.name for matcher in selector.matchers.matchers}
        wanted = {"cluster"} if selector.name in {*OF_RAY, "ALERTS"} else {"cluster", "job"}
        assert wanted <= chosen, selector.name


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("darkroom_jobs_waiting", "darkroom_jobs_waiting is not in the catalogue"),
        ("rate(darkroom_jobs_queued[5m])", "darkroom_jobs_queued is a gauge: it has no rate"),
        ("darkroom_jobs_total", "darkroom_jobs_total only grows: it says something as a rate or an increase"),
        ("rate(darkroom_parks[5m])", "darkroom_parks is not in the catalogue"),
        ("darkroom_jobs_queued{plan='basic'}", "darkroom_jobs_queued has no label plan"),
        ("darkroom_jobs_queued{tier='turbo'}", "tier of darkroom_jobs_queued is never 'turbo'"),
        ("darkroom_gpu_workers{state=~'idle|lazy'}", "state of darkroom_gpu_workers is never 'lazy'"),
        (
            "rate(darkroom_job_queue_wait_seconds_bucket{le='30'}[5m])",
            "le of darkroom_job_queue_wait_seconds_bucket is never '30'",
        ),
        ("sum by (plan) (darkroom_jobs_queued)", "nothing below has the label plan"),
        (
            "histogram_quantile(0.9, sum by (tier) (rate(darkroom_job_queue_wait_seconds_bucket[5m])))",
            "a quantile is of sum by (le, ...)",
        ),
        (
            "histogram_quantile(0.9, sum by (le) (increase(darkroom_job_queue_wait_seconds_bucket[5m])))",
            "a quantile is of rates",
        ),
    ],
)
def test_a_query_that_would_be_empty_for_ever_is_found(expr: str, fault: str) -> None:
    assert faults(expr, KNOWN) == [fault]


def test_a_legend_that_would_be_blank_is_found() -> None:
    expr = "sum by (tier) (darkroom_jobs_queued)"
    assert faults(expr, KNOWN, legend="{{tier}} {{plan}}") == ["legend: no series has plan"]
