"""What should be done now. Looks at the cell, tries its decisions on it, and leaves it as it was.

In this order: attempts wished away, jobs lost too often, fast starts (on idle workers, then
in place of relax runs), parked runs whose workers are free, parked runs that another worker can go on with,
relax starts, and fast starts again where relax has taken all it can.

While a queue is read again after a restart, the plan ends before the first start that might be another's:
what it holds is the beginning of what it would hold if all were there.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.policy.cell import Cell
from scheduler.policy.decisions import (
    ChosenBecause,
    Decision,
    GiveUp,
    Migrate,
    Resume,
    Start,
    StartKeys,
    Stop,
)
from scheduler.policy.fair_queue import Head
from scheduler.policy.ids import Tier
from scheduler.policy.order import Lines, Order
from scheduler.policy.placement import Placement
from scheduler.policy.preemption import relax_floor
from scheduler.policy.trial import Trial


class Plan:
    """The decisions of one cycle, tried one after the other."""

    def __init__(self, cell: Cell, now_ms: int) -> None:
        self._cell = cell
        self._now_ms = now_ms
        self._fleet = cell.fleet
        self._parameters = cell.parameters
        self._orders = {
            tier: Order(queue, cell.accounts, cell.parameters, now_ms) for tier, queue in cell.queues.items()
        }
        self._trial = Trial(cell.queues, self._orders, cell.fleet)
        self._since_relax_turn = cell.fast_since_relax_turn
        self._ends = False
        """What comes next may be for somebody who is yet to be read."""
        self._relax_wants_turn = True
        """Until it was found that no relax work is old enough for one: a plan makes none older."""

    def decisions(self) -> list[Decision]:
        """Return what should be done now, in the order it is to be committed. To be called once."""
        decisions: list[Decision] = [*self._stops(), *self._give_ups()]
        try:
            decisions.extend(self._fast_starts())
            if not self._ends:
                decisions.extend(self._resumes())
                decisions.extend(self._migrations())
                decisions.extend(self._relax_starts())
            if self._fleet.open and not self._ends:
                # Relax has what it can take, so that the floor may bind no more.
                decisions.extend(self._fast_starts())
        finally:
            self._trial.take_back()
        return decisions

    def _stops(self) -> Iterator[Stop]:
        """Stop what its owner wants no more. A worker that is away is told when it is back."""
        for attempt_id in self._cell.to_stop:
            worker_id = self._cell.attempts[attempt_id].worker_id
            if self._fleet.is_present(worker_id):
                yield Stop(attempt_id=attempt_id, worker_id=worker_id, reason="Its owner cancelled the job.")

    def _give_ups(self) -> Iterator[GiveUp]:
        for job_id, reason in self._cell.to_give_up.items():
            yield GiveUp(job_id=job_id, reason=reason)

    def _fast_starts(self) -> Iterator[Start | Resume]:
        """Start fast jobs on idle workers, then in place of relax runs, up to what relax is left."""
        order = self._orders[Tier.FAST]
        if Tier.FAST in self._cell.paused:
            return
        most = self._fleet.taking - relax_floor(self._fleet.taking, self._parameters)
        relax_waits = self._relax_waits()
        lines = order.lines()
        while lines:
            at_floor = self._fleet.fast_held >= most
            parked = len(self._cell.parked) + self._trial.parked > 0
            if at_floor and (parked or relax_waits or not self._fleet.idle):
                return
            if at_floor and self._cell.queues[Tier.RELAX].edge is not None:
                self._ends = True  # relax that waits may be yet to be read, and then the floor binds
                return
            due = self._since_relax_turn >= self._parameters.relax_first_one_in - 1
            if due and self._fleet.idle and self._relax_wants_turn:
                turn = self._relax_turn()
                if turn is not None:
                    self._since_relax_turn = 0
                    yield turn
                    continue
                self._relax_wants_turn = False
            head = order.choose(lines.values())
            if head is None:
                break
            placement = self._fleet.place(head.job.fit, held_too=True) if self._fleet.idle else None
            if placement is None and not at_floor:
                placement = self._fleet.place_by_parking(head.job.fit, self._now_ms)
            if placement is None:
                del lines[head.job.fit]
                continue
            if not placement.warm and placement.parks is None:
                chosen = self._to_save_a_load(order, lines, head, placement, held_too=True)
                if chosen is None:
                    break
                head, placement = chosen
            start = self._start(order, lines, head, placement)
            self._since_relax_turn += 1
            yield start
        self._ends = self._cell.queues[Tier.FAST].edge is not None

    def _relax_turn(self) -> Start | Resume | None:
        """Return what relax that waited long takes before fast, one in a few, where the floor is not for it.

        There is none on a small fleet. On a mixed one it may be of GPUs that cannot run what waits, and a run
        that nothing else can go on with waits for its own GPU, which fast would take again and again.
        """
        floor = relax_floor(self._fleet.taking, self._parameters)
        long_ago_ms = self._now_ms - self._parameters.aging_ms
        parked = self._cell.parked.longest_first()
        for attempt_id in parked:
            attempt = self._cell.attempts[attempt_id]
            assert attempt.parked_since_ms is not None
            if attempt.parked_since_ms > long_ago_ms:
                break
            kept = attempt.checkpoint
            if floor and kept is not None and self._fleet.relax_has(attempt.job.fit, kept.device):
                parked.pass_over_its_like()
                continue
            if (
                attempt.attempt_id not in self._trial.moved
                and self._fleet.hands(attempt.worker_id).active is None
            ):
                if not self._fleet.is_present(attempt.worker_id):
                    continue
                resume = Resume(
                    attempt_id=attempt.attempt_id,
                    worker_id=attempt.worker_id,
                    sheltered=True,
                    reason="It was parked for long, and relax has one turn in a few before fast.",
                )
                self._trial.resume(resume)
                return resume
        order = self._orders[Tier.RELAX]
        if Tier.RELAX in self._cell.paused or not self._fleet.open:
            return None
        lines = {
            fit: line
            for fit, line in order.lines().items()
            if not (floor and self._fleet.relax_has(fit)) and self._fleet.place(fit) is not None
        }
        oldest_ms = order.oldest_head_since_ms(lines.values())
        if oldest_ms is None or oldest_ms > long_ago_ms:
            return None
        head = order.choose(lines.values())
        if head is None:
            return None
        placement = self._fleet.place(head.job.fit)
        assert placement is not None
        if head.because is ChosenBecause.FIRST_IN_ORDER:
            head = head._replace(because=ChosenBecause.RELAX_TURN)
        return self._start(order, lines, head, placement, sheltered=True)

    def _resumes(self) -> Iterator[Resume]:
        """Let parked runs go on whose workers are free. That a tier is paused is for starts only."""
        for worker_id, attempt_id in self._fleet.resumable():
            resume = Resume(
                attempt_id=attempt_id,
                worker_id=worker_id,
                sheltered=self._cell.attempts[attempt_id].sheltered,
                reason="The fast job it was parked for has ended.",
            )
            self._trial.resume(resume)
            yield resume

    def _migrations(self) -> Iterator[Migrate]:
        """Give the runs that are parked longest to open workers that draw the same bits."""
        parked = self._cell.parked.longest_first()
        for attempt_id in parked:
            attempt = self._cell.attempts[attempt_id]
            assert attempt.parked_since_ms is not None
            parked_ms = self._now_ms - attempt.parked_since_ms
            if not self._fleet.open or parked_ms < self._parameters.park_patience_ms:
                break
            if attempt.checkpoint is None or attempt.attempt_id in self._trial.moved:
                continue
            if self._cell.jobs[attempt.job.job_id].cancel_wanted:
                continue
            placement = self._fleet.place_like(attempt.job.fit, attempt.checkpoint.device)
            if placement is None:
                parked.pass_over_its_like()
                continue
            migrate = Migrate(
                attempt_id=attempt.attempt_id,
                worker_id=attempt.worker_id,
                to=placement.worker_id,
                checkpoint=attempt.checkpoint,
                reason=f"It was parked for {parked_ms / 1000:,.1f} s, and another GPU was free.",
            )
            self._trial.migrate(attempt, migrate)
            yield migrate

    def _relax_starts(self) -> Iterator[Start]:
        """Start relax jobs on open workers."""
        order = self._orders[Tier.RELAX]
        if Tier.RELAX in self._cell.paused:
            return
        lines = order.lines() if self._fleet.open else {}
        while lines:
            head = order.choose(lines.values())
            if head is None:
                break
            placement = self._fleet.place(head.job.fit)
            if placement is None:
                del lines[head.job.fit]
                continue
            if not placement.warm:
                chosen = self._to_save_a_load(order, lines, head, placement, held_too=False)
                if chosen is None:
                    break
                head, placement = chosen
            yield self._start(order, lines, head, placement)
        self._ends = self._ends or self._cell.queues[Tier.RELAX].edge is not None

    def _start(
        self, order: Order, lines: Lines, head: Head, placement: Placement, *, sheltered: bool = False
    ) -> Start:
        """Start a job, and try it."""
        job, account, tier = head.job, head.account, head.job.tier
        queue, worker_id = self._cell.queues[tier], placement.worker_id
        checkpoint = self._cell.jobs[job.job_id].checkpoint
        if checkpoint is not None and checkpoint.device != self._fleet.device(worker_id):
            checkpoint = None
        charge = queue.charge(head, self._now_ms)
        chosen = queue.standing(queue.tag_entry(account, charge.start_tag, job), self._now_ms)
        virtual_time = queue.virtual_time
        self._trial.start(head, tier, charge, worker_id, placement.parks)
        return Start(
            job_id=job.job_id,
            account_id=account.account_id,
            tier=tier,
            worker_id=worker_id,
            charge=charge,
            keys=StartKeys(
                because=head.because,
                chosen=chosen,
                runner_up=order.first_besides(account, lines.values()),
                virtual_time=virtual_time,
            ),
            warm=placement.warm,
            parks=placement.parks,
            resume_from=checkpoint,
            sheltered=sheltered,
        )

    def _relax_waits(self) -> bool:
        """Return whether a relax job waits that only lacks a GPU."""
        order = self._orders[Tier.RELAX]
        return Tier.RELAX not in self._cell.paused and any(
            order.is_waited_in(line) and self._fleet.can_take(fit) for fit, line in order.lines().items()
        )

    def _to_save_a_load(
        self, order: Order, lines: Lines, first: Head, cold: Placement, *, held_too: bool
    ) -> tuple[Head, Placement] | None:
        """Return a job that the worker has the model for, if one is close enough behind the first.

        None: it may be one that is yet to be read.
        """
        if first.because is not ChosenBecause.FIRST_IN_ORDER:
            return first, cold
        loaded = self._fleet.warm_models(cold.worker_id)
        if not loaded:
            return first, cold
        warm_lines = [
            line
            for fit, line in lines.items()
            if fit.model in loaded and self._fleet.can_run_on(cold.worker_id, fit)
        ]
        warm = order.choose_warm(warm_lines, first)
        if not order.is_warm_choice_known(warm, first):
            return None
        if warm is None:
            return first, cold
        placement = self._fleet.place(warm.job.fit, held_too=held_too)
        assert placement is not None
        return warm, placement
