"""What a simulation says, in numbers: for people as a table in Markdown, for programs as JSON.

Everything follows from what was simulated, so equal simulations give equal reports, byte for byte.

Which accounts are light is the workload's to say, so that it is the same for every policy: the accounts are
ordered by the GPU time they ask for. The *light* ones are the half that asks for least, the *heavy* ones the
tenth that asks for most, and the *middle* is between them. The *lighter half of use* are the accounts that,
the lightest first, make up half of all GPU time asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random

from scheduler.policy.ids import AccountId, Tier
from scheduler.simulator.simulation import Ended, Simulated
from scheduler.simulator.workload import Workload

SLICES = 48
"""Jain's index is taken over so many slices of the time in which jobs come."""
RESAMPLES = 400
_MINUTE_MS = 60_000
_USE_BINS_MS = (0, 10 * _MINUTE_MS, 60 * _MINUTE_MS, 300 * _MINUTE_MS)
_USE_BINS = ("none", "up to 10 min", "10 to 60 min", "1 to 5 h", "over 5 h")
_HEAVIEST = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Waits:
    """Waits of some jobs, in milliseconds: all the time in which they were not being drawn."""

    jobs: int
    mean_ms: int
    p50_ms: int
    p90_ms: int
    p99_ms: int
    max_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountFigures:
    """One of the accounts that asked for most."""

    account_id: str
    jobs: int
    asked_ms: int
    served_ms: int
    """Within the time in which jobs come."""
    relax: Waits | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundFigures:
    """How close a bound came to be broken."""

    bound: str
    sentence: str
    verdict: str
    cases: int
    violations: int
    worst_margin: float | None
    unit: str
    widened: Sequence[str]
    """What was added to it, because an assumption of the bound does not hold here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One policy on one workload."""

    policy: str
    jobs: int
    given_up: int
    fast: Waits | None
    relax: Waits | None
    relax_of: Mapping[str, Waits | None]
    """Of groups of accounts: light, middle, heavy, and the lighter half of use."""
    relax_by_prior_use: Mapping[str, Waits | None]
    """By the GPU time of the account's jobs that had ended when the job came."""
    jain_permille: int | None
    """Of the relax service of accounts that had work waiting all through a slice; the mean of the slices.
    None: no slice had two such accounts."""
    utilisation_permille: int
    """Of the GPUs' time while jobs come: spent on steps that were kept."""
    makespan_ms: int
    parks: int
    migrations: int
    kills: int
    steps_redone: int
    wasted_permille: int
    """GPU time of steps that were not kept, as a share of those that were."""
    loads: int
    loading_permille: int
    """Time spent loading models, as a share of that of kept steps."""
    deaths: int
    heaviest: Sequence[AccountFigures]
    bounds: Sequence[BoundFigures]
    """Of a policy that promises bounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A figure of one policy less another's, with what chance does to it: the middle 95 % of the differences
    found when the accounts are drawn again, with repetition."""

    mine: int
    other: int
    low: int
    high: int

    @property
    def verdict(self) -> str:
        """Say whether mine is smaller, larger, or not to be told apart from the other."""
        if self.high < 0:
            return "ahead"
        return "behind" if self.low > 0 else "level"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The first policy of a comparison against another one."""

    other: str
    differences: Mapping[str, Difference | None]
    utilisation_percent: float
    """Ours over theirs, less 1; so is the next."""
    makespan_percent: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Who is light and who is not."""

    light: frozenset[AccountId]
    middle: frozenset[AccountId]
    heavy: frozenset[AccountId]
    lighter_half_of_use: frozenset[AccountId]

    @classmethod
    def of(cls, workload: Workload) -> Groups:
        asked: dict[AccountId, int] = {}
        for request in workload.requests:
            asked[request.account_id] = asked.get(request.account_id, 0) + request.cost_ms
        ranked = sorted(asked, key=lambda account_id: (asked[account_id], account_id))
        half, tenth = len(ranked) // 2, max(1, len(ranked) // 10)
        total, sum_ms, lighter = sum(asked.values()), 0, []
        for account_id in ranked:
            sum_ms += asked[account_id]
            if 2 * sum_ms > total:
                break
            lighter.append(account_id)
        return cls(
            light=frozenset(ranked[:half]),
            middle=frozenset(ranked[half:-tenth]),
            heavy=frozenset(ranked[-tenth:]),
            lighter_half_of_use=frozenset(lighter),
        )

    def named(self) -> dict[str, frozenset[AccountId]]:
        return {
            "light": self.light,
            "middle": self.middle,
            "heavy": self.heavy,
            "lighter half of use": self.lighter_half_of_use,
        }


