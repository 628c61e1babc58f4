"""What GPUs do when told: they park between steps, lose nothing by it, and die with what was not stored."""

from __future__ import annotations

from simulated import a_request, order, played, waits_ms

from scheduler.policy.ids import Tier
from scheduler.simulator.kernel import Kernel
from scheduler.simulator.world import Cluster


def test_what_is_due_at_one_moment_happens_in_the_order_it_was_planned_in() -> None:
    kernel = Kernel()
    seen: list[str] = []
    kernel.at(5, lambda: seen.append("a"))
    kernel.at(3, lambda: seen.append("first"))
    kernel.at(5, lambda: seen.append("b"))
    assert kernel.advance()
    assert (kernel.now_ms, seen) == (3, ["first"])
    assert kernel.advance()
    assert (kernel.now_ms, seen) == (5, ["first", "a", "b"])
    assert not kernel.advance()


def test_a_relax_run_is_parked_at_its_next_step_and_loses_nothing() -> None:
    """Ten steps of 100 ms; a fast job comes at 250: parked at 300, resumed at 800, done at 1500."""
    simulated = played(
        "ours", [a_request("r"), a_request("f", tier=Tier.FAST, at_ms=250, cost_ms=500, steps=5)]
    )
    spells = [(one.request.job_id, one.start_ms, one.end_ms, one.kept_ms) for one in simulated.spells]
    assert spells == [("r", 0, 300, 300), ("f", 300, 800, 500), ("r", 800, 1500, 700)]
    assert waits_ms(simulated) == {"r": 500, "f": 50}
    assert (simulated.parks, simulated.steps_redone) == (1, 0)


def test_without_preemption_a_fast_job_waits_for_the_end_of_the_run() -> None:
    simulated = played("none", [a_request("r"), a_request("f", tier=Tier.FAST, at_ms=250)])
    assert waits_ms(simulated) == {"r": 0, "f": 750}


def test_a_killed_run_begins_again() -> None:
    """Its three steps are made twice, and its job waits for them too."""
    simulated = played(
        "kill", [a_request("r"), a_request("f", tier=Tier.FAST, at_ms=250, cost_ms=500, steps=5)]
    )
    assert (simulated.kills, simulated.parks, simulated.steps_redone) == (1, 0, 3)
    assert simulated.makespan_ms == 1800
    assert waits_ms(simulated) == {"r": 800, "f": 50}


def test_a_run_parked_for_long_goes_on_where_a_gpu_is_free() -> None:
    """Two GPUs: `f` parks `r` at 100 for a minute, `s` ends at 20 s, and `r` had been parked for 10 s."""
    simulated = played(
        "ours",
        [
            a_request("s", cost_ms=20_000, steps=20),
            a_request("r", cost_ms=30_000, steps=300, at_ms=1),
            a_request("f", tier=Tier.FAST, at_ms=50, cost_ms=60_000),
        ],
        gpus=2,
    )
    assert simulated.migrations == 1
    assert simulated.steps_redone == 0
    parts = [(one.worker_id, one.kept_ms) for one in simulated.spells if one.request.job_id == "r"]
    assert parts == [("gpu-0001", 100), ("gpu-0000", 29_900)]


def test_a_cold_model_is_loaded_first_and_the_least_recently_used_one_goes() -> None:
    requests = [a_request(f"{model}{turn}", model=model) for turn in (1, 2) for model in "ab"]
    cluster = Cluster(gpus=1, models_per_gpu=1, model_load_ms=4_000)
    simulated = played("fifo", requests, cluster=cluster)
    assert order(simulated) == "a1 b1 a2 b2"
    # `a` is there from the start.
    assert (simulated.loads, simulated.loading_ms, simulated.makespan_ms) == (3, 12_000, 16_000)
    kept_warm = played("ours", requests, cluster=cluster)
    assert order(kept_warm) == "a1 a2 b1 b2"
    assert kept_warm.loads == 1


def test_fast_gpu_classes_are_taken_first_and_are_faster() -> None:
    simulated = played(
        "ours",
        [a_request("a"), a_request("b", at_ms=1)],
        cluster=Cluster(gpus=2, speeds_permille=(1000, 2000)),
    )
    assert [(one.worker_id, one.end_ms - one.start_ms) for one in simulated.spells] == [
        ("gpu-0001", 500),
        ("gpu-0000", 1000),
    ]


def test_a_death_costs_the_steps_since_the_last_checkpoint() -> None:
    """A picture of four hours on GPUs that die as often: at most four steps are redone each time."""
    cluster = Cluster(gpus=2, mtbf_hours=4, repair_ms=1_000, checkpoint_steps=5)
    simulated = played("ours", [a_request("r", cost_ms=4 * 3_600_000, steps=24_000)], cluster=cluster)
    (ended,) = simulated.jobs
    assert simulated.deaths > 0
    assert not ended.given_up
    assert ended.gpu_ms == 4 * 3_600_000
    assert simulated.steps_redone <= 4 * simulated.deaths
