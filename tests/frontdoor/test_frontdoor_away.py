"""What callers see while PostgreSQL is away, and that they need do nothing when it is back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scheduler.v1 import job_pb2
from tests.frontdoor.door import Door, refusal


class Relay:
    """A socket between the front door and PostgreSQL that can be cut and mended."""

    def __init__(self, real: Path, folder: Path) -> None:
        self._real = real
        self._path = folder / real.name
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def cut(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_unix_connection(self._real)
        self._writers |= {writer, back_writer}
        await asyncio.gather(self._pass_on(reader, back_writer), self._pass_on(back_reader, writer))
        self._writers -= {writer, back_writer}

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()


@pytest.fixture
async def relay(database: str, tmp_path: Path) -> AsyncIterator[Relay]:
    relay = Relay(_socket_of(database), tmp_path)
    await relay.mend()
    yield relay
    await relay.cut()


def _socket_of(database: str) -> Path:
    (socket,) = Path(parse_qs(urlsplit(database).query)["host"][0]).glob(".s.PGSQL.*[0-9]")
    return socket


@pytest.fixture
def dsn(database: str, relay: Relay, tmp_path: Path) -> str:
    folder = parse_qs(urlsplit(database).query)["host"][0]
    return database.replace(folder, str(tmp_path))


async def test_a_database_that_is_away_is_a_refusal_that_clients_retry(door: Door, relay: Relay) -> None:
    ann = await door.caller("ann")
    request_id = str(uuid.uuid4())
    job = await ann.create(request_id=request_id)
    await relay.cut()
    for call in (ann.create(), ann.get(job.name), ann.cancel(job.name)):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert refused.retry_s == 1
        assert refused.message == "The database does not answer at the moment. Send the same request again."
    await relay.mend()
    assert (await ann.create(request_id=request_id)).uid == job.uid


async def test_a_key_is_not_called_wrong_because_nobody_could_look_it_up(door: Door, relay: Relay) -> None:
    ann = await door.caller("ann")
    await relay.cut()
    assert (await refusal(ann.create())).reason == "OVERLOADED"


async def test_a_watch_that_finds_the_database_away_ends_and_can_be_resumed(door: Door, relay: Relay) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    watch = aiter(ann.watch(job.name))
    first = await anext(watch)
    await anext(watch)
    await relay.cut()
    door.scheduler.update(job.uid)
    assert (await refusal(anext(watch))).reason == "OVERLOADED"
    await relay.mend()
    await ann.cancel(job.name)
    rest = [r.event.state async for r in ann.watch(job.name, after_sequence=first.event.sequence)]
    assert rest == [job_pb2.JOB_STATE_CANCELLED]


async def test_health_says_when_the_database_is_away(door: Door, relay: Relay) -> None:
    health = health_pb2_grpc.HealthStub(door.channel(None))
    watch = aiter(health.Watch(health_pb2.HealthCheckRequest(service="scheduler.v1.JobService")))
    assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
    await relay.cut()
    assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await relay.mend()
    assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
