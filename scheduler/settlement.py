"""The end of an attempt, from the worker's result to the committed row.

Accounts are hashed to lanes. Each lane has a connection of its own and takes, in one transaction, everything
that arrived while its last commit was in flight; one account's ends stay in order.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog

from gpu_worker.contract import AttemptResult, Blame, Outcome
from scheduler.clock import LeaderClock
from scheduler.inbox import AttemptSettled, Inbox
from scheduler.metrics import SchedulerMetrics
from scheduler.policy.parameters import Parameters
from scheduler.store.endings import (
    REFUSED_VALUE,
    AttemptEnd,
    Settled,
    Unknown,
    Verdict,
    settle_attempts,
)
from scheduler.store.lanes import Lane
from scheduler.store.pool import Connection

_log = structlog.get_logger()

# More in one transaction gains little and makes the first wait for the last.
_MOST_IN_ONE = 200
_LONGEST_SENTENCE = 500

_HANDED_OVER = "Its GPU worker saved it in the middle and gave it up."


def end_of(result: AttemptResult, *, device: str, speed_permille: int, memory_bytes: int) -> AttemptEnd:
    """Return what the result of a worker of this device type, speed and memory claims.

    A failure that is the platform's counts as a loss and is tried again. One that was handed over is tried
    again too, and counts as a loss of nobody's; so is one that ran out of memory, on a larger worker.
    """
    handed_over = result.outcome is Outcome.HANDED_OVER
    outgrew = ran_out_of_memory(result)
    if result.outcome is Outcome.SUCCEEDED:
        verdict = Verdict.SUCCEEDED
    elif result.outcome is Outcome.CANCELLED:
        verdict = Verdict.CANCELLED
    elif handed_over:
        verdict = Verdict.LOST
    else:
        verdict = Verdict.LOST if result.blame is Blame.PLATFORM else Verdict.FAILED
    return AttemptEnd(
        attempt_id=result.attempt_id,
        token=result.token,
        incarnation=result.incarnation,
        verdict=verdict,
        gpu_ms=result.times.gpu_ms,
        redone_ms=result.redone_ms,
        kept=result.kept,
        # Losses are counted to end what might go on for ever. This does not: each try is on a larger worker,
        # and to stop below the largest would fail a job that there is a GPU for.
        counts=not handed_over and not outgrew,
        outgrew_bytes=memory_bytes if outgrew else 0,
        # An artifact store or a hub that is away, or a picture too large, says nothing about this GPU.
        worker_at_fault=result.failure_reason == "ENGINE_ERROR" and result.blame is Blame.PLATFORM,
        times=result.times,
        device=device,
        speed_permille=speed_permille,
        images=result.images,
        videos=result.videos,
        latents_path=result.latents_path,
        reproduction=_storable(result.receipt),
        failure_reason=result.failure_reason,
        sentence=_HANDED_OVER
        if handed_over
        else _storable(result.failure_sentence or "")[:_LONGEST_SENTENCE],
    )


def ran_out_of_memory(result: AttemptResult) -> bool:
    """Return whether a worker's GPU was too small for an attempt."""
    return result.outcome is Outcome.FAILED and result.failure_reason == "OUT_OF_MEMORY"


def end_of_too_large(end: AttemptEnd, model: str) -> AttemptEnd:
    """Return the end of an attempt that ran out of memory, where no worker has more: its job fails."""
    return replace(
        end,
        verdict=Verdict.FAILED,
        sentence=(
            f"The GPU worker ran out of memory with all of its {end.outgrew_bytes / 2**30:.1f} GiB, "
            f"and no worker for the model {model} has noticeably more. The job costs nothing."
        ),
    )


