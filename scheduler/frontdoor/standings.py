"""Why a job does not move: the scheduler's word, or, until it has said one, what the account's own jobs say.

All watches of this front door share one question a second. It is about so many jobs at most; of more, all
have their turn. So do watches that begin, or look again all at once because another scheduler leads: what
one asks while another's question is on its way goes with the next.
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
from scheduler.refusals import Overloaded
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

_AWAY_SENTENCE = "The database does not answer at the moment; watch again from the last sequence number."

Tell: TypeAlias = Callable[[QueueStatus], None]


class _Question:
    """What several ask together."""

    def __init__(self) -> None:
        self.about: dict[str, StoredJob] = {}
        self.answer: Mapping[str, QueueStatus] | None = None
        self.trouble: Overloaded | None = None


class Standings:
    """Where waiting jobs stand."""

    def __init__(self, pool: Pool, link: SchedulerLink, clock: Callable[[], datetime]) -> None:
        self._pool = pool
        self._link = link
        self._clock = clock
        self._listeners: dict[str, list[Tell]] = {}
        self._gathered = _Question()
        self._asking = asyncio.Lock()
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

    async def of_watched(self, job: StoredJob) -> QueueStatus | None:
        """Return of one job what `of` does, by a question that is shared with all who ask meanwhile.

        Raises Overloaded.
        """
        if job.state is not JobState.QUEUED:
            return (await self.of([job])).get(job.job_id)
        if len(self._gathered.about) == _MOST_ASKED:
            self._gathered = _Question()
        question = self._gathered
        question.about[job.job_id] = job
        async with self._asking:
            # Whoever comes first asks for all; if it is cancelled meanwhile, the next does.
            if question.answer is None and question.trouble is None:
                if self._gathered is question:
                    self._gathered = _Question()
                try:
                    question.answer = await self.of(list(question.about.values()))
                except Overloaded as trouble:
                    question.trouble = trouble
        if question.answer is None:
            raise Overloaded(sentence=_AWAY_SENTENCE) from question.trouble
        return question.answer.get(job.job_id)

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
