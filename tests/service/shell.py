"""Somebody at a shell, with a key and a folder, who types commands to a running service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.service.typed import type_command

DARKROOM = str(Path(sys.executable).with_name("darkroom"))
_END_S = 200.0


@dataclass(frozen=True)
class Person:
    """Types commands, and sees what they print and how they end."""

    address: str
    key: str
    folder: Path

    def types(self, *arguments: str, expect: int = 0, answers: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command and return it, having seen its exit status."""
        environment = {**os.environ, "DARKROOM_ADDRESS": self.address, "DARKROOM_KEY": self.key}
        with (
            tempfile.TemporaryFile("w+") as typed,
            tempfile.TemporaryFile("w+") as printed,
            tempfile.TemporaryFile("w+") as complained,
        ):
            typed.write(answers)
            typed.seek(0)
            status = type_command(
                arguments,
                folder=self.folder,
                environment=environment,
                files=(typed, printed, complained),
                within_s=_END_S,
            )
            printed.seek(0)
            complained.seek(0)
            done = subprocess.CompletedProcess(arguments, status, printed.read(), complained.read())
        assert done.returncode == expect, f"{arguments}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def gets(self, *arguments: str) -> dict[str, Any]:
        """Run a command and return its answer."""
        answer: dict[str, Any] = json.loads(self.types(*arguments, "--json").stdout)
        return answer

    def made(self, *arguments: str) -> dict[str, Any]:
        """Run a command that makes something, and return the finished job."""
        made = self.gets(*arguments)
        assert all((self.folder / file).stat().st_size > 0 for file in made["files"])
        job: dict[str, Any] = made["job"]
        assert job["state"] == "JOB_STATE_SUCCEEDED"
        return job

    def refusal(self, *arguments: str) -> dict[str, Any]:
        """Run a command that the service refuses, and return what it said."""
        said = json.loads(self.types(*arguments, "--json", expect=1).stderr.splitlines()[-1])
        refused: dict[str, Any] = said["error"]
        return refused
