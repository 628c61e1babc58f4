"""The only way to the board.

Everybody who knows something puts it here; the loop, and nobody else, takes it out. It is bounded: a notice
of jobs, whose rows are swept up later, is dropped when it is full; of a worker's heartbeats, each of which
says all that the ones before it said, only the newest is kept; and of everything else there is only ever as
much as there are workers and accounts.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from scheduler.fleet import FleetFact, WorkerHeard
from scheduler.store.endings import AttemptEnd, Settled, Unknown

_MOST_NOTICES = 100_000


@dataclass(frozen=True, kw_only=True)
class JobsChanged:
    """These jobs' rows were committed, cancelled or moved; what they say now is in the database."""

    job_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AccountsChanged:
    """Plans, limits, funds or consent of these accounts changed; what holds now is in the database."""

    account_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FleetChanged:
    """Operators drained, resumed or paused something; what they want now is in the database."""


@dataclass(frozen=True, kw_only=True)
class ClosingDown:
    """The workers are about to end: nothing is to start, and what runs is to be handed over."""


@dataclass(frozen=True, kw_only=True)
class AttemptSettled:
    """The end of an attempt is committed, or turned out to be nobody's."""

    worker_id: str
    end: AttemptEnd
    outcome: Settled | Unknown


Item = JobsChanged | AccountsChanged | FleetChanged | ClosingDown | FleetFact | AttemptSettled


class Inbox:
    """Items in the order they came."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._notices = 0
        self._heard: dict[tuple[str, str], WorkerHeard] = {}
        """Newest heartbeat of each life of a worker; its place among the items is that of the first."""
        self._filled = asyncio.Event()

    def put(self, item: Item) -> None:
        """Leave an item for the next cycle."""
        if isinstance(item, JobsChanged):
            if self._notices >= _MOST_NOTICES:
                return  # the sweep finds the rows
            self._notices += 1
        elif isinstance(item, WorkerHeard):
            life = _life(item)
            repeated = life in self._heard
            self._heard[life] = item
            if repeated:
                return
        self._items.append(item)
        self._filled.set()

    def drain(self) -> list[Item]:
        """Take everything out."""
        items = [self._heard[_life(item)] if isinstance(item, WorkerHeard) else item for item in self._items]
        self._items.clear()
        self._heard.clear()
        self._notices = 0
        self._filled.clear()
        return items

    async def wait(self, seconds: float) -> None:
        """Return when something is there, or after `seconds`."""
        # Not wait_for: in Python 3.11 it loses a cancellation that comes together with what it waits for.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._filled.wait()


def _life(heard: WorkerHeard) -> tuple[str, str]:
    return heard.report.worker_id, heard.report.incarnation
