"""The end of an attempt, in one transaction:
attempt closed, charge posted or voided, job moved, usage corrected.

An attempt is closed only where its id, its token and the state `running` still match; a result that matches
no such row came from a worker that was given up, and counts for nothing. Settling the same attempt again
returns what was done the first time.

GPU time is conserved: what an attempt's job had in its checkpoint when it started, and what it took since,
is used, absorbed, or in the checkpoint that its job goes on from. The one thing it leaves out: what is in the
checkpoint of a waiting job is dropped when its owner cancels the job or moves it to the other tier. Nobody is
charged for it, and no settlement tells of it, because no attempt ends then.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import asyncpg

from billing import accounts as billing_accounts
from billing import ledger
from billing.accounts import Terms
from billing.prices import PricingSnapshot
from gpu_worker.contract import ImageFile, StageTimes, VideoFile
from scheduler.clock import from_ms
from scheduler.estimator import Observation, observation
from scheduler.policy import retry
from scheduler.policy.ids import JobId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.store import estimates
from scheduler.store.checkpoints import checkpoint_from_json
from scheduler.store.dispatch import record_events
from scheduler.store.jobs import (
    JobReceipt,
    images_to_json,
    receipt_to_json,
    spec_from_json,
    videos_to_json,
)
from scheduler.store.leadership import require_leader
from scheduler.store.shares import correction_of, lock_shares

REFUSED_VALUE = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
"""What the database raises about a value of one row, not about itself."""


class Verdict(StrEnum):
    """What an attempt came to; the states an attempt's row can end in."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


@dataclass(frozen=True, kw_only=True)
class AttemptEnd:
    """What is claimed about the end of an attempt."""

    attempt_id: str
    token: str
    incarnation: str | None = None
    """The life of the worker that reported it; None: no worker did, it was given up."""
    verdict: Verdict
    gpu_ms: int | None
    """Measured of this attempt alone; None for a lost one, which counts with the time it had its GPU."""
    redone_ms: int = 0
    """Measured, and spent on what a checkpoint should have spared: nobody is charged for it."""
    kept: StageTimes = field(default_factory=StageTimes)
    """Of earlier attempts, in the checkpoint that it went on from: charged with it."""
    counts: bool = True
    """False: no worker ever took it, or it was handed over or ran out of memory, so a loss counts against
    nobody."""
    outgrew_bytes: int = 0
    """All the memory of its worker, which was too little for it; 0: it did not run out of any."""
    worker_at_fault: bool = False
    """The loss counts against the worker's slot."""
    times: StageTimes = field(default_factory=StageTimes)
    device: str = ""
    """Device type and speed of the worker that measured it, from which costs are learned; empty: of none."""
    speed_permille: int = 1000
    images: tuple[ImageFile, ...] = ()
    videos: tuple[VideoFile, ...] = ()
    latents_path: str | None = None
    reproduction: Mapping[str, Any] = field(default_factory=dict)
    failure_reason: str | None = None
    sentence: str = ""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What the database says about the attempt now."""

    attempt_id: str
    job_id: str
    account_id: str
    tier: Tier
    plan: str
    worker_id: str
    verdict: Verdict
    job_state: str
    event_seq: int
    gpu_ms: int
    """Executed and not wasted: what usage was corrected to."""
    absorbed_ms: int
    due_ms: int
    """What its measured time costs its account, after its multiplier."""
    billed_ms: int
    released_ms: int
    """Held for it, after its multiplier, and given back."""
    thresholds: tuple[int, ...] = ()
    """Percents of the account's fast time in this period that are used up with it."""
    counts_as_loss: bool = False
    set_aside_until: datetime | None = None
    """The worker's slot lost so many jobs in a row that it gets none until then."""
    repeated: bool = False
    """It was settled before: of what it came to only `gpu_ms` is told again, and no price."""


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """No running attempt has this id and token, and none ended with them: the claim counts for nothing."""

    attempt_id: str


