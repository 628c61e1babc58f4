"""AdminService: accounts, keys, plans and grants. Every change has a reason and leaves an audit event.

A repeated request returns its first answer, with one exception: the secret of a key was in the first answer
and nowhere else, so a repeated CreateApiKey is refused with SECRET_SHOWN_ONCE and names the key.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc
from google.protobuf import json_format

from billing import accounts as ledger_accounts
from billing import admin, plans
from billing.plans import EffectiveFrom, PlanFields, PlanLimits
from billing.refusals import UnknownAccount
from billing.v1 import admin_pb2, admin_pb2_grpc, billing_pb2
from scheduler.frontdoor import messages
from scheduler.frontdoor.deeds import Deeds
from scheduler.frontdoor.fields import Violations
from scheduler.link import SchedulerLink
from scheduler.metrics import AdminAction
from scheduler.refusals import SecretShownOnce
from scheduler.store import accounts as store
from scheduler.store.pool import Pool

ACTION_OF = {
    "/billing.v1.AdminService/CreateAccount": AdminAction.CREATE_ACCOUNT,
    "/billing.v1.AdminService/CreateApiKey": AdminAction.CREATE_API_KEY,
    "/billing.v1.AdminService/UpdatePlan": AdminAction.UPDATE_PLAN,
    "/billing.v1.AdminService/AdjustBalance": AdminAction.ADJUST_BALANCE,
}

_Context = grpc.aio.ServicerContext[Any, Any]

# Far beyond any use, and far within the bigints in which the ledger adds such numbers up.
_LARGEST = 2**53
_LARGEST_INT = 2**31 - 1
# Ten times, and 10,000 units of the currency for a minute. The ledger multiplies milliseconds, after the
# multiplier, by the price: for the longest job there may be, of ten minutes, that is 6e16, and a bigint ends
# at 9e18. Beyond it the scheduler could start no job at all: one hold it cannot write fails its whole batch.
_LARGEST_MULTIPLIER_BP = 100_000
_LARGEST_PRICE = 10_000_000_000

_EFFECTIVE_FROM = {
    admin_pb2.EFFECTIVE_FROM_NEXT_PERIOD: EffectiveFrom.NEXT_PERIOD,
    admin_pb2.EFFECTIVE_FROM_NOW: EffectiveFrom.NOW,
}


@dataclass(frozen=True, kw_only=True)
class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """The methods of billing.v1.AdminService. `clock` returns the present time, aware."""

    pool: Pool
    link: SchedulerLink
    deeds: Deeds
    clock: Callable[[], datetime]

    async def CreateAccount(  # noqa: N802
        self, request: admin_pb2.CreateAccountRequest, context: _Context
    ) -> admin_pb2.AdminAccount:
        """Open an account on a plan."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        account_id = request.account_id or f"a-{secrets.token_hex(6)}"
        violations.new_account_id("account_id", account_id)
        plan = violations.plan("plan", request.plan)
        reason = violations.reason(request.reason)
        violations.refuse()
        async with self.deeds.open(AdminAction.CREATE_ACCOUNT, request, request_id) as deed:
            if deed.first_answer is not None:
                return json_format.ParseDict(deed.first_answer, admin_pb2.AdminAccount())
            await ledger_accounts.create(deed.connection, account_id, plan, deed.at)
            await store.create_account(deed.connection, account_id)
            answer = admin_pb2.AdminAccount(
                name=f"accounts/{account_id}", plan=f"plans/{plan}", create_time=messages.timestamp(deed.at)
            )
            await deed.record(target=answer.name, reason=reason, before=None, after={"plan": plan})
            deed.answer = json_format.MessageToDict(answer)
        return answer

    async def CreateApiKey(  # noqa: N802
        self, request: admin_pb2.CreateApiKeyRequest, context: _Context
    ) -> admin_pb2.ApiKey:
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
            name = f"accounts/{account_id}/keys/{key.key_id}"
            await deed.record(target=name, reason=reason, before=None, after={"role": role.value})
            deed.answer = {"key_id": key.key_id}
        return admin_pb2.ApiKey(
            name=name,
            role=messages.role(role),
            create_time=messages.timestamp(key.created_at),
            secret=key.secret,
        )

    async def ListPlans(  # noqa: N802
        self, request: admin_pb2.ListPlansRequest, context: _Context
    ) -> admin_pb2.ListPlansResponse:
        """Return the newest version of every plan."""
        async with self.pool.reading() as connection:
            newest = await plans.all_newest(connection)
        return admin_pb2.ListPlansResponse(plans=[messages.plan(version) for version in newest])

    async def UpdatePlan(self, request: admin_pb2.UpdatePlanRequest, context: _Context) -> admin_pb2.Plan:  # noqa: N802
        """Make a new version of a plan."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        fields = _plan_fields(request.plan, violations)
        if not request.plan.etag:
            violations.add("plan.etag", "plan.etag must be that of the version you read and mean to replace.")
        effective_from = _EFFECTIVE_FROM.get(request.effective_from)
        if effective_from is None:
            violations.add("effective_from", "effective_from must be next period or now.")
        reason = violations.reason(request.reason)
        violations.refuse()
        assert effective_from is not None, "whatever made it None is a violation"
        async with self.deeds.open(AdminAction.UPDATE_PLAN, request, request_id) as deed:
            if deed.first_answer is None:
                version = await plans.update(
                    deed.connection,
                    fields,
                    etag=request.plan.etag,
                    effective_from=effective_from,
                    actor=deed.actor,
                    reason=reason,
                    request_id=request_id,
                    at=deed.at,
                )
                answer = messages.plan(version)
                deed.answer = json_format.MessageToDict(answer)
            else:
                answer = json_format.ParseDict(deed.first_answer, admin_pb2.Plan())
            known = await store.accounts_known_to_scheduler(deed.connection)
        # Told also of a repeated request: the front door that did it may have died before it told.
        self.link.accounts_changed(known)
        return answer

    async def AdjustBalance(  # noqa: N802
        self, request: admin_pb2.AdjustBalanceRequest, context: _Context
    ) -> billing_pb2.Balance:
        """Grant or take fast time."""
        now = self.clock()
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        account_id = violations.named_account("account", request.account)
        if request.amount_ms == 0 or abs(request.amount_ms) > _LARGEST:
            violations.add(
                "amount_ms",
                "amount_ms must be 1 or more GPU milliseconds to grant, -1 or less to take unused ones, and "
                f"at most {_LARGEST} either way.",
            )
        expires_at = None
        if request.HasField("expire_time"):
            expires_at = violations.time("expire_time", request.expire_time)
            if expires_at is not None and expires_at <= now:
                violations.add(
                    "expire_time",
                    "expire_time must lie in the future; leave it out for time that does not expire.",
                )
            if request.amount_ms < 0:
                violations.add(
                    "expire_time", "expire_time is for time that is granted; leave it out when taking."
                )
        reason = violations.reason(request.reason)
        violations.refuse()
        async with self.deeds.open(AdminAction.ADJUST_BALANCE, request, request_id) as deed:
            if deed.first_answer is None:
                balance = await admin.adjust_balance(
                    deed.connection,
                    account_id,
                    request.amount_ms,
                    deed.actor,
                    reason,
                    request_id,
                    expires_at,
                    deed.at,
                )
                answer = messages.balance(balance)
                deed.answer = json_format.MessageToDict(answer)
            else:
                answer = json_format.ParseDict(deed.first_answer, billing_pb2.Balance())
        # Told also of a repeated request: the front door that did it may have died before it told.
        self.link.accounts_changed([account_id])
        return answer


def _plan_fields(plan: admin_pb2.Plan, violations: Violations) -> PlanFields:
    def within(field: str, value: int, least: int, most: int) -> int:
        if not least <= value <= most:
            violations.add(f"plan.{field}", f"plan.{field} must be {least} to {most}.")
        return value

    currency = plan.currency_code
    if not (len(currency) == 3 and currency.isascii() and currency.isalpha() and currency.isupper()):
        violations.add("plan.currency_code", "plan.currency_code must be three capital letters, as USD.")
    return PlanFields(
        plan=violations.plan("plan.name", plan.name),
        quota_ms=within("quota_ms", plan.quota_ms, 0, _LARGEST),
        limits=PlanLimits(
            running=within("limits.running", plan.limits.running, 1, _LARGEST_INT),
            relax_running=within("limits.relax_running", plan.limits.relax_running, 0, _LARGEST_INT),
            accepted=within("limits.accepted", plan.limits.accepted, 1, _LARGEST_INT),
        ),
        relax_weight_milli=within("relax_weight_milli", plan.relax_weight_milli, 1, 1_000_000),
        private_allowed=plan.private_allowed,
        private_multiplier_bp=within(
            "private_multiplier_bp", plan.private_multiplier_bp, 1, _LARGEST_MULTIPLIER_BP
        ),
        overage_micros_per_minute=within(
            "overage_micros_per_minute", plan.overage_micros_per_minute, 0, _LARGEST_PRICE
        ),
        currency=currency,
    )
