"""How commands print what moderators see: rules, what a change of them does, who is blocked."""

from __future__ import annotations

from scheduler.client.names import last_part
from scheduler.client.printing import Printer, when
from scheduler.v1.moderation_pb2 import AccountBlock, ListRulesResponse, RulesUpdate


def print_rules(printer: Printer, rules: ListRulesResponse) -> None:
    """Print rules, one a line."""
    if printer.as_json:
        printer.document(rules)
        return
    printer.table(
        ["pattern", "category", "since"],
        [[rule.pattern, rule.category, when(rule, "create_time")] for rule in rules.rules],
    )


def print_rules_update(printer: Printer, update: RulesUpdate) -> None:
    """Print which rules come and go, and what those that come would have refused."""
    if printer.as_json:
        printer.document(update)
        return
    printer.facts(
        [
            *(("removed", pattern) for pattern in update.removed),
            *(("added", f"{rule.pattern} ({rule.category})") for rule in update.added),
        ]
    )
    trial = update.trial
    if update.added and update.HasField("trial"):
        printer.note(f"Of the last {trial.jobs:,} prompts it would have refused {trial.matches:,}.")
        for match in trial.examples:
            printer.note(f"  {last_part(match.job)}: {match.pattern}")


def print_block(printer: Printer, block: AccountBlock) -> None:
    """Print whether an account is let in, and what became of its jobs."""
    if printer.as_json:
        printer.document(block)
        return
    printer.facts(
        [
            ("account", last_part(block.account)),
            ("let in", "no: blocked" if block.blocked else "yes"),
            ("cancelled as they waited", str(block.waiting_jobs) if block.waiting_jobs else ""),
            ("stopped as they ran", str(block.running_jobs) if block.running_jobs else ""),
        ]
    )
