"""Upscales: what each kind does to a picture, and that no park, cut or neighbour changes a bit of it."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny_models import png, tiny_entry
from worker_builders import a_spec

from gpu_worker.contract import PicturePart, RenderKind, RenderSpec, TextPart
from gpu_worker.engine.loading import LoadedModel, loaded_model
from gpu_worker.engine.super_resolution import SuperResolution, loaded_upscaler
from gpu_worker.engine.upscale import upscaled
from gpu_worker.run import CutState, Preview, Rendering, RunStopped, WallStageClock

pytestmark = [
    pytest.mark.engine,
    # diffusers hands torch tensors to numpy in a way that numpy 2 will no longer take.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

_CPU = torch.device("cpu")
_UPSCALER = "builtin:realesrgan-x4"
# With the strength of details, two denoising steps a tile.
_STEPS = 7
_RECEIPT = {"torch": torch.__version__, "seed": 7}


class Control:
    """Counts what it is asked, and does `at_each` there. Stops the run at the check of a given number."""

    def __init__(self, at_each: Callable[[], object] | None = None, *, stop_at: int | None = None) -> None:
        self.boundaries: list[tuple[int, int]] = []
        self.cuts: list[CutState] = []
        self.checks: list[int] = []
        """Of each check, how many tiles were done."""
        self.last_at: list[int] = []
        """Which checks, by number, were said to come before the last piece."""
        self.previews: list[bytes] = []
        self.restorations = 0
        self.offered: Callable[[], CutState] | None = None
        self._at_each = at_each
        self._stop_at = stop_at

    def check(self, *, last: bool = False) -> None:
        self.checks.append(len(self.boundaries))
        if last:
            self.last_at.append(len(self.checks))
        if len(self.checks) == self._stop_at:
            raise RunStopped
        if self._at_each is not None:
            self._at_each()

    def restored(self) -> None:
        self.restorations += 1

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        self.boundaries.append((step, steps))
        self.cuts.append(cut())
        self.previews.append(preview()())
        self.offered = cut
        if self._at_each is not None:
            self._at_each()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def upscaler() -> SuperResolution:
    return loaded_upscaler(_UPSCALER, _CPU)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return a_model(folder)


def a_model(
    folder: Path, family: str = "sd", scheduler: str = "EulerAncestralDiscreteScheduler"
) -> LoadedModel:
    return loaded_model(tiny_entry(family, folder / family, scheduler), _CPU, folder)


def a_detailed_spec(**changes: Any) -> RenderSpec:
    fixed = {"kind": RenderKind.UPSCALE_DETAILED, "width": 104, "height": 72, "images": 1, "steps": _STEPS}
    return a_spec(**{**fixed, **changes})


def drawn(
    model: LoadedModel,
    upscaler: SuperResolution,
    spec: RenderSpec | None = None,
    *,
    picture: bytes | None = None,
    control: Control | None = None,
    checkpoint: bytes | None = None,
    receipt: dict[str, object] | None = None,
    clock: WallStageClock | None = None,
) -> Rendering:
    # As engines do: the number decides bits.
    torch.set_num_threads(1)
    with torch.no_grad():
        return upscaled(
            spec or a_detailed_spec(),
            picture or a_picture(),
            model=model,
            upscaler=upscaler,
            device=_CPU,
            control=control or Control(),
            clock=clock or WallStageClock(),
            checkpoint=checkpoint,
            receipt=receipt or _RECEIPT,
        )


def a_picture(width: int = 264, height: int = 20) -> bytes:
    """Return a smooth picture's file: wide enough for two tiles of the network."""
    coarse = torch.rand((1, 3, 3, 5), generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    file = io.BytesIO()
    Image.fromarray((smooth.permute(1, 2, 0) * 255).to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


def pixels(rendering: Rendering) -> torch.Tensor:
    (image,) = rendering.images
    return torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8).view(image.height, image.width, 3)


def test_a_light_upscale_is_the_networks_picture_and_takes_a_step_for_each_of_its_tiles(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    spec = a_detailed_spec(kind=RenderKind.UPSCALE_LIGHT, width=1056, height=80)
    control, clock = Control(), WallStageClock()
    rendering = drawn(model, upscaler, spec, control=control, clock=clock)
    source = torch.from_numpy(np.array(Image.open(io.BytesIO(a_picture()))))
    expected = torch.zeros((80, 1056, 3), dtype=torch.uint8)
    with torch.no_grad():
        for tile in upscaler.tiles((264, 20), (1056, 80)):
            part = upscaler.enlarged(source, (1056, 80), tile)
            expected[tile.top : tile.bottom, tile.left : tile.right] = part
    assert torch.equal(pixels(rendering), expected)
    assert control.boundaries == [(1, 2), (2, 2)]
    assert rendering.latents is None
    assert rendering.receipt["upscaler"] == _UPSCALER
    times = clock.times()
    assert times.upscale_ms == times.gpu_ms > 0


def test_a_detailed_upscale_adds_what_the_prompt_says_and_keeps_the_colours(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    light = pixels(drawn(model, upscaler, a_detailed_spec(kind=RenderKind.UPSCALE_LIGHT)))
    control, clock = Control(), WallStageClock()
    one = pixels(drawn(model, upscaler, control=control, clock=clock))
    other = pixels(drawn(model, upscaler, a_detailed_spec(prompt="wild foxes dance")))
    assert (one.float() - light.float()).abs().mean() > 2
    assert (one.float() - other.float()).abs().mean() > 1
    # Its random decoder gives other colours to everything.
    assert (one.float().mean(dim=(0, 1)) - light.float().mean(dim=(0, 1))).abs().max() < 10
    # Two of the network, and two by two of the model.
    assert control.boundaries == [(step, 6) for step in range(1, 7)]
    times = clock.times()
    assert times.upscale_ms == times.gpu_ms


@pytest.mark.parametrize("kind", [RenderKind.UPSCALE_LIGHT, RenderKind.UPSCALE_DETAILED])
def test_the_last_piece_of_an_upscale_is_said_to_be_that(
    model: LoadedModel, upscaler: SuperResolution, kind: RenderKind
) -> None:
    control = Control()
    drawn(model, upscaler, a_detailed_spec(kind=kind), control=control)
    assert control.last_at == [len(control.checks)], "nothing is asked after it"
    tiles = len(control.boundaries)
    assert control.checks[-1] == tiles - 1


def test_tiles_are_drawn_from_noise_of_their_own_and_of_the_seed(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (120, 130, 140)).save(file, "PNG")
    spec = a_detailed_spec(width=128, height=128)
    first = pixels(drawn(model, upscaler, spec, picture=file.getvalue()))
    again = pixels(drawn(model, upscaler, spec, picture=file.getvalue()))
    other = pixels(
        drawn(model, upscaler, a_detailed_spec(width=128, height=128, seed=8), picture=file.getvalue())
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:56, :56], first[:56, 72:])


def test_no_seam_is_seen_where_tiles_meet(model: LoadedModel, upscaler: SuperResolution) -> None:
    spec = a_detailed_spec(width=232, height=64, steps=20)
    canvas = pixels(drawn(model, upscaler, spec, picture=a_picture(58, 16))).float()
    across = (canvas[:, 1:] - canvas[:, :-1]).abs().mean(dim=(0, 2))
    # Tiles of 64 begin each 56 pixels, and end 8 pixels after the next begins.
    meets = [at + by for at in (56, 112, 168) for by in (-1, 7)]
    usual = across.mean()
    for column in meets:
        assert across[column] < 2 * usual, f"{across[column]:.2f} at {column}, {usual:.2f} elsewhere"


@pytest.mark.parametrize("size", [(40, 24), (200, 40)])
def test_a_picture_smaller_than_a_tile_is_detailed_too(
    model: LoadedModel, upscaler: SuperResolution, size: tuple[int, int]
) -> None:
    spec = a_detailed_spec(width=size[0], height=size[1])
    (image,) = drawn(model, upscaler, spec, picture=a_picture(size[0] // 4, size[1] // 4)).images
    assert (image.width, image.height, len(image.pixels)) == (*size, 3 * size[0] * size[1])


def test_parts_of_the_prompt_count_for_what_they_weigh_and_pictures_are_left_out(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    fox = TextPart(text="a fox", share_ppm=400_000)
    snow = TextPart(text="snow", share_ppm=-200_000)
    shown = PicturePart(path="p.png", share_ppm=400_000)
    one = drawn(model, upscaler, a_detailed_spec(parts=(fox, snow)))
    other = drawn(model, upscaler, a_detailed_spec(parts=(fox,), pictures=(shown,)))
    alone = drawn(model, upscaler, a_detailed_spec(prompt="a fox"))
    assert not torch.equal(pixels(one), pixels(other))
    assert torch.equal(pixels(other), pixels(alone))


def test_a_model_of_few_steps_takes_one_a_tile(model: LoadedModel, upscaler: SuperResolution) -> None:
    rendering = drawn(model, upscaler, a_detailed_spec(steps=1))
    assert rendering.receipt["detail_steps"] == 4


def test_parking_anywhere_changes_no_bit(model: LoadedModel, upscaler: SuperResolution) -> None:
    undisturbed = drawn(model, upscaler)

    def another_run() -> None:
        # As in a worker: the other run has a thread of its own, and this one waits in its call.
        spec = a_detailed_spec(width=64, height=64, seed=1, prompt="a fox", steps=4)
        thread = threading.Thread(target=drawn, args=(model, upscaler, spec), kwargs={"picture": png(1)})
        thread.start()
        thread.join()

    control = Control(another_run)
    assert drawn(model, upscaler, control=control) == undisturbed
    # Before each tile, at the start of denoising, at each of two steps and before the decode.
    assert len(control.checks) == 2 + 4 * 5


def test_a_run_continued_after_any_tile_by_another_engine_draws_the_same_bits(
    model: LoadedModel, upscaler: SuperResolution, folder: Path
) -> None:
    control = Control()
    undisturbed = drawn(model, upscaler, control=control)
    fresh, fresh_upscaler = a_model(folder), loaded_upscaler(_UPSCALER, _CPU)
    assert len(control.cuts) == 6
    for done, cut in enumerate(control.cuts, start=1):
        going_on = Control()
        assert drawn(fresh, fresh_upscaler, control=going_on, checkpoint=cut()) == undisturbed
        assert going_on.restorations == 1
        # No tile is drawn again.
        assert going_on.boundaries == [(step, 6) for step in range(done + 1, 7)]
        # And it can be cut again.
        assert [later() for later in going_on.cuts] == [later() for later in control.cuts[done:]]


def test_a_run_that_passes_the_network_twice_can_be_cut_in_between(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    spec = a_detailed_spec(kind=RenderKind.UPSCALE_LIGHT, width=160, height=80)
    control = Control()
    undisturbed = drawn(model, upscaler, spec, picture=a_picture(16, 8), control=control)
    assert control.boundaries == [(1, 2), (2, 2)]
    for cut in control.cuts:
        assert drawn(model, upscaler, spec, picture=a_picture(16, 8), checkpoint=cut()) == undisturbed


def test_a_cut_within_a_tile_is_the_one_before_the_tile(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    within: list[tuple[int, bytes]] = []

    def cut() -> None:
        if control.offered is not None:
            within.append((len(control.boundaries), control.offered()()))

    control = Control(cut)
    drawn(model, upscaler, control=control)
    at_boundaries = [state() for state in control.cuts]
    assert len(within) > 3 * len(at_boundaries)
    assert all(content == at_boundaries[done - 1] for done, content in within)


def test_a_run_continued_in_another_process_draws_the_same_bits(
    model: LoadedModel, upscaler: SuperResolution, folder: Path, tmp_path: Path
) -> None:
    control = Control()
    undisturbed = drawn(model, upscaler, control=control)
    (tmp_path / "checkpoint").write_bytes(control.cuts[3]())
    program = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_upscale import _CPU, _UPSCALER, Control, a_model, drawn, loaded_upscaler
        control = Control()
        checkpoint = Path({str(tmp_path / "checkpoint")!r}).read_bytes()
        upscaler = loaded_upscaler(_UPSCALER, _CPU)
        rendering = drawn(a_model(Path({str(folder)!r})), upscaler, control=control, checkpoint=checkpoint)
        assert control.boundaries == [(5, 6), (6, 6)]
        Path({str(tmp_path / "pixels")!r}).write_bytes(rendering.images[0].pixels)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=100)
    assert (tmp_path / "pixels").read_bytes() == undisturbed.images[0].pixels


def test_a_checkpoint_of_other_software_is_not_used(model: LoadedModel, upscaler: SuperResolution) -> None:
    control, anew = Control(), Control()
    drawn(model, upscaler, control=control)
    drawn(model, upscaler, control=anew, checkpoint=control.cuts[2](), receipt={"torch": "1.0", "seed": 7})
    assert anew.restorations == 0
    assert anew.boundaries == control.boundaries


def test_other_weights_are_another_receipt_and_another_checkpoint(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    def weighed(*shares: int) -> RenderSpec:
        texts = zip(("a fox", "snow"), shares, strict=True)
        return a_detailed_spec(parts=tuple(TextPart(text=text, share_ppm=share) for text, share in texts))

    control, anew = Control(), Control()
    one = drawn(model, upscaler, weighed(600_000, -400_000), control=control)
    spec = weighed(400_000, 600_000)
    other = drawn(model, upscaler, spec, control=anew, checkpoint=control.cuts[2]())
    assert one.receipt["texts"] == [
        {"text": "a fox", "share_ppm": 600_000},
        {"text": "snow", "share_ppm": -400_000},
    ]
    assert other.receipt != one.receipt
    assert anew.restorations == 0
    assert other == drawn(model, upscaler, spec)


@pytest.mark.parametrize("length", [0, 20, -1])
def test_a_checkpoint_that_cannot_be_read_costs_its_tiles(
    model: LoadedModel, upscaler: SuperResolution, length: int
) -> None:
    control, anew = Control(), Control()
    undisturbed = drawn(model, upscaler, control=control)
    assert drawn(model, upscaler, control=anew, checkpoint=control.cuts[2]()[:length]) == undisturbed
    assert anew.restorations == 0


def test_nothing_of_a_run_that_ended_stays_until_the_collector_comes_by(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    def tensors() -> int:
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    drawn(model, upscaler)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        drawn(model, upscaler)
        assert tensors() == before
    finally:
        gc.enable()


def test_a_checkpoint_is_no_more_than_the_pictures_and_executes_nothing(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    control = Control()
    drawn(model, upscaler, control=control)
    content = control.cuts[-1]()
    assert len(content) < 3 * 104 * 72 + 2_000
    assert set(safetensors.torch.load(content)) == {"canvas"}


def test_a_run_can_be_stopped_within_a_tile_and_leaves_nothing_behind(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    undisturbed = drawn(model, upscaler)
    # Two of the network's tiles, then the third of five checks in the model's first.
    control = Control(stop_at=5)
    with pytest.raises(RunStopped):
        drawn(model, upscaler, control=control)
    assert control.checks == [0, 1, 2, 2, 2]
    assert drawn(model, upscaler) == undisturbed


def test_a_preview_shows_the_canvas_so_far(model: LoadedModel, upscaler: SuperResolution) -> None:
    control = Control()
    rendering = drawn(model, upscaler, control=control)
    with Image.open(io.BytesIO(control.previews[-1])) as preview:
        assert preview.tobytes() == rendering.images[0].pixels
    large = a_detailed_spec(kind=RenderKind.UPSCALE_LIGHT, width=1056, height=80)
    drawn(model, upscaler, large, control=control)
    with Image.open(io.BytesIO(control.previews[-1])) as preview:
        assert preview.size == (512, 39)


def test_the_receipt_says_what_else_is_needed_to_draw_it_again(
    model: LoadedModel, upscaler: SuperResolution
) -> None:
    receipt = drawn(model, upscaler).receipt
    assert {**receipt, **_RECEIPT} == receipt
    assert set(receipt) - set(_RECEIPT) == {
        "source_sha256",
        "upscaler",
        "upscaler_sha256",
        "pillow",
        "detail_strength_permille",
        "detail_steps",
        "detail_tile_width",
        "detail_tile_height",
    }


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux-dynamic"])
def test_other_families_draw_details_and_can_be_cut(
    folder: Path, upscaler: SuperResolution, family: str
) -> None:
    model, control = a_model(folder, family, ""), Control()
    rendering = drawn(model, upscaler, control=control)
    light = drawn(model, upscaler, a_detailed_spec(kind=RenderKind.UPSCALE_LIGHT))
    assert not torch.equal(pixels(rendering), pixels(light))
    assert drawn(model, upscaler, checkpoint=control.cuts[3]()) == rendering
