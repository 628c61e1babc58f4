"""Draws with stock diffusers pipelines, on a GPU or on the CPU.

The same request gives the same bits on the same device type with the same software, whoever watches, and
however often it was parked, or cut and continued elsewhere. Each run has its own scheduler and its own
shallow copy of the pipeline over shared weights, so that runs on several threads may wait for each other in
the middle; each picture has its own noise, drawn on the CPU, so that it is the same on every device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers

from gpu_worker.contract import RenderKind, RenderSpec
from gpu_worker.engine.checkpoint import RunState, SkippingDenoiser, WayBack
from gpu_worker.engine.device import (
    Leash,
    chosen_device,
    device_memory_bytes,
    device_type,
    stage_clock,
)
from gpu_worker.engine.latents import contact_sheet, decoded, pixels
from gpu_worker.engine.loading import LoadedModel, loaded_model
from gpu_worker.engine.step_boundary import Predict, with_boundary
from gpu_worker.image_seeds import image_seed
from gpu_worker.models import Models
from gpu_worker.run import (
    EngineFailure,
    RenderedImage,
    Rendering,
    RunControl,
    Snapshot,
    Stage,
    StageClock,
)
from gpu_worker.settings import WorkerSettings

_LATENTS = "latents"
# What pipelines call their denoiser, a U-Net or a transformer.
_DENOISERS = ("unet", "transformer")


class DiffusersEngine:
    """One device and the models in its memory."""

    def __init__(self, models: Models, settings: WorkerSettings) -> None:
        self._threads = settings.threads
        torch.set_num_threads(settings.threads)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self._models = models
        self._device = chosen_device(settings.device)
        self._device_type = device_type(self._device)
        self._memory_bytes = settings.memory_bytes or device_memory_bytes(self._device)
        self._cache_dir = settings.cache_dir
        self._loaded: dict[str, LoadedModel] = {}

    @property
    def device_type(self) -> str:
        return self._device_type

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def memory_used_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device)
        return sum(model.memory_bytes for model in tuple(self._loaded.values()))

    def warm_models(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def load(self, model: str) -> None:
        """Bring a model into memory; the ones loaded longest ago make room where it needs some."""
        if model in self._loaded:
            return
        entry = self._models.entries.get(model)
        if entry is None:
            raise EngineFailure(reason="MODEL_MISSING", sentence=f"This worker has no model {model}.")
        needed = entry.memory_needed(entry.default_width, entry.default_height)
        while self._loaded and self._models_bytes() + needed > self._memory_bytes:
            del self._loaded[next(iter(self._loaded))]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            torch.set_num_threads(self._threads)
            self._loaded[model] = loaded_model(entry, self._device, self._cache_dir)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(model) from error

    def stage_clock(self) -> StageClock:
        return stage_clock(self._device)

    def render(
        self,
        spec: RenderSpec,
        source_latents: bytes | None,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None = None,
    ) -> Rendering:
        # Both are settings of a thread, and each run has its own. The number of threads decides bits.
        torch.set_num_threads(self._threads)
        try:
            with torch.no_grad():
                return self._render(spec, source_latents, control, clock, checkpoint)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(spec.model) from error

    def _models_bytes(self) -> int:
        return sum(model.entry.memory_bytes for model in self._loaded.values())

    def _render(
        self,
        spec: RenderSpec,
        source_latents: bytes | None,
        control: RunControl,
        clock: StageClock,
        checkpoint: bytes | None,
    ) -> Rendering:
        model = self._loaded[spec.model]
        seeds = [image_seed(spec.seed, index) for index in range(1, spec.images + 1)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments: dict[str, Any] = {
            "prompt": spec.prompt,
            "num_inference_steps": spec.steps,
            "guidance_scale": spec.guidance_milli / 1000,
            "num_images_per_prompt": spec.images,
            "generator": generators,
            # Decoding is ours: one picture at a time, so that a run can be stopped between two.
            "output_type": "latent",
        }
        skipped = 0
        if spec.kind is RenderKind.VARIATION:
            assert spec.source is not None
            assert source_latents is not None
            shared = model.image_to_image
            strength = spec.source.strength_permille / 1000
            arguments["image"] = _source(source_latents, spec)
            arguments["strength"] = strength
            # As image-to-image pipelines do: steps before this one are left out.
            skipped = spec.steps - min(int(spec.steps * strength), spec.steps)
        else:
            shared = model.text_to_image
            arguments["width"], arguments["height"] = spec.width, spec.height

        pipeline = copy.copy(shared)
        receipt = self._receipt(spec, model, pipeline, seeds)
        state = RunState.read(checkpoint, receipt) if checkpoint is not None else None
        way = None
        if state is not None:
            way = WayBack(state, generators=generators, device=self._device, restored=control.restored)
            name = next(name for name in _DENOISERS if hasattr(pipeline, name))
            # Not by setattr, which would write the stand-in's class into the configuration.
            vars(pipeline)[name] = SkippingDenoiser(getattr(pipeline, name), way)
        listener = _Listener(
            control=control,
            clock=clock,
            skipped=skipped,
            leash=Leash(self._device),
            preview=lambda latents: contact_sheet(latents, model.latent_to_rgb),
            generators=generators,
            receipt=receipt,
            way=way,
        )
        pipeline.scheduler = with_boundary(shared.scheduler, listener)
        clock.enter(Stage.ENCODE)
        latents = pipeline(**arguments).images
        clock.enter(Stage.DECODE)
        images = []
        for row, seed in enumerate(seeds):
            control.check()
            picture = pixels(decoded(pipeline.vae, latents[row : row + 1]))[0]
            images.append(
                RenderedImage(
                    pixels=picture.numpy().tobytes(),
                    width=picture.shape[1],
                    height=picture.shape[0],
                    seed=seed,
                )
            )
        return Rendering(
            images=tuple(images),
            latents=safetensors.torch.save({_LATENTS: latents.cpu().contiguous()}),
            receipt=receipt,
        )

    def _receipt(
        self, spec: RenderSpec, model: LoadedModel, pipeline: Any, seeds: list[int]
    ) -> dict[str, object]:
        receipt: dict[str, object] = {
            "engine": "diffusers",
            "model": spec.model,
            "weights_sha256": model.weights_sha256,
            "pipeline": type(pipeline).__name__,
            "scheduler": type(pipeline.scheduler).__name__,
            "steps": spec.steps,
            "guidance_milli": spec.guidance_milli,
            "width": spec.width,
            "height": spec.height,
            "seed": spec.seed,
            "image_seeds": seeds,
            "dtype": model.dtype,
            "device": self._device_type,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        }
        if spec.source is not None:
            receipt["source_job"] = spec.source.job_id
            receipt["source_image"] = spec.source.index
            receipt["strength_permille"] = spec.source.strength_permille
        return receipt


class _Listener:
    """Passes the boundaries of one run on to the worker."""

    def __init__(
        self,
        *,
        control: RunControl,
        clock: StageClock,
        skipped: int,
        leash: Leash,
        preview: Callable[[torch.Tensor], bytes],
        generators: Sequence[torch.Generator],
        receipt: Mapping[str, object],
        way: WayBack | None,
    ) -> None:
        self._control = control
        self._clock = clock
        self._skipped = skipped
        self._leash = leash
        self._preview = preview
        self._generators = generators
        self._receipt = receipt
        self._way = way
        self._step = 0

    def denoising_begins(self) -> None:
        self._control.check()
        self._clock.enter(Stage.DENOISE)

    def skipped(self, scheduler: Any, sample: torch.Tensor) -> torch.Tensor | None:
        way = self._way
        if way is None or not way.under_way:
            return None
        self._step += 1
        return way.skip(scheduler, sample)

    def step_ended(self, scheduler: Any, latents: torch.Tensor, predict: Predict) -> None:
        self._leash.step()
        self._step += 1
        # A scheduler's own table, not the number asked for: second-order schedulers step more often.
        steps = len(scheduler.timesteps) - self._skipped * scheduler.order
        self._control.boundary(
            self._step,
            steps,
            preview=lambda: self._preview(predict()),
            snapshot=lambda: self._snapshot(scheduler, latents),
        )

    def _snapshot(self, scheduler: Any, latents: torch.Tensor) -> Snapshot:
        state = RunState.of(
            step=self._step, latents=latents, scheduler=scheduler, generators=self._generators
        )
        return lambda: state.content(self._receipt)


def _source(source_latents: bytes, spec: RenderSpec) -> torch.Tensor:
    """Return the latents that a variation starts from, once for each of its pictures."""
    assert spec.source is not None
    grid: torch.Tensor = safetensors.torch.load(source_latents)[_LATENTS]
    picture = grid[spec.source.index - 1 : spec.source.index]
    assert len(picture) == 1, f"the source has {len(grid)} pictures, not {spec.source.index}"
    return picture.repeat(spec.images, 1, 1, 1)


def _out_of_memory(model: str) -> EngineFailure:
    return EngineFailure(
        reason="OUT_OF_MEMORY",
        sentence=f"This worker has too little memory for a job of this size with {model}.",
    )
