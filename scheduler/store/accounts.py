"""Accounts and their keys: how an account wants its jobs, whether it is blocked, and who may speak for it.

What an account may do, and what it has, is in its plan (`billing`).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

import asyncpg

from billing.plans import PlanLimits
from scheduler.policy.ids import Tier
from scheduler.store.pool import Connection


class Visibility(StrEnum):
    """Who may see a finished job."""

    PUBLIC = "public"
    PRIVATE = "private"


class Role(StrEnum):
    """What a key may do beyond its own account's jobs; each role includes those before it."""

    USER = "user"
    MODERATOR = "moderator"
    OPERATOR = "operator"
    ADMIN = "admin"

    def reaches(self, needed: Role) -> bool:
        """Return whether this role includes `needed`."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True, kw_only=True)
class AccountSettings:
    """How an account wants its jobs where they do not say otherwise."""

    account_id: str
    mode: Tier
    visibility: Visibility
    blocked: bool


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One valid key."""

    key_id: str
    account_id: str
    role: Role
    secret_hash: bytes = field(repr=False)
    blocked: bool
    """Whether its account is."""


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """A key as it is listed: good or revoked, without its secret."""

    key_id: str
    account_id: str
    role: Role
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class AccountRecord:
    """An account as admins list it."""

    account_id: str
    plan: str
    scheduled_plan: str | None
    """That it changes to at the end of its period."""
    created_at: datetime
    blocked: bool
    erased_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class NewKey:
    """A key just made."""

    key_id: str
    secret: str = field(repr=False)
    """`dk_<id>_<secret>`: shown once, never stored."""
    created_at: datetime


def hash_secret(secret: str) -> bytes:
    """Return what is stored of a key's secret part."""
    return hashlib.sha256(secret.encode()).digest()


async def create_account(connection: Connection, account_id: str) -> None:
    """Make the scheduler's row of an account that the ledger has: fast mode, public pictures."""
    await connection.execute("INSERT INTO scheduler.account (account_id) VALUES ($1)", account_id)


async def settings(connection: Connection, account_id: str) -> AccountSettings | None:
    """Return an account's settings, None if there is no such account."""
    row = await connection.fetchrow(
        "SELECT account_id, mode, visibility, blocked FROM scheduler.account WHERE account_id = $1",
        account_id,
    )
    if row is None:
        return None
    return AccountSettings(
        account_id=row["account_id"],
        mode=Tier(row["mode"]),
        visibility=Visibility(row["visibility"]),
        blocked=row["blocked"],
    )


async def record(connection: Connection, account_id: str) -> AccountRecord | None:
    """Return an account as admins see it, None if there is no such account."""
    row = await connection.fetchrow(f"{_RECORD} WHERE account_id = $1", account_id)
    return None if row is None else AccountRecord(**row)


async def records(connection: Connection, *, plan: str | None, after: str, limit: int) -> list[AccountRecord]:
    """Return up to `limit` accounts with ids behind `after`, in their order; None: of any plan."""
    rows = await connection.fetch(
        f"""{_RECORD} WHERE account_id > $1 AND ($2::text IS NULL OR plan = $2)
            ORDER BY account_id LIMIT $3""",
        after,
        plan,
        limit,
    )
    return [AccountRecord(**row) for row in rows]


_RECORD = """SELECT account_id, plan, scheduled_plan, created_at, blocked, erased_at
             FROM scheduler.account JOIN billing.account USING (account_id)
                  JOIN billing.subscription USING (account_id)"""


async def over_limits(connection: Connection, plan: str, limits: PlanLimits) -> int:
    """Return how many accounts of a plan have more jobs running or accepted than these limits allow."""
    count: int = await connection.fetchval(
        """SELECT count(*) FROM (
               SELECT FROM scheduler.job JOIN billing.subscription USING (account_id)
               WHERE plan = $1 AND NOT past AND state IN ('queued', 'running') GROUP BY account_id
               HAVING count(*) > $2 OR count(*) FILTER (WHERE state = 'running') > $3
                      OR count(*) FILTER (WHERE state = 'running' AND tier = 'relax') > $4) AS over""",
        plan,
        limits.accepted,
        limits.running,
        limits.relax_running,
    )
    return count


