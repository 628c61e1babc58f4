"""What somebody types, and what comes back."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from scheduler.client.commands import app


def darkroom(environment: dict[str, str], *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, env=environment, input=stdin)


def lines(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.output
    return [line.split("\t") for line in result.stdout.splitlines()]


def one_document(result: Result) -> Any:
    """The answer of a command with --json, which is all there is on stdout."""
    (line,) = result.stdout.splitlines()
    return json.loads(line)
