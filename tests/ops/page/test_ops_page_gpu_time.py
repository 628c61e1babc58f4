"""What the chart shows is what the scheduler counted, minute by minute, and nothing where nobody knows."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from scheduler.metrics import GpuUse, Page
from scheduler.ops import History
from scheduler.ops.gpu_time import MINUTES
from scheduler.policy.ids import Tier
from tests.ops.page.conftest import a_page_of_counters

NOON_S = 1_800_000_000.0
"""The first second of a minute."""


class Clock:
    """Time that passes when a test says so."""

    now_s = NOON_S


async def nobody(accept: str) -> Page:
    raise TimeoutError


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def history(clock: Clock) -> History:
    return History(nobody, lambda: clock.now_s)


def read(history: History, clock: Clock, at_s: float, *, started: int = 0, **gpu_s: float) -> None:
    clock.now_s = NOON_S + at_s
    history.read(a_page_of_counters(started=started, **gpu_s), clock.now_s)


def test_nothing_is_known_before_the_second_reading(history: History, clock: Clock) -> None:
    assert not history.spent().known
    read(history, clock, 0, fast=1_000)
    assert not history.spent().known
    assert history.started_a_minute(Tier.FAST) is None
    read(history, clock, 15, fast=1_015)
    assert history.spent().known


def test_each_minute_has_its_part_of_what_was_counted_across_it(history: History, clock: Clock) -> None:
    read(history, clock, 50)
    read(history, clock, 70, fast=40, idle=20)
    before, after = history.spent().minutes[-2:]
    assert (before.at_s, after.at_s) == (NOON_S, NOON_S + 60)
    for minute in (before, after):
        assert minute.gpus is not None
        assert minute.gpus[GpuUse.FAST] == pytest.approx(2)
        assert minute.gpus[GpuUse.IDLE] == pytest.approx(1)
    assert history.spent().gpu_s[GpuUse.FAST] == pytest.approx(40)
    assert history.spent().share(GpuUse.FAST) == pytest.approx(2 / 3)


def test_the_uses_of_an_hour_add_up_to_the_gpus_times_the_time(history: History, clock: Clock) -> None:
    for at_s in range(0, 4_000, 15):
        read(history, clock, at_s, fast=at_s * 1.5, relax=at_s * 0.5, load=at_s * 0.25, idle=at_s * 1.75)
    spent = history.spent()
    assert len(spent.minutes) == MINUTES
    assert all(
        minute.gpus is not None and sum(minute.gpus.values()) == pytest.approx(4) for minute in spent.minutes
    )
    watched_s = clock.now_s - spent.minutes[0].at_s
    assert sum(spent.gpu_s.values()) == pytest.approx(4 * watched_s)


def test_a_scheduler_that_counts_from_zero_again_leaves_a_gap_and_no_negative_time(
    history: History, clock: Clock
) -> None:
    read(history, clock, 0, fast=500, idle=500)
    read(history, clock, 60, fast=560, idle=500)
    read(history, clock, 120, fast=30, idle=600)
    read(history, clock, 180, fast=90, idle=600)
    known = [minute for minute in history.spent().minutes if minute.gpus is not None]
    assert [minute.at_s - NOON_S for minute in known] == [0, 120]
    assert history.spent().gpu_s[GpuUse.FAST] == pytest.approx(120)


def test_time_in_which_nobody_answered_is_not_known(history: History, clock: Clock) -> None:
    read(history, clock, 0)
    read(history, clock, 300, fast=300)
    assert not history.spent().known


def test_a_clock_that_is_set_back_does_not_make_time_run_backwards(history: History, clock: Clock) -> None:
    for at_s in (0, 15, 30):
        read(history, clock, at_s, fast=at_s)
    read(history, clock, 10, fast=45)
    read(history, clock, 25, fast=60)
    assert all(spent_s >= 0 for spent_s in history.spent().gpu_s.values())
    assert history.spent().gpu_s[GpuUse.FAST] == pytest.approx(60)


def test_what_only_a_newer_scheduler_counts_is_passed_over(history: History, clock: Clock) -> None:
    newer = 'darkroom_gpu_time_seconds_total{use="training"} 5.0\n'
    for at_s in (0, 15):
        page = a_page_of_counters(fast=at_s)
        history.read(replace(page, text=newer + page.text), NOON_S + at_s)
    clock.now_s += 15
    assert history.spent().gpu_s[GpuUse.FAST] == pytest.approx(15)


def test_an_hour_is_kept_and_no_more(history: History, clock: Clock) -> None:
    for at_s in range(0, 20_000, 15):
        read(history, clock, at_s, fast=at_s)
    assert len(history._readings) <= (MINUTES + 1) * 4 + 1


def test_the_pace_is_that_of_the_last_five_minutes(history: History, clock: Clock) -> None:
    for at_s in range(0, 601, 30):
        read(history, clock, at_s, started=10_000 if at_s <= 300 else 10_000 + (at_s - 300) // 5)
    assert history.started_a_minute(Tier.FAST) == pytest.approx(12)
    assert history.started_a_minute(Tier.RELAX) == 0


async def test_it_goes_on_while_the_scheduler_is_away(clock: Clock) -> None:
    asked = asyncio.Event()

    async def away(accept: str) -> Page:
        asked.set()
        raise TimeoutError

    running = asyncio.create_task(History(away, lambda: clock.now_s).run())
    await asked.wait()
    await asyncio.sleep(0)
    assert not running.done()
    running.cancel()
