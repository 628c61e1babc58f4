"""Page tokens are not signed: whoever forges one gets another page of what they may see, or a refusal."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from billing.v1 import admin_pb2, billing_pb2
from scheduler.store.accounts import Role
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, read_refusal

VALUES: list[Any] = [
    *(0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 1.5, 1e308, True, None),
    *(
        "",
        "ann",
        "a\0b",
        "\ud800",
        "é" * 10_000,
        "%",
        "1",
        "2026-11-10",
        "00000000-0000-0000-0000-000000000000",
    ),
    *([], {}, [[]], {"a": 1}),
]
FIELDS = ("account", "number", "at_us", "ended_us", "arrival", "job")


def forged(of: str, after: object) -> str:
    return base64.urlsafe_b64encode(json.dumps({"of": of, "after": after}).encode()).decode()


def bound(*binding: object) -> str:
    return hashlib.sha256(repr(binding).encode()).hexdigest()[:16]


@pytest.fixture
async def boss(door: Door) -> Caller:
    return await door.caller("boss", role=Role.ADMIN)


async def test_a_forged_token_is_a_page_or_a_refusal(door: Door, boss: Caller) -> None:
    await door.caller("ann")
    lists: list[tuple[Any, type[Message], str]] = [
        (boss.admin.ListAccounts, admin_pb2.ListAccountsRequest, bound("accounts", None)),
        (boss.admin.ListAuditEvents, admin_pb2.ListAuditEventsRequest, bound("audit", "", "", None, None)),
        (boss.billing.ListTransfers, billing_pb2.ListTransfersRequest, bound("transfers", "")),
        (boss.jobs.ListJobs, job_pb2.ListJobsRequest, bound("boss")),
        (boss.jobs.ListFeed, job_pb2.ListFeedRequest, bound("feed", False)),
    ]
    for call, request, of in lists:
        read = 0
        for value in VALUES:
            right = {"account": "ann", "number": 1, "job": str(uuid.UUID(int=1))}
            for after in (value, dict.fromkeys(FIELDS, value), right | {"at_us": value, "ended_us": value}):
                reason = await _reason(call(request(page_token=forged(of, after))))
                assert reason in ("", "INVALID_PARAMETER"), (request, after)
                read += not reason
        assert read, f"no token of {request} was right, so its binding is another by now"


async def _reason(call: Awaitable[Any]) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return read_refusal(error).reason
    return ""


@pytest.mark.parametrize(
    "token",
    ["x", "é", "\ud7ff", "=", "e30=", "bnVsbA==", "W10=", "MQ==", "W1tbW1s=", "[" * 9_000, "A" * 9_000],
)
async def test_what_is_no_token_is_refused(door: Door, boss: Caller, token: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await boss.admin.ListAccounts(admin_pb2.ListAccountsRequest(page_token=token))
    assert read_refusal(caught.value).violations.keys() == {"page_token"}
