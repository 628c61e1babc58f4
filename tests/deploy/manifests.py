"""The deployment files as values."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from scheduler.settings import FrontDoor, Ops

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUSTOMIZE = DEPLOY / "kustomize"
TOOLS = Path(sys.executable).parent
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()

GRPC, OPS = FrontDoor().port, Ops().port
# Ray's, on every node: each tool is told them, and Prometheus and the probes ask there.
GCS, RAY_METRICS, RAY_AGENT = 6379, 8080, 52365


def built(folder: str | Path) -> list[dict[str, Any]]:
    """Return the resources that kustomize builds from a folder of ours, or from any."""
    if not _kustomize_has_components():
        pytest.skip("there is no kubectl of 1.27 or newer: https://kubernetes.io/docs/tasks/tools/")
    return list(yaml.safe_load_all(_built_text(KUSTOMIZE / folder)))


@functools.cache
def _built_text(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@functools.cache
def _kustomize_has_components() -> bool:
    if shutil.which("kubectl") is None:
        return False
    asked = ["kubectl", "version", "--client", "--output=json"]
    version = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    # Before 1.27 it was another tool, and Debian's is as old as that.
    return str(version.get("kustomizeVersion", "v0")).startswith("v5")


def combined(folder: Path, components: Sequence[str]) -> list[dict[str, Any]]:
    """Return the resources of the base with these components, by an overlay that is written to `folder`."""
    ours = os.path.relpath(KUSTOMIZE, folder.resolve())
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{ours}/base"],
        "components": [f"{ours}/components/{component}" for component in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return built(folder)


def composed() -> dict[str, Any]:
    """Return compose.yaml, its anchors and merges resolved."""
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return read


def containers(resource: Any) -> Iterator[dict[str, Any]]:
    """Return every container in a resource, wherever it is, init containers among them."""
    if isinstance(resource, dict):
        for name, value in resource.items():
            if name in ("containers", "initContainers"):
                yield from value
            else:
                yield from containers(value)
    elif isinstance(resource, list):
        for value in resource:
            yield from containers(value)


def probes() -> set[tuple[int, str]]:
    """Return the ports and paths that anything here asks by HTTP whether something is well."""
    found = set()
    text = DOCKERFILE + (DEPLOY / "compose.yaml").read_text()
    for port, path in re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/-]+)'", text):
        found.add((int(port), path))
    for container in containers(built("overlays/gpu-pool")):
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if kind in container:
                asks = container[kind]["httpGet"]
                found.add((ports.get(asks["port"], asks["port"]), asks["path"]))
    return found
