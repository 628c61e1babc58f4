"""The whole service in a process of its own, as an operator starts it, and the processes under it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from scheduler.store import invariants
from tests.stand_in import STAND_IN_FILE

_START_S = 120.0
_STOP_S = 60.0


class ServiceProcess:
    """`darkroom serve` with everything embedded, on free ports of loopback."""

    def __init__(self, process: subprocess.Popen[str], data_dir: Path) -> None:
        self._process = process
        self._data_dir = data_dir
        self._said: list[str] = []
        self._heard = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        announced = self._wait_for(r"takes jobs at (\S+); metrics at http://(\S+)/metrics")
        self.address, self.ops = announced.group(1), announced.group(2)
        key_file = data_dir / "admin-key-of-the-test"
        if not key_file.exists():
            key_file.write_text(self._wait_for(r"shown once: (dk_\S+)").group(1))
        self.admin_key = key_file.read_text()

    @property
    def dsn(self) -> str:
        """The embedded database, for looking at what the service wrote."""
        return f"postgresql://postgres@/postgres?host={self._data_dir}/database/postgresql"

    def wait_for_worker(self, worker_id: str) -> None:
        """Return once this worker has joined."""
        self._wait_for(rf'"worker": "{worker_id}".*"event": "worker joined"')

    def wait_for_slot_gone(self, worker_id: str) -> None:
        """Return once the machine of this worker has left the cluster."""
        self._wait_for(rf'"worker": "{worker_id}".*"event": "slot gone with its node"')

    def last_said(self, event: str, job_id: str) -> dict[str, Any]:
        """Return the newest log line of that event that is about this job."""
        said: dict[str, Any] = json.loads(
            self._all(rf'\{{.*"job": "{job_id}".*"event": "{event}".*\}}')[-1].group()
        )
        return said

    def said_of(self, event: str, job_id: str, times: int) -> dict[str, Any]:
        """Return the newest log line of that event about this job, once there are so many.

        An answer reaches a client before the lines about it get here.
        """
        pattern = rf'\{{.*"job": "{job_id}".*"event": "{event}".*\}}'
        with self._heard:
            assert self._heard.wait_for(lambda: len(self._all(pattern)) >= times, _START_S), pattern
        return self.last_said(event, job_id)

    def kill_worker(self, worker_id: str) -> None:
        """SIGKILL the process of a slot's worker."""
        joined = [json.loads(found.group()) for found in self._all(r'\{.*"event": "worker joined".*\}')]
        os.kill(next(one["pid"] for one in reversed(joined) if one["worker"] == worker_id), signal.SIGKILL)

    def kill_scheduler(self) -> None:
        """SIGKILL the process of the scheduler's actor."""
        for child in psutil.Process(self._process.pid).children(recursive=True):
            if child.cmdline() and child.cmdline()[0].startswith("ray::SchedulerActor"):
                child.kill()
                return
        raise AssertionError("there is no scheduler to kill")

    def kill(self) -> None:
        """SIGKILL the service's own process: front door, PostgreSQL's and Ray's parent."""
        self._process.kill()
        self._process.wait(_STOP_S)

    def wait_for_event(self, event: str) -> None:
        """Return once it has logged this."""
        self._wait_for(rf'"event": "{event}"')

    def processes(self) -> list[psutil.Process]:
        """Return all that are under it, and the embedded server, which is not."""
        pid_file = self._data_dir / "database" / "postgresql" / "postmaster.pid"
        postgresql = psutil.Process(int(pid_file.read_text().split()[0]))
        return [*psutil.Process(self._process.pid).children(recursive=True), postgresql]

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Stop as an operator would, and return the exit status."""
        if self._process.poll() is None:
            self.terminate()
        return self.stopped()

    def stopped(self) -> int:
        """Wait for its end, and return the exit status."""
        status = self._process.wait(_STOP_S)
        self._reader.join(10)
        return status

    @property
    def said(self) -> str:
        """Everything it printed so far."""
        with self._heard:
            return "".join(self._said)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._heard:
                    self._said.append(line)
                    self._heard.notify_all()
        with self._heard:
            self._said.append("(it ended)\n")
            self._heard.notify_all()

    def _all(self, pattern: str) -> list[re.Match[str]]:
        with self._heard:
            return [match for line in self._said if (match := re.search(pattern, line))]

    def _wait_for(self, pattern: str) -> re.Match[str]:
        def found() -> bool:
            return bool(self._all(pattern)) or not self._reader.is_alive()

        with self._heard:
            self._heard.wait_for(found, _START_S)
        matches = self._all(pattern)
        assert matches, f"the service did not say {pattern!r}:\n{self.said}"
        return matches[0]


def assert_promises_hold(dsn: str) -> None:
    """Ask every invariant that holds at any moment, of a database that may be in use."""

    async def broken() -> list[invariants.InvariantResult]:
        connection = await asyncpg.connect(dsn)
        try:
            return await invariants.check(connection)
        finally:
            await connection.close()

    # Of its own thread: the caller may be in an event loop.
    with ThreadPoolExecutor(1) as aside:
        assert aside.submit(lambda: asyncio.run(broken())).result() == []


@contextmanager
def service(
    data_dir: Path,
    *,
    gpus: int = 2,
    engine: str = "timed",
    timed_step_ms: int = 20,
    traces_to: str | None = None,
    record_to: Path | None = None,
) -> Iterator[ServiceProcess]:
    """Run the service on `data_dir` while the context is open, then stop it and ask that it stopped well.

    With `traces_to`, an address, it sends there what belongs to traces that its callers record, and no other;
    with `record_to`, a folder, its schedulers record there.
    Before that, what it promises of the ledger has to hold, unless the test has killed it.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "scheduler", "serve", "--port", "0", "--ops-port", "0"),
            *("--models-file", str(STAND_IN_FILE)),
            *("--data-dir", str(data_dir), "--gpus", str(gpus), "--engine", engine),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Beside other tests the machine is late at any time.
        env={
            **os.environ,
            "DARKROOM_WORKER__TIMED_STEP_MS": str(timed_step_ms),
            "DARKROOM_FRONTDOOR__LATE_MAX_MS": "60000",
            **({} if record_to is None else {"DARKROOM_SCHEDULING__RECORD_TO": str(record_to)}),
            **(
                {}
                if traces_to is None
                else {"DARKROOM_TRACING__ENDPOINT": traces_to, "DARKROOM_TRACING__SAMPLED_PERMILLE": "0"}
            ),
        },
    )
    try:
        running = ServiceProcess(process, data_dir)
        yield running
        killed = process.poll() is not None
        if not killed:
            assert_promises_hold(running.dsn)
        status = running.stop()
        assert status == 0 or killed, f"exit status {status}\n{running.said}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(_STOP_S)
