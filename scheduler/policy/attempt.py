"""An attempt as the board remembers it: where it runs, what it was charged, how far it probably is."""

from __future__ import annotations

from scheduler.policy.ids import AttemptId, Tier, WorkerId
from scheduler.policy.job import Checkpoint, Job


class Attempt:
    """A running attempt: it has a worker's GPU, waits parked on the worker for it, or is drawn."""

    __slots__ = (
        "attempt_id",
        "charged_at_ms",
        "checkpoint",
        "drawn",
        "ends_ms",
        "job",
        "left_ms",
        "parked_since_ms",
        "parks",
        "predicted_ms",
        "sheltered",
        "started_ms",
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
        started_ms: int,
    ) -> None:
        self.attempt_id = attempt_id
        self.job = job
        self.worker_id = worker_id
        self.predicted_ms = predicted_ms
        self.weight_milli = weight_milli
        self.charged_at_ms = charged_at_ms
        self.started_ms = started_ms
        self.parked_since_ms: int | None = None
        self.drawn = False
        """It needs no GPU any more, and its worker may have another by now."""
        self.parks = 0
        self.sheltered = False
        self.checkpoint: Checkpoint | None = None
        self.left_ms = predicted_ms
        """GPU time it will probably still take, as of when it last got or lost its GPU."""
        self.ends_ms = started_ms
        """When it will probably end, if it keeps its GPU; of one that is drawn, when it was."""

    @property
    def is_relax(self) -> bool:
        return self.job.tier is Tier.RELAX

    def gets_gpu(self, at_ms: int, speed_permille: int) -> None:
        """Note that it runs from now on."""
        self.parked_since_ms = None
        self.ends_ms = at_ms + self.left_ms * 1000 // speed_permille

    def is_parked(self, at_ms: int, speed_permille: int) -> None:
        """Note that its GPU is another's from now on."""
        self.parked_since_ms = at_ms
        self.parks += 1
        self.left_ms = max(0, self.ends_ms - at_ms) * speed_permille // 1000
