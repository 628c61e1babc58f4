"""The prompt language: what a person types becomes text for the model and checked parameters.

    a lighthouse in fog --w 256 --h 320 --seed 7 --relax

Text first, then `--` parameters in any order and any case. `parse` reports every violation of a prompt
together, each in a sentence its author can act on, and raises nothing but `PromptRefused` whatever the
text is. Its time is linear in the text's length, which is limited before anything else is looked at.

Standard library only: the front door parses with it and carries no torch.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CHARACTERS = 6000
MAX_SEED = 2**32 - 1
"""Seeds are 0 to this: the range that people's seeds from other tools come from."""
SIDE_STEP = 64
"""Widths and heights are multiples of this: eight pixels a latent, and three halvings in large models."""

# A CLIP text encoder reads 75 tokens, about 60 English words.
_WORDS_READ = 60
_STEM_CHARACTERS = 40
# More unknown parameters than a person mistypes. The rest is counted only: a hostile prompt costs little.
_UNKNOWN_SHOWN = 20
_SHOWN_CHARACTERS = 40

_SIDES = ("w", "h")
_FLAGS = ("fast", "relax", "private", "public")
_PARAMETERS = (*_SIDES, "seed", *_FLAGS)

_NUMBER = re.compile(r"[0-9]{1,10}", re.ASCII)
_URL = re.compile(r"https?://", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
_NOT_IN_STEM = re.compile(r"[^a-z0-9]+")


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


@dataclass(frozen=True, kw_only=True)
class ParsedPrompt:
    """A prompt that can be drawn. A parameter that was not given is None."""

    text: str
    """For the model: no parameters, one space between words."""
    width: int | None = None
    """Pixels, a multiple of 64. The model's entry says which sizes it can draw."""
    height: int | None = None
    seed: int | None = None
    tier: str | None = None
    """`fast` or `relax`."""
    visibility: str | None = None
    """`private` or `public`."""
    warnings: tuple[str, ...] = ()


def parse(prompt: str) -> ParsedPrompt:
    """Return what `prompt` asks for.

    Raises PromptRefused with all violations, in the order of the text; a prompt that is too long is
    refused for that alone.
    """
    if len(prompt) > MAX_CHARACTERS:
        sentence = f"The prompt has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are allowed."
        raise PromptRefused((Violation(field="prompt", sentence=sentence),))
    words = prompt.split()
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    text = " ".join(words[:first])
    violations = _text_violations(prompt, text)
    parameters = _Parameters(violations)
    for name, values in _parameters(words[first:]):
        parameters.take(name, values)
    parameters.refuse_contradictions()
    parameters.refuse_the_rest()
    if violations:
        raise PromptRefused(tuple(violations))
    return ParsedPrompt(
        text=text,
        width=parameters.numbers.get("w"),
        height=parameters.numbers.get("h"),
        seed=parameters.numbers.get("seed"),
        tier=parameters.chosen("fast", "relax"),
        visibility=parameters.chosen("private", "public"),
        warnings=_warnings(words[:first]),
    )


def file_stem(text: str) -> str:
    """Return a short name for files made from `text`: 1 to 40 of a-z, 0-9 and `_`."""
    ascii_text = (
        unicodedata.normalize("NFKD", text[:MAX_CHARACTERS]).encode("ascii", "ignore").decode("ascii")
    )
    stem = _NOT_IN_STEM.sub("_", ascii_text.lower()).strip("_")
    if len(stem) > _STEM_CHARACTERS:
        whole_words = stem[: _STEM_CHARACTERS + 1].rpartition("_")[0]
        stem = whole_words or stem[:_STEM_CHARACTERS]
    return stem or "image"


def _text_violations(prompt: str, text: str) -> list[Violation]:
    found = []
    if not text:
        found.append("The prompt has no text before its parameters; say what to draw.")
    if _CONTROL.search(prompt):
        found.append("The prompt contains control characters; remove them.")
    if "::" in text:
        found.append("Weights (`::`) are not offered yet; write the text without them.")
    if _URL.search(text):
        found.append("Image prompts (URLs) are not offered yet; describe the picture in words.")
    return [Violation(field="prompt", sentence=sentence) for sentence in found]


def _warnings(words: Sequence[str]) -> tuple[str, ...]:
    if len(words) <= _WORDS_READ:
        return ()
    return (
        f"The model reads about {_WORDS_READ} words; of these {len(words)} the last ones have no effect.",
    )


def _parameters(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Split words into parameters as they were typed, without dashes, each with the words that follow it."""
    parameters: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            parameters.append((word[2:], []))
        else:
            parameters[-1][1].append(word)
    return parameters


class _Parameters:
    """What the parameters read so far say; what is wrong with them goes into `violations`."""

    def __init__(self, violations: list[Violation]) -> None:
        self.numbers: dict[str, int] = {}
        self._flags: set[str] = set()
        self._seen: set[str] = set()
        self._unknown = 0
        self._violations = violations

    def take(self, typed: str, values: Sequence[str]) -> None:
        name = typed.lower()
        if name not in _PARAMETERS:
            self._refuse_unknown(typed, name)
        elif name in self._seen:
            self._refuse(name, f"--{name} is given more than once; give it once.")
        elif name in _FLAGS:
            self._take_flag(name, values)
        else:
            self._take_number(name, values)

    def chosen(self, one: str, other: str) -> str | None:
        return one if one in self._flags else other if other in self._flags else None

    def refuse_contradictions(self) -> None:
        for one, other in (("fast", "relax"), ("private", "public")):
            if {one, other} <= self._flags:
                self._refuse(one, f"--{one} and --{other} contradict each other; give one of them.")

    def refuse_the_rest(self) -> None:
        more = self._unknown - _UNKNOWN_SHOWN
        if more > 0:
            self._violations.append(
                Violation(field="prompt", sentence=f"{more} more parameters are unknown.")
            )

    def _take_flag(self, name: str, values: Sequence[str]) -> None:
        self._seen.add(name)
        self._flags.add(name)
        if values:
            self._refuse(
                name,
                f"--{name} takes no value, but {_shown(values[0])} follows it; text goes before parameters.",
            )

    def _take_number(self, name: str, values: Sequence[str]) -> None:
        self._seen.add(name)
        wanted = "a whole number" if name == "seed" else f"a multiple of {SIDE_STEP}"
        if not values:
            self._refuse(name, f"--{name} needs a value: {wanted}.")
            return
        if len(values) > 1:
            self._refuse(
                name,
                f"--{name} takes one value, but {_shown(values[1])} follows it; text goes before parameters.",
            )
        if not _NUMBER.fullmatch(values[0]):
            self._refuse(name, f"--{name} must be {wanted}, not {_shown(values[0])}.")
            return
        number = int(values[0])
        if name in _SIDES and (number == 0 or number % SIDE_STEP):
            below = number // SIDE_STEP * SIDE_STEP
            nearest = f"{below} or {below + SIDE_STEP}" if below else f"{SIDE_STEP}"
            self._refuse(name, f"--{name} must be a multiple of {SIDE_STEP}, not {number}; try {nearest}.")
        elif name == "seed" and number > MAX_SEED:
            self._refuse(name, f"--seed must be 0 to {MAX_SEED}, not {number}.")
        else:
            self.numbers[name] = number

    def _refuse_unknown(self, typed: str, name: str) -> None:
        self._unknown += 1
        if self._unknown > _UNKNOWN_SHOWN:
            return
        if not name:
            sentence = "A `--` stands alone; write a parameter's name directly after it, or leave it out."
            self._violations.append(Violation(field="prompt", sentence=sentence))
            return
        (nearest,) = difflib.get_close_matches(name[:_SHOWN_CHARACTERS], _PARAMETERS, n=1, cutoff=0.0)
        parameter = f"--{_shown(typed)}"
        self._violations.append(
            Violation(
                field=parameter,
                sentence=f"Unknown parameter {parameter}; the nearest known one is --{nearest}.",
            )
        )

    def _refuse(self, name: str, sentence: str) -> None:
        self._violations.append(Violation(field=f"--{name}", sentence=sentence))


def _shown(word: str) -> str:
    return word if len(word) <= _SHOWN_CHARACTERS else word[: _SHOWN_CHARACTERS - 1] + "…"
