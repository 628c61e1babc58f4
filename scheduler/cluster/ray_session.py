"""Joins a Ray cluster, or runs a local one that ends with this process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.util

from scheduler.cluster.ray_fleet import actor_name
from scheduler.cluster.scheduler_actor import SchedulerActor
from scheduler.settings import RayCluster, Settings

LOCAL_NODE = "local"

_SchedulerActor: Any = SchedulerActor  # Ray's decorator adds what no type says


@contextmanager
def ray_session(cluster: RayCluster, *, show_logs: bool = False) -> Iterator[None]:
    """Be a Ray driver while the context is open.

    Given no address, a local Ray is started with as many logical GPUs as workers are wanted: an existing one,
    or a stale note of one, is never joined by accident. Raises RuntimeError, saying what to do, if a given
    cluster cannot be joined.
    """
    if cluster.address is not None:
        _join(cluster.address, cluster.namespace, show_logs=show_logs)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # A Unix socket's path ends at 107 bytes, so the folder is a short one.
    with tempfile.TemporaryDirectory(prefix="dr-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            namespace=cluster.namespace,
            # The loop, the front door and the workers are processes of ours that claim no CPU;
            # Ray needs one to exist.
            num_cpus=1,
            num_gpus=cluster.local_gpus,
            include_dashboard=False,
            log_to_driver=show_logs,
            logging_level="ERROR",
            _node_name=LOCAL_NODE,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


def ensure_scheduler(settings: Settings, dsn: str) -> None:
    """Start the scheduler of this release, unless the cluster has it already.

    Raises RuntimeError if pictures would land on several machines' own disks.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if settings.artifacts.startswith("file://") and len({node["NodeManagerHostname"] for node in nodes}) > 1:
        raise RuntimeError(
            f"the artifact store {settings.artifacts} is a folder, but the cluster has several machines: "
            "give artifacts_url an address that all of them reach, such as s3://bucket/prefix"
        )
    _SchedulerActor.options(
        name=actor_name("scheduler"),
        namespace=settings.ray.namespace,
        lifetime="detached",
        get_if_exists=True,
    ).remote(settings.model_dump_json(), dsn)


def stop_actors(namespace: str) -> list[str]:
    """End the scheduler and the workers of this release; returns their names.

    Rows keep everything that waits.
    """
    stopped = []
    for named in ray.util.list_named_actors(all_namespaces=True):
        name = named["name"]
        if named["namespace"] == namespace and name.startswith(
            (actor_name("scheduler"), actor_name("worker"))
        ):
            ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
            stopped.append(name)
    return stopped


def _join(address: str, namespace: str, *, show_logs: bool) -> None:
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=show_logs, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as trouble:
        raise RuntimeError(
            f"cannot join the Ray cluster at {address}: {trouble}. Each front door runs beside a raylet of "
            "the cluster; start one here with `ray start --address HEAD:6379 --num-cpus 0 --num-gpus 0`, "
            'then give ray.address = "auto"'
        ) from trouble
