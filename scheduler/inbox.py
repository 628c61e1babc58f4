"""The only way to the board.

Everybody who knows something puts it here; the loop, and nobody else, takes it out. It is bounded, however
long the loop waits for the database: what is noticed of jobs, whose rows are swept up later, is dropped when
there is too much; accounts and the fleet are noticed once, however often they change; of a worker's
heartbeats, each of which says all that the ones before it said, only the newest is kept; and of everything
else there is only ever as much as there are workers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from scheduler.fleet import FleetFact, WorkerHeard
from scheduler.store.endings import AttemptEnd, Settled, Unknown

# In one cycle the loop reads as many rows.
_MOST_JOBS = 10_000


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
class RowsRead:
    """More of what waited when this scheduler took over is ready to be told to the board."""


@dataclass(frozen=True, kw_only=True)
class ClosingDown:
    """The workers are about to end: nothing is to start, and what runs is to be handed over."""


@dataclass(frozen=True, kw_only=True)
class AttemptSettled:
    """The end of an attempt is committed, or turned out to be nobody's."""

    worker_id: str
    end: AttemptEnd
    outcome: Settled | Unknown


Item = JobsChanged | AccountsChanged | FleetChanged | RowsRead | ClosingDown | FleetFact | AttemptSettled


class Inbox:
    """Items in the order they came."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._jobs: dict[str, None] = {}
        self._accounts: dict[str, None] = {}
        self._fleet = False
        """Operators changed something of it."""
        self._heard: dict[tuple[str, str], WorkerHeard] = {}
        """Newest heartbeat of each life of a worker; its place among the items is that of the first."""
        self._filled = asyncio.Event()

    def put(self, item: Item) -> None:
        """Leave an item for the next cycle."""
        match item:
            case JobsChanged():
                # The sweep finds the rows of those that are left out.
                self._jobs.update(dict.fromkeys(item.job_ids[: _MOST_JOBS - len(self._jobs)]))
            case AccountsChanged():
                self._accounts.update(dict.fromkeys(item.account_ids))
            case FleetChanged():
                self._fleet = True
            case WorkerHeard():
                life = _life(item)
                if life not in self._heard:
                    self._items.append(item)
                self._heard[life] = item
            case _:
                self._items.append(item)
        self._filled.set()

    def drain(self) -> list[Item]:
        """Take everything out. What is noticed comes last: it is looked up after all else was heard."""
        items = [self._heard[_life(item)] if isinstance(item, WorkerHeard) else item for item in self._items]
        if self._jobs:
            items.append(JobsChanged(job_ids=tuple(self._jobs)))
        if self._accounts:
            items.append(AccountsChanged(account_ids=tuple(self._accounts)))
        if self._fleet:
            items.append(FleetChanged())
        self._items.clear()
        self._jobs, self._accounts, self._fleet = {}, {}, False
        self._heard.clear()
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
