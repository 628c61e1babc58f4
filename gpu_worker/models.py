"""Reads models.toml: which models there are, what each can draw and what it is expected to cost.

The front door validates sizes and prices jobs with it, workers load by it; both read the same file, so what
is accepted at submission is something the worker can draw. Standard library only.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from gpu_worker.contract import RenderKind
from gpu_worker.prompt import SIDE_STEP

STAND_IN_SOURCE = "builtin:stand-in"
REALESRGAN_X4_SOURCE = "builtin:realesrgan-x4"
_UPSCALER_SOURCES = (REALESRGAN_X4_SOURCE, "builtin:realesrgan-x4plus")
MOST_UPSCALED_PIXELS = 3_000_000
_PACKAGED = Path(__file__).with_name("models.toml")
_BUILTIN = "builtin:"
PIXELS_EXPONENT = 1.6
"""Time of a grid against its pixels, from 60,000 service times of the Stable Diffusion beta (August 2022)."""
_UPSCALE_FACTOR = 4
_UPSCALED_SIDE_STEP = 8
# Of the time of a detailed upscale, super-resolution alone: as measured with the stand-in on a CPU.
_LIGHT_PERMILLE = 100
# Of an upscaled picture that is put together from tiles: a few copies of three float32 colours each.
_UPSCALED_BYTES_PER_PIXEL = 64
_GRID = 4
_MOST_ASPECT_ERROR = math.log(1.25)


def upscaled_size(kind: RenderKind, width: int, height: int) -> tuple[int, int]:
    """Return the size to which that kind of upscale brings a picture.

    Four times its sides, and for max as large as its shape allows; never more than MOST_UPSCALED_PIXELS.
    Sides are multiples of 8, rounded down.
    """
    assert kind.is_upscale, f"{kind} is no upscale"
    wide, high = _UPSCALE_FACTOR * width, _UPSCALE_FACTOR * height
    if kind is RenderKind.UPSCALE_MAX or wide * high > MOST_UPSCALED_PIXELS:
        wide = math.isqrt(MOST_UPSCALED_PIXELS * width // height)
        high = math.isqrt(MOST_UPSCALED_PIXELS * height // width)
    return wide - wide % _UPSCALED_SIDE_STEP, high - high % _UPSCALED_SIDE_STEP


class ModelsFileWrong(Exception):
    """A models file cannot be used; `problems` says everything that is wrong with it."""

    def __init__(self, path: Path, problems: tuple[str, ...]) -> None:
        super().__init__(path, problems)
        self.path = path
        self.problems = problems

    def __str__(self) -> str:
        return f"{self.path}: " + "; ".join(self.problems)


class UnknownModel(Exception):
    """There is no model of that name."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        return f"There is no model {self.name[:80]!r}; there is {', '.join(self.known)}."


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model as models.toml describes it. Sizes are pixels, times GPU milliseconds."""

    name: str
    source: str
    """An absolute diffusers folder, a hub id, or `builtin:stand-in`."""
    steps: int
    guidance_milli: int
    """Guidance scale in thousandths."""
    default_width: int
    default_height: int
    memory_bytes: int
    """Of the weights and the libraries' own, with the model loaded and nothing drawn."""
    imagine_ms: int
    """Expected time of an imagine grid at the default size."""
    variation_ms: int
    memory_bytes_per_pixel: int
    """What a grid of four adds, for each pixel of one of its pictures."""
    revision: str = ""
    """Of a hub id; empty for its main one."""
    dtype: str = "float32"
    """Of the weights on a GPU. A CPU always computes in float32."""
    scheduler: str = ""
    """A diffusers scheduler class; empty for the model's own."""
    max_side: int = 960
    variation_strength_permille: int = 600
    """How far a variation goes from its source: 0 keeps the picture, 1000 forgets it."""
    variation_strong_permille: int = 800
    """The same of a strong variation."""
    upscale_ms: int = 0
    """Expected time of a detailed upscale of a picture of the default size; 0: as long as an imagine grid."""
    words_read: int = 60
    """About how many words of a part of a prompt have an effect. A CLIP text encoder reads 75 tokens."""
    ip_adapter: str = ""
    """An absolute path of an IP-Adapter's weights, or `builtin:stand-in`; empty: it takes no pictures."""
    weighted_parts: bool = True
    """Whether parts of a prompt can be weighed against each other; loading it tells if it is not so."""

    @property
    def folder(self) -> Path | None:
        """The diffusers folder it is loaded from; None for hub ids and built-in models."""
        path = Path(self.source)
        return path if path.is_absolute() else None

    @property
    def takes_pictures(self) -> bool:
        """Whether a prompt may name pictures."""
        return bool(self.ip_adapter)

    def size_violations(self, width: int, height: int) -> tuple[tuple[str, str], ...]:
        """Return what keeps this model from drawing that size, as (parameter, sentence); empty if it can."""
        return tuple(_size_violations(self.name, self.max_side, width, height))

    def size_of_aspect(self, across: int, down: int) -> tuple[int, int]:
        """Return the width and height nearest to a shape and to the default size's area.

        Of the sizes this model can draw whose shape is off by no more than a quarter, that with the least sum
        of the error of the area and twice the error of the shape, both as logarithms of ratios: a shape is
        what was asked for, an area is not. Where there is none, that with the nearest shape.
        """
        sides = range(SIDE_STEP, self.max_side + 1, SIDE_STEP)
        area = self.default_width * self.default_height

        def error(size: tuple[int, int]) -> tuple[float, float, int, int]:
            width, height = size
            of_shape = abs(math.log(width * down / (height * across)))
            bent = of_shape if of_shape > _MOST_ASPECT_ERROR else 0.0
            # Rounded, so that sizes that are equally far decide by their own order and not by the last bit.
            return bent, round(2 * of_shape + abs(math.log(width * height / area)), 9), width, height

        return min(((width, height) for width in sides for height in sides), key=error)

    def aspect_violations(self, across: int, down: int) -> tuple[tuple[str, str], ...]:
        """Return what keeps this model from drawing that shape, as (parameter, sentence); empty if it can.

        A shape whose nearest size is off by more than a quarter is refused, not bent.
        """
        if across > 0 and down > 0:
            width, height = self.size_of_aspect(across, down)
            if abs(math.log(width * down / (height * across))) <= _MOST_ASPECT_ERROR:
                return ()
            nearest = f"the nearest size that {self.name} draws is {width} by {height}"
        else:
            nearest = "both numbers must be at least 1"
        return (("--ar", f"--ar {across}:{down} cannot be drawn: {nearest}."),)

    def memory_needed(self, width: int, height: int, kind: RenderKind = RenderKind.IMAGINE) -> int:
        """Return the bytes a worker must have to draw a job of that size with this model.

        The weights, and what grows with the pixels: of a grid its activations; of an upscale, which is drawn
        one tile of at most the default size after the other, those of one tile and the whole picture. An
        upscaler's own are not in it: `Models.memory_needed` adds them.
        """
        if not kind.is_upscale:
            return self.memory_bytes + self.memory_bytes_per_pixel * width * height
        tile = min(width * height, self.default_width * self.default_height)
        activations = self.memory_bytes_per_pixel * tile // _GRID
        return self.memory_bytes + activations + _UPSCALED_BYTES_PER_PIXEL * width * height

    def predicted_ms(self, kind: RenderKind, width: int, height: int) -> int:
        """Return the GPU time a job is expected to take, before any has been measured; at least 1.

        Of a grid, the entry's figure at its default size, times the ratio of pixels to the power 1.6. Of an
        upscale, whose size is the result's, the figure grows with the pixels, since it is drawn in tiles.
        """
        if kind.is_upscale:
            of_default = upscaled_size(RenderKind.UPSCALE_DETAILED, self.default_width, self.default_height)
            ratio = (width * height) / math.prod(of_default)
            share = _LIGHT_PERMILLE / 1000 if kind is RenderKind.UPSCALE_LIGHT else 1
            return max(1, round((self.upscale_ms or self.imagine_ms) * share * ratio))
        at_default = self.variation_ms if kind is RenderKind.VARIATION else self.imagine_ms
        ratio = (width * height) / (self.default_width * self.default_height)
        return max(1, round(at_default * math.pow(ratio, PIXELS_EXPONENT)))


