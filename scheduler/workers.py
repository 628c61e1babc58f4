"""The workers as the loop knows them: their newest reports, and what keeps one from taking jobs.

There are several such reasons and they overlap: an operator drains it, it makes room for a worker of this
release, its machine is about to end or not needed, it lost too many jobs in a row, it says that it is not
healthy, it has in hand what is not ours, it refused what it was given. The board only hears whether it takes
jobs.
"""

from __future__ import annotations

from collections.abc import Collection, KeysView, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from gpu_worker.contract import WorkerReport
from scheduler.clock import to_ms


class LeavesBecause(StrEnum):
    """Why a worker is emptied and ends, as operators read it."""

    MACHINE_ENDS = "Its machine is about to end."
    NOT_NEEDED = "The work there is needs fewer machines."
    OUTDATED = "It makes room for a worker of the scheduler's release."


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """That a worker finishes or hands over what it has, gets nothing more, and ends."""

    since_ms: int
    because: LeavesBecause


class _Slot:
    """A worker that has joined."""

    __slots__ = ("at_odds", "idle_since_ms", "leaving", "report")

    def __init__(self, report: WorkerReport, now_ms: int) -> None:
        self.report = report
        self.at_odds = False
        self.leaving: Leaving | None = None
        self.idle_since_ms: int | None = now_ms


class Workers:
    """All that have joined and are not lost."""

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._closed: dict[str, None] = {}
        self._draining: frozenset[str] = frozenset()
        self._set_aside: dict[str, datetime] = {}
        self._outdated: dict[str, None] = {}
        self._departing: dict[str, int] = {}
        self._spare: dict[str, int] = {}
        self._all_closed = False

    def __len__(self) -> int:
        return len(self._slots)

    def ids(self) -> KeysView[str]:
        """Return their ids."""
        return self._slots.keys()

    def closed(self) -> KeysView[str]:
        """Return the ids of those that take no jobs."""
        return self._closed.keys()

    def report(self, worker_id: str) -> WorkerReport | None:
        """Return what a worker said last; None: there is no such worker."""
        slot = self._slots.get(worker_id)
        return None if slot is None else slot.report

    def idle_since_ms(self, worker_id: str) -> int | None:
        """Return since when no attempt has had a worker's GPU; None: one has."""
        return self._slots[worker_id].idle_since_ms

    def joined(self, report: WorkerReport, now_ms: int, *, outdated: bool = False) -> None:
        """Begin a worker's life. Like the board, take it for one that takes jobs."""
        self.gone(report.worker_id)
        self._slots[report.worker_id] = _Slot(report, now_ms)
        if outdated:
            self._outdated[report.worker_id] = None

    def heard(self, report: WorkerReport, *, at_odds: bool) -> None:
        """Note a worker's newest report. `at_odds`: until its next, it would refuse whatever it is given."""
        slot = self._slots[report.worker_id]
        slot.report, slot.at_odds = report, at_odds

    def refused(self, worker_id: str) -> None:
        """Note that a worker refused an attempt: until its next report, it would refuse any other."""
        slot = self._slots.get(worker_id)
        if slot is not None:
            slot.at_odds = True

    def gone(self, worker_id: str) -> None:
        """End a worker's life."""
        self._slots.pop(worker_id, None)
        self._closed.pop(worker_id, None)
        self._outdated.pop(worker_id, None)
        self._departing.pop(worker_id, None)

    def outdated(self) -> KeysView[str]:
        """Return the ids of those that are of another release than this scheduler."""
        return self._outdated.keys()

    @property
    def departing(self) -> Mapping[str, int]:
        """Those whose machines are about to end, and since when that is known."""
        return self._departing

    def departs(self, worker_id: str, now_ms: int) -> None:
        """Note that a worker's machine is about to end. To say it again changes nothing."""
        if worker_id in self._slots:
            self._departing.setdefault(worker_id, now_ms)

    @property
    def spare(self) -> Mapping[str, int]:
        """Slots that are to have no workers, and since when."""
        return self._spare

    def spare_slots(self, slots: Collection[str], now_ms: int) -> set[str]:
        """Note which slots are to have no workers; returns those of which that is new, or over."""
        changed = self._spare.keys() ^ set(slots)
        self._spare = {slot: self._spare.get(slot, now_ms) for slot in slots}
        return changed

    def leaves(self, worker_id: str, leaving: Leaving) -> None:
        """Give a worker nothing as long as it lives: it is to make room. The first word counts."""
        slot = self._slots[worker_id]
        slot.leaving = slot.leaving or leaving

    def leaving(self, worker_id: str) -> Leaving | None:
        """Return since when a worker is being emptied, to end then, and why; None: it is not."""
        slot = self._slots[worker_id]
        if slot.leaving is None and worker_id in self._spare:
            return Leaving(since_ms=self._spare[worker_id], because=LeavesBecause.NOT_NEEDED)
        return slot.leaving

    def is_drained(self, worker_id: str) -> bool:
        """Return whether an operator wants a slot to take nothing new, whether or not its worker is there."""
        return worker_id in self._draining

    def was_told(self, worker_id: str) -> bool:
        """Return whether a worker that has joined was told to take nothing more, so that its end surprises
        nobody.
        """
        return (
            self._all_closed
            or self.leaving(worker_id) is not None
            or worker_id in self._departing
            or worker_id in self._draining
        )

    def close_all(self) -> None:
        """Give nothing to anybody from now on."""
        self._all_closed = True

    def set_aside(self, worker_id: str, until: datetime) -> None:
        """Give a worker nothing until then: it lost too many jobs in a row."""
        self._set_aside[worker_id] = until

    def wanted(self, draining: Mapping[str, datetime], set_aside: Mapping[str, datetime]) -> set[str]:
        """Note what the rows say of all slots; returns those of which they said something else before."""
        changed = set(self._draining ^ draining.keys())
        changed.update(worker_id for worker_id, _ in self._set_aside.items() ^ set_aside.items())
        self._draining, self._set_aside = frozenset(draining), dict(set_aside)
        return changed

    def looked_at(self, worker_id: str, *, busy: bool, now_ms: int) -> bool | None:
        """Work out whether a worker takes jobs now; None: it does or does not as before."""
        slot = self._slots.get(worker_id)
        if slot is None:
            return None
        if busy:
            slot.idle_since_ms = None
        elif slot.idle_since_ms is None:
            slot.idle_since_ms = now_ms
        aside_until = self._set_aside.get(worker_id)
        takes_jobs = (
            not self._all_closed
            and slot.report.healthy
            and not slot.at_odds
            and slot.leaving is None
            and worker_id not in self._spare
            and worker_id not in self._draining
            and (aside_until is None or to_ms(aside_until) <= now_ms)
        )
        if takes_jobs is (worker_id not in self._closed):
            return None
        if takes_jobs:
            del self._closed[worker_id]
        else:
            self._closed[worker_id] = None
        return takes_jobs
