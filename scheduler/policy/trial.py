"""Starts that are tried on the board while a cycle is planned, and taken back at its end.

One start changes the keys that the next is compared by. Trying it on the board itself means that planning
and applying are one code, which an overlay beside the board would have to repeat.
"""

from __future__ import annotations

from collections.abc import Mapping

from scheduler.policy.account import Account, AccountMemento
from scheduler.policy.decisions import Start
from scheduler.policy.fair_queue import FairQueue, Head
from scheduler.policy.ids import AccountId, AttemptId, Tier
from scheduler.policy.job import Job
from scheduler.policy.placement import Fleet

_TRIED = AttemptId("")


class Trial:
    """The starts of one cycle so far."""

    def __init__(self, queues: Mapping[Tier, FairQueue], fleet: Fleet, now_ms: int) -> None:
        self._queues = queues
        self._fleet = fleet
        self._now_ms = now_ms
        self._before = {tier: (queue.virtual_time, queue.since_aged) for tier, queue in queues.items()}
        self._mementos: dict[AccountId, tuple[Account, AccountMemento]] = {}
        self._tried: list[tuple[Account, Job, Start]] = []

    def start(self, head: Head, start: Start) -> None:
        """Make the board what it will be once this start is committed."""
        account = head.account
        if account.account_id not in self._mementos:
            self._mementos[account.account_id] = (account, AccountMemento(account))
        self._queues[start.tier].start(account, head.job, start.charge)
        self._fleet.occupy(start.worker_id, _TRIED)
        self._tried.append((account, head.job, start))
        for queue in self._queues.values():
            queue.reconcile(account, self._now_ms)

    def take_back(self) -> None:
        """Make the board what it was."""
        for account, job, start in self._tried:
            account.turn(start.tier).add(job)
            self._fleet.release(start.worker_id)
        for tier, queue in self._queues.items():
            queue.virtual_time, queue.since_aged = self._before[tier]
        for account, memento in self._mementos.values():
            memento.restore()
            for queue in self._queues.values():
                queue.reconcile(account, self._now_ms)
