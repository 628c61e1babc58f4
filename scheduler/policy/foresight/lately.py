"""What came of late and how far predictions were off, and futures drawn from that."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from scheduler.policy.events import (
    AttemptFinished,
    AttemptLost,
    AttemptMigrated,
    AttemptRestored,
    AttemptStarted,
    Event,
    JobSubmitted,
    Outcome,
    WaitingRestored,
    WorkerJoined,
)
from scheduler.policy.foresight.roll_forward import Arrival, Draws
from scheduler.policy.ids import AccountId, AttemptId, WorkerId
from scheduler.policy.job import Job

SPAN_MS = 3_600_000
"""How far back: an hour knows who is at work now. A longer one knows the rate better and the people less."""

_MOST_ARRIVALS = 50_000
_MOST_ERRORS = 2_000
_COSTS = 4_096
"""Costs in a draw: more than there are different ones to tell apart."""

_BEYOND = 64
"""Of those that outlast all costs that were seen there are few at a time."""

_BEYOND_TAIL = 2
"""Such a run lasts x times what it has taken so far with chance 1 / x^2: half of them take 0.4 of it yet, one
in ten 2.2 of it. A Pareto tail, as the longer something overran the longer it is likely to go on."""

_STAYS = 0.6
"""The chance that an account goes on: the one number that was set so that tellings on a replayed day were
right as often as they say. With 0.75 futures are too much alike (79 % started before their p90), with 0.5
they come too late (63 % before their p50)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recent:
    """What is resampled."""

    span_ms: int
    """How long it was watched, at most `SPAN_MS`."""
    jobs: tuple[tuple[int, Job], ...]
    """(when after the span's begin, the job)."""
    cost_permille: tuple[int, ...]
    """What jobs took of what was predicted, at the speed of the worker."""


class Lately:
    """Watches the events that the board is told, all of them and in their order."""

    def __init__(self, began_ms: int) -> None:
        self._began_ms = began_ms
        self._jobs: deque[tuple[int, Job]] = deque(maxlen=_MOST_ARRIVALS)
        self._costs: deque[int] = deque(maxlen=_MOST_ERRORS)
        self._speeds: dict[WorkerId, int] = {}
        self._predicted: dict[AttemptId, int] = {}
        """GPU time on its worker."""
        self.mean_ms = 0
        """Predicted GPU time of a job: the mean that forgets, in which each job counts 1/256."""

    def apply(self, event: Event) -> None:
        """Take note of a fact."""
        match event:
            case JobSubmitted():
                came_ms = event.at_ms if event.accepted_ms is None else event.accepted_ms
                self._came(event.job, came_ms)
            case WaitingRestored():
                for job, _, came_ms, _ in event.jobs:
                    self._came(job, came_ms)
            case AttemptStarted():
                self._predict(event.attempt_id, event.charge.predicted_ms, event.worker_id)
            case AttemptRestored():
                self._predict(event.attempt_id, event.predicted_ms, event.worker_id)
            case AttemptMigrated():
                self._predicted[event.to_attempt_id] = self._predicted.pop(event.attempt_id)
            case AttemptFinished():
                predicted_ms = self._predicted.pop(event.attempt_id)
                if event.outcome is Outcome.SUCCEEDED:
                    self._costs.append(event.gpu_ms * 1000 // max(1, predicted_ms))
            case AttemptLost():
                self._predicted.pop(event.attempt_id)
            case WorkerJoined():
                self._speeds[event.worker.worker_id] = event.worker.speed_permille
            case _:
                pass

    def seen(self, now_ms: int, most: int = _MOST_ARRIVALS) -> Recent:
        """Return what came in the last hour, or since it began to watch; of more than `most`, the newest and
        the shorter time that they came in."""
        since_ms = max(self._began_ms, now_ms - SPAN_MS)
        while self._jobs and self._jobs[0][0] < since_ms:
            self._jobs.popleft()
        jobs = list(islice(reversed(self._jobs), most))
        jobs.reverse()
        if len(jobs) < len(self._jobs) or len(jobs) == _MOST_ARRIVALS:
            since_ms = jobs[0][0]
        return Recent(
            span_ms=max(1, now_ms - since_ms),
            jobs=tuple((came_ms - since_ms, job) for came_ms, job in jobs),
            cost_permille=tuple(self._costs),
        )

    def _came(self, job: Job, came_ms: int) -> None:
        predicted_ms = job.predicted_ms
        self.mean_ms += (predicted_ms - self.mean_ms) // 256 if self.mean_ms else predicted_ms
        if came_ms >= self._began_ms:
            self._jobs.append((came_ms, job))

    def _predict(self, attempt_id: AttemptId, predicted_ms: int, worker_id: WorkerId) -> None:
        self._predicted[attempt_id] = predicted_ms * 1000 // self._speeds.get(worker_id, 1000)


def resampled(recent: Recent, uniform: Callable[[], float], *, load_ms: int = 0) -> Draws:
    """Return chances like those that were seen. `uniform` gives numbers from 0 up to 1.

    What will come is what came, mirrored in time: whoever sent a job a minute ago is likely to send one in a
    minute, and who was last seen half an hour ago is not. Accounts are drawn, not jobs: people come and go in
    sessions, and if a hundred jobs come it matters whether they are of one account, which waits behind
    itself, or of many. So each account goes on, mirrored, with chance `_STAYS`; and it has newcomers like
    itself, each beginning at another moment of its past, so many that in the mean as much comes as came. How
    long a past the future is like is drawn too, from a quarter of the span up: a rate does not last.
    """
    span_ms = max(1, int(recent.span_ms / 4 ** uniform()))
    since_ms = recent.span_ms - span_ms
    sent: dict[AccountId, list[tuple[int, Job]]] = {}
    for at_ms, job in recent.jobs:
        if at_ms >= since_ms:
            sent.setdefault(job.account_id, []).append((recent.span_ms - at_ms, job))
    arrivals: list[Arrival] = []
    for account_id, jobs in sorted(sent.items()):
        if uniform() < _STAYS:
            arrivals.extend(_arrival(job, after_ms, account_id) for after_ms, job in jobs)
        for number in range(_poisson(uniform(), 1 - _STAYS)):
            shift_ms = int(uniform() * span_ms)
            name = AccountId(f"{account_id}~{number}")
            arrivals.extend(_arrival(job, (after_ms + shift_ms) % span_ms, name) for after_ms, job in jobs)
    arrivals.sort(key=lambda one: (one.after_ms, one.account_id))
    costs = recent.cost_permille or (1000,)
    return Draws(
        arrivals=tuple(arrivals),
        repeat_ms=span_ms,
        cost_permille=tuple(costs[int(uniform() * len(costs))] for _ in range(_COSTS)),
        beyond_permille=tuple(
            int(1000 * ((1 - uniform()) ** (-1 / _BEYOND_TAIL) - 1)) for _ in range(_BEYOND)
        ),
        load_ms=load_ms,
    )


def _arrival(job: Job, after_ms: int, account_id: AccountId) -> Arrival:
    return Arrival(
        after_ms=after_ms,
        account_id=account_id,
        like=job.account_id,
        tier=job.tier,
        predicted_ms=job.predicted_ms,
        step_ms=job.step_ms,
        model=job.model,
        memory_bytes=job.memory_bytes,
    )


def _poisson(uniform: float, mean: float) -> int:
    """Return a Poisson number."""
    chance = below = math.exp(-mean)
    number = 0
    while uniform >= below and number < 20:
        number += 1
        chance *= mean / number
        below += chance
    return number
