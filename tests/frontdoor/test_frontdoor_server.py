"""The socket itself: ports, reflection, and pings that are not answered with a goodbye."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gpu_worker.models import Models
from scheduler.frontdoor.server import CannotListen, serve
from scheduler.metrics import FrontDoorMetrics
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.settings import Settings
from scheduler.store.pool import Pool, open_pool
from scheduler.v1 import job_pb2, job_pb2_grpc
from tests.frontdoor.door import PLANS, Door, SmallScheduler


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database, 2)
    yield pool
    await pool.close()


def _serve(pool: Pool, models: Models, folder: Path, frontdoor: FrontDoorSettings):  # type: ignore[no-untyped-def]
    settings = Settings(data_dir=folder, frontdoor=frontdoor)
    return serve(settings, pool, SmallScheduler(), models, FrontDoorMetrics(PLANS))


async def test_anybody_may_ask_for_health_and_reflection(door: Door) -> None:
    channel = door.channel(None)
    health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await anext(aiter(call))
    assert {service.name for service in answer.list_services_response.service} >= {
        "scheduler.v1.JobService",
        "scheduler.v1.AccountService",
        "billing.v1.BillingService",
        "billing.v1.AdminService",
        "grpc.health.v1.Health",
    }


async def test_a_method_that_does_not_exist_is_unimplemented(door: Door) -> None:
    call = door.channel("Bearer x").unary_unary("/scheduler.v1.JobService/Frobnicate")(b"")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_port_is_not_shared(pool: Pool, models: Models, tmp_path: Path) -> None:
    async with _serve(pool, models, tmp_path, FrontDoorSettings(port=0)) as first:
        with pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1:{first.port}"):
            async with _serve(pool, models, tmp_path, FrontDoorSettings(port=first.port)):
                pass


async def test_a_client_that_pings_often_keeps_its_quiet_watch(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with grpc.aio.insecure_channel(door.address, options=options) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        watch = aiter(
            stub.WatchJob(
                job_pb2.WatchJobRequest(name=job.name), metadata=(("authorization", f"Bearer {ann.secret}"),)
            )
        )
        await anext(watch)
        await anext(watch)
        silent = asyncio.ensure_future(anext(watch))
        with pytest.raises(TimeoutError):  # nothing came: neither an event nor a GOAWAY
            await asyncio.wait_for(asyncio.shield(silent), 1.0)
        await ann.cancel(job.name)
        door.scheduler.update(job.uid)
        assert (await silent).event.state == job_pb2.JOB_STATE_CANCELLED
