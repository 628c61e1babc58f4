"""One scheduler leads, also after the database has been put back to where it was."""

from __future__ import annotations

import asyncpg
import pytest

from scheduler.store.leadership import DatabaseWentBack, Deposed, keep_time, require_leader, take_lead

NOW_MS = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"
ROW = "SELECT epoch, holder, last_now_ms FROM scheduler.leader"
PUT_BACK = "UPDATE scheduler.leader SET epoch = $1, holder = $2, last_now_ms = $3"


async def test_epochs_grow_also_above_those_that_a_restored_database_does_not_know(
    connection: asyncpg.Connection,
) -> None:
    first = await take_lead(connection, "first")
    backup = await connection.fetchrow(ROW)
    lost = [(await take_lead(connection, f"later {number}")).epoch for number in range(3)]
    assert [first.epoch, *lost] == sorted({first.epoch, *lost})
    await connection.execute(PUT_BACK, *backup)
    # Time passes while a backup is restored; here none does.
    while await connection.fetchval(NOW_MS) <= max(lost):
        pass
    restored = await take_lead(connection, "restored")
    assert restored.epoch > max(lost)
    for epoch in (first.epoch, *lost):
        with pytest.raises(Deposed):
            await require_leader(connection, epoch)


async def test_epoch_is_above_the_last_where_the_clock_is_behind(connection: asyncpg.Connection) -> None:
    ahead = await connection.fetchval(NOW_MS) + 3_600_000
    await connection.execute("UPDATE scheduler.leader SET epoch = $1", ahead)
    assert (await take_lead(connection, "first")).epoch == ahead + 1


async def test_leader_whose_writes_are_gone_finds_out_though_nobody_replaced_it(
    connection: asyncpg.Connection,
) -> None:
    lead = await take_lead(connection, "first")
    await keep_time(connection, lead.epoch, lead.now_ms + 5_000)
    backup = await connection.fetchrow(ROW)
    await keep_time(connection, lead.epoch, lead.now_ms + 10_000, kept_ms=lead.now_ms + 5_000)
    await connection.execute(PUT_BACK, *backup)
    with pytest.raises(DatabaseWentBack):
        await keep_time(connection, lead.epoch, lead.now_ms + 15_000, kept_ms=lead.now_ms + 10_000)
    await take_lead(connection, "second")
    with pytest.raises(Deposed):
        await keep_time(connection, lead.epoch, lead.now_ms + 15_000, kept_ms=lead.now_ms + 10_000)
