"""How commands print what the ledger says: accounts, plans, statements, audit events, what a check found.

Each function prints one answer with a `Printer`: JSON, a table on a terminal, lines with tabs in a pipe.
Times that add up are shown to the millisecond; in JSON all of them are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from billing.v1.admin_pb2 import (
    AdminAccount,
    ApiKey,
    AuditEvent,
    CheckInvariantsResponse,
    InvariantResult,
    Plan,
    PlanImpact,
    PlanUndo,
    Refund,
    RefundUndo,
    Role,
)
from billing.v1.billing_pb2 import Balance, PlanChange, PlanLimits, Statement, StatementLine
from scheduler.client.errors import CannotSave
from scheduler.client.names import last_part
from scheduler.client.plan_file import Change
from scheduler.client.printing import Printer, to_json, visibility_word, when
from scheduler.client.terminal import duration, exact_duration, money, tier_word
from scheduler.v1.account_pb2 import Account


@dataclass(frozen=True, kw_only=True)
class PlanDifference:
    """What a file makes of one plan."""

    before: Plan | None
    """None: the plan is new."""
    after: Plan
    changes: Sequence[Change]
    impact: PlanImpact | None
    """None where nobody is touched, because the plan is new."""


# What people ask of their account


def print_info(printer: Printer, account: Account) -> None:
    """Print what `darkroom info` is asked for."""
    if printer.as_json:
        printer.document(account)
        return
    printer.facts(
        [
            ("account", last_part(account.name) + (" (blocked)" if account.blocked else "")),
            ("mode", tier_word(account.mode)),
            ("visibility", visibility_word(account.visibility)),
            *_balance_facts(account.balance),
            ("plan changes to", _scheduled(account)),
            ("overage", _overage(account)),
            ("jobs", f"{account.jobs_running} running, {account.jobs_waiting} waiting"),
            ("limits", _limits(account.limits)),
        ]
    )


def print_own_plan(printer: Printer, account: Account) -> None:
    """Print what the account's plan gives it, and what is to come."""
    balance = account.balance
    if printer.as_json:
        printer.document(
            {
                "plan": balance.plan,
                "grantedMs": str(balance.granted_ms),
                "renewTime": to_json(balance).get("renewTime", ""),
                "limits": to_json(account.limits),
                "scheduledPlan": account.scheduled_plan,
            }
        )
        return
    printer.facts(
        [
            ("plan", last_part(balance.plan)),
            ("fast time this month", duration(balance.granted_ms)),
            ("renews", when(balance, "renew_time")),
            ("limits", _limits(account.limits)),
            ("changes to", _scheduled(account)),
        ]
    )


def print_plan_change(printer: Printer, change: PlanChange) -> None:
    """Print what a change of plan gives and costs."""
    if printer.as_json:
        printer.document(change)
        return
    currency = change.currency_code
    amount = change.amount_micros
    printer.facts(
        [
            ("plan", _from_to(change)),
            ("counts", "at once" if change.at_once else f"from {when(change, 'effective_time')}"),
            ("fast time added", exact_duration(change.granted_ms) if change.granted_ms else ""),
            ("old price, unused", money(change.credit_micros, currency) if change.credit_micros else ""),
            ("new price, to come", money(change.charge_micros, currency) if change.charge_micros else ""),
            ("to pay now" if amount >= 0 else "to get back", money(abs(amount), currency)),
        ]
    )
    if change.sentence:
        printer.note(change.sentence)


def print_statement(printer: Printer, statement: Statement) -> None:
    """Print one period of an account, line by line, and what it comes to."""
    if printer.as_json:
        printer.document(statement)
        return
    printer.table(
        ["time", "what", "job", "measured", "×", "fast time", "beyond it", "charged", "relax"],
        [
            [
                when(line, "time"),
                line.sentence,
                last_part(line.job),
                _unless_0(line.measured_ms),
                _factor(line.multiplier_bp),
                _unless_0(line.fast_ms),
                _unless_0(line.metered_ms),
                money(line.amount_micros, line.currency_code) if line.amount_micros else "",
                _unless_0(line.relax_ms),
            ]
            for line in statement.lines
        ],
    )
    printer.facts(
        [
            ("account", last_part(statement.account)),
            ("plan", last_part(statement.plan)),
            ("period", f"{when(statement, 'period_start')} to {when(statement, 'period_end')}"),
            ("fast time at its start", exact_duration(statement.opening_ms)),
            ("+ granted", exact_duration(statement.granted_ms)),
            ("- used", exact_duration(statement.used_ms)),
            ("- expired", exact_duration(statement.expired_ms)),
            ("- taken back", exact_duration(statement.revoked_ms)),
            ("= left", exact_duration(statement.closing_ms)),
            ("held of it", _unless_0(statement.held_ms)),
            ("beyond it", _unless_0(statement.metered_ms)),
            (
                "charged in money",
                ", ".join(money(one.micros, one.currency_code) for one in statement.amounts if one.micros),
            ),
            ("relax", exact_duration(statement.relax_ms)),
        ]
    )


