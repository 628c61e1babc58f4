"""Plans as admins have them: made, read by version, and changed after a look at whom it touches."""

from __future__ import annotations

import uuid
from typing import Any

import grpc
import pytest

from billing.v1 import admin_pb2, billing_pb2
from scheduler.store.accounts import Role
from tests.frontdoor.door import Caller, Door, refusal


@pytest.fixture
async def boss(door: Door) -> Caller:
    return await door.caller("boss", plan="pro", role=Role.ADMIN)


def a_plan(name: str = "plans/team", **fields: Any) -> admin_pb2.Plan:
    return admin_pb2.Plan(
        **{
            "name": name,
            "quota_ms": 1_000_000,
            "limits": billing_pb2.PlanLimits(running=3, relax_running=2, accepted=10),
            "relax_weight_milli": 1_500,
            "private_multiplier_bp": 20_000,
            "currency_code": "EUR",
            "price_micros": 10_000_000,
            "rollover_ms": 50_000,
            "gpu_class_bp": {"H200": 15_000},
            "picture_retention_days": 90,
            **fields,
        }
    )


def a_request(plan: admin_pb2.Plan) -> admin_pb2.CreatePlanRequest:
    return admin_pb2.CreatePlanRequest(request_id=str(uuid.uuid4()), plan=plan, reason="new offer")


def an_update(plan: admin_pb2.Plan, **fields: Any) -> admin_pb2.UpdatePlanRequest:
    return admin_pb2.UpdatePlanRequest(
        **{
            "request_id": str(uuid.uuid4()),
            "plan": plan,
            "effective_from": admin_pb2.EFFECTIVE_FROM_NOW,
            "reason": "r",
            **fields,
        }
    )


async def get(boss: Caller, name: str) -> admin_pb2.Plan:
    return await boss.admin.GetPlan(admin_pb2.GetPlanRequest(name=name))


async def test_a_plan_is_made_once_and_can_be_had(door: Door, boss: Caller) -> None:
    request = a_request(a_plan())
    made = await boss.admin.CreatePlan(request)
    assert (made.version, made.etag) == (1, "v1")
    assert (made.price_micros, made.rollover_ms, dict(made.gpu_class_bp)) == (
        10_000_000,
        50_000,
        {"H200": 15_000},
    )
    assert made.picture_retention_days == 90
    assert await boss.admin.CreatePlan(request) == made
    assert await get(boss, "plans/team") == made
    zoe = admin_pb2.CreateAccountRequest(
        request_id=str(uuid.uuid4()), account_id="zoe", plan="plans/team", reason="r"
    )
    await boss.admin.CreateAccount(zoe)
    refused = await refusal(boss.admin.CreatePlan(a_request(a_plan())))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "PLAN_EXISTS")
    audited = await door.sql(
        "SELECT count(*) FROM billing.audit_event WHERE target = 'plans/team' AND reason = 'new offer'"
    )
    assert audited == 1


async def test_a_new_plan_is_judged_before_it_is_made(door: Door, boss: Caller) -> None:
    request = a_request(a_plan(self_service=True))
    request.validate_only = True
    shown = await boss.admin.CreatePlan(request)
    assert (await refusal(get(boss, "plans/team"))).reason == "UNKNOWN_PLAN"
    request.validate_only = False
    assert await boss.admin.CreatePlan(request) == shown
    assert shown.self_service
    again = a_request(a_plan())
    again.validate_only = True
    assert (await refusal(boss.admin.CreatePlan(again))).reason == "PLAN_EXISTS"
    again.plan.gpu_class_bp["H200"] = 10**6
    assert (await refusal(boss.admin.CreatePlan(again))).violations.keys() == {"plan.gpu_class_bp"}


async def test_versions_stay_as_they_were(boss: Caller) -> None:
    first = await get(boss, "plans/basic")
    changed = admin_pb2.Plan()
    changed.CopyFrom(first)
    changed.quota_ms += 1
    second = await boss.admin.UpdatePlan(an_update(changed))
    assert await get(boss, "plans/basic/versions/1") == first
    assert (await get(boss, "plans/basic")).version == second.version == 2
    for name in ("plans/gold", "plans/basic/versions/3"):
        refused = await refusal(get(boss, name))
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_PLAN")
    assert (await refusal(get(boss, "plans/basic/versions/0"))).violations.keys() == {"name"}


