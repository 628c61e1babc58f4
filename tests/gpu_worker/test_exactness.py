"""A picture's bits, whatever happens to its run: parked at any step, or cut there and continued elsewhere."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_models import models_of, png, tiny_entry
from worker_builders import a_request, a_spec, some_settings

from gpu_worker.contract import (
    Outcome,
    PicturePart,
    RenderKind,
    RenderSpec,
    SourceImage,
    TextPart,
    WorkerReport,
)
from gpu_worker.engine.checkpoint import NotCheckpointable, RunState
from gpu_worker.engine.diffusers_engine import DiffusersEngine
from gpu_worker.run import CutState, Inputs, Preview, Rendering
from gpu_worker.worker import Worker

pytestmark = [
    pytest.mark.engine,
    # diffusers hands torch tensors to numpy in a way that numpy 2 will no longer take.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # It makes a few schedulers from the configuration of another, and tells what it changes in them.
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

_STEPS = 5
_EULER_A, _DPM, _UNIPC = (
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
_OTHERS = [
    "EulerDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
]
_FLOW = "FlowMatchEulerDiscreteScheduler"
# Each family, and each kind of state that a scheduler has: noise of its own, answers of earlier steps, halves
# of a step.
_SOME = [
    ("sd", _EULER_A),
    ("sd", _UNIPC),
    ("sd", "HeunDiscreteScheduler"),
    ("sdxl", _DPM),
    ("sd3", _FLOW),
    ("flux-dynamic", _FLOW),
    ("sd3", "FlowMatchLCMScheduler"),
    # Its denoiser is given a list of pictures.
    ("z-image", _FLOW),
]
_ALL = [
    *((family, name) for family in ("sd", "sdxl") for name in [_EULER_A, _DPM, _UNIPC, *_OTHERS]),
    *((family, _FLOW) for family in ("sd3", "flux", "flux-dynamic", "z-image")),
    ("sd3", "FlowMatchHeunDiscreteScheduler"),
    # It draws noise in each step, and its pipeline passes no generator.
    ("sd3", "FlowMatchLCMScheduler"),
]
_MODELS = [
    pytest.param(
        f"{family} {scheduler}",
        marks=() if (family, scheduler) in _SOME else pytest.mark.long,
        id=f"{family}-{scheduler}",
    )
    for family, scheduler in _ALL
]
_KINDS = [RenderKind.IMAGINE, RenderKind.VARIATION]
_ELSEWHERE = [
    (f"sd {_DPM}", RenderKind.IMAGINE),
    (f"sdxl {_EULER_A}", RenderKind.VARIATION),
    (f"sd3 {_FLOW}", RenderKind.VARIATION),
    (f"flux-dynamic {_FLOW}", RenderKind.IMAGINE),
]
_PARTS = (TextPart(text="a fox", share_ppm=400_000), TextPart(text="snow", share_ppm=-350_000))


class Control:
    """Lets another run have the device at some steps, and copies the run's state at each."""

    def __init__(
        self,
        *,
        parked_at: Callable[[int], bool] = lambda step: False,
        other: Callable[[], object] = object,
        watched: bool = False,
    ) -> None:
        self.cuts: dict[int, CutState] = {}
        self.previews: list[bytes] = []
        self.steps = 0
        self.was_restored = False
        self._parked_at = parked_at
        self._other = other
        self._watched = watched

    def check(self, *, last: bool = False) -> None:
        if not self.cuts and self._parked_at(0):
            self._park()

    def restored(self) -> None:
        self.was_restored = True

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        self.steps = steps
        self.cuts[step] = cut()
        if self._watched:
            self.previews.append(preview()())
        if self._parked_at(step):
            self._park()

    def _park(self) -> None:
        # As in a worker: the other run has a thread of its own, and this one waits in its call.
        thread = threading.Thread(target=self._other)
        thread.start()
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def engine(folder: Path) -> DiffusersEngine:
    return an_engine(folder)


@pytest.fixture(scope="module")
def fresh_engine(folder: Path) -> DiffusersEngine:
    """Another that has drawn nothing of what the first one has."""
    return an_engine(folder)


def an_engine(folder: Path) -> DiffusersEngine:
    entries = (tiny_entry(family, folder / family, scheduler) for family, scheduler in _ALL)
    settings = some_settings(folder, engine="diffusers", cache_dir=folder, memory_bytes=10**12)
    return DiffusersEngine(models_of(*entries), settings)