def figures(simulated: Simulated, groups: Groups) -> Figures:
    """Return the numbers of one simulation."""
    done = [ended for ended in simulated.jobs if not ended.given_up]
    relax = [ended for ended in done if ended.request.tier is Tier.RELAX]
    span_ms, gpus = simulated.workload.span_ms, simulated.cluster.gpus
    kept_ms = sum(spell.kept_ms for spell in simulated.spells) - simulated.discarded_ms
    spent_ms = sum(spell.end_ms - spell.start_ms for spell in simulated.spells)
    within_ms = sum(
        max(0, min(spell.start_ms + spell.kept_ms, span_ms) - spell.start_ms) for spell in simulated.spells
    )
    return Figures(
        policy=simulated.contestant.name,
        jobs=len(simulated.jobs),
        given_up=len(simulated.jobs) - len(done),
        fast=_waits(ended for ended in done if ended.request.tier is Tier.FAST),
        relax=_waits(relax),
        relax_of={
            name: _waits(ended for ended in relax if ended.request.account_id in accounts)
            for name, accounts in groups.named().items()
        },
        relax_by_prior_use={
            name: _waits(ended for ended in relax if _use_bin(ended.prior_use_ms) == number)
            for number, name in enumerate(_USE_BINS)
        },
        jain_permille=_jain_permille(simulated),
        utilisation_permille=round(1000 * within_ms / (span_ms * gpus)),
        makespan_ms=simulated.makespan_ms,
        parks=simulated.parks,
        migrations=simulated.migrations,
        kills=simulated.kills,
        steps_redone=simulated.steps_redone,
        wasted_permille=round(1000 * (spent_ms - kept_ms) / max(1, kept_ms)),
        loads=simulated.loads,
        loading_permille=round(1000 * simulated.loading_ms / max(1, kept_ms)),
        deaths=simulated.deaths,
        heaviest=_heaviest(simulated),
        bounds=[
            BoundFigures(
                bound=finding.bound,
                sentence=finding.promise.sentence,
                verdict=finding.verdict,
                cases=finding.cases,
                violations=finding.violations,
                worst_margin=None if finding.worst_margin is None else round(finding.worst_margin, 3),
                unit=finding.promise.unit,
                widened=finding.widened,
            )
            for finding in simulated.findings
        ],
    )


def compare(
    mine: Simulated,
    other: Simulated,
    groups: Groups,
    *,
    utilisation_permille: tuple[int, int],
    seed: int,
) -> Comparison:
    """Return how a policy stands against another one on the same workload."""
    light, lighter = groups.light, groups.lighter_half_of_use
    return Comparison(
        other=other.contestant.name,
        differences={
            "fast p99 wait": _difference(mine, other, Tier.FAST, None, _p99_ms, seed),
            "light mean wait": _difference(mine, other, Tier.RELAX, light, _mean_ms, seed),
            "light p99 wait": _difference(mine, other, Tier.RELAX, light, _p99_ms, seed),
            "lighter half mean wait": _difference(mine, other, Tier.RELAX, lighter, _mean_ms, seed),
        },
        utilisation_percent=_percent_more(*utilisation_permille),
        makespan_percent=_percent_more(mine.makespan_ms, other.makespan_ms),
    )


def as_json(report: Mapping[str, object]) -> str:
    """Return a report for programs."""
    return json.dumps(report, indent=1, sort_keys=True, default=asdict) + "\n"


