"""How soon a new leader starts jobs, and how soon it has read all that waits.

    python -m tests.bench.recovery [--jobs 10000 100000] [--million] [--gpus 64] [--record]

Each row fills an embedded PostgreSQL with waiting jobs (ten of each account, one in ten of them fast, in four
sizes), as an earlier leader left them: noticed, and with stored tags. Then a leader takes over, with an idle
timed fleet in this process, and these are measured from the moment it begins to take the lead:

- first: until the first job is started, its row committed and its worker told;
- busy: until every GPU has one;
- whole: until everything that waits is on the board, and the CPU time that this process took until then;
- pause: the longest that the process did nothing else meanwhile, from the first start on;
- memory: what the process takes more than before for each waiting job, with the journal's unwritten lines;
- naive: the first start if the loop only begins to turn when everything is read.

A reading of the same number is not promised twice: the clock is that of a machine with other things to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import structlog

from billing.prices import ChargeMode, PricingSnapshot
from gpu_worker.contract import RenderKind, RenderSpec
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.leader import Leader, lead
from scheduler.recovery import collect_seldom
from scheduler.store.embedded import embedded_postgresql
from scheduler.store.jobs import spec_to_json
from scheduler.store.migrate import migrate_database
from tests.stand_in import stand_in_models

_JOBS_OF_AN_ACCOUNT = 10
_JOB_MS = 60_000
_BEAT_S = 0.001

_SPAWN = multiprocessing.get_context("spawn")
_Measure = Callable[[str, Path | None, LocalFleet, int], Coroutine[None, None, str]]


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--million", action="store_true", help="also with 1,000,000")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--record", action="store_true", help="take down all that the board is told")
    arguments = parser.parse_args()
    print(
        f"{'waiting':>9} {'GPUs':>6} {'first s':>8} {'busy s':>7} {'whole s':>8} {'CPU s':>6} {'pause ms':>9}"
        f" {'bytes/job':>10} {'naive first s':>14}",
        flush=True,
    )
    for jobs in (*arguments.jobs, *((1_000_000,) if arguments.million else ())):
        with (
            tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder,
            embedded_postgresql(Path(folder) / "database") as dsn,
        ):
            asyncio.run(_fill(dsn, jobs))
            # Each in a process of its own, whose memory is its alone.
            for measure in (_measured, _measured_naively):
                record_to = Path(folder) / measure.__name__ if arguments.record else None
                process = _SPAWN.Process(target=_run, args=(measure, dsn, record_to, arguments.gpus, jobs))
                process.start()
                process.join()


async def _fill(dsn: str, jobs: int) -> None:
    """Leave jobs, accounts and tags as a leader that died left them."""
    await migrate_database(dsn)
    model = stand_in_models().default
    spec = RenderSpec(
        kind=RenderKind.IMAGINE,
        model=model.name,
        prompt="a lighthouse above a stormy sea, oil on canvas",
        width=model.default_width,
        height=model.default_height,
        steps=model.steps,
        guidance_milli=model.guidance_milli,
        seed=1,
    )
    connection = await asyncpg.connect(dsn)
    plan = await connection.fetchrow("SELECT * FROM billing.plan_version WHERE plan = 'standard'")
    assert plan is not None
    pricing = PricingSnapshot(
        plan="standard",
        plan_version=plan["version"],
        charge_mode=ChargeMode.FAST,
        multiplier_bp=10_000,
        overage_allowed=False,
        overage_micros_per_minute=0,
        currency=plan["currency"],
    )
    accounts = jobs // _JOBS_OF_AN_ACCOUNT
    for statement in (
        "INSERT INTO billing.account SELECT 'account-' || n, now() FROM generate_series(1, $1::int) n",
        """INSERT INTO billing.subscription (account_id, plan, version, anchor, period_start, period_end)
           SELECT account_id, 'standard', 1, now(), now(), now() + interval '1 month' FROM billing.account
           WHERE $1::int > 0""",
        """INSERT INTO billing.grant_lot (account_id, source, source_key, priority, effective_at, expires_at,
                                          granted_ms)
           SELECT account_id, 'plan', account_id, 1, now(), now() + interval '1 month', 54000000
           FROM billing.account WHERE $1::int > 0""",
        "INSERT INTO scheduler.account SELECT account_id FROM billing.account WHERE $1::int > 0",
    ):
        await connection.execute(statement, accounts)
    await connection.execute(
        """INSERT INTO scheduler.job (job_id, account_id, kind, tier, visibility, prompt, seed_fixed, spec,
                                      pricing, predicted_ms, noticed_epoch)
           SELECT gen_random_uuid(), 'account-' || 1 + (n * 7919::bigint) % $2, 'imagine',
                  CASE WHEN n % 10 = 0 THEN 'fast' ELSE 'relax' END, 'public', $3, false,
                  $4::jsonb || jsonb_build_object('seed', n, 'width', 256 + 64 * (n % 4)), $5,
                  10000 + (n * 7919::bigint) % 50000, 1
           FROM generate_series(1, $1::int) n""",
        jobs,
        accounts,
        spec.prompt,
        json.dumps(spec_to_json(spec)),
        json.dumps(pricing.to_json()),
        timeout=600,
    )
    await connection.execute(
        """INSERT INTO scheduler.fair_share (account_id, tier, finish_tag, tag, usage)
           SELECT account_id, tier, 0, hashtext(account_id)::bigint + 2147483648,
                  CASE WHEN tier = 'relax' THEN abs(hashtext(account_id) % 50000000) ELSE 0 END
           FROM (SELECT DISTINCT account_id, tier FROM scheduler.job) AS waiting""",
        timeout=600,
    )
    await connection.execute("VACUUM ANALYZE", timeout=600)
    await connection.close()


def _run(measure: _Measure, dsn: str, record_to: Path | None, gpus: int, jobs: int) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    fleet = LocalFleet(workers=gpus, take_ms=_JOB_MS)
    print(asyncio.run(measure(dsn, record_to, fleet, jobs)), end="", flush=True)


async def _measured(dsn: str, record_to: Path | None, fleet: LocalFleet, jobs: int) -> str:
    before = _resident_bytes()
    pauses: list[float] = []
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    async with _leading(dsn, record_to, fleet) as leader:
        turning = asyncio.create_task(leader.run())
        while not fleet.rendered:  # noqa: ASYNC110 - a fleet that tells nobody
            await asyncio.sleep(_BEAT_S)
        first_s = time.perf_counter() - begun_s
        beating = asyncio.create_task(_beat(pauses))
        while len(fleet.busy) < leader.workers:  # noqa: ASYNC110
            await asyncio.sleep(_BEAT_S)
        busy_s = time.perf_counter() - begun_s
        while not leader._loop.board.is_whole:  # noqa: ASYNC110
            await asyncio.sleep(10 * _BEAT_S)
        whole_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
        memory = (_resident_bytes() - before) / jobs
        await _ended(beating, turning)
    return (
        f"{jobs:>9,} {leader.workers:>6,} {first_s:>8.2f} {busy_s:>7.2f} {whole_s:>8.2f}"
        f" {cpu_s:>6.2f} {max(pauses) * 1000:>9.0f} {memory:>10,.0f}"
    )


async def _measured_naively(dsn: str, record_to: Path | None, fleet: LocalFleet, jobs: int) -> str:
    begun_s = time.perf_counter()
    async with _leading(dsn, record_to, fleet) as leader:
        reading = asyncio.gather(*(leader._backlog.run(lane) for lane in leader._backlog.lanes))
        while leader._loop._backlog is not None:
            leader._loop._tell_backlog(leader._loop._backlog)
            await asyncio.sleep(0)
            if reading.done():
                reading.result()
        await reading
        turning = asyncio.create_task(leader.run())
        while not fleet.rendered:  # noqa: ASYNC110
            await asyncio.sleep(_BEAT_S)
        first_s = time.perf_counter() - begun_s
        await _ended(turning)
    return f" {first_s:>14.2f}\n"


@asynccontextmanager
async def _leading(dsn: str, record_to: Path | None, fleet: LocalFleet) -> AsyncIterator[Leader]:
    async with lead(
        dsn=dsn,
        holder="bench",
        fleet=fleet,
        models=stand_in_models(),
        sweep_ms=1_000,
        record_to=record_to,
    ) as leader:
        collect_seldom()
        yield leader


async def _beat(pauses: list[float]) -> None:
    """Note how late each of many short sleeps ends."""
    while True:
        begun_s = time.perf_counter()
        await asyncio.sleep(_BEAT_S)
        pauses.append(time.perf_counter() - begun_s - _BEAT_S)


async def _ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main()
