"""Moderation finds words however they are written, and only whole ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.frontdoor.moderation import category_of
from scheduler.store.moderation import Category, Rule


@pytest.mark.parametrize(
    "prompt",
    [
        "gore",
        "GORE",
        "a gore, b",
        "(gore:1.2)",
        "gore_fest",
        "g.o.r.e",
        "G-O-R-E!",
        "g0re",
        "goré",
        "ｇｏｒｅ",
    ],
)
def test_a_word_is_found_in_its_disguises(prompt: str) -> None:
    assert category_of(prompt) is Category.GORE


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("a severed   HEAD", Category.GORE),
        ("$ex-scene", Category.ADULT),
        ("k1ll your5elf!!", Category.HARASSMENT),
    ],
)
def test_words_that_stand_together_are_found(prompt: str, category: Category) -> None:
    assert category_of(prompt) is category


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Scunthorpe, a classic grape",
        "a forgery in Gorebridge",
        "455 nm light, 4k",
        "a head, severed from all news",
        "!!! ??? ...",
    ],
)
def test_parts_of_words_numbers_and_scattered_words_pass(prompt: str) -> None:
    assert category_of(prompt) is None


def test_rules_of_the_table_are_matched_like_the_built_in_ones() -> None:
    rules = [Rule(pattern="Purple Dinosaur", category=Category.HARASSMENT)]
    assert category_of("one púrple-d1nosaur", rules) is Category.HARASSMENT
    assert category_of("a dinosaur, purple", rules) is None


def test_a_rule_without_letters_finds_nothing() -> None:
    assert category_of("a fox", [Rule(pattern=" ...", category=Category.GORE)]) is None


@given(st.text())
def test_no_text_is_too_strange(prompt: str) -> None:
    category_of(prompt)


@given(st.text(alphabet="abcdefgh 01@$!.,-_", max_size=40))
def test_a_rule_finds_the_text_it_was_made_of(text: str) -> None:
    rule = Rule(pattern=text, category=Category.GORE)
    found = category_of(f"before {text} after", [rule])
    assert found is Category.GORE or not any(character.isalnum() for character in text)
