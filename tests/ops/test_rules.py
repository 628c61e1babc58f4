"""The rules are valid; each alert fires, stays silent, and leads to a panel and to what is to be done."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.prometheus import slo
from scheduler.policy.parameters import Parameters
from tests.ops.known import KNOWN
from tests.ops.promql import faults, selectors
from tests.ops.shipped import ROOT, RULE_TESTS, RULES, alerts, boards, rules, substituted, tool
from tests.structure.pages import blocks

_RUNBOOK = ROOT / "deploy/runbook.md"
_ALERTMANAGER = ROOT / "deploy/alertmanager/alertmanager.yml"

# What their summaries say is not in their value.
_WITHOUT_VALUE = {"TargetMissing"}

# Their panels show what is left of the budget, who is there, how many slots got another worker, and alerts.
_SHOWN_OTHERWISE = {
    *(objective.alert for objective in slo.OBJECTIVES),
    *("TargetMissing", "SeriesBudgetExceeded", "GpuWorkerFlapping", "Watchdog"),
}


def passes(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_committed_rules_of_the_objectives_are_what_the_program_makes() -> None:
    assert slo.FILE.read_text() == slo.as_yaml(), "run python -m deploy.prometheus.slo"


def test_promtool_finds_nothing_in_the_rules() -> None:
    passes(tool("promtool"), "check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))


def test_promtool_finds_nothing_in_the_configuration() -> None:
    passes(tool("promtool"), "check", "config", str(ROOT / "deploy/prometheus/prometheus.yml"))


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_stay_silent_and_recover(path: Path) -> None:
    passes(tool("promtool"), "test", "rules", str(path))


def test_every_alert_is_seen_to_fire_and_to_stay_silent() -> None:
    fired, silent = set(), set()
    for path in RULE_TESTS:
        for one in yaml.safe_load(path.read_text())["tests"]:
            for check in one.get("alert_rule_test", ()):
                (fired if check["exp_alerts"] else silent).add(check["alertname"])
    names = {rule["alert"] for rule in alerts()}
    assert names - fired == set()
    assert names - silent == {"Watchdog"}


def test_every_objective_is_recorded_over_every_window_and_burns_at_four_speeds() -> None:
    for objective in slo.OBJECTIVES:
        recorded = [rule["record"] for rule in rules() if rule.get("labels", {}).get("slo") == objective.name]
        windows = [name.partition("ratio_rate")[2] for name in recorded if "ratio_rate" in name]
        assert windows == ["5m", "30m", "1h", "2h", "6h", "1d", "3d"]
        burns = [
            (rule["labels"]["window"], rule["labels"]["severity"])
            for rule in alerts()
            if rule["alert"] == objective.alert
        ]
        assert burns == [("1h", "page"), ("6h", "page"), ("1d", "ticket"), ("3d", "ticket")]


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_has_a_severity_a_value_a_panel_and_a_place_in_the_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"page", "ticket", "info", "none"}
    assert "$value" in rule["annotations"]["summary"] or rule["alert"] in _WITHOUT_VALUE
    assert rule["annotations"]["runbook_url"] == f"/deploy/runbook.md#{rule['alert'].lower()}"
    found = re.fullmatch(r"/d/([\w-]+)\?viewPanel=(\d+)", rule["annotations"]["dashboard_url"])
    assert found
    uids = {board["uid"]: {panel["id"] for panel in board["panels"]} for board in boards()}
    assert int(found[2]) in uids[found[1]]


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_the_panel_that_an_alert_leads_to_shows_what_it_looked_at(rule: dict[str, Any]) -> None:
    uid, number = rule["annotations"]["dashboard_url"].removeprefix("/d/").split("?viewPanel=")
    (board,) = [board for board in boards() if board["uid"] == uid]
    panel = board["panels"][int(number) - 1]
    shown = {one.name for target in panel["targets"] for one in selectors(substituted(target["expr"]))}
    looked_at = {one.name for one in selectors(rule["expr"])}
    assert shown & looked_at or rule["alert"] in _SHOWN_OTHERWISE


def test_a_hold_that_leaked_is_older_than_twice_the_longest_job() -> None:
    (rule,) = [rule for rule in alerts() if rule["alert"] == "HoldLeaked"]
    assert f"> {2 * Parameters().max_predicted_ms // 1000}" in rule["expr"]


def test_runbook_has_every_alert_and_no_other() -> None:
    headings = re.findall(r"^## (\w+)$", _RUNBOOK.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted({rule["alert"] for rule in alerts()})


def test_entries_of_the_runbook_lead_to_entries() -> None:
    text = _RUNBOOK.read_text()
    anchors = {heading.lower() for heading in re.findall(r"^## (\w+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= anchors


def test_every_entry_of_the_runbook_says_what_it_has_to() -> None:
    for entry in re.split(r"^## ", _RUNBOOK.read_text(), flags=re.MULTILINE)[1:]:
        parts = re.findall(r"^\*\*(.+?)\*\*", entry, re.MULTILINE)
        assert parts == ["Meaning.", "First look.", "Likely causes.", "What to do.", "Escalate."], entry[:40]


@pytest.mark.parametrize(
    "query", sorted({line for block in blocks(_RUNBOOK.read_text(), "promql") for line in block.splitlines()})
)
def test_queries_of_the_runbook_ask_for_what_is_there(query: str) -> None:
    assert faults(query, KNOWN) == []


def test_amtool_finds_nothing_in_the_routing() -> None:
    passes(tool("amtool"), "check-config", str(_ALERTMANAGER))


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("alertname=Watchdog severity=none", "still-alive"),
        ("alertname=LedgerDrift severity=page", "on-call"),
        ("alertname=ModelThrash severity=ticket", "tickets"),
        ("alertname=QuotaRejectionSurge severity=info", "daily-note"),
    ],
)
def test_each_severity_reaches_whom_it_should(labels: str, receiver: str) -> None:
    told = (tool("amtool"), "config", "routes", "test", f"--config.file={_ALERTMANAGER}")
    passes(*told, f"--verify.receivers={receiver}", *labels.split())
