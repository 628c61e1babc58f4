"""A classifier as somebody may write one: it counts words, and does as some of them say."""

from __future__ import annotations

import asyncio

from scheduler.frontdoor.moderation_classifier import Verdict

NOT_CALLABLE = 1


async def classify(text: str) -> Verdict | None:
    """Take a tenth of the words for sharks, unless told to fail or to say nothing for ever."""
    words = text.split()
    if "flunk" in words:
        raise ValueError(text)
    if "babble" in words:
        return Verdict(category=f"As asked: {text}", score_permille=1000)
    if "dawdle" in words:
        await asyncio.Event().wait()
    sharks = words.count("shark")
    return Verdict(category="sharks", score_permille=1000 * sharks // len(words)) if sharks else None


def not_async(_: str) -> None:
    """Is no classifier: it would stop everybody while it thinks."""
