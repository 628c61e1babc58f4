"""A classifier judges what rules let through; while it fails, nothing is let through unless one says so."""

from __future__ import annotations

import grpc
import pytest
from structlog.testing import capture_logs

from scheduler.frontdoor.moderation_classifier import ClassifierUnusable, classification
from scheduler.refusals import Overloaded
from scheduler.settings import Moderation as ModerationSettings
from tests.frontdoor.door import Door, refusal


@pytest.fixture
def moderation_settings() -> ModerationSettings:
    return settings()


def settings(name: str = "classify", **fields: object) -> ModerationSettings:
    return ModerationSettings.model_validate(
        {"classifier": f"tests.frontdoor.small_classifier:{name}", "classifier_ms": 100, **fields}
    )


async def judged(text: str, **fields: object) -> str | None:
    found = classification(settings(**fields))
    assert found is not None
    return await found.category(text)


async def test_a_prompt_is_refused_by_the_classifier_and_only_by_its_words(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create("a shark and shark --w 256 --h 256"))
    assert (refused.reason, refused.metadata) == ("MODERATION_REJECTED", {"category": "sharks"})
    assert "sharks" in refused.violations["prompt"]
    await ann.create("one shark in a sea of other words --seed 1")
    await ann.create("a fox --seed 1")
    assert (await refusal(ann.create("gore"))).metadata == {"category": "gore"}, "rules come first"


@pytest.mark.parametrize("prompt", ["flunk", "dawdle", "babble"])
async def test_while_the_classifier_fails_clients_are_asked_to_repeat(door: Door, prompt: str) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create(f"a fox, {prompt}"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
    assert refused.retry_s is not None
    assert await door.sql("SELECT count(*) FROM scheduler.job") == 0


@pytest.mark.parametrize("prompt", ["flunk", "dawdle", "babble"])
async def test_prompts_pass_without_the_classifier_where_the_settings_say_so(prompt: str) -> None:
    assert await judged(prompt, without_classifier="pass") is None
    with capture_logs() as logs, pytest.raises(Overloaded):
        await judged(prompt)
    assert [entry["event"] for entry in logs] == ["classifier failed"]
    assert prompt not in str(logs)


async def test_a_score_counts_from_the_settings_on() -> None:
    assert await judged("a shark", classifier_permille=500) == "sharks"
    assert await judged("a shark", classifier_permille=501) is None


@pytest.mark.parametrize("name", ["not_there", "NOT_CALLABLE", "not_async"])
def test_what_is_no_classifier_is_found_at_start(name: str) -> None:
    with pytest.raises(ClassifierUnusable, match=name):
        classification(settings(name))


def test_a_module_that_is_not_there_is_found_at_start_and_none_is_none() -> None:
    with pytest.raises(ClassifierUnusable, match="cannot be imported"):
        classification(ModerationSettings(classifier="no.such_module:classify"))
    with pytest.raises(ValueError, match="classifier"):
        ModerationSettings(classifier="os.system")
    assert classification(ModerationSettings()) is None
