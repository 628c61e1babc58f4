"""Prompts of several parts: each counts as much as its share says, and pictures leave other runs alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from tiny_models import models_of, png, tiny_entry
from worker_builders import a_spec, some_settings

from gpu_worker.contract import WHOLE_PPM, PicturePart, RenderKind, RenderSpec, TextPart
from gpu_worker.engine.adapters import AdapterUnusable, loaded_adapter
from gpu_worker.engine.denoiser import DenoiserStandIn, denoiser_of, put_denoiser
from gpu_worker.engine.diffusers_engine import DiffusersEngine
from gpu_worker.engine.loading import LoadedModel
from gpu_worker.engine.parts import joining, prompt_arguments
from gpu_worker.run import CutState, EngineFailure, Inputs, Preview, Rendering
from tests.stand_in import stand_in_models

pytestmark = [
    pytest.mark.engine,
    # diffusers hands torch tensors to numpy in a way that numpy 2 will no longer take.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

_FAMILIES = ["sd", "sdxl", "sd3", "flux"]
_GUIDED = _FAMILIES[:3]
_SHOWN = _FAMILIES[:2]


class Control:
    """Lets another run have the device at each step."""

    def __init__(self, other: Callable[[], object] = object) -> None:
        self.checks = 0
        self._other = other

    def check(self, *, last: bool = False) -> None:
        self.checks += 1

    def restored(self) -> None:
        raise AssertionError("nothing was given to go on from")

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        self._other()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> DiffusersEngine:
    folder = tmp_path_factory.mktemp("models")
    entries = [tiny_entry(family, folder / family) for family in _FAMILIES]
    settings = some_settings(folder, engine="diffusers", cache_dir=folder, memory_bytes=10**12)
    engine = DiffusersEngine(models_of(*entries, stand_in_models().default), settings)
    for entry in entries:
        engine.load(entry.name, RenderKind.IMAGINE)
    return engine


def a_small_spec(
    model: str, texts: Sequence[tuple[str, float]] = (), pictures: Sequence[float] = (), **changes: Any
) -> RenderSpec:
    """Return a spec of texts and pictures, given with their shares."""
    parts = tuple(TextPart(text=text, share_ppm=round(share * WHOLE_PPM)) for text, share in texts)
    shown = tuple(PicturePart(path="", share_ppm=round(share * WHOLE_PPM)) for share in pictures)
    fixed = {"model": model, "images": 2, "steps": 3, "parts": parts, "pictures": shown}
    return a_spec(**{**fixed, **changes})


def drawn(
    engine: DiffusersEngine,
    spec: RenderSpec,
    *,
    pictures: Sequence[bytes] | None = None,
    control: Control | None = None,
) -> Rendering:
    shown = pictures if pictures is not None else [png(number) for number in range(len(spec.pictures))]
    return engine.render(spec, Inputs(pictures=tuple(shown)), control or Control(), engine.stage_clock())


def latents(rendering: Rendering) -> torch.Tensor:
    return safetensors.torch.load(rendering.latents)["latents"]


def distance(one: Rendering, other: Rendering) -> float:
    return float((latents(one) - latents(other)).square().mean().sqrt())


def model_of(engine: DiffusersEngine, name: str) -> LoadedModel:
    with engine._residency.held(name, LoadedModel) as model:
        return model


@pytest.mark.parametrize("family", _FAMILIES)
def test_one_text_of_all_the_weight_is_drawn_as_if_it_had_none(engine: DiffusersEngine, family: str) -> None:
    plain = a_small_spec(family, prompt="a fox")
    assert drawn(engine, a_small_spec(family, [("a fox", 1.0)], prompt="a fox")) == drawn(engine, plain)


@pytest.mark.parametrize("family", _FAMILIES)
def test_two_equal_texts_are_one_up_to_rounding(engine: DiffusersEngine, family: str) -> None:
    once = drawn(engine, a_small_spec(family, prompt="a fox"))
    twice = drawn(engine, a_small_spec(family, [("a fox", 0.3), ("a fox", 0.7)]))
    assert torch.allclose(latents(twice), latents(once), atol=1e-3)


@pytest.mark.parametrize("family", _FAMILIES)
def test_a_text_and_its_own_negative_cancel(engine: DiffusersEngine, family: str) -> None:
    nothing = drawn(engine, a_small_spec(family, [("a fox", 0.5), ("a fox", -0.5)]))
    other = drawn(engine, a_small_spec(family, [("zebra zoo", 0.5), ("zebra zoo", -0.5)]))
    assert torch.allclose(latents(nothing), latents(other), atol=1e-3)
    assert distance(nothing, drawn(engine, a_small_spec(family, prompt="a fox"))) > 1e-2


@pytest.mark.parametrize("family", _FAMILIES)
def test_a_share_draws_nearer_and_a_negative_one_further_away(engine: DiffusersEngine, family: str) -> None:
    fox, zebra = "a fox", "zebra zoo"
    target = drawn(engine, a_small_spec(family, prompt=zebra))
    distances = [
        distance(drawn(engine, a_small_spec(family, [(fox, 1 - abs(share)), (zebra, share)])), target)
        for share in (0.75, 0.5, 0.25, -0.25)
    ]
    assert distances == sorted(distances)


class Recording(DenoiserStandIn):
    """Keeps what it answered."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__(denoiser)
        self.answers: list[torch.Tensor] = []

    def _answer(self, args: Any, kwargs: Any) -> torch.Tensor:
        self.answers.append(self._asked(args, kwargs))
        return self.answers[-1]


