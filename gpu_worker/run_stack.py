"""Which run has the GPU: at most one at any instant, the newest that is ready.

Each run has a thread of its own, and the right to use the GPU passes between them at boundaries. A run that
finds a newer one ready at its boundary gives way and waits there, parked, inside whatever pipeline called
it; when all above it have left, it goes on. Nothing of a parked run is copied, moved or rebuilt for that: its
stack frames are its state, which is why it comes out bit-identical.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from gpu_worker.run import RunStopped


class Place:
    """A run's place on the stack."""

    def __init__(self, *, urgent: bool = False) -> None:
        """One that is `urgent` stays above all that come after it, until it leaves."""
        self.urgent = urgent
        self.ready = False
        self.stopped = False


class RunStack:
    """The runs that need the GPU, the newest on top. Any thread may call it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._places: list[Place] = []
        self._holder: Place | None = None

    def enter(self, place: Place, *, ready: bool) -> None:
        """Put a run on top, below what is urgent.

        The one below goes on until this one is ready: a picture to start from can be fetched without the GPU.
        """
        with self._changed:
            place.ready = ready
            above = sum(each.urgent for each in self._places)
            self._places.insert(len(self._places) - above, place)

    def take(self, place: Place) -> None:
        """Wait until the GPU is this run's: it is free, and no newer one is ready. Raises RunStopped."""
        with self._changed:
            place.ready = True
            self._changed.wait_for(lambda: place.stopped or self._may_begin(place))
            if place.stopped:
                raise RunStopped
            self._holder = place

    def gives_way(self, place: Place) -> bool:
        """Return whether a newer run is ready for the GPU."""
        with self._changed:
            return self._next() is not place

    def put_down(self, place: Place) -> None:
        """Let the GPU go to whoever is next."""
        with self._changed:
            assert self._holder is place, "only who has the GPU can put it down"
            self._holder = None
            self._changed.notify_all()

    def leave(self, place: Place) -> None:
        """Take a run from the stack, wherever it is in it."""
        with self._changed:
            self._places.remove(place)
            if self._holder is place:
                self._holder = None
            self._changed.notify_all()

    def stop(self, place: Place) -> None:
        """Let a run that waits, or will wait, for the GPU end instead."""
        with self._changed:
            place.stopped = True
            self._changed.notify_all()

    def lift(self, place: Place) -> Sequence[Place]:
        """Let a run be the next after the one on top; return the order after that, the top last."""
        with self._changed:
            if place in self._places[:-1]:
                self._places.remove(place)
                self._places.insert(-1, place)
            return tuple(self._places)

    def _may_begin(self, place: Place) -> bool:
        return self._holder is None and self._next() is place

    def _next(self) -> Place | None:
        return next((place for place in reversed(self._places) if place.ready), None)
