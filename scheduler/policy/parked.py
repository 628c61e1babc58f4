"""The parked runs, the one parked longest first, and apart by what could go on with them.

Whether a GPU can go on with a run depends on its device type and on what its job needs. One that cannot go on
with the first of a group cannot with the others, so a fleet full of parked runs is not gone through for it.
"""

from __future__ import annotations

import heapq

from scheduler.policy.attempt import Attempt
from scheduler.policy.ids import AttemptId
from scheduler.policy.job import Fit
from scheduler.policy.ranking import Cursor, Entry, Ranking

_Group = tuple[str, Fit]


class ParkedRuns:
    """All parked runs of a cell."""

    def __init__(self) -> None:
        self._groups: dict[_Group, Ranking[AttemptId]] = {}
        self._group_of: dict[AttemptId, _Group] = {}

    def __len__(self) -> int:
        return len(self._group_of)

    def put(self, attempt: Attempt, device: str, since_ms: int) -> None:
        """Add a run that is parked on a worker of a device type."""
        group = device, attempt.job.fit
        self._group_of[attempt.attempt_id] = group
        self._groups.setdefault(group, Ranking()).put((since_ms, attempt.attempt_id))

    def discard(self, attempt_id: AttemptId) -> None:
        """Take a run out."""
        group = self._group_of.pop(attempt_id)
        ranking = self._groups[group]
        ranking.discard(attempt_id)
        if not len(ranking):
            del self._groups[group]

    def longest_first(self) -> LongestFirst:
        """Return a walk through them, that changes nothing and ends with the next change."""
        return LongestFirst([Cursor(ranking) for ranking in self._groups.values()])


class LongestFirst:
    """A walk through parked runs."""

    def __init__(self, groups: list[Cursor[AttemptId]]) -> None:
        self._ahead: list[tuple[Entry, int, Cursor[AttemptId]]] = []
        self._last: tuple[int, Cursor[AttemptId]] | None = None
        for number, cursor in enumerate(groups):
            self._put(number, cursor)

    def __iter__(self) -> LongestFirst:
        return self

    def __next__(self) -> AttemptId:
        if self._last is not None:
            number, cursor = self._last
            cursor.advance()
            self._put(number, cursor)
        if not self._ahead:
            raise StopIteration
        entry, number, cursor = heapq.heappop(self._ahead)
        self._last = number, cursor
        attempt_id: AttemptId = entry[-1]
        return attempt_id

    def pass_over_its_like(self) -> None:
        """Leave out the rest of the group of the run that was returned last."""
        self._last = None

    def _put(self, number: int, cursor: Cursor[AttemptId]) -> None:
        first = cursor.first()
        if first is not None:
            heapq.heappush(self._ahead, (first, number, cursor))