def predicted(engine: DiffusersEngine, spec: RenderSpec, pictures: Sequence[bytes] = ()) -> torch.Tensor:
    """Return what a pipeline is told at its first step: without its prompt, and with it."""
    model = model_of(engine, spec.model)
    pipeline = copy.copy(model.text_to_image)
    pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    with torch.no_grad():
        prompt = prompt_arguments(
            joining(spec, pipeline), spec, pictures, pipeline=pipeline, adapter=model.adapter, check=object
        )
        recording = Recording(denoiser_of(pipeline))
        put_denoiser(pipeline, recording)
        pipeline(
            **prompt,
            width=64,
            height=64,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(spec.images)],
            output_type="latent",
        )
    return recording.answers[0]


@pytest.mark.parametrize("family", _GUIDED)
def test_a_pipeline_is_told_the_sum_over_the_parts_for_its_prompt(
    engine: DiffusersEngine, family: str
) -> None:
    texts = [("a fox", 0.5), ("zebra zoo", 0.3), ("snow", -0.2)]
    without, composed = predicted(engine, a_small_spec(family, texts)).chunk(2)
    expected = without.clone()
    for text, share in texts:
        plain_without, alone = predicted(engine, a_small_spec(family, prompt=text)).chunk(2)
        # Half as large a batch is summed in another order.
        assert torch.allclose(plain_without, without, atol=1e-5)
        expected += share * (alone - plain_without)
        assert not torch.allclose(alone, composed, atol=1e-3)
    assert torch.allclose(composed, expected, atol=1e-5)


@pytest.mark.parametrize("family", _SHOWN)
def test_a_picture_is_one_more_part_of_the_sum(engine: DiffusersEngine, family: str) -> None:
    mixed = a_small_spec(family, [("a fox", 0.5)], [-0.25, 0.25])
    without, composed = predicted(engine, mixed, [png(1), png(2)]).chunk(2)
    _, fox = predicted(engine, a_small_spec(family, prompt="a fox")).chunk(2)
    _, one = predicted(engine, a_small_spec(family, [], [1.0], prompt=""), [png(1)]).chunk(2)
    _, two = predicted(engine, a_small_spec(family, [], [1.0], prompt=""), [png(2)]).chunk(2)
    expected = without + 0.5 * (fox - without) - 0.25 * (one - without) + 0.25 * (two - without)
    assert torch.allclose(composed, expected, atol=1e-5)
    assert not torch.allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("family", _FAMILIES)
def test_the_receipt_says_how_parts_were_joined(engine: DiffusersEngine, family: str) -> None:
    receipt = drawn(engine, a_small_spec(family, [("a fox", 0.75), ("snow", -0.25)])).receipt
    assert receipt["parts"] == ("composed" if family in _GUIDED else "blended")
    assert receipt["texts"] == [
        {"text": "a fox", "share_ppm": 750_000},
        {"text": "snow", "share_ppm": -250_000},
    ]
    assert "parts" not in drawn(engine, a_small_spec(family)).receipt
    assert json.loads(json.dumps(receipt)) == receipt


