"""Upscales one picture: super-resolution, and details drawn over it where they are asked for.

Both work on a canvas, tile by tile. A tile is the step that a run counts, reports and can be cut after;
within one it can be parked or stopped at each denoising step too. The canvas holds all that is done, so that
a run continued elsewhere gives the same bits.

Details come from the model's own image-to-image pipeline at low strength, in tiles of the size that it draws
best. Three things keep them from being seen as tiles: each starts from what its neighbours left in the part
they share and is faded in over it; each has noise of its own, since the same noise everywhere shows as a
pattern; and what a tile does to colours over larger distances is taken back, for it cannot know what the
other tiles do.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import PIL
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional

from gpu_worker.contract import WHOLE_PPM, RenderKind, RenderSpec
from gpu_worker.engine.checkpoint import opened
from gpu_worker.engine.device import Leash
from gpu_worker.engine.latents import decoded, unpacked
from gpu_worker.engine.loading import LoadedModel
from gpu_worker.engine.parts import joining, prompt_arguments
from gpu_worker.engine.receipts import parts_in_receipt
from gpu_worker.engine.step_boundary import Predict, with_boundary
from gpu_worker.engine.super_resolution import SuperResolution, Tile
from gpu_worker.image_seeds import image_seed
from gpu_worker.prompt import SIDE_STEP
from gpu_worker.run import (
    CutState,
    Inputs,
    Preview,
    RenderedImage,
    Rendering,
    RunControl,
    Stage,
    StageClock,
)

# A tile is drawn with the prompt of the whole picture. Up to about here it becomes texture; from 0.4 on each
# tile begins to be a small picture of its own. Below 0.2 nothing is added that super-resolution left out.
_STRENGTH_PERMILLE = 300
# Of a tile's side, at least so much is shared with each neighbour.
_SHARED_PERMILLE = 125
# Pixels on a side of the squares whose mean colour is left as it was.
_COLOUR_CELL = 32
_PREVIEW_SIDE = 512


def upscaled(
    spec: RenderSpec,
    picture: bytes,
    *,
    model: LoadedModel,
    upscaler: SuperResolution,
    device: torch.device,
    control: RunControl,
    clock: StageClock,
    checkpoint: bytes | None,
    receipt: Mapping[str, object],
) -> Rendering:
    """Return `picture`, a file, at the size that `spec` asks for.

    `receipt` is what the engine knows of the run; what is known here is added to it. A checkpoint made under
    another is not used. All time is the upscale's, the drawing of details included: a tile's stages are not
    the picture's, and the decodes of those that are done are kept in a checkpoint. Raises RunStopped where
    `control` does.
    """
    clock.enter(Stage.UPSCALE)
    source = _pixels(Image.open(io.BytesIO(picture)).convert("RGB"))
    receipt = {
        **receipt,
        "source_sha256": hashlib.sha256(picture).hexdigest(),
        "upscaler": upscaler.name,
        "upscaler_sha256": upscaler.weights_sha256,
        "pillow": PIL.__version__,
    }
    size = (source.shape[1], source.shape[0])
    passes: list[_Enlargement | _Details] = []
    for wanted in upscaler.sizes(size, (spec.width, spec.height)):
        passes.append(_Enlargement(upscaler, size, wanted))
        size = wanted
    if spec.kind is not RenderKind.UPSCALE_LIGHT:
        details = _Details(spec, model, device, control)
        receipt |= details.receipt
        passes.append(details)

    state = _State.read(checkpoint, receipt) if checkpoint is not None else None
    if state is not None:
        control.restored()
    else:
        state = passes[0].begun(0, source)
    steps = sum(len(each.tiles) for each in passes)
    while state.passed < len(passes):
        current = passes[state.passed]
        earlier = sum(len(each.tiles) for each in passes[: state.passed])
        while state.tiles < len(current.tiles):
            # Details are drawn in many steps: of these, the last piece is told apart there.
            light = isinstance(current, _Enlargement) and current is passes[-1]
            control.check(last=light and state.tiles == len(current.tiles) - 1)
            current.draw(state)
            state = replace(state, tiles=state.tiles + 1)
            control.boundary(
                earlier + state.tiles,
                steps,
                preview=partial(_preview, state.canvas),
                cut=partial(_cut, state, receipt),
            )
        passed = state.passed + 1
        if passed < len(passes):
            state = passes[passed].begun(passed, state.canvas)
        else:
            state = replace(state, passed=passed, tiles=0)
    return Rendering(
        images=(
            RenderedImage(
                pixels=state.canvas.numpy().tobytes(),
                width=spec.width,
                height=spec.height,
                seed=image_seed(spec.seed, 1),
            ),
        ),
        latents=None,
        receipt=receipt,
    )


@dataclass(frozen=True, kw_only=True)
class _State:
    """How far an upscale is. Pictures are bytes of shape (h, w, 3) on the CPU."""

    passed: int
    """Passes that are done."""
    tiles: int
    """Tiles of the next one that are done."""
    before: torch.Tensor | None
    """The picture as that pass found it; None where it needs but the canvas."""
    canvas: torch.Tensor
    """The picture as it leaves it: drawn on, where all else here is replaced."""

    def content(self, receipt: Mapping[str, object]) -> bytes:
        header = {"passed": self.passed, "tiles": self.tiles, "receipt": receipt}
        pictures = {"canvas": self.canvas} | ({} if self.before is None else {"before": self.before})
        content: bytes = safetensors.torch.save(pictures, metadata={"state": json.dumps(header)})
        return content

    @staticmethod
    def read(content: bytes, receipt: Mapping[str, object]) -> _State | None:
        """Return the state in a file; None where `opened` does."""
        file = opened(content, receipt)
        if file is None:
            return None
        header, pictures = file
        return _State(
            passed=header["passed"],
            tiles=header["tiles"],
            before=pictures.get("before"),
            canvas=pictures["canvas"],
        )


def _cut(state: _State, receipt: Mapping[str, object]) -> CutState:
    # The canvas is drawn on only when a tile is finished: asked within the next, it is what it was.
    copied = replace(state, canvas=state.canvas.clone())
    return lambda: copied.content(receipt)


class _Enlargement:
    """A pass of the network over a picture, to any size."""

    def __init__(self, upscaler: SuperResolution, source: tuple[int, int], wanted: tuple[int, int]) -> None:
        self.tiles = upscaler.tiles(source, wanted)
        self._upscaler = upscaler
        self._wanted = wanted

    def begun(self, passed: int, picture: torch.Tensor) -> _State:
        # For whoever watches, it begins as it is without the network.
        without = Image.fromarray(picture.numpy()).resize(self._wanted, Image.Resampling.BICUBIC)
        return _State(passed=passed, tiles=0, before=picture, canvas=_pixels(without))

    def draw(self, state: _State) -> None:
        assert state.before is not None
        tile = self.tiles[state.tiles]
        _part(state.canvas, tile).copy_(self._upscaler.enlarged(state.before, self._wanted, tile))


class _Details:
    """A pass of the model over a picture of its final size."""

    def __init__(
        self, spec: RenderSpec, model: LoadedModel, device: torch.device, control: RunControl
    ) -> None:
        entry = model.entry
        self._side = (
            _tile_side(entry.default_width, spec.width),
            _tile_side(entry.default_height, spec.height),
        )
        lefts, tops = (
            _begins(side, whole) for side, whole in zip(self._side, (spec.width, spec.height), strict=True)
        )
        self.tiles = tuple(
            Tile(
                left=left,
                top=top,
                right=min(left + self._side[0], spec.width),
                bottom=min(top + self._side[1], spec.height),
            )
            for top in tops
            for left in lefts
        )
        self._shared = (_shared(lefts, self._side[0]), _shared(tops, self._side[1]))
        # So that one step at least is taken, of models that need but a few.
        self._steps = max(spec.steps, math.ceil(1000 / _STRENGTH_PERMILLE))
        self._seed = image_seed(spec.seed, 1)
        self._guidance = spec.guidance_milli / 1000
        self._control = control
        self._device = device
        self._leash = Leash(device)
        # Weights are shared, all else is this run's; of the scheduler each tile has a copy.
        self._pipeline = copy.copy(model.image_to_image)
        self._spec = _without_pictures(spec)
        self._joining = joining(self._spec, self._pipeline)
        self._prompt: dict[str, Any] | None = None
        self.receipt = {
            **parts_in_receipt(self._spec, Inputs(), model, self._joining),
            "detail_strength_permille": _STRENGTH_PERMILLE,
            "detail_steps": self._steps,
            "detail_tile_width": self._side[0],
            "detail_tile_height": self._side[1],
        }

    def begun(self, passed: int, picture: torch.Tensor) -> _State:
        return _State(passed=passed, tiles=0, before=None, canvas=picture)

    def draw(self, state: _State) -> None:
        tile = self.tiles[state.tiles]
        part = _part(state.canvas, tile)
        found = part.to(self._device).permute(2, 0, 1).unsqueeze(0).float() / 255
        # A picture that is smaller than a tile, or whose sides no model can draw, goes on as its edge does.
        missing = (self._side[0] - found.shape[3], self._side[1] - found.shape[2])
        whole = functional.pad(found, (0, missing[0], 0, missing[1]), mode="replicate")
        drawn = self._drawn(whole, state.tiles)
        kept = drawn + _coarse(whole) - _coarse(drawn)
        kept = kept[..., : found.shape[2], : found.shape[3]]
        fade = self._fade(tile).to(self._device)
        blended = found + (kept - found) * fade
        levels = (blended.clamp(0, 1) * 255).round().to(torch.uint8)
        part.copy_(levels[0].permute(1, 2, 0).cpu())

    def _drawn(self, found: torch.Tensor, number: int) -> torch.Tensor:
        """Return a tile, colours of shape (1, 3, h, w) from 0 to 1, with details that were not there."""
        if self._prompt is None:
            self._prompt = self._prompt_arguments()
        height, width = found.shape[2:]
        vae = self._pipeline.vae
        pipeline = copy.copy(self._pipeline)
        generator = torch.Generator().manual_seed(image_seed(self._seed, number + 1))
        pipeline.scheduler = with_boundary(pipeline.scheduler, _InTile(self._control, self._leash), generator)
        sizes = {"width": width, "height": height}
        known = inspect.signature(pipeline.__call__).parameters
        latents = pipeline(
            **self._prompt,
            **{name: value for name, value in sizes.items() if name in known},
            # Latents, not colours: some pipelines cast the decoder they share to encode them.
            image=_encoded(vae, found * 2 - 1),
            strength=_STRENGTH_PERMILLE / 1000,
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            generator=generator,
            output_type="latent",
        ).images
        self._control.check(last=number == len(self.tiles) - 1)
        pictures = decoded(vae, unpacked(pipeline, latents, width, height))
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def _prompt_arguments(self) -> dict[str, Any]:
        return prompt_arguments(
            self._joining, self._spec, (), pipeline=self._pipeline, adapter=None, check=self._control.check
        )

    def _fade(self, tile: Tile) -> torch.Tensor:
        """Return how much of a tile counts in each pixel: less in what tiles before it have drawn."""
        across = _ramp(tile.right - tile.left, self._shared[0].get(tile.left, 0))
        down = _ramp(tile.bottom - tile.top, self._shared[1].get(tile.top, 0))
        return down.unsqueeze(1) * across.unsqueeze(0)


class _InTile:
    """Makes each denoising step of a tile a place where the run can be parked and stopped."""

    def __init__(self, control: RunControl, leash: Leash) -> None:
        self._control = control
        self._leash = leash

    def denoising_begins(self) -> None:
        self._control.check()

    def skipped(self, scheduler: Any, sample: torch.Tensor) -> torch.Tensor | None:
        return None

    def step_ended(self, scheduler: Any, latents: torch.Tensor, predict: Predict) -> None:
        self._leash.step()
        self._control.check()


def _without_pictures(spec: RenderSpec) -> RenderSpec:
    """Return the spec of one picture whose prompt is its text alone: all of it, where it was a part."""
    whole = sum(abs(part.share_ppm) for part in spec.parts)
    parts = tuple(replace(part, share_ppm=part.share_ppm * WHOLE_PPM // whole) for part in spec.parts)
    return replace(spec, images=1, pictures=(), parts=parts)


def _tile_side(drawn_best: int, whole: int) -> int:
    return min(drawn_best, -(-whole // SIDE_STEP) * SIDE_STEP)


def _begins(side: int, whole: int) -> Sequence[int]:
    """Return where tiles begin: at equal distances, so that neighbours share what they must or more."""
    if side >= whole:
        return (0,)
    shared = side * _SHARED_PERMILLE // 1000
    count = math.ceil((whole - shared) / (side - shared))
    return tuple((whole - side) * i // (count - 1) for i in range(count))


def _shared(begins: Sequence[int], side: int) -> Mapping[int, int]:
    """Return how many pixels the tile that begins there shares with the one before it."""
    return {begin: before + side - begin for before, begin in itertools.pairwise(begins)}


def _ramp(length: int, shared: int) -> torch.Tensor:
    """Return weights that rise smoothly from 0 to 1 over the first `shared` of `length` pixels."""
    along = ((torch.arange(length) + 0.5) / shared).clamp(max=1) if shared else torch.ones(length)
    return along * along * (3 - 2 * along)


def _encoded(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Return latents as pipelines take them of pictures (n, 3, h, w), -1 to 1: the inverse of `decoded`."""
    config = vae.config
    latents: torch.Tensor = vae.encode(pictures.to(vae.dtype)).latent_dist.mode()
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(config[key], dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        latents = (latents - mean) * config.scaling_factor / std
    else:
        latents = (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    return latents


def _coarse(colours: torch.Tensor) -> torch.Tensor:
    """Return what is left of colours (1, 3, h, w) when all that is finer than a cell is gone."""
    means = functional.avg_pool2d(colours, _COLOUR_CELL)
    return functional.interpolate(means, size=colours.shape[2:], mode="bilinear", align_corners=False)


def _part(canvas: torch.Tensor, tile: Tile) -> torch.Tensor:
    return canvas[tile.top : tile.bottom, tile.left : tile.right]


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def _preview(canvas: torch.Tensor) -> Preview:
    # A copy: the next tile is drawn on it.
    return partial(_png, canvas.clone())


def _png(canvas: torch.Tensor) -> bytes:
    image = Image.fromarray(canvas.numpy())
    image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
