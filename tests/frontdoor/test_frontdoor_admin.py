"""What admins do: each deed has a reason, an audit event in its transaction, and happens once."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import TypeVar

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from billing.holds import HoldPlaced, HoldRequest, place_holds
from billing.v1 import admin_pb2
from scheduler.policy.parameters import Parameters
from scheduler.store import jobs
from scheduler.store.accounts import Role
from scheduler.v1 import account_pb2, job_pb2
from tests.frontdoor.door import Caller, Door, refusal

Request = TypeVar("Request", bound=Message)


@pytest.fixture
async def boss(door: Door) -> Caller:
    return await door.caller("boss", role=Role.ADMIN)


async def test_an_account_is_opened_once_with_its_audit_event(door: Door, boss: Caller) -> None:
    request = admin_pb2.CreateAccountRequest(
        request_id=str(uuid.uuid4()), account_id="zoe", plan="plans/basic", reason="new customer"
    )
    first = await boss.admin.CreateAccount(request)
    assert (first.name, first.plan) == ("accounts/zoe", "plans/basic")
    assert await boss.admin.CreateAccount(request) == first
    assert await _audit(door, "CreateAccount") == [("accounts/zoe", "new customer", {"plan": "basic"})]
    assert await door.sql("SELECT actor FROM billing.audit_event WHERE action = 'CreateAccount'") == (
        f"accounts/boss/keys/{boss.secret.split('_')[1]}"
    )
    refused = await refusal(boss.admin.CreateAccount(_with_new_id(request)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ACCOUNT_EXISTS")
    for result, number in (("done", 1), ("replayed", 1), ("refused", 1)):
        labels = {"action": "create_account", "result": result}
        assert door.metrics.registry.get_sample_value("darkroom_admin_actions_total", labels) == number


async def test_the_same_account_asked_for_ten_times_at_once_is_opened_once(door: Door, boss: Caller) -> None:
    request = admin_pb2.CreateAccountRequest(request_id=str(uuid.uuid4()), plan="plans/basic", reason="r")
    answers = await asyncio.gather(*(boss.admin.CreateAccount(request) for _ in range(10)))
    assert len({answer.name for answer in answers}) == 1
    assert await door.sql("SELECT count(*) FROM scheduler.account WHERE account_id <> 'boss'") == 1


async def test_an_account_on_a_plan_that_does_not_exist(door: Door, boss: Caller) -> None:
    request = admin_pb2.CreateAccountRequest(request_id=str(uuid.uuid4()), plan="plans/gold", reason="r")
    refused = await refusal(boss.admin.CreateAccount(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_PLAN")
    assert await door.sql("SELECT count(*) FROM billing.account") == 1


async def test_a_key_works_at_once_and_its_secret_is_shown_once(door: Door, boss: Caller) -> None:
    await door.caller("zoe")
    request = admin_pb2.CreateApiKeyRequest(
        request_id=str(uuid.uuid4()), account="accounts/zoe", role=admin_pb2.ROLE_MODERATOR, reason="on duty"
    )
    key = await boss.admin.CreateApiKey(request)
    key_id = key.name.rpartition("/")[2]
    assert key.name == f"accounts/zoe/keys/{key_id}"
    assert key.role == admin_pb2.ROLE_MODERATOR
    await door.with_secret("zoe", key.secret).create()
    refused = await refusal(boss.admin.CreateApiKey(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SECRET_SHOWN_ONCE")
    assert refused.metadata == {"key": key_id}
    assert "make another key under a new request id" in refused.message
    assert await _audit(door, "CreateApiKey") == [(key.name, "on duty", {"role": "moderator"})]
    everything = await door.sql("SELECT string_agg(api_key::text, '') FROM scheduler.api_key")
    assert key.secret.rpartition("_")[2] not in everything


async def test_a_key_for_an_account_that_does_not_exist(boss: Caller) -> None:
    request = admin_pb2.CreateApiKeyRequest(
        request_id=str(uuid.uuid4()), account="accounts/zoe", role=admin_pb2.ROLE_USER, reason="r"
    )
    refused = await refusal(boss.admin.CreateApiKey(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ACCOUNT")


async def test_a_plan_changes_by_a_new_version_and_limits_count_at_once(door: Door, boss: Caller) -> None:
    ann = await door.caller("ann")
    await ann.create()
    (standard,) = [plan for plan in await _plans(boss) if plan.name == "plans/standard"]
    assert (standard.version, standard.quota_ms, standard.limits.accepted) == (1, 54_000_000, 10)
    standard.limits.accepted = 1
    request = admin_pb2.UpdatePlanRequest(
        request_id=str(uuid.uuid4()),
        plan=standard,
        effective_from=admin_pb2.EFFECTIVE_FROM_NOW,
        reason="too many jobs",
    )
    changed = await boss.admin.UpdatePlan(request)
    assert (changed.version, changed.limits.accepted) == (2, 1)
    assert changed.etag != standard.etag
    assert await boss.admin.UpdatePlan(request) == changed
    assert (await refusal(ann.create())).metadata == {"depth": "1", "limit": "1"}
    assert door.scheduler.told_accounts == ["ann", "ann"]
    stale = await refusal(boss.admin.UpdatePlan(_with_new_id(request)))
    assert (stale.code, stale.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert stale.metadata == {"given": standard.etag, "current": changed.etag}
    assert "Read it again and repeat the change." in stale.message
    assert len(await _audit(door, "UpdatePlan")) == 1


async def test_time_is_granted_and_taken_once(door: Door, boss: Caller) -> None:
    await door.caller("ann")
    grant = admin_pb2.AdjustBalanceRequest(
        request_id=str(uuid.uuid4()), account="accounts/ann", amount_ms=60_000, reason="sorry"
    )
    balance = await boss.admin.AdjustBalance(grant)
    assert balance.available_ms == 54_060_000
    assert await boss.admin.AdjustBalance(grant) == balance
    take = _with_new_id(grant)
    take.amount_ms = -160_000
    assert (await boss.admin.AdjustBalance(take)).available_ms == 53_900_000
    assert [reason for _, reason, _ in await _audit(door, "AdjustBalance")] == ["sorry", "sorry"]
    assert door.scheduler.told_accounts == ["ann", "ann", "ann"]
    too_much = _with_new_id(grant)
    too_much.amount_ms = -60_000_000
    refused = await refusal(boss.admin.AdjustBalance(too_much))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADJUSTMENT_TOO_LARGE")


async def test_a_repeated_deed_tells_the_scheduler_again(door: Door, boss: Caller) -> None:
    """The front door that did it first may have died between its commit and its notice."""
    ann = await door.caller("ann")
    await ann.create()
    (standard,) = [plan for plan in await _plans(boss) if plan.name == "plans/standard"]
    deeds = (
        lambda request_id: boss.admin.AdjustBalance(
            admin_pb2.AdjustBalanceRequest(
                request_id=request_id, account="accounts/ann", amount_ms=60_000, reason="r"
            )
        ),
        lambda request_id: boss.admin.UpdatePlan(
            admin_pb2.UpdatePlanRequest(
                request_id=request_id,
                plan=standard,
                effective_from=admin_pb2.EFFECTIVE_FROM_NOW,
                reason="r",
            )
        ),
        lambda request_id: ann.accounts.UpdateAccount(
            account_pb2.UpdateAccountRequest(
                request_id=request_id,
                account=account_pb2.Account(overage_allowed=True),
                update_mask=FieldMask(paths=["overage_allowed"]),
            )
        ),
    )
    for deed in deeds:
        request_id = str(uuid.uuid4())
        first = await deed(request_id)
        door.scheduler.told_accounts.clear()
        assert await deed(request_id) == first
        assert door.scheduler.told_accounts == ["ann"]


async def test_a_grant_may_expire_at_any_time_there_is_and_at_no_other(door: Door, boss: Caller) -> None:
    await door.caller("ann")
    grant = admin_pb2.AdjustBalanceRequest(account="accounts/ann", amount_ms=1, reason="r")
    for seconds, nanos in ((253402300800, 0), (-(2**63), 0), (2**63 - 1, 0), (2_000_000_000, -1)):
        grant.request_id = str(uuid.uuid4())
        grant.expire_time.CopyFrom(Timestamp(seconds=seconds, nanos=nanos))
        refused = await refusal(boss.admin.AdjustBalance(grant))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
        assert refused.violations.keys() == {"expire_time"}
    grant.expire_time.CopyFrom(Timestamp(seconds=253402300799))
    assert (await boss.admin.AdjustBalance(grant)).available_ms == 54_000_001


async def test_the_dearest_plan_there_may_be_can_still_be_charged(door: Door, boss: Caller) -> None:
    ann = await door.caller("ann", plan="pro")
    await ann.create()
    (pro,) = [plan for plan in await _plans(boss) if plan.name == "plans/pro"]
    too_dear = admin_pb2.UpdatePlanRequest(
        request_id=str(uuid.uuid4()),
        plan=pro,
        effective_from=admin_pb2.EFFECTIVE_FROM_NOW,
        reason="r",
    )
    too_dear.plan.overage_micros_per_minute = 10_000_000_001
    too_dear.plan.private_multiplier_bp = 100_001
    refused = await refusal(boss.admin.UpdatePlan(too_dear))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
    assert refused.violations == {
        "plan.overage_micros_per_minute": "plan.overage_micros_per_minute must be 0 to 10000000000.",
        "plan.private_multiplier_bp": "plan.private_multiplier_bp must be 1 to 100000.",
    }
    dearest = too_dear
    dearest.plan.overage_micros_per_minute -= 1
    dearest.plan.private_multiplier_bp -= 1
    await boss.admin.UpdatePlan(dearest)
    await door.use_up("ann")
    await ann.update(overage_allowed=True)
    job = await ann.create("a fox --private")
    async with door.pool.transaction() as connection:
        stored = await jobs.read_job(connection, job.uid)
        assert stored is not None
        (hold,) = await place_holds(
            connection,
            [
                HoldRequest(
                    job_id=job.uid,
                    attempt_id=str(uuid.uuid4()),
                    account_id="ann",
                    predicted_ms=Parameters().max_predicted_ms,
                    pricing=stored.pricing,
                    at=door.clock.now,
                )
            ],
        )
    assert isinstance(hold, HoldPlaced)
    assert hold.metered_micros == 100 * 10_000_000_000  # ten minutes, ten times


async def test_a_grant_lets_an_account_go_on_in_fast(door: Door, boss: Caller) -> None:
    ann = await door.caller("ann")
    await door.use_up("ann")
    assert (await refusal(ann.create())).reason == "FAST_TIME_EXHAUSTED"
    await boss.admin.AdjustBalance(
        admin_pb2.AdjustBalanceRequest(
            request_id=str(uuid.uuid4()), account="accounts/ann", amount_ms=4_000, reason="r"
        )
    )
    assert (await ann.create()).charge_mode == job_pb2.CHARGE_MODE_FAST
    assert (await refusal(ann.create())).reason == "FAST_TIME_EXHAUSTED"  # the first one waits for that time


async def test_a_deed_needs_an_id_a_reason_and_sense(boss: Caller) -> None:
    admin = boss.admin
    past = admin_pb2.AdjustBalanceRequest(account="x", amount_ms=0)
    past.expire_time.FromSeconds(1)
    for call, fields in (
        (admin.CreateAccount(admin_pb2.CreateAccountRequest(account_id="No Good")), {"account_id", "plan"}),
        (admin.CreateApiKey(admin_pb2.CreateApiKeyRequest(account="accounts/-")), {"account", "role"}),
        (admin.AdjustBalance(past), {"account", "amount_ms", "expire_time"}),
        (
            admin.UpdatePlan(admin_pb2.UpdatePlanRequest()),
            {
                "plan.name",
                "plan.etag",
                "plan.limits.running",
                "plan.limits.accepted",
                "plan.relax_weight_milli",
                "plan.private_multiplier_bp",
                "plan.currency_code",
                "effective_from",
            },
        ),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
        assert refused.violations.keys() == {"request_id", "reason"} | fields


def _with_new_id(request: Request) -> Request:
    again = type(request)()
    again.CopyFrom(request)
    again.request_id = str(uuid.uuid4())  # type: ignore[attr-defined]
    return again


async def _plans(caller: Caller) -> list[admin_pb2.Plan]:
    return list((await caller.admin.ListPlans(admin_pb2.ListPlansRequest())).plans)


async def _audit(door: Door, action: str) -> list[tuple[str, str, dict[str, object]]]:
    async with door.pool.reading() as connection:
        rows = await connection.fetch(
            "SELECT target, reason, after FROM billing.audit_event WHERE action = $1 ORDER BY audit_id",
            action,
        )
    return [(row["target"], row["reason"], json.loads(row["after"])) for row in rows]
