"""The prompt language, row by row of what is promised."""

from __future__ import annotations

import pytest

from gpu_worker.contract import WHOLE_PPM, TextPart
from gpu_worker.prompt import (
    MAX_CHARACTERS,
    MAX_PARTS,
    MAX_SEED,
    ParsedPrompt,
    PromptRefused,
    Violation,
    file_stem,
    parse,
    print_prompt,
    unread,
    without_urls,
)


def violations(prompt: str, uploaded: int = 0) -> tuple[Violation, ...]:
    with pytest.raises(PromptRefused) as refused:
        parse(prompt, uploaded)
    return refused.value.violations


def shares(prompt: str) -> list[tuple[str, int]]:
    return [(part.text, part.share_ppm) for part in parse(prompt).parts]


def test_text_and_parameters_in_any_case_and_order() -> None:
    parsed = parse(
        "A  lighthouse\nin fog --SEED 7 --h 320 --Relax --W 256 --PRIVATE --UpLight --viDEO --STOP 80"
    )
    assert parsed.text == "A lighthouse in fog"
    assert (parsed.width, parsed.height, parsed.seed, parsed.stop_percent) == (256, 320, 7, 80)
    assert (parsed.tier, parsed.visibility) == ("relax", "private")
    assert parsed.light_upscale
    assert parsed.video
    assert parsed.warnings == ()


def test_what_was_not_said_is_none() -> None:
    assert parse("fog") == ParsedPrompt(
        text="fog",
        urls=(),
        parts=(),
        picture_shares_ppm=(),
        width=None,
        height=None,
        aspect=None,
        seed=None,
        stop_percent=100,
        light_upscale=False,
        video=False,
        tier=None,
        visibility=None,
    )


def test_dashes_inside_words_are_text() -> None:
    text = "a well--known jack-o'-lantern - at night — alone —softly"
    assert parse(text).text == text


# Text parts and weights.


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hot dog::2 food::-1", [("hot dog", 666_667), ("food", -333_333)]),
        ("hot dog:: food::-1 animal::", [("hot dog", 333_334), ("food", -333_333), ("animal", 333_333)]),
        ("hot dog animal::-1", [("hot dog animal", -1_000_000)]),
        ("a::3 b", [("a", 750_000), ("b", 250_000)]),
        ("a::.5 b::1.50", [("a", 250_000), ("b", 750_000)]),
        ("a::+3 b::1.", [("a", 750_000), ("b", 250_000)]),
        ("a::0 b::1", [("a", 0), ("b", 1_000_000)]),
        ("a::b::c::2", [("a", 250_000), ("b", 250_000), ("c", 500_000)]),
        ("a :: b ::3", [("a", 250_000), ("b", 750_000)]),
        ("a::3, b", [("a", 750_000), ("b", 250_000)]),
        ("a:: , b", [("a", 500_000), (", b", 500_000)]),
        ("a::,b", [("a", 500_000), ("b", 500_000)]),
        ("a:: :: b::", [("a", 500_000), ("b", 500_000)]),
        ("a::8k render", [("a", 500_000), ("8k render", 500_000)]),
        ("a::999999999 b::0.000000000001", [("a", 1_000_000), ("b", 0)]),
    ],
)
def test_a_weight_belongs_to_all_the_text_before_it(prompt: str, expected: list[tuple[str, int]]) -> None:
    assert shares(prompt) == expected
    assert parse(prompt).text == " ".join(text for text, _ in expected)


def test_shares_add_up_exactly_whatever_the_rounding() -> None:
    prompt = " ".join(f"p{i}::{weight}" for i, weight in enumerate((1, 1, 1, 2, -3, 0.7, 0.01)))
    assert sum(abs(share) for _, share in shares(prompt)) == WHOLE_PPM


@pytest.mark.parametrize("prompt", ["fog", "fog::", "fog::1", "fog::2"])
def test_one_text_alone_needs_no_parts(prompt: str) -> None:
    assert parse(prompt) == ParsedPrompt(text="fog")


def test_a_warning_says_what_a_negative_weight_applies_to() -> None:
    (warning,) = parse("hot dog animal::-1").warnings
    assert "The weight -1 applies to all of the text before it, “hot dog animal”" in warning
    assert parse("hot dog:: animal::-1").warnings == ()


def test_a_warning_says_that_a_lone_weight_means_nothing() -> None:
    (warning,) = parse("fog::2").warnings
    assert "The weight 2 has no effect" in warning


def test_a_number_apart_from_its_colons_is_text_and_warned_of() -> None:
    parsed = parse("fog :: 2 rain")
    assert [part.text for part in parsed.parts] == ["fog", "2 rain"]
    assert "2 is read as text" in parsed.warnings[0]


