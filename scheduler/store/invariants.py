"""What must hold between the scheduler's tables and the ledger's, at any moment: queries that return no rows.

`INVARIANTS` is the whole list, the ledger's own included; its numbers are one series. A service that runs is
asked these. `AT_REST` holds besides where nothing is to be done any more.
"""

from __future__ import annotations

from collections.abc import Collection

import asyncpg

from billing import invariants as ledger_invariants
from billing.invariants import NOT_ASKED, Invariant, InvariantResult

__all__ = [
    "AT_REST",
    "INVARIANTS",
    "NOT_ASKED",
    "WALL_TIME",
    "Invariant",
    "InvariantResult",
    "check",
    "results",
]

# Workers measure with a clock of their own, in stages that are each rounded.
_ROUNDING_MS = 10

WALL_TIME: tuple[Invariant, ...] = (
    Invariant(
        number=18,
        sentence="What an attempt measured is no longer than from its dispatch to its report.",
        sql=f"""
        SELECT attempt_id, job_id, gpu_ms - kept_ms AS measured_ms, started_at, ended_at
          FROM scheduler.attempt
         WHERE state IN ('succeeded', 'cancelled')
           AND gpu_ms - kept_ms > extract(epoch FROM ended_at - started_at) * 1000 + {_ROUNDING_MS}""",  # noqa: S608
    ),
    Invariant(
        number=19,
        sentence="Time measured on one GPU is no longer than the time that passed there.",
        # Spans are runs of attempts that overlap, as those do that are parked for others. What is measured
        # between two of its ends has to fit in there.
        sql=f"""
        WITH placed AS (
            SELECT worker_id, started_at, ended_at, gpu_ms - kept_ms AS measured_ms,
                   started_at > max(ended_at) OVER (
                       PARTITION BY worker_id ORDER BY started_at, ended_at, attempt_id
                       ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS begins
              FROM scheduler.attempt WHERE state IN ('succeeded', 'cancelled')),
        numbered AS (
            SELECT *, count(*) FILTER (WHERE begins) OVER (
                       PARTITION BY worker_id ORDER BY started_at, ended_at) AS span
              FROM placed)
        SELECT worker_id, min(started_at) AS started_at, max(ended_at) AS ended_at,
               sum(measured_ms) AS measured_ms, count(*) AS attempts
          FROM numbered GROUP BY worker_id, span
        HAVING sum(measured_ms)
               > extract(epoch FROM max(ended_at) - min(started_at)) * 1000 + {_ROUNDING_MS} * count(*)""",  # noqa: S608
    ),
)
"""Those that hold a worker's clock against ours. A fleet that counts what it is told to breaks them."""

