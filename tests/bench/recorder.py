"""What it costs to take down what the board is told and decides.

    python -m tests.bench.recorder [--jobs 20000] [--gpus 1000] [--seed N]

Jobs of 2,000 accounts are submitted and go through a board, 100 at a time, without a recorder and with one.
Times are CPU time, but for the last of them of the loop's thread alone: beside it another packs and writes.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from scheduler.forecasts import ListenedBoard
from scheduler.policy.decisions import Start
from scheduler.policy.events import (
    AccountRestored,
    AttemptFinished,
    AttemptStarted,
    Event,
    JobSubmitted,
    Outcome,
    WorkerJoined,
)
from scheduler.policy.foresight.lately import Lately
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker
from scheduler.recorder import RecordedBoard, recording_of, start_recording

_ACCOUNTS = 2_000
_AT_A_TIME = 100


@dataclass(kw_only=True)
class _Cost:
    """CPU seconds of the loop's thread."""

    submitting_s: float = 0.0
    telling_s: float = 0.0
    told: int = 0
    deciding_s: float = 0.0
    cycles: int = 0
    decisions: int = 0
    process_s: float = 0.0
    """Of all threads."""


def main() -> None:
    """Print what the same takes without a recorder and with one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--gpus", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    without = _run(ListenedBoard(Parameters(), Lately(0)), arguments)
    with tempfile.TemporaryDirectory() as folder:
        recorder = start_recording(Path(folder), epoch=1, parameters=Parameters(), bytes_max=2**32)
        assert recorder is not None
        recorded = _run(RecordedBoard(Parameters(), Lately(0), recorder), arguments)
        recorder.close()
        size = recording_of(Path(folder), 1).stat().st_size
    print(f"{'':34}{'off':>9}{'on':>9}{'ratio':>8}")
    for what, before, after in (
        (
            "a waiting job is told, us",
            without.submitting_s / arguments.jobs,
            recorded.submitting_s / arguments.jobs,
        ),
        ("any other event, us", without.telling_s / without.told, recorded.telling_s / recorded.told),
        (
            "a decision is made, us",
            without.deciding_s / without.decisions,
            recorded.deciding_s / recorded.decisions,
        ),
        ("a cycle, us", without.deciding_s / without.cycles, recorded.deciding_s / recorded.cycles),
        (
            "a job in all, every thread, us",
            without.process_s / arguments.jobs,
            recorded.process_s / arguments.jobs,
        ),
    ):
        print(f"{what:34}{before * 1e6:9.1f}{after * 1e6:9.1f}{after / before:8.2f}")
    print(f"{size / arguments.jobs:.0f} bytes a job on the disk")


def _run(board: ListenedBoard, arguments: argparse.Namespace) -> _Cost:
    draws = random.Random(arguments.seed)
    cost, now_ms, process_s = _Cost(), 0, time.process_time()
    limits = Limits(running=30, relax_running=20, accepted=100)
    for number in range(_ACCOUNTS):
        account_id = AccountId(f"account-{number}")
        board.apply(
            AccountRestored(at_ms=0, account_id=account_id, limits=limits, weight_milli=1000, shares={})
        )
    for number in range(arguments.gpus):
        worker = Worker(
            worker_id=WorkerId(f"node-{number // 8}/gpu-{number % 8}"),
            memory_bytes=16 * 2**30,
            speed_permille=1000,
            warm_models=frozenset({"sdxl"}),
        )
        board.apply(WorkerJoined(at_ms=0, worker=worker))
    gc.collect()
    gc.freeze()

    submitted: list[Event] = [
        JobSubmitted(at_ms=0, job=_job(number, draws)) for number in range(arguments.jobs)
    ]
    begun_s = time.thread_time()
    for event in submitted:
        board.apply(event)
    cost.submitting_s = time.thread_time() - begun_s

    running: list[AttemptId] = []
    ended = 0
    while ended < arguments.jobs:
        now_ms += 500
        begun_s = time.thread_time()
        decisions = board.decide(now_ms)
        cost.deciding_s += time.thread_time() - begun_s
        cost.cycles += 1
        cost.decisions += len(decisions)
        events: list[Event] = []
        for decision in decisions:
            assert isinstance(decision, Start)
            attempt_id = AttemptId(f"{len(running) + ended:036d}-{now_ms}")
            running.append(attempt_id)
            events.append(
                AttemptStarted(
                    at_ms=now_ms,
                    job_id=decision.job_id,
                    attempt_id=attempt_id,
                    worker_id=decision.worker_id,
                    charge=decision.charge,
                )
            )
        draws.shuffle(running)
        ending, running = running[:_AT_A_TIME], running[_AT_A_TIME:]
        ended += len(ending)
        events += [
            AttemptFinished(at_ms=now_ms, attempt_id=one, outcome=Outcome.SUCCEEDED, gpu_ms=30_000)
            for one in ending
        ]
        begun_s = time.thread_time()
        for event in events:
            board.apply(event)
        cost.telling_s += time.thread_time() - begun_s
        cost.told += len(events)
    cost.process_s = time.process_time() - process_s
    return cost


def _job(number: int, draws: random.Random) -> Job:
    return Job(
        job_id=JobId(f"{draws.getrandbits(128):032x}"),
        account_id=AccountId(f"account-{number % _ACCOUNTS}"),
        tier=Tier.FAST if draws.random() < 0.1 else Tier.RELAX,
        arrival=number,
        predicted_ms=draws.randint(10_000, 60_000),
        step_ms=1_000,
        model="sdxl",
        memory_bytes=draws.choice((4, 6, 8)) * 2**30,
    )


if __name__ == "__main__":
    main()
