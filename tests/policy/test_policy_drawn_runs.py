"""What the board promises of runs that need their GPU no more and have yet to end."""

from __future__ import annotations

import pytest
from policy_cell import PLAN, Cell, a_worker

from scheduler.policy.board import Board
from scheduler.policy.decisions import Resume, Start, Stop
from scheduler.policy.events import AttemptDrawn, CancelWanted
from scheduler.policy.explain import Stage
from scheduler.policy.ids import JobId, Tier

FAST, RELAX = Tier.FAST, Tier.RELAX
LONG_MS = 500_000


def a_drawn_run(cell: Cell, account: str = "drawn", *, tier: Tier = RELAX) -> str:
    """Start a job on the only idle GPU and have it drawn; it ends when it is told to."""
    job = cell.submit(account, LONG_MS, tier=tier)
    cell.decide()
    cell.draw(cell.attempt(job), stored_in_ms=LONG_MS)
    return job


def only_start(cell: Cell) -> Start:
    (served,) = cell.decide()
    return served.start


def test_the_next_job_starts_once_the_run_before_it_is_drawn() -> None:
    cell = Cell()
    first = cell.submit("a", LONG_MS)
    cell.decide()
    cell.submit("b", name="next")
    assert cell.decide() == []
    cell.draw(cell.attempt(first))
    assert only_start(cell).job_id == "next"
    assert (cell.board.running(RELAX), cell.board.sharing().idle) == (2, 0)


def test_the_end_of_a_drawn_run_leaves_the_next_its_gpu() -> None:
    cell = Cell()
    drawn = a_drawn_run(cell)
    cell.submit("b", LONG_MS, name="next")
    cell.decide()
    cell.end(cell.attempt(drawn), 1000)
    cell.submit("c")
    assert cell.decide() == []
    assert (cell.worker_of("next"), cell.board.idle_workers()) == ("w0", 0)


def test_the_next_may_end_before_the_drawn_run_does() -> None:
    cell = Cell()
    drawn = a_drawn_run(cell)
    cell.submit("b", name="next")
    cell.decide()
    cell.end(cell.attempt("next"), 1000)
    assert cell.board.idle_workers() == 1
    cell.end(cell.attempt(drawn), LONG_MS)
    assert (cell.board.idle_workers(), cell.board.running(RELAX)) == (1, 0)
    assert cell.used_ms("drawn") == LONG_MS, "what is charged is what was measured"


def test_a_drawn_run_counts_for_its_account_until_it_ends() -> None:
    cell = Cell(workers=3)
    cell.account("a", limits=PLAN)
    jobs = [cell.submit("a", LONG_MS) for _ in range(3)]
    cell.decide()
    cell.draw(cell.attempt(jobs[0]), stored_in_ms=LONG_MS)
    cell.draw(cell.attempt(jobs[1]), stored_in_ms=LONG_MS)
    assert cell.decide() == [], "two relax jobs of one account run"
    cell.end(cell.attempt(jobs[0]), 1000)
    assert only_start(cell).job_id == jobs[2]


def test_a_fast_job_parks_nobody_where_a_run_is_drawn() -> None:
    cell = Cell(workers=2)
    cell.submit("relaxed", LONG_MS, step_ms=1000)
    cell.decide()
    drawn = a_drawn_run(cell)
    cell.submit("paying", tier=FAST)
    start = only_start(cell)
    assert (start.worker_id, start.parks) == (cell.worker_of(drawn), None)


def test_a_parked_run_goes_on_once_what_it_was_parked_for_is_drawn() -> None:
    cell = Cell()
    relax = cell.submit("relaxed", LONG_MS, step_ms=1000)
    cell.decide()
    cell.submit("paying", LONG_MS, tier=FAST, name="fast")
    cell.decide()
    assert cell.is_parked(relax)
    cell.draw(cell.attempt("fast"))
    (resume,) = cell.board.decide(cell.now_ms)
    assert isinstance(resume, Resume)
    cell.decide()
    assert not cell.is_parked(relax)
    # One that comes before it goes on has the GPU first, as if the one before had ended.
    cell.submit("paying", LONG_MS, tier=FAST, name="fast-2")
    cell.decide()
    cell.draw(cell.attempt("fast-2"))
    cell.submit("paying", LONG_MS, tier=FAST)
    start = only_start(cell)
    assert (start.worker_id, start.parks) == ("w0", None)
    assert cell.is_parked(relax)


def test_a_drawn_run_is_parked_by_nobody() -> None:
    cell = Cell()
    a_drawn_run(cell)
    cell.submit("paying", LONG_MS, tier=FAST)
    assert only_start(cell).parks is None
    cell.submit("paying", LONG_MS, tier=FAST)
    assert cell.decide() == []


def test_a_drawn_run_that_is_cancelled_is_stopped_and_one_that_is_lost_waits_again() -> None:
    cell = Cell()
    cancelled = a_drawn_run(cell, "a")
    cell.apply(CancelWanted(at_ms=0, job_id=JobId(cancelled)))
    (stop,) = cell.board.decide(0)
    assert isinstance(stop, Stop)
    assert stop.attempt_id == cell.attempt(cancelled)
    lost = cell.submit("b", LONG_MS)
    cell.unwanted.add(cancelled)
    cell.decide()
    cell.draw(cell.attempt(lost))
    cell.lose(cell.attempt(lost))
    assert only_start(cell).job_id == lost


def test_a_drawn_run_of_a_lost_worker_is_off_it() -> None:
    cell = Cell()
    drawn = a_drawn_run(cell)
    cell.join(a_worker("w0"))
    assert cell.board.idle_workers() == 1
    cell.lose(cell.attempt(drawn))
    assert only_start(cell).job_id == drawn


def test_a_copy_of_the_board_knows_what_is_drawn() -> None:
    cell = Cell()
    drawn = a_drawn_run(cell)
    cell.submit("b", name="next")
    copy = Board(cell.parameters)
    for fact in cell.board.facts(cell.now_ms):
        copy.apply(fact)
    assert copy.decide(cell.now_ms) == cell.board.decide(cell.now_ms)
    assert (copy.running(RELAX), copy.idle_workers()) == (1, 1)
    assert [job for job in (drawn, "next") if copy.waiting_job(JobId(job))] == ["next"]


def test_a_drawn_run_says_so_and_is_not_what_others_wait_for() -> None:
    cell = Cell()
    drawn = a_drawn_run(cell)
    told = cell.board.explain(JobId(drawn), 0)
    assert told is not None
    assert (told.stage, told.sentences) == (
        Stage.RUNNING,
        ("It is drawn, and ends when its pictures are stored.",),
    )
    cell.submit("b", 20_000)
    cell.decide()
    cell.submit("c", name="waits")
    waits = cell.board.explain(JobId("waits"), 0)
    assert waits is not None
    assert waits.before is not None
    assert (waits.before.running, waits.before.soonest_end_ms) == (1, 20_000)


@pytest.mark.parametrize("again", ["drawn", "parked"])
def test_only_a_run_that_has_its_gpu_becomes_drawn(again: str) -> None:
    cell = Cell()
    job = cell.submit("a", LONG_MS, step_ms=1000)
    cell.decide()
    attempt_id = cell.attempt(job)
    if again == "drawn":
        cell.draw(attempt_id)
    else:
        cell.submit("paying", LONG_MS, tier=FAST)
        cell.decide()
    with pytest.raises(AssertionError):
        cell.board.apply(AttemptDrawn(at_ms=0, attempt_id=attempt_id))
