"""What the loop may ask of a fleet of GPU workers.

`cluster/ray_fleet` implements it over Ray, `cluster/local_fleet` with workers in this process. The fleet
finds workers, keeps one long poll open to each, and turns what it hears into facts for the inbox; it
decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gpu_worker.contract import AttemptResult, RenderRequest, WorkerReport


@dataclass(frozen=True, kw_only=True)
class WorkerAwaited:
    """A worker from before this scheduler lives, as far as the cluster knows.

    WorkerFound or WorkerGone follows.
    """

    worker_id: str


@dataclass(frozen=True, kw_only=True)
class WorkerFound:
    """A worker answered for the first time, or again after it was lost, or as a new incarnation."""

    report: WorkerReport
    outdated: bool = False
    """It is of another release than those that this fleet starts: it works, and is to be replaced."""


@dataclass(frozen=True, kw_only=True)
class WorkerHeard:
    """A heartbeat: what it has in hand and what it measured."""

    report: WorkerReport


@dataclass(frozen=True, kw_only=True)
class WorkerLeaves:
    """The slot's machine is about to end: what its worker has in hand had better go on elsewhere, at once."""

    worker_id: str


class GoneBecause(StrEnum):
    """Why a worker's life is over, as far as the fleet knows."""

    DIED = "died"
    SILENT = "silent"
    RESTARTED = "restarted"
    """Another life answered in its place."""
    REPLACED = "replaced"
    """It was told to make room."""


@dataclass(frozen=True, kw_only=True)
class WorkerGone:
    """The worker's process died, or was silent for three heartbeat intervals. Whatever it had is lost."""

    worker_id: str
    incarnation: str
    """Empty: it was awaited, and has not answered."""
    sentence: str
    because: GoneBecause = GoneBecause.DIED


@dataclass(frozen=True, kw_only=True)
class RenderTaken:
    """A worker has taken an attempt that it was given."""

    worker_id: str
    attempt_id: str


@dataclass(frozen=True, kw_only=True)
class RenderRefused:
    """A worker would not or could not take an attempt; it was never executed."""

    worker_id: str
    attempt_id: str
    sentence: str


FleetFact = (
    WorkerAwaited | WorkerFound | WorkerHeard | WorkerLeaves | WorkerGone | RenderTaken | RenderRefused
)


class Fleet(Protocol):
    """Workers, as the loop sees them. No method waits for a worker: answers come as facts."""

    async def open(self, epoch: int, tell: Callable[[FleetFact], None]) -> None:
        """Find the workers that live and start the missing ones; from now on every fact goes to `tell`.

        First tells, of each worker that is alive already, that it is awaited. Returns once all of them have
        answered, or a second later: one that died unnoticed is not to hold up those that are there.
        """

    def render(self, worker_id: str, request: RenderRequest) -> None:
        """Give an attempt to a worker, which parks for it what the request names."""

    def stop(self, worker_id: str, attempt_id: str, token: str) -> None:
        """Ask a worker to end an attempt at its next step, or at once if it is parked."""

    def hand_over(self, worker_id: str, attempt_id: str) -> None:
        """Ask a worker to cut an attempt at its next step and end it there, for another to go on with."""

    def resume(self, worker_id: str, attempt_id: str) -> None:
        """Ask a worker to go on with a parked attempt; it may have done so by itself."""

    def acknowledge(self, worker_id: str, result: AttemptResult) -> None:
        """Say that a result is settled, so that the worker may forget it."""

    def forget(self, worker_id: str, attempt_id: str, *, kept: bool = False) -> None:
        """Say that an attempt is not ours any more.

        The worker ends it, deletes its pictures and counts its time as wasted; `kept` says that its job goes
        on from its newest checkpoint, so that what this kept was of use.
        """

    def replace(self, worker_id: str) -> None:
        """End a worker that has nothing in hand.

        Another is started on its GPU unless its machine ends, or the slot is spare.
        """

    def want(self, workers: int, spare: Collection[str]) -> None:
        """Have the cluster keep machines for so many workers, and start none on the `spare` slots.

        Workers that are there stay until they are replaced. To be said again whenever it may have changed; a
        fleet that is never told has workers on all GPUs that the cluster has.
        """

    def slots(self) -> Collection[str]:
        """Return the ids of the workers of all GPUs that the cluster has, those without one included.

        Those of machines that are about to end are not among them, whether or not their workers still live.
        """

    async def run(self) -> None:
        """Listen until cancelled. The workers live on."""
