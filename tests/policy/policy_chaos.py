"""A cell to which anything may happen, and which checks after everything what must hold at any instant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import assert_never

from hypothesis import strategies as st
from policy_cell import PLAN, Cell, Restarted, Running, Served, a_worker

from scheduler.policy.board import Board
from scheduler.policy.decisions import ChosenBecause, Migrate, Start
from scheduler.policy.events import (
    AccountRestored,
    AttemptRestored,
    CancelWanted,
    CellRestored,
    Event,
    FundsChanged,
    JobSubmitted,
    LimitsChanged,
    ModelEvicted,
    ModelLoaded,
    RecoveryEnded,
    RefusedBecause,
    TierChanged,
    TierPaused,
    TierResumed,
    UsageReset,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerResumed,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker

ACCOUNTS = "abcd"
WORKERS = [
    a_worker("w0", gib=8, warm=("m",)),
    a_worker("w1", gib=8, warm=("n",), speed=1500, device="e"),
    a_worker("w2", gib=16, warm=("m",)),
    a_worker("w3", gib=16, warm=(), models=("n",)),
    a_worker("w4", gib=16, warm=("m", "n"), device="e"),
]
LIMITS = [
    PLAN,
    Limits(running=1, relax_running=1, accepted=10),
    Limits(running=5, relax_running=4, accepted=10),
]
Step = tuple[object, ...]

account_names = st.sampled_from(ACCOUNTS)
tiers = st.sampled_from(Tier)
numbers = st.integers(0, 100)
worker_ids = st.sampled_from([worker.worker_id for worker in WORKERS])
models = st.sampled_from(["m", "n"])
costs = st.integers(1, 60_000)
actual_costs = st.integers(0, 90_000)
step_costs = st.sampled_from([0, 1_000, 10_000])
sizes = st.sampled_from([4, 12])
spans = st.sampled_from([1, 999, 10_000, 20_000, 60_000])
seeds = st.integers(0, 9)

submits = st.tuples(st.just("submit"), account_names, tiers, costs, actual_costs, models, sizes, step_costs)
crowds = st.tuples(st.just("crowd"), tiers, models)
passes = st.tuples(st.just("pass"), spans)


def often(steps: st.SearchStrategy[Step], times: int) -> list[st.SearchStrategy[Step]]:
    """Return strategies that weigh more in `one_of`, which takes equal ones for one."""
    return [steps.map(tuple) for _ in range(times)]


# What makes a full fleet comes often, or there would be nothing to park.
steps = st.one_of(
    *often(submits, 6),
    *often(crowds, 12),
    *often(passes, 10),
    *often(st.tuples(st.just("join"), worker_ids), 3),
    st.tuples(st.just("cancel"), numbers, st.booleans()),
    *often(st.tuples(st.just("draw"), numbers, spans), 3),
    st.tuples(st.just("lose"), numbers),
    st.tuples(st.just("lose_worker"), worker_ids),
    st.tuples(st.just("join"), worker_ids),
    st.tuples(st.just("drain"), worker_ids),
    st.tuples(st.just("load"), worker_ids, models),
    st.tuples(st.just("evict"), worker_ids, models),
    st.tuples(st.just("pause"), tiers),
    st.tuples(st.just("change_tier"), numbers),
    st.tuples(st.just("limits"), account_names, st.sampled_from(LIMITS), st.sampled_from([0.5, 1, 3])),
    st.tuples(st.just("checkpoint"), numbers),
    st.tuples(st.just("store_checkpoints"), st.booleans()),
)
faults = st.one_of(
    steps,
    st.tuples(st.just("refuse"), st.sampled_from(RefusedBecause)),
    st.tuples(st.just("refuse_migration"), st.just(1)),
    st.tuples(st.just("funds"), account_names),
    st.tuples(st.just("reset"), account_names),
    st.tuples(st.just("restart"), seeds),
    st.tuples(st.just("copy"), st.just(1)),
)


def plans(steps: st.SearchStrategy[Step]) -> st.SearchStrategy[list[Step]]:
    """Return plans of which half are long: left alone, a list has five entries on average."""
    return st.one_of(st.lists(steps, max_size=60), st.lists(steps, min_size=40, max_size=80))


parameters = st.builds(
    Parameters,
    memory_span_ms=st.sampled_from([0, 600_000]),
    aging_ms=st.sampled_from([0, 30_000, 1_800_000]),
    affinity_ms=st.sampled_from([0, 60_000]),
    fast_usage_factor=st.sampled_from([0.0, 0.5, 1.0]),
    park_patience_ms=st.sampled_from([0, 10_000]),
    relax_first_one_in=st.sampled_from([2, 10]),
)


class Chaos(Cell):
    """A cell to which anything may happen, and which checks itself after everything."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters, workers=0)
        self.present: dict[WorkerId, Worker] = {}
        self.draining: set[WorkerId] = set()
        self.paused: set[Tier] = set()
        self.held: set[str] = set()
        self.answers_stops = True
        self.refuse_next: RefusedBecause | None = None
        self.disturbed = False
        """By a refusal or an end within the batch at hand: the rest of it was decided for another board."""
        self.refuse = self._refuse
        self.refuse_next_migration = False
        self.refuse_migration = self._refuse_migration
        self.virtual_times = dict.fromkeys(Tier, 0)
        for worker in WORKERS:
            self.bring(worker)
        for name in ACCOUNTS:
            self.account(name, limits=PLAN)

    def bring(self, worker: Worker) -> None:
        self.present[worker.worker_id] = worker
        self.draining.discard(worker.worker_id)
        self.join(worker)

    def play(self, steps: list[Step]) -> Chaos:
        for step in steps:
            self.take(*step)
            self.cycle()
        return self

    def cycle(self) -> None:
        """Decide until nothing comes between, and check."""
        self.decide()
        while self.disturbed:
            self.decide()
        self.look()

    def decide(self) -> list[Served]:
        self.disturbed = False
        return super().decide()

    def take(self, what: object, *details: object) -> None:
        match (what, *details):
            case (
                "submit",
                str(account),
                Tier() as tier,
                int(cost),
                int(actual),
                str(model),
                int(gib),
                int(ms),
            ):
                self.submit(account, cost, actual_ms=actual, tier=tier, model=model, gib=gib, step_ms=ms)
            case ("crowd", Tier() as tier, str(model)):
                for name in ACCOUNTS:
                    self.submit(name, 50_000, tier=tier, model=model, gib=4, step_ms=1000)
            case ("pass", int(duration)):
                self.run(until_ms=self.now_ms + duration)
            case ("cancel", int(number), bool(answers)) if self.jobs:
                self._cancel(sorted(self.jobs)[number % len(self.jobs)], answers)
            case ("draw", int(number), int(stored_in_ms)) if self.active():
                active = self.active()
                self.draw(active[number % len(active)], stored_in_ms)
            case ("lose", int(number)) if self.running:
                self.lose(sorted(self.running)[number % len(self.running)])
            case ("lose_worker", str(worker)) if worker in self.present:
                worker_id = WorkerId(worker)
                del self.present[worker_id]
                self.apply(WorkerLost(at_ms=self.now_ms, worker_id=worker_id))
                for attempt in [key for key, one in self.running.items() if one.worker_id == worker]:
                    self.lose(attempt)
            case ("join", str(worker)):
                self.bring(next(one for one in WORKERS if one.worker_id == worker))
            case ("drain", str(worker)):
                self._drain(WorkerId(worker))
            case ("load", str(worker), str(model)):
                self._warm(WorkerId(worker), lambda warm: warm | {model})
                self.apply(ModelLoaded(at_ms=self.now_ms, worker_id=WorkerId(worker), model=model))
            case ("evict", str(worker), str(model)):
                self._warm(WorkerId(worker), lambda warm: warm - {model})
                self.apply(ModelEvicted(at_ms=self.now_ms, worker_id=WorkerId(worker), model=model))
            case ("pause", Tier() as tier):
                self._pause(tier)
            case ("change_tier", int(number)) if self.waiting:
                job_id = sorted(self.waiting)[number % len(self.waiting)]
                self.held.discard(job_id)
                self.move(job_id)
                self.apply(TierChanged(at_ms=self.now_ms, job_id=JobId(job_id), tier=self.jobs[job_id].tier))
            case ("limits", str(account), Limits() as limits, float() | int() as weight):
                # A smaller plan stops nothing: what the caps promise is about starts.
                self.limits[account], self.weights[account] = limits, round(weight * 1000)
                self.apply(
                    LimitsChanged(
                        at_ms=self.now_ms,
                        account_id=AccountId(account),
                        limits=limits,
                        weight_milli=self.weights[account],
                    )
                )
            case ("checkpoint", int(number)) if self.running:
                self.save_checkpoint(sorted(self.running)[number % len(self.running)])
            case ("store_checkpoints", bool(stores)):
                self.stores_checkpoints = stores
            case ("refuse", RefusedBecause() as because):
                self.refuse_next = because
            case ("refuse_migration", _):
                self.refuse_next_migration = True
            case ("funds", str(account)):
                self._funds(account)
            case ("reset", str(account)):
                self.rows.usage[account] = 0.0
                self.apply(UsageReset(at_ms=self.now_ms, account_id=AccountId(account)))
            case ("restart", int(seed)):
                self.restart(Random(seed))
            case ("copy", _):
                self.go_on_with_a_copy()

    def active(self) -> list[AttemptId]:
        """Return the attempts that have a GPU."""
        return sorted(key for key, one in self.running.items() if one.active_since_ms is not None)

    def look(self) -> None:
        """Check what must hold after every cycle."""
        for tier in Tier:
            assert self.board.virtual_time(tier) >= self.virtual_times[tier], "V went back"
            self.virtual_times[tier] = self.board.virtual_time(tier)
        for name in self.limits:
            assert 0 <= self.board.share(AccountId(name), Tier.RELAX).usage < math.inf
        active = {one.worker_id: one for one in self.running.values() if one.active_since_ms is not None}
        for one in self.running.values():
            if one.is_parked and one.worker_id in self.present:
                assert active[one.worker_id].job.tier is Tier.FAST, "only fast keeps a run parked"
        idle = [
            worker for key, worker in self.present.items() if key not in active and key not in self.draining
        ]
        assert self.board.idle_workers() == len(idle)
        for job_id in self.startable():
            job = self.jobs[job_id]
            if job.tier is Tier.RELAX or not self.floor_binds(more=1):
                assert not [worker for worker in idle if fits(worker, job)], f"{job_id} could start"
        if idle:
            for one in self.running.values():
                if one.is_parked and one.job.job_id not in self.unwanted:
                    assert not self._could_migrate(one, idle), "it waited longest for a GPU open to relax"

    def startable(self) -> list[str]:
        """Return the waiting jobs that no gate holds."""
        return [
            job_id
            for job_id in sorted(self.waiting - self.held)
            if self.jobs[job_id].tier not in self.paused
            and self._below_caps(self.jobs[job_id])
            and self.losses.get(job_id, 0) < self.parameters.max_losses
        ]

    def relax_has_work(self) -> bool:
        """Return whether relax work is parked, or waits for nothing but a GPU."""
        taking = [worker for key, worker in self.present.items() if key not in self.draining]
        return any(one.is_parked for one in self.running.values()) or any(
            self.jobs[job_id].tier is Tier.RELAX and any(fits(worker, self.jobs[job_id]) for worker in taking)
            for job_id in self.startable()
        )

    def floor_binds(self, more: int = 0) -> bool:
        """Return whether fast with so many GPUs more would have some that are relax's."""
        taking = [key for key in self.present if key not in self.draining]
        held = sum(
            one.job.tier is Tier.FAST and one.active_since_ms is not None and one.worker_id in taking
            for one in self.running.values()
        )
        floor = 0 if len(taking) < 4 else max(1, math.ceil(len(taking) / 20))
        return self.relax_has_work() and held + more > len(taking) - floor

    def settle(self) -> Chaos:
        """Open every gate and let everything end."""
        self.refuse_next = None
        self.refuse_next_migration = False
        for tier in Tier:
            if tier in self.paused:
                self._pause(tier)
        for worker in WORKERS:
            self.bring(worker)
        for name in ACCOUNTS:
            self._funds(name)
        self.run()
        self.look()
        assert not self.waiting
        assert not self.running
        assert self.board.parked() == 0
        assert self.board.idle_workers() == len(WORKERS)
        return self

    def restart(self, order: Random | None = None) -> None:
        """Have another scheduler take over, that knows the rows alone. They come in any order."""
        facts = recovery(self, order)
        self.held.clear()
        self.board = Board(self.parameters)
        self.journal.append(Restarted())
        for event in facts:
            self.apply(event)

    def go_on_with_a_copy(self) -> None:
        """Go on with a board that was made of the facts of this one."""
        self.store_tags()
        facts = self.board.facts(self.now_ms)
        self.board = Board(self.parameters)
        self.journal.append(Restarted())
        for event in facts:
            self.apply(event)

    def stop(self, running: Running) -> None:
        if self.answers_stops:
            self.disturbed = True
            super().stop(running)

    def _start(self, start: Start) -> Served:
        parked = {one.worker_id for one in self.running.values() if one.is_parked}
        active = {one.worker_id for one in self.running.values() if one.active_since_ms is not None}
        job = self.jobs[start.job_id]
        assert start.worker_id in self.present
        assert start.worker_id not in self.draining
        if start.tier is Tier.RELAX:
            assert start.parks is None, "relax parks nobody"
            assert start.worker_id not in parked, "a parked run goes on before a new job starts there"
        elif start.parks is not None and not self.disturbed:
            idle = [
                key
                for key, worker in self.present.items()
                if key not in active and key not in self.draining and fits(worker, job)
            ]
            assert not idle, "nobody is parked while a GPU is idle"
        if not self.disturbed:
            self._check_order(start)
        served = super()._start(start)
        if start.tier is Tier.FAST and not self.disturbed:
            assert not self.floor_binds(), "fast leaves relax its floor"
        return served

    def _check_order(self, start: Start) -> None:
        """Check a start against the order of all that could have started in its place."""
        chosen, keys = self.jobs[start.job_id], start.keys
        assert keys.virtual_time == self.board.virtual_time(start.tier)
        assert start.charge.start_tag == self._rank(chosen)[0]
        worker = self.present[start.worker_id]
        first = min(
            self._rank(self.jobs[job_id])
            for job_id in self.startable()
            if self.jobs[job_id].tier is start.tier and fits(worker, self.jobs[job_id])
        )
        match keys.because:
            case ChosenBecause.FIRST_IN_ORDER:
                assert self._rank(chosen) == first
            case ChosenBecause.MODEL_WARM:
                assert start.warm
                assert self._rank(chosen)[0] <= first[0] + self.parameters.affinity_ms * 1000
            case ChosenBecause.AGED:
                assert start.charge.virtual_time == keys.virtual_time, "an aged start does not move V"
            case ChosenBecause.RELAX_TURN:
                assert start.tier is Tier.RELAX
                assert start.sheltered
                taking = len(self.present.keys() - self.draining)
                if taking < self.parameters.relax_floor_from_gpus:
                    assert self._rank(chosen) == first
            case _:
                assert_never(keys.because)

    def _rank(self, job: Job) -> tuple[int, float, int, str]:
        tag = self.board.share(job.account_id, job.tier).tag
        assert tag is not None, "what could start has a tag"
        used = 0.0
        if job.tier is Tier.RELAX:
            stored = self.board.share(job.account_id, Tier.RELAX).usage
            used = stored * 1000 / self.weights[job.account_id]
        return tag, used, job.arrival, job.account_id

    def _cancel(self, job_id: str, answers: bool) -> None:
        self.held.discard(job_id)
        self.answers_stops = answers
        self.cancel(job_id)
        self.decide()

    def _warm(self, worker_id: WorkerId, change: Callable[[frozenset[str]], frozenset[str]]) -> None:
        worker = self.present.get(worker_id)
        if worker is not None:
            self.present[worker_id] = replace(worker, warm_models=change(worker.warm_models))

    def _drain(self, worker_id: WorkerId) -> None:
        if worker_id in self.draining:
            self.draining.remove(worker_id)
            self.apply(WorkerResumed(at_ms=self.now_ms, worker_id=worker_id))
        elif worker_id in self.present:
            self.draining.add(worker_id)
            self.apply(WorkerDraining(at_ms=self.now_ms, worker_id=worker_id))

    def _pause(self, tier: Tier) -> None:
        self.apply((TierResumed if tier in self.paused else TierPaused)(at_ms=self.now_ms, tier=tier))
        self.paused ^= {tier}

    def _funds(self, account: str) -> None:
        self.held -= {job_id for job_id in self.held if self.jobs[job_id].account_id == account}
        self.apply(FundsChanged(at_ms=self.now_ms, account_id=AccountId(account)))

    def _refuse(self, start: Start) -> RefusedBecause | None:
        because, self.refuse_next = self.refuse_next, None
        self.disturbed |= because is not None
        if because is RefusedBecause.FUNDS:
            self.held.add(start.job_id)
        return because

    def _refuse_migration(self, migrate: Migrate) -> bool:
        refused, self.refuse_next_migration = self.refuse_next_migration, False
        self.disturbed |= refused
        return refused

    def _below_caps(self, job: Job) -> bool:
        mine = [one.job.tier for one in self.running.values() if one.job.account_id == job.account_id]
        limits = self.limits[job.account_id]
        if len(mine) >= limits.running:
            return False
        return job.tier is Tier.FAST or mine.count(Tier.RELAX) < limits.relax_running

    def _could_migrate(self, run: Running, idle: list[Worker]) -> bool:
        if run.checkpoint is None or run.parked_since_ms is None:
            return False
        if self.now_ms - run.parked_since_ms < max(1, self.parameters.park_patience_ms):
            return False
        return any(worker.device == run.checkpoint.device and fits(worker, run.job) for worker in idle)