def tables(found: Sequence[Figures], comparisons: Sequence[Comparison]) -> str:
    """Return a report for people, in Markdown. Waits are in seconds."""
    parts = [
        "Waits in seconds, mean / p50 / p90 / p99:",
        _table(
            ["policy", "fast", "relax", "light", "middle", "heavy", "Jain", "utilisation", "makespan h"],
            [
                [
                    one.policy,
                    _short(one.fast),
                    _short(one.relax),
                    *(_short(one.relax_of[name]) for name in ("light", "middle", "heavy")),
                    "-" if one.jain_permille is None else f"{one.jain_permille / 1000:.2f}",
                    f"{one.utilisation_permille / 10:.1f} %",
                    f"{one.makespan_ms / 3_600_000:.2f}",
                ]
                for one in found
            ],
        ),
        "Relax waits by what the account had used before, in seconds, mean / p50 / p90 / p99:",
        _table(
            ["policy", *_USE_BINS],
            [[one.policy, *(_short(one.relax_by_prior_use[name]) for name in _USE_BINS)] for one in found],
        ),
        _table(
            [
                "policy",
                "jobs",
                "given up",
                "parks",
                "migrations",
                "kills",
                "steps redone",
                "wasted",
                "model loads",
                "loading",
                "GPU deaths",
            ],
            [
                [
                    one.policy,
                    f"{one.jobs:,}",
                    f"{one.given_up:,}",
                    f"{one.parks:,}",
                    f"{one.migrations:,}",
                    f"{one.kills:,}",
                    f"{one.steps_redone:,}",
                    f"{one.wasted_permille / 10:.1f} %",
                    f"{one.loads:,}",
                    f"{one.loading_permille / 10:.1f} %",
                    f"{one.deaths:,}",
                ]
                for one in found
            ],
        ),
        "The accounts that asked for most: GPU-hours served while jobs came (mean relax wait in seconds):",
        _table(
            ["policy", *(f"{one.account_id}: {one.asked_ms / 3_600_000:.1f} h" for one in found[0].heaviest)],
            [[one.policy, *(_heavy(account) for account in one.heaviest)] for one in found],
        ),
    ]
    for one in found[:1]:
        if one.bounds:
            parts += [
                f"The bounds of {one.policy}, by the auditor (margin: what was left; B15: the longest wait):",
                _table(["bound", "promise", "verdict", "cases", "violations", "worst margin"], _bounds(one)),
            ]
    if comparisons:
        names = list(comparisons[0].differences)
        parts += [
            f"{found[0].policy} against each: difference in seconds [middle 95 % when accounts are drawn "
            "again]; utilisation and makespan in percent more:",
            _table(
                ["against", *names, "utilisation", "makespan"],
                [
                    [
                        one.other,
                        *(_judged(one.differences[name]) for name in names),
                        f"{one.utilisation_percent:+.1f} %",
                        f"{one.makespan_percent:+.1f} %",
                    ]
                    for one in comparisons
                ],
            ),
        ]
    return "\n\n".join(parts) + "\n"


# -- waits ----------------------------------------------------------------------------------------------


def _waits(jobs: Iterable[Ended]) -> Waits | None:
    waits = sorted(ended.wait_ms for ended in jobs)
    if not waits:
        return None
    return Waits(
        jobs=len(waits),
        mean_ms=round(sum(waits) / len(waits)),
        p50_ms=_quantile(waits, 50),
        p90_ms=_quantile(waits, 90),
        p99_ms=_quantile(waits, 99),
        max_ms=waits[-1],
    )


