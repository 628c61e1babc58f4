"""What is shown of the whole cell that no single event tells: how relax is shared, how many GPUs the work
asks for, and what those are told who came of late. Worked out beside the loop, for a twentieth of the time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from scheduler.clock import LeaderClock
from scheduler.fair_shares import FairShares
from scheduler.metrics import SchedulerMetrics
from scheduler.oracle import Oracle
from scheduler.policy.board import Board
from scheduler.policy.ids import AccountId, Tier
from scheduler.running import RunningAttempts
from scheduler.waits import Waits

_EVERY_S = 1.0
# Between two looks, as a multiple of what one takes: with 100,000 accounts that is a tenth of a second.
_REST = 20


class Figures:
    """Of one board."""

    def __init__(
        self,
        *,
        board: Board,
        running: RunningAttempts,
        waits: Waits,
        oracle: Oracle,
        wanted_workers: Callable[[], int],
        clock: LeaderClock,
        metrics: SchedulerMetrics,
    ) -> None:
        self._board = board
        self._running = running
        self._waits = waits
        self._oracle = oracle
        self._wanted_workers = wanted_workers
        self._clock = clock
        self._metrics = metrics
        self._shares = FairShares(clock.now_ms())

    async def run(self) -> None:
        """Show them until cancelled."""
        while True:
            begin_s = time.monotonic()
            if self._board.is_whole:
                self.look()
            await asyncio.sleep(max(_EVERY_S, _REST * (time.monotonic() - begin_s)))

    def look(self) -> None:
        """Show them as they are now."""
        self._waits.tell(self._oracle.expected_wait_ms)
        gpus: Counter[str] = Counter(
            one.account_id
            for one in self._running
            if one.tier is Tier.RELAX and one.parked_since_ms is None and one.drawn_ms is None
        )
        waiting: dict[str, int] = {
            account.account_id: account.weight_milli
            for account in self._board.cell.queues[Tier.RELAX].accounts()
        }
        weights = dict(waiting)
        for account_id in gpus.keys() - waiting.keys():
            weights[account_id] = self._board.cell.accounts[AccountId(account_id)].weight_milli
        self._shares.seen(weights, gpus, self._clock.now_ms())
        self._metrics.relax_seen(active_accounts=len(weights), fairness_error=self._shares.error(waiting))
        self._metrics.gpu_workers_desired.set(self._wanted_workers())
