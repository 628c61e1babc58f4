"""The diffusers engine on a real pipeline: what is exact, what is cancelled, what is measured."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny_models import models_of, png, tiny_entry
from worker_builders import a_request, a_spec, some_settings, uses_that_are_the_wall_time

from gpu_worker.contract import Outcome, RenderKind, RenderSpec, SourceImage, StageTimes, TextPart
from gpu_worker.engine.checkpoint import RunState
from gpu_worker.engine.diffusers_engine import DiffusersEngine
from gpu_worker.engine.film import FilmRoll
from gpu_worker.engine.latents import contact_sheet, decoded, fitted_latent_to_rgb
from gpu_worker.engine.loading import LoadedModel, loaded_model
from gpu_worker.engine.receipts import RECIPE
from gpu_worker.engine.step_boundary import has_boundary, with_boundary
from gpu_worker.image_seeds import image_seed
from gpu_worker.models import Models
from gpu_worker.outputs import Artifacts
from gpu_worker.run import CutState, EngineFailure, Inputs, Preview, RenderedImage, Rendering, RunStopped
from gpu_worker.worker import Worker
from tests.stand_in import stand_in_models

pytestmark = [
    pytest.mark.engine,
    # diffusers hands torch tensors to numpy in a way that numpy 2 will no longer take.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

_SIDE = 128
_STEPS = 6


class Control:
    """Counts boundaries; watches and stops as it is told."""

    def __init__(
        self, *, stop_at: int | None = None, stop_after_decodes: int | None = None, watched: bool = False
    ) -> None:
        self.boundaries: list[tuple[int, int]] = []
        self.previews: list[bytes] = []
        self.cuts: list[CutState] = []
        self.lasts: list[bool] = []
        """Of each check, whether what follows was said to be the last."""
        self._stop_at = stop_at
        self._checks_left = None if stop_after_decodes is None else stop_after_decodes + 1
        self._watched = watched

    def check(self, *, last: bool = False) -> None:
        self.lasts.append(last)
        if self._checks_left is not None and self.boundaries:
            self._checks_left -= 1
            if self._checks_left == 0:
                raise RunStopped

    def restored(self) -> None:
        raise AssertionError("nothing was given to go on from")

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        if step == self._stop_at:
            raise RunStopped
        self.boundaries.append((step, steps))
        self.cuts.append(cut())
        if self._watched:
            self.previews.append(preview()())


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def engine(cache_dir: Path) -> DiffusersEngine:
    engine = an_engine(cache_dir)
    engine.load("stand-in", RenderKind.IMAGINE)
    return engine


@pytest.fixture(scope="module")
def stand_in(cache_dir: Path) -> LoadedModel:
    """A model of a test's own, beside the engine's."""
    return loaded_model(stand_in_models().default, torch.device("cpu"), cache_dir)


def an_engine(cache_dir: Path, models: Models | None = None, **changes: Any) -> DiffusersEngine:
    settings = some_settings(cache_dir, engine="diffusers", cache_dir=cache_dir, **changes)
    return DiffusersEngine(models or stand_in_models(), settings)


def model_of(engine: DiffusersEngine, name: str = "stand-in") -> LoadedModel:
    with engine._residency.held(name, LoadedModel) as model:
        return model


def a_small_spec(**changes: Any) -> RenderSpec:
    return a_spec(**{"width": _SIDE, "height": _SIDE, "steps": _STEPS, **changes})


def drawn(
    engine: DiffusersEngine, spec: RenderSpec, *, control: Control | None = None, source: bytes | None = None
) -> Rendering:
    return engine.render(spec, Inputs(source=source), control or Control(), engine.stage_clock())


def latents(rendering: Rendering) -> torch.Tensor:
    return safetensors.torch.load(rendering.latents)["latents"]


def latents_at(engine: DiffusersEngine, spec: RenderSpec, step: int) -> torch.Tensor:
    """Return the noisy latents after a step."""
    control = Control(stop_at=step + 1)
    with pytest.raises(RunStopped):
        drawn(engine, spec, control=control)
    state = RunState.read(control.cuts[-1](), drawn(engine, spec).receipt)
    assert state is not None
    return state.put_back(
        scheduler=SimpleNamespace(),
        generators=[torch.Generator() for _ in range(4)],
        device=torch.device("cpu"),
    )


def picture(rendering: Rendering, index: int) -> torch.Tensor:
    image = rendering.images[index - 1]
    return (
        torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .float()
    )


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square over all colours, of 255."""
    return float((one - other).square().mean().sqrt())


