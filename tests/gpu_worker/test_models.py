"""models.toml: what is read, what is refused, what is computed from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.contract import RenderKind
from gpu_worker.models import (
    MOST_UPSCALED_PIXELS,
    ModelEntry,
    ModelsFileWrong,
    UnknownModel,
    read_models,
    upscaled_size,
)
from tests.stand_in import stand_in_models

_UPSCALES = (RenderKind.UPSCALE_LIGHT, RenderKind.UPSCALE_DETAILED, RenderKind.UPSCALE_MAX)

_ENTRY = """
source = "./weights"
steps = 20
guidance_milli = 5000
default_width = 512
default_height = 512
memory_bytes = 1000
memory_bytes_per_pixel = 2
imagine_ms = 1000
variation_ms = 500
"""


def a_file(folder: Path, text: str) -> Path:
    path = folder / "models.toml"
    path.write_text(text)
    return path


def an_entry(folder: Path, more: str = "") -> ModelEntry:
    return read_models(a_file(folder, f'default = "mine"\n[models.mine]{_ENTRY}{more}')).default


def test_the_packaged_file_has_a_default_whose_weights_come_with_it() -> None:
    models = read_models(None)
    assert models.default.name == "emoji"
    assert models.get("") is models.default
    folder = models.default.folder
    assert folder is not None
    weights = list(folder.rglob("*.safetensors"))
    assert {weight.parent.name for weight in weights} >= {"unet", "vae", "text_encoder"}
    sizes = [each.stat().st_size for each in folder.rglob("*") if each.is_file()]
    assert sum(sizes) <= 30_000_000
    assert max(sizes) <= 16_000_000


def test_a_relative_folder_is_relative_to_the_file(tmp_path: Path) -> None:
    models = read_models(a_file(tmp_path, f'default = "mine"\n[models.mine]{_ENTRY}'))
    assert models.default.folder == tmp_path.resolve() / "weights"


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownModel, match="'sdxl'; there is emoji"):
        read_models(None).get("sdxl")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no \\[models.<name>\\] table"),
        ("default = ", "Invalid value"),
        (f'default = "other"\n[models.mine]{_ENTRY}', "default = 'other' is not one of its models: mine"),
        (f'default = "mine"\ncolour = 1\n[models.mine]{_ENTRY}', "unknown key 'colour'"),
        (f'default = "mine"\n[models.mine]{_ENTRY}\nstep = 3', "models.mine: unknown key 'step'"),
        (
            f'default = "mine"\n[models.mine]{_ENTRY}\nmax_side = 1000',
            "max_side = 1000 is not a multiple of 64",
        ),
        (f'default = "mine"\n[models.mine]{_ENTRY}\nmax_side = 448', "--w 512 cannot be drawn"),
        (f'default = "mine"\n[models.mine]{_ENTRY}\ndtype = "int8"', "dtype = 'int8' is none of"),
        (
            f'default = "mine"\n[models.mine]{_ENTRY}\nmax_side = true',
            "max_side = True is not a whole number",
        ),
        (f'default = "mine"\n[models.mine]{_ENTRY}\nvariation_strength_permille = 49', "without a step"),
        (f'default = "mine"\n[models.mine]{_ENTRY}\nvariation_strength_permille = 1001', "over 1000"),
        ('default = "mine"\n[models.mine]\nsource = "builtin:sdxl"', "steps is missing"),
        (f'default = "mine"\n[models.mine]{_ENTRY.replace("./weights", "builtin:sdxl")}', "is not built in"),
        (f'default = "mine"\n[models.mine]{_ENTRY.replace("20", "0")}', "steps = 0 is too small"),
        (f'default = "mine"\n[models.mine]{_ENTRY}\nvariation_strong_permille = 1001', "over 1000"),
        (
            f'default = "mine"\n[models.mine]{_ENTRY}\nvariation_strong_permille = 500',
            "variation_strong_permille = 500 is less than variation_strength_permille = 600",
        ),
        (
            f'default = "mine"\n[models.mine]{_ENTRY}\nscheduler = "DPMSolverSDEScheduler"',
            "'DPMSolverSDEScheduler' keeps a live Brownian tree, so that its runs cannot be checkpointed",
        ),
        (
            f'default = "mine"\n[models.mine]{_ENTRY}\nip_adapter = "builtin:plus"',
            "ip_adapter = 'builtin:plus' is not built in",
        ),
        (
            f'default = "mine"\n[models.mine]{_ENTRY}\nip_adapter = "builtin:stand-in"',
            "ip_adapter = 'builtin:stand-in' fits the stand-in only",
        ),
        (
            f'default = "mine"\n[models.mine]{_ENTRY}\nweighted_parts = 0',
            "weighted_parts = 0 is not true or false",
        ),
        (
            f'default = "mine"\n[models.mine]{_ENTRY}\nip_adapter = "./a"\nweighted_parts = false',
            "weighted_parts = false leaves nothing to weigh pictures with",
        ),
        (f'default = "mine"\n[models.mine]{_ENTRY}\nrevision = "main"', "revision = 'main' is for hub ids"),
        (
            f'default = "mine"\n[models.mine]{_ENTRY.replace("./weights", "weights")}',
            "'weights' is no folder",
        ),
        (f'default = "mine"\n[models.mine]{_ENTRY.replace("./weights", "https://a/b")}', "is no folder"),
        ('default = "mine"\nmodels.mine = 3', "models.mine: it is not a table"),
        (f'default = "mine"\nupscaler = 3\n[models.mine]{_ENTRY}', "upscaler: it is not a table"),
        (
            f'default = "mine"\n[upscaler]\nsource = "builtin:waifu"\nsize = 2\n[models.mine]{_ENTRY}',
            "upscaler: unknown key 'size'; upscaler: source = 'builtin:waifu' is not built in",
        ),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ModelsFileWrong, match=problem):
        read_models(a_file(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelsFileWrong, match="no-such"):
        read_models(tmp_path / "no-such.toml")


def test_sizes_up_to_the_entrys_largest_side() -> None:
    entry = stand_in_models().default
    assert entry.size_violations(64, 960) == ()
    assert [parameter for parameter, _ in entry.size_violations(1024, 100)] == ["--w", "--h"]


def test_memory_grows_with_pixels(tmp_path: Path) -> None:
    entry = read_models(a_file(tmp_path, f'default = "mine"\n[models.mine]{_ENTRY}')).default
    assert entry.memory_needed(512, 512) == 1000 + 2 * 512 * 512


def test_the_predicted_cost_is_the_entrys_at_its_default_size_and_grows_faster_than_pixels(
    tmp_path: Path,
) -> None:
    entry = read_models(a_file(tmp_path, f'default = "mine"\n[models.mine]{_ENTRY}')).default
    assert entry.predicted_ms(RenderKind.IMAGINE, 512, 512) == 1000
    assert entry.predicted_ms(RenderKind.VARIATION, 512, 512) == 500
    assert entry.predicted_ms(RenderKind.IMAGINE, 1024, 512) == round(1000 * 2**1.6)
    assert entry.predicted_ms(RenderKind.IMAGINE, 64, 64) >= 1


def test_all_that_is_wrong_with_a_file_is_said_together(tmp_path: Path) -> None:
    text = f"""
