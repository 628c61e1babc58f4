"""The simulated fleet: GPUs that load models, denoise step by step, park, resume and die.

It does what workers do when told, and reports what came of it. It decides nothing: which run goes where is
the policy's to say, and what a GPU does by itself (letting the newest parked run go on when it falls free) is
what the real worker does.

Simplified against the real worker: encode and decode are part of the steps; a checkpoint is stored the moment
its step ends; the board hears of periodic ones only when they matter, which is when their worker dies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from scheduler.policy.ids import AttemptId, WorkerId
from scheduler.policy.job import Checkpoint
from scheduler.policy.worker import Worker
from scheduler.simulator.kernel import Kernel
from scheduler.simulator.workload import Request

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What the fleet is made of."""

    gpus: int
    speeds_permille: tuple[int, ...] = (1000,)
    """Speed classes against the reference, dealt to the GPUs in turn."""
    model_load_ms: int = 8_000
    """Loading one model into GPU memory."""
    models_per_gpu: int = 2
    """Models that fit into a GPU's memory at once; the least recently used one is evicted."""
    checkpoint_steps: int = 5
    """A checkpoint is stored every so many steps, and at every park."""
    mtbf_hours: float | None = None
    """Mean time between the deaths of one GPU; None: none dies."""
    repair_ms: int = 600_000

    def speed_permille(self, number: int) -> int:
        return self.speeds_permille[number % len(self.speeds_permille)]

    @property
    def capacity(self) -> float:
        """GPU-seconds of the reference class that it does in a second."""
        return sum(self.speed_permille(number) for number in range(self.gpus)) / 1000


