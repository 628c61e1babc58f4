"""Whatever is sent, whoever sends it: an answer or a refusal, never a failure of ours."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

import grpc
import pytest
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from scheduler.answers import QueuesView, WorkerView
from scheduler.frontdoor.auth import ROLE_NEEDED, SERVICES
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.store.accounts import Role
from scheduler.v1 import job_pb2
from tests.frontdoor.door import WORKER, Caller, Door
from tests.frontdoor.test_frontdoor_billing import charge
from tests.security.made_requests import MARK, Requests

METHODS: Mapping[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
}
CALLS = 4_000
SEEDS = [11]
if os.environ.get("DARKROOM_LONG"):
    CALLS = 25_000
    SEEDS = [int.from_bytes(os.urandom(4)) for _ in range(6)]

_A_WORKER = WorkerView(
    worker_id=WORKER,
    idle_since_ms=1_762_776_000_000,
    healthy=True,
    sentence="",
    device="a GPU",
    speed_permille=1_000,
    memory_bytes=10**10,
    memory_used_bytes=10**9,
    warm_models=("small",),
    active=None,
    parked=(),
)
_QUEUES = QueuesView(tiers=(), gpus=1, idle_gpus=0, fast_gpus=1, relax_floor_gpus=0, wanted_gpus=None)

# Refusals that clients get to read. UNAVAILABLE is one, but not of a service that is well.
_EXPECTED = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.ABORTED,
    }
)
_AT_ONCE = 4
# A watch of a job that nothing happens to has nothing to send after this.
_QUIET_S = 0.05


@pytest.fixture
def frontdoor_settings() -> FrontDoorSettings:
    return FrontDoorSettings(port=0, requests_per_second=1_000_000, streams_per_key=1_000)


@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("seed", SEEDS)
async def test_no_request_is_answered_with_a_failure(
    door: Door, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    requests = Requests(seed)
    people = await _a_town(door, requests)
    failures: list[str] = []
    answered: dict[str, Counter[str]] = {path: Counter() for path in METHODS}
    with capture_logs(processors=[structlog.processors.format_exc_info]) as logs:
        for _ in range(CALLS // _AT_ONCE):
            calls = [_Call(door, people, requests) for _ in range(_AT_ONCE)]
            for call, outcome in zip(calls, await asyncio.gather(*(c.made() for c in calls)), strict=True):
                answered[call.path][outcome] += 1
                if call.complaint:
                    failures.append(call.complaint)
            if len(failures) > 20:
                break
            door.clock.pass_s(0.05)
            await people.revive()
    assert not failures, f"seed {seed}, {len(failures)}:\n" + "\n".join(failures[:20]) + _tracebacks(logs)
    assert [log for log in logs if log["log_level"] in ("error", "critical")] == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    # A fuzzer that is always refused at the first line tries nothing. Few requests hit what is rarely there.
    refused = {path: dict(outcomes) for path, outcomes in answered.items() if "OK" not in outcomes}
    assert len(refused) <= len(METHODS) // 5, refused


def _tracebacks(logs: list[dict[str, object]]) -> str:
    found = {log.get("exception", ""): log["event"] for log in logs if log["log_level"] == "error"}
    return "".join(f"\n\n{event}\n{exception}" for exception, event in list(found.items())[:5])


class _Call:
    """One request of somebody to some method."""

    def __init__(self, door: Door, people: _Town, requests: Requests) -> None:
        self.path, method = requests.random.choice(list(METHODS.items()))
        self.wire = requests.one_for(method.input_type)
        self.complaint = ""
        self._who, self._channel = people.somebody(ROLE_NEEDED[self.path], requests)
        self._method = method
        self._requests = requests

    async def made(self) -> str:
        """Send it, and return OK or the reason of the refusal."""
        try:
            async with asyncio.timeout(20):
                await self._send()
        except grpc.aio.AioRpcError as error:
            self.complaint = self._wrong_with(error)
            return self._reason(error)
        except TimeoutError:
            self.complaint = self._told("no answer in 20 s")
            return "TIMEOUT"
        return "OK"

    async def _send(self) -> None:
        answer_of = GetMessageClass(self._method.output_type).FromString
        if not self._method.server_streaming:
            answer = await self._channel.unary_unary(self.path, response_deserializer=answer_of)(self.wire)
            self._requests.learn(answer)
            return
        call = self._channel.unary_stream(self.path, response_deserializer=answer_of)(self.wire)
        try:
            while True:
                async with asyncio.timeout(_QUIET_S):
                    answer = await call.read()
                if answer is grpc.aio.EOF:
                    return
                self._requests.learn(answer)
        except TimeoutError:
            # Still open, and quiet: it is a watch of a job that waits.
            call.cancel()
            with suppress(asyncio.CancelledError):
                await call.code()

    def _reason(self, error: grpc.aio.AioRpcError) -> str:
        status = rpc_status.from_call(error)
        info = error_details_pb2.ErrorInfo()
        if status is None or not status.details or not status.details[0].Unpack(info):
            return error.code().name
        return info.reason

    def _wrong_with(self, error: grpc.aio.AioRpcError) -> str:
        if error.code() not in _EXPECTED:
            return self._told(f"{error.code().name}: {error.details()}")
        status = rpc_status.from_call(error)
        if status is None:
            return self._told(f"no details: {error.code().name}: {error.details()}")
        if status.ByteSize() > 4_096:
            return self._told(f"{status.ByteSize()} bytes of details")
        if MARK in repr(status) or MARK in (error.details() or ""):
            return self._told(f"the prompt in {status}")
        return ""

    def _told(self, what: str) -> str:
        try:
            request = repr(GetMessageClass(self._method.input_type).FromString(self.wire))[:600]
        except Exception:
            request = repr(self.wire)[:300]
        return f"{self.path} by {self._who}: {what}\n    {request}"


class _Town:
    """People of every role, and nobody."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._callers: dict[str, Caller] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._roles = {
            "ann": Role.USER,
            "ben": Role.USER,
            "mo": Role.MODERATOR,
            "otto": Role.OPERATOR,
            "ada": Role.ADMIN,
        }

    async def move_in(self) -> None:
        for name in self._roles:
            await self._give_a_key(name)
        self._channels["nobody"] = self._door.channel(None)
        self._channels["stranger"] = self._door.channel(f"Bearer dk_{'0' * 16}_{'0' * 64}")

    def of(self, name: str) -> Caller:
        return self._callers[name]

    def somebody(self, needed: Role, requests: Requests) -> tuple[str, grpc.aio.Channel]:
        """Return anybody, but mostly somebody whose role is enough."""
        names = list(self._channels)
        if requests.random.random() < 0.8:
            names = [name for name, role in self._roles.items() if role.reaches(needed)]
        name = requests.random.choice(names)
        return name, self._channels[name]

    async def revive(self) -> None:
        """Give whoever was erased, blocked or lost a key by a request a new one."""
        for name in self._roles:
            gone = await self._door.sql(
                """SELECT NOT EXISTS (SELECT FROM scheduler.api_key JOIN scheduler.account USING (account_id)
                                      WHERE account_id = $1 AND key_id = $2 AND revoked_at IS NULL
                                            AND NOT blocked)""",
                self._callers[name].account_id,
                self._callers[name].secret.split("_")[1],
            )
            if gone:
                await self._give_a_key(name)

    async def _give_a_key(self, name: str) -> None:
        role = self._roles[name]
        account_id = name if name not in self._callers else f"{name}-{uuid.uuid4().hex[:6]}"
        caller = await self._door.caller(account_id, role=role, plan="standard")
        self._callers[name] = caller
        self._channels[name] = self._door.channel(f"Bearer {caller.secret}")


