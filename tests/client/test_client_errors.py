"""Errors: one class for each reason, with what happened, what it means and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest

from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import (
    REFUSALS,
    DarkroomError,
    ExitCode,
    FastTimeExhausted,
    InvalidParameter,
    ModerationRejected,
    NoAnswerInTime,
    Overloaded,
    Refusal,
    ServiceFailed,
    Violation,
)
from tests.client.scripted_service import UID, Refuse, ScriptedService


async def refused(service: ScriptedService, client: DarkroomClient, answer: Refuse) -> DarkroomError:
    """The error that a call raises for an answer of the service."""
    service.says("GetJob", *[answer] * 5)
    with pytest.raises(DarkroomError) as caught:
        await client.get(UID)
    return caught.value


@pytest.mark.parametrize("reason", sorted(REFUSALS))
async def test_each_reason_has_its_class_and_says_three_things(
    service: ScriptedService, client: DarkroomClient, reason: str
) -> None:
    code = grpc.StatusCode.FAILED_PRECONDITION
    error = await refused(
        service, client, Refuse(code=code, reason=reason, sentence="Ten jobs are accepted.")
    )
    assert type(error) is REFUSALS[reason]
    assert error.stable_reason == reason
    happened, meaning, advice = str(error).splitlines()
    assert happened == "Ten jobs are accepted."
    assert meaning == error.meaning
    assert advice == error.advice
    assert meaning.endswith(".")
    assert advice.endswith(".")


def test_every_reason_of_the_service_has_a_class_here() -> None:
    root = Path(__file__).parents[2]
    theirs: set[str] = set()
    for file in ("scheduler/refusals.py", "billing/refusals.py"):
        theirs |= set(re.findall(r' reason = "([A-Z_]+)"', (root / file).read_text(encoding="utf-8")))
    assert len(theirs) > 10
    assert theirs <= set(REFUSALS)


async def test_a_reason_of_a_newer_service_is_still_readable(
    service: ScriptedService, client: DarkroomClient
) -> None:
    answer = Refuse(
        code=grpc.StatusCode.ABORTED, reason="MOON_IN_THE_WAY", sentence="The moon is in the way."
    )
    error = await refused(service, client, answer)
    assert type(error) is Refusal
    assert error.stable_reason == "MOON_IN_THE_WAY"
    assert str(error).startswith("The moon is in the way.")
    assert error.exit_code is ExitCode.REFUSED


async def test_all_violations_are_said_with_their_fields(
    service: ScriptedService, client: DarkroomClient
) -> None:
    violations = {"prompt": "--hue is not a parameter; did you mean --h?", "request_id": "must be a UUID"}
    answer = Refuse(code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_PARAMETER", violations=violations)
    error = await refused(service, client, answer)
    assert isinstance(error, InvalidParameter)
    assert error.details.violations == tuple(
        Violation(field=name, sentence=sentence) for name, sentence in violations.items()
    )
    assert str(error).startswith("No.")
    assert "prompt: --hue is not a parameter; did you mean --h?" in str(error).splitlines()


async def test_a_sentence_that_repeats_the_violations_is_not_said_twice(
    service: ScriptedService, client: DarkroomClient
) -> None:
    answer = Refuse(
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_PARAMETER",
        sentence="Too long. Too wide.",
        violations={"prompt": "Too long.", "imagine.prompt": "Too wide."},
    )
    error = await refused(service, client, answer)
    assert str(error).splitlines()[:2] == ["prompt: Too long.", "imagine.prompt: Too wide."]
    assert "Too long. Too wide." not in str(error)


async def test_numbers_of_a_refusal_are_there_for_programs(
    service: ScriptedService, client: DarkroomClient
) -> None:
    answer = Refuse(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="FAST_TIME_EXHAUSTED", metadata={"remaining_ms": "12"}
    )
    error = await refused(service, client, answer)
    assert isinstance(error, FastTimeExhausted)
    assert error.details.metadata == {"remaining_ms": "12"}
    assert error.details.retry_after_ms is None


async def test_a_moderation_refusal_keeps_its_category(
    service: ScriptedService, client: DarkroomClient
) -> None:
    answer = Refuse(
        code=grpc.StatusCode.INVALID_ARGUMENT, reason="MODERATION_REJECTED", metadata={"category": "gore"}
    )
    error = await refused(service, client, answer)
    assert isinstance(error, ModerationRejected)
    assert error.details.metadata["category"] == "gore"


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, ServiceFailed, ExitCode.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, NoAnswerInTime, ExitCode.UNAVAILABLE),
    ],
)
async def test_an_answer_without_a_reason_is_the_services_trouble(
    service: ScriptedService,
    client: DarkroomClient,
    code: grpc.StatusCode,
    kind: type[DarkroomError],
    exit_code: ExitCode,
) -> None:
    error = await refused(service, client, Refuse(code=code, sentence="Id 7f3a."))
    assert type(error) is kind
    assert error.exit_code is exit_code
    assert service.address in str(error)


async def test_a_bug_of_the_service_is_its_trouble_and_keeps_the_id_to_look_for(
    service: ScriptedService, client: DarkroomClient
) -> None:
    answer = Refuse(code=grpc.StatusCode.INTERNAL, reason="INTERNAL", sentence="Tell them this id: 7f3a.")
    error = await refused(service, client, answer)
    assert type(error) is ServiceFailed
    assert "7f3a" in str(error)


def test_only_trouble_that_may_pass_is_tried_again() -> None:
    assert [each.__name__ for each in REFUSALS.values() if each.retried] == [Overloaded.__name__]