def test_no_is_a_part_of_weight_minus_a_half() -> None:
    assert shares("fog --no trees and people") == [("fog", 666_667), ("trees and people", -333_333)]
    assert parse("fog --no trees") == parse("fog:: trees::-0.5")


def test_no_takes_words_to_the_next_parameter_and_may_be_repeated() -> None:
    parsed = parse("fog --no trees, people --seed 7 --NO cars")
    assert parsed.seed == 7
    assert parsed.parts == (
        TextPart(text="fog", share_ppm=500_000),
        TextPart(text="trees, people", share_ppm=-250_000),
        TextPart(text="cars", share_ppm=-250_000),
    )


# Pictures.


def test_urls_come_first_and_keep_their_case() -> None:
    parsed = parse("HTTPS://Host/A.PNG?Q=Ä http://[::1]/b.jpg a fox")
    assert parsed.urls == ("HTTPS://Host/A.PNG?Q=Ä", "http://[::1]/b.jpg")
    assert parsed.text == "a fox"


def test_brackets_and_commas_around_urls_are_not_theirs() -> None:
    assert parse("<https://h/a.png>, https://h/b.png, fox").urls == ("https://h/a.png", "https://h/b.png")


@pytest.mark.parametrize(
    ("prompt", "uploaded", "texts", "pictures"),
    [
        ("https://h/a.png fox", 0, [750_000], [250_000]),
        ("https://h/a.png https://h/b.png fox", 0, [750_000], [125_000, 125_000]),
        ("https://h/a.png fox", 2, [750_000], [83_334, 83_333, 83_333]),
        ("fox", 1, [750_000], [250_000]),
        ("https://h/a.png A::1 B::-2", 0, [250_000, -500_000], [250_000]),
        ("https://h/a.png fox --iw 1", 0, [500_000], [500_000]),
        ("https://h/a.png A::2 B::3 --iw 1", 0, [333_333, 500_000], [166_667]),
        ("https://h/a.png https://h/b.png fox --iw -1", 0, [500_000], [-250_000, -250_000]),
        ("https://h/a.png fox --iw 0", 0, [1_000_000], [0]),
        ("https://h/a.png fox::0 --iw .5", 0, [0], [1_000_000]),
        ("https://h/a.png fox --no hen --iw .5", 0, [500_000, -250_000], [250_000]),
    ],
)
def test_pictures_together_have_a_quarter_or_the_weight_of_iw(
    prompt: str, uploaded: int, texts: list[int], pictures: list[int]
) -> None:
    parsed = parse(prompt, uploaded)
    assert [part.share_ppm for part in parsed.parts] == texts
    assert list(parsed.picture_shares_ppm) == pictures


def test_iw_without_pictures_is_warned_of() -> None:
    parsed = parse("fox --iw 2")
    assert parsed == parse("fox")
    assert "--iw has no effect" in parsed.warnings[0]


# Parameters.


def test_an_aspect_ratio_in_place_of_a_size() -> None:
    assert parse("fog --AR 3:2").aspect == (3, 2)


@pytest.mark.parametrize(("typed", "percent"), [("10", 10), ("80", 80), ("100", 100), ("080", 80)])
def test_stop_is_a_percentage_of_the_steps(typed: str, percent: int) -> None:
    assert parse(f"fog --stop {typed}").stop_percent == percent


def test_the_largest_seed_is_accepted() -> None:
    assert parse(f"fog --seed {MAX_SEED}").seed == MAX_SEED


@pytest.mark.parametrize("dashes", ["—", "–"])
def test_a_long_dash_before_a_known_name_is_two_dashes(dashes: str) -> None:
    assert parse(f"fog {dashes}W 64 {dashes}private") == parse("fog --w 64 --private")


def test_a_parameter_may_follow_colons_directly() -> None:
    assert parse("fog::--seed 7") == parse("fog --seed 7")


# Refusals.


@pytest.mark.parametrize(
    ("prompt", "field", "sentence"),
    [
        ("fog --sed 7", "--sed", "Unknown parameter --sed; the nearest known one is --seed."),
        ("fog --Privat", "--Privat", "Unknown parameter --Privat; the nearest known one is --private."),
        ("fog --width 64", "--width", "Unknown parameter --width; the nearest known one is --w."),
        ("fog —width 64", "--width", "Unknown parameter --width; the nearest known one is --w."),
        ("fog --aspect 3:2", "--aspect", "Unknown parameter --aspect; the nearest known one is --ar."),
        ("fog --w=64", "--w=64", "Unknown parameter --w=64; write --w 64 with a space."),
        (
            "fog --stylize 5",
            "--stylize",
            "Unknown parameter --stylize; leave it out, since only other programs have it; the nearest known "
            "one is --stop.",
        ),
    ],
)
def test_an_unknown_parameter_is_named_with_the_nearest_known_one(
    prompt: str, field: str, sentence: str
) -> None:
    assert violations(prompt) == (Violation(field=field, sentence=sentence),)