@dataclass(frozen=True, kw_only=True)
class UpscalerEntry:
    """The super-resolution network of all models, as models.toml describes it."""

    source: str = REALESRGAN_X4_SOURCE
    """An absolute path of weights that spandrel loads, or one that is built in."""
    memory_bytes: int = 400_000_000
    """Of its weights, and of what it needs for one tile."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of one file, by name."""

    default: ModelEntry
    """What a job that names no model gets."""
    entries: Mapping[str, ModelEntry]
    upscaler: UpscalerEntry = field(default_factory=UpscalerEntry)

    def get(self, name: str) -> ModelEntry:
        """Return the entry of that name; the default one for an empty name. Raises UnknownModel."""
        if not name:
            return self.default
        entry = self.entries.get(name)
        if entry is None:
            raise UnknownModel(name, tuple(self.entries))
        return entry

    def taking_pictures(self) -> tuple[str, ...]:
        """Return the names of the models whose prompts may name pictures."""
        return tuple(entry.name for entry in self.entries.values() if entry.takes_pictures)

    def weighing_parts(self) -> tuple[str, ...]:
        """Return the names of the models whose prompts may have weighted parts."""
        return tuple(entry.name for entry in self.entries.values() if entry.weighted_parts)

    def memory_needed(self, kind: RenderKind, model: str, width: int, height: int) -> int:
        """Return the bytes a worker must have for a job: its model's, and for an upscale the upscaler's.

        Raises UnknownModel.
        """
        needed = self.get(model).memory_needed(width, height, kind)
        return needed + self.upscaler.memory_bytes if kind.is_upscale else needed