INVARIANTS: tuple[Invariant, ...] = tuple(
    sorted(
        (
            *ledger_invariants.INVARIANTS,
            *WALL_TIME,
            Invariant(
                number=14,
                sentence="An open hold is of a running fast attempt, and such an attempt has one.",
                sql="""
                SELECT hold.attempt_id, hold.job_id, 'is held for, and does not run in fast' AS what
                  FROM billing.hold
                       LEFT JOIN scheduler.attempt USING (attempt_id)
                       LEFT JOIN scheduler.job ON job.job_id = attempt.job_id
                 WHERE hold.state = 'open'
                   AND (attempt.state = 'running' AND job.tier = 'fast' AND job.job_id = hold.job_id
                        AND job.account_id = hold.account_id) IS NOT TRUE
                UNION ALL
                SELECT attempt_id, attempt.job_id, 'runs in fast, and nothing is held for it'
                  FROM scheduler.attempt JOIN scheduler.job USING (job_id)
                 WHERE attempt.state = 'running' AND job.tier = 'fast'
                   AND NOT EXISTS (SELECT FROM billing.hold
                                    WHERE hold.attempt_id = attempt.attempt_id AND hold.state = 'open')""",
            ),
            Invariant(
                number=15,
                sentence="A job that has ended has no open hold.",
                sql="""
                SELECT hold.job_id, hold.attempt_id, job.state
                  FROM billing.hold JOIN scheduler.job USING (job_id)
                 WHERE hold.state = 'open' AND job.state IN ('succeeded', 'failed', 'cancelled')""",
            ),
            Invariant(
                number=17,
                sentence="A job that succeeded is charged for what it measured; one that failed is not.",
                sql="""
                SELECT job_id, job.state, charge.attempt_id, charge.measured_ms, attempt.gpu_ms
                  FROM scheduler.job
                       LEFT JOIN scheduler.attempt USING (job_id)
                       LEFT JOIN billing.settlement AS charge USING (attempt_id, job_id)
                 WHERE job.state = 'succeeded' AND attempt.state = 'succeeded'
                   AND (charge.ending = 'post' AND charge.tier = job.tier
                        AND charge.account_id = job.account_id
                        AND charge.measured_ms = attempt.gpu_ms) IS NOT TRUE
                UNION ALL
                SELECT job_id, job.state, charge.attempt_id, charge.measured_ms, NULL
                  FROM scheduler.job JOIN billing.settlement AS charge USING (job_id)
                 WHERE job.state = 'failed' AND charge.ending = 'post'""",
            ),
            Invariant(
                number=17,
                sentence="An attempt that ended is settled: charged if its owner ended it, else given back.",
                sql="""
                SELECT attempt_id, attempt.job_id, attempt.state, settlement.ending
                  FROM scheduler.attempt LEFT JOIN billing.settlement USING (attempt_id)
                 WHERE attempt.state NOT IN ('running', 'migrated', 'succeeded')
                   AND settlement.ending
                       IS DISTINCT FROM CASE attempt.state WHEN 'cancelled' THEN 'post' ELSE 'void' END""",
            ),
            Invariant(
                number=20,
                sentence="An attempt starts only where its account runs no more than it may at that moment.",
                # An attempt is counted from its start up to, and without, its end.
                sql="""
                WITH attempts AS (
                    SELECT attempt_id, account_id, attempt.started_at, attempt.ended_at, decision,
                           NOT EXISTS (SELECT FROM billing.hold
                                        WHERE hold.attempt_id = attempt.attempt_id) AS relax
                      FROM scheduler.attempt JOIN scheduler.job USING (job_id)
                     WHERE attempt.ended_at IS NULL OR attempt.ended_at > attempt.started_at),
                steps AS (
                    SELECT attempt_id, account_id, started_at AS at, 1 AS step, relax, decision FROM attempts
                    UNION ALL
                    SELECT attempt_id, account_id, ended_at, -1, relax, NULL FROM attempts
                     WHERE ended_at IS NOT NULL),
                counted AS (
                    SELECT attempt_id, account_id, at, relax, decision,
                           sum(step) OVER at_once AS running,
                           sum(step) FILTER (WHERE relax) OVER at_once AS relax_running
                      FROM steps WINDOW at_once AS (PARTITION BY account_id ORDER BY at))
                SELECT attempt_id, account_id, at, running, relax_running,
                       decision -> 'limit_running' AS limit_running,
                       decision -> 'limit_relax_running' AS limit_relax_running
                  FROM counted
                 WHERE running > (decision ->> 'limit_running')::int
                    OR (relax AND relax_running > (decision ->> 'limit_relax_running')::int)""",
            ),
            Invariant(
                number=21,
                sentence="An attempt is ended by the worker's life and the token that it was leased to, and "
                "what is settled is such an attempt.",
                sql="""
                SELECT attempt_id, job_id, state, incarnation, reported_incarnation
                  FROM scheduler.attempt
                 WHERE reported_token <> token OR reported_incarnation <> incarnation
                    OR (state = 'running' AND reported_token IS NOT NULL)
                UNION ALL
                SELECT settlement.attempt_id, settlement.job_id, attempt.state, incarnation, NULL
                  FROM billing.settlement
                       LEFT JOIN scheduler.attempt USING (attempt_id)
                       LEFT JOIN scheduler.job ON job.job_id = attempt.job_id
                 WHERE (attempt.state NOT IN ('running', 'migrated') AND job.job_id = settlement.job_id
                        AND job.account_id = settlement.account_id) IS NOT TRUE
                UNION ALL
                SELECT succeeded.attempt_id, job_id, job.state, incarnation, NULL
                  FROM scheduler.job
                       LEFT JOIN scheduler.attempt AS succeeded USING (job_id)
                 WHERE (job.state = 'succeeded') AND NOT EXISTS (
                           SELECT FROM scheduler.attempt AS done
                            WHERE done.job_id = job.job_id AND done.state = 'succeeded')
                    OR succeeded.state = 'succeeded' AND (
                           job.state <> 'succeeded' OR EXISTS (
                               SELECT FROM scheduler.attempt AS later
                                WHERE later.job_id = job.job_id AND later.number > succeeded.number))""",
            ),
            Invariant(
                number=22,
                sentence="A job that has ended has one event that says so, and one that has not has none.",
                sql="""
                WITH told AS (
                    SELECT job_id, count(*) AS ends, min(state) AS state FROM scheduler.job_event
                     WHERE state IN ('succeeded', 'failed', 'cancelled') GROUP BY job_id)
                SELECT job_id, job.state, told.ends, told.state AS told
                  FROM scheduler.job LEFT JOIN told USING (job_id)
                 WHERE CASE WHEN job.state IN ('queued', 'running') THEN told.ends IS NOT NULL
                            ELSE (told.ends = 1 AND told.state = job.state) IS NOT TRUE END""",
            ),
            Invariant(
                number=22,
                sentence="Epochs never fall: no attempt is of an older leader than the attempt before it.",
                sql="""
                SELECT attempt_id, job_id, epoch, before FROM (
                    SELECT attempt_id, job_id, epoch,
                           lag(epoch) OVER (PARTITION BY job_id ORDER BY number) AS before
                      FROM scheduler.attempt) AS attempts
                 WHERE epoch < before OR epoch > (SELECT epoch FROM scheduler.leader)""",
            ),
            Invariant(
                number=24,
                sentence="Every request to make a job that was answered has its job.",
                sql="""
                SELECT account_id, request_id, outcome FROM billing.idempotency
                 WHERE method = 'CreateJob' AND NOT EXISTS (
                           SELECT FROM scheduler.job
                            WHERE job.job_id = (outcome ->> 'job_id')::uuid
                              AND job.account_id = idempotency.account_id)""",
            ),
            Invariant(
                number=24,
                sentence="A job has one row, and what tells of a job tells of one that there is.",
                # No key says so: the rows of jobs are in partitions, and move between them.
                sql="""
                SELECT job_id, 'rows: ' || count(*) AS what
                  FROM scheduler.job GROUP BY job_id HAVING count(*) > 1
                UNION ALL
                SELECT job_id, 'no row, and attempt ' || attempt_id FROM scheduler.attempt
                 WHERE NOT EXISTS (SELECT FROM scheduler.job WHERE job.job_id = attempt.job_id)
                UNION ALL
                SELECT job_id, 'no row, and event ' || seq FROM scheduler.job_event
                 WHERE NOT EXISTS (SELECT FROM scheduler.job WHERE job.job_id = job_event.job_id)
                UNION ALL
                SELECT source_job_id, 'no row, and was made to job ' || job_id FROM scheduler.job AS made
                 WHERE source_job_id IS NOT NULL
                   AND NOT EXISTS (SELECT FROM scheduler.job WHERE job.job_id = made.source_job_id)""",
            ),
        ),
        key=lambda invariant: invariant.number,
    )
)

