"""FleetService: the workers and the queues, and what operators want of them.

What an operator wants is committed as a row with its audit event, and then the scheduler is told. A repeated
request changes nothing and returns the worker or the queue as it is now.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeAlias

import grpc

from scheduler.answers import QueuesView, TierView, WorkerView
from scheduler.frontdoor import fairness, messages, translate
from scheduler.frontdoor.deeds import Deeds
from scheduler.frontdoor.fields import Violations
from scheduler.link import SchedulerLink
from scheduler.metrics import AdminAction
from scheduler.policy.ids import Tier
from scheduler.refusals import Overloaded, UnknownWorker
from scheduler.store import operations, overview
from scheduler.store.operations import Pause, Slot
from scheduler.store.pool import Connection, Pool
from scheduler.v1 import fleet_pb2, fleet_pb2_grpc

ACTION_OF = {
    "/scheduler.v1.FleetService/DrainWorker": AdminAction.DRAIN_WORKER,
    "/scheduler.v1.FleetService/ResumeWorker": AdminAction.RESUME_WORKER,
    "/scheduler.v1.FleetService/PauseTier": AdminAction.PAUSE_TIER,
    "/scheduler.v1.FleetService/ResumeTier": AdminAction.RESUME_TIER,
}

_Context = grpc.aio.ServicerContext[Any, Any]
_OfWorker: TypeAlias = fleet_pb2.DrainWorkerRequest | fleet_pb2.ResumeWorkerRequest
_OfTier: TypeAlias = fleet_pb2.PauseTierRequest | fleet_pb2.ResumeTierRequest

_NO_SLOT = Slot(draining=False, drain_reason="", hand_over_at=None, set_aside_until=None)
_LONGEST_DRAIN_MS = 24 * 3_600_000


@dataclass(frozen=True, kw_only=True)
class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """The methods of scheduler.v1.FleetService. `clock` returns the present time, aware."""

    pool: Pool
    link: SchedulerLink
    deeds: Deeds
    drain_within_ms: int
    """How long a worker that drains may take to finish what it has, if the operator says nothing."""
    clock: Callable[[], datetime]

    async def ListWorkers(  # noqa: N802
        self, request: fleet_pb2.ListWorkersRequest, context: _Context
    ) -> fleet_pb2.ListWorkersResponse:
        """Return every worker, and the slots of which something is remembered."""
        views = await self._views()
        if views is None:
            raise _away()
        async with self.pool.reading() as connection:
            slots = await operations.slots(connection)
        at = self.clock()
        remembered = {
            worker_id for worker_id, slot in slots.items() if slot.draining or slot.aside_at(at) is not None
        }
        return fleet_pb2.ListWorkersResponse(
            workers=[
                messages.worker(worker_id, views.get(worker_id), slots.get(worker_id, _NO_SLOT), at)
                for worker_id in sorted(views.keys() | remembered)
            ]
        )

    async def DrainWorker(  # noqa: N802
        self, request: fleet_pb2.DrainWorkerRequest, context: _Context
    ) -> fleet_pb2.Worker:
        """Give a worker nothing new, and let it finish what it has, or hand it over after a while."""
        within_ms = request.within_ms if request.HasField("within_ms") else self.drain_within_ms

        async def drain(connection: Connection, worker_id: str, reason: str) -> None:
            within = timedelta(milliseconds=within_ms)
            await operations.drain_worker(connection, worker_id, reason, within=within)

        violations = Violations()
        if not 0 <= within_ms <= _LONGEST_DRAIN_MS:
            violations.add("within_ms", "within_ms must be 0 or more, and at most a day.")
        return await self._change_worker(AdminAction.DRAIN_WORKER, request, drain, violations)

    async def ResumeWorker(  # noqa: N802
        self, request: fleet_pb2.ResumeWorkerRequest, context: _Context
    ) -> fleet_pb2.Worker:
        """Give a worker jobs again."""

        async def resume(connection: Connection, worker_id: str, _: str) -> None:
            await operations.resume_worker(connection, worker_id)

        return await self._change_worker(AdminAction.RESUME_WORKER, request, resume, Violations())

    async def GetQueues(  # noqa: N802
        self, request: fleet_pb2.GetQueuesRequest, context: _Context
    ) -> fleet_pb2.Queues:
        """Return what waits and runs, and how the GPUs are shared."""
        view = await self.link.queues()
        if view is None:
            raise _away()
        async with self.pool.reading() as connection:
            pauses = await operations.pauses(connection)
        return messages.queues(view, pauses)

    async def PauseTier(  # noqa: N802
        self, request: fleet_pb2.PauseTierRequest, context: _Context
    ) -> fleet_pb2.TierQueue:
        """Let nothing of a tier start."""
        return await self._change_tier(AdminAction.PAUSE_TIER, request, operations.pause_tier)

    async def ResumeTier(  # noqa: N802
        self, request: fleet_pb2.ResumeTierRequest, context: _Context
    ) -> fleet_pb2.TierQueue:
        """Let jobs of a tier start again."""

        async def resume(connection: Connection, tier: Tier, _: str) -> None:
            await operations.resume_tier(connection, tier)

        return await self._change_tier(AdminAction.RESUME_TIER, request, resume)

    async def AuditFairness(  # noqa: N802
        self, request: fleet_pb2.AuditFairnessRequest, context: _Context
    ) -> fleet_pb2.AuditFairnessResponse:
        """Hold what was decided in a period against the policy's bounds."""
        violations = Violations()
        period = fairness.period(request, violations, self.clock())
        violations.refuse()
        assert period is not None, "whatever made it None is a violation"
        return await fairness.audited(self.pool, *period)

    async def ListDecisions(  # noqa: N802
        self, request: fleet_pb2.ListDecisionsRequest, context: _Context
    ) -> fleet_pb2.ListDecisionsResponse:
        """Return what was decided lately."""
        violations = Violations()
        limit = violations.page_size(request.page_size)
        violations.refuse()
        async with self.pool.reading() as connection:
            found = await overview.decisions(connection, limit)
        return fleet_pb2.ListDecisionsResponse(decisions=[messages.decision(one) for one in found])

    async def _change_worker(
        self,
        action: AdminAction,
        request: _OfWorker,
        change: Callable[[Connection, str, str], Awaitable[None]],
        violations: Violations,
    ) -> fleet_pb2.Worker:
        request_id = violations.request_id(request.request_id)
        worker_id = violations.worker("name", request.name)
        reason = violations.reason(request.reason)
        violations.refuse()
        views = await self._views()
        async with self.deeds.open(action, request, request_id) as deed:
            slot = await operations.lock_slot(deed.connection, worker_id)
            if deed.first_answer is None:
                _refuse_unknown(worker_id, views, slot)
                before = slot or _NO_SLOT
                await change(deed.connection, worker_id, reason)
                slot = await operations.lock_slot(deed.connection, worker_id)
                await deed.record(
                    target=f"workers/{worker_id}",
                    reason=reason,
                    before=_slot_document(before),
                    after=_slot_document(slot or _NO_SLOT),
                )
                deed.answer = {}
            at = deed.at
        # Told also of a repeated request: the front door that did it may have died before it told.
        self.link.fleet_changed()
        return messages.worker(worker_id, (views or {}).get(worker_id), slot or _NO_SLOT, at)

    async def _change_tier(
        self,
        action: AdminAction,
        request: _OfTier,
        change: Callable[[Connection, Tier, str], Awaitable[None]],
    ) -> fleet_pb2.TierQueue:
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        tier = translate.TIERS.get(request.tier)
        if tier is None:
            violations.add("tier", "tier must be fast or relax.")
        reason = violations.reason(request.reason)
        violations.refuse()
        assert tier is not None, "whatever made it None is a violation"
        async with self.deeds.open(action, request, request_id) as deed:
            pause = await operations.lock_pause(deed.connection, tier)
            if deed.first_answer is None:
                before = pause
                await change(deed.connection, tier, reason)
                pause = await operations.lock_pause(deed.connection, tier)
                await deed.record(
                    target=f"tiers/{tier}",
                    reason=reason,
                    before=_pause_document(before),
                    after=_pause_document(pause),
                )
                deed.answer = {}
        self.link.fleet_changed()
        return messages.tier_queue(_tier_view(await self.link.queues(), tier), pause)

    async def _views(self) -> Mapping[str, WorkerView] | None:
        """Return the workers there are; None: nobody can tell at the moment."""
        views = await self.link.workers_view()
        return None if views is None else {view.worker_id: view for view in views}


