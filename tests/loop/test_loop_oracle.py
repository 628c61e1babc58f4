"""What goes wrong between jobs, attempts and the ledger is told by its own number, and by no other.

The other queries, which need the ledger alone, are told in its own tests.
"""

from __future__ import annotations

import asyncpg
import pytest

from billing.invariants import INVARIANTS as OF_THE_LEDGER
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import Tier
from scheduler.store.invariants import AT_REST, INVARIANTS, NOT_ASKED, Invariant, check, results
from tests.loop.conftest import Stage

MEASURED_MS = 500
_RUNNING = "(SELECT job_id FROM scheduler.job WHERE state = 'running')"
_LOST = "(SELECT attempt_id FROM scheduler.attempt WHERE state = 'lost')"
_DONE_FAST = "(SELECT min(job_id::text)::uuid FROM scheduler.job WHERE state = 'succeeded' AND tier = 'fast')"

BREAKS: list[tuple[str, set[int], str]] = [
    (
        "a running fast job without a hold",
        {14},
        f"UPDATE scheduler.job SET tier = 'relax' WHERE job_id = {_RUNNING}",
    ),
    (
        "a fence skipped at dispatch: two run, one is held for",
        {14},
        f"""WITH copy AS (
                INSERT INTO scheduler.job (job_id, account_id, kind, tier, visibility, state, prompt,
                                           seed_fixed, spec, pricing, predicted_ms)
                SELECT gen_random_uuid(), account_id, kind, tier, visibility, state, prompt,
                       seed_fixed, spec, pricing, predicted_ms
                  FROM scheduler.job WHERE job_id = {_RUNNING} RETURNING job_id)
            INSERT INTO scheduler.attempt (attempt_id, job_id, number, token, epoch, worker_id, incarnation,
                                           started_at, predicted_ms, charged_at_ms, weight_milli, decision)
            SELECT gen_random_uuid(), job_id, 1, gen_random_uuid(), 1, 'here/gpu-9', '', now(), 1, 0, 1000,
                   '{{}}' FROM copy""",
    ),
    (
        "a job that ended and is held for",
        {15},
        f"""WITH ended AS (UPDATE scheduler.job SET state = 'cancelled', ended_at = now()
                            WHERE job_id = {_RUNNING} RETURNING job_id)
            INSERT INTO scheduler.job_event (job_id, state) SELECT job_id, 'cancelled' FROM ended""",
    ),
    (
        "a success that nobody was charged for",
        {17},
        f"""WITH a AS (DELETE FROM billing.transfer WHERE job_id = {_DONE_FAST}
                            RETURNING lot_id, kind, amount),
                 b AS (DELETE FROM billing.hold_leg WHERE hold_id IN (
                           SELECT hold_id FROM billing.hold WHERE job_id = {_DONE_FAST})),
                 c AS (DELETE FROM billing.hold WHERE job_id = {_DONE_FAST}),
                 d AS (DELETE FROM billing.settlement WHERE job_id = {_DONE_FAST})
            UPDATE billing.grant_lot SET used_ms = used_ms - amount FROM a
             WHERE a.lot_id = grant_lot.lot_id AND kind = 'post_pending'""",
    ),
    (
        "a success that was charged for less than it measured",
        {17},
        f"""UPDATE scheduler.attempt SET gpu_ms = gpu_ms + 1
             WHERE job_id = {_DONE_FAST} AND state = 'succeeded'""",
    ),
    (
        "a loss that the ledger never heard of",
        {17},
        f"""WITH a AS (DELETE FROM billing.transfer WHERE attempt_id = {_LOST}),
                 b AS (DELETE FROM billing.hold_leg WHERE hold_id IN (
                           SELECT hold_id FROM billing.hold WHERE attempt_id = {_LOST})),
                 c AS (DELETE FROM billing.hold WHERE attempt_id = {_LOST})
            DELETE FROM billing.settlement WHERE attempt_id = {_LOST}""",
    ),
    (
        "a failure that was charged",
        {17},
        f"""WITH a AS (UPDATE scheduler.job SET state = 'failed', images = NULL, failure_reason = 'X'
                            WHERE job_id = {_DONE_FAST}),
                 b AS (UPDATE scheduler.attempt SET state = 'failed' WHERE job_id = {_DONE_FAST})
            UPDATE scheduler.job_event SET state = 'failed'
             WHERE job_id = {_DONE_FAST} AND state = 'succeeded'""",
    ),
    (
        "measured longer than it ran",
        {18, 19},
        "UPDATE scheduler.attempt SET ended_at = started_at + interval '0.4 s' WHERE state = 'succeeded' "
        f"AND job_id = {_DONE_FAST}",
    ),
    (
        "measured longer than it ran, beside another that was parked",
        {18},
        f"""UPDATE scheduler.attempt
               SET started_at = '2026-01-01 00:00:00.1',
                   ended_at = '2026-01-01 00:00:00.1'::timestamptz
                              + CASE WHEN job_id = {_DONE_FAST} THEN interval '0.4 s' ELSE interval '2 s' END
             WHERE state = 'succeeded'""",
    ),
    (
        "two that had one GPU at once",
        {19},
        """UPDATE scheduler.attempt SET started_at = '2026-01-01', ended_at = '2026-01-01 00:00:00.600'
            WHERE state = 'succeeded'""",
    ),
    (
        "a limit not kept",
        {20},
        "UPDATE scheduler.attempt SET decision = decision || '{\"limit_running\": 0}'",
    ),
    (
        "a relax limit not kept",
        {20},
        "UPDATE scheduler.attempt SET decision = decision || '{\"limit_relax_running\": 0}'",
    ),
    (
        "a fence skipped: another token",
        {21},
        "UPDATE scheduler.attempt SET reported_token = gen_random_uuid() WHERE state = 'succeeded'",
    ),
    (
        "a fence skipped: another life of the worker",
        {21},
        "UPDATE scheduler.attempt SET reported_incarnation = 'another' WHERE state = 'succeeded'",
    ),
    (
        "a fence skipped: an attempt that came after another's success",
        {21},
        "UPDATE scheduler.attempt SET number = 0 FROM (SELECT min(attempt_id::text)::uuid AS first "
        "FROM scheduler.attempt WHERE state = 'lost') AS lost WHERE job_id = "
        "(SELECT job_id FROM scheduler.attempt WHERE attempt_id = first) AND state = 'succeeded'",
    ),
    (
        "an end told twice",
        {22},
        "INSERT INTO scheduler.job_event (job_id, state) "
        "SELECT job_id, state FROM scheduler.job_event WHERE state = 'succeeded'",
    ),
    ("an end told to nobody", {22}, "DELETE FROM scheduler.job_event WHERE state = 'succeeded'"),
    (
        "an attempt of a leader to come",
        {22},
        "UPDATE scheduler.attempt SET epoch = leader.epoch + 1 FROM scheduler.leader WHERE number = 1",
    ),
    (
        "a request whose job is gone",
        {24},
        "UPDATE billing.idempotency SET outcome = jsonb_build_object('job_id', gen_random_uuid())",
    ),
    ("a request without an answer", {24}, "UPDATE billing.idempotency SET outcome = NULL"),
    (
        "an event of no job",
        {24},
        "INSERT INTO scheduler.job_event (job_id, state) VALUES (gen_random_uuid(), 'queued')",
    ),
]


