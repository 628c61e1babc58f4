"""Traces are read as they are, errors say what to do, and what is made up is the same for a seed."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from scheduler.policy.ids import Tier
from scheduler.simulator.workload import Cut, FastRule, Generator, TraceWrong, Workload, generate, read_trace

HEAD = "arrival_s,user,kind,gpu_seconds"
ALL_RELAX = FastRule(share=0)


def read(
    path: Path, *lines: str, cut: Cut | None = None, fast: FastRule = ALL_RELAX, seed: int = 0
) -> Workload:
    path.write_text("\n".join(lines) + "\n")
    return read_trace(path, cut=Cut() if cut is None else cut, fast=fast, seed=seed)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.csv"


def test_a_trace_is_read_with_the_steps_of_its_kinds(path: Path) -> None:
    workload = read(path, HEAD, "2.5,u,t2i_512x512_s50_n9,45.3", "4,v,train_g8,12.3456")
    first, second = workload.requests
    assert (first.arrival_ms, first.account_id, first.cost_ms) == (0, "u", 45_300)
    # Three grids of up to four images each.
    assert first.steps == 150
    assert (second.arrival_ms, second.cost_ms, second.steps) == (1500, 12_346, 12)
    assert workload.span_ms == 1500
    assert workload.longest_ms == 45_300


def test_a_trace_may_name_tiers_models_and_steps_and_be_packed(path: Path) -> None:
    text = f"{HEAD},tier,model,steps\n0,u,x,1,fast,sdxl,4\n1,u,x,1,,,\n"
    path.write_bytes(gzip.compress(text.encode()))
    first, second = read_trace(path, cut=Cut(), fast=ALL_RELAX, seed=0).requests
    assert (first.tier, first.model, first.steps) == (Tier.FAST, "sdxl", 4)
    assert (second.tier, second.model, second.steps) == (Tier.RELAX, "default", 1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["arrival_s,user,gpu_seconds"], "the first line has to name the columns, and kind is missing"),
        ([HEAD, "soon,u,x,1"], "line 2: arrival_s is 'soon'; it has to be a number, 0 or more"),
        ([HEAD, "0,u,x,1", "1,u,x,-2"], "line 3: gpu_seconds is '-2'"),
        ([HEAD, "0,u,x"], "line 2: gpu_seconds is None"),
        ([HEAD, "0,,x,1"], "line 2: user is empty"),
        ([HEAD, "5,u,x,1", "4,u,x,1"], "line 3: arrival_s goes back; sort the file by arrival_s"),
        ([f"{HEAD},tier", "0,u,x,1,slow"], "line 2: tier is 'slow'; write fast or relax, or leave it empty"),
        ([HEAD], "no jobs in the part that was asked for; use another --from-hours or --hours"),
    ],
)
def test_a_wrong_trace_is_refused_with_the_place_and_what_to_do(
    path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(TraceWrong) as refused:
        read(path, *lines)
    assert message in str(refused.value)


def test_a_damaged_file_is_refused(path: Path) -> None:
    path.write_bytes(gzip.compress(b"arrival_s,user,kind,gpu_seconds\n" * 100)[:40])
    with pytest.raises(TraceWrong, match="cannot be read as CSV, plain or gzip"):
        read_trace(path, cut=Cut(), fast=ALL_RELAX, seed=0)


def test_a_part_of_a_trace_begins_at_its_own_zero(path: Path) -> None:
    lines = [HEAD, *(f"{hour * 3600},u{hour % 2},x,{hour}" for hour in range(10))]
    workload = read(path, *lines, cut=Cut(from_hours=2.5, hours=4, divide_cost=2))
    assert [request.arrival_ms for request in workload.requests] == [
        1_800_000 + number * 3_600_000 for number in range(4)
    ]
    assert [request.cost_ms for request in workload.requests] == [1500, 2000, 2500, 3000]
    assert workload.span_ms == 4 * 3_600_000
    assert len(read(path, *lines, cut=Cut(rows=3)).requests) == 3


def test_drawn_users_come_with_all_their_jobs(path: Path) -> None:
    lines = [HEAD, *(f"{number},u{number % 50},x,1" for number in range(500))]
    workload = read(path, *lines, cut=Cut(users_share=0.3))
    users = {request.account_id for request in workload.requests}
    assert 0 < len(users) < 30
    assert len(workload.requests) == 10 * len(users)


def test_thinking_is_the_gap_less_the_time_the_last_picture_takes(path: Path) -> None:
    workload = read(path, HEAD, "0,u,x,10", "4,v,x,1", "30,u,x,10", "35,u,x,10")
    assert [request.think_ms for request in workload.requests] == [0, 0, 20_000, 0]


def test_an_account_has_fast_jobs_until_its_allowance_is_used(path: Path) -> None:
    lines = [HEAD, *(f"{number * 86_400},u,x,60" for number in range(40))]
    workload = read(path, *lines, fast=FastRule(share=1, allowance_ms=150_000))
    fast = [number for number, one in enumerate(workload.requests) if one.tier is Tier.FAST]
    # Two of a month of thirty days.
    assert fast == [0, 1, 30, 31]
    assert "are fast while the account has something left of 2.5 fast GPU-min a month" in workload.source


def test_a_load_is_reached_by_stretching_time(path: Path) -> None:
    workload = read(path, HEAD, "0,u,x,10", "5,u,x,10", "20,u,x,10")
    assert workload.load(3) == pytest.approx(0.5)
    busier = workload.at_load(1.0, 3)
    assert busier.load(3) == pytest.approx(1.0)
    assert [one.arrival_ms for one in busier.requests] == [0, 2500, 10_000]
    assert [one.think_ms for one in busier.requests] == [0, 0, 2500]


def test_a_seed_makes_the_same_workload_and_another_seed_another() -> None:
    generator = Generator(jobs=300, accounts=20)
    one = generate(generator, fast=FastRule(), seed=1)
    assert generate(generator, fast=FastRule(), seed=1) == one
    assert generate(generator, fast=FastRule(), seed=2).requests != one.requests
    assert len(one.requests) == 300
    assert list(one.requests) == sorted(one.requests, key=lambda request: request.arrival_ms)
    assert {request.tier for request in one.requests} == set(Tier)
    assert one.models[0] == "model-0"
