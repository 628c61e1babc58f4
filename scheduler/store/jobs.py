"""Jobs as clients see them: rows read, accepted and cancelled on behalf of their owners.

Starting and settling them is the loop's, in `dispatch` and `endings`. Here is also the one place that knows
how the JSON columns of a job are written: its spec, its pictures and its receipt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import asyncpg

from billing.prices import PricingSnapshot
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
from scheduler.store.accounts import AccountSettings, Visibility
from scheduler.store.moderation import Hidden
from scheduler.store.pool import Connection


class JobKind(StrEnum):
    """What the client asked for; a reroll is drawn as one of the others."""

    IMAGINE = "imagine"
    VARIATION = "variation"
    REROLL = "reroll"
    UPSCALE = "upscale"


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Return whether nothing can happen to the job any more."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, kw_only=True)
class JobReceipt:
    """What a finished job did cost and how to make the same bits again; the names of proto Receipt.

    Times are milliseconds. `endings` writes it when an attempt ends a job.
    """

    gpu_ms: int
    """Measured GPU time of the attempt that ended the job."""
    billed_gpu_ms: int
    """What was charged; 0 for relax and for failures."""
    amount_micros: int
    """What was charged beyond the plan's time, in millionths of the currency."""
    currency_code: str
    balance_before_ms: int
    """Fast time of the account just before the charge, and just after it."""
    balance_after_ms: int
    attempts: int
    worker: str
    """Slot of the last attempt; empty if none was made."""
    waited_ms: int
    encode_ms: int
    denoise_ms: int
    decode_ms: int
    upscale_ms: int = 0
    """Absent in receipts from before there were upscales."""
    reproduction: Mapping[str, Any]
    """Model, scheduler, sizes, device, versions: JSON values only."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be accepted."""

    job_id: str
    account_id: str
    kind: JobKind
    tier: Tier
    visibility: Visibility
    prompt: str
    seed_fixed: bool
    spec: RenderSpec
    pricing: PricingSnapshot
    predicted_ms: int
    source_job_id: str | None
    source_image: int | None
    uploads: int = 0
    """Pictures that came with the prompt, beside those that it names."""
    warnings: tuple[str, ...]
    traceparent: str | None = None
    """The call's span, whose children are what is done for the job; None: it is not traced."""


@dataclass(frozen=True, kw_only=True)
class StoredJob:
    """One row of a job, as it was when it was read."""

    job_id: str
    arrival: int
    account_id: str
    kind: JobKind
    tier: Tier
    visibility: Visibility
    state: JobState
    prompt: str
    seed_fixed: bool
    spec: RenderSpec
    pricing: PricingSnapshot
    predicted_ms: int
    source_job_id: str | None
    source_image: int | None
    uploads: int
    warnings: tuple[str, ...]
    cancel_wanted: bool
    event_seq: int
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    images: tuple[ImageFile, ...]
    videos: tuple[VideoFile, ...]
    latents_path: str | None
    receipt: JobReceipt | None
    failure_reason: str | None
    failure_sentence: str | None
    expired_at: datetime | None
    """Since when its pictures are gone, as its account's plan kept them no longer; None: they are not."""
    kept_until: datetime | None
    """Until when that plan keeps them; None: for ever, or there are none."""
    hidden: Hidden | None
    """That a moderator keeps it out of the feed."""
    attempt_id: str | None
    """Of the running attempt."""
    worker_id: str | None
    parked_at: datetime | None
    """Since when the running attempt's GPU is another's; None: it has it."""


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """A durable change of a job."""

    seq: int
    at: datetime
    state: JobState
    sentence: str


@dataclass(frozen=True, kw_only=True)
class LiveJobs:
    """What an account has accepted and not yet ended."""

    running: int
    waiting: int
    relax: int
    """Of either kind, in relax."""
    waiting_fast_ms: int
    """Predicted fast time of the waiting ones, after the plan's multipliers."""

    @property
    def accepted(self) -> int:
        """All of them."""
        return self.running + self.waiting


@dataclass(frozen=True, kw_only=True)
class LivePlace:
    """A live job's place among its account's: how many older ones are live."""

    ahead: int
    relax_ahead: int


@dataclass(frozen=True, kw_only=True)
class FeedPlace:
    """Where a page of the feed ended."""

    ended_at: datetime
    job_id: str


def spec_to_json(spec: RenderSpec) -> dict[str, Any]:
    """Return the spec as the `spec` column has it."""
    return asdict(spec)


