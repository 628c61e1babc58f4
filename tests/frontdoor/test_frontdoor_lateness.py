"""A front door knows how long calls wait before it looks at them, and takes on nothing new while they do."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from scheduler.frontdoor.admission import Admission
from scheduler.frontdoor.lateness import Lateness, private_socket
from scheduler.refusals import Overloaded
from scheduler.settings import FrontDoor as FrontDoorSettings
from tests.frontdoor.door import Door, read_refusal

CREATE, GET = (f"/scheduler.v1.JobService/{method}" for method in ("CreateJob", "GetJob"))


@pytest.fixture
def frontdoor_settings() -> FrontDoorSettings:
    return FrontDoorSettings(
        port=0, requests_per_second=100_000, calls_at_once=10_000, submissions_at_once=10_000, late_max_ms=10
    )


def test_while_calls_wait_long_nothing_is_submitted_and_everything_else_goes_on() -> None:
    def admission(late_ms: int) -> Admission:
        return Admission(FrontDoorSettings(late_max_ms=250), late_ms=lambda: late_ms)

    admission(250).refuse_if_late(CREATE)
    admission(251).refuse_if_late(GET)
    with pytest.raises(Overloaded) as refused:
        admission(251).refuse_if_late(CREATE)
    assert 0 < refused.value.retry_after_ms <= 2_000


async def test_a_knock_waits_until_the_door_looks_and_tells_how_long() -> None:
    now_s = 100.0
    lateness = Lateness(now_s=lambda: now_s)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    with private_socket(server) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            assert lateness.ms() == 0
            knock = asyncio.create_task(lateness.knock(channel))
            while lateness.ms() == 0:
                await asyncio.sleep(0)
                now_s += 0.1
            waited_ms = lateness.ms()
            now_s += 0.4
            assert lateness.ms() == waited_ms + 400
            await server.start()
            await knock
            now_s += 7
            assert lateness.ms() == waited_ms + 400, "that of the last knock, until the next"
            await lateness.knock(channel)
            assert lateness.ms() == 0
            await server.stop(None)


async def test_a_door_that_cannot_keep_up_refuses_until_it_can(door: Door) -> None:
    ann = await door.caller("ann")

    async def refusals_of(submissions: int) -> list[str]:
        answers = await asyncio.gather(
            *(ann.create(validate_only=True) for _ in range(submissions)), return_exceptions=True
        )
        return [read_refusal(one).message for one in answers if isinstance(one, grpc.aio.AioRpcError)]

    async with asyncio.timeout(60):
        while not (refused := await refusals_of(200)):
            pass
        assert all("is behind" in message for message in refused)
        while await refusals_of(1):
            pass