def test_the_same_request_gives_the_same_bits_also_from_weights_built_anew(
    engine: DiffusersEngine, tmp_path: Path
) -> None:
    first = drawn(engine, a_small_spec())
    assert drawn(engine, a_small_spec()) == first
    other = an_engine(tmp_path)
    other.load("stand-in", RenderKind.IMAGINE)
    assert drawn(other, a_small_spec()) == first


def test_the_decode_of_the_last_picture_is_said_to_be_the_last(engine: DiffusersEngine) -> None:
    control = Control()
    drawn(engine, a_small_spec(steps=2), control=control)
    assert control.lasts[-4:] == [False, False, False, True]
    assert sum(control.lasts) == 1


def test_watching_with_previews_changes_no_bit(engine: DiffusersEngine) -> None:
    watched = Control(watched=True)
    assert drawn(engine, a_small_spec(), control=watched) == drawn(engine, a_small_spec())
    assert len(watched.previews) == _STEPS


def test_prompt_and_seed_both_change_every_picture_visibly(engine: DiffusersEngine) -> None:
    one = drawn(engine, a_small_spec())
    for other in (drawn(engine, a_small_spec(seed=8)), drawn(engine, a_small_spec(prompt="a red fox"))):
        assert all(distance(picture(one, i), picture(other, i)) > 10 for i in range(1, 5))
    assert distance(picture(one, 1), picture(one, 2)) > 10


def test_a_picture_is_as_large_as_asked_for(engine: DiffusersEngine) -> None:
    rendering = drawn(engine, a_small_spec(width=64, height=192, steps=2))
    assert [(image.width, image.height, len(image.pixels)) for image in rendering.images] == [
        (64, 192, 64 * 192 * 3)
    ] * 4


def test_every_step_is_a_boundary(engine: DiffusersEngine) -> None:
    control = Control()
    drawn(engine, a_small_spec(), control=control)
    assert control.boundaries == [(step, _STEPS) for step in range(1, _STEPS + 1)]


def test_a_run_stopped_at_a_boundary_pays_for_its_steps_and_for_no_decode(engine: DiffusersEngine) -> None:
    clock = engine.stage_clock()
    control = Control(stop_at=3)
    with pytest.raises(RunStopped):
        engine.render(a_small_spec(), Inputs(), control, clock)
    times = clock.times()
    assert len(control.boundaries) == 2
    assert times.denoise_ms > 0
    assert times.decode_ms == 0


def test_a_run_can_be_stopped_between_two_decodes(engine: DiffusersEngine) -> None:
    whole, part = engine.stage_clock(), engine.stage_clock()
    engine.render(a_small_spec(steps=2, width=256, height=256), Inputs(), Control(), whole)
    with pytest.raises(RunStopped):
        engine.render(
            a_small_spec(steps=2, width=256, height=256), Inputs(), Control(stop_after_decodes=1), part
        )
    assert 0 < part.times().decode_ms < whole.times().decode_ms


def test_a_stopped_run_leaves_nothing_behind_in_the_shared_pipeline(engine: DiffusersEngine) -> None:
    before = drawn(engine, a_small_spec())
    with pytest.raises(RunStopped):
        drawn(engine, a_small_spec(steps=9, seed=1), control=Control(stop_at=4))
    assert drawn(engine, a_small_spec()) == before


def test_each_picture_has_its_own_noise_which_can_be_drawn_alone() -> None:
    shape = (4, 4, 16, 16)
    generators = [torch.Generator().manual_seed(image_seed(7, index)) for index in range(1, 5)]
    grid = diffusers.utils.torch_utils.randn_tensor(shape, generator=generators)
    for index in range(1, 5):
        alone = torch.randn(shape[1:], generator=torch.Generator().manual_seed(image_seed(7, index)))
        assert torch.equal(grid[index - 1], alone)


