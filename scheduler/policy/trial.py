"""Decisions that are tried on the board while a cycle is planned, and taken back at its end.

One start changes the keys that the next is compared by. Trying it on the board itself means that planning
and applying are one code, which an overlay beside the board would have to repeat.
"""

from __future__ import annotations

from collections.abc import Mapping

from scheduler.policy.account import AccountMemento, Turn
from scheduler.policy.attempt import Attempt
from scheduler.policy.decisions import Charge, Migrate, Resume
from scheduler.policy.fair_queue import FairQueue, Head
from scheduler.policy.ids import AccountId, AttemptId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.order import Order
from scheduler.policy.placement import Fleet, Hands
from scheduler.policy.preemption import Parkable

_TRIED = AttemptId("")


class Trial:
    """The decisions of one cycle so far."""

    def __init__(self, queues: Mapping[Tier, FairQueue], orders: Mapping[Tier, Order], fleet: Fleet) -> None:
        self._queues = queues
        self._orders = orders
        self._fleet = fleet
        self._before = {tier: (queue.virtual_time, queue.aged_wait_ms) for tier, queue in queues.items()}
        self._mementos: dict[AccountId, AccountMemento] = {}
        self._hands: dict[WorkerId, tuple[Hands, Parkable | None]] = {}
        self._started: list[tuple[Turn, Job]] = []
        self.parked = 0
        """Runs parked by this cycle, less those it resumes or migrates."""
        self.moved: set[AttemptId] = set()
        """Parked runs that it resumes or migrates."""

    def start(
        self, head: Head, tier: Tier, charge: Charge, worker_id: WorkerId, parks: AttemptId | None
    ) -> None:
        """Make the board what it will be once this start is committed."""
        account = head.account
        if account.account_id not in self._mementos:
            self._mementos[account.account_id] = AccountMemento(account)
        turn = account.turn(tier)
        self._queues[tier].start(account, head.job, charge)
        self._started.append((turn, head.job))
        for other, order in self._orders.items():
            if other is tier or account.turn(other).waiting:
                order.change(account)
        parked = parks
        if parks is None:
            parked = self._fleet.hands(worker_id).parked
        else:
            self.parked += 1
        self._set(worker_id, Hands(_TRIED, tier is Tier.FAST, parked))

    def resume(self, resume: Resume) -> None:
        """Make the board what it will be once this run goes on."""
        self.parked -= 1
        self.moved.add(resume.attempt_id)
        self._set(resume.worker_id, Hands(resume.attempt_id))

    def migrate(self, attempt: Attempt, migrate: Migrate) -> None:
        """Make the board what it will be once this run is another worker's."""
        self.parked -= 1
        self.moved.add(migrate.attempt_id)
        self._set(attempt.worker_id, self._fleet.hands(attempt.worker_id)._replace(parked=None))
        self._set(migrate.to, Hands(_TRIED))

    def take_back(self) -> None:
        """Make the board what it was."""
        for order in self._orders.values():
            order.put_back()
        for turn, job in reversed(self._started):
            turn.put_back(job)
        for memento in self._mementos.values():
            memento.restore()
        for worker_id, (hands, parkable) in self._hands.items():
            self._fleet.set_hands(worker_id, hands, parkable)
        for tier, queue in self._queues.items():
            queue.virtual_time, queue.aged_wait_ms = self._before[tier]

    def _set(self, worker_id: WorkerId, hands: Hands) -> None:
        if worker_id not in self._hands:
            self._hands[worker_id] = (self._fleet.hands(worker_id), self._fleet.parkable(worker_id))
        self._fleet.set_hands(worker_id, hands)
