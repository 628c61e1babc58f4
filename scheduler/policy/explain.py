"""Why a live job is where it is: every gate that holds it, or its place, and by how much its wait is bounded.

The numbers and the sentences are for the job's owner, so no other account and no job of others is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile

from scheduler.policy import status, usage
from scheduler.policy.account import Account
from scheduler.policy.attempt import Attempt
from scheduler.policy.cell import Cell, Live, State
from scheduler.policy.fair_queue import FairQueue
from scheduler.policy.ids import JobId, Tier
from scheduler.policy.job import Fit, Job
from scheduler.policy.parameters import Parameters
from scheduler.policy.preemption import relax_floor
from scheduler.policy.status import JobStatus, QueueReason

_MOST_WALKED = 2_000
"""Of a board with more that could start, that runs, or that it could run on, no more is told than what needs
no walk over all of it: whoever may ask may ask often, and the scheduler waits meanwhile."""


class Stage(StrEnum):
    """Where a live job is."""

    WAITING = "waiting"
    GIVEN_UP = "given_up"
    """It is about to fail."""
    RUNNING = "running"
    PARKED = "parked"
    """It was running and waits on its GPU for a fast job to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a job stands in the order of its tier. Tags are GPU-microseconds per unit of weight."""

    position: int
    """Among the jobs that could start; 1 is next, 0: a gate holds it, not the order."""
    of: int
    """How many could start."""
    tag: int
    """What the job is, or would be, compared by: that of its account's next job, moved by those before it."""
    served: int
    """The tag being served: the largest that its tier has started."""
    used_per_weight_ms: float
    """Decayed GPU-milliseconds of its account over its weight; it decides between equal tags."""
    memory: int
    """What of a tag its account's use is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """What has to end first."""

    own: bool
    """Only attempts of its own account count: the account's caps hold the job."""
    earlier: int
    """Jobs of its own account and tier that wait and came before it."""
    running: int
    """Attempts that have a GPU it could run on."""
    parked: int
    """Runs that go on before any new relax job starts on their GPUs."""
    fast_waiting: int
    """Fast jobs that could start, of which a relax job waits for all."""
    soonest_end_ms: int | None
    """When the first of the running ones will probably end; None: none runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Within what a job starts, as long as the fleet stays as it is and jobs take what was predicted."""

    within_ms: int
    """Of the accounts that are there now, by their tags (B2)."""
    newcomer_ms: int
    """What each account adds that comes before the job starts."""
    whatever_ms: int | None
    """Whoever comes: within this it is taken for its age. None: it is not the first of its account."""
    gpus: int
    """That it counts on: those it could run on, without any that the other tier may take."""
    calm_ms: int | None
    """`within_ms` if no fast job ran or came; None in fast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Why a job is where it is."""

    job_id: JobId
    tier: Tier
    stage: Stage
    gates: tuple[JobStatus, ...]
    """All that hold it, first those that others must open. Empty: only the order does, or it has a GPU."""
    place: Place | None
    """None: it does not wait."""
    before: Before | None
    """None: a gate holds it that no end of an attempt opens, it does not wait, or there is too much to look
    at."""
    bound: Bound | None
    """None: its wait has none, for a gate holds it, or fast may take every GPU it could run on; or there is
    too much to look at to work it out."""
    started_ms: int | None
    ends_ms: int | None
    """When it will probably end, if it keeps its GPU; of a parked run, when the job it is parked for will."""
    parked_since_ms: int | None
    parks: int
    """How often it was parked so far."""
    sentences: tuple[str, ...]


def explain(cell: Cell, job_id: JobId, now_ms: int) -> Explanation | None:
    """Return why a job is where it is; None: it is not on the board.

    O(accounts that could start + attempts + workers) on boards up to `_MOST_WALKED` of each; beyond, it tells
    less, in O(the account's own jobs).
    """
    live = cell.jobs.get(job_id)
    if live is None:
        return None
    if live.attempt_id is not None:
        return _of_running(cell, cell.attempts[live.attempt_id], now_ms, cancelled=live.cancel_wanted)
    if live.state is State.GIVEN_UP:
        return _of_given_up(live.job, cell.to_give_up[job_id])
    return _of_waiting(cell, live, now_ms)


# -- jobs that wait ---------------------------------------------------------------------------------


