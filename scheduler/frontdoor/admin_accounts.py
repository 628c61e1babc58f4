"""What admins do with accounts and their keys."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from billing import accounts as ledger_accounts
from billing import ledger
from billing.refusals import AccountErased, UnknownAccount
from billing.v1 import admin_pb2
from scheduler import intake
from scheduler.frontdoor import ledger_messages as messages
from scheduler.frontdoor.auth import Doorman
from scheduler.frontdoor.deeds import Deed, Deeds
from scheduler.frontdoor.deletions import Deletions
from scheduler.frontdoor.fields import Violations, page_token, storable_text
from scheduler.frontdoor.gate import caller
from scheduler.frontdoor.messages import timestamp
from scheduler.link import SchedulerLink
from scheduler.metrics import AdminAction
from scheduler.refusals import SecretShownOnce, UnknownKey
from scheduler.store import accounts as store
from scheduler.store.pool import Pool


@dataclass(frozen=True, kw_only=True)
class AccountDeeds:
    """The methods of AdminService about accounts and keys. `clock` returns the present time, aware."""

    pool: Pool
    link: SchedulerLink
    deeds: Deeds
    deletions: Deletions
    doorman: Doorman
    clock: Callable[[], datetime]

    async def create(self, request: admin_pb2.CreateAccountRequest) -> admin_pb2.AdminAccount:
        """Open an account on a plan."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        account_id = request.account_id or f"a-{secrets.token_hex(6)}"
        violations.new_account_id("account_id", account_id)
        plan = violations.plan("plan", request.plan)
        reason = violations.reason(request.reason)
        violations.refuse()

        async def created(deed: Deed) -> admin_pb2.AdminAccount:
            await ledger_accounts.create(deed.connection, account_id, plan, deed.at)
            await store.create_account(deed.connection, account_id)
            answer = admin_pb2.AdminAccount(
                name=messages.account_name(account_id),
                plan=messages.plan_name(plan),
                create_time=timestamp(deed.at),
            )
            await deed.record(target=answer.name, reason=reason, before=None, after={"plan": plan})
            return answer

        return await self.deeds.do(
            AdminAction.CREATE_ACCOUNT, request, request_id, admin_pb2.AdminAccount, created
        )

    async def get(self, request: admin_pb2.GetAccountRequest) -> admin_pb2.AdminAccount:
        """Return an account with its balance. Raises UnknownAccount."""
        violations = Violations()
        account_id = violations.named_account("name", request.name)
        violations.refuse()
        return await self._account(account_id)

    async def list(self, request: admin_pb2.ListAccountsRequest) -> admin_pb2.ListAccountsResponse:
        """Return a page of accounts in the order of their ids."""
        violations = Violations()
        plan = violations.plan("plan", request.plan) if request.plan else None
        limit = violations.ledger_page_size(request.page_size)
        binding = ("accounts", plan)
        after = violations.page_token(request.page_token, binding, _account)
        violations.refuse()
        async with self.pool.reading() as connection:
            listed = await store.records(connection, plan=plan, after=after or "", limit=limit + 1)
        page = listed[:limit]
        return admin_pb2.ListAccountsResponse(
            accounts=[messages.admin_account(record) for record in page],
            next_page_token=page_token({"account": page[-1].account_id}, binding)
            if len(listed) > limit
            else "",
        )

    async def erase(self, request: admin_pb2.EraseAccountRequest) -> admin_pb2.AdminAccount:
        """Block an account, cancel its jobs and delete its keys; its jobs are deleted as they end.

        With the last of them it loses its id. Repeated, it returns the account as it is now; another request
        finds nobody, or raises AccountErased where it names the account by its other id.
        """
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        account_id = violations.named_account("name", request.name)
        if account_id == caller().account_id:
            violations.add(
                "name", "name is the account of the key you call with; another admin has to erase it."
            )
        reason = violations.reason(request.reason)
        violations.refuse()
        cancelled: list[str] = []
        async with self.deeds.open(AdminAction.ERASE_ACCOUNT, request, request_id) as deed:
            if deed.first_answer is None:
                cancelled = await intake.withdraw_all(
                    deed.connection,
                    account_id,
                    deed.at,
                    "Cancelled before it started: its account was erased.",
                )
                record = await store.record(deed.connection, account_id)
                assert record is not None, "withdraw_all has locked it"
                if record.erased_at is not None:
                    raise AccountErased(account_id=account_id)
                await store.forget(deed.connection, account_id)
                name = messages.account_name(account_id)
                await deed.record(target=name, reason=reason, before=None, after={"erased": True})
                deed.answer = {"name": name}
            else:
                # Not what was asked for: the answer was given the account's other id with everything else.
                account_id = deed.first_answer["name"].removeprefix(messages.account_name(""))
        self.doorman.forget(account_id)
        self.link.jobs_changed(cancelled)
        return await self._account(await self.deletions.erase(account_id) or account_id)

    async def create_key(self, request: admin_pb2.CreateApiKeyRequest) -> admin_pb2.ApiKey:
        """Make a key. Raises SecretShownOnce when the request is repeated."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        account_id = violations.named_account("account", request.account)
        role = messages.ROLE_OF.get(request.role)
        if role is None:
            violations.add("role", "role must be user, moderator, operator or admin.")
        reason = violations.reason(request.reason)
        violations.refuse()
        assert role is not None, "whatever made it None is a violation"
        async with self.deeds.open(AdminAction.CREATE_API_KEY, request, request_id) as deed:
            if deed.first_answer is not None:
                raise SecretShownOnce(key_id=deed.first_answer["key_id"])
            if await store.settings(deed.connection, account_id) is None:
                raise UnknownAccount(account_id=account_id)
            key = await store.create_key(deed.connection, account_id, role)
            name = messages.key_name(account_id, key.key_id)
            await deed.record(target=name, reason=reason, before=None, after={"role": role.value})
            deed.answer = {"key_id": key.key_id}
        return admin_pb2.ApiKey(
            name=name,
            role=messages.role(role),
            create_time=timestamp(key.created_at),
            secret=key.secret,
        )

    async def list_keys(self, request: admin_pb2.ListApiKeysRequest) -> admin_pb2.ListApiKeysResponse:
        """Return an account's keys, revoked ones included, oldest first. Raises UnknownAccount."""
        violations = Violations()
        account_id = violations.named_account("account", request.account)
        violations.refuse()
        async with self.pool.reading() as connection:
            if await store.settings(connection, account_id) is None:
                raise UnknownAccount(account_id=account_id)
            keys = await store.keys(connection, account_id)
        return admin_pb2.ListApiKeysResponse(keys=[messages.api_key(key) for key in keys])

    async def revoke_key(self, request: admin_pb2.RevokeApiKeyRequest) -> admin_pb2.ApiKey:
        """End a key: nobody is let in with it here, nor within a second elsewhere. Raises UnknownKey."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        key = violations.key("name", request.name)
        reason = violations.reason(request.reason)
        violations.refuse()
        assert key is not None, "whatever made it None is a violation"

        async def ended(deed: Deed) -> admin_pb2.ApiKey:
            revoked = await store.revoke_key(deed.connection, key.account_id, key.key_id, deed.at)
            if revoked is None:
                raise UnknownKey(account_id=key.account_id, key_id=key.key_id)
            answer = messages.api_key(revoked)
            await deed.record(
                target=answer.name,
                reason=reason,
                before={"role": revoked.role.value},
                after={"role": revoked.role.value, "revoked": True},
            )
            return answer

        answer = await self.deeds.do(AdminAction.REVOKE_API_KEY, request, request_id, admin_pb2.ApiKey, ended)
        self.doorman.forget(key.account_id)
        return answer

    async def _account(self, account_id: str) -> admin_pb2.AdminAccount:
        async with self.pool.transaction() as connection:
            # First: it opens a new period, which may begin with another plan.
            balance = await ledger.balance(connection, account_id, self.clock())
            record = await store.record(connection, account_id)
        assert record is not None, "an account of the ledger is one of the scheduler"
        return messages.admin_account(record, balance)


def _account(token: Mapping[str, Any]) -> str:
    return storable_text(token["account"])
