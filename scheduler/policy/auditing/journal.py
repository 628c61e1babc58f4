"""What happened in a period, in the order in which the board was told: what an auditor needs, and no more.

The live service keeps it in rows, the simulator and the tests in memory, and all of them give it to the same
auditor (`audit.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from scheduler.policy.decisions import Decision, Start, StartKeys
from scheduler.policy.events import (
    AttemptStarted,
    CheckpointSaved,
    Event,
    FairShare,
    ModelEvicted,
    ModelLoaded,
    StopAsked,
    TagsStored,
    WaitingRestored,
)
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.limits import Limits


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """A start that was committed, and the numbers that decided it."""

    started: AttemptStarted
    keys: StartKeys

    @property
    def at_ms(self) -> int:
        """When it was decided."""
        return self.started.at_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountMet:
    """An account that was there before the period: where it stood in the queues then is not known."""

    at_ms: int
    account_id: AccountId
    limits: Limits
    weight_milli: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CellMet:
    """First of a period whose beginning is not a recovery: virtual times are not known."""

    at_ms: int
    decay_origin_ms: int


Record = Event | Dispatch | AccountMet | CellMet

OF_NO_CONCERN = (TagsStored, StopAsked, ModelLoaded, ModelEvicted, CheckpointSaved)
"""They decide neither who goes first nor when a GPU is free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """A period. It begins with `CellRestored` where everything is known from the start on.

    A `CellRestored` behind other records is a scheduler that took over: its board knew what follows it.
    """

    records: Sequence[Record]
    ended_ms: int
    grace_ms: int = 0
    """How long it may take from a fact to the row of what was decided for it: 0 where time stands still
    meanwhile, as in a simulation."""
    closing: Mapping[AccountId, Mapping[Tier, FairShare]] = field(default_factory=dict)
    """What was stored of accounts at the end, to hold the records against."""


class Recorder:
    """Takes a journal down while a board is told and asked.

    Whoever owns a board calls `decided` with what it decides and `note` with each event it is told.
    """

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._keys: dict[JobId, StartKeys] = {}
        self._now_ms = 0

    def decided(self, decisions: Iterable[Decision]) -> None:
        """Remember by what numbers jobs were chosen, until they are started or others are decided."""
        self._keys = {one.job_id: one.keys for one in decisions if isinstance(one, Start)}

    def note(self, event: Event) -> None:
        """Take an event down. A start must have been decided."""
        self._now_ms = max(self._now_ms, event.at_ms)
        if isinstance(event, AttemptStarted):
            self._records.append(Dispatch(started=event, keys=self._keys[event.job_id]))
        elif isinstance(event, WaitingRestored):
            self._records += event.submitted()
        elif not isinstance(event, OF_NO_CONCERN):
            self._records.append(event)

    def take(self) -> Sequence[Record]:
        """Return what was taken down since this was last asked, and begin anew."""
        records, self._records = self._records, []
        return records

    def journal(
        self,
        *,
        ended_ms: int | None = None,
        grace_ms: int = 0,
        closing: Mapping[AccountId, Mapping[Tier, FairShare]] | None = None,
    ) -> Journal:
        """Return what was taken down so far."""
        return Journal(
            records=tuple(self._records),
            ended_ms=self._now_ms if ended_ms is None else ended_ms,
            grace_ms=grace_ms,
            closing={} if closing is None else closing,
        )
