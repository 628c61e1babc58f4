"""Which release's scheduler leads a cluster, and who takes the lead from whom."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import ray
from pydantic import ValidationError
from structlog.testing import capture_logs

from scheduler.cluster.ray_session import ensure_scheduler, start_scheduler, stop_actors
from scheduler.cluster.scheduler_actor import lives
from scheduler.settings import RayCluster, Settings, Worker
from tests.cluster.small_ray import NAMESPACE

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.usefixtures("local_ray")]

OLD, NEW = "0.9.0", "0.10.0"


@ray.remote(num_cpus=0)
class Leads:
    """In the place of a scheduler of another release."""

    def close_down(self, within_s: float) -> bool:
        return True


@ray.remote(num_cpus=0)
class Stands:
    """In the place of a worker."""


@ray.remote(num_cpus=0)
class EndsWith:
    """In the place of a scheduler during whose last words a worker ends."""

    def __init__(self, worker: str) -> None:
        self._worker = worker

    def close_down(self, within_s: float) -> None:
        ray.kill(ray.get_actor(self._worker, namespace=NAMESPACE))
        while lives(self._worker, NAMESPACE):
            pass  # asking takes a moment


@pytest.fixture
def another_leads() -> Iterator[str]:
    name = f"scheduler-{NEW}"
    Leads.options(name=name, namespace=NAMESPACE, lifetime="detached").remote()  # type: ignore[attr-defined]
    yield name
    stop_actors(NAMESPACE)


def settings(folder: Path, release: str) -> Settings:
    return Settings(
        data_dir=folder,
        release=release,
        ray=RayCluster(namespace=NAMESPACE),
        worker=Worker(engine="timed", timed_step_ms=0),
    )


def test_front_door_of_an_older_release_brings_no_scheduler_where_a_newer_leads(
    tmp_path: Path, another_leads: str
) -> None:
    dsn = "postgresql://postgres@/postgres?host=/nowhere"
    ensure_scheduler(settings(tmp_path, OLD), dsn, leads=another_leads)
    assert not lives(f"scheduler-{OLD}", NAMESPACE)
    ensure_scheduler(settings(tmp_path, "0.11.0"), dsn, leads=another_leads)
    assert lives("scheduler-0.11.0", NAMESPACE), "a newer one takes the lead by itself"
    ensure_scheduler(settings(tmp_path, OLD), dsn, leads="scheduler-0.12.0")
    assert lives(f"scheduler-{OLD}", NAMESPACE), "the one that led is not there any more"


def test_a_scheduler_whose_machine_is_not_there_waits_for_it_and_says_so(tmp_path: Path) -> None:
    elsewhere = RayCluster(namespace=NAMESPACE, scheduler_resource="of-no-machine")
    wanted = settings(tmp_path, OLD).model_copy(update={"ray": elsewhere})
    with capture_logs() as logs:
        start_scheduler(wanted, "postgresql://postgres@/postgres?host=/nowhere")
    assert [line["resource"] for line in logs if line["log_level"] == "warning"] == ["of-no-machine"]
    assert stop_actors(NAMESPACE) == [f"scheduler-{OLD}"]


@pytest.mark.parametrize("name", ["CPU", "GPU", ""])
def test_what_others_take_is_no_resource_of_the_scheduler(name: str) -> None:
    with pytest.raises(ValidationError):
        RayCluster(scheduler_resource=name)


def test_what_ends_by_itself_meanwhile_does_not_keep_the_others_from_being_ended() -> None:
    names = [f"scheduler-{NEW}", f"worker-{NEW}-here/gpu-0", f"worker-{NEW}-here/gpu-1"]
    for name in names[1:]:
        Stands.options(name=name, namespace=NAMESPACE, lifetime="detached").remote()  # type: ignore[attr-defined]
    EndsWith.options(name=names[0], namespace=NAMESPACE, lifetime="detached").remote(names[1])  # type: ignore[attr-defined]
    assert stop_actors(NAMESPACE, within_s=20) == names
    assert stop_actors(NAMESPACE) == []


async def test_scheduler_that_ray_starts_anew_leaves_the_lead_to_whoever_has_it_by_then(
    tmp_path: Path, another_leads: str, database: str, connection: asyncpg.Connection
) -> None:
    ensure_scheduler(settings(tmp_path, OLD), database, leads="")
    old = ray.get_actor(f"scheduler-{OLD}", namespace=NAMESPACE)
    pid = await old.pid.remote()
    async with asyncio.timeout(60):
        while await connection.fetchval("SELECT holder FROM scheduler.leader") != f"scheduler-{OLD}":
            pass  # asking takes a moment
        os.kill(pid, signal.SIGSTOP)
        epoch = await connection.fetchval(
            "UPDATE scheduler.leader SET epoch = epoch + 1, holder = $1 RETURNING epoch", another_leads
        )
        os.kill(pid, signal.SIGKILL)
        while lives(f"scheduler-{OLD}", NAMESPACE):
            await connection.execute("SELECT")
    assert await connection.fetchval("SELECT epoch FROM scheduler.leader") == epoch
