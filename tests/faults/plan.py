"""The plan of a run: which faults strike when, and for how long, as a pure function of a seed.

Kinds are dealt like cards: all of them once, in an order of the seed's, before any comes again. So a few
short runs meet every kind, and each in another company. In every fifth seed PostgreSQL is stopped and started
every few seconds beside them, from the beginning to the end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What can go wrong."""

    KILL_DOOR = "kill a front door"
    FREEZE_DOOR = "freeze a front door"
    KILL_SCHEDULER = "kill the scheduler"
    FREEZE_SCHEDULER = "freeze the scheduler"
    KILL_WORKER = "kill a worker"
    FREEZE_WORKER = "freeze a worker"
    KILL_NODE = "kill a node"
    FREEZE_NODE = "freeze a node"
    FREEZE_LEADER = "freeze the scheduler's node until another leads"
    STOP_DATABASE = "stop the database"
    WORKER_AND_DATABASE = "stop the database, then kill every worker"
    DELAY_CLIENTS = "delay clients"
    CUT_CLIENTS = "cut clients"
    HALF_CLOSE_CLIENTS = "half-close clients"
    SWALLOW_ANSWERS = "swallow answers to clients"
    DELAY_DATABASE = "delay the database"
    CUT_DATABASE = "cut the database"
    HALF_CLOSE_DATABASE = "half-close the database"
    SWALLOW_DATABASE = "swallow the database's answers"
    LOSE_COMMITS = "lose answers to commits"
    STORE_AWAY = "take the store away"
    STORE_FULL = "fill the store"
    OLD_TRANSACTION = "leave a transaction open"
    LOCKED_ACCOUNT = "leave an account locked"
    WRONG_CLOCK = "set a front door's clock wrong"


# From and to, in milliseconds. 0: it strikes, and there is nothing to mend. What lasts longer than it takes
# to be noticed (three seconds of a worker, twelve of a node) is there to be noticed and then to come back.
_LASTS: Mapping[Kind, tuple[int, int]] = {
    Kind.KILL_DOOR: (0, 0),
    Kind.FREEZE_DOOR: (1_000, 8_000),
    Kind.KILL_SCHEDULER: (0, 0),
    Kind.FREEZE_SCHEDULER: (1_000, 12_000),
    Kind.KILL_WORKER: (0, 0),
    Kind.FREEZE_WORKER: (4_000, 10_000),
    Kind.KILL_NODE: (2_000, 8_000),
    Kind.FREEZE_NODE: (5_000, 20_000),
    Kind.FREEZE_LEADER: (16_000, 24_000),
    Kind.STOP_DATABASE: (500, 6_000),
    Kind.WORKER_AND_DATABASE: (4_000, 6_000),
    Kind.DELAY_CLIENTS: (2_000, 6_000),
    Kind.CUT_CLIENTS: (0, 0),
    Kind.HALF_CLOSE_CLIENTS: (0, 0),
    Kind.SWALLOW_ANSWERS: (500, 4_000),
    Kind.DELAY_DATABASE: (2_000, 6_000),
    Kind.CUT_DATABASE: (0, 0),
    Kind.HALF_CLOSE_DATABASE: (0, 0),
    Kind.SWALLOW_DATABASE: (500, 4_000),
    Kind.LOSE_COMMITS: (3_000, 6_000),
    Kind.STORE_AWAY: (2_000, 8_000),
    Kind.STORE_FULL: (2_000, 8_000),
    Kind.OLD_TRANSACTION: (5_000, 20_000),
    Kind.LOCKED_ACCOUNT: (1_000, 6_000),
    Kind.WRONG_CLOCK: (6_000, 15_000),
}


HOLDS_ALL_UP = frozenset(
    {
        Kind.FREEZE_SCHEDULER,
        Kind.FREEZE_LEADER,
        Kind.STOP_DATABASE,
        Kind.WORKER_AND_DATABASE,
        Kind.SWALLOW_DATABASE,
        Kind.STORE_AWAY,
        Kind.STORE_FULL,
    }
)
"""Those that may let nothing begin or end anywhere until they are mended."""

BREAKS_CALLS = frozenset(
    {
        Kind.KILL_DOOR,
        Kind.FREEZE_DOOR,
        Kind.CUT_CLIENTS,
        Kind.HALF_CLOSE_CLIENTS,
        Kind.SWALLOW_ANSWERS,
        Kind.DELAY_CLIENTS,
        Kind.WRONG_CLOCK,
    }
)
"""Those that may break off a client's call."""

_BEATS_IN_EVERY = 5
_BEAT_MS = (3_000, 7_000)
"""From one stop of PostgreSQL to the next, in the seeds that have that."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One fault to come."""

    at_ms: int
    """After the run began."""
    kind: Kind
    for_ms: int
    which: int
    """Picks one of those that it may hit, and how hard, where there is a choice: any number from 0."""

    def __str__(self) -> str:
        lasts = f" for {self.for_ms / 1000:.1f} s" if self.for_ms else ""
        return f"{self.at_ms / 1000:6.1f} s  {self.kind}{lasts}  (which {self.which})"


def plan_of(
    seed: int, *, span_ms: int, every_ms: int = 2_500, kinds: Sequence[Kind] = tuple(Kind)
) -> tuple[Planned, ...]:
    """Return the faults of a run in the order in which they strike, about one every so often and its beat.

    The same arguments give the same plan, on every machine and in every release of Python.
    """
    draw = random.Random(f"faults {seed}")
    deck = _dealt(draw, kinds)
    planned = []
    at_ms = draw.randrange(every_ms)
    while at_ms < span_ms:
        kind = next(deck)
        shortest, longest = _LASTS[kind]
        planned.append(
            Planned(
                at_ms=at_ms,
                kind=kind,
                for_ms=draw.randint(shortest, longest),
                which=draw.randrange(1_000),
            )
        )
        at_ms += draw.randrange(every_ms // 4, 2 * every_ms - every_ms // 4)
    if has_beat(seed) and Kind.STOP_DATABASE in kinds:
        planned += _beat(seed, span_ms)
    return tuple(sorted(planned, key=lambda one: one.at_ms))


def has_beat(seed: int) -> bool:
    """Return whether PostgreSQL is stopped again and again in this seed, beside all else."""
    return seed % _BEATS_IN_EVERY == 0


def _beat(seed: int, span_ms: int) -> Iterator[Planned]:
    # A generator of its own, so that the other faults of a seed are what they are without it.
    draw = random.Random(f"beat {seed}")
    shortest, _ = _LASTS[Kind.STOP_DATABASE]
    at_ms = draw.randint(*_BEAT_MS)
    while at_ms < span_ms:
        yield Planned(
            at_ms=at_ms, kind=Kind.STOP_DATABASE, for_ms=draw.randint(shortest, 2 * shortest), which=0
        )
        at_ms += draw.randint(*_BEAT_MS)


def _dealt(draw: random.Random, kinds: Sequence[Kind]) -> Iterator[Kind]:
    while True:
        deck = list(kinds)
        draw.shuffle(deck)
        yield from deck
