"""What moderators do: rules that count at once, hidden jobs, blocked accounts; and what is kept of it."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from billing.v1 import admin_pb2
from scheduler.frontdoor.moderation import Moderation
from scheduler.store import moderation as store
from scheduler.store.accounts import Role
from scheduler.v1 import job_pb2
from scheduler.v1.moderation_pb2 import (
    BlockAccountRequest,
    HideJobRequest,
    ListRulesRequest,
    ListRulesResponse,
    Rule,
    RulesUpdate,
    UnblockAccountRequest,
    UnhideJobRequest,
    UpdateRulesRequest,
)
from tests.frontdoor.door import Caller, Door, refusal

Code = grpc.StatusCode


@pytest.fixture
async def mo(door: Door) -> Caller:
    return await door.caller("mo", role=Role.MODERATOR)


def _id() -> str:
    return str(uuid.uuid4())


def a_rule(pattern: str, category: str = "gore") -> Rule:
    return Rule(pattern=pattern, category=category)


def an_update(**fields: Any) -> UpdateRulesRequest:
    return UpdateRulesRequest(**{"request_id": _id(), "reason": "they found a new word", **fields})


async def update(caller: Caller, **fields: Any) -> RulesUpdate:
    return await caller.moderation.UpdateRules(an_update(**fields))


async def rules(caller: Caller, **fields: Any) -> ListRulesResponse:
    return await caller.moderation.ListRules(ListRulesRequest(page_size=1000, **fields))


async def hide(caller: Caller, name: str, category: str = "adult", **fields: Any) -> job_pb2.Job:
    request = {"request_id": _id(), "reason": "bare", **fields}
    return await caller.moderation.HideJob(HideJobRequest(name=name, category=category, **request))


async def unhide(caller: Caller, name: str) -> job_pb2.Job:
    request = UnhideJobRequest(name=name, request_id=_id(), reason="it was a statue")
    return await caller.moderation.UnhideJob(request)


def a_block(account: str, **fields: Any) -> BlockAccountRequest:
    return BlockAccountRequest(
        **{"name": f"accounts/{account}", "request_id": _id(), "reason": "spam", **fields}
    )


def an_unblock(account: str) -> UnblockAccountRequest:
    return UnblockAccountRequest(name=f"accounts/{account}", request_id=_id(), reason="a mistake")


async def events(caller: Caller, **fields: Any) -> list[admin_pb2.AuditEvent]:
    return list((await caller.admin.ListAuditEvents(admin_pb2.ListAuditEventsRequest(**fields))).events)


async def feed(caller: Caller, **fields: Any) -> list[job_pb2.Job]:
    return list((await caller.jobs.ListFeed(job_pb2.ListFeedRequest(**fields))).jobs)


async def an_upscale(door: Door, owner: Caller, prompt: str = "a fox") -> job_pb2.Job:
    """Return a finished upscale of the owner's."""
    grid = await owner.create(prompt)
    await door.start(grid.uid)
    await door.succeed(grid.uid)
    upscale = await owner.upscale(f"{grid.name}/images/1")
    await door.start(upscale.uid)
    await door.succeed(upscale.uid, [b"large"])
    return await owner.get(upscale.name)


# Rules


async def test_a_rule_counts_at_once_where_it_was_made_and_no_more_where_it_was_removed(
    door: Door, mo: Caller
) -> None:
    ann = await door.caller("ann")
    await ann.create("a purple dinosaur")
    made = await update(mo, add=[a_rule("  Purple  DINOSAUR ", "trademarks")])
    assert [(rule.pattern, rule.category) for rule in made.added] == [("purple dinosaur", "trademarks")]
    refused = await refusal(ann.create("one púrple d1nosaur"))
    assert (refused.reason, refused.metadata) == ("MODERATION_REJECTED", {"category": "trademarks"})
    removed = await update(mo, remove=["purple dinosaur"])
    assert list(removed.removed) == ["purple dinosaur"]
    await ann.create("one púrple d1nosaur")


