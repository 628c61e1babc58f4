"""`darkroom top` and `darkroom doctor` against a running service, over a real Ray."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.service.nodes import a_node, cluster_environment, front_door, stop_everything
from tests.service.people import People
from tests.service.process import ServiceProcess
from tests.service.shell import DARKROOM, Person

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


async def test_the_board_of_an_operator_has_everybodys_runs_and_ones_own_only_ones_own(
    running: ServiceProcess, people: People, tmp_path: Path
) -> None:
    key = await people.key("ann")
    ann, admin = (Person(running.address, each, tmp_path) for each in (key, running.admin_key))
    submitted = ann.gets("imagine", "a lighthouse", "--fast", "--no-wait")["job"]
    fleet = admin.gets("top")
    assert fleet["queues"]["gpus"] == len(fleet["workers"]) == 3
    own = ann.gets("top")
    assert own["account"]["name"].startswith("accounts/ann-")
    assert {job["uid"] for job in own["jobs"]} <= {submitted["uid"]}
    ann.types("watch", submitted["uid"])
    assert ann.gets("top")["jobs"] == []


def diagnosed(folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """Type `darkroom doctor` in a folder; return what it found, by what it is of."""
    done = subprocess.run(
        [DARKROOM, "doctor", *arguments, "--json"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.stderr == ""
    return {one["what"]: one for one in json.loads(done.stdout)["checks"]}


def unwell(found: dict[str, Any], names: Sequence[str]) -> list[Any]:
    """Return what was not found well of these. The machine that runs the tests is nobody's promise."""
    return [found.get(name, name) for name in names if name not in found or found[name]["level"] != "ok"]


CLIENT = ("client", "settings", "address", "service", "account", "fast", "relax", "workers")
DATABASE = ("database", "pooler", "schema", "clock", "scheduler", "releases")
PORTS = ("port", "ops port", "front door", "metrics", "scheduler metrics")


def where(running: ServiceProcess) -> dict[str, str]:
    """Settings of a client of the service, and of the service itself."""
    return {
        "DARKROOM_ADDRESS": running.address,
        "DARKROOM_KEY": running.admin_key,
        "DARKROOM_FRONTDOOR__PORT": running.address.rpartition(":")[2],
        "DARKROOM_OPS__PORT": running.ops.rpartition(":")[2],
    }


def test_the_doctor_finds_a_running_service_well(running: ServiceProcess, tmp_path: Path) -> None:
    found = diagnosed(tmp_path, "--dsn", running.dsn, "--data-dir", str(tmp_path), **where(running))
    assert unwell(found, (*CLIENT, *DATABASE, *PORTS, "Ray")) == []
    assert found["workers"]["sentence"] == "3 of 3 take jobs"
    assert found["releases"]["sentence"] == "frontdoor-0.1.0, scheduler-0.1.0"


@pytest.mark.faults
def test_the_doctor_sees_who_is_on_a_cluster(database: str, data_dir: Path) -> None:
    environment = cluster_environment()
    head = ("--head", "--port", "0", "--include-dashboard=false", "--temp-dir", str(data_dir / "ray"))
    with a_node("node-a", *head, environment=environment) as node:
        with front_door(node.address, database, data_dir, environment) as first:
            first.wait_for_worker("node-a/gpu-0")
            cluster = {
                "DARKROOM_RAY__ADDRESS": node.address,
                "DARKROOM_DATABASE__DSN": database,
                "DARKROOM_ARTIFACTS_URL": f"file://{data_dir}/artifacts",
            }
            found = diagnosed(data_dir, **environment | where(first) | cluster)
            assert unwell(found, (*CLIENT, *DATABASE, *PORTS, "Ray", "Ray token", "schedulers")) == []
            assert found["Ray"]["sentence"] == "machines: 1, GPUs: 1"
            assert found["workers on Ray"]["sentence"] == "1 of 0.1.0"
        stop_everything(node.address, environment)
