"""Keys in order of their entries, which change often: O(log n) to change one or to see the first."""

from __future__ import annotations

import heapq
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=str)
Entry = tuple[Any, ...]


class Ranking(Generic[Key]):
    """A heap in which every key has at most one live entry: a tuple to compare by, its last item the key.

    A replaced or discarded entry stays in the heap until it comes to the top or until the dead outnumber the
    living, when the heap is built again. So a change never searches, and memory grows with the keys alone.
    """

    __slots__ = ("_heap", "_live")

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._live: dict[Key, Entry] = {}

    def __len__(self) -> int:
        return len(self._live)

    def put(self, entry: Entry) -> None:
        """Rank the entry's key by it, in place of the key's former entry."""
        key = entry[-1]
        if self._live.get(key) == entry:
            return
        self._live[key] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)

    def discard(self, key: Key) -> None:
        """Take a key out, if it is in."""
        self._live.pop(key, None)

    def first(self) -> Entry | None:
        """Return the smallest entry."""
        heap, live = self._heap, self._live
        while heap:
            entry = heap[0]
            # Identity: an equal entry of a key that left and came back would otherwise be in twice.
            if live.get(entry[-1]) is entry:
                return entry
            heapq.heappop(heap)
        return None

    def first_besides(self, key: Key) -> Entry | None:
        """Return the smallest entry of another key."""
        first = self.first()
        if first is None or first[-1] != key:
            return first
        heapq.heappop(self._heap)
        second = self.first()
        heapq.heappush(self._heap, first)
        return second
