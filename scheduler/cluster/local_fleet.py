"""A timed stub of a fleet, in this process:
for trying the loop and measuring everything but Ray and rendering.

Its workers draw nothing. Each attempt ends after a fixed time with the GPU, or when it is told to, and then
counts the time it was told to count. It keeps a worker's promises: a run that is parked stores a checkpoint
and goes on by itself when what it was parked for has ended, a result stays until it is acknowledged, a worker
that is killed comes back as another life and remembers nothing.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from gpu_worker.contract import (
    AttemptResult,
    Blame,
    Checkpoint,
    GpuTime,
    ImageFile,
    Outcome,
    RenderRequest,
    RunInHand,
    StageTimes,
    WorkerReport,
)
from scheduler.fleet import (
    FleetFact,
    GoneBecause,
    RenderRefused,
    RenderTaken,
    WorkerAwaited,
    WorkerFound,
    WorkerGone,
    WorkerHeard,
    WorkerLeaves,
)

_CHECKPOINT_BYTES = 1_000
_MEMORY_BYTES = 64 * 1024**3


@dataclass
class _Run:
    """An attempt that a worker has in hand."""

    request: RenderRequest
    left_s: float | None
    """Time it still needs; None: until it is told."""
    checkpoint: Checkpoint | None
    done_ms: int = 0
    """GPU time since it began, as it was told."""
    began_s: float = 0.0
    """When it last got the GPU."""
    ends: asyncio.TimerHandle | None = None


@dataclass
class _Stub:
    """One worker's state."""

    worker_id: str
    incarnation: str
    memory_bytes: int
    warm_models: tuple[str, ...] = ()
    stack: list[_Run] = field(default_factory=list)
    """The active run is the last, the others are parked."""
    drawn: list[_Run] = field(default_factory=list)
    results: dict[str, AttemptResult] = field(default_factory=dict)
    sentence: str = ""
    """Why it is not healthy; empty if it is."""
    outdated: bool = False

    def has(self, attempt_id: str) -> bool:
        """Return whether an attempt is in hand."""
        return any(run.request.attempt_id == attempt_id for run in (*self.stack, *self.drawn))


