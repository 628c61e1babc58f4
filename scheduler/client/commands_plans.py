"""`darkroom admin plans`: what plans are, what a file would make of them, and making it so.

A plan never changes: each change makes a new version, which is refused if somebody else made one since what
it replaces was read. Before anything is changed, everything is asked of the service with `validate_only`; so
a file of several plans is refused as a whole wherever that can be known before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from billing.v1 import admin_pb2
from billing.v1.admin_pb2 import EffectiveFrom, Plan
from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import DarkroomError, UnknownPlan
from scheduler.client.names import last_part
from scheduler.client.plan_file import (
    KEYS_HELP,
    PlanEdit,
    changes,
    nearest,
    read_file,
    read_words,
    to_toml,
)
from scheduler.client.printing import Printer
from scheduler.client.printing_ledger import PlanDifference, print_differences, print_plans
from scheduler.client.running import Json, Reason, expected_trouble, run

plans = typer.Typer(help="What accounts get.", no_args_is_help=True)

# A preview keeps nothing, but the service judges it as it would the change itself.
_PREVIEW = "a preview"

File = Annotated[
    Path, typer.Argument(metavar="FILE", dir_okay=False, help="TOML, as `plans show --toml` prints it.")
]
Now = Annotated[bool, typer.Option("--now", help="In force at once, not with each account's next period.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say what it would change, and whom it touches.")
]


@plans.command("show")
def plans_show(
    context: typer.Context,
    plan: Annotated[str, typer.Argument(metavar="[PLAN]", help="Only this one.")] = "",
    version: Annotated[int | None, typer.Option(min=1, help="An earlier version of it.")] = None,
    toml: Annotated[bool, typer.Option("--toml", help="As a file that `plans apply` takes.")] = False,
    as_json: Json = False,
) -> None:
    """Print plans: the newest version of each."""
    if version is not None and not plan:
        raise typer.BadParameter("--version is of one plan: say which")
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        found = [await client.plan(plan, version=version)] if plan else await client.plans()
        if toml and not as_json:
            for line in to_toml(found).splitlines():
                printer.line(line)
        else:
            print_plans(printer, found)

    run(context, printer, work)


@plans.command("set", epilog=f"KEYS\n\n{KEYS_HELP}")
def plans_set(
    context: typer.Context,
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Which plan.")],
    values: Annotated[list[str], typer.Argument(metavar="KEY=VALUE…", help="As minutes=200 running=4.")],
    reason: Reason,
    now: Now = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a new version of a plan; what is not given stays as it is."""
    printer = Printer(as_json=as_json)
    with expected_trouble(printer):
        edit = read_words(plan, values)
    _make(context, printer, [edit], reason=reason, now=now, dry_run=dry_run, creates=False)


@plans.command("diff")
def plans_diff(context: typer.Context, file: File, now: Now = False, as_json: Json = False) -> None:
    """Say what `plans apply` of a file would change, and whom that touches; change nothing."""
    printer = Printer(as_json=as_json)
    with expected_trouble(printer):
        edits = read_file(file)
    _make(context, printer, edits, reason=_PREVIEW, now=now, dry_run=True)


@plans.command("apply")
def plans_apply(
    context: typer.Context,
    file: File,
    reason: Reason,
    now: Now = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make plans as a file says: a new version of each that differs, and those that are not there yet."""
    printer = Printer(as_json=as_json)
    with expected_trouble(printer):
        edits = read_file(file)
    _make(context, printer, edits, reason=reason, now=now, dry_run=dry_run)


def _make(
    context: typer.Context,
    printer: Printer,
    edits: Sequence[PlanEdit],
    *,
    reason: str,
    now: bool,
    dry_run: bool,
    creates: bool = True,
) -> None:
    effective = admin_pb2.EFFECTIVE_FROM_NOW if now else admin_pb2.EFFECTIVE_FROM_NEXT_PERIOD

    async def work(client: DarkroomClient) -> None:
        known = {plan.name: plan for plan in await client.plans()}
        if not creates:
            _refuse_unknown(edits, known)
        found = [await _difference(client, known.get(edit.name), edit, reason, effective) for edit in edits]
        differences = [each for each in found if each.changes]
        if not dry_run:
            differences = await _made(client, printer, differences, reason, effective)
        print_differences(printer, differences, applied=not dry_run)
        if not differences:
            printer.note("Nothing differs from what is.")
        elif dry_run:
            printer.note("Nothing was changed.")

    run(context, printer, work)


def _refuse_unknown(edits: Iterable[PlanEdit], known: Iterable[str]) -> None:
    there = [last_part(name) for name in known]
    for edit in edits:
        plan = last_part(edit.name)
        if plan not in there:
            raise UnknownPlan(f"There is no plan {plan}; {nearest(plan, there)}")


async def _difference(
    client: DarkroomClient,
    before: Plan | None,
    edit: PlanEdit,
    reason: str,
    effective: EffectiveFrom.ValueType,
) -> PlanDifference:
    """Return what an edit would change, and whom the service says it touches."""
    after = edit.on(before) if before is not None else edit.new_plan()
    changed = changes(before, after)
    impact = None
    if before is None:
        await client.create_plan(after, reason=reason, validate_only=True)
    elif changed:
        answer = await client.update_plan(after, effective_from=effective, reason=reason, validate_only=True)
        impact = answer.impact
    return PlanDifference(before=before, after=after, changes=changed, impact=impact)


async def _made(
    client: DarkroomClient,
    printer: Printer,
    differences: Sequence[PlanDifference],
    reason: str,
    effective: EffectiveFrom.ValueType,
) -> list[PlanDifference]:
    """Make it so, plan by plan; return it with the versions that were made."""
    made: list[PlanDifference] = []
    try:
        for each in differences:
            if each.before is None:
                plan = await client.create_plan(each.after, reason=reason)
            else:
                plan = await client.update_plan(each.after, effective_from=effective, reason=reason)
            made.append(replace(each, after=plan, impact=plan.impact if each.before is not None else None))
    except DarkroomError:
        if made:
            names = ", ".join(f"{last_part(each.after.name)} (version {each.after.version})" for each in made)
            printer.note(f"Changed before what comes now: {names}.")
        raise
    return made