def test_all_violations_are_reported_together_in_the_order_of_the_text() -> None:
    found = violations(
        "https:// fox::0 http://host/a.png::1,2 --w 100 --h tall --ar 0:1 --seed --fast --relax --quality 2 "
        "--stop 5 --iw big --no --private on"
    )
    assert [violation.field for violation in found] == [
        "prompt",
        "prompt",
        "prompt",
        "--w",
        "--h",
        "--ar",
        "--seed",
        "--quality",
        "--stop",
        "--iw",
        "--no",
        "--private",
        "--fast",
        "--ar",
    ]


@pytest.mark.parametrize(
    ("prompt", "field", "sentence"),
    [
        ("", "prompt", "has no text"),
        ("   ", "prompt", "has no text"),
        (":: ::", "prompt", "has no text"),
        ("--seed 7", "prompt", "has no text"),
        ("--no trees", "prompt", "has no text"),
        ("\u200b", "prompt", "has no text"),
        ("\u2060\ufeff :: \u3164\ufe0f::2 --seed 7", "prompt", "has no text"),
        ("https://h/a.png \u200b", "prompt", "say in words what to draw from the pictures"),
        ("https://h/a.png --iw 2", "prompt", "say in words what to draw from the pictures"),
        ("fox::0 hen::-0.0", "prompt", "All weights are zero"),
        ("https://h/a.png fox::0", "prompt", "All weights are zero"),
        ("https://h/a.png fox::0 --iw 0", "prompt", "All weights are zero"),
        ("::3, dreamlike", "prompt", "The weight 3 has no text before it"),
        ("fox::2 ::3", "prompt", "The weight 3 has no text before it"),
        ("fox::0,5", "prompt", "::0,5 is not a weight"),
        ("fox::1.2.3", "prompt", "::1.2.3 is not a weight"),
        ("fox::–1 hen", "prompt", "::–1 is not a weight"),
        ("fox::1000000000 hen", "prompt", "at most 9 digits"),
        ("fox::" + "9" * 5000, "prompt", "is not a weight"),
        ("fox https://h/a.png", "prompt", "https://h/a.png stands behind text; URLs of pictures go first."),
        ("fox (HTTP://h/a.png)", "prompt", "stands behind text"),
        ("fox --no https://h/a.png", "--no", "stands behind text"),
        ("https://h/a.png::2 fox", "prompt", "--iw weighs all pictures"),
        ("https:// fox", "prompt", "names no host"),
        ("ftp://h/a.png fox", "prompt", "begin with https:// or http://"),
        ("blue--seed 719", "prompt", "write a space before --seed"),
        ("blue --no red--PRIVATE", "--no", "write a space before --private"),
        ("blue--width 719", "prompt", "write a space before --w"),
        ("blue--cfg 7", "prompt", "leave --cfg out"),
        ("fog --w 100", "--w", "try 64 or 128"),
        ("fog --w 10", "--w", "try 64."),
        ("fog --h 0", "--h", "multiple of 64"),
        ("fog --w -64", "--w", "multiple of 64"),
        ("fog --w 99999999999", "--w", "a multiple of 64 from 64 to 65536, not 99999999999."),
        ("fog --h 65600", "--h", "a multiple of 64 from 64 to 65536, not 65600."),
        ("fog --w ٢٥٦", "--w", "multiple of 64"),
        ("fog --w " + "9" * 5000, "--w", "multiple of 64"),
        ("fog --w", "--w", "needs a value"),
        ("fog --w 64 64", "--w", "takes one value, but more follows it"),
        ("fog --w 64 --W 64", "--w", "more than once"),
        (f"fog --seed {MAX_SEED + 1}", "--seed", "from 0 to 4294967295, not 4294967296."),
        ("fog --seed 99999999999", "--seed", "from 0 to 4294967295, not 99999999999."),
        ("fog --seed -1", "--seed", "from 0 to 4294967295, not -1."),
        ("fog --seed 1.5", "--seed", "whole number"),
        ("fog --stop 9", "--stop", "from 10 to 100, not 9"),
        ("fog --stop 101", "--stop", "from 10 to 100, not 101"),
        ("fog --stop 50%", "--stop", "from 10 to 100, not 50%"),
        ("fog --iw nan", "--iw", "must be a number, not nan"),
        ("fog --iw .", "--iw", "must be a number"),
        ("fog --iw 1e5", "--iw", "must be a number"),
        ("fog --ar 3", "--ar", "two whole numbers such as 3:2, not 3"),
        ("fog --ar 3:0", "--ar", "two whole numbers"),
        ("fog --ar 1.5:1", "--ar", "two whole numbers"),
        ("fog --ar 12345:1", "--ar", "two whole numbers"),
        ("fog --ar 3:2 --w 64", "--ar", "leave out either it or --w."),
        ("fog --h 64 --ar 3:2 --w 64", "--ar", "leave out either it or --w and --h."),
        ("fog --no", "--no", "needs words"),
        ("fog --no --seed 7", "--no", "needs words"),
        ("fog --no trees::2", "--no", "write text::-0.5 before the parameters"),
        ("fog --fast --relax", "--fast", "contradict"),
        ("fog --private --public", "--private", "contradict"),
        ("fog --fast and quick", "--fast", "text goes before parameters"),
        ("fog --video 3", "--video", "takes no value"),
        ("fog -- rain", "prompt", "stands alone"),
        ("fog --- rain", "prompt", "stands alone"),
        ("fog\x00", "prompt", "control characters"),
        ("fog\ud800", "prompt", "control characters"),
        ("fog" * 2001, "prompt", "6,003 characters; at most 6,000"),
    ],
)
def test_a_refusal_says_what_to_do(prompt: str, field: str, sentence: str) -> None:
    (violation,) = violations(prompt)
    assert violation.field == field
    assert sentence in violation.sentence


