"""The moderation rules that people of this service have added to the built-in list."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from scheduler.store.pool import Connection


class Category(StrEnum):
    """What a refusal by moderation names."""

    GORE = "gore"
    ADULT = "adult"
    HARASSMENT = "harassment"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Words that, standing together as whole words, make a prompt belong to a category."""

    pattern: str
    category: Category


async def rules(connection: Connection) -> tuple[Rule, ...]:
    """Return all rules of the table, in the order of their patterns."""
    rows = await connection.fetch("SELECT pattern, category FROM scheduler.moderation_rule ORDER BY pattern")
    return tuple(Rule(pattern=row["pattern"], category=Category(row["category"])) for row in rows)