AT_REST: tuple[Invariant, ...] = (
    Invariant(
        number=25,
        sentence="At rest: nothing runs, and nothing is held.",
        sql="""
        SELECT 'job ' || job_id AS what FROM scheduler.job WHERE state = 'running'
        UNION ALL SELECT 'attempt ' || attempt_id FROM scheduler.attempt WHERE state = 'running'
        UNION ALL SELECT 'hold of attempt ' || attempt_id FROM billing.hold WHERE state = 'open'
        UNION ALL SELECT 'lot ' || lot_id FROM billing.grant_lot WHERE held_ms <> 0
        UNION ALL SELECT 'money of ' || account_id FROM billing.metered_account WHERE held_micros <> 0""",
    ),
    Invariant(
        number=25,
        sentence="At rest: what attempts measured is what was posted in fast and relax, and absorbed.",
        # What a checkpoint kept of a lost attempt is in the one that went on from there, or in none: a job
        # that is cancelled as it waits drops it, and so does one that is moved to the other tier (which its
        # events tell: it began to wait more often than it came and lost an attempt). Who died measured
        # nothing, and is counted with the time it had its GPU; and who went on from a checkpoint may have
        # spent time to get there, which is not in its stages. Neither took more than passed between its two
        # ends.
        sql=f"""
        WITH attempts AS (
            SELECT job_id, number = 1 AND reported_incarnation IS NOT NULL AS is_measured,
                   state = 'lost' AS is_lost,
                   COALESCE((SELECT sum(ms.value::bigint) FROM jsonb_each_text(times) AS ms), 0)
                       AS measured_ms,
                   extract(epoch FROM ended_at - started_at) * 1000 + {_ROUNDING_MS} AS passed_ms
              FROM scheduler.attempt),
        moved AS (
            SELECT job_id
              FROM (SELECT job_id, count(*) AS waits FROM scheduler.job_event
                     WHERE state = 'queued' GROUP BY job_id) AS told
                   LEFT JOIN (SELECT job_id, count(*) AS losses FROM attempts
                               WHERE is_lost GROUP BY job_id) AS lost USING (job_id)
             WHERE waits > 1 + COALESCE(losses, 0)),
        measured AS (
            SELECT job_id,
                   sum(measured_ms) FILTER (WHERE NOT is_lost OR job_id NOT IN (SELECT job_id FROM moved))
                       AS measured_ms,
                   sum(CASE WHEN is_measured THEN measured_ms
                            ELSE GREATEST(measured_ms, passed_ms) END) AS most_ms
              FROM attempts GROUP BY job_id),
        settled AS (
            SELECT job_id, sum(measured_ms - unpaid_ms + absorbed_ms) AS settled_ms,
                   bool_or(ending = 'post') AS posted
              FROM billing.settlement GROUP BY job_id)
        SELECT job_id, measured_ms, most_ms, settled_ms FROM measured FULL JOIN settled USING (job_id)
         WHERE (posted IS NOT FALSE AND measured_ms > COALESCE(settled_ms, 0))
            OR settled_ms > COALESCE(most_ms, 0)""",  # noqa: S608
    ),
)


async def results(
    connection: asyncpg.Connection, within_ms: int, invariants: Collection[Invariant] = INVARIANTS
) -> list[InvariantResult]:
    """Ask all invariants of one moment of the database: see `billing.invariants.results`."""
    return await ledger_invariants.results(connection, within_ms, invariants)


async def check(
    connection: asyncpg.Connection,
    *,
    within_ms: int = 60_000,
    invariants: Collection[Invariant] = INVARIANTS,
) -> list[InvariantResult]:
    """Return the answers of those that do not hold or were not asked; none is what is hoped for."""
    return await ledger_invariants.check(connection, within_ms=within_ms, invariants=invariants)
