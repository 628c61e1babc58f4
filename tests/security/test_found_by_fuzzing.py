"""What made-up requests have broken: each as the request that did it, told plainly."""

from __future__ import annotations

import uuid

import grpc
import pytest

from billing.v1 import admin_pb2
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.deletions import Deletions
from scheduler.store.accounts import Role
from tests.frontdoor.door import Caller, Door, refusal


@pytest.fixture
async def boss(door: Door) -> Caller:
    return await door.caller("boss", role=Role.ADMIN)


def erasure(name: str) -> admin_pb2.EraseAccountRequest:
    return admin_pb2.EraseAccountRequest(request_id=str(uuid.uuid4()), name=name, reason="asked for")


async def test_who_was_erased_is_not_erased_again_and_no_sweep_fails_of_it(door: Door, boss: Caller) -> None:
    """It was noted as to be erased once more, and every front door ended at that note, also a new one."""
    await door.caller("ann")
    erased = await boss.admin.EraseAccount(erasure("accounts/ann"))
    assert erased.name != "accounts/ann"
    refused = await refusal(boss.admin.EraseAccount(erasure(erased.name)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ACCOUNT_ERASED")
    assert (await refusal(boss.admin.EraseAccount(erasure("accounts/ann")))).reason == "UNKNOWN_ACCOUNT"
    assert not await door.sql("SELECT bool_or(erasing) FROM scheduler.account")
    await Deletions(door.pool, Artifacts(f"file://{door.artifacts}"), lambda: door.clock.now).sweep()


async def test_a_word_behind_a_parameter_is_not_repeated(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create("a boat --fast ashamedsecret --seed 1 ashamedsecret"))
    assert refused.violations.keys() == {"--fast", "--seed"}
    assert b"ashamedsecret" not in refused.raw


async def test_bytes_that_are_no_message_are_a_mistake_of_the_caller(
    door: Door, boss: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    for wire in (b"\xff", b"\x0b" * 5_000, b"\x0a\x03\xed\xa0\x80", b"\x0a\xff\xff\xff\xff\x0f"):
        call = door.channel(f"Bearer {boss.secret}").unary_unary("/scheduler.v1.JobService/CreateJob")
        refused = await refusal(call(wire))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")
        assert refused.violations == {"request": "request is no scheduler.v1.CreateJobRequest."}
    assert caplog.records == []
    labels = {"tier": "fast", "outcome": "rejected", "reason": "invalid_parameter"}
    assert door.metrics.registry.get_sample_value("darkroom_submissions_total", labels) == 4
