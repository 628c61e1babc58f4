"""What is shipped for Prometheus and Grafana, read as they read it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BOARDS = sorted((ROOT / "deploy/grafana/boards").glob("*.json"))
RULES = sorted((ROOT / "deploy/prometheus").glob("*rules*.yml"))
RULE_TESTS = sorted((ROOT / "deploy/prometheus/tests").glob("*.yml"))

_PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "amtool": "prometheus-alertmanager",
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One expression, and where it is."""

    where: str
    expr: str
    legend: str = ""


def tool(name: str) -> str:
    """Return the path of one of Prometheus' programs; skips, saying what installs it, where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}: apt-get install {_PACKAGES[name]}")
    return path


def boards() -> list[dict[str, Any]]:
    """Return the boards as committed."""
    return [json.loads(path.read_text()) for path in BOARDS]


def rules() -> list[dict[str, Any]]:
    """Return all rules, of recording and of alerts."""
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def alerts() -> list[dict[str, Any]]:
    """Return the alerts; several may share a name."""
    return [rule for rule in rules() if "alert" in rule]


def asked_by_boards() -> Iterator[Asked]:
    """Yield every query of the panels and the annotations, with the variables as they are."""
    for board in boards():
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield Asked(
                    where=f"{board['uid']}, panel {panel['id']} {target['refId']}",
                    expr=target["expr"],
                    legend=target.get("legendFormat", ""),
                )
        for event in board["annotations"].get("list", ()):
            yield Asked(where=f"{board['uid']}, {event['name']}", expr=event["expr"])


def asked_by_rules() -> Iterator[Asked]:
    """Yield the expression of every rule."""
    for number, rule in enumerate(rules()):
        yield Asked(where=f"{rule.get('alert') or rule['record']} ({number})", expr=rule["expr"])


def substituted(expr: str, *, rate_interval: str = "1m") -> str:
    """Return a board's query as Grafana sends it with every variable at All."""
    return re.sub(r"\$(job|cluster)\b", ".*", expr.replace("$__rate_interval", rate_interval))