async def test_a_dry_run_shows_whom_it_touches_and_keeps_nothing(door: Door, boss: Caller) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    await ann.create()
    for _ in range(2):
        await ben.create()
    await door.use_up("ben")
    standard = await get(boss, "plans/standard")
    standard.quota_ms -= 1_000_000
    standard.limits.accepted = 1
    standard.picture_retention_days = 30
    request = an_update(standard, validate_only=True)
    foreseen = await boss.admin.UpdatePlan(request)
    impact = foreseen.impact
    assert (foreseen.version, impact.accounts, impact.granted_ms, impact.revoked_ms) == (2, 2, 0, 1_000_000)
    assert (impact.accounts_cut_short, impact.accounts_over_limits) == (1, 1)
    assert (impact.picture_retention_days_before, impact.picture_retention_days_after) == (0, 30)
    assert [(one.account, one.available_before_ms, one.available_after_ms) for one in impact.first] == [
        ("accounts/ann", 54_000_000, 53_000_000),
        ("accounts/ben", 0, 0),
    ]
    assert (await get(boss, "plans/standard")).version == 1
    assert await door.sql("SELECT count(*) FROM billing.audit_event WHERE action = 'UpdatePlan'") == 0
    assert not door.scheduler.told_accounts
    request.validate_only = False
    assert await boss.admin.UpdatePlan(request) == foreseen
    assert set(door.scheduler.told_accounts) == {"ann", "ben"}
    balance = await boss.billing.GetBalance(billing_pb2.GetBalanceRequest(account="accounts/ann"))
    assert balance.available_ms == 53_000_000


async def test_from_the_next_period_no_time_is_touched_now(door: Door, boss: Caller) -> None:
    await door.caller("ann")
    standard = await get(boss, "plans/standard")
    standard.quota_ms *= 2
    impact = (
        await boss.admin.UpdatePlan(
            an_update(standard, effective_from=admin_pb2.EFFECTIVE_FROM_NEXT_PERIOD, validate_only=True)
        )
    ).impact
    assert (impact.accounts, impact.granted_ms, impact.revoked_ms) == (1, 0, 0)


async def test_a_dry_run_is_refused_for_what_the_change_would_be(boss: Caller) -> None:
    standard = await get(boss, "plans/standard")
    standard.etag = "v9"
    refused = await refusal(boss.admin.UpdatePlan(an_update(standard, validate_only=True)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    unknown = await refusal(
        boss.admin.UpdatePlan(an_update(a_plan("plans/gold", etag="v1"), validate_only=True))
    )
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_PLAN")
    nothing = await refusal(boss.admin.UpdatePlan(admin_pb2.UpdatePlanRequest(validate_only=True)))
    assert {"request_id", "reason", "plan.etag", "effective_from"} <= nothing.violations.keys()


async def test_everything_wrong_with_a_plan_is_told_at_once(boss: Caller) -> None:
    nonsense = a_plan(
        "team",
        version=1,
        quota_ms=-1,
        currency_code="eur",
        price_micros=-1,
        rollover_ms=-1,
        gpu_class_bp={"H200": 0},
        picture_retention_days=36_501,
    )
    refused = await refusal(boss.admin.CreatePlan(admin_pb2.CreatePlanRequest(plan=nonsense)))
    assert refused.violations.keys() == {
        *("request_id", "reason", "plan.name", "plan.version", "plan.quota_ms", "plan.currency_code"),
        *("plan.price_micros", "plan.rollover_ms", "plan.gpu_class_bp", "plan.picture_retention_days"),
    }
    for classes in ({"": 10_000}, {"x" * 121: 10_000}, {f"gpu-{number}": 1 for number in range(101)}):
        refused = await refusal(boss.admin.CreatePlan(a_request(a_plan(gpu_class_bp=classes))))
        assert refused.violations.keys() == {"plan.gpu_class_bp"}
