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
from gpu_worker.engine.memory_ladder import is_out_of_memory
from gpu_worker.engine.parts import PartsUnknown, try_weighing
from gpu_worker.engine.stand_in import IP_ADAPTER, stand_in_folder
from gpu_worker.engine.step_boundary import Predict, has_boundary, with_boundary
from gpu_worker.engine.weights import files_sha256
from gpu_worker.image_seeds import image_seed
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
    pipeline_class = _pipeline_class(entry, folder)
    left_out = {k: v for k, v in _LEFT_OUT.items() if k in inspect.signature(pipeline_class).parameters}
    try:
        pipeline = pipeline_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, **left_out
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Files are broken in more ways than their readers have errors for. No device has a part in it yet.
        raise _unusable(entry, f"its files cannot be read: {_said(error)}") from error
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
        latent_to_rgb = _warm(entry, pipeline, image_to_image)
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


def _pipeline_class(entry: ModelEntry, folder: Path) -> Any:
    """Return the class that a model's index names."""
    try:
        name = str(DiffusionPipeline.load_config(folder)["_class_name"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise _unusable(entry, f"its {_INDEX} names no pipeline: {_said(error)}") from error
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise _unusable(entry, f"diffusers has no pipeline {name}")
    return found


def _warm(entry: ModelEntry, text_to_image: Any, image_to_image: Any) -> torch.Tensor:
    """Draw a grid, and a variation of it twice: what cannot be drawn with is known here, and not by a job.

    Returns the short cut to colours. The first kernels of a shape are slow too: the fleet pays for them.
    """
    arguments: dict[str, Any] = {"num_inference_steps": _WARMING_STEPS, "output_type": "latent"}
    sizes = {"width": entry.default_width, "height": entry.default_height}
    takes = inspect.signature(image_to_image.__call__).parameters
    name = type(text_to_image.scheduler).__name__

    def drawn(shared: Any, images: int, **more: Any) -> tuple[torch.Tensor, Any]:
        pipeline = copy.copy(shared)
        generators = [torch.Generator().manual_seed(image_seed(0, i + 1)) for i in range(images)]
        pipeline.scheduler = with_boundary(shared.scheduler, _Nobody(), generators)
        answer = pipeline("", num_images_per_prompt=images, generator=generators, **arguments, **more)
        return answer.images, pipeline.scheduler

    try:
        latent_to_rgb = fitted_latent_to_rgb(text_to_image.vae)
        latents, scheduler = drawn(text_to_image, _GRID, **sizes)
        varying = {
            "image": unpacked(text_to_image, latents, entry.default_width, entry.default_height)[:1],
            "strength": 0.5,
            **{side: length for side, length in sizes.items() if side in takes},
        }
        # Noise that is not its run's own shows in the second. Of a grid, that would take eight times as long.
        one, other = (drawn(image_to_image, 1, **varying)[0] for _ in range(2))
        if entry.weighted_parts:
            try_weighing(text_to_image)
    except PartsUnknown as error:
        what_to_do = (
            "Say so with weighted_parts = false in its entry, and prompts that ask for it are refused"
        )
        raise _unusable(entry, f"{error.sentence} {what_to_do}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Pipelines find out in the middle what they miss in a scheduler, or say so before. Not what a device
        # raises when it fails, which is a RuntimeError: that is no model's fault, and asks for a check.
        raise _unusable(entry, f"{name} does not fit it: {_said(error)}") from error
    if not torch.equal(one.nan_to_num(), other.nan_to_num()):
        raise _unusable(entry, f"with {name} it draws other bits when it is asked for the same again")
    try:
        RunState.of(step=1, latents=latents, scheduler=scheduler, generators=())
    except NotCheckpointable as error:
        raise _unusable(entry, f"its runs cannot be cut: {error}") from error
    return latent_to_rgb


class _Nobody:
    """Listens to a run that is nobody's."""

    def denoising_begins(self) -> None:
        """Nothing is measured."""

    def skipped(self, scheduler: Any, sample: torch.Tensor) -> torch.Tensor | None:
        """Every step is taken."""
        return None

    def step_ended(self, scheduler: Any, latents: torch.Tensor, predict: Predict) -> None:
        """Predict once as a preview would."""
        predict()


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


def _said(error: Exception) -> str:
    # The text of a KeyError is but the key.
    return f"{type(error).__name__}: {error}"


def _unusable(entry: ModelEntry, why: str) -> EngineFailure:
    return EngineFailure(reason="MODEL_UNUSABLE", sentence=f"Model {entry.name} cannot be used: {why}.")
