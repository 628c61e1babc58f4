"""Real workers with timed engines, in this process: everything of a fleet but Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_worker.contract import AttemptResult, RenderKind, RenderRequest, WorkerReport
from gpu_worker.outputs import Artifacts
from gpu_worker.settings import WorkerSettings
from gpu_worker.timed_engine import TimedEngine
from gpu_worker.worker import Worker
from scheduler.fleet import FleetFact, GoneBecause, RenderTaken, WorkerFound, WorkerGone, WorkerHeard
from tests.stand_in import stand_in_models

_HEARTBEAT_MS = 50


class LoadingEngine(TimedEngine):
    """Takes a set time for a model that it does not have yet."""

    def __init__(self, settings: WorkerSettings, load_s: float) -> None:
        super().__init__(stand_in_models(), settings)
        self._load_s = load_s

    def load(self, model: str, kind: RenderKind) -> bool:
        cold = super().load(model, kind)
        if cold:
            time.sleep(self._load_s)
        return cold


@dataclass
class _Life:
    """Of one worker, from when it was made until it died, or was last heard of."""

    worker: Worker
    began_s: float
    until_s: float
    open_ms: int = 0
    """Of its newest report: of attempts that it does not know yet whether they were of use."""
    listening: asyncio.Task[None] | None = None


class WorkerFleet:
    """Implements `scheduler.fleet.Fleet`."""

    def __init__(self, folder: Path, *, workers: int, step_ms: int, load_s: float) -> None:
        self._folder = folder
        self._step_ms = step_ms
        self._load_s = load_s
        self._slots = [f"here/gpu-{index}" for index in range(workers)]
        self._present: dict[str, _Life] = {}
        self._lives: list[_Life] = []
        self._epoch = 0
        self._tell: Callable[[FleetFact], None] = lambda fact: None
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def lived_s(self) -> float:
        """How long all workers have lived together, up to where they were last heard of."""
        return sum(life.until_s - life.began_s for life in self._lives)

    @property
    def settled(self) -> bool:
        """Whether all workers have told what became of all that they drew."""
        return not any(life.open_ms for life in self._present.values())

    async def open(self, epoch: int, tell: Callable[[FleetFact], None]) -> None:
        """See Fleet.open."""
        self._epoch, self._tell = epoch, tell
        for worker_id in self._slots:
            self._begin(worker_id)

    async def run(self) -> None:
        """See Fleet.run."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            tasks = [life.listening for life in self._lives if life.listening is not None]
            for task in (*tasks, *self._calls):
                task.cancel()
            await asyncio.gather(*tasks, *self._calls, return_exceptions=True)

    async def close(self) -> None:
        """End all threads, those of workers that died too."""
        for life in self._lives:
            await life.worker.close()

    def kill(self, worker_id: str) -> None:
        """Let a worker die, with all that it has in hand and was not heard to have, and begin the next."""
        life = self._present.pop(worker_id)
        assert life.listening is not None
        life.listening.cancel()
        life.until_s = time.monotonic()
        self._tell(
            WorkerGone(
                worker_id=worker_id,
                incarnation=life.worker.incarnation,
                sentence="It was killed.",
                because=GoneBecause.DIED,
            )
        )
        self._begin(worker_id)

    def render(self, worker_id: str, request: RenderRequest) -> None:
        """See Fleet.render."""
        self._present[worker_id].worker.render(request)
        self._tell(RenderTaken(worker_id=worker_id, attempt_id=request.attempt_id))

    def stop(self, worker_id: str, attempt_id: str, token: str) -> None:
        """See Fleet.stop."""
        self._present[worker_id].worker.stop(self._epoch, attempt_id, token)

    def hand_over(self, worker_id: str, attempt_id: str) -> None:
        """See Fleet.hand_over."""
        self._present[worker_id].worker.hand_over(self._epoch, attempt_id)

    def resume(self, worker_id: str, attempt_id: str) -> None:
        """See Fleet.resume."""
        self._present[worker_id].worker.resume(self._epoch, attempt_id)

    def acknowledge(self, worker_id: str, result: AttemptResult) -> None:
        """See Fleet.acknowledge."""
        self._present[worker_id].worker.acknowledge(self._epoch, result.attempt_id)

    def forget(self, worker_id: str, attempt_id: str, *, kept: bool = False) -> None:
        """See Fleet.forget."""
        self._call(self._present[worker_id].worker.forget(self._epoch, attempt_id, kept))

    def replace(self, worker_id: str) -> None:
        """See Fleet.replace."""
        raise AssertionError("all are of one release")

    def slots(self) -> Collection[str]:
        """See Fleet.slots."""
        return self._slots

    def _begin(self, worker_id: str) -> None:
        settings = WorkerSettings(
            worker_id=worker_id,
            release="test",
            artifacts_url=str(self._folder / "artifacts"),
            cache_dir=self._folder / "cache",
            engine="timed",
            timed_step_ms=self._step_ms,
            checkpoint_every_steps=1_000,
        )
        began_s = time.monotonic()
        worker = Worker(settings, LoadingEngine(settings, self._load_s), Artifacts(settings.artifacts_url))
        life = _Life(worker, began_s, began_s)
        self._lives.append(life)
        self._present[worker_id] = life
        self._tell(WorkerFound(report=self._heard(life, worker.report(self._epoch))))
        life.listening = asyncio.create_task(self._listen(life), name=f"listen {worker_id}")

    async def _listen(self, life: _Life) -> None:
        while True:
            beat = await life.worker.heartbeat(self._epoch, _HEARTBEAT_MS)
            self._tell(WorkerHeard(report=self._heard(life, beat.report)))

    def _heard(self, life: _Life, report: WorkerReport) -> WorkerReport:
        life.until_s, life.open_ms = time.monotonic(), report.gpu_time.open_ms
        return report

    def _call(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
