"""Moderation, promise by promise: what moderators type while others work, against a running service."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from billing.v1 import admin_pb2
from scheduler.client.errors import (
    AccountBlocked,
    JobCancelled,
    ModerationRejected,
    NotFoundOrNotYours,
    RoleRequired,
)
from scheduler.client.sync import DarkroomClient, JobHandle
from scheduler.v1 import job_pb2
from tests.service.people import People
from tests.service.process import ServiceProcess
from tests.service.shell import Person

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

WHY = ("--reason", "a test")
MODERATION = ("admin", "moderation")
# A tenth of the twenty steps: 200 ms.
QUICK = "--w 64 --h 64 --stop 10"


@pytest.fixture
def somebody(running: ServiceProcess, people: People) -> Iterator[Callable[[str], DarkroomClient]]:
    """Return somebody new with an account on the plan with private mode."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(
            DarkroomClient(running.address, asyncio.run(people.key(name, "pro")))
        )


@pytest.fixture
def boss(running: ServiceProcess) -> Iterator[DarkroomClient]:
    """An admin."""
    with DarkroomClient(running.address, running.admin_key) as client:
        yield client


@pytest.fixture
def mo(running: ServiceProcess, boss: DarkroomClient, tmp_path: Path) -> Person:
    """A moderator."""
    account = f"mo-{secrets.token_hex(3)}"
    boss.create_account(plan="basic", account_id=account, reason="a test")
    key = boss.create_api_key(account, role=admin_pb2.ROLE_MODERATOR, reason="a test")
    return Person(running.address, key.secret, tmp_path)


def account_of(handle: JobHandle) -> str:
    return handle.job.name.split("/")[1]


def test_moderators_edit_the_rules_while_the_service_runs(
    mo: Person, somebody: Callable[[str], DarkroomClient]
) -> None:
    ann = somebody("ann")
    add = (*MODERATION, "add", "purple dinosaur", "--category", "trademarks", *WHY)
    seen = ann.imagine(f"a purple dinosaur {QUICK}")
    shown = mo.gets(*add, "--dry-run")
    assert [match["job"] for match in shown["trial"]["examples"]] == [seen.job.name]

    mo.types(*add, answers="y\n")
    try:
        with pytest.raises(ModerationRejected) as refused:
            ann.imagine(f"a P.u.r.p.l.e d1nosaur {QUICK}")
        assert refused.value.details.metadata == {"category": "trademarks"}
        rules = mo.gets(*MODERATION, "rules", "--category", "trademarks")["rules"]
        assert [rule["pattern"] for rule in rules] == ["purple dinosaur"]
        assert mo.refusal(*add, "--yes")["reason"] == "INVALID_PARAMETER", "it is a rule already"
        with pytest.raises(RoleRequired):
            ann.rules()
    finally:
        mo.types(*MODERATION, "remove", "Purple Dinosaur", *WHY, "--yes")
    ann.imagine(f"a purple dinosaur {QUICK}").result()
    seen.result()
    events = mo.gets("admin", "audit", "--target", "moderation/rules")["events"]
    assert [event["action"] for event in events][:2] == ["UpdateRules", "UpdateRules"]


def test_a_hidden_job_is_in_no_feed_and_its_owner_is_told(
    mo: Person, somebody: Callable[[str], DarkroomClient], tmp_path: Path
) -> None:
    ann, eve = somebody("ann"), somebody("eve")
    grid = ann.imagine(f"a lighthouse {QUICK} --public").result()
    upscale = ann.upscale(grid.uid, 1).result()
    assert upscale.uid in {job.uid for job in eve.feed()}

    mo.types(*MODERATION, "hide", upscale.uid, "--category", "adult", *WHY)
    assert upscale.uid not in {job.uid for job in eve.feed()}
    (hidden,) = [job for job in mo.gets("feed", "--hidden")["jobs"] if job["uid"] == upscale.uid]
    assert hidden["hidden"]["category"] == "adult"
    with pytest.raises(RoleRequired):
        list(eve.feed(show_hidden=True))
    with pytest.raises(NotFoundOrNotYours):
        eve.download(upscale.name, tmp_path)
    assert ann.get(upscale.uid).hidden.category == "adult"
    assert len(ann.download(upscale.uid, tmp_path)) == 1

    mo.types(*MODERATION, "unhide", upscale.uid, *WHY)
    assert upscale.uid in {job.uid for job in eve.feed()}
    unhidden, hidden = mo.gets("admin", "audit", "--target", upscale.name)["events"]
    assert (hidden["action"], hidden["reason"], json.loads(hidden["afterJson"])) == (
        "HideJob",
        "a test",
        {"hidden": "adult"},
    )
    assert unhidden["action"] == "UnhideJob"


