"""A front door's line to the scheduler and the workers, over Ray.

One long poll brings every update of every job to this front door, where watchers take what is theirs; notices
go out in batches. While the scheduler is away nothing is lost: its sweep finds rows, and the first poll that
works again tells every watcher to look at the database.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
import structlog
from ray.exceptions import RayError

from gpu_worker.contract import Progress
from scheduler.answers import Explained, Outlook, QueuesView, WhatIf, WorkerView
from scheduler.cluster.ray_fleet import actor_name, living_workers
from scheduler.cluster.scheduler_actor import StillStarting
from scheduler.metrics import Page
from scheduler.refusals import Overloaded
from scheduler.settings import RELEASE
from scheduler.updates import Abilities, JobUpdate, QueueStatus

_log = structlog.get_logger()

_POLL_S = 5.0
_ASK_AGAIN_S = 0.2
_ANSWER_S = 2.0
# Playing futures forward takes seconds on a large board.
_FORESEE_S = 10.0
_NODES_EVERY_S = 2.0
# Notices that wait for the scheduler to come back. Jobs beyond are found by its sweep.
_MOST_JOBS_NOTED = 100_000


class _NoSuchActor(Exception):
    """Nobody of that name is in the cluster."""


class NodeGone(RuntimeError):
    """Ray counts this process's node among the dead: what is started anew beside another raylet can go on."""


# The scheduler is away: it may be busy with a million rows, or be started anew by Ray; or the database is,
# and nobody can tell who leads.
_AWAY = (RayError, StillStarting, TimeoutError, _NoSuchActor, Overloaded)


