"""Whoever types the README's commands for clients, from first to last as they stand, is refused none of them.

What a reader has of their own stands in for what the README cannot know: the address, the keys, the ids of
their jobs, the name of a GPU, a recording.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.folders import data_folder
from tests.service.people import People
from tests.service.process import ServiceProcess, service
from tests.structure.pages import ROOT, blocks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

_END_S = 60
_ADDRESS, _KEY, _WORKER = "127.0.0.1:7443", "dk_…", "node-a/gpu-0"  # as in the README
_STAFF = ("darkroom admin ", "darkroom jobs --account ", "darkroom top")
"""What people type who run the service."""
_DRAW_FOUR = ("darkroom imagine ", "darkroom vary ", "darkroom reroll ", "darkroom redo ")


@dataclass(frozen=True)
class Reader:
    """Somebody at a shell of their own, with a home, who has been told nothing by the environment."""

    folder: Path

    def types(self, line: str) -> str:
        """Run a line as it stands, say yes to what it asks, and return what it prints."""
        told = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            # With something behind it bash stays, as where people type, and is found by who asks for it.
            ["bash", "-ec", f"{line}\n:"],
            cwd=self.folder,
            env={**told, "HOME": str(self.folder), "PATH": programs},
            input="yes\n",
            capture_output=True,
            text=True,
            timeout=_END_S,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def pictures(self) -> set[Path]:
        """Return what was saved."""
        return set(self.folder.rglob("*.png"))

    def is_told(self, address: str, key: str) -> None:
        """Keep where the service is, and a key to it."""
        self.types(f"darkroom config set address {address}")
        self.types(f"darkroom config set key {key}")


@dataclass(frozen=True)
class Place:
    """A running service, and who types at it."""

    service: ServiceProcess
    recordings: Path
    key: str
    client: Reader
    staff: Reader

    def number_of_the_grant(self) -> str:
        """Return the number by which a grant is taken back, from where the README says that it stands."""
        audit = json.loads(self.staff.types("darkroom admin audit --target accounts/ada --json"))
        (number,) = [event["number"] for event in audit["events"] if event["reason"] == "the demo on Friday"]
        return str(number)

    def waiting_job(self) -> str:
        """Return the id of a job that waits, as one does whose GPUs are taken."""
        self.staff.types('darkroom admin pause relax --reason "nobody starts"')
        return self.new_job("--relax --no-wait")

    def new_job(self, *options: str) -> str:
        made = json.loads(self.client.types(f'darkroom imagine "a red apple" {" ".join(options)} --json'))
        job: dict[str, str] = made.get("job", made)
        return job["uid"]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with data_folder() as folder:
        recordings = folder / "recordings"
        recordings.mkdir()
        with service(folder / "data", record_to=recordings) as running:
            key = asyncio.run(People(running.address, running.admin_key).key("reader"))
            client, staff = Reader(folder / "client"), Reader(folder / "staff")
            for each in (client, staff):
                each.folder.mkdir()
            staff.is_told(running.address, running.admin_key)
            yield Place(running, recordings, key, client, staff)


def test_every_command_of_the_readme_does_its_work_in_the_order_in_which_it_stands(place: Place) -> None:
    lines = [
        line
        for block in blocks((ROOT / "README.md").read_text(), "sh")
        if f"darkroom config set address {_ADDRESS}" in block
        for line in block.splitlines()
        if line.startswith("darkroom ")
    ]
    assert len(lines) > 40
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(place.client.folder / "cat.png")
    staff = place.staff
    staff.types('darkroom admin plans set pro self_service=true --reason "all may"')
    staff.types('darkroom admin accounts create eve --plan basic --reason "asked for it"')
    (eve, *_) = staff.types('darkroom admin keys create eve --reason "asked for it"').split()
    told = f"DARKROOM_ADDRESS={place.service.address} DARKROOM_KEY={eve}"
    place.client.types(f'{told} darkroom imagine "a red apple" --no-wait')
    job = ""
    for line in lines:
        typed = line.replace(_ADDRESS, place.service.address).replace(_KEY, place.key)
        if line.startswith("darkroom vary JOB"):
            # Paid in fast time, so that there is something to give back.
            job = place.new_job("--fast")
        elif line.startswith("darkroom fast JOB"):
            typed = typed.replace("JOB", place.waiting_job(), 1)
        elif "--undoes 17" in line:
            typed = typed.replace("17", place.number_of_the_grant())
        elif line.startswith("darkroom admin accounts undo-plan ada"):
            staff.types('darkroom plan change pro --account ada --reason "a mistake to come"')
        elif line.startswith("darkroom replay "):
            (recording,) = place.recordings.iterdir()
            typed = re.sub(r"epoch-\d+\.jsonl\.gz", str(recording), typed)
        typed = typed.replace("JOB", job, 1).replace(_WORKER, "local/gpu-0")
        before = place.client.pictures()
        assert (staff if line.startswith(_STAFF) else place.client).types(typed), f"{typed} says nothing"
        if line.startswith(_DRAW_FOUR):
            assert len(place.client.pictures() - before) == 4, typed
    # As it was, for whoever asks whether it is at rest.
    staff.types("darkroom admin unpause relax --reason over")
    staff.types("darkroom admin undrain local/gpu-0 --reason over")
