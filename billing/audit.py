"""Who changed what, and why: one event for each deed of an admin, in the transaction of the deed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg


@dataclass(frozen=True, kw_only=True)
class AuditEvent:
    """One deed."""

    audit_id: int
    at: datetime
    actor: str
    action: str
    """Name of the API method."""
    target: str
    """Resource name of what was changed."""
    reason: str
    request_id: str
    before: str
    """JSON; empty where there was nothing."""
    after: str


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


async def was_done(connection: asyncpg.Connection, action: str, target: str, request_id: str) -> bool:
    """Return whether this was done to a target under a request id, by whomever.

    Two callers may choose the same id, and each has claimed it for itself. Asked under a lock of the target.
    """
    done: bool = await connection.fetchval(
        """SELECT EXISTS (SELECT FROM billing.audit_event
                           WHERE target = $1 AND action = $2 AND request_id = $3)""",
        target,
        action,
        request_id,
    )
    return done


async def events(
    connection: asyncpg.Connection,
    *,
    target: str = "",
    actor: str = "",
    since: datetime | None = None,
    until: datetime | None = None,
    actions: Iterable[str] | None = None,
    before_id: int | None = None,
    limit: int,
) -> list[AuditEvent]:
    """Return up to `limit` audit events, newest first, with numbers below `before_id`. Locks nothing.

    `target` and `actor` are resource names: events of them and of all below them, as an account's keys are
    below the account. `since` is included, `until` is not. `actions` are names of API methods. What is empty
    or None leaves nothing out.
    """
    rows = await connection.fetch(
        """SELECT audit_id, at, actor, action, target, reason, request_id,
                  COALESCE(before::text, '') AS before, COALESCE(after::text, '') AS after
             FROM billing.audit_event
            WHERE ($1 = '' OR target = $1 OR starts_with(target, $1 || '/'))
              AND ($2 = '' OR actor = $2 OR starts_with(actor, $2 || '/'))
              AND ($3::timestamptz IS NULL OR at >= $3)
              AND ($4::timestamptz IS NULL OR at < $4)
              AND ($5::bigint IS NULL OR audit_id < $5)
              AND ($6::text[] IS NULL OR action = ANY($6))
            ORDER BY audit_id DESC LIMIT $7""",
        target,
        actor,
        since,
        until,
        before_id,
        None if actions is None else list(actions),
        limit,
    )
    return [AuditEvent(**row) for row in rows]
