"""`darkroom demo` works on a machine that has nothing, works again, and works after it was killed.

Three starts on one data folder: the first is killed in the middle of its jobs, the next ends by itself, and
the last stays up until it is told to stop.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import psutil
import pytest
from PIL import Image

from scheduler.store import invariants
from scheduler.store.embedded import embedded_postgresql
from tests.folders import data_folder

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(300)]

JOBS = {"ben 1": "relax", "ben 2": "relax", "ben 3": "relax", "ada": "fast"}
DEFAULT_SIZE = (128, 128)  # of the default model
_END_S = 20
_ANY_PORTS = {"DARKROOM_FRONTDOOR__PORT": "0", "DARKROOM_OPS__PORT": "0"}
# In the folder where they are started. None of it can be reached: to try would not end well.
_OF_A_SERVICE = """
artifacts_url = "s3://pictures/darkroom"
[database]
dsn = "postgresql://darkroom@127.0.0.1:1/darkroom"
[ray]
address = "127.0.0.1:1"
[scaling]
max_workers = 8
[frontdoor]
host = "192.0.2.1"
tls_certificate = "/etc/darkroom/server.crt"
tls_key = "/etc/darkroom/server.key"
"""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One start of the demonstration, and what there was to see of it."""

    images: Path
    status: int
    said: str
    processes: list[psutil.Process]
    """All that belonged to it while its jobs were running."""
    tried: list[str]
    """What each command printed that it said to try, of one that stayed up."""

    @property
    def job_ids(self) -> set[str]:
        return {picture.name[:36] for picture in self.images.iterdir()}


@dataclass(frozen=True, kw_only=True)
class Demos:
    """All starts on one data folder."""

    data_dir: Path
    killed: Demo
    completed: list[Demo]


@pytest.fixture(scope="module")
def demos() -> Iterator[Demos]:
    with data_folder() as folder:
        data_dir = folder / "data"
        (folder / "darkroom.toml").write_text(_OF_A_SERVICE)
        yield Demos(
            data_dir=data_dir,
            killed=demonstrate(data_dir, folder / "killed", kill=True),
            completed=[
                demonstrate(data_dir, folder / "after"),
                demonstrate(data_dir, folder / "again", keep=True),
            ],
        )


