"""Who may call what, how fast, and how soon a revoked key stops working."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from scheduler.frontdoor.auth import ROLE_NEEDED, SERVICES, OpenStream, every_method_has_a_role
from scheduler.refusals import Unauthenticated
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.store.accounts import Role
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, read_refusal, refusal

METHODS = {
    f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
}


@pytest.fixture
def frontdoor_settings() -> FrontDoorSettings:
    return FrontDoorSettings(port=0, requests_per_second=25, streams_per_key=2, late_max_ms=60_000)


def test_every_method_says_which_role_it_needs() -> None:
    every_method_has_a_role()
    assert METHODS.keys() == ROLE_NEEDED.keys()
    assert {path for path, role in ROLE_NEEDED.items() if role is Role.ADMIN} == {
        path for path in METHODS if "AdminService" in path and not path.endswith("/ListAuditEvents")
    }


@pytest.mark.parametrize("role", list(Role))
async def test_a_role_opens_its_own_methods_and_no_others(door: Door, role: Role) -> None:
    caller = await door.caller("ann", role=role)
    for path, needed in ROLE_NEEDED.items():
        refused = await _call(door, path, f"Bearer {caller.secret}")
        if role.reaches(needed):
            assert refused is None or refused[1] != "ROLE_REQUIRED", path
        else:
            assert refused == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED"), path


async def test_without_a_valid_key_every_method_answers_with_the_same_bytes(door: Door) -> None:
    ann = await door.caller("ann")
    _, key_id, secret = ann.secret.split("_")
    revoked = await door.caller("ann")
    await door.sql(
        "UPDATE scheduler.api_key SET revoked_at = now() WHERE key_id = $1 RETURNING 1",
        revoked.secret.split("_")[1],
    )
    given = [
        None,
        "",
        "Bearer",
        ann.secret,
        f"Basic {ann.secret}",
        f"Bearer dk_{key_id}",
        f"Bearer dk_{key_id}_{secret[:-1]}{'0' if secret[-1] != '0' else '1'}",
        f"Bearer dk_{'0' * 16}_{secret}",
        f"Bearer dk_{key_id}_{secret}0",
        f"Bearer {revoked.secret}",
    ]
    answers = set()
    for authorization in given:
        for path in ROLE_NEEDED:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _answer(door, path, authorization)
            refused = read_refusal(caught.value)
            assert refused.code is grpc.StatusCode.UNAUTHENTICATED, (path, authorization)
            answers.add((refused.raw, refused.reason, refused.message))
    assert len(answers) == 1
    ((_, reason, message),) = answers
    assert reason == "UNAUTHENTICATED"
    assert message.startswith("Send a valid API key as `authorization: Bearer dk_…`")


async def test_a_revoked_key_works_for_a_second_at_most(door: Door) -> None:
    ann = await door.caller("ann")
    await ann.create()
    await door.sql("UPDATE scheduler.api_key SET revoked_at = now() RETURNING 1")
    door.clock.pass_s(1.0)
    assert (await refusal(ann.create())).reason == "UNAUTHENTICATED"


async def test_a_key_that_asks_too_often_is_told_when_to_come_back(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    burst = 4 * 25
    for _ in range(burst):
        await ann.jobs.ListFeed(job_pb2.ListFeedRequest())
    refused = await refusal(ann.jobs.ListFeed(job_pb2.ListFeedRequest()))
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert refused.message == "This key sends more than 25 requests a second: slow down."
    assert refused.retry_s is not None
    assert 0.04 <= refused.retry_s <= 0.05
    await ben.jobs.ListFeed(job_pb2.ListFeedRequest())  # another key is not held up
    door.clock.pass_s(refused.retry_s)
    await ann.jobs.ListFeed(job_pb2.ListFeedRequest())


async def watching(caller: Caller) -> AsyncIterator[job_pb2.WatchJobResponse]:
    """Return what is still to come of an open watch of a waiting job."""
    job = await caller.create(tier=job_pb2.TIER_RELAX)
    messages = aiter(caller.watch(job.name))
    await anext(messages)
    return messages


async def its_end(messages: AsyncIterator[job_pb2.WatchJobResponse]) -> None:
    async for _ in messages:
        pass


@pytest.mark.parametrize(
    ("statement", "code", "reason"),
    [
        (
            "UPDATE scheduler.api_key SET revoked_at = now()",
            grpc.StatusCode.UNAUTHENTICATED,
            "UNAUTHENTICATED",
        ),
        ("DELETE FROM scheduler.api_key", grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
        ("UPDATE scheduler.account SET blocked = true", grpc.StatusCode.PERMISSION_DENIED, "ACCOUNT_BLOCKED"),
    ],
    ids=["revoked", "erased", "blocked"],
)
async def test_open_streams_end_with_their_key(
    door: Door, statement: str, code: grpc.StatusCode, reason: str
) -> None:
    ann = await door.caller("ann")
    messages = await watching(ann)
    door.clock.pass_s(15)
    await door.doorman.look_again()
    await door.sql(f"{statement} RETURNING 1")
    door.clock.pass_s(15)
    await door.doorman.look_again()
    refused = await refusal(its_end(messages))
    assert (refused.code, refused.reason) == (code, reason)
    assert door.metrics.registry.get_sample_value("darkroom_watch_streams") == 0


async def test_streams_of_good_keys_go_on_beside_one_that_was_revoked(door: Door) -> None:
    ann, ben = await door.caller("ann"), await door.caller("ben")
    hers, his = await watching(ann), await watching(ben)
    await door.sql("UPDATE scheduler.api_key SET revoked_at = now() WHERE account_id = 'ann' RETURNING 1")
    door.clock.pass_s(15)
    await door.doorman.look_again()
    assert (await refusal(its_end(hers))).code is grpc.StatusCode.UNAUTHENTICATED
    ended = asyncio.create_task(its_end(his))
    await door.close()
    with pytest.raises(grpc.aio.AioRpcError) as closed:
        await ended
    assert closed.value.code() is grpc.StatusCode.UNAVAILABLE, "it was open until then"


async def test_a_download_ends_before_its_next_piece_when_its_key_was_revoked() -> None:
    stream = OpenStream()
    async with stream.kept():
        pass
    stream.end(Unauthenticated())
    with pytest.raises(Unauthenticated):
        async with stream.kept():
            raise AssertionError("nothing more is read")


async def test_a_timeout_of_what_is_awaited_is_not_taken_for_the_end_of_a_key() -> None:
    with pytest.raises(TimeoutError):
        async with OpenStream().kept():
            raise TimeoutError


async def test_a_key_has_so_many_streams_open_and_no_more(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    watches = [ann.watch(job.name) for _ in range(2)]
    for watch in watches:
        await watch.read()
    refused = await refusal(anext(aiter(ann.watch(job.name))))
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert "2 open streams" in refused.message
    assert door.metrics.registry.get_sample_value("darkroom_watch_streams") == 2
    await ann.cancel(job.name)  # ends the watches, also for the count
    door.scheduler.update(job.uid)
    for watch in watches:
        while await watch.read() is not grpc.aio.EOF:
            pass
    assert [response async for response in ann.watch(job.name)]


async def _call(door: Door, path: str, authorization: str | None) -> tuple[grpc.StatusCode, str] | None:
    try:
        await _answer(door, path, authorization)
    except grpc.aio.AioRpcError as error:
        refused = read_refusal(error)
        return refused.code, refused.reason
    return None


async def _answer(door: Door, path: str, authorization: str | None) -> None:
    """Call a method with an empty request."""
    channel = door.channel(None)
    metadata = None if authorization is None else (("authorization", authorization),)
    if METHODS[path].server_streaming:
        async for _ in channel.unary_stream(path)(b"", metadata=metadata):
            pass
    else:
        await channel.unary_unary(path)(b"", metadata=metadata)