async def test_every_front_door_has_heard_of_a_rule_two_seconds_later(door: Door, mo: Caller) -> None:
    other = Moderation(door.pool, lambda: door.clock.monotonic_s)

    async def judged() -> str | None:
        return await other.category(["a purple fox"], "a purple fox")

    assert await judged() is None
    await update(mo, add=[a_rule("purple")])
    door.clock.pass_s(1.9)
    assert await judged() is None, "it has looked less than two seconds ago"
    door.clock.pass_s(0.1)
    assert await judged() == "gore"
    await update(mo, remove=["purple"])
    door.clock.pass_s(2)
    assert await judged() is None


async def test_whoever_sends_long_prompts_keeps_nobody_else_waiting(door: Door) -> None:
    moderation = Moderation(door.pool, lambda: door.clock.monotonic_s)
    busy = threading.Event()
    moderation._long_ones.submit(busy.wait)
    long = asyncio.create_task(moderation.category([f"{'a fox ' * 500} gore"], ""))
    assert await moderation.category(["gore"], "") == "gore"
    assert not long.done()
    busy.set()
    assert await long == "gore"


async def test_a_change_while_the_rules_are_read_is_not_missed(door: Door, mo: Caller) -> None:
    moderation = Moderation(door.pool, lambda: door.clock.monotonic_s)
    await moderation.category([], "")
    door.clock.pass_s(2)
    reading = asyncio.create_task(moderation.category([], ""))
    await asyncio.sleep(0)
    moderation.forget()
    await reading
    await update(mo, add=[a_rule("purple")])
    assert await moderation.category(["purple"], "purple") == "gore"


async def test_each_rule_that_was_there_from_the_start_can_be_removed(door: Door, mo: Caller) -> None:
    ann = await door.caller("ann")
    assert (await refusal(ann.create("a nude descending a staircase"))).metadata == {"category": "adult"}
    listed = await rules(mo)
    assert len(listed.rules) > 100
    assert {rule.category for rule in listed.rules} == {"gore", "adult", "harassment"}
    await update(mo, remove=[rule.pattern for rule in listed.rules])
    assert list((await rules(mo)).rules) == []
    await ann.create("a nude descending a staircase")


async def test_a_rule_from_before_there_was_one_spelling_is_known_by_any(door: Door, mo: Caller) -> None:
    await door.sql("INSERT INTO scheduler.moderation_rule VALUES ('Purple  Dinosaur', 'gore') RETURNING 1")
    refused = await refusal(update(mo, add=[a_rule("purple dinosaur")]))
    assert refused.violations.keys() == {"add[0].pattern"}
    assert list((await update(mo, remove=["purple dinosaur"])).removed) == ["Purple  Dinosaur"]


async def test_rules_are_listed_in_pages_and_by_category(door: Door, mo: Caller) -> None:
    await update(mo, add=[a_rule("été", "weather"), a_rule("zebra", "weather"), a_rule("a b", "weather")])
    every = await rules(mo)
    patterns = [rule.pattern for rule in every.rules]
    assert patterns == sorted(patterns)
    assert [rule.pattern for rule in (await rules(mo, category="weather")).rules] == ["a b", "zebra", "été"]
    paged: list[str] = []
    token = ""
    while True:
        page = await mo.moderation.ListRules(ListRulesRequest(page_size=50, page_token=token))
        paged += [rule.pattern for rule in page.rules]
        assert page.etag == every.etag
        token = page.next_page_token
        if not token:
            break
    assert paged == patterns
    assert every.rules[0].create_time.seconds > 0
    for request in (ListRulesRequest(category="No!"), ListRulesRequest(page_token="nonsense")):
        assert (await refusal(mo.moderation.ListRules(request))).reason == "INVALID_PARAMETER"


