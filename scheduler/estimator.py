"""What a job will cost: from the models file's figures at first, then from what its like have taken.

Two numbers describe a shape on a device type: the time of one denoising step, and of all the rest (encode,
decode, enlarging). A job takes steps times the one plus the other. Values in, values out: rows come from the
table scheduler.estimate and go back to it, and nothing here reads a clock or a database.

All learned times are those of a worker of speed 1000; a worker of another speed takes them times 1000 over
its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpu_worker.contract import RenderKind, RenderSpec, StageTimes
from gpu_worker.models import PIXELS_EXPONENT, ModelEntry, Models

# An observation weighs at least this much, so that a new driver or a hotter room shows within a few dozen
# jobs. Less, and a change is noticed late; more, and the mean follows every job's luck.
_LEAST_WEIGHT = 1 / 16
# So the mean of a row is worth no more jobs than it remembers.
_MOST_JOBS = 1 / _LEAST_WEIGHT
# An observation counts for at most this many times the mean. Only upwards: a neighbour on the machine, a cold
# cache or a throttled clock add time, and nothing makes a GPU faster than it is by accident.
_MOST_TIMES_MEAN = 2.0
# Stages are measured in whole milliseconds. Below that, a ratio of two times says nothing, and a mean that
# was once 0 could never rise again.
_GRAIN_US = 1_000.0
# Of what was believed before, each observation leaves this share. The figures of a models file may be wrong
# tenfold on a machine its author never saw; one measured job is seldom wrong twofold.
_DOUBT = 0.5

_MOST_MS = 2**31 - 1
"""What the columns of predicted times hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What decides how long a job takes, but for the machine."""

    kind: RenderKind
    model: str
    width: int
    height: int
    steps: int
    """Denoising steps that are done, in plain ones; at least 1."""

    @property
    def pixels(self) -> int:
        """Pixels of one of its pictures."""
        return self.width * self.height


def shape_of(spec: RenderSpec) -> Shape:
    """Return the shape of a job."""
    return Shape(
        kind=spec.kind,
        model=spec.model,
        width=spec.width,
        height=spec.height,
        steps=steps_done(
            spec.steps,
            strength_permille=None if spec.source is None else spec.source.strength_permille,
            stop_percent=spec.stop_percent,
            parts=len(spec.parts) + len(spec.pictures),
            kind=spec.kind,
        ),
    )


def steps_done(
    steps: int, *, kind: RenderKind, strength_permille: int | None, stop_percent: int, parts: int
) -> int:
    """Return how many plain steps the steps take that a job does.

    A variation of strength s does the last s of its steps, and one that stops at p percent the first p of
    these. A plain step asks the denoiser twice, without and with the prompt; each part of the prompt beyond
    the first, text or picture, is one question more. What upscales do is between them and their tiles: they
    are compared by their size alone.
    """
    if kind.is_upscale:
        return steps
    of_source = steps if strength_permille is None else max(1, steps * strength_permille // 1000)
    of_stop = -(-of_source * stop_percent // 100)
    return of_stop * (1 + max(1, parts)) // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What one job took, in microseconds of a worker of speed 1000."""

    shape: Shape
    device: str
    """Device type, as workers name it."""
    step_us: float
    rest_us: float


