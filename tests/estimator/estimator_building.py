"""Models, shapes and observations, naming only what a test is about."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_worker.contract import RenderKind, RenderSpec, SourceImage
from gpu_worker.models import ModelEntry, Models
from scheduler.estimator import Learned, Observation, Shape, learned

ENTRY = ModelEntry(
    name="small",
    source="builtin:stand-in",
    steps=20,
    guidance_milli=5_000,
    default_width=512,
    default_height=512,
    memory_bytes=1,
    memory_bytes_per_pixel=1,
    imagine_ms=60_000,
    variation_ms=18_000,
    max_side=1024,
    variation_strength_permille=400,
)
MODELS = Models(default=ENTRY, entries={ENTRY.name: ENTRY})
GPU = "gpu-a"


def a_shape(
    width: int = 512, height: int = 512, steps: int = 20, kind: RenderKind = RenderKind.IMAGINE
) -> Shape:
    return Shape(kind=kind, model=ENTRY.name, width=width, height=height, steps=steps)


def a_spec(*, steps: int = 20, strength_permille: int | None = None) -> RenderSpec:
    """An imagine job; with a strength, a variation."""
    if strength_permille is None:
        kind, source = RenderKind.IMAGINE, None
    else:
        kind = RenderKind.VARIATION
        source = SourceImage(job_id="j", index=1, latents_path="l", strength_permille=strength_permille)
    return RenderSpec(
        kind=kind,
        model=ENTRY.name,
        prompt="a hare",
        width=512,
        height=512,
        steps=steps,
        guidance_milli=5_000,
        seed=1,
        source=source,
    )


def seen(shape: Shape, *, step_ms: float = 100, rest_ms: float = 500, device: str = GPU) -> Observation:
    return Observation(shape=shape, device=device, step_us=step_ms * 1000, rest_us=rest_ms * 1000)


def rows_of(observations: Iterable[Observation]) -> list[Learned]:
    """Return what is learned from these, in their order."""
    rows: dict[tuple[Shape, str], Learned] = {}
    for observation in observations:
        key = observation.shape, observation.device
        rows[key] = learned(rows.get(key), observation)
    return list(rows.values())
