"""`darkroom admin` about time and money: accounts, keys, grants, refunds, what was done, whether it holds.

Every change needs a reason, which is kept. A grant is taken back by a negative one, a refund and a change of
plan by an undo: nothing is unsaid, it is answered by another entry.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from billing.v1 import admin_pb2
from billing.v1.admin_pb2 import AdminAccount, AuditEvent, GrantSource, PlanUndo, RefundUndo, Role
from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import CannotSave, ExitCode
from scheduler.client.names import last_part
from scheduler.client.printing import Printer, to_json
from scheduler.client.printing_ledger import (
    print_account,
    print_accounts,
    print_audit_events,
    print_balance,
    print_check,
    print_keys,
    print_plan_undo,
    print_refund,
    print_refund_undo,
)
from scheduler.client.running import (
    DATES,
    JobArgument,
    Json,
    Reason,
    do_as_shown,
    go_on_if_agreed,
    minutes_typed,
    run,
    span,
)

accounts = typer.Typer(help="Who may submit jobs.", no_args_is_help=True)
keys = typer.Typer(help="What accounts show to be let in.", no_args_is_help=True)

AccountArgument = Annotated[str, typer.Argument(metavar="ACCOUNT", help="Account's id or name.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="At most so many.")]


class RoleName(StrEnum):
    """Roles as they are typed."""

    USER = "user"
    MODERATOR = "moderator"
    OPERATOR = "operator"
    ADMIN = "admin"


def add_to(admin: typer.Typer) -> None:
    """Add the commands to `darkroom admin`, in the order that its help shows them in."""
    admin.add_typer(accounts, name="accounts")
    admin.add_typer(keys, name="keys")
    # So that -30 is minutes, not an option.
    admin.command(context_settings={"ignore_unknown_options": True})(grant)
    admin.command()(refund)
    admin.command("undo-refund")(undo_refund)
    for command in (audit, check):
        admin.command()(command)


# Accounts


@accounts.command("list")
def accounts_list(
    context: typer.Context,
    plan: Annotated[str, typer.Option(help="Only those on this plan.")] = "",
    limit: Limit = 100,
    as_json: Json = False,
) -> None:
    """List accounts in the order of their ids."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        listed: list[AdminAccount] = []
        async for account in client.accounts(plan=plan, page_size=min(limit, 1000)):
            listed.append(account)
            if len(listed) == limit:
                break
        print_accounts(printer, listed)

    run(context, printer, work)


@accounts.command("show")
def accounts_show(context: typer.Context, account: AccountArgument, as_json: Json = False) -> None:
    """Print an account with its fast time."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        print_account(printer, await client.admin_account(account))

    run(context, printer, work)


@accounts.command("create")
def accounts_create(
    context: typer.Context,
    reason: Reason,
    account_id: Annotated[
        str, typer.Argument(metavar="[ID]", help="Lower-case letters, digits, dashes.")
    ] = "",
    plan: Annotated[str, typer.Option(help="Plan of the account.")] = "basic",
    as_json: Json = False,
) -> None:
    """Open an account."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        account = await client.create_account(plan=plan, account_id=account_id, reason=reason)
        if as_json:
            printer.document(account)
        else:
            printer.line(f"{last_part(account.name)} on {last_part(account.plan)}")

    run(context, printer, work)


