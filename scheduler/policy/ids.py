"""Names of the things the policy ranks and places; each is text whose meaning lies outside the core."""

from __future__ import annotations

from enum import StrEnum
from typing import NewType

JobId = NewType("JobId", str)
AccountId = NewType("AccountId", str)
AttemptId = NewType("AttemptId", str)
WorkerId = NewType("WorkerId", str)


class Tier(StrEnum):
    """The two promises."""

    FAST = "fast"
    RELAX = "relax"
