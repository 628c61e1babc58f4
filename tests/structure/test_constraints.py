"""What is installed is what `constraints.txt` says, and all of what `pyproject.toml` asks for is in it."""

from __future__ import annotations

import re
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_is_pinned_to_a_version_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    pinned = pins()
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes {pinned[name]}"


def test_nothing_is_installed_that_is_not_pinned() -> None:
    # What CONTRIBUTING has looked up in lists of unsafe versions is what is run, and all of it.
    # Not of the whole path: Ray puts what it brings along there.
    found = metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    installed = {canonicalize_name(one.metadata["Name"]) for one in found}
    # torch's build for CUDA brings these along, at the one version that it works with.
    of_cuda = {one for one in installed if one.startswith(("cuda-", "nvidia-", "triton"))}
    assert installed - of_cuda - pins().keys() <= {"darkroom", "pip"}


def test_torch_is_one_exact_version() -> None:
    assert re.fullmatch(r"[\d.]+", pins()["torch"])


def test_the_environment_has_the_pinned_versions() -> None:
    differing = {}
    for name, pinned in pins().items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # markers of the platform may leave a package out
        if installed.split("+")[0] != pinned:
            differing[name] = f"{installed}, pinned {pinned}"
    assert differing == {}