async def settle_attempts(
    connection: asyncpg.Connection,
    *,
    epoch: int,
    ends: Sequence[AttemptEnd],
    parameters: Parameters,
    now_ms: int,
) -> list[Settled | Unknown]:
    """Settle a batch in one transaction; outcomes in the order of `ends`.

    Locks the leader row in share mode, then what the ledger locks, then attempts and jobs. Raises Deposed.
    """
    at = from_ms(now_ms)
    async with connection.transaction():
        await require_leader(connection, epoch)
        # A cancel takes the account's lock before it marks a job, and a migration takes no lock but the
        # attempt's; what is read under both locks stays true.
        locked = await billing_accounts.lock(connection, await _accounts(connection, ends), at)
        rows = {
            attempt_id: row
            for attempt_id, row in (await _attempt_rows(connection, ends)).items()
            if row["state"] != "migrated"  # its run is another attempt's
        }
        # A repeat of what was settled before, or a second claim in the same batch, changes nothing.
        fresh: dict[str, AttemptEnd] = {}
        for end in ends:
            row = rows.get(end.attempt_id)
            if row is not None and row["state"] == "running" and end.attempt_id not in fresh:
                fresh[end.attempt_id] = end
        closed = {
            settled.attempt_id: settled
            for settled in await _close(connection, list(fresh.values()), rows, locked, parameters, at)
        }
    return [
        closed.get(end.attempt_id) or _settled_before(rows[end.attempt_id])
        if end.attempt_id in rows
        else Unknown(attempt_id=end.attempt_id)
        for end in ends
    ]


async def _accounts(connection: asyncpg.Connection, ends: Sequence[AttemptEnd]) -> list[str]:
    rows = await connection.fetch(
        """SELECT DISTINCT account_id FROM scheduler.attempt JOIN scheduler.job USING (job_id)
           WHERE attempt_id = ANY($1::uuid[]) AND NOT past""",
        [end.attempt_id for end in ends],
    )
    return [row["account_id"] for row in rows]


async def _attempt_rows(
    connection: asyncpg.Connection, ends: Sequence[AttemptEnd]
) -> dict[str, asyncpg.Record]:
    """Lock the attempts that the ends name rightly, and return them with their jobs."""
    rows = await _rows_of_jobs(connection, ends, "NOT past")
    # Settled so long ago that its job has moved, and claimed again all the same; or nobody's.
    others = [end for end in ends if end.attempt_id not in rows]
    return {**rows, **await _rows_of_jobs(connection, others, "past")} if others else rows


async def _rows_of_jobs(
    connection: asyncpg.Connection, ends: Sequence[AttemptEnd], which: str
) -> dict[str, asyncpg.Record]:
    rows = await connection.fetch(
        f"""SELECT attempt.attempt_id::text, attempt.job_id::text, attempt.number, attempt.state,
                  attempt.worker_id, attempt.started_at, attempt.predicted_ms, attempt.charged_at_ms,
                  attempt.weight_milli, attempt.gpu_ms, attempt.parked_at, attempt.parked_ms,
                  attempt.drawn_at, attempt.kept_ms, attempt.counts_as_loss, job.account_id, job.tier,
                  job.pricing, job.spec, job.checkpoint, job.state AS job_state, job.event_seq,
                  job.cancel_wanted, job.losses,
                  job.created_at, job.started_at AS job_started_at,
                  -- Asked once: behind an old transaction the row has many versions to go through.
                  (SELECT decay_origin_ms FROM scheduler.cell WHERE tier = 'relax') AS decay_origin_ms
           FROM unnest($1::uuid[], $2::uuid[]) AS claim (attempt_id, token)
           JOIN scheduler.attempt USING (attempt_id, token)
           JOIN scheduler.job USING (job_id)
           WHERE {which}
           ORDER BY attempt.attempt_id FOR NO KEY UPDATE OF attempt""",  # noqa: S608
        [end.attempt_id for end in ends],
        [end.token for end in ends],
    )
    return {row["attempt_id"]: row for row in rows}