def observation(spec: RenderSpec, whole: StageTimes, *, device: str, speed_permille: int) -> Observation:
    """Return what a job that succeeded teaches.

    `whole` is all that went into its pictures: where it went on from a checkpoint, what that kept and what
    the last attempt added; not what was done again. A job that was cancelled or failed teaches nothing: how
    many steps it did is not known.
    """
    shape = shape_of(spec)
    return Observation(
        shape=shape,
        device=device,
        step_us=whole.denoise_ms * speed_permille / shape.steps,
        rest_us=float((whole.gpu_ms - whole.denoise_ms) * speed_permille),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """What jobs of one shape took on one device type: exponentially weighted means."""

    shape: Shape
    device: str
    seen: int
    """Jobs counted."""
    step_us: float
    rest_us: float


def learned(before: Learned | None, seen: Observation) -> Learned:
    """Return the row of a shape and device type after one more observation; None: it is the first.

    The n-th observation weighs 1/n up to the 16th and 1/16 from there on: the plain mean first, then one that
    forgets. More than twice the mean counts as twice the mean.
    """
    if before is None:
        return Learned(
            shape=seen.shape, device=seen.device, seen=1, step_us=seen.step_us, rest_us=seen.rest_us
        )
    assert (before.shape, before.device) == (seen.shape, seen.device), "an observation of another row"
    weight = max(1 / (before.seen + 1), _LEAST_WEIGHT)
    return Learned(
        shape=before.shape,
        device=before.device,
        seen=before.seen + 1,
        step_us=_mean(before.step_us, seen.step_us, weight),
        rest_us=_mean(before.rest_us, seen.rest_us, weight),
    )


def _mean(mean_us: float, new_us: float, weight: float) -> float:
    counted_us = min(new_us, _MOST_TIMES_MEAN * mean_us + _GRAIN_US)
    return mean_us + weight * (counted_us - mean_us)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a job will probably take on a worker of speed 1000."""

    cost_ms: int
    """At least 1, and no more than the database's column holds."""
    step_ms: int
    """Of its denoising steps, each; at least 1."""
    seen: int
    """Jobs of this very shape that it was learned from."""


@dataclass(frozen=True, slots=True)
class _Times:
    """Microseconds of a step and of the rest, and how many jobs say so."""

    step_us: float
    rest_us: float
    seen: int

    def scaled(self, factor: float) -> _Times:
        return _Times(self.step_us * factor, self.rest_us * factor, self.seen)


class Estimator:
    """Predicts from the rows it is made of; a value, so a newer state is another one."""

    def __init__(self, models: Models, rows: Iterable[Learned] = ()) -> None:
        self._models = models
        of_line: defaultdict[tuple[RenderKind, str], defaultdict[str, list[Learned]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for row in rows:
            of_line[row.shape.kind, row.shape.model][row.device].append(row)
        self._seen = {
            line: {device: _Seen(own) for device, own in of_device.items()}
            for line, of_device in of_line.items()
        }

    def predict(self, shape: Shape, device: str | None = None) -> Prediction:
        """Return what a job of that shape will take.

        What is believed goes from the general to the particular, and at each stage half of it is left by each
        job that was seen: the models file; the other sizes, scaled; the size, whatever the steps; the shape
        itself. For a device type that drew nothing of this kind with this model, and for None, it is the mean
        over those that did, weighted by how many jobs each drew. Raises UnknownModel.
        """
        believed = _from_models_file(self._models.get(shape.model), shape)
        of_device = self._seen.get((shape.kind, shape.model), {})
        if device in of_device:
            of_device = {device: of_device[device]}
        if of_device:
            believed = _pooled([(own.times(shape, believed), own.jobs) for own in of_device.values()])
        cost_ms = _whole_ms(believed.step_us * shape.steps + believed.rest_us)
        return Prediction(
            cost_ms=cost_ms, step_ms=min(cost_ms, _whole_ms(believed.step_us)), seen=believed.seen
        )


def _from_models_file(entry: ModelEntry, shape: Shape) -> _Times:
    """Return the entry's figure, all of it in the steps: nothing says what share the rest would have."""
    variation = shape.kind is RenderKind.VARIATION
    steps = steps_done(
        entry.steps,
        kind=shape.kind,
        strength_permille=entry.variation_strength_permille if variation else None,
        stop_percent=100,
        parts=1,
    )
    cost_ms = entry.predicted_ms(shape.kind, shape.width, shape.height)
    return _Times(cost_ms * 1000 / steps, 0.0, seen=0)


class _Seen:
    """What one device type drew of one kind with one model."""

    def __init__(self, rows: Sequence[Learned]) -> None:
        self.jobs = sum(row.seen for row in rows)
        """How many it drew."""
        # A larger grid costs more than its pixels; upscales are drawn in tiles of one size.
        self._exponent = 1.0 if rows[0].shape.kind.is_upscale else PIXELS_EXPONENT
        self._of_shape = {row.shape: _Times(row.step_us, row.rest_us, row.seen) for row in rows}
        of_pixels: defaultdict[int, list[tuple[_Times, float]]] = defaultdict(list)
        for shape, times in self._of_shape.items():
            of_pixels[shape.pixels].append((times, min(times.seen, _MOST_JOBS)))
        self._of_pixels = {pixels: _pooled(times) for pixels, times in of_pixels.items()}

    def times(self, shape: Shape, believed: _Times) -> _Times:
        """Return what is believed of a shape's times after what was seen here; `seen` is of the shape."""
        for of_more in (self._of_other_sizes(shape.pixels), self._of_pixels.get(shape.pixels)):
            believed = _corrected(believed, of_more)
        of_shape = self._of_shape.get(shape)
        believed = _corrected(believed, of_shape)
        return _Times(believed.step_us, believed.rest_us, 0 if of_shape is None else of_shape.seen)

    def _of_other_sizes(self, pixels: int) -> _Times | None:
        """Return the times of all other sizes, scaled, each counted by its jobs and by how near it is.

        Nearness is the inverse square of the distance, as in Shepard, "A two-dimensional interpolation
        function for irregularly-spaced data" (ACM 1968); distance is the logarithm of the pixels' ratio.
        """
        scaled = [
            (
                times.scaled((pixels / other) ** self._exponent),
                min(times.seen, _MOST_JOBS) / math.log(pixels / other) ** 2,
            )
            for other, times in self._of_pixels.items()
            if other != pixels
        ]
        return _pooled(scaled) if scaled else None


def _corrected(believed: _Times, seen: _Times | None) -> _Times:
    """Return what is believed after what was seen; the more jobs say so, the less of the old is left."""
    if seen is None:
        return believed
    return _pooled([(believed, _DOUBT**seen.seen), (seen, 1 - _DOUBT**seen.seen)])


def _pooled(weighted: Sequence[tuple[_Times, float]]) -> _Times:
    """Return the weighted mean of times; their jobs add up."""
    whole = math.fsum(weight for _, weight in weighted)
    return _Times(
        math.fsum(times.step_us * weight for times, weight in weighted) / whole,
        math.fsum(times.rest_us * weight for times, weight in weighted) / whole,
        sum(times.seen for times, _ in weighted),
    )


def _whole_ms(us: float) -> int:
    return min(_MOST_MS, max(1, round(us / 1000)))
