"""What the front door keeps in PostgreSQL, and how it borrows connections."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime

import asyncpg
import pytest

from billing import accounts as ledger_accounts
from billing.prices import ChargeMode, PricingSnapshot
from gpu_worker.contract import (
    ImageFile,
    PicturePart,
    RenderKind,
    RenderSpec,
    SourceImage,
    TextPart,
    VideoFile,
)
from scheduler.policy.ids import Tier
from scheduler.refusals import Overloaded
from scheduler.store import accounts, jobs
from scheduler.store.accounts import Role, Visibility
from scheduler.store.bootstrap import ensure_admin_key
from scheduler.store.jobs import JobKind, JobReceipt, JobState, LivePlace, NewJob, StoredJob
from scheduler.store.pool import Pool, open_pool

AT = datetime(2026, 11, 10, tzinfo=UTC)
SPEC = RenderSpec(
    kind=RenderKind.VARIATION,
    model="stand-in",
    prompt="a fox",
    width=256,
    height=320,
    steps=20,
    guidance_milli=5_000,
    seed=7,
    source=SourceImage(job_id="j", index=2, latents_path="l", strength_permille=500),
)
PRICING = PricingSnapshot(
    plan="standard",
    plan_version=1,
    charge_mode=ChargeMode.FAST,
    multiplier_bp=15_000,
    overage_allowed=False,
    overage_micros_per_minute=0,
    currency="USD",
)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database, 2)
    yield pool
    await pool.close()


async def test_what_a_transaction_wrote_stays_and_what_a_rehearsal_wrote_does_not(pool: Pool) -> None:
    insert = "INSERT INTO scheduler.stray_picture VALUES ($1)"
    async with pool.transaction() as connection:
        await connection.execute(insert, "kept")
    async with pool.rehearsal() as connection:
        await connection.execute(insert, "dropped")

    async def fail_behind_an_insert() -> None:
        async with pool.transaction() as connection:
            await connection.execute(insert, "rolled back")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail_behind_an_insert()
    async with pool.reading() as connection:
        assert await connection.fetchval("SELECT array_agg(path) FROM scheduler.stray_picture") == ["kept"]


async def test_a_cancelled_borrower_leaves_no_transaction_behind(pool: Pool) -> None:
    entered = asyncio.Event()

    async def hold() -> None:
        async with pool.transaction() as connection:
            await connection.execute("INSERT INTO scheduler.stray_picture VALUES ('half')")
            entered.set()
            await asyncio.Event().wait()

    holder = asyncio.create_task(hold())
    await entered.wait()
    holder.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holder
    for _ in range(2):  # both connections of the pool
        async with pool.transaction() as connection:
            assert await connection.fetchval("SELECT count(*) FROM scheduler.stray_picture") == 0


async def test_a_database_that_is_not_there_is_overloaded_and_a_wrong_statement_is_a_bug(pool: Pool) -> None:
    with pytest.raises(Overloaded):
        await open_pool("postgresql://postgres@/postgres?host=/nowhere", 2)
    with pytest.raises(asyncpg.UndefinedTableError):
        async with pool.reading() as connection:
            await connection.execute("SELECT FROM nonsense")


async def test_connections_carry_a_name_and_waits_are_observed(pool: Pool) -> None:
    waits: list[float] = []
    pool.observe_waits(waits.append)
    async with pool.reading() as connection:
        assert await connection.fetchval("SHOW application_name") == "darkroom frontdoor"
        assert (pool.used, pool.most) == (1, 2)
    assert len(waits) == 1


async def test_the_first_start_makes_one_admin_key_however_many_start(database: str) -> None:
    connections = [await asyncpg.connect(database) for _ in range(3)]
    keys = await asyncio.gather(*(ensure_admin_key(connection, AT) for connection in connections))
    (secret,) = [key for key in keys if key is not None]
    (found,) = (await accounts.find_keys(connections[0], [secret.split("_")[1]])).values()
    assert (found.account_id, found.role) == ("admin", Role.ADMIN)
    assert found.secret_hash == accounts.hash_secret(secret.split("_")[2])
    assert await ensure_admin_key(connections[0], AT) is None
    await connections[0].execute("UPDATE scheduler.api_key SET revoked_at = now()")
    assert await ensure_admin_key(connections[0], AT) is not None
    for connection in connections:
        await connection.close()


async def test_an_admin_key_made_anew_replaces_those_that_services_made_and_no_others(
    connection: asyncpg.Connection,
) -> None:
    first = await ensure_admin_key(connection, AT)
    assert first is not None
    persons = await accounts.create_key(connection, "admin", Role.ADMIN)
    second = await ensure_admin_key(connection, AT, anew=True)
    assert second is not None
    ids = [secret.split("_")[1] for secret in (first, persons.secret, second)]
    assert (await accounts.find_keys(connection, ids)).keys() == set(ids[1:])
    events = await connection.fetch(
        "SELECT action, target FROM billing.audit_event WHERE actor = 'service' ORDER BY audit_id"
    )
    assert [(event["action"], event["target"].rpartition("/")[2]) for event in events] == [
        ("CreateApiKey", first.split("_")[1]),
        ("RevokeApiKey", first.split("_")[1]),
        ("CreateApiKey", second.split("_")[1]),
    ]


async def test_a_job_is_read_as_it_was_written(connection: asyncpg.Connection) -> None:
    written = await _a_job(connection, "ann")
    assert await jobs.read_job(connection, written.job_id) == written
    assert (written.spec, written.pricing) == (SPEC, PRICING)
    assert written.warnings == ("too long",)
    (event,) = await jobs.events_after(connection, written.job_id, 0)
    assert (event.seq, event.state, event.sentence) == (written.event_seq, JobState.QUEUED, "Accepted.")
    assert await jobs.read_job(connection, str(uuid.uuid4())) is None


def test_pictures_and_receipts_survive_their_columns() -> None:
    image = ImageFile(
        index=1,
        path="p",
        file_name="f",
        content_type="image/png",
        size_bytes=3,
        sha256="s",
        width=1,
        height=2,
        seed=4,
    )
    assert jobs.images_from_json(jobs.images_to_json([image])) == (image,)
    video = VideoFile(
        path="p",
        file_name="f",
        content_type="video/mp4",
        size_bytes=3,
        sha256="s",
        width=1,
        height=2,
        frames=4,
    )
    assert jobs.videos_from_json(jobs.videos_to_json([video])) == (video,)
    receipt = JobReceipt(
        gpu_ms=1,
        billed_gpu_ms=2,
        amount_micros=3,
        currency_code="USD",
        balance_before_ms=4,
        balance_after_ms=5,
        attempts=6,
        worker="w",
        waited_ms=7,
        encode_ms=8,
        denoise_ms=9,
        decode_ms=10,
        upscale_ms=11,
        reproduction={"a": [1]},
    )
    document = jobs.receipt_to_json(receipt)
    assert jobs.receipt_from_json(document) == receipt
    del document["upscale_ms"]  # as a release before upscales wrote it
    assert jobs.receipt_from_json(document) == replace(receipt, upscale_ms=0)


def test_specs_survive_their_column_also_those_of_an_older_release() -> None:
    spec = replace(
        SPEC,
        parts=(TextPart(text="a fox", share_ppm=400_000), TextPart(text="rain", share_ppm=-100_000)),
        pictures=(PicturePart(path="pictures/x.png", share_ppm=500_000),),
        stop_percent=80,
        video=True,
    )
    document = json.loads(json.dumps(jobs.spec_to_json(spec)))
    assert jobs.spec_from_json(document) == spec
    for name in ("parts", "pictures", "stop_percent", "video"):
        del document[name]
    del document["source"]["picture_path"]
    assert jobs.spec_from_json(document) == SPEC


@pytest.mark.unsound(22)
async def test_live_jobs_are_counted_by_what_they_are(connection: asyncpg.Connection) -> None:
    await _a_job(connection, "ann")
    relax = await _a_job(connection, "ann", tier=Tier.RELAX)
    running = await _a_job(connection, "ann")
    await connection.execute(
        "UPDATE scheduler.job SET state = 'running' WHERE job_id = $1", uuid.UUID(running.job_id)
    )
    cancelled = await _a_job(connection, "ann")
    await connection.execute(
        "UPDATE scheduler.job SET state = 'cancelled', ended_at = now() WHERE job_id = $1",
        uuid.UUID(cancelled.job_id),
    )
    await _a_job(connection, "ben")
    found = await jobs.settings_and_live_jobs(connection, "ann")
    assert found is not None
    settings, live = found
    assert (settings.mode, settings.visibility, settings.blocked) == (Tier.FAST, Visibility.PUBLIC, False)
    assert (live.accepted, live.running, live.waiting, live.relax) == (3, 1, 2, 1)
    assert live.waiting_fast_ms == 1_502  # 1,001 ms at one and a half, rounded up
    places = await jobs.live_places(connection, [relax.job_id, cancelled.job_id])
    assert places == {
        relax.job_id: LivePlace(ahead=1, relax_ahead=0),
        cancelled.job_id: LivePlace(ahead=3, relax_ahead=1),
    }
    assert await jobs.settings_and_live_jobs(connection, "zoe") is None


async def test_waiting_jobs_are_counted_no_further_than_asked(connection: asyncpg.Connection) -> None:
    for _ in range(4):
        await _a_job(connection, "ann")
    assert await jobs.waiting_in_tier(connection, Tier.FAST, 100) == 4
    assert await jobs.waiting_in_tier(connection, Tier.FAST, 3) == 3
    assert await jobs.waiting_in_tier(connection, Tier.RELAX, 100) == 0


def test_a_role_includes_those_before_it() -> None:
    assert [
        role.reaches(Role.OPERATOR) for role in (Role.USER, Role.MODERATOR, Role.OPERATOR, Role.ADMIN)
    ] == [
        False,
        False,
        True,
        True,
    ]


async def _a_job(connection: asyncpg.Connection, account_id: str, tier: Tier = Tier.FAST) -> StoredJob:
    if await accounts.settings(connection, account_id) is None:
        await ledger_accounts.create(connection, account_id, "standard", AT)
        await accounts.create_account(connection, account_id)
    job = NewJob(
        job_id=str(uuid.uuid4()),
        account_id=account_id,
        kind=JobKind.VARIATION,
        tier=tier,
        visibility=Visibility.PUBLIC,
        prompt="a fox --seed 7",
        seed_fixed=True,
        spec=SPEC,
        pricing=PRICING,
        predicted_ms=1_001,
        source_job_id=None,
        source_image=None,
        warnings=("too long",),
    )
    return await jobs.insert_job(connection, job, "Accepted.")
