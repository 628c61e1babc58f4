"""What the systemd units start works: their commands, from an empty database to a finished job.

Both machines are this one, with folders and ports of their own, and nobody is systemd. All else that is run
stands in deploy/systemd, and beside it is what deploy/README.md tells an operator to write.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode

import asyncpg
import psutil
import pytest

from scheduler.store.embedded import with_database
from tests.deploy.manifests import DEPLOY, GCS, GRPC, OPS, RAY_AGENT, RAY_METRICS, TOOLS, probes
from tests.deploy.units import SYSTEMD, command, directives, environment, settings_of
from tests.security.certificates import Authority
from tests.service.nodes import started
from tests.service.process import ServiceProcess, assert_promises_hold
from tests.service.shell import Person

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

_PATIENCE_S = 90
_DATABASE = "two_machines"


def free_ports(number: int) -> list[int]:
    """Return ports of loopback that nobody listens on."""
    with ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in listening]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A folder for what a machine has in /etc/darkroom and /var/lib/darkroom, and ports of its own."""

    name: str
    folder: Path
    ports: dict[int, int]
    """Of this test, by those in the files."""

    @property
    def etc(self) -> Path:
        return self.folder / "etc"

    def here(self, text: str) -> str:
        """Return a text of the deployment files as it is on this machine."""
        for written, ours in (
            ("/opt/darkroom/bin", str(TOOLS)),
            ("/etc/darkroom", str(self.etc)),
            ("/var/lib/darkroom", str(self.folder / "state")),
            ("10.0.0.1", "127.0.0.1"),
            ("%H", self.name),
        ):
            text = text.replace(written, ours)
        for usual, port in self.ports.items():
            for before in (":", "=", "port = "):
                text = text.replace(f"{before}{usual}", f"{before}{port}")
        return text

    def commands(self, unit: str, directive: str) -> list[list[str]]:
        """Return the command lines of a unit."""
        lines = directives(SYSTEMD / f"{unit}.service")[directive]
        return [command(self.here(line), settings_of(self.etc / "ray.env")) for line in lines]

    def environment(self, unit: str, **more: str) -> dict[str, str]:
        """Return the environment of a unit's processes."""
        given = environment(SYSTEMD / f"{unit}.service")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}
        return {**inherited, **{name: self.here(value) for name, value in given.items()}, **more}

    def run(self, unit: str, directive: str) -> None:
        """Run commands of a unit to their ends, which have to be good ones."""
        for words in self.commands(unit, directive):
            subprocess.run(words, check=True, env=self.environment(unit), timeout=_PATIENCE_S)

    @contextmanager
    def node(self, unit: str) -> Iterator[None]:
        """Run the node of Ray that a unit starts; in the end SIGTERM ends it, and it leaves nothing."""
        self.run(unit, "ExecStartPre")
        (words,) = self.commands(unit, "ExecStart")
        process, _ = started(words, self.environment(unit))
        try:
            self.run(unit, "ExecStartPost")
            yield
            told = directives(SYSTEMD / f"{unit}.service")
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=int(told["TimeoutStopSec"][0]))
            assert str(process.returncode) in told["SuccessExitStatus"]
            # systemd would kill them. What Ray has told to end may take a moment.
            assert psutil.wait_procs(family, timeout=10)[1] == []
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


@dataclass(frozen=True, kw_only=True)
class TwoMachines:
    """A running service."""

    head: Machine
    gpu: Machine
    admin: Person

    def get(self, machine: Machine, usual: int, path: str) -> str:
        """Return what a machine answers at the port that the files name so."""
        with urllib.request.urlopen(f"http://127.0.0.1:{machine.ports[usual]}{path}", timeout=10) as answer:
            assert answer.status == 200
            text: str = answer.read().decode()
        return text


def write_configuration(head: Machine, gpu: Machine, dsn: str) -> Path:
    """Write on both machines what deploy/README.md says; returns the certificate of the authority."""
    token = "".join(f"{byte:02x}" for byte in os.urandom(32))
    for machine in (head, gpu):
        machine.etc.mkdir(parents=True)
        (machine.folder / "state").mkdir()
        (machine.etc / "ray_auth_token").write_text(token)
        more = "--num-gpus=1 --num-cpus=1" if machine is gpu else ""
        env = machine.here((SYSTEMD / "ray.env").read_text())
        (machine.etc / "ray.env").write_text(env.replace("RAY_START_MORE=", f"RAY_START_MORE={more}"))
    authority = Authority(head.etc)
    authority.issue("tls")
    toml = head.here((SYSTEMD / "darkroom.toml").read_text())
    toml = toml.replace("s3://pictures/darkroom", f"file://{head.folder.parent}/pictures")
    (line,) = [line for line in toml.splitlines() if line.startswith("dsn = ")]
    (head.etc / "darkroom.toml").write_text(toml.replace(line, f'dsn = "{dsn}"'))
    return authority.certificate