def _quantile(ordered: Sequence[int], percent: int) -> int:
    """Return the smallest value that so many percent are not above."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _use_bin(used_ms: int) -> int:
    return sum(used_ms > edge for edge in _USE_BINS_MS)


# -- chance ---------------------------------------------------------------------------------------------


class _Sample:
    """Waits of some jobs by account, such that accounts can be drawn again cheaply."""

    def __init__(self, simulated: Simulated, tier: Tier, accounts: Collection[AccountId] | None) -> None:
        self.waits = sorted(
            (
                (ended.wait_ms, ended.request.account_id)
                for ended in simulated.jobs
                if not ended.given_up
                and ended.request.tier is tier
                and (accounts is None or ended.request.account_id in accounts)
            ),
            reverse=True,
        )
        self.jobs: dict[AccountId, int] = {}
        self.sum_ms: dict[AccountId, int] = {}
        for wait_ms, account_id in self.waits:
            self.jobs[account_id] = self.jobs.get(account_id, 0) + 1
            self.sum_ms[account_id] = self.sum_ms.get(account_id, 0) + wait_ms


def _mean_ms(sample: _Sample, times: Mapping[AccountId, int]) -> int:
    jobs = sum(sample.jobs[account_id] * number for account_id, number in times.items())
    return round(sum(sample.sum_ms[account_id] * number for account_id, number in times.items()) / jobs)


def _p99_ms(sample: _Sample, times: Mapping[AccountId, int]) -> int:
    jobs = sum(sample.jobs[account_id] * number for account_id, number in times.items())
    above = jobs - -(-jobs * 99 // 100)
    for wait_ms, account_id in sample.waits:
        above -= times.get(account_id, 0)
        if above < 0:
            return wait_ms
    raise AssertionError("a sample has jobs")


def _difference(
    mine: Simulated,
    other: Simulated,
    tier: Tier,
    accounts: Collection[AccountId] | None,
    statistic: Callable[[_Sample, Mapping[AccountId, int]], int],
    seed: int,
) -> Difference | None:
    samples = _Sample(mine, tier, accounts), _Sample(other, tier, accounts)
    drawn_from = sorted(samples[0].jobs.keys() & samples[1].jobs.keys())
    if not drawn_from:
        return None
    random = Random(f"accounts {seed}")  # noqa: S311 - not a secret
    found = []
    for _ in range(RESAMPLES):
        times: dict[AccountId, int] = {}
        for account_id in random.choices(drawn_from, k=len(drawn_from)):
            times[account_id] = times.get(account_id, 0) + 1
        found.append(statistic(samples[0], times) - statistic(samples[1], times))
    found.sort()
    once = dict.fromkeys(drawn_from, 1)
    return Difference(
        mine=statistic(samples[0], once),
        other=statistic(samples[1], once),
        low=found[RESAMPLES * 25 // 1000],
        high=found[RESAMPLES * 975 // 1000 - 1],
    )


def _percent_more(mine: float, other: float) -> float:
    return round(100 * (mine / other - 1), 2) if other else 0.0


# -- service --------------------------------------------------------------------------------------------


def service_by_slice(
    simulated: Simulated, slices: int, tier: Tier | None = None
) -> list[dict[AccountId, int]]:
    """Return the GPU time that each account was given, and that was kept, in each of so many slices of the
    time jobs come in."""
    found: list[dict[AccountId, int]] = [{} for _ in range(slices)]
    span_ms = simulated.workload.span_ms
    for spell in simulated.spells:
        if tier is not None and spell.request.tier is not tier:
            continue
        # A spell's lost steps are its last.
        start_ms, kept_until_ms = spell.start_ms, spell.start_ms + spell.kept_ms
        while start_ms < min(kept_until_ms, span_ms):
            number = start_ms * slices // span_ms
            end_ms = min(kept_until_ms, -(-(number + 1) * span_ms // slices))
            account_id = spell.request.account_id
            found[number][account_id] = found[number].get(account_id, 0) + end_ms - start_ms
            start_ms = end_ms
    return found


def _jain_permille(simulated: Simulated) -> int | None:
    span_ms = simulated.workload.span_ms
    service = service_by_slice(simulated, SLICES, Tier.RELAX)
    backlogged: list[set[AccountId]] = [set() for _ in range(SLICES)]
    for backlog in simulated.backlogs:
        first = -(-backlog.start_ms * SLICES // span_ms)
        for number in range(first, SLICES):
            if (number + 1) * span_ms > backlog.end_ms * SLICES:
                break
            backlogged[number].add(backlog.account_id)
    indices = []
    for number, accounts in enumerate(backlogged):
        given = [service[number].get(account_id, 0) for account_id in sorted(accounts)]
        squares = sum(one * one for one in given)
        if len(given) > 1 and squares:
            indices.append(sum(given) ** 2 / (len(given) * squares))
    return round(1000 * sum(indices) / len(indices)) if indices else None


def _heaviest(simulated: Simulated) -> list[AccountFigures]:
    asked: dict[AccountId, int] = {}
    jobs: dict[AccountId, list[Ended]] = {}
    for ended in simulated.jobs:
        account_id = ended.request.account_id
        asked[account_id] = asked.get(account_id, 0) + ended.request.cost_ms
        jobs.setdefault(account_id, []).append(ended)
    (served,) = service_by_slice(simulated, 1)
    return [
        AccountFigures(
            account_id=account_id,
            jobs=len(jobs[account_id]),
            asked_ms=asked[account_id],
            served_ms=served.get(account_id, 0),
            relax=_waits(
                ended for ended in jobs[account_id] if ended.request.tier is Tier.RELAX and not ended.given_up
            ),
        )
        for account_id in sorted(asked, key=lambda one: (-asked[one], one))[:_HEAVIEST]
    ]


# -- tables ---------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(waits: Waits | None) -> str:
    if waits is None:
        return "-"
    return " / ".join(
        _seconds(number) for number in (waits.mean_ms, waits.p50_ms, waits.p90_ms, waits.p99_ms)
    )


def _seconds(number_ms: int) -> str:
    return f"{number_ms / 1000:,.1f}" if abs(number_ms) < 100_000 else f"{number_ms / 1000:,.0f}"


def _bounds(one: Figures) -> list[list[str]]:
    return [
        [
            bound.bound,
            bound.sentence,
            bound.verdict,
            f"{bound.cases:,}",
            f"{bound.violations:,}",
            "-" if bound.worst_margin is None else f"{round(bound.worst_margin):,} {bound.unit}",
        ]
        for bound in one.bounds
    ]


def _heavy(account: AccountFigures) -> str:
    waits = "-" if account.relax is None else _seconds(account.relax.mean_ms)
    return f"{account.served_ms / 3_600_000:.1f} ({waits})"


def _judged(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return (
        f"{difference.verdict} {_seconds(difference.mine - difference.other)} "
        f"[{_seconds(difference.low)}, {_seconds(difference.high)}]"
    )
