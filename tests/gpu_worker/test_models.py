"""models.toml: what is read, what is refused, what is computed from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_worker.contract import RenderKind
from gpu_worker.models import ModelsFileWrong, UnknownModel, read_models

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


def test_the_packaged_file_has_a_default_that_says_it_is_a_stand_in() -> None:
    models = read_models(None)
    assert models.default.name == "stand-in"
    assert models.get("") is models.default
    assert models.default.folder is None
    assert models.default.max_side == 960


def test_a_relative_folder_is_relative_to_the_file(tmp_path: Path) -> None:
    models = read_models(a_file(tmp_path, f'default = "mine"\n[models.mine]{_ENTRY}'))
    assert models.default.folder == tmp_path.resolve() / "weights"


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownModel, match="'sdxl'; there is stand-in"):
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
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ModelsFileWrong, match=problem):
        read_models(a_file(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelsFileWrong, match="no-such"):
        read_models(tmp_path / "no-such.toml")


def test_sizes_up_to_the_entrys_largest_side() -> None:
    entry = read_models(None).default
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