def spec_from_json(document: Mapping[str, Any]) -> RenderSpec:
    """Return the spec that `spec_to_json` wrote."""
    source = document["source"]
    return RenderSpec(
        **{
            **document,
            "kind": RenderKind(document["kind"]),
            "source": None if source is None else SourceImage(**source),
            "parts": tuple(TextPart(**part) for part in document.get("parts", ())),
            "pictures": tuple(PicturePart(**part) for part in document.get("pictures", ())),
        }
    )


def images_to_json(images: Sequence[ImageFile]) -> list[dict[str, Any]]:
    """Return pictures as the `images` column has them."""
    return [asdict(image) for image in images]


def images_from_json(document: Sequence[Mapping[str, Any]]) -> tuple[ImageFile, ...]:
    """Return the pictures that `images_to_json` wrote."""
    return tuple(ImageFile(**image) for image in document)


def videos_to_json(videos: Sequence[VideoFile]) -> list[dict[str, Any]]:
    """Return videos as the `videos` column has them."""
    return [asdict(video) for video in videos]


def videos_from_json(document: Sequence[Mapping[str, Any]]) -> tuple[VideoFile, ...]:
    """Return the videos that `videos_to_json` wrote."""
    return tuple(VideoFile(**video) for video in document)


def receipt_to_json(receipt: JobReceipt) -> dict[str, Any]:
    """Return a receipt as the `receipt` column has it."""
    return asdict(receipt)


def receipt_from_json(document: Mapping[str, Any]) -> JobReceipt:
    """Return the receipt that `receipt_to_json` wrote."""
    return JobReceipt(**document)


_COLUMNS = """
    job.job_id::text, arrival, account_id, kind, tier, visibility, job.state, prompt, seed_fixed, spec,
    pricing, job.predicted_ms, source_job_id::text, source_image, uploads, warnings, cancel_wanted,
    event_seq, created_at, job.started_at, job.ended_at, images, videos, latents_path, receipt,
    failure_reason, failure_sentence, expired_at"""
_SELECT = f"""
    SELECT {_COLUMNS}, attempt.attempt_id::text, attempt.worker_id, attempt.parked_at,
           hidden_job.category AS hidden_category, hidden_at,
           CASE WHEN job.state = 'succeeded' THEN (
               SELECT job.ended_at + make_interval(hours => 24 * nullif(picture_retention_days, 0))
               FROM billing.subscription JOIN billing.plan_version USING (plan, version)
               WHERE subscription.account_id = job.account_id) END AS kept_until
    FROM scheduler.job
    LEFT JOIN scheduler.attempt ON attempt.job_id = job.job_id AND attempt.state = 'running'
    LEFT JOIN scheduler.hidden_job ON hidden_job.job_id = job.job_id"""  # noqa: S608


async def insert_job(connection: Connection, job: NewJob, sentence: str) -> StoredJob:
    """Write a waiting job and its first event, which says `sentence`."""
    # The event's number is drawn first, so that the job's row is written once and not updated at once.
    row = await connection.fetchrow(
        f"""/* insert_job */ WITH event AS (
                SELECT nextval(pg_get_serial_sequence('scheduler.job_event', 'seq')) AS seq),
            job AS (
                INSERT INTO scheduler.job (
                    job_id, account_id, kind, tier, visibility, prompt, seed_fixed, spec, pricing,
                    predicted_ms, source_job_id, source_image, warnings, uploads, traceparent, event_seq)
                SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $15, $16, seq FROM event
                RETURNING *),
            written AS (
                INSERT INTO scheduler.job_event (seq, job_id, state, sentence) OVERRIDING SYSTEM VALUE
                SELECT event_seq, job_id, state, $14 FROM job)
            SELECT {_COLUMNS}, NULL AS attempt_id, NULL AS worker_id, NULL AS parked_at,
                   NULL AS hidden_category, NULL AS hidden_at, NULL AS kept_until
            FROM job""",  # noqa: S608
        UUID(job.job_id),
        job.account_id,
        job.kind,
        job.tier,
        job.visibility,
        job.prompt,
        job.seed_fixed,
        json.dumps(spec_to_json(job.spec)),
        json.dumps(job.pricing.to_json()),
        job.predicted_ms,
        None if job.source_job_id is None else UUID(job.source_job_id),
        job.source_image,
        list(job.warnings),
        sentence,
        job.uploads,
        job.traceparent,
    )
    assert row is not None, "an INSERT with RETURNING returns its row"
    return _stored(row)