def test_uploaded_pictures_need_text_too() -> None:
    (violation,) = violations("--seed 7", uploaded=1)
    assert "say in words what to draw from the pictures" in violation.sentence


def test_parts_and_pictures_have_a_limit() -> None:
    full = "a:: " * (MAX_PARTS - 3) + "--no b"
    assert len(parse(f"https://h/a.png {full}", uploaded=1).parts) == MAX_PARTS - 2
    (violation,) = violations(f"https://h/a.png {full}", uploaded=2)
    assert violation.sentence == "The prompt has 17 text parts and pictures; at most 16 are allowed."


def test_words_without_effect_are_warned_of() -> None:
    assert [*unread(parse("fog " * 60), 60)] == []
    (warning,) = unread(parse("fog " * 61), 60)
    assert warning == "The model reads about 60 words; of these 61 the last ones have no effect."


def test_the_model_reads_each_part_from_its_beginning() -> None:
    assert [*unread(parse("fog " * 60 + ":: " + "rain " * 60), 60)] == []
    (warning,) = unread(parse("fog :: " + "rain " * 61), 60)
    assert "the 61 of “rain rain" in warning


def test_a_hostile_number_of_unknown_parameters_is_counted_not_listed() -> None:
    found = violations("fog" + " --x1" * 1000)
    assert len(found) == 21
    assert found[-1].sentence == "980 more parameters are unknown."


def test_a_refusal_shows_no_control_characters() -> None:
    for violation in violations("fog\x1b[31m --\x1b\ud800x --seed \x07"):
        assert (violation.field + violation.sentence).isprintable()


def test_a_prompt_of_full_length_is_read() -> None:
    assert len(parse("a" * MAX_CHARACTERS).text) == MAX_CHARACTERS


# The way back, and names.


@pytest.mark.parametrize(
    ("prompt", "printed"),
    [
        ("  A  fog::2 ", "A fog"),
        ("hot dog::3 food::-1", "hot dog::0.75 food::-0.25"),
        (
            "<HTTP://h/A> fog --No a --PUBLIC --fast --video --uplight --stop 50 --ar 3:2 --seed 0 --iw 1.5",
            "HTTP://h/A fog::0.333333 a::-0.166667 --iw 0.5 --seed 0 --ar 3:2 --stop 50 --uplight --video "
            "--fast --public",
        ),
        ("ratio: ::2 b ::2 --w 64 --h 128", "ratio: ::0.5 b::0.5 --w 64 --h 128"),
    ],
)
def test_a_parsed_prompt_is_printed_in_one_way(prompt: str, printed: str) -> None:
    assert print_prompt(parse(prompt)) == printed
    assert parse(printed) == parse(prompt)


def test_a_file_stem_keeps_whole_words() -> None:
    assert (
        file_stem("Ein Füchslein, in the snow; très long for a file")
        == "ein_fuchslein_in_the_snow_tres_long_for"
    )
    assert file_stem("霧") == "image"
    assert file_stem("a" * 50) == "a" * 40


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("a fox", "a fox"),
        ("  https://h/a.png?key=1  <HTTP://h/b.png>, a  fox\n --w 64 ", "a  fox\n --w 64 "),
        ("https://h/a.png", ""),
        ("", ""),
        ("a fox,--w https://h/a.png", "a fox,--w https://h/a.png"),
    ],
)
def test_a_prompt_without_its_urls_is_what_stands_behind_them(prompt: str, rest: str) -> None:
    assert without_urls(prompt) == rest