def test_a_picture_drawn_alone_is_the_grids_up_to_what_batching_does_to_floats(
    engine: DiffusersEngine,
) -> None:
    # Batch size picks other kernels, which sum in another order: near, not equal.
    grid, alone = latents(drawn(engine, a_small_spec())), latents(drawn(engine, a_small_spec(images=1)))
    assert torch.allclose(alone[0], grid[0], atol=1e-2)
    assert not torch.allclose(alone[0], grid[1], atol=1e-1)


def test_image_seeds_are_as_documented_and_differ_between_neighbouring_jobs() -> None:
    assert image_seed(7, 1) == 5251435224235300234
    assert len({image_seed(seed, index) for seed in range(100) for index in range(1, 5)}) == 400


def test_a_variation_is_near_its_source_and_not_its_copy(engine: DiffusersEngine) -> None:
    entry = stand_in_models().default
    spec = a_small_spec(prompt="a castle", steps=entry.steps, guidance_milli=entry.guidance_milli)
    grid = drawn(engine, spec)
    source = SourceImage(
        job_id="a", index=2, latents_path="", strength_permille=entry.variation_strength_permille
    )
    control = Control()
    near = drawn(
        engine,
        replace(spec, kind=RenderKind.VARIATION, seed=99, source=source),
        control=control,
        source=grid.latents,
    )
    unrelated = drawn(engine, replace(spec, seed=99))

    def mean_from_source(rendering: Rendering) -> float:
        return sum(distance(picture(rendering, index), picture(grid, 2)) for index in range(1, 5)) / 4

    assert 2 < mean_from_source(near) < 0.7 * mean_from_source(unrelated)
    assert control.boundaries[-1] == (8, 8)


def test_a_preview_has_the_colours_that_the_decoder_would_give(
    engine: DiffusersEngine, stand_in: LoadedModel
) -> None:
    model = stand_in
    coarse = torch.randn((8, 4, 5, 5), generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic")
    with torch.no_grad():
        whole = decoded(model.text_to_image.vae, smooth)
    wanted = torch.nn.functional.interpolate(whole, size=(16, 16), mode="area").clamp(-1, 1)
    short_cut = (
        torch.tensordot(smooth.movedim(1, -1), model.latent_to_rgb[:-1], dims=1) + model.latent_to_rgb[-1]
    )
    left = (short_cut.movedim(-1, 1) - wanted).square().mean() / wanted.var()
    # A random decoder is far from affine; trained ones leave less.
    assert left < 0.8, f"{left:.2f} of the variance is left unexplained"


def test_a_preview_has_the_same_colours_from_every_worker(engine: DiffusersEngine) -> None:
    vae = model_of(engine).text_to_image.vae
    elsewhere = []
    maps = set()
    for number in range(8):
        # Where in memory a solver's input lies changes its last bits.
        elsewhere.append(bytearray(1000 + 777 * number))
        with torch.no_grad():
            maps.add(fitted_latent_to_rgb(vae).numpy().tobytes())
    assert len(maps) == 1


def test_a_preview_shows_all_pictures_of_the_grid(engine: DiffusersEngine) -> None:
    control = Control(watched=True)
    drawn(engine, a_small_spec(), control=control)
    for preview in control.previews:
        with Image.open(io.BytesIO(preview)) as sheet:
            assert (sheet.size, sheet.format) == ((256, 256), "PNG")
    assert len(set(control.previews)) == _STEPS


def test_the_contact_sheet_of_one_picture_is_that_picture() -> None:
    to_rgb = torch.zeros(5, 3)
    with Image.open(io.BytesIO(contact_sheet(torch.zeros(1, 4, 8, 16), to_rgb))) as sheet:
        assert sheet.size == (128, 64)


_SCHEDULERS = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
]