async def read_job(connection: Connection, job_id: str) -> StoredJob | None:
    """Return a job, None if there is none of that id or if it was deleted."""
    row = await connection.fetchrow(
        f"/* read_job */ {_SELECT} WHERE job.job_id = $1 AND deleted_at IS NULL", UUID(job_id)
    )
    return None if row is None else _stored(row)


async def lock_job(connection: Connection, job_id: str) -> StoredJob | None:
    """Return what `read_job` does and lock the row: it neither starts nor ends until the transaction does."""
    row = await connection.fetchrow(
        f"{_SELECT} WHERE job.job_id = $1 AND deleted_at IS NULL FOR UPDATE OF job", UUID(job_id)
    )
    return None if row is None else _stored(row)


async def list_jobs(
    connection: Connection,
    account_id: str,
    *,
    states: Sequence[JobState],
    before_arrival: int | None,
    limit: int,
) -> list[StoredJob]:
    """Return up to `limit` jobs of an account in these states (none: in any), newest first."""
    rows = await connection.fetch(
        f"""/* list_jobs */ {_SELECT} WHERE account_id = $1 AND deleted_at IS NULL
                        AND (cardinality($2::text[]) = 0 OR job.state = ANY($2))
                        AND ($3::bigint IS NULL OR arrival < $3) ORDER BY arrival DESC LIMIT $4""",
        account_id,
        [state.value for state in states],
        before_arrival,
        limit,
    )
    return [_stored(row) for row in rows]


async def feed(
    connection: Connection, *, after: FeedPlace | None, limit: int, hidden_too: bool = False
) -> list[StoredJob]:
    """Return up to `limit` finished public upscales of all accounts, newest first, from behind `after`.

    With `hidden_too` also those that a moderator keeps out of it.
    """
    rows = await connection.fetch(
        f"""{_SELECT} WHERE job.state = 'succeeded' AND visibility = 'public' AND deleted_at IS NULL
                        AND expired_at IS NULL
                        -- In the words of the index.
                        AND spec ->> 'kind' IN ('upscale_light', 'upscale_detailed', 'upscale_max')
                        -- Says no more than what follows, but so that an index can begin there.
                        AND job.ended_at <= coalesce($1::timestamptz, 'infinity')
                        AND ($1::timestamptz IS NULL OR job.ended_at < $1
                             OR (job.ended_at = $1 AND job.job_id > $2::uuid))
                        AND ($4 OR hidden_at IS NULL)
            ORDER BY job.ended_at DESC, job.job_id LIMIT $3""",
        None if after is None else after.ended_at,
        None if after is None else UUID(after.job_id),
        limit,
        hidden_too,
    )
    return [_stored(row) for row in rows]


async def with_pictures(connection: Connection, account_id: str) -> dict[int, int]:
    """Return how many pictures each job of an account has that has any, by arrival, oldest first."""
    rows = await connection.fetch(
        """SELECT arrival, jsonb_array_length(images) AS pictures FROM scheduler.job
           WHERE account_id = $1 AND state = 'succeeded' AND deleted_at IS NULL AND expired_at IS NULL
           ORDER BY arrival""",
        account_id,
    )
    return {row["arrival"]: row["pictures"] for row in rows}


async def arrival(connection: Connection, account_id: str, job_id: str) -> int | None:
    """Return a job's place among its account's, also if it was deleted since; None: there is none such."""
    place: int | None = await connection.fetchval(
        "SELECT arrival FROM scheduler.job WHERE account_id = $1 AND job_id = $2", account_id, UUID(job_id)
    )
    return place


async def pictures(connection: Connection, account_id: str, arrivals: Sequence[int]) -> list[ImageFile]:
    """Return the pictures of these jobs of an account, oldest job first; some may be gone by now."""
    rows = await connection.fetch(
        """SELECT images FROM scheduler.job
           WHERE account_id = $1 AND arrival = ANY($2::bigint[]) AND state = 'succeeded'
                 AND deleted_at IS NULL AND expired_at IS NULL ORDER BY arrival""",
        account_id,
        arrivals,
    )
    return [image for row in rows for image in images_from_json(json.loads(row["images"]))]


