"""How many GPUs the fleet should have: enough for its aims, never two for a job, never beyond the budget."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from policy_cell import PLAN, Cell

from scheduler.policy.demand import Aims, Demand, TierLoad, demand
from scheduler.policy.events import TierPaused
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters

NOTHING = TierLoad(waiting_jobs=0, waiting_ms=0, running=0, running_ms=0)
AIMS = Aims(wait_ms={Tier.FAST: 10_000, Tier.RELAX: 600_000}, at_least=0, at_most=1_000_000)


def asked(*, fast: TierLoad = NOTHING, relax: TierLoad = NOTHING, aims: Aims = AIMS) -> Demand:
    return demand({Tier.FAST: fast, Tier.RELAX: relax}, aims, Parameters())


def waiting(jobs: int, each_ms: int = 60_000, *, running: int = 0, left_ms: int = 30_000) -> TierLoad:
    return TierLoad(
        waiting_jobs=jobs, waiting_ms=jobs * each_ms, running=running, running_ms=running * left_ms
    )


loads = st.builds(
    lambda jobs, each_ms, running, left_ms: waiting(jobs, each_ms, running=running, left_ms=left_ms),
    st.integers(0, 5000),
    st.integers(1, 600_000),
    st.integers(0, 5000),
    st.integers(0, 600_000),
)


@given(fast=loads, relax=loads)
def test_each_tier_gets_enough_to_start_its_work_in_time_and_never_two_gpus_for_a_job(
    fast: TierLoad, relax: TierLoad
) -> None:
    result = asked(fast=fast, relax=relax)
    for tier, load in ((Tier.FAST, fast), (Tier.RELAX, relax)):
        gpus, jobs = result.by_tier[tier], load.running + load.waiting_jobs
        assert load.running <= gpus <= jobs
        assert gpus == jobs or gpus * AIMS.wait_ms[tier] >= load.waiting_ms + load.running_ms


@given(fast=loads, relax=loads, more=st.integers(1, 100))
def test_more_work_never_asks_for_fewer_gpus(fast: TierLoad, relax: TierLoad, more: int) -> None:
    grown = replace(
        relax, waiting_jobs=relax.waiting_jobs + more, waiting_ms=relax.waiting_ms + more * 60_000
    )
    assert asked(fast=fast, relax=grown).gpus >= asked(fast=fast, relax=relax).gpus


@given(fast=loads, relax=loads, least=st.integers(0, 50), most=st.integers(50, 5000))
def test_the_budget_is_the_end_of_it_and_what_it_does_not_give_is_told(
    fast: TierLoad, relax: TierLoad, least: int, most: int
) -> None:
    free = asked(fast=fast, relax=relax, aims=replace(AIMS, at_least=least))
    bound = asked(fast=fast, relax=relax, aims=replace(AIMS, at_least=least, at_most=most))
    assert least <= bound.gpus <= most
    assert bound.gpus + bound.beyond_budget == free.gpus


@given(fast=st.integers(1, 500), relax=st.integers(1, 500))
def test_fast_has_its_gpus_beside_the_relax_floor(fast: int, relax: int) -> None:
    gpus = asked(fast=waiting(0, running=fast), relax=waiting(0, running=relax)).gpus
    floor = 0 if gpus < 4 else max(1, -(-gpus * 5 // 100))
    assert gpus - floor >= fast


def test_the_floor_costs_gpus_only_where_relax_asks_for_few() -> None:
    assert asked(fast=waiting(0, running=95), relax=waiting(0, running=1)).gpus == 100
    assert asked(fast=waiting(0, running=50), relax=waiting(0, running=50)).gpus == 100


def test_relax_work_is_given_its_target_wait_to_start_in() -> None:
    # 100 jobs of a minute, to start within ten minutes: ten GPUs do ten of them each in that time.
    assert asked(relax=waiting(100)).gpus == 10


def test_gpus_of_twice_the_speed_are_half_as_many() -> None:
    assert asked(relax=waiting(100), aims=replace(AIMS, speed_permille=2000)).gpus == 5


def test_without_work_the_least_is_kept() -> None:
    result = asked(aims=replace(AIMS, at_least=2))
    assert (result.gpus, result.reason) == (2, "2 GPUs: no work is there; at least 2 are kept.")


def test_the_reason_has_the_numbers_in_it() -> None:
    result = asked(fast=waiting(3, running=2), relax=waiting(100), aims=replace(AIMS, at_most=12))
    assert result.reason == (
        "12 GPUs: fast asks for 5 (2 in use; 3 jobs with 3.0 GPU-min waiting, to start within 10 s); "
        "relax asks for 10 (0 in use; 100 jobs with 100.0 GPU-min waiting, to start within 600 s); "
        "the budget ends at 12, 3 fewer than asked for."
    )
    assert result.beyond_budget == 3


def test_only_jobs_count_that_the_caps_of_their_accounts_let_start() -> None:
    cell = Cell(workers=1)
    cell.account("a", limits=PLAN)
    for _ in range(8):
        cell.submit("a", 1000)
    assert cell.board.load(Tier.RELAX, 0) == TierLoad(
        waiting_jobs=2, waiting_ms=2000, running=0, running_ms=0
    )
    cell.decide()
    cell.now_ms = 400
    assert cell.board.load(Tier.RELAX, 400) == TierLoad(
        waiting_jobs=1, waiting_ms=1000, running=1, running_ms=600
    )


def test_a_parked_run_asks_for_a_gpu_of_its_own() -> None:
    cell = Cell(workers=1)
    cell.submit("a", 10_000)
    cell.decide()
    cell.now_ms = 4_000
    cell.submit("b", 5_000, tier=Tier.FAST)
    cell.decide()
    load = {tier: cell.board.load(tier, 5_000) for tier in Tier}
    assert load[Tier.RELAX] == TierLoad(waiting_jobs=0, waiting_ms=0, running=1, running_ms=6_000)
    assert load[Tier.FAST] == TierLoad(waiting_jobs=0, waiting_ms=0, running=1, running_ms=4_000)
    assert demand(load, AIMS, Parameters()).gpus == 2


def test_what_waits_in_a_paused_tier_asks_for_nothing() -> None:
    cell = Cell(workers=0)
    cell.submit("a")
    cell.apply(TierPaused(at_ms=0, tier=Tier.RELAX))
    assert cell.board.load(Tier.RELAX, 0) == NOTHING
