"""How many decisions a second the policy core makes, and what a waiting job costs it.

    python tests/bench/policy.py [--million] [--seed N]

Each row fills a board with waiting jobs (ten of each account; two models in four sizes, of which an account
mostly uses one), starts every GPU, then goes through cycles as the loop does: some attempts end, their
accounts send a job each, one `decide`, and every `Start` is applied. Times are CPU time of one
core, so that a busy machine does not change them much.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from scheduler.policy.board import Board
from scheduler.policy.decisions import Decision, Resume, Start
from scheduler.policy.events import (
    AccountRestored,
    AttemptFinished,
    AttemptParked,
    AttemptResumed,
    AttemptStarted,
    FairShare,
    JobSubmitted,
    Outcome,
    WorkerJoined,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker
from scheduler.recovery import collect_seldom

_MODELS = ("small", "large")
_GIB = 2**30
_LIMITS = Limits(running=3, relax_running=2, accepted=10)


class _Running:
    """Attempts that have a GPU, of which one can be taken at random."""

    def __init__(self) -> None:
        self._all: list[AttemptId] = []
        self._places: dict[AttemptId, int] = {}

    def put(self, attempt_id: AttemptId) -> None:
        self._places[attempt_id] = len(self._all)
        self._all.append(attempt_id)

    def take(self, attempt_id: AttemptId) -> None:
        place, last = self._places.pop(attempt_id), self._all.pop()
        if last != attempt_id:
            self._all[place] = last
            self._places[last] = place

    def at_random(self, draws: random.Random) -> AttemptId:
        return draws.choice(self._all)


@dataclass
class _Fleet:
    """A board with every GPU busy, and the jobs that go through it."""

    board: Board
    random: random.Random
    now_ms: int = 0
    jobs: int = 0
    attempts: int = 0
    running: _Running = field(default_factory=_Running)
    owners: dict[AttemptId, AccountId] = field(default_factory=dict)
    habits: dict[AccountId, tuple[str, int]] = field(default_factory=dict)

    def submit(self, account_id: AccountId) -> None:
        self.jobs += 1
        anything = (self.random.choice(_MODELS), self.random.choice((4, 6, 8, 12)))
        habit = self.habits.setdefault(account_id, anything)
        model, gib = habit if self.random.random() < 0.8 else anything
        # A fresh string of a UUID's length, as a job id from a row is.
        job = Job(
            job_id=JobId(f"{self.jobs:036d}"),
            account_id=account_id,
            tier=Tier.FAST if self.random.random() < 0.1 else Tier.RELAX,
            arrival=self.jobs,
            predicted_ms=self.random.randint(10_000, 60_000),
            step_ms=1_000,
            model=model,
            memory_bytes=gib * _GIB,
        )
        self.board.apply(JobSubmitted(at_ms=self.now_ms, job=job))

    def fill(self) -> int:
        """Decide once and do what was decided; returns how many decisions there were."""
        return self.act(self.board.decide(self.now_ms))

    def act(self, decisions: list[Decision]) -> int:
        """Tell the board that what was decided was done."""
        for decision in decisions:
            match decision:
                case Start():
                    if decision.parks is not None:
                        self.board.apply(AttemptParked(at_ms=self.now_ms, attempt_id=decision.parks))
                        self.running.take(decision.parks)
                    self.attempts += 1
                    attempt_id = AttemptId(f"{self.attempts:036d}")
                    self.board.apply(
                        AttemptStarted(
                            at_ms=self.now_ms,
                            job_id=decision.job_id,
                            attempt_id=attempt_id,
                            worker_id=decision.worker_id,
                            charge=decision.charge,
                            sheltered=decision.sheltered,
                        )
                    )
                    self.owners[attempt_id] = decision.account_id
                    self.running.put(attempt_id)
                case Resume():
                    self.board.apply(AttemptResumed(at_ms=self.now_ms, attempt_id=decision.attempt_id))
                    self.running.put(decision.attempt_id)
        return len(decisions)

    def finish(self) -> AccountId:
        """End an attempt at random and return whose it was."""
        attempt_id = self.running.at_random(self.random)
        self.running.take(attempt_id)
        gpu_ms = self.random.randint(10_000, 60_000)
        self.board.apply(
            AttemptFinished(
                at_ms=self.now_ms, attempt_id=attempt_id, outcome=Outcome.SUCCEEDED, gpu_ms=gpu_ms
            )
        )
        return self.owners.pop(attempt_id)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _row(waiting: int, seed: int) -> str:
    gpus = min(10_000, waiting // 10)
    fleet = _Fleet(Board(Parameters()), random.Random(seed))
    accounts = [AccountId(f"account-{number}") for number in range(waiting // 10)]
    for account_id in accounts:
        share = FairShare(finish_tag=0, tag=None, usage=fleet.random.uniform(0, 60_000_000))
        fleet.board.apply(
            AccountRestored(
                at_ms=0,
                account_id=account_id,
                limits=_LIMITS,
                weight_milli=1000,
                shares={Tier.RELAX: share},
            )
        )
    gc.collect()
    before = _resident_bytes()
    begin = time.process_time()
    for account_id in accounts:
        for _ in range(10):
            fleet.submit(account_id)
    load_s = time.process_time() - begin
    gc.collect()
    memory = (_resident_bytes() - before) / waiting
    for number in range(gpus):
        fleet.board.apply(
            WorkerJoined(
                at_ms=0,
                worker=Worker(
                    worker_id=WorkerId(f"node-{number // 8}/gpu-{number % 8}"),
                    memory_bytes=fleet.random.choice((8, 16)) * _GIB,
                    speed_permille=1000,
                    warm_models=frozenset({_MODELS[number % 2]}),
                ),
            )
        )
    fleet.fill()
    gc.collect()
    collect_seldom()

    decisions = 0
    decide_s = 0.0
    cycle_begin = time.process_time()
    # So many that the garbage collector has its turn with the largest board too: it comes seldom and is dear.
    for _ in range(600):
        fleet.now_ms += 500
        for _ in range(100):
            fleet.submit(fleet.finish())
        begin = time.process_time()
        decided = fleet.board.decide(fleet.now_ms)
        decide_s += time.process_time() - begin
        decisions += fleet.act(decided)
    cycle_s = time.process_time() - cycle_begin

    singles = []
    for _ in range(3000):
        fleet.now_ms += 5
        fleet.submit(fleet.finish())
        begin = time.process_time()
        decided = fleet.board.decide(fleet.now_ms)
        singles.append(time.process_time() - begin)
        fleet.act(decided)
    singles.sort()
    begin = time.process_time()
    fleet.board.status(JobId(f"{fleet.jobs:036d}"))
    status_s = time.process_time() - begin
    p99_us = singles[len(singles) * 99 // 100] * 1e6
    return (
        f"{waiting:>9,} {len(accounts):>9,} {gpus:>7,} {decisions / decide_s:>12,.0f}"
        f" {decisions / cycle_s:>12,.0f} {p99_us:>10,.0f} {memory:>9,.0f} {load_s:>7.2f}"
        f" {status_s * 1e3:>10,.1f}"
    )


def main() -> None:
    """Print one row for each number of waiting jobs."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--million", action="store_true", help="also with 1,000,000 waiting jobs")
    arguments.add_argument("--seed", type=int, default=1)
    chosen = arguments.parse_args()
    print(
        f"{'waiting':>9} {'accounts':>9} {'GPUs':>7} {'decisions/s':>12} {'whole cycle':>12}"
        f" {'p99 one us':>10} {'bytes/job':>9} {'load s':>7} {'places ms':>10}"
    )
    for waiting in (10_000, 100_000, *((1_000_000,) if chosen.million else ())):
        print(_row(waiting, chosen.seed), flush=True)


if __name__ == "__main__":
    main()
