"""Which words of a prompt are parameters, and which only look like text.

No pattern here or beside it has two ways to match the same text, and repeats before others are bounded: none
can backtrack far.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from gpu_worker.prompt.findings import Findings, shown

MIN_STOP_PERCENT = 10
SIDE_STEP = 64
"""Widths and heights are multiples of this: eight pixels a latent, and three halvings in large models."""

MAX_SIDE = 65_536
"""More than any model draws; each model's entry says how much less."""
MAX_SEED = 2**32 - 1
"""Seeds are 0 to this: the range that people's seeds from other tools come from."""

SIDES = ("w", "h")
FLAGS = ("uplight", "video", "fast", "relax", "private", "public")
_A_SIDE = f"a multiple of {SIDE_STEP} from {SIDE_STEP} to {MAX_SIDE}"
WANTED: Mapping[str, str] = {
    "iw": "a number such as 0.5",
    "w": _A_SIDE,
    "h": _A_SIDE,
    "ar": "two whole numbers such as 3:2",
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "stop": f"a whole number from {MIN_STOP_PERCENT} to 100",
}
"""Parameters that take one value, and which."""
PARAMETERS = (*WANTED, "no", *FLAGS)

# People bring prompts from other programs as they are. There, some parameters have other names,
OTHER_NAMES: Mapping[str, str] = {
    "width": "w",
    "height": "h",
    "aspect": "ar",
    "negative": "no",
    "negative_prompt": "no",
}
# and others there are not here.
OF_OTHERS = frozenset(
    (
        *(
            "c",
            "cfg",
            "cfg_scale",
            "chaos",
            "cref",
            "cw",
            "hd",
            "n",
            "niji",
            "number",
            "q",
            "quality",
            "repeat",
        ),
        *("s", "scale", "separate", "sref", "steps", "style", "stylize", "sv", "sw", "test", "testp", "tile"),
        *("v", "version", "weird", "zoom"),
    )
)
_MEANT = frozenset((*PARAMETERS, *OTHER_NAMES, *OF_OTHERS))

FIRST_URL = re.compile(r"<*https?://", re.IGNORECASE)
_URL = re.compile(r"https?://", re.IGNORECASE)
_OTHER_SCHEME = re.compile(r"<*(?!https?:)[a-z]{1,10}://", re.IGNORECASE)
_MISPLACED_SHOWN = 10


def parameter_name(word: str) -> str | None:
    """Return the name that `word` gives a parameter, as it was typed; None if it is text or a value."""
    if word.startswith("--"):
        return word[2:]
    # Phones make one long dash of two.
    if word.startswith(("—", "–")) and word[1:].partition("::")[0].lower() in _MEANT:
        return word[1:]
    return None


def refuse_misplaced(words: Sequence[str], field: str, findings: Findings) -> None:
    """Refuse words among text that their author did not mean as text."""
    for word in _few(word for word in words if _URL.search(word)):
        findings.refuse(field, f"{shown(word)} stands behind text; URLs of pictures go first.")
    for word in _few(word for word in words if _OTHER_SCHEME.match(word)):
        findings.refuse(
            field, f"{shown(word)} cannot be read; URLs of pictures begin with https:// or http://."
        )
    # Drawn as text, a --private would leave its author's pictures for everybody to see.
    for word in _few(word for word in words if "--" in word and _glued(word) in _MEANT):
        name = OTHER_NAMES.get(_glued(word), _glued(word))
        what = f"write a space before --{name}" if name in PARAMETERS else f"leave --{name} out"
        findings.refuse(field, f"{shown(word)} would be read as text; {what}.")


def _glued(word: str) -> str:
    return word.rpartition("--")[2].lower()


def _few(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))[:_MISPLACED_SHOWN]
