"""Has as many GPUs as the work asks for, within bounds that are set.

The number comes from the policy; the cluster is asked for that many, never told by how busy it is. Machines
beyond it are spare: their workers finish what they have in hand or hand it over, and end, so that whoever
rents the machines sees that they are idle, and takes them back. What is wanted again before that gets its
workers again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import structlog

from scheduler.desk import Desk
from scheduler.policy.fleet_size import Machine, spare_machines

_log = structlog.get_logger()


class Scaling:
    """Of one leader."""

    def __init__(self, desk: Desk, *, wanted_gpus: Callable[[], int]) -> None:
        """Have as many GPUs as `wanted_gpus` returns, whenever it is looked at."""
        self._desk = desk
        self._wanted_gpus = wanted_gpus
        self._wanted: int | None = None

    def go_on(self, now_ms: int) -> None:
        """Ask for what is wanted now, and say which slots are to have no workers: called every second or so.

        While what waited before this scheduler led is being read, nobody knows: the fleet stays as it is.
        """
        if not self._desk.board.is_whole:
            return
        wanted = self._wanted_gpus()
        machines = self._machines()
        spare = spare_machines(machines.values(), wanted)
        if wanted != self._wanted:
            _log.info("workers wanted", workers=wanted, machines=len(machines), spare=len(spare))
            self._wanted = wanted
        slots = {slot for slot in self._desk.fleet.slots() if _machine_of(slot) in spare}
        # Before they are emptied: a worker that ends is not to be started again.
        self._desk.fleet.want(wanted, slots)
        for worker_id in self._desk.workers.spare_slots(slots, now_ms):
            self._desk.look_at(worker_id)

    def _machines(self) -> dict[str, Machine]:
        """Return the machines that stay, but for whose work."""
        slots = defaultdict(list)
        for slot in self._desk.fleet.slots():
            slots[_machine_of(slot)].append(slot)
        return {machine_id: self._machine(machine_id, ids) for machine_id, ids in slots.items()}

    def _machine(self, machine_id: str, slots: list[str]) -> Machine:
        workers = self._desk.workers
        present = [slot for slot in slots if workers.report(slot) is not None]
        idle_since_ms = [workers.idle_since_ms(worker_id) for worker_id in present]
        known = [since_ms for since_ms in idle_since_ms if since_ms is not None]
        return Machine(
            machine_id=machine_id,
            gpus=len(slots),
            workers=len(present),
            runs=sum(len(self._desk.running.on(slot)) for slot in slots),
            idle_since_ms=max(known) if known and len(known) == len(present) else None,
            is_spare=any(slot in workers.spare for slot in slots),
        )


def _machine_of(worker_id: str) -> str:
    return worker_id.rpartition("/")[0]
