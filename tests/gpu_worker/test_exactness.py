"""A picture's bits, whatever happens to its run: parked at any step, or cut there and continued elsewhere."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from test_engine import a_tiny_sdxl, models_of
from worker_builders import a_request, a_spec, some_settings

from gpu_worker.contract import Outcome, RenderKind, RenderSpec, SourceImage, WorkerReport
from gpu_worker.engine.checkpoint import NotCheckpointable, RunState
from gpu_worker.engine.diffusers_engine import DiffusersEngine
from gpu_worker.models import Models, read_models
from gpu_worker.run import Rendering, Snapshot
from gpu_worker.worker import Worker

pytestmark = [
    pytest.mark.engine,
    # diffusers hands torch tensors to numpy in a way that numpy 2 will no longer take.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # It makes a few schedulers from the configuration of another, and tells what it changes in them.
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

_STEPS = 5
_PROCESS_SCHEDULER = "DPMSolverMultistepScheduler"
_SOME = ["EulerAncestralDiscreteScheduler", _PROCESS_SCHEDULER, "UniPCMultistepScheduler"]
_OTHERS = [
    "EulerDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
]
_SCHEDULERS = [*_SOME, *(pytest.param(name, marks=pytest.mark.long) for name in _OTHERS)]
_KINDS = [RenderKind.IMAGINE, RenderKind.VARIATION]


class Control:
    """Lets another run have the device at some steps, and copies the run's state at each."""

    def __init__(
        self, *, parked_at: Callable[[int], bool] = lambda step: False, other: Callable[[], object] = object
    ) -> None:
        self.cuts: dict[int, Snapshot] = {}
        self.steps = 0
        self.was_restored = False
        self._parked_at = parked_at
        self._other = other

    def check(self) -> None:
        if not self.cuts and self._parked_at(0):
            self._park()

    def restored(self) -> None:
        self.was_restored = True

    def boundary(
        self, step: int, steps: int, preview: Callable[[], bytes], snapshot: Callable[[], Snapshot]
    ) -> None:
        self.steps = steps
        self.cuts[step] = snapshot()
        if self._parked_at(step):
            self._park()

    def _park(self) -> None:
        # As in a worker: the other run has a thread of its own, and this one waits in its call.
        thread = threading.Thread(target=self._other)
        thread.start()
        thread.join()


@cache
def models() -> Models:
    """Return the stand-in, once with each scheduler."""
    stand_in = replace(read_models(None).default, default_width=64, default_height=64)
    names = [*_SOME, *_OTHERS]
    entries = {name: replace(stand_in, name=name, scheduler=name) for name in names}
    return Models(default=entries[names[0]], entries=entries)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def engine(cache_dir: Path) -> DiffusersEngine:
    return an_engine(cache_dir)


@pytest.fixture(scope="module")
def fresh_engine(cache_dir: Path) -> DiffusersEngine:
    """Another that has drawn nothing of what the first one has."""
    return an_engine(cache_dir)


def an_engine(cache_dir: Path) -> DiffusersEngine:
    settings = some_settings(cache_dir, engine="diffusers", cache_dir=cache_dir, memory_bytes=10**12)
    return DiffusersEngine(models(), settings)


def a_small_spec(scheduler: str, kind: RenderKind = RenderKind.IMAGINE, **changes: Any) -> RenderSpec:
    source = SourceImage(job_id="a", index=2, latents_path="", strength_permille=800)
    varied = {"source": source} if kind is RenderKind.VARIATION else {}
    fixed = {"model": scheduler, "kind": kind, "images": 2, "steps": _STEPS}
    return a_spec(**{**fixed, **varied, **changes})


def source_grid() -> bytes:
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    content: bytes = safetensors.torch.save({"latents": latents})
    return content


def drawn(
    engine: DiffusersEngine,
    spec: RenderSpec,
    control: Control | None = None,
    checkpoint: bytes | None = None,
) -> Rendering:
    engine.load(spec.model)
    source = source_grid() if spec.kind is RenderKind.VARIATION else None
    return engine.render(spec, source, control or Control(), engine.stage_clock(), checkpoint)


