"""The order of one tier: start-time fair queueing, in relax with a bounded memory of use.

A job of an account that has used much is tagged as if it came later, by a bounded amount; the smallest tag
starts first. Least-used-first would let an account that stayed idle take everything when it returns; plain
start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996) forgets what a returning account used. Fast is the
same queue without the memory and with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from scheduler.policy import usage
from scheduler.policy.account import Account, Lane, Turn
from scheduler.policy.decisions import Charge, ChosenBecause, Standing
from scheduler.policy.events import Edge
from scheduler.policy.ids import AccountId, Tier
from scheduler.policy.job import Fit, Job
from scheduler.policy.parameters import Parameters
from scheduler.policy.ranking import Entry, Ladder, Ranking

# Places are counted by this much of a tag: a GPU-second.
_CROWD_SPAN = 1_000_000
# Accounts are ranked by this much of a tag at a time: of 100,000 accounts a few hundred in each line.
_RUNG = 10_000_000


class Head(NamedTuple):
    """The head job of a lane that was chosen, and why."""

    job: Job
    account: Account
    because: ChosenBecause


class Line:
    """All lanes of one fit whose accounts are eligible, in their two orders."""

    __slots__ = ("by_age", "by_tag")

    def __init__(self) -> None:
        self.by_tag: Ranking[AccountId] = Ladder(_RUNG)
        """Entries (tag, stored usage per weight, arrival, account)."""
        self.by_age: Ranking[AccountId] = Ranking()
        """Entries (since when at the head, arrival, account)."""


class FairQueue:
    """The eligible accounts of one tier in the order they are served."""

    def __init__(self, tier: Tier, accounts: Mapping[AccountId, Account], parameters: Parameters) -> None:
        self.tier = tier
        self.virtual_time = 0
        """The largest point that a start was charged from, aged starts apart."""
        self.aged_wait_ms = 0
        """GPU time that must start in the order of tags before something starts for its age again."""
        self.decay_origin_ms = 0
        self.edge: Edge | None = None
        """In a recovery: up to where the order is known; None: all of it is."""
        self._accounts = accounts
        self._parameters = parameters
        self._growth = ((0, 0), 1.0)
        """The newest moment and origin for which it was worked out, and what it was."""
        self.lines: dict[Fit, Line] = {}
        """Those in which somebody waits, by what the jobs in them need."""
        self._crowd: dict[int, int] = {}
        """Jobs that could start, by spans of their accounts' tags."""
        self.could_start = 0
        """Jobs that only others in the order are before: within the caps of their accounts."""

    def join(self, account: Account, job: Job, now_ms: int) -> bool:
        """Put a job in its account's lane. The account is reconciled by it; what that returns is returned."""
        turn = account.turn(self.tier)
        lane = turn.add(job)
        if turn.tag is None or turn.ranked_by is None:
            return self.reconcile(account, now_ms)
        # Of an account that is in the order it changes its own lane at most, and nothing beyond the caps: as
        # nearly all of a million that waited at a restart.
        if lane.jobs[0] is job:
            self._rank(account, turn.tag, job.fit, lane, now_ms)
        if turn.counted is None or turn.counted[1] == turn.waiting - 1:
            self._count(account, turn)
        return False

    def reconcile(self, account: Account, now_ms: int) -> bool:
        """Bring an account's tag and ranks in line with its caps, its use and its waiting jobs.

        Returns whether its tag is now another than the database knows. To be called after every change to
        the account.
        """
        turn = account.turn(self.tier)
        eligible = turn.waiting > 0 and account.free(self.tier) > 0
        if not eligible and turn.tag is None and not turn.lanes:
            return False
        unstored = False
        if not eligible:
            unstored = turn.tag is not None
            turn.tag = None
        elif turn.tag is None and turn.restored_tag is not None:
            turn.tag, turn.restored_tag = turn.restored_tag, None
        elif turn.tag is None:
            unstored = True
            turn.tag = self.next_tag(account, now_ms)
        if turn.tag is None:
            for fit, lane in list(turn.lanes.items()):
                self._unrank(account, turn, fit, lane)
            turn.ranked_by = None
        else:
            ranked_by = turn.tag, self.usage_per_weight(account)
            moved = turn.ranked_by != ranked_by
            for fit, lane in list(turn.lanes.items()):
                if not lane.jobs:
                    self._unrank(account, turn, fit, lane)
                elif moved or lane.head_job_id != lane.jobs[0].job_id:
                    self._rank(account, turn.tag, fit, lane, now_ms)
            turn.ranked_by = ranked_by
        self._count(account, turn)
        return unstored

    def is_known(self, entry: Entry) -> bool:
        """Return whether everybody who comes before an entry of a line is in the order."""
        edge = self.edge
        # Of who is yet to be read with an equal tag, the use is not known: it may be 0.
        return edge is None or (entry[0], entry[1], entry[2]) < (edge.tag, 0.0, edge.arrival)

    def accounts(self) -> Iterator[Account]:
        """Return the eligible accounts, in no order."""
        names = {account_id for line in self.lines.values() for account_id in line.by_tag}
        return (self._accounts[account_id] for account_id in names)

    def before(self, tag: int) -> int:
        """Return about how many jobs that could start have a smaller tag, in O(spans of tags)."""
        span = tag // _CROWD_SPAN
        return sum(count for at, count in self._crowd.items() if at < span) + self._crowd.get(span, 0) // 2

    def oldest_head_since_ms(self) -> int | None:
        """Return since when the oldest of all heads has been one; None: there is none."""
        ages = (line.by_age.first() for line in self.lines.values())
        return min((entry[0] for entry in ages if entry is not None), default=None)

    def charge(self, head: Head, now_ms: int) -> Charge:
        """Return what the start of a lane's head job changes. Changes nothing itself."""
        job, account = head.job, head.account
        turn = account.turn(self.tier)
        assert turn.tag is not None
        aged = head.because is ChosenBecause.AGED
        weight_milli = self.weight_milli(account)
        start = usage.start_of(turn.tag, turn.finish_tag, self.virtual_time)
        finish_tag = start + usage.tag_cost(job.predicted_ms, weight_milli)
        virtual_time = self.virtual_time if aged else max(self.virtual_time, start)
        added = usage.usage_cost(
            job.predicted_ms,
            self.tier,
            now_ms,
            decay_origin_ms=self.decay_origin_ms,
            parameters=self._parameters,
        )
        next_tag = None
        if turn.waiting > 1 and account.free(self.tier) > 1:
            next_tag = max(finish_tag, virtual_time) + self.memory(account, now_ms, account.usage + added)
        return Charge(
            predicted_ms=job.predicted_ms,
            weight_milli=weight_milli,
            charged_at_ms=now_ms,
            start_tag=turn.tag,
            finish_tag=finish_tag,
            next_tag=next_tag,
            usage_added=added,
            virtual_time=virtual_time,
            aged=aged,
        )

    def start(self, account: Account, job: Job, charge: Charge) -> None:
        """Take a waiting job out of its lane and charge it. The account is to be reconciled after it."""
        turn = account.turn(self.tier)
        turn.remove(job)
        turn.finish_tag = charge.finish_tag
        turn.tag = charge.next_tag
        account.usage += charge.usage_added
        account.count(self.tier, 1)
        self.virtual_time = max(self.virtual_time, charge.virtual_time)
        if charge.aged:
            self.aged_wait_ms = (self._parameters.aged_one_in - 1) * charge.predicted_ms
        else:
            self.aged_wait_ms = max(0, self.aged_wait_ms - charge.predicted_ms)

    def next_tag(self, account: Account, now_ms: int) -> int:
        """Return the tag of an account's next job, or the one it would have were it eligible now."""
        turn = account.turn(self.tier)
        if turn.tag is not None:
            return turn.tag
        return max(turn.finish_tag, self.virtual_time) + self.memory(account, now_ms)

    def growth(self, at_ms: int) -> float:
        """Return what use at `at_ms` is multiplied by to be stored."""
        moment = at_ms, self.decay_origin_ms
        if self._growth[0] != moment:
            growth = usage.growth(
                at_ms, decay_origin_ms=self.decay_origin_ms, half_life_ms=self._parameters.half_life_ms
            )
            self._growth = moment, growth
        return self._growth[1]

    def usage_per_weight(self, account: Account, stored: float | None = None) -> float:
        """Return what accounts with equal tags are compared by: stored use in relax, nothing in fast."""
        if self.tier is Tier.FAST:
            return 0.0
        return (account.usage if stored is None else stored) * 1000 / account.weight_milli

    def steps(self, account: Account, now_ms: int) -> Callable[[Job], int]:
        """Return how far each start of a job would move the account's tag, as its use is now."""
        weight_milli = self.weight_milli(account)
        remembered = self.memory(account, now_ms)
        return lambda job: usage.tag_cost(job.predicted_ms, weight_milli) + remembered

    def memory(self, account: Account, now_ms: int, stored: float | None = None) -> int:
        """Return how much later than its turn the account's next job is tagged for what it has used.

        `stored` is its use where that is not what it is now.
        """
        if self.tier is Tier.FAST:
            return 0
        used = (account.usage if stored is None else stored) / self.growth(now_ms)
        return usage.memory(used * 1000 / account.weight_milli, self._parameters)

    def weight_milli(self, account: Account) -> int:
        """Return what an account's costs are divided by, in thousandths."""
        return usage.FAST_WEIGHT_MILLI if self.tier is Tier.FAST else account.weight_milli

    def tag_entry(self, account: Account, tag: int, job: Job) -> tuple[int, float, int, AccountId]:
        """Return what an account's head job is ranked by in its line."""
        return tag, self.usage_per_weight(account), job.arrival, account.account_id

    def standing(self, entry: Entry, now_ms: int) -> Standing:
        """Return what an entry of a line says for a journal."""
        tag, used, arrival, account_id = entry
        return Standing(
            tag=tag, usage_per_weight_ms=used / self.growth(now_ms), arrival=arrival, account_id=account_id
        )

    def _count(self, account: Account, turn: Turn) -> None:
        counted = None
        if turn.tag is not None:
            counted = turn.tag // _CROWD_SPAN, min(turn.waiting, account.free(self.tier))
        if counted == turn.counted:
            return
        for sign, at in ((-1, turn.counted), (1, counted)):
            if at is not None:
                span, jobs = at
                self.could_start += sign * jobs
                left = self._crowd.get(span, 0) + sign * jobs
                if left:
                    self._crowd[span] = left
                else:
                    del self._crowd[span]
        turn.counted = counted

    def _rank(self, account: Account, tag: int, fit: Fit, lane: Lane, now_ms: int) -> None:
        line = self.lines.get(fit)
        if line is None:
            line = self.lines[fit] = Line()
        head = lane.jobs[0]
        line.by_tag.put(self.tag_entry(account, tag, head))
        if lane.head_job_id != head.job_id:
            lane.head_job_id, lane.head_since_ms = head.job_id, now_ms
            line.by_age.put((now_ms, head.arrival, account.account_id))

    def _unrank(self, account: Account, turn: Turn, fit: Fit, lane: Lane) -> None:
        lane.head_job_id = None
        if not lane.jobs:
            del turn.lanes[fit]
        line = self.lines.get(fit)
        if line is not None:
            line.by_tag.discard(account.account_id)
            line.by_age.discard(account.account_id)
            if not len(line.by_tag):
                del self.lines[fit]
