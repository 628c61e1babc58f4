"""Reads a network in ncnn's two files into torch: the graph as text, the weights as bytes.

Only what picture networks of the Real-ESRGAN family are made of is read; anything else is refused by name,
before a weight is. The result is one module that runs the graph in the file's order.
Format: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

_MAGIC = "7767517"
# What stands before a layer's weights: their form. Biases and slopes have none before them.
_FLOAT32 = 0
_FLOAT16 = 0x01306B47
# Keys of lists are written as -23300 - key.
_LIST_KEY = -23300
_INPUT, _OUTPUT = "data", "output"
_LEAKY = 2
_NEAREST = 1
_SUM = 1


class NetworkUnreadable(Exception):
    """The files hold what this reader does not know, or do not belong together."""


class NcnnNetwork(torch.nn.Module):
    """A network with one input and one output, both of shape (n, channels, height, width)."""

    def __init__(self, param: Path, weights: Path) -> None:
        """Read the graph at `param` and its weights. Raises OSError and NetworkUnreadable."""
        super().__init__()
        layers = _graph(param.read_text(encoding="utf-8"))
        blob = _Blob(weights.read_bytes())
        self._steps: list[tuple[_Layer, Callable[..., torch.Tensor]]] = []
        self.layers = torch.nn.ModuleList()
        for layer in layers:
            made = _made(layer, blob)
            if isinstance(made, torch.nn.Module):
                self.layers.append(made)
            self._steps.append((layer, made))
        blob.end()
        self.requires_grad_(False)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        # Each value is read once, since a layer of its own makes the copies: what was read is free to go.
        values = {_INPUT: picture}
        for layer, step in self._steps:
            result = step(*(values.pop(name) for name in layer.inputs))
            values.update(dict.fromkeys(layer.outputs, result))
        return values[_OUTPUT]


@dataclass(frozen=True, kw_only=True)
class _Layer:
    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[int, float]
    lists: dict[int, tuple[float, ...]]

    def whole(self, key: int, default: int = 0) -> int:
        return int(self.numbers.get(key, default))

    def demand(self, met: bool, what: str) -> None:
        if not met:
            raise NetworkUnreadable(f"layer {self.name} of kind {self.kind}: {what} is not read")


class _Blob:
    """The weights, one array after the other as the layers ask for them."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def flagged(self, count: int) -> torch.Tensor:
        """Return weights that say themselves what form they have."""
        flag = int.from_bytes(self._taken(4), "little")
        if flag == _FLOAT32:
            return self.plain(count)
        if flag == _FLOAT16:
            # Padded to whole words of four bytes.
            taken = self._taken((2 * count + 3) // 4 * 4)
            return torch.from_numpy(np.frombuffer(taken, "<f2", count).astype(np.float32))
        raise NetworkUnreadable(f"weights of the form {flag:#x} are not read")

    def plain(self, count: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(self._taken(4 * count), "<f4").astype(np.float32))

    def end(self) -> None:
        if self._at != len(self._content):
            raise NetworkUnreadable(f"{len(self._content) - self._at} bytes of weights belong to no layer")

    def _taken(self, size: int) -> bytes:
        taken = self._content[self._at : self._at + size]
        if len(taken) != size:
            raise NetworkUnreadable("the weights end before the graph does")
        self._at += size
        return taken


def _graph(text: str) -> Sequence[_Layer]:
    lines = text.splitlines()
    if len(lines) < 2 or lines[0].strip() != _MAGIC:
        raise NetworkUnreadable("the graph is not in ncnn's text form")
    layers = [_layer(line.split()) for line in lines[2:] if line.strip()]
    if not layers or layers[0].kind != "Input" or layers[0].outputs != (_INPUT,):
        raise NetworkUnreadable(f"the graph does not begin with an input called {_INPUT!r}")
    if layers[-1].outputs != (_OUTPUT,):
        raise NetworkUnreadable(f"the graph does not end with a value called {_OUTPUT!r}")
    return layers[1:]


def _layer(words: Sequence[str]) -> _Layer:
    """One line: kind, name, how many inputs and outputs, their names, and `key=value` for the rest."""
    try:
        inputs_end = 4 + int(words[2])
        outputs_end = inputs_end + int(words[3])
        if outputs_end > len(words):
            raise IndexError
        numbers: dict[int, float] = {}
        lists: dict[int, tuple[float, ...]] = {}
        for word in words[outputs_end:]:
            key, value = word.split("=")
            if int(key) <= _LIST_KEY:
                lists[_LIST_KEY - int(key)] = tuple(float(each) for each in value.split(",")[1:])
            else:
                numbers[int(key)] = float(value)
    except (IndexError, ValueError) as error:
        raise NetworkUnreadable(f"no layer: {' '.join(words)[:100]}") from error
    return _Layer(
        kind=words[0],
        name=words[1],
        inputs=tuple(words[4:inputs_end]),
        outputs=tuple(words[inputs_end:outputs_end]),
        numbers=numbers,
        lists=lists,
    )


def _made(layer: _Layer, blob: _Blob) -> Callable[..., torch.Tensor]:
    """Return what computes a layer; the numbers of the keys are in ncnn's operator table."""
    match layer.kind:
        case "Convolution":
            return _Convolution(layer, blob)
        case "PReLU":
            slopes = torch.nn.PReLU(layer.whole(0))
            slopes.weight = torch.nn.Parameter(blob.plain(layer.whole(0)))
            return slopes
        case "Split":
            return lambda value: value
        case "Concat":
            layer.demand(layer.whole(0) == 0, "an axis that is not the channels'")
            return lambda *values: torch.cat(values, dim=1)
        case "Eltwise":
            layer.demand(layer.whole(0) == _SUM, "an operation that is not a sum")
            factors = layer.lists.get(1) or (1.0,) * len(layer.inputs)
            return lambda *values: _weighted_sum(values, factors)
        case "BinaryOp":
            layer.demand(layer.whole(0) == 0 and not layer.whole(1), "an operation that is not a sum of two")
            return lambda one, other: one + other
        case "PixelShuffle":
            layer.demand(layer.whole(1) == 0, "another order of channels")
            return torch.nn.PixelShuffle(layer.whole(0))
        case "Interp":
            layer.demand(layer.whole(0) == _NEAREST, "an enlargement that does not repeat pixels")
            factor = layer.whole(1)
            layer.demand(layer.numbers.get(1) == layer.numbers.get(2) == factor, "an uneven enlargement")
            return lambda value: functional.interpolate(value, scale_factor=factor, mode="nearest")
        case _:
            raise NetworkUnreadable(f"layers of kind {layer.kind} are not read")


class _Convolution(torch.nn.Module):
    def __init__(self, layer: _Layer, blob: _Blob) -> None:
        super().__init__()
        outputs, kernel, count = layer.whole(0), layer.whole(1), layer.whole(6)
        layer.demand(layer.whole(3, 1) == 1 and layer.whole(2, 1) == 1, "a stride or dilation")
        layer.demand(layer.whole(11, kernel) == kernel, "a kernel that is no square")
        layer.demand(layer.whole(9) in (0, _LEAKY), "an activation that is no leaky ReLU")
        self._padding = layer.whole(4)
        self._slope = layer.lists[10][0] if layer.whole(9) == _LEAKY else None
        weight = blob.flagged(count).reshape(outputs, -1, kernel, kernel)
        self.weight = torch.nn.Parameter(weight)
        self.bias = torch.nn.Parameter(blob.plain(outputs)) if layer.whole(5) else None

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        result = functional.conv2d(value, self.weight, self.bias, padding=self._padding)
        return result if self._slope is None else functional.leaky_relu(result, self._slope)


def _weighted_sum(values: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    whole = values[0] * factors[0]
    for value, factor in zip(values[1:], factors[1:], strict=True):
        whole = whole + value * factor
    return whole
