"""One line of `darkroom doctor`, whichever side of it found out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How well something is."""

    OK = "ok"
    WARN = "warn"
    """It works, but not as it should, or not for long."""
    FAIL = "fail"
    """Something that people rely on does not work."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found of one thing."""

    what: str
    """In a word or two: `database`, `open files`."""
    level: Level
    sentence: str
    fix: str = ""
    """What to type, or to do, unless all is well."""


def ok(what: str, sentence: str) -> Diagnosis:
    """Return that something is as it should be."""
    return Diagnosis(what=what, level=Level.OK, sentence=sentence)


def warn(what: str, sentence: str, fix: str) -> Diagnosis:
    """Return that something works, and ought to be looked at."""
    return Diagnosis(what=what, level=Level.WARN, sentence=sentence, fix=fix)


def fail(what: str, sentence: str, fix: str) -> Diagnosis:
    """Return that something does not work."""
    return Diagnosis(what=what, level=Level.FAIL, sentence=sentence, fix=fix)
