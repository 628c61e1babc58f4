"""What admins give back and look up: refunds, sources of grants, audit events, invariants; and who may."""

from __future__ import annotations

import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from billing.v1 import admin_pb2, billing_pb2
from scheduler.frontdoor.auth import ROLE_NEEDED
from scheduler.store import invariants
from scheduler.store.accounts import Role
from tests.frontdoor.door import Caller, Door, refusal
from tests.frontdoor.test_frontdoor_billing import change, charge

STANDARD_MS = 54_000_000


@pytest.fixture
async def boss(door: Door) -> Caller:
    return await door.caller("boss", role=Role.ADMIN)


def a_refund(job: str, **fields: Any) -> admin_pb2.RefundJobRequest:
    return admin_pb2.RefundJobRequest(
        **{"request_id": str(uuid.uuid4()), "job": job, "reason": "a black picture", **fields}
    )


def a_grant(**fields: Any) -> admin_pb2.AdjustBalanceRequest:
    return admin_pb2.AdjustBalanceRequest(
        **{
            "request_id": str(uuid.uuid4()),
            "account": "accounts/ann",
            "amount_ms": 60_000,
            "reason": "r",
            **fields,
        }
    )


async def events(boss: Caller, **fields: Any) -> list[admin_pb2.AuditEvent]:
    return list((await boss.admin.ListAuditEvents(admin_pb2.ListAuditEventsRequest(**fields))).events)