def _settled_before(row: asyncpg.Record) -> Settled:
    return Settled(
        attempt_id=row["attempt_id"],
        job_id=row["job_id"],
        account_id=row["account_id"],
        tier=Tier(row["tier"]),
        plan=json.loads(row["pricing"])["plan"],
        worker_id=row["worker_id"],
        verdict=Verdict(row["state"]),
        job_state=row["job_state"],
        event_seq=row["event_seq"],
        gpu_ms=row["gpu_ms"] or 0,
        absorbed_ms=0,
        due_ms=0,
        billed_ms=0,
        released_ms=0,
        counts_as_loss=row["counts_as_loss"],
        repeated=True,
    )


@dataclass(frozen=True, kw_only=True)
class _Closing:
    """One attempt's end, judged."""

    end: AttemptEnd
    row: asyncpg.Record
    verdict: Verdict
    job_state: str
    used_ms: int
    """With what was kept of earlier attempts."""
    absorbed_ms: int
    goes_on: bool
    """The job waits again, and has a checkpoint to go on from."""

    @property
    def counts_as_loss(self) -> bool:
        """Whether it is one of the few losses a job may have."""
        return _counts_as_loss(self.verdict, self.end, self.row)

    @property
    def teaches(self) -> bool:
        """Whether it shows what such a job takes."""
        return self.verdict is Verdict.SUCCEEDED and self.end.device != ""

    @property
    def kept(self) -> StageTimes:
        """What of `used_ms` earlier attempts took."""
        return self.end.kept if self.verdict in _PAID else StageTimes()

    @property
    def ending(self) -> ledger.Ending:
        """Whether its hold is posted or voided."""
        return ledger.Ending.POST if self.verdict in _PAID else ledger.Ending.VOID


_PAID = (Verdict.SUCCEEDED, Verdict.CANCELLED)


def _counts_as_loss(verdict: Verdict, end: AttemptEnd, row: asyncpg.Record) -> bool:
    # A parked run sat still: it is not what its worker died of.
    return verdict is Verdict.LOST and end.counts and row["parked_at"] is None


def _judge(end: AttemptEnd, row: asyncpg.Record, parameters: Parameters, at: datetime) -> _Closing:
    verdict = end.verdict
    if verdict is Verdict.CANCELLED and not row["cancel_wanted"]:
        verdict = Verdict.LOST  # it was stopped by us, not by its owner: not paid for, and done again
    measured_ms = _on_gpu_ms(row, at) if end.gpu_ms is None else end.gpu_ms
    job_state = verdict.value
    used_ms, goes_on_from = 0, None
    if verdict in _PAID:
        used_ms = end.kept.gpu_ms + measured_ms
    elif verdict is Verdict.LOST:
        # A lost attempt of a job whose owner no longer wants it is not tried again.
        job_state = "cancelled" if row["cancel_wanted"] else "queued"
        losses = row["losses"] + _counts_as_loss(verdict, end, row)
        if job_state == "queued" and retry.give_up_reason(losses, parameters) is None:
            goes_on_from = checkpoint_from_json(row["checkpoint"])
    kept_on_ms = 0 if goes_on_from is None else goes_on_from.kept.gpu_ms
    return _Closing(
        end=end,
        row=row,
        verdict=verdict,
        job_state=job_state,
        used_ms=used_ms,
        # Times of several clocks: a checkpoint may have kept a little more than was seen to pass.
        absorbed_ms=max(0, row["kept_ms"] + measured_ms + end.redone_ms - used_ms - kept_on_ms),
        goes_on=goes_on_from is not None,
    )


def _on_gpu_ms(row: asyncpg.Record, at: datetime) -> int:
    """Return how long an attempt had its worker's GPU."""
    until = row["parked_at"] or row["drawn_at"] or at
    held_ms: int = (until - row["started_at"]) // timedelta(milliseconds=1) - row["parked_ms"]
    return max(0, held_ms)


