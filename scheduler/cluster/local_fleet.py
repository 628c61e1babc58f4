"""A timed stub of a fleet, in this process:
for trying the loop and measuring everything but Ray and rendering.

Its workers draw nothing. Each attempt ends after a fixed time, or when it is told to, and then counts the
time it was told to count. It keeps a worker's promises: a result stays until it is acknowledged, a worker
that is killed comes back as another life and remembers nothing.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gpu_worker.contract import (
    ActiveRun,
    AttemptResult,
    Blame,
    GpuTime,
    ImageFile,
    Outcome,
    RenderRequest,
    StageTimes,
    WorkerReport,
)
from scheduler.fleet import FleetFact, RenderRefused, WorkerFound, WorkerGone, WorkerHeard

_MEMORY_BYTES = 64 * 1024**3


@dataclass
class _Stub:
    """One worker's state."""

    worker_id: str
    incarnation: str
    warm_models: tuple[str, ...] = ()
    active: RenderRequest | None = None
    ends: asyncio.TimerHandle | None = None
    results: dict[str, AttemptResult] = field(default_factory=dict)


class LocalFleet:
    """Implements `scheduler.fleet.Fleet`."""

    def __init__(self, *, workers: int, take_ms: int | None, gpu_ms: int | None = None) -> None:
        """Make `workers` workers whose attempts end after `take_ms` (None: when told)
        and count `gpu_ms` (None: that).
        """
        self._take_ms = take_ms
        self._gpu_ms = gpu_ms if gpu_ms is not None else (take_ms or 0)
        self._stubs = {
            f"here/gpu-{index}": _Stub(worker_id=f"here/gpu-{index}", incarnation=str(uuid.uuid4()))
            for index in range(workers)
        }
        self._epoch = 0
        self._tell: Callable[[FleetFact], None] = lambda fact: None
        self.refuse_next = 0
        """How many renders are still to be refused."""
        self.rendered: list[RenderRequest] = []
        """Every attempt that was begun, in order."""

    async def open(self, epoch: int, tell: Callable[[FleetFact], None]) -> None:
        """See Fleet.open. A fleet may be opened again, by the next scheduler: its attempts go on."""
        self._epoch, self._tell = epoch, tell
        for stub in self._stubs.values():
            tell(WorkerFound(report=self._report(stub)))

    async def run(self) -> None:
        """See Fleet.run."""
        await asyncio.get_running_loop().create_future()

    def render(self, worker_id: str, request: RenderRequest) -> None:
        """See Fleet.render."""
        stub = self._stubs[worker_id]
        if self.refuse_next > 0:
            self.refuse_next -= 1
            self._tell(RenderRefused(worker_id=worker_id, attempt_id=request.attempt_id, sentence="refused"))
            return
        if stub.active is not None:
            self._tell(RenderRefused(worker_id=worker_id, attempt_id=request.attempt_id, sentence="busy"))
            return
        stub.active = request
        self.rendered.append(request)
        if request.spec.model not in stub.warm_models:
            stub.warm_models = (*stub.warm_models, request.spec.model)
        if self._take_ms is not None:
            stub.ends = asyncio.get_running_loop().call_later(self._take_ms / 1000, self.finish, worker_id)

    def stop(self, worker_id: str, attempt_id: str, token: str) -> None:
        """See Fleet.stop."""
        stub = self._stubs[worker_id]
        if stub.active is not None and stub.active.attempt_id == attempt_id:
            self.finish(worker_id, outcome=Outcome.CANCELLED)

    def acknowledge(self, worker_id: str, result: AttemptResult) -> None:
        """See Fleet.acknowledge."""
        self._stubs[worker_id].results.pop(result.attempt_id, None)

    def forget(self, worker_id: str, attempt_id: str) -> None:
        """See Fleet.forget."""
        stub = self._stubs[worker_id]
        stub.results.pop(attempt_id, None)
        if stub.active is not None and stub.active.attempt_id == attempt_id:
            self._drop(stub)
            self._tell(WorkerHeard(report=self._report(stub)))

    def finish(
        self,
        worker_id: str,
        *,
        outcome: Outcome = Outcome.SUCCEEDED,
        gpu_ms: int | None = None,
        blame: Blame = Blame.NONE,
        reason: str = "ENGINE_ERROR",
        sentence: str = "The stub was told to fail.",
    ) -> AttemptResult:
        """End what a worker has in hand, and tell."""
        stub = self._stubs[worker_id]
        request = stub.active
        assert request is not None, f"{worker_id} has nothing in hand"
        self._drop(stub)
        failed = outcome is Outcome.FAILED
        result = AttemptResult(
            job_id=request.job_id,
            attempt_id=request.attempt_id,
            token=request.token,
            incarnation=stub.incarnation,
            outcome=outcome,
            times=StageTimes(denoise_ms=self._gpu_ms if gpu_ms is None else gpu_ms),
            images=_no_pictures(request) if outcome is Outcome.SUCCEEDED else (),
            blame=blame,
            failure_reason=reason if failed else None,
            failure_sentence=sentence if failed else None,
        )
        stub.results[request.attempt_id] = result
        self._tell(WorkerHeard(report=self._report(stub)))
        return result

    def kill(self, worker_id: str) -> None:
        """End a worker's life and begin the next."""
        stub = self._stubs[worker_id]
        before = stub.incarnation
        self._drop(stub)
        stub.incarnation = str(uuid.uuid4())
        stub.results.clear()
        stub.warm_models = ()
        self._tell(WorkerGone(worker_id=worker_id, incarnation=before, sentence="The stub was killed."))
        self._tell(WorkerFound(report=self._report(stub)))

    def beat(self, worker_id: str) -> None:
        """Let a worker's long poll be answered."""
        self._tell(WorkerHeard(report=self._report(self._stubs[worker_id])))

    def tell_to(self, tell: Callable[[FleetFact], None]) -> None:
        """Tell every fact from now on to `tell`."""
        self._tell = tell

    def never_got(self, worker_id: str) -> None:
        """Undo that a worker got what it has in hand, as if the call had been lost."""
        self._drop(self._stubs[worker_id])

    def fall_silent(self, worker_id: str) -> None:
        """Let a worker be taken for lost while it goes on with what it has in hand."""
        stub = self._stubs[worker_id]
        self._tell(
            WorkerGone(worker_id=worker_id, incarnation=stub.incarnation, sentence="The stub was silent.")
        )

    def speak_again(self, worker_id: str) -> None:
        """Let a worker that fell silent be found."""
        self._tell(WorkerFound(report=self._report(self._stubs[worker_id])))

    def say_again(self, worker_id: str, result: AttemptResult) -> None:
        """Let a worker claim a result that is not its to claim any more, as one that woke up late does."""
        stub = self._stubs[worker_id]
        stub.results[result.attempt_id] = replace(result, incarnation=stub.incarnation)
        self._tell(WorkerHeard(report=self._report(stub)))

    @property
    def busy(self) -> dict[str, RenderRequest]:
        """What each worker has in hand."""
        return {stub.worker_id: stub.active for stub in self._stubs.values() if stub.active is not None}

    def _drop(self, stub: _Stub) -> None:
        stub.active = None
        if stub.ends is not None:
            stub.ends.cancel()
            stub.ends = None

    def _report(self, stub: _Stub) -> WorkerReport:
        active = None
        if stub.active is not None:
            active = ActiveRun(
                job_id=stub.active.job_id, attempt_id=stub.active.attempt_id, token=stub.active.token
            )
        return WorkerReport(
            worker_id=stub.worker_id,
            incarnation=stub.incarnation,
            pid=os.getpid(),
            release="",
            epoch=self._epoch,
            device="stub",
            speed_permille=1000,
            memory_bytes=_MEMORY_BYTES,
            memory_used_bytes=0,
            warm_models=stub.warm_models,
            active=active,
            unacknowledged=tuple(stub.results.values()),
            gpu_time=GpuTime(),
        )


def _no_pictures(request: RenderRequest) -> tuple[ImageFile, ...]:
    return tuple(
        ImageFile(
            index=index,
            path=f"none/{request.job_id}_{index}",
            file_name=f"{request.job_id}_{request.file_stem}_{index}.png",
            content_type="image/png",
            size_bytes=0,
            sha256="",
            width=request.spec.width,
            height=request.spec.height,
            seed=request.spec.seed,
        )
        for index in range(1, request.spec.images + 1)
    )
