"""Keys in order of their entries, which change often: O(log n) to change one or to see the first."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=str | int)
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

    def __iter__(self) -> Iterator[Key]:
        """Go through the ranked keys, in no order."""
        return iter(self._live)

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
        while heap or self._fill():
            entry = heap[0]
            # Identity: an equal entry of a key that left and came back would otherwise be in twice.
            if live.get(entry[-1]) is entry:
                return entry
            heapq.heappop(heap)
        return None

    def lift(self) -> Entry:
        """Take the smallest entry off the front for a while, still ranked; to be called after `first`."""
        entry: Entry = heapq.heappop(self._heap)
        return entry

    def lift_while(self, keys: Container[Key]) -> list[Entry]:
        """Lift the smallest entries as long as their keys are among these, and return them."""
        heap, live = self._heap, self._live
        lifted: list[Entry] = []
        while heap or self._fill():
            entry = heap[0]
            key = entry[-1]
            if live.get(key) is entry:
                if key not in keys:
                    break
                lifted.append(entry)
            heapq.heappop(heap)
        return lifted

    def put_back(self, entry: Entry) -> None:
        """Put an entry back that was lifted."""
        heapq.heappush(self._heap, entry)

    def _fill(self) -> bool:
        """Put into the empty heap what comes next; returns whether there is anything."""
        return False


class Ladder(Ranking[Key]):
    """A ranking of very many keys whose entries begin with a number: the heap holds only the next of them.

    Whatever leaves a heap, dead entries too, costs a way from its top to its bottom, and in a large one that
    leads through memory which is in no cache. So entries beyond those that come next lie unsorted in rungs,
    by their number, and get into the heap with their rung: by then many are dead, and left behind. The road
    is from Tang, Goh, Thng: "Ladder Queue" (ACM TOMACS 2005). A `Cursor` would see no further than the heap.
    """

    __slots__ = ("_far", "_far_entries", "_far_rungs", "_height", "_reached")

    def __init__(self, height: int) -> None:
        """`height`: how much of the number one rung spans."""
        super().__init__()
        self._height = height
        self._reached: int | None = None
        """The last rung that got into the heap, with all before it; None: none did."""
        self._far: dict[int, list[Entry]] = {}
        self._far_rungs: list[int] = []
        """Of these a heap."""
        self._far_entries = 0

    def put(self, entry: Entry) -> None:
        """Rank the entry's key by it, in place of the key's former entry."""
        key = entry[-1]
        if self._live.get(key) == entry:
            return
        self._live[key] = entry
        self._add(entry)
        if len(self._heap) + self._far_entries > 2 * len(self._live) + 16:
            self._heap, self._far, self._far_rungs, self._far_entries = [], {}, [], 0
            for living in self._live.values():
                self._add(living)

    def _add(self, entry: Entry) -> None:
        rung = entry[0] // self._height
        if self._reached is not None and rung <= self._reached:
            heapq.heappush(self._heap, entry)
            return
        entries = self._far.get(rung)
        if entries is None:
            entries = self._far[rung] = []
            heapq.heappush(self._far_rungs, rung)
        entries.append(entry)
        self._far_entries += 1

    def _fill(self) -> bool:
        live = self._live
        while self._far_rungs and not self._heap:
            self._reached = rung = heapq.heappop(self._far_rungs)
            entries = self._far.pop(rung)
            self._far_entries -= len(entries)
            self._heap += [entry for entry in entries if live.get(entry[-1]) is entry]
        heapq.heapify(self._heap)
        return bool(self._heap)


class Cursor(Generic[Key]):
    """Goes through a ranking from the front and changes nothing; not to be used after the ranking changed.

    A heap's next entry is a child of one that was passed, so the few at the front cost little however many
    there are.
    """

    __slots__ = ("_heap", "_live", "_next")

    def __init__(self, ranking: Ranking[Key]) -> None:
        first = ranking.first()
        self._heap, self._live = ranking._heap, ranking._live
        self._next: list[tuple[Entry, int]] = [] if first is None else [(first, 0)]
        """A heap of the entries whose parents were passed, and their places in the ranking's."""

    def first(self) -> Entry | None:
        """Return the smallest entry that was not passed."""
        ahead, live = self._next, self._live
        while ahead:
            entry = ahead[0][0]
            if live.get(entry[-1]) is entry:
                return entry
            self.advance()
        return None

    def advance(self) -> None:
        """Pass the smallest entry."""
        heap = self._heap
        child = 2 * self._next[0][1] + 1
        if child < len(heap):
            heapq.heapreplace(self._next, (heap[child], child))
            if child + 1 < len(heap):
                heapq.heappush(self._next, (heap[child + 1], child + 1))
        else:
            heapq.heappop(self._next)
