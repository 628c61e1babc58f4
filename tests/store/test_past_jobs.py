"""Jobs that ended move to the partitions of the past: nobody loses sight of them, and nobody waits for it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Collection
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from billing import accounts as ledger_accounts
from billing.prices import ChargeMode, PricingSnapshot
from scheduler.refusals import Overloaded
from scheduler.store import accounts, deletions, invariants, jobs, live, past_jobs
from scheduler.store.lanes import Lane
from scheduler.store.pool import Pool, open_pool

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
SPEC = """{"kind": "imagine", "model": "m", "prompt": "", "width": 64, "height": 64, "steps": 1,
           "guidance_milli": 1, "seed": 1, "source": null}"""
PRICING = PricingSnapshot(
    plan="basic",
    plan_version=1,
    charge_mode=ChargeMode.RELAX,
    multiplier_bp=10_000,
    overage_allowed=False,
    overage_micros_per_minute=0,
    currency="USD",
)
WHERE = "SELECT tableoid::regclass::text FROM scheduler.job WHERE job_id = $1"


@pytest.fixture
def promises() -> Collection[invariants.Invariant]:
    """That each job is there once: they end here without having run."""
    return [one for one in invariants.INVARIANTS if one.number == 24]


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database, 4)
    async with pool.transaction() as connection:
        await ledger_accounts.create(connection, "ann", "basic", NOW)
        await accounts.create_account(connection, "ann")
    yield pool
    await pool.close()


async def a_job(
    connection: asyncpg.Connection,
    *,
    state: str = "succeeded",
    ended_at: datetime | None = NOW - timedelta(hours=1),
    noticed_epoch: int = 1,
) -> str:
    """Return a job of ann's, as it may be found in a table."""
    job_id: str = await connection.fetchval(
        """WITH job AS (
               INSERT INTO scheduler.job (job_id, account_id, kind, tier, visibility, prompt, seed_fixed,
                                          spec, pricing, predicted_ms, state, ended_at, images,
                                          failure_reason, noticed_epoch)
               VALUES ($1, 'ann', 'imagine', 'relax', 'public', 'a fox', false, $2, $3, 1, $4, $5, $6, $7, $8)
               RETURNING job_id)
           INSERT INTO scheduler.job_event (job_id, state) SELECT job_id, $4 FROM job
           RETURNING job_id::text""",
        uuid.uuid4(),
        SPEC,
        json.dumps(PRICING.to_json()),
        state,
        ended_at,
        "[]" if state == "succeeded" else None,
        "X" if state == "failed" else None,
        noticed_epoch,
    )
    return job_id


async def move(connection: asyncpg.Connection, **changes: datetime | int | None) -> int:
    """Move what ended ten minutes before NOW and more, and return how many did."""
    async with connection.transaction():
        await past_jobs.make_months(connection, ended_from=None, until=NOW)
        terms = {"ended_before": NOW - timedelta(minutes=10), "ended_from": None, "limit": 500} | changes
        return len(await past_jobs.move(connection, **terms))  # type: ignore[arg-type]


async def place(connection: asyncpg.Connection, job_id: str) -> str:
    found: str = await connection.fetchval(WHERE, uuid.UUID(job_id))
    return found.removeprefix("scheduler.")


async def test_a_job_moves_to_the_month_it_ended_in(pool: Pool) -> None:
    async with pool.reading() as connection:
        places = {
            datetime(2026, 9, 30, 23, 59, 59, tzinfo=UTC): "past_job_2026_09",
            datetime(2026, 10, 1, tzinfo=UTC): "past_job_2026_10",
            NOW - timedelta(minutes=10, microseconds=1): "past_job_2026_11",
            NOW - timedelta(minutes=10): "live_job",
        }
        made = {await a_job(connection, ended_at=ended_at): where for ended_at, where in places.items()}
        assert await move(connection) == 3
        assert {job_id: await place(connection, job_id) for job_id in made} == made
        assert await move(connection) == 0


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Auckland"])
async def test_months_are_of_utc_and_begin_where_others_end(pool: Pool, zone: str) -> None:
    async with pool.reading() as connection:
        await connection.execute(f"SET timezone = '{zone}'")
        await a_job(connection, ended_at=datetime(2025, 12, 31, 23, 30, tzinfo=UTC))
        async with connection.transaction():
            made = await past_jobs.make_months(
                connection, ended_from=None, until=datetime(2026, 3, 31, 23, tzinfo=UTC)
            )
            assert (
                await past_jobs.make_months(
                    connection, ended_from=None, until=datetime(2026, 3, 31, 23, tzinfo=UTC)
                )
                == []
            )
        assert made == [f"past_job_{month}" for month in ("2025_12", "2026_01", "2026_02", "2026_03")]


