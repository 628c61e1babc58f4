"""What waited when a scheduler took over, told to its board from the front of the order to its end.

A million jobs take many seconds to read, and whoever is next need not wait for the last of them. So accounts
come in the order in which they are served, each with all its jobs, and the board is told how far it knows the
order: up to there it starts what it would start if it knew all.
"""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from scheduler.arrivals import Arrivals, WaitingPortion
from scheduler.clock import LeaderClock
from scheduler.inbox import RowsRead
from scheduler.policy.events import Edge, Event, OrderKnown, RecoveryEnded
from scheduler.policy.ids import AccountId, Tier
from scheduler.store import live
from scheduler.store.lanes import Lane

# Read first: few, for them to be there soon. Then each time twice as many, up to so many that the round trips
# cost little, and that the next portion is there before this one is told.
_JOBS_FIRST = 2_000
_JOBS_LAST = 8_000
# Jobs told between two times that what was told is kept from the collector, before it begins to look.
_KEEP_EVERY = 5_000


class Backlog:
    """Of one leader. Reading goes on beside the loop, some portions ahead; telling is the loop's, an account
    at a time and in their order, so that it can stop when it has other things to do.

    An account of which something is noticed before it is told of is read by whoever looks into that, and not
    told of again. Changed terms of one that nobody knows yet are looked at again behind the portion that it
    may be in, which may be older.
    """

    def __init__(
        self,
        waiting: Mapping[Tier, Sequence[live.Waits]],
        *,
        arrivals: Arrivals,
        lanes: Sequence[Lane],
        clock: LeaderClock,
        tell: Callable[[RowsRead], None],
        jobs_first: int = _JOBS_FIRST,
        jobs_last: int = _JOBS_LAST,
    ) -> None:
        self._orders = {tier: _Order(waiting[tier]) for tier in Tier}
        self._arrivals = arrivals
        self.lanes = lanes
        """To be read on, each by a `run` of its own."""
        self._clock = clock
        self._tell = tell
        self._jobs_at_a_time = jobs_first
        self._jobs_last = jobs_last
        self._asked: set[AccountId] = set()
        """Accounts that are read, or about to be."""
        self._done: set[AccountId] = set()
        """Of these, those that the board was told of, or that are gone."""
        self._on_its_way: deque[_Delivery] = deque()
        """What is being read, behind what is ready to be told."""
        self._again: set[str] = set()
        self._room = asyncio.Event()
        self._ended = False
        self._unkept_jobs = 0

    async def run(self, lane: Lane) -> None:
        """Read on one lane until all is read; raises Deposed when another scheduler leads."""
        try:
            while wanted := self._next_accounts():
                delivery = _Delivery(wanted)
                self._on_its_way.append(delivery)
                self._jobs_at_a_time = min(2 * self._jobs_at_a_time, self._jobs_last)
                delivery.portion = await self._arrivals.read_waiting(lane, wanted)
                self._tell(RowsRead())
                while len(self._on_its_way) > len(self.lanes):
                    self._room.clear()
                    await self._room.wait()
        finally:
            await lane.close()

    @property
    def is_ready(self) -> bool:
        """Whether there is something to tell."""
        return bool(self._on_its_way) and self._on_its_way[0].portion is not None

    @property
    def ended(self) -> bool:
        """Whether the board was told that all is there."""
        return self._ended

    def untold(self, tier: Tier) -> int:
        """Return about how many waiting jobs of a tier the board was not told of yet."""
        return self._orders[tier].jobs_left

    def noticed(self, account_ids: Iterable[str]) -> None:
        """Note that the terms of these changed, for what is on its way."""
        for delivery in self._on_its_way:
            delivery.noticed.update(account_ids)

    def again(self) -> set[str]:
        """Take out the accounts whose terms are to be looked at again."""
        noticed, self._again = self._again, set()
        return noticed

    def next(self) -> list[Event]:
        """Return what is to be told of the next account; something must be ready."""
        delivery = self._on_its_way[0]
        assert delivery.portion is not None
        events: list[Event] = []
        if delivery.wanted:
            account_id = delivery.wanted.popleft()
            self._done.add(account_id)
            if account_id in delivery.portion.accounts:
                events = self._arrivals.of_waiting_account(delivery.portion, account_id)
                self._keep(len(delivery.portion.accounts[account_id][1]))
        if not delivery.wanted:
            self._on_its_way.popleft()
            self._again |= delivery.noticed
            self._room.set()
        return events

    def progress(self) -> list[Event]:
        """Return how far the board knows the order now, where that is new, and that it has ended."""
        now_ms = self._clock.now_ms()
        events: list[Event] = []
        for tier, order in self._orders.items():
            first = order.first(self._is_known)
            edge = None if first is None else Edge(tag=first.tag, arrival=first.arrival)
            if edge != order.told:
                order.told = edge
                events.append(OrderKnown(at_ms=now_ms, tier=tier, edge=edge))
        if not self._on_its_way and all(order.told is None for order in self._orders.values()):
            self._ended = True
            events.append(RecoveryEnded(at_ms=now_ms))
        return events

    def _next_accounts(self) -> list[AccountId]:
        accounts: list[AccountId] = []
        jobs = 0
        while jobs < self._jobs_at_a_time:
            taken = [waits for order in self._orders.values() if (waits := order.next(self._is_wanted))]
            if not taken:
                break
            for waits in taken:
                jobs += waits.jobs
                if waits.account_id not in self._asked:
                    self._asked.add(waits.account_id)
                    accounts.append(waits.account_id)
        return accounts

    def _is_known(self, account_id: AccountId) -> bool:
        return account_id in self._done or self._arrivals.knows(account_id)

    def _is_wanted(self, account_id: AccountId) -> bool:
        return account_id not in self._asked and not self._arrivals.knows(account_id)

    def _keep(self, jobs: int) -> None:
        """Keep what was told from the collector: it would walk through all of it, again and again."""
        self._unkept_jobs += jobs
        if self._unkept_jobs >= _KEEP_EVERY:
            self._unkept_jobs = 0
            gc.freeze()


class _Delivery:
    """A portion on its way from the rows to the board."""

    __slots__ = ("noticed", "portion", "wanted")

    def __init__(self, wanted: Iterable[AccountId]) -> None:
        self.wanted = deque(wanted)
        """Accounts that the board has yet to be told of."""
        self.portion: WaitingPortion | None = None
        """None: it is being read."""
        self.noticed: set[str] = set()
        """Accounts whose terms changed since."""


class _Order:
    """Who waits in one tier, in the order in which they are served."""

    __slots__ = ("_first", "_next", "_waits", "jobs_left", "told")

    def __init__(self, waits: Sequence[live.Waits]) -> None:
        self._waits = waits
        self._next = self._first = 0
        self.jobs_left = sum(one.jobs for one in waits)
        """From the first on that the board does not know."""
        self.told: Edge | None = None
        """What the board was told last."""

    def next(self, is_wanted: Callable[[AccountId], bool]) -> live.Waits | None:
        """Return the next to be read, and go on; None: there is no other."""
        while self._next < len(self._waits):
            waits = self._waits[self._next]
            self._next += 1
            if is_wanted(waits.account_id):
                return waits
        return None

    def first(self, is_known: Callable[[AccountId], bool]) -> live.Waits | None:
        """Return the first that the board does not know; None: it knows all."""
        while self._first < len(self._waits):
            waits = self._waits[self._first]
            if not is_known(waits.account_id):
                return waits
            self._first += 1
            self.jobs_left -= waits.jobs
        return None
