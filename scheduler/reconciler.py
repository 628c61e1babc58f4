"""The money looked at every few minutes, beside everything else: does the ledger still add up?

Each time the next lots are compared with their journal, and those again that differed; what is shown is the
sum of all gaps that are known. It reads on a connection of its own, by statements that end within seconds,
and locks nothing. A database that is too busy is no drift but a comparison that failed; that there was none
for long is told by the time of the last one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from scheduler.clock import LeaderClock
from scheduler.metrics import BillingKind, SchedulerMetrics
from scheduler.store import reconciling
from scheduler.store.lanes import Lane

_log = structlog.get_logger()

# Of one comparison: all lots of a small cell each time, and of a large one all within the day.
_LOTS = 20_000
# What is not known is shown as nothing until then.
_FIRST_AFTER_S = 2.0
# Of lots that differ, for a log line that can be read; the metric has the sum of all.
_LOTS_NAMED = 10


class Reconciler:
    """Of one leader; `lane` is its own. It begins when `may_begin` says so: while a queue is read after a
    restart, the database has something more urgent to do."""

    def __init__(
        self,
        *,
        lane: Lane,
        clock: LeaderClock,
        metrics: SchedulerMetrics,
        every_ms: int,
        may_begin: Callable[[], bool],
    ) -> None:
        self._lane = lane
        self._clock = clock
        self._metrics = metrics
        self._every_ms = every_ms
        self._may_begin = may_begin
        self._after_lot_id = 0
        self._gaps_ms: dict[int, int] = {}
        self._plans: set[str] = set()
        """With accounts, at some look."""
        self._counted_to: int | None = None
        self._count_to: int | None = None
        """The newest entry a look ago; None: there was none yet."""

    async def run(self) -> None:
        """Look until cancelled."""
        first_after_s = min(_FIRST_AFTER_S, self._every_ms / 1000)
        await asyncio.sleep(first_after_s)
        while not self._may_begin():  # noqa: ASYNC110 - it may wait longer than it must, and nobody tells it
            await asyncio.sleep(first_after_s)
        while True:
            await self.look()
            await asyncio.sleep(self._every_ms / 1000)

    async def look(self) -> None:
        """Look once."""
        counted_to = count_to = 0
        if self._count_to is not None:
            count_to = self._count_to
            counted_to = count_to if self._counted_to is None else self._counted_to
        try:
            books = await self._lane.run(
                lambda connection: reconciling.look(
                    connection,
                    after_lot_id=self._after_lot_id,
                    lots=_LOTS,
                    again=tuple(self._gaps_ms),
                    counted_to=counted_to,
                    count_to=count_to,
                )
            )
        except reconciling.TookTooLong:
            _log.warning("ledger not reconciled", reason="the database took too long")
            self._metrics.not_reconciled()
            return
        self._show(books)
        self._after_lot_id = books.drift.last_lot_id or 0
        # What was the newest now is counted the next time, when all entries before it have been committed.
        self._counted_to, self._count_to = self._count_to, books.newest_entry

    def _show(self, books: reconciling.Books) -> None:
        new = books.drift.gaps_ms.keys() - self._gaps_ms.keys()
        if new:
            named = {lot_id: books.drift.gaps_ms[lot_id] for lot_id in sorted(new)[:_LOTS_NAMED]}
            _log.error("ledger drifts from its journal", lots=len(new), gaps_ms=named)
        # Those that differed were compared again, so that what is here is all that is known.
        self._gaps_ms = dict(books.drift.gaps_ms)
        self._metrics.reconciled(drift_ms=sum(self._gaps_ms.values()), now_ms=self._clock.now_ms())
        for one in books.moved:
            kind = BillingKind(one.movement.value)
            self._metrics.fast_time_moved(plan=one.plan, kind=kind, ms=one.ms)
        for left in self._plans - {plan.plan for plan in books.plans}:
            self._metrics.accounts_seen(plan=left, accounts=0, exhausted=0)
        for plan in books.plans:
            self._plans.add(plan.plan)
            self._metrics.accounts_seen(plan=plan.plan, accounts=plan.accounts, exhausted=plan.exhausted)
