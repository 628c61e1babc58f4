"""Two releases on one Ray cluster and one database: there, and back again, with jobs under way all the time.

Both are this code under two names: that they understand each other is what test_wire.py asks.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack
from pathlib import Path

import asyncpg
import pytest

from scheduler.client.aio import DarkroomClient, JobHandle
from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import Job
from tests.service.nodes import STOP_S, Node, a_node, cluster_environment, front_door, stop_everything
from tests.service.people import People, assert_ledger_closes, result_of, until_step
from tests.service.process import ServiceProcess
from tests.stand_in import STAND_IN_FILE

pytestmark = [pytest.mark.long, pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(600)]

OLD, NEW = "0.1.0", "0.2.0"
GPUS = ("node-a/gpu-0", "node-b/gpu-0")


@pytest.fixture
def environment() -> dict[str, str]:
    return cluster_environment(DARKROOM_WORKER__TIMED_STEP_MS="150")


@pytest.fixture
def nodes(data_dir: Path, environment: dict[str, str]) -> Iterator[tuple[Node, Node]]:
    head = ("--head", "--port", "0", "--include-dashboard=false", "--temp-dir", str(data_dir / "ray"))
    with ExitStack() as stack:
        first = stack.enter_context(a_node("node-a", *head, environment=environment))
        other = ("--address", first.address)
        yield first, stack.enter_context(a_node("node-b", *other, environment=environment))


class Customers:
    """Two people who always have jobs under way, at whichever front doors there are."""

    def __init__(self, clients: list[DarkroomClient]) -> None:
        self._clients = clients
        self._sent: list[JobHandle] = []
        self._watched: list[asyncio.Task[Job]] = []

    async def send(self) -> None:
        """Let each send a fast and a relax job, and watch them to their ends."""
        for client in self._clients:
            for tier in (job_pb2.TIER_FAST, job_pb2.TIER_RELAX):
                handle = await client.imagine(f"a fox {len(self._sent)}", tier=tier)
                self._sent.append(handle)
                self._watched.append(asyncio.create_task(result_of(handle)))

    async def until_running(self) -> None:
        await until_step(
            next(one for one, end in zip(self._sent, self._watched, strict=True) if not end.done()), 2
        )

    async def until_lives(self, connection: asyncpg.Connection, lives: int) -> None:
        """Send jobs until those of so many lives of each GPU's worker have succeeded."""
        seen: list[int] = []
        while seen != [lives] * len(GPUS):
            await self.send()
            await self.all_succeed()
            rows = await connection.fetch(
                """SELECT count(DISTINCT incarnation) AS lives FROM scheduler.attempt
                   WHERE state = 'succeeded' GROUP BY worker_id"""
            )
            seen = [row["lives"] for row in rows]

    async def until_runs_at(self, connection: asyncpg.Connection, worker: str) -> None:
        query = "SELECT count(*) FROM scheduler.attempt WHERE state = 'running' AND worker_id = $1"
        async with asyncio.timeout(60):
            while not await connection.fetchval(query, worker):
                pass  # asking takes a moment

    async def all_succeed(self) -> None:
        for job in await asyncio.gather(*self._watched):
            assert len(job.images) == 4


async def leads(connection: asyncpg.Connection) -> str:
    holder: str = await connection.fetchval("SELECT holder FROM scheduler.leader")
    return holder


async def until_leads(connection: asyncpg.Connection, name: str) -> None:
    async with asyncio.timeout(60):
        while await leads(connection) != name:
            pass  # asking takes a moment


async def test_release_is_replaced_and_comes_back_while_jobs_go_on(
    nodes: tuple[Node, Node],
    database: str,
    data_dir: Path,
    environment: dict[str, str],
    connection: asyncpg.Connection,
) -> None:
    ray_address = nodes[0].address

    def a_front_door(release: str) -> AbstractContextManager[ServiceProcess]:
        return front_door(ray_address, database, data_dir, {**environment, "DARKROOM_RELEASE": release})

    with ExitStack() as doors:
        old = doors.enter_context(a_front_door(OLD))
        for worker in GPUS:
            old.wait_for_worker(worker)
        async with AsyncExitStack() as stack:
            people = People(old.address, old.admin_key)
            keys = [await people.key(name) for name in ("ada", "ben")]
            at_old = [await stack.enter_async_context(DarkroomClient(old.address, key)) for key in keys]
            customers = Customers(at_old)
            await customers.send()
            await customers.until_running()

            new = doors.enter_context(a_front_door(NEW))
            await until_leads(connection, f"scheduler-{NEW}")
            at_new = [await stack.enter_async_context(DarkroomClient(new.address, key)) for key in keys]
            await customers.all_succeed()
            everybody = Customers([*at_old, *at_new])
            await everybody.until_lives(connection, 2)

            # A front door of the release before that is started once more brings nothing back.
            with a_front_door(OLD) as again:
                assert await leads(connection) == f"scheduler-{NEW}"
                async with DarkroomClient(again.address, keys[0]) as ada:
                    await result_of(await ada.imagine("a harbour", tier=job_pb2.TIER_FAST))

            await everybody.send()
            await everybody.until_running()
            assert lead(ray_address, database, data_dir, {**environment, "DARKROOM_RELEASE": OLD}) == [
                f"scheduler-{OLD} leads"
            ]
            await everybody.until_lives(connection, 3)

            # And a machine is taken away: what runs there goes on here.
            await everybody.send()
            await everybody.until_runs_at(connection, GPUS[1])
            nodes[1].terminate()
            await everybody.all_succeed()
            nodes[1].process.wait(STOP_S)
    attempts = await connection.fetch("SELECT state, count(*) FROM scheduler.attempt GROUP BY state")
    assert await connection.fetchval("SELECT sum(losses) FROM scheduler.job") == 0, attempts
    assert await connection.fetchval("SELECT coalesce(sum(losses_in_row), 0) FROM scheduler.worker_slot") == 0
    await assert_ledger_closes(database)
    assert stop_everything(ray_address, environment) == [
        f"stopped scheduler-{OLD}",
        f"stopped worker-{OLD}-{GPUS[0]}",
    ]


def lead(ray_address: str, dsn: str, data_dir: Path, environment: dict[str, str]) -> list[str]:
    """Run `darkroom lead` and return the lines it says."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scheduler", "lead", "--ray-address", ray_address, "--dsn", dsn),
            *("--artifacts-url", f"file://{data_dir}/artifacts"),
        ],
        capture_output=True,
        text=True,
        env={**environment, "DARKROOM_WORKER__ENGINE": "timed", "DARKROOM_MODELS_FILE": str(STAND_IN_FILE)},
        timeout=STOP_S,
        check=True,
    )
    return done.stdout.splitlines()