@pytest.fixture(scope="module")
def empty_database(postgresql: str) -> Iterator[str]:
    async def say(statement: str) -> None:
        connection = await asyncpg.connect(postgresql)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(say(f"CREATE DATABASE {_DATABASE}"))
    yield with_database(postgresql, _DATABASE)
    asyncio.run(say(f"DROP DATABASE {_DATABASE} WITH (FORCE)"))


@pytest.fixture(scope="module")
def machines(empty_database: str) -> Iterator[TwoMachines]:
    """The service, started as deploy/README.md says, and stopped so afterwards."""
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as name:
        gcs, grpc, ops, *rest = free_ports(7)
        shared = {GCS: gcs, GRPC: grpc, OPS: ops}
        head, gpu = (
            Machine(
                name=called,
                folder=Path(name) / called,
                ports={**shared, RAY_METRICS: rest.pop(), RAY_AGENT: rest.pop()},
            )
            for called in ("head", "gpu-a")
        )
        trusted = write_configuration(head, gpu, empty_database)
        door = "darkroom-front-door"
        with head.node("darkroom-ray-head"), gpu.node("darkroom-ray-worker"):
            head.run("darkroom-migrate", "ExecStart")
            (serve,) = head.commands(door, "ExecStart")
            environment = head.environment(
                door, DARKROOM_WORKER__ENGINE="timed", DARKROOM_WORKER__TIMED_STEP_MS="20"
            )
            process = subprocess.Popen(
                serve, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
            try:
                running = ServiceProcess(process, head.folder)
                running.wait_for_worker("gpu-a/gpu-0")
                admin = Person(f"127.0.0.1:{grpc}", running.admin_key, head.folder)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("DARKROOM_CA_FILE", str(trusted))
                    yield TwoMachines(head=head, gpu=gpu, admin=admin)
                assert_promises_hold(empty_database)
                assert running.stop() == 0, running.said
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            stop = [str(TOOLS / "darkroom"), "stop", "--ray-address", f"127.0.0.1:{gcs}"]
            said = subprocess.run(stop, capture_output=True, text=True, env=environment, check=True)
            assert said.stdout.splitlines() == ["stopped scheduler-0.1.0", "stopped worker-0.1.0-gpu-a/gpu-0"]


def test_an_account_draws_on_the_machine_with_the_gpu(machines: TwoMachines) -> None:
    admin = machines.admin
    admin.types("admin", "accounts", "create", "ada", "--plan", "standard", "--reason", "joined the lab")
    key = admin.gets("admin", "keys", "create", "ada", "--reason", "joined the lab")["secret"]
    job = Person(admin.address, key, admin.folder).made("imagine", "a lighthouse in fog")
    assert job["receipt"]["worker"] == "gpu-a/gpu-0"


def test_the_schema_is_complete_before_a_front_door_starts(machines: TwoMachines) -> None:
    (migrate,) = machines.head.commands("darkroom-migrate", "ExecStart")
    said = subprocess.run(
        migrate,
        env=machines.head.environment("darkroom-migrate"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines() == ["nothing to do: the schema is this release's"]


def test_every_probe_answers(machines: TwoMachines) -> None:
    for port, path in probes():
        for machine in (machines.head, machines.gpu):
            machines.get(machine, port, path)


def test_prometheus_finds_everything_up(machines: TwoMachines, tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("there is no prometheus: apt-get install prometheus")
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "prometheus")
    config = tmp_path / "prometheus" / "prometheus.yml"
    head, gpu = machines.head.ports, machines.gpu.ports
    text = config.read_text().replace("_interval: 15s", "_interval: 1s").replace("scrape_timeout: 10s", "")
    for written, port in (
        (f"ray-head:{OPS}", head[OPS]),
        (f"ray-head:{RAY_METRICS}", head[RAY_METRICS]),
        (f"worker:{RAY_METRICS}", gpu[RAY_METRICS]),
    ):
        text = text.replace(written, f"127.0.0.1:{port}")
    config.write_text(text)
    (port,) = free_ports(1)
    with scraping(config, port):

        def up() -> dict[str, list[str]]:
            query = urlencode({"query": "sort(up)"})
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}") as answer:
                found = json.load(answer)["data"]["result"]
            values: dict[str, list[str]] = {}
            for one in found:
                values.setdefault(one["metric"]["job"], []).append(one["value"][1])
            return values

        eventually(lambda: up() == {"darkroom": ["1", "1"], "ray": ["1", "1"]})


@contextmanager
def scraping(config: Path, port: int) -> Iterator[None]:
    """Run a Prometheus while the context is open."""
    process = subprocess.Popen(
        [
            *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={config.parent}/data"),
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def eventually(holds: Callable[[], bool]) -> None:
    """Return once something outside holds; not being reachable yet is not holding."""
    end_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end_s:
        try:
            if holds():
                return
        except (URLError, ConnectionError):
            pass
        threading.Event().wait(0.2)
    raise AssertionError(f"it did not come to hold within {_PATIENCE_S} s")
