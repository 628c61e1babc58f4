"""The service on a Ray cluster that is not its own: two nodes joined by a token, as README describes it."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import asyncpg
import pytest

from scheduler.v1 import job_pb2
from tests.service.people import People, assert_ledger_closes, result_of
from tests.service.process import ServiceProcess

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(240)]

_STOP_S = 60
_RAY = str(Path(sys.executable).with_name("ray"))


@contextmanager
def a_node(name: str, *arguments: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a node with one logical GPU while the context is open; yields the address that it names."""
    command = [
        _RAY,
        "start",
        *arguments,
        "--block",
        "--node-name",
        name,
        "--num-cpus",
        "1",
        "--num-gpus",
        "1",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        with process:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if "--block" in line:  # the last thing it says: it waits from now on
                    break
            else:
                raise AssertionError(f"the node {name} did not start:\n{said}")
            joined = re.search(r"--address='([^']+)'", said)
            yield joined.group(1) if joined is not None else ""
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=_STOP_S)
    finally:
        process.kill()


@pytest.fixture
def environment() -> dict[str, str]:
    return {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "DARKROOM_WORKER__TIMED_STEP_MS": "20",
    }


@pytest.fixture
def ray_address(data_dir: Path, environment: dict[str, str]) -> Iterator[str]:
    """Address of a cluster of two nodes."""
    head = ("--head", "--port", "0", "--include-dashboard=false", "--temp-dir", str(data_dir / "ray"))
    with ExitStack() as stack:
        address = stack.enter_context(a_node("node-a", *head, environment=environment))
        stack.enter_context(a_node("node-b", "--address", address, environment=environment))
        yield address


@contextmanager
def front_door(
    ray_address: str, dsn: str, data_dir: Path, environment: Mapping[str, str]
) -> Iterator[ServiceProcess]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "scheduler", "serve", "--port", "0", "--ops-port", "0"),
            *("--ray-address", ray_address, "--dsn", dsn, "--data-dir", str(data_dir)),
            *("--artifacts-url", f"file://{data_dir}/artifacts", "--engine", "timed"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        running = ServiceProcess(process, data_dir)
        yield running
        assert running.stop() == 0, running.said
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(_STOP_S)


async def test_scheduler_and_workers_live_on_while_front_doors_come_and_go(
    ray_address: str,
    database: str,
    data_dir: Path,
    environment: dict[str, str],
    connection: asyncpg.Connection,
) -> None:
    with front_door(ray_address, database, data_dir, environment) as first:
        for node in ("node-a", "node-b"):
            first.wait_for_worker(f"{node}/gpu-0")
        async with await People(first.address, first.admin_key).account("ada") as ada:
            for handle in [await ada.imagine(f"a fox {n}", tier=job_pb2.TIER_FAST) for n in range(2)]:
                await result_of(handle)
            left = await ada.imagine("a harbour", tier=job_pb2.TIER_FAST)
    with front_door(ray_address, database, data_dir, environment) as second:
        async with await People(second.address, second.admin_key).account("ben") as ben:
            await result_of(await ben.imagine("a lighthouse", tier=job_pb2.TIER_FAST))
    attempts = await connection.fetch("SELECT worker_id, state, job_id FROM scheduler.attempt")
    assert {attempt["worker_id"] for attempt in attempts} == {"node-a/gpu-0", "node-b/gpu-0"}
    assert [attempt["state"] for attempt in attempts] == ["succeeded"] * 4
    assert left.id in {str(attempt["job_id"]) for attempt in attempts}
    assert await connection.fetchval("SELECT epoch FROM scheduler.leader") == 1, "one scheduler served both"
    await assert_ledger_closes(database)

    assert stop_everything(ray_address, environment) == [
        "stopped scheduler-0.1.0",
        "stopped worker-0.1.0-node-a/gpu-0",
        "stopped worker-0.1.0-node-b/gpu-0",
    ]


def stop_everything(ray_address: str, environment: Mapping[str, str]) -> list[str]:
    """Run `darkroom stop` and return the lines it says."""
    stop = subprocess.run(
        [sys.executable, "-m", "scheduler", "stop", "--ray-address", ray_address],
        capture_output=True,
        text=True,
        env=environment,
        timeout=_STOP_S,
        check=True,
    )
    return stop.stdout.splitlines()
