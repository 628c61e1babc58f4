"""The server that is started where nobody gave a database."""

from __future__ import annotations

import asyncpg

from scheduler.store.embedded import embedded_postgresql
from tests.folders import data_folder


async def test_our_settings_hold_from_its_second_start_on_and_a_line_of_ones_own_stays_below_them() -> None:
    with data_folder() as folder:
        settings = folder / "postgresql" / "postgresql.conf"
        for _ in range(2):
            with embedded_postgresql(folder) as dsn:
                connection = await asyncpg.connect(dsn)
                reads_ahead = await connection.fetchval("SHOW effective_io_concurrency")
                await connection.close()
            with settings.open("a") as end:
                end.write("work_mem = 8MB\n")
        lines = settings.read_text().splitlines()
    assert reads_ahead == "0"
    assert lines.count("effective_io_concurrency = 0") == 1
    assert lines[-2:] == 2 * ["work_mem = 8MB"]