async def a_busy_day(stage: Stage) -> None:
    """Let a fast job and a relax one succeed, the fast one after a loss, and another fast one run."""
    await stage.open_account("ann")
    fleet = LocalFleet(workers=1, take_ms=None, gpu_ms=MEASURED_MS)
    async with stage.leading(fleet) as leader:
        first = await stage.submit("ann", Tier.FAST)
        await stage.until(leader, lambda: fleet.busy)
        fleet.kill("here/gpu-0")
        await stage.until_attempts(leader, first, 2)
        await stage.until(leader, lambda: fleet.busy)
        fleet.finish("here/gpu-0")
        await stage.until_state(leader, first, "succeeded")
        second = await stage.submit("ann", Tier.RELAX)
        await stage.until(leader, lambda: fleet.busy)
        fleet.finish("here/gpu-0")
        await stage.until_state(leader, second, "succeeded")
        third = await stage.submit("ann", Tier.FAST)
        await stage.until_attempts(leader, third, 1)
    # The stub counted what it was told to; on a real GPU that much time would have passed.
    await stage.connection.execute(
        """UPDATE scheduler.attempt
              SET started_at = '2026-01-02'::timestamptz + n * interval '10 s',
                  ended_at = '2026-01-02'::timestamptz + n * interval '10 s' + interval '0.6 s'
             FROM (SELECT attempt_id, row_number() OVER (ORDER BY started_at) AS n
                     FROM scheduler.attempt) AS numbered
            WHERE numbered.attempt_id = attempt.attempt_id AND ended_at IS NOT NULL"""
    )


