"""Every schema there ever was comes to the present one with its rows, and the service goes on with them.

The rows are written once, by today's service: accounts, lots and holds, jobs that wait, run, are parked and
have ended. Each earlier schema gets as much of them as it has tables and columns for.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from billing import auditor
from gpu_worker.contract import Blame, Outcome
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.metrics import FrontDoorMetrics
from scheduler.policy.ids import Tier
from scheduler.store import invariants
from scheduler.store.embedded import with_database
from scheduler.store.migrate import migrate, migrate_before, migrations
from scheduler.store.pool import open_pool
from tests.loop.conftest import DirectLink, Stage

# The stub fleet counts the time that it is told to count.
HOLDS = [one for one in invariants.INVARIANTS if one not in invariants.WALL_TIME]

TABLES = """
    SELECT format('%I.%I', nspname, relname)
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname IN ('billing', 'scheduler') AND relkind IN ('r', 'p') AND NOT relispartition
    ORDER BY nspname, relname"""
COLUMNS = """
    SELECT attname::text FROM pg_attribute
    WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''"""


@dataclass(frozen=True)
class Rows:
    """What a service wrote, by table."""

    of: dict[str, list[dict[str, Any]]]

    def as_of(self, columns: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
        """Return what a schema with these tables and columns has room for."""
        of = {table: rows for table, rows in self.of.items() if table in columns}
        if "parked_at" not in columns["scheduler.attempt"]:
            # Before there was parking, every attempt that ran had a GPU.
            of["scheduler.attempt"] = [
                row | {"worker_id": "here/gpu-9"} if row["parked_at"] is not None else row
                for row in of["scheduler.attempt"]
            ]
        return {
            table: [{name: value for name, value in row.items() if name in columns[table]} for row in rows]
            for table, rows in of.items()
        }


@pytest.fixture(scope="session")
def rows(postgresql: str, migrated_template: str) -> Rows:
    async def write() -> Rows:
        server = await asyncpg.connect(postgresql)
        await server.execute(f"CREATE DATABASE rows_of_a_service TEMPLATE {migrated_template}")
        dsn = with_database(postgresql, "rows_of_a_service")
        try:
            await live_a_little(dsn)
            connection = await asyncpg.connect(dsn)
            assert await invariants.check(connection, invariants=HOLDS) == []
            of = {
                table: json.loads(
                    await connection.fetchval(f"SELECT coalesce(jsonb_agg(to_jsonb(t)), '[]') FROM {table} t")
                )
                for (table,) in await connection.fetch(TABLES)
            }
            await connection.close()
            return Rows(of)
        finally:
            await server.execute("DROP DATABASE rows_of_a_service WITH (FORCE)")
            await server.close()

    return asyncio.run(write())


async def live_a_little(dsn: str) -> None:
    """Let a service have jobs in every state, and leave it as a killed one would."""
    connection, pool = await asyncpg.connect(dsn), await open_pool(dsn, 2)
    stage = a_stage(dsn, connection, pool)
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=1_000)
    await stage.open_account("ada")
    await stage.open_account("ben", "basic")
    await stage.adjust_balance("ada", 60_000)
    async with stage.leading(fleet) as leader:
        for tier, outcome, blame in (
            (Tier.FAST, Outcome.SUCCEEDED, Blame.NONE),
            (Tier.RELAX, Outcome.SUCCEEDED, Blame.NONE),
            (Tier.FAST, Outcome.FAILED, Blame.CLIENT),
            (Tier.FAST, Outcome.CANCELLED, Blame.NONE),
        ):
            job_id = await stage.submit("ada", tier)
            await stage.until(leader, lambda: fleet.busy)
            if outcome is Outcome.CANCELLED:
                await stage.cancel("ada", job_id)
            else:
                fleet.finish(next(iter(fleet.busy)), outcome=outcome, blame=blame)
            await stage.until_state(leader, job_id, outcome.value)
        await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        await stage.submit("ben")
        await stage.until(leader, lambda: len(fleet.busy) == 2)
        for _ in range(3):
            await stage.submit("ben")
        await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: any(fleet.parked(worker_id) for worker_id in fleet.busy))
        withdrawn = await stage.submit("ada")
        await stage.cancel("ada", withdrawn)
        await stage.until_state(leader, withdrawn, "cancelled")
    await pool.close()
    await connection.close()


def a_stage(dsn: str, connection: asyncpg.Connection, pool: Any) -> Stage:
    metrics = FrontDoorMetrics(["basic", "standard", "pro"])
    return Stage(dsn=dsn, pool=pool, link=DirectLink(), connection=connection, metrics=metrics)


async def insert(connection: asyncpg.Connection, rows: Rows) -> None:
    columns = {
        table: [name for (name,) in await connection.fetch(COLUMNS, table)]
        for (table,) in await connection.fetch(TABLES)
    }
    # Whatever order the tables have: they are as consistent as they were where they come from.
    await connection.execute("SET session_replication_role = replica")
    await connection.execute(f"TRUNCATE {', '.join(columns)}")
    for table, of_table in rows.as_of(columns).items():
        if of_table:
            names = ", ".join(f'"{name}"' for name in of_table[0])
            await connection.execute(
                f"""INSERT INTO {table} ({names}) OVERRIDING SYSTEM VALUE
                    SELECT {names} FROM jsonb_populate_recordset(NULL::{table}, $1)""",
                json.dumps(of_table),
            )
    await connection.execute("RESET session_replication_role")
    for table, names in columns.items():
        for name in names:
            if sequence := await connection.fetchval("SELECT pg_get_serial_sequence($1, $2)", table, name):
                await connection.execute(
                    f"SELECT setval('{sequence}', (SELECT 1 + coalesce(max({name}), 0) FROM {table}), false)"
                )


async def what_is_broken(connection: asyncpg.Connection) -> list[invariants.InvariantResult]:
    """Ask what can be asked of a schema that may be an old one."""
    broken = []
    for one in HOLDS:
        try:
            broken += await invariants.check(connection, invariants=[one])
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            continue  # of something that came later
    return broken


@pytest.mark.parametrize("applied", range(2, len(migrations()) + 1))
async def test_rows_of_every_schema_come_to_this_one_and_their_jobs_to_their_ends(
    applied: int, rows: Rows, postgresql: str
) -> None:
    name = f"schema_after_{applied}_files"
    server = await asyncpg.connect(postgresql)
    await server.execute(f"CREATE DATABASE {name}")
    dsn = with_database(postgresql, name)
    connection, pool = await asyncpg.connect(dsn), await open_pool(dsn, 2)
    try:
        await migrate(connection, known=migrations()[:applied])
        await insert(connection, rows)
        assert await what_is_broken(connection) == []
        jobs = await connection.fetch("SELECT job_id, state FROM scheduler.job ORDER BY arrival")

        before = await migrate_before(connection)
        assert await invariants.check(connection, invariants=HOLDS) == []
        after = await migrate(connection)
        assert [*before.applied, *after.applied] == migrations()[applied:]
        assert await invariants.check(connection, invariants=HOLDS) == []
        assert jobs == await connection.fetch("SELECT job_id, state FROM scheduler.job ORDER BY arrival")

        stage = a_stage(dsn, connection, pool)
        async with stage.leading(LocalFleet(workers=2, take_ms=0, gpu_ms=1_000)) as leader:
            new = await stage.submit("ben")
            for job_id in [
                *(str(job["job_id"]) for job in jobs if job["state"] in ("queued", "running")),
                new,
            ]:
                await stage.until_state(leader, job_id, "succeeded")
        assert await invariants.check(connection, invariants=[*HOLDS, *invariants.AT_REST]) == []
        assert await auditor.replay(connection) == []
    finally:
        await pool.close()
        await connection.close()
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()
