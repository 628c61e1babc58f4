"""systemd's unit files, as far as ours go: what they say, and their commands as processes of a test."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

SYSTEMD = Path(__file__).resolve().parents[2] / "deploy" / "systemd"


def units() -> list[Path]:
    """Return our unit files."""
    return sorted(SYSTEMD.glob("*.service"))


def directives(unit: Path) -> dict[str, list[str]]:
    """Return what a unit says: the values of each directive, in order, whichever section it is in."""
    said = defaultdict(list)
    for line in unit.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            said[name].append(value)
    return said


def environment(unit: Path) -> dict[str, str]:
    """Return what it sets in the environment by itself, without its files."""
    return dict(
        setting.split("=", 1) for line in directives(unit)["Environment"] for setting in shlex.split(line)
    )


def command(line: str, variables: Mapping[str, str]) -> list[str]:
    """Return the words of an Exec line as systemd splits it.

    `${NAME}` is one word, or part of one; `$NAME` alone is as many as are in it.
    """
    words = []
    for word in shlex.split(line):
        if alone := re.fullmatch(r"\$(\w+)", word):
            words += variables[alone[1]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda found: variables[found[1]], word))
    return words


def settings_of(file: Path) -> dict[str, str]:
    """Return the assignments of an environment file."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)
