"""A board as the events that make one like it, for whoever rolls a copy forward in another process."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.policy.attempt import Attempt
from scheduler.policy.cell import Cell, State
from scheduler.policy.events import (
    AccountRestored,
    AttemptRestored,
    CancelWanted,
    CellRestored,
    Event,
    JobSubmitted,
    RecoveryEnded,
    RefusedBecause,
    StartRefused,
    TierPaused,
    WorkerDraining,
    WorkerJoined,
)
from scheduler.policy.ids import AccountId, Tier


def facts(cell: Cell, now_ms: int, lately: Iterable[AccountId] | None = None) -> list[Event]:
    """Return events that make a board like this one, for whoever rolls a copy of it forward.

    What the copy lacks is how long heads have waited and the counts of turns, as after a recovery. With
    `lately` it also lacks all accounts but these and those with a live job: a board remembers every account
    that it ever met.
    """
    account_ids: Iterable[AccountId] = cell.accounts
    if lately is not None:
        # Not a set: its order would be another one each time.
        wanted = dict.fromkeys(live.job.account_id for live in cell.jobs.values())
        wanted.update(dict.fromkeys(lately))
        account_ids = (account_id for account_id in wanted if account_id in cell.accounts)
    origin_ms = cell.queues[Tier.RELAX].decay_origin_ms
    facts: list[Event] = [
        CellRestored(at_ms=now_ms, tier=tier, virtual_time=queue.virtual_time, decay_origin_ms=origin_ms)
        for tier, queue in cell.queues.items()
    ]
    facts += [
        AccountRestored(
            at_ms=now_ms,
            account_id=account.account_id,
            limits=account.limits,
            weight_milli=account.weight_milli,
            shares={tier: account.share(tier) for tier in cell.queues},
        )
        for account in map(cell.accounts.__getitem__, account_ids)
    ]
    for worker, draining in cell.fleet.workers():
        facts.append(WorkerJoined(at_ms=now_ms, worker=worker))
        if draining:
            facts.append(WorkerDraining(at_ms=now_ms, worker_id=worker.worker_id))
    facts += [_restored(cell, attempt, now_ms) for attempt in cell.attempts.values()]
    # Held ones last: an account that had nothing else for a moment would lose its tag.
    for job_id, live in sorted(cell.jobs.items(), key=lambda one: one[1].state is State.HELD):
        if live.state is State.RUNNING:
            if live.cancel_wanted:
                facts.append(CancelWanted(at_ms=now_ms, job_id=job_id))
            continue
        facts.append(
            JobSubmitted(
                at_ms=now_ms,
                job=live.job,
                losses=live.losses,
                accepted_ms=live.accepted_ms,
                checkpoint=live.checkpoint,
            )
        )
        if live.state is State.HELD:
            facts.append(StartRefused(at_ms=now_ms, job_id=job_id, reason=RefusedBecause.FUNDS))
    facts += [TierPaused(at_ms=now_ms, tier=tier) for tier in cell.queues if tier in cell.paused]
    facts.append(RecoveryEnded(at_ms=now_ms))
    return facts


def _restored(cell: Cell, attempt: Attempt, now_ms: int) -> AttemptRestored:
    live = cell.jobs[attempt.job.job_id]
    parked = attempt.parked_since_ms is not None
    # Below 0 for a run that takes longer than was predicted: by how much says how much longer yet.
    speed_permille = cell.fleet.speed_permille(attempt.worker_id)
    left_ms = attempt.left_ms if parked else (attempt.ends_ms - now_ms) * speed_permille // 1000
    until_ms = attempt.parked_since_ms if attempt.parked_since_ms is not None else now_ms
    return AttemptRestored(
        at_ms=now_ms,
        job=attempt.job,
        losses=live.losses,
        accepted_ms=live.accepted_ms,
        attempt_id=attempt.attempt_id,
        worker_id=attempt.worker_id,
        predicted_ms=attempt.predicted_ms,
        weight_milli=attempt.weight_milli,
        charged_at_ms=attempt.charged_at_ms,
        # As if it had run without a break, so that what is left of it is the same.
        started_ms=until_ms - (attempt.predicted_ms - left_ms),
        parked_since_ms=attempt.parked_since_ms,
        drawn=attempt.drawn,
        parks=attempt.parks,
        sheltered=attempt.sheltered,
        checkpoint=attempt.checkpoint,
    )