async def events_after(connection: Connection, job_id: str, seq: int) -> list[JobEvent]:
    """Return a job's events with numbers above `seq`, oldest first."""
    rows = await connection.fetch(
        """SELECT seq, at, state, sentence FROM scheduler.job_event
           WHERE job_id = $1 AND seq > $2 ORDER BY seq""",
        UUID(job_id),
        seq,
    )
    return [
        JobEvent(seq=row["seq"], at=row["at"], state=JobState(row["state"]), sentence=row["sentence"])
        for row in rows
    ]


async def settings_and_live_jobs(
    connection: Connection, account_id: str
) -> tuple[AccountSettings, LiveJobs] | None:
    """Return an account's settings and its live jobs in one round trip, None if there is no such account."""
    row = await connection.fetchrow(
        """SELECT account_id, mode, account.visibility, blocked,
                  count(*) FILTER (WHERE state = 'running') AS running,
                  count(*) FILTER (WHERE state = 'queued') AS waiting,
                  count(*) FILTER (WHERE tier = 'relax') AS relax,
                  coalesce(sum(ceil(predicted_ms * coalesce(pricing ->> 'dearest_bp',
                                                            pricing ->> 'multiplier_bp')::numeric / 10000))
                           FILTER (WHERE state = 'queued' AND tier = 'fast'), 0)::bigint AS waiting_fast_ms
           FROM scheduler.account LEFT JOIN (
                SELECT * FROM scheduler.job
                WHERE account_id = $1 AND NOT past AND state IN ('queued', 'running')) live
                USING (account_id)
           WHERE account_id = $1 GROUP BY account_id""",
        account_id,
    )
    if row is None:
        return None
    settings = AccountSettings(
        account_id=account_id,
        mode=Tier(row["mode"]),
        visibility=Visibility(row["visibility"]),
        blocked=row["blocked"],
    )
    live = LiveJobs(
        running=row["running"],
        waiting=row["waiting"],
        relax=row["relax"],
        waiting_fast_ms=row["waiting_fast_ms"],
    )
    return settings, live


async def owner(connection: Connection, job_id: str) -> str | None:
    """Return the account of a job, deleted or not; None if there is none of that id."""
    account_id: str | None = await connection.fetchval(
        "SELECT account_id FROM scheduler.job WHERE job_id = $1", UUID(job_id)
    )
    return account_id


async def live_jobs(connection: Connection, account_id: str) -> list[str]:
    """Return the jobs of an account that wait or run, by id."""
    rows = await connection.fetch(
        """SELECT job_id::text FROM scheduler.job
           WHERE account_id = $1 AND NOT past AND state IN ('queued', 'running') ORDER BY job_id""",
        account_id,
    )
    return [row["job_id"] for row in rows]


async def live_places(connection: Connection, job_ids: Sequence[str]) -> dict[str, LivePlace]:
    """Return how many older jobs of its account are live, for each of these that exists."""
    rows = await connection.fetch(
        """SELECT job.job_id::text, count(older.job_id) AS ahead,
                  count(older.job_id) FILTER (WHERE older.tier = 'relax') AS relax_ahead
           FROM scheduler.job LEFT JOIN scheduler.job older
                ON older.account_id = job.account_id AND older.arrival < job.arrival
                   AND NOT older.past AND older.state IN ('queued', 'running')
           WHERE job.job_id = ANY($1::uuid[]) GROUP BY job.job_id""",
        [UUID(job_id) for job_id in job_ids],
    )
    return {row["job_id"]: LivePlace(ahead=row["ahead"], relax_ahead=row["relax_ahead"]) for row in rows}


async def waiting(connection: Connection, at_most: int) -> int:
    """Return how many jobs wait, counting no further than `at_most`."""
    count: int = await connection.fetchval(
        """SELECT count(*) FROM
               (SELECT FROM scheduler.job WHERE NOT past AND state = 'queued' LIMIT $1) counted""",
        at_most,
    )
    return count


async def waiting_in_tier(connection: Connection, tier: Tier, at_most: int) -> int:
    """Return how many jobs wait in a tier, counting no further than `at_most`."""
    count: int = await connection.fetchval(
        """SELECT count(*) FROM
               (SELECT FROM scheduler.job
                WHERE NOT past AND state = 'queued' AND tier = $1 LIMIT $2) counted""",
        tier,
        at_most,
    )
    return count


