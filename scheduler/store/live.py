"""What the board is built from and kept current by: live jobs, running attempts, accounts, cells.

Nothing here decides; a scheduler that starts reads these rows and replays them as events, one that runs reads
the rows it was told of, and once in a while those that nobody told it of.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import asyncpg

from billing import accounts as billing_accounts
from billing.refusals import UnknownAccount
from gpu_worker.contract import Checkpoint, RenderKind, RenderSpec
from scheduler.clock import from_ms
from scheduler.estimator import steps_done
from scheduler.policy.events import FairShare
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.limits import Limits
from scheduler.policy.usage import Rescaling
from scheduler.store.checkpoints import checkpoint_from_json
from scheduler.store.jobs import spec_from_json
from scheduler.store.leadership import require_leader

# In the order of _Row's fields. What the spec says of the work comes as one text: there are few different
# ones, and each is looked into once. Not as JSON, which takes the database as long as all the rest together.
_JOB_COLUMNS = """job_id::text, account_id, tier, state, arrival, predicted_ms, losses, cancel_wanted,
                  floor(extract(epoch FROM created_at) * 1000)::bigint AS accepted_ms, event_seq,
                  concat(
                      spec ->> 'kind', ' ', spec ->> 'width', ' ', spec ->> 'height', ' ',
                      spec ->> 'steps', ' ', spec -> 'source' ->> 'strength_permille', ' ',
                      spec ->> 'stop_percent', ' ',
                      jsonb_array_length(spec -> 'parts') + jsonb_array_length(spec -> 'pictures'), ' ',
                      spec ->> 'model') AS work, checkpoint, memory_above_bytes"""


MOST_WORKS = 10_000
"""Different works that are kept, of those asked for last: kinds, models, sizes and steps that are in use."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What a job's spec says of the work it is. Jobs of the same work share one, and so does what is kept by
    it: to find that by its fields would take longer than to work it out."""

    kind: RenderKind
    model: str
    width: int
    height: int
    steps: int
    """Of the estimator: what its denoising steps take, in plain ones."""


class _Row(NamedTuple):
    job_id: JobId
    account_id: AccountId
    tier_name: str
    state: str
    arrival: int
    predicted_ms: int
    losses: int
    cancel_wanted: bool
    accepted_ms: int
    """When its row was committed."""
    event_seq: int
    work_text: str
    checkpoint_text: str | None
    memory_above_bytes: int
    """All the memory of the largest worker that had too little for it; 0: none had."""


class LiveJob(_Row):
    """A job's row, as far as the order of things needs it.

    A tuple of what was read, since a restart may read a million: of the rest each is worked out by whoever
    asks for it.
    """

    __slots__ = ()

    @property
    def tier(self) -> Tier:
        """Where it runs or waits."""
        return _TIERS[self.tier_name]

    @property
    def work(self) -> Work:
        """What work it is."""
        return _work(self.work_text)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest of its attempts; None: it begins anew."""
        return None if self.checkpoint_text is None else checkpoint_from_json(self.checkpoint_text)


class Waits(NamedTuple):
    """An account that waits in a tier. A tuple, since there may be 200,000 of them at once."""

    account_id: AccountId
    tag: int
    """Its tag, or what that cannot be below where it has none yet."""
    arrival: int
    """Of its first job."""
    jobs: int


@dataclass(frozen=True, kw_only=True)
class RunningAttempt:
    """A running attempt's row."""

    attempt_id: str
    token: str
    job_id: JobId
    account_id: AccountId
    tier: Tier
    worker_id: str
    incarnation: str
    predicted_ms: int
    charged_at_ms: int
    weight_milli: int
    started_at: datetime
    parked_at: datetime | None
    """None: it has its worker's GPU, unless it is drawn."""
    drawn_at: datetime | None
    """None: it may still need it."""
    parked_ms: int
    """Before that."""
    parks: int
    sheltered: bool
    spec: RenderSpec
    traceparent: str | None
    """The span of the call that made its job; None: it is not traced."""


@dataclass(frozen=True, kw_only=True)
class AccountStanding:
    """What an account may have at once and where it stands in the fair queues."""

    account_id: AccountId
    limits: Limits
    weight_milli: int
    period_start: datetime
    renews_at: datetime
    usage_expired: bool
    """Its usage is from before the present period, and is to be forgotten."""
    shares: Mapping[Tier, FairShare]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A tier's virtual time, and the origin of its forward decay."""

    tier: Tier
    virtual_time: int
    decay_origin_ms: int


