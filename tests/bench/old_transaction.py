"""What an old transaction does to dispatch: ours beside a queue that takes its next jobs by SKIP LOCKED.

    python -m tests.bench.old_transaction [--jobs 60000] [--batch 50] [--waiting 1000] [--out FOLDER]

A transaction that stays open (a backup, a report, a session somebody forgot) keeps PostgreSQL from clearing
away the rows that were deleted or replaced since it began. Here one reads a moment of the database
(REPEATABLE READ) and stays open while jobs come, start and end, 1,000 of 10,000 accounts in each round,
with always as many waiting, on an embedded PostgreSQL with fsync. Some batches of each round are measured;
told are the medians over a tenth of the jobs each:

- dispatch: `store.dispatch.start_attempts`, the whole transaction of a batch that the board chose from
  memory. Ended jobs move to the past meanwhile, as a front door moves them;
- sweep: `store.live.unheeded`, the scheduler's look, once a second, for rows that nobody told it of;
- naive: the same jobs in one table of a queue, the next ones taken by SELECT … ORDER BY arrival FOR UPDATE
  SKIP LOCKED LIMIT n and deleted at their end: nothing else is done, no attempts, events or tags.

With --out FOLDER the graph is written there, as SVG.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from billing import accounts as ledger_accounts
from billing.prices import ChargeMode, PricingSnapshot
from gpu_worker.contract import ImageFile, RenderKind, RenderSpec
from scheduler.policy.decisions import Charge
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.store import accounts, dispatch, endings, leadership, live, past_jobs
from scheduler.store.embedded import embedded_postgresql, with_database
from scheduler.store.jobs import spec_to_json
from scheduler.store.migrate import migrate

# Each GPU draws one job in a round, which would take it a minute: 60,000 jobs are an hour of such a cell.
_GPUS = 1_000
_ACCOUNTS = 10_000
# Batches of a round that are measured; the rest of it is one large batch.
_MEASURED = 4
_POINTS = 10
# Jobs that were there before, so that plans are those of a server that has worked for a while.
_BEFORE = 5_000
_NAIVE = """
    CREATE TABLE naive_job (
        job_id uuid PRIMARY KEY, arrival bigint GENERATED ALWAYS AS IDENTITY, account_id text NOT NULL,
        state text NOT NULL DEFAULT 'queued', spec jsonb NOT NULL);
    CREATE INDEX naive_job_waiting ON naive_job (arrival) WHERE state = 'queued'"""
_SPEC = json.dumps(
    spec_to_json(
        RenderSpec(
            kind=RenderKind.IMAGINE,
            model="m",
            prompt="a fox in the snow, at dawn, as on an old postcard",
            width=512,
            height=512,
            steps=20,
            guidance_milli=5_000,
            seed=1,
        )
    )
)
_PRICING = json.dumps(
    PricingSnapshot(
        plan="standard",
        plan_version=1,
        charge_mode=ChargeMode.RELAX,
        multiplier_bp=10_000,
        overage_allowed=False,
        overage_micros_per_minute=0,
        currency="USD",
    ).to_json()
)


_accounts = itertools.cycle(range(_ACCOUNTS))


@dataclass(frozen=True, kw_only=True)
class Series:
    """Milliseconds of each batch, in their order."""

    dispatch: list[float] = field(default_factory=list)
    sweep: list[float] = field(default_factory=list)


def main() -> None:
    """Parse the command line, print the table, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--waiting", type=int, default=1_000)
    parser.add_argument("--out", type=Path, help="folder for the graph")
    arguments = parser.parse_args()
    rounds = arguments.jobs // _GPUS
    measured: dict[str, Series] = {}
    for way, run in (("ours", _ours), ("naive", _naive)):
        for is_open in (False, True):
            with (
                tempfile.TemporaryDirectory(prefix="dr-") as folder,
                embedded_postgresql(Path(folder) / "pg") as server,
            ):
                name = f"{way}, an old transaction open" if is_open else f"{way}, none open"
                measured[name] = asyncio.run(
                    _measure(server, run, is_open, rounds, arguments.batch, arguments.waiting)
                )
                print(f"measured: {name}", flush=True)
    _print(measured, arguments.batch)
    if arguments.out is not None:
        print(_draw(measured, arguments.batch, arguments.out))


_Run = Callable[[asyncpg.Connection, Series, int, int, int], Awaitable[None]]


