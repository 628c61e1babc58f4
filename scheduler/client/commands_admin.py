"""`darkroom admin`: accounts, keys, plans and grants; workers and queues.

Every change needs a reason, which is kept.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer

from billing.v1 import admin_pb2
from billing.v1.admin_pb2 import Role
from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import ExitCode
from scheduler.client.names import last_part, plan_name
from scheduler.client.printing import Printer
from scheduler.client.running import Json, run
from scheduler.v1 import fleet_pb2
from scheduler.v1.job_pb2 import Tier

admin = typer.Typer(
    help=(
        "Accounts, keys, plans and grants, for keys with the role admin; "
        "workers and queues, for operators too."
    ),
    no_args_is_help=True,
)
accounts = typer.Typer(help="Who may submit jobs.", no_args_is_help=True)
keys = typer.Typer(help="What accounts show to be let in.", no_args_is_help=True)
plans = typer.Typer(help="What accounts get.", no_args_is_help=True)
admin.add_typer(accounts, name="accounts")
admin.add_typer(keys, name="keys")
admin.add_typer(plans, name="plans")

_SPANS = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}

Reason = Annotated[str, typer.Option(help="Why; kept with the audit event.")]


Worker = Annotated[str, typer.Argument(metavar="WORKER", help="Worker's id, as `admin workers` lists it.")]


class TierName(StrEnum):
    """Tiers as they are typed."""

    FAST = "fast"
    RELAX = "relax"

    @property
    def value_in_api(self) -> Tier.ValueType:
        """Return the API's name."""
        return Tier.Value(f"TIER_{self.name}")


def _span(text: str | timedelta) -> timedelta:
    """Return a span of time that was typed. Raises typer.BadParameter."""
    if isinstance(text, timedelta):
        return text
    match = re.fullmatch(r"(\d+)([smhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no span of time: type 90m, 24h or 7d")
    return int(match[1]) * _SPANS[match[2]]


class RoleName(StrEnum):
    """Roles as they are typed."""

    USER = "user"
    MODERATOR = "moderator"
    OPERATOR = "operator"
    ADMIN = "admin"


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


@keys.command("create")
def keys_create(
    context: typer.Context,
    account: Annotated[str, typer.Argument(help="Account the key is for.")],
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


@plans.command("list")
def plans_list(context: typer.Context, as_json: Json = False) -> None:
    """List the newest version of every plan."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        printer.plans(await client.plans())

    run(context, printer, work)


@plans.command("set")
def plans_set(
    context: typer.Context,
    plan: Annotated[str, typer.Argument(help="Which plan.")],
    reason: Reason,
    minutes: Annotated[float | None, typer.Option(min=0, help="Fast time a month.")] = None,
    running: Annotated[int | None, typer.Option(min=1, help="Jobs running at once.")] = None,
    relax_running: Annotated[int | None, typer.Option(min=0, help="Of those, relax.")] = None,
    accepted: Annotated[int | None, typer.Option(min=1, help="Jobs running and waiting at once.")] = None,
    relax_weight: Annotated[float | None, typer.Option(min=0, help="Share of relax; 1 is usual.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--no-private", help="Private mode.")] = None,
    private_multiplier: Annotated[
        float | None, typer.Option(min=0, help="What private jobs cost, against public ones.")
    ] = None,
    overage_price: Annotated[
        float | None, typer.Option(min=0, help="Price of a minute beyond the plan; 0: none to be had.")
    ] = None,
    now: Annotated[bool, typer.Option("--now", help="In force at once, not with the next period.")] = False,
    as_json: Json = False,
) -> None:
    """Make a new version of a plan; what is not given stays as it is."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        name = plan_name(plan)
        found = [each for each in await client.plans() if each.name == name]
        if not found:
            raise typer.BadParameter(f"there is no plan {plan!r}")
        new = found[0]
        if minutes is not None:
            new.quota_ms = round(minutes * 60_000)
        if running is not None:
            new.limits.running = running
        if relax_running is not None:
            new.limits.relax_running = relax_running
        if accepted is not None:
            new.limits.accepted = accepted
        if relax_weight is not None:
            new.relax_weight_milli = round(relax_weight * 1000)
        if private is not None:
            new.private_allowed = private
        if private_multiplier is not None:
            new.private_multiplier_bp = round(private_multiplier * 10_000)
        if overage_price is not None:
            new.overage_micros_per_minute = round(overage_price * 1_000_000)
        effective = admin_pb2.EFFECTIVE_FROM_NOW if now else admin_pb2.EFFECTIVE_FROM_NEXT_PERIOD
        updated = await client.update_plan(new, effective_from=effective, reason=reason)
        if as_json:
            printer.document(updated)
        else:
            printer.plans([updated])

    run(context, printer, work)


@admin.command(
    "grant", context_settings={"ignore_unknown_options": True}
)  # so that -30 is minutes, not an option
def grant(
    context: typer.Context,
    account: Annotated[str, typer.Argument(help="Who gets it.")],
    minutes: Annotated[float, typer.Argument(help="GPU minutes of fast time; negative takes them away.")],
    reason: Reason,
    expires: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Unused time ends on this day (UTC).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Grant an account fast time."""
    printer = Printer(as_json=as_json)
    expiry = expires.replace(tzinfo=UTC) if expires is not None else None

    async def work(client: DarkroomClient) -> None:
        amount_ms = round(minutes * 60_000)
        printer.balance(
            await client.adjust_balance(account, amount_ms=amount_ms, reason=reason, expires=expiry)
        )

    run(context, printer, work)


# The fleet


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
            parser=_span,
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
        typer.Option(parser=_span, metavar="SPAN", help="How far back: 90m, 24h, 7d."),
    ] = timedelta(hours=24),
    as_json: Json = False,
) -> None:
    """Replay what was decided, and tell for every bound of the policy how close it came to breaking.

    Exits with 1 if one was broken.
    """
    printer = Printer(as_json=as_json)
    broken: list[fleet_pb2.Finding] = []

    async def work(client: DarkroomClient) -> None:
        answer = await client.audit_fairness(start=datetime.now(UTC) - since)
        printer.audit(answer)
        broken.extend(one for one in answer.findings if one.verdict == fleet_pb2.VERDICT_VIOLATED)

    run(context, printer, work)
    if broken:
        raise typer.Exit(ExitCode.REFUSED)


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
