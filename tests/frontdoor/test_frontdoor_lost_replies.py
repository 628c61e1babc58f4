"""The database's answer to a commit is lost: the caller asks again, and what it asked for is done once."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from billing.v1 import admin_pb2
from scheduler.store.accounts import Role
from tests.billing.reply_proxy import Loses, ReplyProxy, proxy_of
from tests.frontdoor.door import Door, refusal


@pytest.fixture
async def proxy(database: str) -> AsyncIterator[ReplyProxy]:
    async with proxy_of(database).open() as proxy:
        yield proxy


@pytest.fixture
def dsn(proxy: ReplyProxy) -> str:
    return proxy.dsn


async def _lost_and_repeated(proxy: ReplyProxy, request_id: str, call: Callable[[], Awaitable[Any]]) -> Any:
    """Make a call whose commit is lost, then its answer; return the answers to the two that came after."""
    for lost, loses in enumerate(Loses, start=1):
        # Of this request: the door's own sweeps commit too.
        proxy.lose_next(loses, of=request_id.encode())
        assert (await refusal(call())).reason == "OVERLOADED"
        assert proxy.lost == lost
    return await call(), await call()


async def test_an_admin_whose_answer_was_lost_asks_again_and_it_was_done_once(
    door: Door, proxy: ReplyProxy
) -> None:
    boss = await door.caller("boss", role=Role.ADMIN)
    await door.caller("ann")
    grant = admin_pb2.AdjustBalanceRequest(
        account="accounts/ann", amount_ms=60_000, reason="sorry", request_id=str(uuid.uuid4())
    )
    first, second = await _lost_and_repeated(proxy, grant.request_id, lambda: boss.admin.AdjustBalance(grant))
    assert first == second
    assert first.available_ms == 54_000_000 + 60_000


async def test_a_job_whose_acceptance_was_lost_is_accepted_once(door: Door, proxy: ReplyProxy) -> None:
    ann = await door.caller("ann")
    request_id = str(uuid.uuid4())
    first, second = await _lost_and_repeated(proxy, request_id, lambda: ann.create(request_id=request_id))
    assert first.uid == second.uid
    assert await door.sql("SELECT count(*) FROM scheduler.job") == 1