async def _measure(server: str, run: _Run, is_open: bool, rounds: int, batch: int, waiting: int) -> Series:
    connection = await asyncpg.connect(server)
    assert await connection.fetchval("SHOW fsync") == "on", "without fsync nothing here would mean anything"
    version = await connection.fetchval("SHOW server_version")
    print(f"PostgreSQL {version}, {os.cpu_count()} cores, {rounds} times {_GPUS} jobs, {waiting} waiting")
    await connection.execute("CREATE DATABASE bench")
    await connection.close()
    dsn = with_database(server, "bench")
    connection = await asyncpg.connect(dsn)
    await migrate(connection)
    await connection.execute(_NAIVE)
    await connection.execute("UPDATE scheduler.cell SET decay_origin_ms = $1", _now_ms())
    async with connection.transaction():
        for number in range(_ACCOUNTS):
            await ledger_accounts.create(connection, f"account-{number}", "standard", datetime.now(UTC))
            await accounts.create_account(connection, f"account-{number}")
    await run(connection, Series(), _BEFORE // _GPUS, batch, 0)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()
    connection = await asyncpg.connect(dsn)
    measured = Series()
    old = await asyncpg.connect(dsn)
    transaction = old.transaction(isolation="repeatable_read", readonly=True)
    if is_open:
        await transaction.start()
        await old.fetchval("SELECT count(*) FROM scheduler.account")
    await run(connection, measured, rounds, batch, waiting)
    await old.close()
    await connection.close()
    return measured


@asynccontextmanager
async def _timed(into: list[float]) -> Any:
    begun_s = time.perf_counter()
    yield
    into.append((time.perf_counter() - begun_s) * 1000)


async def _ours(
    connection: asyncpg.Connection, measured: Series, rounds: int, batch: int, waiting: int
) -> None:
    epoch = (await leadership.take_lead(connection, "bench")).epoch
    queue: deque[tuple[str, str]] = deque()
    moved_until: datetime | None = None
    queue += await _submit(connection, epoch, waiting)

    async def start_and_end(count: int, into: Series) -> None:
        queue.extend(await _submit(connection, epoch, count))
        planned = [_planned(*queue.popleft(), slot) for slot in range(count)]
        async with _timed(into.dispatch):
            await dispatch.start_attempts(
                connection,
                epoch=epoch,
                planned=planned,
                tags=[],
                running=[],
                parameters=Parameters(),
                now_ms=_now_ms(),
                again=False,
            )
        async with _timed(into.sweep):
            assert await live.unheeded(connection, most=5_000, everywhere=False) == []
        settled = await endings.settle_attempts(
            connection,
            epoch=epoch,
            ends=[_end(plan) for plan in planned],
            parameters=Parameters(),
            now_ms=_now_ms(),
        )
        assert all(isinstance(one, endings.Settled) for one in settled)

    for _ in range(rounds):
        for _ in range(_MEASURED):
            await start_and_end(batch, measured)
        await start_and_end(_GPUS - _MEASURED * batch, Series())
        moved_until = await _move(connection, moved_until)


async def _submit(connection: asyncpg.Connection, epoch: int, count: int) -> list[tuple[str, str]]:
    """Write waiting jobs as intake does, let the scheduler notice them; return their ids and accounts."""
    jobs = [(str(uuid.uuid4()), f"account-{next(_accounts)}") for _ in range(count)]
    await connection.executemany(
        """WITH job AS (
               INSERT INTO scheduler.job (job_id, account_id, kind, tier, visibility, prompt, seed_fixed,
                                          spec, pricing, predicted_ms)
               VALUES ($1, $2, 'imagine', 'relax', 'public', 'a fox', false, $3, $4, 60000)
               RETURNING job_id)
           INSERT INTO scheduler.job_event (job_id, state) SELECT job_id, 'queued' FROM job""",
        [(job_id, account_id, _SPEC, _PRICING) for job_id, account_id in jobs],
    )
    await live.noticed_jobs(connection, epoch=epoch, job_ids=[job_id for job_id, _ in jobs])
    return jobs


async def _move(connection: asyncpg.Connection, moved_until: datetime | None) -> datetime | None:
    now = datetime.now(UTC)
    async with connection.transaction():
        await past_jobs.make_months(connection, ended_from=moved_until, until=now)
    while True:
        async with connection.transaction():
            moved = await past_jobs.move(
                connection, ended_before=now - timedelta(seconds=2), ended_from=moved_until, limit=500
            )
        moved_until = max(moved, default=moved_until)
        if len(moved) < 500:
            return moved_until


def _planned(job_id: str, account_id: str, slot: int) -> dispatch.PlannedAttempt:
    return dispatch.PlannedAttempt(
        attempt_id=str(uuid.uuid4()),
        token=str(uuid.uuid4()),
        job_id=JobId(job_id),
        account_id=AccountId(account_id),
        tier=Tier.RELAX,
        worker_id=f"node-a/gpu-{slot}",
        incarnation="first",
        charge=Charge(
            predicted_ms=60_000,
            weight_milli=1000,
            charged_at_ms=_now_ms(),
            start_tag=0,
            finish_tag=0,
            next_tag=None,
            usage_added=1.0,
            virtual_time=0,
            aged=False,
        ),
        decision={"limit_running": 3, "limit_relax_running": 2},
        sentence="It was next.",
    )


def _end(plan: dispatch.PlannedAttempt) -> endings.AttemptEnd:
    return endings.AttemptEnd(
        attempt_id=plan.attempt_id,
        token=plan.token,
        incarnation=plan.incarnation,
        verdict=endings.Verdict.SUCCEEDED,
        gpu_ms=1,
        images=tuple(
            ImageFile(
                index=index,
                path=f"jobs/{plan.job_id}/{plan.attempt_id}/{index}.png",
                file_name=f"{index}.png",
                content_type="image/png",
                size_bytes=1,
                sha256="0" * 64,
                width=512,
                height=512,
                seed=1,
            )
            for index in range(1, 5)
        ),
        reproduction={"model": "m"},
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def _naive(
    connection: asyncpg.Connection, measured: Series, rounds: int, batch: int, waiting: int
) -> None:
    async def submit(count: int) -> None:
        await connection.executemany(
            "INSERT INTO naive_job (job_id, account_id, spec) VALUES ($1, 'ann', $2)",
            [(uuid.uuid4(), _SPEC) for _ in range(count)],
        )

    async def start_and_end(count: int, into: Series) -> None:
        await submit(count)
        async with _timed(into.dispatch):
            taken = await connection.fetch(
                """UPDATE naive_job SET state = 'running' WHERE job_id IN (
                       SELECT job_id FROM naive_job WHERE state = 'queued'
                       ORDER BY arrival LIMIT $1 FOR UPDATE SKIP LOCKED)
                   RETURNING job_id""",
                count,
            )
        assert len(taken) == count
        await connection.execute(
            "DELETE FROM naive_job WHERE job_id = ANY($1)", [row["job_id"] for row in taken]
        )

    await submit(waiting)
    for _ in range(rounds):
        for _ in range(_MEASURED):
            await start_and_end(batch, measured)
        await start_and_end(_GPUS - _MEASURED * batch, Series())


def _columns(measured: Mapping[str, Series]) -> dict[str, Sequence[float]]:
    columns: dict[str, Sequence[float]] = {}
    for name, series in measured.items():
        columns[name] = _medians(series.dispatch)
        if series.sweep:
            columns[f"{name}: sweep"] = _medians(series.sweep)
    return columns


def _medians(values: Sequence[float]) -> list[float]:
    size = len(values) // _POINTS
    return [statistics.median(values[first : first + size]) for first in range(0, size * _POINTS, size)]


def _print(measured: Mapping[str, Series], batch: int) -> None:
    columns = _columns(measured)
    rounds = len(next(iter(measured.values())).dispatch) // _MEASURED
    print(f"\nMilliseconds of a batch of {batch}, median, after so many jobs:")
    print(f"{'jobs':40}" + "".join(f"{_GPUS * rounds * n // _POINTS:>9,}" for n in range(1, _POINTS + 1)))
    for name, values in columns.items():
        print(f"{name:40}" + "".join(f"{value:>9.1f}" for value in values))


def _draw(measured: Mapping[str, Series], batch: int, folder: Path) -> Path:
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "darkroom", "svg.fonttype": "none", "axes.grid": True}):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for name, values in _columns(measured).items():
            if not name.endswith("sweep"):
                rounds = len(measured[name].dispatch) // _MEASURED
                jobs = [_GPUS * rounds * n // _POINTS for n in range(1, _POINTS + 1)]
                axes.plot(
                    jobs,
                    values,
                    label=name,
                    color="#1b6ca8" if name.startswith("ours") else "#d1495b",
                    linestyle="-" if name.endswith("transaction open") else "--",
                    marker="o",
                    markersize=3,
                )
        axes.set(xlabel="jobs since the old transaction began", ylabel=f"ms to start {batch} jobs")
        axes.set_ylim(bottom=0)
        axes.legend()
        path = folder / "old_transaction.svg"
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return path


if __name__ == "__main__":
    main()
