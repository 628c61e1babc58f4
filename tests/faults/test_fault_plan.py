"""A plan follows from its seed alone, and deals every kind of fault before any comes again."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest

from tests.faults.plan import Kind, has_beat, plan_of
from tests.faults.stage import ROOT

MINUTE_MS = 60_000
WITHOUT_BEAT = [seed for seed in range(25) if not has_beat(seed)]


def test_a_seed_gives_the_same_plan_in_another_process_too() -> None:
    said = "from tests.faults.plan import plan_of; print(*plan_of(7, span_ms=60_000), sep='\\n')"
    told = [
        subprocess.run(
            [sys.executable, "-c", said],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for hash_seed in ("1", "2")
    ]
    assert told[0] == told[1] == list(map(str, plan_of(7, span_ms=MINUTE_MS)))


def test_a_seed_of_last_year_gives_the_plan_of_last_year() -> None:
    # Or no run that somebody wrote down could be looked at again. Who adds a kind changes this, and says so.
    assert list(map(str, plan_of(1, span_ms=9_000))) == [
        "   0.6 s  stop the database for 0.7 s  (which 121)",
        "   4.3 s  freeze the scheduler's node until another leads for 18.5 s  (which 931)",
        "   7.6 s  delay the database for 2.6 s  (which 515)",
    ]


def test_seeds_give_different_plans() -> None:
    assert len({plan_of(seed, span_ms=MINUTE_MS) for seed in range(100)}) == 100


@pytest.mark.parametrize("seed", WITHOUT_BEAT)
def test_every_kind_is_dealt_before_any_comes_again(seed: int) -> None:
    dealt = [planned.kind for planned in plan_of(seed, span_ms=5 * MINUTE_MS)]
    for begin in range(0, len(dealt) - len(Kind), len(Kind)):
        assert set(dealt[begin : begin + len(Kind)]) == set(Kind)


@pytest.mark.parametrize("seed", WITHOUT_BEAT)
def test_faults_come_in_order_and_within_their_span(seed: int) -> None:
    plan = plan_of(seed, span_ms=MINUTE_MS, every_ms=2_000)
    times_ms = [planned.at_ms for planned in plan]
    assert times_ms == sorted(times_ms)
    assert all(at_ms in range(MINUTE_MS) for at_ms in times_ms)
    assert 20 <= len(plan) <= 45, "about one every two seconds"


def test_in_every_fifth_seed_the_database_stops_every_few_seconds() -> None:
    assert len(WITHOUT_BEAT) == 20
    for seed in set(range(25)).difference(WITHOUT_BEAT):
        plan = plan_of(seed, span_ms=MINUTE_MS)
        stops_ms = [0, *(one.at_ms for one in plan if one.kind is Kind.STOP_DATABASE), MINUTE_MS]
        assert max(after - before for before, after in pairwise(stops_ms)) <= 7_000
        times_ms = [one.at_ms for one in plan]
        assert times_ms == sorted(times_ms)


def test_a_run_may_be_of_a_few_kinds_only() -> None:
    kinds = (Kind.KILL_WORKER, Kind.LOSE_COMMITS)
    assert {planned.kind for planned in plan_of(3, span_ms=MINUTE_MS, kinds=kinds)} == set(kinds)