async def test_what_lives_stays_and_so_does_what_the_scheduler_has_yet_to_hear_of(pool: Pool) -> None:
    async with pool.reading() as connection:
        waiting = await a_job(connection, state="queued", ended_at=None)
        unheard = await a_job(connection, state="cancelled", noticed_epoch=0)
        heard = await a_job(connection, state="cancelled")
        failed = await a_job(connection, state="failed")
        assert await move(connection) == 2
        assert {await place(connection, job_id) for job_id in (waiting, unheard)} == {"live_job"}
        assert {await place(connection, job_id) for job_id in (heard, failed)} == {"past_job_2026_11"}
        await connection.execute("INSERT INTO scheduler.leader DEFAULT VALUES ON CONFLICT DO NOTHING")
        await connection.execute("UPDATE scheduler.leader SET epoch = 1")
        assert [job.state for job in await live.noticed_jobs(connection, epoch=1, job_ids=[unheard])] == [
            "cancelled"
        ]
        assert await move(connection) == 1


async def test_a_past_job_can_be_had_listed_and_deleted(pool: Pool) -> None:
    async with pool.transaction() as connection:
        older = await a_job(connection)
        assert await move(connection) == 1
        newer = await a_job(connection)
        sent = {"states": [], "before_arrival": None, "limit": 10}
        listed = await jobs.list_jobs(connection, "ann", **sent)  # type: ignore[arg-type]
        assert [job.job_id for job in listed] == [newer, older]
        read = await jobs.read_job(connection, older)
        assert read is not None
        assert read.prompt == "a fox"
        assert await deletions.lock_for_deletion(connection, older) is not None
        await deletions.delete_job(connection, older)
        assert await jobs.read_job(connection, older) is None
        assert await deletions.leftovers(connection, limit=10) == [older]
        assert await place(connection, older) == "past_job_2026_11"


async def test_the_order_of_arrival_goes_on(pool: Pool) -> None:
    async with pool.reading() as connection:
        first = await a_job(connection)
        await move(connection)
        second = await a_job(connection)
        arrivals = "SELECT arrival FROM scheduler.job WHERE job_id = $1"
        assert await connection.fetchval(arrivals, uuid.UUID(first)) < await connection.fetchval(
            arrivals, uuid.UUID(second)
        )


async def test_an_erased_account_has_its_other_id_in_the_past_too(pool: Pool) -> None:
    async with pool.transaction() as connection:
        for days in (0, 30, 60):
            await a_job(connection, ended_at=NOW - timedelta(days=days, hours=1))
        assert await move(connection) == 3
        await a_job(connection)
        pseudonym = await ledger_accounts.erase(connection, "ann", NOW)
        rows = await connection.fetch("SELECT account_id, count(*) FROM scheduler.job GROUP BY 1")
        assert [tuple(row) for row in rows] == [(pseudonym, 4)]


async def test_rows_that_somebody_has_locked_move_the_next_time(pool: Pool) -> None:
    async with pool.reading() as mover, pool.transaction() as owner:
        locked, other = await a_job(mover), await a_job(mover)
        assert await deletions.lock_for_deletion(owner, locked) is not None
        assert await move(mover) == 1
        assert await place(mover, other) == "past_job_2026_11"
        assert await place(mover, locked) == "live_job"


async def test_who_waits_for_a_row_that_is_being_moved_is_asked_to_begin_again(pool: Pool) -> None:
    async with pool.reading() as mover:
        job_id = await a_job(mover)

        async def delete() -> None:
            async with pool.transaction() as connection:
                await deletions.lock_for_deletion(connection, job_id)
                await deletions.delete_job(connection, job_id)

        moving = mover.transaction()
        await moving.start()
        assert await move(mover) == 1
        waiting = asyncio.create_task(delete())
        await _until_somebody_waits(pool)
        await moving.commit()
        with pytest.raises(Overloaded, match="the same request again"):
            await waiting
        await delete()
        assert await jobs.read_job(mover, job_id) is None


async def test_a_lane_does_its_work_again_where_a_row_has_moved(pool: Pool) -> None:
    lane = Lane(pool.dsn, "test")
    async with pool.reading() as mover:
        job_id = await a_job(mover)

        async def touch(connection: asyncpg.Connection) -> str:
            return await connection.execute(
                "UPDATE scheduler.job SET event_seq = 7 WHERE job_id = $1", uuid.UUID(job_id)
            )

        moving = mover.transaction()
        await moving.start()
        assert await move(mover) == 1
        working = asyncio.create_task(lane.run(touch))
        await _until_somebody_waits(pool)
        await moving.commit()
        assert await working == "UPDATE 1"
    await lane.close()


async def _until_somebody_waits(pool: Pool) -> None:
    waiting = """SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event_type = 'Lock'"""
    async with pool.reading() as connection, asyncio.timeout(10):
        while not await connection.fetchval(waiting):
            pass


