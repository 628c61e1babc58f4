"""AdminService: accounts, keys, plans, time and money. Every change has a reason and leaves an audit event.

A repeated request returns its first answer, with two exceptions. The secret of a key was in the first answer
and nowhere else, so a repeated CreateApiKey is refused with SECRET_SHOWN_ONCE and names the key. And an
account that was erased is answered as it is now: its name changes with the end of its last job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from billing.v1 import admin_pb2, admin_pb2_grpc, billing_pb2
from scheduler.frontdoor.admin_accounts import AccountDeeds
from scheduler.frontdoor.admin_balances import BalanceDeeds
from scheduler.frontdoor.admin_plans import PlanDeeds
from scheduler.frontdoor.admin_records import Records
from scheduler.metrics import AdminAction

ACTION_OF = {
    "/billing.v1.AdminService/CreateAccount": AdminAction.CREATE_ACCOUNT,
    "/billing.v1.AdminService/EraseAccount": AdminAction.ERASE_ACCOUNT,
    "/billing.v1.AdminService/CreateApiKey": AdminAction.CREATE_API_KEY,
    "/billing.v1.AdminService/RevokeApiKey": AdminAction.REVOKE_API_KEY,
    "/billing.v1.AdminService/CreatePlan": AdminAction.CREATE_PLAN,
    "/billing.v1.AdminService/UpdatePlan": AdminAction.UPDATE_PLAN,
    "/billing.v1.AdminService/AdjustBalance": AdminAction.ADJUST_BALANCE,
    "/billing.v1.AdminService/RefundJob": AdminAction.REFUND_JOB,
    "/billing.v1.AdminService/UndoRefund": AdminAction.UNDO_REFUND,
    "/billing.v1.AdminService/UndoPlanChange": AdminAction.UNDO_PLAN_CHANGE,
}

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """The methods of billing.v1.AdminService, each with those of its kind."""

    accounts: AccountDeeds
    plans: PlanDeeds
    balances: BalanceDeeds
    records: Records

    async def CreateAccount(  # noqa: N802
        self, request: admin_pb2.CreateAccountRequest, context: _Context
    ) -> admin_pb2.AdminAccount:
        """Open an account on a plan."""
        return await self.accounts.create(request)

    async def GetAccount(  # noqa: N802
        self, request: admin_pb2.GetAccountRequest, context: _Context
    ) -> admin_pb2.AdminAccount:
        """Return an account with its balance."""
        return await self.accounts.get(request)

    async def ListAccounts(  # noqa: N802
        self, request: admin_pb2.ListAccountsRequest, context: _Context
    ) -> admin_pb2.ListAccountsResponse:
        """Return a page of accounts."""
        return await self.accounts.list(request)

    async def EraseAccount(  # noqa: N802
        self, request: admin_pb2.EraseAccountRequest, context: _Context
    ) -> admin_pb2.AdminAccount:
        """Delete what an account made and what says who it was."""
        return await self.accounts.erase(request)

    async def CreateApiKey(  # noqa: N802
        self, request: admin_pb2.CreateApiKeyRequest, context: _Context
    ) -> admin_pb2.ApiKey:
        """Make a key."""
        return await self.accounts.create_key(request)

    async def ListApiKeys(  # noqa: N802
        self, request: admin_pb2.ListApiKeysRequest, context: _Context
    ) -> admin_pb2.ListApiKeysResponse:
        """Return an account's keys."""
        return await self.accounts.list_keys(request)

    async def RevokeApiKey(  # noqa: N802
        self, request: admin_pb2.RevokeApiKeyRequest, context: _Context
    ) -> admin_pb2.ApiKey:
        """End a key."""
        return await self.accounts.revoke_key(request)

    async def CreatePlan(self, request: admin_pb2.CreatePlanRequest, context: _Context) -> admin_pb2.Plan:  # noqa: N802
        """Make a plan."""
        return await self.plans.create(request)

    async def GetPlan(self, request: admin_pb2.GetPlanRequest, context: _Context) -> admin_pb2.Plan:  # noqa: N802
        """Return a version of a plan."""
        return await self.plans.get(request)

    async def ListPlans(  # noqa: N802
        self, request: admin_pb2.ListPlansRequest, context: _Context
    ) -> admin_pb2.ListPlansResponse:
        """Return the newest version of every plan."""
        return await self.plans.list(request)

    async def UpdatePlan(self, request: admin_pb2.UpdatePlanRequest, context: _Context) -> admin_pb2.Plan:  # noqa: N802
        """Make a new version of a plan, or say what it would do."""
        return await self.plans.update(request)

    async def AdjustBalance(  # noqa: N802
        self, request: admin_pb2.AdjustBalanceRequest, context: _Context
    ) -> billing_pb2.Balance:
        """Grant or take fast time."""
        return await self.balances.adjust(request)

    async def RefundJob(self, request: admin_pb2.RefundJobRequest, context: _Context) -> admin_pb2.Refund:  # noqa: N802
        """Give back what a job was charged."""
        return await self.balances.refund(request)

    async def UndoRefund(  # noqa: N802
        self, request: admin_pb2.UndoRefundRequest, context: _Context
    ) -> admin_pb2.RefundUndo:
        """Take a refund of a job back, or say what that would do."""
        return await self.balances.undo_refund(request)

    async def UndoPlanChange(  # noqa: N802
        self, request: admin_pb2.UndoPlanChangeRequest, context: _Context
    ) -> admin_pb2.PlanUndo:
        """Take a change of an account's plan back, or say what that would do."""
        return await self.balances.undo_plan_change(request)

    async def ListAuditEvents(  # noqa: N802
        self, request: admin_pb2.ListAuditEventsRequest, context: _Context
    ) -> admin_pb2.ListAuditEventsResponse:
        """Return a page of what admins and operators did."""
        return await self.records.audit_events(request)

    async def CheckInvariants(  # noqa: N802
        self, request: admin_pb2.CheckInvariantsRequest, context: _Context
    ) -> admin_pb2.CheckInvariantsResponse:
        """Ask what must hold of the live database."""
        return await self.records.check(request)
