"""Processes that share a run of the tests start each service once, not once each."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CONFTEST = """
from pathlib import Path

import pytest

from tests.conftest import pytest_collection_modifyitems as pytest_collection_modifyitems


def starts(what):
    with Path(__file__).with_name("started").open("a") as started:
        started.write(what + "\\n")


@pytest.fixture(scope="session")
def running():
    starts("the shared service")


@pytest.fixture(scope="module")
def own(request):
    starts(request.path.name)
"""

SHARES = """
import pytest

@pytest.mark.parametrize("number", range(4))
def test_with_the_shared_service(number, running):
    pass
"""

OF_ITS_OWN = """
import pytest

@pytest.mark.parametrize("name", ["a", "b@c", "d]", "e"])
def test_with_its_own(name, own):
    pass
"""


def test_a_file_stays_in_one_process_and_so_do_all_that_share_a_service(tmp_path: Path) -> None:
    files = {
        "conftest.py": CONFTEST,
        "test_one.py": SHARES,
        "test_other.py": SHARES,
        "test_alone.py": OF_ITS_OWN,
        "test_lonely.py": OF_ITS_OWN,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    shared = re.search(r"-m pytest (-n .*?) \$", (ROOT / "tests" / "run.sh").read_text())
    assert shared is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *shlex.split(shared[1]), "-p", "no:cacheprovider", str(tmp_path)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert "16 passed" in done.stdout, done.stdout + done.stderr
    started = (tmp_path / "started").read_text().splitlines()
    assert sorted(started) == ["test_alone.py", "test_lonely.py", "the shared service"]
