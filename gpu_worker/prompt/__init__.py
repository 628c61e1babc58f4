"""The prompt language: what a person types becomes text for the model and checked parameters.

    https://host/fox.png a lighthouse in fog::2 crowd::-0.5 --w 256 --h 320 --seed 7 --relax

URLs of pictures first, then text in parts that may have weights, then `--` parameters in any order and any
case. `parse` reports every violation of a prompt together, each in a sentence its author can act on, and
raises nothing but `PromptRefused` whatever the text is. Its time is linear in the text's length, which is
limited before anything else is looked at. `print_prompt` is the way back.

Standard library only: the front door parses with it and carries no torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gpu_worker.contract import WHOLE_PPM, TextPart
from gpu_worker.prompt.findings import CONTROL, Findings, PromptRefused, Violation, shown
from gpu_worker.prompt.parameters import Parameters
from gpu_worker.prompt.texts import BLANK, pieces, shows, texts, urls
from gpu_worker.prompt.weights import decimal, in_one_unit, shares_ppm
from gpu_worker.prompt.words import FIRST_URL, MAX_SEED, SIDE_STEP

__all__ = [
    "BLANK",
    "MAX_CHARACTERS",
    "MAX_PARTS",
    "MAX_SEED",
    "SIDE_STEP",
    "ParsedPrompt",
    "PromptRefused",
    "Violation",
    "file_stem",
    "parse",
    "print_prompt",
    "without_urls",
]

MAX_CHARACTERS = 6000
MAX_PARTS = 16
"""Text parts and pictures of a prompt together. Each costs a pass through the denoiser in each step."""

_STEM_CHARACTERS = 40
_NOT_IN_STEM = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, kw_only=True)
class ParsedPrompt:
    """A prompt that can be drawn. A parameter that was not given is None."""

    text: str
    """The text of all parts, one space between words."""
    urls: tuple[str, ...] = ()
    """Of pictures, http or https, in the case they were typed in."""
    parts: tuple[TextPart, ...] = ()
    """The texts of `--no` come last. Empty where `text` is all there is and a weight would mean nothing."""
    picture_shares_ppm: tuple[int, ...] = ()
    """Of uploaded pictures, then of `urls`; with those of `parts` they make WHOLE_PPM without their signs."""
    width: int | None = None
    """Pixels, a multiple of 64. The model's entry says which sizes it can draw."""
    height: int | None = None
    aspect: tuple[int, int] | None = None
    """Across and down, in place of width and height; each 1 to 9999. The model's entry says what size."""
    seed: int | None = None
    stop_percent: int = 100
    """Of the steps, after which the picture is shown as it is; 10 to 100."""
    light_upscale: bool = False
    video: bool = False
    tier: str | None = None
    """`fast` or `relax`."""
    visibility: str | None = None
    """`private` or `public`."""
    warnings: tuple[str, ...] = field(default=(), compare=False)
    """About how it was typed, not what it asks for: two ways to ask for the same are equal."""


