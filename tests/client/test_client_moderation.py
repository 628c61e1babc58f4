"""What moderators type, what they are shown before it is done, and the same calls from Python."""

from __future__ import annotations

import grpc
import pytest

from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import EtagMismatch
from scheduler.client.sync import DarkroomClient as SyncClient
from scheduler.v1.job_pb2 import Hidden, ListFeedResponse, ListJobsResponse
from scheduler.v1.moderation_pb2 import (
    AccountBlock,
    ListRulesResponse,
    Rule,
    RuleMatch,
    RulesTrial,
    RulesUpdate,
)
from tests.client.scripted_service import JOB, UID, Refuse, ScriptedService, a_job
from tests.client.typed_commands import darkroom, lines, one_document

MODERATION = ("admin", "moderation")
WHY = ("--reason", "their lawyers")
DINOSAUR = Rule(pattern="purple dinosaur", category="trademarks")
SHOWN = RulesUpdate(
    etag="e1",
    added=[DINOSAUR],
    trial=RulesTrial(jobs=1_000, matches=2, examples=[RuleMatch(job=JOB, pattern="purple dinosaur")]),
)


def test_rules_are_listed_from_all_pages(service: ScriptedService, environment: dict[str, str]) -> None:
    first = ListRulesResponse(rules=[DINOSAUR], next_page_token="more", etag="e1")
    second = ListRulesResponse(rules=[Rule(pattern="xxx", category="adult")], etag="e2")
    service.says("ListRules", first, second, first, second)
    rows = lines(darkroom(environment, *MODERATION, "rules", "--category", "adult"))
    assert [row[:2] for row in rows] == [["purple dinosaur", "trademarks"], ["xxx", "adult"]]
    assert [(request.page_token, request.category) for request in service.asked("ListRules")] == [
        ("", "adult"),
        ("more", "adult"),
    ]
    document = one_document(darkroom(environment, *MODERATION, "rules", "--json"))
    assert (len(document["rules"]), document["etag"]) == (2, "e1"), "by the first page nothing is overlooked"


