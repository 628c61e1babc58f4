"""What an account may see and change about itself."""

from __future__ import annotations

import json
import uuid

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from billing.v1 import billing_pb2
from scheduler.store.accounts import Role
from scheduler.v1 import account_pb2, job_pb2
from tests.frontdoor.door import Caller, Door, refusal


async def test_one_call_says_everything_about_an_account(door: Door) -> None:
    ann = await door.caller("ann")
    waiting, running = await ann.create(), await ann.create()
    await door.start(running.uid)
    account = await _get(ann)
    assert account.name == "accounts/ann"
    assert (account.mode, account.visibility) == (job_pb2.TIER_FAST, job_pb2.VISIBILITY_PUBLIC)
    assert (account.jobs_running, account.jobs_waiting) == (1, 1)
    assert (account.limits.running, account.limits.relax_running, account.limits.accepted) == (3, 2, 10)
    assert not account.blocked
    assert account.balance.plan == "plans/standard"
    assert account.balance.available_ms == 54_000_000
    assert account.balance.renew_time.ToDatetime().isoformat() == "2026-12-10T12:00:00"
    assert account.balance == await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())
    assert waiting.uid != running.uid


async def test_what_the_mask_names_is_changed_and_nothing_else(door: Door) -> None:
    ann = await door.caller("ann", plan="pro")
    changed = await ann.update(mode=job_pb2.TIER_RELAX, overage_allowed=True, spend_cap_micros=5_000_000)
    assert changed.mode == job_pb2.TIER_RELAX
    assert changed.visibility == job_pb2.VISIBILITY_PUBLIC
    assert (changed.overage_allowed, changed.spend_cap_micros) == (True, 5_000_000)
    assert await _get(ann) == changed
    changed = await ann.update(visibility=job_pb2.VISIBILITY_PRIVATE, overage_allowed=False)
    assert (changed.visibility, changed.overage_allowed) == (job_pb2.VISIBILITY_PRIVATE, False)
    assert changed.spend_cap_micros == 5_000_000
    assert door.scheduler.told_accounts == ["ann", "ann"]


async def test_consent_to_overage_reaches_the_terms_of_jobs_that_wait(door: Door) -> None:
    ann = await door.caller("ann")
    fast, relax = await ann.create(), await ann.create(tier=job_pb2.TIER_RELAX)
    await ann.update(overage_allowed=True)
    consents = "SELECT pricing ->> 'overage_allowed' FROM scheduler.job WHERE job_id = $1"
    assert await door.sql(consents, uuid.UUID(fast.uid)) == "true"
    assert await door.sql(consents, uuid.UUID(relax.uid)) == "false"


PRICING = "SELECT pricing FROM scheduler.job WHERE job_id = $1"


async def test_a_job_that_has_a_consent_keeps_the_price_it_was_given_for(door: Door) -> None:
    ann = await door.caller("ann")
    without = await ann.create()
    await ann.update(overage_allowed=True)
    await ann.update(overage_allowed=False)
    later = await ann.create()
    await door.plan("standard", overage_micros_per_minute=5_000_000, currency="EUR")
    await ann.update(overage_allowed=True)

    agreed = json.loads(await door.sql(PRICING, uuid.UUID(without.uid)))
    assert (agreed["overage_micros_per_minute"], agreed["currency"]) == (66_667, "USD")
    agreed = json.loads(await door.sql(PRICING, uuid.UUID(later.uid)))
    assert (agreed["overage_allowed"], agreed["overage_micros_per_minute"]) == (True, 5_000_000)
    assert agreed["currency"] == "EUR"


async def test_nobody_agrees_to_overage_on_a_plan_without_a_price(door: Door) -> None:
    await door.plan("narrow", overage_micros_per_minute=0)
    ann = await door.caller("ann", plan="narrow")
    refused = await refusal(ann.update(overage_allowed=True, spend_cap_micros=5))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PLAN_LACKS_OVERAGE")
    assert refused.precondition == "plans/narrow"
    assert (await _get(ann)).spend_cap_micros == 0


async def test_a_repeated_change_is_not_done_again(door: Door) -> None:
    ann = await door.caller("ann")
    request = account_pb2.UpdateAccountRequest(
        request_id=str(uuid.uuid4()),
        account=account_pb2.Account(mode=job_pb2.TIER_RELAX),
        update_mask=FieldMask(paths=["mode"]),
    )
    await ann.accounts.UpdateAccount(request)
    await ann.update(mode=job_pb2.TIER_FAST)
    assert (await ann.accounts.UpdateAccount(request)).mode == job_pb2.TIER_FAST
    request.account.mode = job_pb2.TIER_FAST
    assert (await refusal(ann.accounts.UpdateAccount(request))).reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize(
    ("account", "paths", "fields"),
    [
        (account_pb2.Account(), ["balance", "blocked"], {"update_mask"}),
        (account_pb2.Account(), ["mode", "visibility"], {"account.mode", "account.visibility"}),
        (account_pb2.Account(spend_cap_micros=-1), ["spend_cap_micros"], {"account.spend_cap_micros"}),
    ],
)
async def test_what_cannot_be_changed_is_named(
    door: Door, account: account_pb2.Account, paths: list[str], fields: set[str]
) -> None:
    ann = await door.caller("ann")
    request = account_pb2.UpdateAccountRequest(
        request_id=str(uuid.uuid4()), account=account, update_mask=FieldMask(paths=paths)
    )
    refused = await refusal(ann.accounts.UpdateAccount(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
    assert refused.violations.keys() == fields


async def test_only_admins_look_at_other_accounts_and_nobody_changes_them(door: Door) -> None:
    await door.caller("ann")
    admin = await door.caller("boss", role=Role.ADMIN)
    seen = await admin.accounts.GetAccount(account_pb2.GetAccountRequest(name="accounts/ann"))
    assert seen.name == "accounts/ann"
    balance = await admin.billing.GetBalance(billing_pb2.GetBalanceRequest(account="accounts/ann"))
    assert balance.account == "accounts/ann"
    request = account_pb2.UpdateAccountRequest(
        request_id=str(uuid.uuid4()),
        account=account_pb2.Account(name="accounts/ann", mode=job_pb2.TIER_RELAX),
        update_mask=FieldMask(paths=["mode"]),
    )
    moderator = await door.caller("mod", role=Role.MODERATOR)
    for call in (
        admin.accounts.UpdateAccount(request),
        admin.accounts.GetAccount(account_pb2.GetAccountRequest(name="accounts/zoe")),
        admin.billing.GetBalance(billing_pb2.GetBalanceRequest(account="accounts/zoe")),
        moderator.billing.GetBalance(billing_pb2.GetBalanceRequest(account="accounts/ann")),
    ):
        assert (await refusal(call)).reason == "NOT_FOUND_OR_NOT_YOURS"


async def _get(caller: Caller) -> account_pb2.Account:
    return await caller.accounts.GetAccount(account_pb2.GetAccountRequest())
