"""What the engine and the worker add to a stock pipeline call, and how soon a run gives way.

    python tests/bench/worker.py [--model stand-in|sdxl|flux] [--rounds N] [--steps N] [--device D]

Needs neither Ray nor a database, and no network. `stand-in` is the model of most tests; `sdxl`
and `flux` have the sizes of those models, random weights, and bfloat16: for a GPU. Rows of one table are
measured in turn within one process, so that what else the machine does falls on all alike.

1. the engine's render against the stock pipeline's own call with the same arguments
2. from asking a relax run to park until the fast run has the GPU: the relax run's steps meanwhile, and time
3. a checkpoint: its size, the time that copying it keeps the GPU waiting, and the way back to it
4. what a preview costs the run, in a step and as a share of all time while somebody watches, and what it
   takes beside the run
5. the worker's account of the GPU's time against the wall, and the gap between jobs given one after the other
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import gpu_worker.engine  # noqa: F401  (before diffusers is: it says how quiet that is)
from gpu_worker.contract import AttemptResult, Outcome, RenderKind, RenderRequest, RenderSpec, WorkerReport
from gpu_worker.engine.diffusers_engine import DiffusersEngine
from gpu_worker.engine.loading import LoadedModel, loaded_model
from gpu_worker.image_seeds import image_seed
from gpu_worker.models import ModelEntry, Models, read_models
from gpu_worker.outputs import Artifacts
from gpu_worker.run import CutState, Inputs, Preview, Rendering, RunControl, StageClock
from gpu_worker.settings import WorkerSettings
from gpu_worker.worker import Worker

_MS = 1_000_000


@dataclass
class _Control:
    """Listens to one render, alone on its device."""

    watched: bool = False
    cut: bool = False
    step_ns: list[int] = field(default_factory=list)
    """When each step had ended, on the caller's clock."""
    preview_ns: list[int] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    cut_ns: list[int] = field(default_factory=list)
    cuts: list[tuple[int, CutState]] = field(default_factory=list)
    restored_ns: int = 0

    def check(self, *, last: bool = False) -> None:
        """Nobody waits for the GPU."""

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        """Note the time, and make what is asked for."""
        if self.watched:
            began_ns = time.monotonic_ns()
            self.previews.append(preview())
            self.preview_ns.append(time.monotonic_ns() - began_ns)
        if self.cut:
            began_ns = time.monotonic_ns()
            self.cuts.append((step, cut()))
            self.cut_ns.append(time.monotonic_ns() - began_ns)
        self.step_ns.append(time.monotonic_ns())

    def restored(self) -> None:
        """Note the time."""
        self.restored_ns = time.monotonic_ns()


class _NotedControl:
    """A worker's control of a run, and a note of when each step ended."""

    def __init__(self, control: RunControl, steps_ns: list[int]) -> None:
        self._steps_ns = steps_ns
        self._boundary = control.boundary
        self.check, self.restored = control.check, control.restored

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        """Note the time, and pass it on."""
        self._steps_ns.append(time.monotonic_ns())
        self._boundary(step, steps, preview, cut)


class _NotingEngine(DiffusersEngine):
    """Notes when renders began on the device and when steps ended."""

    def begin_notes(self) -> None:
        """Forget what was noted."""
        self.begun_ns: list[int] = []
        self.steps_ns: list[int] = []

    def render(
        self,
        spec: RenderSpec,
        inputs: Inputs,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None = None,
    ) -> Rendering:
        """Draw as always."""
        self.begun_ns.append(time.monotonic_ns())
        return super().render(spec, inputs, _NotedControl(control, self.steps_ns), clock, checkpoint)


@dataclass(frozen=True)
class _Bench:
    engine: _NotingEngine
    models: Models
    settings: WorkerSettings
    device: torch.device
    spec: RenderSpec
    rounds: int

    def render(self, control: _Control, checkpoint: bytes | None = None) -> float:
        """Return how many milliseconds a render took."""
        began_ns = time.monotonic_ns()
        self.engine.render(self.spec, Inputs(), control, self.engine.stage_clock(), checkpoint)
        return (time.monotonic_ns() - began_ns) / _MS


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--model", choices=("stand-in", "sdxl", "flux"), default="stand-in")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--steps", type=int, help="denoising steps; the model's own unless given")
    arguments.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        entry = _entry(chosen.model, Path(folder))
        settings = WorkerSettings(
            worker_id="bench/gpu-0",
            release="bench",
            artifacts_url=f"{folder}/artifacts",
            cache_dir=Path(folder) / "cache",
            device=chosen.device,
        )
        models = Models(default=entry, entries={entry.name: entry})
        engine = _NotingEngine(models, settings)
        engine.begin_notes()
        engine.load(entry.name, RenderKind.IMAGINE)
        spec = RenderSpec(
            kind=RenderKind.IMAGINE,
            model=entry.name,
            prompt="a lighthouse in fog",
            width=entry.default_width,
            height=entry.default_height,
            steps=chosen.steps or entry.steps,
            guidance_milli=entry.guidance_milli,
            seed=7,
        )
        device = torch.device("cuda" if torch.cuda.is_available() and chosen.device != "cpu" else "cpu")
        bench = _Bench(engine, models, settings, device, spec, chosen.rounds)
        print(f"{engine.device_type}; {platform.machine()}, torch {torch.__version__}, {os.cpu_count()} CPUs")
        print(f"{entry.name}: a grid of {spec.images}, {spec.width}x{spec.height}, {spec.steps} steps\n")
        step_ms = _against_the_stock_call(bench, settings.cache_dir)
        asyncio.run(_parking(bench, step_ms))
        _checkpoints(bench)
        _previews(bench)
        asyncio.run(_account(bench))


