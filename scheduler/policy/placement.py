"""Where a job runs: on a worker that can hold it, with its model warm if possible, then on the fastest."""

from __future__ import annotations

from typing import NamedTuple

from scheduler.policy.ids import AttemptId, WorkerId
from scheduler.policy.job import Fit
from scheduler.policy.ranking import Ranking
from scheduler.policy.worker import Worker


class Kind(NamedTuple):
    """What is the same for many workers; a fleet has few kinds."""

    speed_permille: int
    memory_bytes: int
    models: frozenset[str] | None

    def can_load(self, model: str) -> bool:
        return self.models is None or model in self.models

    def can_run(self, fit: Fit) -> bool:
        return fit.memory_bytes <= self.memory_bytes and self.can_load(fit.model)


class Placement(NamedTuple):
    """An idle worker for a job."""

    worker_id: WorkerId
    warm: bool


class _Idle:
    """The idle workers of one kind."""

    __slots__ = ("any", "warm")

    def __init__(self) -> None:
        self.any: Ranking[WorkerId] = Ranking()
        self.warm: dict[str, Ranking[WorkerId]] = {}


class _Slot:
    """A worker that is present."""

    __slots__ = ("draining", "kind", "warm_models")

    def __init__(self, worker: Worker) -> None:
        self.kind = Kind(worker.speed_permille, worker.memory_bytes, worker.models)
        self.warm_models = set(worker.warm_models)
        self.draining = False


class Fleet:
    """The workers of one cell, and which attempt each has in hand.

    An attempt may be on a worker that is not present: one that was lost, or has not joined yet after a
    recovery. Such a worker is busy when it comes.
    """

    def __init__(self) -> None:
        self._slots: dict[WorkerId, _Slot] = {}
        self._attempts: dict[WorkerId, AttemptId] = {}
        self._idle: dict[Kind, _Idle] = {}
        self._kinds: dict[Kind, int] = {}
        self._kinds_taking: dict[Kind, int] = {}
        """Without workers that drain."""

    def join(self, worker: Worker) -> None:
        self.leave(worker.worker_id)
        slot = self._slots[worker.worker_id] = _Slot(worker)
        _count(self._kinds, slot.kind, 1)
        _count(self._kinds_taking, slot.kind, 1)
        if worker.worker_id not in self._attempts:
            self._offer(worker.worker_id)

    def leave(self, worker_id: WorkerId) -> None:
        slot = self._slots.get(worker_id)
        if slot is None:
            return
        self._withdraw(worker_id)
        _count(self._kinds, slot.kind, -1)
        if not slot.draining:
            _count(self._kinds_taking, slot.kind, -1)
        del self._slots[worker_id]

    def drain(self, worker_id: WorkerId, draining: bool) -> None:
        slot = self._slots.get(worker_id)
        if slot is None or slot.draining is draining:
            return
        slot.draining = draining
        _count(self._kinds_taking, slot.kind, -1 if draining else 1)
        if draining:
            self._withdraw(worker_id)
        elif worker_id not in self._attempts:
            self._offer(worker_id)

    def load(self, worker_id: WorkerId, model: str) -> None:
        slot = self._slots.get(worker_id)
        if slot is None or model in slot.warm_models:
            return
        slot.warm_models.add(model)
        if self.is_idle(worker_id):
            self._offer(worker_id)

    def evict(self, worker_id: WorkerId, model: str) -> None:
        slot = self._slots.get(worker_id)
        if slot is None or model not in slot.warm_models:
            return
        slot.warm_models.remove(model)
        if self.is_idle(worker_id):
            self._idle[slot.kind].warm[model].discard(worker_id)

    def occupy(self, worker_id: WorkerId, attempt_id: AttemptId) -> None:
        assert worker_id not in self._attempts, "a worker runs at most one attempt"
        self._attempts[worker_id] = attempt_id
        if worker_id in self._slots:
            self._withdraw(worker_id)

    def release(self, worker_id: WorkerId) -> None:
        del self._attempts[worker_id]
        slot = self._slots.get(worker_id)
        if slot is not None and not slot.draining:
            self._offer(worker_id)

    def is_present(self, worker_id: WorkerId) -> bool:
        return worker_id in self._slots

    def is_idle(self, worker_id: WorkerId) -> bool:
        slot = self._slots.get(worker_id)
        return slot is not None and not slot.draining and worker_id not in self._attempts

    def idle(self) -> int:
        """Return how many workers could start a job now."""
        return sum(len(idle.any) for idle in self._idle.values())

    def warm_models(self, worker_id: WorkerId) -> frozenset[str]:
        return frozenset(self._slots[worker_id].warm_models)

    def place(self, fit: Fit) -> Placement | None:
        """Return the idle worker that suits a job best."""
        best: tuple[bool, int, WorkerId] | None = None
        for kind, idle in self._idle.items():
            if not kind.can_run(fit):
                continue
            warm = idle.warm.get(fit.model)
            entry = warm.first() if warm is not None else None
            cold = entry is None
            if entry is None:
                entry = idle.any.first()
            if entry is not None:
                rank = (cold, -kind.speed_permille, entry[-1])
                best = rank if best is None else min(best, rank)
        return None if best is None else Placement(best[2], not best[0])

    def can_run_on(self, worker_id: WorkerId, fit: Fit) -> bool:
        return self._slots[worker_id].kind.can_run(fit)

    def is_empty(self) -> bool:
        return not self._slots

    def lacks(self, fit: Fit, *, draining_count: bool) -> str | None:
        """Return what the fleet lacks for a job, as a sentence; None: some worker could run it."""
        kinds = self._kinds if draining_count else self._kinds_taking
        if any(kind.can_run(fit) for kind in kinds):
            return None
        if not kinds:
            return "No worker is taking jobs."
        able = [kind.memory_bytes for kind in kinds if kind.can_load(fit.model)]
        if not able:
            return f"No worker can load the model {fit.model}."
        return (
            f"It needs {_gibibytes(fit.memory_bytes)} of GPU memory; "
            f"the largest worker for the model {fit.model} has {_gibibytes(max(able))}."
        )

    def _offer(self, worker_id: WorkerId) -> None:
        slot = self._slots[worker_id]
        idle = self._idle.setdefault(slot.kind, _Idle())
        idle.any.put((worker_id,))
        for model in slot.warm_models:
            idle.warm.setdefault(model, Ranking()).put((worker_id,))

    def _withdraw(self, worker_id: WorkerId) -> None:
        slot = self._slots[worker_id]
        idle = self._idle.get(slot.kind)
        if idle is None:
            return
        idle.any.discard(worker_id)
        for model in slot.warm_models:
            warm = idle.warm.get(model)
            if warm is not None:
                warm.discard(worker_id)


def _count(kinds: dict[Kind, int], kind: Kind, change: int) -> None:
    count = kinds.get(kind, 0) + change
    if count:
        kinds[kind] = count
    else:
        del kinds[kind]


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
