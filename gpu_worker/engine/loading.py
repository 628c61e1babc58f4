"""From an entry of models.toml to a model in memory, ready to draw."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

from gpu_worker.engine.checkpoint import NotCheckpointable, RunState
from gpu_worker.engine.latents import fitted_latent_to_rgb
from gpu_worker.engine.stand_in import stand_in_folder
from gpu_worker.engine.step_boundary import has_boundary
from gpu_worker.models import STAND_IN_SOURCE, ModelEntry
from gpu_worker.run import EngineFailure

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

_GRID = 4
# PNDM makes its table of timesteps from no fewer.
_WARMING_STEPS = 4

# Checkers and watermarks change a picture after it was drawn. Moderation is the front door's.
_LEFT_OUT: Mapping[str, Any] = {
    "safety_checker": None,
    "requires_safety_checker": False,
    "add_watermarker": False,
}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in memory. Its pipelines share their weights and are copied for each run, never called."""

    entry: ModelEntry
    text_to_image: Any
    image_to_image: Any
    latent_to_rgb: torch.Tensor
    dtype: str
    weights_sha256: str
    memory_bytes: int
    """Of the weights, as they lie on the device."""


def loaded_model(entry: ModelEntry, device: torch.device, cache_dir: Path) -> LoadedModel:
    """Load a model onto the device.

    Raises EngineFailure with MODEL_MISSING where its files are not to be had, and with MODEL_UNUSABLE where
    they are of a kind that this engine cannot draw with.
    """
    folder = _folder(entry, cache_dir)
    # Halves are slow or missing on CPUs.
    dtype = getattr(torch, entry.dtype) if device.type == "cuda" else torch.float32
    pipeline_class = getattr(diffusers, str(DiffusionPipeline.load_config(folder)["_class_name"]), None)
    if pipeline_class is None:
        raise _unusable(entry, "diffusers has no such pipeline")
    left_out = {k: v for k, v in _LEFT_OUT.items() if k in inspect.signature(pipeline_class).parameters}
    try:
        pipeline = pipeline_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, **left_out
        )
    except (OSError, ValueError) as error:
        raise _unusable(entry, str(error)) from error
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    if entry.scheduler:
        scheduler_class = getattr(diffusers, entry.scheduler, None)
        if scheduler_class is None:
            raise _unusable(entry, f"diffusers has no scheduler {entry.scheduler}")
        try:
            pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
        except Exception as error:
            # Each scheduler checks the other's configuration in its own way, or not at all.
            raise _unusable(entry, f"{entry.scheduler} does not fit it: {error}") from error
    if not has_boundary(pipeline.scheduler):
        raise _unusable(entry, f"no previews can be made with {type(pipeline.scheduler).__name__}")
    if hasattr(pipeline, "_pack_latents"):
        raise _unusable(entry, f"{pipeline_class.__name__} packs its latents")
    try:
        image_to_image = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError as error:
        raise _unusable(entry, "it has no image-to-image form") from error
    image_to_image.set_progress_bar_config(disable=True)
    if dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
        # Its activations leave the range of float16; stock pipelines cast it back and forth in each run.
        pipeline.vae.to(torch.float32)
    with torch.no_grad():
        latent_to_rgb = fitted_latent_to_rgb(pipeline.vae)
        # The first kernels of a shape are slow: paid here, by the fleet, not by the first job.
        warmed = copy.copy(pipeline)
        warmed.scheduler = copy.deepcopy(pipeline.scheduler)
        latents = warmed(
            "",
            num_inference_steps=_WARMING_STEPS,
            num_images_per_prompt=_GRID,
            width=entry.default_width,
            height=entry.default_height,
            output_type="latent",
        ).images
    try:
        RunState.of(step=1, latents=latents, scheduler=warmed.scheduler, generators=())
    except NotCheckpointable as error:
        raise _unusable(entry, f"its runs cannot be cut: {error}") from error
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    return LoadedModel(
        entry=entry,
        text_to_image=pipeline,
        image_to_image=image_to_image,
        latent_to_rgb=latent_to_rgb,
        dtype=str(dtype).removeprefix("torch."),
        weights_sha256=_sha256(folder),
        memory_bytes=sum(p.numel() * p.element_size() for module in modules for p in module.parameters()),
    )


def _folder(entry: ModelEntry, cache_dir: Path) -> Path:
    if entry.source == STAND_IN_SOURCE:
        return stand_in_folder(cache_dir)
    folder = entry.folder
    if folder is None:
        try:
            folder = Path(
                DiffusionPipeline.download(
                    entry.source, revision=entry.revision or None, use_safetensors=True
                )
            )
        except (OSError, ValueError) as error:
            raise _missing(entry, f"the hub gave no {entry.source}: {error}") from error
    if not (folder / "model_index.json").is_file():
        raise _missing(entry, "its folder holds no model_index.json on this worker")
    return folder


def _sha256(folder: Path) -> str:
    """Return one hash over the names and contents of all files of a model."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return whole.hexdigest()


def _missing(entry: ModelEntry, why: str) -> EngineFailure:
    return EngineFailure(reason="MODEL_MISSING", sentence=f"Model {entry.name} is not to be had: {why}.")


def _unusable(entry: ModelEntry, why: str) -> EngineFailure:
    return EngineFailure(reason="MODEL_UNUSABLE", sentence=f"Model {entry.name} cannot be used: {why}.")