def assert_same(one: Rendering, other: Rendering) -> None:
    assert torch.equal(
        safetensors.torch.load(one.latents)["latents"], safetensors.torch.load(other.latents)["latents"]
    )
    assert one.images == other.images
    assert one.receipt == other.receipt


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("scheduler", _SCHEDULERS)
def test_a_run_parked_at_every_boundary_draws_the_same_bits(
    engine: DiffusersEngine, scheduler: str, kind: RenderKind
) -> None:
    spec = a_small_spec(scheduler, kind)
    undisturbed = drawn(engine, spec)
    # The other run uses the same model, so everything the two might share, they do share.
    control = Control(
        parked_at=lambda step: True,
        other=lambda: drawn(engine, replace(spec, seed=1, steps=4, prompt="a fox")),
    )
    assert_same(drawn(engine, spec, control), undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("scheduler", _SCHEDULERS)
def test_a_run_parked_at_any_step_draws_the_same_bits(
    engine: DiffusersEngine, scheduler: str, kind: RenderKind
) -> None:
    spec = a_small_spec(scheduler, kind)
    count = Control()
    undisturbed = drawn(engine, spec, count)
    for parked_at in range(count.steps + 1):
        control = Control(
            parked_at=lambda step, at=parked_at: step == at,
            other=lambda: drawn(engine, a_small_spec("EulerDiscreteScheduler", seed=1)),
        )
        assert_same(drawn(engine, spec, control), undisturbed)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("scheduler", _SCHEDULERS)
def test_a_run_continued_from_any_step_by_another_engine_draws_the_same_bits(
    engine: DiffusersEngine, fresh_engine: DiffusersEngine, scheduler: str, kind: RenderKind
) -> None:
    spec = a_small_spec(scheduler, kind)
    control = Control()
    undisturbed = drawn(engine, spec, control)
    assert list(control.cuts) == list(range(1, control.steps + 1))
    for step, cut in control.cuts.items():
        going_on = Control()
        assert_same(drawn(fresh_engine, spec, going_on, cut()), undisturbed)
        assert going_on.was_restored
        # No step is taken again.
        assert list(going_on.cuts) == list(range(step + 1, control.steps + 1))


def test_a_run_of_another_family_continued_elsewhere_draws_the_same_bits(tmp_path: Path) -> None:
    entry = a_tiny_sdxl(tmp_path / "sdxl")
    settings = some_settings(tmp_path, engine="diffusers")
    one, other = (DiffusersEngine(models_of(entry), settings) for _ in range(2))
    for kind in _KINDS:
        spec = a_small_spec("sdxl", kind, width=128, height=128)
        control, going_on = Control(), Control()
        undisturbed = drawn(one, spec, control)
        assert_same(drawn(other, spec, going_on, control.cuts[2]()), undisturbed)
        assert going_on.was_restored


def test_a_run_that_was_continued_can_be_cut_and_continued_again(
    engine: DiffusersEngine, fresh_engine: DiffusersEngine
) -> None:
    spec = a_small_spec("EulerAncestralDiscreteScheduler")
    first, second = Control(), Control()
    undisturbed = drawn(engine, spec, first)
    drawn(fresh_engine, spec, second, first.cuts[2]())
    assert second.cuts[4]() == first.cuts[4]()
    assert_same(drawn(engine, spec, Control(), second.cuts[4]()), undisturbed)


def test_a_run_continued_in_another_process_draws_the_same_bits(
    engine: DiffusersEngine, cache_dir: Path, tmp_path: Path
) -> None:
    spec = a_small_spec(_PROCESS_SCHEDULER)
    control = Control()
    undisturbed = drawn(engine, spec, control)
    (tmp_path / "checkpoint").write_bytes(control.cuts[3]())
    program = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_exactness import Control, a_small_spec, an_engine, drawn
        control = Control()
        checkpoint = Path({str(tmp_path / "checkpoint")!r}).read_bytes()
        rendering = drawn(
            an_engine(Path({str(cache_dir)!r})), a_small_spec({_PROCESS_SCHEDULER!r}), control, checkpoint
        )
        assert list(control.cuts) == [4, 5]
        Path({str(tmp_path / "latents")!r}).write_bytes(rendering.latents)
        Path({str(tmp_path / "pixels")!r}).write_bytes(b"".join(i.pixels for i in rendering.images))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=100)
    assert (tmp_path / "latents").read_bytes() == undisturbed.latents
    assert (tmp_path / "pixels").read_bytes() == b"".join(image.pixels for image in undisturbed.images)


def test_a_checkpoint_of_other_software_is_not_used(engine: DiffusersEngine) -> None:
    spec = a_small_spec("EulerAncestralDiscreteScheduler")
    control, anew = Control(), Control()
    undisturbed = drawn(engine, spec, control)
    state = RunState.read(control.cuts[2](), undisturbed.receipt)
    assert state is not None
    other = state.content({**undisturbed.receipt, "torch": "1.0"})
    assert_same(drawn(engine, spec, anew, other), undisturbed)
    assert not anew.was_restored
    assert list(anew.cuts) == list(control.cuts)