def fits(worker: Worker, job: Job) -> bool:
    """Return whether a worker could run a job."""
    return job.memory_bytes <= worker.memory_bytes and (worker.models is None or job.model in worker.models)


def recovery(chaos: Chaos, order: Random | None = None) -> list[Event]:
    """Return what a scheduler that takes over reads in the rows."""
    now_ms = chaos.now_ms
    cells: list[Event] = [
        CellRestored(
            at_ms=now_ms,
            tier=tier,
            virtual_time=chaos.rows.virtual_time[tier],
            decay_origin_ms=chaos.decay_origin_ms,
        )
        for tier in Tier
    ]
    accounts: list[Event] = [
        AccountRestored(
            at_ms=now_ms,
            account_id=AccountId(name),
            limits=limits,
            weight_milli=chaos.weights[name],
            shares={tier: chaos.rows.share(name, tier) for tier in Tier},
        )
        for name, limits in chaos.limits.items()
    ]
    rows: list[Event] = [
        JobSubmitted(
            at_ms=now_ms,
            job=chaos.jobs[job_id],
            losses=chaos.losses.get(job_id, 0),
            accepted_ms=chaos.accepted_ms[job_id],
            checkpoint=chaos.checkpoints.get(job_id),
        )
        for job_id in sorted(chaos.waiting)
    ]
    rows += [_attempt_row(chaos, attempt_id, one) for attempt_id, one in sorted(chaos.running.items())]
    rows += [WorkerJoined(at_ms=now_ms, worker=worker) for worker in chaos.present.values()]
    if order is not None:
        order.shuffle(rows)
    wishes: list[Event] = [WorkerDraining(at_ms=now_ms, worker_id=key) for key in sorted(chaos.draining)]
    wishes += [TierPaused(at_ms=now_ms, tier=tier) for tier in Tier if tier in chaos.paused]
    wishes += [CancelWanted(at_ms=now_ms, job_id=JobId(job_id)) for job_id in sorted(chaos.unwanted)]
    return [*cells, *accounts, *rows, *wishes, RecoveryEnded(at_ms=now_ms)]


def _attempt_row(chaos: Chaos, attempt_id: AttemptId, run: Running) -> AttemptRestored:
    return AttemptRestored(
        at_ms=chaos.now_ms,
        job=run.job,
        losses=chaos.losses.get(run.job.job_id, 0),
        accepted_ms=chaos.accepted_ms[run.job.job_id],
        attempt_id=attempt_id,
        worker_id=run.worker_id,
        predicted_ms=run.start.charge.predicted_ms,
        weight_milli=run.start.charge.weight_milli,
        charged_at_ms=run.start.charge.charged_at_ms,
        started_ms=run.started_ms,
        parked_since_ms=run.parked_since_ms,
        drawn=run.is_drawn,
        parks=run.parks,
        sheltered=run.sheltered,
        checkpoint=chaos.checkpoints.get(run.job.job_id),
    )