async def test_an_old_transaction_keeps_nobody_from_moving_rows_and_sees_what_it_saw(pool: Pool) -> None:
    async with pool.snapshot() as old, pool.reading() as connection:
        assert await old.fetchval("SELECT count(*) FROM scheduler.job") == 0
        job_id = await a_job(connection)
        async with pool.snapshot() as older:
            assert await place(older, job_id) == "live_job"
            assert await old.fetchval("SELECT count(*) FROM scheduler.job") == 0
            assert await move(connection) == 1
            async with connection.transaction():
                made = await past_jobs.make_months(
                    connection, ended_from=None, until=NOW + timedelta(days=60)
                )
            assert made == ["past_job_2027_01"]
            assert await place(older, job_id) == "live_job"
            assert await older.fetchval("SELECT count(*) FROM scheduler.job") == 1
        assert await place(connection, job_id) == "past_job_2026_11"


async def test_a_move_that_begins_behind_what_moved_before_leaves_what_is_older(pool: Pool) -> None:
    async with pool.reading() as connection:
        await a_job(connection, ended_at=NOW - timedelta(hours=3))
        await a_job(connection, ended_at=NOW - timedelta(hours=1))
        assert await move(connection, ended_from=NOW - timedelta(hours=2)) == 1
        assert await move(connection) == 1


@pytest.mark.parametrize(
    "query",
    [
        "SELECT FROM scheduler.job WHERE NOT past AND job_id = gen_random_uuid()",
        # As the release before asks.
        "SELECT FROM scheduler.job WHERE state = 'queued' AND noticed_epoch <> 1",
        "SELECT FROM scheduler.job WHERE state = 'cancelled' AND noticed_epoch = 0",
        "SELECT FROM scheduler.job WHERE state IN ('queued', 'running')",
    ],
)
async def test_what_is_about_jobs_that_live_looks_at_no_other(pool: Pool, query: str) -> None:
    async with pool.reading() as connection:
        await a_job(connection)
        await move(connection)
        plan = await connection.fetch(f"EXPLAIN {query}")
    text = "\n".join(row[0] for row in plan)
    assert "live_job" in text
    assert "past_job" not in text


class Explaining:
    """A connection that, instead of what it is asked, says how that would be found."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self.plan = ""

    async def fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        rows = await self._connection.fetch(f"EXPLAIN {query}", *arguments)
        self.plan = "\n".join(row[0] for row in rows)
        return []


async def test_the_feed_and_archives_pass_over_nothing_that_expired(pool: Pool) -> None:
    async with pool.transaction() as connection:
        await a_job(connection)
        await move(connection)
        await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off")
        await connection.execute("SET LOCAL enable_bitmapscan = off")
        explaining = Explaining(connection)
        asked: asyncpg.Connection = explaining
        await jobs.feed(asked, after=None, limit=25)
        # What an index has alone is not looked at again.
        assert "past_job_2026_11" in explaining.plan
        assert "expired_at" not in explaining.plan
        await jobs.with_pictures(asked, "ann")
        assert "past_job_2026_11" in explaining.plan
        assert "expired_at" not in explaining.plan


async def test_a_later_page_of_the_feed_begins_where_the_one_before_ended(pool: Pool) -> None:
    async with pool.transaction() as connection:
        await a_job(connection)
        await a_job(connection, ended_at=NOW - timedelta(days=60))
        await move(connection)
        await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
        explaining = Explaining(connection)
        asked: asyncpg.Connection = explaining
        place = jobs.FeedPlace(ended_at=NOW - timedelta(days=55), job_id=str(uuid.uuid4()))
        await jobs.feed(asked, after=place, limit=25)
        assert "past_job_2026_09" in explaining.plan
        assert "Index Cond: (ended_at <= " in explaining.plan
        assert "past_job_2026_10" not in explaining.plan
        assert "past_job_2026_11" not in explaining.plan


@pytest.mark.unsound(24)
async def test_a_job_with_two_rows_is_found_by_the_checker(
    pool: Pool, promises: Collection[invariants.Invariant]
) -> None:
    async with pool.reading() as connection:
        job_id = await a_job(connection)
        await move(connection)
        assert await invariants.check(connection, invariants=promises) == []
        await connection.execute(
            """INSERT INTO scheduler.job (job_id, account_id, kind, tier, visibility, prompt, seed_fixed,
                                          spec, pricing, predicted_ms, state, ended_at, images)
               SELECT job_id, account_id, kind, tier, visibility, prompt, seed_fixed, spec, pricing,
                      predicted_ms, state, ended_at, images FROM scheduler.job WHERE job_id = $1""",
            uuid.UUID(job_id),
        )
        (found,) = await invariants.check(connection, invariants=promises)
        assert (found.number, found.violations) == (24, 1)
