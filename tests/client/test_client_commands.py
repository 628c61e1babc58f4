"""What holds of every command: help, JSON, exit status, completion, and no traceback whatever goes wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
import typer.main

from scheduler.__main__ import server
from scheduler.client.commands import app
from scheduler.client.errors import ExitCode
from tests.client.other_services import something_else
from tests.client.scripted_service import UID, Refuse, ScriptedService
from tests.client.typed_commands import darkroom, one_document

ROOT = Path(__file__).resolve().parents[2]
DARKROOM = str(Path(sys.executable).with_name("darkroom"))

NOT_OUR_ANSWERS = {"serve", "demo", "migrate", "sweep-artifacts", "lead", "stop", "simulate", "replay"}
"""Commands of the server: they run something, and say so for people."""


def every_command(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command that can be typed, with its words."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if getattr(command, "commands", None):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(every_command())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_prints_json_where_it_is_told_to(words: tuple[str, ...]) -> None:
    if words[0] not in NOT_OUR_ANSWERS:
        assert "--json" in {option for each in COMMANDS[words].params for option in each.opts}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_says_what_it_does_in_a_sentence(words: tuple[str, ...]) -> None:
    sentence = (COMMANDS[words].help or "").split("\n\n")[0].strip()
    assert sentence.endswith("."), sentence


def test_every_command_of_the_server_can_be_typed() -> None:
    typed = {words[0] for words in COMMANDS}
    of_server = typer.main.get_command(server)
    assert isinstance(of_server, click.Group) or hasattr(of_server, "commands")
    assert set(of_server.commands) <= typed


# Exit status


def test_help_and_readme_have_every_exit_status(environment: dict[str, str]) -> None:
    shown = " ".join(darkroom(environment, "--help").stdout.split())
    readme = (ROOT / "README.md").read_text()
    rows = {int(row[0]): row[1] for row in re.findall(r"^\| (\d+) \| (.+?) \|$", readme, re.MULTILINE)}
    assert rows == {code.value: code.meaning for code in ExitCode}
    for code in ExitCode:
        assert f"{code:d} {code.meaning}" in shown


# Whatever goes wrong


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-none\r\n", b"\x15\x03\x03\x00\x02\x02\x28"],
    ids=["http", "ssh", "tls"],
)
def test_a_wrong_port_is_said(environment: dict[str, str], answer: bytes) -> None:
    with something_else(answer) as address:
        result = darkroom(environment | {"DARKROOM_ADDRESS": address}, "info")
    assert result.exit_code == ExitCode.UNAVAILABLE
    assert address in result.stderr
    assert "darkroom config show" in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("answer", "status", "advice"),
    [
        (
            Refuse(code=grpc.StatusCode.UNAUTHENTICATED, reason="UNAUTHENTICATED"),
            1,
            "darkroom config set key",
        ),
        (Refuse(code=grpc.StatusCode.DEADLINE_EXCEEDED), 3, "darkroom jobs"),
        (Refuse(code=grpc.StatusCode.INTERNAL, reason="INTERNAL", sentence="Error 7f."), 3, "Error 7f."),
        (Refuse(code=grpc.StatusCode.UNIMPLEMENTED, sentence="No such method."), 3, "No such method."),
    ],
    ids=["key", "deadline", "bug", "older service"],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["for people", "as JSON"])
def test_what_the_service_says_is_passed_on_without_a_traceback(
    service: ScriptedService,
    environment: dict[str, str],
    answer: Refuse,
    status: int,
    advice: str,
    as_json: bool,
) -> None:
    service.says("GetJob", answer)
    result = darkroom(environment, "show", UID, *["--json"] * as_json)
    assert (result.exit_code, result.stdout) == (status, "")
    assert advice in result.stderr
    assert "Traceback" not in result.stderr


# Settings of the service


@pytest.fixture
def of_service(
    environment: dict[str, str], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Where the service's settings are: a darkroom.toml, and the environment over it."""
    (in_folder / "darkroom.toml").write_text('log_level = "debug"\n[frontdoor]\nport = 7001\nhost = "::1"\n')
    monkeypatch.delenv("DARKROOM_CONFIG", raising=False)
    return environment | {
        "DARKROOM_FRONTDOOR__PORT": "7002",
        "DARKROOM_WORKER": '{"threads": 3}',
        "DARKROOM_DATABASE__DSN": "postgresql://ada:swordfish@db/darkroom?sslmode=require",
    }


def test_each_setting_of_the_service_is_shown_with_its_source_and_no_password(
    of_service: dict[str, str],
) -> None:
    result = darkroom(of_service, "config", "show", "--json")
    shown = {name: (each["value"], each["source"]) for name, each in one_document(result).items()}
    assert shown["address"][1] == "DARKROOM_ADDRESS"
    assert shown["service.frontdoor.port"] == ("7002", "DARKROOM_FRONTDOOR__PORT")
    assert shown["service.frontdoor.host"] == ("::1", "darkroom.toml")
    assert shown["service.log_level"] == ("debug", "darkroom.toml")
    assert shown["service.worker.threads"] == ("3", "DARKROOM_WORKER")
    assert shown["service.ray.local_gpus"] == ("0", "default")
    assert shown["service.database.dsn"] == (
        "postgresql://ada:…@db/darkroom?sslmode=require",
        "DARKROOM_DATABASE__DSN",
    )
    assert "swordfish" not in result.output


@pytest.mark.parametrize(
    ("text", "said"), [("port = ", "not valid TOML"), ("[frontdoor]\nport = -1", "frontdoor.port")]
)
def test_settings_of_the_service_that_are_wrong_are_said_without_a_traceback(
    environment: dict[str, str], in_folder: Path, text: str, said: str
) -> None:
    (in_folder / "darkroom.toml").write_text(text)
    for command in (["config", "show"], ["serve"]):
        result = darkroom(environment, *command)
        assert result.exit_code == ExitCode.USAGE
        assert said in result.output
        assert isinstance(result.exception, SystemExit)


# Completion


def completed(shell: str, words: str) -> str:
    """Return what a shell is told that could follow the words, of which the last is being typed."""
    asked = {
        "bash": {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))},
        "zsh": {"_TYPER_COMPLETE_ARGS": words},
        "fish": {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = subprocess.run(
        [DARKROOM],
        env={**os.environ, "_DARKROOM_COMPLETE": f"complete_{shell}", **asked},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_complete(shell: str) -> None:
    assert "imagine" in completed(shell, "darkroom im")
    assert "unpause" in completed(shell, "darkroom admin unp")
    assert "--client-only" in completed(shell, "darkroom doctor --cl")
    assert "cancelled" in completed(shell, "darkroom jobs --state ca")


def test_what_show_completion_prints_works_in_bash(environment: dict[str, str], tmp_path: Path) -> None:
    bin_folder = Path(DARKROOM).parent
    script = f"""
        PATH={bin_folder}:$PATH
        eval "$(darkroom --show-completion)"
        COMP_WORDS=(darkroom ups) COMP_CWORD=1
        _darkroom_completion darkroom
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "upscale\n", done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_installed_for_every_shell(shell: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [DARKROOM, "--install-completion", shell],
        env={**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert f"{shell} completion installed" in done.stdout
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_DARKROOM_COMPLETE" in path.read_text() for path in written)