def test_a_rule_is_added_as_it_was_shown(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("UpdateRules", SHOWN, RulesUpdate(etag="e2", added=[DINOSAUR]))
    add = ("add", "Purple Dinosaur", "--category", "trademarks", *WHY)
    done = darkroom(environment, *MODERATION, *add, stdin="y\n")
    assert done.exit_code == 0, done.output
    assert done.stdout == "added\tpurple dinosaur (trademarks)\n"
    assert "Of the last 1,000 prompts it would have refused 2." in done.stderr
    assert f"{UID}: purple dinosaur" in done.stderr
    looked, did = service.asked("UpdateRules")
    assert (looked.validate_only, did.validate_only, did.etag) == (True, False, "e1")
    assert [rule.pattern for rule in did.add] == ["Purple Dinosaur"]
    assert did.reason == "their lawyers"
    assert looked.request_id != did.request_id


def test_a_dry_run_and_a_no_change_nothing(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("UpdateRules", SHOWN, RulesUpdate(removed=["xxx"]))
    add = ("add", "purple dinosaur", "--category", "trademarks", *WHY)
    shown = darkroom(environment, *MODERATION, *add, "--dry-run", "--json")
    assert one_document(shown)["trial"]["matches"] == 2
    declined = darkroom(environment, *MODERATION, "remove", "xxx", *WHY, stdin="\n")
    assert (declined.exit_code, "Nothing was changed." in declined.stderr) == (1, True)
    assert all(request.validate_only for request in service.asked("UpdateRules"))


def test_rules_that_somebody_changed_meanwhile_are_looked_at_again(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says(
        "UpdateRules",
        RulesUpdate(etag="e1", removed=["xxx"]),
        Refuse(code=grpc.StatusCode.ABORTED, reason="ETAG_MISMATCH"),
    )
    refused = darkroom(environment, *MODERATION, "remove", "xxx", *WHY, "--yes")
    assert refused.exit_code == 1
    assert "Read it again" in refused.stderr


def test_a_job_is_hidden_and_shown_again(service: ScriptedService, environment: dict[str, str]) -> None:
    hidden = a_job(hidden=Hidden(category="adult"))
    service.says("HideJob", hidden)
    service.says("UnhideJob", a_job())
    said = dict(lines(darkroom(environment, *MODERATION, "hide", UID, "--category", "adult", *WHY)))
    assert said["hidden"] == "from the feed, by a moderator (adult)"
    assert "hidden" not in dict(lines(darkroom(environment, *MODERATION, "unhide", JOB, *WHY)))
    (hide,), (unhide,) = service.asked("HideJob"), service.asked("UnhideJob")
    assert (hide.name, hide.category, hide.reason) == (f"accounts/-/jobs/{UID}", "adult", "their lawyers")
    assert (unhide.name, unhide.reason) == (JOB, "their lawyers")


def test_an_account_is_blocked_when_it_is_meant(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    block = AccountBlock(account="accounts/eve", blocked=True, waiting_jobs=2, running_jobs=1)
    service.says("BlockAccount", block, block, block, block)
    service.says("UnblockAccount", AccountBlock(account="accounts/eve"))
    declined = darkroom(environment, *MODERATION, "block", "eve", *WHY, stdin="\n")
    assert declined.exit_code == 1
    assert "Block eve?" in declined.stderr
    assert darkroom(environment, *MODERATION, "block", "eve", *WHY, "--dry-run").exit_code == 0
    assert all(request.validate_only for request in service.asked("BlockAccount"))
    said = dict(lines(darkroom(environment, *MODERATION, "block", "eve", *WHY, "--yes")))
    assert said == {
        "account": "eve",
        "let in": "no: blocked",
        "cancelled as they waited": "2",
        "stopped as they ran": "1",
    }
    assert not service.asked("BlockAccount")[-1].validate_only
    unblocked = dict(lines(darkroom(environment, *MODERATION, "unblock", "accounts/eve", *WHY)))
    assert unblocked == {"account": "eve", "let in": "yes"}
    assert service.asked("UnblockAccount")[0].name == "accounts/eve"


@pytest.mark.parametrize(
    "command",
    [
        ["add", "x", "--category", "gore", "--yes"],
        ["remove", "x", "--yes"],
        ["hide", UID, "--category", "gore"],
        ["unhide", UID],
        ["block", "eve", "--yes"],
        ["unblock", "eve"],
    ],
)
def test_what_a_moderator_does_needs_a_reason(environment: dict[str, str], command: list[str]) -> None:
    assert darkroom(environment, *MODERATION, *command).exit_code == 2


def test_moderators_list_jobs_of_others_and_what_is_hidden(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    hidden = a_job(hidden=Hidden(category="adult"))
    service.says("ListJobs", ListJobsResponse(jobs=[hidden]), ListJobsResponse())
    service.says("ListFeed", ListFeedResponse(jobs=[hidden]), ListFeedResponse())
    (row,) = lines(darkroom(environment, "jobs", "--account", "eve"))
    assert row[1].endswith(", hidden")
    assert darkroom(environment, "jobs").exit_code == 0
    assert [request.parent for request in service.asked("ListJobs")] == ["accounts/eve", "accounts/-"]
    assert darkroom(environment, "feed", "--hidden").exit_code == 0
    assert darkroom(environment, "feed").exit_code == 0
    assert [request.show_hidden for request in service.asked("ListFeed")] == [True, False]


async def test_a_program_moderates_with_the_asyncio_client(
    service: ScriptedService, client: DarkroomClient
) -> None:
    service.says("ListRules", ListRulesResponse(rules=[DINOSAUR], etag="e1"))
    service.says("UpdateRules", Refuse(code=grpc.StatusCode.ABORTED, reason="ETAG_MISMATCH"))
    rules = await client.rules()
    with pytest.raises(EtagMismatch):
        await client.update_rules(remove=[rules.rules[0].pattern], reason="r", etag=rules.etag)
    assert service.asked("UpdateRules")[0].etag == "e1"


def test_a_program_moderates_without_an_event_loop(service: ScriptedService) -> None:
    service.says("ListRules", ListRulesResponse(rules=[DINOSAUR]))
    service.says("UpdateRules", SHOWN)
    service.says("HideJob", a_job(hidden=Hidden(category="adult")))
    service.says("UnhideJob", a_job())
    service.says("BlockAccount", AccountBlock(account="accounts/eve", blocked=True))
    service.says("UnblockAccount", AccountBlock(account="accounts/eve"))
    with SyncClient(service.address, "k") as client:
        assert list(client.rules().rules) == [DINOSAUR]
        assert client.update_rules(add=[DINOSAUR], reason="r", validate_only=True) == SHOWN
        assert client.hide(UID, category="adult", reason="r").hidden.category == "adult"
        assert not client.unhide(UID, reason="r").HasField("hidden")
        assert client.block_account("eve", reason="r").blocked
        assert not client.unblock_account("eve", reason="r").blocked
    requests = [service.asked(f"{method}Account")[0] for method in ("Block", "Unblock")]
    assert {request.name for request in requests} == {"accounts/eve"}