async def test_all_that_is_wrong_with_an_update_is_said_at_once(door: Door, mo: Caller) -> None:
    refused = await refusal(
        update(
            mo,
            reason=" ",
            remove=["no such rule", "gore", "GORE"],
            add=[
                a_rule("..."),
                a_rule("x"),
                a_rule("nude"),
                a_rule("new", "Not A Name"),
                a_rule("y" * 201),
                a_rule("twice"),
                a_rule("Twice"),
                a_rule("two\nlines"),
                a_rule("be\x07ll"),
            ],
        )
    )
    assert refused.reason == "INVALID_PARAMETER"
    assert refused.violations.keys() == {
        "reason",
        "remove[0]",
        "remove[2]",
        "add[0].pattern",
        "add[1].pattern",
        "add[2].pattern",
        "add[3].category",
        "add[4].pattern",
        "add[6].pattern",
        "add[8].pattern",
    }
    assert "nearly everything" in refused.violations["add[0].pattern"]
    assert "a rule already (adult)" in refused.violations["add[2].pattern"]
    listed = {rule.pattern for rule in (await rules(mo)).rules}
    assert "gore" in listed
    assert "twice" not in listed
    assert "add" in (await refusal(update(mo))).violations
    assert (await refusal(update(mo, request_id="x", add=[a_rule("x")]))).violations.keys() == {
        "request_id",
        "add[0].pattern",
    }


async def test_two_moderators_do_not_overwrite_each_other(door: Door, mo: Caller) -> None:
    zoe = await door.caller("zoe", role=Role.MODERATOR)
    read = (await rules(mo)).etag
    answer = await update(mo, etag=read, add=[a_rule("purple")])
    refused = await refusal(update(zoe, etag=read, remove=["gore"]))
    assert (refused.code, refused.reason) == (Code.ABORTED, "ETAG_MISMATCH")
    assert (await rules(zoe)).etag == answer.etag
    await update(zoe, etag=answer.etag, remove=["gore"])
    # And without one, both changes are made, one after the other.
    await asyncio.gather(update(mo, add=[a_rule("one")]), update(zoe, add=[a_rule("two")]))
    assert {"one", "two", "purple"} <= {rule.pattern for rule in (await rules(mo)).rules}


async def test_a_rule_gets_another_category_by_being_removed_and_added(door: Door, mo: Caller) -> None:
    await update(mo, remove=["gore"], add=[a_rule("gore", "violence")])
    ann = await door.caller("ann")
    assert (await refusal(ann.create("gore"))).metadata == {"category": "violence"}
    (event,) = await events(mo, target="moderation/rules")
    assert json.loads(event.before_json)["removed"] == [{"pattern": "gore", "category": "gore"}]
    assert json.loads(event.after_json)["added"] == [{"pattern": "gore", "category": "violence"}]
    assert (event.actor.split("/keys/")[0], event.action) == ("accounts/mo", "UpdateRules")
    assert event.reason == "they found a new word"


async def test_a_dry_run_says_whom_a_rule_would_have_refused_and_changes_nothing(
    door: Door, mo: Caller
) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben", plan="pro")
    first = await ann.create("a purple fox")
    await ann.create("a red fox")
    second = await ben.create("a p-u-r-p-l-e hare --private")
    gone = await ben.create("a purple hen")
    await ben.cancel(gone.name)
    await ben.delete(gone.name)
    before = await rules(mo)
    shown = await update(mo, add=[a_rule("purple")], remove=["gore"], validate_only=True, etag=before.etag)
    assert (shown.trial.jobs, shown.trial.matches) == (3, 2)
    assert [match.job for match in shown.trial.examples] == [second.name, first.name]
    assert {match.pattern for match in shown.trial.examples} == {"purple"}
    assert (shown.etag, list(shown.removed)) == (before.etag, ["gore"])
    assert await rules(mo) == before
    await ann.create("a purple fox")
    assert await events(mo) == []
    assert not (await update(mo, add=[a_rule("purple")])).HasField("trial")


async def test_rules_are_tried_on_the_newest_jobs_however_much_happens_to_older_ones(door: Door) -> None:
    ann = await door.caller("ann")
    names = [await ann.create(f"{what}") for what in ("a fox", "a hen", "a hare")]
    await door.sql(
        """INSERT INTO scheduler.job_event (job_id, state)
           SELECT $1, 'running' FROM generate_series(1, 50) RETURNING 1""",
        uuid.UUID(names[0].uid),
    )
    async with door.pool.reading() as connection:
        assert [job.text for job in await store.newest_prompts(connection, 2)] == ["a hare", "a hen"]
        assert [job.text for job in await store.newest_prompts(connection, 9)] == ["a hare", "a hen", "a fox"]


