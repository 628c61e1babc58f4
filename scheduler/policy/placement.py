"""Where a job runs: on a worker that can hold it, with its model warm if possible, then on the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from scheduler.policy.ids import AttemptId, WorkerId
from scheduler.policy.job import Fit
from scheduler.policy.preemption import Parkable
from scheduler.policy.ranking import Entry, Ranking
from scheduler.policy.worker import Worker


class Kind(NamedTuple):
    """What is the same for many workers; a fleet has few kinds."""

    speed_permille: int
    memory_bytes: int
    models: frozenset[str] | None
    device: str

    def can_load(self, model: str) -> bool:
        return self.models is None or model in self.models

    def can_run(self, fit: Fit) -> bool:
        return fit.memory_bytes <= self.memory_bytes and self.can_load(fit.model)


class Placement(NamedTuple):
    """A worker for a job."""

    worker_id: WorkerId
    warm: bool
    parks: AttemptId | None = None
    """The run that is to be parked for it."""


class Hands(NamedTuple):
    """What a worker has in hand."""

    active: AttemptId | None = None
    fast: bool = False
    """The active attempt is a fast one."""
    parked: AttemptId | None = None


_EMPTY = Hands()


class _Pool:
    """Workers of one kind that could take a job, ranked, and again those that have a model loaded."""

    __slots__ = ("any", "warm")

    def __init__(self) -> None:
        self.any: Ranking[WorkerId] = Ranking()
        self.warm: dict[str, Ranking[WorkerId]] = {}

    def put(self, entry: Entry, models: set[str]) -> None:
        self.any.put(entry)
        for model in models:
            warm = self.warm.get(model)
            if warm is None:
                warm = self.warm[model] = Ranking()
            warm.put(entry)

    def discard(self, worker_id: WorkerId, models: set[str]) -> None:
        self.any.discard(worker_id)
        for model in models:
            warm = self.warm.get(model)
            if warm is not None:
                warm.discard(worker_id)

    def first(self, model: str) -> tuple[Entry | None, bool]:
        """Return the first worker, of those with the model if there are any, and whether it has it."""
        warm = self.warm.get(model)
        entry = None if warm is None else warm.first()
        return (self.any.first(), False) if entry is None else (entry, True)


class _Pools:
    """The workers of one kind by what taking them costs."""

    __slots__ = ("ending", "held", "open", "parkable", "relax_held")

    def __init__(self) -> None:
        self.open = _Pool()
        """Idle, with nothing parked."""
        self.held = _Pool()
        """Idle, with a run parked that goes on next unless a fast job comes before it."""
        self.parkable = _Pool()
        """With a relax run worth parking, or that was until a moment ago."""
        self.ending: Ranking[WorkerId] = Ranking()
        """With a relax run that is about to end, by when."""
        self.relax_held = 0
        """Workers whose active attempt is a relax one."""


class _Slot:
    """A worker that is present."""

    __slots__ = ("draining", "kind", "parkable", "pools", "warm_models")

    def __init__(self, worker: Worker, kind: Kind, pools: _Pools) -> None:
        self.kind = kind
        self.pools = pools
        """Those of its kind."""
        self.warm_models = set(worker.warm_models)
        self.draining = False
        self.parkable: Parkable | None = None


class Fleet:
    """The workers of one cell, and what each has in hand.

    An attempt may be on a worker that is not present: one that was lost, or has not joined yet after a
    recovery. Such a worker is busy when it comes.
    """

    def __init__(self) -> None:
        self._slots: dict[WorkerId, _Slot] = {}
        self._hands: dict[WorkerId, Hands] = {}
        """Of those that have something."""
        self._pools: dict[Kind, _Pools] = {}
        self._able_pools: dict[Fit, list[tuple[int, _Pools]]] = {}
        """Asked for at each decision, and the same while no new kind of worker comes."""
        self._kinds: dict[Kind, int] = {}
        self._kinds_taking: dict[Kind, int] = {}
        """Without workers that drain."""
        self._resumable: dict[WorkerId, AttemptId] = {}
        """Present workers without an active attempt, and the run that is parked there."""
        self.open = 0
        """Workers that a relax job could start on now."""
        self.idle = 0
        """Workers that a fast job could start on now without parking anything: the open ones, and those that
        have a parked run only."""
        self.taking = 0
        """Present workers that do not drain."""
        self.fast_held = 0
        """Of these, those whose active attempt is a fast one."""

    # -- workers come and go ------------------------------------------------------------------------

    def join(self, worker: Worker) -> None:
        self.leave(worker.worker_id)
        kind = Kind(worker.speed_permille, worker.memory_bytes, worker.models, worker.device)
        if kind not in self._pools:
            self._pools[kind] = _Pools()
            self._able_pools.clear()
        slot = self._slots[worker.worker_id] = _Slot(worker, kind, self._pools[kind])
        _count(self._kinds, kind, 1)
        self._take_part(worker.worker_id, slot, 1)

    def leave(self, worker_id: WorkerId) -> None:
        slot = self._slots.get(worker_id)
        if slot is None:
            return
        self._take_part(worker_id, slot, -1)
        _count(self._kinds, slot.kind, -1)
        self._resumable.pop(worker_id, None)
        del self._slots[worker_id]

    def drain(self, worker_id: WorkerId, draining: bool) -> None:
        slot = self._slots.get(worker_id)
        if slot is None or slot.draining is draining:
            return
        if draining:
            self._take_part(worker_id, slot, -1)
        slot.draining = draining
        self._take_part(worker_id, slot, 1)

    def load(self, worker_id: WorkerId, model: str) -> None:
        slot = self._slots.get(worker_id)
        if slot is not None and model not in slot.warm_models:
            self._withdraw(worker_id, slot, self.hands(worker_id))
            slot.warm_models.add(model)
            self._offer(worker_id, slot, self.hands(worker_id))

    def evict(self, worker_id: WorkerId, model: str) -> None:
        slot = self._slots.get(worker_id)
        if slot is not None and model in slot.warm_models:
            self._withdraw(worker_id, slot, self.hands(worker_id))
            slot.warm_models.remove(model)
            self._offer(worker_id, slot, self.hands(worker_id))

    # -- what they have in hand ---------------------------------------------------------------------

    def hands(self, worker_id: WorkerId) -> Hands:
        return self._hands.get(worker_id, _EMPTY)

    def set_hands(self, worker_id: WorkerId, hands: Hands, parkable: Parkable | None = None) -> None:
        """Say what a worker has in hand now, and how its active run stands among those that may be parked."""
        slot = self._slots.get(worker_id)
        before = self._hands.get(worker_id, _EMPTY)
        if slot is not None:
            self._withdraw(worker_id, slot, before)
            slot.parkable = parkable
            if not slot.draining:
                self.fast_held += hands.fast - before.fast
        if hands.active is None and hands.parked is None:
            self._hands.pop(worker_id, None)
        else:
            self._hands[worker_id] = hands
        if slot is not None:
            self._offer(worker_id, slot, hands)

    def parkable(self, worker_id: WorkerId) -> Parkable | None:
        slot = self._slots.get(worker_id)
        return None if slot is None else slot.parkable

    def set_parkable(self, worker_id: WorkerId, parkable: Parkable | None) -> None:
        """Say how the worker's active run stands among those that may be parked; None: it may not."""
        slot = self._slots.get(worker_id)
        if slot is not None and slot.parkable != parkable:
            self._withdraw(worker_id, slot, self.hands(worker_id))
            slot.parkable = parkable
            self._offer(worker_id, slot, self.hands(worker_id))

    # -- where a job could run ----------------------------------------------------------------------

    def place(self, fit: Fit, *, held_too: bool = False) -> Placement | None:
        """Return the idle worker that suits a job best; with `held_too` also those with a parked run."""
        best: tuple[bool, bool, int, WorkerId] | None = None
        for slowness, pools in self._able(fit):
            entry, warm = pools.open.first(fit.model)
            if entry is not None:
                rank = (not warm, False, slowness, entry[-1])
                best = rank if best is None or rank < best else best
            if held_too:
                entry, warm = pools.held.first(fit.model)
                if entry is not None:
                    rank = (not warm, True, slowness, entry[-1])
                    best = rank if best is None or rank < best else best
        return None if best is None else Placement(best[-1], not best[0])

    def _able(self, fit: Fit) -> list[tuple[int, _Pools]]:
        """Return the pools of the kinds that can run a job, and what puts the faster first."""
        able = self._able_pools.get(fit)
        if able is None:
            able = self._able_pools[fit] = [
                (-kind.speed_permille, pools) for kind, pools in self._pools.items() if kind.can_run(fit)
            ]
        return able

    def relax_has(self, fit: Fit, device: str | None = None) -> bool:
        """Return whether a worker that runs a relax job could run such a job: relax gets it when that ends.

        With a device type, only workers of that type count.
        """
        return any(
            pools.relax_held > 0 and kind.can_run(fit) and device in (None, kind.device)
            for kind, pools in self._pools.items()
        )

    def place_like(self, fit: Fit, device: str) -> Placement | None:
        """Return the open worker of a device type that suits a job best."""
        found: list[tuple[bool, int, WorkerId]] = []
        for kind, pools in self._pools.items():
            if kind.device == device and kind.can_run(fit):
                entry, warm = pools.open.first(fit.model)
                if entry is not None:
                    found.append((not warm, -kind.speed_permille, entry[-1]))
        if not found:
            return None
        cold, _, worker_id = min(found)
        return Placement(worker_id, not cold)

    def place_by_parking(self, fit: Fit, now_ms: int) -> Placement | None:
        """Return the worker whose relax run is to be parked for a job.

        One with the job's model loaded, if there is one, then in the order of the runs' ranks; if none is
        worth parking, the one whose run ends first.
        """
        best: tuple[bool, Entry] | None = None
        ending: Entry | None = None
        for kind, pools in self._pools.items():
            if not kind.can_run(fit):
                continue
            self._set_ending_apart(pools, fit.model, now_ms)
            entry, warm = pools.parkable.first(fit.model)
            if entry is not None and (best is None or (not warm, entry) < best):
                best = (not warm, entry)
            last = pools.ending.first()
            if last is not None and (ending is None or last < ending):
                ending = last
        if best is not None:
            worker_id, warm = best[1][-1], not best[0]
        elif ending is not None:
            worker_id = ending[-1]
            warm = fit.model in self._slots[worker_id].warm_models
        else:
            return None
        return Placement(worker_id, warm, self._hands[worker_id].active)

    def resumable(self) -> list[tuple[WorkerId, AttemptId]]:
        """Return the present workers that have nothing but a parked run, and that run."""
        return sorted(self._resumable.items())

    # -- what there is ------------------------------------------------------------------------------

    def is_present(self, worker_id: WorkerId) -> bool:
        return worker_id in self._slots

    def workers(self) -> Iterator[tuple[Worker, bool]]:
        """Return the present workers, and whether each drains."""
        for worker_id, slot in self._slots.items():
            kind = slot.kind
            worker = Worker(
                worker_id=worker_id,
                memory_bytes=kind.memory_bytes,
                speed_permille=kind.speed_permille,
                warm_models=frozenset(slot.warm_models),
                device=kind.device,
                models=kind.models,
            )
            yield worker, slot.draining

    def warm_models(self, worker_id: WorkerId) -> set[str]:
        return self._slots[worker_id].warm_models

    def device(self, worker_id: WorkerId) -> str:
        return self._slots[worker_id].kind.device

    def speed_permille(self, worker_id: WorkerId) -> int:
        """Return a worker's speed; that of the reference class if it is not present."""
        slot = self._slots.get(worker_id)
        return 1000 if slot is None else slot.kind.speed_permille

    def can_run_on(self, worker_id: WorkerId, fit: Fit) -> bool:
        return self._slots[worker_id].kind.can_run(fit)

    def is_empty(self) -> bool:
        return not self._slots

    def can_take(self, fit: Fit) -> bool:
        """Return whether some worker that does not drain could run such a job."""
        return any(kind.can_run(fit) for kind in self._kinds_taking)

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

    # -- keeping the ranks --------------------------------------------------------------------------

    def _take_part(self, worker_id: WorkerId, slot: _Slot, change: int) -> None:
        """Count a worker in or out of those that take jobs."""
        if change < 0:
            self._withdraw(worker_id, slot, self.hands(worker_id))
        if not slot.draining:
            _count(self._kinds_taking, slot.kind, change)
            self.taking += change
            self.fast_held += change * self.hands(worker_id).fast
        if change > 0:
            self._offer(worker_id, slot, self.hands(worker_id))

    def _offer(self, worker_id: WorkerId, slot: _Slot, hands: Hands) -> None:
        if hands.active is None and hands.parked is not None:
            self._resumable[worker_id] = hands.parked
        if slot.draining:
            return
        pools = slot.pools
        if hands.active is None:
            self.idle += 1
            if hands.parked is None:
                self.open += 1
                pools.open.put((worker_id,), slot.warm_models)
            else:
                pools.held.put((worker_id,), slot.warm_models)
            return
        pools.relax_held += not hands.fast
        if slot.parkable is not None and hands.parked is None:
            pools.parkable.put(slot.parkable.rank, slot.warm_models)

    def _withdraw(self, worker_id: WorkerId, slot: _Slot, hands: Hands) -> None:
        if hands.active is None and hands.parked is not None:
            self._resumable.pop(worker_id, None)
        if slot.draining:
            return
        pools = slot.pools
        if hands.active is None:
            self.idle -= 1
            if hands.parked is None:
                self.open -= 1
                pools.open.discard(worker_id, slot.warm_models)
            else:
                pools.held.discard(worker_id, slot.warm_models)
            return
        pools.relax_held -= not hands.fast
        if slot.parkable is not None:
            pools.parkable.discard(worker_id, slot.warm_models)
            pools.ending.discard(worker_id)

    def _set_ending_apart(self, pools: _Pools, model: str, now_ms: int) -> None:
        """Take the runs at the head that are about to end by now out of those worth parking.

        Which runs those are follows from the time alone, so it is no change of what the board knows.
        """
        while (entry := pools.parkable.first(model)[0]) is not None:
            worker_id: WorkerId = entry[-1]
            slot = self._slots[worker_id]
            assert slot.parkable is not None
            if now_ms <= slot.parkable.worth_until_ms:
                return
            pools.parkable.discard(worker_id, slot.warm_models)
            pools.ending.put((slot.parkable.ends_ms, worker_id))


def _count(kinds: dict[Kind, int], kind: Kind, change: int) -> None:
    count = kinds.get(kind, 0) + change
    if count:
        kinds[kind] = count
    else:
        del kinds[kind]


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
