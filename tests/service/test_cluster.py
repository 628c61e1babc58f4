"""The service on a Ray cluster that is not its own: two nodes joined by a token, as README describes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import asyncpg
import pytest

from scheduler.v1 import job_pb2
from tests.service.nodes import Node, a_node, cluster_environment, front_door, stop_everything
from tests.service.people import People, assert_ledger_closes, result_of

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture
def environment() -> dict[str, str]:
    return cluster_environment(DARKROOM_WORKER__TIMED_STEP_MS="20")


@pytest.fixture
def head(data_dir: Path, environment: dict[str, str]) -> Iterator[Node]:
    """The head of a cluster of two nodes."""
    arguments = ("--head", "--port", "0", "--include-dashboard=false", "--temp-dir", str(data_dir / "ray"))
    with ExitStack() as stack:
        first = stack.enter_context(a_node("node-a", *arguments, environment=environment))
        stack.enter_context(a_node("node-b", "--address", first.address, environment=environment))
        yield first


async def test_scheduler_and_workers_live_on_while_front_doors_come_and_go(
    head: Node,
    database: str,
    data_dir: Path,
    environment: dict[str, str],
    connection: asyncpg.Connection,
) -> None:
    with front_door(head.address, database, data_dir, environment) as first:
        for node in ("node-a", "node-b"):
            first.wait_for_worker(f"{node}/gpu-0")
        assert "ray::SchedulerActor" in head.processes(), "no machine with GPUs is given up with it"
        async with await People(first.address, first.admin_key).account("ada") as ada:
            for handle in [await ada.imagine(f"a fox {n}", tier=job_pb2.TIER_FAST) for n in range(2)]:
                await result_of(handle)
            left = await ada.imagine("a harbour", tier=job_pb2.TIER_FAST)
        led = await connection.fetchval("SELECT epoch FROM scheduler.leader")
    with front_door(head.address, database, data_dir, environment) as second:
        async with await People(second.address, second.admin_key).account("ben") as ben:
            await result_of(await ben.imagine("a lighthouse", tier=job_pb2.TIER_FAST))
    attempts = await connection.fetch("SELECT worker_id, state, job_id FROM scheduler.attempt")
    assert {attempt["worker_id"] for attempt in attempts} == {"node-a/gpu-0", "node-b/gpu-0"}
    assert [attempt["state"] for attempt in attempts] == ["succeeded"] * 4
    assert left.id in {str(attempt["job_id"]) for attempt in attempts}
    assert await connection.fetchval("SELECT epoch FROM scheduler.leader") == led, "one scheduler served both"
    await assert_ledger_closes(database)

    assert stop_everything(head.address, environment) == [
        "stopped scheduler-0.1.0",
        "stopped worker-0.1.0-node-a/gpu-0",
        "stopped worker-0.1.0-node-b/gpu-0",
    ]