async def test_a_job_is_given_back_in_part_then_whole_and_no_more(door: Door, boss: Caller) -> None:
    ann = await door.caller("ann")
    job = await charge(door, ann)
    part = a_refund(job, amount_ms=1_000)
    refund = await boss.admin.RefundJob(part)
    assert (refund.job, refund.refunded_ms, refund.refunded_in_all_ms, refund.billed_ms) == (
        job,
        1_000,
        1_000,
        4_000,
    )
    assert refund.balance.available_ms == STANDARD_MS - 3_000
    assert await boss.admin.RefundJob(part) == refund
    assert door.scheduler.told_accounts == ["ann", "ann"]
    rest = await boss.admin.RefundJob(a_refund(job))
    assert (rest.refunded_ms, rest.refunded_in_all_ms) == (3_000, 4_000)
    refused = await refusal(boss.admin.RefundJob(a_refund(job)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REFUND_TOO_LARGE")
    assert refused.metadata == {"billed_ms": "4000", "refunded_ms": "4000"}
    (second, first) = await events(boss, target=job)
    assert (first.action, first.reason) == (second.action, second.reason) == ("RefundJob", "a black picture")


async def test_an_admin_may_leave_out_whose_job_it_is(door: Door, boss: Caller) -> None:
    job = await charge(door, await door.caller("ann"))
    refund = await boss.admin.RefundJob(a_refund(f"accounts/-/jobs/{job.rpartition('/')[2]}"))
    assert (refund.job, refund.refunded_ms) == (job, 4_000)


async def test_a_refund_is_shown_then_taken_back_and_repeated_it_is_taken_back_once(
    door: Door, boss: Caller
) -> None:
    job = await charge(door, await door.caller("ann"))
    await boss.admin.RefundJob(a_refund(job))
    door.scheduler.told_accounts.clear()

    def an_undo_of(name: str, **fields: Any) -> admin_pb2.UndoRefundRequest:
        fields = {"request_id": str(uuid.uuid4()), "job": name, "reason": "not broken", **fields}
        return admin_pb2.UndoRefundRequest(**fields)

    shown = await boss.admin.UndoRefund(an_undo_of(job, validate_only=True))
    assert (shown.taken_ms, shown.kept_ms, shown.billed_ms) == (4_000, 0, 4_000)
    assert shown.balance.available_ms == STANDARD_MS - 4_000
    left = await boss.billing.GetBalance(billing_pb2.GetBalanceRequest(account="accounts/ann"))
    assert left.available_ms == STANDARD_MS
    request = an_undo_of(f"accounts/-/jobs/{job.rpartition('/')[2]}", etag=shown.etag)
    assert await boss.admin.UndoRefund(request) == shown
    assert await boss.admin.UndoRefund(request) == shown
    assert door.scheduler.told_accounts == ["ann", "ann"]
    (event, *_) = await events(boss, target=job)
    assert (event.action, event.reason) == ("UndoRefund", "not broken")

    for name in (job, f"accounts/-/jobs/{uuid.uuid4()}"):
        refused = await refusal(boss.admin.UndoRefund(an_undo_of(name)))
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_REFUND_TO_UNDO")
    wrong = await refusal(boss.admin.UndoRefund(admin_pb2.UndoRefundRequest(etag="x" * 101)))
    assert wrong.violations.keys() == {"request_id", "job", "etag", "reason"}


async def test_a_refund_of_which_all_is_used_is_not_taken_back(door: Door, boss: Caller) -> None:
    ann = await door.caller("ann")
    job = await charge(door, ann)
    await boss.admin.RefundJob(a_refund(job))
    await boss.admin.AdjustBalance(a_grant(amount_ms=-STANDARD_MS))
    refused = await refusal(
        boss.admin.UndoRefund(
            admin_pb2.UndoRefundRequest(request_id=str(uuid.uuid4()), job=job, reason="not broken")
        )
    )
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REFUND_SPENT")


def an_undo(**fields: Any) -> admin_pb2.UndoPlanChangeRequest:
    return admin_pb2.UndoPlanChangeRequest(
        **{"request_id": str(uuid.uuid4()), "account": "accounts/ann", "reason": "a mistake", **fields}
    )


async def test_a_change_of_plan_is_shown_then_taken_back_and_repeated_it_is_taken_back_once(
    door: Door, boss: Caller
) -> None:
    ann = await door.caller("ann")
    await boss.billing.ChangePlan(change("plans/pro", account="accounts/ann", reason="r"))
    door.scheduler.told_accounts.clear()

    shown = await boss.admin.UndoPlanChange(an_undo(validate_only=True))
    assert (await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())).plan == "plans/pro"
    assert (shown.from_plan, shown.to_plan, shown.at_once) == ("plans/pro", "plans/standard", True)
    assert shown.sentence.startswith(
        "Of the change of 2026-11-10 12:00 UTC: the plan is standard again at once;"
    )
    request = an_undo(etag=shown.etag)
    undone = await boss.admin.UndoPlanChange(request)

    assert undone == shown
    assert await boss.admin.UndoPlanChange(request) == undone
    assert door.scheduler.told_accounts == ["ann", "ann"]
    left = await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())
    assert (left.plan, left.available_ms) == ("plans/standard", STANDARD_MS)
    (event, *_) = await events(boss, target="accounts/ann")
    assert (event.action, event.reason) == ("UndoPlanChange", "a mistake")
    refused = await refusal(boss.admin.UndoPlanChange(an_undo()))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOTHING_TO_UNDO")
    assert refused.metadata == {"account": "ann"}


async def test_everything_wrong_with_an_undo_is_told_at_once(boss: Caller) -> None:
    refused = await refusal(
        boss.admin.UndoPlanChange(admin_pb2.UndoPlanChangeRequest(account="ann", etag="x" * 101))
    )
    assert refused.violations.keys() == {"request_id", "account", "etag", "reason"}
    unknown = await refusal(boss.admin.UndoPlanChange(an_undo(account="accounts/nobody")))
    assert unknown.reason == "UNKNOWN_ACCOUNT"


async def test_what_was_not_charged_is_not_given_back(door: Door, boss: Caller) -> None:
    job = await (await door.caller("ann")).create()
    for name in (job.name, f"accounts/-/jobs/{uuid.uuid4()}", f"accounts/boss/jobs/{job.uid}"):
        refused = await refusal(boss.admin.RefundJob(a_refund(name)))
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOTHING_CHARGED")
    unknown = await refusal(boss.admin.RefundJob(a_refund(f"accounts/zoe/jobs/{job.uid}")))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ACCOUNT")
    nothing = await refusal(boss.admin.RefundJob(admin_pb2.RefundJobRequest(amount_ms=-1)))
    assert nothing.violations.keys() == {"request_id", "job", "amount_ms", "reason"}


