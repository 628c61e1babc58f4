"""What an audit found: for every bound, how often it was checked, how close it came, and where."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from scheduler.policy.ids import AccountId, AttemptId, JobId, WorkerId


class Bound(StrEnum):
    """The promises that a journal can speak about: the policy's bounds by their ids, then its rules."""

    O1 = "O1"
    O2 = "O2"
    B1 = "B1"
    B2 = "B2"
    B3 = "B3"
    B4 = "B4"
    B5 = "B5"
    B7 = "B7"
    B8 = "B8"
    B9 = "B9"
    B10 = "B10"
    B11 = "B11"
    B13 = "B13"
    B14 = "B14"
    B15 = "B15"
    ORDER = "order"
    AGED = "aged"
    TAGS = "tags"


class Verdict(StrEnum):
    """What is to be said of a bound."""

    HOLDS = "holds"
    VIOLATED = "violated"
    NO_CASES = "no_cases"
    """Nothing in the period could have broken it."""
    OBSERVED = "observed"
    """It has no number that a period could exceed: the worst is told, and judged by whoever reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """A bound in words."""

    sentence: str
    unit: str
    """Of its margin: what could have been added before it broke."""


PROMISES = {
    Bound.O1: Promise(
        sentence="of two accounts that become eligible together, the one that used less is served first",
        unit="GPU-ms of use per weight",
    ),
    Bound.O2: Promise(
        sentence="of two that wait side by side, who used more gets at most one start more", unit="starts"
    ),
    Bound.B1: Promise(
        sentence="the service of two that wait side by side differs by at most a job of each",
        unit="GPU-ms per weight",
    ),
    Bound.B2: Promise(sentence="a wait is bounded by the distance of the tag", unit="ms"),
    Bound.B3: Promise(sentence="an account without use starts within a job of each other", unit="ms"),
    Bound.B4: Promise(sentence="whoever returns starts within the span of memory", unit="ms"),
    Bound.B5: Promise(sentence="who returns gets at most half beside one rival, and a job", unit="starts"),
    Bound.B7: Promise(
        sentence="virtual time never decreases and is the largest start tag served",
        unit="GPU-us per weight",
    ),
    Bound.B8: Promise(sentence="no GPU idles while an eligible job it could run waits", unit="ms"),
    Bound.B9: Promise(sentence="use is what was executed and not wasted", unit="GPU-ms"),
    Bound.B10: Promise(sentence="caps and accepted limits are never exceeded", unit="jobs"),
    Bound.B11: Promise(sentence="a worker runs one attempt, a running job has one", unit="attempts"),
    Bound.B13: Promise(sentence="fast starts at once where a relax run can be parked", unit="ms"),
    Bound.B14: Promise(sentence="a fast job parks one run at most, and relax parks nobody", unit="runs"),
    Bound.B15: Promise(sentence="no relax job and no parked run waits for ever (the longest)", unit="ms"),
    Bound.ORDER: Promise(
        sentence="the smallest key goes first, within theta if warm", unit="GPU-us per weight"
    ),
    Bound.AGED: Promise(sentence="little is started for its age", unit="GPU-ms"),
    Bound.TAGS: Promise(sentence="tags follow from the charges", unit="GPU-us per weight"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """When and about whom something was checked."""

    at_ms: int
    accounts: tuple[AccountId, ...] = ()
    job_id: JobId | None = None
    attempt_id: AttemptId | None = None
    worker_id: WorkerId | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the audit says of one bound."""

    bound: Bound
    verdict: Verdict
    cases: int
    """How often it could have been broken."""
    violations: int
    set_aside: int
    """Cases that could not be judged: something before the period is not known, or no GPU was open."""
    worst_margin: float | None
    """Bound minus what was observed, where that is smallest; negative where it was broken. For an observed
    one, the largest that was. None: no cases."""
    worst: Case | None
    widened: tuple[str, ...] = ()
    """The assumptions that did not hold in the period, and what was added for them."""

    @property
    def promise(self) -> Promise:
        """The bound in words."""
        return PROMISES[self.bound]
