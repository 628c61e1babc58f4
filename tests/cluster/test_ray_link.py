"""A front door's line over a real Ray, with small actors in the places of the scheduler and a worker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import ray

from gpu_worker.contract import Progress
from scheduler.cluster.ray_fleet import actor_name
from scheduler.cluster.ray_link import NodeGone, ray_link
from scheduler.refusals import Overloaded
from scheduler.updates import JobUpdate, UpdateBatch
from tests.cluster.small_ray import NAMESPACE

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@ray.remote(num_cpus=0)
class WatchedWorker:
    """Draws for ever, and knows how many streams it serves."""

    def __init__(self) -> None:
        self._open = 0
        self._begun = 0
        self._changed = asyncio.Condition()

    async def watch(self, attempt_id: str, previews: bool) -> AsyncIterator[Progress]:
        await self._count(1)
        try:
            step = 0
            while True:
                step += 1
                yield Progress(
                    attempt_id=attempt_id, step=step, steps=0, preview=b"picture" if step == 1 else b""
                )
                await asyncio.sleep(0.01)  # a step of drawing
        finally:
            await self._count(-1)

    async def _count(self, by: int) -> None:
        async with self._changed:
            self._open += by
            self._begun += by > 0
            self._changed.notify_all()

    async def begun_once_none_is_open(self) -> int:
        """Wait until every stream has ended, and return how many there were."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._open == 0)
            return self._begun


@ray.remote(num_cpus=0)
class ListeningScheduler:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self._jobs: set[str] = set()
        self._accounts: set[str] = set()
        self._fleet = False
        self._told = asyncio.Condition()

    async def updates_after(self, number: int, wait_s: float) -> UpdateBatch:
        await asyncio.sleep(wait_s)
        return UpdateBatch(epoch=1, newest=number, updates=(), gap=False, abilities=None)

    async def jobs_changed(self, job_ids: list[str]) -> None:
        async with self._told:
            self._jobs.update(job_ids)
            self._told.notify_all()

    async def accounts_changed(self, account_ids: list[str]) -> None:
        async with self._told:
            self._accounts.update(account_ids)
            self._told.notify_all()

    async def fleet_changed(self) -> None:
        async with self._told:
            self._fleet = True
            self._told.notify_all()

    async def told(self) -> tuple[set[str], set[str]]:
        """Wait until there were notices of all kinds, and return whom they named."""
        async with self._told:
            await self._told.wait_for(lambda: bool(self._jobs and self._accounts and self._fleet))
            return self._jobs, self._accounts


@ray.remote(num_cpus=0)
class ForgetfulScheduler:
    """Has more news, whenever it is asked to, than it keeps until somebody asks."""

    def __init__(self) -> None:
        self._newest = 1
        self._asked_after = 0
        self._told = asyncio.Condition()

    async def updates_after(self, number: int, wait_s: float) -> UpdateBatch:
        async with self._told:
            self._asked_after = number
            self._told.notify_all()
            await self._told.wait_for(lambda: number < self._newest)
            return UpdateBatch(epoch=1, newest=self._newest, updates=(), gap=number > 0, abilities=None)

    async def update_of(self, job_id: str) -> None:
        return None

    async def change(self) -> None:
        """Have such news, once somebody knows all before it."""
        async with self._told:
            await self._told.wait_for(lambda: self._asked_after == self._newest)
            self._newest += 1
            self._told.notify_all()


