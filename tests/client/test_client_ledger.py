"""What the ledger says, from the command line: to people about their account, to admins about all of them."""

from __future__ import annotations

import csv
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import Parse, ParseDict
from google.protobuf.timestamp_pb2 import Timestamp

from billing.v1 import admin_pb2
from billing.v1.admin_pb2 import (
    AdminAccount,
    ApiKey,
    AuditEvent,
    CheckInvariantsResponse,
    InvariantResult,
    ListAccountsResponse,
    ListApiKeysResponse,
    ListAuditEventsResponse,
    ListPlansResponse,
    Plan,
    PlanUndo,
    Refund,
    RefundUndo,
)
from billing.v1.billing_pb2 import (
    Amount,
    Balance,
    ListTransfersResponse,
    PlanChange,
    PlanLimits,
    Statement,
    StatementLine,
    Transfer,
)
from scheduler.client.aio import DarkroomClient
from scheduler.client.names import key_name
from scheduler.client.printing import when
from scheduler.client.sync import DarkroomClient as SyncClient
from scheduler.client.terminal import exact_duration
from scheduler.v1 import job_pb2
from scheduler.v1.account_pb2 import Account
from tests.client.scripted_service import JOB, UID, Refuse, ScriptedService
from tests.client.typed_commands import darkroom, lines, one_document

WHY = ("--reason", "a new lab")
START = datetime(2026, 1, 31, tzinfo=UTC)


def at(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "TZ": "UTC"}


# People


BALANCE = Balance(
    account="accounts/ada",
    plan="plans/basic",
    granted_ms=12_000_000,
    used_ms=900_000,
    held_ms=100_000,
    available_ms=11_000_000,
    renew_time=at(datetime(2026, 2, 28, tzinfo=UTC)),
    overage_allowed=True,
    overage_posted_micros=1_250_000,
    currency_code="USD",
    relax_used_ms=61_000,
)


