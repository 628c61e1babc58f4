"""What a front door does when more comes than it can take, and what it costs to be watched.

    python -m tests.bench.overload [--seconds 8] [--watches 2000]

Serves one front door on an embedded PostgreSQL in a process of its own (its scheduler is a stub, which only
passes changes on) and asks from this one. Two tables:

- submissions at a fixed rate, whatever becomes of them, of 0.5, 1, 2 and 4 times what the door accepted when
  it was asked by callers that wait for their answers: accepted a second, from when each was due to its answer
  (p50, p99), refused a second, how fast a refusal is, and the door's memory;
- watches: how long it takes to open them, what each takes of the door's memory, how long it takes to tell all
  of one change, and how much the memory grows while none of them reads and pictures of 20 KB come.

The caller has a core of its own only where there are more than two.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import multiprocessing
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import structlog

from billing import accounts as ledger_accounts
from scheduler.frontdoor.server import serve
from scheduler.metrics import FrontDoorMetrics
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.settings import Settings
from scheduler.store import accounts
from scheduler.store.accounts import Role
from scheduler.store.embedded import embedded_postgresql
from scheduler.store.migrate import migrate_database
from scheduler.store.pool import Pool, open_pool
from scheduler.v1 import job_pb2, job_pb2_grpc
from tests.frontdoor.door import PLANS, SmallScheduler
from tests.stand_in import stand_in_models

_SPAWN = multiprocessing.get_context("spawn")
_ACCOUNTS = 500
_CALLERS = 32
_STREAMS_OF_A_KEY = 20
_PICTURE_BYTES = 20_000


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--watches", type=int, default=2_000)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder,
        embedded_postgresql(Path(folder) / "database") as dsn,
    ):
        here, there = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_serve, args=(dsn, folder, there))
        process.start()
        try:
            asyncio.run(_measure(dsn, _Server(here), arguments.seconds, arguments.watches))
        finally:
            process.terminate()
            process.join()


# -- the door's process -----------------------------------------------------------------------------------


class _Stub(SmallScheduler):
    """Passes on at once what is said to have changed."""

    def jobs_changed(self, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            if job_id in self._followers:
                self.update(job_id)


def _serve(dsn: str, folder: str, asked: Connection) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(_door(dsn, Path(folder), asked))


async def _door(dsn: str, folder: Path, asked: Connection) -> None:
    await migrate_database(dsn)
    pool = await open_pool(dsn, 8)
    (folder / "artifacts").mkdir()
    settings = Settings(
        data_dir=folder,
        artifacts_url=f"file://{folder}/artifacts",
        frontdoor=FrontDoorSettings(port=0, requests_per_second=1_000_000),
    )
    stub = _Stub()
    async with serve(settings, pool, stub, stand_in_models(), FrontDoorMetrics(PLANS)) as door:
        asked.send(door.address)
        while True:
            attempt_id = await asyncio.to_thread(asked.recv)
            if attempt_id is not None:
                stub.step(attempt_id, 1, bytes(_PICTURE_BYTES))
            asked.send(_resident_bytes())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class _Server:
    """The door's process, as this one sees it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.address: str = connection.recv()

    def memory_bytes(self) -> int:
        self._connection.send(None)
        return int(self._connection.recv())

    def step(self, attempt_id: str) -> None:
        self._connection.send(attempt_id)
        self._connection.recv()


# -- this process -----------------------------------------------------------------------------------------


async def _measure(dsn: str, server: _Server, seconds: float, watches: int) -> None:
    pool = await open_pool(dsn, 4)
    async with pool.transaction() as connection:
        # Nobody is to be told that his own queue is full.
        await connection.execute("ALTER TABLE billing.plan_version DISABLE TRIGGER USER")
        await connection.execute("UPDATE billing.plan_version SET limit_accepted = 1000000")
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        keys = [await _key(pool, f"bench-{number}") for number in range(_ACCOUNTS)]
        await _submissions(stub, keys, server, seconds)
        await _watches(pool, stub, server, watches)
    await pool.close()


async def _key(pool: Pool, account_id: str) -> tuple[tuple[str, str], ...]:
    async with pool.transaction() as connection:
        if await accounts.settings(connection, account_id) is None:
            await ledger_accounts.create(connection, account_id, "standard", datetime.now(UTC))
            await accounts.create_account(connection, account_id)
        key = await accounts.create_key(connection, account_id, Role.USER)
    return (("authorization", f"Bearer {key.secret}"),)


@dataclass(kw_only=True)
class _Answers:
    """How long each took, in seconds."""

    accepted: list[float]
    refused: list[float]
    broken: int = 0
    """Calls that ended otherwise, cut by gRPC."""


async def _submit(stub: Any, key: Any, due_s: float, answers: _Answers) -> None:
    sent_s = time.perf_counter()
    request = job_pb2.CreateJobRequest(
        request_id=str(uuid.uuid4()), imagine=job_pb2.Imagine(prompt="a bench"), tier=job_pb2.TIER_RELAX
    )
    try:
        await stub.CreateJob(request, metadata=key)
        answers.accepted.append(time.perf_counter() - due_s)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            answers.refused.append(time.perf_counter() - sent_s)
        else:
            answers.broken += 1