async def _close(
    connection: asyncpg.Connection,
    ends: Sequence[AttemptEnd],
    rows: Mapping[str, asyncpg.Record],
    locked: Mapping[str, Terms],
    parameters: Parameters,
    at: datetime,
) -> list[Settled]:
    if not ends:
        return []
    closings = [_judge(end, rows[end.attempt_id], parameters, at) for end in ends]
    charges = await ledger.settle(
        connection,
        [
            ledger.Settlement(
                job_id=closing.row["job_id"],
                attempt_id=closing.end.attempt_id,
                account_id=closing.row["account_id"],
                tier=closing.row["tier"],
                ending=closing.ending,
                measured_ms=closing.used_ms,
                absorbed_ms=closing.absorbed_ms,
                pricing=PricingSnapshot.from_json(json.loads(closing.row["pricing"])),
                at=at,
            )
            for closing in closings
        ],
        locked=locked,
    )
    await _close_attempts(connection, closings, at)
    await _move_jobs(connection, closings, charges, at)
    await _correct_usage(connection, closings, parameters)
    sequences = await record_events(
        connection,
        [
            (closing.row["job_id"], closing.job_state, _sentence(closing) + _used_up(charge))
            for closing, charge in zip(closings, charges, strict=True)
        ],
        at,
    )
    set_aside = await _count_losses(connection, closings, at)
    await estimates.learn(connection, [_observed(c) for c in closings if c.teaches])
    return [
        Settled(
            attempt_id=closing.end.attempt_id,
            job_id=closing.row["job_id"],
            account_id=closing.row["account_id"],
            tier=Tier(closing.row["tier"]),
            plan=json.loads(closing.row["pricing"])["plan"],
            worker_id=closing.row["worker_id"],
            verdict=closing.verdict,
            job_state=closing.job_state,
            event_seq=sequences[closing.row["job_id"]],
            gpu_ms=closing.used_ms,
            absorbed_ms=closing.absorbed_ms,
            due_ms=charge.due_ms,
            billed_ms=charge.billed_ms,
            released_ms=charge.released_ms,
            thresholds=charge.thresholds,
            counts_as_loss=closing.counts_as_loss,
            set_aside_until=set_aside.get(closing.row["worker_id"]),
        )
        for closing, charge in zip(closings, charges, strict=True)
    ]


def _observed(closing: _Closing) -> Observation:
    end = closing.end
    return observation(
        spec_from_json(json.loads(closing.row["spec"])),
        closing.kept + end.times,
        device=end.device,
        speed_permille=end.speed_permille,
    )


def _sentence(closing: _Closing) -> str:
    match closing.job_state:
        case "queued":
            goes_on = ", and goes on from where it was saved last" if closing.goes_on else ""
            larger = " for a GPU with more memory" if closing.end.outgrew_bytes else ""
            return (
                f"{closing.end.sentence or 'The GPU worker was lost.'} "
                f"The job waits at its old place{larger}{goes_on}. It costs nothing so far."
            )
        case "cancelled":
            return "Cancelled while it ran."
        case "failed":
            return closing.end.sentence
        case _:
            return "Done."


def _used_up(charge: ledger.Settled) -> str:
    if not charge.thresholds:
        return ""
    return f" With it, {charge.thresholds[-1]} % of the fast time of this period are used."


async def _close_attempts(connection: asyncpg.Connection, closings: Sequence[_Closing], at: datetime) -> None:
    done = await connection.execute(
        """/* close_attempts */ UPDATE scheduler.attempt
           SET state = new.state, ended_at = $5, gpu_ms = new.gpu_ms, times = new.times,
               kept_ms = new.kept_ms, parked_at = NULL, counts_as_loss = new.counts_as_loss,
               reported_token = new.token, reported_incarnation = new.incarnation
           FROM unnest($1::uuid[], $2::text[], $3::integer[], $4::jsonb[], $6::integer[], $7::uuid[],
                       $8::text[], $9::boolean[])
                AS new (attempt_id, state, gpu_ms, times, kept_ms, token, incarnation, counts_as_loss)
           WHERE attempt.attempt_id = new.attempt_id AND attempt.state = 'running'""",
        [closing.end.attempt_id for closing in closings],
        [closing.verdict.value for closing in closings],
        [closing.used_ms for closing in closings],
        [json.dumps(asdict(closing.end.times)) for closing in closings],
        at,
        [closing.kept.gpu_ms for closing in closings],
        [closing.end.token for closing in closings],
        [closing.end.incarnation for closing in closings],
        [closing.counts_as_loss for closing in closings],
    )
    # They were read as running in this transaction, and are locked since.
    assert done == f"UPDATE {len(closings)}", f"{done}, not {len(closings)}: two settlements of one attempt"


