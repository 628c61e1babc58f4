"""A hook for a classifier: a function of yours that judges prompts where lists of words do not reach.

It is named in the settings as `module:function`, is asked about each new job after the rules, and has a
deadline. Where it says nothing in time, or fails, nobody knows what the prompt is: the job is refused with
UNAVAILABLE, which clients repeat, unless the settings say that it is let through.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from dataclasses import dataclass
from typing import Protocol

import structlog

from scheduler.refusals import Overloaded
from scheduler.settings import Moderation as ModerationSettings
from scheduler.store.moderation import is_category

_log = structlog.get_logger()


class ClassifierUnusable(RuntimeError):
    """What the settings name is no classifier."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a classifier makes of a prompt."""

    category: str
    """Is named to whoever sent the prompt: as a rule's, up to 40 lower-case letters, digits and `-`, of
    which the first is a letter. Any other counts as no answer."""
    score_permille: int
    """How sure it is that the prompt belongs there: 0 to 1000."""


class _NoCategory(ValueError):
    """What a classifier calls a category cannot be one."""


class Classifier(Protocol):
    """An async function that judges the text of a prompt, without its parameters, weights and URLs.

    It runs on the event loop of the front door: what computes for long belongs in a process of its own.
    """

    async def __call__(self, text: str, /) -> Verdict | None:
        """Return the category that fits best, None if none does."""


@dataclass(frozen=True, kw_only=True)
class Classification:
    """A classifier, and what its answers and its silence mean."""

    classify: Classifier
    settings: ModerationSettings

    async def category(self, text: str) -> str | None:
        """Return the category of a text, None if it may be drawn. Raises Overloaded."""
        try:
            async with asyncio.timeout(self.settings.classifier_ms / 1000):
                verdict = await self.classify(text)
            if verdict is not None and not is_category(verdict.category):
                # It is shown to whoever sent the prompt, and may be anything, the prompt too.
                raise _NoCategory
        except Exception as trouble:
            # Whatever it raises is its own; of its answer nothing is known.
            passes = self.settings.without_classifier == "pass"
            _log.warning("classifier failed", trouble=type(trouble).__name__, passes=passes)
            if passes:
                return None
            raise Overloaded(
                sentence="Prompts cannot be judged at the moment: what judges them does not answer."
            ) from trouble
        if verdict is None or verdict.score_permille < self.settings.classifier_permille:
            return None
        return verdict.category


def classification(settings: ModerationSettings) -> Classification | None:
    """Return the classifier that the settings name, None if they name none. Raises ClassifierUnusable."""
    if settings.classifier is None:
        return None
    module, _, name = settings.classifier.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as missing:
        raise ClassifierUnusable(
            f"moderation.classifier is {settings.classifier}, which cannot be imported: {missing}"
        ) from missing
    if not inspect.iscoroutinefunction(found):
        raise ClassifierUnusable(
            f"moderation.classifier is {settings.classifier}, which is no `async def` function"
        )
    return Classification(classify=found, settings=settings)
