"""An account that is erased has its other id in every table, of the ledger and of the scheduler."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

import asyncpg

from billing import accounts as ledger_accounts
from scheduler.store import accounts

NOW = datetime(2026, 3, 1, tzinfo=UTC)


async def test_every_reference_to_an_account_follows_its_id(connection: asyncpg.Connection) -> None:
    left_behind = await connection.fetch(
        """SELECT conrelid::regclass::text FROM pg_constraint
            WHERE contype = 'f' AND confupdtype <> 'c'
              AND confrelid IN ('billing.account'::regclass, 'scheduler.account'::regclass)"""
    )
    assert left_behind == []


async def test_no_table_is_read_whole_to_find_an_account(connection: asyncpg.Connection) -> None:
    read_whole = await connection.fetch(
        """SELECT conrelid::regclass::text FROM pg_constraint
            WHERE contype = 'f'
              AND confrelid IN ('billing.account'::regclass, 'scheduler.account'::regclass)
              AND NOT EXISTS (SELECT FROM pg_index
                               WHERE indrelid = conrelid AND indkey[0] = conkey[1] AND indpred IS NULL)"""
    )
    assert read_whole == []


async def test_an_erased_account_keeps_its_jobs_and_its_place(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await ledger_accounts.create(connection, "mary", "basic", NOW)
        await accounts.create_account(connection, "mary")
        await accounts.create_key(connection, "mary", accounts.Role.USER)
        await connection.execute(
            "INSERT INTO scheduler.fair_share (account_id, tier) VALUES ('mary', 'relax')"
        )
        await connection.execute(
            """INSERT INTO scheduler.job (job_id, account_id, kind, tier, visibility, prompt, seed_fixed,
                                          spec, pricing, predicted_ms)
               VALUES ($1, 'mary', 'imagine', 'relax', 'public', '', false, '{}', '{}', 1)""",
            uuid4(),
        )
        pseudonym = await ledger_accounts.erase(connection, "mary", NOW)

    for table in ("account", "api_key", "fair_share", "job"):
        ids = await connection.fetch(f"SELECT account_id FROM scheduler.{table}")
        assert [account_id for (account_id,) in ids] == [pseudonym], table