@ray.remote(num_cpus=0)
class ReplacedScheduler:
    """Is another one whenever it is asked to be, and knows of no job."""

    def __init__(self) -> None:
        self._epoch = 1
        self._told = 0
        self._changed = asyncio.Condition()

    async def updates_after(self, number: int, wait_s: float) -> UpdateBatch:
        async with self._changed:
            if wait_s:
                await self._changed.wait_for(lambda: self._told < self._epoch)
            self._told = self._epoch
            self._changed.notify_all()
            return UpdateBatch(epoch=self._epoch, newest=0, updates=(), gap=False, abilities=None)

    async def update_of(self, job_id: str) -> None:
        return None

    async def change(self) -> None:
        """Be another one, once somebody knows this one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._told == self._epoch)
            self._epoch += 1
            self._changed.notify_all()


async def no_holder() -> str:
    raise Overloaded(sentence="The database is away.")


def a_worker() -> tuple[str, Any]:
    worker_id = f"{uuid.uuid4()}/gpu-0"
    actor = WatchedWorker.options(  # type: ignore[attr-defined]
        name=actor_name("worker", worker_id), namespace=NAMESPACE
    ).remote()
    return worker_id, actor


async def test_no_stream_is_left_on_the_worker_when_its_watchers_have_gone() -> None:
    worker_id, actor = a_worker()
    async with ray_link(namespace=NAMESPACE, holder=no_holder) as link:
        for number in range(5):
            async with aclosing(link.progress(worker_id, f"attempt {number}", False)) as progress:  # type: ignore[type-var]
                await anext(progress)
        async with asyncio.timeout(30):
            assert await actor.begun_once_none_is_open.remote() == 5


async def test_watchers_of_one_attempt_share_one_stream_and_each_sees_the_preview() -> None:
    worker_id, actor = a_worker()
    async with ray_link(namespace=NAMESPACE, holder=no_holder) as link:
        watchers = [link.progress(worker_id, "attempt", True) for _ in range(3)]
        for watcher in watchers:
            assert (await anext(watcher)).preview == b"picture"
            second = await anext(watcher)
            assert second.step > 1
            assert second.preview == b"", "a picture is sent once"
        for watcher in watchers:
            await watcher.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(30):
            assert await actor.begun_once_none_is_open.remote() == 1


async def test_progress_of_a_worker_that_is_not_there_ends() -> None:
    async with ray_link(namespace=NAMESPACE, holder=no_holder) as link:
        assert [progress async for progress in link.progress("nobody/gpu-0", "attempt", False)] == []


async def test_line_outlives_a_database_that_is_away_and_then_delivers_every_notice() -> None:
    scheduler = ListeningScheduler.options(name="listens", namespace=NAMESPACE).remote()  # type: ignore[attr-defined]
    away = True

    async def holder() -> str:
        return await no_holder() if away else "listens"

    async with ray_link(namespace=NAMESPACE, holder=holder) as link:
        assert await link.queue_statuses(["job"]) == {}
        assert not await link.scheduler_ready()
        assert await link.explain("job") is None
        assert await link.estimate([]) == []
        assert await link.queues() is None
        assert await link.workers_view() is None
        link.jobs_changed(["job"])
        link.accounts_changed(["account"])
        link.fleet_changed()
        away = False
        async with asyncio.timeout(30):
            assert await scheduler.told.remote() == ({"job"}, {"account"})
        assert not link.background.done()


@pytest.mark.parametrize("kind", [ReplacedScheduler, ForgetfulScheduler], ids=["replaced", "forgets"])
async def test_a_watcher_is_told_to_look_again_whenever_there_may_be_news_that_nobody_has(kind: Any) -> None:
    scheduler = kind.options(name="changes", namespace=NAMESPACE).remote()

    async def holder() -> str:
        return "changes"

    async with ray_link(namespace=NAMESPACE, holder=holder) as link, aclosing(link.follow("job")) as updates:  # type: ignore[type-var]
        async with asyncio.timeout(30):
            for _ in range(3):
                looking = asyncio.create_task(anext(updates))
                await scheduler.change.remote()
                # Nothing of the job itself is in it, and so all of them say the same.
                assert await looking == JobUpdate(job_id="job", event_seq=0, state="")
    ray.kill(scheduler)


async def test_a_front_door_ends_when_the_raylet_beside_it_has_ended() -> None:
    own, alive = ray.get_runtime_context().get_node_id(), True

    def nodes() -> list[dict[str, Any]]:
        return [{"NodeID": "another", "Alive": False}, {"NodeID": own, "Alive": alive}]

    async with ray_link(namespace=NAMESPACE, holder=no_holder, nodes=nodes) as link:
        assert not link.background.done()
    async with ray_link(namespace=NAMESPACE, holder=no_holder, nodes=nodes) as link:
        alive = False
        with pytest.raises(NodeGone):
            await link.background