@pytest.mark.parametrize("name", _SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_boundary_changes_no_bit_of_a_stock_call_under_any_scheduler(
    stand_in: LoadedModel, name: str, prediction_type: str
) -> None:
    pipeline = stand_in.text_to_image
    shared = pipeline.scheduler
    stock = getattr(diffusers, name).from_config(shared.config, prediction_type=prediction_type)
    listener = CountingListener()

    def call(scheduler: Any) -> torch.Tensor:
        pipeline.scheduler = scheduler
        result: torch.Tensor = pipeline(
            "fog",
            num_inference_steps=4,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images
        return result

    try:
        bounded = call(with_boundary(stock, listener, torch.Generator()))
        assert torch.equal(bounded, call(stock))
        assert listener.steps == len(stock.timesteps)
        assert type(with_boundary(stock, listener, torch.Generator())).__name__ == name
        assert listener.predicted.shape == bounded.shape
        assert listener.predicted.isfinite().all()
    finally:
        pipeline.scheduler = shared


class CountingListener:
    def __init__(self) -> None:
        self.begun = 0
        self.steps = 0
        self.predicted = torch.empty(0)

    def denoising_begins(self) -> None:
        self.begun += 1

    def skipped(self, scheduler: Any, sample: torch.Tensor) -> torch.Tensor | None:
        return None

    def step_ended(self, scheduler: Any, latents: torch.Tensor, predict: Callable[[], torch.Tensor]) -> None:
        self.steps += 1
        self.predicted = predict()


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        ("DPMSolverMultistepScheduler", "epsilon"),
        ("DPMSolverMultistepScheduler", "v_prediction"),
        ("DPMSolverMultistepScheduler", "sample"),
        ("UniPCMultistepScheduler", "epsilon"),
        ("UniPCMultistepScheduler", "v_prediction"),
        ("UniPCMultistepScheduler", "sample"),
        ("PNDMScheduler", "epsilon"),
        ("PNDMScheduler", "v_prediction"),
    ],
)
def test_the_picture_predicted_at_a_step_is_the_one_the_model_meant(name: str, prediction_type: str) -> None:
    listener = CountingListener()
    scheduler = with_boundary(
        getattr(diffusers, name)(prediction_type=prediction_type), listener, torch.Generator()
    )
    scheduler.set_timesteps(10)
    meant, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    time_step = scheduler.timesteps[0]
    alpha = scheduler.alphas_cumprod[int(time_step)]
    sample = alpha.sqrt() * meant + (1 - alpha).sqrt() * noise
    answer = {
        "epsilon": noise,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * meant,
        "sample": meant,
    }
    scheduler.step(answer[prediction_type], time_step, sample)
    assert torch.allclose(listener.predicted, meant, atol=1e-3)


def test_the_picture_predicted_by_flow_matching_is_the_one_the_model_meant() -> None:
    listener = CountingListener()
    scheduler = with_boundary(diffusers.FlowMatchEulerDiscreteScheduler(), listener, torch.Generator())
    scheduler.set_timesteps(10)
    meant, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = scheduler.sigmas[0]
    scheduler.step(noise - meant, scheduler.timesteps[0], (1 - sigma) * meant + sigma * noise)
    assert torch.allclose(listener.predicted, meant, atol=1e-5)
    assert listener.begun == 1


