"""Why a job does not move: the scheduler's word, or, until it has said one, what the account's own jobs say.

All watches of this front door share one question a second. It is about so many jobs at most; of more, all
have their turn.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TypeAlias

from billing import accounts as ledger_accounts
from scheduler.intake import expected_status
from scheduler.link import SchedulerLink
from scheduler.store import jobs
from scheduler.store.jobs import JobState, StoredJob
from scheduler.store.pool import Pool
from scheduler.updates import QueueReason, QueueStatus

_ASK_EVERY_S = 1.0
# The scheduler works out the place of each, and decides nothing meanwhile.
_MOST_ASKED = 500
_PARKED = QueueStatus(
    reason=QueueReason.PARKED,
    sentence="A fast job has its GPU for the moment; your job goes on from where it is.",
    position=0,
)
_STARTING_SENTENCE = "The scheduler is starting; the job keeps its place."

Tell: TypeAlias = Callable[[QueueStatus], None]


class Standings:
    """Where waiting jobs stand."""

    def __init__(self, pool: Pool, link: SchedulerLink, clock: Callable[[], datetime]) -> None:
        self._pool = pool
        self._link = link
        self._clock = clock
        self._listeners: dict[str, list[Tell]] = {}
        self._wanted = asyncio.Event()

    async def of(self, listed: Sequence[StoredJob]) -> Mapping[str, QueueStatus]:
        """Return why each of these waits that does, at the start or in the middle. Raises Overloaded."""
        parked = {job.job_id: _PARKED for job in listed if job.parked_at is not None}
        waiting = [job for job in listed if job.state is JobState.QUEUED]
        if not waiting:
            return parked
        known = dict(await self._link.queue_statuses([job.job_id for job in waiting]))
        unknown = [job for job in waiting if job.job_id not in known]
        if unknown:
            known |= await self._expected(unknown)
        return known | parked

    async def run(self) -> None:
        """Tell the listeners what the scheduler says, once a second while there are any, until cancelled."""
        while True:
            await self._wanted.wait()
            await self.ask()
            await asyncio.sleep(_ASK_EVERY_S)

    async def ask(self) -> None:
        """Ask the scheduler once, and tell the listeners."""
        asked = list(itertools.islice(self._listeners, _MOST_ASKED))
        for job_id in asked:
            self._listeners[job_id] = self._listeners.pop(job_id)  # behind those not asked about
        for job_id, status in (await self._link.queue_statuses(asked)).items():
            for tell in self._listeners.get(job_id, ()):
                tell(status)

    @contextmanager
    def listen(self, job_id: str, tell: Tell) -> Iterator[None]:
        """Have `tell` called with each answer about a waiting job."""
        self._listeners.setdefault(job_id, []).append(tell)
        self._wanted.set()
        try:
            yield
        finally:
            self._listeners[job_id].remove(tell)
            if not self._listeners[job_id]:
                del self._listeners[job_id]
            if not self._listeners:
                self._wanted.clear()

    async def _expected(self, waiting: Sequence[StoredJob]) -> Mapping[str, QueueStatus]:
        ready = await self._link.scheduler_ready()
        async with self._pool.transaction() as connection:
            terms = await ledger_accounts.terms(
                connection, {job.account_id for job in waiting}, self._clock()
            )
            places = await jobs.live_places(connection, [job.job_id for job in waiting])
        expected = {
            job.job_id: expected_status(job.tier, places[job.job_id], terms[job.account_id])
            for job in waiting
            if job.job_id in places
        }
        if ready:
            return expected
        starting = QueueStatus(reason=QueueReason.SCHEDULER_STARTING, sentence=_STARTING_SENTENCE, position=0)
        return {
            job_id: status if status.reason is QueueReason.CONCURRENCY_LIMIT else starting
            for job_id, status in expected.items()
        }
