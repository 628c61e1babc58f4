"""`darkroom admin`: what admins do with the ledger, and what operators do with workers and queues.

Every change needs a reason, which is kept.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer

from scheduler.client.aio import DarkroomClient
from scheduler.client.commands_ledger import add_to as add_ledger_to
from scheduler.client.commands_moderation import moderation
from scheduler.client.commands_plans import plans
from scheduler.client.errors import ExitCode
from scheduler.client.printing import Printer
from scheduler.client.running import Json, Reason, run, span
from scheduler.v1 import fleet_pb2
from scheduler.v1.job_pb2 import Tier

admin = typer.Typer(
    help=(
        "Accounts, keys, plans, grants and the books, for keys with the role admin; "
        "workers and queues, for operators too; moderation, for moderators too."
    ),
    no_args_is_help=True,
)
admin.add_typer(plans, name="plans")
admin.add_typer(moderation, name="moderation")
add_ledger_to(admin)

Worker = Annotated[str, typer.Argument(metavar="WORKER", help="Worker's id, as `admin workers` lists it.")]


class TierName(StrEnum):
    """Tiers as they are typed."""

    FAST = "fast"
    RELAX = "relax"

    @property
    def value_in_api(self) -> Tier.ValueType:
        """Return the API's name."""
        return Tier.Value(f"TIER_{self.name}")


@admin.command()
def workers(context: typer.Context, as_json: Json = False) -> None:
    """List the workers: what each does, what it has in hand, and why it takes no jobs."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        printer.workers(await client.workers())

    run(context, printer, work)


@admin.command()
def queues(context: typer.Context, as_json: Json = False) -> None:
    """Show what waits and runs in each tier, and how the GPUs are shared."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        printer.queues(await client.queues())

    run(context, printer, work)


@admin.command()
def drain(
    context: typer.Context,
    worker: Worker,
    reason: Reason,
    within: Annotated[
        timedelta | None,
        typer.Option(
            parser=span,
            metavar="SPAN",
            help="What it has not finished then goes on elsewhere: 60s, 5m. The service has a default.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a worker finish what it has, or hand it over after a while, and give it nothing new."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        _print_worker(printer, await client.drain_worker(worker, reason=reason, within=within))

    run(context, printer, work)


@admin.command()
def undrain(context: typer.Context, worker: Worker, reason: Reason, as_json: Json = False) -> None:
    """Give a worker jobs again that drains, or was set aside for what it lost."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        _print_worker(printer, await client.resume_worker(worker, reason=reason))

    run(context, printer, work)


@admin.command()
def pause(context: typer.Context, tier: TierName, reason: Reason, as_json: Json = False) -> None:
    """Let nothing of a tier start; what runs goes on, and jobs are still accepted."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        _print_tier(printer, await client.pause_tier(tier.value_in_api, reason=reason))

    run(context, printer, work)


@admin.command()
def unpause(context: typer.Context, tier: TierName, reason: Reason, as_json: Json = False) -> None:
    """Let jobs of a paused tier start again."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        _print_tier(printer, await client.resume_tier(tier.value_in_api, reason=reason))

    run(context, printer, work)


@admin.command("audit-fairness")
def audit_fairness(
    context: typer.Context,
    since: Annotated[
        timedelta,
        typer.Option(parser=span, metavar="SPAN", help="How far back: 90m, 24h, 7d."),
    ] = timedelta(hours=24),
    as_json: Json = False,
) -> None:
    """Replay what was decided, and tell for every bound of the policy how close it came to breaking.

    Exits with 6 if one was broken.
    """
    printer = Printer(as_json=as_json)
    broken: list[fleet_pb2.Finding] = []

    async def work(client: DarkroomClient) -> None:
        answer = await client.audit_fairness(start=datetime.now(UTC) - since)
        printer.audit(answer)
        broken.extend(one for one in answer.findings if one.verdict == fleet_pb2.VERDICT_VIOLATED)

    run(context, printer, work)
    if broken:
        raise typer.Exit(ExitCode.VIOLATED)


def _print_worker(printer: Printer, worker: fleet_pb2.Worker) -> None:
    if printer.as_json:
        printer.document(worker)
    else:
        printer.workers([worker])


def _print_tier(printer: Printer, tier: fleet_pb2.TierQueue) -> None:
    if printer.as_json:
        printer.document(tier)
    else:
        printer.tiers([tier])
