"""Which models are in the device's memory, and which of them make room for the next.

What goes is what was not used for long and costs little to get back for the memory that it gives up:
GreedyDual-Size (Cao and Irani 1997, Cost-Aware WWW Proxy Caching Algorithms), with the measured seconds of a
load for the cost. Each use sets a model's credit to that of the last one evicted plus its seconds per byte,
and who has the least goes. So equal models go by who was used least recently, a large one goes before a small
one that loads as long, and none stays for ever for having been expensive once.

The model of whoever has the device is never evicted. That of a parked run may be: the run's stack holds its
weights, so they are not dropped but moved to the machine's memory, and back before the run goes on, which
changes no bit. A device without memory of its own gains nothing by that: there, what a run holds stays.

Nobody but whoever has the device loads, holds or evicts; runs that are stopped while they are parked let go.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from gpu_worker.engine.memory_ladder import MemoryLadder, free_caches, nothing_fails

_log = logging.getLogger(__name__)

_NS_PER_S = 1_000_000_000
_NS_PER_MS = 1_000_000
_LOAD = "load"


class Resident(Protocol):
    """Something with weights that lies in a device's memory."""

    @property
    def memory_bytes(self) -> int:
        """Of the weights."""

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]:
        """All that the weights are in, and each network whose calls are to be sheltered, by name."""


_R = TypeVar("_R", bound=Resident)


@dataclass(kw_only=True)
class _Place:
    """What is known of a resident that is here, or away since a run holds it."""

    resident: Resident
    credit: float
    movable: bool
    holders: int = 0
    away: bool = False


class Residency:
    """Of one device. `names` and `memory_used_bytes` are for any thread."""

    def __init__(
        self,
        *,
        memory_bytes: int,
        device: torch.device,
        spare: torch.device | None,
        allocating: Callable[[str], None] = nothing_fails,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`spare` is where weights wait that a parked run holds; None where moving them gains nothing.

        `allocating` is the ladder's.
        """
        self._memory_bytes = memory_bytes
        self._device = device
        self._spare = spare
        self._now_ns = now_ns
        # What it guards is changed by whoever has the device, and by parked runs that end.
        self._lock = threading.Lock()
        self._places: dict[str, _Place] = {}
        self._load_ns: dict[str, int] = {}
        self._last_credit = 0.0
        self._active = ""
        self.ladder = MemoryLadder(device, evict=self.evict_coldest, allocating=allocating)

    def names(self) -> tuple[str, ...]:
        """Return what is in the device's memory."""
        with self._lock:
            return tuple(name for name, place in self._places.items() if not place.away)

    def memory_used_bytes(self) -> int:
        """Return the bytes of all weights in the device's memory."""
        with self._lock:
            return sum(place.resident.memory_bytes for place in self._places.values() if not place.away)

    def load(
        self, name: str, make: Callable[[], Resident], *, needed_bytes: int, movable: bool = True
    ) -> bool:
        """Bring something into memory, unless it is there; what is cold makes room where there is too little.

        `make` loads it, and `needed_bytes` are what it takes with a use of it. What is `movable` is a model:
        it is that of whoever has the device from now on. What is not is what runs use beside their models,
        and stays as long as one holds it. Returns whether it was not there. Raises what `make` does, and
        torch.OutOfMemoryError.
        """
        if movable:
            self._active = name
        with self._lock:
            place = self._places.get(name)
            if place is not None:
                # A parked run that holds it may end meanwhile.
                place.holders += 1
        cold = place is None or place.away
        if place is None:
            place = self._made(name, make, needed_bytes, movable)
        try:
            if place.away:
                self._bring_back(name, place, needed_bytes)
            self._credit(name, place)
        finally:
            self._let_go(name, place)
        return cold

    @contextmanager
    def held(self, name: str, kind: type[_R], *, needed_bytes: int = 0) -> Iterator[_R]:
        """Hold what was loaded under a name for one run, which `needed_bytes` are to suffice for.

        While the run is parked its model may be moved away: `load` brings it back, before the run goes on.
        """
        with self._lock:
            place = self._places[name]
            place.holders += 1
        try:
            assert isinstance(place.resident, kind)
            assert not place.away, f"{name} was not loaded"
            if place.movable:
                self._active = name
            self._make_room(name, needed_bytes)
            self._credit(name, place)
            yield place.resident
        finally:
            self._let_go(name, place)

    def evict_coldest(self) -> bool:
        """Free the memory of what is worth least there; False where all that is there must stay."""
        with self._lock:
            evictable = {name: place for name, place in self._places.items() if self._may_go(name, place)}
            if not evictable:
                return False
            name = min(evictable, key=lambda each: evictable[each].credit)
            place = evictable.pop(name)
            self._last_credit = place.credit
            kept = place.holders > 0
            if kept:
                place.away = True
            else:
                del self._places[name]
        freed_bytes = place.resident.memory_bytes
        if kept:
            assert self._spare is not None
            _move(place.resident, self._spare)
        del place
        free_caches(self._device)
        _log.info("model evicted model=%s freed_bytes=%d kept_for_run=%s", name, freed_bytes, kept)
        return True

    def _made(self, name: str, make: Callable[[], Resident], needed_bytes: int, movable: bool) -> _Place:
        self._make_room(name, needed_bytes)
        began_ns = self._now_ns()
        resident = self.ladder.done(_LOAD, make)
        self._load_ns[name] = self._now_ns() - began_ns
        for network, module in resident.modules.items():
            self.ladder.shelter(network, module)
        place = _Place(resident=resident, credit=0.0, movable=movable, holders=1)
        with self._lock:
            self._places[name] = place
        _log.info("model loaded model=%s load_ms=%d", name, self._load_ns[name] // _NS_PER_MS)
        return place

    def _bring_back(self, name: str, place: _Place, needed_bytes: int) -> None:
        self._make_room(name, needed_bytes)
        began_ns = self._now_ns()
        # Where it fails in the middle, the next try moves the rest.
        self.ladder.done(_LOAD, lambda: _move(place.resident, self._device))
        with self._lock:
            place.away = False
        _log.info("model brought back model=%s load_ms=%d", name, (self._now_ns() - began_ns) // _NS_PER_MS)

    def _let_go(self, name: str, place: _Place) -> None:
        with self._lock:
            place.holders -= 1
            if place.away and not place.holders:
                # Nobody is left who would go on with it.
                del self._places[name]

    def _may_go(self, name: str, place: _Place) -> bool:
        if place.away or name == self._active:
            return False
        return not place.holders or (place.movable and self._spare is not None)

    def _make_room(self, name: str, needed_bytes: int) -> None:
        """Evict until so many bytes for `name` fit beside the others, or nothing is left to evict."""
        while True:
            with self._lock:
                others = sum(
                    place.resident.memory_bytes
                    for other, place in self._places.items()
                    if not place.away and other != name
                )
            if others + needed_bytes <= self._memory_bytes or not self.evict_coldest():
                return

    def _credit(self, name: str, place: _Place) -> None:
        """Say that it was used."""
        seconds = self._load_ns[name] / _NS_PER_S
        with self._lock:
            place.credit = self._last_credit + seconds / max(1, place.resident.memory_bytes)


def _move(resident: Resident, device: torch.device) -> None:
    """Move weights in place, so that everybody who holds them finds them there.

    Not by `Module.to`, which gives a module new buffers: where two share them, each would have its own.
    """
    for module in resident.modules.values():
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            tensor.data = tensor.data.to(device)
