"""What a job waited is told apart: what its own account caused, and what the fleet did."""

from __future__ import annotations

import pytest

from scheduler.metrics import HeldBecause
from scheduler.policy.board import Board
from scheduler.policy.decisions import Start
from scheduler.policy.events import (
    AccountRestored,
    AttemptFinished,
    AttemptStarted,
    Edge,
    Event,
    FundsChanged,
    JobSubmitted,
    OrderKnown,
    Outcome,
    RefusedBecause,
    StartRefused,
    TierPaused,
    TierResumed,
    WorkerJoined,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker
from scheduler.waits import Waits

ADA = AccountId("ada")


class Cell:
    """A board with one worker, and what watches its waiting."""

    def __init__(self, *, running: int = 1) -> None:
        self.board = Board(Parameters())
        self.waits = Waits(self.board)
        self.tell(
            AccountRestored(
                at_ms=0,
                account_id=ADA,
                limits=Limits(running=running, relax_running=running, accepted=10),
                weight_milli=1000,
                shares={},
            ),
            WorkerJoined(
                at_ms=0,
                worker=Worker(
                    worker_id=WorkerId("here/gpu-0"),
                    memory_bytes=8_000,
                    speed_permille=1000,
                    warm_models=frozenset(),
                    device="stub",
                    models=None,
                ),
            ),
        )

    def tell(self, *events: Event) -> None:
        for event in events:
            concerned = self.waits.concerned(event)
            self.board.apply(event)
            self.waits.heard(event, concerned)

    def submit(
        self, name: str, at_ms: int, tier: Tier = Tier.FAST, *, accepted_ms: int | None = None
    ) -> JobId:
        job = Job(
            job_id=JobId(name),
            account_id=ADA,
            tier=tier,
            arrival=at_ms,
            predicted_ms=10_000,
            step_ms=500,
            model="stand-in",
            memory_bytes=1_000,
        )
        self.tell(JobSubmitted(at_ms=at_ms, job=job, accepted_ms=accepted_ms))
        return job.job_id

    def start(self, job_id: JobId, at_ms: int) -> dict[HeldBecause, int]:
        """Start the one job that the board decides to start, and return what had held it."""
        (start,) = (one for one in self.board.decide(at_ms) if isinstance(one, Start))
        assert start.job_id == job_id
        held = dict(self.waits.started(job_id, ADA, at_ms).held_ms)
        self.tell(
            AttemptStarted(
                at_ms=at_ms,
                job_id=job_id,
                attempt_id=AttemptId(f"of {job_id}"),
                worker_id=start.worker_id,
                charge=start.charge,
            )
        )
        return held

    def finish(self, job_id: JobId, at_ms: int) -> None:
        self.tell(
            AttemptFinished(
                at_ms=at_ms, attempt_id=AttemptId(f"of {job_id}"), outcome=Outcome.SUCCEEDED, gpu_ms=9_000
            )
        )


def test_a_job_that_only_others_are_before_is_not_held() -> None:
    cell = Cell()
    first = cell.submit("first", 1_000)
    assert cell.start(first, 61_000) == {}


def test_a_job_that_the_scheduler_hears_of_late_is_not_held_by_its_account() -> None:
    cell = Cell(running=3)
    cell.submit("known", 0)
    late = cell.submit("late", 61_000, accepted_ms=1_000)
    assert cell.waits.started(late, ADA, 62_000).held_ms == {}


@pytest.mark.parametrize("tier", Tier)
def test_a_job_beyond_its_accounts_limit_is_held_until_another_of_its_own_ends(tier: Tier) -> None:
    cell = Cell(running=1)
    first = cell.submit("first", 1_000, tier)
    second = cell.submit("second", 2_000, tier)
    cell.start(first, 3_000)
    cell.finish(first, 13_000)
    assert cell.start(second, 20_000) == {HeldBecause.CONCURRENCY_LIMIT: 11_000}


def test_a_job_without_fast_time_is_held_until_there_is_some() -> None:
    cell = Cell()
    first = cell.submit("first", 1_000)
    cell.tell(StartRefused(at_ms=4_000, job_id=first, reason=RefusedBecause.FUNDS))
    cell.tell(FundsChanged(at_ms=34_000, account_id=ADA))
    assert cell.start(first, 35_000) == {HeldBecause.FUNDS: 30_000}


def test_a_paused_tier_holds_all_its_jobs_and_only_while_it_is_paused() -> None:
    cell = Cell()
    cell.tell(TierPaused(at_ms=500, tier=Tier.FAST))
    first = cell.submit("first", 1_000)
    cell.tell(TierResumed(at_ms=41_000, tier=Tier.FAST))
    assert cell.start(first, 51_000) == {HeldBecause.TIER_PAUSED: 40_000}


def test_a_tier_that_was_paused_before_the_queue_was_known_holds_all_the_same() -> None:
    cell = Cell()
    for tier in Tier:
        cell.tell(OrderKnown(at_ms=0, tier=tier, edge=Edge(tag=0, arrival=0)))
    cell.tell(TierPaused(at_ms=500, tier=Tier.FAST))
    for tier in Tier:
        cell.tell(OrderKnown(at_ms=900, tier=tier, edge=None))
    first = cell.submit("first", 1_000)
    cell.tell(TierResumed(at_ms=41_000, tier=Tier.FAST))
    assert cell.start(first, 51_000) == {HeldBecause.TIER_PAUSED: 40_000}


def test_a_job_that_went_is_forgotten() -> None:
    cell = Cell()
    first = cell.submit("first", 1_000)
    cell.tell(StartRefused(at_ms=2_000, job_id=first, reason=RefusedBecause.GONE))
    assert cell.waits.started(first, ADA, 9_000).held_ms == {}
    assert not cell.waits._waits


def test_a_job_is_told_once_when_it_will_start_and_one_that_started_is_told_nothing() -> None:
    cell = Cell()
    first, second = cell.submit("first", 1_000), cell.submit("second", 1_000)
    cell.start(first, 1_000)
    asked = []

    def expected_ms(job: Job) -> int:
        asked.append(job.job_id)
        return 15_000

    cell.waits.tell(expected_ms)
    cell.waits.tell(expected_ms)
    assert asked == [second]
    cell.finish(first, 12_000)
    assert cell.waits.started(second, ADA, 12_000).told_ms == 15_000
