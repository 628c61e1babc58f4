"""A new leader's first act: read what is live and hand it to the loop, as events.

There is no second way of building a board: what runs after a restart is what `apply` makes of the same
events a scheduler that never died would have seen.

What runs is read at once. What waits may be a million jobs, and whoever is next need not wait for the last
of them: it is read from the front of the order, beside the loop, which starts what it may meanwhile.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Sequence

from opentelemetry.trace import Tracer

from scheduler.arrivals import Arrivals, checkpoint_of
from scheduler.backlog import Backlog
from scheduler.clock import LeaderClock, to_ms
from scheduler.inbox import RowsRead
from scheduler.loop import Loop
from scheduler.policy.events import AttemptRestored, CellRestored, Event
from scheduler.policy.ids import AccountId, AttemptId, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.parameters import Parameters
from scheduler.policy.usage import rescaling
from scheduler.running import Running, traced
from scheduler.store import live, operations
from scheduler.store.lanes import Lane
from scheduler.tracing import noted
from scheduler.updates import JobUpdate

# Containers made and not freed before the collector looks for cycles among them. Python's own number, 700,
# is reached several times in one cycle of decisions, which make none: it took a sixth of their time. Looking
# through what lives by then of a large board takes a fifth of a second, seldom.
_COLLECT_EVERY = 100_000


async def restore(
    loop: Loop,
    *,
    arrivals: Arrivals,
    lane: Lane,
    backlog_lanes: Sequence[Lane],
    epoch: int,
    clock: LeaderClock,
    parameters: Parameters,
    tell: Callable[[RowsRead], None],
) -> Backlog:
    """Bring a fresh loop up to the rows of what runs, and return what brings it up to those of what waits.

    The fleet is open: its workers' reports are in the inbox. Raises Deposed if another scheduler took the
    lead meanwhile.
    """
    cells = await _young_cells(lane, epoch, clock, parameters)
    attempts = await lane.run(live.running_attempts)
    wishes = await lane.run(operations.wishes)
    waiting = await lane.run(live.waiting_accounts)
    portion = await arrivals.read(lane, {attempt.account_id for attempt in attempts})
    rows = {job.job_id: job for _, jobs in portion.accounts.values() for job in jobs}
    backlog = Backlog(waiting, arrivals=arrivals, lanes=backlog_lanes, clock=clock, tell=tell)

    now_ms = clock.now_ms()
    events: list[Event] = [
        CellRestored(
            at_ms=now_ms,
            tier=cell.tier,
            virtual_time=cell.virtual_time,
            decay_origin_ms=cell.decay_origin_ms,
        )
        for cell in cells
    ]
    running: defaultdict[AccountId, list[Event]] = defaultdict(list)
    for attempt in attempts:
        row = rows[attempt.job_id]
        running[attempt.account_id].append(_restored(attempt, row, arrivals.job(row), now_ms))
    for account_id in portion.accounts:
        events += arrivals.of_account(portion, account_id, running[account_id])
    await loop.adopt(
        [*events, *backlog.progress()],
        backlog=backlog,
        running=[_running(attempt, rows[attempt.job_id], now_ms, loop.desk.tracer) for attempt in attempts],
        specs={attempt.attempt_id: attempt.spec for attempt in attempts},
        updates=[_update(attempt, rows[attempt.job_id]) for attempt in attempts],
        wishes=wishes,
    )
    return backlog


def collect_seldom() -> None:
    """Keep Python's garbage collector from what was restored, and from most of what is decided.

    What was restored lives long: a collection that walks a million jobs would stop the loop for a second,
    again and again.
    """
    gc.freeze()
    gc.set_threshold(_COLLECT_EVERY, 10, 10)


async def _young_cells(lane: Lane, epoch: int, clock: LeaderClock, parameters: Parameters) -> list[live.Cell]:
    """Return the tiers' virtual times, having moved the origin of decay if it is old."""
    cells = await lane.run(live.cells)
    origin_ms = cells[0].decay_origin_ms
    newer = rescaling(decay_origin_ms=origin_ms, now_ms=clock.now_ms(), parameters=parameters)
    if newer is None:
        return cells
    await lane.run(
        lambda connection: live.rescale_usage(connection, epoch=epoch, before_ms=origin_ms, rescaling=newer)
    )
    return await lane.run(live.cells)


def _restored(attempt: live.RunningAttempt, row: live.LiveJob, job: Job, now_ms: int) -> AttemptRestored:
    return AttemptRestored(
        at_ms=now_ms,
        job=job,
        losses=row.losses,
        accepted_ms=row.accepted_ms,
        attempt_id=AttemptId(attempt.attempt_id),
        worker_id=WorkerId(attempt.worker_id),
        predicted_ms=attempt.predicted_ms,
        weight_milli=attempt.weight_milli,
        charged_at_ms=attempt.charged_at_ms,
        # As if it had run without a break: what it has done is what it had its GPU for.
        started_ms=to_ms(attempt.started_at) + attempt.parked_ms,
        parked_since_ms=None if attempt.parked_at is None else to_ms(attempt.parked_at),
        drawn=attempt.drawn_at is not None,
        parks=attempt.parks,
        sheltered=attempt.sheltered,
        checkpoint=checkpoint_of(row),
    )


def _running(attempt: live.RunningAttempt, job: live.LiveJob, now_ms: int, tracer: Tracer) -> Running:
    running = Running(
        attempt_id=attempt.attempt_id,
        token=attempt.token,
        job_id=attempt.job_id,
        account_id=attempt.account_id,
        tier=attempt.tier,
        model=job.work.model,
        worker_id=attempt.worker_id,
        incarnation=attempt.incarnation,
        started_ms=to_ms(attempt.started_at),
        given_ms=now_ms,
        parked_since_ms=None if attempt.parked_at is None else to_ms(attempt.parked_at),
        drawn_ms=None if attempt.drawn_at is None else to_ms(attempt.drawn_at),
        parked_ms=attempt.parked_ms,
        checkpoint=job.checkpoint,
        traceparent=attempt.traceparent,
    )
    running = traced(running, tracer)
    noted(running.span, "adopted", now_ms)
    return running


def _update(attempt: live.RunningAttempt, job: live.LiveJob) -> JobUpdate:
    return JobUpdate(
        job_id=job.job_id,
        event_seq=job.event_seq,
        state=job.state,
        worker_id=attempt.worker_id,
        attempt_id=attempt.attempt_id,
        parked=attempt.parked_at is not None,
    )