@accounts.command("erase")
def accounts_erase(
    context: typer.Context,
    account: AccountArgument,
    reason: Reason,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete an account's prompts, pictures and keys for good; the ledger keeps a pseudonym."""
    printer = Printer(as_json=as_json)
    if not yes:
        found: list[AdminAccount] = []

        async def look(client: DarkroomClient) -> None:
            found.append(await client.admin_account(account))

        run(context, printer, look)
        go_on_if_agreed(
            printer,
            f"Erase {last_part(found[0].name)} (on {last_part(found[0].plan)}) for good: its prompts, "
            "its pictures, its keys and all that says who it was?",
            otherwise="Nothing was erased.",
        )

    async def work(client: DarkroomClient) -> None:
        print_account(printer, await client.erase_account(account, reason=reason))

    run(context, printer, work)


@accounts.command("undo-plan")
def accounts_undo_plan(
    context: typer.Context,
    account: AccountArgument,
    reason: Reason,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take and give.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Take back an account's newest change of plan: its money, and what is left of its fast time.

    What it would do is shown first. The change before it can be taken back after it.
    """

    async def look(client: DarkroomClient) -> PlanUndo:
        return await client.undo_plan_change(account, reason=reason, validate_only=True)

    async def undo(client: DarkroomClient, shown: PlanUndo) -> PlanUndo:
        # By its etag: what was shown is what is taken back, and twice at once takes one change back.
        return await client.undo_plan_change(account, reason=reason, etag=shown.etag)

    do_as_shown(
        context,
        Printer(as_json=as_json),
        look=look,
        do=undo,
        show=print_plan_undo,
        question="Take it back?",
        dry_run=dry_run,
        yes=yes,
    )


# Keys


@keys.command("list")
def keys_list(context: typer.Context, account: AccountArgument, as_json: Json = False) -> None:
    """List an account's keys, without their secrets."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        print_keys(printer, await client.api_keys(account))

    run(context, printer, work)


@keys.command("create")
def keys_create(
    context: typer.Context,
    account: AccountArgument,
    reason: Reason,
    role: Annotated[RoleName, typer.Option(help="What the key may do.")] = RoleName.USER,
    as_json: Json = False,
) -> None:
    """Make a key and print it: this is the only time it can be read."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        key = await client.create_api_key(account, role=Role.Value(f"ROLE_{role.name}"), reason=reason)
        if as_json:
            printer.document(key)
            return
        printer.line(key.secret)
        printer.note("Keep it now: it cannot be shown again.")

    run(context, printer, work)


@keys.command("revoke")
def keys_revoke(
    context: typer.Context,
    account: AccountArgument,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key's id, as `keys list` prints it.")],
    reason: Reason,
    as_json: Json = False,
) -> None:
    """End a key; whoever shows it is not let in any more."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        revoked = await client.revoke_api_key(account, key, reason=reason)
        if as_json:
            printer.document(revoked)
        else:
            print_keys(printer, [revoked])

    run(context, printer, work)


# Time and money


def grant(
    context: typer.Context,
    account: AccountArgument,
    minutes: Annotated[
        int,
        typer.Argument(
            parser=minutes_typed,
            metavar="MINUTES",
            help="GPU minutes of fast time; negative takes them away, of what burns last.",
        ),
    ],
    reason: Reason,
    promo: Annotated[bool, typer.Option("--promo", help="A present: burns first.")] = False,
    purchase: Annotated[bool, typer.Option("--purchase", help="Was paid for by itself: burns last.")] = False,
    until: Annotated[
        datetime | None, typer.Option(formats=DATES, help="Unused time ends then (UTC).")
    ] = None,
    undoes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="NUMBER",
            help="Take the minutes from this grant alone: its number, as `audit` lists it.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Grant an account fast time, or take a grant back."""
    if undoes and minutes >= 0:
        raise typer.BadParameter("--undoes is for minutes that are taken: type them as -30")
    if promo and purchase:
        raise typer.BadParameter("a grant is a --promo or a --purchase, not both")
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        balance = await client.adjust_balance(
            account,
            amount_ms=minutes,
            reason=reason,
            expires=until.replace(tzinfo=UTC) if until is not None else None,
            source=_source(promo=promo, purchase=purchase),
            undoes=undoes or 0,
        )
        print_balance(printer, balance)

    run(context, printer, work)


def _source(*, promo: bool, purchase: bool) -> GrantSource.ValueType:
    if promo:
        return admin_pb2.GRANT_SOURCE_PROMO
    return admin_pb2.GRANT_SOURCE_PURCHASE if purchase else admin_pb2.GRANT_SOURCE_UNSPECIFIED


def refund(
    context: typer.Context,
    job: JobArgument,
    reason: Reason,
    minutes: Annotated[
        int | None,
        typer.Option(
            parser=minutes_typed,
            metavar="MINUTES",
            help="Only so much of what it was billed; otherwise all that is left of it.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give back what a job was charged, all of it or a part; money in proportion."""
    if minutes is not None and minutes <= 0:
        raise typer.BadParameter("--minutes is more than 0; leave it out to give all back")
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        print_refund(printer, await client.refund(job, reason=reason, amount_ms=minutes or 0))

    run(context, printer, work)


def undo_refund(
    context: typer.Context,
    job: JobArgument,
    reason: Reason,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would charge again.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Take back a job's newest refund: its money, and what is left of its fast time.

    What it would charge again is shown first. The refund before it can be taken back after it.
    """

    async def look(client: DarkroomClient) -> RefundUndo:
        return await client.undo_refund(job, reason=reason, validate_only=True)

    async def undo(client: DarkroomClient, shown: RefundUndo) -> RefundUndo:
        # By its etag: what was shown is what is taken back, and twice at once takes one refund back.
        return await client.undo_refund(job, reason=reason, etag=shown.etag)

    do_as_shown(
        context,
        Printer(as_json=as_json),
        look=look,
        do=undo,
        show=print_refund_undo,
        question="Take it back?",
        dry_run=dry_run,
        yes=yes,
    )


# Looking into it


def audit(
    context: typer.Context,
    target: Annotated[
        str, typer.Option(help="Only what was done to this and all below it: accounts/ada, plans/basic.")
    ] = "",
    actor: Annotated[
        str, typer.Option(help="Only what was done by: accounts/ada, with any of its keys.")
    ] = "",
    start: Annotated[
        datetime | None, typer.Option("--from", formats=DATES, help="From then on (UTC).")
    ] = None,
    end: Annotated[datetime | None, typer.Option("--until", formats=DATES, help="Before then (UTC).")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many; 50 are listed if not said.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            dir_okay=False,
            help="Save it there, a JSON document a line: all of it, but for --limit.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what admins and operators did, newest first: by whom, why, and what it changed."""
    printer = Printer(as_json=as_json)
    most = 50 if limit is None and export is None else limit

    async def work(client: DarkroomClient) -> None:
        events = client.audit_events(
            target=target,
            actor=actor,
            start=start.replace(tzinfo=UTC) if start is not None else None,
            end=end.replace(tzinfo=UTC) if end is not None else None,
            page_size=min(most or 1000, 1000),
        )
        listed: list[AuditEvent] = []
        async for event in events:
            listed.append(event)
            if len(listed) == most:
                break
        if export is None:
            print_audit_events(printer, listed)
            return
        _save_lines(export, [json.dumps(to_json(event)) for event in listed])
        if as_json:
            printer.document({"file": str(export), "events": len(listed)})
        else:
            printer.line(str(export))
            printer.note(f"{len(listed):,} events.")

    run(context, printer, work)


def _save_lines(path: Path, lines: list[str]) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(part, path)
    except OSError as error:
        raise CannotSave(f"{path}: {error.strerror}.") from error


def check(
    context: typer.Context,
    within: Annotated[
        timedelta | None,
        typer.Option(
            parser=span, metavar="SPAN", help="How long it may take: 60s, 10m. A minute if not said."
        ),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Also replay the whole journal by a second program.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask every invariant of the ledger of the live database.

    Exits with 6 if one is broken, or if not all could be asked in time.
    """
    printer = Printer(as_json=as_json)
    holds: list[bool] = []

    async def work(client: DarkroomClient) -> None:
        answer = await client.check_invariants(within=within, replay=replay)
        print_check(printer, answer)
        holds.append(answer.holds)

    run(context, printer, work)
    if not all(holds):
        raise typer.Exit(ExitCode.VIOLATED)
