"""Who is on a Ray cluster: its machines, and the actors of ours, with their releases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import ray
import ray.util

from scheduler.cluster.ray_session import ray_session
from scheduler.settings import RayCluster


@dataclass(frozen=True, kw_only=True)
class Census:
    """What a cluster has."""

    machines: int
    gpus: int
    schedulers: Mapping[str, int]
    """How many there are of each release."""
    workers: Mapping[str, int]
    """The same."""


def take_census(cluster: RayCluster) -> Census:
    """Join a cluster as a driver, count, and leave. Raises RuntimeError, saying what to do, if it cannot be
    joined; also where Ray or Python are other versions there.
    """
    assert cluster.address is not None, "a local Ray is another process's own"
    schedulers: Counter[str] = Counter()
    workers: Counter[str] = Counter()
    with ray_session(cluster):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] != cluster.namespace:
                continue
            kind, _, rest = actor["name"].partition("-")
            release = rest.partition("-")[0]
            if kind == "scheduler":
                schedulers[release] += 1
            elif kind == "worker":
                workers[release] += 1
    return Census(
        machines=len({node["NodeManagerHostname"] for node in nodes}),
        gpus=round(sum(node["Resources"].get("GPU", 0) for node in nodes)),
        schedulers=schedulers,
        workers=workers,
    )
