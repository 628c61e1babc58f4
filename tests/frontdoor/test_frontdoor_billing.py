"""What an account sees of the ledger and changes in it: journal, statements, its plan."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from billing import ledger
from billing.v1 import admin_pb2, billing_pb2
from scheduler.store import jobs
from scheduler.store.accounts import Role
from scheduler.v1 import account_pb2
from tests.frontdoor.door import Caller, Door, refusal

STANDARD_MS = 54_000_000


@pytest.fixture
async def boss(door: Door) -> Caller:
    return await door.caller("boss", role=Role.ADMIN)


@pytest.fixture
async def ann(door: Door) -> Caller:
    return await door.caller("ann")


@pytest.fixture
async def open_plans(boss: Caller) -> None:
    """An admin who has opened every plan to accounts."""
    for plan in (await boss.admin.ListPlans(admin_pb2.ListPlansRequest())).plans:
        plan.self_service = True
        await boss.admin.UpdatePlan(
            admin_pb2.UpdatePlanRequest(
                request_id=str(uuid.uuid4()),
                plan=plan,
                effective_from=admin_pb2.EFFECTIVE_FROM_NEXT_PERIOD,
                reason="r",
            )
        )


def change(plan: str = "plans/pro", **fields: str) -> billing_pb2.ChangePlanRequest:
    return billing_pb2.ChangePlanRequest(request_id=str(uuid.uuid4()), plan=plan, **fields)


def at(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


async def charge(door: Door, caller: Caller, measured_ms: int = 4_000) -> str:
    """Let a job of the caller run in fast and end, as the loop's transactions do; return its name."""
    job = await caller.create()
    attempt_id = str(uuid.uuid4())
    async with door.pool.transaction() as connection:
        stored = await jobs.read_job(connection, job.uid)
        assert stored is not None
        request = ledger.HoldRequest(
            job_id=job.uid,
            attempt_id=attempt_id,
            account_id=caller.account_id,
            predicted_ms=stored.predicted_ms,
            pricing=stored.pricing,
            at=door.clock.now,
        )
        (placed,) = await ledger.place_holds(connection, [request])
        assert isinstance(placed, ledger.HoldPlaced)
        await ledger.settle(
            connection,
            [
                ledger.Settlement(
                    job_id=job.uid,
                    attempt_id=attempt_id,
                    account_id=caller.account_id,
                    tier="fast",
                    ending=ledger.Ending.POST,
                    measured_ms=measured_ms,
                    absorbed_ms=0,
                    pricing=stored.pricing,
                    at=door.clock.now,
                )
            ],
        )
    await door.succeed(job.uid)
    return job.name


async def test_the_journal_is_paged_newest_first(door: Door, ann: Caller) -> None:
    job = await charge(door, ann)
    whole = await ann.billing.ListTransfers(billing_pb2.ListTransfersRequest())
    settled, held, granted = whole.transfers
    assert not whole.next_page_token
    assert (settled.kind, settled.code, settled.amount, settled.unit) == (
        "post_pending",
        "settle",
        4_000,
        "gpu_ms",
    )
    assert (settled.credit_account, settled.job, settled.pending_number) == ("consumed", job, held.number)
    assert settled.attempt_id == held.attempt_id
    assert (granted.code, granted.debit_account, granted.job, granted.attempt_id) == (
        "period",
        "issued",
        "",
        "",
    )
    paged, token = [], ""
    while not paged or token:
        page = await ann.billing.ListTransfers(
            billing_pb2.ListTransfersRequest(page_size=1, page_token=token)
        )
        paged += page.transfers
        token = page.next_page_token
    assert paged == list(whole.transfers)


async def test_a_token_is_good_for_its_own_account_alone(door: Door, ann: Caller, boss: Caller) -> None:
    await charge(door, ann)
    page = await boss.billing.ListTransfers(
        billing_pb2.ListTransfersRequest(account="accounts/ann", page_size=1)
    )
    for request in (
        billing_pb2.ListTransfersRequest(account="accounts/boss", page_token=page.next_page_token),
        billing_pb2.ListTransfersRequest(page_token="nonsense"),
        billing_pb2.ListTransfersRequest(page_size=-1, account="ann"),
    ):
        refused = await refusal(boss.billing.ListTransfers(request))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
    assert refused.violations.keys() == {"page_size", "account"}


async def test_a_statement_adds_up_and_names_its_jobs(door: Door, ann: Caller) -> None:
    job = await charge(door, ann)
    made = await ann.billing.GetStatement(billing_pb2.GetStatementRequest())
    assert (made.account, made.plan, made.currency_code) == ("accounts/ann", "plans/standard", "USD")
    assert (
        made.opening_ms + made.granted_ms - made.used_ms - made.expired_ms - made.revoked_ms
        == made.closing_ms
    )
    assert (made.granted_ms, made.used_ms, made.closing_ms) == (STANDARD_MS, 4_000, STANDARD_MS - 4_000)
    granted, charged = made.lines
    assert granted.fast_ms == STANDARD_MS
    assert (charged.job, charged.fast_ms, charged.measured_ms, charged.multiplier_bp) == (
        job,
        -4_000,
        4_000,
        10_000,
    )
    assert charged.sentence == "Charged 4.000 s of fast time: 4.000 s of GPU time."
    balance = await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())
    assert made.closing_ms == balance.available_ms + balance.held_ms


