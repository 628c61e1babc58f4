"""AccountService: what an account may do, what it has, and how it wants its jobs to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc

from billing import accounts as ledger_accounts
from billing import idempotency, ledger
from billing.refusals import PlanLacksPrivate
from scheduler.frontdoor import ledger_messages, messages, translate
from scheduler.frontdoor.fields import Violations, digest
from scheduler.frontdoor.gate import caller
from scheduler.link import SchedulerLink
from scheduler.metrics import FrontDoorMetrics
from scheduler.refusals import NotFoundOrNotYours
from scheduler.store import accounts as store
from scheduler.store import jobs
from scheduler.store.accounts import Visibility
from scheduler.store.pool import Connection, Pool
from scheduler.v1 import account_pb2, account_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]
_CHANGEABLE = ("mode", "visibility", "overage_allowed", "spend_cap_micros")


@dataclass(frozen=True, kw_only=True)
class AccountService(account_pb2_grpc.AccountServiceServicer):
    """The methods of scheduler.v1.AccountService. `clock` returns the present time, aware."""

    pool: Pool
    link: SchedulerLink
    metrics: FrontDoorMetrics
    clock: Callable[[], datetime]

    async def GetAccount(  # noqa: N802
        self, request: account_pb2.GetAccountRequest, context: _Context
    ) -> account_pb2.Account:
        """Return everything `darkroom info` prints; of another account only to admins."""
        principal = caller()
        violations = Violations()
        account_id = violations.account("name", request.name, own=principal.account_id)
        violations.refuse()
        if not principal.reads_account(account_id):
            raise NotFoundOrNotYours
        async with self.pool.transaction() as connection:
            return await _account(connection, account_id, self.clock())

    async def UpdateAccount(  # noqa: N802
        self, request: account_pb2.UpdateAccountRequest, context: _Context
    ) -> account_pb2.Account:
        """Change what the mask names; repeated, change nothing and return the account as it is now."""
        principal = caller()
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        account_id = violations.account("account.name", request.account.name, own=principal.account_id)
        wanted = _wanted(request, violations)
        violations.refuse()
        if account_id != principal.account_id:
            raise NotFoundOrNotYours
        async with self.pool.transaction() as connection:
            outcome = await idempotency.claim(
                connection, account_id, "UpdateAccount", request_id, digest(request)
            )
            if outcome is None:
                await _change(connection, account_id, wanted, self.clock())
                await idempotency.store(connection, account_id, "UpdateAccount", request_id, {})
            account = await _account(connection, account_id, self.clock())
        if outcome is not None:
            self.metrics.replayed("UpdateAccount")
        # Consent may be what a held job waits for. Told also of a repeated request: the front door that did
        # it may have died before it told.
        self.link.accounts_changed([account_id])
        return account


def _wanted(request: account_pb2.UpdateAccountRequest, violations: Violations) -> Mapping[str, Any]:
    """Return the new value of each field in the mask."""
    if not request.update_mask.paths:
        violations.add("update_mask", f"update_mask must name what to change: {', '.join(_CHANGEABLE)}.")
    wanted: dict[str, Any] = {}
    for path in request.update_mask.paths:
        match path:
            case "mode":
                wanted[path] = translate.TIERS.get(request.account.mode)
                if wanted[path] is None:
                    violations.add("account.mode", "account.mode must be fast or relax.")
            case "visibility":
                wanted[path] = translate.VISIBILITIES.get(request.account.visibility)
                if wanted[path] is None:
                    violations.add("account.visibility", "account.visibility must be public or private.")
            case "overage_allowed":
                wanted[path] = request.account.overage_allowed
            case "spend_cap_micros":
                wanted[path] = request.account.spend_cap_micros
                if request.account.spend_cap_micros < 0:
                    violations.add(
                        "account.spend_cap_micros",
                        "account.spend_cap_micros must not be negative; 0 is for no cap.",
                    )
            case _:
                violations.add(
                    "update_mask",
                    f"update_mask names a field that cannot be changed; these can: {', '.join(_CHANGEABLE)}.",
                )
    return wanted


async def _change(connection: Connection, account_id: str, wanted: Mapping[str, Any], at: datetime) -> None:
    terms = await ledger_accounts.lock_terms(connection, account_id, at)
    if wanted.get("visibility") is Visibility.PRIVATE and not terms.private_allowed:
        raise PlanLacksPrivate(plan=terms.plan)
    if "overage_allowed" in wanted or "spend_cap_micros" in wanted:
        terms = await ledger_accounts.set_overage(
            connection, account_id, wanted.get("overage_allowed"), wanted.get("spend_cap_micros"), at
        )
    if wanted.get("overage_allowed"):
        await jobs.consent_to_overage(connection, account_id, terms.overage_micros_per_minute, terms.currency)
    if "mode" in wanted or "visibility" in wanted:
        await store.change_settings(
            connection, account_id, mode=wanted.get("mode"), visibility=wanted.get("visibility")
        )


async def _account(connection: Connection, account_id: str, at: datetime) -> account_pb2.Account:
    found = await jobs.settings_and_live_jobs(connection, account_id)
    if found is None:
        raise NotFoundOrNotYours
    settings, live = found
    terms = (await ledger_accounts.terms(connection, [account_id], at))[account_id]
    balance = await ledger.balance(connection, account_id, at)
    return account_pb2.Account(
        name=f"accounts/{account_id}",
        mode=messages.tier(settings.mode),
        visibility=messages.visibility(settings.visibility),
        overage_allowed=balance.overage_allowed,
        spend_cap_micros=balance.spend_cap_micros,
        balance=messages.balance(balance),
        jobs_running=live.running,
        jobs_waiting=live.waiting,
        limits=messages.limits(terms.limits),
        blocked=settings.blocked,
        scheduled_plan=ledger_messages.plan_name(terms.scheduled_plan),
    )
