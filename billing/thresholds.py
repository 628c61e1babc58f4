"""Thresholds: half, four fifths and all of a period's fast time used up; each is told once a period.

A period's fast time is that of the lots that began in it: the plan's, and whatever was granted, carried over
or bought since. Time from before it burns too, but is not of the period.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from billing.accounts import Terms
from billing.entries import Lot

PERCENTS = (50, 80, 100)


def reached(used_ms: int, granted_ms: int) -> tuple[int, ...]:
    """Return which of the shares of `granted_ms` are used up; none where nothing was granted."""
    if not granted_ms:
        return ()
    return tuple(percent for percent in PERCENTS if used_ms * 100 >= granted_ms * percent)


def reached_by(lots: Iterable[Lot], period_start: datetime, at: datetime) -> tuple[int, ...]:
    """Return which shares of a period's fast time are used up, from an account's lots as they are at `at`."""
    of_period = [lot for lot in lots if lot.effective_at >= period_start and lot.lives(at)]
    return reached(
        sum(lot.used_ms for lot in of_period), sum(lot.granted_ms - lot.revoked_ms for lot in of_period)
    )


def reached_in_periods(
    terms: Mapping[str, Terms], lots_of: Mapping[str, Sequence[Lot]], at: datetime
) -> list[tuple[str, datetime, int]]:
    """Return (account, start of its present period, percent) for all that accounts have reached of theirs.

    `lots_of` are their lots as they are at `at`. What of it was told before, `threshold_event` knows.
    """
    return [
        (account_id, terms[account_id].period_start, percent)
        for account_id, lots in lots_of.items()
        for percent in reached_by(lots, terms[account_id].period_start, terms[account_id].in_period(at))
    ]
