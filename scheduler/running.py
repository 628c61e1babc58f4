"""The running attempts as the loop knows them, found by id, by worker and by account.

Parked ones are running too: they have a worker, and wait there for its GPU. So are those that are drawn: they
need it no more, and have yet to deliver what came of it. A cell has tens of thousands of
them and every heartbeat asks for those of its worker, so nothing here goes through all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView
from dataclasses import dataclass, field, replace

from opentelemetry.trace import INVALID_SPAN, Span, Tracer

from gpu_worker.contract import Checkpoint, RenderKind, RenderSpec
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.tracing import attempt_started


@dataclass(frozen=True, kw_only=True)
class Running:
    """One of them."""

    attempt_id: str
    token: str
    job_id: JobId
    account_id: AccountId
    tier: Tier
    model: str
    worker_id: str
    incarnation: str
    started_ms: int
    given_ms: int
    """When its worker was last given it: a report from before does not have it yet."""
    parked_since_ms: int | None = None
    """None: it has its worker's GPU, unless it is drawn."""
    drawn_ms: int | None = None
    """When it was heard to need it no more."""
    parked_ms: int = 0
    """How long it was parked before that."""
    checkpoint: Checkpoint | None = None
    """The newest of its job that is stored."""
    steps: int = 0
    """Denoising steps that this attempt has before it when it begins; 0: not known."""
    traceparent: str | None = None
    """The span of the call that made its job; None: it is not traced."""
    span: Span = field(default=INVALID_SPAN, repr=False)
    """Its own, which ends with it."""

    def on_gpu_ms(self, now_ms: int) -> int:
        """Return how long it has had its worker's GPU."""
        until_ms = now_ms if self.parked_since_ms is None else self.parked_since_ms
        return until_ms - self.started_ms - self.parked_ms


class RunningAttempts:
    """All of them. A worker has at most one that is neither parked nor drawn."""

    def __init__(self) -> None:
        self._by_id: dict[str, Running] = {}
        self._by_worker: dict[str, dict[str, None]] = {}
        self._by_account: dict[str, dict[str, None]] = {}
        self._with_gpu: dict[str, str] = {}
        self._parked: set[str] = set()

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Running]:
        return iter(self._by_id.values())

    def __contains__(self, attempt_id: str) -> bool:
        return attempt_id in self._by_id

    def get(self, attempt_id: str) -> Running | None:
        """Return what is known of an attempt; None: it does not run."""
        return self._by_id.get(attempt_id)

    def put(self, running: Running) -> None:
        """Add an attempt, or replace what was known of it."""
        self.pop(running.attempt_id)
        self._by_id[running.attempt_id] = running
        self._by_worker.setdefault(running.worker_id, {})[running.attempt_id] = None
        self._by_account.setdefault(running.account_id, {})[running.attempt_id] = None
        if running.parked_since_ms is not None:
            self._parked.add(running.attempt_id)
        elif running.drawn_ms is None:
            assert running.worker_id not in self._with_gpu, "a worker runs one attempt"
            self._with_gpu[running.worker_id] = running.attempt_id

    def pop(self, attempt_id: str) -> Running | None:
        """Take an attempt out, and return what was known of it."""
        running = self._by_id.pop(attempt_id, None)
        if running is not None:
            _discard(self._by_worker, running.worker_id, attempt_id)
            _discard(self._by_account, running.account_id, attempt_id)
            self._parked.discard(attempt_id)
            if self._with_gpu.get(running.worker_id) == attempt_id:
                del self._with_gpu[running.worker_id]
        return running

    def on(self, worker_id: str) -> list[Running]:
        """Return a worker's attempts, parked ones included."""
        return [self._by_id[attempt_id] for attempt_id in self._by_worker.get(worker_id, ())]

    def with_gpu(self, worker_id: str) -> Running | None:
        """Return the attempt that has a worker's GPU."""
        attempt_id = self._with_gpu.get(worker_id)
        return None if attempt_id is None else self._by_id[attempt_id]

    def parked_on(self, worker_id: str) -> list[Running]:
        """Return the attempts that are parked on a worker, the newest last."""
        parked = [one for one in self.on(worker_id) if one.parked_since_ms is not None]
        return sorted(parked, key=lambda one: one.parked_since_ms or 0)

    def ids_of(self, account_ids: Iterable[str]) -> list[str]:
        """Return the ids of these accounts' attempts."""
        return [
            attempt_id for account_id in account_ids for attempt_id in self._by_account.get(account_id, ())
        ]

    @property
    def busy_workers(self) -> KeysView[str]:
        """Workers whose GPU an attempt has."""
        return self._with_gpu.keys()

    @property
    def parked(self) -> int:
        """How many are parked."""
        return len(self._parked)


def traced(running: Running, tracer: Tracer) -> Running:
    """Return an attempt that began when it started with its span, where its job is traced."""
    if running.traceparent is None:
        return running
    span = attempt_started(
        tracer,
        running.traceparent,
        attempt_id=running.attempt_id,
        at_ms=running.started_ms,
        attributes={
            "darkroom.attempt": running.attempt_id,
            "darkroom.job": running.job_id,
            "darkroom.account": running.account_id,
            "darkroom.tier": running.tier.value,
            "darkroom.model": running.model,
            "darkroom.worker": running.worker_id,
        },
    )
    return replace(running, span=span)


def steps_ahead(spec: RenderSpec, checkpoint: Checkpoint | None) -> int:
    """Return how many denoising steps an attempt has before it that goes on from there; 0: not known.

    How many a variation or an upscale takes is the engine's to say.
    """
    if spec.kind is not RenderKind.IMAGINE:
        return 0
    done = 0 if checkpoint is None else checkpoint.step
    return max(0, -(-spec.steps * spec.stop_percent // 100) - done)


def _discard(index: dict[str, dict[str, None]], key: str, attempt_id: str) -> None:
    of_key = index[key]
    del of_key[attempt_id]
    if not of_key:
        del index[key]
