"""`darkroom doctor`: a line for each thing that has to be well, and the command that makes it so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from scheduler.client.config import config_path
from scheduler.client.diagnosis import Diagnosis, Level
from scheduler.client.doctor import client_diagnoses
from scheduler.client.errors import ExitCode, ServerNotInstalled
from scheduler.client.printing import Printer
from scheduler.client.running import Json, config_of, expected_trouble, of_server
from scheduler.client.terminal import plain

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
_STATUS = {Level.OK: ExitCode.OK, Level.WARN: ExitCode.WARNED, Level.FAIL: ExitCode.VIOLATED}

DataDir = Annotated[Path | None, typer.Option(help="Data folder of the service, if not as in its settings.")]
Dsn = Annotated[str | None, typer.Option(help="PostgreSQL of the service, if not as in its settings.")]


def doctor(
    context: typer.Context,
    client_only: Annotated[
        bool, typer.Option("--client-only", help="Nothing of the service's machine and settings.")
    ] = False,
    data_dir: DataDir = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Check the client, the service it calls and, where a server is installed, its machine and database.

    Exits with 6 if something does not work, and with 7 if something ought to be looked at.
    """

    async def found() -> AsyncIterator[Diagnosis]:
        async for one in client_diagnoses(lambda: config_of(context), config_path()):
            yield one
        if not client_only:
            with suppress(ServerNotInstalled):
                diagnoses = of_server("scheduler.doctor").service_diagnoses
                async for one in diagnoses(data_dir=data_dir, dsn=dsn):
                    yield one

    report(Printer(as_json=as_json), found())


def report(printer: Printer, found: AsyncIterator[Diagnosis]) -> None:
    """Print each diagnosis as it comes, or with JSON all in the end; exit by the worst."""
    levels = {Level.OK}
    every: list[dict[str, str]] = []

    async def read() -> None:
        async for one in found:
            levels.add(one.level)
            every.append({"what": one.what, "level": one.level, "sentence": one.sentence, "fix": one.fix})
            if not printer.as_json:
                _print(printer, one)

    with expected_trouble(printer):
        asyncio.run(read())
    worst = max(levels, key=list(Level).index)
    if printer.as_json:
        printer.document({"worst": worst, "checks": every})
    raise typer.Exit(_STATUS[worst])


def _print(printer: Printer, one: Diagnosis) -> None:
    if not printer.out.is_terminal:
        printer.line(one.level, one.what, one.sentence, *filter(None, [one.fix]))
        return
    line = Text.assemble(
        (f"{one.level:4}", _STYLES[one.level]), f"  {plain(one.what):16}  {plain(one.sentence)}"
    )
    if one.fix:
        line.append(f"  → {plain(one.fix)}", style="bold")
    printer.out.print(line, soft_wrap=True)
