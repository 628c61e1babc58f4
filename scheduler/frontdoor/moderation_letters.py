"""Texts in letters that can be compared: the same word is the same text, however it is written.

`plain` takes away what does not change a word: case, accents, styles of letters (`𝐠`, `ｇ`, `ⓖ`), and what is
not seen, as joiners and soft hyphens. `look_alike` also takes a letter for the Latin one that it looks like,
as a Cyrillic `о` for an `o`, and `spellings` a digit for the letter that people write it for (`g0re`).

What a character becomes is found out once, and is of four letters at most: no text grows by more than that.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from itertools import groupby

from gpu_worker.prompt import BLANK

# Letters of other alphabets that are taken for Latin ones, of the alphabets that people have the letters of:
# confusables.txt of Unicode Technical Standard 39, single letters only, both cases of those whose small form
# is the large one in small, and the Greek and Icelandic ones that are commonly written for others.
_LOOK_ALIKES: dict[str, str] = {
    letter: latin
    for letters, latins in (
        ("ÐðÞþƄƍƖƦƽǀɑɣɩꞟꞳꞴꭇ", "ddppbglrslayiuxbr"),
        (
            "ͿΑΒΕΖΗΙΚΜΝΟΡΤΥΧαβγεηικμνορστυχωϜϳϺᴦ",
            "jabezhikmnoptyxabyenikuvopotuxwfjmr",
        ),
        (
            "ЅІЈАВЕКМНОРСТУХЬавгекмнорстухѕіјѡѴѵҮүһҽӀӏԁԌԛԜԝꙇ",
            "sijabekmhopctyxbabrekmhopctyxsijwvvyyheildgqwwi",
        ),
        ("ՍՏՕագզհոռսցքօ", "usowqqhnnugfo"),
        ("ᎠᎡᎢᎥᎩᎪᎫᎬᎳᎷᎻᎽᏀᏂᏃᏏᏒᏔᏕᏙᏚᏞᏟᏢᏦᏧᏳᏴꭵꮁꮃꮓꮩꮪꮯ", "drtiyajewmhyghzbrwsvslcpkdgbirwzvsc"),
        ("ᐯᑌᑭᑯᑲᒍᒪᕁᕼᕽᖇᖯᖴᗅᗞᗪᗰᗷ", "vupdbjlxhxrbfaddmb"),
        ("ⲅⲎⲒⲔⲘⲚⲞⲟⲢⲣⲤⲥⲦⲨⲬⳐ", "rhikmnooppcctyxl"),
        ("ꓐꓑꓒꓓꓔꓖꓗꓙꓚꓜꓝꓟꓠꓡꓢꓣꓦꓧꓪꓫꓬꓮꓰꓲꓳꓴ", "bpddtgkjczfmnlsrvhwxyaeiou"),
    )
    for letter, latin in zip(letters, latins, strict=True)
}
# A letter with something on it or through it, a small capital, a letter of a flag: their names end with it.
_NAMED_FOR_LATIN = re.compile(
    r"(?:.*LATIN (?:[A-Z]+ )*LETTER|REGIONAL INDICATOR SYMBOL LETTER) (?:[A-Z]+ )*?([A-Z])(?: WITH .*)?"
)

_NOT_SEEN = frozenset(("Cf", "Me", "Mn"))
# Private and unassigned: there are a million, and none means anything to anybody.
_NOBODYS = frozenset(("Cn", "Co"))
# Most signs there are, and each is what it is.
_IDEOGRAPH = "CJK UNIFIED IDEOGRAPH"
# One ligature unfolds into 18 letters, and a prompt of nothing else into a text of a hundred thousand.
_LETTERS_AT_MOST = 4

_DIGITS = str.maketrans("03456789", "oeasgtbg")
_ONE = "1"
"""Is written for `i` and for `l`."""
_ONE_FOR = str.maketrans("il", "11")
# Each as the digit that is written for the same letter.
SYMBOLS = str.maketrans("@$!|€£+", "4511317")

# From one mark to the other, or to the end, a text is shown from its end to its beginning.
_SHOWN_BACKWARDS = re.compile("\u202e([^\u202c]*)\u202c?")
_STRETCHED = re.compile(r"(.)\1\1+")
_A_RUN = re.compile(r"(.)\1+")
_A_LETTER = re.compile(r"[^\W\d_]")
# With less beside the digits it is a name of something: mp3, ss1.
_LEAST_BESIDE_DIGITS = 3


def plain(text: str) -> str:
    """Return a text without case, accents, styles, and what is not seen."""
    return text.lower() if text.isascii() else text.translate(_PLAIN)


def look_alike(text: str) -> str:
    """Return what `plain` does, with Latin letters for those that look like them."""
    return text.lower() if text.isascii() else text.translate(_LOOK_ALIKE)


def as_shown(text: str) -> str:
    """Return a text in the order of its letters on a screen, where marks in it turn that round."""
    return _SHOWN_BACKWARDS.sub(lambda turned: turned[1][::-1], text)


def spellings(word: str) -> tuple[str, ...]:
    """Return a word as it is and, if it has letters and digits, with the letters that these are written for.

    A 1 may be an `i` or an `l` and stays. A number alone is a number: "455 nm" says nothing.
    """
    if word.isalpha() or not _A_LETTER.search(word):
        return (word,)
    return (word, word.translate(_DIGITS))


def with_and_without_number(word: str) -> tuple[str, ...]:
    """Return a word as it is, and without a number that it begins with, or ends with, and without both."""
    if word.isalpha():
        return (word,)
    both = (word.lstrip(string.digits), word.rstrip(string.digits), word.strip(string.digits))
    bare = (left for left in both if left != word and len(left) >= _LEAST_BESIDE_DIGITS)
    return (word, *dict.fromkeys(bare))


def is_unclear(word: str) -> bool:
    """Return whether a word may be meant as another: for a 1, or letters that are stretched as in no word."""
    return _ONE in word or (len(word) > 2 and _STRETCHED.search(word) is not None)


def sketch(word: str) -> str:
    """Return what a word and all that may be meant by it have in common."""
    return _A_RUN.sub(r"\1", with_ones(word))


def with_ones(word: str) -> str:
    """Return a word with a 1 for each letter that one may be written for."""
    return word.translate(_ONE_FOR)


def may_mean(unclear: str, word: str) -> bool:
    """Return whether `unclear` is `word` with a 1 for some letters, or with some that are stretched."""
    if len(unclear) == len(word):
        return all(there in (wanted, with_ones(wanted)) for there, wanted in zip(unclear, word, strict=True))
    return any(_stretches(unclear.replace(_ONE, one), word) for one in ("il" if _ONE in unclear else _ONE))


def once_where_stretched(word: str) -> tuple[str, ...]:
    """Return a stretched word with each stretched letter once, and twice; nothing if none is."""
    if not _STRETCHED.search(word):
        return ()
    return _STRETCHED.sub(r"\1", word), _STRETCHED.sub(r"\1\1", word)


def _stretches(stretched: str, word: str) -> bool:
    runs, wanted_runs = _runs(stretched), _runs(word)
    return len(runs) == len(wanted_runs) and all(
        letter == wanted and (times == wanted_times or times >= max(3, wanted_times))
        for (letter, times), (wanted, wanted_times) in zip(runs, wanted_runs, strict=True)
    )


def _runs(word: str) -> list[tuple[str, int]]:
    return [(letter, len(list(run))) for letter, run in groupby(word)]


class _Table(dict[int, str]):
    """For str.translate: what each character becomes, found out when it is first met."""

    def __init__(self, folded: Callable[[str], str]) -> None:
        super().__init__()
        self._folded = folded

    def __missing__(self, code: int) -> str:
        character = chr(code)
        # Not kept, so that whoever sends all characters there are does not fill the memory. Of the others,
        # there are fifty thousand.
        if unicodedata.category(character) in _NOBODYS or unicodedata.name(character, "").startswith(
            _IDEOGRAPH
        ):
            return character
        folded = "".join(
            self._folded(part)
            for part in unicodedata.normalize("NFKD", character)
            if unicodedata.category(part) not in _NOT_SEEN
        )
        self[code] = " " if character in BLANK else folded[:_LETTERS_AT_MOST]
        return self[code]


def _latin(part: str) -> str:
    if part.isascii():
        return part.casefold()
    named = _NAMED_FOR_LATIN.fullmatch(unicodedata.name(part, ""))
    latin = _LOOK_ALIKES.get(part) or (named and named[1].lower())
    if latin:
        return latin
    return "".join(_LOOK_ALIKES.get(small, small) for small in part.casefold())


_PLAIN = _Table(str.casefold)
_LOOK_ALIKE = _Table(_latin)