def test_a_checkpoint_is_small_and_executes_nothing(engine: DiffusersEngine) -> None:
    control = Control()
    drawn(engine, a_small_spec("UniPCMultistepScheduler"), control)
    content = control.cuts[3]()
    assert len(content) < 100_000
    tensors = safetensors.torch.load(content)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def test_what_is_put_back_is_what_was_there() -> None:
    channels_last = torch.randn(1, 4, 8, 8).to(memory_format=torch.channels_last)
    kept: dict[str, Any] = {
        "number": 0.1,
        "none": None,
        "yes": True,
        "pair": (1, [torch.arange(3), None]),
        "by_name": {"a": torch.tensor(float("inf")), 2: "b"},
        "table": torch.arange(6, dtype=torch.float64).numpy(),
        "channels_last": channels_last,
    }
    kept["scalar"] = kept["table"][3]
    generator = torch.Generator().manual_seed(5)
    state = RunState.of(
        step=3, latents=channels_last, scheduler=SimpleNamespace(**kept), generators=[generator]
    )
    following = torch.rand(4, generator=generator)
    read = RunState.read(state.content({"torch": "2"}), {"torch": "2"})
    assert read is not None
    scheduler = SimpleNamespace()
    latents = read.put_back(scheduler=scheduler, generators=[generator], device=torch.device("cpu"))
    assert torch.equal(latents, channels_last)
    assert latents.stride() == scheduler.channels_last.stride() == channels_last.stride()
    assert torch.equal(torch.rand(4, generator=generator), following)
    assert (scheduler.number, scheduler.none, scheduler.yes) == (0.1, None, True)
    assert torch.equal(scheduler.pair[1][0], torch.arange(3))
    assert scheduler.by_name[2] == "b"
    assert scheduler.by_name["a"].isinf()
    assert (scheduler.table == kept["table"]).all()
    assert type(scheduler.scalar) is type(kept["scalar"])


def test_a_scheduler_that_keeps_a_live_object_cannot_be_cut() -> None:
    with pytest.raises(NotCheckpointable, match="Generator"):
        RunState.of(
            step=1,
            latents=torch.zeros(1),
            scheduler=SimpleNamespace(noise=torch.Generator()),
            generators=[],
        )


async def shas(worker: Worker, attempt_id: str) -> list[str]:
    report = worker.report(1)
    while True:
        for result in report.unacknowledged:
            if result.attempt_id == attempt_id:
                assert result.outcome is Outcome.SUCCEEDED, result.failure_sentence
                return [image.sha256 for image in result.images]
        report = (await worker.heartbeat(1, 60_000)).report


async def step_passed(worker: Worker, attempt_id: str, step: int) -> None:
    async for progress in worker.watch(attempt_id, previews=True):
        if progress.step >= step:
            return


async def test_a_run_parked_and_then_continued_by_another_worker_gives_the_same_files(
    make_worker: Callable[..., Worker], engine: DiffusersEngine, fresh_engine: DiffusersEngine
) -> None:
    scheduler = "EulerAncestralDiscreteScheduler"
    changes: dict[str, Any] = {"model": scheduler, "steps": 30, "images": 2}
    one, other = make_worker(engine), make_worker(fresh_engine)
    undisturbed = a_request(spec=changes)
    one.render(undisturbed)
    expected = await shas(one, undisturbed.attempt_id)

    relax, fast = a_request(tier="relax", spec=changes), a_request(spec=changes)
    one.render(relax)
    await step_passed(one, relax.attempt_id, 2)
    one.render(replace(fast, parks=relax.attempt_id))
    report: WorkerReport = one.report(1)
    while report.parked == () or report.parked[0].checkpoint is None:
        report = (await one.heartbeat(1, 60_000)).report
    checkpoint = report.parked[0].checkpoint
    again = replace(a_request(spec=changes), job_id=relax.job_id, checkpoint=checkpoint)
    other.render(again)
    assert await shas(one, fast.attempt_id) == expected
    assert await shas(one, relax.attempt_id) == expected
    assert await shas(other, again.attempt_id) == expected
    (result,) = other.report(1).unacknowledged
    assert (result.kept, checkpoint.device) == (checkpoint.kept, one.report(1).device)
