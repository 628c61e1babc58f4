"""What one caller may take of a front door, with a key and without, and that nobody else notices."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack

import asyncpg
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from scheduler.frontdoor.auth import Doorman
from scheduler.refusals import RateLimited, Unauthenticated
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.store.accounts import Role
from scheduler.store.pool import Pool, open_pool
from scheduler.v1 import fleet_pb2, job_pb2, job_pb2_grpc
from tests.frontdoor.door import Door, read_refusal, refusal

BURST = 4 * 5
PATH = "/scheduler.v1.JobService/ListFeed"


@pytest.fixture
def frontdoor_settings() -> FrontDoorSettings:
    return FrontDoorSettings(
        port=0,
        requests_per_second=5,
        streams_per_key=100,
        streams_per_connection=3,
        connection_age_ms=1_000,
        max_message_bytes=64 * 1024,
    )


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


# -- with a key --------------------------------------------------------------------------------------------


async def test_calls_that_a_role_does_not_open_count_too(door: Door) -> None:
    ann = await door.caller("ann")
    for _ in range(BURST):
        refused = await refusal(ann.fleet.GetQueues(fleet_pb2.GetQueuesRequest()))
        assert refused.reason == "ROLE_REQUIRED"
    refused = await refusal(ann.fleet.GetQueues(fleet_pb2.GetQueuesRequest()))
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert refused.retry_s is not None
    assert 0.19 <= refused.retry_s <= 0.21


async def test_calls_of_a_blocked_account_count_too(door: Door) -> None:
    ann = await door.caller("ann")
    await door.sql("UPDATE scheduler.account SET blocked = true")
    reasons = [(await refusal(ann.jobs.ListFeed(job_pb2.ListFeedRequest()))).reason for _ in range(BURST + 1)]
    assert reasons == ["ACCOUNT_BLOCKED"] * BURST + ["RATE_LIMITED"]


async def test_bytes_that_are_no_message_count_too(door: Door) -> None:
    ann = await door.caller("ann")
    send = door.channel(None).unary_unary(PATH)
    reasons = []
    for _ in range(BURST + 1):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(b"\xff\xff\xff", metadata=bearer(ann.secret))
        reasons.append(read_refusal(caught.value).reason)
    assert reasons == ["INVALID_PARAMETER"] * BURST + ["RATE_LIMITED"]


async def test_a_message_above_the_limit_is_not_taken(door: Door) -> None:
    ann = await door.caller("ann")
    for prompt, code in (("x" * 65_000, "INVALID_ARGUMENT"), ("x" * 66_000, "RESOURCE_EXHAUSTED")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ann.create(prompt)
        assert caught.value.code().name == code


async def test_a_message_that_grows_above_the_limit_is_not_taken(door: Door) -> None:
    ann = await door.caller("ann")
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(
        door.address, compression=grpc.Compression.Gzip, options=options
    ) as channel:
        request = job_pb2.CreateJobRequest(
            request_id=str(uuid.uuid4()), imagine=job_pb2.Imagine(pictures=[bytes(32 * 2**20)])
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await job_pb2_grpc.JobServiceStub(channel).CreateJob(request, metadata=bearer(ann.secret))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_above_the_limit_is_not_taken(door: Door) -> None:
    ann = await door.caller("ann")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.channel(None).unary_unary(PATH)(
            b"", metadata=(*bearer(ann.secret), ("x-something", "x" * 64 * 1024))
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_stream_whose_deadline_has_passed_counts_no_more(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    for _ in range(3):  # as many as the connection may have: a fourth would wait for one that is left
        watch = ann.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name), timeout=0.2)
        assert await watch.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await ann.get(job.name)).uid == job.uid
    assert door.metrics.registry.get_sample_value("darkroom_watch_streams") == 0


async def test_further_calls_on_one_connection_wait_until_others_end(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    watches = [ann.watch(job.name) for _ in range(3)]
    for watch in watches:
        await watch.read()
    waiting = asyncio.ensure_future(ann.get(job.name))
    async with grpc.aio.insecure_channel(
        door.address, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as another:
        stub = job_pb2_grpc.JobServiceStub(another)
        await stub.GetJob(job_pb2.GetJobRequest(name=job.name), metadata=bearer(ann.secret))
    assert not waiting.done()
    watches[0].cancel()
    assert (await waiting).uid == job.uid


async def test_old_connections_are_replaced_and_what_is_open_on_them_goes_on(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    async with grpc.aio.insecure_channel(door.address) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        watch = stub.WatchJob(job_pb2.WatchJobRequest(name=job.name), metadata=bearer(ann.secret))
        await watch.read()
        await watch.read()
        assert channel.get_state() is grpc.ChannelConnectivity.READY
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        await stub.GetJob(job_pb2.GetJobRequest(name=job.name), metadata=bearer(ann.secret))
        await ann.cancel(job.name)
        door.scheduler.update(job.uid)
        event = (await watch.read()).event
        assert event.state == job_pb2.JOB_STATE_CANCELLED


# -- without -----------------------------------------------------------------------------------------------


class TestWhileConnectionsLast:
    """None is replaced before the test ends."""

    @pytest.fixture
    def frontdoor_settings(self) -> FrontDoorSettings:
        return FrontDoorSettings(port=0, streams_per_connection=3)

    async def test_streams_of_strangers_are_so_many_from_one_address(self, door: Door) -> None:
        channels = [
            grpc.aio.insecure_channel(door.address, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(5)
        ]
        try:
            open_ones = []
            for number in range(10):
                stub = health_pb2_grpc.HealthStub(channels[number // 3])
                open_ones.append(stub.Watch(health_pb2.HealthCheckRequest()))
                await open_ones[-1].read()
            fresh = channels[-1]
            for one_too_many in (
                health_pb2_grpc.HealthStub(fresh).Watch(health_pb2.HealthCheckRequest()),
                reflection_pb2_grpc.ServerReflectionStub(fresh).ServerReflectionInfo(_questions()),
            ):
                refused = await refusal(one_too_many.read())
                assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
                assert refused.retry_s == 1
            health = await health_pb2_grpc.HealthStub(fresh).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING, "probes go on"
            ann = await door.caller("ann")
            await ann.create()
        finally:
            for channel in channels:
                await channel.close()


async def test_streams_of_strangers_end_when_a_connection_would(door: Door) -> None:
    channel = door.channel(None)
    ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    talk = ask()
    await talk.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    await talk.read()
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    await watch.read()
    for stream in (talk, watch):
        ended = await refusal(stream.read())
        assert (ended.code, ended.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")


def test_streams_of_strangers_are_so_many_together_and_few_of_one_network(pool: Pool) -> None:
    doorman = Doorman(pool, requests_per_second=1, streams_per_key=1, now_s=lambda: 0.0)
    with ExitStack() as open_ones:

        def opened(peer: str, times: int) -> int:
            """Return how many of so many streams are let in."""
            for let_in in range(times):
                try:
                    open_ones.enter_context(doorman.stream_of_a_stranger(f"{peer}:{40_000 + let_in}"))
                except RateLimited:
                    return let_in
            return times

        assert opened("ipv4:192.0.2.7", 11) == 10
        assert opened("ipv4:192.0.2.8", 9) == 9
        assert opened("ipv6:%5B2001:db8:0:1::7%5D", 6) == 6
        assert opened("ipv6:%5B2001:db8:0:1:ffff::%5D", 6) == 4, "one network of one household"
        assert opened("ipv6:%5B2001:db8:0:2::7%5D", 1) == 1
        assert opened("ipv6:%5B::ffff:192.0.2.8%5D", 2) == 1
        assert opened("ipv6:%5Bfe80::1%25eth0%5D", 1) == 1
        assert opened("unix", 1) == 1
        assert sum(opened(f"ipv4:198.51.100.{host}", 10) for host in range(10)) == 100 - 33
    with doorman.stream_of_a_stranger("ipv4:192.0.2.7:40000"):
        pass


async def _questions() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    yield reflection_pb2.ServerReflectionRequest(list_services="")


async def test_bytes_that_are_no_message_are_refused_without_a_key_too(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    channel = door.channel(None)
    for call in (
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff"),
        channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff").read(),
        channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(
            iter([b"\xff"])
        ).read(),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
    for path in (PATH, "/scheduler.v1.JobService/WatchJob"):
        refused = await refusal(channel.unary_stream(path)(b"\xff").read())
        assert refused.reason == "UNAUTHENTICATED", "before anything is said of the message"
    assert caplog.records == [], "or anybody could fill the log"


# -- the database ------------------------------------------------------------------------------------------


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database, 2)
    yield pool
    await pool.close()


class Reads:
    """A doorman, and how often it went to the database."""

    def __init__(self, pool: Pool) -> None:
        self.count = 0
        self.now_s = 0.0
        self.doorman = Doorman(pool, requests_per_second=1e6, streams_per_key=1, now_s=lambda: self.now_s)
        pool.observe_waits(self._lent)

    def _lent(self, _: float) -> None:
        self.count += 1

    async def admitted(self, *secrets: str) -> list[bool]:
        """Ask with each of these keys, all at once."""
        asked = [self.doorman.admit(PATH, bearer(secret)) for secret in secrets]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert all(
            isinstance(answer, Unauthenticated) for answer in answers if isinstance(answer, BaseException)
        )
        return [not isinstance(answer, BaseException) for answer in answers]


def made_up(count: int) -> list[str]:
    return [f"dk_{number:016x}_{'0' * 64}" for number in range(count)]


async def test_a_flood_of_made_up_keys_is_one_question_at_a_time(door: Door, pool: Pool) -> None:
    ann = await door.caller("ann")
    reads = Reads(pool)
    assert await reads.admitted(*made_up(1_000), ann.secret) == [False] * 1_000 + [True]
    assert reads.count == 1, "with a good key in the middle of them"
    assert not any(await reads.admitted(*made_up(1_000)))
    assert reads.count == 1, "what is not there is remembered too"
    reads.now_s += 1.0
    assert not any(await reads.admitted(*made_up(1_000)))
    assert reads.count == 2


async def test_a_flood_of_made_up_keys_makes_no_good_one_forgotten(door: Door, pool: Pool) -> None:
    ann = await door.caller("ann")
    reads = Reads(pool)
    assert await reads.admitted(ann.secret) == [True]
    assert not any(await reads.admitted(*made_up(10_001)))
    assert not any(await reads.admitted(*made_up(10_001)))
    before = reads.count
    assert await reads.admitted(ann.secret) == [True]
    assert reads.count == before


async def test_a_wrong_secret_and_an_unknown_id_ask_the_database_alike(door: Door, pool: Pool) -> None:
    ann = await door.caller("ann")
    reads = Reads(pool)
    wrong, unknown = f"{ann.secret[:-64]}{'0' * 64}", made_up(1)[0]
    for secret in (wrong, unknown):
        before = reads.count
        for _ in range(3):
            assert await reads.admitted(secret) == [False]
        assert reads.count == before + 1


async def test_a_key_that_changes_while_it_is_read_is_read_again(door: Door, pool: Pool) -> None:
    ann = await door.caller("ann", role=Role.ADMIN)
    reads = Reads(pool)

    def revoked_elsewhere_in_this_door(_: float) -> None:
        reads.count += 1
        if reads.count == 1:
            reads.doorman.forget("ann")

    pool.observe_waits(revoked_elsewhere_in_this_door)
    assert await reads.admitted(ann.secret) == [True]
    assert reads.count == 2


async def test_a_database_that_fails_is_told_to_everybody_who_waits(door: Door, pool: Pool) -> None:
    ann = await door.caller("ann")
    reads = Reads(pool)
    await door.sql("ALTER TABLE scheduler.api_key RENAME TO elsewhere")
    asked = [reads.doorman.admit(PATH, bearer(ann.secret)) for _ in range(3)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(answer) for answer in answers} == {asyncpg.UndefinedTableError}
    await door.sql("ALTER TABLE scheduler.elsewhere RENAME TO api_key")
    assert await reads.admitted(ann.secret) == [True], "and asked again"


async def test_who_goes_away_takes_nobodys_answer_along(door: Door, pool: Pool) -> None:
    ann = await door.caller("ann")
    reads = Reads(pool)
    first, second = (asyncio.create_task(reads.doorman.admit(PATH, bearer(ann.secret))) for _ in range(2))
    await asyncio.sleep(0)  # both have asked
    first.cancel()
    assert (await second).account_id == "ann"
    assert first.cancelled()
