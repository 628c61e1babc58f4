"""What is added in one place is in every other where it has to be."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import asyncpg

from scheduler.frontdoor.auth import SERVICES
from scheduler.store.jobs import JobKind
from scheduler.v1 import job_pb2
from tests.structure.pages import ROOT, blocks


async def test_every_kind_of_job_is_one_for_clients_readers_rows_and_the_database(
    connection: asyncpg.Connection,
) -> None:
    kinds = {kind.value for kind in JobKind}
    assert {
        field.name for field in job_pb2.CreateJobRequest.DESCRIPTOR.oneofs_by_name["spec"].fields
    } == kinds
    named = {name.removeprefix("JOB_KIND_").lower() for name in job_pb2.JobKind.DESCRIPTOR.values_by_name}
    assert named == {*kinds, "unspecified"}
    page = (ROOT / "proto" / "README.md").read_text()
    table = page.partition("## Kinds of jobs")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == kinds
    check = await connection.fetchval(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE conname = 'job_kind_check' AND conrelid = 'scheduler.job'::regclass"
    )
    assert set(re.findall(r"'(\w+)'", check)) == kinds


def test_every_method_of_the_api_is_one_of_the_client() -> None:
    tree = ast.parse((ROOT / "scheduler" / "client" / "aio.py").read_text())
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    offered = {method.name for service in SERVICES for method in service.methods}
    assert offered - called == set()


def test_stubs_come_of_the_command_on_the_page_for_clients(tmp_path: Path) -> None:
    (command,) = blocks((ROOT / "proto" / "README.md").read_text(), "sh")
    (tmp_path / "proto").symlink_to(ROOT / "proto")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, env={"PATH": path}, check=True)
    made = {file.stem.removesuffix("_pb2_grpc") for file in tmp_path.rglob("*_pb2_grpc.py")}
    assert made == {file.stem for file in (ROOT / "proto").rglob("*.proto")}


def test_every_wall_has_its_reason() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE))
    assert [contract["name"] for contract in contracts if contract["name"] not in rows] == []


def test_every_module_of_the_service_has_its_place_in_the_readme() -> None:
    page = (ROOT / "scheduler" / "README.md").read_text()
    named = {quoted.strip("/").rpartition("/")[2] for quoted in re.findall(r"`([\w/]+)`", page)}
    modules = {
        path.stem
        for folder in (".", "frontdoor", "cluster", "ops")
        for path in (ROOT / "scheduler" / folder).glob("*.py")
    }
    assert modules - named == {"__init__"}