async def _submissions(stub: Any, keys: Sequence[Any], server: _Server, seconds: float) -> None:
    turns = itertools.cycle(keys)
    closed = _Answers(accepted=[], refused=[])
    ends_s = time.perf_counter() + seconds

    async def call() -> None:
        while time.perf_counter() < ends_s:
            await _submit(stub, next(turns), time.perf_counter(), closed)

    await asyncio.gather(*(call() for _ in range(_CALLERS)))
    capacity = len(closed.accepted) / seconds
    print(f"{_CALLERS} callers that wait for their answers: {capacity:.0f} accepted/s")
    print(
        f"{'load':>6} {'asked/s':>8} {'accepted/s':>11} {'p50 ms':>8} {'p99 ms':>8} {'refused/s':>10}"
        f" {'p50 ms':>8} {'p99 ms':>8} {'broken':>7} {'door MB':>8}"
    )
    for load in (0.5, 1, 2, 4):
        await _caught_up(stub, next(turns))
        answers = _Answers(accepted=[], refused=[])
        begun_s, tasks = time.perf_counter(), []
        for number in range(int(load * capacity * seconds)):
            due_s = begun_s + number / (load * capacity)
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(_submit(stub, next(turns), due_s, answers)))
        took_s = time.perf_counter() - begun_s
        await asyncio.gather(*tasks)
        print(
            f"{load:>6} {len(tasks) / took_s:>8.0f} {len(answers.accepted) / took_s:>11.0f}"
            f" {_percentiles(answers.accepted)} {len(answers.refused) / took_s:>10.0f}"
            f" {_percentiles(answers.refused)} {answers.broken:>7} {server.memory_bytes() / 2**20:>8.0f}",
            flush=True,
        )


async def _caught_up(stub: Any, key: Any) -> None:
    """Wait until a submission is accepted again."""
    answers = _Answers(accepted=[], refused=[])
    while not answers.accepted:
        await _submit(stub, key, time.perf_counter(), answers)


def _percentiles(took_s: Sequence[float]) -> str:
    if len(took_s) < 2:
        return f"{'-':>8} {'-':>8}"
    return f"{statistics.median(took_s) * 1000:>8.1f} {statistics.quantiles(took_s, n=100)[98] * 1000:>8.1f}"


async def _watches(pool: Pool, stub: Any, server: _Server, count: int) -> None:
    """Watch one job so many times, tell all of a change, and let nobody read."""
    await _caught_up(stub, await _key(pool, "bench-0"))
    keys = [await _key(pool, "watched") for _ in range(-(-count // _STREAMS_OF_A_KEY))]
    job = await stub.CreateJob(
        job_pb2.CreateJobRequest(request_id=str(uuid.uuid4()), imagine=job_pb2.Imagine(prompt="a bench")),
        metadata=keys[0],
    )
    before = server.memory_bytes()
    begun_s = time.perf_counter()
    calls = [
        stub.WatchJob(
            job_pb2.WatchJobRequest(name=job.name, previews=True), metadata=keys[number // _STREAMS_OF_A_KEY]
        )
        for number in range(count)
    ]
    await asyncio.gather(*(_until(call, job_pb2.JOB_STATE_QUEUED) for call in calls))
    opened_s = time.perf_counter() - begun_s
    each = (server.memory_bytes() - before) / count

    attempt_id = await _start(pool, job.uid)
    begun_s = time.perf_counter()
    await stub.CancelJob(
        job_pb2.CancelJobRequest(name=job.name, request_id=str(uuid.uuid4())), metadata=keys[0]
    )
    await asyncio.gather(*(_until(call, job_pb2.JOB_STATE_RUNNING) for call in calls))
    told_s = time.perf_counter() - begun_s

    full = server.memory_bytes()
    for _ in range(200):
        server.step(attempt_id)
        await asyncio.sleep(0.02)
    grown = (server.memory_bytes() - full) / count
    print(
        f"{count} watches: opened in {opened_s:.1f} s, {each / 1024:.0f} KB each; all told of a change in "
        f"{told_s:.2f} s; while nobody reads, 200 pictures of 20 KB cost {grown / 1024:.0f} KB each"
    )
    for call in calls:
        call.cancel()


async def _until(call: Any, state: job_pb2.JobState.ValueType) -> None:
    while (await call.read()).event.state != state:
        pass


async def _start(pool: Pool, job_id: str) -> str:
    """Let a job run, as the loop's transaction does."""
    attempt_id = str(uuid.uuid4())
    async with pool.transaction() as connection:
        await connection.execute(
            """INSERT INTO scheduler.attempt (attempt_id, job_id, number, token, epoch, worker_id,
                                              incarnation, started_at, predicted_ms, charged_at_ms,
                                              weight_milli, decision)
               VALUES ($1, $2, 1, $1, 1, 'node-a/gpu-0', 'i', now(), 1, 0, 1000, '{}')""",
            attempt_id,
            job_id,
        )
        await connection.execute(
            """WITH event AS (INSERT INTO scheduler.job_event (job_id, state) VALUES ($1, 'running')
                              RETURNING seq)
               UPDATE scheduler.job SET state = 'running', started_at = now(), event_seq = seq FROM event
               WHERE job_id = $1""",
            job_id,
        )
    return attempt_id


if __name__ == "__main__":
    main()