async def test_a_repeated_update_is_done_once(door: Door, mo: Caller) -> None:
    request = an_update(add=[a_rule("purple")], remove=["gore"])
    first = await mo.moderation.UpdateRules(request)
    assert await mo.moderation.UpdateRules(request) == first
    assert len(await events(mo)) == 1
    other = UpdateRulesRequest()
    other.CopyFrom(request)
    other.reason = "another"
    assert (await refusal(mo.moderation.UpdateRules(other))).reason == "REQUEST_ID_REUSED"


async def test_what_was_made_before_a_rule_is_judged_again_when_something_is_made_of_it(
    door: Door, mo: Caller
) -> None:
    ann = await door.caller("ann")
    grid = await ann.create("a purple fox")
    await door.start(grid.uid)
    await door.succeed(grid.uid)
    waiting = await ann.create("a purple hare")
    await update(mo, add=[a_rule("purple")])
    for made in (
        ann.reroll(grid.name),
        ann.vary(f"{grid.name}/images/1"),
        ann.upscale(f"{grid.name}/images/1"),
        ann.create("a fox::2 purple::-1"),
        ann.create("a fox --no purple"),
        ann.create("pur::1 a fox::1 purple::1"),
        ann.create("a purple fox", validate_only=True),
    ):
        assert (await refusal(made)).reason == "MODERATION_REJECTED"
    assert (await ann.get(waiting.name)).state == job_pb2.JOB_STATE_QUEUED, "it was accepted"


async def test_addresses_of_pictures_are_no_words(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create("http://localhost/gore.png a fox", model="seeing"))
    assert refused.reason == "PICTURE_UNREADABLE"


# Hidden jobs


async def test_a_hidden_job_leaves_the_feed_and_its_owner_is_told(door: Door, mo: Caller) -> None:
    ann, eve = await door.caller("ann"), await door.caller("eve")
    job, other = await an_upscale(door, ann), await an_upscale(door, ann, "a hare")
    assert {shown.name for shown in await feed(eve)} == {job.name, other.name}
    assert len(await eve.download(job.name)) == 1

    answer = await hide(mo, job.name)
    assert answer.hidden.category == "adult"
    assert [shown.name for shown in await feed(eve)] == [other.name]
    assert [shown.name for shown in await feed(ann)] == [other.name]
    assert (await refusal(eve.download(job.name))).reason == "NOT_FOUND_OR_NOT_YOURS"
    seen = await ann.get(job.name)
    assert (seen.hidden.category, seen.hidden.hide_time.seconds > 0) == ("adult", True)
    assert len(await ann.download(job.name)) == 1
    assert [listed.HasField("hidden") for listed in (await _list(ann, "accounts/-")).jobs][0:1] == [False]

    assert not (await unhide(mo, job.name)).HasField("hidden")
    assert {shown.name for shown in await feed(eve)} == {job.name, other.name}


async def _list(caller: Caller, parent: str) -> job_pb2.ListJobsResponse:
    return await caller.jobs.ListJobs(job_pb2.ListJobsRequest(parent=parent))


async def test_moderators_see_everything_also_what_is_private_or_hidden(door: Door, mo: Caller) -> None:
    ann, eve = await door.caller("ann", plan="pro"), await door.caller("eve")
    private = await an_upscale(door, ann, "a fox --private")
    hidden = await an_upscale(door, ann, "a hen")
    await hide(mo, hidden.name)
    assert await mo.get(f"accounts/-/jobs/{private.uid}") == await ann.get(private.name)
    assert len(await mo.download(private.name)) == 1
    assert {job.uid for job in (await _list(mo, "accounts/ann")).jobs} >= {private.uid, hidden.uid}
    ((archive, _),) = await mo.download("accounts/ann")
    assert archive.images == 10
    (shown,) = await feed(mo, show_hidden=True)
    assert (shown.name, shown.hidden.category) == (hidden.name, "adult"), "and nothing private"
    assert await feed(mo) == []
    refused = await refusal(feed(eve, show_hidden=True))
    assert (refused.reason, refused.metadata) == ("ROLE_REQUIRED", {"role": "moderator"})
    assert (await refusal(_list(eve, "accounts/ann"))).reason == "NOT_FOUND_OR_NOT_YOURS"


