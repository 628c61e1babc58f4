"""A fast job takes the GPU of a relax run, and nobody loses anything: rows, money, restarts and races."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from billing import invariants, ledger
from gpu_worker.contract import Blame, Checkpoint, Outcome, StageTimes
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.leader import Leader
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.settlement import end_of_lost
from scheduler.store import dispatch, endings, leadership, operations
from scheduler.store.checkpoints import SavedCheckpoint, store_checkpoints
from scheduler.store.parking import PlannedMigration, PlannedResume
from tests.loop.conftest import Stage, a_planned_attempt

WORKER = "here/gpu-0"
PICTURE_MS = 1_000
A_DAY = timedelta(days=1)
IMPATIENT = Parameters(park_patience_ms=0)


async def ledger_is_sound(stage: Stage) -> None:
    assert await invariants.check(stage.connection) == []


async def charged_ms(stage: Stage, job_id: str) -> tuple[int, int]:
    """Return what a job's owner was charged for, in whichever tier, and what the platform bore."""
    row = await stage.connection.fetchrow(
        """SELECT coalesce(sum(measured_ms), 0) AS measured, coalesce(sum(absorbed_ms), 0) AS absorbed
           FROM billing.settlement WHERE job_id = $1""",
        job_id,
    )
    assert row is not None
    return int(row["measured"]), int(row["absorbed"])


async def shares_in_memory_equal_the_database(stage: Stage, leader: Leader) -> None:
    board = leader._loop.board
    await stage.until(leader, lambda: not board.unstored_tags())
    for row in await stage.connection.fetch("SELECT * FROM scheduler.fair_share"):
        share = board.share(row["account_id"], Tier(row["tier"]))
        assert (share.finish_tag, share.tag) == (row["finish_tag"], row["tag"])
        assert share.usage == pytest.approx(row["usage"])


async def parked_pair(stage: Stage, leader: Leader, fleet: LocalFleet) -> tuple[str, str]:
    """Let Ben's relax job get 300 ms of the only GPU, then Ada's fast one take it."""
    for name in ("ada", "ben"):
        await stage.open_account(name)
    relax = await stage.submit("ben")
    await stage.until(leader, lambda: fleet.busy)
    fleet.work(WORKER, 300)
    fast = await stage.submit("ada", Tier.FAST)
    await stage.until(leader, lambda: fleet.busy[WORKER].job_id == fast)
    return relax, fast


async def resumed(stage: Stage, leader: Leader, job_id: str) -> None:
    async def has_gpu() -> bool:
        return (await stage.attempts(job_id))[-1]["parked_at"] is None

    await stage.until(leader, has_gpu)


