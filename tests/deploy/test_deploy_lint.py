"""Our deployment files can be read by what reads them, asked without a cluster or a daemon.

That is form. Whether the files agree with each other and with the code is test_deploy_agreement.py; whether
what they start runs, test_deploy_start.py.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest

from tests.deploy.manifests import DEPLOY, KUSTOMIZE, TOOLS, built, combined, containers
from tests.deploy.units import units

COMPONENTS = sorted(path.name for path in (KUSTOMIZE / "components").iterdir())
COMBINATIONS = [
    chosen for size in range(len(COMPONENTS) + 1) for chosen in itertools.combinations(COMPONENTS, size)
]
FOLDERS = ["base", "overlays/small", "overlays/gpu-pool", "migrate/before", "migrate/after"]

# The newest that the package knows.
KUBERNETES = "1.37"
# Of operators: no schema of theirs comes with Kubernetes. What we rely on in them is asked one by one.
FOREIGN = {"RayCluster", "PodMonitor", "PrometheusRule", "ScrapeConfig"}

_YAML = """
extends: default
rules:
  line-length: {max: 130, allow-non-breakable-inline-mappings: true}
  document-start: disable
  comments: {min-spaces-from-content: 1}
  indentation: {indent-sequences: consistent}
"""
# PrometheusRule objects are written by a program.
_WRITTEN = {KUSTOMIZE / "components" / "monitoring" / "rules.yaml"}


def yaml_files() -> list[Path]:
    found = [*DEPLOY.glob("*.yaml"), *KUSTOMIZE.rglob("*.yaml")]
    return sorted(set(found) - _WRITTEN)


def test_yamllint_finds_nothing() -> None:
    done = subprocess.run(
        [TOOLS / "yamllint", "--strict", "--config-data", _YAML, *yaml_files()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing() -> None:
    file = DEPLOY / "docker" / "Dockerfile"
    done = subprocess.run([TOOLS / "hadolint", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_are_compose_files(file: str) -> None:
    reader = compose_spec.PyOptions(apply_merge=True)
    reader.from_yaml((DEPLOY / file).read_text()).validate()


def test_systemd_reads_every_unit_without_a_word(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze: apt-get install systemd")
    copies = []
    for unit in units():
        # It looks whether the programs exist.
        copies.append(tmp_path / unit.name)
        copies[-1].write_text(unit.read_text().replace("/opt/darkroom/bin", str(TOOLS)))
    done = subprocess.run(
        ["systemd-analyze", "verify", *copies],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_LOG_COLOR": "0"},
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_builds_what_kubernetes_takes(folder: str) -> None:
    _assert_taken(built(folder))


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_every_choice_of_components_builds_what_kubernetes_takes(
    components: tuple[str, ...], tmp_path: Path
) -> None:
    _assert_taken(combined(tmp_path, components))


def _assert_taken(resources: list[dict[str, Any]]) -> None:
    for resource in resources:
        if resource["kind"] not in FOREIGN:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def test_operators_get_what_they_need() -> None:
    """Their schemas are too large to keep here, so this asks for what they require, by name.

    A field that they do not know is what it cannot see.
    """
    kinds: dict[str, list[dict[str, Any]]] = {}
    for resource in built("overlays/gpu-pool"):
        kinds.setdefault(resource["kind"], []).append(resource)
    (cluster,) = kinds["RayCluster"]
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    (settings,) = [
        one for one in kinds["ConfigMap"] if one["metadata"]["name"].startswith("darkroom-settings")
    ]
    assert settings["data"]["DARKROOM_SCALING__MAX_WORKERS"] == str(
        spec["workerGroupSpecs"][0]["maxReplicas"]
    )
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        # KubeRay makes a command line of them, and of text alone.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources"} <= container.keys()
        # KubeRay puts its own command there.
        assert "command" not in container
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "any"},
            "spec": group["template"]["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    for group in spec["workerGroupSpecs"]:
        assert {"groupName", "replicas", "minReplicas", "maxReplicas"} <= group.keys()
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for monitor in kinds["PodMonitor"]:
        assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
        assert {"selector", "podMetricsEndpoints"} <= monitor["spec"].keys()
    for rule in kinds["PrometheusRule"]:
        assert rule["apiVersion"] == "monitoring.coreos.com/v1"
        assert all({"name", "rules"} <= group.keys() for group in rule["spec"]["groups"])
    (scrape,) = kinds["ScrapeConfig"]
    assert scrape["apiVersion"] == "monitoring.coreos.com/v1alpha1"
    assert scrape["spec"]["staticConfigs"][0]["targets"]


def test_the_overlay_that_operators_are_shown_builds(tmp_path: Path) -> None:
    page = (DEPLOY / "README.md").read_text()
    (overlay,) = re.findall(r"^```yaml\n(# kustomization.yaml\n.*?)^```", page, re.DOTALL | re.MULTILINE)
    ours = os.path.relpath(KUSTOMIZE, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(overlay.replace("../deploy/kustomize", ours))
    resources = built(tmp_path)
    _assert_taken(resources)
    images = {container["image"].partition(":")[0] for container in containers(resources)}
    assert images == {"registry.internal/darkroom-control", "registry.internal/darkroom-worker"}