async def test_a_look_at_anothers_work_is_no_deed_but_a_line_in_the_log(door: Door, mo: Caller) -> None:
    ann = await door.caller("ann", plan="pro")
    shown, private = await an_upscale(door, ann), await an_upscale(door, ann, "a fox --private")
    with capture_logs() as logs:
        await mo.get(private.name)
        await mo.download(shown.name)
        await _list(mo, "accounts/ann")
        await mo.download("accounts/ann")
        await ann.get(private.name)
    looks = [entry for entry in logs if entry["event"] == "moderator looked"]
    assert [entry["at"] for entry in looks] == [private.name, "accounts/ann", "accounts/ann"]
    assert {entry["by"].split("/keys/")[0] for entry in looks} == {"accounts/mo"}
    assert await events(mo) == []


async def test_what_is_hidden_is_not_made_again(door: Door, mo: Caller) -> None:
    ann = await door.caller("ann")
    hidden = await an_upscale(door, ann)
    grid = await ann.get(hidden.source_job)
    again = await ann.reroll(hidden.name, exact=True)
    await door.start(again.uid)
    await door.succeed(again.uid, [b"large"])
    await hide(mo, hidden.name)
    for made, field in (
        (ann.upscale(f"{grid.name}/images/1"), "upscale.source_image"),
        (ann.upscale(f"{grid.name}/images/1", validate_only=True), "upscale.source_image"),
        (ann.reroll(hidden.name), "reroll.source_job"),
        (ann.reroll(again.name), "reroll.source_job"),
    ):
        refused = await refusal(made)
        assert (refused.reason, refused.metadata) == ("MODERATION_REJECTED", {"category": "adult"})
        assert hidden.uid in refused.violations[field]
    await ann.delete(hidden.name)
    assert (await refusal(ann.upscale(f"{grid.name}/images/1"))).reason == "MODERATION_REJECTED"
    await ann.upscale(f"{grid.name}/images/2")
    await ann.vary(f"{grid.name}/images/1")
    await hide(mo, grid.name, "violence")
    for made in (
        ann.upscale(f"{grid.name}/images/2"),
        ann.vary(f"{grid.name}/images/1"),
        ann.reroll(grid.name),
    ):
        assert (await refusal(made)).metadata == {"category": "violence"}
    await unhide(mo, grid.name)
    await ann.reroll(grid.name)


async def test_hiding_is_kept_with_who_and_why_and_done_once(door: Door, mo: Caller) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox")
    request = HideJobRequest(name=job.name, category="adult", request_id=_id(), reason="bare")
    first = await mo.moderation.HideJob(request)
    assert await mo.moderation.HideJob(request) == first
    await hide(mo, f"accounts/-/jobs/{job.uid}", "violence")
    newer, older = await events(mo, target=job.name)
    assert (older.reason, older.before_json, older.after_json) == (
        "bare",
        '{"hidden": null}',
        '{"hidden": "adult"}',
    )
    assert (newer.before_json, newer.after_json) == ('{"hidden": "adult"}', '{"hidden": "violence"}')
    assert (await ann.get(job.name)).hidden.category == "violence"
    done = {"action": "hide_job", "result": "done"}
    assert door.metrics.registry.get_sample_value("darkroom_admin_actions_total", done) == 2


async def test_what_cannot_be_hidden_is_refused(door: Door, mo: Caller) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox")
    for name in (f"accounts/ann/jobs/{_id()}", f"accounts/eve/jobs/{job.uid}"):
        assert (await refusal(hide(mo, name))).reason == "NOT_FOUND_OR_NOT_YOURS"
        assert (await refusal(unhide(mo, name))).reason == "NOT_FOUND_OR_NOT_YOURS"
    refused = await refusal(hide(mo, "nonsense", "?", reason=""))
    assert refused.violations.keys() == {"name", "category", "reason"}
    assert (await refusal(hide(ann, job.name))).reason == "ROLE_REQUIRED"


