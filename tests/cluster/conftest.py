"""A small local Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from scheduler.cluster.ray_session import start_local_ray
from tests.cluster.small_ray import NAMESPACE, NODE


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One node with two logical GPUs."""
    # A short path: a Unix socket's name ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder:
        start_local_ray(Path(folder), gpus=2, namespace=NAMESPACE, node_name=NODE)
        yield
        ray.shutdown()