async def change_settings(
    connection: Connection, account_id: str, *, mode: Tier | None = None, visibility: Visibility | None = None
) -> None:
    """Change what is given and leave the rest."""
    await connection.execute(
        """UPDATE scheduler.account SET mode = coalesce($2, mode), visibility = coalesce($3, visibility)
           WHERE account_id = $1""",
        account_id,
        mode,
        visibility,
    )


async def accounts_known_to_scheduler(connection: Connection) -> list[str]:
    """Return the accounts that a scheduler may have in memory: those with a live job or a share of a tier."""
    rows = await connection.fetch(
        """SELECT account_id FROM scheduler.job WHERE NOT past AND state IN ('queued', 'running')
           UNION SELECT account_id FROM scheduler.fair_share"""
    )
    return [row["account_id"] for row in rows]


async def create_key(connection: Connection, account_id: str, role: Role) -> NewKey:
    """Make a key of an account; the returned secret exists nowhere else."""
    key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    created_at: datetime = await connection.fetchval(
        """INSERT INTO scheduler.api_key (key_id, account_id, secret_hash, role) VALUES ($1, $2, $3, $4)
           RETURNING created_at""",
        key_id,
        account_id,
        hash_secret(secret),
        role,
    )
    return NewKey(key_id=key_id, secret=f"dk_{key_id}_{secret}", created_at=created_at)


async def keys(connection: Connection, account_id: str) -> list[KeyRecord]:
    """Return an account's keys, revoked ones included, oldest first."""
    rows = await connection.fetch(
        f"SELECT {_KEY} FROM scheduler.api_key WHERE account_id = $1 ORDER BY created_at, key_id",  # noqa: S608 - a constant
        account_id,
    )
    return [_key_record(row) for row in rows]


async def revoke_key(connection: Connection, account_id: str, key_id: str, at: datetime) -> KeyRecord | None:
    """End a key and return it, None if the account has none of that id; a revoked one stays as it is."""
    row = await connection.fetchrow(
        f"""UPDATE scheduler.api_key SET revoked_at = coalesce(revoked_at, $3)
            WHERE account_id = $1 AND key_id = $2 RETURNING {_KEY}""",  # noqa: S608 - a constant
        account_id,
        key_id,
        at,
    )
    return None if row is None else _key_record(row)


_KEY = "key_id, account_id, role, created_at, revoked_at"


def _key_record(row: asyncpg.Record) -> KeyRecord:
    return KeyRecord(**{**row, "role": Role(row["role"])})


async def forget(connection: Connection, account_id: str) -> None:
    """Delete an account's keys, block it, and note that its jobs are to be deleted; its row stays."""
    await connection.execute("DELETE FROM scheduler.api_key WHERE account_id = $1", account_id)
    await connection.execute(
        """UPDATE scheduler.account SET blocked = true, erasing = true, mode = 'fast', visibility = 'public'
           WHERE account_id = $1""",
        account_id,
    )


async def find_keys(connection: Connection, key_ids: Sequence[str]) -> dict[str, ApiKey]:
    """Return by their ids those of these keys that exist and are not revoked."""
    rows = await connection.fetch(
        """/* find_keys */ SELECT key_id, account_id, role, secret_hash, blocked
           FROM scheduler.api_key JOIN scheduler.account USING (account_id)
           WHERE key_id = ANY($1) AND revoked_at IS NULL""",
        key_ids,
    )
    return {row["key_id"]: ApiKey(**{**row, "role": Role(row["role"])}) for row in rows}


async def admin_key_exists(connection: Connection) -> bool:
    """Return whether anybody can administer this database."""
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM scheduler.api_key WHERE role = 'admin' AND revoked_at IS NULL)"
        )
    )
