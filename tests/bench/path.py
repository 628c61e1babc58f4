"""How long the whole path takes around a picture, and how much of it there is room for.

    python -m tests.bench.path [--seconds 10] [--clients 16] [--gpus 4]

Starts the real service (PostgreSQL with fsync, Ray, front door, scheduler, workers) on this machine with an
engine that takes no time, and prints a table:

- a bare call: the health check, which touches neither database nor scheduler: the floor of any answer;
- submit to acknowledge: CreateJob, one at a time, the job durable when it answers;
- submit to start: on an idle fleet, from sending CreateJob to the database's time of the start;
- submit to done: the same to the end of the watch;
- jobs a second: clients that submit, watch to the end and submit again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scheduler.client.aio import DarkroomClient
from scheduler.v1 import job_pb2
from tests.service.people import People
from tests.service.process import service

_SAMPLES = 200


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=4)
    arguments = parser.parse_args()
    # A bench is one client with the zeal of thousands.
    os.environ["DARKROOM_FRONTDOOR__REQUESTS_PER_SECOND"] = "100000"
    os.environ["DARKROOM_FRONTDOOR__STREAMS_PER_KEY"] = "1000"
    with (
        tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder,
        service(Path(folder), gpus=arguments.gpus, timed_step_ms=0) as running,
    ):
        people = People(running.address, running.admin_key)
        asyncio.run(_measure(people, arguments.seconds, arguments.clients))


async def _measure(people: People, seconds: float, clients: int) -> None:
    print(f"{'':34}{'p50':>10}{'p99':>10}   of {_SAMPLES}")
    _row("a bare call (health check)", await _bare_calls(people.address))
    async with await people.account("ada") as ada:
        acknowledged, started, done = [], [], []
        for number in range(_SAMPLES):
            sent_s, begun_s = time.time(), time.perf_counter()
            handle = await ada.imagine(f"a bench {number} --w 64 --h 64", tier=job_pb2.TIER_RELAX)
            acknowledged.append(time.perf_counter() - begun_s)
            job = await handle.result()
            done.append(time.perf_counter() - begun_s)
            started.append(job.start_time.ToNanoseconds() / 1e9 - sent_s)
        _row("submit to acknowledge", acknowledged)
        _row("submit to start, idle fleet", started)
        _row("submit to done, engine of 0 ms", done)
    for tier in (job_pb2.TIER_RELAX, job_pb2.TIER_FAST):
        finished = await _throughput(people, tier, seconds, clients)
        name = job_pb2.Tier.Name(tier).removeprefix("TIER_").lower()
        print(f"{f'{name}: {clients} clients, {finished} jobs':34}{finished / seconds:>10.1f} jobs/s")


async def _bare_calls(address: str) -> list[float]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        took = []
        for _ in range(_SAMPLES):
            begun_s = time.perf_counter()
            await stub.Check(health_pb2.HealthCheckRequest())
            took.append(time.perf_counter() - begun_s)
        return took


async def _throughput(people: People, tier: job_pb2.Tier.ValueType, seconds: float, clients: int) -> int:
    """Return how many jobs `clients` accounts finish in `seconds`, each with one in flight."""
    accounts = [await people.account(f"bench{number}") for number in range(clients)]
    numbers = itertools.count()
    finished = 0
    ends_s = time.perf_counter() + seconds

    async def work(client: DarkroomClient) -> None:
        nonlocal finished
        while time.perf_counter() < ends_s:
            handle = await client.imagine(f"a bench {next(numbers)} --w 64 --h 64", tier=tier)
            await handle.result()
            finished += time.perf_counter() < ends_s

    await asyncio.gather(*map(work, accounts))
    for client in accounts:
        await client.close()
    return finished


def _row(name: str, took_s: Sequence[float]) -> None:
    p99 = statistics.quantiles(took_s, n=100)[98]
    print(f"{name:34}{statistics.median(took_s) * 1000:>7.1f} ms{p99 * 1000:>7.1f} ms")


if __name__ == "__main__":
    main()
