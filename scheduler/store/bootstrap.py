"""The first key of a new database."""

from __future__ import annotations

from datetime import datetime

from billing import accounts as ledger_accounts
from billing import audit
from scheduler.store import accounts
from scheduler.store.pool import Connection

ADMIN_ACCOUNT = "admin"
ADMIN_PLAN = "standard"

# Any fixed number that differs from other users' advisory locks in this database.
_LOCK = 0x6461726C


async def ensure_admin_key(connection: Connection, at: datetime, *, anew: bool = False) -> str | None:
    """Return the text of a new admin key if the database has none, or if another is wanted `anew`, else None.

    Makes the account `admin` if need be. Of two services that start at once, one makes the key. An advisory
    lock is held until the transaction ends.
    """
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        if not anew and await accounts.admin_key_exists(connection):
            return None
        if await accounts.settings(connection, ADMIN_ACCOUNT) is None:
            await ledger_accounts.create(connection, ADMIN_ACCOUNT, ADMIN_PLAN, at)
            await accounts.create_account(connection, ADMIN_ACCOUNT)
        key = await accounts.create_key(connection, ADMIN_ACCOUNT, accounts.Role.ADMIN)
        await audit.record(
            connection,
            actor="service",
            action="CreateApiKey",
            target=f"accounts/{ADMIN_ACCOUNT}/keys/{key.key_id}",
            reason="made by the service at its start",
            request_id=key.key_id,
            before=None,
            after={"role": accounts.Role.ADMIN.value},
            at=at,
        )
        return key.secret
