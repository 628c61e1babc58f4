"""What the `--` parameters of a prompt say."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from gpu_worker.prompt.findings import Findings, shown
from gpu_worker.prompt.texts import WeightedText
from gpu_worker.prompt.weights import ONE, WEIGHTS_ARE, weight_of
from gpu_worker.prompt.words import (
    FLAGS,
    MAX_SEED,
    MAX_SIDE,
    MIN_STOP_PERCENT,
    OF_OTHERS,
    OTHER_NAMES,
    PARAMETERS,
    SIDE_STEP,
    SIDES,
    WANTED,
    parameter_name,
    refuse_misplaced,
)

# More unknown parameters than a person mistypes. The rest is counted only: a hostile prompt costs little.
_UNKNOWN_SHOWN = 20
_NAME_CHARACTERS = 40

_WHOLE = re.compile(r"[0-9]{1,10}")
_RATIO = re.compile(r"([0-9]{1,4}):([0-9]{1,4})")


class Parameters:
    """The parameters of a prompt. One that was not given is None, or not in `numbers` and `flags`."""

    def __init__(self, words: Sequence[str], findings: Findings) -> None:
        """Read `words`, the first of which is a parameter."""
        self.numbers: dict[str, int] = {}
        self.flags: set[str] = set()
        self.aspect: tuple[int, int] | None = None
        self.picture_weight: int | None = None
        """Of all pictures together, in units of 1 / ONE."""
        self.without: list[WeightedText] = []
        self._seen: set[str] = set()
        self._unknown = 0
        self._findings = findings
        for typed, values in _parted(words):
            self._take(typed, values)
        self._refuse_contradictions()
        if self._unknown > _UNKNOWN_SHOWN:
            findings.refuse("prompt", f"{self._unknown - _UNKNOWN_SHOWN} more parameters are unknown.")

    def chosen(self, one: str, other: str) -> str | None:
        return one if one in self.flags else other if other in self.flags else None

    def _take(self, typed: str, values: Sequence[str]) -> None:
        name = typed.lower()
        if name not in PARAMETERS:
            self._refuse_unknown(typed, name)
        elif name == "no":
            self._take_words(values)
        elif name in self._seen:
            self._refuse(name, f"--{name} is given more than once; give it once.")
        else:
            self._seen.add(name)
            if name in FLAGS:
                self.flags.add(name)
                self._refuse_text_behind(f"--{name} takes no value", name, values)
            elif values:
                self._refuse_text_behind(f"--{name} takes one value", name, values[1:])
                self._take_value(name, values[0])
            else:
                self._refuse(name, f"--{name} needs a value: {WANTED[name]}.")

    def _take_words(self, words: Sequence[str]) -> None:
        if not words:
            self._refuse("no", "--no needs words: what should not be seen.")
            return
        if any("::" in word for word in words):
            self._refuse("no", "--no takes words without ::; write text::-0.5 before the parameters instead.")
        refuse_misplaced(words, "--no", self._findings)
        self.without.append(WeightedText(text=" ".join(words), weight=-ONE // 2))

    def _take_value(self, name: str, value: str) -> None:
        if name == "iw":
            self.picture_weight = weight_of(value)
            if self.picture_weight is None:
                self._refuse(name, f"--iw must be a number, not {shown(value)}; {WEIGHTS_ARE}.")
        elif name == "ar":
            ratio = _RATIO.fullmatch(value)
            if ratio is None or not int(ratio[1]) or not int(ratio[2]):
                self._refuse(name, f"--ar must be {WANTED[name]}, not {shown(value)}.")
            else:
                self.aspect = int(ratio[1]), int(ratio[2])
        elif _WHOLE.fullmatch(value):
            self._take_number(name, int(value))
        else:
            self._refuse(name, f"--{name} must be {WANTED[name]}, not {shown(value)}.")

    def _take_number(self, name: str, number: int) -> None:
        if (name in SIDES and number > MAX_SIDE) or (name == "seed" and number > MAX_SEED):
            self._refuse(name, f"--{name} must be {WANTED[name]}, not {number}.")
        elif name in SIDES and (number == 0 or number % SIDE_STEP):
            below = number // SIDE_STEP * SIDE_STEP
            nearest = f"{below} or {below + SIDE_STEP}" if below else f"{SIDE_STEP}"
            self._refuse(name, f"--{name} must be {WANTED[name]}, not {number}; try {nearest}.")
        elif name == "stop" and not MIN_STOP_PERCENT <= number <= 100:
            self._refuse(name, f"--stop must be {WANTED[name]}, not {number}.")
        else:
            self.numbers[name] = number

    def _refuse_contradictions(self) -> None:
        for one, other in (("fast", "relax"), ("private", "public")):
            if {one, other} <= self.flags:
                self._refuse(one, f"--{one} and --{other} contradict each other; give one of them.")
        sides = " and ".join(f"--{side}" for side in SIDES if side in self._seen)
        if "ar" in self._seen and sides:
            self._refuse("ar", f"--ar stands in place of a size; leave out either it or {sides}.")

    def _refuse_text_behind(self, takes: str, name: str, words: Sequence[str]) -> None:
        if words:
            # The word itself is left out: it is text, and errors end up where prompts must not.
            self._refuse(name, f"{takes}, but more follows it; text goes before parameters.")

    def _refuse_unknown(self, typed: str, name: str) -> None:
        self._unknown += 1
        if self._unknown > _UNKNOWN_SHOWN:
            return
        if not name.strip("-"):
            sentence = "A `--` stands alone; write a parameter's name directly after it, or leave it out."
            self._findings.refuse("prompt", sentence)
            return
        parameter = f"--{shown(typed)}"
        bare, equals, value = name.partition("=")
        if equals and bare in PARAMETERS:
            sentence = f"Unknown parameter {parameter}; write --{bare} {shown(value)} with a space."
        else:
            leave_out = "; leave it out, since only other programs have it" if bare in OF_OTHERS else ""
            sentence = (
                f"Unknown parameter {parameter}{leave_out}; the nearest known one is --{_nearest(bare)}."
            )
        self._findings.refuse(parameter, sentence)

    def _refuse(self, name: str, sentence: str) -> None:
        self._findings.refuse(f"--{name}", sentence)


def _parted(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Part words into parameters as they were typed, without dashes, each with the words that follow it."""
    parameters: list[tuple[str, list[str]]] = []
    for word in words:
        name = parameter_name(word)
        if name is not None:
            parameters.append((name, []))
        else:
            parameters[-1][1].append(word)
    return parameters


def _nearest(name: str) -> str:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    (nearest,) = difflib.get_close_matches(name[:_NAME_CHARACTERS], PARAMETERS, n=1, cutoff=0.0)
    return nearest
