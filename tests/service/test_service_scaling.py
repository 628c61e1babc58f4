"""A service on a cluster whose machines come and go: with Ray's autoscaler, with notice, and without."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest

from scheduler.client.aio import DarkroomClient
from scheduler.v1 import job_pb2
from tests.service.nodes import STOP_S, Node, a_node, cluster_environment, front_door, stop_everything
from tests.service.people import People, assert_ledger_closes
from tests.service.rented import autoscaling

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(400)]

FAST = job_pb2.TIER_FAST
STEP_MS = 300
AT_ONCE = 3
"""What the plan lets an account have running. Those of three wait too long for one GPU, at 6 s each."""
SHRINK_AFTER_MS = 20_000
"""Longer than a picture takes. What waits is too much for one GPU until the next picture begins, and then
again: a fleet that shrank in between would give its second machine back while that still starts.
"""


def head_of(data_dir: Path) -> tuple[str, ...]:
    return ("--head", "--port", "0", "--include-dashboard=false", "--temp-dir", str(data_dir / "ray"))


@contextmanager
def ended(node: Node) -> Iterator[None]:
    """Have all that was started under a node end with it: Ray leaves rented machines as they are."""
    try:
        yield
    finally:
        below = psutil.Process(node.process.pid).children(recursive=True)
        node.terminate()
        node.process.wait(STOP_S)
        for process in below:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(below, timeout=30)


async def test_machines_are_rented_while_work_waits_and_given_back_when_it_is_done(
    database: str, data_dir: Path, connection: asyncpg.Connection
) -> None:
    arguments, rents = autoscaling(data_dir / "autoscaling.json", most=2, idle_s=1)
    environment = cluster_environment(
        **rents,
        DARKROOM_WORKER__TIMED_STEP_MS=str(STEP_MS),
        DARKROOM_SCALING__MAX_WORKERS="2",
        DARKROOM_SCALING__MIN_WORKERS="0",
        DARKROOM_SCALING__SHRINK_AFTER_MS=str(SHRINK_AFTER_MS),
    )
    with (
        a_node("head", *head_of(data_dir), *arguments, environment=environment, gpus=0) as head,
        ended(head),
    ):
        with front_door(head.address, database, data_dir, environment) as door:
            people = People(door.address, door.admin_key)
            async with (
                await people.account("ada") as ada,
                await people.account("bob") as bob,
                await people.account("cleo") as cleo,
                much_to_draw(ada, bob, cleo),
            ):
                rented = await until_used(connection, workers=2)
            for worker_id in rented:
                await asyncio.to_thread(door.wait_for_slot_gone, worker_id)
        stop_everything(head.address, environment)
    assert all(worker_id.startswith("rented-") for worker_id in rented)
    states = await connection.fetch("SELECT DISTINCT state FROM scheduler.attempt")
    assert [row["state"] for row in states] == ["succeeded"]
    await assert_ledger_closes(database)


@pytest.mark.parametrize(("leave", "losses"), [(Node.terminate, 0), (Node.kill, 1)], ids=["notice", "none"])
async def test_work_spreads_to_a_machine_that_joins_and_goes_on_elsewhere_when_it_leaves(
    database: str,
    data_dir: Path,
    connection: asyncpg.Connection,
    leave: Callable[[Node], None],
    losses: int,
) -> None:
    environment = cluster_environment(DARKROOM_WORKER__TIMED_STEP_MS=str(STEP_MS))
    with ExitStack() as nodes:
        head = nodes.enter_context(a_node("head", *head_of(data_dir), environment=environment, gpus=0))
        joins = ("--address", head.address)
        nodes.enter_context(a_node("node-a", *joins, environment=environment))
        with front_door(head.address, database, data_dir, environment) as door:
            door.wait_for_worker("node-a/gpu-0")
            async with await People(door.address, door.admin_key).account("ada") as ada:
                async with much_to_draw(ada):
                    leaves = await asyncio.to_thread(
                        nodes.enter_context, a_node("node-b", *joins, environment=environment)
                    )
                    job_id = await until_runs_at(connection, "node-b/gpu-0")
                    leave(leaves)
                leaves.process.wait(STOP_S)
        stop_everything(head.address, environment)
    assert await attempts_and_losses(connection, job_id) == (2, losses)
    await assert_ledger_closes(database)


@asynccontextmanager
async def much_to_draw(*clients: DarkroomClient) -> AsyncIterator[None]:
    """Have pictures of each account wait and be drawn as long as the context is open, and then no more."""
    enough = asyncio.Event()

    async def draw(client: DarkroomClient) -> None:
        while not enough.is_set():
            await (await client.imagine("a fox", tier=FAST)).result()

    async with asyncio.TaskGroup() as group:
        for client in clients:
            for _ in range(AT_ONCE):
                group.create_task(draw(client))
        yield
        enough.set()


async def until_used(connection: asyncpg.Connection, *, workers: int) -> set[str]:
    """Return the workers that have had an attempt, once they are so many."""
    while True:
        rows = await connection.fetch("SELECT DISTINCT worker_id FROM scheduler.attempt")
        if len(rows) >= workers:
            return {row["worker_id"] for row in rows}
        await asyncio.sleep(0.1)


async def until_runs_at(connection: asyncpg.Connection, worker_id: str) -> str:
    """Return the job of which a worker runs an attempt, once one does."""
    while True:
        job_id = await connection.fetchval(
            "SELECT job_id FROM scheduler.attempt WHERE worker_id = $1 AND state = 'running'", worker_id
        )
        if job_id is not None:
            return str(job_id)
        await asyncio.sleep(0.1)


async def attempts_and_losses(connection: asyncpg.Connection, job_id: str) -> tuple[int, int]:
    """Return how many attempts at a job there were, and how many of their workers were lost."""
    row = await connection.fetchrow(
        """SELECT (SELECT count(*) FROM scheduler.attempt WHERE job_id = job.job_id), losses
           FROM scheduler.job WHERE job_id = $1""",
        job_id,
    )
    assert row is not None
    return row[0], row[1]
