"""Plans as files and words: nothing is lost on the way, and nothing changes that was not shown before."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from billing.v1 import admin_pb2
from billing.v1.admin_pb2 import AccountImpact, ListPlansResponse, Plan, PlanImpact
from billing.v1.billing_pb2 import PlanLimits
from scheduler.client.commands import app
from scheduler.client.errors import PlanNotUnderstood
from scheduler.client.plan_file import Change, changes, read_file, read_words, to_toml
from tests.client.scripted_service import Refuse, ScriptedService
from tests.client.typed_commands import lines

WHY = ("--reason", "a new lab")


def a_plan(**fields: Any) -> Plan:
    defaults: dict[str, Any] = {
        "name": "plans/basic",
        "version": 3,
        "etag": "v3",
        "quota_ms": 12_000_000,
        "limits": PlanLimits(running=3, relax_running=2, accepted=10),
        "relax_weight_milli": 1_000,
        "private_multiplier_bp": 20_000,
        "overage_micros_per_minute": 66_667,
        "currency_code": "USD",
        "price_micros": 10_000_000,
    }
    return Plan(**defaults | fields)


def impact(**fields: Any) -> Plan:
    return a_plan(impact=PlanImpact(**fields))


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[[str], Path]:
    def written(text: str) -> Path:
        path = tmp_path / "plans.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


def plans(environment: dict[str, str], *arguments: str) -> Result:
    return CliRunner().invoke(app, ["admin", "plans", *arguments], env=environment)


# The file


@given(
    plan=st.builds(
        a_plan,
        quota_ms=st.integers(0, 2**53),
        rollover_ms=st.integers(0, 2**53),
        price_micros=st.integers(0, 2**53),
        overage_micros_per_minute=st.integers(0, 2**53),
        relax_weight_milli=st.integers(0, 2**31 - 1),
        private_allowed=st.booleans(),
        private_multiplier_bp=st.integers(0, 2**31 - 1),
        self_service=st.booleans(),
        picture_retention_days=st.integers(0, 2**31 - 1),
        gpu_class_bp=st.dictionaries(
            st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1),
            st.integers(0, 2**31 - 1).filter(lambda bp: bp != 10_000),
            max_size=3,
        ),
    )
)
def test_a_plan_that_is_written_and_read_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_text(to_toml([plan]), encoding="utf-8")
    (edit,) = read_file(path)
    assert edit.on(plan) == plan
    blank = Plan(version=plan.version)
    assert edit.on(blank) == plan
    assert changes(plan, edit.on(plan)) == []


def test_a_file_is_in_minutes_factors_and_the_plans_currency() -> None:
    text = to_toml([a_plan(gpu_class_bp={"NVIDIA H200": 25_000, "cpu": 10_000}, rollover_ms=90_000)])
    said = [line.partition("#")[0].rstrip() for line in text.splitlines()]
    assert [line for line in said if line] == [
        "[basic]",
        'etag = "v3"',
        "minutes = 200",
        "rollover_minutes = 1.5",
        "price = 10",
        'currency = "USD"',
        "overage_price = 0.066667",
        "running = 3",
        "relax_running = 2",
        "accepted = 10",
        "relax_weight = 1",
        "private = false",
        "private_multiplier = 2",
        "self_service = false",
        "keep_days = 0",
        "[basic.gpu_classes]",
        '"NVIDIA H200" = 2.5',
    ]


def test_what_is_left_out_stays_as_it_is(file_of: Callable[[str], Path]) -> None:
    before = a_plan(gpu_class_bp={"h200": 25_000})
    (edit,) = read_file(file_of("[basic]\nminutes = 200.5\nprivate = true\n"))
    after = edit.on(before)
    assert changes(before, after) == [
        Change(key="minutes", before="200", after="200.5"),
        Change(key="private", before="false", after="true"),
    ]
    assert (after.etag, after.gpu_class_bp["h200"]) == ("v3", 25_000)


def test_a_table_of_gpu_types_is_all_there_are_and_a_word_is_only_itself(
    file_of: Callable[[str], Path],
) -> None:
    before = a_plan(gpu_class_bp={"h200": 25_000})
    (edit,) = read_file(file_of("[basic.gpu_classes]\ncpu = 0.5\n"))
    assert changes(before, edit.on(before)) == [
        Change(key="gpu_classes.cpu", before="1", after="0.5"),
        Change(key="gpu_classes.h200", before="2.5", after="1"),
    ]
    word = read_words("basic", ["gpu_classes.cpu=0.5"]).on(before)
    assert dict(word.gpu_class_bp) == {"h200": 25_000, "cpu": 5_000}
    assert dict(read_words("basic", ["gpu_classes.h200=1"]).on(before).gpu_class_bp) == {}


@pytest.mark.parametrize(
    ("text", "field", "sentence"),
    [
        ("[basic]\nminuts = 3", "basic.minuts", "did you mean minutes"),
        ("[basic]\nfrobnication = 3", "basic.frobnication", "there are minutes, rollover_minutes"),
        ('[basic]\nminutes = "3"', "basic.minutes", "is a number"),
        ("[basic]\nminutes = true", "basic.minutes", "is a number"),
        ("[basic]\nminutes = nan", "basic.minutes", "is a number"),
        ("[basic]\nminutes = -3", "basic.minutes", "not below 0"),
        ("[basic]\nminutes = 1e30", "basic.minutes", "at most"),
        ("[basic]\nrunning = 2.5", "basic.running", "a whole number"),
        ("[basic]\nrunning = 9999999999", "basic.running", "at most 2,147,483,647"),
        ("[basic]\nprice = 0.00000001", "basic.price", "finer"),
        ("[basic]\nprivate = 1", "basic.private", "true or false"),
        ("[basic]\ncurrency = 1", "basic.currency", "text in quotes"),
        ("[basic]\netag = 1", "basic.etag", "text in quotes"),
        ("[basic]\ngpu_classes = 1", "basic.gpu_classes", "is a table"),
        ('[basic.gpu_classes]\nh200 = "a"', "basic.gpu_classes.h200", "is a number"),
        ("basic = 3", "basic", "a plan is a table"),
    ],
)
def test_what_cannot_be_meant_is_named_with_what_can(
    file_of: Callable[[str], Path], text: str, field: str, sentence: str
) -> None:
    with pytest.raises(PlanNotUnderstood) as caught:
        read_file(file_of(text))
    (violation,) = caught.value.details.violations
    assert violation.field == field
    assert sentence in violation.sentence


def test_all_that_is_wrong_is_said_at_once(
    environment: dict[str, str], file_of: Callable[[str], Path]
) -> None:
    path = file_of("[basic]\nminuts = 3\nrunning = -1\n[pro]\nprise = 3\n")
    result = plans(environment, "apply", str(path), *WHY)
    assert result.exit_code == 2
    assert [line.partition(":")[0] for line in result.stderr.splitlines()[1:4]] == [
        "basic.minuts",
        "basic.running",
        "pro.prise",
    ]
    words = plans(environment, "set", "basic", "minuts=3", "private=maybe", "running", *WHY, "--json")
    assert words.exit_code == 2
    (error,) = [json.loads(line)["error"] for line in words.stderr.splitlines()]
    assert error["reason"] == "PLAN_NOT_UNDERSTOOD"
    assert len(error["violations"]) == 3


@pytest.mark.parametrize("text", ["[basic", "\xff"])
def test_a_file_that_is_none_is_not_understood(
    environment: dict[str, str], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "plans.toml"
    path.write_bytes(text.encode("latin-1"))
    for file in (path, tmp_path / "none.toml"):
        result = plans(environment, "diff", str(file))
        assert result.exit_code == 2, result.output
        assert str(file) in result.stderr


# The commands


def test_show_prints_all_one_an_earlier_one_or_a_file(
    service: ScriptedService, environment: dict[str, str], file_of: Callable[[str], Path]
) -> None:
    service.says("ListPlans", *[ListPlansResponse(plans=[a_plan(), a_plan(name="plans/pro")])] * 2)
    service.says("GetPlan", a_plan(), a_plan())
    rows = lines(plans(environment, "show"))
    assert [row[0] for row in rows] == ["basic", "pro"]
    assert rows[0][2:9] == ["10.00 USD", "3 h 20 min", "no", "3/2/10", "1", "no", "0.0667 USD"]
    assert len(json.loads(plans(environment, "show", "Basic", "--json").stdout)["plans"]) == 1
    file = plans(environment, "show", "--toml").stdout
    assert [edit.name for edit in read_file(file_of(file))] == ["plans/basic", "plans/pro"]
    plans(environment, "show", "basic", "--version", "2")
    assert [request.name for request in service.asked("GetPlan")] == ["plans/basic", "plans/basic/versions/2"]
    assert plans(environment, "show", "--version", "2").exit_code == 2


def test_set_takes_words_previews_them_and_makes_a_version_with_its_etag(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("ListPlans", ListPlansResponse(plans=[a_plan()]))
    service.says("UpdatePlan", impact(accounts=2), impact(accounts=2))
    result = plans(environment, "set", "Basic", "minutes=200.5", "running=4", "currency=EUR", *WHY)
    assert lines(result) == [
        ["basic", "minutes", "200", "200.5"],
        ["basic", "currency", '"USD"', '"EUR"'],
        ["basic", "running", "3", "4"],
    ]
    preview, update = service.asked("UpdatePlan")
    assert [preview.validate_only, update.validate_only] == [True, False]
    for request in (preview, update):
        assert (request.plan.quota_ms, request.plan.limits.running) == (12_030_000, 4)
        assert (request.plan.etag, request.plan.currency_code) == ("v3", "EUR")
        assert request.effective_from == admin_pb2.EFFECTIVE_FROM_NEXT_PERIOD
        assert request.reason == "a new lab"
    assert preview.request_id != update.request_id


def test_set_of_no_plan_names_the_nearest(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("ListPlans", ListPlansResponse(plans=[a_plan()]))
    result = plans(environment, "set", "basik", "minutes=1", *WHY)
    assert result.exit_code == 1
    assert "did you mean basic?" in result.stderr


TOUCHED = PlanImpact(
    accounts=1_204,
    granted_ms=3_600_000,
    revoked_ms=60_000,
    accounts_cut_short=1,
    accounts_over_limits=2,
    accounts_behind=3,
    picture_retention_days_after=30,
    first=[
        AccountImpact(account="accounts/ada", available_before_ms=60_000, available_after_ms=120_000),
        AccountImpact(account="accounts/ben", available_before_ms=5_000, available_after_ms=5_000),
    ],
)
A_FILE = "[basic]\nminutes = 300\n[pro]\nrunning = 3\n"


@pytest.mark.parametrize("words", [("diff",), ("apply", "--dry-run", *WHY)])
def test_a_diff_says_what_would_change_and_whom_it_touches_and_changes_nothing(
    service: ScriptedService,
    environment: dict[str, str],
    file_of: Callable[[str], Path],
    words: tuple[str, ...],
) -> None:
    service.says("ListPlans", ListPlansResponse(plans=[a_plan(), a_plan(name="plans/pro")]))
    service.says("UpdatePlan", a_plan(impact=TOUCHED))
    result = plans(environment, words[0], str(file_of(A_FILE)), "--now", *words[1:])
    assert lines(result) == [["basic", "minutes", "200", "300"], ["ada", "1 min", "2 min"]]
    assert result.stderr.splitlines() == [
        "basic: touches 1,204 accounts; at once it gives 1 h and takes 1 min in all.",
        "basic: from 1 account not all of it can be taken: it is used, or held by running jobs.",
        "basic: 3 accounts with a version before the newest: at once it is all that changed since, also what "
        "was to wait for their next period.",
        "basic: pictures are kept 30 days instead of for ever; older ones are gone for good.",
        "basic: 2 accounts with more jobs than new limits allow: these jobs go on, and no new ones start.",
        "Nothing was changed.",
    ]
    (request,) = service.asked("UpdatePlan")
    assert request.validate_only
    assert request.effective_from == admin_pb2.EFFECTIVE_FROM_NOW


def test_apply_asks_all_before_it_changes_any(
    service: ScriptedService, environment: dict[str, str], file_of: Callable[[str], Path]
) -> None:
    file = file_of('[basic]\nminutes = 300\n[pro]\netag = "v1"\nminutes = 300\n')
    both = ListPlansResponse(plans=[a_plan(), a_plan(name="plans/pro")])
    stale = Refuse(code=grpc.StatusCode.ABORTED, reason="ETAG_MISMATCH")
    service.says("ListPlans", both)
    service.says("UpdatePlan", impact(accounts=1), stale)
    result = plans(environment, "apply", str(file), *WHY)
    assert result.exit_code == 1
    first, second = service.asked("UpdatePlan")
    assert first.validate_only
    assert second.validate_only
    assert second.plan.etag == "v1"


def test_apply_changes_nothing_where_a_new_plan_of_the_file_would_be_refused(
    service: ScriptedService, environment: dict[str, str], file_of: Callable[[str], Path]
) -> None:
    gold = to_toml([a_plan(name="plans/gold", gpu_class_bp={"h200": 200_000})])
    service.says("ListPlans", ListPlansResponse(plans=[a_plan()]))
    service.says("UpdatePlan", impact(accounts=1))
    service.says("CreatePlan", Refuse(code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_PARAMETER"))
    result = plans(environment, "apply", str(file_of(f"[basic]\nminutes = 300\n{gold}")), *WHY)
    assert result.exit_code != 0
    assert [request.validate_only for request in service.asked("UpdatePlan")] == [True]
    assert [request.validate_only for request in service.asked("CreatePlan")] == [True]


def test_apply_makes_versions_and_new_plans_and_says_which_it_made_before_it_was_refused(
    service: ScriptedService, environment: dict[str, str], file_of: Callable[[str], Path]
) -> None:
    gold = to_toml([a_plan(name="plans/gold", price_micros=1)])
    file = file_of(f"{gold}\n[basic]\nminutes = 300\n")
    created = a_plan(name="plans/gold", version=1)
    for refused in (False, True):
        service.says("ListPlans", ListPlansResponse(plans=[a_plan()]))
        service.says("CreatePlan", created, created)
        stale = Refuse(code=grpc.StatusCode.ABORTED, reason="ETAG_MISMATCH")
        service.says("UpdatePlan", impact(accounts=1), stale if refused else impact(accounts=1))
    done = plans(environment, "apply", str(file), *WHY, "--json")
    document = json.loads(done.stdout)
    assert document["applied"]
    assert [(each["name"], each["new"]) for each in document["plans"]] == [
        ("plans/gold", True),
        ("plans/basic", False),
    ]
    assert document["plans"][1]["changes"] == [{"key": "minutes", "before": "200", "after": "300"}]
    assert document["plans"][1]["impact"]["accounts"] == "1"
    assert document["plans"][0]["version"] == 1
    assert [request.validate_only for request in service.asked("CreatePlan")] == [True, False]
    assert service.asked("CreatePlan")[0].plan.etag == ""
    failed = plans(environment, "apply", str(file), *WHY)
    assert failed.exit_code == 1
    assert "Changed before what comes now: gold (version 1)." in failed.stderr


def test_a_new_plan_needs_all_its_keys(
    service: ScriptedService, environment: dict[str, str], file_of: Callable[[str], Path]
) -> None:
    service.says("ListPlans", ListPlansResponse())
    result = plans(environment, "diff", str(file_of("[gold]\nminutes = 300\n")))
    assert result.exit_code == 2
    assert "gold.currency: is missing" in result.stderr
    assert "gold.price" not in result.stderr


def test_a_file_that_says_what_is_changes_nothing(
    service: ScriptedService, environment: dict[str, str], file_of: Callable[[str], Path]
) -> None:
    service.says("ListPlans", *[ListPlansResponse(plans=[a_plan()])] * 2)
    file = str(file_of(to_toml([a_plan(etag="v1")])))
    result = plans(environment, "apply", file, *WHY)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "Nothing differs from what is.\n"
    assert json.loads(plans(environment, "diff", file, "--json").stdout) == {"applied": False, "plans": []}
    assert service.asked("UpdatePlan") == []


@pytest.mark.parametrize("command", [["set", "basic", "minutes=1"], ["apply", "plans.toml"]])
def test_a_change_of_plans_needs_a_reason(environment: dict[str, str], command: list[str]) -> None:
    assert plans(environment, *command).exit_code == 2


def test_words_are_as_exact_as_the_file() -> None:
    edit = read_words("basic", ["overage_price=0.066667", "relax_weight=1.5", "private=true"])
    assert edit.values == {
        "overage_price": Decimal("0.066667"),
        "relax_weight": Decimal("1.5"),
        "private": True,
    }
