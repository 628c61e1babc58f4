"""What the auditor's book-keeping (`replay.py`) remembers: accounts, runs, workers, tiers, and waits."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from scheduler.policy.ids import AccountId, AttemptId, Tier, WorkerId
from scheduler.policy.job import Fit, Job
from scheduler.policy.limits import Limits
from scheduler.policy.worker import Worker

NOTHING = (0,) * 7
"""A worker that takes part in nothing."""


class Contention:
    """What was so when a job became the next of its kind that its account may start."""

    __slots__ = (
        "aged",
        "at_ms",
        "came",
        "capacity_ms",
        "from_virtual",
        "low",
        "position",
        "refunded_ms",
        "room",
        "runs",
        "tag",
        "uncharged_ms",
        "unused",
        "virtual",
        "warm",
    )

    def __init__(self, at_ms: int) -> None:
        self.at_ms = at_ms
        self.capacity_ms = 0
        """GPU time its kind of job could have had in all, up to here."""
        self.room = 0
        """GPUs that its tier could have."""
        self.runs = 0
        """Runs of its tier on the GPUs that could take it, parked ones included."""
        self.came = 0
        """Runs that had migrated there from others."""
        self.position = 0
        """Starts of its tier so far."""
        self.tag: int | None = None
        """The largest its account has had since."""
        self.low: int | None = None
        """The smallest of the virtual time and all tags then; None: a tag was not known."""
        self.virtual = 0
        self.from_virtual = False
        """Its account came back: its tag was set from the virtual time."""
        self.unused = False
        """Its account had no use to be remembered for."""
        self.aged = self.warm = self.refunded_ms = self.uncharged_ms = 0


class Lane:
    """An account's waiting jobs of one tier and fit."""

    __slots__ = ("contention", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.contention: Contention | None = None


class Turn:
    """Where an account stands in one tier."""

    __slots__ = (
        "advance",
        "eligible",
        "eligible_ms",
        "finish_tag",
        "from_virtual",
        "known",
        "lanes",
        "most_cost",
        "most_error",
        "most_memory",
        "only_cost_ms",
        "remembered",
        "restored_tag",
        "set_number",
        "set_virtual",
        "spell",
        "tag",
        "unknown",
        "waiting",
    )

    def __init__(self, *, known: bool) -> None:
        self.known = known
        """Its finish tag is known."""
        self.finish_tag = 0
        self.tag: int | None = None
        self.restored_tag: int | None = None
        self.eligible = False
        self.unknown = False
        """Eligible, and its tag is not known."""
        self.eligible_ms = 0
        self.spell = 0
        """Counts the times it became eligible."""
        self.lanes: dict[Fit, Lane] = {}
        self.waiting = 0
        self.set_number = 0
        """Counts the times its tag was set or moved."""
        self.from_virtual = False
        self.set_virtual = 0
        """Virtual time when its tag was set."""
        self.remembered = 0
        """Memory in its tag."""
        self.advance = 0
        """How far its starts and their corrections moved its tags."""
        self.most_cost = 0
        """Of one start, in tag units."""
        self.most_memory = 0
        self.most_error = 0
        """The largest correction, in tag units."""
        self.only_cost_ms: int | None = None
        """The predicted cost of all its starts; 0 if they differ."""


class AccountState:
    """An account, by the records."""

    __slots__ = (
        "account_id",
        "heaviest_milli",
        "jobs",
        "known",
        "limits",
        "most_running",
        "relax_running",
        "running",
        "turns",
        "usage",
        "weight_milli",
    )

    def __init__(self, account_id: AccountId, limits: Limits, weight_milli: int, *, known: bool) -> None:
        self.account_id = account_id
        self.limits = limits
        self.weight_milli = self.heaviest_milli = weight_milli
        self.jobs = 0
        self.running = self.relax_running = self.most_running = 0
        self.known = known
        """All of its jobs are on record."""
        self.usage: float | None = 0.0 if known else None
        """Scaled forward to the decay origin; None: not known."""
        self.turns = {tier: Turn(known=known) for tier in (Tier.FAST, Tier.RELAX)}

    def free(self, tier: Tier) -> int:
        return self.limits.free(tier, running=self.running, relax_running=self.relax_running)


class Run:
    """A running attempt."""

    __slots__ = (
        "active_since_ms",
        "attempt_id",
        "charged_at_ms",
        "drawn",
        "job",
        "left_ms",
        "over",
        "parked_since_ms",
        "predicted_ms",
        "sheltered",
        "spent_ms",
        "weight_milli",
        "worker_id",
    )

    def __init__(
        self,
        attempt_id: AttemptId,
        job: Job,
        worker_id: WorkerId,
        *,
        predicted_ms: int,
        weight_milli: int,
        charged_at_ms: int,
        sheltered: bool,
    ) -> None:
        self.attempt_id = attempt_id
        self.job = job
        self.worker_id = worker_id
        self.predicted_ms = predicted_ms
        self.weight_milli = weight_milli
        self.charged_at_ms = charged_at_ms
        self.sheltered = sheltered
        self.active_since_ms: int | None = None
        self.parked_since_ms: int | None = None
        self.drawn = False
        """It needs no GPU any more."""
        self.spent_ms = 0
        """Of its GPU, up to when it last lost it."""
        self.left_ms = predicted_ms
        self.over = False
        """It has had what it was charged for, and still runs."""


class Returned(NamedTuple):
    """An account that became eligible at a virtual time that its tags had not reached."""

    remembered: int
    stored_usage: float
    """Per unit of weight."""
    account_id: AccountId
    set_number: int
    used_ms: float
    """Decayed use per unit of weight, then."""


class Waiting:
    """A job that does not run."""

    __slots__ = ("held", "job", "losses")

    def __init__(self, job: Job, losses: int) -> None:
        self.job = job
        self.losses = losses
        self.held = False
        """For funds, or given up: it takes no part."""


class Slot:
    """A worker that is present."""

    __slots__ = ("draining", "pools", "standing", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.draining = False
        self.pools: list[Pool] = []
        self.standing: tuple[int, ...] = NOTHING

    def can_run(self, fit: Fit) -> bool:
        worker = self.worker
        return fit.memory_bytes <= worker.memory_bytes and (
            worker.models is None or fit.model in worker.models
        )


class Hands:
    """What a worker has in hand, present or not."""

    __slots__ = ("active", "parked")

    def __init__(self) -> None:
        self.active: AttemptId | None = None
        self.parked: AttemptId | None = None


_OPEN, _HELD, _FAST, _RELAX, FAST_RUNS, _RELAX_RUNS, _PARKABLE = range(7)
"""What a worker is counted as."""


class Pool:
    """The workers that could take jobs of one fit, counted by what they do, and the time they offered."""

    __slots__ = ("_at_ms", "came", "capacity_ms", "counts")

    def __init__(self, at_ms: int) -> None:
        self.counts = [0] * 7
        self.capacity_ms = {Tier.FAST: 0, Tier.RELAX: 0}
        """GPU time that was open to the tier, or went to runs of it within what they were charged."""
        self.came = 0
        """Runs that migrated to one of them from one that could not take such jobs."""
        self._at_ms = at_ms

    @property
    def open(self) -> int:
        """Idle, with nothing parked."""
        return self.counts[_OPEN]

    @property
    def idle(self) -> int:
        """Idle, whatever is parked."""
        return self.counts[_OPEN] + self.counts[_HELD]

    @property
    def parkable(self) -> int:
        return self.counts[_PARKABLE]

    def runs(self, tier: Tier) -> int:
        return self.counts[FAST_RUNS if tier is Tier.FAST else _RELAX_RUNS]

    def room(self, tier: Tier) -> int:
        if tier is Tier.FAST:
            return self.idle + self.counts[_FAST]
        return self.open + self.counts[_RELAX]

    def advance(self, now_ms: int, closed: Collection[Tier]) -> None:
        passed_ms = now_ms - self._at_ms
        if passed_ms > 0:
            for tier in self.capacity_ms:
                if tier not in closed:
                    self.capacity_ms[tier] += self.room(tier) * passed_ms
            self._at_ms = now_ms

    def change(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        counts = self.counts
        for index in range(7):
            counts[index] += after[index] - before[index]


class Served:
    """Sums over the accounts that were last served after a given start: a Fenwick tree."""

    def __init__(self, starts: int) -> None:
        self._tree = [0] * (starts + 2)
        self._at: dict[AccountId, tuple[int, int]] = {}
        self._total = 0
        self.starts = 0

    def serve(self, account_id: AccountId, weight_milli: int) -> None:
        before = self._at.get(account_id)
        if before is not None:
            self._add(before[0], -before[1])
        self.starts += 1
        # Weight and count in one number: half the walks.
        value = (1 << 40) + weight_milli
        self._at[account_id] = (self.starts, value)
        self._add(self.starts, value)

    def since(self, position: int) -> tuple[int, int]:
        """Return how many accounts were last served behind this many starts, and their weights' sum."""
        total, index = self._total, position
        while index > 0:
            total -= self._tree[index]
            index &= index - 1
        return total >> 40, total & ((1 << 40) - 1)

    def _add(self, index: int, value: int) -> None:
        self._total += value
        size = len(self._tree)
        while index < size:
            self._tree[index] += value
            index += index & -index


class Queue:
    """One tier, by the records."""

    def __init__(self, tier: Tier, starts: int) -> None:
        self.tier = tier
        self.virtual_time: int | None = None
        self.aged_wait_ms: int | None = None
        self.served = Served(starts)
        self.aged = self.warm = 0
        self.most_cost_ms = 0
        """Of a job that was started."""
        self.refunded_ms = 0
        """Charged and not used, in all."""
        self.uncharged_ms = 0
        """Held of GPUs within what was charged, and in the end not counted as use."""
        self.unknown_tags = 0
        """Eligible accounts whose tags are not known."""
        self.contending: dict[Fit, int] = {}
        """Lanes that may start, by fit."""
        self.tags: dict[Fit, list[tuple[int, AccountId]]] = {}