async def waiting_accounts(connection: asyncpg.Connection) -> dict[Tier, list[Waits]]:
    """Return who waits in each tier, in the order in which they are served, as far as the rows tell it."""
    waiting: dict[Tier, list[Waits]] = {tier: [] for tier in Tier}
    for row in await connection.fetch(
        """SELECT tier, account_id, coalesce(tag, greatest(finish_tag, virtual_time)) AS tag, arrival, jobs
           FROM (SELECT account_id, tier, min(arrival) AS arrival, count(*) AS jobs FROM scheduler.job
                 WHERE NOT past AND state = 'queued' GROUP BY account_id, tier) AS waiting
           LEFT JOIN scheduler.fair_share USING (account_id, tier)
           JOIN scheduler.cell USING (tier)
           ORDER BY tier, 3, arrival"""
    ):
        waiting[Tier(row["tier"])].append(Waits(row["account_id"], row["tag"], row["arrival"], row["jobs"]))
    return waiting


async def live_jobs(connection: asyncpg.Connection, account_ids: Sequence[str]) -> list[LiveJob]:
    """Return all jobs of these accounts that have not ended, in order of arrival."""
    rows = await connection.fetch(
        f"""SELECT {_JOB_COLUMNS} FROM scheduler.job
            WHERE account_id = ANY($1::text[]) AND NOT past AND state IN ('queued', 'running')
            ORDER BY arrival""",  # noqa: S608
        account_ids,
    )
    return [LiveJob._make(row) for row in rows]


async def noticed_jobs(
    connection: asyncpg.Connection, *, epoch: int, job_ids: Sequence[str]
) -> list[LiveJob]:
    """Return these jobs as they are now, in order of arrival, and stamp the waiting ones as on this board.

    A deposed leader stamps nothing: the next one has yet to see them.
    """
    await connection.execute(
        """UPDATE scheduler.job SET noticed_epoch = $1
           WHERE job_id = ANY($2::uuid[]) AND NOT past AND state IN ('queued', 'cancelled')
                 AND noticed_epoch < $1 AND EXISTS (SELECT FROM scheduler.leader WHERE epoch = $1)""",
        epoch,
        job_ids,
    )
    # Not in one statement: that would read what was there when it began, and stamp what it then waited for.
    rows = await connection.fetch(
        f"""/* noticed_jobs */ SELECT {_JOB_COLUMNS} FROM scheduler.job
            WHERE job_id = ANY($1::uuid[]) AND NOT past ORDER BY arrival""",  # noqa: S608
        job_ids,
    )
    return [LiveJob._make(row) for row in rows]


# Of each of a million rows, at a restart: what an Enum finds by its value takes a microsecond.
_TIERS = {tier.value: tier for tier in Tier}


@functools.lru_cache(maxsize=MOST_WORKS)
def _work(text: str) -> Work:
    # What the spec does not have is empty.
    kind, width, height, steps, strength_permille, stop_percent, parts, model = text.split(" ", 7)
    return Work(
        kind=RenderKind(kind),
        model=model,
        width=int(width),
        height=int(height),
        steps=steps_done(
            int(steps),
            kind=RenderKind(kind),
            strength_permille=int(strength_permille) if strength_permille else None,
            stop_percent=int(stop_percent or 100),
            parts=int(parts or 0),
        ),
    )


async def unheeded(connection: asyncpg.Connection, *, most: int, everywhere: bool) -> list[str]:
    """Return ids of jobs whose notice was lost.

    They wait without the stamp, were cancelled while they waited, or run with a cancel wish. With the stamp
    of an earlier leader they are not lost: they were there before the present one took over, and are read
    with all that waited then. So a new leader does not have to stamp a million rows anew.

    Not `everywhere`: of those that wait, only what came within the last five seconds. Behind a transaction
    that stays open the index keeps an entry for each job that came since, and to look through them takes
    seconds for a million.
    """
    rows = await connection.fetch(
        """/* unheeded_jobs */
           (SELECT job_id::text FROM scheduler.job
            WHERE NOT past AND state = 'queued' AND noticed_epoch = 0
                  AND created_at >= CASE WHEN $2 THEN '-infinity' ELSE now() - interval '5 seconds' END
            ORDER BY created_at LIMIT $1)
           UNION ALL
           (SELECT job_id::text FROM scheduler.job
            WHERE NOT past AND state = 'cancelled' AND noticed_epoch = 0 LIMIT $1)
           UNION ALL
           (SELECT job_id::text FROM scheduler.job
            WHERE NOT past AND state = 'running' AND cancel_wanted LIMIT $1)""",
        most,
        everywhere,
    )
    return [row["job_id"] for row in rows]


