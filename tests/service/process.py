"""The whole service in a process of its own, as an operator starts it, and the processes under it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_ADDRESS = re.compile(r"takes jobs at (\S+); metrics at http://(\S+)/metrics")
_KEY = re.compile(r"shown once: (dk_\S+)")


class ServiceProcess:
    """`darkroom serve` with everything embedded, on free ports of loopback."""

    def __init__(self, process: subprocess.Popen[str], address: str, ops: str, admin_key: str | None) -> None:
        self._process = process
        self.address = address
        self.ops = ops
        self.admin_key = admin_key

    def pids(self, title: str) -> list[int]:
        """Return the processes of this service whose title begins so: `ray::GpuWorker`, `ray::SchedulerActor`."""
        found = []
        for child in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if child.cmdline() and child.cmdline()[0].startswith(title):
                    found.append(child.pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self, title: str) -> int:
        """SIGKILL one process with that title and return its id."""
        pid = self.pids(title)[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def end(self) -> int:
        """Stop as an operator would, and return the exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)


@contextmanager
def service(
    data_dir: Path, *, gpus: int = 2, engine: str = "timed", timed_step_ms: int = 20, **environment: str
) -> Iterator[ServiceProcess]:
    """Run the service on `data_dir` while the context is open."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "scheduler", "serve", "--port", "0", "--ops-port", "0"),
            *("--data-dir", str(data_dir), "--gpus", str(gpus), "--engine", engine, "--log-level", "info"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DARKROOM_WORKER__TIMED_STEP_MS": str(timed_step_ms), **environment},
    )
    said: list[str] = []
    address: re.Match[str] | None = None
    key: str | None = None
    assert process.stdout is not None
    patience = threading.Timer(90, process.kill)
    patience.start()
    for line in process.stdout:
        said.append(line)
        if match := _ADDRESS.search(line):
            address = match
            break
    patience.cancel()
    assert address is not None, "the service did not start:\n" + "".join(said)
    key_file = data_dir / "test-admin-key"
    begun = time.monotonic()
    if not key_file.exists():
        for line in process.stdout:
            said.append(line)
            if match := _KEY.search(line):
                key = match.group(1)
                key_file.write_text(key)
                break
            assert time.monotonic() - begun < 10, "no key was printed"
    else:
        key = key_file.read_text()
    # What it says from now on must be read, or it would block on a full pipe.
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    running = ServiceProcess(process, address.group(1), address.group(2), key)
    try:
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        reader.join(10)
        (data_dir / "service.log").write_text("".join(said))
