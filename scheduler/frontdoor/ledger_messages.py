"""From the ledger's values to the messages of billing.v1."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC
from uuid import UUID

from billing.audit import AuditEvent
from billing.balances import Balance
from billing.invariants import InvariantResult
from billing.plan_changes import PlanChange
from billing.plan_undo import PlanUndo
from billing.plans import PlanImpact, PlanVersion
from billing.refund_undo import RefundUndone
from billing.refunds import Refunded
from billing.statements import Line, Statement, Transfer
from billing.v1 import admin_pb2, billing_pb2
from scheduler.frontdoor.messages import balance, job_name, limits, timestamp
from scheduler.store.accounts import AccountRecord, KeyRecord, Role

_ROLE: Mapping[Role, admin_pb2.Role.ValueType] = {
    Role.USER: admin_pb2.ROLE_USER,
    Role.MODERATOR: admin_pb2.ROLE_MODERATOR,
    Role.OPERATOR: admin_pb2.ROLE_OPERATOR,
    Role.ADMIN: admin_pb2.ROLE_ADMIN,
}
ROLE_OF: Mapping[int, Role] = {number: role for role, number in _ROLE.items()}


def account_name(account_id: str) -> str:
    """Return the resource name of an account."""
    return f"accounts/{account_id}"


def key_name(account_id: str, key_id: str) -> str:
    """Return the resource name of a key."""
    return f"accounts/{account_id}/keys/{key_id}"


def plan_name(plan: str | None) -> str:
    """Return the resource name of a plan; empty where there is none."""
    return f"plans/{plan}" if plan else ""


def role(value: Role) -> admin_pb2.Role.ValueType:
    """Return the API's name of a role."""
    return _ROLE[value]


def admin_account(of: AccountRecord, has: Balance | None = None) -> admin_pb2.AdminAccount:
    """Return an account as admins see it; without its balance in lists."""
    return admin_pb2.AdminAccount(
        name=account_name(of.account_id),
        plan=plan_name(of.plan),
        create_time=timestamp(of.created_at),
        scheduled_plan=plan_name(of.scheduled_plan),
        balance=None if has is None else balance(has),
        blocked=of.blocked,
        erase_time=timestamp(of.erased_at),
    )


def api_key(of: KeyRecord) -> admin_pb2.ApiKey:
    """Return a key, without its secret."""
    return admin_pb2.ApiKey(
        name=key_name(of.account_id, of.key_id),
        role=_ROLE[of.role],
        create_time=timestamp(of.created_at),
        revoke_time=timestamp(of.revoked_at),
    )


def plan(version: PlanVersion, impact: admin_pb2.PlanImpact | None = None) -> admin_pb2.Plan:
    """Return one version of a plan."""
    return admin_pb2.Plan(
        name=plan_name(version.plan),
        version=version.version,
        quota_ms=version.quota_ms,
        limits=limits(version.limits),
        relax_weight_milli=version.relax_weight_milli,
        private_allowed=version.private_allowed,
        private_multiplier_bp=version.private_multiplier_bp,
        overage_micros_per_minute=version.overage_micros_per_minute,
        currency_code=version.currency,
        etag=version.etag,
        price_micros=version.price_micros,
        rollover_ms=version.rollover_ms,
        gpu_class_bp=version.gpu_class_bp,
        self_service=version.self_service,
        picture_retention_days=version.picture_retention_days,
        impact=impact,
    )


def plan_impact(of: PlanImpact, over_limits: int) -> admin_pb2.PlanImpact:
    """Return whom a new version of a plan touches."""
    return admin_pb2.PlanImpact(
        accounts=of.accounts,
        granted_ms=of.granted_ms,
        revoked_ms=of.revoked_ms,
        accounts_cut_short=of.cut_short,
        accounts_over_limits=over_limits,
        accounts_behind=of.behind,
        picture_retention_days_before=of.retention_days_before,
        picture_retention_days_after=of.retention_days_after,
        first=[
            admin_pb2.AccountImpact(
                account=account_name(one.account_id),
                available_before_ms=one.available_before_ms,
                available_after_ms=one.available_after_ms,
            )
            for one in of.first
        ],
    )


