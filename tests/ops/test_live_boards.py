"""Beside a running service that people use and that things go wrong in, no panel is empty, and alerts tell.

A real Prometheus scrapes it by the rules that are shipped.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.metrics import catalogue
from scheduler.store.bootstrap import ADMIN_ACCOUNT
from tests.folders import data_folder
from tests.ops.live import Prometheus, prometheus, things_happen
from tests.ops.promql import selectors, series_of
from tests.ops.shipped import Asked, asked_by_boards, asked_by_rules, substituted, tool
from tests.service.process import service

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(240)]

_LAST_LOOK_S = 15.0

# Ray's come with the first look of its agent, ten seconds after its start, and ours are made of these.
_FIRST = series_of(catalogue()).keys()

# What a machine that does much else at the same time makes true of the service.
_SLOW_MACHINE = {"FrontDoorBudgetBurn", "FastStartBudgetBurn", "EventLoopBlocked", "EtaDishonest"}

# What it makes true for a moment, and no longer.
_SLOW_MOMENTS = {
    *("FairnessErrorHigh", "DatabasePoolExhausted", "SchedulerStalled", "SchedulerLeaderCountWrong"),
    *("TargetMissing", "ReconcileStale"),
}


@pytest.fixture(scope="module")
def looked() -> Iterator[Prometheus]:
    """A Prometheus that has seen all that `things_happen` does, the last of it too."""
    program = tool("prometheus")
    with (
        pytest.MonkeyPatch.context() as environment,
        data_folder() as data,
        tempfile.TemporaryDirectory(prefix="dr-prometheus-") as folder,
    ):
        environment.setenv("DARKROOM_CANARY__ACCOUNT", ADMIN_ACCOUNT)
        environment.setenv("DARKROOM_CANARY__EVERY_S", "10")
        environment.setenv("DARKROOM_SCHEDULING__RECONCILE_EVERY_MS", "2000")
        with (
            service(data, gpus=3, timed_step_ms=100) as running,
            prometheus(program, running, Path(folder)) as looking,
        ):
            asyncio.run(things_happen(running, looking))
            until_s = time.time() + _LAST_LOOK_S
            while time.time() < until_s and empty(looking):
                time.sleep(1)
            yield looking


def empty(looking: Prometheus) -> list[Asked]:
    """Return the queries of the boards that have no value."""
    return [
        asked
        for asked in asked_by_boards()
        if not any(values for _, values in looking.series(substituted(asked.expr, rate_interval="10s")))
    ]


def test_no_panel_is_empty(looked: Prometheus) -> None:
    assert empty(looked) == []


def test_what_happened_pends_and_fires_and_nothing_else_does(looked: Prometheus) -> None:
    seen = {
        (labels["alertname"], labels["alertstate"])
        for labels, _ in looked.series("ALERTS")
        if labels["alertname"] not in _SLOW_MACHINE
    }
    firing = {name for name, state in seen if state == "firing"}
    pending = {name for name, state in seen if state == "pending"}
    # 25 jobs were refused for want of fast time, and a balance was changed by hand.
    assert firing == {"Watchdog", "QuotaRejectionSurge", "LedgerDrift"}
    # A worker was away while jobs waited for a GPU: if another had not come, it would be trouble.
    assert "GpuWorkersMissing" in pending
    # The canary's first job is yet to come when all begins.
    expected = {"GpuWorkersMissing", "GpusIdleWhileJobsWait", "CanaryFailing"}
    assert pending - _SLOW_MOMENTS <= expected


def test_everything_is_scraped_and_every_rule_could_be_evaluated(looked: Prometheus) -> None:
    assert {(one["job"], one["instance"]) for one in looked.now("up == 0")} == set()
    assert looked.now("prometheus_rule_evaluation_failures_total > 0") == []
    assert len(looked.now('ALERTS{alertname="Watchdog"}')) == 1


def test_every_series_that_a_rule_looks_at_is_there_before_anything_has_happened(looked: Prometheus) -> None:
    """One that begins with its first event is missed by `rate`, and what is compared with it never fires."""
    asked_for = {
        str(one) for asked in asked_by_rules() for one in selectors(asked.expr) if one.name in _FIRST
    }
    assert {one for one in asked_for if not looked.at_first(one)} == set()