async def test_a_statement_of_a_period_that_is_over(door: Door, ann: Caller) -> None:
    await charge(door, ann)
    begun = door.clock.now
    door.clock.pass_s(40 * 86_400)
    made = await ann.billing.GetStatement(billing_pb2.GetStatementRequest(at=at(begun + timedelta(days=3))))
    assert (made.period_start.ToDatetime(UTC), made.used_ms) == (begun, 4_000)
    assert (made.expired_ms, made.closing_ms) == (STANDARD_MS - 4_000, 0)


async def test_a_moment_outside_all_periods(door: Door, ann: Caller) -> None:
    for moment in (door.clock.now - timedelta(days=1), door.clock.now + timedelta(days=60)):
        refused = await refusal(ann.billing.GetStatement(billing_pb2.GetStatementRequest(at=at(moment))))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "OUTSIDE_PERIODS")
        assert refused.violations.keys() == {"at"}
    never = billing_pb2.GetStatementRequest(at=Timestamp(seconds=2**60))
    assert (await refusal(ann.billing.GetStatement(never))).violations.keys() == {"at"}


async def test_statements_read_one_moment_while_charges_go_on(door: Door, ann: Caller) -> None:
    """A statement that does not add up would be an error of the service."""

    async def charges() -> None:
        for _ in range(8):
            await charge(door, ann)

    async def reads() -> None:
        for _ in range(8):
            await ann.billing.GetStatement(billing_pb2.GetStatementRequest())

    await asyncio.gather(charges(), reads())


@pytest.mark.usefixtures("open_plans")
async def test_a_change_of_plan_is_what_the_preview_showed(door: Door, ann: Caller) -> None:
    door.scheduler.told_accounts.clear()
    door.clock.pass_s(5 * 86_400)
    preview = await ann.billing.PreviewPlanChange(billing_pb2.PreviewPlanChangeRequest(plan="plans/pro"))
    assert (preview.from_plan, preview.to_plan, preview.at_once) == ("plans/standard", "plans/pro", True)
    assert preview.granted_ms == STANDARD_MS * 25 // 30
    assert preview.sentence.startswith(
        "At once: pro instead of standard, 750.0 GPU-minutes more in this period"
    )
    before = await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())
    assert before.plan == "plans/standard", "a preview changes nothing"
    door.clock.pass_s(60)
    request = change(etag=preview.etag)
    changed = await ann.billing.ChangePlan(request)
    assert changed == preview
    assert await ann.billing.ChangePlan(request) == changed
    after = await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())
    assert (after.plan, after.available_ms - before.available_ms) == ("plans/pro", preview.granted_ms)
    assert door.scheduler.told_accounts == ["ann", "ann"]
    audited = await door.sql(
        "SELECT actor || ' ' || target || ' ' || reason FROM billing.audit_event WHERE action = 'ChangePlan'"
    )
    assert (
        audited
        == f"accounts/ann/keys/{ann.secret.split('_')[1]} accounts/ann asked for by the account itself"
    )


async def test_only_admins_change_an_account_to_a_plan_that_is_not_open(
    door: Door, ann: Caller, boss: Caller
) -> None:
    operator = await door.caller("ann", role=Role.OPERATOR)
    for caller in (ann, operator):
        for call in (
            caller.billing.PreviewPlanChange(billing_pb2.PreviewPlanChangeRequest(plan="plans/pro")),
            caller.billing.ChangePlan(change("plans/pro")),
            caller.billing.ChangePlan(change("plans/standard")),
        ):
            refused = await refusal(call)
            assert (refused.code, refused.reason) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "PLAN_NOT_SELF_SERVICE",
            )
    assert (await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())).plan == "plans/standard"
    for_ann = billing_pb2.PreviewPlanChangeRequest(account="accounts/ann", plan="plans/pro")
    assert (await boss.billing.PreviewPlanChange(for_ann)).at_once
    assert (await boss.billing.ChangePlan(change("plans/pro"))).account == "accounts/boss"