def _of_waiting(cell: Cell, live: Live, now_ms: int) -> Explanation:
    job = live.job
    gates = tuple(_gates(cell, live))
    place = _place(cell, live, now_ms)
    before = bound = None
    sentences = [gate.sentence for gate in gates]
    if not gates:
        position = status.status(cell, job.job_id)
        assert position is not None
        sentences += [position.sentence, *_of_place(place, job.tier)]
        if _runs_little(cell) and cell.queues[job.tier].could_start <= _MOST_WALKED:
            before = _before(cell, job)
            bound = _bound(cell, job, place, now_ms)
            sentences += _of_before(before, now_ms)
            sentences += _of_bound(bound, job.tier, place, cell.parameters)
    elif [gate.reason for gate in gates] == [QueueReason.CONCURRENCY_LIMIT] and _runs_little(cell):
        before = _before_own(cell, job)
        sentences += _of_before(before, now_ms)
    return Explanation(
        job_id=job.job_id,
        tier=job.tier,
        stage=Stage.WAITING,
        gates=gates,
        place=place,
        before=before,
        bound=bound,
        started_ms=None,
        ends_ms=None,
        parked_since_ms=None,
        parks=0,
        sentences=tuple(sentences),
    )


def _runs_little(cell: Cell) -> bool:
    """Return whether attempts and workers can be walked over."""
    return len(cell.attempts) <= _MOST_WALKED and cell.fleet.taking <= _MOST_WALKED


def _gates(cell: Cell, live: Live) -> Iterator[JobStatus]:
    job, account = live.job, cell.accounts[live.job.account_id]
    if job.tier in cell.paused:
        yield status.tier_paused(job.tier)
    if live.state is State.HELD:
        yield status.FUNDS
    lack = cell.fleet.lacks(job.fit, draining_count=False)
    if lack is not None:
        yield status.no_worker(lack)
    if sum(1 for _ in _earlier(account, job)) >= account.free(job.tier):
        yield status.CONCURRENCY_LIMIT


def _earlier(account: Account, job: Job) -> Iterator[Job]:
    """Return the waiting jobs of the same account and tier that are before a job."""
    return takewhile(
        lambda other: (other.arrival, other.job_id) < (job.arrival, job.job_id), account.turn(job.tier).jobs()
    )


def _place(cell: Cell, live: Live, now_ms: int) -> Place:
    job = live.job
    queue, account = cell.queues[job.tier], cell.accounts[job.account_id]
    memory = queue.memory(account, now_ms)
    step = queue.steps(account, now_ms)
    now = status.status(cell, job.job_id)
    assert now is not None
    return Place(
        position=now.position,
        of=queue.could_start,
        tag=queue.next_tag(account, now_ms) + sum(map(step, _earlier(account, job))),
        served=queue.virtual_time,
        used_per_weight_ms=account.usage * 1000 / account.weight_milli / queue.growth(now_ms),
        memory=memory,
    )


def _before(cell: Cell, job: Job) -> Before:
    able = _able(cell, job.fit)
    here = [one for one in cell.attempts.values() if one.worker_id in able and not one.drawn]
    active = [one for one in here if one.parked_since_ms is None]
    relax = job.tier is Tier.RELAX
    return Before(
        own=False,
        earlier=sum(1 for _ in _earlier(cell.accounts[job.account_id], job)),
        running=len(active),
        parked=len(here) - len(active) if relax else 0,
        fast_waiting=cell.queues[Tier.FAST].could_start if relax and Tier.FAST not in cell.paused else 0,
        soonest_end_ms=min((one.ends_ms for one in active), default=None),
    )


def _before_own(cell: Cell, job: Job) -> Before:
    """Return which attempts of its own account one has to end for a job at the caps."""
    account = cell.accounts[job.account_id]
    own = [one for one in cell.attempts.values() if one.job.account_id == job.account_id]
    if account.running < account.limits.running:
        own = [one for one in own if one.is_relax]
    active = [one for one in own if one.parked_since_ms is None]
    return Before(
        own=True,
        earlier=sum(1 for _ in _earlier(account, job)),
        running=len(active),
        parked=len(own) - len(active),
        fast_waiting=0,
        soonest_end_ms=min((one.ends_ms for one in active), default=None),
    )


def _able(cell: Cell, fit: Fit) -> dict[str, int]:
    """Return the workers that take jobs and could run such a one, with their speeds."""
    return {
        worker.worker_id: worker.speed_permille
        for worker, draining in cell.fleet.workers()
        if not draining and cell.fleet.can_run_on(worker.worker_id, fit)
    }


