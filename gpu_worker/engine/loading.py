"""From an entry of models.toml to a model in memory, ready to draw."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, FluxPipeline

from gpu_worker.engine.adapters import AdapterUnusable, PictureAdapter, loaded_adapter
from gpu_worker.engine.checkpoint import NotCheckpointable, RunState
from gpu_worker.engine.denoiser import denoiser_of
from gpu_worker.engine.latents import fitted_latent_to_rgb, unpacked
from gpu_worker.engine.stand_in import IP_ADAPTER, stand_in_folder
from gpu_worker.engine.step_boundary import has_boundary
from gpu_worker.engine.weights import files_sha256
from gpu_worker.models import STAND_IN_SOURCE, ModelEntry
from gpu_worker.run import EngineFailure

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

_INDEX = "model_index.json"
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
    adapter: PictureAdapter | None
    """Where it takes pictures."""
    latent_to_rgb: torch.Tensor
    dtype: str
    weights_sha256: str
    memory_bytes: int
    """Of the weights, the adapter's included, as they lie on the device."""

    @property
    def modules(self) -> Mapping[str, torch.nn.Module]:
        """All that weights are in, and the two halves of the autoencoder, which are called for themselves."""
        found = dict(self.text_to_image.components)
        vae = self.text_to_image.vae
        found |= {"vae.encoder": vae.encoder, "vae.decoder": vae.decoder}
        if self.adapter is not None:
            found |= {
                "adapter.denoiser": self.adapter.denoiser,
                "adapter.image_encoder": self.adapter.image_encoder,
            }
        return {name: part for name, part in found.items() if isinstance(part, torch.nn.Module)}


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
    if hasattr(pipeline, "_pack_latents") and not isinstance(pipeline, FluxPipeline):
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
        _warm(entry, pipeline, image_to_image)
    adapter = None
    if entry.ip_adapter:
        built_in = entry.ip_adapter == STAND_IN_SOURCE
        place = stand_in_folder(cache_dir) / IP_ADAPTER if built_in else Path(entry.ip_adapter)
        try:
            adapter = loaded_adapter(place, denoiser_of(pipeline))
        except AdapterUnusable as error:
            raise _unusable(entry, str(error)) from error
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    weights_bytes = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    return LoadedModel(
        entry=entry,
        text_to_image=pipeline,
        image_to_image=image_to_image,
        adapter=adapter,
        latent_to_rgb=latent_to_rgb,
        dtype=str(dtype).removeprefix("torch."),
        weights_sha256=files_sha256(folder),
        memory_bytes=weights_bytes + (adapter.memory_bytes if adapter else 0),
    )


def to_be_had(entry: ModelEntry) -> bool:
    """Return whether a model's files are there, or can be asked for: what can be told without loading it."""
    if entry.source == STAND_IN_SOURCE:
        return True
    if entry.folder is not None:
        return (entry.folder / _INDEX).is_file()
    if not huggingface_hub.is_offline_mode():
        return True
    found = huggingface_hub.try_to_load_from_cache(entry.source, _INDEX, revision=entry.revision or None)
    return isinstance(found, str)


def _warm(entry: ModelEntry, text_to_image: Any, image_to_image: Any) -> None:
    """Draw a grid, and a variation of it: what cannot be drawn with is known here, and not by the first job.

    The first kernels of a shape are slow too: the fleet pays for them.
    """
    drawing, varying = copy.copy(text_to_image), copy.copy(image_to_image)
    arguments: dict[str, Any] = {"num_inference_steps": _WARMING_STEPS, "output_type": "latent"}
    sizes = {"width": entry.default_width, "height": entry.default_height}
    takes = inspect.signature(varying.__call__).parameters
    try:
        drawing.scheduler = copy.deepcopy(text_to_image.scheduler)
        latents = drawing("", num_images_per_prompt=_GRID, **arguments, **sizes).images
        varying.scheduler = copy.deepcopy(image_to_image.scheduler)
        varying(
            "",
            image=unpacked(drawing, latents, entry.default_width, entry.default_height)[:1],
            strength=0.5,
            **arguments,
            **{side: length for side, length in sizes.items() if side in takes},
        )
    except (AttributeError, TypeError, ValueError) as error:
        # Pipelines find out in the middle what they miss in a scheduler, or say so before.
        name = type(text_to_image.scheduler).__name__
        raise _unusable(entry, f"{name} does not fit it: {error}") from error
    try:
        RunState.of(step=1, latents=latents, scheduler=drawing.scheduler, generators=())
    except NotCheckpointable as error:
        raise _unusable(entry, f"its runs cannot be cut: {error}") from error


def _folder(entry: ModelEntry, cache_dir: Path) -> Path:
    if entry.source == STAND_IN_SOURCE:
        return stand_in_folder(cache_dir)
    folder = entry.folder or _hub_folder(entry)
    if not (folder / _INDEX).is_file():
        raise _missing(entry, f"its folder holds no {_INDEX} on this worker")
    return folder


def _hub_folder(entry: ModelEntry) -> Path:
    """Return the folder of a hub's model in the hub's cache, fetching what is not there.

    With HF_HUB_OFFLINE set, nothing is asked of anybody.
    """
    offline = huggingface_hub.is_offline_mode()
    revision = entry.revision or None
    try:
        folder = DiffusionPipeline.download(
            entry.source, revision=revision, use_safetensors=True, local_files_only=offline
        )
    except Exception as error:
        # The hub's client fails in its own ways, in its transport's, and in those of whoever reads the files.
        name = f"{entry.source} at {revision}" if revision else entry.source
        if not offline:
            raise _missing(entry, f"the hub gave no {name}: {error}") from error
        command = f"hf download {entry.source}" + (f" --revision {revision}" if revision else "")
        raise _missing(
            entry,
            f"{name} is not whole in this worker's cache, and HF_HUB_OFFLINE keeps it from being fetched; "
            f"run {command!r} on this machine where the hub can be reached",
        ) from error
    return Path(folder)


def _missing(entry: ModelEntry, why: str) -> EngineFailure:
    return EngineFailure(reason="MODEL_MISSING", sentence=f"Model {entry.name} is not to be had: {why}.")


def _unusable(entry: ModelEntry, why: str) -> EngineFailure:
    return EngineFailure(reason="MODEL_UNUSABLE", sentence=f"Model {entry.name} cannot be used: {why}.")
