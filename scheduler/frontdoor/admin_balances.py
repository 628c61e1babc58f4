"""What admins do with an account's time and money: they grant, take, give back, and undo what was done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from billing import admin, ledger, plan_undo, refund_undo, refunds
from billing.entries import Source
from billing.refusals import NoRefundToUndo, NothingCharged, Refusal
from billing.v1 import admin_pb2, billing_pb2
from scheduler.frontdoor import ledger_messages
from scheduler.frontdoor.deeds import Deed, Deeds
from scheduler.frontdoor.fields import OWN, JobName, Violations
from scheduler.frontdoor.messages import balance as balance_message
from scheduler.link import SchedulerLink
from scheduler.metrics import AdminAction
from scheduler.store import jobs
from scheduler.store.pool import Connection

# Far beyond any use, and far within the bigints in which the ledger adds such numbers up.
_LARGEST = 2**53

_SOURCE = {
    admin_pb2.GRANT_SOURCE_UNSPECIFIED: Source.ADMIN,
    admin_pb2.GRANT_SOURCE_ADMIN: Source.ADMIN,
    admin_pb2.GRANT_SOURCE_PROMO: Source.PROMO,
    admin_pb2.GRANT_SOURCE_PURCHASE: Source.PURCHASE,
}


@dataclass(frozen=True, kw_only=True)
class BalanceDeeds:
    """The methods of AdminService that move time and money. `clock` returns the present time, aware."""

    link: SchedulerLink
    deeds: Deeds
    clock: Callable[[], datetime]

    async def adjust(self, request: admin_pb2.AdjustBalanceRequest) -> billing_pb2.Balance:
        """Grant or take fast time. Raises UnknownAccount, UnknownGrant or AdjustmentTooLarge."""
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
        source = _SOURCE.get(request.source)
        if source is None:
            violations.add("source", "source must be admin, promo or purchase.")
        elif request.source and request.amount_ms < 0:
            violations.add("source", "source is for time that is granted; leave it out when taking.")
        if request.undoes < 0 or (request.undoes and request.amount_ms > 0):
            violations.add(
                "undoes",
                "undoes must be the number of the audit event of a grant, and is for time that is taken.",
            )
        reason = violations.reason(request.reason)
        violations.refuse()
        assert source is not None, "whatever made it None is a violation"

        async def adjusted(deed: Deed) -> billing_pb2.Balance:
            balance = await admin.adjust_balance(
                deed.connection,
                account_id,
                request.amount_ms,
                deed.actor,
                reason,
                request_id,
                expires_at,
                deed.at,
                source=source,
                undoes=request.undoes or None,
            )
            return balance_message(balance)

        answer = await self.deeds.do(
            AdminAction.ADJUST_BALANCE, request, request_id, billing_pb2.Balance, adjusted
        )
        # Told also of a repeated request: the front door that did it may have died before it told.
        self.link.accounts_changed([account_id])
        return answer

    async def refund(self, request: admin_pb2.RefundJobRequest) -> admin_pb2.Refund:
        """Give back what a job was charged. Raises NothingCharged or RefundTooLarge."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        name = violations.job("job", request.job)
        if not 0 <= request.amount_ms <= _LARGEST:
            violations.add(
                "amount_ms",
                f"amount_ms must be 1 to {_LARGEST} milliseconds of the billed time, or 0 for all of it.",
            )
        reason = violations.reason(request.reason)
        violations.refuse()
        assert name is not None, "whatever made it None is a violation"

        async def refunded(deed: Deed) -> admin_pb2.Refund:
            account_id = await _owner(deed.connection, name, NothingCharged(job_id=name.job_id))
            given_back = await refunds.refund(
                deed.connection,
                account_id=account_id,
                job_id=name.job_id,
                amount_ms=request.amount_ms or None,
                actor=deed.actor,
                reason=reason,
                request_id=request_id,
                at=deed.at,
            )
            balance = await ledger.balance(deed.connection, account_id, deed.at)
            return ledger_messages.refund(given_back, account_id, name.job_id, balance)

        answer = await self.deeds.do(AdminAction.REFUND_JOB, request, request_id, admin_pb2.Refund, refunded)
        # Told also of a repeated request: the front door that did it may have died before it told.
        self.link.accounts_changed([_account_of(answer.balance)])
        return answer

    async def undo_refund(self, request: admin_pb2.UndoRefundRequest) -> admin_pb2.RefundUndo:
        """Take a job's newest refund back, or with `validate_only` say what that would do.

        Raises UnknownAccount, NoRefundToUndo, RefundSpent or EtagMismatch.
        """
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        name = violations.job("job", request.job)
        etag = violations.etag_of_preview(request.etag)
        reason = violations.reason(request.reason)
        violations.refuse()
        assert name is not None, "whatever made it None is a violation"

        async def undone(deed: Deed) -> admin_pb2.RefundUndo:
            account_id = await _owner(deed.connection, name, NoRefundToUndo(job_id=name.job_id))
            undo = await refund_undo.undo(
                deed.connection,
                account_id=account_id,
                job_id=name.job_id,
                etag=etag,
                actor=deed.actor,
                reason=reason,
                request_id=request_id,
                at=deed.at,
            )
            balance = await ledger.balance(deed.connection, account_id, deed.at)
            return ledger_messages.refund_undo(undo, account_id, name.job_id, balance)

        answer = await self.deeds.do(
            AdminAction.UNDO_REFUND,
            request,
            request_id,
            admin_pb2.RefundUndo,
            undone,
            rehearse=request.validate_only,
        )
        if not request.validate_only:
            # Told also of a repeated request: the front door that did it may have died before it told.
            self.link.accounts_changed([_account_of(answer.balance)])
        return answer

    async def undo_plan_change(self, request: admin_pb2.UndoPlanChangeRequest) -> admin_pb2.PlanUndo:
        """Take an account's newest change of plan back, or with `validate_only` say what that would do.

        Raises UnknownAccount, NothingToUndo or EtagMismatch.
        """
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        account_id = violations.named_account("account", request.account)
        etag = violations.etag_of_preview(request.etag)
        reason = violations.reason(request.reason)
        violations.refuse()

        async def undone(deed: Deed) -> admin_pb2.PlanUndo:
            undo = await plan_undo.undo(
                deed.connection,
                account_id,
                etag=etag,
                actor=deed.actor,
                reason=reason,
                request_id=request_id,
                at=deed.at,
            )
            return ledger_messages.plan_undo(undo, await ledger.balance(deed.connection, account_id, deed.at))

        answer = await self.deeds.do(
            AdminAction.UNDO_PLAN_CHANGE,
            request,
            request_id,
            admin_pb2.PlanUndo,
            undone,
            rehearse=request.validate_only,
        )
        if not request.validate_only:
            # Told also of a repeated request: the front door that did it may have died before it told.
            self.link.accounts_changed([account_id])
        return answer


async def _owner(connection: Connection, job: JobName, unknown: Refusal) -> str:
    """Return whose a job is, by its name or by its row; raises `unknown` where neither says."""
    if job.account_id != OWN:
        return job.account_id
    owner = await jobs.owner(connection, job.job_id)
    if owner is None:
        raise unknown
    return owner


def _account_of(balance: billing_pb2.Balance) -> str:
    return balance.account.removeprefix(ledger_messages.account_name(""))