def _bound(cell: Cell, job: Job, place: Place, now_ms: int) -> Bound | None:
    """Return the bound B2 for the job with the numbers of now in it.

    While the job waits, every GPU it counts on is busy with what goes before it: the rest of what runs now,
    at most c_max each; of every other account, jobs whose tags lie between V and the job's, w (T - V), and
    the one that goes over it, c_max; the earlier jobs of its own account; and the runs that are parked now.
    """
    parameters, queue, account = cell.parameters, cell.queues[job.tier], cell.accounts[job.account_id]
    able = _able(cell, job.fit)
    floor = relax_floor(cell.fleet.taking, parameters)
    others_take = floor if job.tier is Tier.FAST else cell.fleet.taking - floor
    sure = len(able) - others_take
    if sure <= 0:
        return None
    others = [one for one in queue.accounts() if one is not account]
    distance = max(0, place.tag - place.served)
    c_max = parameters.max_predicted_ms
    work_ms = sum(_service_ms(queue, one, distance) + c_max for one in others)
    work_ms += sum(other.predicted_ms for other in _earlier(account, job))
    if job.tier is Tier.RELAX:
        work_ms += len(cell.parked) * c_max
    slowest = min(able.values(), default=1000)

    def within(gpus: int, ms: int) -> int:
        return (c_max + -(-ms // gpus)) * 1000 // slowest

    newcomer_ms = within(sure, _service_ms(queue, account, distance) + c_max) - within(sure, 0)
    lane = account.turn(job.tier).lanes[job.fit]
    whatever_ms = None
    if lane.head_job_id == job.job_id:
        older = sum(
            lane_of.head_job_id is not None and lane_of.head_since_ms <= lane.head_since_ms
            for one in others
            for lane_of in one.turn(job.tier).lanes.values()
        )
        aged_ms = max(0, lane.head_since_ms + parameters.aging_ms - now_ms)
        # Between two that are taken for their age others take their share, and the last of them goes over.
        turns = (parameters.aged_one_in + 1) * (older + 1)
        whatever_ms = aged_ms + within(sure, turns * c_max)
    return Bound(
        within_ms=within(sure, work_ms),
        newcomer_ms=newcomer_ms,
        whatever_ms=whatever_ms,
        gpus=sure,
        calm_ms=within(len(able), work_ms) if job.tier is Tier.RELAX else None,
    )


def _service_ms(queue: FairQueue, account: Account, distance: int) -> int:
    """Return what an account may be served while tags move by `distance`."""
    weight_milli = usage.FAST_WEIGHT_MILLI if queue.tier is Tier.FAST else account.weight_milli
    return weight_milli * distance // 1_000_000


# -- jobs that run ----------------------------------------------------------------------------------


def _of_running(cell: Cell, attempt: Attempt, now_ms: int, *, cancelled: bool) -> Explanation:
    times = f"{attempt.parks} times" if attempt.parks != 1 else "once"
    ends_ms: int | None = attempt.ends_ms
    if attempt.parked_since_ms is None:
        sentences = ["It is drawn, and ends when its pictures are stored."]
        if not attempt.drawn:
            sentences = [f"It runs, and will probably end {_in(attempt.ends_ms - now_ms)}."]
        if attempt.parks:
            sentences.append(f"It was parked for fast jobs {times}, and lost nothing by it but time.")
        if attempt.sheltered and not attempt.drawn:
            sentences.append("It had its turn before fast jobs, so none takes its GPU.")
    else:
        active = cell.fleet.hands(attempt.worker_id).active
        holder = None if active is None else cell.attempts.get(active)
        ends_ms = None if holder is None else holder.ends_ms
        waited = about(now_ms - attempt.parked_since_ms)
        sentences = [
            f"It has been parked for {waited}, between two steps, as a fast job needed its GPU; "
            "no step is done twice."
        ]
        if ends_ms is not None:
            sentences.append(f"That job will probably end {_in(ends_ms - now_ms)}; then it goes on.")
        if attempt.checkpoint is not None:
            patience = about(cell.parameters.park_patience_ms)
            sentences.append(
                f"Once parked for {patience} it goes on on another GPU of its kind if one is free sooner."
            )
        left = cell.parameters.parks_before_spared - attempt.parks
        sentences.append(
            f"It was parked {times}"
            + ("; from now on it is spared if any other run can be parked." if left <= 0 else ".")
        )
    if cancelled:
        sentences.insert(0, "It was cancelled, and ends at its next step.")
    return Explanation(
        job_id=attempt.job.job_id,
        tier=attempt.job.tier,
        stage=Stage.RUNNING if attempt.parked_since_ms is None else Stage.PARKED,
        gates=(),
        place=None,
        before=None,
        bound=None,
        started_ms=attempt.started_ms,
        ends_ms=ends_ms,
        parked_since_ms=attempt.parked_since_ms,
        parks=attempt.parks,
        sentences=tuple(sentences),
    )


def _of_given_up(job: Job, reason: str) -> Explanation:
    return Explanation(
        job_id=job.job_id,
        tier=job.tier,
        stage=Stage.GIVEN_UP,
        gates=(),
        place=None,
        before=None,
        bound=None,
        started_ms=None,
        ends_ms=None,
        parked_since_ms=None,
        parks=0,
        sentences=(reason,),
    )


# -- sentences --------------------------------------------------------------------------------------


def _of_place(place: Place, tier: Tier) -> Iterator[str]:
    yield (
        f"Jobs go in the order of their tags: {tier} has served up to {_tag(place.served)}, "
        f"and this job has {_tag(place.tag)}."
    )
    if tier is Tier.RELAX:
        used = f"Your recent use ({place.used_per_weight_ms / 60_000:,.1f} GPU-min per unit of your weight)"
        yield f"{used} counts for {_tag(place.memory)} of that."


def _of_before(before: Before, now_ms: int) -> Iterator[str]:
    if before.earlier:
        waits = "waits" if before.earlier == 1 else "wait"
        yield f"{_number(before.earlier, 'earlier job')} of yours {waits} before it."
    runs = "runs" if before.running == 1 else "run"
    if before.own:
        what = f"{_number(before.running, 'job')} of yours {runs}"
        if before.parked:
            what += f", {_number(before.parked, 'job')} more {'is' if before.parked == 1 else 'are'} parked"
    else:
        what = f"{_number(before.running, 'job')} {runs} on GPUs it could use"
        if before.parked:
            what += f", {_number(before.parked, 'parked run')} will go on there first"
        if before.fast_waiting:
            what += f", {_number(before.fast_waiting, 'fast job')} may take them before it"
    if before.soonest_end_ms is not None:
        yield f"{what}; the first of them will probably end {_in(before.soonest_end_ms - now_ms)}."
    elif before.parked or before.fast_waiting:
        yield f"{what}."


def _of_bound(bound: Bound | None, tier: Tier, place: Place, parameters: Parameters) -> Iterator[str]:
    if bound is None:
        if tier is Tier.RELAX:
            yield (
                "Fast jobs may take every GPU it could use, so there is no time by which it surely starts; "
                f"once it has waited {about(parameters.aging_ms)}, relax gets one start in "
                f"{parameters.relax_first_one_in} of those that fast would have."
            )
        return
    yield (
        f"It starts within {about(bound.within_ms)} if nobody else comes: {_number(bound.gpus, 'GPU')} "
        f"{'is' if bound.gpus == 1 else 'are'} sure for {tier}, one job takes at most "
        f"{about(parameters.max_predicted_ms)}, and the others' jobs with tags up to "
        f"{_tag(place.tag)} go before it."
    )
    yield f"Each account that comes before then adds at most {about(bound.newcomer_ms)}."
    if bound.calm_ms is not None and bound.calm_ms < bound.within_ms:
        yield f"Without fast jobs it would start within {about(bound.calm_ms)}."
    if bound.whatever_ms is not None:
        yield f"Whoever comes, it starts within {about(bound.whatever_ms)}, for its age if not for its tag."
    yield "All this as long as GPUs stay, models are loaded, and jobs take as long as was predicted."


def _tag(tag: int) -> str:
    return f"{tag / 1_000_000:,.1f} s"


def _number(count: int, of: str) -> str:
    return f"{count:,} {of}" if count == 1 else f"{count:,} {of}s"


def _in(ms: int) -> str:
    return f"in {about(ms)}" if ms > 0 else "at any moment"


def about(ms: int) -> str:
    """Return a time for people, in the words and the rounding of the command line's `about`."""
    seconds = (max(ms, 0) + 500) // 1000
    if seconds < 100:
        return f"{seconds} s"
    minutes = (seconds + 30) // 60
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod((minutes + 5) // 10 * 10, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
