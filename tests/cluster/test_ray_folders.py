"""The folders of local Rays: one that is in use stays, one whose process was killed goes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from scheduler.cluster.ray_session import local_folder, remove_left_folders

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