def save_statement(statement: Statement, path: Path) -> None:
    """Write the lines of a statement as CSV, in milliseconds and millionths. Raises CannotSave."""
    columns = StatementLine.DESCRIPTOR.fields
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow([column.name for column in columns])
            for line in statement.lines:
                shown = MessageToDict(
                    line, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
                )
                rows.writerow([shown.get(column.name, "") for column in columns])
    except OSError as error:
        raise CannotSave(f"{path}: {error.strerror}.") from error


# What admins ask


def print_balance(printer: Printer, balance: Balance) -> None:
    """Print an account's fast time."""
    if printer.as_json:
        printer.document(balance)
        return
    printer.facts([("account", last_part(balance.account)), *_balance_facts(balance)])


def print_accounts(printer: Printer, accounts: Sequence[AdminAccount]) -> None:
    """Print accounts, one a line."""
    if printer.as_json:
        printer.document({"accounts": [to_json(account) for account in accounts]})
        return
    printer.table(
        ["account", "plan", "changes to", "since", "state"],
        [
            [
                last_part(account.name),
                last_part(account.plan),
                last_part(account.scheduled_plan),
                when(account, "create_time"),
                _account_state(account),
            ]
            for account in accounts
        ],
    )


def print_account(printer: Printer, account: AdminAccount) -> None:
    """Print one account with its balance."""
    if printer.as_json:
        printer.document(account)
        return
    printer.facts(
        [
            ("account", last_part(account.name)),
            ("state", _account_state(account)),
            ("since", when(account, "create_time")),
            ("erased", when(account, "erase_time")),
            *(
                _balance_facts(account.balance)
                if account.HasField("balance")
                else [("plan", last_part(account.plan))]
            ),
            ("plan changes to", last_part(account.scheduled_plan)),
        ]
    )


def print_keys(printer: Printer, keys: Sequence[ApiKey]) -> None:
    """Print keys, one a line, without their secrets."""
    if printer.as_json:
        printer.document({"keys": [to_json(key) for key in keys]})
        return
    printer.table(
        ["key", "role", "made", "revoked"],
        [
            [
                last_part(key.name),
                Role.Name(key.role).removeprefix("ROLE_").lower(),
                when(key, "create_time"),
                when(key, "revoke_time"),
            ]
            for key in keys
        ],
    )


def print_plans(printer: Printer, plans: Sequence[Plan]) -> None:
    """Print plans, one a line."""
    if printer.as_json:
        printer.document({"plans": [to_json(plan) for plan in plans]})
        return
    printer.table(
        [
            "plan",
            "version",
            "price",
            "fast a month",
            "carried over",
            "running/relax/accepted",
            "relax weight",
            "private",
            "overage a minute",
            "self-service",
            "keeps pictures",
            "GPU types",
        ],
        [
            [
                last_part(plan.name),
                str(plan.version),
                money(plan.price_micros, plan.currency_code),
                duration(plan.quota_ms),
                duration(plan.rollover_ms) if plan.rollover_ms else "no",
                f"{plan.limits.running}/{plan.limits.relax_running}/{plan.limits.accepted}",
                f"{plan.relax_weight_milli / 1000:g}",
                _factor(plan.private_multiplier_bp) if plan.private_allowed else "no",
                money(plan.overage_micros_per_minute, plan.currency_code)
                if plan.overage_micros_per_minute
                else "no",
                "yes" if plan.self_service else "no",
                f"{plan.picture_retention_days} d" if plan.picture_retention_days else "for ever",
                ", ".join(f"{device} {_factor(bp)}" for device, bp in sorted(plan.gpu_class_bp.items())),
            ]
            for plan in plans
        ],
    )


