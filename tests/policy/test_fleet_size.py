"""How a fleet follows its demand: at once upwards, after a while downwards, by the machines least missed."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy.fleet_size import Machine, SteadyDemand, spare_machines

WHILE_MS = 300_000


def a_machine(
    machine_id: str,
    *,
    gpus: int = 1,
    workers: int | None = None,
    runs: int = 0,
    idle_since_ms: int | None = 0,
    is_spare: bool = False,
) -> Machine:
    return Machine(
        machine_id=machine_id,
        gpus=gpus,
        workers=gpus if workers is None else workers,
        runs=runs,
        idle_since_ms=idle_since_ms,
        is_spare=is_spare,
    )


demands = st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 50)), min_size=1, max_size=40)
machines = st.lists(
    st.builds(
        lambda gpus, runs, ended, idle_since_ms, is_spare: a_machine(
            "",
            gpus=gpus,
            workers=max(0, gpus - ended),
            runs=runs,
            idle_since_ms=idle_since_ms,
            is_spare=is_spare,
        ),
        st.integers(1, 8),
        st.integers(0, 3),
        st.integers(0, 8),
        st.none() | st.integers(0, 1000),
        st.booleans(),
    ),
    max_size=12,
).map(lambda some: [replace(one, machine_id=f"m{number}") for number, one in enumerate(some)])


@given(began=st.integers(0, 50), steps=demands)
def test_what_is_wanted_is_the_largest_demand_of_the_last_while(
    began: int, steps: list[tuple[int, int]]
) -> None:
    steady, now_ms = SteadyDemand(began, 0, shrinks_after_ms=WHILE_MS), 0
    seen = [(0, began)]
    for later_ms, gpus in steps:
        now_ms += later_ms
        seen.append((now_ms, gpus))
        assert steady.wanted(gpus, now_ms) == max(of for at_ms, of in seen if at_ms >= now_ms - WHILE_MS)


def test_a_fleet_grows_at_once_and_shrinks_when_fewer_have_been_enough_for_a_while() -> None:
    steady = SteadyDemand(2, 0, shrinks_after_ms=WHILE_MS)
    assert steady.wanted(9, 1_000) == 9
    assert steady.wanted(1, 1_000 + WHILE_MS) == 9
    assert steady.wanted(1, 1_001 + WHILE_MS) == 1


def test_a_new_scheduler_keeps_the_fleet_that_it_finds_for_a_while() -> None:
    steady = SteadyDemand(6, 0, shrinks_after_ms=WHILE_MS)
    assert steady.wanted(1, WHILE_MS) == 6
    assert steady.wanted(1, WHILE_MS + 1) == 1


@given(fleet=machines, gpus=st.integers(0, 40))
def test_as_many_machines_are_spare_as_leave_enough(fleet: list[Machine], gpus: int) -> None:
    spare = spare_machines(fleet, gpus)
    stay = [machine for machine in fleet if machine.machine_id not in spare]
    left = sum(machine.gpus for machine in stay)
    assert left >= min(gpus, sum(machine.gpus for machine in fleet))
    assert all(left - machine.gpus < gpus for machine in stay), "one more could have gone"


@given(fleet=machines, gpus=st.integers(0, 40))
def test_nothing_is_interrupted_on_a_machine_while_one_like_it_with_less_in_hand_stays(
    fleet: list[Machine], gpus: int
) -> None:
    spare = spare_machines(fleet, gpus)
    for goes in fleet:
        for stays in fleet:
            if goes.machine_id in spare and stays.machine_id not in spare and goes.gpus == stays.gpus:
                assert (goes.runs, goes.workers) <= (stays.runs, stays.workers)


@given(fleet=machines, gpus=st.integers(0, 40))
def test_the_choice_stays_what_it_was_while_nothing_happens(fleet: list[Machine], gpus: int) -> None:
    spare = spare_machines(fleet, gpus)
    told = [replace(machine, is_spare=machine.machine_id in spare) for machine in fleet]
    assert spare_machines(told, gpus) == spare
    # Workers of the spare machines without work end.
    ended = [
        replace(machine, workers=0, idle_since_ms=None)
        if machine.machine_id in spare and not machine.runs
        else machine
        for machine in told
    ]
    assert spare_machines(ended, gpus) == spare


@given(fleet=machines, gpus=st.integers(0, 40))
def test_the_order_in_which_machines_are_told_does_not_matter(fleet: list[Machine], gpus: int) -> None:
    assert spare_machines(reversed(fleet), gpus) == spare_machines(fleet, gpus)


def test_one_without_workers_goes_before_one_that_is_idle_and_that_before_one_at_work() -> None:
    at_work = a_machine("a", runs=1, idle_since_ms=None)
    idle = a_machine("b")
    starting = a_machine("c", workers=0, idle_since_ms=None)
    fleet = [at_work, idle, starting]
    assert [spare_machines(fleet, gpus) for gpus in (3, 2, 1, 0)] == [
        set(),
        {"c"},
        {"b", "c"},
        {"a", "b", "c"},
    ]


def test_of_two_idle_ones_that_which_is_idle_for_longer_goes() -> None:
    assert spare_machines([a_machine("a", idle_since_ms=9), a_machine("b", idle_since_ms=5)], 1) == {"b"}


def test_a_machine_of_which_one_gpu_is_needed_stays_as_a_whole() -> None:
    fleet = [a_machine("a", gpus=4), a_machine("b", gpus=4)]
    assert spare_machines(fleet, 5) == set()
    assert spare_machines(fleet, 4) == {"a"}