def demonstrate(data_dir: Path, images: Path, *, kill: bool = False, keep: bool = False) -> Demo:
    """Run the demonstration to its end, or kill it once a job has done a few steps.

    One that is to stay up is told to stop once all that it says to try was tried.
    """
    images.mkdir()
    said: list[str] = []
    processes: list[psutil.Process] = []
    tried: list[str] = []
    with subprocess.Popen(
        [
            *(Path(sys.executable).with_name("darkroom"), "demo"),
            *("--data-dir", data_dir, "--images", images),
            *(("--keep",) if keep else ()),
        ],
        cwd=images.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Wide enough for its tables.
        env={**_ANY_PORTS, **os.environ, "COLUMNS": "160"},
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                if not processes and re.search(r": step \d+ of \d+", line):
                    processes = processes_of(process.pid, data_dir)
                    if kill:
                        process.kill()
                if "until you press Ctrl-C" in line:
                    tried = [tries(command, images.parent) for command in suggested("".join(said))]
                    process.send_signal(signal.SIGINT)
            status = process.wait(_END_S)
        finally:
            if process.returncode is None:
                process.kill()
    return Demo(images=images, status=status, said="".join(said), processes=processes, tried=tried)


def suggested(said: str) -> list[str]:
    """Return the commands that it says to try, each with the address and the key that it shows."""
    (told,) = re.findall(r"^Try: ((?:\w+=\S+ )+)(.*)$", said, re.MULTILINE)
    others = re.findall(r"^  (\S*darkroom .*)$", said, re.MULTILINE)
    return [f"{told[0]}{command}" for command in (told[1], *others)]


def tries(command: str, folder: Path) -> str:
    """Type a command of whoever has just seen the demonstration, and return what it prints."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def processes_of(pid: int, data_dir: Path) -> list[psutil.Process]:
    """Return a process, all below it, and those with its data folder: PostgreSQL's is nobody's child."""
    return [
        *[psutil.Process(pid), *psutil.Process(pid).children(recursive=True)],
        *[
            each
            for each in psutil.process_iter(["cmdline"])
            if each.pid != pid and any(str(data_dir) in part for part in each.info["cmdline"] or ())
        ],
    ]


def test_demo_ends_well_and_says_so_and_nothing_else(demos: Demos) -> None:
    for demo in demos.completed:
        assert demo.status == 0, demo.said
        assert not re.search("traceback|warning|error", demo.said, re.IGNORECASE), demo.said


def test_demo_was_killed_in_the_middle_of_its_jobs(demos: Demos) -> None:
    assert demos.killed.status < 0
    assert "Receipts" not in demos.killed.said
    assert list(demos.killed.images.iterdir()) == []


def test_demo_leaves_four_valid_pictures_of_each_job(demos: Demos) -> None:
    for demo in demos.completed:
        pictures = list(demo.images.iterdir())
        assert sorted(Counter(picture.name[:36] for picture in pictures).values()) == [4, 4, 4, 4]
        for path in pictures:
            with Image.open(path) as picture:
                picture.load()
                assert (picture.format, picture.size) == ("PNG", DEFAULT_SIZE), path
                colours = picture.convert("RGB").getextrema()
            assert any(low < high for low, high in colours), f"{path} is of one colour"


def test_demo_shows_progress_and_prints_receipts_and_explains_the_order(demos: Demos) -> None:
    for demo in demos.completed:
        for name, tier in JOBS.items():
            assert re.search(rf"^{name}: step \d+ of \d+$", demo.said, re.MULTILINE), demo.said
            charge = "relax costs nothing" if tier == "relax" else r"charged [\d.]+ s of fast time"
            assert re.search(rf"^{name}\b.*{charge}", demo.said, re.MULTILINE), demo.said
        started = re.findall(
            r"^[1-4]\. (.+) \((fast|relax)\), submitted at .+, started at .+: \S.+\.$",
            demo.said,
            re.MULTILINE,
        )
        assert len(started) == len(JOBS)
        assert dict(started) == JOBS


def test_demo_that_stays_up_takes_what_it_says_to_try_until_it_is_stopped(demos: Demos) -> None:
    ended, kept = demos.completed
    assert ended.tried == []
    assert len(kept.tried) == len(("imagine", "imagine", "vary", "info"))
    saved = list((kept.images.parent / "darkroom-images").iterdir())
    assert len({picture.name[:36] for picture in saved}) == 3
    assert len(saved) == 3 * 4
    assert "standard" in kept.tried[-1]


def test_demo_leaves_nothing_running_not_even_of_one_that_was_killed(demos: Demos) -> None:
    processes = [process for demo in (demos.killed, *demos.completed) for process in demo.processes]
    assert len(processes) > 3 * len(("itself", "PostgreSQL", "Ray", "scheduler", "worker", "worker"))
    _, left = psutil.wait_procs(processes, timeout=_END_S)
    assert left == []


def test_demo_leaves_a_ledger_that_closes(demos: Demos) -> None:
    async def look(dsn: str) -> dict[str, tuple[str, str]]:
        connection = await asyncpg.connect(dsn)
        try:
            assert await invariants.check(connection) == []
            jobs = await connection.fetch("SELECT job_id::text, tier, state FROM scheduler.job")
            return {job["job_id"]: (job["tier"], job["state"]) for job in jobs}
        finally:
            await connection.close()

    with embedded_postgresql(demos.data_dir / "database") as dsn:
        jobs = asyncio.run(look(dsn))
    assert len(jobs) == 3 * len(JOBS) + len(("imagine", "imagine", "vary"))
    for demo in demos.completed:
        ended = Counter(jobs[job_id] for job_id in demo.job_ids)
        assert ended == {("relax", "succeeded"): 3, ("fast", "succeeded"): 1}
    assert {state for _, state in jobs.values()} <= {"queued", "running", "succeeded"}, "none was lost"
