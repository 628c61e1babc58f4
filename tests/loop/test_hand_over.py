"""A run that is handed over goes on elsewhere where it was saved, and counts against nobody."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from billing import invariants, ledger
from gpu_worker.contract import Checkpoint, Outcome, StageTimes
from gpu_worker.outputs import checkpoint_path
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import Tier
from scheduler.store import invariants as store_invariants
from scheduler.store import operations, stray_checkpoints
from scheduler.store.checkpoints import SavedCheckpoint, store_checkpoints
from tests.loop.conftest import Stage

FIRST, SECOND = "here/gpu-0", "here/gpu-1"
PICTURE_MS = 1_000
AT_ONCE = timedelta(0)
A_DAY = timedelta(days=1)


async def used_ms(stage: Stage, account_id: str) -> int:
    async with stage.pool.transaction() as connection:
        return (await ledger.balance(connection, account_id, datetime.now(UTC))).used_ms


async def test_what_a_draining_worker_has_not_finished_in_time_is_finished_elsewhere_and_paid_once(
    stage: Stage,
) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        (worker_id,) = fleet.busy
        other = SECOND if worker_id == FIRST else FIRST
        fleet.work(worker_id, 400)
        await operations.drain_worker(stage.connection, worker_id, "a new fan", within=AT_ONCE)
        await stage.until(leader, lambda: other in fleet.busy)
        assert fleet.busy.keys() == {other}
        request = fleet.busy[other]
        assert request.checkpoint is not None
        assert request.checkpoint.kept.gpu_ms == 400
        assert not request.after_loss
        fleet.finish(other)
        await stage.until_state(leader, job_id, "succeeded")
    before, after = await stage.attempts(job_id)
    assert (before["state"], after["state"]) == ("lost", "succeeded")
    assert fleet.forgotten == {str(before["attempt_id"]): True}, "what it drew was of use"
    assert (await stage.job(job_id))["losses"] == 0
    absorbed = "SELECT sum(absorbed_ms) FROM billing.settlement WHERE job_id = $1"
    assert await stage.connection.fetchval(absorbed, job_id) == 0, "nothing was done twice"
    assert await used_ms(stage, "ada") == PICTURE_MS
    assert await invariants.check(stage.connection) == []
    losses = "SELECT losses_in_row FROM scheduler.worker_slot WHERE worker_id = $1"
    assert await stage.connection.fetchval(losses, worker_id) == 0


async def test_what_parks_and_losses_came_to_is_counted(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        fleet.hand_over(FIRST, fleet.busy[FIRST].attempt_id)
        await stage.until_attempts(leader, job_id, 2)
        result = fleet.finish(FIRST, steps_redone=3, park_waits=(1, 0))
        await stage.until_state(leader, job_id, "succeeded")
        assert result.outcome is Outcome.SUCCEEDED
        await stage.until(leader, lambda: "darkroom_steps_redone_total 3.0" in leader.metrics.page().text)
        figures = leader.metrics.page().text
    assert 'darkroom_park_wait_steps_bucket{le="0.0"} 1.0' in figures
    assert "darkroom_park_wait_steps_count 2.0" in figures
    assert "darkroom_checkpoint_bytes_total 1000.0" in figures
    assert "darkroom_checkpoint_seconds_count 1.0" in figures
    assert 'darkroom_job_requeues_total{reason="drain"} 1.0' in figures


async def test_what_was_saved_of_a_job_is_nobodys_once_its_owner_moves_it(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.RELAX)
        await stage.until(leader, lambda: fleet.busy)
        fleet.work(FIRST, 400)
        await operations.drain_worker(stage.connection, FIRST, "a new fan", within=AT_ONCE)
        await stage.until_state(leader, job_id, "queued")
        await stage.move("ada", job_id, Tier.FAST)
        await operations.resume_worker(stage.connection, FIRST)
        await stage.until(leader, lambda: fleet.busy)
        assert fleet.busy[FIRST].checkpoint is None
        fleet.finish(FIRST)
        await stage.until_state(leader, job_id, "succeeded")
    assert await used_ms(stage, "ada") == PICTURE_MS, "not the 400 ms that were drawn in relax"
    assert await store_invariants.check(stage.connection, invariants=store_invariants.AT_REST) == []


async def test_a_worker_that_has_time_to_drain_finishes(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        (worker_id,) = fleet.busy
        await operations.drain_worker(stage.connection, worker_id, "a new fan", within=A_DAY)
        await stage.until(leader, lambda: worker_id in leader._loop._desk.workers.closed())
        fleet.finish(worker_id)
        await stage.until_state(leader, job_id, "succeeded")
    assert len(await stage.attempts(job_id)) == 1


async def test_a_parked_run_is_handed_over_too(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        relax = await stage.submit("ben")
        await stage.until(leader, lambda: fleet.busy)
        fleet.work(FIRST, 300)
        fast = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.parked(FIRST))
        await operations.drain_worker(stage.connection, FIRST, "a new fan", within=AT_ONCE)
        for job_id in (relax, fast):
            await stage.until_state(leader, job_id, "queued")
        assert not fleet.busy
        await operations.resume_worker(stage.connection, FIRST)
        await stage.until(leader, lambda: fleet.busy)
        fleet.finish(FIRST)
        await stage.until_state(leader, fast, "succeeded")
        await stage.until(leader, lambda: fleet.busy)
        assert fleet.busy[FIRST].checkpoint is not None
        fleet.finish(FIRST)
        await stage.until_state(leader, relax, "succeeded")
    assert await invariants.check(stage.connection) == []
    assert await used_ms(stage, "ada") == PICTURE_MS


async def test_a_lost_attempt_is_told_to_the_next_and_one_that_was_handed_over_is_not(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        fleet.hand_over(FIRST, fleet.busy[FIRST].attempt_id)
        await stage.until_attempts(leader, job_id, 2)
        fleet.kill(FIRST)
        await stage.until_attempts(leader, job_id, 3)
    assert [request.after_loss for request in fleet.rendered] == [False, False, True]


async def test_a_worker_whose_gpu_is_broken_takes_nothing_and_says_why_until_it_is_another(
    stage: Stage,
) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        fleet.work(FIRST, 700)
        fleet.fall_ill(FIRST, "It drew another picture than it should.")
        await stage.until_state(leader, job_id, "queued")
        await stage.until_waits(leader, job_id, "no_worker")
        (view,) = leader.workers_view()
        assert (view.healthy, view.sentence) == (False, "It drew another picture than it should.")
        assert not fleet.busy
        fleet.kill(FIRST)
        await stage.until(leader, lambda: fleet.busy)
        fleet.finish(FIRST)
        await stage.until_state(leader, job_id, "succeeded")
    assert (await stage.job(job_id))["losses"] == 0
    assert await used_ms(stage, "ada") == PICTURE_MS


async def test_closing_down_hands_over_everything_and_the_next_scheduler_goes_on(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=PICTURE_MS)
    for name in ("ada", "ben", "eve"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        jobs = [await stage.submit(name, Tier.FAST) for name in ("ada", "ben", "eve")]
        await stage.until(leader, lambda: len(fleet.busy) == 2)
        for worker_id in fleet.busy:
            fleet.work(worker_id, 250)
        assert await leader.close_down(within_s=20)
        assert not fleet.busy, "what waited was not started"
    async with stage.leading(fleet) as leader:
        await stage.until(leader, lambda: len(fleet.busy) == 2)
        kept = [request.checkpoint and request.checkpoint.kept.gpu_ms for request in fleet.busy.values()]
        assert kept == [250, 250]
        for _ in jobs:
            await stage.until(leader, lambda: fleet.busy)
            fleet.finish(next(iter(fleet.busy)))
        for job_id in jobs:
            await stage.until_state(leader, job_id, "succeeded")
            assert (await stage.job(job_id))["losses"] == 0
    assert await invariants.check(stage.connection) == []


async def test_closing_down_waits_for_what_was_being_started_when_it_was_asked_to(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        async with stage.connection.transaction():
            await stage.connection.execute("LOCK TABLE scheduler.attempt")
            job_id = await stage.submit("ada", Tier.FAST)
            await stage.until_blocked()
            assert not await leader.close_down(within_s=0)
        assert await leader.close_down(within_s=20)
        assert [one["state"] for one in await stage.attempts(job_id)] == ["lost"]
        assert (await stage.job(job_id))["losses"] == 0


async def test_closing_down_says_again_what_was_said_before_the_run_had_come(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        late = fleet.busy[FIRST]
        fleet.never_got(FIRST)
        closing = asyncio.create_task(leader.close_down(within_s=20))
        await stage.until(leader, lambda: leader._loop._desk.workers.closed())
        fleet.render(FIRST, late)
        assert await closing


async def test_what_was_handed_over_to_a_scheduler_that_died_goes_on_where_it_was_saved(
    stage: Stage,
) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        fleet.work(FIRST, 400)
    first = fleet.busy[FIRST].attempt_id
    fleet.hand_over(FIRST, first)
    async with stage.leading(fleet) as leader:
        await stage.until_attempts(leader, job_id, 2)
        checkpoint = fleet.busy[FIRST].checkpoint
        assert checkpoint is not None
        assert checkpoint.kept.gpu_ms == 400
        assert fleet.forgotten == {first: True}, "its file is in use"


async def strays(stage: Stage) -> list[str]:
    """Return the checkpoints whose files are to be deleted, ten minutes later."""
    await stage.connection.execute(
        "UPDATE scheduler.stray_checkpoint SET since = since - interval '11 minutes'"
    )
    return await stray_checkpoints.due(stage.connection, limit=10)


async def test_file_of_a_checkpoint_that_no_job_will_go_on_from_is_left_to_nobody(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        paths = []
        for number in (1, 2):
            await stage.until_attempts(leader, job_id, number)
            await stage.until(leader, lambda: fleet.busy)
            paths.append(checkpoint_path(job_id, fleet.busy[FIRST].attempt_id))
            fleet.hand_over(FIRST, fleet.busy[FIRST].attempt_id)
        await stage.until_attempts(leader, job_id, 3)
        assert await strays(stage) == paths[:1], "the second is in use"
        await operations.drain_worker(stage.connection, FIRST, "so that it waits", within=AT_ONCE)
        leader.fleet_changed()
        await stage.until_state(leader, job_id, "queued")
        await stage.cancel("ada", job_id)
        third = checkpoint_path(job_id, fleet.rendered[-1].attempt_id)
        assert set(await strays(stage)) == {*paths, third}
        for path in (*paths, third):
            await stray_checkpoints.gone(stage.connection, path)
        assert await strays(stage) == []


async def test_what_the_attempt_that_ends_a_job_had_saved_itself_is_its_worker_s_to_delete(
    stage: Stage,
) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        request = fleet.busy[FIRST]
        saved = SavedCheckpoint(
            attempt_id=request.attempt_id,
            token=request.token,
            checkpoint=Checkpoint(
                path=checkpoint_path(job_id, request.attempt_id),
                step=5,
                steps=20,
                kept=StageTimes(),
                device="cuda",
            ),
        )
        assert await store_checkpoints(stage.connection, epoch=request.epoch, saved=[saved])
        fleet.finish(FIRST)
        await stage.until_state(leader, job_id, "succeeded")
        assert await strays(stage) == []


async def test_file_of_a_checkpoint_that_its_job_succeeded_without_is_left_to_nobody(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=PICTURE_MS)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        first = fleet.busy[FIRST].attempt_id
        fleet.hand_over(FIRST, first)
        await stage.until_attempts(leader, job_id, 2)
        await stage.until(leader, lambda: fleet.busy)
        fleet.finish(FIRST)
        await stage.until_state(leader, job_id, "succeeded")
        assert await strays(stage) == [checkpoint_path(job_id, first)]