async def cancel_waiting(connection: Connection, job_id: str, receipt: JobReceipt, sentence: str) -> None:
    """End a waiting job, whose row the caller has locked, and write its last event, which says `sentence`."""
    done = await connection.execute(
        """WITH event AS (
               INSERT INTO scheduler.job_event (job_id, state, sentence) VALUES ($1, 'cancelled', $2)
               RETURNING seq)
           UPDATE scheduler.job
           SET state = 'cancelled', ended_at = now(), receipt = $3, event_seq = event.seq, noticed_epoch = 0,
               checkpoint = NULL
           FROM event WHERE job_id = $1 AND NOT past AND state = 'queued'""",
        UUID(job_id),
        sentence,
        json.dumps(receipt_to_json(receipt)),
    )
    assert done == "UPDATE 1", "the caller locked a waiting job"


async def move_waiting(
    connection: Connection, job_id: str, tier: Tier, pricing: PricingSnapshot, sentence: str
) -> None:
    """Put a waiting job, whose row the caller has locked, in `tier` on these terms, with an event.

    It loses its checkpoint: what was drawn in relax would be charged as fast, and what was drawn in fast
    would be free. Should the scheduler not be told, its sweep finds the row: it counts as one nobody has
    noticed.
    """
    done = await connection.execute(
        """WITH event AS (
               INSERT INTO scheduler.job_event (job_id, state, sentence) VALUES ($1, 'queued', $4)
               RETURNING seq)
           UPDATE scheduler.job
           SET tier = $2, pricing = $3, event_seq = event.seq, noticed_epoch = 0, checkpoint = NULL
           FROM event WHERE job_id = $1 AND NOT past AND state = 'queued'""",
        UUID(job_id),
        tier,
        json.dumps(pricing.to_json()),
        sentence,
    )
    assert done == "UPDATE 1", "the caller locked a waiting job"


async def want_cancel(connection: Connection, job_id: str) -> None:
    """Remember that the owner of a running job, whose row the caller has locked, wants it to end."""
    await connection.execute(
        "UPDATE scheduler.job SET cancel_wanted = true WHERE job_id = $1 AND NOT past", UUID(job_id)
    )


async def consent_to_overage(
    connection: Connection, account_id: str, micros_per_minute: int, currency: str
) -> None:
    """Put the account's new consent, at this price, into the terms of its waiting fast jobs that lack one.

    The caller has locked the account. Those that have a consent keep it, at the price it was given for; and a
    consent that is withdrawn changes no accepted job.
    """
    await connection.execute(
        """UPDATE scheduler.job
           SET pricing = pricing || jsonb_build_object('overage_allowed', true, 'overage_micros_per_minute',
           $2::bigint, 'currency', $3::text)
           WHERE account_id = $1 AND NOT past AND state = 'queued' AND tier = 'fast'
                 AND NOT (pricing ->> 'overage_allowed')::boolean""",
        account_id,
        micros_per_minute,
        currency,
    )


def _stored(row: asyncpg.Record) -> StoredJob:
    return StoredJob(
        job_id=row["job_id"],
        arrival=row["arrival"],
        account_id=row["account_id"],
        kind=JobKind(row["kind"]),
        tier=Tier(row["tier"]),
        visibility=Visibility(row["visibility"]),
        state=JobState(row["state"]),
        prompt=row["prompt"],
        seed_fixed=row["seed_fixed"],
        spec=spec_from_json(json.loads(row["spec"])),
        pricing=PricingSnapshot.from_json(json.loads(row["pricing"])),
        predicted_ms=row["predicted_ms"],
        source_job_id=row["source_job_id"],
        source_image=row["source_image"],
        uploads=row["uploads"],
        warnings=tuple(row["warnings"]),
        cancel_wanted=row["cancel_wanted"],
        event_seq=row["event_seq"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        images=() if row["images"] is None else images_from_json(json.loads(row["images"])),
        videos=() if row["videos"] is None else videos_from_json(json.loads(row["videos"])),
        latents_path=row["latents_path"],
        receipt=None if row["receipt"] is None else receipt_from_json(json.loads(row["receipt"])),
        failure_reason=row["failure_reason"],
        failure_sentence=row["failure_sentence"],
        expired_at=row["expired_at"],
        kept_until=row["kept_until"],
        hidden=None
        if row["hidden_at"] is None
        else Hidden(category=row["hidden_category"], at=row["hidden_at"]),
        attempt_id=row["attempt_id"],
        worker_id=row["worker_id"],
        parked_at=row["parked_at"],
    )
