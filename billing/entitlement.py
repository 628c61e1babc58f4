"""What a plan gives an account for a period: by which version, how much, and what of it rolls over.

Values only, without a database: a renewal and the dry run of a plan's new version decide by this one rule. A
version at once brings the period's time to its quota, as far as more of it is not used or held already. It is
a target and no difference: a quota that was lowered when all was used, and is raised again, grants nothing.
And what comes of several versions does not depend on whether anybody touched the account between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from billing.periods import Period, period_at

_US = timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """What of a plan's version decides how much it gives."""

    version: int
    quota_ms: int
    rollover_ms: int
    at_once: bool
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanTime:
    """What an account has of its plan for one period, in GPU milliseconds."""

    given_ms: int
    """By versions and by changes of plan, less what these took back; whatever admins did is not in it."""
    missed_ms: int
    """What changes of plan did not give of what they raised the quota by: its share of the time before."""
    unused_ms: int
    """Neither used nor held, of all that a plan gave for the period."""

    def to(self, quota_ms: int) -> int:
        """Return what must be granted for a quota, in GPU ms; negative: what can be taken back for it."""
        return max(self.short_of(quota_ms), -self.unused_ms)

    def short_of(self, quota_ms: int) -> int:
        """Return what is missing to a quota, in GPU ms; negative: what is too much, unused or not."""
        return quota_ms - self.missed_ms - self.given_ms

    def plus(self, ms: int) -> PlanTime:
        """Return it after a grant, or, if negative, a cut."""
        return replace(self, given_ms=self.given_ms + ms, unused_ms=self.unused_ms + ms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """An account as it was left when it was last touched."""

    account_id: str
    plan: str
    version: int
    scheduled_plan: str | None
    anchor: datetime
    period: Period
    time: PlanTime
    living_ms: int
    """What it can still take of all lots that live at the moment asked about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Renewed:
    """What brings a standing to the present."""

    plan: str
    version: Version
    scheduled_plan: str | None
    period: Period
    time: PlanTime
    """Of `period`, when the rest of this is done."""
    moved_by: int
    """Version of the standing's plan that moves `moved_ms`."""
    moved_ms: int
    """To be granted, or if negative taken back, in the standing's period: for versions at once made in it."""
    rolled_ms: int
    """To go into the new period of what is left of the one before it."""


def renewed(standing: Standing, versions: Mapping[str, Sequence[Version]], at: datetime) -> Renewed:
    """Return what brings an account to the period that contains `at`, and to its version.

    `versions` has all of its plan, and of the one it changes to, in the order of their numbers, which count
    from 1 without gaps.
    """
    own = versions[standing.plan]
    current, newer = own[standing.version - 1], own[standing.version :]
    if at < standing.period.end:
        version, moved_ms = _at_once(current, newer, standing.time)
        return Renewed(
            plan=standing.plan,
            version=version,
            scheduled_plan=standing.scheduled_plan,
            period=standing.period,
            time=standing.time.plus(moved_ms),
            moved_by=version.version,
            moved_ms=moved_ms,
            rolled_ms=0,
        )
    # A version at once belongs to the period it was made in, also where that was over before anybody came.
    last, moved_ms = _at_once(current, _made_before(newer, standing.period.end), standing.time)
    plan = standing.scheduled_plan or standing.plan
    least = last.version if plan == standing.plan else 1
    period = period_at(standing.anchor, at)
    if period.start == standing.period.end:
        rolled_ms = min(last.rollover_ms, standing.time.unused_ms + moved_ms)
    else:
        # Of the periods between nothing was used: each left to the next what it may.
        before = period_at(standing.anchor, period.start - _US)
        of_before = _newest_of(versions[plan], least, before, until=before.end)
        rolled_ms = min(of_before.rollover_ms, of_before.quota_ms)
    version = _newest_of(versions[plan], least, period, until=None)
    return Renewed(
        plan=plan,
        version=version,
        scheduled_plan=None,
        period=period,
        time=PlanTime(given_ms=version.quota_ms, missed_ms=0, unused_ms=version.quota_ms),
        moved_by=last.version,
        moved_ms=moved_ms,
        rolled_ms=rolled_ms,
    )


def _at_once(current: Version, newer: Sequence[Version], time: PlanTime) -> tuple[Version, int]:
    """Return the version in force after `newer` ones came, and what that grants or takes back.

    None that leaves the quota as it is moves time: what was given back to an account whose quota had been
    lowered before stays its own when only the plan's limits change.
    """
    at_once = [version for version in newer if version.at_once]
    last = at_once[-1] if at_once else current
    changed = any(version.quota_ms != current.quota_ms for version in at_once)
    return last, time.to(last.quota_ms) if changed else 0


def _newest_of(versions: Sequence[Version], least: int, period: Period, until: datetime | None) -> Version:
    """Return the version that a period has at its end, or so far: from `least` on, the newest when it began,
    and then those at once.
    """
    made = _made_before(versions, period.start + _US)
    begun_with = versions[max(made[-1].version if made else 1, least) - 1]
    newer = versions[begun_with.version :]
    at_once = [one for one in (newer if until is None else _made_before(newer, until)) if one.at_once]
    return at_once[-1] if at_once else begun_with


def _made_before(versions: Sequence[Version], moment: datetime) -> list[Version]:
    return [version for version in versions if version.created_at < moment]
