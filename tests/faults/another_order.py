"""A board whose dictionaries are turned around before it decides: what it decides must not hang on them.

Some are lists of what came first, and stay: their order is that of the events.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scheduler.policy.board import Board
from scheduler.policy.decisions import Decision
from scheduler.policy.events import AccountRestored, Event

_AS_THEY_CAME = frozenset({"to_stop", "to_give_up", "unstored", "queues"})
"""Of `Cell`. Fast is first wherever tiers are gone through; the others are in the order of their events."""


class InAnotherOrder(Board):
    """Decides as any board does, or breaks its promise."""

    def apply(self, event: Event) -> None:
        """Take note of a fact, with its own dictionaries turned around too."""
        if isinstance(event, AccountRestored):
            event = replace(event, shares=dict(reversed(event.shares.items())))
        super().apply(event)

    def decide(self, now_ms: int) -> list[Decision]:
        """Return what should be done now."""
        turn_around(self.cell)
        return super().decide(now_ms)


def turn_around(root: object) -> int:
    """Turn the order of every dictionary around that can be reached, but for those; returns how many."""
    turned, seen, ahead = 0, set[int](), [root]
    while ahead:
        one: Any = ahead.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        match one:
            case dict():
                if len(one) > 1:
                    items = list(one.items())
                    one.clear()
                    one.update(reversed(items))
                    turned += 1
                ahead.extend(one.values())
            case list() | tuple():
                ahead.extend(one)
            case _ if type(one).__module__.startswith("scheduler.policy"):
                names = [*getattr(one, "__dict__", ())]
                names += [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
                for name in names:
                    known = getattr(one, name)
                    ahead.extend(known.values() if name in _AS_THEY_CAME else [known])
    return turned
