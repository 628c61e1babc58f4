"""The bounds that compare two accounts, for the auditor: O2, B1 and B5.

All pairs of accounts would be too many, so the accounts that were served most are compared with each other. A
pair is compared while both stay eligible and wait for the same kind of GPU, from start to start.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from scheduler.policy import usage
from scheduler.policy.auditing.findings import Bound, Case
from scheduler.policy.auditing.journal import Dispatch
from scheduler.policy.auditing.replay import Replay
from scheduler.policy.auditing.replay_state import AccountState, Queue, Turn
from scheduler.policy.decisions import ChosenBecause
from scheduler.policy.ids import AccountId, Tier
from scheduler.policy.job import Fit

Check = Callable[[Bound, float, Case], None]


class _Pair:
    """Two accounts since both were eligible; what the first has more counts as positive."""

    __slots__ = (
        "aged",
        "aged_advance",
        "ahead",
        "base",
        "comparable",
        "highest",
        "lifted",
        "lowest",
        "more",
        "returned",
        "returned_starts",
        "rival_starts",
        "spells",
        "warm",
        "worst",
    )

    def __init__(self, spells: tuple[int, int], base: int, warm: int) -> None:
        self.spells = spells
        self.base = base
        self.lowest = self.highest = 0
        self.warm = warm
        """Starts out of order for a warm model, up to here."""
        self.aged = self.aged_advance = self.lifted = 0
        self.more: AccountId | None = None
        """Which of them has used more."""
        self.ahead = self.worst = 0
        """Starts that it is ahead by, and was at least."""
        self.comparable = False
        self.returned: AccountId | None = None
        """Which of them came back to find the other waiting, having used no less."""
        self.returned_starts = self.rival_starts = 0


class Pairs:
    """Every pair of the accounts that are followed."""

    def __init__(self, replay: Replay, followed: Collection[AccountId], check: Check) -> None:
        self._replay = replay
        self._followed = sorted(followed)
        self._check = check
        self._pairs: dict[tuple[Tier, AccountId, AccountId], _Pair] = {}

    def dispatched(self, record: Dispatch, account: AccountState, tier: Tier) -> None:
        """Compare an account that is about to be served with every other that waits beside it."""
        if account.account_id not in self._followed:
            return
        queue = self._replay.queues[tier]
        turn = account.turns[tier]
        fit = None if turn.tag is None else _only_fit(turn)
        for other_id in self._followed:
            other = self._replay.accounts.get(other_id)
            if other is None or other is account:
                continue
            rival = other.turns[tier]
            if fit is not None and rival.tag is not None and _only_fit(rival) == fit:
                self._compare(record, queue, account, other)
            else:
                self._pairs.pop(_key(tier, account.account_id, other_id), None)

    def _compare(self, record: Dispatch, queue: Queue, account: AccountState, other: AccountState) -> None:
        tier = queue.tier
        first, second = (account, other) if account.account_id < other.account_id else (other, account)
        a, b = first.turns[tier], second.turns[tier]
        key = _key(tier, account.account_id, other.account_id)
        pair = self._pairs.get(key)
        difference = a.advance - b.advance
        if pair is None or pair.spells != (a.spell, b.spell):
            pair = self._pairs[key] = _Pair((a.spell, b.spell), difference, queue.warm)
            if queue.aged or queue.warm:
                pair.lifted = _ahead(queue, a, b) + _ahead(queue, b, a)
            self._see_who_returned(pair, queue, first, second)
        sign = 1 if account is first else -1
        charge = record.started.charge
        cost = usage.tag_cost(charge.predicted_ms, charge.weight_milli)
        reached = charge.finish_tag if charge.next_tag is None else charge.next_tag
        advance = max(cost, reached - charge.start_tag)
        served_to = max(charge.finish_tag, charge.virtual_time)
        # Virtual time that ran ahead, with starts out of order or of another fit, is nobody's service.
        pair.lifted += max(0, min(reached, served_to) - charge.finish_tag)
        memory = a.most_memory + b.most_memory + max(0, reached - served_to)
        case = Case(
            at_ms=record.at_ms,
            job_id=record.started.job_id,
            accounts=(account.account_id, other.account_id),
        )
        warm = queue.warm - pair.warm + (record.keys.because is ChosenBecause.MODEL_WARM)
        if record.keys.because is ChosenBecause.AGED:
            pair.aged += 1
            pair.aged_advance += advance
        theta = 2 * self._replay.parameters.affinity_ms * 1000 if warm else 0
        errors = a.most_error * first.most_running + b.most_error * second.most_running
        before = difference - pair.base
        after = before + sign * advance
        pair.lowest = min(pair.lowest, before, after)
        pair.highest = max(pair.highest, before, after)
        mine, theirs = account.turns[tier], other.turns[tier]
        bound = max(mine.most_cost, cost) + theirs.most_cost + memory
        bound += theta + errors + pair.lifted + pair.aged_advance
        self._check(Bound.B1, (bound - (pair.highest - pair.lowest)) / 1000, case)
        if tier is Tier.RELAX and first.weight_milli == second.weight_milli:
            self._starts(pair, queue, account, other, charge.predicted_ms, theta + errors, case)
        if pair.returned is not None:
            self._halves(pair, account, (a, b), charge.predicted_ms, cost, theta + errors, case)

    def _starts(
        self,
        pair: _Pair,
        queue: Queue,
        account: AccountState,
        other: AccountState,
        cost_ms: int,
        widened: int,
        case: Case,
    ) -> None:
        """O2: who has used more gets at most one start more."""
        if account.usage is None or other.usage is None or account.usage == other.usage:
            pair.more = None
            return
        mine, theirs = account.turns[queue.tier], other.turns[queue.tier]
        if {mine.only_cost_ms, theirs.only_cost_ms} - {cost_ms, None}:
            pair.more = None
            return
        more = account if account.usage > other.usage else other
        if pair.more != more.account_id:
            pair.more, pair.ahead, pair.worst = more.account_id, 0, 0
            pair.comparable = self._comparable(queue, more, other if more is account else account, cost_ms)
        pair.ahead += 1 if more is account else -1
        pair.worst = min(pair.worst, pair.ahead)
        if pair.comparable:
            cost = usage.tag_cost(cost_ms, account.weight_milli)
            allowed = 1 + pair.aged + (-(-widened // max(1, cost)))
            self._check(Bound.O2, allowed - (pair.ahead - pair.worst), case)

    def _comparable(self, queue: Queue, more: AccountState, less: AccountState, cost_ms: int) -> bool:
        """Return whether the account that used less was not put back for something that was before.

        Its tag may lie ahead by one job and its memory. Further ahead, it is for jobs of another cost.
        """
        tag, tag_of_more = less.turns[queue.tier].tag, more.turns[queue.tier].tag
        remembered = self._replay.memory(queue.tier, less, self._replay.now_ms)
        if tag is None or tag_of_more is None or remembered is None or queue.virtual_time is None:
            return False
        from_tag = min(tag_of_more, queue.virtual_time)
        return tag - from_tag <= usage.tag_cost(cost_ms, less.weight_milli) + remembered

    def _see_who_returned(self, pair: _Pair, queue: Queue, first: AccountState, second: AccountState) -> None:
        a, b = first.turns[queue.tier], second.turns[queue.tier]
        if first.weight_milli != second.weight_milli or a.eligible_ms == b.eligible_ms:
            return
        came, rival = (first, second) if a.eligible_ms > b.eligible_ms else (second, first)
        if not came.turns[queue.tier].from_virtual:
            return
        if queue.tier is Tier.RELAX and (
            came.usage is None or rival.usage is None or came.usage < rival.usage * (1 - 1e-9)
        ):
            return
        pair.returned = came.account_id

    def _halves(
        self,
        pair: _Pair,
        account: AccountState,
        turns: tuple[Turn, Turn],
        cost_ms: int,
        cost: int,
        widened: int,
        case: Case,
    ) -> None:
        """B5: who came back gets at most half beside the other, and one job."""
        if any(turn.only_cost_ms not in (None, cost_ms) for turn in turns):
            pair.returned = None
            return
        if account.account_id == pair.returned:
            pair.returned_starts += 1
        else:
            pair.rival_starts += 1
        allowed = (pair.returned_starts + pair.rival_starts) / 2 + 1 + pair.aged + widened / max(1, cost)
        self._check(Bound.B5, allowed - pair.returned_starts, case)


def _ahead(queue: Queue, turn: Turn, other: Turn) -> int:
    """Return how much further ahead a tag lies than one job and its memory put it.

    Starts out of order do that to the account that has them, and the other then catches up.
    """
    assert turn.tag is not None
    assert other.tag is not None
    assert queue.virtual_time is not None
    served_to = min(queue.virtual_time, other.tag)
    return max(0, turn.tag - served_to - turn.most_cost - turn.most_memory)


def _key(tier: Tier, one: AccountId, other: AccountId) -> tuple[Tier, AccountId, AccountId]:
    return (tier, one, other) if one < other else (tier, other, one)


def _only_fit(turn: Turn) -> Fit | None:
    """Return the one kind of GPU that the account waits for; None: it waits for several."""
    found = None
    for fit, lane in turn.lanes.items():
        if lane.waiting:
            if found is not None:
                return None
            found = fit
    return found
