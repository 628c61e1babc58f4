"""What the project's pages tell people to type, and what takes it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from ray.scripts.scripts import cli as ray_commands

from scheduler.__main__ import server
from scheduler.client.commands import app
from scheduler.client.config import NAMES
from scheduler.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("billing", "deploy", "gpu_worker", "proto", "scheduler", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])

JOB = "1b4e28ba-2fa1-4d3b-9f0c-51d2a6e8c7f4"
"""What stands for JOB in a command."""

_GROUPS: dict[str, Any] = {"ray": ray_commands, "darkroom": typer.main.get_command(app)}
_SERVERS: Any = typer.main.get_command(server)
# How another program is told to run one of ours.
_WRAPPED = re.compile(r"^(kubectl .* -- |sudo -u \w+ env (\w+=\S+ )*)")
_FENCED = r"^( *)```{language}\n(.*?)^ *```$"


def blocks(page: str, language: str) -> list[str]:
    """Return a page's code blocks in a language."""
    found = re.findall(_FENCED.format(language=language), page, re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of each command of ours and of Ray's in the blocks of a page that are for a shell."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for one in re.split(r"&&|\|", line):
                yield from _ours(one)


def mentioned(page: str) -> Iterator[list[str]]:
    """Yield the words of each command that is named in a sentence, perhaps without all that it takes."""
    sentences = re.sub(_FENCED.format(language=r"\w*"), "", page, flags=re.DOTALL | re.MULTILINE)
    for quoted in re.findall(r"`([^`]+)`", sentences):
        yield from _ours(" ".join(quoted.replace("[", "").replace("]", "").split()))


def _ours(line: str) -> Iterator[list[str]]:
    text = _WRAPPED.sub("", line.strip())
    if re.match(rf"(\S*/)?({'|'.join(_GROUPS)}) ", text):
        words = shlex.split(text.replace("JOB", JOB), comments=True)
        yield words[: words.index(">")] if ">" in words else words


def ask(program: str, *words: str) -> None:
    """Raise what a program raises of a command line that it does not take; nothing is run."""
    command, rest = _command(program, *words)
    # The program itself would act on its options as it reads them.
    if rest != ["--help"] and not words[0].startswith("-"):
        command.make_context(words[0], rest).close()
    check_options(program, *words)


def check_options(program: str, *words: str) -> None:
    """Raise KeyError for a command or an option that a program does not have."""
    command, rest = _command(program, *words)
    known = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    for word in rest:
        if word.startswith("--") and word != "--help":
            known[word.partition("=")[0]]


def _command(program: str, *words: str) -> tuple[Any, list[str]]:
    """Return the command that the first words name, and the others."""
    one: Any = _GROUPS[program]
    # The client hands these over with all their options unread.
    if program == "darkroom" and words[0] in _SERVERS.commands:
        one = _SERVERS
    rest = list(words)
    while hasattr(one, "commands") and rest and not rest[0].startswith("-"):
        one = one.commands[rest.pop(0)]
    return one, rest


def names_in_the_environment() -> set[str]:
    """Return every name that the service or the client reads."""
    clients = {f"DARKROOM_{name.upper()}" for name in NAMES}
    return {*_names_of(Settings, "DARKROOM_"), "DARKROOM_CONFIG", *clients}


def _names_of(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _names_of(kind, f"{prefix}{name.upper()}__")
        else:
            yield prefix + name.upper()