async def _a_town(door: Door, requests: Requests) -> _Town:
    """Return people with jobs in every state, whose names the requests know."""
    town = _Town(door)
    await town.move_in()
    door.scheduler.workers = [_A_WORKER]
    door.scheduler.seen_queues = _QUEUES
    await door.plan("pro", self_service=True, price_micros=30_000_000, overage_micros_per_minute=50_000)
    for name in ("ann", "ben"):
        caller = town.of(name)
        made = [await caller.create(f"{MARK} {number}") for number in range(5)]
        waiting, done, failed, cancelled, deleted = made
        # One after the other: they have one worker.
        await door.start(done.uid)
        await door.succeed(done.uid)
        await door.start(failed.uid)
        await door.fail(failed.uid)
        await caller.cancel(cancelled.name)
        await door.start(deleted.uid)
        await door.succeed(deleted.uid)
        await caller.delete(deleted.name)
        for _ in range(2):
            requests.know("charged", await charge(door, caller))
        larger = await caller.upscale(f"{done.name}/images/1", visibility=job_pb2.VISIBILITY_PUBLIC)
        await door.start(larger.uid)
        await door.succeed(larger.uid, pictures=(b"one",))
        for job in (*made, larger):
            requests.know("name", job.name)
            requests.know("name", job.name.replace(name, "-"))
            requests.know("name", f"{job.name}/images/1")
        requests.know("name", f"accounts/{name}")
    await door.start(waiting.uid)
    for text in ("accounts/-", "plans/basic", "plans/standard", "plans/pro", f"workers/{WORKER}"):
        requests.know("name", text)
    return town