@pytest.mark.usefixtures("open_plans")
async def test_a_change_to_less_waits_for_the_end_of_the_period(
    door: Door, ann: Caller, boss: Caller
) -> None:
    scheduled = await ann.billing.ChangePlan(change("plans/basic"))
    assert not scheduled.at_once
    assert scheduled.sentence.startswith(
        "From 2026-12-10 12:00 UTC the plan is basic; until then it stays standard"
    )
    account = await boss.admin.GetAccount(admin_pb2.GetAccountRequest(name="accounts/ann"))
    assert (account.plan, account.scheduled_plan) == ("plans/standard", "plans/basic")
    own = await ann.accounts.GetAccount(_own())
    assert own.scheduled_plan == "plans/basic"
    taken_back = await ann.billing.ChangePlan(change("plans/standard"))
    assert taken_back.sentence == "The plan stays standard; a change that was scheduled is taken back."
    assert (await ann.accounts.GetAccount(_own())).scheduled_plan == ""
    await ann.billing.ChangePlan(change("plans/basic"))
    door.clock.pass_s(31 * 86_400)
    assert (await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())).plan == "plans/basic"


@pytest.mark.usefixtures("open_plans")
async def test_a_preview_that_no_longer_holds_is_refused(ann: Caller, boss: Caller) -> None:
    preview = await ann.billing.PreviewPlanChange(billing_pb2.PreviewPlanChangeRequest(plan="plans/pro"))
    pro = await boss.admin.GetPlan(admin_pb2.GetPlanRequest(name="plans/pro"))
    pro.quota_ms += 1
    await boss.admin.UpdatePlan(
        admin_pb2.UpdatePlanRequest(
            request_id=str(uuid.uuid4()),
            plan=pro,
            effective_from=admin_pb2.EFFECTIVE_FROM_NEXT_PERIOD,
            reason="r",
        )
    )
    refused = await refusal(ann.billing.ChangePlan(change(etag=preview.etag)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert (await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())).plan == "plans/standard"


async def test_a_plan_that_does_not_exist(ann: Caller) -> None:
    for call in (
        ann.billing.PreviewPlanChange(billing_pb2.PreviewPlanChangeRequest(plan="plans/gold")),
        ann.billing.ChangePlan(change("plans/gold")),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_PLAN")


async def test_everything_wrong_with_a_change_is_told_at_once(ann: Caller) -> None:
    request = billing_pb2.ChangePlanRequest(account="ann", plan="pro", etag="x" * 101)
    refused = await refusal(ann.billing.ChangePlan(request))
    assert refused.violations.keys() == {"request_id", "plan", "etag", "account"}


async def test_an_admin_changes_the_plan_of_another_and_says_why(
    door: Door, ann: Caller, boss: Caller
) -> None:
    refused = await refusal(boss.billing.ChangePlan(change(account="accounts/ann")))
    assert refused.violations.keys() == {"reason"}
    changed = await boss.billing.ChangePlan(change(account="accounts/ann", reason="asked on the phone"))
    assert (changed.account, changed.to_plan) == ("accounts/ann", "plans/pro")
    assert (
        await door.sql("SELECT reason FROM billing.audit_event WHERE action = 'ChangePlan'")
        == "asked on the phone"
    )


async def test_nobody_but_admins_reads_or_changes_another_account(door: Door, ann: Caller) -> None:
    await door.caller("ben")
    others = [ann, await door.caller("mod", role=Role.MODERATOR), await door.caller("op", role=Role.OPERATOR)]
    for account in ("accounts/ben", "accounts/nobody"):
        for caller in others:
            for call in (
                caller.billing.GetBalance(billing_pb2.GetBalanceRequest(account=account)),
                caller.billing.ListTransfers(billing_pb2.ListTransfersRequest(account=account)),
                caller.billing.GetStatement(billing_pb2.GetStatementRequest(account=account)),
                caller.billing.PreviewPlanChange(
                    billing_pb2.PreviewPlanChangeRequest(account=account, plan="plans/pro")
                ),
                caller.billing.ChangePlan(change(account=account, reason="r")),
            ):
                refused = await refusal(call)
                assert (refused.code, refused.reason) == (
                    grpc.StatusCode.PERMISSION_DENIED,
                    "NOT_FOUND_OR_NOT_YOURS",
                )


async def test_an_admin_reads_any_account_and_none_that_is_not_there(ann: Caller, boss: Caller) -> None:
    name = f"accounts/{ann.account_id}"
    assert (await boss.billing.GetStatement(billing_pb2.GetStatementRequest(account=name))).account == name
    assert (await boss.billing.ListTransfers(billing_pb2.ListTransfersRequest(account=name))).transfers
    for call in (
        boss.billing.GetStatement(billing_pb2.GetStatementRequest(account="accounts/zoe")),
        boss.billing.ListTransfers(billing_pb2.ListTransfersRequest(account="accounts/zoe")),
        boss.billing.PreviewPlanChange(
            billing_pb2.PreviewPlanChangeRequest(account="accounts/zoe", plan="plans/pro")
        ),
        boss.billing.ChangePlan(change(account="accounts/zoe", reason="r")),
    ):
        assert (await refusal(call)).reason == "NOT_FOUND_OR_NOT_YOURS"


def _own() -> account_pb2.GetAccountRequest:
    return account_pb2.GetAccountRequest()
