"""The admin's key that a service makes at its start."""

from __future__ import annotations

from datetime import datetime

from billing import accounts as ledger_accounts
from billing import audit
from scheduler.store import accounts
from scheduler.store.pool import Connection

ADMIN_ACCOUNT = "admin"
ADMIN_PLAN = "standard"
_ACTOR = "service"

# Any fixed number that differs from other users' advisory locks in this database.
_LOCK = 0x6461726C


async def ensure_admin_key(connection: Connection, at: datetime, *, anew: bool = False) -> str | None:
    """Return the text of a new admin key if the database has none, or if another is wanted `anew`, else None.

    Makes the account `admin` if need be. With `anew`, keys that services made before are revoked: whoever
    started one has only the newest in hand. Of two services that start at once on an empty database, one
    makes the key. An advisory lock is held until the transaction ends.
    """
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        if not anew and await accounts.admin_key_exists(connection):
            return None
        if await accounts.settings(connection, ADMIN_ACCOUNT) is None:
            await ledger_accounts.create(connection, ADMIN_ACCOUNT, ADMIN_PLAN, at)
            await accounts.create_account(connection, ADMIN_ACCOUNT)
        for key_id in await _revoke_earlier(connection, at):
            await _record(connection, "RevokeApiKey", key_id, "replaced by the service at its start", at)
        key = await accounts.create_key(connection, ADMIN_ACCOUNT, accounts.Role.ADMIN)
        await _record(connection, "CreateApiKey", key.key_id, "made by the service at its start", at)
        return key.secret


async def _revoke_earlier(connection: Connection, at: datetime) -> list[str]:
    """Revoke the admin keys that services made, and return their ids. Those that people made stay."""
    revoked = await connection.fetch(
        """UPDATE scheduler.api_key SET revoked_at = $1
           WHERE account_id = $2 AND revoked_at IS NULL
             AND EXISTS (SELECT FROM billing.audit_event
                         WHERE actor = $3 AND action = 'CreateApiKey'
                           AND target = 'accounts/' || account_id || '/keys/' || key_id)
           RETURNING key_id""",
        at,
        ADMIN_ACCOUNT,
        _ACTOR,
    )
    return [row["key_id"] for row in revoked]


async def _record(connection: Connection, action: str, key_id: str, reason: str, at: datetime) -> None:
    role = {"role": accounts.Role.ADMIN.value}
    made = action == "CreateApiKey"
    await audit.record(
        connection,
        actor=_ACTOR,
        action=action,
        target=f"accounts/{ADMIN_ACCOUNT}/keys/{key_id}",
        reason=reason,
        request_id=key_id,
        before=None if made else role,
        after=role if made else None,
        at=at,
    )