@pytest.mark.parametrize("family", _GUIDED)
@pytest.mark.parametrize("guidance_milli", [0, 1000])
def test_without_guidance_texts_are_blended(
    engine: DiffusersEngine, family: str, guidance_milli: int
) -> None:
    texts = [("a fox", 0.6), ("snow", 0.4)]
    rendering = drawn(engine, a_small_spec(family, texts, guidance_milli=guidance_milli))
    assert rendering.receipt["parts"] == "blended"
    alone = [
        drawn(engine, a_small_spec(family, prompt=text, guidance_milli=guidance_milli)) for text, _ in texts
    ]
    assert distance(rendering, alone[0]) < distance(alone[1], alone[0])


@pytest.mark.parametrize("guidance_milli", [1000, 5000])
@pytest.mark.parametrize("family", _SHOWN)
def test_a_picture_changes_what_is_drawn_as_much_as_its_share_says(
    engine: DiffusersEngine, family: str, guidance_milli: int
) -> None:
    def shown(share: float, number: int = 1) -> Rendering:
        texts = [("a fox", 1 - abs(share))]
        spec = a_small_spec(family, texts, [share], guidance_milli=guidance_milli)
        return drawn(engine, spec, pictures=[png(number)])

    nearly_nothing, little, much, other, against = (
        shown(0.000001),
        shown(0.2),
        shown(0.5),
        shown(0.5, number=2),
        shown(-0.2),
    )
    assert distance(little, nearly_nothing) < distance(much, nearly_nothing)
    assert distance(other, much) > 0.01
    assert distance(against, little) > distance(nearly_nothing, little)
    assert shown(0.5) == much


@pytest.mark.parametrize("family", _SHOWN)
def test_a_prompt_may_be_pictures_alone(engine: DiffusersEngine, family: str) -> None:
    one, both = a_small_spec(family, [], [1.0], prompt=""), a_small_spec(family, [], [0.5, 0.5], prompt="")
    first = drawn(engine, one, pictures=[png(1)])
    assert distance(drawn(engine, one, pictures=[png(2)]), first) > 0.01
    # The same picture twice is that picture.
    assert distance(drawn(engine, both, pictures=[png(1), png(1)]), first) < 1e-4


@pytest.mark.parametrize("family", _SHOWN)
def test_a_picture_without_a_text_part_beside_it_leaves_the_rest_to_the_prompt(
    engine: DiffusersEngine, family: str
) -> None:
    named = a_small_spec(family, [("a fox", 0.75)], [0.25], prompt="a fox")
    assert drawn(engine, replace(named, parts=())).images == drawn(engine, named).images


