"""What a board knows: the live jobs, accounts and workers of one cell.

`board.py` changes it by what happened, `planning.py` finds what should be done; `status.py`, `explain.py` and
`facts.py` tell what is there.
"""

from __future__ import annotations

from enum import Enum, auto

from scheduler.policy.account import Account
from scheduler.policy.attempt import Attempt
from scheduler.policy.fair_queue import FairQueue
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier
from scheduler.policy.job import Checkpoint, Job
from scheduler.policy.parameters import Parameters
from scheduler.policy.parked import ParkedRuns
from scheduler.policy.placement import Fleet
from scheduler.policy.ranking import Ranking

_SPAN_MS = 100


class State(Enum):
    WAITING = auto()
    HELD = auto()
    """For funds: out of the order until they change."""
    RUNNING = auto()
    GIVEN_UP = auto()
    """Until that is committed."""


class Live:
    """A job on the board, waiting, held or running."""

    __slots__ = ("accepted_ms", "attempt_id", "cancel_wanted", "checkpoint", "job", "losses", "state")

    def __init__(self, job: Job, losses: int, accepted_ms: int, checkpoint: Checkpoint | None) -> None:
        self.job = job
        self.losses = losses
        self.accepted_ms = accepted_ms
        self.checkpoint = checkpoint
        self.attempt_id: AttemptId | None = None
        self.cancel_wanted = False
        self.state = State.WAITING


class Moments:
    """How many there are, and when the first of them came, to a tenth of a second.

    Not one by one: there may be a million, and nobody asks which of them was the first.
    """

    __slots__ = ("_count", "_counts", "_spans")

    def __init__(self) -> None:
        self._count = 0
        self._counts: dict[int, int] = {}
        self._spans: Ranking[int] = Ranking()
        """Those in which some came."""

    def __len__(self) -> int:
        return self._count

    def add(self, at_ms: int) -> None:
        """Count one."""
        span = at_ms // _SPAN_MS
        counted = self._counts.get(span, 0)
        if not counted:
            self._spans.put((span,))
        self._counts[span] = counted + 1
        self._count += 1

    def remove(self, at_ms: int) -> None:
        """Count one less of those that came then."""
        span = at_ms // _SPAN_MS
        self._counts[span] -= 1
        self._count -= 1
        if not self._counts[span]:
            del self._counts[span]
            self._spans.discard(span)

    def first_ms(self) -> int | None:
        """Return when the first came; None: there is none."""
        entry = self._spans.first()
        return None if entry is None else entry[0] * _SPAN_MS


class Cell:
    """The state of a board."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.now_ms = 0
        self.accounts: dict[AccountId, Account] = {}
        self.jobs: dict[JobId, Live] = {}
        self.attempts: dict[AttemptId, Attempt] = {}
        self.parked = ParkedRuns()
        self.fleet = Fleet()
        # Fast first, wherever tiers are gone through.
        self.queues = {tier: FairQueue(tier, self.accounts, parameters) for tier in (Tier.FAST, Tier.RELAX)}
        self.paused: set[Tier] = set()
        self.held: dict[AccountId, dict[JobId, None]] = {}
        """Jobs out of the order until their account has funds."""
        self.to_stop: dict[AttemptId, None] = {}
        """Attempts whose owners want them no more, and whose workers were not told so far."""
        self.to_give_up: dict[JobId, str] = {}
        """And why."""
        self.unstored: dict[tuple[AccountId, Tier], None] = {}
        """Tags that the database does not know."""
        self.running = dict.fromkeys(Tier, 0)
        """How many attempts run, parked ones included."""
        self.fast_since_relax_turn = 0
        """Fast starts since relax last had its turn before fast."""
        self.not_running = {tier: Moments() for tier in Tier}
        """Jobs that wait, held ones included, by the time of their acceptance."""
        self.positions: dict[Tier, dict[JobId, int]] = {}
        """Places of the jobs that could start, as of the last event, where they were asked for."""
