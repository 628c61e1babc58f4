"""A Ray cluster that is not the service's own: its nodes are processes here, joined by a token."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.service.process import ServiceProcess
from tests.stand_in import STAND_IN_FILE

STOP_S = 60
_STARTS = 3
_RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node with logical GPUs."""

    name: str
    address: str
    """Of the cluster, as its head names it; empty of other nodes."""
    process: subprocess.Popen[str]

    def terminate(self) -> None:
        """Send SIGTERM, as whoever drains a machine does."""
        self.process.send_signal(signal.SIGTERM)

    def processes(self) -> list[str]:
        """Return the titles of what runs on it, such as `ray::GpuWorker.heartbeat`, without the method."""
        running = psutil.Process(self.process.pid).children(recursive=True)
        # A title that is shorter than the command it took the place of is filled up with spaces.
        return [" ".join(process.cmdline()).partition(".")[0].strip() for process in running]

    def kill(self) -> None:
        """SIGKILL everything that runs on it, as if its power were cut."""
        root = psutil.Process(self.process.pid)
        # The root last: what looks after the others' deaths would act on them.
        for process in [*root.children(recursive=True), root]:
            process.send_signal(signal.SIGKILL)


def cluster_environment(**more: str) -> dict[str, str]:
    """Return the environment of a new cluster's nodes and of whoever joins it."""
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **more}


@contextmanager
def a_node(name: str, *arguments: str, environment: Mapping[str, str], gpus: int = 1) -> Iterator[Node]:
    """Run a node while the context is open; it may be killed meanwhile."""
    process, said = started(
        [
            *(_RAY, "start", *arguments, "--block", "--node-name", name),
            *("--num-cpus", "1", "--num-gpus", str(gpus)),
        ],
        environment,
    )
    joined = re.search(r"--address='([^']+)'", said)
    try:
        yield Node(name=name, address=joined.group(1) if joined is not None else "", process=process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=STOP_S)
        finally:
            process.kill()


def started(command: list[str], environment: Mapping[str, str]) -> tuple[subprocess.Popen[str], str]:
    """Start a node and return it with what it said.

    Ray's processes give each other 30 s to come up: on a busy machine one of many starts fails, and is tried
    again.
    """
    said = ""
    for _ in range(_STARTS):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if "--block" in line:  # the last thing it says: it waits from now on
                return process, said
        process.communicate(timeout=STOP_S)
    raise AssertionError(f"the node did not start {_STARTS} times:\n{said}")


@contextmanager
def front_door(
    ray_address: str, dsn: str, data_dir: Path, environment: Mapping[str, str], *, engine: str = "timed"
) -> Iterator[ServiceProcess]:
    """Serve on a cluster while the context is open; the scheduler and the workers stay when it ends."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "scheduler", "serve", "--port", "0", "--ops-port", "0"),
            *("--models-file", str(STAND_IN_FILE)),
            *("--ray-address", ray_address, "--dsn", dsn, "--data-dir", str(data_dir)),
            *("--artifacts-url", f"file://{data_dir}/artifacts", "--engine", engine),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        running = ServiceProcess(process, data_dir)
        yield running
        assert running.stop() == 0, running.said
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(STOP_S)


def stop_everything(ray_address: str, environment: Mapping[str, str]) -> list[str]:
    """Run `darkroom stop` and return the lines it says."""
    stop = subprocess.run(
        [sys.executable, "-m", "scheduler", "stop", "--ray-address", ray_address],
        capture_output=True,
        text=True,
        env=environment,
        timeout=STOP_S,
        check=True,
    )
    return stop.stdout.splitlines()
