"""Who changed what, and why: one event for each deed of an admin, in the transaction of the deed."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import asyncpg


async def record(
    connection: asyncpg.Connection,
    *,
    actor: str,
    action: str,
    target: str,
    reason: str,
    request_id: str,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    at: datetime,
) -> int:
    """Write an audit event and return its number.

    `action` is the name of the API method, `target` a resource name; `before` and `after` hold JSON values.
    No text may be empty. Locks nothing.
    """
    # Through text, so that it does not matter which JSON codec the caller's connection has.
    audit_id: int = await connection.fetchval(
        """INSERT INTO billing.audit_event (at, actor, action, target, reason, request_id, before, after)
           VALUES ($1, $2, $3, $4, $5, $6, $7::text::jsonb, $8::text::jsonb) RETURNING audit_id""",
        at,
        actor,
        action,
        target,
        reason,
        request_id,
        None if before is None else json.dumps(before),
        None if after is None else json.dumps(after),
    )
    return audit_id
