"""What is not drawn here: a built-in list of words by category, and the rules that people add to it.

Matching is by whole words, whatever their case, accents, punctuation and the commonest disguises (`g0re`,
`g.o.r.e`), so that "Scunthorpe", "classic" and "grape" pass. It catches words, not meanings.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from scheduler.store import moderation as store
from scheduler.store.moderation import Category, Rule
from scheduler.store.pool import Pool

_BUILT_IN: Mapping[Category, str] = {
    Category.GORE: """
        gore, gory, goriest, beheading, beheaded, decapitated, decapitation, disembowel, disemboweled,
        disembowelment, dismember, dismembered, dismemberment, eviscerated, evisceration, entrails,
        mutilated, mutilation, severed head, severed limb, severed limbs, severed arm, severed leg, severed
        hand, slit throat, slit wrists, mangled corpse, rotting corpse, snuff film, guts spilling, brains
        splattered, blood splatter""",
    Category.ADULT: """
        porn, porno, pornographic, pornography, nsfw, xxx, hentai, nude, nudes, nudity, naked, topless,
        genitals, genitalia, penis, penises, vagina, vaginal, vulva, nipple, nipples, areola, masturbate,
        masturbating, masturbation, orgasm, blowjob, handjob, cumshot, creampie, gangbang, threesome,
        bondage, bdsm, fellatio, cunnilingus, sexual intercourse, sex scene, sex act, having sex, sexually
        explicit, explicit sex, erotic, erotica, upskirt, striptease, lolicon, shotacon""",
    Category.HARASSMENT: """
        kill yourself, kys, go die, hang yourself, neck yourself, you should die, deserve to die, gas the
        jews, heil hitler, sieg heil, ethnic cleansing, untermensch, retard, retarded, faggot, faggots,
        nigger, niggers, kike, kikes, spics, wetback, tranny, trannies""",
}

_RULES_FRESH_S = 2.0

_DISGUISES = str.maketrans("013457@$!|", "oieastasii")
_LETTER = re.compile(r"[^\W\d_]")
_NOT_WORD = re.compile(r"[\W_]+")


class Moderation:
    """Judges prompts. `now_s` is a monotonic clock in seconds; the table's rules are read every two."""

    def __init__(self, pool: Pool, now_s: Callable[[], float]) -> None:
        self._pool = pool
        self._now_s = now_s
        self._read_s = float("-inf")
        self._rules: tuple[Rule, ...] = ()

    async def category(self, prompt: str) -> Category | None:
        """Return the category the prompt belongs to, None if it may be drawn. Raises Overloaded."""
        now_s = self._now_s()
        if now_s - self._read_s >= _RULES_FRESH_S:
            async with self._pool.reading() as connection:
                self._rules = await store.rules(connection)
            self._read_s = now_s
        return category_of(prompt, self._rules)


def category_of(prompt: str, rules: Iterable[Rule] = ()) -> Category | None:
    """Return the category of the first rule, built-in ones first, whose words stand in the prompt."""
    views = (_words(prompt, within=" "), _words(prompt, within=""))
    for category, pattern in _built_in():
        if any(pattern in view for view in views):
            return category
    for rule in rules:
        pattern = _words(rule.pattern, within=" ")
        # A pattern of punctuation alone would be found in everything.
        if pattern.strip() and any(pattern in view for view in views):
            return rule.category
    return None


@lru_cache(maxsize=1)
def _built_in() -> tuple[tuple[Category, str], ...]:
    return tuple(
        (category, _words(pattern, within=" "))
        for category, patterns in _BUILT_IN.items()
        for pattern in patterns.split(",")
    )


def _words(text: str, *, within: str) -> str:
    """Return the words in their plainest form with one space before, between and after.

    Punctuation within a word becomes `within`: a space makes two words of "gore,blood", nothing makes one of
    "g.o.r.e".
    """
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    words = (_NOT_WORD.sub(within, _undisguised(word)) for word in plain.split())
    return f" {' '.join(' '.join(words).split())} "


def _undisguised(word: str) -> str:
    # A number alone is a number: "455 nm" says nothing. At a word's end `!` shouts and is no letter.
    return word.rstrip("!|").translate(_DISGUISES) if _LETTER.search(word) else word
