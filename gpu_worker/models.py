"""Reads models.toml: which models there are, what each can draw and what it is expected to cost.

The front door validates sizes and prices jobs with it, workers load by it; both read the same file, so a
size accepted at submission is one the worker can draw. Standard library only.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from gpu_worker.contract import RenderKind
from gpu_worker.prompt import SIDE_STEP

STAND_IN_SOURCE = "builtin:stand-in"
_PACKAGED = Path(__file__).with_name("models.toml")
_BUILTIN = "builtin:"
PIXELS_EXPONENT = 1.6
"""Time of a grid against its pixels, from 60,000 service times of the Stable Diffusion beta (August 2022)."""


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

    @property
    def folder(self) -> Path | None:
        """The diffusers folder it is loaded from; None for hub ids and built-in models."""
        path = Path(self.source)
        return path if path.is_absolute() else None

    def size_violations(self, width: int, height: int) -> tuple[tuple[str, str], ...]:
        """Return what keeps this model from drawing that size, as (parameter, sentence); empty if it can."""
        allowed = f"sizes of {self.name} are multiples of {SIDE_STEP} up to {self.max_side}"
        return tuple(
            (parameter, f"{parameter} {side} cannot be drawn: {allowed}.")
            for parameter, side in (("--w", width), ("--h", height))
            if side <= 0 or side % SIDE_STEP or side > self.max_side
        )

    def memory_needed(self, width: int, height: int) -> int:
        """Return the bytes a worker must have to draw a grid of four at that size with this model.

        The weights, and activations that grow with the pixels; both figures come from the entry.
        """
        return self.memory_bytes + self.memory_bytes_per_pixel * width * height

    def predicted_ms(self, kind: RenderKind, width: int, height: int) -> int:
        """Return the GPU time a grid is expected to take, before any has been measured; at least 1.

        The entry's figure at its default size, times the ratio of pixels to the power 1.6.
        """
        at_default = self.variation_ms if kind is RenderKind.VARIATION else self.imagine_ms
        ratio = (width * height) / (self.default_width * self.default_height)
        return max(1, round(at_default * math.pow(ratio, PIXELS_EXPONENT)))


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of one file, by name."""

    default: ModelEntry
    """What a job that names no model gets."""
    entries: Mapping[str, ModelEntry]

    def get(self, name: str) -> ModelEntry:
        """Return the entry of that name; the default one for an empty name. Raises UnknownModel."""
        if not name:
            return self.default
        entry = self.entries.get(name)
        if entry is None:
            raise UnknownModel(name, tuple(self.entries))
        return entry


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
    unknown = set(document) - {"default", "models"}
    problems += [f"unknown key {key!r}" for key in sorted(unknown)]
    tables = document.get("models")
    if not isinstance(tables, dict) or not tables:
        raise ModelsFileWrong(path, (*problems, "no [models.<name>] table"))
    entries = {name: _entry(name, table, path.resolve().parent, problems) for name, table in tables.items()}
    default = document.get("default")
    if default not in entries:
        problems.append(f"default = {default!r} is not one of its models: {', '.join(entries)}")
    if problems:
        raise ModelsFileWrong(path, tuple(problems))
    whole = {name: entry for name, entry in entries.items() if entry is not None}
    return Models(default=whole[str(default)], entries=whole)


_TYPES: Mapping[str, type] = {"str": str, "int": int}
_MAY_BE_ZERO = {"guidance_milli", "memory_bytes_per_pixel"}
_DTYPES = ("float32", "float16", "bfloat16")


def _entry(name: str, table: object, base: Path, problems: list[str]) -> ModelEntry | None:
    """Return the entry of one table; None, with the reasons added to `problems`, if it is wrong."""
    if not isinstance(table, dict):
        problems.append(f"models.{name} is not a table")
        return None
    known = {field.name: field for field in fields(ModelEntry) if field.name != "name"}
    wrong = [f"unknown key {key!r}" for key in table if key not in known]
    wrong += [
        f"{key} is missing" for key, field in known.items() if field.default is MISSING and key not in table
    ]
    for key, value in table.items():
        if key in known:
            wrong += _value_problems(key, value, _TYPES[str(known[key].type)])
    if wrong:
        problems += [f"models.{name}: {problem}" for problem in wrong]
        return None
    entry = ModelEntry(name=name, **{**table, "source": _resolved(table["source"], base)})
    wrong = _entry_problems(entry)
    problems += [f"models.{name}: {problem}" for problem in wrong]
    return None if wrong else entry


def _value_problems(key: str, value: object, wanted: type) -> list[str]:
    if type(value) is not wanted:
        return [f"{key} = {value!r} is not {'a text' if wanted is str else 'a whole number'}"]
    if isinstance(value, int) and (value < 0 or (value == 0 and key not in _MAY_BE_ZERO)):
        return [f"{key} = {value} is too small"]
    return []


def _entry_problems(entry: ModelEntry) -> list[str]:
    found = []
    if entry.dtype not in _DTYPES:
        found.append(f"dtype = {entry.dtype!r} is none of {', '.join(_DTYPES)}")
    if entry.source.startswith(_BUILTIN) and entry.source != STAND_IN_SOURCE:
        found.append(f"source = {entry.source!r} is not built in; {STAND_IN_SOURCE!r} is")
    if not entry.source:
        found.append("source is empty")
    if entry.max_side % SIDE_STEP:
        found.append(f"max_side = {entry.max_side} is not a multiple of {SIDE_STEP}")
    if entry.variation_strength_permille > 1000:
        found.append(f"variation_strength_permille = {entry.variation_strength_permille} is over 1000")
    # A variation of strength s runs steps * s steps; with none there would be nothing to draw.
    elif entry.steps * entry.variation_strength_permille < 1000:
        found.append("variation_strength_permille leaves a variation without a step")
    found += [sentence for _, sentence in entry.size_violations(entry.default_width, entry.default_height)]
    return found


def _resolved(source: str, base: Path) -> str:
    """Return a folder given relative to the file as an absolute one; other sources as they are."""
    if source.startswith(("./", "../")):
        return str((base / source).resolve())
    return source