def _against_the_stock_call(bench: _Bench, cache_dir: Path) -> float:
    """Return what a step takes, in milliseconds."""
    model = loaded_model(bench.models.default, bench.device, cache_dir)
    ours, stock, steps = [], [], []
    for _ in range(bench.rounds + 1):
        control = _Control()
        ours.append(bench.render(control))
        stock.append(_stock_ms(model, bench))
        steps += [(b - a) / _MS for a, b in zip(control.step_ns, control.step_ns[1:], strict=False)]
    ratios = [a / b for a, b in zip(ours[1:], stock[1:], strict=True)]
    step_ms = statistics.median(steps)
    print("1. A grid, from its prompt to its pixels, milliseconds: median of the rounds")
    print(f"   stock pipeline call   {statistics.median(stock[1:]):10.1f}")
    print(f"   engine                {statistics.median(ours[1:]):10.1f}   a step {step_ms:.2f}")
    print(
        f"   engine / stock        {statistics.median(ratios):10.3f}"
        f"   (rounds {min(ratios):.3f} to {max(ratios):.3f})\n"
    )
    return step_ms


def _stock_ms(model: LoadedModel, bench: _Bench) -> float:
    spec = bench.spec
    seeds = [image_seed(spec.seed, index) for index in range(1, spec.images + 1)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    began_ns = time.monotonic_ns()
    with torch.no_grad():
        model.text_to_image(
            spec.prompt,
            width=spec.width,
            height=spec.height,
            num_inference_steps=spec.steps,
            guidance_scale=spec.guidance_milli / 1000,
            num_images_per_prompt=spec.images,
            generator=generators,
            output_type="np",
        )
    return (time.monotonic_ns() - began_ns) / _MS


async def _parking(bench: _Bench, step_ms: float) -> None:
    """Ask a relax run for the GPU, at another part of its step in each round."""
    waits_ms, steps_done = [], []
    worker = _worker(bench)
    for number in range(bench.rounds):
        bench.engine.begin_notes()
        relax = _request(bench, "relax")
        worker.render(relax)
        # Asked, not told: whoever watches would take part in what is measured.
        while len(bench.engine.steps_ns) < 2 + number % 3:  # noqa: ASYNC110
            await asyncio.sleep(step_ms / 10_000)
        await asyncio.sleep(step_ms / 1000 * number / bench.rounds)
        fast = dataclasses.replace(_request(bench, "fast"), parks=relax.attempt_id)
        asked_ns = time.monotonic_ns()
        worker.render(fast)
        for request in (fast, relax):
            await _result(worker, request.attempt_id)
        begun_ns = bench.engine.begun_ns[1]
        waits_ms.append((begun_ns - asked_ns) / _MS)
        steps_done.append(sum(asked_ns < ended_ns <= begun_ns for ended_ns in bench.engine.steps_ns))
    await worker.close()
    print("2. A fast run takes the GPU of a relax run, asked at some moment of a step")
    print(f"   relax steps that ended meanwhile    {max(steps_done)} at most")
    print(
        f"   until the fast run has the GPU      {statistics.median(waits_ms):.1f} ms median,"
        f" {max(waits_ms):.1f} at most; a step is {step_ms:.1f}\n"
    )


def _checkpoints(bench: _Bench) -> None:
    noted = _Control(cut=True)
    bench.render(noted)
    sizes, made_ms, back_ms, first_ms = [], [], [], []
    plain = _Control()
    for step, cut in noted.cuts[4::5]:
        began_ns = time.monotonic_ns()
        content = cut()
        made_ms.append((time.monotonic_ns() - began_ns) / _MS)
        sizes.append(len(content))
        if step < bench.spec.steps:
            restored = _Control()
            began_ns = time.monotonic_ns()
            bench.render(restored, content)
            back_ms.append((restored.restored_ns - began_ns) / _MS)
    began_ns = time.monotonic_ns()
    bench.render(plain)
    first_ms.append((plain.step_ns[0] - began_ns) / _MS)
    print("3. A checkpoint")
    print(f"   size                        {statistics.median(sizes) / 1000:10.1f} kB")
    print(f"   the GPU waits for the copy  {statistics.median(noted.cut_ns) / _MS:10.3f} ms")
    print(f"   made into a file            {statistics.median(made_ms):10.3f} ms of another thread")
    print(
        f"   the way back to it          {statistics.median(back_ms):10.1f} ms"
        f" (a run is at its first step after {first_ms[0]:.1f})\n"
    )


def _previews(bench: _Bench) -> None:
    watched, unwatched, each, made = [], [], [], []
    for _ in range(bench.rounds):
        control = _Control(watched=True)
        bench.render(control)
        each += control.preview_ns
        for preview in control.previews:
            began_ns = time.monotonic_ns()
            preview()
            made.append(time.monotonic_ns() - began_ns)
        watched += [b - a for a, b in zip(control.step_ns, control.step_ns[1:], strict=False)]
        control = _Control()
        bench.render(control)
        unwatched += [b - a for a, b in zip(control.step_ns, control.step_ns[1:], strict=False)]
    step_ms = statistics.median(unwatched) / _MS
    preview_ms = statistics.median(each) / _MS
    # At most four a second, and never more than one a step.
    share = preview_ms / max(step_ms, bench.settings.preview_interval_ms)
    made_ms = statistics.median(made) / _MS
    print("4. Previews")
    print(f"   a step that nobody watches   {step_ms:10.2f} ms")
    print(f"   a step with a preview        {statistics.median(watched) / _MS:10.2f} ms")
    print(f"   the run waits for the copy   {preview_ms:10.2f} ms")
    print(f"   made into a picture          {made_ms:10.2f} ms of another thread")
    print(
        f"   of all time while watched    {share:10.2%}"
        f"   (at most one in {bench.settings.preview_interval_ms} ms)\n"
    )


async def _account(bench: _Bench) -> None:
    """Give a worker one job after the other, each as soon as it takes it."""
    began = time.monotonic()
    worker = _worker(bench)
    given = _request(bench, "relax")
    worker.render(given)
    gaps_ms = []
    for _ in range(bench.rounds):
        idle_ms = worker.report(1).gpu_time.idle_ms
        while (await worker.heartbeat(1, 60_000)).report.active is not None:
            pass
        before, given = given, _request(bench, "relax")
        worker.render(given)
        # Its time is in the account when it has ended, and then the next has long begun.
        await _result(worker, before.attempt_id)
        gaps_ms.append(worker.report(1).gpu_time.idle_ms - idle_ms)
    await _result(worker, given.attempt_id)
    after = worker.report(1)
    wall_ms = (time.monotonic() - began) * 1000
    used = sum(dataclasses.asdict(after.gpu_time).values())
    job_ms = _spent_ms(after) / (bench.rounds + 1)
    await worker.close()
    print("5. The GPU's time as the worker counts it")
    print(f"   all uses against the wall    {used / wall_ms:10.4f}")
    print(f"   a job                        {job_ms:10.1f} ms")
    print(
        f"   idle between two jobs        {statistics.median(gaps_ms):10.1f} ms median,"
        f" {max(gaps_ms)} at most: the next one given while the last picture is decoded"
    )


def _spent_ms(report: WorkerReport) -> int:
    return report.gpu_time.fast_ms + report.gpu_time.relax_ms


def _worker(bench: _Bench) -> Worker:
    return Worker(bench.settings, bench.engine, Artifacts(bench.settings.artifacts_url))


def _request(bench: _Bench, tier: str) -> RenderRequest:
    return RenderRequest(
        job_id=str(uuid.uuid4()),
        attempt_id=str(uuid.uuid4()),
        token=str(uuid.uuid4()),
        epoch=1,
        tier=tier,
        spec=bench.spec,
        file_stem="a_lighthouse_in_fog",
    )


def _entry(model: str, folder: Path) -> ModelEntry:
    """Return the entry of the model; those of large shapes are built in `folder`."""
    if model == "stand-in":
        return read_models(Path(__file__).parents[1] / "stand_in.toml").default
    # Not at the top: it imports diffusers, and the engine says first how quiet that is to be.
    from large_models import large_entry

    return large_entry(model, folder / model)


async def _result(worker: Worker, attempt_id: str) -> AttemptResult:
    while True:
        report = worker.report(1)
        for result in report.unacknowledged:
            if result.attempt_id == attempt_id:
                assert result.outcome is Outcome.SUCCEEDED, result.failure_sentence
                worker.acknowledge(1, attempt_id)
                return result
        await worker.heartbeat(1, 60_000)


if __name__ == "__main__":
    main()
