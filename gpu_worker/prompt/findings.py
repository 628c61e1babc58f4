"""What is wrong with a prompt, and what its author should know."""

from __future__ import annotations

import re
from dataclasses import dataclass

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One thing that is wrong with a prompt."""

    field: str
    """`prompt`, or the parameter as it should be typed: `--w`."""
    sentence: str


class PromptRefused(Exception):
    """The prompt cannot be drawn as it is; `violations` says all that is wrong with it."""

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        super().__init__(violations)
        self.violations = violations

    def __str__(self) -> str:
        return " ".join(violation.sentence for violation in self.violations)


class Findings:
    """What was found in a prompt so far."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.warnings: list[str] = []

    def refuse(self, field: str, sentence: str) -> None:
        self.violations.append(Violation(field=field, sentence=sentence))

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)


def shown(text: str) -> str:
    """Return the beginning of a prompt's words, fit for a sentence."""
    cut = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
    return CONTROL.sub("\ufffd", cut)
