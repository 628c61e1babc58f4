"""Accounts in a running service, and what tests ask of their jobs."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

import asyncpg

from billing import auditor
from billing.v1 import admin_pb2
from scheduler.client.aio import DarkroomClient, JobHandle
from scheduler.store import invariants
from scheduler.v1.job_pb2 import Job

_PATIENCE_S = 90


@dataclass(frozen=True)
class People:
    """Opens accounts as an admin does."""

    address: str
    admin_key: str

    async def account(self, name: str, plan: str = "standard") -> DarkroomClient:
        """Open an account and return its client."""
        return DarkroomClient(self.address, await self.key(name, plan))

    async def key(self, name: str, plan: str = "standard") -> str:
        """Open an account of that name, with something behind it, and return its key."""
        account_id = f"{name}-{secrets.token_hex(3)}"
        async with DarkroomClient(self.address, self.admin_key) as admin:
            await admin.create_account(plan=f"plans/{plan}", account_id=account_id, reason="a test")
            key = await admin.create_api_key(
                f"accounts/{account_id}", role=admin_pb2.ROLE_USER, reason="a test"
            )
        return key.secret


async def until_step(handle: JobHandle, step: int) -> None:
    """Return once a running attempt has reached a step."""
    async with asyncio.timeout(_PATIENCE_S):
        async for update in handle.watch():
            if update.progress.step >= step:
                return
    raise AssertionError("the job ended before that step")


async def result_of(handle: JobHandle) -> Job:
    """Return the job once it has succeeded."""
    async with asyncio.timeout(_PATIENCE_S):
        return await handle.result()


async def assert_ledger_closes(dsn: str) -> None:
    """Ask every invariant of the whole database, those of a service at rest too, and the auditor."""
    connection = await asyncpg.connect(dsn)
    try:
        assert (
            await invariants.check(connection, invariants=[*invariants.INVARIANTS, *invariants.AT_REST]) == []
        )
        assert await auditor.replay(connection) == []
    finally:
        await connection.close()
