"""Sums and peaks over a fleet, behind the metrics that show them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpu_worker.contract import GpuTime
from scheduler.metrics.labels import GpuUse

# What was written off of a life that goes on after all is taken back from what it tells of later, in this
# order: what nobody looks at first.
_TAKEN_BACK_FROM = (GpuUse.WASTED, GpuUse.IDLE, GpuUse.LOAD, GpuUse.RELAX, GpuUse.FAST)


@dataclass
class _Life:
    """What is known of one incarnation of a worker."""

    counted: GpuTime
    """Of its own figures; the first of them, where they are older than the account."""
    alive_ms: int
    """How long it had lived when it was first heard, as far as that is counted here."""
    first_heard_ms: int
    added_ms: int = 0
    written_off_ms: int = 0


class GpuTimeAccount:
    """Adds up the GPU time of a fleet whose workers each count their own, from their start.

    A worker that starts again counts from 0 under a new incarnation, so each incarnation is counted for
    itself, and reports may arrive late or in any order. A worker does not tell of the time of an attempt
    before it knows whether it was of use: of one that died, that time is written off.

    What was added stays added; of a worker that will not be heard again nothing else need be kept.
    """

    def __init__(self, *, since_ms: int) -> None:
        self._since_ms = since_ms
        self._lives: dict[str, dict[str, _Life]] = {}
        """By worker, then by incarnation."""

    def __len__(self) -> int:
        """Return how many lives are known."""
        return sum(map(len, self._lives.values()))

    def add(self, worker_id: str, incarnation: str, total: GpuTime, now_ms: int) -> GpuTime:
        """Return what is new in `total`, the time of this incarnation since its start, heard at `now_ms`.

        Of a worker older than this account only the time after its first report is new. The rest was counted
        by the scheduler before; a counter that begins with hours in it reads as hours of work in a second.
        """
        lives = self._lives.setdefault(worker_id, {})
        life = lives.get(incarnation)
        if life is None:
            told_ms = _wall_ms(total)
            older_than_account = told_ms > now_ms - self._since_ms
            life = lives[incarnation] = _Life(
                counted=total if older_than_account else GpuTime(),
                alive_ms=total.open_ms + (0 if older_than_account else told_ms),
                first_heard_ms=now_ms,
            )
        newest = _each_use(max, total, life.counted)
        new = _each_use(int.__sub__, newest, life.counted)
        life.counted = newest
        for use in _TAKEN_BACK_FROM:
            back_ms = min(spent_ms(new, use), life.written_off_ms)
            life.written_off_ms -= back_ms
            new = replace(new, **{f"{use}_ms": spent_ms(new, use) - back_ms})
        life.added_ms += _wall_ms(new)
        return new

    def close(self, worker_id: str, incarnation: str, *, busy: bool, now_ms: int) -> GpuTime:
        """Return what a worker lived, and told of no more when it ended: wasted if it was busy, else idle."""
        life = self._lives.get(worker_id, {}).get(incarnation)
        if life is None:
            return GpuTime()
        lived_ms = life.alive_ms + now_ms - life.first_heard_ms
        untold_ms = max(0, lived_ms - life.added_ms)
        life.added_ms += untold_ms
        life.written_off_ms += untold_ms
        return GpuTime(wasted_ms=untold_ms) if busy else GpuTime(idle_ms=untold_ms)

    def forget(self, worker_id: str, *, but: str = "") -> None:
        """Forget the lives of a worker, but for one. A life that tells more after this is counted anew."""
        kept = self._lives.pop(worker_id, {}).get(but)
        if kept is not None:
            self._lives[worker_id] = {but: kept}


class RollingPeak:
    """The highest value seen within a window.

    It is not reset when it is read: of two scrapers each would rob the other.
    """

    def __init__(self, window_ms: int) -> None:
        self._window_ms = window_ms
        # Times rise and values fall from left to right: what is older and lower never becomes the peak.
        self._falling: deque[tuple[int, int]] = deque()

    def saw(self, value: int, now_ms: int) -> int:
        """Return the highest value of the window that ends at `now_ms`, with this one."""
        while self._falling and self._falling[-1][1] <= value:
            self._falling.pop()
        self._falling.append((now_ms, value))
        while self._falling[0][0] <= now_ms - self._window_ms:
            self._falling.popleft()
        return self._falling[0][1]


def spent_ms(time: GpuTime, use: GpuUse) -> int:
    """Return the time of one use."""
    spent: int = getattr(time, f"{use}_ms")
    return spent


def _wall_ms(time: GpuTime) -> int:
    return sum(spent_ms(time, use) for use in GpuUse)


def _each_use(operation: Callable[[int, int], int], left: GpuTime, right: GpuTime) -> GpuTime:
    return GpuTime(**{f"{use}_ms": operation(spent_ms(left, use), spent_ms(right, use)) for use in GpuUse})
