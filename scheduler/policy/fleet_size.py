"""How a fleet follows its demand: it grows at once, shrinks after a while, and by the machines that are least
missed, each as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Within which a fleet follows its work."""

    at_least: int
    """GPUs to have without any work."""
    at_most: int
    """The budget."""
    shrinks_after_ms: int
    """How long fewer are enough before there are fewer."""


class SteadyDemand:
    """The largest demand of the last while.

    Work that comes in bursts would otherwise end and start the same workers again and again, each start at
    the price of a model's loading. Nothing steadies the way up: work waits.
    """

    def __init__(self, gpus: int, now_ms: int, *, shrinks_after_ms: int) -> None:
        """Begin with a fleet of so many GPUs. Each demand is kept to for `shrinks_after_ms`."""
        self._shrinks_after_ms = shrinks_after_ms
        self._peaks = deque([(now_ms, gpus)])
        """When, and how many; each later one is smaller."""

    def wanted(self, gpus: int, now_ms: int) -> int:
        """Return how many GPUs to have, now that `gpus` are asked for; time never goes back."""
        while self._peaks and self._peaks[-1][1] <= gpus:
            self._peaks.pop()
        self._peaks.append((now_ms, gpus))
        while self._peaks[0][0] < now_ms - self._shrinks_after_ms:
            self._peaks.popleft()
        return self._peaks[0][1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What leaves the fleet, or stays in it, as a whole: nobody gives back one GPU of a machine."""

    machine_id: str
    gpus: int
    workers: int
    """Those that are there. One that was spared has none, or fewer than GPUs."""
    runs: int
    """What its workers have in hand: each would have to be finished first, or go on elsewhere."""
    idle_since_ms: int | None
    """When the last of its workers fell idle; None: one is at work, or it has none."""
    is_spare: bool
    """It was not needed a moment ago."""


def spare_machines(machines: Iterable[Machine], gpus: int) -> frozenset[str]:
    """Return the machines without which there are still as many GPUs: as many machines as that allows.

    Those with the least in hand first: what is finished or moved costs somebody a wait. Among these, those
    without workers, which would have to be started; then those that were spare before, so that the choice
    does not wander; then those that are idle for longest. The id ends every tie.
    """
    ordered = sorted(machines, key=_missed)
    left = sum(machine.gpus for machine in ordered)
    spare = set()
    for machine in ordered:
        if left - machine.gpus >= gpus:
            left -= machine.gpus
            spare.add(machine.machine_id)
    return frozenset(spare)


def _missed(machine: Machine) -> tuple[int, int, bool, int, str]:
    idle_since_ms = machine.idle_since_ms if machine.idle_since_ms is not None else 0
    return machine.runs, machine.workers, not machine.is_spare, idle_since_ms, machine.machine_id
