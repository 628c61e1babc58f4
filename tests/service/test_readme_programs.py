"""The programs of the README do what it says, as they stand, against a running service."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.people import People
from tests.service.process import ServiceProcess
from tests.structure.pages import ROOT, blocks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

ADDRESS, KEY = "127.0.0.1:7443", "dk_…"  # as in the README


@pytest.mark.parametrize("number", range(len(blocks((ROOT / "README.md").read_text(), "python"))))
def test_a_program_of_the_readme_draws_and_saves_pictures(
    running: ServiceProcess, people: People, tmp_path: Path, number: int
) -> None:
    program = blocks((ROOT / "README.md").read_text(), "python")[number]
    assert ADDRESS in program
    assert KEY in program
    key = asyncio.run(people.key("reader"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program.replace(ADDRESS, running.address).replace(KEY, key)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    pictures = list(tmp_path.rglob("*.png"))
    assert len({picture.name[:36] for picture in pictures}) == 1
    assert len(pictures) == 4
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
