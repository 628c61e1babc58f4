"""What is not drawn here: prompts in which words of a rule stand, or which a classifier refuses.

The rules are a table that moderators edit (`moderation_service`). Each front door looks for changes every two
seconds, and after one of its own at once. How words are found is in `moderation_matcher`, what a classifier
is in `moderation_classifier`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from scheduler.frontdoor.moderation_classifier import Classification
from scheduler.frontdoor.moderation_matcher import Matcher
from scheduler.store import moderation as store
from scheduler.store.pool import Pool

_RULES_FRESH_S = 2.0
# In characters. As long as nearly all are, a prompt takes a millisecond; the longest take twenty.
_LONG = 1_000


class Moderation:
    """Judges prompts. `now_s` is a monotonic clock in seconds."""

    def __init__(
        self, pool: Pool, now_s: Callable[[], float], classification: Classification | None = None
    ) -> None:
        self._pool = pool
        self._now_s = now_s
        self._classification = classification
        self._reading = asyncio.Lock()
        self._read_s = float("-inf")
        self._etag = ""
        self._matcher = Matcher(())
        # One: whoever sends long ones waits for other long ones, and nobody else does.
        self._long_ones = ThreadPoolExecutor(1, thread_name_prefix="moderation")

    async def category(self, texts: Iterable[str], text: str) -> str | None:
        """Return the category a prompt belongs to, None if it may be drawn. Raises Overloaded.

        The rules are held against all `texts`; a classifier is asked about `text`.
        """
        matcher = await self._fresh()
        for each in dict.fromkeys(texts):
            if len(each) < _LONG:
                rule = matcher.first(each)
            else:
                found = partial(matcher.first, each)
                rule = await asyncio.get_running_loop().run_in_executor(self._long_ones, found)
            if rule is not None:
                return rule.category
        return None if self._classification is None else await self._classification.category(text)

    def forget(self) -> None:
        """Look at the rules afresh: they changed here, and whoever changed them may try at once."""
        self._read_s = float("-inf")

    async def _fresh(self) -> Matcher:
        # One reads, and whoever comes meanwhile waits for that.
        async with self._reading:
            now_s = self._now_s()
            if now_s - self._read_s >= _RULES_FRESH_S:
                # Before it is true, so that whoever says meanwhile that there are others is not overheard.
                self._read_s = now_s
                try:
                    await self._read()
                except BaseException:
                    self.forget()
                    raise
            return self._matcher

    async def _read(self) -> None:
        async with self._pool.reading() as connection:
            if await store.etag(connection) == self._etag:
                return
            rule_set = await store.rule_set(connection)
        # Ten thousand rules take a moment, which others' calls need not wait for.
        self._matcher = await asyncio.to_thread(Matcher, rule_set.rules)
        self._etag = rule_set.etag
