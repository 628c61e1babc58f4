"""Plans, money and proof, as an admin and as people type it, against a running service."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from scheduler.client.sync import DarkroomClient
from scheduler.v1 import job_pb2
from tests.folders import data_folder
from tests.service.process import ServiceProcess, service
from tests.service.shell import Person

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

WHY = ("--reason", "a test")
# 20 steps of a second each; of a quick job, two.
STEP_MS = 1_000
SLOW = ("a", "boat", "--w", "64", "--h", "64")
QUICK = (*SLOW, "--stop", "10")

PLANS = f"""
[club]
minutes = 200
price = 10
currency = "USD"
overage_price = 0.05
running = 3
relax_running = 2
accepted = 10
relax_weight = 1
private = true
private_multiplier = 2
self_service = true
[club.gpu_classes]
"timed {STEP_MS} ms" = 1.5

[club-plus]
minutes = 900
price = 20
currency = "USD"
overage_price = 0.05
running = 6
relax_running = 3
accepted = 20
relax_weight = 1
private = true
private_multiplier = 2
self_service = true

[narrow]
minutes = 200
currency = "USD"
overage_price = 0
running = 1
relax_running = 1
accepted = 10
relax_weight = 1
private = false
private_multiplier = 1
"""


@pytest.fixture(scope="module")
def serving() -> Iterator[ServiceProcess]:
    with data_folder() as folder, service(folder, gpus=3, timed_step_ms=STEP_MS) as running:
        yield running


@pytest.fixture(scope="module")
def admin(serving: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Person:
    """An admin who has made the plans of this page."""
    person = Person(address=serving.address, key=serving.admin_key, folder=tmp_path_factory.mktemp("admin"))
    (person.folder / "plans.toml").write_text(PLANS)
    person.types("admin", "plans", "apply", "plans.toml", *WHY)
    return person


def opens(admin: Person, name: str, plan: str) -> Person:
    """Let the admin open an account, and return who has its key."""
    admin.types("admin", "accounts", "create", name, "--plan", plan, *WHY)
    key = admin.types("admin", "keys", "create", name, *WHY).stdout.strip()
    folder = admin.folder / name
    folder.mkdir()
    return Person(address=admin.address, key=key, folder=folder)


def balance(person: Person) -> dict[str, int]:
    """Return what is left, held and used, in whole numbers."""
    found = person.gets("info")["balance"]
    return {name: int(value) for name, value in found.items() if name.endswith(("Ms", "Micros"))}


def totals(statement: dict[str, Any]) -> dict[str, int]:
    """Return the sums of a statement, having added them up."""
    sums = {name: int(value) for name, value in statement.items() if name.endswith(("Ms", "Micros"))}
    closing = sums["openingMs"] + sums["grantedMs"] - sums["usedMs"] - sums["expiredMs"] - sums["revokedMs"]
    assert closing == sums["closingMs"]
    lines = statement["lines"]
    assert sum(int(line["fastMs"]) for line in lines) == sums["closingMs"] - sums["openingMs"]
    for name in ("meteredMs", "amountMicros", "relaxMs"):
        assert sum(int(line[name]) for line in lines) == sums[name]
    return sums


# Plans


def test_a_plan_file_is_shown_first_then_made_and_touches_those_who_are_on_it(admin: Person) -> None:
    file = admin.folder / "fresh.toml"
    shown = admin.types("admin", "plans", "show", "basic", "--toml").stdout
    file.write_text(shown.replace("[basic]", "[fresh]"))
    first = admin.gets("admin", "plans", "apply", "fresh.toml", "--dry-run", *WHY)
    assert (first["applied"], first["plans"][0]["new"]) == (False, True)
    assert admin.refusal("admin", "plans", "show", "fresh")["reason"] == "UNKNOWN_PLAN"
    assert admin.gets("admin", "plans", "apply", "fresh.toml", *WHY)["plans"][0]["version"] == 1

    ann = opens(admin, "ann", "fresh")
    before = balance(ann)["availableMs"]
    file.write_text("[fresh]\nminutes = 250\n")
    diff = admin.gets("admin", "plans", "diff", "fresh.toml", "--now")
    (plan,) = diff["plans"]
    assert plan["changes"] == [{"key": "minutes", "before": "200", "after": "250"}]
    assert (plan["impact"]["accounts"], plan["impact"]["grantedMs"]) == ("1", "3000000")
    assert plan["impact"]["first"] == [
        {
            "account": "accounts/ann",
            "availableBeforeMs": str(before),
            "availableAfterMs": str(before + 3_000_000),
        }
    ]
    assert balance(ann)["availableMs"] == before
    applied = admin.gets("admin", "plans", "apply", "fresh.toml", "--now", *WHY)
    assert applied["plans"][0]["version"] == 2
    assert balance(ann)["availableMs"] == before + 3_000_000

    file.write_text('[fresh]\netag = "v1"\nminutes = 300\n')
    stale = admin.refusal("admin", "plans", "apply", "fresh.toml", *WHY)
    assert stale["reason"] == "ETAG_MISMATCH"
    file.write_text("[fresh]\nminuts = 300\n")
    misspelt = admin.types("admin", "plans", "apply", "fresh.toml", *WHY, expect=2)
    assert "did you mean minutes?" in misspelt.stderr
    assert admin.gets("admin", "plans", "show", "fresh")["plans"][0]["version"] == 2
    assert (
        admin.gets("admin", "plans", "show", "fresh", "--version", "1")["plans"][0]["quotaMs"] == "12000000"
    )


def test_changed_limits_reach_the_running_scheduler(admin: Person) -> None:
    ben = opens(admin, "ben", "narrow")
    first, second = (ben.gets("imagine", "--relax", "--no-wait", *SLOW)["job"] for _ in range(2))
    with DarkroomClient(ben.address, ben.key) as client:
        for update in client.watch(second["uid"]):
            assert update.event.state != job_pb2.JOB_STATE_RUNNING
            if update.queue_status.reason == job_pb2.QUEUE_REASON_CONCURRENCY_LIMIT:
                break
        admin.types("admin", "plans", "set", "narrow", "running=2", "relax_running=2", "--now", *WHY)
        for update in client.watch(second["uid"]):
            if update.event.state == job_pb2.JOB_STATE_RUNNING:
                break
    assert ben.gets("show", first["uid"])["state"] == "JOB_STATE_RUNNING"
    (deed, *_) = admin.gets("admin", "audit", "--target", "plans/narrow")["events"]
    started = moment(ben.gets("show", second["uid"])["startTime"])
    # A second is the promise, and a fraction of it usual; the rest is for machines that are busy with more.
    assert timedelta(0) <= started - moment(deed["time"]) < timedelta(seconds=5)
    for job in (first, second):
        ben.types("cancel", job["uid"])


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


# A person's month


def test_a_month_adds_up_with_a_grant_a_charge_a_refund_and_what_takes_it_back(admin: Person) -> None:
    ada = opens(admin, "ada", "club")
    admin.types("admin", "grant", "ada", "5", "--promo", "--until", "2100-01-01", *WHY)
    assert balance(ada)["availableMs"] == 12_300_000
    admin.types("admin", "grant", "ada", "7", "--purchase", *WHY)
    (_, promo, *_) = admin.gets("admin", "audit", "--target", "accounts/ada")["events"]
    admin.types("admin", "grant", "ada", "-2", "--undoes", promo["number"], *WHY)
    (deed, *_) = admin.gets("admin", "audit", "--target", "accounts/ada", "--limit", "1")["events"]
    assert json.loads(deed["afterJson"])["undoes"] == int(promo["number"])
    too_much = admin.refusal("admin", "grant", "ada", "-4", "--undoes", promo["number"], *WHY)
    assert too_much["metadata"]["available_ms"] == "180000", "three of five are left of it"
    assert admin.refusal("admin", "grant", "ada", "-1", "--undoes", "1", *WHY)["reason"] == "UNKNOWN_GRANT"
    admin.types("admin", "grant", "ada", "-7", *WHY)
    admin.types("admin", "grant", "ada", "2", "--promo", "--until", "2100-01-01", *WHY)
    assert balance(ada)["availableMs"] == 12_300_000

    dry = ada.gets("imagine", "--fast", "--dry-run", *QUICK)
    foreseen_ms = -(-int(dry["price"]["predictedGpuMs"]) * 15_000 // 10_000)
    assert int(dry["price"]["billedGpuMs"]) == foreseen_ms
    assert dry["price"]["sentence"] == (
        f"About {foreseen_ms / 1000:.0f} s of fast time from your plan club; what is charged is measured."
    )
    job = ada.made("imagine", "--fast", *QUICK)
    receipt = {name: int(value) for name, value in job["receipt"].items() if name.endswith("Ms")}
    billed = receipt["billedGpuMs"]
    assert billed == -(-receipt["gpuMs"] * 15_000 // 10_000), "this type of GPU costs one and a half"
    relaxed = ada.made("imagine", "--relax", *QUICK)
    used = balance(ada)
    assert (used["usedMs"], used["heldMs"]) == (billed, 0)
    assert used["relaxUsedMs"] == int(relaxed["receipt"]["gpuMs"])

    statement = ada.gets("statement", "--csv", "month.csv")
    sums = totals(statement)
    assert (sums["grantedMs"] - sums["revokedMs"], sums["usedMs"]) == (12_300_000, billed)
    of_job = [line for line in statement["lines"] if line["job"] == job["name"]]
    assert sum(int(line["fastMs"]) for line in of_job) == -billed
    assert {line["multiplierBp"] for line in of_job} == {15_000}
    assert sum(int(line["measuredMs"]) for line in of_job) == receipt["gpuMs"]
    with (ada.folder / "month.csv").open(newline="") as file:
        assert sum(int(line["fast_ms"]) for line in csv.DictReader(file)) == sums["closingMs"]

    part = admin.gets("admin", "refund", job["uid"], "--minutes", "0.01", *WHY)
    assert (part["refundedMs"], part["billedMs"]) == ("600", str(billed))
    rest = admin.gets("admin", "refund", job["name"], *WHY)
    assert rest["refundedInAllMs"] == str(billed)
    assert admin.refusal("admin", "refund", job["uid"], *WHY)["reason"] == "REFUND_TOO_LARGE"
    assert admin.refusal("admin", "refund", relaxed["uid"], *WHY)["reason"] == "NOTHING_CHARGED"
    assert totals(ada.gets("statement"))["usedMs"] == 0

    shown = admin.gets("admin", "undo-refund", job["uid"], "--dry-run", *WHY)
    assert int(shown["takenMs"]) == billed - 600, "the newest first"
    assert totals(ada.gets("statement"))["usedMs"] == 0
    undone = admin.gets("admin", "undo-refund", job["uid"], "--yes", *WHY)
    assert (undone["takenMs"], undone["refundedInAllMs"]) == (shown["takenMs"], "600")
    admin.gets("admin", "undo-refund", job["uid"], "--yes", *WHY)
    assert totals(ada.gets("statement"))["usedMs"] == billed
    again = admin.refusal("admin", "undo-refund", job["uid"], "--yes", *WHY)
    assert again["reason"] == "NO_REFUND_TO_UNDO"
    admin.types("admin", "refund", job["uid"], *WHY)

    before = totals(ada.gets("statement"))["revokedMs"]
    admin.types("admin", "grant", "ada", "-5", *WHY)
    left = admin.gets("admin", "accounts", "show", "ada")["balance"]
    assert left["availableMs"] == "12000000"
    assert totals(admin.gets("statement", "--account", "ada"))["revokedMs"] == before + 300_000


def test_out_of_fast_time_is_refused_or_charged_within_the_cap_as_the_account_has_agreed(
    admin: Person,
) -> None:
    pat = opens(admin, "pat", "club")
    admin.types("admin", "grant", "pat", "-200", *WHY)
    assert pat.refusal("imagine", "--fast", *QUICK)["reason"] == "FAST_TIME_EXHAUSTED"
    pat.types("overage", "on", "--cap", "5")
    job = pat.made("imagine", "--fast", *QUICK)
    posted = balance(pat)["overagePostedMicros"]
    assert posted == int(job["receipt"]["amountMicros"]) > 0
    assert totals(pat.gets("statement"))["amountMicros"] == posted
    pat.types("overage", "on", "--cap", "0.000001")
    assert pat.refusal("imagine", "--fast", *QUICK)["reason"] == "FAST_TIME_EXHAUSTED"
    admin.types("admin", "refund", job["uid"], *WHY)
    assert totals(pat.gets("statement"))["amountMicros"] == 0
    admin.types("admin", "undo-refund", job["uid"], "--yes", *WHY)
    assert totals(pat.gets("statement"))["amountMicros"] == posted


def test_an_upgrade_is_done_as_it_was_shown_and_a_downgrade_waits_for_the_end_of_the_period(
    admin: Person,
) -> None:
    eve = opens(admin, "eve", "club")
    before = balance(eve)
    for words in (("--dry-run",), ("--yes",)):
        refused = eve.refusal("plan", "change", "pro", *words)
        assert (refused["reason"], refused["metadata"]) == ("PLAN_NOT_SELF_SERVICE", {"plan": "pro"})
    assert eve.gets("plan", "change", "club-plus", "--dry-run")["atOnce"] is True
    eve.types("plan", "change", "club-plus", answers="n\n", expect=1)
    assert eve.gets("plan")["plan"] == "plans/club"
    done = eve.types("plan", "change", "club-plus", answers="y\n")
    facts = done.stdout.splitlines()
    assert done.stderr.splitlines()[: len(facts)] == facts, "what was shown is what was done"

    (upgrade,) = [
        line for line in eve.gets("statement")["lines"] if int(line["fastMs"]) not in (0, 12_000_000)
    ]
    after = balance(eve)
    assert after["grantedMs"] - before["grantedMs"] == int(upgrade["fastMs"])
    # The account was opened a moment ago: nearly the whole of the difference.
    assert 41_000_000 < int(upgrade["fastMs"]) <= 42_000_000

    shown = admin.gets("admin", "accounts", "undo-plan", "eve", "--dry-run", *WHY)
    assert (shown["fromPlan"], shown["toPlan"]) == ("plans/club-plus", "plans/club")
    admin.types("admin", "accounts", "undo-plan", "eve", *WHY, answers="n\n", expect=1)
    undone = admin.gets("admin", "accounts", "undo-plan", "eve", "--yes", *WHY)
    assert (undone["revokedMs"], undone["keptMs"]) == (upgrade["fastMs"], "0")
    assert eve.gets("plan")["plan"] == "plans/club"
    assert balance(eve)["availableMs"] == before["availableMs"]
    assert totals(eve.gets("statement"))["amountMicros"] == 0, "nothing is owed of what was taken back"
    assert (
        admin.refusal("admin", "accounts", "undo-plan", "eve", "--yes", *WHY)["reason"] == "NOTHING_TO_UNDO"
    )
    eve.types("plan", "change", "club-plus", "--yes")
    after = balance(eve)

    assert eve.gets("plan", "change", "club", "--yes")["atOnce"] is False
    assert eve.gets("info")["scheduledPlan"] == "plans/club"
    assert admin.gets("admin", "accounts", "show", "eve")["scheduledPlan"] == "plans/club"
    eve.types("plan", "change", "club-plus", "--yes")
    assert eve.gets("info")["scheduledPlan"] == ""
    assert balance(eve)["grantedMs"] == after["grantedMs"]
    moved = admin.gets("plan", "change", "narrow", "--account", "eve", "--yes", *WHY)
    assert (moved["account"], moved["atOnce"]) == ("accounts/eve", False)
    totals(eve.gets("statement"))


def test_a_revoked_key_opens_nothing_and_an_erased_account_keeps_its_books(admin: Person) -> None:
    zoe = opens(admin, "zoe", "club")
    job = zoe.made("imagine", "--fast", *QUICK)
    spare = admin.gets("admin", "keys", "create", "zoe", "--role", "moderator", *WHY)
    assert len(admin.gets("admin", "keys", "list", "zoe")["keys"]) == 2
    admin.types("admin", "keys", "revoke", "zoe", spare["name"].rpartition("/")[2], *WHY)
    revoked = Person(address=zoe.address, key=spare["secret"], folder=zoe.folder)
    assert revoked.refusal("info")["reason"] == "UNAUTHENTICATED"
    assert zoe.gets("show", job["uid"])["state"] == "JOB_STATE_SUCCEEDED"

    admin.types("admin", "accounts", "erase", "zoe", *WHY, answers="n\n", expect=1)
    erased = admin.gets("admin", "accounts", "erase", "zoe", "--yes", *WHY)
    assert erased["eraseTime"]
    assert zoe.refusal("info")["reason"] == "UNAUTHENTICATED"
    charged = int(job["receipt"]["billedGpuMs"])
    assert totals(admin.gets("statement", "--account", erased["name"]))["usedMs"] == charged


# Proof


def test_whatever_was_done_is_on_record_and_every_invariant_holds(admin: Person) -> None:
    admin.types("admin", "audit", "--export", "audit.jsonl")
    events = [json.loads(line) for line in (admin.folder / "audit.jsonl").read_text().splitlines()]
    numbers = [int(event["number"]) for event in events]
    assert numbers == sorted(numbers, reverse=True)
    assert all(event["actor"] and event["reason"] and event["requestId"] for event in events)
    made = {event["action"] for event in events}
    assert {"CreatePlan", "CreateAccount", "CreateApiKey"} <= made
    admin.types("admin", "audit", "--export", "three.jsonl", "--limit", "3")
    assert len((admin.folder / "three.jsonl").read_text().splitlines()) == 3
    listed = admin.gets("admin", "audit", "--actor", "accounts/admin", "--limit", "2")["events"]
    assert listed == [event for event in events if event["actor"].startswith("accounts/admin/")][:2]

    answer = admin.gets("admin", "check", "--within", "2m", "--replay")
    assert answer["holds"] is True
    assert len(answer["results"]) > 20
    assert "All invariants hold." in admin.types("admin", "check").stderr