async def test_a_grant_that_is_named_is_taken_back(door: Door, boss: Caller) -> None:
    await door.caller("ann")
    await boss.admin.AdjustBalance(a_grant(source=admin_pb2.GRANT_SOURCE_PROMO))
    (promo,) = await events(boss, target="accounts/ann")
    await boss.admin.AdjustBalance(a_grant(source=admin_pb2.GRANT_SOURCE_PURCHASE))
    left = await boss.admin.AdjustBalance(a_grant(amount_ms=-60_000, undoes=promo.number))
    assert left.available_ms == STANDARD_MS + 60_000
    refused = await refusal(boss.admin.AdjustBalance(a_grant(amount_ms=-1, undoes=promo.number)))
    assert (refused.reason, refused.metadata["available_ms"]) == ("ADJUSTMENT_TOO_LARGE", "0")
    unknown = await refusal(boss.admin.AdjustBalance(a_grant(amount_ms=-1, undoes=promo.number + 100)))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_GRANT")
    for fields in ({"undoes": promo.number}, {"amount_ms": -1, "undoes": -1}):
        assert (await refusal(boss.admin.AdjustBalance(a_grant(**fields)))).violations.keys() == {"undoes"}


async def test_two_admins_with_one_request_id_do_one_thing(door: Door, boss: Caller) -> None:
    await door.caller("ann")
    other = await door.caller("other", role=Role.ADMIN)
    request = a_grant()
    first = await boss.admin.AdjustBalance(request)
    refused = await refusal(other.admin.AdjustBalance(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    assert await boss.admin.AdjustBalance(request) == first


async def test_a_grant_says_what_it_is(door: Door, boss: Caller) -> None:
    await door.caller("ann")
    for source in (
        admin_pb2.GRANT_SOURCE_PROMO,
        admin_pb2.GRANT_SOURCE_PURCHASE,
        admin_pb2.GRANT_SOURCE_ADMIN,
    ):
        await boss.admin.AdjustBalance(a_grant(source=source))
    made = await boss.billing.GetStatement(billing_pb2.GetStatementRequest(account="accounts/ann"))
    assert [line.sentence for line in made.lines[1:]] == [
        "Granted 1.0 GPU-minutes: a promotion.",
        "Granted 1.0 GPU-minutes: bought.",
        "Granted 1.0 GPU-minutes: by the people who run this service.",
    ]
    for wrong in (a_grant(source=9), a_grant(source=admin_pb2.GRANT_SOURCE_PROMO, amount_ms=-1)):
        assert (await refusal(boss.admin.AdjustBalance(wrong))).violations.keys() == {"source"}


async def test_what_admins_did_is_listed_newest_first(door: Door, boss: Caller) -> None:
    await door.caller("ann")
    await door.caller("ann-two")
    await boss.admin.AdjustBalance(a_grant(reason="first"))
    door.clock.pass_s(60)
    between = Timestamp()
    between.FromDatetime(door.clock.now)
    await boss.admin.AdjustBalance(a_grant(reason="second"))
    await boss.admin.AdjustBalance(a_grant(account="accounts/ann-two", reason="another's"))
    await boss.admin.CreateApiKey(
        admin_pb2.CreateApiKeyRequest(
            request_id=str(uuid.uuid4()), account="accounts/ann", role=admin_pb2.ROLE_USER, reason="a key"
        )
    )
    of_ann = await events(boss, target="accounts/ann")
    assert [event.reason for event in of_ann] == ["a key", "second", "first"]
    newest = of_ann[0]
    assert (newest.action, newest.actor) == (
        "CreateApiKey",
        f"accounts/boss/keys/{boss.secret.split('_')[1]}",
    )
    assert newest.target.startswith("accounts/ann/keys/")
    assert newest.before_json == ""
    assert [event.reason for event in await events(boss, target="accounts/ann", until=between)] == ["first"]
    assert [event.reason for event in await events(boss, **{"from": between})] == [
        "a key",
        "another's",
        "second",
    ]
    assert len(await events(boss, actor="release")) == 3
    assert len(await events(boss, actor="accounts/boss")) == len(await events(boss, actor=newest.actor)) == 4
    assert not await events(boss, actor="accounts/bos")
    paged, token = [], ""
    while not paged or token:
        page = await boss.admin.ListAuditEvents(
            admin_pb2.ListAuditEventsRequest(target="accounts/ann", page_size=2, page_token=token)
        )
        paged += page.events
        token = page.next_page_token
    assert paged == of_ann


async def test_everything_wrong_with_a_list_of_events_is_told_at_once(boss: Caller) -> None:
    wrong = admin_pb2.ListAuditEventsRequest(
        page_size=-1, page_token="x", target="x" * 301, actor="\0", until=Timestamp(seconds=2**60)
    )
    refused = await refusal(boss.admin.ListAuditEvents(wrong))
    assert refused.violations.keys() == {"page_size", "page_token", "target", "actor", "until"}


async def test_invariants_are_asked_of_the_live_database(door: Door, boss: Caller) -> None:
    job = await charge(door, await door.caller("ann"))
    await boss.admin.RefundJob(a_refund(job))
    answer = await boss.admin.CheckInvariants(admin_pb2.CheckInvariantsRequest(replay=True))
    assert len(answer.results) == len(invariants.INVARIANTS) + 1
    of_ledger = [one for one in answer.results if one.number in (0, 1, 2, 3, 4, 5, 7, 11, 16, 23)]
    assert [(one.number, one.violations) for one in of_ledger if one.violations] == []
    assert answer.results[-1].sentence == "A second program that replays the whole journal agrees."


@pytest.mark.unsound(2)
async def test_what_does_not_hold_is_shown(door: Door, boss: Caller) -> None:
    await door.caller("ann")
    assert (await boss.admin.CheckInvariants(admin_pb2.CheckInvariantsRequest())).holds
    await door.sql("UPDATE billing.grant_lot SET used_ms = 5 WHERE account_id = 'ann'")
    answer = await boss.admin.CheckInvariants(admin_pb2.CheckInvariantsRequest(replay=True))
    assert not answer.holds
    broken = [one for one in answer.results if one.violations]
    assert {0, 2} <= {one.number for one in broken}
    assert all(one.violations == 1 and '"lot_id"' in one.first_json[0] for one in broken if one.number == 2)


async def test_what_there_was_no_time_for_is_not_said_to_hold(boss: Caller) -> None:
    refused = await refusal(boss.admin.CheckInvariants(admin_pb2.CheckInvariantsRequest(within_ms=-1)))
    assert refused.violations.keys() == {"within_ms"}
    answer = await boss.admin.CheckInvariants(admin_pb2.CheckInvariantsRequest(within_ms=1, replay=True))
    assert not answer.holds
    assert answer.results[-1].violations == -1


@pytest.mark.parametrize("role", [Role.USER, Role.MODERATOR, Role.OPERATOR])
async def test_admin_service_is_for_admins_alone(door: Door, role: Role) -> None:
    caller = await door.caller("ann", role=role)
    methods = [
        path.rpartition("/")[2]
        for path in ROLE_NEEDED
        # Of audit events, moderators see what was done about moderation.
        if path.startswith("/billing.v1.AdminService/") and not path.endswith("/ListAuditEvents")
    ]
    assert len(methods) == 16
    for method in methods:
        request = getattr(admin_pb2, f"{method}Request")()
        refused = await refusal(getattr(caller.admin, method)(request))
        assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