def plan_change(of: PlanChange) -> billing_pb2.PlanChange:
    """Return what a change of plan gives and costs, with a sentence for a person."""
    return billing_pb2.PlanChange(
        account=account_name(of.account_id),
        from_plan=plan_name(of.from_plan),
        to_plan=plan_name(of.to_plan),
        effective_time=timestamp(of.effective_at),
        at_once=of.at_once,
        granted_ms=of.granted_ms,
        credit_micros=of.credit_micros,
        charge_micros=of.charge_micros,
        amount_micros=of.amount_micros,
        currency_code=of.currency,
        sentence=_sentence(of) + _retention_sentence(of),
        picture_retention_days_before=of.retention_days_before,
        picture_retention_days_after=of.retention_days_after,
        etag=of.etag,
    )


def _sentence(of: PlanChange) -> str:
    if of.from_plan == of.to_plan:
        return f"The plan stays {of.to_plan}; a change that was scheduled is taken back."
    if not of.at_once:
        return (
            f"From {of.effective_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC the plan is {of.to_plan}; until then "
            f"it stays {of.from_plan}, and nothing is to be paid now."
        )
    gained = f" {of.granted_ms / 60_000:,.1f} GPU-minutes more in this period," if of.granted_ms else ""
    credit, charge = (abs(micros) / 1_000_000 for micros in (of.credit_micros, of.charge_micros))
    amount = abs(of.amount_micros) / 1_000_000
    whose = "to pay" if of.amount_micros >= 0 else "in your favour"
    return (
        f"At once: {of.to_plan} instead of {of.from_plan},{gained} and {amount:,.2f} {of.currency} {whose} "
        f"({charge:,.2f} for the rest of the period on {of.to_plan}, less {credit:,.2f} on {of.from_plan})."
    )


def _retention_sentence(of: PlanChange) -> str:
    """Say whether pictures are kept for longer or not as long; empty where that stays as it is."""
    if of.retention_days_before == of.retention_days_after:
        return ""
    before, after = (
        f"for {days} days from the end of their job" if days else "for ever"
        for days in (of.retention_days_before, of.retention_days_after)
    )
    is_shorter = (of.retention_days_after or math.inf) < (of.retention_days_before or math.inf)
    loss = ": those that are older are gone for good" if is_shorter else ""
    return f" Pictures are then kept {after}, no longer {before}{loss}."


def transfer(of: Transfer, account_id: str) -> billing_pb2.Transfer:
    """Return one row of an account's journal."""
    return billing_pb2.Transfer(
        number=of.transfer_id,
        time=timestamp(of.at),
        kind=of.kind,
        code=of.code,
        debit_account=of.debit_account,
        credit_account=of.credit_account,
        amount=of.amount,
        unit=of.unit,
        job=_job(account_id, of.job_id),
        attempt_id=_text(of.attempt_id),
        pending_number=of.pending_id or 0,
    )


def statement(of: Statement) -> billing_pb2.Statement:
    """Return one period of an account."""
    return billing_pb2.Statement(
        account=account_name(of.account_id),
        plan=plan_name(of.plan),
        period_start=timestamp(of.period.start),
        period_end=timestamp(of.period.end),
        opening_ms=of.opening_ms,
        granted_ms=of.granted_ms,
        used_ms=of.used_ms,
        expired_ms=of.expired_ms,
        revoked_ms=of.revoked_ms,
        closing_ms=of.closing_ms,
        held_ms=of.held_ms,
        metered_ms=of.metered_ms,
        amount_micros=of.amounts.get(of.currency, 0),
        currency_code=of.currency,
        relax_ms=of.relax_ms,
        lines=[_line(line, of.account_id) for line in of.lines],
        amounts=[
            billing_pb2.Amount(currency_code=currency, micros=micros)
            for currency, micros in of.amounts.items()
        ],
    )