def print_differences(printer: Printer, differences: Sequence[PlanDifference], *, applied: bool) -> None:
    """Print what a file changes, or changed, of each plan, and whom that touches."""
    if printer.as_json:
        plans = [
            {
                "name": each.after.name,
                "version": each.after.version if applied else None,
                "new": each.before is None,
                "changes": [asdict(change) for change in each.changes],
                "impact": to_json(each.impact) if each.impact is not None else None,
            }
            for each in differences
        ]
        printer.document({"applied": applied, "plans": plans})
        return
    rows = [
        [last_part(each.after.name), change.key, change.before, change.after]
        for each in differences
        for change in each.changes
    ]
    printer.table(["plan", "key", "is", "becomes"] if not applied else ["plan", "key", "was", "is"], rows)
    for each in differences:
        if each.impact is not None:
            print_impact(printer, last_part(each.after.name), each.impact)


def print_impact(printer: Printer, plan: str, impact: PlanImpact) -> None:
    """Say whom a new version of a plan touches: sentences, then the first accounts with what is left."""
    accounts = _counted(impact.accounts, "account")
    if impact.granted_ms or impact.revoked_ms:
        given = [
            f"{words} {duration(ms)}"
            for words, ms in (("gives", impact.granted_ms), ("takes", impact.revoked_ms))
            if ms
        ]
        printer.note(f"{plan}: touches {accounts}; at once it {' and '.join(given)} in all.")
    else:
        printer.note(f"{plan}: touches {accounts}; nobody's fast time of this period changes.")
    if impact.accounts_cut_short:
        printer.note(
            f"{plan}: from {_counted(impact.accounts_cut_short, 'account')} not all of it can be taken: "
            "it is used, or held by running jobs."
        )
    if impact.accounts_behind:
        printer.note(
            f"{plan}: {_counted(impact.accounts_behind, 'account')} with a version before the newest: at "
            "once it is all that changed since, also what was to wait for their next period."
        )
    kept, then_kept = impact.picture_retention_days_before, impact.picture_retention_days_after
    if kept != then_kept:
        days, then_days = (f"{of} days" if of else "for ever" for of in (kept, then_kept))
        printer.note(
            f"{plan}: pictures are kept {then_days} instead of {days}; older ones are gone for good."
        )
    if impact.accounts_over_limits:
        printer.note(
            f"{plan}: {_counted(impact.accounts_over_limits, 'account')} with more jobs than new limits "
            "allow: these jobs go on, and no new ones start."
        )
    changed = [each for each in impact.first if each.available_before_ms != each.available_after_ms]
    if changed:
        printer.table(
            ["account", "left", "then left"],
            [
                [
                    last_part(each.account),
                    duration(each.available_before_ms),
                    duration(each.available_after_ms),
                ]
                for each in changed
            ],
        )


def print_refund(printer: Printer, refund: Refund) -> None:
    """Print what was given back of a job's charge."""
    if printer.as_json:
        printer.document(refund)
        return
    balance = refund.balance
    printer.facts(
        [
            ("job", last_part(refund.job)),
            ("given back", exact_duration(refund.refunded_ms)),
            (
                "in money",
                money(refund.refunded_micros, refund.currency_code) if refund.refunded_micros else "",
            ),
            (
                "in all",
                f"{exact_duration(refund.refunded_in_all_ms)} of {exact_duration(refund.billed_ms)} billed",
            ),
            ("account", last_part(balance.account)),
            *_balance_facts(balance),
        ]
    )


def print_refund_undo(printer: Printer, undo: RefundUndo) -> None:
    """Print what taking a refund back charges again."""
    if printer.as_json:
        printer.document(undo)
        return
    printer.facts(
        [
            ("job", last_part(undo.job)),
            ("refund of", when(undo, "refund_time")),
            ("charged again", exact_duration(undo.taken_ms)),
            ("in money", money(undo.taken_micros, undo.currency_code) if undo.taken_micros else ""),
            ("used, held or gone", _unless_0(undo.kept_ms)),
            (
                "stays given back",
                f"{exact_duration(undo.refunded_in_all_ms)} of {exact_duration(undo.billed_ms)} billed",
            ),
            ("account", last_part(undo.balance.account)),
            *_balance_facts(undo.balance),
        ]
    )


