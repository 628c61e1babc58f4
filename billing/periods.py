"""Monthly periods that keep the day they began on.

A subscription that began on 31 January renews on 28 February, 31 March, 30 April: each boundary is
counted from the anchor, never from the one before it, so a short month shortens nothing after it. Periods
are half-open and in UTC, so daylight saving moves none of them.
"""

from __future__ import annotations

import calendar
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Period:
    """From `start` up to, and without, `end`; both aware, in UTC."""

    start: datetime
    end: datetime


def period_at(anchor: datetime, at: datetime) -> Period:
    """Return the period that contains `at`, which is not before `anchor`; both are aware."""
    anchor, at = anchor.astimezone(UTC), at.astimezone(UTC)
    assert at >= anchor, "a subscription has no period before its anchor"
    months = (at.year - anchor.year) * 12 + at.month - anchor.month
    if _boundary(anchor, months) > at:
        months -= 1
    return Period(start=_boundary(anchor, months), end=_boundary(anchor, months + 1))


def _boundary(anchor: datetime, months: int) -> datetime:
    years, month_index = divmod(anchor.month - 1 + months, 12)
    year, month = anchor.year + years, month_index + 1
    return anchor.replace(year=year, month=month, day=min(anchor.day, calendar.monthrange(year, month)[1]))
