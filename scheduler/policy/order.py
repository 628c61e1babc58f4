"""The order of one tier while a cycle is planned: the queue's own, less what the plan has started so far.

A start moves its account back or out, in every line that it waits in. Ranking it anew at once, and again when
the plan is taken back, would cost more than the decision. So the plan looks at an account that it has changed
only once that comes first in a line, lifts it out there, and puts it back at the end.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping

from scheduler.policy.account import Account, Lane
from scheduler.policy.decisions import ChosenBecause, Standing
from scheduler.policy.fair_queue import FairQueue, Head, Line
from scheduler.policy.ids import AccountId
from scheduler.policy.job import Fit
from scheduler.policy.parameters import Parameters
from scheduler.policy.ranking import Entry, Ranking


class _View:
    """One ranking of a line, as a plan sees it.

    It knows nothing of its order: a plan that held itself would be left to the garbage collector.
    """

    __slots__ = ("lifted", "moved", "ranking")

    def __init__(self, ranking: Ranking[AccountId]) -> None:
        self.ranking = ranking
        self.lifted: list[Entry] = []
        """What was taken off the ranking's front."""
        self.moved: list[Entry] = []
        """A heap of what stands further back than in the ranking."""


class PlannedLine:
    """A line, as a plan sees it."""

    __slots__ = ("by_age", "by_tag", "fit", "front", "is_front_known")

    def __init__(self, fit: Fit, line: Line) -> None:
        self.fit = fit
        self.by_tag = _View(line.by_tag)
        self.by_age = _View(line.by_age)
        self.front: Entry | None = None
        """The first in the order of tags; None: nobody is left."""
        self.is_front_known = False


Lines = dict[Fit, PlannedLine]


