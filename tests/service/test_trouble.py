"""Expected trouble is one sentence and exit status 3; a failure in the background ends the service."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import asyncpg
import pytest
from typer.testing import CliRunner

from scheduler.__main__ import server
from scheduler.app import Service


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["migrate", "--dsn", "postgresql://ann:secret@127.0.0.1:1/darkroom"],
            "cannot connect to PostgreSQL",
        ),
        (["serve", "--dsn", "postgresql://ann:secret@127.0.0.1:1/darkroom"], "cannot connect to PostgreSQL"),
        (["serve", "--models-file", "/nowhere/models.toml"], "/nowhere/models.toml"),
    ],
)
def test_expected_trouble_is_a_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(server, [*arguments, "--data-dir", str(tmp_path)])
    assert result.exit_code == 3, result.output
    assert result.output.startswith("darkroom: ")
    assert sentence in result.output
    assert "Traceback" not in result.output
    assert "secret" not in result.output


async def test_a_start_that_fails_leaves_no_admin_key_that_nobody_was_shown(
    database: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    serve = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scheduler", "serve", "--port", "0", "--ops-port", "0"),
        *("--dsn", database, "--data-dir", str(tmp_path), "--artifacts-url", "memory://pictures"),
        *("--ray-address", "127.0.0.1:1"),
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await serve.communicate()
    assert serve.returncode == 3, said.decode()
    assert b"darkroom: cannot join the Ray cluster at 127.0.0.1:1: " in said
    assert b"Traceback" not in said
    assert await connection.fetchval("SELECT count(*) FROM scheduler.api_key") == 0


async def fails() -> None:
    raise ValueError("a bug")


async def waits() -> None:
    await asyncio.Event().wait()


def a_service(*background: asyncio.Task[None]) -> Service:
    return Service(address="", ops_address="", admin_key=None, background=background)


async def test_failure_in_the_background_ends_the_service_with_its_error() -> None:
    steady = asyncio.create_task(waits())
    work = waits()
    with pytest.raises(ValueError, match="a bug"):
        async with asyncio.timeout(10):
            await a_service(steady, asyncio.create_task(fails())).unless_it_fails(work)
    assert work.cr_frame is None, "the work was ended too"
    steady.cancel()


async def test_work_ends_by_itself_while_the_background_goes_on() -> None:
    async def answer() -> int:
        return 42

    steady = asyncio.create_task(waits())
    assert await a_service(steady).unless_it_fails(answer()) == 42
    assert not steady.done()
    steady.cancel()
