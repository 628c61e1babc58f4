"""What the board remembers of an account: its caps, its use, and its turn and waiting jobs in each tier."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from scheduler.policy.attempt import Attempt
from scheduler.policy.events import FairShare
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier
from scheduler.policy.job import Fit, Job
from scheduler.policy.limits import Limits
from scheduler.policy.usage import ShareChange


def _age(job: Job) -> tuple[int, JobId]:
    return job.arrival, job.job_id


class Lane:
    """The waiting jobs of one account, tier and fit, oldest first.

    A sorted list, not a heap: jobs leave from the middle and come back to their old places, and an account's
    accepted jobs are few, so that moving the rest of the list is cheaper than any structure that avoids it.
    """

    __slots__ = ("head_job_id", "head_since_ms", "jobs")

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.head_job_id: JobId | None = None
        """The job whose time at the head is counted; None while the account is not eligible."""
        self.head_since_ms = 0

    def add(self, job: Job) -> None:
        if not self.jobs or self.jobs[-1].arrival < job.arrival:
            self.jobs.append(job)
        else:
            insort(self.jobs, job, key=_age)

    def remove(self, job: Job) -> None:
        if self.jobs[0] is job:
            del self.jobs[0]
            return
        index = bisect_left(self.jobs, _age(job), key=_age)
        assert self.jobs[index].job_id == job.job_id
        del self.jobs[index]


class Turn:
    """An account's tags in one tier, and the lanes of its jobs that wait there.

    The tag is set exactly while the account is eligible: something waits, and it is below its caps.
    """

    __slots__ = ("counted", "finish_tag", "lanes", "ranked_by", "restored_tag", "tag", "waiting")

    def __init__(self) -> None:
        self.finish_tag = 0
        self.tag: int | None = None
        self.restored_tag: int | None = None
        """A stored tag, until the account proves eligible or recovery ends."""
        self.lanes: dict[Fit, Lane] = {}
        self.waiting = 0
        self.ranked_by: tuple[int, float] | None = None
        """Tag and use that its lanes are in the order by; None: they are in none, or it is not known."""
        self.counted: tuple[int, int] | None = None
        """Where its jobs that could start are counted by tag, and how many; None: none could."""

    def add(self, job: Job) -> Lane:
        """Put a job in its lane, and return that."""
        lane = self.lanes.get(job.fit)
        if lane is None:
            lane = self.lanes[job.fit] = Lane()
        lane.add(job)
        self.waiting += 1
        return lane

    def remove(self, job: Job) -> None:
        """Take a job out. Its lane stays, even if empty: the queue that ranks it takes it away."""
        self.lanes[job.fit].remove(job)
        self.waiting -= 1

    def put_back(self, job: Job) -> None:
        """Put a job that was taken from the head of its lane there again."""
        self.lanes[job.fit].jobs.insert(0, job)
        self.waiting += 1

    def jobs(self) -> Iterator[Job]:
        """Return its waiting jobs, the oldest of all lanes first."""
        yield from sorted((job for lane in self.lanes.values() for job in lane.jobs), key=_age)


class Account:
    """An account with jobs on the board, or that had some."""

    __slots__ = (
        "account_id",
        "fast",
        "limits",
        "parkable",
        "relax",
        "relax_running",
        "running",
        "usage",
        "weight_milli",
    )

    def __init__(self, account_id: AccountId, limits: Limits, weight_milli: int) -> None:
        self.account_id = account_id
        self.limits = limits
        self.weight_milli = weight_milli
        self.running = 0
        """Attempts of any tier."""
        self.relax_running = 0
        self.usage = 0.0
        """GPU-milliseconds of both tiers, scaled forward to the decay origin."""
        self.fast = Turn()
        self.relax = Turn()
        self.parkable: dict[AttemptId, Attempt] = {}
        """Its relax runs that have a GPU and may be parked."""

    def turn(self, tier: Tier) -> Turn:
        return self.fast if tier is Tier.FAST else self.relax

    def share(self, tier: Tier) -> FairShare:
        turn = self.turn(tier)
        tag = turn.restored_tag if turn.tag is None else turn.tag
        return FairShare(finish_tag=turn.finish_tag, tag=tag, usage=self.usage if tier is Tier.RELAX else 0.0)

    def free(self, tier: Tier) -> int:
        """Return how many more attempts of `tier` its caps let start."""
        return self.limits.free(tier, running=self.running, relax_running=self.relax_running)

    def correct(self, tier: Tier, change: ShareChange) -> None:
        """Replace the charge of an attempt by what it cost."""
        turn = self.turn(tier)
        turn.finish_tag += change.tag_delta
        if turn.tag is not None:
            turn.tag += change.tag_delta
        if turn.restored_tag is not None:
            turn.restored_tag += change.tag_delta
        # A reset may have come between the charge and its correction.
        self.usage = max(0.0, self.usage + change.usage_delta)

    def count(self, tier: Tier, change: int) -> None:
        """Count attempts that started or ended."""
        self.running += change
        if tier is Tier.RELAX:
            self.relax_running += change
        assert self.running >= self.relax_running >= 0


class AccountMemento:
    """What an account was before a plan was tried on it, but for its waiting jobs."""

    __slots__ = ("_account", "_counts", "_tags")

    def __init__(self, account: Account) -> None:
        self._account = account
        self._counts = (account.running, account.relax_running, account.usage)
        fast, relax = account.fast, account.relax
        self._tags = (fast.finish_tag, fast.tag, relax.finish_tag, relax.tag)

    def restore(self) -> None:
        """Set it back."""
        account = self._account
        account.running, account.relax_running, account.usage = self._counts
        fast, relax = account.fast, account.relax
        fast.finish_tag, fast.tag, relax.finish_tag, relax.tag = self._tags
