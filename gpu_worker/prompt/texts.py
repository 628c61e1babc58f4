"""What stands before a prompt's parameters: URLs of pictures, then text in parts with weights."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_worker.prompt.findings import Findings, shown
from gpu_worker.prompt.weights import ONE, WEIGHTS_ARE, looks_like_weight, weight_of
from gpu_worker.prompt.words import parameter_name, refuse_misplaced

_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Me", "Mn", "Zl", "Zp", "Zs"))
# Fillers of Hangul, and Braille without a dot: letters and symbols that leave a space.
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")


@dataclass(frozen=True, kw_only=True)
class WeightedText:
    """A text part of a prompt."""

    text: str
    weight: int
    """In units of 1 / ONE, with its sign."""
    typed: str = ""
    """The weight as it was typed; empty where it was not."""


def shows(text: str) -> bool:
    """Return whether anything of a text can be seen: marks, joiners and blank letters alone say nothing."""
    return any(
        unicodedata.category(character) not in _UNSEEN and character not in BLANK for character in text
    )


def urls(words: Sequence[str], findings: Findings) -> tuple[str, ...]:
    """Return the URLs that `words` are, without the angle brackets and commas that people put around them."""
    found = []
    for word in words:
        url = word.lstrip("<").rstrip(",>")
        _, weighted, weight = url.rpartition("::")
        if weighted and (not weight or looks_like_weight(weight)):
            findings.refuse(
                "prompt", f"{shown(url)} has a weight; --iw weighs all pictures against the text."
            )
        elif url.partition("://")[2][:1] in ("", "/", "?", "#"):
            findings.refuse("prompt", f"{shown(url)} names no host; give the full URL of a picture.")
        found.append(url)
    return tuple(found)


def pieces(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the text, in words and in `::` with what directly follows, and the words of the parameters."""
    text: list[str] = []
    for i, word in enumerate(words):
        if parameter_name(word) is not None:
            return text, list(words[i:])
        before, *after = word.split("::")
        if before:
            text.append(before)
        for n, glued in enumerate(after):
            # A comma after `::` parts what is parted already.
            bare = glued.lstrip(",;")
            text.append(f"::{bare}")
            if parameter_name(bare) is not None:
                text[-1] = "::"
                return text, ["::".join((bare, *after[n + 1 :])), *words[i + 1 :]]
    return text, []


def texts(pieces: Sequence[str], findings: Findings) -> list[WeightedText]:
    """Return the text parts that `pieces` make."""
    found: list[WeightedText] = []
    words: list[str] = []
    parted = False
    for piece in pieces:
        if not piece.startswith("::"):
            if parted and not words and looks_like_weight(piece):
                findings.warn(f"{shown(piece)} is read as text; a weight follows :: without a space.")
            words.append(piece)
            continue
        typed, weight, word = _after_colons(piece[2:], findings)
        if words:
            found.append(_part(words, weight, typed, findings))
        elif typed:
            findings.refuse(
                "prompt", f"The weight {shown(typed)} has no text before it; write text, then ::weight."
            )
        words, parted = [word] if word else [], not typed
    if words:
        found.append(_part(words, ONE, "", findings))
    if found and found[0].weight < 0:
        findings.warn(
            f"The weight {found[0].typed} applies to all of the text before it, “{shown(found[0].text)}”; "
            "put :: after the words that it should not apply to."
        )
    return found


def _after_colons(glued: str, findings: Findings) -> tuple[str, int, str]:
    """Return the weight that directly follows `::`, as typed and as a number, or the word that does."""
    typed = glued.rstrip(",;")
    if not looks_like_weight(typed):
        return "", ONE, glued
    weight = weight_of(typed)
    if weight is None:
        findings.refuse("prompt", f"::{shown(typed)} is not a weight; {WEIGHTS_ARE}.")
        return typed, ONE, ""
    return typed, weight, ""


def _part(words: Sequence[str], weight: int, typed: str, findings: Findings) -> WeightedText:
    refuse_misplaced(words, "prompt", findings)
    return WeightedText(text=" ".join(words), weight=weight, typed=typed)