def _line(of: Line, account_id: str) -> billing_pb2.StatementLine:
    return billing_pb2.StatementLine(
        time=timestamp(of.at),
        sentence=of.sentence,
        job=_job(account_id, of.job_id),
        attempt_id=_text(of.attempt_id),
        measured_ms=of.measured_ms,
        multiplier_bp=of.multiplier_bp,
        fast_ms=of.fast_ms,
        metered_ms=of.metered_ms,
        amount_micros=of.amount_micros,
        currency_code=of.currency,
        relax_ms=of.relax_ms,
    )


def plan_undo(of: PlanUndo, has: Balance) -> admin_pb2.PlanUndo:
    """Return what taking a change of plan back takes and gives, with a sentence for a person."""
    return admin_pb2.PlanUndo(
        account=account_name(of.account_id),
        from_plan=plan_name(of.from_plan),
        to_plan=plan_name(of.to_plan),
        change_time=timestamp(of.changed_at),
        effective_time=timestamp(of.effective_at),
        at_once=of.at_once,
        revoked_ms=of.revoked_ms,
        kept_ms=of.kept_ms,
        amount_micros=of.amount_micros,
        currency_code=of.currency,
        sentence=_sentence_of_undo(of),
        etag=of.etag,
        balance=balance(has),
    )


def _sentence_of_undo(of: PlanUndo) -> str:
    if of.from_plan == of.to_plan:
        then = f"the plan stays {of.from_plan}"
    elif of.at_once:
        then = f"the plan is {of.to_plan} again at once"
    else:
        then = f"the plan is {of.to_plan} again from {of.effective_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    amount = f"{abs(of.amount_micros) / 1_000_000:,.2f} {of.currency}"
    money = f"{amount} to pay" if of.amount_micros > 0 else f"{amount} given back"
    kept = f", {of.kept_ms / 60_000:,.1f} stay: they are used, held or gone" if of.kept_ms else ""
    return (
        f"Of the change of {of.changed_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC: {then}; {money}; "
        f"{of.revoked_ms / 60_000:,.1f} GPU-minutes taken back{kept}."
    )


def refund(of: Refunded, account_id: str, job_id: str, has: Balance) -> admin_pb2.Refund:
    """Return what was given back of a job's charge, and what the account has after it."""
    return admin_pb2.Refund(
        job=job_name(account_id, job_id),
        refunded_ms=of.refunded_ms,
        refunded_micros=of.refunded_micros,
        refunded_in_all_ms=of.refunded_in_all_ms,
        billed_ms=of.billed_ms,
        balance=balance(has),
        currency_code=of.currency,
    )


def refund_undo(of: RefundUndone, account_id: str, job_id: str, has: Balance) -> admin_pb2.RefundUndo:
    """Return what taking a refund back charges again, and what the account has after it."""
    return admin_pb2.RefundUndo(
        job=job_name(account_id, job_id),
        refund_time=timestamp(of.refunded_at),
        taken_ms=of.taken_ms,
        kept_ms=of.kept_ms,
        taken_micros=of.taken_micros,
        currency_code=of.currency,
        refunded_in_all_ms=of.refunded_in_all_ms,
        billed_ms=of.billed_ms,
        etag=of.etag,
        balance=balance(has),
    )


def audit_event(of: AuditEvent) -> admin_pb2.AuditEvent:
    """Return one change, by whom and why."""
    return admin_pb2.AuditEvent(
        number=of.audit_id,
        time=timestamp(of.at),
        actor=of.actor,
        action=of.action,
        target=of.target,
        reason=of.reason,
        request_id=of.request_id,
        before_json=of.before,
        after_json=of.after,
    )


def invariant_result(of: InvariantResult) -> admin_pb2.InvariantResult:
    """Return the answer of one invariant."""
    return admin_pb2.InvariantResult(
        number=of.number,
        sentence=of.sentence,
        violations=of.violations,
        first_json=[json.dumps(row, sort_keys=True) for row in of.first],
        took_ms=of.took_ms,
    )


def _job(account_id: str, job_id: UUID | None) -> str:
    return "" if job_id is None else job_name(account_id, str(job_id))


def _text(attempt_id: UUID | None) -> str:
    return "" if attempt_id is None else str(attempt_id)
