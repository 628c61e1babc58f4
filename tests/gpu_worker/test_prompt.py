"""The prompt language as PRODUCT.md states it, as far as it is offered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.prompt import (
    MAX_CHARACTERS,
    MAX_SEED,
    ParsedPrompt,
    PromptRefused,
    Violation,
    file_stem,
    parse,
)


def violations(prompt: str) -> tuple[Violation, ...]:
    with pytest.raises(PromptRefused) as refused:
        parse(prompt)
    return refused.value.violations


def test_text_and_parameters_in_any_case_and_order() -> None:
    parsed = parse("A  lighthouse\nin fog --SEED 7 --h 320 --Relax --W 256 --PRIVATE")
    assert parsed.text == "A lighthouse in fog"
    assert (parsed.width, parsed.height, parsed.seed) == (256, 320, 7)
    assert (parsed.tier, parsed.visibility) == ("relax", "private")
    assert parsed.warnings == ()


def test_what_was_not_said_is_none() -> None:
    parsed = parse("fog")
    assert (parsed.width, parsed.height, parsed.seed, parsed.tier, parsed.visibility) == (None,) * 5


def test_dashes_inside_words_are_text() -> None:
    assert (
        parse("a well--known jack-o'-lantern - at night").text == "a well--known jack-o'-lantern - at night"
    )


def test_an_unknown_parameter_is_named_with_the_nearest_known_one() -> None:
    (violation,) = violations("fog --sed 7")
    assert violation.field == "--sed"
    assert violation.sentence == "Unknown parameter --sed; the nearest known one is --seed."


def test_all_violations_are_reported_together_in_the_order_of_the_text() -> None:
    found = violations(
        "fox::2 http://host/a.png --w 100 --h tall --seed --fast --relax --quality 2 --private on"
    )
    assert [violation.field for violation in found] == [
        "prompt",
        "prompt",
        "--w",
        "--h",
        "--seed",
        "--quality",
        "--private",
        "--fast",
    ]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "has no text"),
        ("   ", "has no text"),
        ("--seed 7", "has no text"),
        ("fox::2 hen::-1", "Weights"),
        ("HTTPS://host/a.png fox", "Image prompts"),
        ("fog --w 100", "try 64 or 128"),
        ("fog --w 10", "try 64."),
        ("fog --h 0", "multiple of 64"),
        ("fog --w -64", "multiple of 64"),
        ("fog --w ٢٥٦", "multiple of 64"),
        ("fog --w " + "9" * 5000, "multiple of 64"),
        ("fog --w", "needs a value"),
        ("fog --w 64 64", "takes one value, but 64 follows it"),
        ("fog --w 64 --w 64", "more than once"),
        (f"fog --seed {MAX_SEED + 1}", "must be 0 to 4294967295"),
        ("fog --seed 1.5", "whole number"),
        ("fog --fast --relax", "contradict"),
        ("fog --private --public", "contradict"),
        ("fog --fast and quick", "text goes before parameters"),
        ("fog -- rain", "stands alone"),
        ("fog\x00", "control characters"),
        ("fog" * 2001, "6,003 characters; at most 6,000"),
    ],
)
def test_a_refusal_says_what_to_do(prompt: str, sentence: str) -> None:
    assert any(sentence in violation.sentence for violation in violations(prompt))


def test_the_largest_seed_is_accepted() -> None:
    assert parse(f"fog --seed {MAX_SEED}").seed == MAX_SEED


def test_words_without_effect_are_warned_of() -> None:
    assert parse("fog " * 60).warnings == ()
    (warning,) = parse("fog " * 61).warnings
    assert "about 60 words" in warning


def test_a_hostile_number_of_unknown_parameters_is_counted_not_listed() -> None:
    found = violations("fog" + " --x1" * 1000)
    assert len(found) == 21
    assert found[-1].sentence == "980 more parameters are unknown."


def outcome(prompt: str) -> ParsedPrompt | tuple[Violation, ...]:
    try:
        return parse(prompt)
    except PromptRefused as refused:
        return refused.violations


@given(st.text(max_size=MAX_CHARACTERS + 10))
def test_any_text_is_parsed_or_refused_with_sentences(prompt: str) -> None:
    match outcome(prompt):
        case ParsedPrompt(text=text):
            assert text
        case found:
            assert found
            assert all(violation.sentence.endswith(".") for violation in found)


_PIECES = st.sampled_from(
    [
        "fog",
        "--w",
        "--h",
        "--SEED",
        "--fast",
        "--relax",
        "--private",
        "--public",
        "64",
        "0",
        "-1",
        "--",
        "---",
        "::",
        "--x",
    ]
)


@given(st.lists(_PIECES, max_size=30).map(" ".join))
def test_any_mix_of_parameters_is_parsed_or_refused_with_reasons(prompt: str) -> None:
    match outcome(prompt):
        case ParsedPrompt(width=width, tier=tier):
            assert width in (None, 64)
            assert ("--fast" in prompt or "--relax" in prompt) == (tier is not None)
        case found:
            assert found


@given(st.text())
def test_file_stems_are_short_and_plain(text: str) -> None:
    stem = file_stem(text)
    assert 1 <= len(stem) <= 40
    assert stem.isascii()
    assert stem.replace("_", "").isalnum()
    assert stem == stem.lower().strip("_")


def test_a_file_stem_keeps_whole_words() -> None:
    assert (
        file_stem("Ein Füchslein, in the snow; très long for a file")
        == "ein_fuchslein_in_the_snow_tres_long_for"
    )
    assert file_stem("霧") == "image"
    assert file_stem("a" * 50) == "a" * 40
