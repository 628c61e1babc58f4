"""Accounts and keys as admins have them: listed, looked at, revoked, erased."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import UTC

import grpc
import pytest

from billing.v1 import admin_pb2, billing_pb2
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.deletions import Deletions
from scheduler.store.accounts import Role
from scheduler.v1 import account_pb2
from tests.frontdoor.door import Caller, Door, refusal


@pytest.fixture
async def boss(door: Door) -> Caller:
    return await door.caller("boss", role=Role.ADMIN)


def an_erasure(account: str, **fields: str) -> admin_pb2.EraseAccountRequest:
    return admin_pb2.EraseAccountRequest(
        **{"request_id": str(uuid.uuid4()), "name": f"accounts/{account}", "reason": "asked to", **fields}
    )


async def sweep(door: Door) -> None:
    """Let the front door's sweep come by."""
    await Deletions(door.pool, Artifacts(f"file://{door.artifacts}"), lambda: door.clock.now).sweep()


async def test_an_account_is_shown_with_its_balance(door: Door, boss: Caller) -> None:
    await door.caller("ann", plan="basic")
    account = await boss.admin.GetAccount(admin_pb2.GetAccountRequest(name="accounts/ann"))
    assert (account.name, account.plan, account.scheduled_plan) == ("accounts/ann", "plans/basic", "")
    assert (account.balance.available_ms, account.blocked) == (12_000_000, False)
    assert account.create_time.ToDatetime(UTC) == door.clock.now
    assert not account.HasField("erase_time")
    refused = await refusal(boss.admin.GetAccount(admin_pb2.GetAccountRequest(name="accounts/zoe")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ACCOUNT")
    malformed = await refusal(boss.admin.GetAccount(admin_pb2.GetAccountRequest(name="accounts/-")))
    assert malformed.violations.keys() == {"name"}


async def test_accounts_are_listed_by_id_page_by_page_and_by_plan(door: Door, boss: Caller) -> None:
    for account_id, plan in (("eve", "basic"), ("ann", "standard"), ("ben", "basic")):
        await door.caller(account_id, plan=plan)
    listed = await boss.admin.ListAccounts(admin_pb2.ListAccountsRequest())
    assert [account.name.partition("/")[2] for account in listed.accounts] == ["ann", "ben", "boss", "eve"]
    assert not listed.accounts[0].HasField("balance")
    first = await boss.admin.ListAccounts(admin_pb2.ListAccountsRequest(page_size=1, plan="plans/basic"))
    second = await boss.admin.ListAccounts(
        admin_pb2.ListAccountsRequest(page_size=1, plan="plans/basic", page_token=first.next_page_token)
    )
    assert [page.accounts[0].name for page in (first, second)] == ["accounts/ben", "accounts/eve"]
    assert not second.next_page_token
    wrong = admin_pb2.ListAccountsRequest(page_size=-1, plan="basic", page_token=first.next_page_token)
    refused = await refusal(boss.admin.ListAccounts(wrong))
    assert refused.violations.keys() == {"page_size", "plan", "page_token"}


async def test_keys_are_listed_without_secrets_and_revoked_once(door: Door, boss: Caller) -> None:
    ann = await door.caller("ann", role=Role.OPERATOR)
    other = await door.caller("ann")
    key_id = ann.secret.split("_")[1]
    keys = (await boss.admin.ListApiKeys(admin_pb2.ListApiKeysRequest(account="accounts/ann"))).keys
    assert [key.role for key in keys] == [admin_pb2.ROLE_OPERATOR, admin_pb2.ROLE_USER]
    assert not any(key.secret or key.HasField("revoke_time") for key in keys)
    request = admin_pb2.RevokeApiKeyRequest(
        request_id=str(uuid.uuid4()), name=f"accounts/ann/keys/{key_id}", reason="left the company"
    )
    await ann.billing.GetBalance(billing_pb2.GetBalanceRequest())  # the door knows the key now
    revoked = await boss.admin.RevokeApiKey(request)
    assert (revoked.name, revoked.revoke_time.ToDatetime(UTC)) == (request.name, door.clock.now)
    assert await boss.admin.RevokeApiKey(request) == revoked
    refused = await refusal(ann.billing.GetBalance(billing_pb2.GetBalanceRequest()))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    await other.billing.GetBalance(billing_pb2.GetBalanceRequest())
    (event,) = (
        await boss.admin.ListAuditEvents(admin_pb2.ListAuditEventsRequest(target=request.name))
    ).events
    assert (event.action, event.reason, json.loads(event.after_json)["revoked"]) == (
        "RevokeApiKey",
        "left the company",
        True,
    )
    request.request_id = str(uuid.uuid4())
    assert (await boss.admin.RevokeApiKey(request)).revoke_time == revoked.revoke_time


async def test_keys_that_are_not_there(boss: Caller) -> None:
    request = admin_pb2.RevokeApiKeyRequest(
        request_id=str(uuid.uuid4()), name=f"accounts/boss/keys/{'0' * 16}", reason="r"
    )
    refused = await refusal(boss.admin.RevokeApiKey(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_KEY")
    assert refused.metadata == {"account": "boss", "key": "0" * 16}
    nothing = await refusal(boss.admin.RevokeApiKey(admin_pb2.RevokeApiKeyRequest()))
    assert nothing.violations.keys() == {"request_id", "name", "reason"}
    unknown = await refusal(boss.admin.ListApiKeys(admin_pb2.ListApiKeysRequest(account="accounts/zoe")))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ACCOUNT")


async def test_an_erased_account_leaves_nothing_that_says_who_it_was(door: Door, boss: Caller) -> None:
    zoe = await door.caller("zoe")
    finished, waiting = await zoe.create("my secret fox"), await zoe.create("my other secret")
    await door.succeed(finished.uid)
    files = list(door.artifacts.glob("jobs/*/*"))
    assert len(files) == 4
    request = an_erasure("zoe")
    erased = await boss.admin.EraseAccount(request)
    refused = await refusal(zoe.accounts.GetAccount(account_pb2.GetAccountRequest()))
    assert refused.reason == "UNAUTHENTICATED"
    pseudonym = erased.name.partition("/")[2]
    assert pseudonym.startswith("erased-")
    assert (erased.blocked, erased.HasField("erase_time")) == (True, True)
    assert await boss.admin.EraseAccount(request) == erased
    assert door.scheduler.told_jobs[-1] == waiting.uid
    assert not list(door.artifacts.glob("jobs/*/*"))
    for table in (
        *("scheduler.account", "scheduler.api_key", "scheduler.job", "scheduler.job_event"),
        *("billing.account", "billing.subscription", "billing.grant_lot", "billing.transfer"),
        *("billing.audit_event", "billing.idempotency"),
    ):
        text = await door.sql(f"SELECT string_agg(of::text, '') FROM {table} AS of") or ""
        assert "secret" not in text.replace("secret_hash", ""), table
        assert "zoe" not in text, table
    assert await door.sql("SELECT count(*) FROM scheduler.api_key WHERE account_id = $1", pseudonym) == 0
    refused = await refusal(boss.admin.GetAccount(admin_pb2.GetAccountRequest(name="accounts/zoe")))
    assert refused.reason == "UNKNOWN_ACCOUNT"
    journal = await boss.billing.ListTransfers(billing_pb2.ListTransfersRequest(account=erased.name))
    assert [transfer.code for transfer in journal.transfers] == ["period"]
    events = await boss.admin.ListAuditEvents(admin_pb2.ListAuditEventsRequest(target=erased.name))
    assert [(event.action, event.reason) for event in events.events] == [("EraseAccount", "asked to")]
    door.clock.pass_s(1)
    assert (await refusal(zoe.create())).reason == "UNAUTHENTICATED"


async def test_a_running_job_of_an_erased_account_is_cancelled_and_deleted_when_it_has_ended(
    door: Door, boss: Caller
) -> None:
    zoe = await door.caller("zoe")
    job = await zoe.create("my secret fox")
    await door.start(job.uid)
    request = an_erasure("zoe")
    erased = await boss.admin.EraseAccount(request)
    assert (erased.name, erased.blocked, erased.HasField("erase_time")) == ("accounts/zoe", True, False)
    assert await door.sql("SELECT cancel_wanted FROM scheduler.job")
    await sweep(door)
    assert await door.sql("SELECT prompt FROM scheduler.job") == "my secret fox"
    await door.succeed(job.uid)
    await sweep(door)
    assert await door.sql("SELECT prompt FROM scheduler.job") == ""
    assert not list(door.artifacts.glob("jobs/*/*"))
    again = await boss.admin.EraseAccount(request)
    assert again.name.startswith("accounts/erased-")
    assert again.HasField("erase_time")


async def test_an_account_keeps_its_id_while_the_scheduler_may_write_under_it(
    door: Door, boss: Caller
) -> None:
    await door.caller("zoe")
    await door.sql("INSERT INTO scheduler.fair_share (account_id, tier, tag) VALUES ('zoe', 'relax', 7)")
    assert (await boss.admin.EraseAccount(an_erasure("zoe"))).name == "accounts/zoe"
    await door.sql("UPDATE scheduler.fair_share SET tag = NULL")
    await sweep(door)
    assert await door.sql("SELECT count(*) FROM scheduler.account WHERE account_id = 'zoe'") == 0
    assert await door.sql("SELECT account_id LIKE 'erased-%' FROM scheduler.fair_share")


async def test_no_job_gets_in_beside_an_erasure(door: Door, boss: Caller) -> None:
    """Its key is looked up once a second at most, so the call itself may still be let in."""
    zoe = await door.caller("zoe")
    await zoe.create()
    outcomes = await asyncio.gather(
        boss.admin.EraseAccount(an_erasure("zoe")),
        *(zoe.create() for _ in range(5)),
        return_exceptions=True,
    )
    assert not isinstance(outcomes[0], BaseException)
    await sweep(door)
    live = "SELECT count(*) FROM scheduler.job WHERE state = 'queued' OR deleted_at IS NULL"
    assert await door.sql(live) == 0


async def test_two_front_doors_erase_one_account_once(door: Door, boss: Caller) -> None:
    await door.caller("zoe")
    await door.sql("UPDATE scheduler.account SET erasing = true WHERE account_id = 'zoe'")
    await asyncio.gather(*(sweep(door) for _ in range(4)))
    assert await door.sql("SELECT count(*) FROM billing.account WHERE erased_at IS NOT NULL") == 1


async def test_what_cannot_be_erased(door: Door, boss: Caller) -> None:
    own = await refusal(boss.admin.EraseAccount(an_erasure("boss")))
    assert own.violations.keys() == {"name"}
    assert "another admin" in own.violations["name"]
    unknown = await refusal(boss.admin.EraseAccount(an_erasure("zoe")))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ACCOUNT")
    nothing = await refusal(boss.admin.EraseAccount(admin_pb2.EraseAccountRequest()))
    assert nothing.violations.keys() == {"request_id", "name", "reason"}


async def test_no_account_is_opened_under_a_name_of_erased_ones(boss: Caller) -> None:
    request = admin_pb2.CreateAccountRequest(
        request_id=str(uuid.uuid4()), account_id="erased-me", plan="plans/basic", reason="r"
    )
    assert (await refusal(boss.admin.CreateAccount(request))).violations.keys() == {"account_id"}
