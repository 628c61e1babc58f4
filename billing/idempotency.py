"""A request that comes again gets its first answer; the same id with other content is an error."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import asyncpg

from billing.refusals import RequestIdReused


async def claim(
    connection: asyncpg.Connection, account_id: str, method: str, request_id: str, input_hash: bytes
) -> dict[str, Any] | None:
    """Claim a request id for the caller's transaction: None means go on, and `store` the outcome in it.

    Otherwise returns the outcome that was stored before. `account_id` is the caller's. A second caller waits
    until the first one's transaction ends, and claims the id itself if that rolled back; so a refusal is
    not remembered. Claim before locking accounts, to keep one order. Raises RequestIdReused.
    """
    while not await connection.fetchval(
        """/* claim_request */ INSERT INTO billing.idempotency (account_id, method, request_id, input_hash)
           VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING RETURNING true""",
        account_id,
        method,
        request_id,
        input_hash,
    ):
        outcome = await outcome_of(connection, account_id, method, request_id, input_hash)
        if outcome is not None:
            return outcome
        # It was there, and forgotten before it was read: the id is free.
    return None


async def outcome_of(
    connection: asyncpg.Connection, account_id: str, method: str, request_id: str, input_hash: bytes
) -> dict[str, Any] | None:
    """Return the outcome stored under a request id, None if there is none yet; claims and locks nothing.

    For what must be answered before a request is checked again; only `claim` keeps it from being done twice.
    Raises RequestIdReused.
    """
    row = await connection.fetchrow(
        """SELECT input_hash, outcome::text FROM billing.idempotency
            WHERE account_id = $1 AND method = $2 AND request_id = $3""",
        account_id,
        method,
        request_id,
    )
    if row is None:
        return None
    if row["input_hash"] != input_hash:
        raise RequestIdReused(request_id=request_id)
    assert row["outcome"] is not None, "a transaction claimed this id and committed without an outcome"
    outcome: dict[str, Any] = json.loads(row["outcome"])
    return outcome


async def store(
    connection: asyncpg.Connection, account_id: str, method: str, request_id: str, outcome: dict[str, Any]
) -> None:
    """Store the outcome (JSON values) of a request that this transaction claimed."""
    await connection.execute(
        """UPDATE billing.idempotency SET outcome = $4::text::jsonb
            WHERE account_id = $1 AND method = $2 AND request_id = $3""",
        account_id,
        method,
        request_id,
        json.dumps(outcome),
    )


async def forget(connection: asyncpg.Connection, *, before: datetime, limit: int) -> int:
    """Forget up to `limit` answers that were given before a time, the oldest first; returns how many.

    The same request under the same id is then done again.
    """
    done: str = await connection.execute(
        """DELETE FROM billing.idempotency WHERE (account_id, method, request_id) IN (
               SELECT account_id, method, request_id FROM billing.idempotency
               WHERE created_at < $1 ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED)""",
        before,
        limit,
    )
    return int(done.removeprefix("DELETE "))
