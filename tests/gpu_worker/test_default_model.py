"""What the default model draws: golden pictures up to a distance, and that each wish in a prompt shows.

Golden pictures are small and compared by distance: kernels differ between machines, and with them the last
bits. `python tests/gpu_worker/test_default_model.py` draws them anew, for a new model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from worker_builders import a_spec, some_settings

from gpu_worker.contract import WHOLE_PPM, PicturePart, RenderKind, RenderSpec, SourceImage, TextPart
from gpu_worker.engine.diffusers_engine import DiffusersEngine
from gpu_worker.models import read_models
from gpu_worker.run import CutState, Inputs, Preview, Rendering

pytestmark = [
    pytest.mark.engine,
    # diffusers hands torch tensors to numpy in a way that numpy 2 will no longer take.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

_GOLDEN = Path(__file__).with_name("golden")
_GRID = _GOLDEN / "default_model.png"
_SHOWN = _GOLDEN / "a_red_apple.png"
"""Noto Emoji's, from the data that it was trained with (Apache-2.0), on white as a front door puts it."""
_PROMPTS = (
    "a red apple",
    "a cat",
    "a rocket on a black background",
    "a sunflower",
    "a soccer ball",
    "a penguin",
)
_SIDE, _SMALL = 128, 32


class Control:
    """Neither stops nor watches."""

    def check(self, *, last: bool = False) -> None:
        """Go on."""

    def restored(self) -> None:
        raise AssertionError("nothing was given to go on from")

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        """Go on."""


def an_engine(folder: Path) -> DiffusersEngine:
    settings = some_settings(folder, engine="diffusers", cache_dir=folder, memory_bytes=10**12)
    engine = DiffusersEngine(read_models(None), settings)
    for kind in (RenderKind.IMAGINE, RenderKind.UPSCALE_DETAILED):
        engine.load(read_models(None).default.name, kind)
    return engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> DiffusersEngine:
    return an_engine(tmp_path_factory.mktemp("cache"))


def a_wish(prompt: str, **changes: Any) -> RenderSpec:
    entry = read_models(None).default
    as_the_entry_says = {
        "model": entry.name,
        "prompt": prompt,
        "width": entry.default_width,
        "height": entry.default_height,
        "steps": entry.steps,
        "guidance_milli": entry.guidance_milli,
        "images": 1,
    }
    return a_spec(**{**as_the_entry_says, **changes})


def rendered(engine: DiffusersEngine, spec: RenderSpec, **inputs: Any) -> Rendering:
    return engine.render(spec, Inputs(**inputs), Control(), engine.stage_clock())


def picture(rendering: Rendering, index: int = 1) -> Image.Image:
    image = rendering.images[index - 1]
    return Image.frombytes("RGB", (image.width, image.height), image.pixels)


def small(image: Image.Image) -> Image.Image:
    return image.resize((_SMALL, _SMALL), Image.Resampling.BOX)


def distance(one: Image.Image, other: Image.Image) -> float:
    """Root mean square over all colours, of 255, of small copies."""
    levels = [
        torch.frombuffer(bytearray(small(each).tobytes()), dtype=torch.uint8).float() for each in (one, other)
    ]
    return float((levels[0] - levels[1]).square().mean().sqrt())


def golden() -> Mapping[str, Image.Image]:
    with Image.open(_GRID) as strip:
        return {
            prompt: strip.convert("RGB").crop((number * _SMALL, 0, (number + 1) * _SMALL, _SMALL))
            for number, prompt in enumerate(_PROMPTS)
        }


@pytest.mark.parametrize("prompt", _PROMPTS)
def test_a_prompt_with_a_seed_is_drawn_as_it_was(engine: DiffusersEngine, prompt: str) -> None:
    got = picture(rendered(engine, a_wish(prompt, seed=7)))
    distances = {each: distance(got, wanted) for each, wanted in golden().items()}
    assert distances[prompt] < 8
    assert min(distances[each] for each in _PROMPTS if each != prompt) > 24