def parse(prompt: str, uploaded: int = 0) -> ParsedPrompt:
    """Return what `prompt` asks for, sent together with `uploaded` pictures.

    Raises PromptRefused with all violations, in the order of the text; a prompt that is too long is
    refused for that alone.
    """
    findings = Findings()
    if len(prompt) > MAX_CHARACTERS:
        findings.refuse(
            "prompt", f"The prompt has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are allowed."
        )
        raise PromptRefused(tuple(findings.violations))
    if CONTROL.search(prompt):
        findings.refuse("prompt", "The prompt contains control characters; remove them.")
    words = prompt.split()
    first = _urls_of(words)
    named = urls(words[:first], findings)
    text, rest = pieces(words[first:])
    before = texts(text, findings)
    pictures = uploaded + len(named)
    if not any(shows(part.text) for part in before):
        what = "say in words what to draw from the pictures" if pictures else "say what to draw"
        findings.refuse("prompt", f"The prompt has no text before its parameters; {what}.")
    parameters = Parameters(rest, findings)
    parts = [*before, *parameters.without]
    weights = in_one_unit([part.weight for part in parts], parameters.picture_weight, pictures)
    if len(weights) > MAX_PARTS:
        findings.refuse(
            "prompt",
            f"The prompt has {len(weights)} text parts and pictures; at most {MAX_PARTS} are allowed.",
        )
    if before and not any(weights):
        findings.refuse("prompt", "All weights are zero; give a part another weight.")
    if findings.violations:
        raise PromptRefused(tuple(findings.violations))
    if len(weights) == 1 and parts[0].typed and parts[0].weight > 0:
        findings.warn(
            f"The weight {parts[0].typed} has no effect: there is nothing to weigh the text against."
        )
    if parameters.picture_weight is not None and not pictures:
        findings.warn("--iw has no effect: there are no pictures to weigh against the text.")
    shares = shares_ppm(weights)
    return ParsedPrompt(
        text=" ".join(part.text for part in parts),
        urls=named,
        parts=()
        if shares == (WHOLE_PPM,)
        else tuple(
            TextPart(text=part.text, share_ppm=share) for part, share in zip(parts, shares, strict=False)
        ),
        picture_shares_ppm=shares[len(parts) :],
        width=parameters.numbers.get("w"),
        height=parameters.numbers.get("h"),
        aspect=parameters.aspect,
        seed=parameters.numbers.get("seed"),
        stop_percent=parameters.numbers.get("stop", 100),
        light_upscale="uplight" in parameters.flags,
        video="video" in parameters.flags,
        tier=parameters.chosen("fast", "relax"),
        visibility=parameters.chosen("private", "public"),
        warnings=tuple(findings.warnings),
    )


def unread(parsed: ParsedPrompt, words_read: int) -> Iterator[str]:
    """Yield a warning for each part that is longer than what a model reads of it, from its beginning."""
    for text in [part.text for part in parsed.parts] or [parsed.text]:
        words = text.count(" ") + 1
        if words > words_read:
            these = f"the {words} of “{shown(text)}”" if parsed.parts else f"these {words}"
            yield f"The model reads about {words_read} words; of {these} the last ones have no effect."


def print_prompt(parsed: ParsedPrompt) -> str:
    """Return a prompt that parses to `parsed`, with as many uploaded pictures as it came with.

    Weights are written as shares, so it may be longer than what was typed, and longer than MAX_CHARACTERS
    where that was nearly full.
    """
    words = list(parsed.urls)
    for part in parsed.parts:
        space = " " if part.text.endswith(":") else ""
        words.append(f"{part.text}{space}::{decimal(part.share_ppm)}")
    if not parsed.parts:
        words.append(parsed.text)
    if parsed.picture_shares_ppm:
        words += ("--iw", decimal(sum(parsed.picture_shares_ppm)))
    for name, number in (("w", parsed.width), ("h", parsed.height), ("seed", parsed.seed)):
        if number is not None:
            words += (f"--{name}", str(number))
    if parsed.aspect is not None:
        words += ("--ar", "{}:{}".format(*parsed.aspect))
    if parsed.stop_percent != 100:
        words += ("--stop", str(parsed.stop_percent))
    given = {"uplight": parsed.light_upscale, "video": parsed.video}
    flags = [name for name, is_given in given.items() if is_given]
    words += [f"--{name}" for name in (*flags, parsed.tier, parsed.visibility) if name is not None]
    return " ".join(words)


def without_urls(prompt: str) -> str:
    """Return a prompt, which may be one that is refused, without the URLs of pictures that it begins with."""
    count = _urls_of(prompt.split())
    rest = prompt.split(maxsplit=count)[count:]
    return rest[0] if rest else ""


def file_stem(text: str) -> str:
    """Return a short name for files made from `text`: 1 to 40 of a-z, 0-9 and `_`."""
    # Each character alone: putting a long run of combining marks in order takes quadratic time.
    plain = "".join(unicodedata.normalize("NFKD", character) for character in text[:MAX_CHARACTERS])
    ascii_text = plain.encode("ascii", "ignore").decode("ascii")
    stem = _NOT_IN_STEM.sub("_", ascii_text.lower()).strip("_")
    if len(stem) > _STEM_CHARACTERS:
        whole_words = stem[: _STEM_CHARACTERS + 1].rpartition("_")[0]
        stem = whole_words or stem[:_STEM_CHARACTERS]
    return stem or "image"


def _urls_of(words: Sequence[str]) -> int:
    """Return how many words at the beginning are URLs."""
    return next((i for i, word in enumerate(words) if not FIRST_URL.match(word)), len(words))