async def _move_jobs(
    connection: asyncpg.Connection,
    closings: Sequence[_Closing],
    charges: Sequence[ledger.Settled],
    at: datetime,
) -> None:
    await connection.execute(
        """UPDATE scheduler.job
           SET state = new.state,
               ended_at = CASE WHEN new.state = 'queued' THEN NULL ELSE $8::timestamptz END,
               images = new.images, videos = new.videos, latents_path = new.latents_path,
               receipt = new.receipt, losses = job.losses + new.losses,
               failure_reason = new.failure_reason, failure_sentence = new.failure_sentence,
               -- Not what was read: a newer one may be there by now.
               checkpoint = CASE WHEN new.goes_on THEN job.checkpoint END,
               memory_above_bytes = greatest(job.memory_above_bytes, new.outgrew_bytes)
           FROM unnest($1::uuid[], $2::text[], $3::jsonb[], $4::text[], $5::jsonb[], $6::smallint[],
                       $7::text[], $9::text[], $10::boolean[], $11::jsonb[], $12::bigint[])
                AS new (job_id, state, images, latents_path, receipt, losses, failure_reason,
                        failure_sentence, goes_on, videos, outgrew_bytes)
           WHERE job.job_id = new.job_id AND NOT past""",
        [closing.row["job_id"] for closing in closings],
        [closing.job_state for closing in closings],
        [_if_state(c, "succeeded", json.dumps(images_to_json(c.end.images))) for c in closings],
        [_if_state(c, "succeeded", c.end.latents_path) for c in closings],
        [
            None if closing.job_state == "queued" else json.dumps(receipt_to_json(_receipt(closing, charge)))
            for closing, charge in zip(closings, charges, strict=True)
        ],
        [int(closing.counts_as_loss) for closing in closings],
        [_if_state(c, "failed", c.end.failure_reason or "ENGINE_ERROR") for c in closings],
        at,
        [_if_state(c, "failed", c.end.sentence) for c in closings],
        [closing.goes_on for closing in closings],
        [_if_state(c, "succeeded", _videos(c.end.videos)) for c in closings],
        [closing.end.outgrew_bytes for closing in closings],
    )


def _videos(videos: Sequence[VideoFile]) -> str | None:
    return json.dumps(videos_to_json(videos)) if videos else None


def _if_state(closing: _Closing, state: str, value: str | None) -> str | None:
    return value if closing.job_state == state else None