def test_info_says_all_that_an_account_has_uses_and_owes(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    account = Account(
        name="accounts/ada",
        mode=job_pb2.TIER_FAST,
        visibility=job_pb2.VISIBILITY_PUBLIC,
        overage_allowed=True,
        spend_cap_micros=5_000_000,
        balance=BALANCE,
        jobs_running=2,
        jobs_waiting=1,
        limits=PlanLimits(running=3, relax_running=2, accepted=10),
        scheduled_plan="plans/free",
    )
    service.says("GetAccount", account)
    said = dict(lines(darkroom(environment, "info")))
    assert said == {
        "account": "ada",
        "mode": "fast",
        "visibility": "public",
        "plan": "basic",
        "fast time left": "3 h 3 min 20.0 s of 3 h 20 min",
        "used": "15 min",
        "held by running jobs": "1 min 40.0 s",
        "renews": said["renews"],
        "overage so far": "1.25 USD",
        "relax used": "1 min 1.0 s",
        "plan changes to": f"free on {said['renews']}",
        "overage": "allowed, cap 5.00 USD",
        "jobs": "2 running, 1 waiting",
        "limits": "3 running at once, 2 of them relax, 10 accepted",
    }
    assert said["renews"]


def test_without_consent_there_is_no_overage_to_speak_of(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("GetAccount", Account(name="accounts/ada", mode=job_pb2.TIER_RELAX))
    said = dict(lines(darkroom(environment, "info")))
    assert said["overage"].startswith("not allowed")
    assert "overage so far" not in said
    assert "plan changes to" not in said


STATEMENT = Statement(
    account="accounts/ada",
    plan="plans/basic",
    period_start=at(START),
    period_end=at(datetime(2026, 2, 28, tzinfo=UTC)),
    granted_ms=12_000_000,
    used_ms=3_421,
    closing_ms=11_996_579,
    held_ms=60_000,
    metered_ms=1_000,
    amount_micros=12_345,
    currency_code="USD",
    amounts=[
        Amount(currency_code="EUR", micros=2_000_000),
        Amount(currency_code="USD", micros=12_345),
    ],
    relax_ms=5_000,
    lines=[
        StatementLine(time=at(START), sentence="The plan's time.", fast_ms=12_000_000),
        StatementLine(
            time=at(START + timedelta(hours=1)),
            sentence='A fast job, "privately".',
            job=JOB,
            attempt_id="a",
            measured_ms=1_710,
            multiplier_bp=20_000,
            fast_ms=-3_421,
            metered_ms=1_000,
            amount_micros=12_345,
            currency_code="USD",
        ),
        StatementLine(sentence="Before the plan had another.", amount_micros=2_000_000, currency_code="EUR"),
    ],
)


def test_a_statement_is_line_by_line_to_the_millisecond(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("GetStatement", STATEMENT)
    result = lines(darkroom(environment, "statement", "--at", "2026-02-01"))
    granted, job, other = result[:3]
    assert granted[1:] == ["The plan's time.", "", "", "", "3 h 20 min", "", "", ""]
    assert job[1:] == [
        'A fast job, "privately".',
        UID,
        "1.710 s",
        "×2",
        "-3.421 s",
        "1.000 s",
        "0.0123 USD",
        "",
    ]
    assert other[7] == "2.00 EUR"
    said = dict(result[3:])
    assert (said["+ granted"], said["- used"]) == ("3 h 20 min", "3.421 s")
    assert (said["= left"], said["held of it"]) == ("3 h 19 min 56.579 s", "1 min")
    assert (said["beyond it"], said["charged in money"]) == ("1.000 s", "2.00 EUR, 0.0123 USD")
    (request,) = service.asked("GetStatement")
    assert request.at.ToJsonString() == "2026-02-01T00:00:00Z"
    assert request.account == "accounts/-"


def test_a_statement_is_saved_with_whole_numbers(
    service: ScriptedService, environment: dict[str, str], tmp_path: Path
) -> None:
    service.says("GetStatement", *[STATEMENT] * 3)
    path = tmp_path / "january.csv"
    result = darkroom(environment, "statement", "--csv", str(path), "--json")
    assert ParseDict(one_document(result), Statement()) == STATEMENT
    with path.open(encoding="utf-8", newline="") as file:
        granted, job, _ = csv.DictReader(file)
    assert granted["time"] == "2026-01-31T00:00:00Z"
    assert (granted["fast_ms"], granted["job"]) == ("12000000", "")
    assert (job["sentence"], job["job"]) == ('A fast job, "privately".', JOB)
    assert (job["fast_ms"], job["amount_micros"], job["relax_ms"]) == ("-3421", "12345", "0")
    nowhere = darkroom(environment, "statement", "--csv", str(tmp_path / "none" / "a.csv"))
    assert nowhere.exit_code == 1
    assert "No such file" in nowhere.stderr
    darkroom(environment, "statement", "--account", "ben")
    assert [request.account for request in service.asked("GetStatement")][2] == "accounts/ben"


def test_plan_says_what_it_gives_and_what_is_to_come(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    account = Account(balance=BALANCE, limits=PlanLimits(running=3, accepted=10), scheduled_plan="plans/free")
    service.says("GetAccount", account, account)
    said = dict(lines(darkroom(environment, "plan")))
    assert (said["plan"], said["fast time this month"]) == ("basic", "3 h 20 min")
    assert said["changes to"].startswith("free on ")
    answer = one_document(darkroom(environment, "plan", "--json"))
    assert (answer["plan"], answer["grantedMs"]) == ("plans/basic", "12000000")
    assert (answer["limits"]["running"], answer["scheduledPlan"]) == (3, "plans/free")


UPGRADE = PlanChange(
    account="accounts/ada",
    from_plan="plans/basic",
    to_plan="plans/pro",
    effective_time=at(START),
    at_once=True,
    granted_ms=21_000_000,
    credit_micros=-5_000_000,
    charge_micros=10_000_000,
    amount_micros=5_000_000,
    currency_code="USD",
    sentence="You get 350 minutes more now.",
    etag="e1",
)


def test_a_change_of_plan_is_shown_asked_about_and_done_as_it_was_shown(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("PreviewPlanChange", UPGRADE, UPGRADE)
    service.says("ChangePlan", UPGRADE)
    declined = darkroom(environment, "plan", "change", "Pro", stdin="n\n")
    assert (declined.exit_code, declined.stdout) == (1, "")
    assert "You get 350 minutes more now." in declined.stderr
    assert declined.stderr.endswith("Nothing was changed.\n")
    assert service.asked("ChangePlan") == []
    agreed = darkroom(environment, "plan", "change", "pro", stdin="y\n")
    assert dict(lines(agreed)) == {
        "plan": "basic to pro",
        "counts": "at once",
        "fast time added": "5 h 50 min",
        "old price, unused": "-5.00 USD",
        "new price, to come": "10.00 USD",
        "to pay now": "5.00 USD",
    }
    (request,) = service.asked("ChangePlan")
    assert (request.plan, request.etag, request.account) == ("plans/pro", "e1", "accounts/-")
    assert request.request_id


def test_a_dry_run_changes_nothing_and_yes_does_not_ask(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    downgrade = PlanChange(from_plan="plans/pro", to_plan="plans/basic", effective_time=at(START), etag="e2")
    service.says("PreviewPlanChange", downgrade, UPGRADE)
    service.says("ChangePlan", UPGRADE)
    said = dict(lines(darkroom(environment, "plan", "change", "basic", "--dry-run")))
    assert said["counts"].startswith("from ")
    assert service.asked("ChangePlan") == []
    done = darkroom(environment, "plan", "change", "pro", "--yes", "--account", "ada", *WHY, "--json")
    assert one_document(done)["etag"] == "e1"
    assert service.asked("PreviewPlanChange")[1].account == "accounts/ada"
    (request,) = service.asked("ChangePlan")
    assert (request.account, request.reason) == ("accounts/ada", "a new lab")
    assert darkroom(environment, "plan", "change", "pro", "--yes", "--account", "ada").exit_code == 2


def test_to_name_the_present_plan_is_to_stay(service: ScriptedService, environment: dict[str, str]) -> None:
    stay = PlanChange(from_plan="plans/pro", to_plan="plans/pro", at_once=True, sentence="It stays pro.")
    service.says("PreviewPlanChange", stay)
    result = darkroom(environment, "plan", "change", "pro", "--dry-run")
    assert lines(result)[0] == ["plan", "stays pro"]
    assert result.stderr == "It stays pro.\n"


def test_a_change_that_is_another_by_now_is_not_made(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("PreviewPlanChange", UPGRADE)
    service.says("ChangePlan", Refuse(code=grpc.StatusCode.ABORTED, reason="ETAG_MISMATCH"))
    result = darkroom(environment, "plan", "change", "pro", "--yes")
    assert result.exit_code == 1
    assert "Read it again" in result.stderr


# Admins: accounts and keys


def test_admins_open_list_and_show_accounts(service: ScriptedService, environment: dict[str, str]) -> None:
    ada = AdminAccount(name="accounts/ada", plan="plans/basic", scheduled_plan="plans/free", balance=BALANCE)
    erased = AdminAccount(name="accounts/x", plan="plans/basic", erase_time=at(START))
    blocked = AdminAccount(name="accounts/zoe", plan="plans/pro", blocked=True)
    service.says("CreateAccount", ada)
    service.says(
        "ListAccounts",
        ListAccountsResponse(accounts=[ada], next_page_token="more"),
        ListAccountsResponse(accounts=[erased, blocked]),
        ListAccountsResponse(accounts=[ada, erased]),
    )
    service.says("GetAccount", ada)
    opened = darkroom(environment, "admin", "accounts", "create", "ada", "--plan", "basic", *WHY)
    assert opened.stdout == "ada on basic\n"
    rows = lines(darkroom(environment, "admin", "accounts", "list"))
    assert [(row[0], row[1], row[2], row[4]) for row in rows] == [
        ("ada", "basic", "free", "open"),
        ("x", "basic", "", "erased"),
        ("zoe", "pro", "", "blocked"),
    ]
    limited = darkroom(environment, "admin", "accounts", "list", "--plan", "Basic", "--limit", "1", "--json")
    assert len(one_document(limited)["accounts"]) == 1
    assert service.asked("ListAccounts")[2].plan == "plans/basic"
    assert service.asked("ListAccounts")[1].page_token == "more"
    said = dict(lines(darkroom(environment, "admin", "accounts", "show", "ada")))
    assert said["fast time left"] == "3 h 3 min 20.0 s of 3 h 20 min"
    assert said["plan changes to"] == "free"
    assert service.asked("GetAccount")[0].name == "accounts/ada"


def test_an_account_is_erased_when_it_is_meant(service: ScriptedService, environment: dict[str, str]) -> None:
    ada = AdminAccount(name="accounts/ada", plan="plans/basic")
    service.says("GetAccount", ada)
    service.says("EraseAccount", AdminAccount(name="accounts/x1", erase_time=at(START)))
    declined = darkroom(environment, "admin", "accounts", "erase", "ada", *WHY, stdin="\n")
    assert declined.exit_code == 1
    assert "Erase ada (on basic) for good" in declined.stderr
    assert service.asked("EraseAccount") == []
    done = darkroom(environment, "admin", "accounts", "erase", "ada", "--yes", *WHY)
    assert dict(lines(done))["state"] == "erased"
    (request,) = service.asked("EraseAccount")
    assert (request.name, request.reason) == ("accounts/ada", "a new lab")


def test_keys_are_made_listed_and_revoked(service: ScriptedService, environment: dict[str, str]) -> None:
    key = ApiKey(name="accounts/ada/keys/ab12", role=admin_pb2.ROLE_OPERATOR, create_time=at(START))
    service.says("CreateApiKey", ApiKey(secret="dk_ab12_y"))
    service.says("ListApiKeys", ListApiKeysResponse(keys=[key]))
    service.says("RevokeApiKey", key, key)
    made = darkroom(environment, "admin", "keys", "create", "ada", "--role", "operator", *WHY)
    assert made.stdout == "dk_ab12_y\n"
    assert service.asked("CreateApiKey")[0].role == admin_pb2.ROLE_OPERATOR
    (row,) = lines(darkroom(environment, "admin", "keys", "list", "ada"))
    assert (row[0], row[1], row[3]) == ("ab12", "operator", "")
    assert darkroom(environment, "admin", "keys", "revoke", "ada", "ab12", *WHY).exit_code == 0
    revoked = darkroom(environment, "admin", "keys", "revoke", "ada", "dk_ab12", *WHY, "--json")
    assert one_document(revoked)["name"] == key.name
    assert {request.name for request in service.asked("RevokeApiKey")} == {key.name}


@pytest.mark.parametrize("text", ["ab12", "dk_ab12", "dk_ab12_secret", "accounts/ada/keys/ab12"])
def test_a_key_is_known_by_its_id(text: str) -> None:
    assert key_name("ada", text) == "accounts/ada/keys/ab12"


# Admins: time and money


@pytest.mark.parametrize(
    ("words", "source"),
    [
        ((), admin_pb2.GRANT_SOURCE_UNSPECIFIED),
        (("--promo",), admin_pb2.GRANT_SOURCE_PROMO),
        (("--purchase",), admin_pb2.GRANT_SOURCE_PURCHASE),
    ],
)
def test_a_grant_says_what_it_is_and_when_it_ends(
    service: ScriptedService, environment: dict[str, str], words: tuple[str, ...], source: int
) -> None:
    service.says("AdjustBalance", BALANCE)
    grant = darkroom(environment, "admin", "grant", "ada", "1.5", "--until", "2027-01-31", *words, *WHY)
    assert ["account", "ada"] in lines(grant)
    (request,) = service.asked("AdjustBalance")
    assert (request.amount_ms, request.source) == (90_000, source)
    assert request.expire_time.ToJsonString() == "2027-01-31T00:00:00Z"
    assert request.reason == "a new lab"


def test_a_grant_is_taken_back_by_a_negative_one(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("AdjustBalance", BALANCE)
    assert darkroom(environment, "admin", "grant", "ada", "-30", *WHY).exit_code == 0
    (request,) = service.asked("AdjustBalance")
    assert request.amount_ms == -1_800_000
    assert not request.HasField("expire_time")
    both = darkroom(environment, "admin", "grant", "ada", "1", "--promo", "--purchase", *WHY)
    assert both.exit_code == 2


def test_a_grant_that_is_named_is_taken_back(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("AdjustBalance", BALANCE)
    assert darkroom(environment, "admin", "grant", "ada", "-0.5", "--undoes", "17", *WHY).exit_code == 0
    (request,) = service.asked("AdjustBalance")
    assert (request.amount_ms, request.undoes) == (-30_000, 17)
    assert darkroom(environment, "admin", "grant", "ada", "5", "--undoes", "17", *WHY).exit_code == 2


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1e300", "1e20", "1e-300", "0.0000001", "x", ""])
@pytest.mark.parametrize(
    "command",
    [
        ("admin", "grant", "ada", "{}", *WHY),
        ("admin", "refund", UID, "--minutes", "{}", *WHY),
        ("overage", "on", "--cap", "{}"),
    ],
)
def test_a_number_that_cannot_be_meant_is_not_understood(
    service: ScriptedService, environment: dict[str, str], command: tuple[str, ...], number: str
) -> None:
    result = darkroom(environment, *(word.format(number) for word in command))
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)


def test_amounts_are_as_exact_as_they_are_typed(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("UpdateAccount", Account(), Account())
    for typed in ("0.000001", "0"):
        assert darkroom(environment, "overage", "on", "--cap", typed).exit_code == 0
    assert [request.account.spend_cap_micros for request in service.asked("UpdateAccount")] == [1, 0]
    for typed in ("-1", "-0.5"):
        assert darkroom(environment, "overage", "on", f"--cap={typed}").exit_code == 2
        assert darkroom(environment, "admin", "refund", UID, f"--minutes={typed}", *WHY).exit_code == 2
    assert darkroom(environment, "admin", "refund", UID, "--minutes", "0", *WHY).exit_code == 2


def test_a_refund_is_of_all_or_of_a_part(service: ScriptedService, environment: dict[str, str]) -> None:
    refund = Refund(
        job=JOB,
        refunded_ms=3_421,
        refunded_micros=12_345,
        currency_code="EUR",
        refunded_in_all_ms=5_000,
        billed_ms=6_000,
        balance=BALANCE,
    )
    service.says("RefundJob", refund, refund)
    said = dict(lines(darkroom(environment, "admin", "refund", UID, *WHY)))
    assert (said["given back"], said["in money"]) == ("3.421 s", "0.0123 EUR")
    assert said["in all"] == "5.000 s of 6.000 s billed"
    part = darkroom(environment, "admin", "refund", JOB, "--minutes", "0.5", *WHY, "--json")
    assert one_document(part)["refundedMs"] == "3421"
    whole, half = service.asked("RefundJob")
    assert (whole.job, whole.amount_ms) == (f"accounts/-/jobs/{UID}", 0)
    assert (half.job, half.amount_ms) == (JOB, 30_000)


UNDO = PlanUndo(
    account="accounts/ada",
    from_plan="plans/pro",
    to_plan="plans/basic",
    change_time=at(START),
    effective_time=at(START),
    at_once=True,
    revoked_ms=21_000_000,
    kept_ms=60_000,
    amount_micros=-5_000_000,
    currency_code="USD",
    sentence="The plan is basic again at once.",
    etag="change-1",
)


def test_a_change_of_plan_is_taken_back_as_it_was_shown(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("UndoPlanChange", *[UNDO] * 4)
    command = ("admin", "accounts", "undo-plan", "ada", *WHY)
    said = dict(lines(darkroom(environment, *command, "--dry-run")))
    assert said["plan"] == "pro to basic"
    assert (said["fast time taken back"], said["used, held or gone"]) == ("5 h 50 min", "1 min")
    assert said["given back"] == "5.00 USD"
    declined = darkroom(environment, *command, stdin="n\n")
    assert (declined.exit_code, declined.stdout) == (1, "")
    assert "The plan is basic again at once." in declined.stderr
    assert declined.stderr.endswith("Nothing was changed.\n")
    done = darkroom(environment, *command, "--yes", "--json")
    assert one_document(done)["etag"] == "change-1"
    *rehearsals, request = service.asked("UndoPlanChange")
    assert [one.validate_only for one in rehearsals] == [True, True, True]
    assert (request.validate_only, request.account, request.etag) == (False, "accounts/ada", "change-1")
    assert request.reason == "a new lab"


def test_an_account_without_a_change_has_none_to_take_back(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("UndoPlanChange", Refuse(code=grpc.StatusCode.FAILED_PRECONDITION, reason="NOTHING_TO_UNDO"))
    result = darkroom(environment, "admin", "accounts", "undo-plan", "ada", "--yes", *WHY)
    assert result.exit_code == 1
    assert "`darkroom plan change`" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["grant", "ada", "5"],
        ["refund", UID],
        ["undo-refund", UID, "--yes"],
        ["accounts", "create", "ada"],
        ["accounts", "erase", "ada", "--yes"],
        ["accounts", "undo-plan", "ada", "--yes"],
        ["keys", "create", "ada"],
        ["keys", "revoke", "ada", "k"],
    ],
)
def test_what_an_admin_does_needs_a_reason(environment: dict[str, str], command: list[str]) -> None:
    assert darkroom(environment, "admin", *command).exit_code == 2


REFUND_UNDO = RefundUndo(
    job=JOB,
    taken_ms=3_000,
    kept_ms=421,
    taken_micros=12_345,
    currency_code="USD",
    refunded_in_all_ms=421,
    billed_ms=5_000,
    etag="refund-1",
    balance=BALANCE,
)


def test_a_refund_is_taken_back_after_it_was_shown_and_agreed_to(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("UndoRefund", *[REFUND_UNDO] * 4)
    command = ("admin", "undo-refund", UID, *WHY)
    said = dict(lines(darkroom(environment, *command, "--dry-run")))
    assert (said["charged again"], said["used, held or gone"]) == ("3.000 s", "0.421 s")
    assert (said["in money"], said["stays given back"]) == ("0.0123 USD", "0.421 s of 5.000 s billed")
    declined = darkroom(environment, *command, stdin="n\n")
    assert (declined.exit_code, declined.stdout) == (1, "")
    assert declined.stderr.endswith("Nothing was changed.\n")
    assert one_document(darkroom(environment, *command, "--yes", "--json"))["etag"] == "refund-1"
    *rehearsals, request = service.asked("UndoRefund")
    assert [one.validate_only for one in rehearsals] == [True, True, True]
    assert (request.validate_only, request.job, request.etag) == (False, f"accounts/-/jobs/{UID}", "refund-1")
    assert request.reason == "a new lab"


@pytest.mark.parametrize("reason", ["NO_REFUND_TO_UNDO", "REFUND_SPENT"])
def test_a_refund_that_cannot_be_taken_back_says_what_to_do(
    service: ScriptedService, environment: dict[str, str], reason: str
) -> None:
    service.says("UndoRefund", Refuse(code=grpc.StatusCode.FAILED_PRECONDITION, reason=reason))
    result = darkroom(environment, "admin", "undo-refund", UID, "--yes", *WHY)
    assert result.exit_code == 1
    assert "`darkroom admin" in result.stderr


@pytest.mark.parametrize("reason", ["NOTHING_CHARGED", "REFUND_TOO_LARGE", "UNKNOWN_ACCOUNT"])
def test_a_refusal_says_what_to_do(
    service: ScriptedService, environment: dict[str, str], reason: str
) -> None:
    service.says("RefundJob", Refuse(code=grpc.StatusCode.FAILED_PRECONDITION, reason=reason))
    result = darkroom(environment, "admin", "refund", UID, *WHY)
    assert result.exit_code == 1
    assert "`darkroom" in result.stderr


# Admins: looking into it


def an_event(number: int, **fields: Any) -> AuditEvent:
    defaults: dict[str, Any] = {
        "number": number,
        "time": at(START),
        "actor": "accounts/root/keys/k1",
        "action": "UpdatePlan",
        "target": "plans/basic",
        "reason": "a new lab",
        "before_json": '{"quota_ms": 1, "limits": 3}',
        "after_json": '{"quota_ms": 2, "limits": 3}',
    }
    return AuditEvent(**defaults | fields)


def test_audit_lists_who_did_what_and_why_and_what_became_another(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    made = an_event(1, action="CreateApiKey", before_json="", after_json='{"role": "user"}')
    service.says("ListAuditEvents", ListAuditEventsResponse(events=[an_event(2), made], next_page_token="m"))
    where = ("--target", "plans/basic", "--actor", "accounts/root")
    when = ("--from", "2026-01-01", "--until", "2026-02-01T12:30")
    result = darkroom(environment, "admin", "audit", *where, *when, "--limit", "2")
    assert [[row[0], *row[2:]] for row in lines(result)] == [
        ["2", "root/keys/k1", "UpdatePlan", "plans/basic", "a new lab", "quota_ms 1 → 2"],
        ["1", "root/keys/k1", "CreateApiKey", "plans/basic", "a new lab", 'role null → "user"'],
    ]
    (request,) = service.asked("ListAuditEvents")
    assert (request.target, request.actor, request.page_size) == ("plans/basic", "accounts/root", 2)
    assert getattr(request, "from").ToJsonString() == "2026-01-01T00:00:00Z"
    assert request.until.ToJsonString() == "2026-02-01T12:30:00Z"


def test_an_export_has_every_event_on_a_line_of_its_own(
    service: ScriptedService, environment: dict[str, str], tmp_path: Path
) -> None:
    pages = [
        ListAuditEventsResponse(events=[an_event(3), an_event(2)], next_page_token="more"),
        ListAuditEventsResponse(events=[an_event(1)]),
    ]
    service.says("ListAuditEvents", *pages, pages[0], *pages)
    path = tmp_path / "audit.jsonl"
    result = darkroom(environment, "admin", "audit", "--export", str(path))
    assert lines(result) == [[str(path)]]
    events = [Parse(line, AuditEvent()) for line in path.read_text(encoding="utf-8").splitlines()]
    assert events == [an_event(3), an_event(2), an_event(1)]
    assert [request.page_token for request in service.asked("ListAuditEvents")] == ["", "more"]
    darkroom(environment, "admin", "audit", "--export", str(path), "--limit", "1")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1
    nowhere = darkroom(environment, "admin", "audit", "--export", str(tmp_path / "none" / "a.jsonl"))
    assert nowhere.exit_code == 1


HOLDS = InvariantResult(number=1, sentence="No amount is 0.", took_ms=1_200)
BROKEN = InvariantResult(number=4, sentence="No pending ends twice.", violations=2, first_json=['{"id": 7}'])
NOT_ASKED = InvariantResult(number=9, sentence="Use lies inside its lot's life.", violations=-1)


@pytest.mark.parametrize(
    ("results", "status", "said"),
    [
        ([HOLDS], 0, ["All invariants hold."]),
        ([HOLDS, BROKEN], 6, ['4: {"id": 7}', "1 of 2 invariants broken."]),
        ([HOLDS, NOT_ASKED], 6, ["1 invariant not asked in time: give it longer, as with --within 10m."]),
    ],
)
def test_a_check_says_of_each_invariant_whether_it_holds_and_ends_with_6_unless_all_do(
    service: ScriptedService,
    environment: dict[str, str],
    results: list[InvariantResult],
    status: int,
    said: list[str],
) -> None:
    answer = CheckInvariantsResponse(results=results, holds=status == 0)
    service.says("CheckInvariants", answer, answer)
    result = darkroom(environment, "admin", "check", "--within", "90s", "--replay")
    assert result.exit_code == status
    assert result.stderr.splitlines() == said
    words = {0: "holds", 2: "broken: 2 rows", -1: "not asked"}
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[1] for row in rows] == [words[each.violations] for each in results]
    assert rows[0] == ["1", "holds", "1,200 ms", "No amount is 0."]
    assert one_document(darkroom(environment, "admin", "check", "--json"))["holds"] is (status == 0)
    spoken, silent = service.asked("CheckInvariants")
    assert (spoken.within_ms, spoken.replay) == (90_000, True)
    assert (silent.within_ms, silent.replay) == (0, False)


# Programs


async def test_transfers_are_asked_for_page_by_page(service: ScriptedService, client: DarkroomClient) -> None:
    service.says(
        "ListTransfers",
        ListTransfersResponse(transfers=[Transfer(number=2)], next_page_token="more"),
        ListTransfersResponse(transfers=[Transfer(number=1)]),
    )
    assert [transfer.number async for transfer in client.list_transfers("ben")] == [2, 1]
    first, second = service.asked("ListTransfers")
    assert (first.account, second.page_token) == ("accounts/ben", "more")


def test_programs_without_an_event_loop_can_do_the_same(service: ScriptedService) -> None:
    plan, key, account = (
        Plan(name="plans/a"),
        ApiKey(name="accounts/a/keys/k"),
        AdminAccount(name="accounts/a"),
    )
    answers: dict[str, Any] = {
        "ListTransfers": ListTransfersResponse(transfers=[Transfer(number=1)]),
        "GetStatement": STATEMENT,
        "PreviewPlanChange": UPGRADE,
        "ChangePlan": UPGRADE,
        "GetAccount": account,
        "ListAccounts": ListAccountsResponse(accounts=[account]),
        "EraseAccount": account,
        "ListApiKeys": ListApiKeysResponse(keys=[key]),
        "RevokeApiKey": key,
        "ListPlans": ListPlansResponse(plans=[plan]),
        "GetPlan": plan,
        "CreatePlan": plan,
        "UpdatePlan": plan,
        "AdjustBalance": BALANCE,
        "RefundJob": Refund(job=JOB),
        "UndoRefund": REFUND_UNDO,
        "UndoPlanChange": UNDO,
        "ListAuditEvents": ListAuditEventsResponse(events=[an_event(1)]),
        "CheckInvariants": CheckInvariantsResponse(holds=True),
    }
    for method, answer in answers.items():
        service.says(method, answer)
    now = admin_pb2.EFFECTIVE_FROM_NOW
    with SyncClient(service.address, "dk_ada_secret") as client:
        assert [each.number for each in client.list_transfers()] == [1]
        assert client.statement(at=START) == STATEMENT
        assert client.preview_plan_change("pro") == client.change_plan("pro", etag="e1") == UPGRADE
        assert client.admin_account("a") == client.erase_account("a", reason="r") == account
        assert list(client.accounts(plan="a")) == [account]
        assert client.api_keys("a") == [client.revoke_api_key("a", "k", reason="r")] == [key]
        assert client.plans() == [client.plan("a")] == [client.create_plan(plan, reason="r")] == [plan]
        assert client.update_plan(plan, effective_from=now, reason="r", validate_only=True) == plan
        assert client.adjust_balance("a", amount_ms=1, reason="r") == BALANCE
        assert client.refund(UID, reason="r", amount_ms=5).job == JOB
        assert client.undo_refund(UID, reason="r", validate_only=True) == REFUND_UNDO
        assert client.undo_plan_change("a", reason="r", validate_only=True) == UNDO
        assert [each.number for each in client.audit_events(start=START, end=START)] == [1]
        assert client.check_invariants(within=timedelta(seconds=5)).holds
    assert service.asked("UpdatePlan")[0].validate_only
    assert service.asked("AdjustBalance")[0].source == admin_pb2.GRANT_SOURCE_UNSPECIFIED


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (0, "0.000 s"),
        (3_421, "3.421 s"),
        (-60_001, "-1 min 0.001 s"),
        (54_000_000, "15 h"),
        (61_000, "1 min 1.000 s"),
    ],
)
def test_times_that_add_up_lose_nothing(ms: int, words: str) -> None:
    assert exact_duration(ms) == words


def test_times_are_local_and_say_so() -> None:
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    balance = Balance()
    balance.renew_time.FromDatetime(noon)
    assert (
        when(balance, "renew_time") == f"{noon.astimezone():%Y-%m-%d %H:%M:%S} {noon.astimezone().tzname()}"
    )