class LocalFleet:
    """Implements `scheduler.fleet.Fleet`."""

    def __init__(
        self,
        *,
        workers: int,
        take_ms: int | None,
        gpu_ms: int | None = None,
        device: str = "stub",
        memory_bytes: Sequence[int] | None = None,
        per_machine: int | None = None,
    ) -> None:
        """Make `workers` workers whose attempts end after `take_ms` with the GPU (None: when told)
        and count `gpu_ms` (None: that). `memory_bytes`: of each. `per_machine`: so many have one (None: all).
        """
        memory_bytes = memory_bytes or [_MEMORY_BYTES] * workers
        self._take_ms = take_ms
        self._gpu_ms = gpu_ms if gpu_ms is not None else (take_ms or 0)
        self._device = device
        names = [
            f"here/gpu-{index}"
            if per_machine is None
            else f"here-{index // per_machine}/gpu-{index % per_machine}"
            for index in range(workers)
        ]
        self._stubs = {
            name: _Stub(worker_id=name, incarnation=str(uuid.uuid4()), memory_bytes=of_it)
            for name, of_it in zip(names, memory_bytes, strict=True)
        }
        self._epoch = 0
        self._tell: Callable[[FleetFact], None] = lambda fact: None
        self.refuse_next = 0
        """How many renders are still to be refused."""
        self.rendered: list[RenderRequest] = []
        """Every attempt that was begun, in order."""
        self.forgotten: dict[str, bool] = {}
        """Attempts that were to be forgotten, and whether their checkpoints were of use."""
        self.replaced: list[str] = []
        """Workers that made room for one of the scheduler's release, in order."""
        self.late: set[str] = set()
        """Workers that the next scheduler does not hear of at once, but when they are told to speak again."""
        self.stays_away = False
        """Whether what takes their places does not come, until it is told to speak again."""
        self.wanted: int | None = None
        """How many workers there should be, as it was told last."""
        self.spare: frozenset[str] = frozenset()
        """Slots that are to have no workers, as it was told last."""
        self._departing: set[str] = set()

    async def open(self, epoch: int, tell: Callable[[FleetFact], None]) -> None:
        """See Fleet.open. A fleet may be opened again, by the next scheduler: its attempts go on."""
        self._epoch, self._tell = epoch, tell
        for worker_id in self._stubs:
            tell(WorkerAwaited(worker_id=worker_id))
        for stub in self._stubs.values():
            if stub.worker_id not in self.late:
                tell(WorkerFound(report=self._report(stub), outdated=stub.outdated))

    async def run(self) -> None:
        """See Fleet.run."""
        await asyncio.get_running_loop().create_future()

    def render(self, worker_id: str, request: RenderRequest) -> None:
        """See Fleet.render. Every moment is a boundary here, so what is to be parked is parked at once."""
        stub = self._stubs[worker_id]
        if self.refuse_next > 0:
            self.refuse_next -= 1
            self._tell(RenderRefused(worker_id=worker_id, attempt_id=request.attempt_id, sentence="refused"))
            return
        if stub.has(request.attempt_id):
            return
        active = stub.stack[-1] if stub.stack else None
        # With a run in hand that the request does not name, it takes nothing else.
        if active is not None and active.request.attempt_id != request.parks:
            self._tell(RenderRefused(worker_id=worker_id, attempt_id=request.attempt_id, sentence="busy"))
            return
        if active is not None:
            self._lose_gpu(active)
            active.checkpoint = self._checkpoint(active)
        if request.spec.model not in stub.warm_models:
            stub.warm_models = (*stub.warm_models, request.spec.model)
        run = _Run(
            request=request,
            left_s=None if self._take_ms is None else self._take_ms / 1000,
            checkpoint=request.checkpoint,
        )
        stub.stack.append(run)
        self.rendered.append(request)
        self._get_gpu(stub, run)
        self._tell(RenderTaken(worker_id=worker_id, attempt_id=request.attempt_id))
        if active is not None:
            self._tell(WorkerHeard(report=self._report(stub)))

    def stop(self, worker_id: str, attempt_id: str, token: str) -> None:
        """See Fleet.stop."""
        if any(run.request.attempt_id == attempt_id for run in self._stubs[worker_id].stack):
            self.finish(worker_id, attempt_id=attempt_id, outcome=Outcome.CANCELLED)

    def hand_over(self, worker_id: str, attempt_id: str) -> None:
        """See Fleet.hand_over."""
        if any(run.request.attempt_id == attempt_id for run in self._stubs[worker_id].stack):
            self.finish(worker_id, attempt_id=attempt_id, outcome=Outcome.HANDED_OVER)

    def resume(self, worker_id: str, attempt_id: str) -> None:
        """See Fleet.resume. It did so by itself."""

    def acknowledge(self, worker_id: str, result: AttemptResult) -> None:
        """See Fleet.acknowledge."""
        self._stubs[worker_id].results.pop(result.attempt_id, None)

    def forget(self, worker_id: str, attempt_id: str, *, kept: bool = False) -> None:
        """See Fleet.forget."""
        stub = self._stubs[worker_id]
        self.forgotten[attempt_id] = kept
        stub.results.pop(attempt_id, None)
        if stub.has(attempt_id):
            self._drop(stub, attempt_id)
            self._tell(WorkerHeard(report=self._report(stub)))

    def replace(self, worker_id: str) -> None:
        """See Fleet.replace."""
        stub = self._stubs[worker_id]
        assert not [*stub.stack, *stub.drawn, *stub.results], f"{worker_id} has something in hand"
        stub.outdated = False
        self.replaced.append(worker_id)
        if self.stays_away:
            self.fall_silent(worker_id)
        else:
            comes_back = worker_id not in self.spare
            self.kill(worker_id, because=GoneBecause.REPLACED, comes_back=comes_back)

    def want(self, workers: int, spare: Collection[str]) -> None:
        """See Fleet.want."""
        self.wanted = workers
        again, self.spare = self.spare - frozenset(spare), frozenset(spare)
        for worker_id in sorted(again):
            self.speak_again(worker_id)

    def slots(self) -> Collection[str]:
        """See Fleet.slots."""
        return self._stubs.keys() - self._departing

    def remove(self, worker_id: str) -> None:
        """Let a worker leave with its machine."""
        self.fall_silent(worker_id)
        del self._stubs[worker_id]

    def depart(self, worker_id: str) -> None:
        """Let a worker's machine be about to end."""
        self.stays_away = True
        self._departing.add(worker_id)
        self._tell(WorkerLeaves(worker_id=worker_id))

    def grow_old(self) -> None:
        """Let the next scheduler find every worker to be of another release."""
        for stub in self._stubs.values():
            stub.outdated = True

    def work(self, worker_id: str, ms: int) -> None:
        """Let the active run have measured so much more GPU time."""
        self._stubs[worker_id].stack[-1].done_ms += ms

    def draw(self, worker_id: str) -> None:
        """Let the active run need its GPU no more, and have its pictures stored when it is told to end."""
        stub = self._stubs[worker_id]
        run = self._drop(stub, stub.stack[-1].request.attempt_id)
        stub.drawn.append(run)
        self._tell(WorkerHeard(report=self._report(stub)))

    def finish(
        self,
        worker_id: str,
        *,
        attempt_id: str | None = None,
        outcome: Outcome = Outcome.SUCCEEDED,
        gpu_ms: int | None = None,
        blame: Blame = Blame.NONE,
        reason: str = "ENGINE_ERROR",
        sentence: str = "The stub was told to fail.",
        steps_redone: int = 0,
        park_waits: tuple[int, ...] = (),
        load_ms: int = 0,
    ) -> AttemptResult:
        """End a run that a worker has in hand (None: the active one), and tell.

        `gpu_ms` is the time of the whole picture (None: what the fleet was made with): what a checkpoint kept
        is not measured again.
        """
        stub = self._stubs[worker_id]
        assert stub.stack or stub.drawn, f"{worker_id} has nothing in hand"
        run = self._drop(stub, attempt_id or stub.stack[-1].request.attempt_id)
        request = run.request
        kept = StageTimes() if request.checkpoint is None else request.checkpoint.kept
        failed, handed_over = outcome is Outcome.FAILED, outcome is Outcome.HANDED_OVER
        whole_ms = self._gpu_ms if gpu_ms is None else gpu_ms
        result = AttemptResult(
            job_id=request.job_id,
            attempt_id=request.attempt_id,
            token=request.token,
            incarnation=stub.incarnation,
            outcome=outcome,
            times=StageTimes(denoise_ms=run.done_ms if handed_over else max(0, whole_ms - kept.gpu_ms)),
            kept=kept,
            images=_no_pictures(request) if outcome is Outcome.SUCCEEDED else (),
            load_ms=load_ms,
            steps_redone=steps_redone,
            park_waits=park_waits,
            checkpoint=self._checkpoint(run) if handed_over else None,
            blame=blame,
            failure_reason=reason if failed else None,
            failure_sentence=sentence if failed else None,
        )
        stub.results[request.attempt_id] = result
        self._tell(WorkerHeard(report=self._report(stub)))
        return result

    def kill(
        self, worker_id: str, *, because: GoneBecause = GoneBecause.DIED, comes_back: bool = True
    ) -> None:
        """End a worker's life and begin the next; `comes_back`: at once."""
        stub = self._stubs[worker_id]
        before = stub.incarnation
        for run in stub.stack:
            self._lose_gpu(run)
        stub.stack.clear()
        stub.drawn.clear()
        stub.incarnation = str(uuid.uuid4())
        stub.results.clear()
        stub.warm_models = ()
        stub.sentence = ""
        self._tell(
            WorkerGone(
                worker_id=worker_id, incarnation=before, sentence="The stub was killed.", because=because
            )
        )
        if comes_back:
            self._tell(WorkerFound(report=self._report(stub)))

    def beat(self, worker_id: str) -> None:
        """Let a worker's long poll be answered."""
        self._tell(WorkerHeard(report=self._report(self._stubs[worker_id])))

    def tell_to(self, tell: Callable[[FleetFact], None]) -> None:
        """Tell every fact from now on to `tell`."""
        self._tell = tell

    def never_got(self, worker_id: str) -> None:
        """Undo that a worker got its active run, as if the call had been lost."""
        stub = self._stubs[worker_id]
        self._drop(stub, stub.stack[-1].request.attempt_id)

    def fall_ill(self, worker_id: str, sentence: str) -> None:
        """Let a worker find that its GPU is broken: it hands over what it has in hand, and says so."""
        stub = self._stubs[worker_id]
        stub.sentence = sentence
        for run in tuple(stub.stack):
            self.hand_over(worker_id, run.request.attempt_id)
        self._tell(WorkerHeard(report=self._report(stub)))

    def fall_silent(self, worker_id: str) -> None:
        """Let a worker be taken for lost while it goes on with what it has in hand."""
        stub = self._stubs[worker_id]
        self._tell(
            WorkerGone(
                worker_id=worker_id,
                incarnation=stub.incarnation,
                sentence="The stub was silent.",
                because=GoneBecause.SILENT,
            )
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
        """What has each worker's GPU."""
        return {stub.worker_id: stub.stack[-1].request for stub in self._stubs.values() if stub.stack}

    def parked(self, worker_id: str) -> list[RenderRequest]:
        """Return what is parked on a worker, the newest last."""
        return [run.request for run in self._stubs[worker_id].stack[:-1]]

    def _get_gpu(self, stub: _Stub, run: _Run) -> None:
        if run.left_s is not None:
            loop = asyncio.get_running_loop()
            run.began_s = loop.time()
            attempt_id = run.request.attempt_id
            run.ends = loop.call_later(run.left_s, lambda: self.finish(stub.worker_id, attempt_id=attempt_id))

    def _lose_gpu(self, run: _Run) -> None:
        if run.ends is not None and run.left_s is not None:
            run.ends.cancel()
            run.ends = None
            had_s = asyncio.get_running_loop().time() - run.began_s
            run.done_ms += round(had_s * 1000)
            run.left_s = max(0.0, run.left_s - had_s)

    def _drop(self, stub: _Stub, attempt_id: str) -> _Run:
        """Take a run off a worker; the newest parked one goes on by itself."""
        run = next(run for run in (*stub.drawn, *stub.stack) if run.request.attempt_id == attempt_id)
        if run in stub.drawn:
            stub.drawn.remove(run)
            return run
        was_active = stub.stack[-1]
        self._lose_gpu(run)
        stub.stack.remove(run)
        if run is was_active and stub.stack:
            self._get_gpu(stub, stub.stack[-1])
        return run

    def _checkpoint(self, run: _Run) -> Checkpoint:
        request = run.request
        before = StageTimes() if request.checkpoint is None else request.checkpoint.kept
        kept = before + StageTimes(denoise_ms=run.done_ms)
        return Checkpoint(
            path=f"jobs/{request.job_id}/checkpoint-{request.attempt_id}.safetensors",
            step=self._step_after(kept.gpu_ms, request),
            steps=request.spec.steps,
            kept=kept,
            device=self._device,
            size_bytes=_CHECKPOINT_BYTES,
        )

    def _step_after(self, gpu_ms: int, request: RenderRequest) -> int:
        steps = request.spec.steps
        return min(steps - 1, steps * gpu_ms // max(1, self._gpu_ms))

    def _in_hand(self, run: _Run) -> RunInHand:
        return RunInHand(
            job_id=run.request.job_id,
            attempt_id=run.request.attempt_id,
            token=run.request.token,
            checkpoint=run.checkpoint,
            step=self._step_after(run.done_ms, run.request),
            steps=run.request.spec.steps,
        )

    def _report(self, stub: _Stub) -> WorkerReport:
        in_hand = [self._in_hand(run) for run in stub.stack]
        return WorkerReport(
            worker_id=stub.worker_id,
            incarnation=stub.incarnation,
            pid=os.getpid(),
            release="",
            epoch=self._epoch,
            device=self._device,
            speed_permille=1000,
            memory_bytes=stub.memory_bytes,
            memory_used_bytes=0,
            warm_models=stub.warm_models,
            active=in_hand[-1] if in_hand else None,
            parked=tuple(in_hand[:-1]),
            drawn=tuple(self._in_hand(run) for run in stub.drawn),
            unacknowledged=tuple(stub.results.values()),
            gpu_time=GpuTime(),
            healthy=not stub.sentence,
            sentence=stub.sentence,
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
