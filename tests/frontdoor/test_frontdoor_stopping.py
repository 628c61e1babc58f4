"""A front door that is told to stop: who asks goes elsewhere, and who was being answered still is."""

from __future__ import annotations

import asyncio

import asyncpg
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.v1 import account_pb2, account_pb2_grpc, job_pb2
from tests.frontdoor.door import Door

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def frontdoor_settings() -> FrontDoorSettings:
    return FrontDoorSettings(port=0, stop_within_ms=60_000, late_max_ms=60_000)


async def until_waits_for_a_lock(connection: asyncpg.Connection) -> None:
    while not await connection.fetchval(
        """SELECT count(*) FROM pg_stat_activity
           WHERE wait_event_type = 'Lock' AND datname = current_database()"""
    ):
        pass


async def test_a_call_in_progress_is_answered_while_no_other_is_taken(
    door: Door, connection: asyncpg.Connection
) -> None:
    ann = await door.caller("ann")
    watch = health_pb2_grpc.HealthStub(door.channel(None)).Watch(health_pb2.HealthCheckRequest())
    assert (await anext(aiter(watch))).status == health_pb2.HealthCheckResponse.SERVING
    held = connection.transaction()
    await held.start()
    await connection.execute("SELECT FROM scheduler.account FOR UPDATE")
    changing = asyncio.ensure_future(
        ann.accounts.UpdateAccount(
            account_pb2.UpdateAccountRequest(
                account=account_pb2.Account(name="accounts/-", mode=job_pb2.TIER_RELAX),
                update_mask={"paths": ["mode"]},
                request_id="7b7b7b7b-0000-4000-8000-000000000000",
            )
        )
    )
    await until_waits_for_a_lock(connection)
    closing = asyncio.create_task(door.close())  # type: ignore[arg-type]
    while (await anext(aiter(watch))).status != NOT_SERVING:
        pass
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async with grpc.aio.insecure_channel(door.address) as channel:
            await account_pb2_grpc.AccountServiceStub(channel).GetAccount(account_pb2.GetAccountRequest())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    watch.cancel()
    await held.rollback()
    assert (await changing).mode == job_pb2.TIER_RELAX
    await closing
