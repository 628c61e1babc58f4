"""How far predictions are off on 60,000 real service times, beside the models file's word alone."""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from gpu_worker.models import Models
from scheduler.estimator import Estimator, Observation
from tests.estimator.estimator_building import ENTRY, GPU, a_shape, rows_of

# Of the Stable Diffusion beta of August 2022; not part of the repository.
_TIMES = Path(__file__).parents[3] / "shared" / "data" / "sdbeta_service_times.csv.gz"


@pytest.fixture(scope="module")
def jobs() -> list[Observation]:
    """Every job of the file that did a step, in random order. It has whole times; all are in the steps."""
    if not _TIMES.exists():
        pytest.skip(f"the service times to calibrate on are not at {_TIMES}")
    with gzip.open(_TIMES, "rt", newline="") as file:
        jobs = [
            Observation(
                shape=a_shape(int(row["width"]), int(row["height"]), int(row["steps"])),
                device=GPU,
                step_us=float(row["wall_s"]) * 1e6 / int(row["steps"]),
                rest_us=0.0,
            )
            for row in csv.DictReader(file)
            if row["steps"] != "0"
        ]
    random.Random(0).shuffle(jobs)
    return jobs


def _told(imagine_ms: float) -> Models:
    """Models whose file says what 512 by 512 with 50 steps takes."""
    entry = replace(ENTRY, steps=50, imagine_ms=round(imagine_ms))
    return Models(default=entry, entries={entry.name: entry})


_PRODUCT = _told(60_000)
"""The rule of thumb: 60 jobs in a GPU-hour. These GPUs drew one picture a job and took 5 s."""


def _fitted(jobs: Sequence[Observation]) -> Models:
    """A models file as good as can be: its figure is the median of these jobs."""
    return _told(median(job.step_us * 50 / 1000 for job in jobs if job.shape == a_shape(steps=50)))


def test_second_half_of_the_jobs_is_predicted_from_the_first(jobs: list[Observation]) -> None:
    half = len(jobs) // 2
    learned, told, fitted = _errors(jobs[:half], jobs[half:])
    assert learned < 0.08
    assert learned < fitted < told


def test_sizes_never_seen_are_predicted_from_their_neighbours(jobs: list[Observation]) -> None:
    sizes = sorted({(job.shape.width, job.shape.height) for job in jobs} - {(512, 512)})
    unseen = set(random.Random(0).sample(sizes, k=len(sizes) // 4))
    past = [job for job in jobs if (job.shape.width, job.shape.height) not in unseen]
    future = [job for job in jobs if (job.shape.width, job.shape.height) in unseen]
    learned, told, _ = _errors(past, future)
    assert learned < 0.15
    assert learned < told


def _errors(past: Sequence[Observation], future: Sequence[Observation]) -> tuple[float, float, float]:
    """Return the errors on `future`: learned from `past`, by the rule of thumb, by a fitted models file."""
    learned = _error(Estimator(_PRODUCT, rows_of(past)), future)
    told, fitted = _error(Estimator(_PRODUCT), future), _error(Estimator(_fitted(past)), future)
    print(
        f"\nmedian relative error on {len(future)} jobs: learned {learned:.3f}, "
        f"rule of thumb {told:.3f}, fitted models file {fitted:.3f}"
    )
    return learned, told, fitted


def _error(estimator: Estimator, jobs: Sequence[Observation]) -> float:
    """Return the median of how far predictions are off, relative to what the job took."""
    return median(
        abs(estimator.predict(job.shape).cost_ms - took_ms) / took_ms
        for job in jobs
        if (took_ms := job.step_us * job.shape.steps / 1000)
    )
