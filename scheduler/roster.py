"""Who should be there, and who is: what is shown of the fleet, and what somebody is woken for.

A slot, the place of one GPU, is remembered while the cluster has it and for a little longer. Of a fleet that
nobody scales, a slot that left with its machine is missed until another comes in its place, unless it was
told to leave: its machine was about to end, or an operator drained it. So a machine that died is missed for
as long as it stays away, but only by the scheduler that saw it: the next one knows how many there should be
at least.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from gpu_worker.contract import WorkerReport
from scheduler.fleet import GoneBecause, WorkerGone
from scheduler.metrics import RestartReason, SchedulerMetrics, WorkerState
from scheduler.running import RunningAttempts
from scheduler.workers import Workers

# A worker that starts imports torch and tries its GPU before its first word, which takes a minute or so.
_COMES_WITHIN_MS = 300_000
# As long as Prometheus goes on with the last value of a series: whoever scrapes seldom still gets it.
_SHOWN_FOR_MS = 300_000
# A machine that is started anew, or repaired, is back by then.
_COMES_BACK_WITHIN_MS = 24 * 3_600_000


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """How a life of a worker ended."""

    incarnation: str
    because: GoneBecause
    was_told: bool


@dataclass
class _Slot:
    """What is remembered of a slot."""

    left_since_ms: int | None
    """Since when the cluster does not have it; None: it has."""
    absent_since_ms: int | None
    """Since when it has had no worker and should have; None: it has one."""
    leaves: bool = False
    """Its machine is about to end, or was when it left."""
    ended: _Ended | None = None
    """Its last life, while no other has come."""


class Roster:
    """Of one leader."""

    def __init__(
        self,
        *,
        slots: Callable[[], Collection[str]],
        workers: Workers,
        running: RunningAttempts,
        metrics: SchedulerMetrics,
        at_least: int | None,
    ) -> None:
        """Expect `at_least` workers, and one for each GPU that there has been; None: the fleet is scaled, and
        how many there should be is for others to say. `slots` returns those that the cluster has.
        """
        self._slots_there = slots
        self._workers = workers
        self._running = running
        self._metrics = metrics
        self._at_least = at_least
        self._slots: dict[str, _Slot] = {}
        self._there: frozenset[str] = frozenset()
        """Those that the cluster had at the last look."""
        self._missed: dict[str, None] = {}
        """Those that left and should not have, the first first."""
        self._excused: dict[str, int] = {}
        """Those that left as they were told, and when."""

    def __len__(self) -> int:
        """Return how many slots are remembered."""
        return len(self._slots)

    def began(self, report: WorkerReport, now_ms: int) -> None:
        """Note that a slot has a worker: another than before, or one that was only silent."""
        slot = self._remember(report.worker_id, now_ms)
        before, slot.ended, slot.absent_since_ms = slot.ended, None, None
        if before is not None and before.incarnation == report.incarnation:
            return
        self._metrics.worker_began(report.worker_id, report.incarnation)
        if before is not None:
            self._metrics.worker_restarted(RestartReason(before.because.value))

    def ended(self, gone: WorkerGone, now_ms: int) -> None:
        """Note that a worker's life is over, before the loop forgets what the worker was told."""
        was_told = gone.because is GoneBecause.REPLACED or self._workers.was_told(gone.worker_id)
        if not was_told:
            self._metrics.worker_lost(gone.worker_id)
        slot = self._remember(gone.worker_id, now_ms)
        slot.absent_since_ms = now_ms
        # That one comes again which nobody needed for a while is no restart.
        if gone.worker_id not in self._workers.spare:
            slot.ended = _Ended(incarnation=gone.incarnation, because=gone.because, was_told=was_told)

    def leaves(self, worker_id: str, now_ms: int) -> None:
        """Note that a slot's machine is about to end. To say it again changes nothing."""
        self._remember(worker_id, now_ms).leaves = True

    def look(self, now_ms: int) -> None:
        """Hold what is remembered against the slots that there are: called every second or so."""
        there, present = frozenset(self._slots_there()), self._workers.ids()
        came, left = sorted(there - self._there), self._there - there
        self._there = there
        for worker_id in came:
            slot = self._remember(worker_id, now_ms)
            slot.left_since_ms, slot.leaves = None, False
        for worker_id in left:
            self._slots[worker_id].left_since_ms = now_ms
        spare = self._workers.spare
        for worker_id, slot in tuple(self._slots.items()):
            if slot.absent_since_ms is not None and (worker_id in spare or worker_id not in there):
                # Nobody starts one there now. When somebody does, it is on its way from then on.
                slot.absent_since_ms = now_ms
                slot.ended = None if worker_id in spare else slot.ended
            left_ms = slot.left_since_ms
            if left_ms is not None and now_ms - left_ms >= _SHOWN_FOR_MS and worker_id not in present:
                del self._slots[worker_id]
                self._metrics.worker_forgotten(worker_id)
        if self._at_least is not None:
            self._miss(came, sorted(left), now_ms)

    def _miss(self, came: list[str], left: list[str], now_ms: int) -> None:
        self._missed.update(dict.fromkeys(left))
        for worker_id in came:
            # One that comes back from where it was told to go takes nobody's place. A machine that does
            # often has another name than the one before.
            if self._excused.pop(worker_id, None) is None:
                place = worker_id if worker_id in self._missed else next(iter(self._missed), "")
                self._missed.pop(place, None)
        for worker_id in tuple(self._missed):
            # That a machine is about to end may be heard after it has left.
            slot = self._slots.get(worker_id)
            if self._workers.is_drained(worker_id) or (slot is not None and slot.leaves):
                del self._missed[worker_id]
                self._excused[worker_id] = now_ms
        for worker_id, left_ms in tuple(self._excused.items()):
            if now_ms - left_ms >= _COMES_BACK_WITHIN_MS:
                del self._excused[worker_id]

    @property
    def expected(self) -> int:
        """How many workers there should be in a fleet that is not scaled, as of the last look."""
        assert self._at_least is not None, "how many a scaled fleet should have is for others to say"
        return max(self._at_least, len(self._there) + len(self._missed))

    def states(self, now_ms: int) -> Mapping[WorkerState, int]:
        """Return how many workers are in each state; together they are all that should be there."""
        workers = self._workers
        present = workers.ids()
        busy = present & self._running.busy_workers
        loading = sum(map(self._loads, busy))
        closed = workers.closed() - busy
        emptied = sum(map(workers.was_told, closed))
        absent = frozenset(self._slots_there()) - present - workers.spare.keys()
        drained = sum(map(workers.is_drained, absent))
        lost = sum(self._is_lost(worker_id, now_ms) for worker_id in absent)
        beyond = 0 if self._at_least is None else self.expected - len(self._there)
        return {
            WorkerState.STARTING: len(absent) - drained - lost,
            WorkerState.IDLE: len(present - busy) - len(closed),
            WorkerState.LOADING: loading,
            WorkerState.RUNNING: len(busy) - loading,
            WorkerState.DRAINING: emptied + drained,
            WorkerState.UNHEALTHY: len(closed) - emptied,
            WorkerState.LOST: lost + beyond,
        }

    def _is_lost(self, worker_id: str, now_ms: int) -> bool:
        """Return whether a slot should have a worker and has none."""
        slot = self._slots.get(worker_id)
        if slot is None or slot.absent_since_ms is None or self._workers.is_drained(worker_id):
            return False
        ended_badly = slot.ended is not None and not slot.ended.was_told
        return ended_badly or now_ms - slot.absent_since_ms >= _COMES_WITHIN_MS

    def _loads(self, worker_id: str) -> bool:
        """Return whether a worker has an attempt whose model it does not have yet."""
        report, one = self._workers.report(worker_id), self._running.with_gpu(worker_id)
        assert report is not None, "it is present"
        assert one is not None, "it is busy"
        return one.model not in report.warm_models

    def _remember(self, worker_id: str, now_ms: int) -> _Slot:
        left_since_ms = None if worker_id in self._there else now_ms
        return self._slots.setdefault(worker_id, _Slot(left_since_ms=left_since_ms, absent_since_ms=now_ms))