default = "other"
colour = 1
[upscaler]
memory_bytes = -1
[models.mine]{_ENTRY.replace("steps = 20", "steps = 0")}
dtype = "int8"
max_side = 448
variation_strength_permille = 2000
[models.yours]
source = "builtin:sdxl"
"""
    with pytest.raises(ModelsFileWrong) as wrong:
        read_models(a_file(tmp_path, text))
    said = "; ".join(wrong.value.problems)
    for problem in (
        "unknown key 'colour'",
        "upscaler: memory_bytes = -1 is too small",
        "models.mine: steps = 0 is too small",
        "models.mine: dtype = 'int8' is none of",
        "models.mine: --w 512 cannot be drawn",
        "models.mine: variation_strength_permille = 2000 is over 1000",
        "models.yours: steps is missing",
        "models.yours: source = 'builtin:sdxl' is not built in",
        "default = 'other' is not one of its models: mine, yours",
    ):
        assert problem in said


def test_a_hub_id_keeps_its_revision_and_has_no_folder(tmp_path: Path) -> None:
    text = f'default = "mine"\n[models.mine]{_ENTRY.replace("./weights", "some-lab/sd.1-5")}\nrevision = "v2"'
    entry = read_models(a_file(tmp_path, text)).default
    assert (entry.source, entry.revision, entry.folder) == ("some-lab/sd.1-5", "v2", None)


def test_an_adapter_is_found_relative_to_the_file_and_opens_its_model_to_pictures(tmp_path: Path) -> None:
    text = f"""
