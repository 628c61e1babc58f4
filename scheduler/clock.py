"""The leader's time: the database's at takeover, then this machine's monotonic clock.

Clocks of machines differ and jump; a scheduler that took its own wall clock would, after a failover, see
time run backwards. The monotonic clock never jumps, and the start never lies below what an earlier leader
acted at.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)


def to_ms(moment: datetime) -> int:
    """Return milliseconds since 1970 of an aware datetime, rounded down."""
    return (moment - _EPOCH) // _MS


def from_ms(ms: int) -> datetime:
    """Return the UTC datetime of milliseconds since 1970."""
    return _EPOCH + timedelta(milliseconds=ms)


@dataclass(frozen=True, kw_only=True)
class LeaderClock:
    """Milliseconds since 1970, never going back."""

    started_ms: int
    """The later of the database's time and the last leader's newest, at takeover."""
    _monotonic_ns: int = field(default_factory=time.monotonic_ns)

    def now_ms(self) -> int:
        """Return the present time."""
        return self.started_ms + (time.monotonic_ns() - self._monotonic_ns) // 1_000_000
