"""`darkroom admin moderation`: what is not drawn, what the feed does not show, and who is not let in.

Every change needs a reason, which is kept. What a rule would have refused, and how many jobs a block would
cancel, is shown before it is done.
"""

from __future__ import annotations

from typing import Annotated

import typer

from scheduler.client.aio import DarkroomClient
from scheduler.client.printing import Printer
from scheduler.client.printing_moderation import print_block, print_rules, print_rules_update
from scheduler.client.running import Json, Reason, WholeJobArgument, do_as_shown, run
from scheduler.v1.moderation_pb2 import AccountBlock, Rule, RulesUpdate

moderation = typer.Typer(
    help="Rules for prompts, hidden jobs and blocked accounts, for keys with the role moderator.",
    no_args_is_help=True,
)

Patterns = Annotated[
    list[str], typer.Argument(metavar="PATTERN…", help="Words that stand together; in quotes if several.")
]
Category = Annotated[
    str, typer.Option(help="gore, adult, harassment or a name of your own: whoever is refused is told it.")
]
Account = Annotated[str, typer.Argument(metavar="ACCOUNT", help="Account's id or name.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it would do.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@moderation.command("rules")
def rules(
    context: typer.Context,
    category: Annotated[str, typer.Option(help="Only of this category.")] = "",
    as_json: Json = False,
) -> None:
    """List the rules that prompts are held against."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        print_rules(printer, await client.rules(category=category))

    run(context, printer, work)


@moderation.command("add")
def add(
    context: typer.Context,
    patterns: Patterns,
    category: Category,
    reason: Reason,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Refuse prompts in which these words stand, having shown which of the newest ones that would be.

    Words are found whatever their case, accents and punctuation, with look-alike letters and digits, spelled
    out and stretched; never within other words.
    """
    _change_rules(
        context,
        add=[Rule(pattern=pattern, category=category) for pattern in patterns],
        remove=[],
        reason=reason,
        question="Add them?",
        dry_run=dry_run,
        yes=yes,
        as_json=as_json,
    )


@moderation.command("remove")
def remove(
    context: typer.Context,
    patterns: Patterns,
    reason: Reason,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove rules: prompts in which their words stand are drawn again."""
    _change_rules(
        context,
        add=[],
        remove=patterns,
        reason=reason,
        question="Remove them?",
        dry_run=dry_run,
        yes=yes,
        as_json=as_json,
    )


def _change_rules(
    context: typer.Context,
    *,
    add: list[Rule],
    remove: list[str],
    reason: str,
    question: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    async def look(client: DarkroomClient) -> RulesUpdate:
        return await client.update_rules(add=add, remove=remove, reason=reason, validate_only=True)

    async def change(client: DarkroomClient, shown: RulesUpdate) -> RulesUpdate:
        # By its etag: if somebody else has changed the rules since, it is for whoever asked to look again.
        return await client.update_rules(add=add, remove=remove, reason=reason, etag=shown.etag)

    do_as_shown(
        context,
        Printer(as_json=as_json),
        look=look,
        do=change,
        show=print_rules_update,
        question=question,
        dry_run=dry_run,
        yes=yes,
    )


@moderation.command("hide")
def hide(
    context: typer.Context,
    job: WholeJobArgument,
    category: Category,
    reason: Reason,
    as_json: Json = False,
) -> None:
    """Keep a job out of the feed; its owner still sees it, and the category, but not the reason."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        printer.job(await client.hide(job, category=category, reason=reason))

    run(context, printer, work)


@moderation.command("unhide")
def unhide(context: typer.Context, job: WholeJobArgument, reason: Reason, as_json: Json = False) -> None:
    """Let the feed show a job again."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        printer.job(await client.unhide(job, reason=reason))

    run(context, printer, work)


@moderation.command("block")
def block(
    context: typer.Context,
    account: Account,
    reason: Reason,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Let nobody in with any key of an account, and cancel its jobs.

    Those that wait cost nothing; those that run are stopped at their next step, and charged up to there.
    """

    async def look(client: DarkroomClient) -> AccountBlock:
        return await client.block_account(account, reason=reason, validate_only=True)

    async def do(client: DarkroomClient, _: AccountBlock) -> AccountBlock:
        return await client.block_account(account, reason=reason)

    do_as_shown(
        context,
        Printer(as_json=as_json),
        look=look,
        do=do,
        show=print_block,
        question=f"Block {account}?",
        dry_run=dry_run,
        yes=yes,
    )


@moderation.command("unblock")
def unblock(context: typer.Context, account: Account, reason: Reason, as_json: Json = False) -> None:
    """Let an account in again; its jobs stay cancelled."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        print_block(printer, await client.unblock_account(account, reason=reason))

    run(context, printer, work)