class Order:
    """One tier's eligible accounts in the order they are served, for one plan."""

    def __init__(
        self, queue: FairQueue, accounts: Mapping[AccountId, Account], parameters: Parameters, now_ms: int
    ) -> None:
        self._queue = queue
        self._accounts = accounts
        self._parameters = parameters
        self._now_ms = now_ms
        self._out: set[AccountId] = set()
        """Accounts that the plan has taken out of the order."""
        self._changed: set[AccountId] = set()
        """Accounts that it has moved back."""
        self._lines = {fit: PlannedLine(fit, line) for fit, line in queue.lines.items()}
        self._oldest_since_ms: int | None = None
        """Since when the oldest head of all has been one, before the plan; None: not looked at."""

    def lines(self) -> Lines:
        """Return the lines in which jobs of eligible accounts waited before the plan."""
        return dict(self._lines)

    def is_waited_in(self, line: PlannedLine) -> bool:
        """Return whether the plan has left anybody in a line."""
        return self._front(line) is not None

    def change(self, account: Account) -> None:
        """Take note that the plan has changed an account."""
        account_id = account.account_id
        turn = account.turn(self._queue.tier)
        if turn.tag is None or account.free(self._queue.tier) <= 0:
            self._out.add(account_id)
            self._changed.discard(account_id)
        else:
            self._changed.add(account_id)
        for line in self._lines.values():
            front = line.front
            if front is not None and front[-1] == account_id:
                line.is_front_known = False

    def put_back(self) -> None:
        """Leave the queue's ranks as they were. The order is of no more use."""
        for line in self._lines.values():
            for view in (line.by_tag, line.by_age):
                for entry in view.lifted:
                    view.ranking.put_back(entry)

    def choose(self, lines: Iterable[PlannedLine]) -> Head | None:
        """Return the job to start next among these lines: by age if it is age's turn, else by tag.

        None: there is none, or, where the order is not known to its end, it may be one that is not here yet.
        """
        first = self._first(lines)
        if first is None or not self._queue.is_known(first[0]):
            return None
        if self._queue.aged_wait_ms == 0 and self._may_be_aged():
            oldest = self._oldest(lines)
            assert oldest is not None, "what has a tag has an age"
            entry, line = oldest
            aged = entry[0] + self._parameters.aging_ms <= self._now_ms
            if aged and (entry[-1], line) != (first[0][-1], first[1]):
                return self._head(entry, line, ChosenBecause.AGED)
        return self._head(*first, ChosenBecause.FIRST_IN_ORDER)

    def choose_warm(self, lines: Iterable[PlannedLine], instead_of: Head) -> Head | None:
        """Return the first job among these lines, if it may go before `instead_of` to save a load."""
        first = self._first(lines)
        if first is None or first[0][0] > self._last_warm_tag(instead_of):
            return None
        return self._head(*first, ChosenBecause.MODEL_WARM)

    def is_warm_choice_known(self, warm: Head | None, instead_of: Head) -> bool:
        """Return whether nobody who is yet to be read would be chosen by `choose_warm` before `warm`."""
        edge = self._queue.edge
        if edge is None:
            return True
        if warm is None:
            return self._last_warm_tag(instead_of) < edge.tag
        tag = warm.account.turn(self._queue.tier).tag
        assert tag is not None
        return self._queue.is_known(self._queue.tag_entry(warm.account, tag, warm.job))

    def _last_warm_tag(self, instead_of: Head) -> int:
        tag = instead_of.account.turn(self._queue.tier).tag
        assert tag is not None
        return tag + self._parameters.affinity_ms * 1000

    def oldest_head_since_ms(self, lines: Iterable[PlannedLine]) -> int | None:
        """Return since when the oldest head among these lines has been one; None: there is none."""
        oldest = self._oldest(lines)
        return None if oldest is None else oldest[0][0]

    def first_besides(self, account: Account, lines: Iterable[PlannedLine]) -> Standing | None:
        """Return the first in the order of tags among the accounts but one that the plan has changed."""
        account_id = account.account_id
        best: Entry | None = None
        for line in lines:
            entry = line.front if line.is_front_known else self._front(line)
            if entry is not None and entry[-1] == account_id:
                entry = self._behind(line, entry)
            if entry is not None and (best is None or entry < best):
                best = entry
        return None if best is None else self._queue.standing(best, self._now_ms)

    def _first(self, lines: Iterable[PlannedLine]) -> tuple[Entry, PlannedLine] | None:
        best: Entry | None = None
        best_line: PlannedLine | None = None
        for line in lines:
            entry = line.front if line.is_front_known else self._front(line)
            if entry is not None and (best is None or entry < best):
                best, best_line = entry, line
        return None if best is None or best_line is None else (best, best_line)

    def _front(self, line: PlannedLine) -> Entry | None:
        """Return the first of a line in the order of tags."""
        if not line.is_front_known:
            line.front = self._first_of(line.by_tag, line.fit, self._entry_by_tag)
            line.is_front_known = True
        return line.front

    def _behind(self, line: PlannedLine, first: Entry) -> Entry | None:
        """Return the one behind the first of a line, which the plan has changed."""
        view = line.by_tag
        if view.ranking.first() is first:
            view.lifted.append(view.ranking.lift())
        else:
            heapq.heappop(view.moved)
        behind = self._first_of(view, line.fit, self._entry_by_tag)
        heapq.heappush(view.moved, first)
        return behind

    def _may_be_aged(self) -> bool:
        """Return whether the oldest head of all is aged. A plan makes none older, so one look is enough."""
        if self._oldest_since_ms is None:
            self._oldest_since_ms = self._queue.oldest_head_since_ms()
        since_ms = self._oldest_since_ms
        return since_ms is not None and since_ms + self._parameters.aging_ms <= self._now_ms

    def _oldest(self, lines: Iterable[PlannedLine]) -> tuple[Entry, PlannedLine] | None:
        best: tuple[Entry, PlannedLine] | None = None
        for line in lines:
            entry = self._first_of(line.by_age, line.fit, self._entry_by_age)
            if entry is not None and (best is None or entry < best[0]):
                best = entry, line
        return best

    def _first_of(self, view: _View, fit: Fit, entry_now: Callable[[Account, Lane], Entry]) -> Entry | None:
        """Return the first entry of a view that is right, having moved back those before it that are not."""
        ranking, moved = view.ranking, view.moved
        view.lifted += ranking.lift_while(self._out)
        while (entry := ranking.first()) is not None and entry[-1] in self._changed:
            right = self._entry_now(entry, fit, entry_now)
            if right == entry:
                break
            if right is not None:
                heapq.heappush(moved, right)
            view.lifted.append(ranking.lift())
            view.lifted += ranking.lift_while(self._out)
        while moved and (entry is None or moved[0] < entry):
            right = self._entry_now(moved[0], fit, entry_now)
            if right == moved[0]:
                return right
            heapq.heappop(moved)
            if right is not None:
                heapq.heappush(moved, right)
        return entry

    def _entry_now(self, entry: Entry, fit: Fit, entry_now: Callable[[Account, Lane], Entry]) -> Entry | None:
        """Return what a changed account is ranked by now in a line; None: it waits there no more."""
        if entry[-1] in self._out:
            return None
        account = self._accounts[entry[-1]]
        lane = account.turn(self._queue.tier).lanes[fit]
        return entry_now(account, lane) if lane.jobs else None

    def _entry_by_tag(self, account: Account, lane: Lane) -> Entry:
        tag = account.turn(self._queue.tier).tag
        assert tag is not None
        return self._queue.tag_entry(account, tag, lane.jobs[0])

    def _entry_by_age(self, account: Account, lane: Lane) -> Entry:
        head = lane.jobs[0]
        since_ms = lane.head_since_ms if lane.head_job_id == head.job_id else self._now_ms
        return since_ms, head.arrival, account.account_id

    def _head(self, entry: Entry, line: PlannedLine, because: ChosenBecause) -> Head:
        account = self._accounts[entry[-1]]
        return Head(account.turn(self._queue.tier).lanes[line.fit].jobs[0], account, because)
