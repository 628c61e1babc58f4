"""The commands of `darkroom` about one's own account: what is left, how jobs run, what was charged, the plan.

Statements and changes of plan are also for admins, who may name another account.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from billing.v1.billing_pb2 import PlanChange
from scheduler.client.aio import DarkroomClient
from scheduler.client.printing import Printer
from scheduler.client.printing_ledger import (
    print_info,
    print_own_plan,
    print_plan_change,
    print_statement,
    save_statement,
)
from scheduler.client.running import DATES, Json, do_as_shown, job_argument, money_typed, run
from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import Tier, Visibility

plan_app = typer.Typer(help="Print what the account's plan gives it; or change the plan.")

MovedJob = Annotated[
    str | None,
    typer.Argument(metavar="[JOB]", parser=job_argument, help="Only this job, which must be waiting."),
]
OtherAccount = Annotated[
    str, typer.Option("--account", metavar="ACCOUNT", help="Another account than the key's; for admins.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to an app, in the order that its help shows them in."""
    for command in (info, fast, relax, private, public, overage, statement):
        app.command()(command)
    app.add_typer(plan_app, name="plan")


def info(context: typer.Context, as_json: Json = False) -> None:
    """Print the account: plan, fast time left, held and used, overage, mode, jobs."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        print_info(printer, await client.account())

    run(context, printer, work)


def fast(context: typer.Context, job: MovedJob = None, as_json: Json = False) -> None:
    """Make fast the mode of jobs that do not say otherwise; or move a waiting job to it."""
    _choose_tier(context, job, job_pb2.TIER_FAST, as_json)


def relax(context: typer.Context, job: MovedJob = None, as_json: Json = False) -> None:
    """Make relax the mode of jobs that do not say otherwise; or move a waiting job to it."""
    _choose_tier(context, job, job_pb2.TIER_RELAX, as_json)


def _choose_tier(context: typer.Context, job: str | None, tier: Tier.ValueType, as_json: bool) -> None:
    if job is None:
        _update_account(context, as_json, mode=tier)
        return
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        printer.job(await client.move(job, tier))

    run(context, printer, work)


def private(context: typer.Context, as_json: Json = False) -> None:
    """Make pictures private unless a job says otherwise."""
    _update_account(context, as_json, visibility=job_pb2.VISIBILITY_PRIVATE)


def public(context: typer.Context, as_json: Json = False) -> None:
    """Make pictures public unless a job says otherwise."""
    _update_account(context, as_json, visibility=job_pb2.VISIBILITY_PUBLIC)


class Consent(StrEnum):
    """Answers to whether fast jobs may be charged beyond the plan."""

    ON = "on"
    OFF = "off"


def overage(
    context: typer.Context,
    consent: Consent,
    cap: Annotated[
        int | None,
        typer.Option(
            parser=money_typed,
            metavar="AMOUNT",
            help="Most to be charged in a month, in the plan's currency; 0: no cap.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether fast jobs go on, charged for each, once the plan's time is used up."""
    if cap is not None and cap < 0:
        raise typer.BadParameter("a cap is 0 or more; 0 is none")
    _update_account(context, as_json, overage_allowed=consent is Consent.ON, spend_cap_micros=cap)


def _update_account(
    context: typer.Context,
    as_json: bool,
    *,
    mode: Tier.ValueType | None = None,
    visibility: Visibility.ValueType | None = None,
    overage_allowed: bool | None = None,
    spend_cap_micros: int | None = None,
) -> None:
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        account = await client.update_account(
            mode=mode,
            visibility=visibility,
            overage_allowed=overage_allowed,
            spend_cap_micros=spend_cap_micros,
        )
        print_info(printer, account)

    run(context, printer, work)


def statement(
    context: typer.Context,
    at: Annotated[
        datetime | None,
        typer.Option(formats=DATES, help="Any moment of the period (UTC); otherwise the present one."),
    ] = None,
    to_csv: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="FILE.csv", dir_okay=False, help="Save the lines there, in milliseconds."
        ),
    ] = None,
    account: OtherAccount = "",
    as_json: Json = False,
) -> None:
    """Print what one period granted and charged, job by job; it adds up to the millisecond."""
    printer = Printer(as_json=as_json)
    moment = at.replace(tzinfo=UTC) if at is not None else None

    async def work(client: DarkroomClient) -> None:
        found = await client.statement(account, at=moment)
        if to_csv is not None:
            save_statement(found, to_csv)
        print_statement(printer, found)
        if to_csv is not None:
            printer.note(f"Saved as {to_csv}.")

    run(context, printer, work)


@plan_app.callback(invoke_without_command=True)
def plan(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is not None:
        return
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        print_own_plan(printer, await client.account())

    run(context, printer, work)


@plan_app.command("change")
def plan_change(
    context: typer.Context,
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Plan to have; the present one: stay on it.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would give and cost.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    account: OtherAccount = "",
    reason: Annotated[str, typer.Option(help="Why another account's is changed; kept.")] = "",
    as_json: Json = False,
) -> None:
    """Change the plan: at once to one with more fast time, to one with less at the end of the period.

    What it gives and costs is shown first, and it is done exactly so or not at all.
    """
    if account and not (reason or dry_run):
        raise typer.BadParameter("say with --reason why another account's plan is changed")

    async def look(client: DarkroomClient) -> PlanChange:
        return await client.preview_plan_change(plan, account=account)

    async def change(client: DarkroomClient, shown: PlanChange) -> PlanChange:
        return await client.change_plan(plan, etag=shown.etag, account=account, reason=reason)

    do_as_shown(
        context,
        Printer(as_json=as_json),
        look=look,
        do=change,
        show=print_plan_change,
        question="Change it?",
        dry_run=dry_run,
        yes=yes,
    )