async def without_their_guards(connection: asyncpg.Connection) -> None:
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("DROP INDEX scheduler.job_event_one_end")
    await connection.execute("ALTER TABLE scheduler.attempt DROP CONSTRAINT attempt_number_check")


async def test_what_goes_wrong_is_told_by_its_number(stage: Stage, subtests: pytest.Subtests) -> None:
    await a_busy_day(stage)
    connection = stage.connection
    assert await check(connection) == []
    await without_their_guards(connection)
    alone: set[str] = set()
    for what, numbers, sql in BREAKS:
        with subtests.test(what):
            transaction = connection.transaction()
            await transaction.start()
            try:
                assert (await connection.execute(sql)).split()[-1] != "0", "this changes nothing"
                answers = await check(connection)
                assert {answer.number for answer in answers} == numbers
                alone |= {answer.sentence for answer in answers} if len(answers) == 1 else set()
            finally:
                await transaction.rollback()
    assert alone == {one.sentence for one in INVARIANTS if one not in OF_THE_LEDGER}


def test_no_number_is_without_a_query() -> None:
    assert {one.number for one in INVARIANTS} == set(range(1, 25))


async def test_what_is_left_to_be_done_is_told_at_rest(stage: Stage) -> None:
    await a_busy_day(stage)
    (running, measured) = await results(stage.connection, 60_000, AT_REST)
    assert running.violations == 4  # a job, its attempt, its hold, and the lot
    assert measured.violations == 0


async def test_what_was_measured_and_is_in_no_settlement_is_told_at_rest(stage: Stage) -> None:
    await a_busy_day(stage)
    await stage.connection.execute(
        "UPDATE scheduler.attempt SET times = times || '{\"decode_ms\": 1}' WHERE state = 'succeeded'"
    )
    (_, measured) = await results(stage.connection, 60_000, AT_REST)
    # Of the fast job more is absorbed than was measured: nobody knows what the worker that died did.
    assert measured.violations == 1


async def test_what_was_settled_and_nobody_measured_is_told_at_rest(
    stage: Stage, subtests: pytest.Subtests
) -> None:
    await a_busy_day(stage)
    connection = stage.connection
    await without_their_guards(connection)
    for what, sql in (
        ("relax", "UPDATE billing.settlement SET absorbed_ms = absorbed_ms + 1 WHERE tier = 'relax'"),
        # Its worker had the GPU for at most 0.6 s.
        ("lost", "UPDATE billing.settlement SET absorbed_ms = absorbed_ms + 700 WHERE ending = 'void'"),
    ):
        with subtests.test(what):
            transaction = connection.transaction()
            await transaction.start()
            try:
                assert await connection.execute(sql) == "UPDATE 1"
                (_, measured) = await results(connection, 60_000, AT_REST)
                assert measured.violations == 1
            finally:
                await transaction.rollback()


async def test_an_answer_that_takes_too_long_is_none_and_the_next_is_given(stage: Stage) -> None:
    await stage.open_account("ann")
    slow = Invariant(number=1, sentence="It takes long.", sql="SELECT pg_sleep(60)")
    first, *others = await results(stage.connection, 300, [slow, *INVARIANTS])
    assert (first.violations, first.first) == (NOT_ASKED, ())
    assert {other.violations for other in others} == {NOT_ASKED}
    assert await check(stage.connection) == []
