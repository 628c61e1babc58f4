"""The walls between the packages stand, and the code is linted, typed and generated as it is committed.

Each test runs the tool that a person would run, and fails with what the tool said.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent


def run(*command: str | Path) -> None:
    """Run a tool of this environment in the root of the checkout; fails with what it printed."""
    done = subprocess.run(
        [TOOLS / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", "--quiet")


def test_every_file_is_formatted() -> None:
    run("ruff", "format", "--check", "--quiet")


@pytest.mark.timeout(900)
def test_the_three_packages_pass_mypy_strict() -> None:
    run("mypy", "--no-error-summary")


def test_import_contracts_hold() -> None:
    run("lint-imports", "--no-cache")


def test_protos_pass_buf_lint() -> None:
    run("buf", "lint", "proto")


def test_generated_code_and_reference_are_what_the_protos_give(tmp_path: Path) -> None:
    made = subprocess.run(
        [ROOT / "tests" / "generate_protos.sh", tmp_path],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    generated = {path.relative_to(tmp_path): path.read_text() for path in _generated(tmp_path)}
    committed = {path.relative_to(ROOT): path.read_text() for path in _generated(ROOT)}
    assert generated.keys() == committed.keys()
    stale = [str(path) for path, text in generated.items() if committed[path] != text]
    assert stale == [], "run tests/generate_protos.sh and commit"


def _generated(folder: Path) -> Iterator[Path]:
    for package in ("scheduler/v1", "billing/v1"):
        yield from (folder / package).glob("*_pb2*.py*")
    yield folder / "proto" / "reference.md"


SHARED = ("gpu_worker.contract", "gpu_worker.prompt", "gpu_worker.models")


@pytest.mark.parametrize("module", [*SHARED, "scheduler.policy"])
def test_what_everybody_may_import_needs_only_the_standard_library(module: str) -> None:
    """The import contracts name what is forbidden there; this says what is allowed."""
    allowed = {*sys.stdlib_module_names, *(SHARED if module in SHARED else (module,))}
    path = ROOT / module.replace(".", "/")
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        for name in _imports(file):
            inside = any(name == known or name.startswith(f"{known}.") for known in allowed)
            assert inside, f"{file.relative_to(ROOT)} imports {name}"


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, level=level):
                assert level == 0, f"{file} imports relative to itself, which the walls cannot see"
                yield module or ""


@pytest.mark.parametrize(
    "script", ["deploy/environment.sh", "deploy/quickstart.sh", "tests/run.sh", ".ci/run"]
)
def test_scripts_are_executable_and_bash_can_read_them(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK), f"chmod +x {script}"
    subprocess.run(["bash", "-n", path], check=True)


def test_what_sends_traces_is_asked_for_only_where_they_are_sent() -> None:
    """The import contracts tell packages apart, not their parts: the API of OpenTelemetry is everybody's."""
    asking = {
        str(path.relative_to(ROOT))
        for package in ("scheduler", "gpu_worker", "billing")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^\s*(from|import) opentelemetry\.(sdk|exporter)", path.read_text(), re.MULTILINE)
    }
    assert asking == {"scheduler/trace_export.py", "gpu_worker/trace_export.py"}


def test_the_client_imports_nothing_that_only_a_server_has() -> None:
    """Here the server's packages are installed, so they are blocked to see whether anything asks for them."""
    blocked = (
        "ray",
        "torch",
        "diffusers",
        "numpy",
        "asyncpg",
        "pydantic",
        "aiohttp",
        "prometheus_client",
        "structlog",
        "opentelemetry.sdk",
        "opentelemetry.exporter",
    )
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import scheduler.client, scheduler.client.cli\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