class RayLink:
    """Implements `scheduler.link.SchedulerLink`. Made by `ray_link`."""

    def __init__(
        self,
        *,
        namespace: str,
        holder: Callable[[], Awaitable[str]],
        release: str,
        nodes: Callable[[], Sequence[Mapping[str, Any]]],
    ) -> None:
        self._nodes = nodes
        self._namespace = namespace
        self._release = release
        self._holder = holder
        """Name of the actor that leads, from the leader row."""
        self._actor: Any = None
        self._workers: dict[str, Any] = {}
        self._jobs: set[str] = set()
        self._accounts: set[str] = set()
        self._fleet = False
        """Operators changed something of it."""
        self._noted = asyncio.Event()
        self._abilities: Abilities | None = None
        self._newest: dict[str, JobUpdate] = {}
        self._followers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._streams: dict[tuple[str, bool], _ProgressStream] = {}
        self.background = asyncio.create_task(self._run(), name="link")
        """Polls and notifies. Ends only by failing: whoever keeps the service up awaits it too."""

    def jobs_changed(self, job_ids: Sequence[str]) -> None:
        """See SchedulerLink.jobs_changed."""
        self._note_jobs(job_ids)
        self._noted.set()

    def accounts_changed(self, account_ids: Sequence[str]) -> None:
        """See SchedulerLink.accounts_changed."""
        self._accounts.update(account_ids)
        self._noted.set()

    def fleet_changed(self) -> None:
        """See SchedulerLink.fleet_changed."""
        self._fleet = True
        self._noted.set()

    async def queue_statuses(self, job_ids: Sequence[str]) -> Mapping[str, QueueStatus]:
        """See SchedulerLink.queue_statuses."""
        try:
            actor = await self._scheduler()
            statuses: Mapping[str, QueueStatus] = await _within(
                _ANSWER_S, actor.queue_statuses.remote(list(job_ids))
            )
            return statuses
        except _AWAY:
            return {}

    async def follow(self, job_id: str) -> AsyncIterator[JobUpdate]:
        """See SchedulerLink.follow."""
        changed = asyncio.Event()
        self._followers[job_id].add(changed)
        told: JobUpdate | None = None
        try:
            known = await self._ask_for(job_id)
            if known is not None:
                self._newest.setdefault(job_id, known)
            while True:
                newest = self._newest.get(job_id)
                # Not by what they say: of two that only tell to look again, the second counts too.
                if newest is not None and newest is not told:
                    told = newest
                    yield newest
                else:
                    await changed.wait()
                    changed.clear()
        finally:
            self._followers[job_id].discard(changed)
            if not self._followers[job_id]:
                del self._followers[job_id]
                self._newest.pop(job_id, None)

    async def progress(self, worker_id: str, attempt_id: str, previews: bool) -> AsyncIterator[Progress]:
        """See SchedulerLink.progress."""
        key = (attempt_id, previews)
        stream = self._streams.get(key)
        if stream is None or stream.ended:
            stream = self._streams[key] = _ProgressStream(self._watch(worker_id, attempt_id, previews))
        try:
            async with aclosing(stream.follow()) as newest:
                async for progress in newest:
                    yield progress
        finally:
            if not stream.followers:
                stream.reading.cancel()
                if self._streams.get(key) is stream:
                    del self._streams[key]

    def abilities(self) -> Abilities | None:
        """See SchedulerLink.abilities."""
        return self._abilities

    async def explain(self, job_id: str) -> Explained | None:
        """See SchedulerLink.explain."""
        try:
            actor = await self._scheduler()
            explanation: Explained | None = await _within(_ANSWER_S, actor.explain.remote(job_id))
        except _AWAY:
            return None
        return explanation

    async def estimate(self, what_ifs: Sequence[WhatIf]) -> Sequence[Outlook | None]:
        """See SchedulerLink.estimate."""
        try:
            actor = await self._scheduler()
            outlooks: Sequence[Outlook | None] = await _within(
                _FORESEE_S, actor.estimate.remote(list(what_ifs))
            )
        except _AWAY:
            return [None] * len(what_ifs)
        return outlooks

    async def queues(self) -> QueuesView | None:
        """See SchedulerLink.queues."""
        try:
            actor = await self._scheduler()
            queues: QueuesView = await _within(_ANSWER_S, actor.queues.remote())
        except _AWAY:
            return None
        return queues

    async def workers_view(self) -> Sequence[WorkerView] | None:
        """See SchedulerLink.workers_view."""
        try:
            actor = await self._scheduler()
            views: Sequence[WorkerView] = await _within(_ANSWER_S, actor.workers_view.remote())
        except _AWAY:
            return None
        return views

    async def scheduler_ready(self) -> bool:
        """See SchedulerLink.scheduler_ready."""
        try:
            actor = await self._scheduler()
            await _within(_ANSWER_S, actor.epoch.remote())
        except _AWAY:
            return False
        return True

    async def workers(self) -> int:
        """Return how many workers have joined; 0 while the scheduler is away."""
        try:
            actor = await self._scheduler()
            joined: int = await _within(_ANSWER_S, actor.workers.remote())
        except _AWAY:
            return 0
        return joined

    async def close_down(self, within_s: float) -> None:
        """Have everything that runs handed over, before the workers end. Gives up after that time."""
        with suppress(*_AWAY):
            actor = await self._scheduler()
            await _within(within_s + _ANSWER_S, actor.close_down.remote(within_s))

    async def scheduler_metrics(self, accept: str = "") -> Page:
        """Return its metrics for a scraper's Accept header. Raises TimeoutError while it is away."""
        try:
            actor = await self._scheduler()
            page: Page = await _within(_ANSWER_S, actor.metrics.remote(accept))
        except _AWAY as away:
            raise TimeoutError("the scheduler does not answer") from away
        return page

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._poll(), name="poll updates")
                group.create_task(self._notify(), name="notify scheduler")
                group.create_task(self._watch_node(), name="watch node")
        except* NodeGone as gone:
            # Expected trouble, which its sentence explains; whatever else failed with it came of it.
            why = gone.exceptions[0]
        else:
            return
        raise why

    async def _watch_node(self) -> None:
        """Raise NodeGone once the raylet beside this process has ended: no call would go anywhere any more.

        Ray ends its workers then, but not a driver.
        """
        own = ray.get_runtime_context().get_node_id()
        while True:
            for node in await asyncio.to_thread(self._nodes):
                if node["NodeID"] == own and not node["Alive"]:
                    raise NodeGone("The raylet beside this front door has ended. Start both again.")
            await asyncio.sleep(_NODES_EVERY_S)

    async def _poll(self) -> None:
        epoch, newest = 0, 0
        away = False
        while True:
            try:
                actor = await self._scheduler()
                batch = await _within(_POLL_S + _ANSWER_S, actor.updates_after.remote(newest, _POLL_S))
                if epoch not in (0, batch.epoch):
                    # Another scheduler, with its own numbers:
                    # whatever it did before this poll is in the database.
                    batch = await _within(_ANSWER_S, actor.updates_after.remote(0, 0))
                if batch.gap or epoch not in (0, batch.epoch):
                    self._look_again()
            except _AWAY as trouble:
                if not away and epoch:
                    _log.warning("scheduler away", trouble=type(trouble).__name__)
                away = True
                self._actor = None
                await asyncio.sleep(_ASK_AGAIN_S)
                continue
            away, epoch, newest = False, batch.epoch, batch.newest
            self._abilities = batch.abilities
            for update in batch.updates:
                self._hand_out(update)

    async def _notify(self) -> None:
        while True:
            await self._noted.wait()
            self._noted.clear()
            jobs, self._jobs = list(self._jobs), set()
            accounts, self._accounts = list(self._accounts), set()
            fleet, self._fleet = self._fleet, False
            try:
                actor = await self._scheduler()
                if jobs:
                    await _within(_ANSWER_S, actor.jobs_changed.remote(jobs))
                if accounts:
                    await _within(_ANSWER_S, actor.accounts_changed.remote(accounts))
                if fleet:
                    await _within(_ANSWER_S, actor.fleet_changed.remote())
            except _AWAY:
                self._note_jobs(jobs)
                self._accounts |= set(accounts)
                self._fleet |= fleet
                self._actor = None
                await asyncio.sleep(_ASK_AGAIN_S)
                self._noted.set()

    def _note_jobs(self, job_ids: Sequence[str]) -> None:
        self._jobs.update(job_ids[: max(0, _MOST_JOBS_NOTED - len(self._jobs))])

    def _hand_out(self, update: JobUpdate) -> None:
        followers = self._followers.get(update.job_id)
        if followers:
            self._newest[update.job_id] = update
            for follower in followers:
                follower.set()

    def _look_again(self) -> None:
        for job_id in list(self._followers):
            self._hand_out(JobUpdate(job_id=job_id, event_seq=0, state=""))

    async def _ask_for(self, job_id: str) -> JobUpdate | None:
        try:
            actor = await self._scheduler()
            known: JobUpdate | None = await _within(_ANSWER_S, actor.update_of.remote(job_id))
        except _AWAY:
            return None  # the poll brings it as soon as somebody leads
        return known

    async def _scheduler(self) -> Any:
        if self._actor is None:
            # Of whichever release it is: what they say to each other is the same.
            leads = await self._holder() or actor_name("scheduler", release=self._release)
            self._actor = await self._named(leads)
        return self._actor

    async def _worker(self, worker_id: str) -> Any:
        if worker_id not in self._workers:
            try:
                worker = await self._named(actor_name("worker", worker_id, release=self._release))
            except _NoSuchActor:
                living = await asyncio.to_thread(living_workers, self._namespace)
                if worker_id not in living:
                    raise
                worker = await self._named(living[worker_id][0])
            self._workers[worker_id] = worker
        return self._workers[worker_id]

    async def _named(self, name: str) -> Any:
        try:
            return await asyncio.to_thread(ray.get_actor, name, self._namespace)
        except ValueError as missing:
            raise _NoSuchActor(name) from missing

    async def _watch(self, worker_id: str, attempt_id: str, previews: bool) -> AsyncGenerator[Progress, None]:
        references = None
        try:
            worker = await self._worker(worker_id)
            references = worker.watch.options(num_returns="streaming").remote(attempt_id, previews)
            async for reference in references:
                yield await reference
        except (RayError, _NoSuchActor):
            # Dead, or not there any more: what becomes of the job comes by `follow`.
            self._workers.pop(worker_id, None)
        finally:
            if references is not None:
                # Dropping them is not enough: the worker's `watch` would go on for nobody, and an actor runs
                # a thousand calls at once and then none.
                ray.cancel(references)


