"""What front doors may ask about the board: why, when, what if, how much. Nothing is changed by it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpu_worker.models import Models
from scheduler.answers import Explained, Outlook, QueuesView, TierView, WhatIf
from scheduler.arrivals import memory_wanted
from scheduler.clock import LeaderClock
from scheduler.forecasts import Forecasts
from scheduler.policy.board import Board
from scheduler.policy.demand import Aims, TierLoad, demand
from scheduler.policy.events import AccountRestored, UsageReset
from scheduler.policy.explain import Stage
from scheduler.policy.fleet_size import Bounds, SteadyDemand
from scheduler.policy.foresight import what_if
from scheduler.policy.foresight.what_if import Change
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.job import Job
from scheduler.policy.parameters import Parameters
from scheduler.store import live
from scheduler.store.lanes import Lane
from scheduler.updates import QueueReason, QueueStatus, StartTimes

_BY_TIME = (QueueReason.WAITING_FOR_GPU, QueueReason.CONCURRENCY_LIMIT)
"""What holds a job only until others have ended."""

_WAIT_MS = {Tier.FAST: 30_000, Tier.RELAX: 30 * 60_000}
"""The waits that the service promises."""
_AIMS = Aims(wait_ms=_WAIT_MS, at_least=1, at_most=10_000)
"""Up to the largest fleet of one cell. What it may cost is for whoever buys the GPUs."""

_WANTED_S = 1.0
_THOUGHT_OF = JobId("")
# Each takes seconds of a core, and whoever asked waits no longer than a few of them take.
_MOST_ESTIMATES = 8
# It would be the last to come.
_LAST_ARRIVAL = 2**62


class Oracle:
    """Answers about one board."""

    def __init__(
        self,
        *,
        board: Board,
        forecasts: Forecasts,
        parameters: Parameters,
        clock: LeaderClock,
        models: Models,
        lane: Lane,
        bounds: Bounds | None,
    ) -> None:
        """Without `bounds` the fleet is what it is, and what is wanted is only shown: as the work is now."""
        self._board = board
        self._forecasts = forecasts
        self._parameters = parameters
        self._clock = clock
        self._models = models
        self._lane = lane
        """Not the loop's: it never waits for a question."""
        self._turn = asyncio.Lock()
        self._estimates = 0
        self._bounds = bounds
        self._steady: SteadyDemand | None = None
        self._wanted = 0
        self._wanted_until = 0.0
        """Monotonic, s."""

    async def run(self) -> None:
        """Keep the forecasts fresh until cancelled."""
        await self._forecasts.run()

    def with_start_times(self, statuses: Mapping[str, QueueStatus]) -> Mapping[str, QueueStatus]:
        """Return why jobs wait, with when each will start, where only time holds it."""
        return {
            job_id: replace(status, start=self._start(job_id, status)) for job_id, status in statuses.items()
        }

    def explain(self, job_id: str, status: QueueStatus | None) -> Explained | None:
        """Return why a live job is where it is; `status` if it waits.

        None: it is not on the board, or it waits and who is before it is still being read.
        """
        now_ms = self._clock.now_ms()
        explanation = self._board.explain(JobId(job_id), now_ms)
        if explanation is None or (explanation.stage is Stage.WAITING and not self._board.is_whole):
            return None
        if explanation.stage is Stage.PARKED:
            status = QueueStatus(reason=QueueReason.PARKED, sentence=explanation.sentences[0], position=0)
        return Explained(at_ms=now_ms, explanation=explanation, status=status)

    def queues(self, untold: Mapping[Tier, int]) -> QueuesView:
        """Return what waits and runs, and how the GPUs are shared.

        `untold` is how many jobs of each tier wait that the board was not told of yet.
        """
        now_ms = self._clock.now_ms()
        sharing = self._board.sharing()
        return QueuesView(
            tiers=tuple(self._tier(tier, untold[tier], now_ms) for tier in Tier),
            gpus=sharing.gpus,
            idle_gpus=sharing.idle,
            fast_gpus=sharing.fast,
            relax_floor_gpus=sharing.relax_floor,
            wanted_gpus=self.wanted_gpus() if self._board.is_whole else None,
        )

    def wanted_gpus(self) -> int:
        """Return how many GPUs the work of a moment ago asks for: within the bounds, no fewer than of late.

        That takes a walk over all of it: it is done once a second, and for a twentieth of the time at most.
        """
        begin = time.monotonic()
        if begin >= self._wanted_until:
            now_ms = self._clock.now_ms()
            loads = {tier: self._board.load(tier, now_ms) for tier in Tier}
            self._wanted = self._demand(loads, now_ms)
            end = time.monotonic()
            self._wanted_until = end + max(_WANTED_S, 20 * (end - begin))
        return self._wanted

    def _demand(self, loads: Mapping[Tier, TierLoad], now_ms: int) -> int:
        bounds = self._bounds
        if bounds is None:
            return demand(loads, _AIMS, self._parameters).gpus
        if self._steady is None:
            # The scheduler before this one had its reasons for the fleet that is there.
            present = min(self._board.sharing().gpus, bounds.at_most)
            self._steady = SteadyDemand(present, now_ms, shrinks_after_ms=bounds.shrinks_after_ms)
        aims = Aims(wait_ms=_WAIT_MS, at_least=bounds.at_least, at_most=bounds.at_most)
        return self._steady.wanted(demand(loads, aims, self._parameters).gpus, now_ms)

    def expected_wait_ms(self, job: Job) -> int | None:
        """Return how long a waiting job is told to wait; None: that is not known."""
        start = self._forecasts.start_times(job)
        return None if start is None else start.p50_ms

    async def estimate(self, what_ifs: Sequence[WhatIf]) -> Sequence[Outlook | None]:
        """Return what would come of each, alone; None: it cannot be told, or too many ask at once."""
        if self._estimates >= _MOST_ESTIMATES:
            return [None] * len(what_ifs)
        self._estimates += 1
        try:
            async with self._turn:
                return await self._outlooks(what_ifs)
        finally:
            self._estimates -= 1

    async def _outlooks(self, what_ifs: Sequence[WhatIf]) -> Sequence[Outlook | None]:
        found = [await self._change(asked) for asked in what_ifs]
        # A job may have started while others' accounts were read.
        changes = [
            change if change is not None and (asked.job_id is None or self._waits(asked.job_id)) else None
            for asked, change in zip(what_ifs, found, strict=True)
        ]
        known = [change for change in changes if change is not None]
        told = iter(await self._forecasts.what_ifs(known))
        now_ms = self._clock.now_ms()
        return [None if change is None else _outlook(next(told), now_ms) for change in changes]

    def _start(self, job_id: str, status: QueueStatus) -> StartTimes | None:
        job = self._board.waiting_job(JobId(job_id))
        if job is None or status.reason not in _BY_TIME:
            return None
        return self._forecasts.start_times(job)

    def _waits(self, job_id: str) -> bool:
        return self._board.waiting_job(JobId(job_id)) is not None

    def _tier(self, tier: Tier, untold: int, now_ms: int) -> TierView:
        held, oldest_ms = self._board.held(tier), self._board.oldest_arrival_ms(tier)
        parked = self._board.parked() if tier is Tier.RELAX else 0
        return TierView(
            tier=tier,
            waiting=self._board.queued(tier) + untold - held,
            held=held,
            running=self._board.running(tier) - parked,
            parked=parked,
            oldest_wait_ms=0 if oldest_ms is None else max(0, now_ms - oldest_ms),
        )

    async def _change(self, asked: WhatIf) -> Change | None:
        """Return what would be different; None: the board does not know the job."""
        now_ms = self._clock.now_ms()
        account_id = AccountId(asked.account_id)
        if asked.job_id is not None:
            job = self._board.waiting_job(JobId(asked.job_id))
            if job is None:
                return None
            change = Change(job_id=job.job_id)
            if job.tier is not asked.tier:
                change += what_if.in_tier(job.job_id, asked.tier, now_ms)
        else:
            job = self._thought_of(asked)
            change = await self._with_account(account_id, now_ms)
            change += what_if.submitted(job, now_ms)
        if asked.plan is not None:
            change += what_if.on_plan(
                job.job_id, account_id, asked.plan.limits, asked.plan.weight_milli, now_ms
            )
        return change

    def _thought_of(self, asked: WhatIf) -> Job:
        return Job(
            job_id=_THOUGHT_OF,
            account_id=AccountId(asked.account_id),
            tier=asked.tier,
            arrival=_LAST_ARRIVAL,
            predicted_ms=asked.predicted_ms,
            step_ms=max(1, asked.predicted_ms // max(1, asked.steps)),
            model=asked.model,
            memory_bytes=memory_wanted(self._models, asked.kind, asked.model, asked.width, asked.height),
        )

    async def _with_account(self, account_id: AccountId, now_ms: int) -> Change:
        """Return the change that the board knows the account, which it may do already."""
        if self._board.knows_account(account_id):
            return Change(job_id=_THOUGHT_OF)
        standings = await self._lane.run(lambda connection: live.standings(connection, [account_id], now_ms))
        if self._board.knows_account(account_id):
            return Change(job_id=_THOUGHT_OF)
        events: list[AccountRestored | UsageReset] = []
        for standing in standings:
            events.append(
                AccountRestored(
                    at_ms=now_ms,
                    account_id=account_id,
                    limits=standing.limits,
                    weight_milli=standing.weight_milli,
                    shares=standing.shares,
                )
            )
            if standing.usage_expired:
                events.append(UsageReset(at_ms=now_ms, account_id=account_id))
        return Change(job_id=_THOUGHT_OF, events=tuple(events))


def _outlook(told: what_if.WhatIf | None, now_ms: int) -> Outlook | None:
    if told is None:
        return None
    start = told.start
    return Outlook(
        start=None
        if start is None
        else StartTimes(p50_ms=max(0, start.p50_ms - now_ms), p90_ms=max(0, start.p90_ms - now_ms)),
        delayed_jobs=told.others_delayed,
        delayed_ms=max(0, told.delay_ms_sum),
    )