default = "plain"
[models.plain]{_ENTRY}
[models.seeing]{_ENTRY}
ip_adapter = "adapters/plus"
"""
    models = read_models(a_file(tmp_path, text))
    assert models.entries["seeing"].ip_adapter == str(tmp_path.resolve() / "adapters" / "plus")
    assert not models.entries["plain"].takes_pictures
    assert models.taking_pictures() == ("seeing",)
    assert read_models(None).taking_pictures() == ("emoji",)


def test_the_upscaler_is_built_in_unless_the_file_names_another(tmp_path: Path) -> None:
    assert read_models(None).upscaler.source == "builtin:realesrgan-x4"
    text = f'default = "mine"\n[upscaler]\nsource = "net.pth"\nmemory_bytes = 7\n[models.mine]{_ENTRY}'
    upscaler = read_models(a_file(tmp_path, text)).upscaler
    assert (upscaler.source, upscaler.memory_bytes) == (str(tmp_path.resolve() / "net.pth"), 7)


@pytest.mark.parametrize(
    ("kind", "size", "upscaled"),
    [
        (RenderKind.UPSCALE_LIGHT, (256, 256), (1024, 1024)),
        (RenderKind.UPSCALE_DETAILED, (256, 384), (1024, 1536)),
        (RenderKind.UPSCALE_DETAILED, (512, 512), (1728, 1728)),
        (RenderKind.UPSCALE_MAX, (256, 256), (1728, 1728)),
        (RenderKind.UPSCALE_MAX, (64, 448), (648, 4576)),
    ],
)
def test_an_upscale_is_four_times_as_large_and_max_as_large_as_it_may_be(
    kind: RenderKind, size: tuple[int, int], upscaled: tuple[int, int]
) -> None:
    assert upscaled_size(kind, *size) == upscaled


@given(kind=st.sampled_from(_UPSCALES), width=st.integers(1, 64), height=st.integers(1, 64))
def test_no_upscale_exceeds_three_megapixels_and_each_keeps_its_shape(
    kind: RenderKind, width: int, height: int
) -> None:
    wide, high = upscaled_size(kind, width * 64, height * 64)
    assert 0 < wide * high <= MOST_UPSCALED_PIXELS
    assert wide % 8 == high % 8 == 0
    # Neither side is off by more than what rounding down to 8 takes away.
    exact = (wide + 8) * height, (high + 8) * width
    assert wide * height < exact[1]
    assert high * width < exact[0]
    detailed = upscaled_size(RenderKind.UPSCALE_DETAILED, width * 64, height * 64)
    assert wide * high >= detailed[0] * detailed[1]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1), (512, 512)),
        ((3, 2), (576, 384)),
        ((2, 3), (384, 576)),
        ((16, 9), (704, 384)),
        ((300, 200), (576, 384)),
        ((10, 1), (640, 64)),
    ],
)
def test_a_shape_is_drawn_at_the_size_nearest_to_the_default_area(
    tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    entry = an_entry(tmp_path)
    assert entry.size_of_aspect(*shape) == size
    assert entry.size_violations(*size) == ()


@given(across=st.integers(1, 4), down=st.integers(1, 4))
def test_every_ordinary_shape_can_be_drawn(across: int, down: int) -> None:
    entry = stand_in_models().default
    assert entry.aspect_violations(across, down) == ()
    assert entry.size_violations(*entry.size_of_aspect(across, down)) == ()
    assert entry.size_of_aspect(down, across) == entry.size_of_aspect(across, down)[::-1]


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((30, 1), "--ar 30:1 cannot be drawn: the nearest size that mine draws is 960 by 64."),
        ((0, 1), "--ar 0:1 cannot be drawn: both numbers must be at least 1."),
    ],
)
def test_an_extreme_shape_is_refused_and_not_bent(
    tmp_path: Path, shape: tuple[int, int], sentence: str
) -> None:
    assert an_entry(tmp_path).aspect_violations(*shape) == (("--ar", sentence),)


def test_the_predicted_cost_of_an_upscale_grows_with_the_pixels_of_its_result(tmp_path: Path) -> None:
    entry = an_entry(tmp_path, "\nupscale_ms = 2000")
    size = upscaled_size(RenderKind.UPSCALE_DETAILED, 512, 512)
    assert entry.predicted_ms(RenderKind.UPSCALE_DETAILED, *size) == 2000
    assert entry.predicted_ms(RenderKind.UPSCALE_MAX, *size) == 2000
    assert entry.predicted_ms(RenderKind.UPSCALE_DETAILED, size[0], size[1] // 2) == 1000
    assert entry.predicted_ms(RenderKind.UPSCALE_LIGHT, *size) == 200
    assert an_entry(tmp_path).predicted_ms(RenderKind.UPSCALE_DETAILED, *size) == 1000


def test_an_upscale_takes_the_memory_of_one_tile_the_whole_picture_and_the_upscaler(tmp_path: Path) -> None:
    text = f'default = "mine"\n[upscaler]\nmemory_bytes = 7\n[models.mine]{_ENTRY}'
    models = read_models(a_file(tmp_path, text))
    needed = models.memory_needed(RenderKind.UPSCALE_DETAILED, "mine", 1728, 1728)
    assert needed == 1000 + 2 * 512 * 512 // 4 + 64 * 1728 * 1728 + 7
    assert models.memory_needed(RenderKind.IMAGINE, "mine", 512, 512) == 1000 + 2 * 512 * 512
    with pytest.raises(UnknownModel):
        models.memory_needed(RenderKind.IMAGINE, "sdxl", 512, 512)
