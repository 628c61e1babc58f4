"""Moments in which two things happen at once, and rows that should not be there: nothing is stuck."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from billing import invariants
from billing.refusals import AdjustmentTooLarge
from gpu_worker.contract import Blame, Outcome
from scheduler.clock import to_ms
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.fleet import WorkerHeard
from scheduler.inbox import AccountsChanged, Inbox, JobsChanged
from scheduler.leader import lead
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.store import live, operations
from tests.loop.conftest import Stage
from tests.stand_in import stand_in_models

WORKER = "here/gpu-0"


async def test_job_of_a_model_that_is_gone_waits_and_holds_up_nobody(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=0)
    await stage.open_account("ada")
    orphan = await stage.submit("ada", model="gone")
    for _ in range(2):  # for the scheduler that was told of it, and for one that finds it
        async with stage.leading(fleet) as leader:
            await stage.until_state(leader, await stage.submit("ada"), "succeeded")
            status = leader.queue_statuses([orphan])[orphan]
            assert status.reason.value == "no_worker"


async def test_what_a_recovery_takes_down_is_written_cycle_by_cycle_and_not_second_by_second(
    stage: Stage,
) -> None:
    await stage.open_account("ada")
    job_id = await stage.submit("ada")
    await stage.connection.execute(
        """INSERT INTO scheduler.job OVERRIDING SYSTEM VALUE
           SELECT (jsonb_populate_record(job, jsonb_build_object(
               'job_id', gen_random_uuid(), 'arrival', arrival + number))).*
           FROM scheduler.job, generate_series(1, 1200) AS number WHERE job_id = $1""",
        job_id,
    )
    async with lead(
        dsn=stage.dsn,
        holder="test",
        fleet=LocalFleet(workers=0, take_ms=None),
        models=stand_in_models(),
        sweep_ms=200,
    ) as leader:
        for _ in range(4):
            await leader._loop.cycle()
    told = await stage.connection.fetchval(
        "SELECT count(DISTINCT subject) FROM scheduler.journal WHERE kind = 'JobSubmitted'"
    )
    assert told == 1_201


async def test_what_a_leader_decides_while_it_reads_what_waits_is_written_at_once(stage: Stage) -> None:
    await stage.open_account("ada")
    waiting = await stage.submit("ada")
    await stage.connection.execute("UPDATE scheduler.job SET noticed_epoch = 1")
    await stage.open_account("ben")
    async with lead(
        dsn=stage.dsn,
        holder="test",
        fleet=LocalFleet(workers=1, take_ms=None),
        models=stand_in_models(),
        sweep_ms=200,
    ) as leader:
        started = await stage.submit("ben", Tier.FAST)
        await leader._loop.cycle()
        assert leader._loop.untold(Tier.RELAX) == 1
    rows = await stage.connection.fetch("SELECT kind, subject FROM scheduler.journal")
    told = {(row["kind"], row["subject"]) for row in rows}
    assert ("JobSubmitted", started) in told
    assert ("JobSubmitted", waiting) not in told


async def test_a_new_leader_has_better_things_to_do_than_to_forget_old_lines(stage: Stage) -> None:
    await stage.connection.execute(
        """INSERT INTO scheduler.journal (epoch, number, at, kind, subject, facts)
           VALUES (0, 1, now() - interval '31 days', 'TierPaused', 'fast', '{}')"""
    )
    async with lead(
        dsn=stage.dsn,
        holder="test",
        fleet=LocalFleet(workers=0, take_ms=None),
        models=stand_in_models(),
        sweep_ms=200,
    ) as leader:
        await leader._loop.cycle()
        oldest = "SELECT epoch FROM scheduler.journal ORDER BY epoch LIMIT 1"
        assert await stage.connection.fetchval(oldest) == 0
        leader._loop._tidy_at_ms = 0  # a minute later
        await leader._loop.cycle()
        assert await stage.connection.fetchval(oldest) != 0


async def test_cancel_that_comes_with_a_loss_ends_the_job(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
        # A cancel that has the account's lock and has not committed yet, while the worker dies.
        async with stage.connection.transaction():
            await stage.connection.execute(
                "SELECT FROM billing.subscription WHERE account_id = 'ada' FOR UPDATE"
            )
            fleet.kill(WORKER)
            await stage.until_blocked()
            await stage.connection.execute(
                "UPDATE scheduler.job SET cancel_wanted = true WHERE job_id = $1", job_id
            )
        leader.jobs_changed([job_id])
        await stage.until_state(leader, job_id, "cancelled")
        assert leader.queue_statuses([job_id]) == {}


async def test_fast_start_is_never_without_its_hold(stage: Stage) -> None:
    """Ben cannot pay, which undoes the batch's holds; Ada's time is taken away at that moment."""
    fleet = LocalFleet(workers=3, take_ms=None, gpu_ms=10)
    for name in ("ada", "ben", "eve"):
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        block = [await stage.submit("eve", Tier.FAST) for _ in range(3)]
        for job_id in block:
            await stage.until_state(leader, job_id, "running")
        jobs = [await stage.submit("ada", Tier.FAST), await stage.submit("ben", Tier.FAST)]
        await stage.adjust_balance("ben", -54_000_000)
        async with stage.connection.transaction():
            await stage.connection.execute(
                "SELECT FROM billing.subscription WHERE account_id = 'ben' FOR UPDATE"
            )
            for worker in list(fleet.busy):
                fleet.finish(worker)
            await stage.until_blocked()
            taking = asyncio.create_task(stage.adjust_balance("ada", -54_000_000))
        with suppress(AdjustmentTooLarge):  # what is held already cannot be taken
            await taking
        await stage.until(leader, lambda: len(leader.queue_statuses(jobs)) + len(fleet.busy) == 2)
        for worker in list(fleet.busy):
            fleet.finish(worker)
        await stage.until(leader, lambda: not fleet.busy)
    unheld = await stage.connection.fetchval(
        """SELECT count(*) FROM scheduler.attempt JOIN scheduler.job USING (job_id)
           LEFT JOIN billing.hold USING (attempt_id) WHERE tier = 'fast' AND hold_id IS NULL"""
    )
    assert unheld == 0
    assert await invariants.check(stage.connection) == []


async def test_two_that_touch_an_ended_period_open_one_new(stage: Stage) -> None:
    await stage.open_account("ada")
    in_40_days_ms = to_ms(datetime.now(UTC) + timedelta(days=40))

    async def touch() -> list[live.AccountStanding]:
        connection = await asyncpg.connect(stage.dsn)
        try:
            return await live.standings(connection, ["ada"], in_40_days_ms)
        finally:
            await connection.close()

    found = await asyncio.gather(*[touch() for _ in range(8)])
    assert len({standing.renews_at for (standing,) in found}) == 1
    lots = await stage.connection.fetchval("SELECT count(*) FROM billing.grant_lot WHERE source = 'plan'")
    assert lots == 2
    assert await invariants.check(stage.connection) == []


@pytest.mark.parametrize("text", ["a \0 in it", "half a \udc80 character", "x" * 100_000])
async def test_result_whose_words_cannot_be_stored_is_settled_all_the_same(stage: Stage, text: str) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=10)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
        fleet.finish(WORKER, outcome=Outcome.FAILED, blame=Blame.CLIENT, sentence=text)
        job = await stage.until_state(leader, job_id, "failed")
    assert len(job["failure_sentence"]) <= 500


async def test_result_that_the_database_refuses_costs_its_neighbours_nothing(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=10)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        first, second = await stage.submit("ada", Tier.FAST), await stage.submit("ada", Tier.FAST)
        for job_id in (first, second):
            await stage.until_state(leader, job_id, "running")
        of_first = next(worker for worker, request in fleet.busy.items() if request.job_id == first)
        of_second = next(worker for worker, request in fleet.busy.items() if request.job_id == second)
        fleet.finish(of_first, gpu_ms=2**40)  # beyond what the column holds
        fleet.finish(of_second)
        await stage.until_state(leader, second, "succeeded")
        await stage.until_state(leader, first, "running")
        assert [attempt["state"] for attempt in await stage.attempts(first)] == ["lost", "running"]


async def test_store_that_is_away_sets_no_worker_aside_and_a_dying_gpu_is(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=10)
    names = ("ada", "ben", "eve", "zoe")
    for name in names:
        await stage.open_account(name)
    async with stage.leading(fleet) as leader:
        for name in names:
            await stage.submit(name, Tier.FAST)
        for _ in range(3):
            await stage.until(leader, lambda: fleet.busy)
            fleet.finish(WORKER, outcome=Outcome.FAILED, blame=Blame.PLATFORM, reason="ARTIFACTS_UNAVAILABLE")
        await stage.until(leader, lambda: fleet.busy)
        assert (await operations.wishes(stage.connection)).set_aside == {}

        # Each job is lost with the GPU three times and given up; with the third job it is the GPU's fault.
        for _ in range(7):
            await stage.until(leader, lambda: fleet.busy)
            fleet.kill(WORKER)

        async def set_aside() -> bool:
            return list((await operations.wishes(stage.connection)).set_aside) == [WORKER]

        await stage.until(leader, set_aside)
        waiting = await stage.connection.fetchval(
            "SELECT job_id::text FROM scheduler.job WHERE state = 'queued'"
        )
        await stage.until_waits(leader, waiting, "no_worker")
        assert not fleet.busy


async def test_attempt_that_no_worker_took_is_none_of_a_jobs_losses(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        fleet.refuse_next = 4
        job_id = await stage.submit("ada", Tier.FAST)

        async def taken() -> bool:
            fleet.beat(WORKER)
            return bool(fleet.busy)

        await stage.until(leader, taken)
        assert (await stage.job(job_id))["losses"] == 0
        assert len(await stage.attempts(job_id)) == 5


async def test_attempt_on_a_gpu_that_hangs_is_lost_in_the_end(stage: Stage) -> None:
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=10)
    await stage.open_account("ada")
    async with stage.leading(fleet, parameters=Parameters(max_predicted_ms=1)) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
        (hanging,) = fleet.busy

        async def elsewhere() -> bool:
            fleet.beat(hanging)
            return len(await stage.attempts(job_id)) == 2

        await stage.until(leader, elsewhere)
        lost, again = await stage.attempts(job_id)
        counted = leader.metrics.registry.get_sample_value
        assert counted("darkroom_job_requeues_total", {"reason": "timeout"}) == 1
    assert (lost["state"], again["state"]) == ("lost", "running")


async def test_cancel_whose_notice_was_lost_leaves_the_queue(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        first, second = await stage.submit("ada"), await stage.submit("ada")
        await stage.until_state(leader, first, "running")
        await stage.until(leader, lambda: second in leader.queue_statuses([second]))
        stage.link.leader = None
        await stage.cancel("ada", second)
        await stage.until(leader, lambda: not leader.queue_statuses([second]))


async def test_grant_whose_notice_was_lost_wakes_the_job(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    await stage.open_account("ada")
    await stage.open_account("ben")
    async with stage.leading(fleet) as leader:
        await stage.until_state(leader, await stage.submit("ada", Tier.FAST), "running")
        poor = await stage.submit("ben", Tier.FAST)
        await stage.adjust_balance("ben", -54_000_000)
        fleet.finish(WORKER, gpu_ms=1)
        await stage.until_waits(leader, poor, "funds")
        await stage.adjust_balance("ben", 600_000)
        await stage.until_state(leader, poor, "running")


def test_inbox_keeps_one_heartbeat_of_each_worker_and_one_notice_of_each_account() -> None:
    reports: list[WorkerHeard] = []
    fleet = LocalFleet(workers=1, take_ms=None)
    fleet.tell_to(lambda fact: reports.append(fact) if isinstance(fact, WorkerHeard) else None)
    fleet.beat(WORKER)
    inbox = Inbox()
    for number in range(1_000):
        inbox.put(replace(reports[0], report=replace(reports[0].report, memory_used_bytes=number)))
        inbox.put(AccountsChanged(account_ids=("ada",)))
    inbox.put(JobsChanged(job_ids=("1",)))
    items = inbox.drain()
    heard = [item for item in items if isinstance(item, WorkerHeard)]
    assert [one.report.memory_used_bytes for one in heard] == [999]
    assert len(items) == 3
    assert inbox.drain() == []


async def test_decision_is_kept_with_the_numbers_it_was_made_by(stage: Stage) -> None:
    await stage.open_account("ada")
    async with stage.leading(LocalFleet(workers=1, take_ms=0)) as leader:
        job_id = await stage.submit("ada")
        await stage.until_state(leader, job_id, "succeeded")
    (attempt,) = await stage.attempts(job_id)
    decision = json.loads(attempt["decision"])
    assert decision["chosen"]["account_id"] == "ada"
    assert decision["reason"] == "No other account waited in relax for a GPU that was free."


async def test_attempt_whose_scheduler_died_before_it_called_is_given_to_its_worker(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=500)
    await stage.open_account("ada")
    async with stage.leading(fleet) as leader:
        job_id = await stage.submit("ada", Tier.FAST)
        await stage.until_state(leader, job_id, "running")
    fleet.never_got(WORKER)
    async with stage.leading(fleet) as leader:
        await stage.until(leader, lambda: fleet.busy)
        fleet.finish(WORKER)
        await stage.until_state(leader, job_id, "succeeded")
    (attempt,) = await stage.attempts(job_id)
    assert attempt["state"] == "succeeded"
