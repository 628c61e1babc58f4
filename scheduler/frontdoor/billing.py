"""BillingService: an account in the ledger, for its owner and for admins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from google.protobuf import json_format

from billing import accounts as ledger_accounts
from billing import idempotency, ledger, plan_changes, statements
from billing.refusals import UnknownAccount
from billing.statements import TransferPlace
from billing.v1 import billing_pb2, billing_pb2_grpc
from scheduler.frontdoor import ledger_messages, messages
from scheduler.frontdoor.fields import Violations, digest, page_token, whole_number
from scheduler.frontdoor.gate import caller
from scheduler.link import SchedulerLink
from scheduler.metrics import FrontDoorMetrics
from scheduler.refusals import NotFoundOrNotYours
from scheduler.store.pool import Pool

_Context = grpc.aio.ServicerContext[Any, Any]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US = timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True)
class BillingService(billing_pb2_grpc.BillingServiceServicer):
    """The methods of billing.v1.BillingService. `clock` returns the present time, aware."""

    pool: Pool
    link: SchedulerLink
    metrics: FrontDoorMetrics
    clock: Callable[[], datetime]

    async def GetBalance(  # noqa: N802
        self, request: billing_pb2.GetBalanceRequest, context: _Context
    ) -> billing_pb2.Balance:
        """Return fast time left, held and used in the present period; of another account only to admins."""
        violations = Violations()
        account_id = _readable_account(request.account, violations)
        async with self.pool.transaction() as connection:
            try:
                return messages.balance(await ledger.balance(connection, account_id, self.clock()))
            except UnknownAccount as unknown:
                raise NotFoundOrNotYours from unknown

    async def ListTransfers(  # noqa: N802
        self, request: billing_pb2.ListTransfersRequest, context: _Context
    ) -> billing_pb2.ListTransfersResponse:
        """Return a page of an account's journal, newest first; of another account only to admins."""
        violations = Violations()
        limit = violations.ledger_page_size(request.page_size)
        binding = ("transfers", request.account)
        after = violations.page_token(request.page_token, binding, _transfer_place)
        account_id = _readable_account(request.account, violations)
        async with self.pool.reading() as connection:
            try:
                listed = await statements.transfers(connection, account_id, after=after, limit=limit + 1)
            except UnknownAccount as unknown:
                raise NotFoundOrNotYours from unknown
        page = listed[:limit]
        return billing_pb2.ListTransfersResponse(
            transfers=[ledger_messages.transfer(one, account_id) for one in page],
            next_page_token=page_token(_transfer_token(page[-1]), binding) if len(listed) > limit else "",
        )

    async def GetStatement(  # noqa: N802
        self, request: billing_pb2.GetStatementRequest, context: _Context
    ) -> billing_pb2.Statement:
        """Return one period, line by line; of another account only to admins."""
        violations = Violations()
        moment = violations.time("at", request.at) if request.HasField("at") else None
        account_id = _readable_account(request.account, violations)
        now = self.clock()
        async with self.pool.transaction() as connection:
            try:
                terms = (await ledger_accounts.terms(connection, [account_id], now))[account_id]
            except UnknownAccount as unknown:
                raise NotFoundOrNotYours from unknown
        async with self.pool.snapshot() as connection:
            return ledger_messages.statement(await statements.statement(connection, terms, moment, now))

    async def PreviewPlanChange(  # noqa: N802
        self, request: billing_pb2.PreviewPlanChangeRequest, context: _Context
    ) -> billing_pb2.PlanChange:
        """Return what a change of plan would give and cost now; of another account only to admins.

        Those who are none get only plans that are open to it: see PlanNotSelfService.
        """
        violations = Violations()
        plan = violations.plan("plan", request.plan)
        account_id = _readable_account(request.account, violations)
        by_itself = not caller().is_admin
        async with self.pool.transaction() as connection:
            try:
                change = await plan_changes.preview(
                    connection, account_id, plan, self.clock(), by_itself=by_itself
                )
            except UnknownAccount as unknown:
                raise NotFoundOrNotYours from unknown
        return ledger_messages.plan_change(change)

    async def ChangePlan(  # noqa: N802
        self, request: billing_pb2.ChangePlanRequest, context: _Context
    ) -> billing_pb2.PlanChange:
        """Move an account to another plan; another's only for admins, who say why, and have any plan."""
        principal = caller()
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        plan = violations.plan("plan", request.plan)
        etag = violations.etag_of_preview(request.etag)
        account_id = violations.account("account", request.account, own=principal.account_id)
        own = account_id == principal.account_id
        reason = _OWN_REASON if own and not request.reason else violations.reason(request.reason)
        violations.refuse()
        if not principal.reads_account(account_id):
            raise NotFoundOrNotYours
        async with self.pool.transaction() as connection:
            outcome = await idempotency.claim(
                connection, principal.account_id, "ChangePlan", request_id, digest(request)
            )
            if outcome is None:
                try:
                    change = await plan_changes.change(
                        connection,
                        account_id,
                        plan,
                        etag=etag,
                        actor=principal.actor,
                        reason=reason,
                        request_id=request_id,
                        at=self.clock(),
                        by_itself=not principal.is_admin,
                    )
                except UnknownAccount as unknown:
                    raise NotFoundOrNotYours from unknown
                answer = ledger_messages.plan_change(change)
                await idempotency.store(
                    connection,
                    principal.account_id,
                    "ChangePlan",
                    request_id,
                    json_format.MessageToDict(answer),
                )
            else:
                answer = json_format.ParseDict(outcome, billing_pb2.PlanChange())
        if outcome is not None:
            self.metrics.replayed("ChangePlan")
        # Told also of a repeated request: the front door that did it may have died before it told.
        self.link.accounts_changed([account_id])
        return answer


_OWN_REASON = "asked for by the account itself"


def _readable_account(name: str, violations: Violations) -> str:
    """Return the account that a request is about, if nothing is wrong with it and the caller may see it."""
    principal = caller()
    account_id = violations.account("account", name, own=principal.account_id)
    violations.refuse()
    if not principal.reads_account(account_id):
        raise NotFoundOrNotYours
    return account_id


def _transfer_token(of: statements.Transfer) -> dict[str, int]:
    # Whole microseconds: PostgreSQL's own precision, so that no row is shown twice or skipped.
    return {"at_us": (of.at - _EPOCH) // _US, "number": of.transfer_id}


def _transfer_place(token: Mapping[str, Any]) -> TransferPlace:
    number = whole_number(token["number"])
    if not 0 < number < 2**63:
        raise ValueError("no row has this number")
    return TransferPlace(at=_EPOCH + whole_number(token["at_us"]) * _US, transfer_id=number)
