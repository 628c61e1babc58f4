"""How a command of the client runs: settings, connection, work, and an exit status that says how it went.

Expected trouble is a few sentences on stderr and a status, never a traceback: see `ExitCode`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from scheduler.client.aio import DarkroomClient
from scheduler.client.config import ClientConfig, config_path, read_config
from scheduler.client.errors import DarkroomError, ExitCode
from scheduler.client.names import Named, named
from scheduler.client.printing import Printer

Json = Annotated[bool, typer.Option("--json", help="Print JSON: one document, or one a line for streams.")]


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


def config_of(context: typer.Context) -> ClientConfig:
    """Return the settings in force for this command."""
    return read_config(flags=context.obj or {}, environment=os.environ, path=config_path())


def run(context: typer.Context, printer: Printer, work: Callable[[DarkroomClient], Awaitable[None]]) -> None:
    """Do `work` with a client; raise typer.Exit with the status that fits if it does not succeed."""

    async def connected() -> None:
        async with config_of(context).connect() as client:
            await work(client)

    with expected_trouble(printer):
        asyncio.run(connected())


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
