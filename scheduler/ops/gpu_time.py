"""Where the GPU time of the last hour went, and how fast each tier starts jobs.

The scheduler counts both from its own start. Here its page of metrics is read four times a minute, so what is
known is as old as this process at most; of minutes in which the scheduler did not answer nothing is told.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import structlog
from prometheus_client.parser import text_string_to_metric_families

from scheduler.metrics import GpuUse, Page
from scheduler.metrics.families import GPU_TIME, PLACEMENTS
from scheduler.policy.ids import Tier

MINUTES = 60

_log = structlog.get_logger()

_READ_EVERY_S = 15.0
# What was counted over a longer time is of no minute in particular.
_LONGEST_S = 60.0
_PACE_OVER_S = 300.0


@dataclass(frozen=True, kw_only=True)
class _Reading:
    at_s: float
    gpu_s: Mapping[GpuUse, float]
    started: Mapping[Tier, float]

    @property
    def counters(self) -> Sequence[float]:
        return [*(self.gpu_s[use] for use in GpuUse), *(self.started[tier] for tier in Tier)]


@dataclass(frozen=True, kw_only=True)
class Minute:
    """One minute of the last hour."""

    at_s: int
    """When it began, since 1970."""
    gpus: Mapping[GpuUse, float] | None
    """How many GPUs were in each use on average, as far as it is over; None: not known."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """GPU time of the last hour, as far as it is known."""

    minutes: Sequence[Minute]
    """All sixty, the newest last."""
    gpu_s: Mapping[GpuUse, float]
    """In seconds of GPU time."""

    @property
    def known(self) -> bool:
        """Whether there is anything to show."""
        return any(minute.gpus is not None for minute in self.minutes)

    def share(self, use: GpuUse) -> float:
        """Return the part of a use, from 0 to 1."""
        whole = sum(self.gpu_s.values())
        return self.gpu_s[use] / whole if whole else 0.0


class History:
    """What was read within the last hour. `clock_s` is the time since 1970, in seconds."""

    def __init__(
        self, scheduler_page: Callable[[str], Awaitable[Page]], clock_s: Callable[[], float]
    ) -> None:
        self._scheduler_page = scheduler_page
        self._clock_s = clock_s
        self._readings: deque[_Reading] = deque()

    async def run(self) -> None:
        """Read the scheduler's page now and then, until cancelled."""
        while True:
            try:
                page = await self._scheduler_page("")
            except TimeoutError:
                _log.debug("GPU time was not read: the scheduler is away")
            else:
                self.read(page, self._clock_s())
            await asyncio.sleep(_READ_EVERY_S)

    def read(self, page: Page, at_s: float) -> None:
        """Take in the scheduler's counters as they were at a time."""
        reading = _reading(page, at_s)
        while self._readings and self._readings[-1].at_s >= at_s:
            self._readings.pop()  # the clock was set back
        self._readings.append(reading)
        while self._readings[0].at_s < at_s - (MINUTES + 1) * 60:
            self._readings.popleft()

    def spent(self) -> Spent:
        """Return the last hour, by minutes and in all."""
        newest = int(self._clock_s() // 60)
        first_s = (newest - MINUTES + 1) * 60
        known_s: defaultdict[int, float] = defaultdict(float)
        gpu_s: defaultdict[int, dict[GpuUse, float]] = defaultdict(lambda: dict.fromkeys(GpuUse, 0.0))
        for before, after in self._known():
            for minute, part_s in _by_minute(before.at_s, after.at_s):
                known_s[minute] += part_s
                for use in GpuUse:
                    rate = (after.gpu_s[use] - before.gpu_s[use]) / (after.at_s - before.at_s)
                    gpu_s[minute][use] += rate * part_s
        minutes = [
            Minute(
                at_s=minute * 60,
                gpus={use: gpu_s[minute][use] / known_s[minute] for use in GpuUse}
                if minute in known_s
                else None,
            )
            for minute in range(first_s // 60, newest + 1)
        ]
        whole = {
            use: sum(spent[use] for minute, spent in gpu_s.items() if minute * 60 >= first_s)
            for use in GpuUse
        }
        return Spent(minutes=minutes, gpu_s=whole)

    def started_a_minute(self, tier: Tier) -> float | None:
        """Return how many jobs of a tier were started a minute, over the last five; None: not known."""
        since_s = self._clock_s() - _PACE_OVER_S
        lately = [(before, after) for before, after in self._known() if before.at_s >= since_s]
        lasted_s = sum(after.at_s - before.at_s for before, after in lately)
        if not lasted_s:
            return None
        return sum(after.started[tier] - before.started[tier] for before, after in lately) * 60 / lasted_s

    def _known(self) -> Iterator[tuple[_Reading, _Reading]]:
        """Yield readings and their followers between which one scheduler counted, and soon enough."""
        for before, after in pairwise(self._readings):
            began_anew = any(new < old for old, new in zip(before.counters, after.counters, strict=True))
            if after.at_s - before.at_s <= _LONGEST_S and not began_anew:
                yield before, after


def _by_minute(begin_s: float, end_s: float) -> Iterator[tuple[int, float]]:
    """Yield the minutes that a time touches, and how many seconds of each are in it."""
    for minute in range(int(begin_s // 60), int(end_s // 60) + 1):
        part_s = min(end_s, (minute + 1) * 60) - max(begin_s, minute * 60)
        if part_s > 0:
            yield minute, part_s


def _reading(page: Page, at_s: float) -> _Reading:
    # Of the whole page, which has a thousand lines, these are about ten.
    wanted = (f"{GPU_TIME.name}{{", f"{PLACEMENTS.name}{{")
    lines = [line for line in page.text.splitlines() if line.startswith(wanted)]
    gpu_s, started = dict.fromkeys(GpuUse, 0.0), dict.fromkeys(Tier, 0.0)
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            # A scheduler of a newer release may count what is not known here.
            use, tier = sample.labels.get("use"), sample.labels.get("tier")
            if use in gpu_s:
                gpu_s[GpuUse(use)] += sample.value
            elif tier in started:
                started[Tier(tier)] += sample.value
    return _Reading(at_s=at_s, gpu_s=gpu_s, started=started)
