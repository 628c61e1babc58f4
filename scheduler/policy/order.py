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
from scheduler.policy.fair_queue import FairQueue, Head
from scheduler.policy.ids import AccountId
from scheduler.policy.job import Fit
from scheduler.policy.parameters import Parameters
from scheduler.policy.ranking import Entry, Ranking


class _View:
    """One ranking of a line, as a plan sees it."""

    __slots__ = ("entry_now", "fit", "lifted", "moved", "ranking")

    def __init__(
        self, ranking: Ranking[AccountId], fit: Fit, entry_now: Callable[[Account, Lane], Entry]
    ) -> None:
        self.ranking = ranking
        self.lifted: list[Entry] = []
        """What was taken off the ranking's front."""
        self.fit = fit
        self.entry_now = entry_now
        self.moved: list[Entry] = []
        """A heap of what stands further back than in the ranking."""


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
        self._by_tag: dict[Fit, _View] = {}
        self._by_age: dict[Fit, _View] = {}
        self._fronts: dict[Fit, Entry | None] = {}
        """The first of each line in the order of tags, where it was looked at."""
        self._oldest_since_ms: int | None = None
        """Since when the oldest head of all has been one, before the plan; None: not looked at."""

    def fits(self) -> list[Fit]:
        """Return the fits that jobs of eligible accounts waited for before the plan."""
        return list(self._queue.lines)

    def is_waited_in(self, fit: Fit) -> bool:
        """Return whether the plan has left anybody in a line."""
        return (self._fronts[fit] if fit in self._fronts else self._front(fit)) is not None

    def change(self, account: Account) -> None:
        """Take note that the plan has changed an account."""
        account_id, fronts = account.account_id, self._fronts
        turn = account.turn(self._queue.tier)
        if turn.tag is None or account.free(self._queue.tier) <= 0:
            self._out.add(account_id)
            self._changed.discard(account_id)
        else:
            self._changed.add(account_id)
        for fit in turn.lanes:
            entry = fronts.get(fit)
            if entry is not None and entry[-1] == account_id:
                del fronts[fit]

    def put_back(self) -> None:
        """Leave the queue's ranks as they were. The order is of no more use."""
        for view in (*self._by_tag.values(), *self._by_age.values()):
            for entry in view.lifted:
                view.ranking.put_back(entry)

    def choose(self, fits: Iterable[Fit]) -> Head | None:
        """Return the job to start next among these fits: by age if it is age's turn, else by tag."""
        first = self._first(fits)
        if first is None:
            return None
        if self._queue.aged_wait_ms == 0 and self._may_be_aged():
            oldest = self._oldest(fits)
            assert oldest is not None, "what has a tag has an age"
            entry, fit = oldest
            aged = entry[0] + self._parameters.aging_ms <= self._now_ms
            if aged and (entry[-1], fit) != (first[0][-1], first[1]):
                return self._head(entry, fit, ChosenBecause.AGED)
        return self._head(*first, ChosenBecause.FIRST_IN_ORDER)

    def choose_warm(self, fits: Iterable[Fit], instead_of: Head) -> Head | None:
        """Return the first job among these fits, if it may go before `instead_of` to save a load."""
        first = self._first(fits)
        tag = instead_of.account.turn(self._queue.tier).tag
        assert tag is not None
        if first is None or first[0][0] > tag + self._parameters.affinity_ms * 1000:
            return None
        return self._head(*first, ChosenBecause.MODEL_WARM)

    def oldest_head_since_ms(self, fits: Iterable[Fit]) -> int | None:
        """Return since when the oldest head among these fits has been one; None: there is none."""
        oldest = self._oldest(fits)
        return None if oldest is None else oldest[0][0]

    def first_besides(self, account: Account, fits: Iterable[Fit]) -> Standing | None:
        """Return the first in the order of tags among the accounts but one that the plan has changed."""
        account_id = account.account_id
        best: Entry | None = None
        fronts = self._fronts
        for fit in fits:
            entry = fronts[fit] if fit in fronts else self._front(fit)
            if entry is not None and entry[-1] == account_id:
                entry = self._behind(fit, entry)
            if entry is not None and (best is None or entry < best):
                best = entry
        return None if best is None else self._queue.standing(best, self._now_ms)

    def _first(self, fits: Iterable[Fit]) -> tuple[Entry, Fit] | None:
        best: Entry | None = None
        best_fit: Fit | None = None
        fronts = self._fronts
        for fit in fits:
            entry = fronts[fit] if fit in fronts else self._front(fit)
            if entry is not None and (best is None or entry < best):
                best, best_fit = entry, fit
        return None if best is None or best_fit is None else (best, best_fit)

    def _front(self, fit: Fit) -> Entry | None:
        """Look up the first of a line in the order of tags."""
        view = self._by_tag.get(fit)
        if view is None:
            view = self._by_tag[fit] = _View(self._queue.lines[fit].by_tag, fit, self._entry_by_tag)
        entry = self._fronts[fit] = self._first_of(view)
        return entry

    def _behind(self, fit: Fit, first: Entry) -> Entry | None:
        """Return the one behind the first of a line, which the plan has changed."""
        view = self._by_tag[fit]
        if view.ranking.first() is first:
            view.lifted.append(view.ranking.lift())
        else:
            heapq.heappop(view.moved)
        behind = self._first_of(view)
        heapq.heappush(view.moved, first)
        return behind

    def _may_be_aged(self) -> bool:
        """Return whether the oldest head of all is aged. A plan makes none older, so one look is enough."""
        if self._oldest_since_ms is None:
            self._oldest_since_ms = self._queue.oldest_head_since_ms()
        since_ms = self._oldest_since_ms
        return since_ms is not None and since_ms + self._parameters.aging_ms <= self._now_ms

    def _oldest(self, fits: Iterable[Fit]) -> tuple[Entry, Fit] | None:
        best: tuple[Entry, Fit] | None = None
        for fit in fits:
            view = self._by_age.get(fit)
            if view is None:
                view = self._by_age[fit] = _View(self._queue.lines[fit].by_age, fit, self._entry_by_age)
            entry = self._first_of(view)
            if entry is not None and (best is None or entry < best[0]):
                best = entry, fit
        return best

    def _first_of(self, view: _View) -> Entry | None:
        """Return the first entry of a view that is right, having moved back those before it that are not."""
        ranking, moved = view.ranking, view.moved
        view.lifted += ranking.lift_while(self._out)
        while (entry := ranking.first()) is not None and entry[-1] in self._changed:
            right = self._entry_now(view, entry)
            if right == entry:
                break
            if right is not None:
                heapq.heappush(moved, right)
            view.lifted.append(ranking.lift())
            view.lifted += ranking.lift_while(self._out)
        while moved and (entry is None or moved[0] < entry):
            right = self._entry_now(view, moved[0])
            if right == moved[0]:
                return right
            heapq.heappop(moved)
            if right is not None:
                heapq.heappush(moved, right)
        return entry

    def _entry_now(self, view: _View, entry: Entry) -> Entry | None:
        """Return what a changed account is ranked by now in a line; None: it waits there no more."""
        if entry[-1] in self._out:
            return None
        account = self._accounts[entry[-1]]
        lane = account.turn(self._queue.tier).lanes[view.fit]
        return view.entry_now(account, lane) if lane.jobs else None

    def _entry_by_tag(self, account: Account, lane: Lane) -> Entry:
        tag = account.turn(self._queue.tier).tag
        assert tag is not None
        return self._queue.tag_entry(account, tag, lane.jobs[0])

    def _entry_by_age(self, account: Account, lane: Lane) -> Entry:
        head = lane.jobs[0]
        since_ms = lane.head_since_ms if lane.head_job_id == head.job_id else self._now_ms
        return since_ms, head.arrival, account.account_id

    def _head(self, entry: Entry, fit: Fit, because: ChosenBecause) -> Head:
        account = self._accounts[entry[-1]]
        return Head(account.turn(self._queue.tier).lanes[fit].jobs[0], account, because)