def test_moderators_see_private_work(mo: Person, somebody: Callable[[str], DarkroomClient]) -> None:
    ann, eve = somebody("ann"), somebody("eve")
    handle = ann.imagine(f"a lighthouse {QUICK} --private")
    job = handle.result()
    assert mo.gets("show", job.uid)["prompt"] == job.prompt
    listed = mo.gets("jobs", "--account", account_of(handle))["jobs"]
    assert [each["uid"] for each in listed] == [job.uid]
    mo.types("download", job.uid, "--out", "seen")
    assert len(list((mo.folder / "seen").iterdir())) == 4
    with pytest.raises(NotFoundOrNotYours):
        eve.get(job.name)
    with pytest.raises(NotFoundOrNotYours):
        list(eve.jobs(account=account_of(handle)))


def test_a_blocked_account_is_let_in_nowhere_and_what_waits_costs_nothing(
    mo: Person, boss: DarkroomClient, somebody: Callable[[str], DarkroomClient]
) -> None:
    eve = somebody("eve")
    boss.pause_tier(job_pb2.TIER_RELAX, reason="so that its jobs wait")
    try:
        waiting = eve.imagine(f"a lighthouse {QUICK}", tier=job_pb2.TIER_RELAX)
        account = account_of(waiting)
        assert mo.gets(*MODERATION, "block", account, *WHY, "--dry-run")["waitingJobs"] == 1
        assert eve.get(waiting.id).state == job_pb2.JOB_STATE_QUEUED
        mo.types(*MODERATION, "block", account, *WHY, answers="y\n")
        for ask in (eve.account, eve.balance, lambda: eve.imagine("a lighthouse")):
            with pytest.raises(AccountBlocked):
                ask()
        ended = mo.gets("show", waiting.id)
        assert (ended["state"], ended["receipt"]["billedGpuMs"]) == ("JOB_STATE_CANCELLED", "0")
        mo.types(*MODERATION, "unblock", account, *WHY)
    finally:
        boss.resume_tier(job_pb2.TIER_RELAX, reason="a test")
    eve.imagine(f"a lighthouse {QUICK}").result()
    assert mo.refusal(*MODERATION, "block", "admin", *WHY, "--yes")["reason"] == "ACCOUNT_PROTECTED"


def test_what_a_blocked_account_runs_stops_and_is_charged_up_to_there(
    boss: DarkroomClient, somebody: Callable[[str], DarkroomClient]
) -> None:
    eve = somebody("eve")
    handle = eve.imagine("a lighthouse", tier=job_pb2.TIER_FAST)
    # It was opened before, so it is shown to its end: nobody is let in, and nobody is thrown out of it.
    stopped = 0
    for update in handle.watch():
        if update.progress.step and not stopped:
            stopped = boss.block_account(account_of(handle), reason="a test").running_jobs
    assert stopped == 1
    ended = boss.get(handle.job.name)
    assert ended.state == job_pb2.JOB_STATE_CANCELLED
    assert 100 <= ended.receipt.billed_gpu_ms < 2_000
    with pytest.raises(AccountBlocked):
        eve.get(handle.id)
    boss.unblock_account(account_of(handle), reason="a test")
    with pytest.raises(JobCancelled):
        eve.handle(handle.id).result()