def _refuse_unknown(worker_id: str, views: Mapping[str, WorkerView] | None, slot: Slot | None) -> None:
    """Raise UnknownWorker for one that is not there and was never heard of."""
    if slot is not None or worker_id in (views or {}):
        return
    if views is None:
        raise _away()
    raise UnknownWorker(worker_id=worker_id)


def _tier_view(queues: QueuesView | None, tier: Tier) -> TierView:
    """Return what is known of a tier; while the scheduler is away that is nothing but what it is called."""
    found = [view for view in queues.tiers if view.tier is tier] if queues is not None else []
    nothing = TierView(tier=tier, waiting=0, held=0, running=0, parked=0, oldest_wait_ms=0)
    return found[0] if found else nothing


def _slot_document(slot: Slot) -> dict[str, Any]:
    until, hand_over_at = slot.set_aside_until, slot.hand_over_at
    return {
        "draining": slot.draining,
        "drain_reason": slot.drain_reason,
        "hand_over_at": None if hand_over_at is None else hand_over_at.isoformat(),
        "set_aside_until": None if until is None else until.isoformat(),
    }


def _pause_document(pause: Pause) -> dict[str, Any]:
    return {"paused": pause.paused, "pause_reason": pause.reason}


def _away() -> Overloaded:
    return Overloaded(sentence="The scheduler is starting: who is there and what waits is known in a moment.")
