"""A local Ray has a worker for each GPU that can be used, and says so where more are demanded."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.local_gpus import seen, settled
from scheduler.settings import Settings


def some_settings(**sections: Any) -> Settings:
    return Settings(**{"ray": {}, "worker": {}, **sections})


def decided(settings: Settings, gpus: int) -> tuple[int, str]:
    found = settled(settings, lambda: gpus)
    return found.ray.local_gpus, found.worker.device


@pytest.mark.parametrize(
    ("gpus", "workers", "device"), [(8, 8, "auto"), (2, 2, "auto"), (1, 1, "auto"), (0, 2, "cpu")]
)
def test_there_is_a_worker_for_each_gpu_and_two_on_a_cpu(gpus: int, workers: int, device: str) -> None:
    assert decided(some_settings(), gpus) == (workers, device)


@pytest.mark.parametrize(("gpus", "device"), [(8, "auto"), (3, "auto"), (0, "cpu")])
def test_as_many_as_are_wanted_if_there_are_gpus_for_them_or_none_at_all(gpus: int, device: str) -> None:
    assert decided(some_settings(ray={"local_gpus": 3}), gpus) == (3, device)


def test_more_than_there_are_gpus_are_refused_with_both_ways_out() -> None:
    with pytest.raises(RuntimeError, match=r"local_gpus = 4, but 1 GPUs.*set it to 0.*worker\.device = cpu"):
        settled(some_settings(ray={"local_gpus": 4}), lambda: 1)


def test_a_gpu_that_is_demanded_and_not_there_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"worker\.device = cuda, but no GPU can be used"):
        settled(some_settings(worker={"device": "cuda"}), lambda: 0)


@pytest.mark.parametrize("worker", [{"device": "cpu"}, {"engine": "timed"}])
@pytest.mark.parametrize(("wanted", "workers"), [(0, 2), (5, 5)])
def test_who_draws_on_no_gpu_needs_none(worker: dict[str, str], wanted: int, workers: int) -> None:
    assert decided(some_settings(ray={"local_gpus": wanted}, worker=worker), 1)[0] == workers


def test_a_cluster_stays_as_it_is_told() -> None:
    cluster = some_settings(
        ray={"address": "auto"}, database={"dsn": "postgresql://db/darkroom"}, artifacts_url="s3://pictures"
    )
    assert settled(cluster, lambda: 4) is cluster


@pytest.mark.parametrize(
    ("visible", "left"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0", 1),
        ("2, 3", 2),
        ("0,9,1", 1),
        ("GPU-8932f937,GPU-1f2b", 2),
        ("MIG-a,MIG-b,MIG-c,MIG-d,MIG-e,MIG-f", 6),
    ],
)
def test_hidden_gpus_are_none(visible: str | None, left: int) -> None:
    assert seen(4, visible) == left


@pytest.mark.parametrize("visible", [None, "0", "GPU-8932f937"])
def test_where_there_is_no_gpu_none_is_seen(visible: str | None) -> None:
    assert seen(0, visible) == 0
