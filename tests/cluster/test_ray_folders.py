"""Local Rays: a start that failed is tried again, and only folders of killed processes are removed."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray

from scheduler.cluster.ray_session import local_folder, remove_left_folders, start_local_ray

_HOLD = """
import sys
from pathlib import Path
from scheduler.cluster.ray_session import local_folder
with local_folder(Path(sys.argv[1])) as folder:
    (folder / "session").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_folder_of_a_killed_process_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        remove_left_folders(tmp_path)
        assert (folder / "session").exists()
        process.send_signal(signal.SIGKILL)
    assert folder.exists()
    remove_left_folders(tmp_path)
    assert not folder.exists()


def test_folder_is_removed_at_the_end(tmp_path: Path) -> None:
    with local_folder(tmp_path) as folder:
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_local_ray_that_failed_to_start_is_started_again() -> None:
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder:
        # Where the first start would put its files.
        (Path(folder) / "start-1").touch()
        start_local_ray(Path(folder), gpus=1, namespace="again")
        try:
            assert ray.cluster_resources()["GPU"] == 1
        finally:
            ray.shutdown()


@pytest.mark.parametrize("visible", ["", "0"])
def test_logical_gpus_are_as_many_as_wanted_whatever_is_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as folder:
        start_local_ray(Path(folder), gpus=2, namespace="logical")
        try:
            assert ray.cluster_resources()["GPU"] == 2
        finally:
            ray.shutdown()


def test_a_local_ray_that_cannot_start_says_where_to_look() -> None:
    with tempfile.TemporaryDirectory(prefix="dr-") as folder:
        for number in (1, 2, 3):
            (Path(folder) / f"start-{number}").touch()
        with pytest.raises(RuntimeError, match=r"did not start on this machine in 3 tries.*Its logs were in"):
            start_local_ray(Path(folder), gpus=1, namespace="never")
    assert not ray.is_initialized()
