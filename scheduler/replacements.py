"""Lets workers leave while jobs go on: those of another release, those whose machines are about to end, and
those that nobody needs.

A scheduler that takes the lead from one of another release finds that one's workers at work, and goes on with
them: what runs is adopted. Then they leave, a tenth of the fleet at once and the idle ones first: each is
given nothing more, has a while to finish what it has in hand, hands the rest over, and makes room for one of
this release. Where the new workers do not come, no more than that tenth is lost: the others stay at work,
however long it takes.

A machine that is about to end gives nobody a choice: its workers hand over at once what they have. Those of a
machine that is not needed have the same while as those of another release, all at once, and nothing comes
in their places.
"""

from __future__ import annotations

import structlog

from scheduler.desk import Desk
from scheduler.workers import LeavesBecause, Leaving

_log = structlog.get_logger()

# One in so many leaves at once.
_PART = 10


class Replacements:
    """Of one leader."""

    def __init__(self, desk: Desk, *, within_ms: int) -> None:
        """Give each worker `within_ms` to finish what it has in hand; then it hands it over."""
        self._desk = desk
        self._within_ms = within_ms
        self._leaving: dict[str, int] = {}
        """Outdated workers that were chosen, and when, until their successors come or their GPUs leave."""
        self._ended: set[str] = set()
        """Workers that were told to make room, until they are gone."""

    def go_on(self, now_ms: int) -> None:
        """Do the next step of each: called every second or so."""
        workers = self._desk.workers
        self._ended = {worker_id for worker_id in self._ended if workers.report(worker_id) is not None}
        departing = workers.departing
        for worker_id in departing.keys() - self._ended:
            leaving = Leaving(since_ms=departing[worker_id], because=LeavesBecause.MACHINE_ENDS)
            workers.leaves(worker_id, leaving)
            self._empty(worker_id, leaving, hands_over=True)
        spare = workers.spare
        for worker_id in (spare.keys() & workers.ids()) - departing.keys() - self._ended:
            leaving = Leaving(since_ms=spare[worker_id], because=LeavesBecause.NOT_NEEDED)
            self._empty(worker_id, leaving, hands_over=now_ms - spare[worker_id] >= self._within_ms)
        outdated = workers.outdated() - spare.keys()
        for worker_id in tuple(self._leaving):
            present = workers.report(worker_id) is not None
            # That a successor has not come for long is no reason to risk the next worker.
            awaits = worker_id in self._desk.fleet.slots() and worker_id not in spare
            if (present and worker_id not in outdated) or not awaits:
                del self._leaving[worker_id]
        if not outdated:
            return
        fleet = len(workers) + sum(workers.report(worker_id) is None for worker_id in self._leaving)
        room = max(1, fleet // _PART) - len(self._leaving)
        stay = sorted(
            outdated - self._leaving.keys(),
            key=lambda worker_id: (workers.idle_since_ms(worker_id) is None, worker_id),
        )
        for worker_id in stay[: max(0, room)]:
            _log.info("worker of another release leaves", worker=worker_id)
            self._leaving[worker_id] = now_ms
        for worker_id in (self._leaving.keys() & outdated) - self._ended:
            leaving = Leaving(since_ms=self._leaving[worker_id], because=LeavesBecause.OUTDATED)
            # Each time: one that fell silent meanwhile has joined again as if nothing had been said.
            workers.leaves(worker_id, leaving)
            self._empty(worker_id, leaving, hands_over=now_ms - leaving.since_ms >= self._within_ms)

    def _empty(self, worker_id: str, leaving: Leaving, *, hands_over: bool) -> None:
        self._desk.look_at(worker_id)
        running = self._desk.running.on(worker_id)
        if hands_over:
            for one in running:
                # Said again until it has ended: to ask twice changes nothing.
                self._desk.fleet.hand_over(worker_id, one.attempt_id)
        report = self._desk.workers.report(worker_id)
        assert report is not None, "only those that are present can leave"
        if not running and not report.unacknowledged and not (report.drawn or report.active or report.parked):
            self._ended.add(worker_id)
            # Until its death is told it may be wanted again: what it were given then would be lost.
            self._desk.workers.leaves(worker_id, leaving)
            self._desk.look_at(worker_id)
            self._desk.fleet.replace(worker_id)