def print_plan_undo(printer: Printer, undo: PlanUndo) -> None:
    """Print what taking a change of plan back takes and gives."""
    if printer.as_json:
        printer.document(undo)
        return
    amount = undo.amount_micros
    printer.facts(
        [
            ("account", last_part(undo.account)),
            ("change of", when(undo, "change_time")),
            ("plan", _from_to(undo)),
            ("counts", "at once" if undo.at_once else f"from {when(undo, 'effective_time')}"),
            ("fast time taken back", exact_duration(undo.revoked_ms)),
            ("used, held or gone", _unless_0(undo.kept_ms)),
            ("to pay" if amount > 0 else "given back", money(abs(amount), undo.currency_code)),
        ]
    )
    if undo.sentence:
        printer.note(undo.sentence)


def print_audit_events(printer: Printer, events: Sequence[AuditEvent]) -> None:
    """Print what admins and operators did, one deed a line."""
    if printer.as_json:
        printer.document({"events": [to_json(event) for event in events]})
        return
    printer.table(
        ["number", "time", "actor", "action", "target", "reason", "changed"],
        [
            [
                str(event.number),
                when(event, "time"),
                event.actor.removeprefix("accounts/"),
                event.action,
                event.target,
                event.reason,
                _changed(event),
            ]
            for event in events
        ],
    )


def print_check(printer: Printer, answer: CheckInvariantsResponse) -> None:
    """Print what became of each invariant, one a line, and the first rows that break one."""
    if printer.as_json:
        printer.document(answer)
        return
    printer.table(
        ["invariant", "answer", "took", "promise"],
        [
            [_number(result), _verdict(result.violations), f"{result.took_ms:,} ms", result.sentence]
            for result in answer.results
        ],
    )
    for result in answer.results:
        for row in result.first_json:
            printer.note(f"{_number(result)}: {row}")
    broken = sum(result.violations > 0 for result in answer.results)
    not_asked = sum(result.violations < 0 for result in answer.results)
    if broken:
        printer.note(f"{broken} of {_counted(len(answer.results), 'invariant')} broken.")
    if not_asked:
        printer.note(
            f"{_counted(not_asked, 'invariant')} not asked in time: give it longer, as with --within 10m."
        )
    if answer.holds:
        printer.note("All invariants hold.")


# Words


def _balance_facts(balance: Balance) -> list[tuple[str, str]]:
    posted = balance.overage_posted_micros
    return [
        ("plan", last_part(balance.plan)),
        ("fast time left", f"{duration(balance.available_ms)} of {duration(balance.granted_ms)}"),
        ("used", duration(balance.used_ms)),
        ("held by running jobs", duration(balance.held_ms)),
        ("renews", when(balance, "renew_time")),
        (
            "overage so far",
            money(posted, balance.currency_code) if posted or balance.overage_allowed else "",
        ),
        ("relax used", duration(balance.relax_used_ms)),
    ]


def _from_to(change: PlanChange | PlanUndo) -> str:
    if change.from_plan == change.to_plan:
        return f"stays {last_part(change.to_plan)}"
    return f"{last_part(change.from_plan)} to {last_part(change.to_plan)}"


def _overage(account: Account) -> str:
    if not account.overage_allowed:
        return "not allowed; fast jobs are refused when the plan's time is used up"
    cap = account.spend_cap_micros
    return f"allowed, cap {money(cap, account.balance.currency_code) if cap else 'none'}"


def _scheduled(account: Account) -> str:
    if not account.scheduled_plan:
        return ""
    return f"{last_part(account.scheduled_plan)} on {when(account.balance, 'renew_time')}"


def _limits(limits: PlanLimits) -> str:
    return (
        f"{limits.running} running at once, {limits.relax_running} of them relax, {limits.accepted} accepted"
    )


def _account_state(account: AdminAccount) -> str:
    if account.HasField("erase_time"):
        return "erased"
    return "blocked" if account.blocked else "open"


def _changed(event: AuditEvent) -> str:
    """Return what differs between before and after, as JSON: what is the same is not worth a line."""
    before = json.loads(event.before_json) if event.before_json else {}
    after = json.loads(event.after_json) if event.after_json else {}
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return f"{event.before_json} → {event.after_json}"
    return ", ".join(
        f"{key} {_json(before.get(key))} → {_json(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _number(result: InvariantResult) -> str:
    return str(result.number) if result.number else "replay"


def _verdict(violations: int) -> str:
    if violations < 0:
        return "not asked"
    return "holds" if violations == 0 else f"broken: {_counted(violations, 'row')}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _unless_0(ms: int) -> str:
    return exact_duration(ms) if ms else ""


def _factor(bp: int) -> str:
    return f"×{bp / 10_000:g}" if bp else ""
