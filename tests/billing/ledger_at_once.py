"""Lets many act on a ledger at once, and gives their deeds a name to be done under."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg

from billing import refunds
from billing.ledger import HoldRequest

BY_ROOT = {"actor": "accounts/root", "reason": "test"}


@asynccontextmanager
async def crowd(database: str) -> AsyncIterator[asyncpg.Pool]:
    """A pool that lets forty do something at the same time."""
    pool = await asyncpg.create_pool(database, min_size=0, max_size=40)
    try:
        yield pool
    finally:
        await pool.close()


async def refund(one: asyncpg.Connection, job: HoldRequest, amount_ms: int | None = None) -> int:
    async with one.transaction():
        given = await refunds.refund(
            one,
            account_id=job.account_id,
            job_id=job.job_id,
            amount_ms=amount_ms,
            request_id=str(uuid4()),
            at=job.at,
            **BY_ROOT,
        )
    return given.refunded_ms