# Blocked accounts


async def test_a_blocked_account_is_let_in_nowhere_and_its_jobs_end(door: Door, mo: Caller) -> None:
    ann = await door.caller("ann")
    running, waiting = await ann.create("a fox"), await ann.create("a hen")
    await door.start(running.uid)
    available = await _available_ms(door, "ann")

    would = await mo.moderation.BlockAccount(a_block("ann", validate_only=True))
    assert (would.blocked, would.waiting_jobs, would.running_jobs) == (True, 1, 1)
    assert (await ann.get(waiting.name)).state == job_pb2.JOB_STATE_QUEUED

    done = await mo.moderation.BlockAccount(a_block("ann"))
    assert (done.account, done.blocked, done.waiting_jobs, done.running_jobs) == ("accounts/ann", True, 1, 1)
    for call in (ann.get(waiting.name), ann.create("a cat"), ann.update(mode=job_pb2.TIER_RELAX)):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (Code.PERMISSION_DENIED, "ACCOUNT_BLOCKED")
    cancelled = await mo.get(waiting.name)
    assert (cancelled.state, cancelled.receipt.billed_gpu_ms) == (job_pb2.JOB_STATE_CANCELLED, 0)
    stopping = await mo.get(running.name)
    assert (stopping.state, stopping.cancel_requested) == (job_pb2.JOB_STATE_RUNNING, True)
    assert set(door.scheduler.told_jobs[-2:]) == {running.uid, waiting.uid}
    assert await _available_ms(door, "ann") == available, "the waiting job held nothing and cost nothing"
    last = await _last_sentence(mo, waiting.name)
    assert last == "Cancelled before it started: its account was blocked."

    await mo.moderation.UnblockAccount(an_unblock("ann"))
    assert (await ann.get(waiting.name)).state == job_pb2.JOB_STATE_CANCELLED
    await ann.create("a cat")
    unblocked, blocked = await events(mo, target="accounts/ann")
    assert (blocked.reason, blocked.before_json) == ("spam", '{"blocked": false}')
    assert json.loads(blocked.after_json) == {
        "blocked": True,
        "cancelled_jobs": [waiting.uid],
        "stopped_jobs": [running.uid],
    }
    assert (unblocked.action, unblocked.after_json) == ("UnblockAccount", '{"blocked": false}')


async def _available_ms(door: Door, account_id: str) -> int:
    boss = await door.caller("boss", role=Role.ADMIN)
    account = await boss.admin.GetAccount(admin_pb2.GetAccountRequest(name=f"accounts/{account_id}"))
    return account.balance.available_ms


async def _last_sentence(caller: Caller, name: str) -> str:
    sentences = [update.event.sentence async for update in caller.watch(name) if update.HasField("event")]
    return sentences[-1]


async def test_whoever_was_let_in_just_before_a_block_submits_nothing_after_it(
    door: Door, mo: Caller
) -> None:
    ann = await door.caller("ann")
    await ann.create("a fox")
    async with door.pool.transaction() as connection:
        # As another front door does, so that this one still believes the key.
        standing = await store.lock_standing(connection, "ann")
        assert standing is not None
        await store.set_blocked(connection, "ann", blocked=True)
    assert (await refusal(ann.create("a hen"))).reason == "ACCOUNT_BLOCKED"
    door.clock.pass_s(1)
    assert (await refusal(ann.get("accounts/-/jobs/" + _id()))).reason == "ACCOUNT_BLOCKED"


async def test_nobody_blocks_themselves_or_an_admin_and_moderators_no_moderator(
    door: Door, mo: Caller
) -> None:
    boss = await door.caller("boss", role=Role.ADMIN)
    other = await door.caller("other", role=Role.ADMIN)
    await door.caller("olga", role=Role.OPERATOR)
    assert "name" in (await refusal(mo.moderation.BlockAccount(a_block("mo")))).violations
    for caller, account, role in ((mo, "boss", "admin"), (mo, "olga", "operator"), (other, "boss", "admin")):
        refused = await refusal(caller.moderation.BlockAccount(a_block(account)))
        assert (refused.code, refused.reason) == (Code.FAILED_PRECONDITION, "ACCOUNT_PROTECTED")
        assert refused.metadata == {"account": account, "role": role}
    for account in ("mo", "olga"):
        assert (await boss.moderation.BlockAccount(a_block(account))).blocked
    assert (await refusal(rules(mo))).reason == "ACCOUNT_BLOCKED"