def read_models(path: Path | None) -> Models:
    """Return the models of the file at `path`; of the one that comes with the package for None.

    Raises ModelsFileWrong with everything that is wrong with the file.
    """
    path = path or _PACKAGED
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ModelsFileWrong(path, (str(error),)) from error
    problems: list[str] = []
    base = path.resolve().parent
    unknown = set(document) - {"default", "models", "upscaler"}
    problems += [f"unknown key {key!r}" for key in sorted(unknown)]
    upscaler = _upscaler(document.get("upscaler", {}), base, problems)
    tables = document.get("models")
    if not isinstance(tables, dict) or not tables:
        raise ModelsFileWrong(path, (*problems, "no [models.<name>] table"))
    entries = {name: _entry(name, table, base, problems) for name, table in tables.items()}
    default = document.get("default")
    if default not in entries:
        problems.append(f"default = {default!r} is not one of its models: {', '.join(entries)}")
    if problems:
        raise ModelsFileWrong(path, tuple(problems))
    whole = {name: entry for name, entry in entries.items() if entry is not None}
    assert upscaler is not None, "what keeps it from being read is a problem"
    return Models(default=whole[str(default)], entries=whole, upscaler=upscaler)


_TYPES: Mapping[str, type] = {"str": str, "int": int, "bool": bool}
_SAID: Mapping[type, str] = {str: "a text", int: "a whole number", bool: "true or false"}
_MAY_BE_ZERO = {"guidance_milli", "memory_bytes_per_pixel", "upscale_ms"}
_DTYPES = ("float32", "float16", "bfloat16")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_KEEPS_A_TREE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
"""Schedulers that keep a live Brownian tree, which no checkpoint can hold."""


def _entry(name: str, table: object, base: Path, problems: list[str]) -> ModelEntry | None:
    """Return the entry of one table; None, with the reasons added to `problems`, if it is wrong."""
    values, wrong = _values(ModelEntry, table)
    wrong += _source_problems(values)
    wrong += _drawing_problems(name, values)
    problems += [f"models.{name}: {problem}" for problem in wrong]
    if wrong:
        return None
    values["source"] = _resolved(values["source"], base)
    if values["ip_adapter"] and not values["ip_adapter"].startswith(_BUILTIN):
        values["ip_adapter"] = str((base / values["ip_adapter"]).resolve())
    return ModelEntry(name=name, **values)


def _upscaler(table: object, base: Path, problems: list[str]) -> UpscalerEntry | None:
    values, wrong = _values(UpscalerEntry, table)
    source = values.get("source")
    if source is not None and source.startswith(_BUILTIN) and source not in _UPSCALER_SOURCES:
        wrong.append(f"source = {source!r} is not built in; {', '.join(map(repr, _UPSCALER_SOURCES))} are")
    if source == "":
        wrong.append("source is empty")
    problems += [f"upscaler: {problem}" for problem in wrong]
    if wrong:
        return None
    if not values["source"].startswith(_BUILTIN):
        values["source"] = str((base / values["source"]).resolve())
    return UpscalerEntry(**values)


