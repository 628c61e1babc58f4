"""Whether expected starts are honest: how many jobs start before their p50 and their p90, on a replayed day.

    python tests/bench/eta.py [--trace FILE] [--load 1.0] [--hours 4] [--every-s 300] [--draws 19] [--seed N]
    python tests/bench/eta.py --speed

The trace has columns `arrival_s,user,kind,gpu_seconds` (gzip CSV); without the file a seeded load is made.
Jobs arrive as in the trace, an account has the limits of a plan, a fifth of the accounts sends fast jobs; a
job is predicted to take what the trace says, which is the median of its shape, and takes that times an error
(log-normal, mean 1, sigma 0.25). After two hours of warming up, every so often all jobs that wait are told
when they will start, as the service would tell them, and then it is seen.

`--speed` measures one roll of a board with 100,000 waiting jobs on 1,000 GPUs.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import heapq
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

from scheduler.policy.board import Board
from scheduler.policy.decisions import GiveUp, Migrate, Resume, Start, Stop
from scheduler.policy.events import (
    AccountRestored,
    AttemptFinished,
    AttemptMigrated,
    AttemptParked,
    AttemptResumed,
    AttemptStarted,
    CellRestored,
    CheckpointSaved,
    Event,
    FairShare,
    JobSubmitted,
    Outcome,
    TagsStored,
    WorkerJoined,
)
from scheduler.policy.foresight.eta import Eta, etas, quick_eta
from scheduler.policy.foresight.lately import Lately, Recent, resampled
from scheduler.policy.foresight.roll_forward import roll_forward
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Checkpoint, Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker

_TRACE = Path(__file__).resolve().parents[3] / "shared" / "data" / "sdbeta_w1.csv.gz"
_GIB = 2**30
_PLAN = Limits(running=3, relax_running=2, accepted=10)
_FAST_ACCOUNTS = 0.2
_ERROR = 0.25
_WARM_UP_MS = 2 * 3_600_000
_PARAMETERS = Parameters(max_predicted_ms=10_000_000)


@dataclass(frozen=True)
class Coming:
    """A job of the trace."""

    at_ms: int
    account: str
    gpu_ms: int


def from_trace(path: Path, from_s: float, to_s: float) -> list[Coming]:
    """Return the jobs of a window, which then begins at 0."""
    with gzip.open(path, "rt") as lines:
        return [
            Coming(
                at_ms=int((float(row["arrival_s"]) - from_s) * 1000),
                account=row["user"],
                gpu_ms=int(float(row["gpu_seconds"]) * 1000),
            )
            for row in csv.DictReader(lines)
            if from_s <= float(row["arrival_s"]) < to_s
        ]


def made_up(chance: random.Random, span_s: float) -> list[Coming]:
    """Return jobs of people who come, send some pictures one after the other, and go."""
    jobs: list[Coming] = []
    at_s, number = 0.0, 0
    while at_s < span_s:
        at_s += chance.expovariate(1 / 40)
        number += 1
        mine_s, size = at_s, chance.lognormvariate(4, 0.6)
        for _ in range(min(300, int(chance.lognormvariate(2, 1.2)) + 1)):
            if mine_s < span_s:
                jobs.append(Coming(int(mine_s * 1000), f"user{number}", int(size * 1000)))
            mine_s += chance.expovariate(1 / 120)
    return sorted(jobs, key=lambda one: one.at_ms)


@dataclass(frozen=True)
class Told:
    """What was said of a job, and when."""

    at_ms: int
    job_id: JobId
    tier: Tier
    eta: Eta
    first: bool
    """Nothing had been said of it before."""


@dataclass
class _Run:
    job: Job
    attempt_id: AttemptId
    worker_id: WorkerId
    gpu_ms: int
    left_ms: int
    since_ms: int = 0
    ends_ms: int | None = None


class Replay:
    """What truly happens: a board, and workers that take as long as the trace says."""

    def __init__(self, coming: list[Coming], gpus: int, chance: random.Random) -> None:
        self.board = Board(_PARAMETERS)
        self.lately = Lately(0)
        self.now_ms = 0
        self.started: dict[JobId, int] = {}
        self.waiting: dict[JobId, Job] = {}
        self.glances: list[Told] = []
        self.refused = 0
        self.parks = 0
        self.busy_ms = 0
        self._coming = coming
        self._next = 0
        self._chance = chance
        self._fast: dict[str, bool] = {}
        self._accepted: dict[str, int] = {}
        self._true_ms: dict[JobId, int] = {}
        self._runs: dict[AttemptId, _Run] = {}
        self._ends: list[tuple[int, int, AttemptId | None]] = []
        self._count = 0
        for tier in Tier:
            self.apply(CellRestored(at_ms=0, tier=tier, virtual_time=0, decay_origin_ms=0))
        for number in range(gpus):
            worker = Worker(
                worker_id=WorkerId(f"gpu{number:04d}"),
                memory_bytes=16 * _GIB,
                speed_permille=1000,
                warm_models=frozenset({"m"}),
            )
            self.apply(WorkerJoined(at_ms=0, worker=worker))

    def apply(self, event: Event) -> None:
        self.board.apply(event)
        self.lately.apply(event)

    def run(self, until_ms: int) -> None:
        """Go on until a time."""
        while True:
            times = [self._ends[0][0]] if self._ends else []
            if self._next < len(self._coming):
                times.append(self._coming[self._next].at_ms)
            if not times or min(times) > until_ms:
                self.now_ms = until_ms
                return
            self.now_ms = min(times)
            while self._next < len(self._coming) and self._coming[self._next].at_ms <= self.now_ms:
                self._submit(self._coming[self._next])
                self._next += 1
            while self._ends and self._ends[0][0] <= self.now_ms:
                attempt_id = heapq.heappop(self._ends)[2]
                run = None if attempt_id is None else self._runs.get(attempt_id)
                if run is not None and run.ends_ms == self.now_ms:
                    self._end(run)
            self._decide()

    def _submit(self, one: Coming) -> None:
        name = one.account
        if name not in self._fast:
            self._fast[name] = self._chance.random() < _FAST_ACCOUNTS
            shares = {Tier.RELAX: FairShare(finish_tag=0, tag=None, usage=0.0)}
            self.apply(
                AccountRestored(
                    at_ms=self.now_ms,
                    account_id=AccountId(name),
                    limits=_PLAN,
                    weight_milli=1000,
                    shares=shares,
                )
            )
        if self._accepted.get(name, 0) >= _PLAN.accepted:
            self.refused += 1
            return
        self._accepted[name] = self._accepted.get(name, 0) + 1
        self._count += 1
        predicted_ms = max(1, one.gpu_ms)
        error = self._chance.lognormvariate(-(_ERROR**2) / 2, _ERROR)
        job = Job(
            job_id=JobId(f"job{self._count}"),
            account_id=AccountId(name),
            tier=Tier.FAST if self._fast[name] else Tier.RELAX,
            arrival=self._count,
            predicted_ms=predicted_ms,
            step_ms=max(1, predicted_ms // 50),
            model="m",
            memory_bytes=8 * _GIB,
        )
        if self.now_ms >= _WARM_UP_MS:
            glance = quick_eta(self.board.cell, job, self.lately.mean_ms, self.now_ms)
            assert glance is not None
            self.glances.append(Told(self.now_ms, job.job_id, job.tier, glance, True))
        self.waiting[job.job_id] = job
        self._true_ms[job.job_id] = max(1, int(one.gpu_ms * error))
        self.apply(JobSubmitted(at_ms=self.now_ms, job=job))

    def _decide(self) -> None:
        decisions = self.board.decide(self.now_ms)
        for account_id, tier, tag in self.board.unstored_tags():
            self.apply(TagsStored(at_ms=self.now_ms, account_id=account_id, tier=tier, tag=tag))
        for decision in decisions:
            match decision:
                case Start():
                    if decision.parks is not None:
                        self._park(self._runs[decision.parks])
                    self._count += 1
                    attempt_id = AttemptId(f"attempt{self._count}")
                    self.apply(
                        AttemptStarted(
                            at_ms=self.now_ms,
                            job_id=decision.job_id,
                            attempt_id=attempt_id,
                            worker_id=decision.worker_id,
                            charge=decision.charge,
                            sheltered=decision.sheltered,
                        )
                    )
                    self.started[decision.job_id] = self.now_ms
                    job = self.waiting.pop(decision.job_id)
                    gpu_ms = self._true_ms.pop(decision.job_id)
                    run = _Run(job, attempt_id, decision.worker_id, gpu_ms, gpu_ms)
                    self._go(run)
                case Resume():
                    self.apply(
                        AttemptResumed(
                            at_ms=self.now_ms, attempt_id=decision.attempt_id, sheltered=decision.sheltered
                        )
                    )
                    self._go(self._runs[decision.attempt_id])
                case Migrate():
                    self._count += 1
                    run = self._runs.pop(decision.attempt_id)
                    run.attempt_id, run.worker_id = AttemptId(f"attempt{self._count}"), decision.to
                    self.apply(
                        AttemptMigrated(
                            at_ms=self.now_ms,
                            attempt_id=decision.attempt_id,
                            to_attempt_id=run.attempt_id,
                            worker_id=decision.to,
                        )
                    )
                    self._go(run)
                case Stop() | GiveUp():
                    raise AssertionError("nobody cancels and nothing is lost here")

    def _go(self, run: _Run) -> None:
        self._runs[run.attempt_id] = run
        run.since_ms, run.ends_ms = self.now_ms, self.now_ms + run.left_ms
        heapq.heappush(self._ends, (run.ends_ms, self._count, run.attempt_id))
        self._count += 1

    def _park(self, run: _Run) -> None:
        assert run.ends_ms is not None
        self.parks += 1
        self.busy_ms += self.now_ms - run.since_ms
        run.left_ms, run.ends_ms = run.ends_ms - self.now_ms, None
        self.apply(AttemptParked(at_ms=self.now_ms, attempt_id=run.attempt_id))
        self.apply(
            CheckpointSaved(
                at_ms=self.now_ms,
                attempt_id=run.attempt_id,
                checkpoint=Checkpoint(step=1, kept_ms=self.now_ms - run.since_ms, device=""),
            )
        )
        heapq.heappush(self._ends, (self.now_ms + _PARAMETERS.park_patience_ms, self._count, None))
        self._count += 1

    def _end(self, run: _Run) -> None:
        del self._runs[run.attempt_id]
        self.busy_ms += self.now_ms - run.since_ms
        self._accepted[run.job.account_id] -= 1
        self.apply(
            AttemptFinished(
                at_ms=self.now_ms, attempt_id=run.attempt_id, outcome=Outcome.SUCCEEDED, gpu_ms=run.gpu_ms
            )
        )


def calibration(told: list[Told], glances: list[Told], started: dict[JobId, int]) -> str:
    """Return the shares of jobs that started before their p50 and p90, in groups."""
    rows = [f"{'jobs told':<32} {'number':>7} {'before p50':>11} {'before p90':>11} {'median wait s':>14}"]
    groups = {
        "all that wait": told,
        "at the first telling": [one for one in told if one.first],
        "relax": [one for one in told if one.tier is Tier.RELAX],
        "fast": [one for one in told if one.tier is Tier.FAST],
        "told at most 5 min more": [one for one in told if one.eta.p50_ms - one.at_ms <= 300_000],
        "told over 5 min more": [one for one in told if one.eta.p50_ms - one.at_ms > 300_000],
        "at a glance, at once": [one for one in glances if one.eta.p50_ms == one.at_ms],
        "at a glance, later": [one for one in glances if one.eta.p50_ms > one.at_ms],
    }
    for name, group in groups.items():
        if not group:
            continue
        half = sum(started[one.job_id] <= one.eta.p50_ms for one in group) / len(group)
        nine = sum(started[one.job_id] <= one.eta.p90_ms for one in group) / len(group)
        waits = sorted(started[one.job_id] - one.at_ms for one in group)
        rows.append(
            f"{name:<32} {len(group):>7,} {half:>11.1%} {nine:>11.1%} {waits[len(waits) // 2] / 1000:>14,.0f}"
        )
    return "\n".join(rows)


def replay(
    coming: list[Coming], gpus: int, hours: float, every_s: int, draws: int, seed: int
) -> tuple[Replay, list[Told], list[float]]:
    """Replay the jobs and say, every so often, when those that wait will start."""
    world = Replay(coming, gpus, random.Random(seed))
    chance = random.Random(seed + 1)
    told: list[Told] = []
    known: set[JobId] = set()
    took: list[float] = []
    at_ms = _WARM_UP_MS
    while at_ms < _WARM_UP_MS + int(hours * 3_600_000):
        world.run(at_ms)
        begin = time.process_time()
        recent = world.lately.seen(at_ms)
        futures = [resampled(recent, chance.random) for _ in range(draws)]
        found = etas(world.board.facts(at_ms), _PARAMETERS, futures, at_ms)
        took.append(time.process_time() - begin)
        for job_id, eta in found.items():
            told.append(Told(at_ms, job_id, world.waiting[job_id].tier, eta, job_id not in known))
        known.update(found)
        at_ms += every_s * 1000
    world.run(at_ms + 48 * 3_600_000)
    return world, told, took


def _calibrate(chosen: argparse.Namespace) -> None:
    hours = chosen.hours + _WARM_UP_MS / 3_600_000
    if chosen.trace.exists():
        begin_s = chosen.begin_h * 3600
        coming = from_trace(chosen.trace, begin_s, begin_s + hours * 3600)
        print(f"trace {chosen.trace.name}, from hour {chosen.begin_h:g}, {hours:g} h")
    else:
        coming = made_up(random.Random(chosen.seed), hours * 3600)
        print(f"made-up load of seed {chosen.seed} (no {chosen.trace}), {hours:g} h")
    work_ms = sum(one.gpu_ms for one in coming)
    gpus = max(1, math.ceil(work_ms / (hours * 3_600_000) / chosen.load))
    world, told, took = replay(coming, gpus, chosen.hours, chosen.every_s, chosen.draws, chosen.seed)
    print(
        f"{len(coming):,} jobs, {gpus} GPUs ({chosen.load:.0%} offered), {world.refused:,} refused at the "
        f"accepted limit, {world.parks:,} parks; {len(took)} tellings, {chosen.draws} futures and "
        f"{sum(took) / len(took):.2f} s each"
    )
    print(calibration(told, world.glances, world.started))


def _speed(seed: int) -> None:
    """Print what one roll of a large board takes."""
    chance = random.Random(seed)
    coming = [
        Coming(number // 100, f"user{number % 12_500}", chance.randint(10_000, 60_000))
        for number in range(100_000)
    ]
    world = Replay(coming, 1_000, chance)
    world.run(1_000)
    begin = time.process_time()
    facts = world.board.facts(1_000)
    told_s = time.process_time() - begin
    # As if they had come over an hour, which is about what 1,000 GPUs get done.
    jobs = tuple((at_ms * 3_600, job) for at_ms, job in world.lately.seen(1_000).jobs)
    draws = resampled(Recent(span_ms=3_600_000, jobs=jobs, cost_permille=()), chance.random)
    begin = time.process_time()
    future = roll_forward(facts, _PARAMETERS, draws, 1_000, first=0)
    copied_s = time.process_time() - begin
    begin = time.process_time()
    future = roll_forward(facts, _PARAMETERS, draws, 1_000)
    waiting = sum(world.board.queued(tier) for tier in Tier)
    print(
        f"{waiting:,} waiting, 1,000 GPUs: facts {told_s:.2f} s, "
        f"one roll of 20,000 starts {time.process_time() - begin:.2f} s, of which the copy {copied_s:.2f} s; "
        f"{len(future.starts):,} jobs told"
    )


def main() -> None:
    """Print the calibration, or the speed."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--trace", type=Path, default=_TRACE)
    arguments.add_argument("--begin-h", type=float, default=36)
    arguments.add_argument("--load", type=float, default=1.0, help="offered work over what the GPUs can do")
    arguments.add_argument("--hours", type=float, default=4)
    arguments.add_argument("--every-s", type=int, default=300)
    arguments.add_argument("--draws", type=int, default=19)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--speed", action="store_true")
    chosen = arguments.parse_args()
    if chosen.speed:
        _speed(chosen.seed)
    else:
        _calibrate(chosen)


if __name__ == "__main__":
    main()
