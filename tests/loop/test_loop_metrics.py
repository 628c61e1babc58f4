"""What a leading scheduler does is in its metrics: driven through the loop, the database and a stub fleet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest

from billing import reconciliation
from gpu_worker.contract import Blame, Outcome
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.leader import Leader
from scheduler.logs import configure_logs
from scheduler.metrics import WorkerState
from scheduler.policy.ids import Tier
from scheduler.store import operations
from tests.loop.conftest import Stage

FIRST, SECOND = "here/gpu-0", "here/gpu-1"
PICTURE_MS = 1_000

SERIES_BUDGET = 2_000
"""Of both pages of a cell of 64 GPUs, without those of the processes themselves."""


def figure(leader: Leader, name: str, /, **labels: str) -> float:
    """Return a sample of the scheduler's families; nan: there is no such series."""
    found = leader.metrics.registry.get_sample_value(f"darkroom_{name}", labels)
    return math.nan if found is None else found


async def shows(stage: Stage, leader: Leader, expected: float, name: str, /, **labels: str) -> None:
    """Return once a sample has this value."""
    await stage.until(leader, lambda: figure(leader, name, **labels) == expected)


async def test_an_attempt_is_measured_from_its_placement_to_its_delivery(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        spec = fleet.busy[FIRST].spec
        model = spec.model
        await shows(stage, leader, 1, "job_stage_seconds_count", stage="place", model=model)
        attempt_id = fleet.busy[FIRST].attempt_id
        fleet.draw(FIRST)
        await stage.until(leader, lambda: not leader._loop._desk.running.busy_workers)
        fleet.finish(FIRST, attempt_id=attempt_id, load_ms=700)
        await stage.until_state(leader, job_id, "succeeded")
        await shows(stage, leader, 1, "job_stage_seconds_count", stage="deliver", model=model)
        assert figure(leader, "model_loads_total", model=model, result="loaded") == 1
        assert figure(leader, "model_load_seconds_sum", model=model) == 0.7
        assert figure(leader, "job_stage_seconds_sum", stage="load", model=model) == 0.7
        assert figure(leader, "denoise_step_seconds_count", model=model) == 1
        step_s = figure(leader, "denoise_step_seconds_sum", model=model)
        assert step_s == pytest.approx(PICTURE_MS / 1000 / spec.steps)
        assert figure(leader, "job_queue_wait_seconds_count", tier="fast") == 1


async def test_a_model_that_cannot_be_loaded_is_a_failed_load(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        model = fleet.busy[FIRST].spec.model
        fleet.finish(FIRST, outcome=Outcome.FAILED, blame=Blame.CLIENT, reason="MODEL_MISSING")
        await stage.until_state(leader, job_id, "failed")
        await shows(stage, leader, 1, "model_loads_total", model=model, result="failed")
        assert figure(leader, "denoise_step_seconds_count", model=model) == 0


async def test_what_was_measured_is_what_was_billed(stage: Stage) -> None:
    await stage.open_account("ada")
    async with stage.leading(LocalFleet(workers=2, take_ms=0, gpu_ms=PICTURE_MS)) as leader:
        for tier in (Tier.FAST, Tier.FAST, Tier.RELAX):
            job_id = await stage.submit("ada", tier)
            await stage.until_state(leader, job_id, "succeeded")
        await shows(stage, leader, 2, "billing_measured_gpu_seconds_total", plan="standard")
        assert figure(leader, "billing_gpu_seconds_total", plan="standard", kind="debit") == 2
        assert figure(leader, "billing_commits_total", result="committed") == 3
        assert figure(leader, "billing_commits_total", result="failed") == 0
        assert figure(leader, "billing_commit_seconds_count") == 3
        for query in ("insert_holds", "start_attempts", "close_attempts", "insert_settlements"):
            await stage.until(leader, lambda q=query: figure(leader, "db_query_seconds_count", query=q) >= 2)


async def test_a_settlement_that_the_database_cut_is_counted_and_done_again(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        async with stage.connection.transaction():
            await stage.connection.execute("SELECT FROM scheduler.attempt FOR UPDATE")
            fleet.finish(FIRST)
            await stage.until_blocked()
            assert await stage.connection.fetchval(
                """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE application_name LIKE 'darkroom settlement%' AND wait_event_type = 'Lock'
                         AND datname = current_database()"""
            )
        await stage.until_state(leader, job_id, "succeeded")
        assert figure(leader, "billing_commits_total", result="failed") == 1
        assert figure(leader, "billing_commits_total", result="committed") == 1
        assert figure(leader, "db_errors_total", **{"class": "away"}) == 1


async def test_the_states_of_workers_add_up_to_the_slots(stage: Stage) -> None:
    fleet = LocalFleet(workers=4, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")

    def states(leader: Leader) -> dict[str, float]:
        known = tuple(WorkerState)
        return {state: count for state in known if (count := figure(leader, "gpu_workers", state=state))}

    async with stage.leading(fleet) as leader:
        await stage.until(leader, lambda: states(leader) == {"idle": 4})
        await stage.submit("ada", Tier.FAST)
        # The stub has a model at once, but says so only with its next word.
        await stage.until(leader, lambda: states(leader) == {"loading": 1, "idle": 3})
        (busy,) = fleet.busy
        fleet.beat(busy)
        await stage.until(leader, lambda: states(leader) == {"running": 1, "idle": 3})
        silent = next(f"here/gpu-{index}" for index in range(4) if f"here/gpu-{index}" != busy)
        fleet.fall_silent(silent)
        await stage.until(leader, lambda: states(leader) == {"running": 1, "idle": 2, "lost": 1})
        fleet.speak_again(silent)
        await stage.until(leader, lambda: states(leader) == {"running": 1, "idle": 3})
        fleet.fall_ill(silent, "its memory is broken")
        await stage.until(leader, lambda: states(leader) == {"running": 1, "idle": 2, "unhealthy": 1})
        drained = next(f"here/gpu-{index}" for index in range(4) if f"here/gpu-{index}" not in (busy, silent))
        await operations.drain_worker(stage.connection, drained, "a test", within=timedelta(0))
        leader.fleet_changed()
        everybody = {"running": 1, "idle": 1, "unhealthy": 1, "draining": 1}
        await stage.until(leader, lambda: states(leader) == everybody)


async def test_a_worker_in_the_place_of_another_is_a_restart_and_one_that_was_only_silent_is_none(
    stage: Stage,
) -> None:
    fleet = LocalFleet(workers=2, take_ms=None)
    async with stage.leading(fleet) as leader:
        await stage.until(leader, lambda: leader.workers == 2)
        assert figure(leader, "worker_losses_total", worker=FIRST) == 0
        fleet.fall_silent(FIRST)
        fleet.speak_again(FIRST)
        fleet.kill(SECOND)
        await shows(stage, leader, 1, "worker_restarts_total", reason="died")
        assert figure(leader, "worker_restarts_total", reason="silent") == 0
        assert figure(leader, "worker_losses_total", worker=FIRST) == 1, "it was given up all the same"
        fleet.fall_silent(FIRST)
        fleet.kill(FIRST)
        await shows(stage, leader, 1, "worker_restarts_total", reason="silent")


async def test_a_job_that_goes_back_to_its_place_is_counted_by_why(stage: Stage) -> None:
    fleet = LocalFleet(workers=3, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        fleet.refuse_next = 1
        job_id = await stage.submit("ada", Tier.FAST)
        await shows(stage, leader, 1, "job_requeues_total", reason="not_taken")
        await stage.until_state(leader, job_id, "running")
        fleet.finish(next(iter(fleet.busy)), outcome=Outcome.FAILED, blame=Blame.PLATFORM)
        await shows(stage, leader, 1, "job_requeues_total", reason="failed")
        await stage.until_state(leader, job_id, "running")
        fleet.kill(next(iter(fleet.busy)))
        await shows(stage, leader, 1, "job_requeues_total", reason="worker_lost")
        assert figure(leader, "job_requeues_total", reason="timeout") == 0


async def test_a_machine_that_died_stays_missed_and_one_that_was_told_to_end_does_not(stage: Stage) -> None:
    fleet = LocalFleet(workers=4, take_ms=None, per_machine=1)

    def shown(leader: Leader) -> tuple[float, float]:
        leader._figures.look()
        return figure(leader, "gpu_workers_desired"), figure(leader, "gpu_workers", state="lost")

    async with stage.leading(fleet) as leader:
        await stage.until(leader, lambda: shown(leader) == (4, 0))
        fleet.remove("here-0/gpu-0")
        await stage.until(leader, lambda: shown(leader) == (4, 1))
        fleet.depart("here-1/gpu-0")
        await stage.until(leader, lambda: shown(leader) == (3, 1))


async def test_what_keeps_the_first_in_line_is_counted(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        assert figure(leader, "scheduler_decisions_total", tier="fast", result="no_gpu") == 0
        await stage.submit("ada", Tier.FAST)
        await stage.until(
            leader, lambda: figure(leader, "scheduler_decisions_total", tier="fast", result="no_gpu") > 0
        )
        fleet.remove(FIRST)
        await stage.until(
            leader,
            lambda: figure(leader, "scheduler_decisions_total", tier="fast", result="no_model_fit") > 0,
        )


async def test_open_holds_are_shown_with_the_age_of_the_oldest(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        jobs = [await stage.submit("ada", Tier.FAST) for _ in range(2)]
        for job_id in jobs:
            await stage.until_state(leader, job_id, "running")
        leader._loop._kept_ms = 0  # what is done every five seconds is done now
        await shows(stage, leader, 2, "billing_holds")
        oldest = await stage.connection.fetchval(
            "SELECT extract(epoch FROM min(placed_at))::float8 FROM billing.hold WHERE state = 'open'"
        )
        shown = figure(leader, "billing_oldest_hold_timestamp_seconds")
        assert shown == pytest.approx(oldest, abs=0.002)


async def test_the_wait_that_a_job_was_told_is_compared_with_what_it_waited(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    for account in ("ada", "ben"):
        await stage.open_account(account)
    async with stage.leading(fleet) as leader:
        first = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        second = await stage.submit("ben", Tier.FAST)
        await stage.until_waits(leader, second, "waiting_for_gpu")
        leader._figures.look()
        fleet.finish(FIRST)
        await stage.until_state(leader, first, "succeeded")
        await stage.until_state(leader, second, "running")
        await shows(stage, leader, 1, "eta_error_ratio_count", tier="fast")
        # It was told a minute or so, and waited a moment.
        assert 0 < figure(leader, "eta_error_ratio_sum", tier="fast") < 0.5


async def test_relax_is_shown_with_who_is_there_and_a_fixed_fleet_wants_what_it_has(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    for account in ("ada", "ben", "eve"):
        await stage.open_account(account)
    async with stage.leading(fleet) as leader:
        await stage.until(leader, lambda: leader.workers == 1)
        leader._figures.look()
        assert figure(leader, "relax_active_accounts") == 0
        for account in ("ada", "ben", "eve"):
            job_id = await stage.submit(account, Tier.RELAX)
        await stage.until_waits(leader, job_id, "waiting_for_gpu")
        leader._figures.look()
        assert figure(leader, "relax_active_accounts") == 3
        assert figure(leader, "gpu_workers_desired") == 1, "however much waits"
        # Two of three wait while the first has the only GPU, since a moment: each is due a third of it.
        leader._figures.look()
        assert 0 <= figure(leader, "relax_fairness_error_ratio") <= 0.34


async def test_a_ledger_that_adds_up_does_not_drift(stage: Stage) -> None:
    await stage.open_account("ada")
    async with stage.leading(LocalFleet(workers=1, take_ms=0, gpu_ms=PICTURE_MS)) as leader:
        for tier in Tier:
            job_id = await stage.submit("ada", tier)
            await stage.until_state(leader, job_id, "succeeded")
        await leader._reconciler.look()
        assert figure(leader, "billing_drift_gpu_seconds") == 0
        assert figure(leader, "billing_reconcile_runs_total", result="clean") == 1
        assert figure(leader, "billing_reconcile_last_success_timestamp_seconds") > 1_700_000_000
        assert figure(leader, "accounts", plan="standard") == 1
        assert figure(leader, "db_query_seconds_count", query="reconcile") == 1


async def test_a_lot_that_was_changed_past_the_journal_drifts_until_it_is_mended(stage: Stage) -> None:
    await stage.open_account("ada")
    async with stage.leading(LocalFleet(workers=1, take_ms=0, gpu_ms=PICTURE_MS)) as leader:
        await stage.connection.execute("UPDATE billing.grant_lot SET used_ms = used_ms + 2500")
        for _ in range(2):
            await leader._reconciler.look()
            assert figure(leader, "billing_drift_gpu_seconds") == 2.5
        assert figure(leader, "billing_reconcile_runs_total", result="drifted") == 2
        await stage.connection.execute("UPDATE billing.grant_lot SET used_ms = used_ms - 2500")
        await leader._reconciler.look()
        assert figure(leader, "billing_drift_gpu_seconds") == 0


async def test_lots_are_compared_piece_by_piece_and_those_that_differ_each_time(stage: Stage) -> None:
    for account in ("ada", "ben", "eve"):
        await stage.open_account(account)
    lots = [row["lot_id"] for row in await stage.connection.fetch("SELECT lot_id FROM billing.grant_lot")]
    await stage.connection.execute("UPDATE billing.grant_lot SET held_ms = 7 WHERE lot_id = $1", min(lots))
    first = await reconciliation.drift(stage.connection, after_lot_id=0, most=2)
    assert (first.gaps_ms, first.last_lot_id) == ({min(lots): 7}, sorted(lots)[1])
    assert first.last_lot_id is not None
    rest = await reconciliation.drift(stage.connection, after_lot_id=first.last_lot_id, most=2)
    assert (rest.gaps_ms, rest.last_lot_id) == ({}, None)
    again = await reconciliation.drift(
        stage.connection, after_lot_id=first.last_lot_id, most=2, again=[min(lots)]
    )
    assert again.gaps_ms == {min(lots): 7}
    await stage.connection.execute("UPDATE billing.grant_lot SET held_ms = 0")


async def test_fast_time_that_came_or_went_is_counted_once_it_is_surely_committed(stage: Stage) -> None:
    await stage.open_account("ada")
    async with stage.leading(LocalFleet(workers=1, take_ms=0)) as leader:
        await leader._reconciler.look()
        await stage.adjust_balance("ada", 60_000)
        await stage.adjust_balance("ada", -15_000)
        await stage.open_account("ben", plan="pro")
        granted_ms = await stage.connection.fetchval(
            "SELECT sum(granted_ms) FROM billing.grant_lot WHERE account_id = 'ben'"
        )
        await leader._reconciler.look()
        assert figure(leader, "billing_gpu_seconds_total", plan="standard", kind="adjust") == 0
        for _ in range(2):
            await leader._reconciler.look()
            assert figure(leader, "billing_gpu_seconds_total", plan="standard", kind="adjust") == 75
            assert figure(leader, "billing_gpu_seconds_total", plan="pro", kind="credit") == granted_ms / 1000


async def test_an_account_without_fast_time_is_exhausted(stage: Stage) -> None:
    await stage.open_account("ada", plan="basic")
    await stage.open_account("ben", plan="basic")
    await stage.adjust_balance("ada", -12_000_000)
    async with stage.leading(LocalFleet(workers=1, take_ms=0)) as leader:
        await leader._reconciler.look()
        assert figure(leader, "accounts", plan="basic") == 2
        assert figure(leader, "accounts_exhausted", plan="basic") == 1


async def test_a_plan_that_everybody_left_has_no_accounts(stage: Stage) -> None:
    await stage.open_account("ada", plan="basic")
    async with stage.leading(LocalFleet(workers=1, take_ms=0)) as leader:
        await leader._reconciler.look()
        assert figure(leader, "accounts", plan="basic") == 1
        await stage.connection.execute("UPDATE billing.subscription SET ended_at = now()")
        await leader._reconciler.look()
        assert figure(leader, "accounts", plan="basic") == 0


async def test_log_lines_are_counted_by_level(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info")
    fleet = LocalFleet(workers=1, take_ms=None)
    async with stage.leading(fleet) as leader:
        await stage.until(leader, lambda: leader.workers == 1)
        before = figure(leader, "log_messages_total", level="warning")
        fleet.kill(FIRST)
        await shows(stage, leader, before + 1, "log_messages_total", level="warning")
    assert "worker lost" in capsys.readouterr().err


async def test_how_late_the_event_loop_is_is_looked_at_all_the_time(stage: Stage) -> None:
    async with stage.leading(LocalFleet(workers=1, take_ms=None)) as leader:
        await stage.until(leader, lambda: figure(leader, "event_loop_lag_seconds_count") >= 1)


def samples(text: str) -> Sequence[str]:
    """Return the series of a page, but for those that every process has of itself."""
    return [
        line
        for line in text.splitlines()
        if not line.startswith(("#", "process_", "python_")) and not line.startswith("darkroom_build_info")
    ]


async def test_a_cell_of_64_gpus_stays_within_the_budget_of_series(
    stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    fleet = LocalFleet(workers=64, take_ms=5, gpu_ms=PICTURE_MS)
    accounts = [await stage.open_account(f"account-{number}", plan="pro") for number in range(8)]
    async with stage.leading(fleet) as leader:
        await stage.until(leader, lambda: leader.workers == 64)
        at_rest = len(samples(leader.metrics.page().text)) + len(samples(stage.metrics.page().text))
        jobs = [await stage.submit(account, tier) for account in accounts for tier in (*Tier, *Tier, *Tier)]
        for job_id in jobs:
            await stage.until_state(leader, job_id, "succeeded")
        fleet.kill(FIRST)
        await shows(stage, leader, 1, "worker_restarts_total", reason="died")
        # Its own look, after two seconds: another beside it would be on the same connection.
        await shows(stage, leader, 1, "billing_reconcile_runs_total", result="clean")
        leader._figures.look()
        for worker in range(64):
            fleet.beat(f"here/gpu-{worker}")
        scheduler = samples(leader.metrics.page().text)
        front_door = samples(stage.metrics.page().text)
    series = len(scheduler) + len(front_door)
    record_property("series", series)
    print(f"series: {series} ({len(scheduler)} of the scheduler, {len(front_door)} of the front door)")
    assert series < SERIES_BUDGET
    assert series - at_rest < 10, "what is known beforehand is there from the beginning"
