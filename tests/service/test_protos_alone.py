"""A client in another process, written against the protos alone, can do everything."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.people import assert_ledger_closes
from tests.service.process import ServiceProcess

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PROTOS = Path(__file__).resolve().parents[2] / "proto"
CLIENT = Path(__file__).with_name("client_of_protos.py")


def test_a_client_that_knows_only_the_protos_can_do_everything(
    running: ServiceProcess, tmp_path: Path
) -> None:
    # Isolated, and in a folder of its own: neither the checkout nor the environment leads it to our packages.
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", CLIENT, PROTOS, running.address],
        input=running.admin_key,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stderr == ""
    assert done.stdout.endswith("everything worked\n")
    asyncio.run(assert_ledger_closes(running.dsn))