def test_a_red_apple_is_red_and_a_blue_ground_is_blue(engine: DiffusersEngine) -> None:
    grid = rendered(engine, a_wish("a red apple on a blue background", images=4))
    for index in range(1, 5):
        whole = picture(grid, index)
        red, green, blue = whole.resize((8, 8), Image.Resampling.BOX).getpixel((4, 5))
        assert red > max(green, blue) + 60, f"picture {index} is ({red}, {green}, {blue}) in its middle"
        red, green, blue = whole.resize((8, 8), Image.Resampling.BOX).getpixel((0, 0))
        assert blue > red + 60, f"picture {index} is ({red}, {green}, {blue}) in its corner"


def test_another_seed_draws_another_picture_of_the_same_thing(engine: DiffusersEngine) -> None:
    one, other = (picture(rendered(engine, a_wish("a red apple", seed=seed))) for seed in (1, 2))
    cat = picture(rendered(engine, a_wish("a cat", seed=1)))
    assert 4 < distance(one, other) < distance(one, cat)


def test_a_part_with_a_negative_weight_is_drawn_away_from(engine: DiffusersEngine) -> None:
    hot_dog, food = "hot dog", "food"
    plain = picture(rendered(engine, a_wish(hot_dog)))
    parts = (
        TextPart(text=hot_dog, share_ppm=round(WHOLE_PPM * 2 / 3)),
        TextPart(text=food, share_ppm=-round(WHOLE_PPM / 3)),
    )
    assert distance(picture(rendered(engine, a_wish("", parts=parts))), plain) > 6


def test_a_picture_that_is_stopped_early_is_the_same_picture_less_worked_out(engine: DiffusersEngine) -> None:
    spec = a_wish("a red apple")
    finished, other = (picture(rendered(engine, each)) for each in (spec, replace(spec, prompt="a penguin")))
    early = picture(rendered(engine, replace(spec, stop_percent=60)))
    assert 2 < distance(early, finished) < 0.5 * distance(early, other)


def test_a_strong_variation_is_further_from_its_source_than_a_subtle_one(engine: DiffusersEngine) -> None:
    entry = read_models(None).default
    spec = a_wish("a red apple")
    source = rendered(engine, spec)

    def varied(strength_permille: int) -> float:
        one = SourceImage(job_id="a", index=1, latents_path="", strength_permille=strength_permille)
        again = replace(spec, kind=RenderKind.VARIATION, seed=99, source=one)
        return distance(picture(rendered(engine, again, source=source.latents)), picture(source))

    subtle, strong = varied(entry.variation_strength_permille), varied(entry.variation_strong_permille)
    assert 1 < subtle < strong
    cat = picture(rendered(engine, a_wish("a cat")))
    assert strong < distance(picture(source), cat)


def test_the_more_a_shown_picture_counts_the_more_of_its_colour_is_in_what_is_drawn(
    engine: DiffusersEngine,
) -> None:
    plain = a_wish("a blue fish")

    def redness(spec: RenderSpec, **inputs: Any) -> float:
        red, _, blue = (
            picture(rendered(engine, spec, **inputs)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        )
        return red - blue

    def with_red_apple(picture_ppm: int) -> float:
        text = TextPart(text="a blue fish", share_ppm=WHOLE_PPM - picture_ppm)
        shown = PicturePart(path="", share_ppm=picture_ppm)
        return redness(
            replace(plain, prompt="", parts=(text,), pictures=(shown,)), pictures=(_SHOWN.read_bytes(),)
        )

    seldom, half, often = (with_red_apple(WHOLE_PPM * quarters // 4) for quarters in (1, 2, 3))
    assert redness(plain) + 4 < seldom, (redness(plain), seldom)
    assert seldom + 10 < half, (seldom, half)
    assert half + 10 < often, (half, often)


def draw_golden() -> None:
    """Write the golden pictures of the model as it is."""
    with tempfile.TemporaryDirectory() as folder:
        engine = an_engine(Path(folder))
        strip = Image.new("RGB", (_SMALL * len(_PROMPTS), _SMALL))
        for number, prompt in enumerate(_PROMPTS):
            strip.paste(small(picture(rendered(engine, a_wish(prompt, seed=7)))), (number * _SMALL, 0))
        strip.save(_GRID)


if __name__ == "__main__":
    draw_golden()
