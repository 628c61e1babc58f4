"""Who is missed, who is not, and what is remembered of those that have left."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from gpu_worker.contract import GpuTime, WorkerReport
from scheduler.fleet import GoneBecause, WorkerGone
from scheduler.metrics import SchedulerMetrics, WorkerState
from scheduler.roster import Roster
from scheduler.running import RunningAttempts
from scheduler.workers import LeavesBecause, Leaving, Workers

A_SECOND_MS = 1_000
A_MINUTE_MS = 60 * A_SECOND_MS


class Cell:
    """A roster with all that it looks at, and what the loop does around it."""

    def __init__(self, *slots: str, at_least: int | None = 0) -> None:
        self.slots = set(slots)
        self.now_ms = 0
        self.workers = Workers()
        self.metrics = SchedulerMetrics((), (), now_ms=0)
        self.roster = Roster(
            slots=lambda: self.slots,
            workers=self.workers,
            running=RunningAttempts(),
            metrics=self.metrics,
            at_least=at_least,
        )
        for worker_id in slots:
            self.join(worker_id)
        self.pass_ms(A_SECOND_MS)

    def join(self, worker_id: str, life: str = "first") -> None:
        report = WorkerReport(
            worker_id=worker_id,
            incarnation=life,
            pid=1,
            release="test",
            epoch=1,
            device="stub",
            speed_permille=1_000,
            memory_bytes=2,
            memory_used_bytes=1,
            warm_models=(),
            active=None,
            unacknowledged=(),
            gpu_time=GpuTime(idle_ms=700),
        )
        self.slots.add(worker_id)
        self.roster.began(report, self.now_ms)
        self.workers.joined(report, self.now_ms)
        self.metrics.worker_heard(report, self.now_ms)

    def end(self, worker_id: str, *, life: str = "first", because: GoneBecause = GoneBecause.DIED) -> None:
        gone = WorkerGone(worker_id=worker_id, incarnation=life, sentence="It ended.", because=because)
        self.roster.ended(gone, self.now_ms)
        self.metrics.worker_ended(worker_id, life, busy=False, now_ms=self.now_ms)
        self.workers.gone(worker_id)

    def leave(self, worker_id: str, *, life: str = "first") -> None:
        """Let a machine be gone with its worker."""
        self.slots.discard(worker_id)
        self.end(worker_id, life=life)

    def pass_ms(self, ms: int) -> None:
        self.now_ms += ms
        self.roster.look(self.now_ms)

    def drain(self, *worker_ids: str) -> None:
        self.workers.wanted(dict.fromkeys(worker_ids, datetime(2026, 1, 1, tzinfo=UTC)), {})
        for worker_id in worker_ids:
            self.workers.looked_at(worker_id, busy=False, now_ms=self.now_ms)

    @property
    def states(self) -> dict[str, int]:
        return {state.value: count for state, count in self.roster.states(self.now_ms).items() if count}

    def losses(self, worker_id: str) -> float | None:
        return self.metrics.registry.get_sample_value("darkroom_worker_losses_total", {"worker": worker_id})

    @property
    def series(self) -> int:
        return sum(1 for line in self.metrics.page().text.splitlines() if 'worker="' in line)


def test_a_machine_that_died_is_missed_until_another_takes_its_place() -> None:
    cell = Cell("a/0", "b/0", "c/0")
    cell.leave("c/0")
    cell.pass_ms(A_SECOND_MS)
    assert (cell.roster.expected, cell.states) == (3, {"idle": 2, "lost": 1})
    cell.pass_ms(24 * 60 * A_MINUTE_MS)
    assert (cell.roster.expected, cell.states) == (3, {"idle": 2, "lost": 1}), "it is not got used to"
    cell.join("d/0")
    cell.pass_ms(A_SECOND_MS)
    assert (cell.roster.expected, cell.states) == (3, {"idle": 3})


def test_a_machine_that_comes_back_is_the_one_that_was_missed() -> None:
    cell = Cell("a/0", "b/0")
    cell.leave("a/0")
    cell.leave("b/0")
    cell.pass_ms(A_SECOND_MS)
    cell.join("b/0", "second")
    cell.pass_ms(A_SECOND_MS)
    assert (cell.roster.expected, cell.states) == (2, {"idle": 1, "lost": 1})
    cell.join("a/0", "second")
    cell.pass_ms(A_SECOND_MS)
    assert (cell.roster.expected, cell.states) == (2, {"idle": 2})


def test_a_machine_that_was_told_to_end_is_not_missed_also_if_that_is_heard_later() -> None:
    cell = Cell("a/0", "b/0", "c/0")
    cell.roster.leaves("b/0", cell.now_ms)
    cell.slots -= {"b/0", "c/0"}
    cell.pass_ms(A_SECOND_MS)
    assert cell.roster.expected == 2
    cell.roster.leaves("c/0", cell.now_ms)
    cell.pass_ms(A_SECOND_MS)
    assert cell.roster.expected == 1
    for worker_id in ("b/0", "c/0"):
        cell.end(worker_id)
    assert cell.states == {"idle": 1}
    # It was only started anew, and dies later.
    cell.join("c/0", "second")
    cell.pass_ms(A_SECOND_MS)
    cell.leave("c/0")
    cell.pass_ms(A_SECOND_MS)
    assert (cell.roster.expected, cell.states) == (2, {"idle": 1, "lost": 1})


def test_a_machine_that_was_only_started_anew_takes_the_place_of_none_that_died() -> None:
    cell = Cell("a/0", "b/0", "c/0")
    cell.roster.leaves("b/0", cell.now_ms)
    cell.leave("b/0")
    cell.leave("a/0")
    cell.pass_ms(20 * A_MINUTE_MS)
    assert (cell.roster.expected, cell.states) == (2, {"idle": 1, "lost": 1})
    cell.join("b/0", "second")
    cell.pass_ms(A_SECOND_MS)
    assert (cell.roster.expected, cell.states) == (3, {"idle": 2, "lost": 1}), "the other one is still away"
    cell.join("d/0")
    cell.pass_ms(A_SECOND_MS)
    assert (cell.roster.expected, cell.states) == (3, {"idle": 3})


def test_what_an_operator_drained_is_not_missed_whenever_that_was() -> None:
    cell = Cell("a/0", "b/0", "c/0")
    cell.drain("b/0")
    assert cell.states == {"idle": 2, "draining": 1}
    cell.end("b/0")
    cell.pass_ms(60 * A_MINUTE_MS)
    assert cell.states == {"idle": 2, "draining": 1}, "its machine may be out for repair"
    cell.slots.discard("b/0")
    cell.leave("c/0")
    cell.pass_ms(A_SECOND_MS)
    assert (cell.roster.expected, cell.states) == (2, {"idle": 1, "lost": 1})
    cell.drain("b/0", "c/0")
    cell.pass_ms(A_SECOND_MS)
    assert (cell.roster.expected, cell.states) == (1, {"idle": 1}), "now somebody knows of it"


def test_a_scheduler_that_finds_fewer_than_there_should_be_misses_them() -> None:
    cell = Cell("a/0", at_least=3)
    assert (cell.roster.expected, cell.states) == (3, {"idle": 1, "lost": 2})


def test_a_fleet_that_is_scaled_misses_no_machine() -> None:
    cell = Cell("a/0", "b/0", at_least=None)
    cell.leave("b/0")
    cell.pass_ms(A_SECOND_MS)
    assert cell.states == {"idle": 1}


def test_a_worker_that_died_is_missed_at_once_and_one_that_makes_room_when_no_other_comes() -> None:
    cell = Cell("a/0", "b/0", "c/0")
    cell.workers.leaves("b/0", Leaving(since_ms=0, because=LeavesBecause.OUTDATED))
    cell.end("a/0")
    cell.end("b/0", because=GoneBecause.REPLACED)
    assert cell.states == {"idle": 1, "lost": 1, "starting": 1}
    cell.pass_ms(5 * A_MINUTE_MS)
    assert cell.states == {"idle": 1, "lost": 2}
    for worker_id in ("a/0", "b/0"):
        cell.join(worker_id, "second")
    assert cell.states == {"idle": 3}


def test_a_worker_that_is_wanted_again_is_on_its_way_however_long_nobody_wanted_it() -> None:
    cell = Cell("a/0", "b/0", "c/0", at_least=None)
    cell.end("c/0")
    cell.pass_ms(A_SECOND_MS)
    assert cell.states == {"idle": 2, "lost": 1}
    cell.workers.spare_slots({"b/0", "c/0"}, cell.now_ms)
    cell.end("b/0", because=GoneBecause.REPLACED)
    cell.pass_ms(60 * A_MINUTE_MS)
    assert cell.states == {"idle": 1}
    cell.workers.spare_slots((), cell.now_ms)
    assert cell.states == {"idle": 1, "starting": 2}
    cell.pass_ms(5 * A_MINUTE_MS)
    assert cell.states == {"idle": 1, "lost": 2}


def test_a_machine_that_comes_back_has_as_long_to_start_its_worker_as_any() -> None:
    cell = Cell("a/0", "b/0")
    cell.roster.leaves("b/0", cell.now_ms)
    cell.workers.departs("b/0", cell.now_ms)
    cell.leave("b/0")
    for _ in range(4):
        cell.pass_ms(A_MINUTE_MS)
    cell.slots.add("b/0")
    cell.pass_ms(A_SECOND_MS)
    cell.pass_ms(2 * A_MINUTE_MS)
    assert cell.states == {"idle": 1, "starting": 1}


def test_only_ends_that_nobody_asked_for_are_losses() -> None:
    cell = Cell("a/0", "b/0", "c/0", "d/0", "e/0")
    cell.workers.spare_slots({"b/0"}, cell.now_ms)
    cell.workers.departs("c/0", cell.now_ms)
    cell.drain("d/0")
    cell.end("a/0", because=GoneBecause.SILENT)
    cell.end("e/0", because=GoneBecause.REPLACED)
    for worker_id in ("b/0", "c/0", "d/0"):
        cell.end(worker_id)
    assert [cell.losses(f"{name}/0") for name in "abcde"] == [1, 0, 0, 0, 0]
    cell.join("a/0", "second")
    cell.end("a/0", life="second")
    assert cell.losses("a/0") == 2


def test_a_thousand_workers_that_came_and_went_leave_nothing_but_their_gpu_time() -> None:
    cell = Cell("stays/0", at_least=None)
    most = 0
    for number in range(1_000):
        cell.join(f"node-{number}/0")
        cell.pass_ms(A_MINUTE_MS)
        cell.leave(f"node-{number}/0")
        # The slot that stays gets another worker each time.
        cell.end("stays/0", life="first" if number == 0 else f"life-{number - 1}")
        cell.join("stays/0", f"life-{number}")
        if number % 100 == 99:
            most = max(most, cell.series)
    # Five minutes of those that left, and those that are there.
    assert most <= 4 * 8
    assert len(cell.roster) <= 8
    assert len(cell.metrics.gpu_time) <= 8
    cell.pass_ms(A_MINUTE_MS)
    cell.pass_ms(5 * A_MINUTE_MS)
    assert (len(cell.roster), len(cell.metrics.gpu_time), cell.series) == (1, 1, 4)
    idle_s = cell.metrics.registry.get_sample_value("darkroom_gpu_time_seconds_total", {"use": "idle"})
    # Each of 2,000 lives had lived for 0.7 s when it was first heard of, the first one before the account.
    assert idle_s == pytest.approx(2_000 * 60.7, abs=2), "what they lived stays counted"


def test_a_fixed_fleet_whose_machines_have_another_name_each_time_misses_none() -> None:
    cell = Cell("node-0/0")
    for number in range(100):
        cell.leave(f"node-{number}/0")
        cell.pass_ms(A_SECOND_MS)
        assert cell.states == {WorkerState.LOST.value: 1}
        cell.join(f"node-{number + 1}/0")
        cell.pass_ms(A_SECOND_MS)
        assert (cell.roster.expected, cell.states) == (1, {"idle": 1})