@pytest.mark.parametrize("family", _SHOWN)
def test_runs_of_other_shares_and_runs_without_pictures_may_take_turns(
    engine: DiffusersEngine, family: str
) -> None:
    """Whatever of a run might live in the modules that runs share would show here."""
    specs = [
        a_small_spec(family, [("a fox", 0.75)], [0.25]),
        a_small_spec(family, [("a fox", 0.4)], [-0.6]),
        a_small_spec(family, prompt="a fox"),
    ]
    undisturbed = [drawn(engine, spec) for spec in specs]
    for spec, expected in zip(specs, undisturbed, strict=True):
        inner: list[Rendering] = []
        control = Control(partial(lambda seen: seen.extend(drawn(engine, other) for other in specs), inner))
        assert drawn(engine, spec, control=control) == expected
        assert inner == undisturbed * (len(inner) // len(specs))


@pytest.mark.parametrize("family", _SHOWN)
def test_a_picture_and_its_adapter_are_in_the_receipt(engine: DiffusersEngine, family: str) -> None:
    receipt = drawn(engine, a_small_spec(family, [("a fox", 0.5)], [0.25, 0.25])).receipt
    assert receipt["adapter_sha256"] == model_of(engine, family).adapter.sha256
    assert [picture["share_ppm"] for picture in receipt["pictures"]] == [250_000, 250_000]
    assert len({picture["sha256"] for picture in receipt["pictures"]}) == 2
    assert json.loads(json.dumps(receipt)) == receipt


def test_each_part_that_is_encoded_is_a_place_to_park(engine: DiffusersEngine) -> None:
    plain, parts = Control(), Control()
    drawn(engine, a_small_spec("sd"), control=plain)
    drawn(engine, a_small_spec("sd", [("a", 0.5), ("b", 0.25)], [0.25]), control=parts)
    assert parts.checks == plain.checks + 3


@pytest.mark.parametrize("family", _SHOWN)
def test_an_adapter_shares_the_weights_of_its_denoiser_and_changes_nothing_of_it(
    engine: DiffusersEngine, family: str
) -> None:
    model = model_of(engine, family)
    plain, adapted = model.text_to_image.unet, model.adapter.denoiser
    weights = dict(adapted.named_parameters())
    assert all(weights[name] is weight for name, weight in plain.named_parameters())
    assert plain.encoder_hid_proj is None
    assert plain.config.encoder_hid_dim_type is None
    assert not any("IPAdapter" in type(processor).__name__ for processor in plain.attn_processors.values())


def test_an_adapter_that_does_not_fit_makes_its_model_unusable(tmp_path: Path) -> None:
    sd, xl = tiny_entry("sd", tmp_path / "sd"), tiny_entry("sdxl", tmp_path / "sdxl")
    transformer = tiny_entry("sd3", tmp_path / "sd3")
    settings = some_settings(tmp_path, engine="diffusers", memory_bytes=10**12)
    for entry, said in (
        (replace(xl, ip_adapter=sd.ip_adapter), "does not fit"),
        (replace(transformer, ip_adapter=sd.ip_adapter), "U-Nets only"),
        (replace(sd, ip_adapter=str(tmp_path / "none")), "holds 0 safetensors files"),
        (replace(sd, ip_adapter=str(tmp_path / "sd" / "unet")), "is no IP-Adapter"),
    ):
        with pytest.raises(EngineFailure, match=f"MODEL_UNUSABLE.*{said}"):
            DiffusersEngine(models_of(entry), settings).load(entry.name, RenderKind.IMAGINE)


def test_a_family_that_cannot_weigh_parts_says_so_when_it_is_loaded(tmp_path: Path) -> None:
    without = tiny_entry("z-image", tmp_path / "z-image")
    settings = some_settings(tmp_path, engine="diffusers", cache_dir=tmp_path, memory_bytes=10**12)
    engine = DiffusersEngine(models_of(replace(without, weighted_parts=True)), settings)
    with pytest.raises(EngineFailure, match=r"MODEL_UNUSABLE.*ZImagePipeline.*weighted_parts = false"):
        engine.load(without.name, RenderKind.IMAGINE)
    engine = DiffusersEngine(models_of(without), settings)
    assert engine.load(without.name, RenderKind.IMAGINE)
    # One that was accepted before the entry said so.
    with pytest.raises(EngineFailure, match=r"MODEL_UNUSABLE.*cannot be weighed"):
        drawn(engine, a_small_spec(without.name, [("a fox", 0.5), ("snow", -0.5)]))


def test_an_adapter_is_read_from_its_file_as_from_its_folder(engine: DiffusersEngine) -> None:
    model = model_of(engine, "sd")
    folder = Path(model.entry.ip_adapter)
    unet = UNet2DConditionModel.from_pretrained(Path(model.entry.source) / "unet")
    by_file = loaded_adapter(folder / "ip_adapter.safetensors", unet)
    assert by_file.sha256 == model.adapter.sha256
    assert torch.equal(by_file.embeddings(png(1), 2), model.adapter.embeddings(png(1), 2))
    with pytest.raises(AdapterUnusable):
        loaded_adapter(folder / "image_encoder" / "model.safetensors", unet)


def test_the_stand_in_takes_pictures_and_shows_it(engine: DiffusersEngine) -> None:
    engine.load("stand-in", RenderKind.IMAGINE)
    spec = a_small_spec("stand-in", [("a castle", 0.75)], [0.25], steps=8, guidance_milli=3000)
    one, other = (drawn(engine, spec, pictures=[png(number)]) for number in (1, 2))

    def levels(rendering: Rendering) -> torch.Tensor:
        return torch.frombuffer(bytearray(rendering.images[0].pixels), dtype=torch.uint8).float()

    assert (levels(one) - levels(other)).square().mean().sqrt() > 5
