"""Finds the rules whose words stand in a text, however they are disguised, and only as whole words.

Disguises: case, accents and styles of letters; what is not seen between letters, and marks that turn their
order round; look-alike letters and digits (`g0re`, `gоre`); a number before or behind (`gore1`); punctuation
and spaces between letters (`g.o.r.e`, `g+o+r+e`, `g o r e`); letters repeated three times or more
(`goooore`). Not found: words with spaces elsewhere than between all letters (`go re`: or "the pen is" would
be found too), words that run into others, other words for the same.

Nobody writes the scripts of China, Japan and South-East Asia with spaces, so there each character is a word.

How long it takes grows with the text, and hardly with the number of rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Self, TypeAlias

from scheduler.frontdoor.moderation_letters import (
    SYMBOLS,
    as_shown,
    is_unclear,
    look_alike,
    may_mean,
    once_where_stretched,
    plain,
    sketch,
    spellings,
    with_and_without_number,
    with_ones,
)
from scheduler.store.moderation import Rule

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
# What ends a shout is no letter.
_SHOUTS = "!|"
# Initials are no words: so many letters make one that is spelled out.
_LEAST_SPELLED_OUT = 3
# And a letter with a digit is a name of something, "4k", "5s", unless other words of a rule follow.
_LEAST_DISGUISED = 3

_Readings: TypeAlias = Sequence[tuple[str, str]]
"""What a word may be meant as, each with its sketch if it is unclear, else with nothing."""


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a text in their plainest form."""
    return tuple(_WORD.findall(plain(text)))


def says_too_little(words: Sequence[str]) -> bool:
    """Return whether a rule of these words would be found in nearly everything."""
    return not words or (len(words) == 1 and len(words[0]) == 1 and not _IS_UNSPACED.match(words[0]))


class Matcher:
    """Rules made ready to be looked for. Does not change, so that any thread may use it."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = _Node()
        self._run_together = _Node()
        # How long rules are, without their spaces, that begin with these letters.
        self._lengths: dict[str, set[int]] = {}
        for rule in rules:
            for folded in dict.fromkeys((plain(rule.pattern), look_alike(rule.pattern))):
                self._add(_WORD.findall(folded), rule)

    def first(self, text: str) -> Rule | None:
        """Return a rule whose words stand in the text, None if there is none."""
        return next(self._found(text), None)

    def _add(self, words: Sequence[str], rule: Rule) -> None:
        if not words:
            return
        node = self._rules
        for word in words:
            node = node.added(word)
        node.rule = rule
        together = "".join(words)
        if len(together) >= _LEAST_SPELLED_OUT:
            self._run_together.added(together).rule = rule
            beginning = with_ones(together[:_LEAST_SPELLED_OUT])
            self._lengths.setdefault(beginning, set()).add(len(together))

    def _found(self, text: str) -> Iterator[Rule]:
        shown = as_shown(text)
        for folded in dict.fromkeys((plain(text), look_alike(text), plain(shown), look_alike(shown))):
            words = tuple(_WORD.findall(folded))
            yield from self._in_words(words)
            # A symbol is written for a letter, or between letters.
            for chunks in dict.fromkeys(
                (
                    tuple(folded.split()),
                    tuple(chunk.rstrip(_SHOUTS).translate(SYMBOLS) for chunk in folded.split()),
                    tuple(folded.translate(SYMBOLS).split()),
                )
            ):
                yield from self._in_chunks([_WORD.findall(chunk) for chunk in chunks], words)

    def _in_chunks(self, chunks: Sequence[Sequence[str]], searched: Sequence[str]) -> Iterator[Rule]:
        """Yield the rules found in the words of chunks, taken apart and together; not in those `searched`."""
        words = tuple(word for chunk in chunks for word in chunk)
        if words != searched:
            yield from self._in_words(words)
        yield from self._spelled_out(words)
        if any(len(chunk) > 1 for chunk in chunks):
            yield from self._in_words(["".join(chunk) for chunk in chunks if chunk])
            for chunk in chunks:
                if len(chunk) > 1:
                    yield from _rules_of(self._run_together.meant_by(_readings("".join(chunk))))

    def _in_words(self, words: Sequence[str]) -> Iterator[Rule]:
        """Yield the rules whose words stand there one after the other."""
        readings = [_readings(word) for word in words]
        for start in range(len(readings)):
            nodes = [self._rules]
            for i in range(start, len(readings)):
                nodes = [found for node in nodes for found in node.meant_by(readings[i])]
                if not nodes:
                    break
                if i == start and len(words[i]) < _LEAST_DISGUISED:
                    yield from _rules_of(self._rules.meant_by([(words[i], "")]))
                else:
                    yield from _rules_of(nodes)

    def _spelled_out(self, words: Sequence[str]) -> Iterator[Rule]:
        """Yield the rules that stand there letter by letter."""
        for single, run in groupby(words, key=lambda word: len(word) == 1):
            if not single:
                continue
            letters = "".join(run)
            # Figures that stand in a row are no word: 4 5 5.
            if 2 * sum(map(str.isalpha, letters)) < len(letters):
                continue
            for spelled in spellings(letters):
                for meant in (spelled, *once_where_stretched(spelled)):
                    yield from self._beginning_anywhere(meant)

    def _beginning_anywhere(self, letters: str) -> Iterator[Rule]:
        beginnings = with_ones(letters)
        for start in range(len(letters) - _LEAST_SPELLED_OUT + 1):
            for length in self._lengths.get(beginnings[start : start + _LEAST_SPELLED_OUT], ()):
                word = letters[start : start + length]
                yield from _rules_of(self._run_together.meant_by([_reading(word)]))


class _Node:
    """What may follow on words of a rule, and the rule that they are."""

    __slots__ = ("_next", "_sketched", "rule")

    def __init__(self) -> None:
        self._next: dict[str, Self] = {}
        self._sketched: dict[str, list[str]] = {}
        self.rule: Rule | None = None

    def added(self, word: str) -> Self:
        """Return the node behind a word, a new one if need be."""
        if word not in self._next:
            self._next[word] = type(self)()
            self._sketched.setdefault(sketch(word), []).append(word)
        return self._next[word]

    def meant_by(self, readings: _Readings) -> Iterator[Self]:
        """Yield the nodes behind the words that may be meant."""
        for word, sketched in readings:
            if word in self._next:
                yield self._next[word]
            if sketched:
                for known in self._sketched.get(sketched, ()):
                    if known != word and may_mean(word, known):
                        yield self._next[known]


def _readings(word: str) -> _Readings:
    return [_reading(spelled) for each in with_and_without_number(word) for spelled in spellings(each)]


def _reading(word: str) -> tuple[str, str]:
    return word, sketch(word) if is_unclear(word) else ""


def _rules_of(nodes: Iterable[_Node]) -> Iterator[Rule]:
    return (node.rule for node in nodes if node.rule is not None)