async def test_whom_only_an_admin_may_block_only_an_admin_lets_in_again(door: Door, mo: Caller) -> None:
    boss = await door.caller("boss", role=Role.ADMIN)
    await door.caller("max", role=Role.MODERATOR)
    await boss.moderation.BlockAccount(a_block("max"))
    refused = await refusal(mo.moderation.UnblockAccount(an_unblock("max")))
    assert (refused.reason, refused.metadata) == (
        "ACCOUNT_PROTECTED",
        {"account": "max", "role": "moderator"},
    )
    await door.caller("max", role=Role.ADMIN)  # another key, made while it was blocked
    assert not (await boss.moderation.UnblockAccount(an_unblock("max"))).blocked


async def test_who_is_not_there_or_erased_cannot_be_unblocked(door: Door, mo: Caller) -> None:
    boss = await door.caller("boss", role=Role.ADMIN)
    for call in (
        mo.moderation.BlockAccount(a_block("nobody")),
        mo.moderation.UnblockAccount(an_unblock("nobody")),
    ):
        assert (await refusal(call)).reason == "UNKNOWN_ACCOUNT"
    ann = await door.caller("ann")
    running = await ann.create("a fox")
    await door.start(running.uid)
    erasure = admin_pb2.EraseAccountRequest(name="accounts/ann", request_id=_id(), reason="she asked")

    async def unblocked() -> str:
        name = (await boss.admin.EraseAccount(erasure)).name
        return (await refusal(mo.moderation.UnblockAccount(an_unblock(name.split("/")[1])))).reason

    assert await unblocked() == "ACCOUNT_ERASED", "while its last job runs"
    await door.fail(running.uid)
    assert await unblocked() == "ACCOUNT_ERASED", "under its other name"


async def test_a_repeated_block_cancels_nothing_of_later(door: Door, mo: Caller) -> None:
    ann = await door.caller("ann")
    await ann.create("a fox")
    request = a_block("ann")
    first = await mo.moderation.BlockAccount(request)
    await mo.moderation.UnblockAccount(an_unblock("ann"))
    later = await ann.create("a hen")
    assert await mo.moderation.BlockAccount(request) == first
    assert (await ann.get(later.name)).state == job_pb2.JOB_STATE_QUEUED
    assert len(await events(mo, target="accounts/ann")) == 2


# What is kept


async def test_moderators_are_shown_what_moderators_did_and_admins_everything(door: Door, mo: Caller) -> None:
    boss = await door.caller("boss", role=Role.ADMIN)
    ann = await door.caller("ann")
    await hide(mo, (await ann.create("a fox")).name)
    await boss.admin.AdjustBalance(
        admin_pb2.AdjustBalanceRequest(
            request_id=_id(), account="accounts/ann", amount_ms=60_000, reason="a present"
        )
    )
    await update(boss, add=[a_rule("purple")])
    assert [event.action for event in await events(mo)] == ["UpdateRules", "HideJob"]
    assert [event.action for event in await events(boss)][:3] == ["UpdateRules", "AdjustBalance", "HideJob"]
    assert (await refusal(events(ann))).reason == "ROLE_REQUIRED"


async def test_moderation_is_for_moderators(door: Door) -> None:
    eve = await door.caller("eve")
    for call in (
        rules(eve),
        update(eve, add=[a_rule("purple")]),
        hide(eve, f"accounts/-/jobs/{_id()}"),
        unhide(eve, f"accounts/-/jobs/{_id()}"),
        eve.moderation.BlockAccount(a_block("mo")),
        eve.moderation.UnblockAccount(an_unblock("mo")),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.metadata) == (Code.PERMISSION_DENIED, {"role": "moderator"})