async def running_attempts(connection: asyncpg.Connection) -> list[RunningAttempt]:
    """Return every running attempt."""
    rows = await connection.fetch(
        """SELECT attempt_id::text, token::text, job_id::text, account_id, tier, worker_id, incarnation,
                  attempt.predicted_ms, charged_at_ms, weight_milli, attempt.started_at, parked_at, drawn_at,
                  parked_ms, parks, sheltered, spec, traceparent
           FROM scheduler.attempt JOIN scheduler.job USING (job_id)
           WHERE attempt.state = 'running' AND NOT past"""
    )
    return [
        RunningAttempt(
            attempt_id=row["attempt_id"],
            token=row["token"],
            job_id=JobId(row["job_id"]),
            account_id=AccountId(row["account_id"]),
            tier=Tier(row["tier"]),
            worker_id=row["worker_id"],
            incarnation=row["incarnation"],
            predicted_ms=row["predicted_ms"],
            charged_at_ms=row["charged_at_ms"],
            weight_milli=row["weight_milli"],
            started_at=row["started_at"],
            parked_at=row["parked_at"],
            drawn_at=row["drawn_at"],
            parked_ms=row["parked_ms"],
            parks=row["parks"],
            sheltered=row["sheltered"],
            spec=spec_from_json(json.loads(row["spec"])),
            traceparent=row["traceparent"],
        )
        for row in rows
    ]


async def standings(
    connection: asyncpg.Connection, account_ids: Sequence[str], now_ms: int
) -> list[AccountStanding]:
    """Return what these accounts may have and where they stand.

    One that was erased is left out: it has another id by now.
    """
    if not account_ids:
        return []
    # It may open a period, which is several writes.
    async with connection.transaction():
        terms = await _terms(connection, account_ids, from_ms(now_ms))
    shares: dict[str, dict[Tier, FairShare]] = {account_id: {} for account_id in terms}
    usage_since: dict[str, datetime] = {}
    for row in await connection.fetch(
        """SELECT account_id, tier, finish_tag, tag, usage, usage_since
           FROM scheduler.fair_share WHERE account_id = ANY($1::text[])""",
        account_ids,
    ):
        tier = _TIERS[row["tier"]]
        shares[row["account_id"]][tier] = FairShare(
            finish_tag=row["finish_tag"], tag=row["tag"], usage=row["usage"]
        )
        if tier is Tier.RELAX:
            usage_since[row["account_id"]] = row["usage_since"]
    return [
        AccountStanding(
            account_id=AccountId(account_id),
            limits=Limits(
                running=term.limits.running,
                relax_running=term.limits.relax_running,
                accepted=term.limits.accepted,
            ),
            weight_milli=term.relax_weight_milli,
            period_start=term.period_start,
            renews_at=term.renews_at,
            usage_expired=usage_since.get(account_id, term.period_start) < term.period_start,
            shares=shares[account_id],
        )
        for account_id, term in terms.items()
    ]


async def _terms(
    connection: asyncpg.Connection, account_ids: Iterable[str], at: datetime
) -> dict[str, billing_accounts.Terms]:
    there = set(account_ids)
    while True:
        try:
            return await billing_accounts.terms(connection, there, at)
        except UnknownAccount as gone:
            there.remove(gone.account_id)


async def forget_usage(
    connection: asyncpg.Connection, *, epoch: int, expired: Sequence[AccountStanding]
) -> None:
    """Set these accounts' decayed usage to 0: their subscriptions were renewed. Raises Deposed."""
    async with connection.transaction():
        await require_leader(connection, epoch)
        await connection.execute(
            """UPDATE scheduler.fair_share SET usage = 0, usage_since = new.period_start
               FROM unnest($1::text[], $2::timestamptz[]) AS new (account_id, period_start)
               WHERE fair_share.account_id = new.account_id AND tier = 'relax'""",
            [standing.account_id for standing in expired],
            [standing.period_start for standing in expired],
        )


async def cells(connection: asyncpg.Connection) -> list[Cell]:
    """Return both tiers' virtual times."""
    return [
        Cell(
            tier=Tier(row["tier"]),
            virtual_time=row["virtual_time"],
            decay_origin_ms=row["decay_origin_ms"],
        )
        for row in await connection.fetch("SELECT * FROM scheduler.cell ORDER BY tier")
    ]


async def rescale_usage(
    connection: asyncpg.Connection, *, epoch: int, before_ms: int, rescaling: Rescaling
) -> None:
    """Move the origin of forward decay from `before_ms` and scale every usage with it. Raises Deposed.

    A repeat after a lost answer finds the origin moved and changes nothing.
    """
    async with connection.transaction():
        await require_leader(connection, epoch)
        moved = await connection.execute(
            "UPDATE scheduler.cell SET decay_origin_ms = $1 WHERE decay_origin_ms = $2",
            rescaling.decay_origin_ms,
            before_ms,
        )
        if moved != "UPDATE 0":
            await connection.execute("UPDATE scheduler.fair_share SET usage = usage * $1", rescaling.factor)
