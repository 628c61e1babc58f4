"""What happens when memory runs out: the same bits, tiles that are told, or the job handed back.

Faults are raised where the engine says that it is about to take memory, as the device would raise them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from worker_builders import a_spec, some_settings

from gpu_worker.contract import Blame, RenderKind, RenderSpec
from gpu_worker.engine.diffusers_engine import DiffusersEngine
from gpu_worker.engine.memory_ladder import is_out_of_memory
from gpu_worker.models import Models
from gpu_worker.run import CutState, EngineFailure, Inputs, Preview, Rendering
from tests.stand_in import stand_in_models

pytestmark = [
    pytest.mark.engine,
    # diffusers hands torch tensors to numpy in a way that numpy 2 will no longer take.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

_SPEC = a_spec(width=128, height=128, steps=3)
_OUT = "CUDA out of memory. Tried to allocate 20.00 MiB."
_DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Faults:
    """Lets the next tries at a place fail, and counts all."""

    def __init__(self) -> None:
        self.left: Counter[str] = Counter()
        self.tries: Counter[str] = Counter()

    def __call__(self, place: str) -> None:
        self.tries[place] += 1
        if self.left[place] > 0:
            self.left[place] -= 1
            raise torch.OutOfMemoryError(_OUT)


class Watching:
    """A control that does something at one step, as a run parked there leaves the device to others."""

    def __init__(self, at: int = 0, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._at = at
        self._meanwhile = meanwhile

    def check(self, *, last: bool = False) -> None:
        pass

    def restored(self) -> None:
        raise AssertionError("nothing was given to go on from")

    def boundary(
        self, step: int, steps: int, preview: Callable[[], Preview], cut: Callable[[], CutState]
    ) -> None:
        if step == self._at:
            self._meanwhile()


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(cache_dir: Path) -> Rendering:
    engine, _ = an_engine(cache_dir)
    return drawn(engine)


def two_models() -> Models:
    first = stand_in_models().default
    return Models(default=first, entries={name: replace(first, name=name) for name in ("stand-in", "second")})


def an_engine(cache_dir: Path, **changes: Any) -> tuple[DiffusersEngine, Faults]:
    """Return an engine with its model loaded, and the faults that it will meet."""
    faults = Faults()
    settings = some_settings(cache_dir, engine="diffusers", cache_dir=cache_dir, **changes)
    engine = DiffusersEngine(two_models(), settings, faults)
    engine.load("stand-in", RenderKind.IMAGINE)
    faults.tries.clear()
    return engine, faults


def drawn(engine: DiffusersEngine, spec: RenderSpec = _SPEC, control: Watching | None = None) -> Rendering:
    return engine.render(spec, Inputs(), control or Watching(), engine.stage_clock())


@pytest.mark.parametrize("place", ["text_encoder", "unet", "vae.decoder"])
def test_freed_caches_are_enough_and_nobody_notices(
    cache_dir: Path, undisturbed: Rendering, place: str
) -> None:
    engine, faults = an_engine(cache_dir)
    faults.left[place] = 1
    assert drawn(engine) == undisturbed
    assert faults.left[place] == 0


def test_a_load_is_tried_again(cache_dir: Path, undisturbed: Rendering) -> None:
    engine, faults = an_engine(cache_dir)
    faults.left["load"] = 1
    engine.load("second", RenderKind.IMAGINE)
    assert faults.tries["load"] == 2
    assert drawn(engine, replace(_SPEC, model="second")).images == undisturbed.images


def test_a_cold_model_makes_room_in_the_middle_of_a_run(cache_dir: Path, undisturbed: Rendering) -> None:
    engine, faults = an_engine(cache_dir)
    engine.load("second", RenderKind.IMAGINE)
    engine.load("stand-in", RenderKind.IMAGINE)
    faults.left["unet"] = 2
    assert drawn(engine) == undisturbed
    assert engine.warm_models() == ("stand-in",)


def test_a_decode_that_does_not_fit_is_done_in_tiles_and_says_so(cache_dir: Path) -> None:
    engine, faults = an_engine(cache_dir)
    spec = a_spec(width=512, height=64, steps=1, images=2)
    whole = drawn(engine, spec)
    # Both tries of the first picture; its tiles and the other picture fit.
    faults.left["vae.decoder"] = 2
    rendering = drawn(engine, spec)
    assert rendering.receipt == {**whole.receipt, "tiles_for_memory": {"1": 32}}
    assert rendering.latents == whole.latents
    assert rendering.images[1] == whole.images[1]
    assert rendering.images[0].pixels != whole.images[0].pixels
    assert len(rendering.images[0].pixels) == 512 * 64 * 3
    assert drawn(engine, spec) == whole, "tiles are one decode's, not the model's"


def test_tiles_so_small_that_they_would_show_are_not_drawn(cache_dir: Path) -> None:
    engine, faults = an_engine(cache_dir)
    faults.left["vae.decoder"] = 2
    with pytest.raises(EngineFailure, match="OUT_OF_MEMORY"):
        drawn(engine)
    assert faults.tries["vae.decoder"] == 2


def test_what_no_rung_helps_is_handed_back_and_the_next_run_is_drawn(
    cache_dir: Path, undisturbed: Rendering
) -> None:
    engine, faults = an_engine(cache_dir)
    faults.left["unet"] = 1000
    with pytest.raises(EngineFailure, match="OUT_OF_MEMORY: This worker has too little memory") as failure:
        drawn(engine)
    assert failure.value.blame is Blame.PLATFORM
    assert engine.warm_models() == ("stand-in",)
    faults.left.clear()
    assert drawn(engine) == undisturbed


def test_a_load_that_never_fits_is_handed_back(cache_dir: Path, undisturbed: Rendering) -> None:
    engine, faults = an_engine(cache_dir)
    faults.left["load"] = 1000
    with pytest.raises(EngineFailure, match="with second"):
        engine.load("second", RenderKind.IMAGINE)
    faults.left.clear()
    engine.load("stand-in", RenderKind.IMAGINE)
    assert drawn(engine) == undisturbed


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("fits", [True, False])
def test_a_parked_run_never_fails_for_the_one_that_has_the_device(
    cache_dir: Path, device: str, fits: bool
) -> None:
    entry = stand_in_models().default
    room_for_one = entry.memory_needed(entry.default_width, entry.default_height)
    engine, faults = an_engine(cache_dir, device=device, memory_bytes=room_for_one)
    expected = drawn(engine)
    met: list[str] = []

    def other_run() -> None:
        try:
            engine.load("second", RenderKind.IMAGINE)
            met.extend(engine.warm_models())
            faults.left["unet"] = 1 if fits else 1000
            drawn(engine, replace(_SPEC, model="second"))
        except EngineFailure as failure:
            met.append(failure.reason)
        faults.left.clear()
        engine.load("stand-in", RenderKind.IMAGINE)

    assert drawn(engine, control=Watching(2, other_run)) == expected
    # A CPU's weights are where the parked run's are too; a GPU's were moved away.
    warm = ["second"] if device == "cuda" else ["stand-in", "second"]
    assert met == (warm if fits else [*warm, "OUT_OF_MEMORY"])


def test_latents_that_were_drawn_short_of_memory_are_those_of_plenty(
    cache_dir: Path, undisturbed: Rendering
) -> None:
    engine, faults = an_engine(cache_dir)
    engine.load("second", RenderKind.IMAGINE)
    engine.load("stand-in", RenderKind.IMAGINE)
    faults.left.update({"text_encoder": 1, "unet": 1})
    one, other = (safetensors.torch.load(each.latents or b"") for each in (drawn(engine), undisturbed))
    assert torch.equal(one["latents"], other["latents"])


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError(_OUT), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_out_of_memory_is_known_in_other_words_too(error: RuntimeError, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it
