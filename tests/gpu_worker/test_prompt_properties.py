"""What holds of the prompt language whatever is typed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gpu_worker.contract import WHOLE_PPM
from gpu_worker.prompt import (
    MAX_CHARACTERS,
    MAX_PARTS,
    ParsedPrompt,
    PromptRefused,
    Violation,
    file_stem,
    findings,
    parameters,
    parse,
    print_prompt,
    weights,
    words,
)

_WORDS = st.sampled_from(
    ["fog", "Ratio:", ":", ",", ",x", "3", "8k", "-", "—", "—dusk", "a--b", "http:", "🧚🏿‍♀️", "é", "1:1"]
)
_TEXT = st.lists(_WORDS, min_size=1, max_size=4).map(" ".join)
_WEIGHTS = st.one_of(
    st.just(""),
    st.integers(-9, 9).map(str),
    st.decimals(-1000, 1000, places=4).map(lambda weight: f"{weight:f}"),
)
_URLS = st.sampled_from(["https://Host/A.png", "http://[::1]/b", "<HTTPS://h/c?d=::e>", "http://h/,"])
_PARAMETERS = st.one_of(
    st.sampled_from(["--uplight", "--VIDEO", "--fast", "--Relax", "--private", "--public", "--ar 16:9"]),
    st.sampled_from(["--w 64", "--h 128", "--seed 0", "--STOP 10", "—seed 5"]),
    _TEXT.map(lambda text: f"--no {text}"),
    _WEIGHTS.map(lambda weight: f"--iw {weight}"),
)


@st.composite
def prompts(draw: Callable[[st.SearchStrategy[list[str]]], list[str]]) -> str:
    """Return a prompt that is mostly right."""
    parts = st.builds(
        lambda text, space, weight: f"{text}{space}::{weight}", _TEXT, st.sampled_from(["", " "]), _WEIGHTS
    )
    urls = draw(st.lists(_URLS, max_size=3))
    weighted = draw(st.lists(parts, max_size=4))
    last = draw(st.lists(_TEXT, min_size=not weighted, max_size=1))
    named = draw(st.lists(_PARAMETERS, max_size=4, unique_by=lambda one: one.split()[0].lower()))
    return " ".join((*urls, *weighted, *last, *named))


_TOKENS = st.one_of(
    st.sampled_from(
        ["::", "::2", "::-.5,", "--", "---", "--no", "--iw", "--seed", "--w", "64", "http://", "—no", "<"]
    ),
    _WORDS,
    st.text(max_size=5),
    st.text(st.characters(categories=["Cs", "Cc", "Mn", "Cf", "Zs"]), max_size=3),
)
_SCRAPS = st.lists(st.tuples(_TOKENS, st.sampled_from(["", " "])).map("".join), max_size=30).map("".join)
_ANYTHING = st.one_of(st.text(st.characters(), max_size=200), _SCRAPS, prompts())


def accepted(prompt: str, uploaded: int = 0) -> ParsedPrompt | None:
    """Return what was parsed; None for a refusal, which has reasons in sentences."""
    violations: tuple[Violation, ...] = ()
    try:
        return parse(prompt, uploaded)
    except PromptRefused as refused:
        violations = refused.violations
    assert violations
    for violation in violations:
        assert violation.sentence.endswith(".")
        assert violation.field == "prompt" or violation.field.startswith("--")
    return None


@given(_ANYTHING, st.integers(0, 3))
@example("\ud800 --\udfff \x00::\x01", 0)
@example("a" + "\u0301\u0323" * 2000 + " --" + "\u0301" * 1000, 0)
@example("::" * 3000, 0)
@example("fog::--\x1f", 0)
@example("fog::—no::", 0)
@example("http://[ fog", 0)
def test_nothing_but_a_refusal_is_raised(prompt: str, uploaded: int) -> None:
    accepted(prompt, uploaded)


@given(st.one_of(_SCRAPS, prompts()), st.integers(0, 3))
@example("—no::", 0)
def test_a_prompt_that_is_printed_parses_to_the_same(prompt: str, uploaded: int) -> None:
    parsed = accepted(prompt, uploaded)
    assume(parsed is not None)
    assert parsed is not None
    printed = print_prompt(parsed)
    assert parse(printed, uploaded) == parsed
    assert print_prompt(parse(printed, uploaded)) == printed


@given(prompts(), st.integers(0, 3))
def test_shares_add_up(prompt: str, uploaded: int) -> None:
    parsed = accepted(prompt, uploaded)
    assume(parsed is not None)
    assert parsed is not None
    assert len(parsed.picture_shares_ppm) == uploaded + len(parsed.urls)
    if parsed.parts:
        shares = [*(part.share_ppm for part in parsed.parts), *parsed.picture_shares_ppm]
        assert sum(map(abs, shares)) == WHOLE_PPM
        assert " ".join(part.text for part in parsed.parts) == parsed.text
    else:
        assert parsed.picture_shares_ppm == ()


@given(st.lists(st.integers(-(10**21), 10**21), min_size=1, max_size=MAX_PARTS).filter(any))
def test_a_share_is_within_a_millionth_of_its_weight(given_weights: list[int]) -> None:
    total = sum(map(abs, given_weights))
    shares = weights.shares_ppm(given_weights)
    assert sum(map(abs, shares)) == WHOLE_PPM
    for share, weight in zip(shares, given_weights, strict=True):
        assert abs(share * total - weight * WHOLE_PPM) < total


@given(prompts(), st.integers(0, 1))
def test_the_case_of_keywords_does_not_matter(prompt: str, uploaded: int) -> None:
    def of_other_case(keyword: re.Match[str]) -> str:
        return keyword[0].swapcase()

    swapped = re.sub(r"(?<=\s)(--[A-Za-z]+|—seed)", of_other_case, prompt)
    assert accepted(swapped, uploaded) == accepted(prompt, uploaded)


@given(st.text(st.characters()))
def test_file_stems_are_short_and_plain(text: str) -> None:
    stem = file_stem(text)
    assert 1 <= len(stem) <= 40
    assert stem.isascii()
    assert stem.replace("_", "").isalnum()
    assert stem == stem.lower().strip("_")


def operations(of: Callable[[], object]) -> int:
    """Return how many instructions of Python are executed, those of comprehensions and of libraries too."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object]:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        of()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "a",
            "a ",
            ":",
            "a::",
            ":: ",
            "::1 ",
            "::1x",
            "a::2 ",
            "a:: ",
            "::-",
            "::,",
            "1",
            "9.",
            ",",
            "<",
            ">",
        ),
        *(
            "--",
            "-- ",
            "a-- ",
            "a--w ",
            "--w ",
            "--x ",
            "--no ",
            "--no a ",
            "--no a::b ",
            "— ",
            "—w ",
            "::--",
        ),
        *(
            "http://",
            "http://h ",
            "<http://h>, ",
            "http://h::1 ",
            "a http://h ",
            "x://a ",
            "\u0301",
            "\x00",
            "\ud800 ",
        ),
    ],
)
@pytest.mark.parametrize("before", ["", "a ", "http://h/", "a --no ", "a --seed ", "a::"])
def test_time_is_linear(unit: str, before: str) -> None:
    def of_length(characters: int) -> int:
        prompt = (before + unit * characters)[:characters]
        return operations(lambda: accepted(prompt))

    half, full = of_length(MAX_CHARACTERS // 8), of_length(MAX_CHARACTERS // 4)
    # What is said in sentences is bounded, and what there is to say has a constant of its own.
    assert full <= 2 * half + 20_000


def test_no_pattern_repeats_a_repeat() -> None:
    """What a pattern does is not among the instructions counted above; this would make one slow."""
    patterns = [
        pattern.pattern
        for module in (findings, parameters, weights, words)
        for pattern in vars(module).values()
        if isinstance(pattern, re.Pattern)
    ]
    assert len(patterns) >= 8
    assert [one for one in patterns if re.search(r"[*+}]\)[*+{]", one)] == []
