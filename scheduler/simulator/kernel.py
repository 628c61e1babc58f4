"""Simulated time: what is to happen when, in integers of milliseconds.

Everything due at one moment happens, in the order it was planned in, before anybody is asked what to do
about it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Kernel:
    """A clock that jumps from one thing that happens to the next."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.happened = 0
        """Actions so far."""
        self._due: list[tuple[int, int, Action]] = []
        self._planned = 0

    def at(self, at_ms: int, action: Action) -> None:
        """Plan an action. One that became pointless by its time has to see that by itself."""
        assert at_ms >= self.now_ms, "the past is over"
        self._planned += 1
        heapq.heappush(self._due, (at_ms, self._planned, action))

    def advance(self) -> bool:
        """Go to the next moment for which something is planned and let all of it happen.

        Returns whether there was one.
        """
        if not self._due:
            return False
        self.now_ms = self._due[0][0]
        while self._due and self._due[0][0] == self.now_ms:
            action = heapq.heappop(self._due)[2]
            self.happened += 1
            action()
        return True