class Run:
    """An attempt in a GPU's hands.

    `total_ms` is what the whole picture takes on this GPU. Step `k` of `n` ends after `total_ms * k // n`.
    """

    __slots__ = (
        "active",
        "attempt_id",
        "began_ms",
        "doomed",
        "kept_ms",
        "kept_step",
        "request",
        "since_ms",
        "step",
        "total_ms",
        "turn",
    )

    def __init__(
        self, attempt_id: AttemptId, request: Request, total_ms: int, start: Checkpoint | None
    ) -> None:
        self.attempt_id = attempt_id
        self.request = request
        self.total_ms = total_ms
        self.step = 0 if start is None else start.step
        """Steps done when it was last set going."""
        self.kept_step = self.step
        """Where this attempt began."""
        self.kept_ms = 0 if start is None else start.kept_ms
        """GPU time that earlier attempts spent on the steps it did not have to make."""
        self.began_ms: int | None = None
        """When it first denoised."""
        self.since_ms = 0
        """When it was last set going, its model loaded."""
        self.active = False
        self.doomed = False
        """Its work is thrown away at its next boundary."""
        self.turn = 0
        """Counts how often it was set going: plans made for an earlier time are void."""

    def ends_after_ms(self, step: int) -> int:
        return self.total_ms * step // self.request.steps

    def done_ms(self) -> int:
        """GPU time that its steps took up to `step`, earlier attempts' included."""
        return self.kept_ms + self.ends_after_ms(self.step) - self.ends_after_ms(self.kept_step)

    def end_ms(self) -> int:
        return self.since_ms + self.total_ms - self.ends_after_ms(self.step)

    def boundary(self, now_ms: int) -> tuple[int, int]:
        """Return its next step boundary from now on: the time, and the steps done by then."""
        if now_ms <= self.since_ms:
            return self.since_ms, self.step
        spent_ms = now_ms - self.since_ms + self.ends_after_ms(self.step)
        step = min(-(-spent_ms * self.request.steps // self.total_ms), self.request.steps)
        return self.since_ms + self.ends_after_ms(step) - self.ends_after_ms(self.step), step

    def steps_done(self, now_ms: int) -> int:
        """Return the whole steps done at a time when it is active."""
        spent_ms = max(0, now_ms - self.since_ms) + self.ends_after_ms(self.step)
        step = min(spent_ms * self.request.steps // self.total_ms, self.request.steps)
        # A step's end is rounded down to the millisecond, so one more may have ended already.
        if step < self.request.steps and self.ends_after_ms(step + 1) <= spent_ms:
            step += 1
        return max(step, self.step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spell:
    """A time in which a GPU worked on one run."""

    worker_id: WorkerId
    request: Request
    start_ms: int
    end_ms: int
    kept_ms: int
    """What of it went into the picture; the rest was thrown away."""


class Gpu:
    """One worker."""

    __slots__ = ("active", "device", "models", "next_run", "parked", "speed_permille", "worker_id")

    def __init__(self, worker_id: WorkerId, speed_permille: int) -> None:
        self.worker_id = worker_id
        self.speed_permille = speed_permille
        self.device = f"gpu-{speed_permille}"
        self.models: dict[str, None] = {}
        """In memory, the least recently used first."""
        self.active: Run | None = None
        self.parked: list[Run] = []
        """The newest last."""
        self.next_run: Run | None = None
        """It gets the GPU at the active run's next boundary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """An attempt that died with its worker."""

    attempt_id: AttemptId
    executed: bool
    """False: it still waited for the run before it to reach its boundary."""
    checkpoint: Checkpoint | None
    """The newest that was stored."""


@dataclass(kw_only=True, slots=True)
class Reports:
    """Whom the world tells what happened. Each is called at the moment it happens."""

    joined: Callable[[Worker], None]
    died: Callable[[WorkerId, list[Loss]], None]
    loaded: Callable[[WorkerId, str], None]
    evicted: Callable[[WorkerId, str], None]
    checkpointed: Callable[[AttemptId, Checkpoint], None]
    finished: Callable[[Run], None]


class World:
    """The fleet, driven by a kernel."""

    def __init__(self, kernel: Kernel, cluster: Cluster, reports: Reports, random: Random) -> None:
        self._kernel = kernel
        self._cluster = cluster
        self._reports = reports
        self._random = random
        self._gpus: dict[WorkerId, Gpu] = {}
        self._runs: dict[AttemptId, tuple[Run, Gpu]] = {}
        self._free_with_parked: dict[WorkerId, None] = {}
        self.spells: list[Spell] = []
        self.loading_ms = 0
        self.loads = 0
        self.parks = 0
        self.steps_redone = 0
        self.discarded_ms = 0
        """GPU time that counted as kept when it was spent, and was thrown away later."""
        self.deaths = 0
        self.over = False
        """Nothing more is to be done: GPUs die no more."""

    def start(self, warm_models: tuple[str, ...]) -> None:
        """Let all GPUs join, with these models in memory as far as they fit."""
        for number in range(self._cluster.gpus):
            worker_id = WorkerId(f"gpu-{number:04}")
            gpu = self._gpus[worker_id] = Gpu(worker_id, self._cluster.speed_permille(number))
            gpu.models = dict.fromkeys(warm_models[: self._cluster.models_per_gpu])
            self._join(gpu)

    # -- what a policy has decided ----------------------------------------------------------------------

    def begin(
        self, worker_id: WorkerId, attempt_id: AttemptId, request: Request, start: Checkpoint | None
    ) -> None:
        """Give a GPU an attempt. What it is busy with is parked for it at its next boundary."""
        gpu = self._gpus[worker_id]
        run = Run(attempt_id, request, self._total_ms(gpu, request), start)
        self._runs[attempt_id] = run, gpu
        self._free_with_parked.pop(worker_id, None)
        if gpu.active is None:
            self._set_going(gpu, run)
        else:
            assert gpu.next_run is None, "a GPU is promised to one run at a time"
            gpu.next_run = run
            self._give_way(gpu, gpu.active)

    def discard(self, attempt_id: AttemptId) -> None:
        """Have a run stop at its next boundary, and throw its work away."""
        run, _ = self._runs.pop(attempt_id)
        assert run.active
        run.doomed = True

    def resume(self, attempt_id: AttemptId) -> None:
        """Let a parked run go on. One that went on by itself is left alone."""
        run, gpu = self._runs[attempt_id]
        if run.active:
            return
        assert gpu.active is None
        self._free_with_parked.pop(gpu.worker_id, None)
        gpu.parked.remove(run)
        self._set_going(gpu, run)

    def migrate(self, attempt_id: AttemptId, to: WorkerId, to_attempt_id: AttemptId, at: Checkpoint) -> None:
        """Go on with a parked run on another GPU, from its checkpoint."""
        run, gpu = self._runs.pop(attempt_id)
        if run.active:
            self._interrupt(gpu, run, run.steps_done(self._kernel.now_ms), kept_steps=at.step)
            gpu.active = None
        else:
            gpu.parked.remove(run)
        if not gpu.parked:
            self._free_with_parked.pop(gpu.worker_id, None)
        self.begin(to, to_attempt_id, run.request, at)

    def throw_away(self, checkpoint: Checkpoint) -> None:
        """Note that nothing goes on from a checkpoint of a job."""
        self.steps_redone += checkpoint.step
        self.discarded_ms += checkpoint.kept_ms

    def settle(self) -> None:
        """Once a moment's decisions are carried out: GPUs left free go on with what is parked there."""
        for worker_id in self._free_with_parked:
            gpu = self._gpus[worker_id]
            self._set_going(gpu, gpu.parked.pop())
        self._free_with_parked.clear()

    # -- how GPUs work ----------------------------------------------------------------------------------

    def _total_ms(self, gpu: Gpu, request: Request) -> int:
        return max(1, -(-request.cost_ms * 1000 // gpu.speed_permille))

    def _set_going(self, gpu: Gpu, run: Run) -> None:
        assert gpu.active is None
        now_ms = self._kernel.now_ms
        gpu.active = run
        run.active = True
        run.turn += 1
        run.since_ms = now_ms + self._load(gpu, run.request.model)
        if run.began_ms is None:
            run.began_ms = run.since_ms
        turn = run.turn
        self._kernel.at(run.end_ms(), lambda: self._end(gpu, run, turn))

    def _load(self, gpu: Gpu, model: str) -> int:
        """Return how long the GPU loads before it can use a model."""
        if model in gpu.models:
            gpu.models[model] = gpu.models.pop(model)
            return 0
        if len(gpu.models) >= self._cluster.models_per_gpu:
            oldest = next(iter(gpu.models))
            del gpu.models[oldest]
            self._reports.evicted(gpu.worker_id, oldest)
        gpu.models[model] = None
        self.loads += 1
        self.loading_ms += self._cluster.model_load_ms
        # Told when the loading begins: whatever comes next finds the model there.
        self._reports.loaded(gpu.worker_id, model)
        return self._cluster.model_load_ms

    def _give_way(self, gpu: Gpu, run: Run) -> None:
        at_ms, step = run.boundary(self._kernel.now_ms)
        if step == run.request.steps:
            return  # it ends there, and its end hands the GPU over
        turn = run.turn
        self._kernel.at(at_ms, lambda: self._park(gpu, run, step, turn))

    def _park(self, gpu: Gpu, run: Run, step: int, turn: int) -> None:
        if gpu.active is not run or run.turn != turn:
            return
        self._interrupt(gpu, run, step, kept_steps=0 if run.doomed else step)
        gpu.active = None
        if not run.doomed:
            self.parks += 1
            gpu.parked.append(run)
            self._reports.checkpointed(
                run.attempt_id, Checkpoint(step=run.step, kept_ms=run.done_ms(), device=gpu.device)
            )
        self._hand_over(gpu)

    def _end(self, gpu: Gpu, run: Run, turn: int) -> None:
        if gpu.active is not run or run.turn != turn:
            return
        steps = run.request.steps
        self._interrupt(gpu, run, steps, kept_steps=0 if run.doomed else steps)
        gpu.active = None
        if not run.doomed:
            del self._runs[run.attempt_id]
        self._hand_over(gpu)
        if not run.doomed:
            self._reports.finished(run)

    def _hand_over(self, gpu: Gpu) -> None:
        if gpu.next_run is not None:
            run, gpu.next_run = gpu.next_run, None
            self._set_going(gpu, run)
        elif gpu.parked:
            self._free_with_parked[gpu.worker_id] = None

    def _interrupt(self, gpu: Gpu, run: Run, step: int, *, kept_steps: int) -> None:
        """Note what came of a run's time on the GPU, `step` steps of it being done and some of them kept."""
        now_ms = self._kernel.now_ms
        if now_ms > run.since_ms:
            kept_ms = run.ends_after_ms(kept_steps) - run.ends_after_ms(run.step)
            self.spells.append(
                Spell(
                    worker_id=gpu.worker_id,
                    request=run.request,
                    start_ms=run.since_ms,
                    end_ms=now_ms,
                    kept_ms=max(0, kept_ms),
                )
            )
        self.steps_redone += max(0, step - kept_steps)
        if kept_steps < run.step:
            self.discarded_ms += run.ends_after_ms(run.step) - run.ends_after_ms(kept_steps)
        run.step = step
        run.active = False

    # -- faults -----------------------------------------------------------------------------------------

    def _join(self, gpu: Gpu) -> None:
        self._reports.joined(
            Worker(
                worker_id=gpu.worker_id,
                memory_bytes=GIB,
                speed_permille=gpu.speed_permille,
                warm_models=frozenset(gpu.models),
                device=gpu.device,
            )
        )
        if self._cluster.mtbf_hours is not None:
            lives_ms = max(1, round(self._random.expovariate(1 / self._cluster.mtbf_hours) * 3_600_000))
            self._kernel.at(self._kernel.now_ms + lives_ms, lambda: self._die(gpu))

    def _die(self, gpu: Gpu) -> None:
        if self.over:
            return
        self.deaths += 1
        gpu.models.clear()
        losses = []
        for run in [
            *gpu.parked,
            *([gpu.active] if gpu.active else []),
            *([gpu.next_run] if gpu.next_run else []),
        ]:
            if run.doomed:
                self._interrupt(gpu, run, run.steps_done(self._kernel.now_ms), kept_steps=0)
                continue
            losses.append(self._lose(gpu, run))
            del self._runs[run.attempt_id]
        gpu.active, gpu.next_run, gpu.parked = None, None, []
        self._free_with_parked.pop(gpu.worker_id, None)
        self._reports.died(gpu.worker_id, losses)
        self._kernel.at(self._kernel.now_ms + self._cluster.repair_ms, lambda: self._join(gpu))

    def _lose(self, gpu: Gpu, run: Run) -> Loss:
        every = self._cluster.checkpoint_steps
        kept_steps = run.step
        if run.active:
            done = run.steps_done(self._kernel.now_ms)
            kept_steps = max(run.step, done // every * every)
            self._interrupt(gpu, run, done, kept_steps=kept_steps)
            run.step = kept_steps
        checkpoint = None
        if kept_steps:
            checkpoint = Checkpoint(step=kept_steps, kept_ms=run.done_ms(), device=gpu.device)
        return Loss(attempt_id=run.attempt_id, executed=run.began_ms is not None, checkpoint=checkpoint)
