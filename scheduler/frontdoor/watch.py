"""What happens to one job, as it happens, until it ends.

State events come from PostgreSQL, all of them and in order; a watch that broke resumes by their numbers.
Queue places and progress have no numbers: whoever reads slowly gets the newest and misses the rest, so that
a watch never makes anything grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import ExitStack, aclosing, contextmanager

from gpu_worker.contract import Progress
from scheduler.frontdoor import messages
from scheduler.frontdoor.standings import Standings
from scheduler.link import SchedulerLink
from scheduler.refusals import NotFoundOrNotYours, Overloaded
from scheduler.store import jobs
from scheduler.store.jobs import JobEvent, JobState, StoredJob
from scheduler.store.pool import Pool
from scheduler.updates import QueueStatus
from scheduler.v1 import job_pb2

# Updates of the scheduler tell when to look at the database; looking also without them finds what it could
# not tell, for instance a cancellation while it was away.
_LOOK_ANYWAY_S = 10.0
# Watches of a front door that do so in a second: of many, each looks less often.
_LOOKS_A_SECOND = 100
# At once, when all have news: the rest of the pool is for others.
_LOOK_AT_ONCE = 4

# A watch may reach the worker before the order to render does, and then hears nothing: so it asks again.
_ASK_AGAIN_S = 0.5


class Watches:
    """The open watches of this front door."""

    def __init__(self, pool: Pool, link: SchedulerLink, standings: Standings, most: int) -> None:
        self._pool = pool
        self._link = link
        self._standings = standings
        self._open: set[_News] = set()
        self._closed = False
        self._most = most
        self._places = 0
        self._turns = asyncio.Semaphore(_LOOK_AT_ONCE)

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Let every watch end with Overloaded: its client resumes at another front door."""
        self._closed = True
        for news in self._open:
            news.leave()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Count a watch while the context is open, before anything is asked for it. Raises Overloaded."""
        if self._places >= self._most:
            raise Overloaded(
                sentence="Too many jobs are watched at this front door; watch again from the last sequence "
                "number."
            )
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    @property
    def turn(self) -> asyncio.Semaphore:
        """To be held by whoever asks the database for a watch: so others find connections too."""
        return self._turns

    async def watch(
        self, job_id: str, after_sequence: int, *, previews: bool
    ) -> AsyncGenerator[job_pb2.WatchJobResponse, None]:
        """Yield what happens to a job until it has ended. Raises NotFoundOrNotYours or Overloaded.

        Whoever calls has a `place`.
        """
        news = _News()
        news.leaving = self._closed
        self._open.add(news)
        try:
            async with aclosing(
                _Watch(self, news, job_id, after_sequence, previews=previews).run()
            ) as responses:
                async for response in responses:
                    yield response
        finally:
            self._open.discard(news)

    async def look(
        self, job_id: str, after_sequence: int
    ) -> tuple[list[JobEvent], StoredJob, QueueStatus | None]:
        """Return the events behind `after_sequence`, the job, no older than they are, and why it waits."""
        async with self._turns, self._pool.reading() as connection:
            events = await jobs.events_after(connection, job_id, after_sequence)
            job = await jobs.read_job(connection, job_id)
        if job is None:
            raise NotFoundOrNotYours
        return events, job, await self._standings.of_watched(job)

    @property
    def look_anyway_s(self) -> float:
        """How long a watch goes without looking at the database."""
        return max(_LOOK_ANYWAY_S, len(self._open) / _LOOKS_A_SECOND)

    async def follow(self, job_id: str, news: _News) -> None:
        """Say on every update of the scheduler that the database has something new."""
        async for _ in self._link.follow(job_id):
            news.look_again()

    async def follow_progress(self, worker_id: str, attempt_id: str, news: _News, *, previews: bool) -> None:
        """Pass on the progress of one attempt until cancelled: whether it has ended, the database says."""
        while True:
            async for progress in self._link.progress(worker_id, attempt_id, previews):
                news.progressed(progress)
            await asyncio.sleep(_ASK_AGAIN_S)

    def follow_queue(self, job_id: str, tell: Callable[[QueueStatus], None]) -> ExitStack:
        """Pass on what the scheduler says of a waiting job, until the returned stack is closed."""
        stack = ExitStack()
        stack.enter_context(self._standings.listen(job_id, tell))
        return stack


class _News:
    """What a watch has not said yet: of each kind only the newest."""

    def __init__(self) -> None:
        self.look = True
        self.leaving = False
        self.status: QueueStatus | None = None
        self.progress: Progress | None = None
        self._arrived = asyncio.Event()

    def look_again(self) -> None:
        self.look = True
        self._arrived.set()

    def leave(self) -> None:
        self.leaving = True
        self._arrived.set()

    def stands(self, status: QueueStatus) -> None:
        self.status = status
        self._arrived.set()

    def progressed(self, progress: Progress) -> None:
        if self.progress is not None and not progress.preview:
            # The newest step, with the newest picture: a preview that was not sent yet is not lost to a
            # bare step.
            progress = Progress(
                attempt_id=progress.attempt_id,
                step=progress.step,
                steps=progress.steps,
                preview=self.progress.preview,
                preview_content_type=self.progress.preview_content_type,
            )
        self.progress = progress
        self._arrived.set()

    async def wait(self, look_anyway_s: float) -> None:
        """Return when there is something to say, or when it is time to look anyway."""
        try:
            # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the event.
            async with asyncio.timeout(look_anyway_s):
                await self._arrived.wait()
        except TimeoutError:
            self.look = True
        self._arrived.clear()


class _Watch:
    """One watch."""

    def __init__(
        self, watches: Watches, news: _News, job_id: str, after_sequence: int, *, previews: bool
    ) -> None:
        self._watches = watches
        self._news = news
        self._job_id = job_id
        self._seen = after_sequence
        self._previews = previews
        self._said: QueueStatus | None = None
        self._attempt_id: str | None = None
        self._progress: asyncio.Task[None] | None = None
        self._queue: ExitStack | None = None

    async def run(self) -> AsyncGenerator[job_pb2.WatchJobResponse, None]:
        # Follow first and look then: what changes in between is seen twice and said once.
        following = self._start(self._watches.follow(self._job_id, self._news))
        try:
            while True:
                for task in (following, self._progress):
                    if task is not None and task.done():
                        task.result()  # what it raised is a bug, and is raised here
                if self._news.leaving:
                    raise Overloaded(
                        sentence="This front door is closing; watch again from the last sequence number."
                    )
                if self._news.look:
                    self._news.look = False
                    events, job, status = await self._watches.look(self._job_id, self._seen)
                    for event in events:
                        self._seen = event.seq
                        yield job_pb2.WatchJobResponse(event=messages.state_event(event, job, status))
                    if job.event_seq > self._seen:
                        self._news.look = True  # it changed between the two statements
                        continue
                    if job.state.ended:
                        return
                    self._follow_what_it_does(job)
                    if status is not None:
                        self._news.stands(status)
                for response in self._unsaid():
                    yield response
                await self._news.wait(self._watches.look_anyway_s)
        finally:
            self._stop_queue()
            tasks = [following, *([self._progress] if self._progress is not None else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _follow_what_it_does(self, job: StoredJob) -> None:
        """Follow the queue while it waits, and its running attempt while it runs."""
        if job.state is JobState.QUEUED and self._queue is None:
            self._queue = self._watches.follow_queue(self._job_id, self._news.stands)
        if job.state is not JobState.QUEUED:
            self._stop_queue()
            self._news.status = None
        if job.attempt_id == self._attempt_id:
            return
        if self._progress is not None:
            self._progress.cancel()
            self._progress = None
        self._attempt_id = job.attempt_id
        self._news.progress = None
        self._said = None
        if job.attempt_id is not None and job.worker_id is not None:
            self._progress = self._start(
                self._watches.follow_progress(
                    job.worker_id, job.attempt_id, self._news, previews=self._previews
                )
            )

    def _start(self, following: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(following)
        task.add_done_callback(lambda _: self._news.look_again())
        return task

    def _stop_queue(self) -> None:
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def _unsaid(self) -> list[job_pb2.WatchJobResponse]:
        status, self._news.status = self._news.status, None
        progress, self._news.progress = self._news.progress, None
        responses = []
        # Before the status: of a job that was just parked, the steps before that come first.
        if progress is not None:
            self._said = None  # it moves: once it is parked again, that is said again
            responses.append(job_pb2.WatchJobResponse(progress=messages.progress(progress)))
        if status is not None and status != self._said:
            self._said = status
            responses.append(job_pb2.WatchJobResponse(queue_status=messages.queue_status(status)))
        return responses