def _storable(value: Any) -> Any:
    """Return a JSON value with what PostgreSQL stores in no text taken out: NUL and lone surrogates.

    They come with the texts of errors from below; a result that cannot be stored would be told for ever.
    """
    match value:
        case str():
            return value.replace("\0", "").encode(errors="replace").decode()
        case Mapping():
            return {_storable(key): _storable(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_storable(inner) for inner in value]
        case _:
            return value


def end_of_lost(attempt_id: str, token: str, sentence: str, *, executed: bool) -> AttemptEnd:
    """Return the end of an attempt whose worker is gone,
    or that no worker took (`executed` false: no time passed).
    """
    return AttemptEnd(
        attempt_id=attempt_id,
        token=token,
        verdict=Verdict.LOST,
        gpu_ms=None if executed else 0,
        counts=executed,
        worker_at_fault=executed,
        sentence=sentence,
    )


@dataclass(frozen=True, kw_only=True)
class _Claim:
    worker_id: str
    end: AttemptEnd


class Settlement:
    """Lanes that settle attempts and tell the inbox."""

    def __init__(
        self,
        *,
        dsn: str,
        lanes: int,
        epoch: int,
        inbox: Inbox,
        clock: LeaderClock,
        parameters: Parameters,
        metrics: SchedulerMetrics,
    ) -> None:
        self._lanes = [Lane(dsn, f"settlement {number}") for number in range(lanes)]
        for lane in self._lanes:
            lane.watched_by(metrics.process)
        self._queues: list[deque[_Claim]] = [deque() for _ in range(lanes)]
        self._filled = [asyncio.Event() for _ in range(lanes)]
        self._epoch = epoch
        self._inbox = inbox
        self._clock = clock
        self._parameters = parameters
        self._metrics = metrics

    def put(self, account_id: str, worker_id: str, end: AttemptEnd) -> None:
        """Settle this end soon. Its outcome comes to the inbox."""
        number = zlib.crc32(account_id.encode()) % len(self._lanes)
        self._queues[number].append(_Claim(worker_id=worker_id, end=end))
        self._filled[number].set()

    async def run(self) -> None:
        """Work until cancelled; raises Deposed when another scheduler leads."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(len(self._lanes)):
                    group.create_task(self._work(number))
        finally:
            for lane in self._lanes:
                await lane.close()

    async def _work(self, number: int) -> None:
        queue, filled = self._queues[number], self._filled[number]
        while True:
            await filled.wait()
            claims = [queue.popleft() for _ in range(min(len(queue), _MOST_IN_ONE))]
            if not queue:
                filled.clear()
            outcomes = await self._lanes[number].run(lambda connection, c=claims: self._settle(connection, c))  # type: ignore[misc]
            for claim, outcome in zip(claims, outcomes, strict=True):
                self._inbox.put(AttemptSettled(worker_id=claim.worker_id, end=claim.end, outcome=outcome))

    async def _settle(self, connection: Connection, claims: list[_Claim]) -> list[Settled | Unknown]:
        """Settle a batch; if the database refuses something in it, each claim for itself."""
        try:
            return await self._settle_ends(connection, [claim.end for claim in claims])
        except REFUSED_VALUE:
            return [await self._settle_alone(connection, claim) for claim in claims]

    async def _settle_alone(self, connection: Connection, claim: _Claim) -> Settled | Unknown:
        """Settle one claim; one that the database cannot store is a loss, or it would be told for ever."""
        try:
            (outcome,) = await self._settle_ends(connection, [claim.end])
        except REFUSED_VALUE:
            _log.exception("result refused by the database", attempt=claim.end.attempt_id)
            plain = AttemptEnd(
                attempt_id=claim.end.attempt_id,
                token=claim.end.token,
                verdict=Verdict.LOST,
                gpu_ms=claim.end.gpu_ms,
                sentence="The GPU worker's result could not be stored.",
            )
            (outcome,) = await self._settle_ends(connection, [plain])
        return outcome

    async def _settle_ends(self, connection: Connection, ends: list[AttemptEnd]) -> list[Settled | Unknown]:
        begin_s = time.monotonic()
        try:
            outcomes = await settle_attempts(
                connection,
                epoch=self._epoch,
                ends=ends,
                parameters=self._parameters,
                now_ms=self._clock.now_ms(),
            )
        except Exception:
            self._metrics.settlement_failed()
            raise
        self._metrics.settlement_committed(time.monotonic() - begin_s)
        return outcomes