def test_schedulers_without_a_known_prediction_are_known_as_such() -> None:
    assert not has_boundary(diffusers.EDMDPMSolverMultistepScheduler())
    assert has_boundary(diffusers.EulerDiscreteScheduler())
    assert has_boundary(diffusers.FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize(
    ("family", "varied_steps"), [("sd", 3), ("sdxl", 3), ("sd3", 4), ("flux", 4), ("flux-dynamic", 4)]
)
def test_a_stock_pipeline_of_any_family_is_drawn_varied_and_watched_just_so(
    tmp_path: Path, family: str, varied_steps: int
) -> None:
    entry = tiny_entry(family, tmp_path / family)
    engine = an_engine(tmp_path, models_of(entry))
    engine.load(entry.name, RenderKind.IMAGINE)
    # PNDM takes one step more than it is asked for, and the second of its table twice.
    spec = a_small_spec(model=entry.name, steps=7, width=64, height=96)
    control = Control(watched=True)
    grid = drawn(engine, spec, control=control)
    steps = control.boundaries[-1][1]
    assert latents(grid).shape == (4, 4, 12, 8)
    assert control.boundaries == [(step, steps) for step in range(1, steps + 1)]
    for preview in control.previews:
        with Image.open(io.BytesIO(preview)) as sheet:
            # Two by two pictures of 8 by 12, enlarged tenfold.
            assert sheet.size == (160, 240)
    assert len(set(control.previews)) >= steps - 1
    source = SourceImage(job_id="a", index=3, latents_path="", strength_permille=500)
    varied = Control(watched=True)
    near = drawn(
        engine, replace(spec, kind=RenderKind.VARIATION, source=source), control=varied, source=grid.latents
    )
    assert "Img2Img" in str(near.receipt["pipeline"])
    assert varied.boundaries[-1] == (len(varied.previews), len(varied.previews))
    assert len(varied.previews) == varied_steps + (family == "sd")
    assert distance(picture(near, 1), picture(grid, 3)) < distance(picture(near, 1), picture(grid, 2))


@pytest.mark.parametrize("percent", [1, 30, 50, 99])
def test_a_run_that_stops_early_shows_what_its_last_preview_showed(
    engine: DiffusersEngine, percent: int
) -> None:
    whole, early = Control(watched=True), Control(watched=True)
    spec = a_small_spec(steps=10)
    drawn(engine, spec, control=whole)
    rendering = drawn(engine, replace(spec, stop_percent=percent), control=early)
    steps = -(-10 * percent // 100)
    assert early.boundaries == [(step, steps) for step in range(1, steps + 1)]
    assert early.previews == whole.previews[:steps]
    shown = contact_sheet(latents(rendering), model_of(engine).latent_to_rgb)
    assert shown == early.previews[-1] or percent == 99


def test_a_picture_that_stopped_early_is_what_the_model_saw_and_not_the_noise(
    engine: DiffusersEngine,
) -> None:
    spec = a_small_spec(steps=10)
    finished = latents(drawn(engine, spec))
    early = latents(drawn(engine, replace(spec, stop_percent=50)))
    noisy = latents_at(engine, spec, step=5)
    assert (early - finished).std() < 0.8 * (noisy - finished).std()


def test_a_variation_starts_from_what_was_shown_where_its_source_stopped_early(
    engine: DiffusersEngine,
) -> None:
    source = SourceImage(job_id="a", index=1, latents_path="", strength_permille=100)
    grid = drawn(engine, a_small_spec(steps=10, stop_percent=40))
    spec = a_small_spec(steps=10, kind=RenderKind.VARIATION, source=source)
    near = drawn(engine, spec, source=grid.latents)
    assert distance(picture(near, 1), picture(grid, 1)) < 0.5 * distance(picture(near, 1), picture(grid, 2))


def test_a_film_ends_with_the_finished_grid_and_is_as_large_as_one_can_watch(
    engine: DiffusersEngine,
) -> None:
    rendering = drawn(engine, a_small_spec(steps=100, width=128, height=64, video=True, images=2))
    film = rendering.film
    assert film is not None
    # Every third step, and the finished grid.
    assert (film.width, film.height, len(film.frames)) == (256, 64, 34)
    assert {len(frame) for frame in film.frames} == {256 * 64 * 3}
    last = torch.frombuffer(bytearray(film.frames[-1]), dtype=torch.uint8).view(64, 256, 3).float()
    assert torch.equal(last[:, :128], picture(rendering, 1))
    assert torch.equal(last[:, 128:], picture(rendering, 2))
    assert drawn(engine, a_small_spec(steps=2)).film is None


@pytest.mark.parametrize(("steps", "frames"), [(1, 1), (4, 4), (47, 47), (48, 24), (94, 47), (150, 38)])
def test_a_film_has_no_more_frames_than_one_can_watch(steps: int, frames: int) -> None:
    roll = FilmRoll()
    for step in range(1, steps + 1):
        roll.step_ended(step, steps, lambda: torch.zeros((4, 8, 8, 3), dtype=torch.uint8))
    image = RenderedImage(pixels=bytes(512 * 448 * 3), width=512, height=448, seed=1)
    film = roll.developed([image] * 4)
    assert len(film.frames) == frames
    assert (film.width, film.height) == (512, 448)


def test_a_large_picture_is_decoded_in_tiles_and_says_so_and_no_other_notices(
    engine: DiffusersEngine,
) -> None:
    before = drawn(engine, a_small_spec(steps=1))
    large = drawn(engine, a_small_spec(steps=1, images=1, width=1280, height=1024))
    assert (large.receipt["vae_tiling"], before.receipt["vae_tiling"]) == (True, False)
    assert not model_of(engine).text_to_image.vae.use_tiling
    assert drawn(engine, a_small_spec(steps=1)) == before


def test_the_receipt_says_what_is_needed_to_draw_it_again(engine: DiffusersEngine) -> None:
    receipt = dict(drawn(engine, a_small_spec(seed=5)).receipt)
    assert json.loads(json.dumps(receipt)) == receipt
    assert b"torch_version" not in pickle.dumps(receipt), "a scheduler without torch reads it"
    assert receipt["image_seeds"] == [image_seed(5, index) for index in range(1, 5)]
    assert receipt["scheduler"] == "EulerDiscreteScheduler"
    assert len(str(receipt["weights_sha256"])) == 64
    assert receipt["scheduler_config"]["prediction_type"] == "v_prediction"
    assert (receipt["torch"], receipt["recipe"]) == (torch.__version__, RECIPE)


def test_a_model_that_is_not_there_is_missing(cache_dir: Path) -> None:
    elsewhere = replace(stand_in_models().default, name="elsewhere", source=str(cache_dir / "none"))
    engine = an_engine(cache_dir, models_of(elsewhere))
    for name in ("elsewhere", "never-heard-of"):
        with pytest.raises(EngineFailure, match="MODEL_MISSING"):
            engine.load(name, RenderKind.IMAGINE)
    assert engine.warm_models() == ()


@pytest.mark.parametrize("scheduler", ["NoSuchScheduler", "EDMDPMSolverMultistepScheduler"])
def test_a_model_with_a_scheduler_it_cannot_use_is_unusable(cache_dir: Path, scheduler: str) -> None:
    entry = replace(stand_in_models().default, scheduler=scheduler)
    with pytest.raises(EngineFailure, match="MODEL_UNUSABLE"):
        an_engine(cache_dir, models_of(entry)).load("stand-in", RenderKind.IMAGINE)


def test_the_model_loaded_longest_ago_makes_room(cache_dir: Path) -> None:
    first = stand_in_models().default
    models = models_of(first, replace(first, name="second"))
    room_for_one = first.memory_needed(first.default_width, first.default_height)
    engine = an_engine(cache_dir, models, memory_bytes=room_for_one)
    engine.load("stand-in", RenderKind.IMAGINE)
    engine.load("second", RenderKind.IMAGINE)
    assert engine.warm_models() == ("second",)


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        # One cannot begin in the middle of its table, the other not with a table that it is given.
        ("sd3", "DPMSolverMultistepScheduler"),
        ("flux", "FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_a_scheduler_that_its_pipelines_cannot_use_makes_a_model_unusable_when_it_is_loaded(
    tmp_path: Path, family: str, scheduler: str
) -> None:
    entry = tiny_entry(family, tmp_path / family, scheduler)
    with pytest.raises(EngineFailure, match=f"MODEL_UNUSABLE.*{scheduler} does not fit it"):
        an_engine(tmp_path, models_of(entry)).load(entry.name, RenderKind.IMAGINE)


class ForgetfulScheduler(diffusers.EulerDiscreteScheduler):
    """Draws noise in each step, and not from the generator that it is given."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().step(*args, **kwargs)
        output.prev_sample += torch.randn_like(output.prev_sample) / 100
        return output


class PartlessScheduler(diffusers.EulerDiscreteScheduler):
    """Misses something that it looks up."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("sigma_data")


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (ForgetfulScheduler, "it draws other bits"),
        (PartlessScheduler, "does not fit it: KeyError: 'sigma_data'"),
    ],
)
def test_a_scheduler_that_would_not_keep_what_is_promised_makes_a_model_unusable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: type, said: str
) -> None:
    monkeypatch.setattr(diffusers, scheduler.__name__, scheduler, raising=False)
    entry = tiny_entry("sd", tmp_path / "sd", scheduler.__name__)
    with pytest.raises(EngineFailure, match=f"MODEL_UNUSABLE.*{said}"):
        an_engine(tmp_path, models_of(entry)).load(entry.name, RenderKind.IMAGINE)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model_index.json": "{"}, "names no pipeline"),
        ({"model_index.json": "{}"}, "names no pipeline: KeyError"),
        ({"model_index.json": "[]"}, "names no pipeline"),
        ({"model_index.json": '{"_class_name": "UNet2DModel"}'}, "no pipeline UNet2DModel"),
        ({"unet/diffusion_pytorch_model.safetensors": "cut short"}, "its files cannot be read: "),
        ({"unet/config.json": "{}"}, "cannot be read"),
    ],
)
def test_a_model_whose_files_are_broken_is_unusable_and_says_what_of(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    entry = tiny_entry("sd", tmp_path / "sd")
    for name, content in files.items():
        (tmp_path / "sd" / name).write_text(content)
    with pytest.raises(EngineFailure, match=f"MODEL_UNUSABLE.*{said}"):
        an_engine(tmp_path, models_of(entry)).load(entry.name, RenderKind.IMAGINE)


def test_noise_that_a_pipeline_passes_no_generator_for_is_each_pictures_own(tmp_path: Path) -> None:
    entry = tiny_entry("sd3", tmp_path / "sd3")
    config = tmp_path / "sd3" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"stochastic_sampling": True}))
    engine = an_engine(tmp_path, models_of(entry))
    engine.load(entry.name, RenderKind.IMAGINE)
    spec = a_small_spec(model=entry.name, width=64, height=64, images=2)
    grid = drawn(engine, spec)
    assert drawn(engine, spec) == grid
    # Up to what batching does to floats.
    alone = latents(drawn(engine, replace(spec, images=1)))
    assert torch.allclose(alone[0], latents(grid)[0], atol=1e-2)


