"""The cycle: drain, apply, decide, commit, act.

One task runs it and owns the board. Whatever happened comes through the inbox; whatever should happen is
decided by the board, becomes rows in one transaction, is applied as events, and only then are workers
called. If the process dies between any two of these steps, the rows tell the next scheduler the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from opentelemetry.trace import NoOpTracer, Tracer

from billing import ledger
from gpu_worker.contract import RenderSpec, WorkerReport
from scheduler.answers import WorkerRun, WorkerView
from scheduler.arrivals import MOST_SWEPT, Arrivals
from scheduler.backlog import Backlog
from scheduler.clock import LeaderClock, from_ms, to_ms
from scheduler.desk import Desk
from scheduler.fleet import Fleet
from scheduler.inbox import AccountsChanged, ClosingDown, FleetChanged, Inbox, Item, JobsChanged, RowsRead
from scheduler.metrics import SchedulerMetrics
from scheduler.moves import Moves
from scheduler.policy.board import Board
from scheduler.policy.events import Event
from scheduler.policy.ids import JobId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.replacements import Replacements
from scheduler.roll_call import RollCall, in_hand
from scheduler.roster import Roster
from scheduler.running import Running
from scheduler.scaling import Scaling
from scheduler.settlement import Settlement
from scheduler.store import journal, leadership, operations
from scheduler.store.lanes import Lane
from scheduler.store.operations import Wishes
from scheduler.updates import JobUpdate, QueueReason, QueueStatus, Updates

# For telling the board what waited before this scheduler led, between two cycles.
_TELL_NS = 20_000_000
# How often the time is persisted, accounts without funds are looked at, and open holds are shown.
_KEEP_TIME_MS = 5_000
# The journal is for whoever audits it, who can do without the last second of a scheduler that died. What is
# left then is written in the next cycles, so that the rate follows the load.
_JOURNAL_MS = 1_000
# A fairness that somebody doubts is doubted within a month.
_JOURNAL_KEPT_MS = 30 * 24 * 3_600_000
_TIDY_MS = 3_600_000
# As long as there is more to forget; and a new leader has better things to do.
_TIDY_ON_MS = 1_000
_TIDY_FIRST_MS = 60_000
# The whole fleet is counted for it.
_SHOW_FLEET_MS = 1_000


_READING = QueueStatus(
    reason=QueueReason.SCHEDULER_STARTING,
    sentence="The scheduler was started anew and reads its queue; the job keeps its place.",
    position=0,
)


class Loop:
    """The only owner of the board."""

    def __init__(
        self,
        *,
        board: Board,
        parameters: Parameters,
        epoch: int,
        lane: Lane,
        arrivals: Arrivals,
        inbox: Inbox,
        fleet: Fleet,
        settlement: Settlement,
        updates: Updates,
        clock: LeaderClock,
        metrics: SchedulerMetrics,
        sweep_ms: int,
        drain_within_ms: int,
        wanted_gpus: Callable[[], int] | None = None,
        workers_min: int = 0,
        tracer: Tracer | None = None,
    ) -> None:
        """Without `wanted_gpus` the fleet is what the cluster has, which should be `workers_min` at least;
        without `tracer` nothing is traced.
        """
        self._desk = Desk(
            board=board,
            parameters=parameters,
            epoch=epoch,
            lane=lane,
            fleet=fleet,
            updates=updates,
            clock=clock,
            metrics=metrics,
            tracer=tracer or NoOpTracer(),
        )
        self._arrivals = arrivals
        self._inbox = inbox
        self._sweep_ms = sweep_ms
        self._roster = Roster(
            slots=fleet.slots,
            workers=self._desk.workers,
            running=self._desk.running,
            metrics=metrics,
            at_least=workers_min if wanted_gpus is None else None,
        )
        self._roll_call = RollCall(self._desk, settlement, self._roster)
        self._moves = Moves(self._desk)
        self._replacements = Replacements(self._desk, within_ms=drain_within_ms)
        self._scaling = None if wanted_gpus is None else Scaling(self._desk, wanted_gpus=wanted_gpus)
        self._backlog: Backlog | None = None
        """What waited when this scheduler took over; None: all of it is on the board."""
        self._fleet_changed = False
        self._closing_down = False
        self._swept_ms = 0
        self._kept_ms = 0
        self._journaled_ms = 0
        self._tidy_at_ms = clock.now_ms() + _TIDY_FIRST_MS
        self._shown_ms = 0

    @property
    def desk(self) -> Desk:
        """For questions; only the loop changes what is on it."""
        return self._desk

    @property
    def board(self) -> Board:
        """For questions; only the loop changes it."""
        return self._desk.board

    async def run(self) -> None:
        """Turn until cancelled; raises Deposed when another scheduler leads, and DatabaseWentBack."""
        while True:
            await self._inbox.wait(0 if self._is_behind else self._sweep_ms / 1000)
            await self.cycle()

    @property
    def _is_behind(self) -> bool:
        return self._desk.notes.behind or (self._backlog is not None and self._backlog.is_ready)

    async def cycle(self) -> None:
        """Turn once."""
        began_ns = time.monotonic_ns()
        notices: set[str] = set()
        accounts: set[str] = set()
        items = self._inbox.drain()
        await self._roll_call.save_checkpoints(items)
        for item in items:
            self._take(item, notices, accounts)
        now_ms = self._desk.clock.now_ms()
        if now_ms - self._swept_ms >= self._sweep_ms:
            self._swept_ms = now_ms
            self._fleet_changed = True
            unheeded = await self._arrivals.unheeded()
            notices.update(unheeded)
            if len(unheeded) >= MOST_SWEPT and self._backlog is None:
                self._swept_ms = 0  # there may be more
            accounts |= self._arrivals.renewed(now_ms)
            if self._scaling is not None:
                self._scaling.go_on(now_ms)
            self._replacements.go_on(now_ms)
            if self._closing_down:
                self._roll_call.hand_over()
        if self._fleet_changed:
            self._fleet_changed = False
            self._roll_call.heed(await self._desk.lane.run(operations.wishes))
        if self._backlog is not None:
            self._backlog.noticed(accounts)
        if accounts:
            self._desk.tell(*await self._arrivals.of_accounts(accounts))
        if notices:
            self._desk.tell(*await self._arrivals.of_jobs(notices))
        if self._backlog is not None:
            self._tell_backlog(self._backlog)
        while await self._moves.make():
            pass
        await self._keep(now_ms)
        self._show(began_ns)

    def _tell_backlog(self, backlog: Backlog) -> None:
        until_ns = time.monotonic_ns() + _TELL_NS
        while backlog.is_ready and time.monotonic_ns() < until_ns:
            self._desk.tell_of_waiting(backlog.next())
        self._desk.tell(*backlog.progress())
        again = backlog.again()
        if again:
            self._inbox.put(AccountsChanged(account_ids=tuple(again)))
        if backlog.ended:
            self._backlog = None

    async def _keep(self, now_ms: int) -> None:
        """Do what is done now and then."""
        if now_ms - self._kept_ms >= _KEEP_TIME_MS:
            kept_ms, self._kept_ms = self._kept_ms, now_ms
            # Nothing sweeps accounts: whoever granted time may have died before it could say so.
            self._inbox.put(AccountsChanged(account_ids=tuple(self._desk.board.accounts_held())))
            await self._desk.lane.run(
                lambda connection: leadership.keep_time(connection, self._desk.epoch, now_ms, kept_ms=kept_ms)
            )
            holds = await self._desk.lane.run(ledger.open_holds)
            self._desk.metrics.holds_seen(
                holds=holds.count,
                held_ms=holds.held_ms,
                oldest_ms=None if holds.oldest_at is None else to_ms(holds.oldest_at),
            )
        if self._desk.notes.behind or now_ms - self._journaled_ms >= _JOURNAL_MS:
            self._journaled_ms = now_ms
            # While what waited is being told, that comes before its lines: they alone are a million.
            lines = self._desk.notes.lines(without_waiting=self._backlog is not None)
            await self._desk.lane.run(
                lambda connection: journal.write(connection, epoch=self._desk.epoch, lines=lines)
            )
        if now_ms >= self._tidy_at_ms:
            before = from_ms(now_ms - _JOURNAL_KEPT_MS)
            more = await self._desk.lane.run(
                lambda connection: journal.forget(connection, epoch=self._desk.epoch, before=before)
            )
            self._tidy_at_ms = now_ms + (_TIDY_ON_MS if more else _TIDY_MS)

    def _take(self, item: Item, notices: set[str], accounts: set[str]) -> None:
        match item:
            case JobsChanged():
                notices.update(item.job_ids)
            case AccountsChanged():
                accounts.update(item.account_ids)
            case FleetChanged():
                self._fleet_changed = True
            case RowsRead():
                pass  # it wakes the loop, which tells them anyway
            case ClosingDown():
                self._closing_down = True
                self._roll_call.close_down()
            case _:
                self._roll_call.take(item)

    async def adopt(
        self,
        restored: Iterable[Event],
        *,
        backlog: Backlog,
        running: Iterable[Running],
        specs: Mapping[str, RenderSpec],
        updates: Iterable[JobUpdate],
        wishes: Wishes,
    ) -> None:
        """Take over what the rows say; called once, before the first cycle. What waits follows as it is read.

        The reports of the workers that live are in the inbox already, but for those that are still awaited.
        A running attempt whose worker is not there, or reported another life, is lost; one that its worker
        never got is given to it now. Raises Deposed.
        """
        self._desk.tell(*restored)
        self._backlog = None if backlog.ended else backlog
        for one in running:
            self._desk.running.put(one)
        self._roll_call.heed(wishes)
        for update in updates:
            self._desk.updates.publish(update)
        items = self._inbox.drain()
        await self._roll_call.save_checkpoints(items)
        for item in items:
            self._take(item, set(), set())
        self._roll_call.fleet_met()
        for one in list(self._desk.running):
            self._roll_call.adopt(one, specs[one.attempt_id])

    @property
    def handed_over(self) -> bool:
        """Whether it was told that it closes down, and nothing runs any more.

        Before it was told, a batch of starts may be in its commit.
        """
        return self._closing_down and not self._desk.running

    @property
    def workers(self) -> int:
        """How many workers have joined and are not lost."""
        return len(self._desk.workers)

    @property
    def expected_workers(self) -> int:
        """How many workers there should be in a fleet that is not scaled."""
        return self._roster.expected

    def worker_views(self) -> tuple[WorkerView, ...]:
        """Return what each of them is and has in hand."""
        return tuple(self._view(worker_id) for worker_id in sorted(self._desk.workers.ids()))

    def _view(self, worker_id: str) -> WorkerView:
        report = self._desk.workers.report(worker_id)
        assert report is not None
        with_gpu = self._desk.running.with_gpu(worker_id)
        leaving = self._desk.workers.leaving(worker_id)
        return WorkerView(
            worker_id=worker_id,
            idle_since_ms=self._desk.workers.idle_since_ms(worker_id),
            healthy=report.healthy,
            sentence=report.sentence,
            device=report.device,
            speed_permille=report.speed_permille,
            memory_bytes=report.memory_bytes,
            memory_used_bytes=report.memory_used_bytes,
            warm_models=report.warm_models,
            active=None if with_gpu is None else _run_view(with_gpu, report),
            parked=tuple(_run_view(one, report) for one in self._desk.running.parked_on(worker_id)),
            leaves_since_ms=None if leaving is None else leaving.since_ms,
            leaves_because="" if leaving is None else leaving.because.value,
        )

    def queue_statuses(self, job_ids: Iterable[str]) -> Mapping[str, QueueStatus]:
        """Return why each of these jobs waits; jobs that do not wait, or are not known yet, are absent."""
        statuses = {}
        for job_id in job_ids:
            status = self._desk.board.status(JobId(job_id))
            if status is not None:
                statuses[job_id] = QueueStatus(
                    reason=QueueReason(status.reason.value),
                    sentence=status.sentence,
                    position=status.position,
                )
                if status.position and not self._desk.board.is_whole:
                    statuses[job_id] = _READING
        return statuses

    def untold(self, tier: Tier) -> int:
        """Return about how many jobs wait that are not on the board yet, because a restart was just now."""
        return 0 if self._backlog is None else self._backlog.untold(tier)

    def _show(self, began_ns: int) -> None:
        now_ms = self._desk.clock.now_ms()
        for tier in Tier:
            self._desk.metrics.queue_seen(
                tier=tier,
                queued=self._desk.board.queued(tier) + self.untold(tier),
                running=self._desk.board.running(tier),
                oldest_ms=self._desk.board.oldest_arrival_ms(tier),
                now_ms=now_ms,
            )
        self._desk.metrics.parked_seen(self._desk.running.parked)
        if now_ms - self._shown_ms >= _SHOW_FLEET_MS:
            self._shown_ms = now_ms
            self._roster.look(now_ms)
            self._desk.metrics.fleet_seen(self._roster.states(now_ms))
        self._desk.metrics.cycle_ended(took_ns=time.monotonic_ns() - began_ns, now_ms=now_ms)


def _run_view(running: Running, report: WorkerReport) -> WorkerRun:
    told = next((run for run in in_hand(report) if run.attempt_id == running.attempt_id), None)
    return WorkerRun(
        attempt_id=running.attempt_id,
        job_id=running.job_id,
        account_id=running.account_id,
        tier=running.tier,
        started_ms=running.started_ms,
        parked_since_ms=running.parked_since_ms,
        step=0 if told is None else told.step,
        steps=0 if told is None else told.steps,
    )