def _values(kind: type, table: object) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a table that are right by themselves, with defaults, and what the others lack."""
    if not isinstance(table, dict):
        return {}, ["it is not a table"]
    known = {each.name: each for each in fields(kind) if each.name != "name"}
    values = {key: each.default for key, each in known.items() if each.default is not MISSING}
    wrong = [f"unknown key {key!r}" for key in table if key not in known]
    wrong += [f"{key} is missing" for key, each in known.items() if key not in {**values, **table}]
    for key, value in table.items():
        if key not in known:
            continue
        found = _value_problems(key, value, _TYPES[str(known[key].type)])
        wrong += found
        if found:
            values.pop(key, None)
        else:
            values[key] = value
    return values, wrong


def _value_problems(key: str, value: object, wanted: type) -> list[str]:
    if type(value) is not wanted:
        return [f"{key} = {value!r} is not {_SAID[wanted]}"]
    if type(value) is int and (value < 0 or (value == 0 and key not in _MAY_BE_ZERO)):
        return [f"{key} = {value} is too small"]
    return []


# Both look at what is right by itself, so that a file's problems are told together.


def _source_problems(values: Mapping[str, Any]) -> Iterator[str]:
    source = values.get("source")
    if source is not None:
        folder = source.startswith(("/", "./", "../"))
        builtin = source.startswith(_BUILTIN)
        if not source:
            yield "source is empty"
        elif builtin and source != STAND_IN_SOURCE:
            yield f"source = {source!r} is not built in; {STAND_IN_SOURCE!r} is"
        elif not folder and not builtin and _HUB_ID.fullmatch(source) is None:
            yield (
                f"source = {source!r} is no folder ('./folder' or '/folder'), no hub id ('owner/name') "
                f"and not {STAND_IN_SOURCE!r}"
            )
        if values.get("revision") and (folder or builtin):
            yield f"revision = {values['revision']!r} is for hub ids; source = {source!r} has none"
    adapter = values.get("ip_adapter", "")
    if adapter.startswith(_BUILTIN) and adapter != STAND_IN_SOURCE:
        yield f"ip_adapter = {adapter!r} is not built in; {STAND_IN_SOURCE!r} is"
    if adapter == STAND_IN_SOURCE and source not in (None, STAND_IN_SOURCE):
        yield f"ip_adapter = {adapter!r} fits the stand-in only"
    if adapter and not values.get("weighted_parts", True):
        yield "weighted_parts = false leaves nothing to weigh pictures with; leave ip_adapter out"
    dtype = values.get("dtype")
    if dtype is not None and dtype not in _DTYPES:
        yield f"dtype = {dtype!r} is none of {', '.join(_DTYPES)}"
    scheduler = values.get("scheduler")
    if scheduler in _KEEPS_A_TREE:
        yield (
            f"scheduler = {scheduler!r} keeps a live Brownian tree, so that its runs cannot be checkpointed; "
            "DPMSolverMultistepScheduler draws like it"
        )


def _drawing_problems(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    max_side = values.get("max_side")
    if max_side is not None and max_side % SIDE_STEP:
        yield f"max_side = {max_side} is not a multiple of {SIDE_STEP}"
    width, height = values.get("default_width"), values.get("default_height")
    if max_side is not None and width is not None and height is not None:
        yield from (sentence for _, sentence in _size_violations(name, max_side, width, height))
    strength, strong = values.get("variation_strength_permille"), values.get("variation_strong_permille")
    steps = values.get("steps")
    for key in ("variation_strength_permille", "variation_strong_permille"):
        if values.get(key, 0) > 1000:
            yield f"{key} = {values[key]} is over 1000"
    # A variation of strength s runs steps * s steps; with none there would be nothing to draw.
    if steps is not None and strength is not None and steps * strength < 1000:
        yield "variation_strength_permille leaves a variation without a step"
    if strength is not None and strong is not None and strong < strength:
        yield f"variation_strong_permille = {strong} is less than variation_strength_permille = {strength}"


def _size_violations(name: str, max_side: int, width: int, height: int) -> Iterator[tuple[str, str]]:
    allowed = f"sizes of {name} are multiples of {SIDE_STEP} up to {max_side}"
    for parameter, side in (("--w", width), ("--h", height)):
        if side <= 0 or side % SIDE_STEP or side > max_side:
            yield parameter, f"{parameter} {side} cannot be drawn: {allowed}."


def _resolved(source: str, base: Path) -> str:
    """Return a folder given relative to the file as an absolute one; other sources as they are."""
    if source.startswith(("./", "../")):
        return str((base / source).resolve())
    return source
