"""How a command of the client runs: settings, connection, work, and an exit status that says how it went.

Expected trouble is a few sentences on stderr and a status, never a traceback: see `ExitCode`.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from types import ModuleType
from typing import Annotated, TypeVar

import typer

from scheduler.client.aio import DarkroomClient, RetryPolicy
from scheduler.client.config import ClientConfig, config_path, read_config
from scheduler.client.errors import DarkroomError, ExitCode, ServerNotInstalled
from scheduler.client.names import Named, named
from scheduler.client.printing import Printer

_Shown = TypeVar("_Shown")

DATES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"]
"""How moments are typed, all of them UTC; a day is its beginning."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON: one document, or one a line for streams.")]


Reason = Annotated[str, typer.Option(help="Why; kept with the audit event.")]

# As the service has it: far beyond any use.
_MOST = 2**53

_SPANS = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}


def span(text: str | timedelta) -> timedelta:
    """Return a span of time that was typed. Raises typer.BadParameter."""
    if isinstance(text, timedelta):
        return text
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip(), re.ASCII)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no span of time: type 90m, 24h or 7d")
    return int(match[1]) * _SPANS[match[2]]


def minutes_typed(text: str | int) -> int:
    """Return GPU minutes that were typed, in milliseconds. Raises typer.BadParameter."""
    return _whole(text, 60_000, "a millisecond")


def money_typed(text: str | int) -> int:
    """Return money that was typed, in millionths of its currency. Raises typer.BadParameter."""
    return _whole(text, 1_000_000, "a millionth")


def _whole(text: str | int, unit: int, least: str) -> int:
    if isinstance(text, int):
        return text
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        raise typer.BadParameter(f"{text!r} is no number: type 30 or 0.5") from None
    if not number.is_finite() or abs(number) > Decimal(_MOST) / unit:
        raise typer.BadParameter(f"{text} is more than anything counted here: at most {_MOST // unit:,}")
    whole = int((number * unit).to_integral_value())
    if number and not whole:
        # 0 has a meaning of its own: no cap, or all there is.
        raise typer.BadParameter(f"{text} is less than {least}, and counts as 0: type that, or more")
    return whole


def named_argument(text: str | Named) -> Named:
    """Return what was typed for a job or one of its pictures or videos. Raises typer.BadParameter."""
    if isinstance(text, Named):
        return text
    try:
        return named(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def job_argument(text: str) -> str:
    """Return the resource name of a job that was typed. Raises typer.BadParameter."""
    return named_argument(text).job


JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB", parser=job_argument, help="Job id, resource name, or name of a file saved of it."
    ),
]


def whole_job_argument(text: str) -> str:
    """Return the resource name of a job that was typed, and not a part of it. Raises typer.BadParameter."""
    named = named_argument(text)
    if named.image is not None or named.video is not None:
        raise typer.BadParameter(
            f"{text} names a part of a job, and only a whole job can be taken: give its id alone."
        )
    return named.job


WholeJobArgument = Annotated[
    str, typer.Argument(metavar="JOB", parser=whole_job_argument, help="Job id or resource name.")
]


def config_of(context: typer.Context) -> ClientConfig:
    """Return the settings in force for this command."""
    return read_config(flags=context.obj or {}, environment=os.environ, path=config_path())


def run(
    context: typer.Context,
    printer: Printer,
    work: Callable[[DarkroomClient], Awaitable[None]],
    *,
    retries: RetryPolicy | None = None,
) -> None:
    """Do `work` with a client; raise typer.Exit with the status that fits if it does not succeed."""

    async def connected() -> None:
        async with config_of(context).connect(retries=retries) as client:
            await work(client)

    with expected_trouble(printer):
        asyncio.run(connected())


def of_server(module: str) -> ModuleType:
    """Return a module of the server. Raises ServerNotInstalled where its packages are not there.

    By name, since nothing of the client may need it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("scheduler", "gpu_worker", "billing"):
            raise
        raise ServerNotInstalled(f"{error.name} is missing.") from error


@contextmanager
def expected_trouble(printer: Printer) -> Iterator[None]:
    """Turn an error of this client into its sentences and its exit status."""
    try:
        yield
    except DarkroomError as error:
        printer.error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def go_on_if_agreed(printer: Printer, question: str, *, otherwise: str) -> None:
    """Ask, and end the command, saying what was not done, unless the answer is yes.

    To be called while nothing runs: an event loop would hold Ctrl-C back until there is an answer.
    """
    with expected_trouble(printer):
        agreed = printer.agreed(question)
    if not agreed:
        printer.note(otherwise)
        raise typer.Exit(ExitCode.REFUSED)


def do_as_shown(
    context: typer.Context,
    printer: Printer,
    *,
    look: Callable[[DarkroomClient], Awaitable[_Shown]],
    do: Callable[[DarkroomClient, _Shown], Awaitable[_Shown]],
    show: Callable[[Printer, _Shown], None],
    question: str,
    dry_run: bool,
    yes: bool,
) -> None:
    """Show what a change would do, ask whether to make it unless `yes`, make it, and show what it did.

    `do` is given what `look` returned, so that what was shown is what is done. With `dry_run` it ends there.
    """
    found: list[_Shown] = []

    async def looking(client: DarkroomClient) -> None:
        found.append(await look(client))

    run(context, printer, looking)
    (shown,) = found
    if dry_run:
        show(printer, shown)
        return
    if not yes:
        show(Printer(to_stderr=True), shown)
        go_on_if_agreed(printer, question, otherwise="Nothing was changed.")

    async def doing(client: DarkroomClient) -> None:
        show(printer, await do(client, shown))

    run(context, printer, doing)