class _ProgressStream:
    """One stream from a worker for all who watch the same attempt here: each gets the newest, at its pace."""

    def __init__(self, source: AsyncGenerator[Progress, None]) -> None:
        self.followers: set[asyncio.Event] = set()
        self.ended = False
        self._newest: Progress | None = None
        self._newest_preview: Progress | None = None
        self.reading = asyncio.create_task(self._read(source), name="progress")

    async def follow(self) -> AsyncGenerator[Progress, None]:
        """Yield the newest progress, with the newest preview where one came since the last."""
        came = asyncio.Event()
        self.followers.add(came)
        told: Progress | None = None
        told_preview: Progress | None = None
        try:
            while True:
                came.clear()
                newest, preview = self._newest, self._newest_preview
                if newest is not None and newest is not told:
                    told = newest
                    if preview is not None and preview is not told_preview:
                        told_preview = preview
                        newest = replace(
                            newest,
                            preview=preview.preview,
                            preview_content_type=preview.preview_content_type,
                        )
                    yield newest
                elif self.ended:
                    await self.reading  # what it raised is a bug, and is raised here
                    return
                else:
                    await came.wait()
        finally:
            self.followers.discard(came)

    async def _read(self, source: AsyncGenerator[Progress, None]) -> None:
        try:
            async with aclosing(source):
                async for progress in source:
                    self._newest = progress
                    if progress.preview:
                        self._newest_preview = progress
                    self._wake()
        finally:
            self.ended = True
            self._wake()

    def _wake(self) -> None:
        for follower in self.followers:
            follower.set()


@asynccontextmanager
async def ray_link(
    *,
    namespace: str,
    holder: Callable[[], Awaitable[str]],
    release: str = RELEASE,
    nodes: Callable[[], Sequence[Mapping[str, Any]]] = ray.nodes,
) -> AsyncIterator[RayLink]:
    """Open the line of a front door of a release and keep it open inside the context.

    `nodes` are those of the cluster, as Ray describes them.
    """
    link = RayLink(namespace=namespace, holder=holder, release=release, nodes=nodes)
    try:
        yield link
    finally:
        link.background.cancel()
        await asyncio.gather(link.background, return_exceptions=True)


async def _within(seconds: float, reference: Awaitable[Any]) -> Any:
    """Await an actor's answer; raises TimeoutError."""
    async with asyncio.timeout(seconds):
        return await reference