@pytest.mark.parametrize("content", [b"", b"\x40" + bytes(7) + b'{"__meta', None])
def test_a_checkpoint_that_cannot_be_read_costs_its_steps(
    engine: DiffusersEngine, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    control = Control()
    undisturbed = drawn(engine, a_small_spec(), control=control)
    cut_short = control.cuts[2]()[:-1] if content is None else content
    # It fails where it is told that anything was put back.
    again = engine.render(a_small_spec(), Inputs(), Control(), engine.stage_clock(), cut_short)
    assert again == undisturbed
    assert "checkpoint cannot be read" in caplog.text


class Restoring(Control):
    """May go on from a checkpoint."""

    def restored(self) -> None:
        """It did."""


def test_nothing_of_a_run_that_ended_stays_until_the_collector_comes_by(engine: DiffusersEngine) -> None:
    source = SourceImage(job_id="a", index=1, latents_path="", strength_permille=500)
    parts = (TextPart(text="a fox", share_ppm=600_000), TextPart(text="snow", share_ppm=-400_000))
    grid = a_small_spec(images=1, steps=3)
    control = Control()
    made = drawn(engine, grid, control=control)
    checkpoint = control.cuts[1]()

    def stopped() -> None:
        with pytest.raises(RunStopped):
            drawn(engine, grid, control=Control(stop_at=2))

    runs: list[Callable[[], object]] = [
        lambda: drawn(engine, grid, control=Control(watched=True)),
        lambda: drawn(engine, replace(grid, parts=parts, video=True)),
        lambda: drawn(engine, replace(grid, stop_percent=50)),
        lambda: drawn(engine, replace(grid, kind=RenderKind.VARIATION, source=source), source=made.latents),
        lambda: engine.render(grid, Inputs(), Restoring(), engine.stage_clock(), checkpoint),
        stopped,
    ]
    for number, run in enumerate(runs):
        run()
        gc.collect()
        gc.disable()
        try:
            before = tensors()
            run()
            assert tensors() == before, f"of run {number}"
        finally:
            gc.enable()


def tensors() -> int:
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


async def test_the_upscalers_load_is_a_load_and_all_uses_are_the_wall_time(
    make_worker: Callable[..., Worker], cache_dir: Path, artifacts: Artifacts
) -> None:
    artifacts.put("jobs/a/1.png", png(1, 256, 256))
    source = SourceImage(
        job_id="a", index=1, latents_path="", strength_permille=0, picture_path="jobs/a/1.png"
    )
    began_s = time.monotonic()
    worker = make_worker(an_engine(cache_dir))
    made_s = time.monotonic()
    report = worker.report(1)
    loads = []
    for kind in (RenderKind.IMAGINE, RenderKind.UPSCALE_LIGHT, RenderKind.UPSCALE_LIGHT):
        upscale = {"kind": kind, "source": source, "images": 1, "width": 512, "height": 512}
        worker.render(a_request(spec=upscale if kind.is_upscale else {"steps": 2}))
        while not report.unacknowledged:
            report = (await worker.heartbeat(1, 60_000)).report
        (result,) = report.unacknowledged
        assert result.outcome is Outcome.SUCCEEDED, result.failure_sentence
        loads.append(result.load_ms)
        worker.acknowledge(1, result.attempt_id)
        report = worker.report(1)
    uses_that_are_the_wall_time(worker, began_s=began_s, made_s=made_s)
    assert [load_ms > 0 for load_ms in loads] == [True, True, False]


async def test_a_workers_account_closes_and_its_stages_are_all_of_a_run(
    make_worker: Callable[..., Worker], engine: DiffusersEngine, cache_dir: Path
) -> None:
    cold = an_engine(cache_dir)
    began_s = time.monotonic()
    worker = make_worker(cold)
    made_s = time.monotonic()
    report = worker.report(1)
    for tier in ("fast", "relax"):
        worker.render(a_request(tier=tier, spec={"width": 256, "height": 256, "steps": 8}))
        while not report.unacknowledged:
            report = (await worker.heartbeat(1, 60_000)).report
        (result,) = report.unacknowledged
        assert result.outcome is Outcome.SUCCEEDED, result.failure_sentence
        assert (result.load_ms > 0) == (tier == "fast")
        assert min(result.times.encode_ms, result.times.denoise_ms, result.times.decode_ms) > 0
        assert result.times != StageTimes()
        worker.acknowledge(1, result.attempt_id)
        report = worker.report(1)
    uses = uses_that_are_the_wall_time(worker, began_s=began_s, made_s=made_s)
    assert min(uses.fast_ms, uses.relax_ms, uses.load_ms) > 0
    assert uses.idle_ms < 0.2 * sum(vars(uses).values())


def test_two_workers_that_start_together_build_one_stand_in_and_print_nothing(tmp_path: Path) -> None:
    program = f"""
        from pathlib import Path
        from gpu_worker.engine.loading import loaded_model
        from tests.stand_in import stand_in_models
        import torch
        torch.set_num_threads(1)
        model = loaded_model(stand_in_models().default, torch.device("cpu"), Path({str(tmp_path)!r}))
        print(model.weights_sha256)
    """
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == b""
    assert [path.name for path in tmp_path.iterdir()] == ["stand-in-2"]


def test_a_prompt_that_is_longer_than_a_model_reads_is_printed_nowhere_whatever_the_environment_says(
    tmp_path: Path,
) -> None:
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import gpu_worker.engine.diffusers_engine  # before others import what it quietens, as workers do
        from pathlib import Path
        from test_engine import a_small_spec, an_engine, drawn
        from gpu_worker.contract import RenderKind
        engine = an_engine(Path({str(tmp_path)!r}))
        engine.load("stand-in", RenderKind.IMAGINE)
        drawn(engine, a_small_spec(prompt="zqxjkvbp of a fox, " * 11, steps=1))
    """
    loud = {"DIFFUSERS_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug"}
    drawing = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | loud,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert drawing.returncode == 0, drawing.stderr
    assert "zqxjkvbp" not in drawing.stdout + drawing.stderr