def _receipt(closing: _Closing, charge: ledger.Settled) -> JobReceipt:
    waited = closing.row["job_started_at"] - closing.row["created_at"]
    times = closing.kept + closing.end.times
    return JobReceipt(
        gpu_ms=closing.used_ms,
        billed_gpu_ms=charge.billed_ms,
        amount_micros=charge.amount_micros,
        currency_code=charge.currency,
        balance_before_ms=charge.balance_before_ms,
        balance_after_ms=charge.balance_after_ms,
        attempts=closing.row["number"],
        worker=closing.row["worker_id"],
        waited_ms=max(0, waited // timedelta(milliseconds=1)),
        encode_ms=times.encode_ms,
        denoise_ms=times.denoise_ms,
        decode_ms=times.decode_ms,
        reproduction=closing.end.reproduction,
        upscale_ms=times.upscale_ms,
    )


async def _correct_usage(
    connection: asyncpg.Connection, closings: Sequence[_Closing], parameters: Parameters
) -> None:
    tags: defaultdict[tuple[str, str], int] = defaultdict(int)
    usage: defaultdict[str, float] = defaultdict(float)
    for closing in closings:
        row = closing.row
        change = correction_of(row, closing.used_ms, parameters)
        tags[row["account_id"], row["tier"]] += change.tag_delta
        usage[row["account_id"]] += change.usage_delta
    await lock_shares(connection, list(usage))
    # Usage is kept in the rows of relax, whichever tier it was of.
    changes = {
        key: (tags[key], usage[key[0]] if key[1] == "relax" else 0.0)
        for key in sorted(tags.keys() | {(account_id, "relax") for account_id in usage})
    }
    await connection.execute(
        """UPDATE scheduler.fair_share
           SET finish_tag = finish_tag + new.tag_delta, tag = tag + new.tag_delta,
               usage = greatest(0, usage + new.usage_delta)
           FROM unnest($1::text[], $2::text[], $3::bigint[], $4::float8[])
                AS new (account_id, tier, tag_delta, usage_delta)
           WHERE (fair_share.account_id, fair_share.tier) = (new.account_id, new.tier)""",
        [account_id for account_id, _ in changes],
        [tier for _, tier in changes],
        [tag_delta for tag_delta, _ in changes.values()],
        [usage_delta for _, usage_delta in changes.values()],
    )


# Three different jobs lost in a row are a bad GPU, not three bad jobs.
_LOSSES_OF_A_BAD_SLOT = 3
# Then it is tried again, and one more loss sets it aside again: whoever mends a GPU need not tell anybody.
_SET_ASIDE = timedelta(hours=1)


async def _count_losses(
    connection: asyncpg.Connection, closings: Sequence[_Closing], at: datetime
) -> dict[str, datetime]:
    """Count losses per slot in a row; returns until when which slots are to be set aside now."""
    set_aside: dict[str, datetime] = {}
    at_fault = {one.row["worker_id"] for one in closings if one.end.worker_at_fault}
    # Nearly every end is of a worker that lost nothing: one statement for all of those. Where a batch has
    # both of one worker, their order counts.
    await _end_losses(
        connection,
        {one.row["worker_id"] for one in closings if one.verdict in _PAID} - at_fault,
    )
    for closing in closings:
        row, end = closing.row, closing.end
        if row["worker_id"] not in at_fault:
            continue
        if closing.verdict in _PAID:
            await _end_losses(connection, {row["worker_id"]})
        elif end.worker_at_fault and row["parked_at"] is None:
            losses = await connection.fetchval(
                """INSERT INTO scheduler.worker_slot (worker_id, losses_in_row, last_lost_job)
                   VALUES ($1, 1, $2)
                   ON CONFLICT (worker_id) DO UPDATE
                   SET losses_in_row = worker_slot.losses_in_row
                           + (worker_slot.last_lost_job IS DISTINCT FROM EXCLUDED.last_lost_job)::int,
                       last_lost_job = EXCLUDED.last_lost_job
                   RETURNING losses_in_row""",
                row["worker_id"],
                row["job_id"],
            )
            if losses >= _LOSSES_OF_A_BAD_SLOT:
                set_aside[row["worker_id"]] = at + _SET_ASIDE
                await connection.execute(
                    "UPDATE scheduler.worker_slot SET set_aside_until = $2 WHERE worker_id = $1",
                    row["worker_id"],
                    at + _SET_ASIDE,
                )
    return set_aside


async def _end_losses(connection: asyncpg.Connection, worker_ids: Set[str]) -> None:
    """Remember that these workers' newest jobs were not lost."""
    if worker_ids:
        await connection.execute(
            """UPDATE scheduler.worker_slot SET losses_in_row = 0, last_lost_job = NULL
               WHERE worker_id = ANY($1::text[]) AND losses_in_row > 0""",
            list(worker_ids),
        )


async def give_up(
    connection: asyncpg.Connection, *, epoch: int, job_id: str, sentence: str, now_ms: int
) -> int | None:
    """Fail a waiting job that lost too many attempts; returns its event's number, None if it no longer waits.

    Nothing is open in the ledger: each lost attempt was voided. Raises Deposed.
    """
    at = from_ms(now_ms)
    async with connection.transaction():
        await require_leader(connection, epoch)
        failed = await connection.fetchval(
            """UPDATE scheduler.job
               SET state = 'failed', ended_at = $2, failure_reason = 'WORKERS_LOST', failure_sentence = $3,
                   checkpoint = NULL
               WHERE job_id = $1 AND NOT past AND state = 'queued' RETURNING job_id""",
            job_id,
            at,
            sentence,
        )
        if failed is None:
            return None
        return (await record_events(connection, [(job_id, "failed", sentence)], at))[JobId(job_id)]
