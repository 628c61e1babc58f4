"""What the front door may ask of the scheduler and the workers.

`scheduler/cluster` implements it over Ray. Nothing here is needed for an answer to be right: every
truth is a row in PostgreSQL. The link makes things quick (a notice instead of the sweep) and shows what
no row holds (places in the queue, progress, previews).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from gpu_worker.contract import Progress
from scheduler.answers import Explained, Outlook, QueuesView, WhatIf, WorkerView
from scheduler.updates import Abilities, JobUpdate, QueueStatus


class SchedulerLink(Protocol):
    """One front door's line to the scheduler."""

    def jobs_changed(self, job_ids: Sequence[str]) -> None:
        """Say that these jobs were committed, cancelled or moved.

        Batched; a notice that is lost is swept up later.
        """

    def accounts_changed(self, account_ids: Sequence[str]) -> None:
        """Say that plans, limits, funds or consent of these accounts changed."""

    def fleet_changed(self) -> None:
        """Say that operators drained, resumed or paused something: what holds now is in the rows."""

    async def queue_statuses(self, job_ids: Sequence[str]) -> Mapping[str, QueueStatus]:
        """Return why each waiting job waits.

        Jobs the scheduler does not know yet are absent, all while it is away.
        """

    def follow(self, job_id: str) -> AsyncIterator[JobUpdate]:
        """Yield the newest known state of a job, at once if one is known and then whenever it changed.

        Changes that arrive faster than they are read are merged; after a gap (the scheduler restarted) an
        update with `event_seq` 0 says: look at the database again. Does not end by itself.
        """

    def progress(self, worker_id: str, attempt_id: str, previews: bool) -> AsyncIterator[Progress]:
        """Yield the newest progress of a running attempt, asked of its worker.

        Ends when the attempt ends or the worker is gone.
        """

    def abilities(self) -> Abilities | None:
        """Return what the workers that the scheduler has met could do; None while that is not known."""

    async def explain(self, job_id: str) -> Explained | None:
        """Return why a live job is where it is.

        None: the scheduler does not know it, or is away.
        """

    async def estimate(self, what_ifs: Sequence[WhatIf]) -> Sequence[Outlook | None]:
        """Return what would come of each, alone; None: not known, or the scheduler is away."""

    async def queues(self) -> QueuesView | None:
        """Return what waits and runs; None while the scheduler is away."""

    async def workers_view(self) -> Sequence[WorkerView] | None:
        """Return the workers that have joined and are not lost; None while the scheduler is away."""

    async def scheduler_ready(self) -> bool:
        """Return whether a leader is taking decisions."""
