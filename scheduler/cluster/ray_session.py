"""Joins a Ray cluster, or runs a local one that ends with this process."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.util
import structlog
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from scheduler.cluster.ray_fleet import actor_name
from scheduler.cluster.scheduler_actor import SchedulerActor, lives
from scheduler.settings import RayCluster, Settings

LOCAL_NODE = "local"

# A Unix socket's path ends at 107 bytes, so the folders of local Rays are short ones.
_FOLDERS = Path("/tmp")  # noqa: S108 - each is made by mkdtemp, which leaves nothing to guess
# Not the `dr-ray-` of releases that held no lock: theirs look free while they are in use.
_PREFIX = "dr-local-"

_ANSWER_S = 2.0

# How often a local Ray is started before it is given up.
_STARTS = 3

_log = structlog.get_logger()

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
    remove_left_folders()
    with local_folder() as folder:
        start_local_ray(folder, gpus=cluster.local_gpus, namespace=cluster.namespace, show_logs=show_logs)
        try:
            yield
        finally:
            ray.shutdown()


def start_local_ray(
    folder: Path, *, gpus: int, namespace: str, node_name: str = LOCAL_NODE, show_logs: bool = False
) -> None:
    """Start a Ray of this process with `gpus` GPUs, its files in `folder`; logical ones, if there are fewer.

    Ray's processes find their ports by trying, and give each other 30 s to come up: on a busy machine one of
    many starts fails. So a failed start is cleared away and tried again; raises RuntimeError, saying what
    to look at, if that happens three times.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and gpus > len(visible.split(",") if visible else ()):
        # Ray starts none beyond those; who draws on logical ones has nothing to choose from.
        del os.environ["CUDA_VISIBLE_DEVICES"]
    for number in range(1, _STARTS + 1):
        try:
            ray.init(
                address="local",
                namespace=namespace,
                # The loop, the front door and the workers are processes of ours that claim no CPU;
                # Ray needs one to exist.
                num_cpus=1,
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=show_logs,
                logging_level="ERROR",
                _node_name=node_name,
                _temp_dir=str(folder / f"start-{number}"),
            )
            return
        except Exception as trouble:  # Ray raises a bare Exception for a start that took too long
            ray.shutdown()
            _log.warning("ray did not start", number=number, trouble=str(trouble))
            if number == _STARTS:
                raise RuntimeError(
                    f"Ray did not start on this machine in {_STARTS} tries: {trouble}. Is there memory "
                    f"and disk? Its logs were in {folder}, which is removed when this process ends"
                ) from trouble


@contextmanager
def local_folder(parent: Path = _FOLDERS) -> Iterator[Path]:
    """Make a folder for a local Ray, held while the context is open, then remove it.

    A folder whose process was killed is held no more, and `remove_left_folders` of the next finds it.
    """
    made = Path(tempfile.mkdtemp(prefix="dr-new-", dir=parent))
    held = os.open(made, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        # It gets the name that is looked for once it is held, so nobody finds it free in between.
        folder = made.rename(made.with_name(made.name.replace("dr-new-", _PREFIX)))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)


def remove_left_folders(parent: Path = _FOLDERS) -> None:
    """Remove the folders of local Rays whose processes were killed; those of other users stay."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            held = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError:
            continue  # another user's, or removed by another process meanwhile
        try:
            if os.fstat(held).st_uid == os.getuid():
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # in use
        finally:
            os.close(held)


def ensure_scheduler(settings: Settings, dsn: str, *, leads: str) -> None:
    """Start the scheduler of this release, unless the cluster has it already, or a newer one leads it.

    `leads` is the actor that the leader row names, which may have ended. So a front door that starts brings
    its scheduler along, and one of the release before that is started once more brings nothing back. Raises
    what `start_scheduler` does.
    """
    release = leads.partition("-")[2]
    if release != settings.release and lives(leads, settings.ray.namespace):
        if _in_order(release) > _in_order(settings.release):
            _log.info("a scheduler of a newer release leads", scheduler=leads)
            return
        _log.info("the lead is taken from a scheduler of an older release", scheduler=leads)
    start_scheduler(settings, dsn)


def start_scheduler(settings: Settings, dsn: str) -> None:
    """Start the scheduler of this release, which takes the lead, unless the cluster has it already.

    Raises RuntimeError if pictures would land on several machines' own disks.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if settings.artifacts.startswith("file://") and len({node["NodeManagerHostname"] for node in nodes}) > 1:
        raise RuntimeError(
            f"the artifact store {settings.artifacts} is a folder, but the cluster has several machines: "
            "give artifacts_url an address that all of them reach, such as s3://bucket/prefix"
        )
    wanted = settings.ray.scheduler_resource
    if not any(node["Resources"].get(wanted) for node in nodes):
        _log.warning(
            "the scheduler waits for a machine that offers the Ray resource of ray.scheduler_resource",
            resource=wanted,
        )
    _SchedulerActor.options(
        name=actor_name("scheduler", release=settings.release),
        namespace=settings.ray.namespace,
        lifetime="detached",
        get_if_exists=True,
        # A demand, which waits for such a machine. For a wish (a soft affinity, a label with a fallback) Ray
        # 2.60 takes any other, if that machine is not among those that the asking one has heard of yet.
        resources={wanted: 0.001},
    ).remote(settings.model_dump_json(), dsn)


def _in_order(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in release.split("."))


def stop_actors(namespace: str, within_s: float = 0.0) -> list[str]:
    """End the scheduler and the workers, of whichever release they are; returns their names.

    What runs is handed over first, if that is done `within_s`, and rows keep everything that waits. Ray's
    autoscaler may then take back every machine on which nothing runs: it would keep for ever what a scheduler
    asked for last, whether or not the one that ends now is set to scale.
    """
    ours = ("scheduler-", "worker-")
    names = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == namespace and actor["name"].startswith(ours)
    ]
    # The scheduler's name sorts first: one that lives starts another worker for each that dies.
    for name in sorted(names):
        try:
            actor = ray.get_actor(name, namespace=namespace)
        except ValueError:
            continue  # Ray's way of saying that it has ended meanwhile
        if name.startswith(ours[0]):
            with suppress(RayError):  # one that does not lead, or does not answer, hands nothing over
                ray.get(actor.close_down.remote(within_s), timeout=within_s + _ANSWER_S)
        ray.kill(actor, no_restart=True)
    request_resources(bundles=[])
    return sorted(names)


def _join(address: str, namespace: str, *, show_logs: bool) -> None:
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=show_logs, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, RayError) as trouble:
        raise RuntimeError(
            f"cannot join the Ray cluster at {address}: {trouble}. Each front door runs beside a raylet of "
            "the cluster; start one here with `ray start --address HEAD:6379 --num-cpus 0 --num-gpus 0`, "
            'then give ray.address = "auto"'
        ) from trouble
