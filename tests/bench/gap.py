"""How long a GPU is idle between two jobs of different accounts, with the whole service around it.

    python -m tests.bench.gap [--jobs 12] [--side 128] [--engine diffusers|timed] [--step-ms 50]

Starts the real service (PostgreSQL with fsync, Ray, front door, scheduler) with one worker on this machine,
has relax jobs of four accounts wait for it, and prints by the worker's own account of its GPU how long it
was idle between any two. While the last picture of one is decoded, the next is decided, committed and given;
the timed engine's last piece of work takes no time, so that with it the gap is that whole path.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import statistics
import tempfile
import urllib.request
from pathlib import Path

from scheduler.client.aio import JobHandle
from scheduler.v1 import job_pb2
from tests.service.people import People
from tests.service.process import ServiceProcess, service

_ACCOUNTS = 4
_IDLE = re.compile(r'^darkroom_gpu_time_seconds_total\{[^}]*use="idle"[^}]*\} (\S+)$', re.MULTILINE)


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    parser.add_argument("--engine", choices=("diffusers", "timed"), default="diffusers")
    parser.add_argument("--step-ms", type=int, default=50, help="what a step of the timed engine takes")
    chosen = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder,
        service(Path(folder), gpus=1, engine=chosen.engine, timed_step_ms=chosen.step_ms) as running,
    ):
        gaps_ms = asyncio.run(_gaps_ms(running, chosen.jobs, chosen.side))
    print(f"idle between two jobs of different accounts, {chosen.engine}, {chosen.jobs} jobs, milliseconds")
    print(f"   median {statistics.median(gaps_ms):.0f}, at most {max(gaps_ms):.0f}")


async def _gaps_ms(running: ServiceProcess, jobs: int, side: int) -> list[float]:
    people = People(running.address, running.admin_key)
    clients = [await people.account(f"bench{number}") for number in range(_ACCOUNTS)]
    # The model is loaded for the first.
    first = await clients[0].imagine(f"a bench --w {side} --h {side}", tier=job_pb2.TIER_RELAX)
    await first.result()
    handles = [
        await clients[number % _ACCOUNTS].imagine(
            f"a bench {number} --w {side} --h {side}", tier=job_pb2.TIER_RELAX
        )
        for number in range(jobs)
    ]
    idle_ms: list[float] = []

    async def seen(handle: JobHandle) -> None:
        await handle.result()
        idle_ms.append(await asyncio.to_thread(_idle_ms, running.ops))

    await asyncio.gather(*map(seen, handles))
    for client in clients:
        await client.close()
    return [after - before for before, after in itertools.pairwise(idle_ms)]


def _idle_ms(ops: str) -> float:
    with urllib.request.urlopen(f"http://{ops}/metrics/scheduler") as answer:
        found = _IDLE.search(answer.read().decode())
    assert found is not None
    return float(found.group(1)) * 1000


if __name__ == "__main__":
    main()
