"""A small local Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import ray

from tests.cluster.small_ray import NAMESPACE, NODE


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One node with two logical GPUs."""
    # A short path: a Unix socket's name ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=1,
            num_gpus=2,
            include_dashboard=False,
            namespace=NAMESPACE,
            log_to_driver=False,
            _node_name=NODE,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
