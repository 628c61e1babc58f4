"""From a committed row to a settled one: the loop on a real database, with a stub fleet."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from structlog.testing import capture_logs

from billing import ledger
from gpu_worker.contract import Blame, Outcome
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import AccountId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.store import dispatch, endings, leadership
from scheduler.store.leadership import Deposed
from tests.loop.conftest import Stage, a_planned_attempt, a_started_attempt


async def used_ms(stage: Stage, account_id: str) -> int:
    async with stage.pool.transaction() as connection:
        return (await ledger.balance(connection, account_id, datetime.now(UTC))).used_ms


async def test_fast_job_runs_and_is_billed_what_it_took(stage: Stage) -> None:
    await stage.open_account("ada")
    fleet = LocalFleet(workers=1, take_ms=0, gpu_ms=1234)
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        job = await stage.until_state(leader, job_id, "succeeded")
    receipt = json.loads(job["receipt"])
    assert receipt["gpu_ms"] == receipt["billed_gpu_ms"] == 1234
    assert receipt["balance_before_ms"] - receipt["balance_after_ms"] == 1234
    assert await used_ms(stage, "ada") == 1234
    assert len(json.loads(job["images"])) == 4


async def test_relax_job_debits_nothing(stage: Stage) -> None:
    await stage.open_account("ada")
    async with stage.leading(LocalFleet(workers=1, take_ms=0, gpu_ms=1234)) as leader:
        job = await stage.until_state(leader, await stage.submit("ada", Tier.RELAX), "succeeded")
    assert json.loads(job["receipt"])["billed_gpu_ms"] == 0
    assert await used_ms(stage, "ada") == 0


async def test_fast_passes_every_waiting_relax_job(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=10)
    for name in ("ben", "eve", "ada"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        first = await stage.submit("ben")
        await stage.until_state(leader, first, "running")
        waiting = [await stage.submit("ben"), await stage.submit("eve"), await stage.submit("eve")]
        fast = await stage.submit("ada", Tier.FAST)
        fleet.finish("here/gpu-0")
        await stage.until_state(leader, fast, "running")
        assert [(await stage.job(job_id))["state"] for job_id in waiting] == ["queued"] * 3


async def test_caps_hold_three_running_two_of_them_relax(stage: Stage) -> None:
    fleet = LocalFleet(workers=6, take_ms=None)
    await stage.open_account("ben")
    async with stage.leading(fleet) as leader:
        relax = [await stage.submit("ben") for _ in range(4)]
        fast = [await stage.submit("ben", Tier.FAST) for _ in range(3)]
        await stage.until(leader, lambda: len(fleet.busy) == 3)
        states = [(await stage.job(job_id))["state"] for job_id in relax]
        assert states.count("running") <= 2
        waiting = [job_id for job_id in relax + fast if (await stage.job(job_id))["state"] == "queued"]
        assert len(waiting) == 4

        async def known() -> bool:
            return set(leader.queue_statuses(waiting)) == set(waiting)

        await stage.until(leader, known)
        reasons = {status.reason.value for status in leader.queue_statuses(waiting).values()}
        assert reasons == {"concurrency_limit"}


async def test_cancel_of_a_running_job_stops_it_and_bills_what_ran(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=700)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
        await stage.cancel("ada", job_id)
        job = await stage.until_state(leader, job_id, "cancelled")
    assert json.loads(job["receipt"])["billed_gpu_ms"] == 700
    assert await used_ms(stage, "ada") == 700


async def test_cancel_of_a_waiting_job_costs_nothing_and_frees_its_place(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        first, second, third = [await stage.submit("ada") for _ in range(3)]
        await stage.until_state(leader, first, "running")
        await stage.cancel("ada", second)
        fleet.finish("here/gpu-0")
        await stage.until_state(leader, third, "running")
        assert (await stage.job(second))["state"] == "cancelled"
        assert await stage.attempts(second) == []


async def test_lost_worker_costs_the_owner_nothing_and_the_job_runs_again(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
        fleet.kill("here/gpu-0")
        await stage.until_attempts(leader, job_id, 2)
        fleet.finish("here/gpu-0")
        job = await stage.until_state(leader, job_id, "succeeded")
    first, second = await stage.attempts(job_id)
    assert (first["state"], second["state"]) == ("lost", "succeeded")
    assert json.loads(job["receipt"])["billed_gpu_ms"] == 500
    assert await used_ms(stage, "ada") == 500


async def test_job_that_loses_three_workers_fails_and_costs_nothing(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        for number in range(1, 4):
            await stage.until_attempts(leader, job_id, number)
            fleet.kill("here/gpu-0")
        job = await stage.until_state(leader, job_id, "failed")
    assert job["failure_reason"] == "WORKERS_LOST"
    assert await used_ms(stage, "ada") == 0


async def test_result_of_an_attempt_that_was_given_up_counts_for_nothing(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
        before = fleet.busy["here/gpu-0"]
        fleet.kill("here/gpu-0")
        await stage.until_attempts(leader, job_id, 2)
        result = fleet.finish("here/gpu-0")
        await stage.until_state(leader, job_id, "succeeded")
        zombie = replace(result, attempt_id=before.attempt_id, token=before.token)
        with capture_logs() as logs:
            for told in (zombie, result):
                fleet.say_again("here/gpu-0", told)
                await stage.until(leader, lambda: not fleet._stubs["here/gpu-0"].results)
    assert await used_ms(stage, "ada") == 500
    assert [attempt["state"] for attempt in await stage.attempts(job_id)] == ["lost", "succeeded"]
    said = [line["event"] for line in logs if "result" in line["event"]]
    assert said == ["late result dropped", "result told again"]


async def test_worker_that_was_silent_gets_nothing_new_before_it_gave_up_the_old(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
        fleet.fall_silent("here/gpu-0")
        await stage.until_state(leader, job_id, "queued")
        fleet.speak_again("here/gpu-0")
        await stage.until_state(leader, job_id, "running")
        fleet.finish("here/gpu-0")
        await stage.until_state(leader, job_id, "succeeded")
    assert [attempt["state"] for attempt in await stage.attempts(job_id)] == ["lost", "succeeded"]
    assert await used_ms(stage, "ada") == 500


async def test_failure_of_ours_is_tried_again_and_one_of_the_clients_is_not(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=300)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
        fleet.finish("here/gpu-0", outcome=Outcome.FAILED, blame=Blame.PLATFORM)
        await stage.until_attempts(leader, job_id, 2)
        fleet.finish("here/gpu-0", outcome=Outcome.FAILED, blame=Blame.CLIENT)
        job = await stage.until_state(leader, job_id, "failed")
    assert job["failure_sentence"] == "The stub was told to fail."
    assert await used_ms(stage, "ada") == 0


async def test_restarted_scheduler_adopts_what_runs_and_continues_what_waits(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        running = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, running, "running")
        waiting = await stage.submit("ada", Tier.FAST)
    unseen = await stage.submit("ada", Tier.FAST)  # nobody leads: only the sweep can find it
    async with stage.leading(fleet) as leader:
        fleet.finish("here/gpu-0")
        await stage.until_state(leader, running, "succeeded")
        for job_id in (waiting, unseen):
            await stage.until_state(leader, job_id, "running")
            fleet.finish("here/gpu-0")
            await stage.until_state(leader, job_id, "succeeded")
    assert len(await stage.attempts(running)) == 1, "it was adopted, not run again"
    assert await used_ms(stage, "ada") == 3 * 500


async def test_result_that_waits_for_a_scheduler_is_settled_by_the_next(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
    fleet.finish("here/gpu-0")
    async with stage.leading(fleet) as leader:
        await stage.until_state(leader, job_id, "succeeded")
    assert await used_ms(stage, "ada") == 500


async def test_worker_that_died_while_nobody_led_is_a_loss_for_the_next_scheduler(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
    fleet.kill("here/gpu-0")
    async with stage.leading(fleet) as leader:
        await stage.until_attempts(leader, job_id, 2)
        fleet.finish("here/gpu-0")
        await stage.until_state(leader, job_id, "succeeded")
    assert await used_ms(stage, "ada") == 500


async def test_old_scheduler_that_wakes_up_writes_nothing_and_ends(stage: Stage) -> None:
    await stage.open_account("ada")
    async with stage.leading(LocalFleet(workers=1, take_ms=None)) as old:
        await leadership.take_lead(stage.connection, "another")
        with pytest.raises(Deposed):
            await dispatch.start_attempts(
                stage.connection,
                epoch=old.epoch,
                planned=[],
                tags=[(AccountId("ada"), Tier.RELAX, 1)],
                running=[],
                parameters=Parameters(),
                now_ms=1,
                again=False,
            )
        job_id = await stage.submit("ada")
        assert stage.running is not None
        await asyncio.wait([stage.running], timeout=10)
        ended_by = stage.running.exception()
        assert isinstance(ended_by, ExceptionGroup)
        assert ended_by.subgroup(Deposed) is not None
    assert (await stage.job(job_id))["state"] == "queued"


async def test_job_without_fast_time_is_held_and_woken_by_a_grant(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    await stage.open_account("ben", plan="basic")
    async with stage.leading(fleet) as leader:
        first = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, first, "running")
        poor = await stage.submit("ben", Tier.FAST)
        await stage.adjust_balance("ben", -12_000_000)
        fleet.finish("here/gpu-0")
        await stage.until_waits(leader, poor, "funds")
        await stage.adjust_balance("ben", 600_000)
        leader.accounts_changed(["ben"])
        await stage.until_state(leader, poor, "running")


async def test_job_that_cannot_be_paid_does_not_hold_up_the_next_account(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    for name in ("ada", "ben", "eve"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        first = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, first, "running")
        poor = await stage.submit("ben", Tier.FAST)
        rich = await stage.submit("eve", Tier.FAST)
        await stage.adjust_balance("ben", -54_000_000)
        fleet.finish("here/gpu-0")
        await stage.until_state(leader, rich, "running")
        assert (await stage.job(poor))["state"] == "queued"


async def test_tags_and_usage_in_memory_equal_the_database(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=0, gpu_ms=1500)
    for name in ("ada", "ben"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        jobs = [await stage.submit(name, tier) for name in ("ada", "ben") for tier in Tier for _ in range(3)]
        for job_id in jobs:
            await stage.until_state(leader, job_id, "succeeded")
        board = leader._loop.board

        async def settled() -> bool:
            return not board.unstored_tags() and not leader._loop._desk.running

        await stage.until(leader, settled)
        rows = await stage.connection.fetch("SELECT * FROM scheduler.fair_share ORDER BY account_id, tier")
        assert [(row["account_id"], row["tier"]) for row in rows] == [
            (name, tier) for name in ("ada", "ben") for tier in ("fast", "relax")
        ]
        for row in rows:
            share = board.share(row["account_id"], Tier(row["tier"]))
            assert (share.finish_tag, share.tag) == (row["finish_tag"], row["tag"])
            assert share.usage == pytest.approx(row["usage"])
        cells = await stage.connection.fetch("SELECT * FROM scheduler.cell")
        assert {Tier(c["tier"]): c["virtual_time"] for c in cells} == {
            tier: board.virtual_time(tier) for tier in Tier
        }


async def test_batch_whose_answer_was_lost_is_not_started_twice(stage: Stage) -> None:
    await stage.open_account("ada")
    job_id = await stage.submit("ada", Tier.FAST)
    lead = await leadership.take_lead(stage.connection, "test")
    await stage.connection.execute("UPDATE scheduler.cell SET decay_origin_ms = $1", lead.now_ms)
    planned = [a_planned_attempt(job_id, lead.now_ms)]

    async def start(*, again: bool) -> dispatch.StartOutcome:
        return await dispatch.start_attempts(
            stage.connection,
            epoch=lead.epoch,
            planned=planned,
            tags=[],
            running=[],
            parameters=Parameters(),
            now_ms=lead.now_ms,
            again=again,
        )

    first, second = await start(again=False), await start(again=True)
    assert [one.planned for one in first.started] == [one.planned for one in second.started] == planned
    assert first.started[0].event_seq == second.started[0].event_seq
    assert len(await stage.attempts(job_id)) == 1
    assert await stage.connection.fetchval("SELECT count(*) FROM billing.hold") == 1

    end = endings.AttemptEnd(
        attempt_id=planned[0].attempt_id,
        token=planned[0].token,
        verdict=endings.Verdict.SUCCEEDED,
        gpu_ms=700,
    )

    async def settle() -> endings.Settled | endings.Unknown:
        (outcome,) = await endings.settle_attempts(
            stage.connection, epoch=lead.epoch, ends=[end], parameters=Parameters(), now_ms=lead.now_ms
        )
        return outcome

    for outcome, repeated in ((await settle(), False), (await settle(), True)):
        assert isinstance(outcome, endings.Settled)
        assert (outcome.job_state, outcome.gpu_ms, outcome.repeated) == ("succeeded", 700, repeated)
    assert await used_ms(stage, "ada") == 700
    forged = replace(end, token=str(uuid.uuid4()))
    (nothing,) = await endings.settle_attempts(
        stage.connection, epoch=lead.epoch, ends=[forged], parameters=Parameters(), now_ms=lead.now_ms
    )
    assert isinstance(nothing, endings.Unknown)


@pytest.mark.parametrize("counts", [True, False])
async def test_loss_whose_answer_was_lost_is_the_same_loss_when_it_is_told_again(
    stage: Stage, counts: bool
) -> None:
    await stage.open_account("ada")
    job_id = await stage.submit("ada", Tier.FAST)
    lead, planned = await a_started_attempt(stage, job_id)
    end = endings.AttemptEnd(
        attempt_id=planned.attempt_id,
        token=planned.token,
        verdict=endings.Verdict.LOST,
        gpu_ms=None,
        counts=counts,
    )
    for repeated in (False, True):
        (outcome,) = await endings.settle_attempts(
            stage.connection, epoch=lead.epoch, ends=[end], parameters=Parameters(), now_ms=lead.now_ms
        )
        assert isinstance(outcome, endings.Settled)
        assert (outcome.job_state, outcome.counts_as_loss, outcome.repeated) == ("queued", counts, repeated)
    losses = await stage.connection.fetchval(
        "SELECT losses FROM scheduler.job WHERE job_id = $1", uuid.UUID(job_id)
    )
    assert losses == counts
