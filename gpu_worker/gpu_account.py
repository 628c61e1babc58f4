"""Where the time of one GPU went: a closed account, each instant in exactly one use.

Loading and idling are measured here, by the instants at which the GPU passes from one to the other.
Time of attempts comes from the engine's stage clock, to the millisecond that money is counted by, and stays
open until it is known whether it was of use. That the parts add up to the wall time is therefore a
statement about the measurements, and tested as one.
"""

from __future__ import annotations

import threading
from enum import StrEnum

from gpu_worker.contract import GpuTime

_NS_PER_MS = 1_000_000


class Doing(StrEnum):
    """What whoever has the GPU does with it. While nobody has it, it is idle."""

    IDLE = "idle"
    LOAD = "load"
    RUN = "run"


class GpuAccount:
    """Written by the thread that has the GPU, read and settled from the event loop's."""

    def __init__(self, now_ns: int) -> None:
        self._lock = threading.Lock()
        self._doing = Doing.IDLE
        self._since_ns = now_ns
        self._measured_ns = {Doing.IDLE: 0, Doing.LOAD: 0}
        self._open_ms = 0
        self._settled_ms = {"fast": 0, "relax": 0, "wasted": 0}

    def turn_to(self, doing: Doing, now_ns: int) -> int:
        """Give the time from now on to `doing`; return the nanoseconds since the last turn."""
        with self._lock:
            spent_ns = now_ns - self._since_ns
            if self._doing in self._measured_ns:
                self._measured_ns[self._doing] += spent_ns
            self._doing, self._since_ns = doing, now_ns
            return spent_ns

    def count(self, gpu_ms: int) -> None:
        """Add what the stage clock of a run has measured since it was last asked; open until settled."""
        with self._lock:
            self._open_ms += gpu_ms

    def settle(self, gpu_ms: int, use: str) -> None:
        """Close an ended run's time under its use: `fast`, `relax` or `wasted`."""
        with self._lock:
            self._open_ms -= gpu_ms
            self._settled_ms[use] += gpu_ms
            assert self._open_ms >= 0, "settled more time than was measured"

    def read(self, now_ns: int) -> GpuTime:
        """Return the account as of now, with what the thread is doing counted up to this instant."""
        with self._lock:
            current_ns = {self._doing: now_ns - self._since_ns}
            return GpuTime(
                fast_ms=self._settled_ms["fast"],
                relax_ms=self._settled_ms["relax"],
                wasted_ms=self._settled_ms["wasted"],
                load_ms=(self._measured_ns[Doing.LOAD] + current_ns.get(Doing.LOAD, 0)) // _NS_PER_MS,
                idle_ms=(self._measured_ns[Doing.IDLE] + current_ns.get(Doing.IDLE, 0)) // _NS_PER_MS,
                open_ms=self._open_ms + current_ns.get(Doing.RUN, 0) // _NS_PER_MS,
            )
