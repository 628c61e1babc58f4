"""Draws a grid with a loaded model: one run, from its prompt to its pictures.

The run has its own scheduler and its own shallow copy of the pipeline over shared weights, so that runs on
several threads may wait for each other in the middle; whatever else it sets, it sets on copies of its own.
Each picture has its own noise, drawn on the CPU, so that it is the same on every device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch

from gpu_worker.contract import RenderKind, RenderSpec
from gpu_worker.engine.checkpoint import RunState, SkippingDenoiser, WayBack
from gpu_worker.engine.denoiser import denoiser_of, put_denoiser
from gpu_worker.engine.device import Leash
from gpu_worker.engine.film import FilmRoll
from gpu_worker.engine.latents import decoded, pixels, tiled, unpacked
from gpu_worker.engine.loading import LoadedModel
from gpu_worker.engine.memory_ladder import decoded_in_memory
from gpu_worker.engine.parts import joining, prompt_arguments
from gpu_worker.engine.receipts import parts_in_receipt, receipt_of
from gpu_worker.engine.run_listener import RunListener, StoppedEarly
from gpu_worker.engine.step_boundary import with_boundary
from gpu_worker.image_seeds import image_seed
from gpu_worker.run import (
    Inputs,
    RenderedImage,
    Rendering,
    RunControl,
    Stage,
    StageClock,
)

_LATENTS = "latents"
# Decoding takes memory with a picture's size, and above this more than denoising does. Tiles change bits.
_TILED_ABOVE_PIXELS = 1_250_000


def drawn(
    spec: RenderSpec,
    inputs: Inputs,
    *,
    model: LoadedModel,
    device: torch.device,
    device_type: str,
    control: RunControl,
    clock: StageClock,
    checkpoint: bytes | None,
) -> Rendering:
    """Return a grid: of a prompt, or of one that starts from a picture of another."""
    shared = model.image_to_image if spec.kind is RenderKind.VARIATION else model.text_to_image
    pipeline = copy.copy(shared)
    try:
        return _drawn(
            spec,
            inputs,
            model=model,
            shared=shared,
            pipeline=pipeline,
            device=device,
            device_type=device_type,
            control=control,
            clock=clock,
            checkpoint=checkpoint,
        )
    finally:
        # Its scheduler knows the listener, and that knows the pipeline. Such a circle would keep what the run
        # had on the device until Python's collector comes by, which knows nothing of a device that is full.
        vars(pipeline).clear()


def _drawn(
    spec: RenderSpec,
    inputs: Inputs,
    *,
    model: LoadedModel,
    shared: Any,
    pipeline: Any,
    device: torch.device,
    device_type: str,
    control: RunControl,
    clock: StageClock,
    checkpoint: bytes | None,
) -> Rendering:
    how = joining(spec, pipeline)
    vae_tiling = spec.width * spec.height > _TILED_ABOVE_PIXELS
    receipt = {
        **receipt_of(spec, inputs, model=model, pipeline=shared, device_type=device_type),
        **parts_in_receipt(spec, inputs, model, how),
        "vae_tiling": vae_tiling,
    }
    clock.enter(Stage.ENCODE)
    prompt = prompt_arguments(
        how, spec, inputs.pictures, pipeline=pipeline, adapter=model.adapter, check=control.check
    )
    seeds = [image_seed(spec.seed, index) for index in range(1, spec.images + 1)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    state = RunState.read(checkpoint, receipt) if checkpoint is not None else None
    way = None
    if state is not None:
        way = WayBack(state, generators=generators, device=device, restored=control.restored)
        put_denoiser(pipeline, SkippingDenoiser(denoiser_of(pipeline), way))
    film = FilmRoll(state.film if state is not None else ()) if spec.video else None
    listener = RunListener(
        control=control,
        clock=clock,
        leash=Leash(device),
        unpacked=lambda latents: unpacked(pipeline, latents, spec.width, spec.height),
        latent_to_rgb=model.latent_to_rgb,
        stop_percent=spec.stop_percent,
        film=film,
        generators=generators,
        receipt=receipt,
        way=way,
    )
    arguments = {
        **prompt,
        **_other_arguments(spec, inputs, pipeline),
        "generator": generators,
        # Decoding is ours: one picture at a time, so that a run can be stopped between two.
        "output_type": "latent",
    }
    if spec.kind is RenderKind.VARIATION:
        listener.count_steps_of(pipeline)
    pipeline.scheduler = with_boundary(shared.scheduler, listener, generators)
    try:
        answer = pipeline(**arguments).images
    except StoppedEarly as stopped:
        answer = stopped.latents
    latents = unpacked(pipeline, answer, spec.width, spec.height)
    clock.enter(Stage.DECODE)
    vae = tiled(pipeline.vae) if vae_tiling else pipeline.vae
    images, tiles_for_memory = _images(vae, latents, seeds, control)
    return Rendering(
        images=images,
        latents=safetensors.torch.save({_LATENTS: latents.cpu().contiguous()}),
        receipt=receipt | ({"tiles_for_memory": tiles_for_memory} if tiles_for_memory else {}),
        film=film.developed(images) if film is not None else None,
    )


def _other_arguments(spec: RenderSpec, inputs: Inputs, pipeline: Any) -> dict[str, Any]:
    """Return what a pipeline is called with beside its prompt."""
    arguments: dict[str, Any] = {
        "num_inference_steps": spec.steps,
        "guidance_scale": spec.guidance_milli / 1000,
    }
    if spec.source is not None:
        assert inputs.source is not None
        arguments["image"] = _source(inputs.source, spec)
        arguments["strength"] = spec.source.strength_permille / 1000
    # Of the image-to-image pipelines some take sizes, and have others in mind where they get none.
    takes = inspect.signature(pipeline.__call__).parameters
    sizes = {"width": spec.width, "height": spec.height}
    return arguments | {side: length for side, length in sizes.items() if side in takes}


def _images(
    vae: Any, latents: torch.Tensor, seeds: Sequence[int], control: RunControl
) -> tuple[tuple[RenderedImage, ...], dict[str, int]]:
    """Return the pictures, and by number the tiles' side of those that took tiles for want of memory."""
    images = []
    tiles_for_memory: dict[str, int] = {}
    for row, seed in enumerate(seeds):
        control.check(last=row == len(seeds) - 1)
        shown, tile_side = decoded_in_memory(vae, latents[row : row + 1], decoded)
        if tile_side is not None:
            # Not in the run's own: whoever goes on from its checkpoint may have the memory.
            tiles_for_memory[str(row + 1)] = tile_side
        picture = pixels(shown)[0]
        images.append(
            RenderedImage(
                pixels=picture.numpy().tobytes(),
                width=picture.shape[1],
                height=picture.shape[0],
                seed=seed,
            )
        )
    return tuple(images), tiles_for_memory


def _source(source_latents: bytes, spec: RenderSpec) -> torch.Tensor:
    """Return the latents that a variation starts from, once for each of its pictures."""
    assert spec.source is not None
    grid: torch.Tensor = safetensors.torch.load(source_latents)[_LATENTS]
    picture = grid[spec.source.index - 1 : spec.source.index]
    assert len(picture) == 1, f"the source has {len(grid)} pictures, not {spec.source.index}"
    return picture.repeat(spec.images, 1, 1, 1)
