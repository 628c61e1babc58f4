"""`darkroom admin audit-fairness`: what an audit found, and an exit status that a script can go by."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from scheduler.client.commands import app
from scheduler.v1.fleet_pb2 import (
    VERDICT_HOLDS,
    VERDICT_NO_CASES,
    VERDICT_VIOLATED,
    AuditFairnessResponse,
    Finding,
    FindingCase,
)
from tests.client.scripted_service import UID, ScriptedService

HOLDS = Finding(
    bound="B2",
    promise="a wait is bounded",
    verdict=VERDICT_HOLDS,
    cases=1_200,
    worst_margin=5_300.4,
    unit="ms",
    worst=FindingCase(accounts=["accounts/ann", "accounts/ben"], job=UID, worker="workers/node-a/gpu-0"),
    set_aside=3,
    widened=["aging: a job for each start taken for its age (7 cases)"],
)
NOTHING = Finding(bound="B5", promise="half and a job", verdict=VERDICT_NO_CASES, unit="starts")
BROKEN = Finding(
    bound="B10",
    promise="caps hold",
    verdict=VERDICT_VIOLATED,
    cases=9,
    violations=1,
    worst_margin=-1,
    unit="jobs",
)


@pytest.fixture
def environment(service: ScriptedService, tmp_path: Path) -> dict[str, str]:
    return {
        "DARKROOM_ADDRESS": service.address,
        "DARKROOM_KEY": "dk_ada_secret",
        "XDG_CONFIG_HOME": str(tmp_path),
        "HOME": str(tmp_path),
    }


def audit(environment: dict[str, str], *words: str) -> Result:
    return CliRunner().invoke(app, ["admin", "audit-fairness", *words], env=environment)


def test_every_bound_is_a_line_and_what_was_widened_or_unknown_is_said_beside(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    answer = AuditFairnessResponse(
        findings=[HOLDS, NOTHING], starts=1_250, unknown=["Nothing is known from before the period."]
    )
    service.says("AuditFairness", answer)
    result = audit(environment)
    assert result.exit_code == 0, result.output
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["B2", "holds", "1,200", "5,300 ms", f" ann ben {UID} node-a/gpu-0", "a wait is bounded"],
        ["B5", "no cases", "0", "", "", "half and a job"],
    ]
    assert result.stderr.splitlines() == [
        "1,250 starts.",
        "B2: 3 cases could not be judged.",
        "B2 was widened for aging: a job for each start taken for its age (7 cases).",
        "Nothing is known from before the period.",
    ]


def test_a_broken_bound_ends_with_6(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("AuditFairness", AuditFairnessResponse(findings=[HOLDS, BROKEN]))
    result = audit(environment)
    assert result.exit_code == 6
    assert "B10\tviolated\t9\t-1 jobs" in result.stdout


def test_as_json_it_is_one_document(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("AuditFairness", AuditFairnessResponse(findings=[BROKEN], starts=9))
    result = audit(environment, "--json")
    assert result.exit_code == 6
    document = json.loads(result.stdout)
    assert (document["starts"], document["findings"][0]["verdict"]) == ("9", "VERDICT_VIOLATED")


@pytest.mark.parametrize(
    ("words", "span"),
    [
        ((), timedelta(hours=24)),
        (("--since", "90m"), timedelta(minutes=90)),
        (("--since", "7d"), timedelta(days=7)),
    ],
)
def test_the_period_ends_now(
    service: ScriptedService, environment: dict[str, str], words: tuple[str, ...], span: timedelta
) -> None:
    service.says("AuditFairness", AuditFairnessResponse())
    before = datetime.now(UTC)
    audit(environment, *words)
    (request,) = service.asked("AuditFairness")
    start = request.start_time.ToDatetime(tzinfo=UTC)
    assert timedelta(0) <= start + span - before < timedelta(minutes=1)
    assert not request.HasField("end_time")


@pytest.mark.parametrize("words", ["yesterday", "0h", "24"])
def test_what_is_no_span_of_time_is_refused(environment: dict[str, str], words: str) -> None:
    result = audit(environment, "--since", words)
    assert result.exit_code == 2
    assert "90m" in result.output