def a_small_spec(model: str, kind: RenderKind = RenderKind.IMAGINE, **changes: Any) -> RenderSpec:
    source = SourceImage(job_id="a", index=2, latents_path="", strength_permille=800)
    varied = {"source": source} if kind is RenderKind.VARIATION else {}
    fixed = {"model": model, "kind": kind, "images": 2, "steps": _STEPS}
    return a_spec(**{**fixed, **varied, **changes})


def everything_at_once(model: str, kind: RenderKind) -> RenderSpec:
    """Return a spec of parts and of a picture where the model takes any, stopped early and filmed."""
    parts = () if model.startswith("z-image") else _PARTS
    spec = a_small_spec(model, kind, steps=8, stop_percent=60, video=True, parts=parts)
    picture = PicturePart(path="", share_ppm=250_000)
    return replace(spec, pictures=(picture,)) if model.startswith(("sd ", "sdxl ")) else spec


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
    engine.load(spec.model, spec.kind)
    source = source_grid() if spec.kind is RenderKind.VARIATION else None
    inputs = Inputs(source=source, pictures=tuple(png(number) for number in range(len(spec.pictures))))
    return engine.render(spec, inputs, control or Control(), engine.stage_clock(), checkpoint)


def assert_same(one: Rendering, other: Rendering) -> None:
    assert torch.equal(
        safetensors.torch.load(one.latents)["latents"], safetensors.torch.load(other.latents)["latents"]
    )
    assert one.images == other.images
    assert one.receipt == other.receipt
    assert one.film == other.film


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("model", _MODELS)
def test_a_run_parked_at_every_boundary_draws_the_same_bits(
    engine: DiffusersEngine, model: str, kind: RenderKind
) -> None:
    spec = a_small_spec(model, kind)
    undisturbed = drawn(engine, spec)
    # The other run uses the same model, so everything the two might share, they do share.
    control = Control(
        parked_at=lambda step: True,
        other=lambda: drawn(engine, replace(spec, seed=1, steps=4, prompt="a fox")),
    )
    assert_same(drawn(engine, spec, control), undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("model", _MODELS)
def test_a_run_parked_at_any_step_draws_the_same_bits(
    engine: DiffusersEngine, model: str, kind: RenderKind
) -> None:
    spec = a_small_spec(model, kind)
    count = Control()
    undisturbed = drawn(engine, spec, count)
    for parked_at in range(count.steps + 1):
        control = Control(
            parked_at=lambda step, at=parked_at: step == at,
            other=lambda: drawn(engine, a_small_spec("sd EulerDiscreteScheduler", seed=1)),
        )
        assert_same(drawn(engine, spec, control), undisturbed)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("model", _MODELS)
def test_a_run_continued_from_any_step_by_another_engine_draws_the_same_bits(
    engine: DiffusersEngine, fresh_engine: DiffusersEngine, model: str, kind: RenderKind
) -> None:
    spec = a_small_spec(model, kind)
    control = Control()
    undisturbed = drawn(engine, spec, control)
    assert list(control.cuts) == list(range(1, control.steps + 1))
    for step, cut in control.cuts.items():
        going_on = Control()
        assert_same(drawn(fresh_engine, spec, going_on, cut()), undisturbed)
        assert going_on.was_restored
        # No step is taken again.
        assert list(going_on.cuts) == list(range(step + 1, control.steps + 1))


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("model", _MODELS)
def test_a_run_cut_and_continued_after_each_of_its_steps_draws_the_same_bits(
    engine: DiffusersEngine, fresh_engine: DiffusersEngine, model: str, kind: RenderKind
) -> None:
    spec = a_small_spec(model, kind)
    control = Control()
    undisturbed = drawn(engine, spec, control)
    steps, checkpoint = control.steps, control.cuts[1]()
    for step in range(2, steps + 1):
        control = Control()
        rendering = drawn((engine, fresh_engine)[step % 2], spec, control, checkpoint)
        checkpoint = control.cuts[step]()
    assert_same(rendering, undisturbed)
    assert_same(drawn(fresh_engine, spec, Control(), checkpoint), undisturbed)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("model", _MODELS)
def test_weights_pictures_a_stop_and_a_film_are_cut_and_parked_without_a_bit_changed(
    engine: DiffusersEngine, fresh_engine: DiffusersEngine, model: str, kind: RenderKind
) -> None:
    spec = everything_at_once(model, kind)
    other = replace(spec, seed=1, pictures=(), parts=(), stop_percent=100)
    control = Control(parked_at=lambda step: True, other=lambda: drawn(engine, other))
    undisturbed = drawn(engine, spec)
    assert_same(drawn(engine, spec, control), undisturbed)
    for cut in control.cuts.values():
        assert_same(drawn(fresh_engine, spec, Control(), cut()), undisturbed)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("model", _MODELS)
def test_who_watches_and_who_films_changes_no_bit(
    engine: DiffusersEngine, model: str, kind: RenderKind
) -> None:
    spec = a_small_spec(model, kind)
    undisturbed = drawn(engine, spec)
    watched = Control(watched=True)
    filmed = drawn(engine, replace(spec, video=True), watched)
    assert filmed.film is not None
    assert len(filmed.film.frames) == len(watched.previews) == watched.steps
    assert_same(replace(filmed, film=None), undisturbed)


@pytest.mark.parametrize(
    ("kind", "source_size", "size"),
    [
        (RenderKind.UPSCALE_LIGHT, (320, 240), (384, 288)),
        (RenderKind.UPSCALE_DETAILED, (64, 48), (160, 120)),
    ],
)
def test_an_upscale_continued_from_any_tile_draws_the_same_bits(
    engine: DiffusersEngine,
    fresh_engine: DiffusersEngine,
    kind: RenderKind,
    source_size: tuple[int, int],
    size: tuple[int, int],
) -> None:
    source = SourceImage(job_id="a", index=1, latents_path="", strength_permille=0, picture_path="a")
    fixed = {"source": source, "images": 1, "width": size[0], "height": size[1], "parts": _PARTS}
    spec = a_small_spec(f"sd {_EULER_A}", kind, **fixed)

    def upscaled(engine: DiffusersEngine, control: Control, checkpoint: bytes | None = None) -> Rendering:
        while engine.load(spec.model, spec.kind):
            """One thing after the other."""
        inputs = Inputs(source=png(1, *source_size))
        return engine.render(spec, inputs, control, engine.stage_clock(), checkpoint)

    control = Control()
    undisturbed = upscaled(engine, control)
    (image,) = undisturbed.images
    assert (image.width, image.height, undisturbed.latents) == (*size, None)
    assert len(str(undisturbed.receipt["upscaler_sha256"])) == 64
    assert control.steps > 1
    for cut in control.cuts.values():
        going_on = Control()
        assert upscaled(fresh_engine, going_on, cut()) == undisturbed
        assert going_on.was_restored
    parked = Control(parked_at=lambda step: True, other=lambda: upscaled(engine, Control()))
    assert upscaled(engine, parked) == undisturbed


def test_a_run_continued_in_another_process_draws_the_same_bits(
    engine: DiffusersEngine, folder: Path, tmp_path: Path
) -> None:
    undisturbed = {}
    for model, kind in _ELSEWHERE:
        control = Control()
        undisturbed[model] = drawn(engine, everything_at_once(model, kind), control)
        (tmp_path / model).write_bytes(control.cuts[2]())
    program = f"""
        import pickle, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_exactness import _ELSEWHERE, Control, an_engine, drawn, everything_at_once
        engine, folder, renderings = an_engine(Path({str(folder)!r})), Path({str(tmp_path)!r}), {{}}
        for model, kind in _ELSEWHERE:
            control = Control()
            checkpoint = (folder / model).read_bytes()
            renderings[model] = drawn(engine, everything_at_once(model, kind), control, checkpoint)
            assert list(control.cuts) == list(range(3, control.steps + 1))
        (folder / "renderings").write_bytes(pickle.dumps(renderings))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=100)
    renderings = pickle.loads((tmp_path / "renderings").read_bytes())
    for model, _ in _ELSEWHERE:
        assert_same(renderings[model], undisturbed[model])


def test_a_checkpoint_of_other_software_is_not_used(engine: DiffusersEngine) -> None:
    spec = a_small_spec(f"sd {_EULER_A}")
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
    drawn(engine, a_small_spec(f"sd {_UNIPC}"), control)
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
    changes: dict[str, Any] = {"model": f"sd {_EULER_A}", "steps": 30, "images": 2}
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
