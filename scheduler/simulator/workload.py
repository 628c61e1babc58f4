"""What is asked of the fleet: read from a trace, or drawn from a seed.

A workload is fixed before anything is simulated, tiers included, so that every policy meets the same one.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TextIO

from scheduler.policy.ids import AccountId, JobId, Tier

DAY_MS = 24 * 3_600_000
MONTH_MS = 30 * DAY_MS
GRID = 4
"""Images that a worker draws at once: a step is one of all of them."""
_STEPS = re.compile(r"_s(\d+)(?:_n(\d+))?(?:_|$)")


class TraceWrong(ValueError):
    """A trace file cannot be used; the message says where and what to do about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One job that a user will ask for."""

    job_id: JobId
    account_id: AccountId
    tier: Tier
    arrival_ms: int
    """When it comes, in an open loop."""
    think_ms: int
    """In a closed loop: how long after the end of its user's job before it it comes."""
    cost_ms: int
    """GPU time on a worker of speed 1000."""
    steps: int
    """Denoising steps, of one grid of images after the other. Between any two of them it can be parked."""
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FastRule:
    """Which jobs are fast where the trace does not say."""

    share: float = 0.2
    """Of an account's jobs, drawn job by job, are asked for as fast …"""
    allowance_ms: int = 200 * 60_000
    """… and are, while this much fast GPU time of a month (30 days of the trace) is left, and else relax. The
    default is the Basic plan's 200 GPU-minutes."""

    def __str__(self) -> str:
        return (
            f"{self.share * 100:g} % of the jobs ask for fast, drawn job by job, and are fast while the "
            f"account has something left of {self.allowance_ms / 60_000:g} fast GPU-min a month, then relax"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """The part of a trace that is used, and what is made of it."""

    from_hours: float = 0.0
    hours: float | None = None
    rows: int | None = None
    """The first so many of the part; None: all."""
    users_share: float = 1.0
    """Of the trace's users, drawn user by user with all their jobs: a day's shape for a smaller fleet."""
    divide_cost: float = 1.0
    """GPU time is divided by this."""
    step_ms: int = 1_000
    """Length of a step, for jobs whose kind does not tell their steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests by the time they come, and where they are from."""

    requests: tuple[Request, ...]
    span_ms: int
    """The time they come in: load is measured over it."""
    source: str
    """For the report: what this is, and what of it is made up."""
    closed: bool = False
    """A user waits for a picture, and thinks, before asking for the next."""

    @property
    def cost_ms(self) -> int:
        return sum(request.cost_ms for request in self.requests)

    @property
    def longest_ms(self) -> int:
        """The largest cost: `c_max`."""
        return max(request.cost_ms for request in self.requests)

    @property
    def models(self) -> tuple[str, ...]:
        """The models, the most used first."""
        used: dict[str, int] = {}
        for request in self.requests:
            used[request.model] = used.get(request.model, 0) + 1
        return tuple(sorted(used, key=lambda model: (-used[model], model)))

    def load(self, capacity: float) -> float:
        """Return the GPU time asked for over the time it comes in, as a share of what a fleet has."""
        return self.cost_ms / (self.span_ms * capacity)

    def at_load(self, load: float, capacity: float) -> Workload:
        """Return the same jobs in the same order, their arrivals and thinking stretched to this load."""
        stretch = self.load(capacity) / load
        return replace(
            self,
            requests=tuple(
                replace(
                    request,
                    arrival_ms=round(request.arrival_ms * stretch),
                    think_ms=round(request.think_ms * stretch),
                )
                for request in self.requests
            ),
            span_ms=max(1, round(self.span_ms * stretch)),
        )


def read_trace(path: Path, *, cut: Cut, fast: FastRule, seed: int) -> Workload:
    """Return a workload from a CSV file, plain or gzip.

    Columns, named in the first line: `arrival_s`, `user`, `kind`, `gpu_seconds`; `tier` (fast or relax),
    `model` and `steps` where known. Steps are else those in the kind (`t2i_512x512_s50_n9` has 50 for each of
    its three grids of up to four images), else one for each `cut.step_ms`. Raises `TraceWrong`.
    """
    begin_s = cut.from_hours * 3600
    end_s = math.inf if cut.hours is None else begin_s + cut.hours * 3600
    rows: list[_Row] = []
    last_s = -math.inf
    tiers_given = False
    drawn: dict[str, bool] = {}
    random = Random(f"users {seed}")  # noqa: S311 - not a secret
    for row in _rows(path):
        if row.arrival_s < last_s:
            raise TraceWrong(f"{path}: line {row.line}: arrival_s goes back; sort the file by arrival_s")
        last_s = row.arrival_s
        if row.user not in drawn:
            drawn[row.user] = random.random() < cut.users_share
        if not drawn[row.user]:
            continue
        if row.arrival_s < begin_s:
            continue
        if row.arrival_s >= end_s or (cut.rows is not None and len(rows) >= cut.rows):
            break
        tiers_given = tiers_given or row.tier is not None
        rows.append(row)
    if not rows:
        raise TraceWrong(
            f"{path}: no jobs in the part that was asked for; use another --from-hours or --hours"
        )
    if cut.hours is None or len(rows) == cut.rows:
        end_s = rows[-1].arrival_s
    if cut.from_hours == 0 and rows[0].arrival_s > begin_s:
        begin_s = rows[0].arrival_s
    drafts = []
    for row in rows:
        cost_ms = max(1, round(row.gpu_seconds * 1000 / cut.divide_cost))
        steps = row.steps or max(1, cost_ms // cut.step_ms)
        drafts.append(
            _Draft(
                arrival_ms=round((row.arrival_s - begin_s) * 1000),
                account=row.user,
                tier=row.tier,
                cost_ms=cost_ms,
                steps=min(steps, cost_ms),
                model=row.model,
            )
        )
    source = f"trace {path.name}, {len(rows):,} jobs from hour {begin_s / 3600:g} to {end_s / 3600:g}"
    if cut.users_share != 1:
        source += f", of {cut.users_share * 100:g} % of its users"
    if cut.divide_cost != 1:
        source += f", GPU time divided by {cut.divide_cost:g}"
    source += "; tiers as in the trace" if tiers_given else f"; tiers are made up: {fast}"
    return Workload(
        requests=_requests(drafts, fast=fast, seed=seed),
        span_ms=max(1, round((end_s - begin_s) * 1000)),
        source=source,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    """A made-up day: arrivals by Poisson's law with a daily rhythm, a few users who ask for most."""

    jobs: int = 20_000
    accounts: int = 500
    hours: float = 24.0
    swing: float = 0.3
    """How far the rate of arrivals goes up and down within a day, as a share of its mean."""
    user_exponent: float = 1.1
    """Zipf's, of the users' shares of the jobs: the busiest tenth asks for about two thirds."""
    models: int = 3
    """Drawn by Zipf's law with exponent 1.5."""


def generate(generator: Generator, *, fast: FastRule, seed: int) -> Workload:
    """Return a workload drawn from a seed."""
    random = Random(f"workload {seed}")  # noqa: S311 - not a secret
    span_ms = round(generator.hours * 3_600_000)
    users = [1 / rank**generator.user_exponent for rank in range(1, generator.accounts + 1)]
    models = [1 / rank**1.5 for rank in range(1, generator.models + 1)]
    # Times of PRODUCT.md's rule of thumb, and how often each is asked for.
    kinds = ((60_000, 50), (18_000, 15), (60_000, 30))
    drafts = []
    for arrival_ms in _arrivals(random, generator, span_ms):
        cost_ms, steps = random.choices(kinds, (60, 25, 15))[0]
        drafts.append(
            _Draft(
                arrival_ms=arrival_ms,
                account=f"user-{random.choices(range(generator.accounts), users)[0]:05}",
                tier=None,
                cost_ms=round(cost_ms * random.lognormvariate(0, 0.25)),
                steps=steps,
                model=f"model-{random.choices(range(generator.models), models)[0]}",
            )
        )
    return Workload(
        requests=_requests(drafts, fast=fast, seed=seed),
        span_ms=span_ms,
        source=(
            f"generated, seed {seed}: {generator.jobs:,} jobs of {generator.accounts:,} accounts in "
            f"{generator.hours:g} hours; {fast}"
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    line: int
    arrival_s: float
    user: str
    gpu_seconds: float
    tier: Tier | None
    model: str
    steps: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """A job before it has its tier and its place among its user's."""

    arrival_ms: int
    account: str
    tier: Tier | None
    cost_ms: int
    steps: int
    model: str


def _rows(path: Path) -> Iterator[_Row]:
    try:
        with _opened(path) as file:
            table = csv.DictReader(file)
            missing = [
                name
                for name in ("arrival_s", "user", "kind", "gpu_seconds")
                if name not in (table.fieldnames or ())
            ]
            if missing:
                raise TraceWrong(
                    f"{path}: the first line has to name the columns, and {', '.join(missing)} is missing"
                )
            for row in table:
                yield _row(path, table.line_num, row)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as trouble:
        raise TraceWrong(f"{path}: cannot be read as CSV, plain or gzip: {trouble}") from trouble


def _opened(path: Path) -> TextIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _row(path: Path, line: int, row: dict[str, str]) -> _Row:
    kind = row["kind"] or ""
    named = _STEPS.search(kind)
    tier = row.get("tier") or None
    if tier is not None and tier not in tuple(Tier):
        raise TraceWrong(f"{path}: line {line}: tier is {tier!r}; write fast or relax, or leave it empty")
    steps = row.get("steps") or None
    if steps is None and named is not None:
        steps = str(int(named[1]) * -(-int(named[2] or 1) // GRID))
    return _Row(
        line=line,
        arrival_s=_number(path, line, "arrival_s", row["arrival_s"]),
        user=row["user"] or _without(path, line, "user"),
        gpu_seconds=_number(path, line, "gpu_seconds", row["gpu_seconds"]),
        tier=None if tier is None else Tier(tier),
        model=row.get("model") or "default",
        steps=None if steps is None else max(1, round(_number(path, line, "steps", steps))),
    )


def _number(path: Path, line: int, column: str, text: str | None) -> float:
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not (0 <= number < math.inf):
        raise TraceWrong(f"{path}: line {line}: {column} is {text!r}; it has to be a number, 0 or more")
    return number


def _without(path: Path, line: int, column: str) -> str:
    raise TraceWrong(f"{path}: line {line}: {column} is empty; every job needs one")


def _requests(drafts: Sequence[_Draft], *, fast: FastRule, seed: int) -> tuple[Request, ...]:
    random = Random(f"tiers {seed}")  # noqa: S311 - not a secret
    requests = []
    before: dict[str, _Draft] = {}
    fast_used: dict[tuple[str, int], int] = {}
    for number, draft in enumerate(drafts):
        asks_fast = random.random() < fast.share
        tier = draft.tier
        if tier is None:
            month = draft.account, draft.arrival_ms // MONTH_MS
            used_ms = fast_used.get(month, 0) + draft.cost_ms
            tier = Tier.FAST if asks_fast and used_ms <= fast.allowance_ms else Tier.RELAX
            if tier is Tier.FAST:
                fast_used[month] = used_ms
        last = before.get(draft.account)
        # Who sent the next job before the last could have been done was not waiting for it: no time to think.
        think_ms = 0 if last is None else max(0, draft.arrival_ms - last.arrival_ms - last.cost_ms)
        before[draft.account] = draft
        requests.append(
            Request(
                job_id=JobId(f"job-{number:07}"),
                account_id=AccountId(draft.account),
                tier=tier,
                arrival_ms=draft.arrival_ms,
                think_ms=think_ms,
                cost_ms=draft.cost_ms,
                steps=draft.steps,
                model=draft.model,
            )
        )
    return tuple(requests)


def _arrivals(random: Random, generator: Generator, span_ms: int) -> list[int]:
    """Return sorted arrivals of a Poisson process with a daily rhythm, given their number."""
    arrivals: list[int] = []
    while len(arrivals) < generator.jobs:
        at_ms = random.randrange(span_ms)
        rate = 1 + generator.swing * math.sin(2 * math.pi * at_ms / DAY_MS)
        if random.random() * (1 + generator.swing) < rate:
            arrivals.append(at_ms)
    return sorted(arrivals)