async def test_fast_job_parks_a_relax_run_which_goes_on_afterwards_and_is_charged_once(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        relax, fast = await parked_pair(stage, leader, fleet)
        (parked,) = await stage.attempts(relax)
        assert (parked["state"], parked["parks"]) == ("running", 1)
        assert parked["parked_at"] is not None
        assert fleet.busy[WORKER].parks == str(parked["attempt_id"])
        assert [request.job_id for request in fleet.parked(WORKER)] == [relax]
        assert (await stage.job(relax))["state"] == "running", "parked is a fact about the attempt"
        update = leader.updates.of(relax)
        assert update is not None
        assert update.parked

        fleet.finish(WORKER)
        await stage.until_state(leader, fast, "succeeded")
        await resumed(stage, leader, relax)
        fleet.finish(WORKER)
        job = await stage.until_state(leader, relax, "succeeded")
        await shares_in_memory_equal_the_database(stage, leader)
        figures = leader.metrics.page().text
    assert "darkroom_parks_total 1.0" in figures
    assert 'darkroom_resumes_total{where="same_gpu"} 1.0' in figures
    (attempt,) = await stage.attempts(relax)
    assert (attempt["state"], attempt["gpu_ms"], attempt["parks"]) == ("succeeded", PICTURE_MS, 1)
    assert attempt["parked_ms"] > 0
    assert json.loads(job["receipt"])["gpu_ms"] == PICTURE_MS
    assert job["checkpoint"] is None
    for job_id in (relax, fast):
        assert await charged_ms(stage, job_id) == (PICTURE_MS, 0)
    async with stage.pool.transaction() as connection:
        assert (await ledger.balance(connection, "ada", datetime.now(UTC))).used_ms == PICTURE_MS
    await ledger_is_sound(stage)


async def test_owner_of_a_parked_run_is_told(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        relax, _ = await parked_pair(stage, leader, fleet)
        fleet.finish(WORKER)
        await resumed(stage, leader, relax)
        rows = await stage.connection.fetch(
            "SELECT state, sentence FROM scheduler.job_event WHERE job_id = $1 ORDER BY seq", relax
        )
        job = await stage.job(relax)
    assert [row["state"] for row in rows] == ["queued", "running", "running", "running"]
    assert rows[2]["sentence"].startswith("A fast job has its GPU for a while.")
    assert rows[3]["sentence"] == "The fast job it was parked for has ended."
    newest = await stage.connection.fetchval("SELECT max(seq) FROM scheduler.job_event")
    assert job["event_seq"] == newest


async def test_next_fast_job_finds_the_gpu_though_the_parked_run_went_on_by_itself(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        relax, fast = await parked_pair(stage, leader, fleet)
        second = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: second in leader.queue_statuses([second]))
        fleet.finish(WORKER)
        await stage.until(leader, lambda: fleet.busy[WORKER].job_id == second)
        assert fleet.busy[WORKER].parks == fleet.parked(WORKER)[0].attempt_id
        (attempt,) = await stage.attempts(second)
        assert "parks" not in json.loads(attempt["decision"]), "the board knew it as parked all the time"
        await stage.until_state(leader, fast, "succeeded")
        assert (await stage.attempts(relax))[0]["parks"] == 1
    await ledger_is_sound(stage)


async def test_cancel_of_a_parked_run_ends_it_while_the_fast_job_goes_on(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        relax, fast = await parked_pair(stage, leader, fleet)
        await stage.cancel("ben", relax)
        await stage.until_state(leader, relax, "cancelled")
        assert fleet.busy[WORKER].job_id == fast
        assert fleet.parked(WORKER) == []
        fleet.finish(WORKER)
        await stage.until_state(leader, fast, "succeeded")
        waiting = await stage.submit("ben")
        await stage.until_state(leader, waiting, "running")
    assert (await stage.job(relax))["checkpoint"] is None
    await ledger_is_sound(stage)


async def test_worker_that_dies_with_both_costs_neither_owner_and_relax_goes_on_from_its_checkpoint(
    stage: Stage,
) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        relax, fast = await parked_pair(stage, leader, fleet)

        async def stored() -> bool:
            return (await stage.job(relax))["checkpoint"] is not None

        await stage.until(leader, stored)
        fleet.kill(WORKER)
        await stage.until_attempts(leader, fast, 2)
        fleet.finish(WORKER)
        await stage.until_attempts(leader, relax, 2)
        await stage.until(leader, lambda: fleet.busy)
        checkpoint = fleet.busy[WORKER].checkpoint
        assert checkpoint is not None
        assert checkpoint.kept.gpu_ms == 300
        fleet.finish(WORKER)
        job = await stage.until_state(leader, relax, "succeeded")
        await stage.until_state(leader, fast, "succeeded")
        await shares_in_memory_equal_the_database(stage, leader)
    assert (job["losses"], (await stage.job(fast))["losses"]) == (0, 1), "a parked run killed no worker"
    lost, again = await stage.attempts(relax)
    assert (lost["state"], lost["gpu_ms"]) == ("lost", 0)
    assert (again["kept_ms"], again["gpu_ms"]) == (300, PICTURE_MS)
    assert (await charged_ms(stage, relax))[0] == (await charged_ms(stage, fast))[0] == PICTURE_MS
    slot = await stage.connection.fetchrow("SELECT * FROM scheduler.worker_slot")
    assert slot is None or slot["losses_in_row"] <= 1, "one death is one loss of the slot"
    await ledger_is_sound(stage)


async def test_checkpoint_that_comes_with_the_death_of_its_worker_is_kept(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        relax, fast = await parked_pair(stage, leader, fleet)
        fleet.beat(WORKER)
        fleet.kill(WORKER)
        await stage.until_attempts(leader, fast, 2)
        assert (await stage.job(relax))["checkpoint"] is not None


@pytest.mark.parametrize("meanwhile", ["nothing", "fast job ended", "call was lost"])
async def test_restarted_scheduler_adopts_both_runs(stage: Stage, meanwhile: str) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        relax, fast = await parked_pair(stage, leader, fleet)
    if meanwhile == "fast job ended":
        fleet.finish(WORKER)
        assert fleet.busy[WORKER].job_id == relax, "it went on by itself"
    if meanwhile == "call was lost":
        fleet.never_got(WORKER)
    async with stage.leading(fleet) as leader:
        if meanwhile != "fast job ended":
            await stage.until(leader, lambda: fleet.busy[WORKER].job_id == fast)
            assert [request.job_id for request in fleet.parked(WORKER)] == [relax]
            fleet.finish(WORKER)
        await stage.until_state(leader, fast, "succeeded")
        await resumed(stage, leader, relax)
        fleet.finish(WORKER)
        await stage.until_state(leader, relax, "succeeded")
        await shares_in_memory_equal_the_database(stage, leader)
    for job_id in (relax, fast):
        assert len(await stage.attempts(job_id)) == 1, "adopted, not run again"
        assert await charged_ms(stage, job_id) == (PICTURE_MS, 0)
    await ledger_is_sound(stage)


async def test_parked_run_that_its_worker_has_no_more_is_lost_at_recovery(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        relax, fast = await parked_pair(stage, leader, fleet)
    fleet.forget(WORKER, fleet.parked(WORKER)[0].attempt_id)
    async with stage.leading(fleet) as leader:
        await stage.until_state(leader, relax, "queued")
        assert fleet.busy[WORKER].job_id == fast
    await ledger_is_sound(stage)


async def two_parked_on_one_of_two(
    stage: Stage, leader: Leader, fleet: LocalFleet
) -> tuple[str, str, str, str]:
    """Fill two GPUs with relax, let a fast job park one run; returns its job and worker, the other's too."""
    for name in ("ada", "ben", "eve"):
        await stage.open_account(name)
    jobs = [await stage.submit("ben"), await stage.submit("eve")]
    await stage.until(leader, lambda: len(fleet.busy) == 2)
    for worker in fleet.busy:
        fleet.work(worker, 300)
    fast = await stage.submit("ada", Tier.FAST)
    await stage.until(leader, lambda: any(request.job_id == fast for request in fleet.busy.values()))
    taken = next(worker for worker, request in fleet.busy.items() if request.job_id == fast)
    other = next(worker for worker in fleet.busy if worker != taken)
    parked = fleet.parked(taken)[0].job_id
    assert parked in jobs
    return parked, taken, fast, other


async def test_run_that_is_parked_for_long_moves_to_a_gpu_that_is_free(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet, parameters=IMPATIENT) as leader:
        relax, taken, fast, other = await two_parked_on_one_of_two(stage, leader, fleet)
        fleet.finish(other)
        await stage.until(leader, lambda: other in fleet.busy and fleet.busy[other].job_id == relax)
        request = fleet.busy[other]
        assert request.checkpoint is not None
        assert request.checkpoint.kept.gpu_ms == 300
        before, after = await stage.attempts(relax)
        assert (before["state"], before["gpu_ms"], after["state"]) == ("migrated", 0, "running")
        assert (after["migrated_from"], after["kept_ms"]) == (before["attempt_id"], 300)
        charge = ("predicted_ms", "charged_at_ms", "weight_milli")
        assert [before[name] for name in charge] == [after[name] for name in charge]
        assert before["token"] != after["token"]
        assert fleet.parked(taken) == []
        assert fleet.forgotten[str(before["attempt_id"])], "what its checkpoint kept was of use"
        fleet.finish(other)
        fleet.finish(taken)
        await stage.until_state(leader, relax, "succeeded")
        await stage.until_state(leader, fast, "succeeded")
        await shares_in_memory_equal_the_database(stage, leader)
    assert await charged_ms(stage, relax) == (PICTURE_MS, 0)
    await ledger_is_sound(stage)


async def test_attempt_that_moved_is_adopted_with_its_checkpoint(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet, parameters=IMPATIENT) as leader:
        relax, _, _, other = await two_parked_on_one_of_two(stage, leader, fleet)
        fleet.finish(other)
        await stage.until(leader, lambda: other in fleet.busy)
    fleet.never_got(other)
    async with stage.leading(fleet, parameters=IMPATIENT) as leader:
        await stage.until(leader, lambda: other in fleet.busy)
        checkpoint = fleet.busy[other].checkpoint
        assert checkpoint is not None
        fleet.finish(other)
        await stage.until_state(leader, relax, "succeeded")
    assert await charged_ms(stage, relax) == (PICTURE_MS, 0)


async def test_result_of_a_run_that_moved_counts_for_nothing(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet, parameters=IMPATIENT) as leader:
        relax, taken, _, other = await two_parked_on_one_of_two(stage, leader, fleet)
        fleet.finish(other)
        await stage.until(leader, lambda: other in fleet.busy)
        before, _ = await stage.attempts(relax)
        result = fleet.finish(other)
        await stage.until_state(leader, relax, "succeeded")
        fleet.forgotten.clear()
        zombie = replace(result, attempt_id=str(before["attempt_id"]), token=str(before["token"]))
        fleet.say_again(taken, zombie)
        await stage.until(leader, lambda: str(before["attempt_id"]) in fleet.forgotten)
    assert await charged_ms(stage, relax) == (PICTURE_MS, 0)
    await ledger_is_sound(stage)


async def test_run_that_ends_while_it_is_to_be_parked_has_ended(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        relax = await stage.submit("ben")
        await stage.until(leader, lambda: fleet.busy)
        # Its settlement waits for Ben's lock; meanwhile the board takes it for running, and parks it.
        async with stage.connection.transaction():
            await stage.connection.execute(
                "SELECT FROM billing.subscription WHERE account_id = 'ben' FOR UPDATE"
            )
            fleet.finish(WORKER, outcome=Outcome.FAILED, blame=Blame.CLIENT)
            await stage.until_blocked()
            fast = await stage.submit("ada", Tier.FAST)
            await stage.until(leader, lambda: fleet.busy)
            assert fleet.busy[WORKER].job_id == fast
            assert fleet.busy[WORKER].parks is not None
        await stage.until_state(leader, relax, "failed")
        fleet.finish(WORKER)
        await stage.until_state(leader, fast, "succeeded")
        again = await stage.submit("ben")
        await stage.until_state(leader, again, "running")
        await shares_in_memory_equal_the_database(stage, leader)
    (attempt,) = await stage.attempts(relax)
    assert (attempt["state"], attempt["parked_at"]) == ("failed", None)
    await ledger_is_sound(stage)


async def test_fast_job_that_cannot_be_paid_parks_nobody(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        relax = await stage.submit("ben")
        await stage.until(leader, lambda: fleet.busy)
    fast = await stage.submit("ada", Tier.FAST)
    await stage.adjust_balance("ada", -54_000_000)
    async with stage.leading(fleet) as leader:
        await stage.until(
            leader,
            lambda: fast in (held := leader.queue_statuses([fast])) and held[fast].reason.value == "funds",
        )
    (attempt,) = await stage.attempts(relax)
    assert (attempt["parked_at"], attempt["parks"]) == (None, 0)
    assert fleet.busy[WORKER].job_id == relax
    assert await stage.attempts(fast) == []


async def test_job_that_was_moved_without_a_word_starts_in_the_tier_of_its_row(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        first = await stage.submit("ben")
        await stage.until(leader, lambda: fleet.busy)
        moved = await stage.submit("ada")
        await stage.until(leader, lambda: moved in leader.queue_statuses([moved]))
        # All that a move does, but for what lets the sweep find it.
        await stage.connection.execute(
            """UPDATE scheduler.job SET tier = 'fast', pricing = pricing || '{"charge_mode": "fast"}'
               WHERE job_id = $1""",
            moved,
        )
        fleet.finish(WORKER)
        await stage.until_state(leader, first, "succeeded")
        await stage.until_state(leader, moved, "running")
        await stage.until(leader, lambda: fleet.busy)
        assert fleet.busy[WORKER].tier == "fast"
        fleet.finish(WORKER)
        await stage.until_state(leader, moved, "succeeded")
    async with stage.pool.transaction() as connection:
        assert (await ledger.balance(connection, "ada", datetime.now(UTC))).used_ms == PICTURE_MS
    await ledger_is_sound(stage)


async def test_moved_job_is_known_in_its_new_tier(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        relax = await stage.submit("ben")
        await stage.until(leader, lambda: fleet.busy)
        moved = await stage.submit("ada")
        await stage.until(leader, lambda: moved in leader.queue_statuses([moved]))
        await stage.move("ada", moved, Tier.FAST)
        await stage.until(leader, lambda: fleet.busy[WORKER].job_id == moved)
        assert [request.job_id for request in fleet.parked(WORKER)] == [relax]


async def test_time_drawn_in_relax_is_not_charged_after_a_move_to_fast(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        moved, fast = await parked_pair(stage, leader, fleet)

        async def stored() -> bool:
            return (await stage.job(moved))["checkpoint"] is not None

        await stage.until(leader, stored)
        fleet.kill(WORKER)
        await stage.until_attempts(leader, fast, 2)
        assert (await stage.job(moved))["checkpoint"] is not None
        await stage.move("ben", moved, Tier.FAST)
        assert (await stage.job(moved))["checkpoint"] is None
        fleet.finish(WORKER)
        await stage.until_attempts(leader, moved, 2)
        await stage.until(leader, lambda: fleet.busy)
        assert fleet.busy[WORKER].checkpoint is None, "it begins anew"
        fleet.finish(WORKER)
        await stage.until_state(leader, moved, "succeeded")
        await shares_in_memory_equal_the_database(stage, leader)
    assert (await stage.attempts(moved))[-1]["kept_ms"] == 0
    async with stage.pool.transaction() as connection:
        assert (await ledger.balance(connection, "ben", datetime.now(UTC))).used_ms == PICTURE_MS
    await ledger_is_sound(stage)


async def test_drain_and_pause_outlive_the_scheduler(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=0, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    await operations.drain_worker(stage.connection, WORKER, "a test", within=A_DAY)
    await operations.pause_tier(stage.connection, Tier.FAST, "a test")
    fast, relax = await stage.submit("ada", Tier.FAST), await stage.submit("ada")

    async with stage.leading(fleet) as leader:
        await stage.until(leader, lambda: len(leader.queue_statuses([fast, relax])) == 2)
        statuses = leader.queue_statuses([fast, relax])
        assert statuses[fast].reason.value == "tier_paused"
        assert statuses[relax].reason.value == "no_worker"
        await operations.resume_worker(stage.connection, WORKER)  # without a word: the sweep finds it
        await stage.until_state(leader, relax, "succeeded")
        assert (await stage.job(fast))["state"] == "queued"
        await operations.resume_tier(stage.connection, Tier.FAST)
        await stage.until_state(leader, fast, "succeeded")


async def test_draining_worker_finishes_what_it_has_and_takes_nothing_new(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        first = await stage.submit("ada")
        await stage.until(leader, lambda: fleet.busy)
        await operations.drain_worker(stage.connection, WORKER, "a test", within=A_DAY)
        await stage.until(leader, lambda: WORKER in leader._loop._desk.workers.closed())
        second = await stage.submit("ada")
        fleet.finish(WORKER)
        await stage.until_state(leader, first, "succeeded")
        assert (await stage.job(second))["state"] == "queued"
        (view,) = leader._loop.worker_views()
        assert view.idle_since_ms is not None
        assert view.active is None


async def test_checkpoint_of_an_attempt_that_was_given_up_is_not_taken(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    async with stage.leading(fleet) as leader:
        relax, _ = await parked_pair(stage, leader, fleet)
        (attempt,) = await stage.attempts(relax)
        checkpoint = Checkpoint(path="x", step=9, steps=10, kept=StageTimes(denoise_ms=900), device="stub")

        async def store(token: str) -> set[str]:
            saved = SavedCheckpoint(attempt_id=str(attempt["attempt_id"]), token=token, checkpoint=checkpoint)
            return await store_checkpoints(stage.connection, epoch=leader.epoch, saved=[saved])

        assert await store(str(attempt["attempt_id"])) == set()
        fleet.kill(WORKER)
        await stage.until_state(leader, relax, "queued")
        assert await store(str(attempt["token"])) == set()
    stored = json.loads((await stage.job(relax))["checkpoint"])
    assert stored["kept"]["denoise_ms"] == 300


async def test_batch_whose_answer_was_lost_parks_moves_and_resumes_once(stage: Stage) -> None:
    for name in ("ada", "ben"):
        await stage.open_account(name)
    relax, fast = await stage.submit("ben"), await stage.submit("ada", Tier.FAST)
    lead = await leadership.take_lead(stage.connection, "test")
    await stage.connection.execute("UPDATE scheduler.cell SET decay_origin_ms = $1", lead.now_ms)

    async def twice(
        planned: Sequence[dispatch.PlannedAttempt] = (),
        resumes: Sequence[PlannedResume] = (),
        migrations: Sequence[PlannedMigration] = (),
    ) -> dispatch.StartOutcome:
        first, second = [
            await dispatch.start_attempts(
                stage.connection,
                epoch=lead.epoch,
                planned=planned,
                resumes=resumes,
                migrations=migrations,
                tags=[],
                running=[],
                parameters=Parameters(),
                now_ms=lead.now_ms,
                again=again,
            )
            for again in (False, True)
        ]
        assert [one.planned for one in first.started] == [one.planned for one in second.started]
        assert [one.planned for one in first.migrated] == [one.planned for one in second.migrated]
        return first

    of_relax, of_fast = str(uuid.uuid4()), str(uuid.uuid4())
    token = str(uuid.uuid4())
    await twice(
        [
            a_planned_attempt(
                relax, lead.now_ms, account_id="ben", tier=Tier.RELAX, attempt_id=of_relax, token=token
            )
        ]
    )
    await twice([a_planned_attempt(fast, lead.now_ms, attempt_id=of_fast, token=token, parks=of_relax)])
    (parked,) = await stage.attempts(relax)
    assert (parked["parks"], parked["parked_at"] is None) == (1, False)

    checkpoint = Checkpoint(path="x", step=3, steps=10, kept=StageTimes(denoise_ms=300), device="stub")
    saved = [SavedCheckpoint(attempt_id=of_relax, token=token, checkpoint=checkpoint)]
    assert await store_checkpoints(stage.connection, epoch=lead.epoch, saved=saved) == {of_relax}
    move = PlannedMigration(
        attempt_id=of_relax,
        to_attempt_id=str(uuid.uuid4()),
        token=str(uuid.uuid4()),
        worker_id="here/gpu-1",
        incarnation="first",
        decision={},
        sentence="",
    )
    outcome = await twice(migrations=[move])
    assert [one.checkpoint for one in outcome.migrated] == [checkpoint]
    assert [attempt["state"] for attempt in await stage.attempts(relax)] == ["migrated", "running"]

    refused = await twice(migrations=[replace(move, to_attempt_id=str(uuid.uuid4()))])
    assert refused.migrated == [], "it has moved already"
    await twice(resumes=[PlannedResume(attempt_id=move.to_attempt_id, sheltered=True, sentence="")])
    moved = (await stage.attempts(relax))[-1]
    assert not moved["sheltered"], "what is not parked is not resumed"


async def test_time_with_the_gpu_is_used_absorbed_or_kept(stage: Stage) -> None:
    """A run that saved 300 ms is lost twice: with 200 ms more, then with a newer checkpoint of 450."""
    await stage.open_account("ben")
    job_id = await stage.submit("ben")
    lead = await leadership.take_lead(stage.connection, "test")
    await stage.connection.execute("UPDATE scheduler.cell SET decay_origin_ms = $1", lead.now_ms)
    now_ms = lead.now_ms

    async def attempt(kept_ms: int | None, end: endings.AttemptEnd, *, lasts_ms: int) -> endings.Settled:
        nonlocal now_ms
        await dispatch.start_attempts(
            stage.connection,
            epoch=lead.epoch,
            planned=[
                a_planned_attempt(
                    job_id,
                    now_ms,
                    account_id="ben",
                    tier=Tier.RELAX,
                    attempt_id=end.attempt_id,
                    token=end.token,
                )
            ],
            tags=[],
            running=[],
            parameters=Parameters(),
            now_ms=now_ms,
            again=False,
        )
        if kept_ms is not None:
            checkpoint = Checkpoint(
                path="x", step=3, steps=10, kept=StageTimes(denoise_ms=kept_ms), device="stub"
            )
            saved = [SavedCheckpoint(attempt_id=end.attempt_id, token=end.token, checkpoint=checkpoint)]
            await store_checkpoints(stage.connection, epoch=lead.epoch, saved=saved)
        now_ms += lasts_ms
        (settled,) = await endings.settle_attempts(
            stage.connection, epoch=lead.epoch, ends=[end], parameters=Parameters(), now_ms=now_ms
        )
        assert isinstance(settled, endings.Settled)
        return settled

    def lost() -> endings.AttemptEnd:
        return end_of_lost(str(uuid.uuid4()), str(uuid.uuid4()), "", executed=True)

    first = await attempt(300, lost(), lasts_ms=500)
    second = await attempt(450, lost(), lasts_ms=400)
    last = await attempt(
        None,
        replace(
            lost(),
            verdict=endings.Verdict.SUCCEEDED,
            gpu_ms=550,
            kept=StageTimes(denoise_ms=450),
            redone_ms=20,
        ),
        lasts_ms=600,
    )
    assert [one.absorbed_ms for one in (first, second, last)] == [200, 250, 20]
    assert last.gpu_ms == 1_000
    assert await charged_ms(stage, job_id) == (1_000, 470)
    assert 1_000 + 470 == 500 + 400 + 570
    await ledger_is_sound(stage)


async def test_parked_time_is_not_time_with_the_gpu(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=300)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        relax = await stage.submit("ben")
        await stage.until(leader, lambda: fleet.busy)
        fast = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, fast, "succeeded")
        await stage.until_state(leader, relax, "succeeded")
    (attempt,) = await stage.attempts(relax)
    (of_fast,) = await stage.attempts(fast)
    assert attempt["parks"] == 1
    # Both ends are told by the same worker; between them lies what was left of the relax run.
    held = attempt["ended_at"] - attempt["started_at"] - timedelta(milliseconds=attempt["parked_ms"])
    assert held < attempt["ended_at"] - attempt["started_at"]
    assert of_fast["ended_at"] < attempt["ended_at"]
