"""The order of one tier: start-time fair queueing, in relax with a bounded memory of use.

A job of an account that has used much is tagged as if it came later, by a bounded amount; the smallest tag
starts first. Least-used-first would let an account that stayed idle take everything when it returns; plain
start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996) forgets what a returning account used. Fast is the
same queue without the memory and with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from scheduler.policy import usage
from scheduler.policy.account import Account, Lane, Turn
from scheduler.policy.decisions import Charge, ChosenBecause, Standing
from scheduler.policy.ids import AccountId, Tier
from scheduler.policy.job import Fit, Job
from scheduler.policy.parameters import Parameters
from scheduler.policy.ranking import Entry, Ranking


class Head(NamedTuple):
    """The head job of a lane that was chosen, and why."""

    job: Job
    account: Account
    because: ChosenBecause


class _Line:
    """All lanes of one fit whose accounts are eligible, in their two orders."""

    __slots__ = ("by_age", "by_tag")

    def __init__(self) -> None:
        self.by_tag: Ranking[AccountId] = Ranking()
        """Entries (tag, stored usage per weight, arrival, account)."""
        self.by_age: Ranking[AccountId] = Ranking()
        """Entries (since when at the head, arrival, account)."""


class FairQueue:
    """The eligible accounts of one tier in the order they are served."""

    def __init__(self, tier: Tier, accounts: Mapping[AccountId, Account], parameters: Parameters) -> None:
        self.tier = tier
        self.virtual_time = 0
        """The largest start tag served so far, aged starts apart."""
        self.since_aged = 0
        """Starts since the last one that was taken for its age."""
        self.decay_origin_ms = 0
        self._accounts = accounts
        self._parameters = parameters
        self._lines: dict[Fit, _Line] = {}

    def fits(self) -> list[Fit]:
        """Return the fits that jobs of eligible accounts wait for."""
        for fit in [fit for fit, line in self._lines.items() if not len(line.by_tag)]:
            del self._lines[fit]
        return list(self._lines)

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
            turn.tag = max(turn.finish_tag, self.virtual_time) + self._memory(account, account.usage, now_ms)
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
        return unstored

    def choose(self, fits: Iterable[Fit], now_ms: int) -> Head | None:
        """Return the job to start next among these fits: by age if it is age's turn, else by tag."""
        first = self._first(fits)
        if first is None:
            return None
        if self.since_aged >= self._parameters.aged_one_in - 1:
            oldest = min(
                ((entry, fit) for fit in fits if (entry := self._lines[fit].by_age.first()) is not None),
                default=None,
            )
            assert oldest is not None, "what has a tag has an age"
            entry, fit = oldest
            if entry[0] + self._parameters.aging_ms <= now_ms and (entry[-1], fit) != (
                first[0][-1],
                first[1],
            ):
                return self._head(entry, fit, ChosenBecause.AGED)
        return self._head(*first, ChosenBecause.FIRST_IN_ORDER)

    def choose_warm(self, fits: Iterable[Fit], instead_of: Head) -> Head | None:
        """Return the first job among these fits, if it may go before `instead_of` to save a load."""
        first = self._first(fits)
        tag = instead_of.account.turn(self.tier).tag
        assert tag is not None
        if first is None or first[0][0] > tag + self._parameters.affinity_ms * 1000:
            return None
        return self._head(*first, ChosenBecause.MODEL_WARM)

    def runner_up(self, fits: Iterable[Fit], besides: AccountId, now_ms: int) -> Standing | None:
        """Return the first in the order of tags among the other accounts."""
        seconds = (self._lines[fit].by_tag.first_besides(besides) for fit in fits)
        entry = min((entry for entry in seconds if entry is not None), default=None)
        return None if entry is None else self._standing(entry, now_ms)

    def standing(self, head: Head, now_ms: int) -> Standing:
        """Return what a job is compared by."""
        turn = head.account.turn(self.tier)
        assert turn.tag is not None
        return self._standing(self._tag_entry(head.account, turn.tag, head.job), now_ms)

    def charge(self, head: Head, now_ms: int) -> Charge:
        """Return what the start of a lane's head job changes. Changes nothing itself."""
        job, account = head.job, head.account
        turn = account.turn(self.tier)
        assert turn.tag is not None
        aged = head.because is ChosenBecause.AGED
        weight_milli = self._weight_milli(account)
        finish_tag = turn.tag + usage.tag_cost(job.predicted_ms, weight_milli)
        virtual_time = self.virtual_time if aged else max(self.virtual_time, turn.tag)
        added = usage.usage_cost(
            job.predicted_ms,
            self.tier,
            now_ms,
            decay_origin_ms=self.decay_origin_ms,
            parameters=self._parameters,
        )
        next_tag = None
        if turn.waiting > 1 and account.free(self.tier) > 1:
            next_tag = max(finish_tag, virtual_time) + self._memory(account, account.usage + added, now_ms)
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
        self.since_aged = 0 if charge.aged else self.since_aged + 1

    def growth(self, at_ms: int) -> float:
        """Return what use at `at_ms` is multiplied by to be stored."""
        return usage.growth(
            at_ms, decay_origin_ms=self.decay_origin_ms, half_life_ms=self._parameters.half_life_ms
        )

    def usage_per_weight(self, account: Account) -> float:
        """Return what accounts with equal tags are compared by: stored use in relax, nothing in fast."""
        return 0.0 if self.tier is Tier.FAST else account.usage * 1000 / account.weight_milli

    def steps(self, account: Account, now_ms: int) -> Callable[[Job], int]:
        """Return how far each start of a job would move the account's tag, as its use is now."""
        weight_milli = self._weight_milli(account)
        remembered = self._memory(account, account.usage, now_ms)
        return lambda job: usage.tag_cost(job.predicted_ms, weight_milli) + remembered

    def _memory(self, account: Account, stored: float, now_ms: int) -> int:
        if self.tier is Tier.FAST:
            return 0
        return usage.memory(stored / self.growth(now_ms) * 1000 / account.weight_milli, self._parameters)

    def _weight_milli(self, account: Account) -> int:
        return usage.FAST_WEIGHT_MILLI if self.tier is Tier.FAST else account.weight_milli

    def _tag_entry(self, account: Account, tag: int, job: Job) -> tuple[int, float, int, AccountId]:
        return tag, self.usage_per_weight(account), job.arrival, account.account_id

    def _standing(self, entry: Entry, now_ms: int) -> Standing:
        tag, used, arrival, account_id = entry
        return Standing(
            tag=tag, usage_per_weight_ms=used / self.growth(now_ms), arrival=arrival, account_id=account_id
        )

    def _head(self, entry: Entry, fit: Fit, because: ChosenBecause) -> Head:
        account = self._accounts[entry[-1]]
        return Head(account.turn(self.tier).lanes[fit].jobs[0], account, because)

    def _first(self, fits: Iterable[Fit]) -> tuple[Entry, Fit] | None:
        return min(
            ((entry, fit) for fit in fits if (entry := self._lines[fit].by_tag.first()) is not None),
            default=None,
        )

    def _rank(self, account: Account, tag: int, fit: Fit, lane: Lane, now_ms: int) -> None:
        line = self._lines.get(fit)
        if line is None:
            line = self._lines[fit] = _Line()
        head = lane.jobs[0]
        if lane.head_job_id != head.job_id:
            lane.head_job_id, lane.head_since_ms = head.job_id, now_ms
        line.by_tag.put(self._tag_entry(account, tag, head))
        line.by_age.put((lane.head_since_ms, head.arrival, account.account_id))

    def _unrank(self, account: Account, turn: Turn, fit: Fit, lane: Lane) -> None:
        lane.head_job_id = None
        if not lane.jobs:
            del turn.lanes[fit]
        line = self._lines.get(fit)
        if line is not None:
            line.by_tag.discard(account.account_id)
            line.by_age.discard(account.account_id)
