"""A new leader begins with what is first, and in the end has all that waits, once, as the rows say it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from scheduler.arrivals import Arrivals
from scheduler.backlog import Backlog
from scheduler.clock import LeaderClock
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.inbox import RowsRead
from scheduler.policy.board import Board
from scheduler.policy.events import CellRestored, Edge, Event, LimitsChanged, OrderKnown, RecoveryEnded
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.store import leadership, live
from scheduler.store.lanes import Lane
from tests.loop.conftest import Stage
from tests.stand_in import stand_in_models


class Reader:
    """A board, and a backlog that brings one account after the other."""

    def __init__(self, backlog: Backlog, arrivals: Arrivals, clock: LeaderClock) -> None:
        self.backlog = backlog
        self.arrivals = arrivals
        self.board = Board(Parameters())
        for tier in Tier:
            self.board.apply(
                CellRestored(
                    at_ms=clock.now_ms(), tier=tier, virtual_time=0, decay_origin_ms=clock.started_ms
                )
            )
        self._tell(backlog.progress())
        self.read = asyncio.Event()

    async def ready(self) -> None:
        """Return once a portion lies ready."""
        async with asyncio.timeout(20):
            while not self.backlog.is_ready:
                self.read.clear()
                await self.read.wait()

    async def tell_next(self) -> None:
        """Tell the board of the next account, as the loop does."""
        await self.ready()
        self._tell(self.backlog.next())
        self._tell(self.backlog.progress())

    async def heed(self, *job_ids: str) -> None:
        """Look at what was noticed, as a cycle does."""
        self._tell(await self.arrivals.of_jobs(job_ids))

    async def tell_the_rest(self) -> None:
        """Tell of all that is left, and look again at what is to be looked at again."""
        while not self.backlog.ended:
            await self.tell_next()
        self._tell(await self.arrivals.of_accounts(self.backlog.again()))

    def waiting(self) -> set[tuple[str, str]]:
        """Return the jobs that wait here, and in which tier."""
        live = self.board.cell.jobs.values()
        return {(one.job.job_id, one.job.tier.value) for one in live}

    def _tell(self, events: Iterable[Event]) -> None:
        for event in events:
            self.board.apply(event)


@asynccontextmanager
async def reading(stage: Stage, lanes: int = 1) -> AsyncIterator[Reader]:
    """Take the lead of what waits, and read it in portions of one account."""
    taken = await leadership.take_lead(stage.connection, "test")
    clock = LeaderClock(started_ms=taken.now_ms)
    lane = Lane(stage.dsn, "loop")
    arrivals = Arrivals(lane=lane, epoch=taken.epoch, clock=clock, models=stand_in_models())
    readers: list[Reader] = []

    def tell(_: RowsRead) -> None:
        readers[0].read.set()

    backlog = Backlog(
        await live.waiting_accounts(stage.connection),
        arrivals=arrivals,
        lanes=[Lane(stage.dsn, f"backlog {number}") for number in range(lanes)],
        clock=clock,
        tell=tell,
        jobs_first=1,
        jobs_last=1,
    )
    readers.append(Reader(backlog, arrivals, clock))
    running = [asyncio.create_task(backlog.run(lane)) for lane in backlog.lanes]
    try:
        yield readers[0]
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await lane.close()


async def rows(stage: Stage) -> set[tuple[str, str]]:
    found = await stage.connection.fetch(
        "SELECT job_id::text, tier FROM scheduler.job WHERE state = 'queued'"
    )
    return {(row["job_id"], row["tier"]) for row in found}


async def waiting_jobs(stage: Stage, *names: str) -> list[str]:
    jobs = []
    for name in names:
        await stage.open_account(name)
        jobs += [await stage.submit(name), await stage.submit(name)]
    return jobs


async def test_accounts_come_in_their_order_and_whole(stage: Stage) -> None:
    jobs = await waiting_jobs(stage, "ada", "ben", "eve")
    await stage.connection.execute(
        """INSERT INTO scheduler.fair_share (account_id, tier, finish_tag, tag)
           VALUES ('ada', 'relax', 0, 3000), ('ben', 'relax', 9000, NULL), ('eve', 'relax', 0, 1000)"""
    )
    async with reading(stage) as reader:
        assert reader.backlog.untold(Tier.RELAX) == 6
        await reader.tell_next()
        assert {job_id for job_id, _ in reader.waiting()} == set(jobs[4:])
        assert reader.backlog.untold(Tier.RELAX) == 4
        await reader.tell_next()
        assert {job_id for job_id, _ in reader.waiting()} == set(jobs[:2] + jobs[4:])
        assert not reader.board.is_whole
        await reader.tell_the_rest()
        assert reader.board.is_whole
        assert reader.waiting() == await rows(stage)


async def test_what_is_read_at_the_same_time_is_told_in_its_order_and_once(stage: Stage) -> None:
    jobs = await waiting_jobs(stage, *(f"account-{number}" for number in range(9)))
    async with reading(stage, lanes=2) as reader:
        for told in range(2, len(jobs) + 1, 2):
            await reader.tell_next()
            assert {job_id for job_id, _ in reader.waiting()} == set(jobs[:told])
        assert reader.backlog.ended


async def test_what_changes_while_it_is_read_is_neither_lost_nor_doubled(stage: Stage) -> None:
    ada, _, ben, moved, eve, _ = await waiting_jobs(stage, "ada", "ben", "eve")
    async with reading(stage) as reader:
        await reader.tell_next()
        await reader.ready()  # ben's rows are read, and told of later
        await stage.cancel("ada", ada)
        await stage.cancel("ben", ben)
        await stage.move("ben", moved, Tier.FAST)
        await stage.cancel("eve", eve)
        later, of_eve = await stage.submit("ben"), await stage.submit("eve")
        await stage.open_account("zoe")
        new = await stage.submit("zoe")
        await reader.heed(ada, ben, moved, eve, later, of_eve, new)
        await reader.tell_the_rest()
        assert reader.waiting() == await rows(stage)
        assert (moved, "fast") in reader.waiting()


async def test_a_change_is_not_undone_by_rows_that_were_read_before_it(stage: Stage) -> None:
    job_id, _ = await waiting_jobs(stage, "ada")
    async with reading(stage) as reader:
        await reader.ready()
        await stage.cancel("ada", job_id)
        await reader.heed(job_id)
        await reader.tell_the_rest()
        assert reader.waiting() == await rows(stage)


async def test_terms_that_change_while_an_account_is_read_are_looked_at_again(stage: Stage) -> None:
    await waiting_jobs(stage, "ada")
    async with reading(stage) as reader:
        await reader.ready()
        reader.backlog.noticed(["ada"])
        assert await reader.arrivals.of_accounts(["ada"]) == [], "nobody knows it yet"
        await reader.tell_next()
        again = reader.backlog.again()
        (limits, _) = await reader.arrivals.of_accounts(again)
        assert isinstance(limits, LimitsChanged)
        assert limits.account_id == "ada"


async def test_a_stamp_is_never_of_another_version_than_what_was_read(stage: Stage) -> None:
    job_id, _ = await waiting_jobs(stage, "ada")
    taken = await leadership.take_lead(stage.connection, "test")
    async with stage.pool.transaction() as connection:
        await connection.execute("SELECT FROM scheduler.job WHERE job_id = $1 FOR UPDATE", job_id)
        noticing = asyncio.create_task(
            live.noticed_jobs(stage.connection, epoch=taken.epoch, job_ids=[job_id])
        )
        await stage.until_blocked()
        await connection.execute(
            """UPDATE scheduler.job SET tier = 'fast', noticed_epoch = 0 WHERE job_id = $1""", job_id
        )
    (row,) = await noticing
    assert row.tier is Tier.FAST


async def test_what_an_earlier_leader_noticed_is_not_stamped_again(stage: Stage) -> None:
    jobs = await waiting_jobs(stage, "ada", "ben")
    await stage.connection.execute("UPDATE scheduler.job SET noticed_epoch = 1")
    async with stage.leading(LocalFleet(workers=0, take_ms=None)) as leader:
        await stage.until(leader, lambda: set(jobs) <= set(leader.queue_statuses(jobs)))
        later = await stage.submit("ada")
        await stage.until(leader, lambda: later in leader.queue_statuses([later]))

        async def stamped() -> bool:
            return bool((await stage.job(later))["noticed_epoch"])

        await stage.until(leader, stamped)
        stamps = {(await stage.job(job_id))["noticed_epoch"] for job_id in jobs}
    assert stamps == {1}


async def test_no_place_is_told_while_those_before_may_be_yet_to_be_read(stage: Stage) -> None:
    await stage.open_account("ada")
    async with stage.leading(LocalFleet(workers=1, take_ms=None)) as leader:
        first, second = await stage.submit("ada"), await stage.submit("ada")
        await stage.until_state(leader, first, "running")
        await stage.until_waits(leader, second, "waiting_for_gpu")
        board = leader._loop.board
        board.apply(OrderKnown(at_ms=0, tier=Tier.RELAX, edge=Edge(tag=0, arrival=0)))
        status = leader.queue_statuses([second])[second]
        assert (status.reason.value, status.position, status.start) == ("scheduler_starting", 0, None)
        assert leader.explain(second) is None
        assert leader.explain(first) is not None
        assert leader.queues().wanted_gpus is None
        board.apply(RecoveryEnded(at_ms=0))
        assert leader.queue_statuses([second])[second].position == 1
        assert leader.explain(second) is not None


async def test_running_jobs_are_adopted_before_anything_is_started(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    await stage.open_account("ben")
    async with stage.leading(fleet) as leader:
        running = [await stage.submit("ada"), await stage.submit("ada")]
        for job_id in running:
            await stage.until_state(leader, job_id, "running")
    jobs = [await stage.submit(name) for name in ("ada", "ben")]
    async with stage.leading(fleet) as leader:
        for job_id in jobs:
            await stage.until(leader, lambda job_id=job_id: job_id in leader.queue_statuses([job_id]))
        assert {run.job_id for run in fleet.busy.values()} == set(running)
        for worker_id in list(fleet.busy):
            fleet.finish(worker_id)
        for job_id in running:
            await stage.until_state(leader, job_id, "succeeded")
    assert [len(await stage.attempts(job_id)) for job_id in running] == [1, 1]
