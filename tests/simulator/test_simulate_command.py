"""`darkroom simulate` as people call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scheduler.__main__ import server

SMALL = ("simulate", "--gpus", "2", "--jobs", "60", "--accounts", "6", "--hours", "0.5")


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(server, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def test_a_made_up_day_is_compared_and_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'darkroom[simulator]'")
    code, out, _ = run(*SMALL, "--policy", "ours,fifo", "--load", "0.8,1.3", "--out", str(tmp_path))
    assert code == 0
    assert "200 fast GPU-min a month" in out
    assert "## Load 80%" in out
    assert "## Load 130%" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["load"] for one in report["loads"]] == [0.8, 1.3]
    assert [one["policy"] for one in report["loads"][0]["policies"]] == ["ours", "fifo"]
    assert (tmp_path / "load-130" / "waits.svg").exists()


def test_a_trace_is_cut_and_closed(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(
        "arrival_s,user,kind,gpu_seconds\n" + "".join(f"{at},u{at % 3},t2i_s20_n4,30\n" for at in range(90))
    )
    code, out, _ = run(
        "simulate",
        "--gpus",
        "2",
        "--trace",
        str(trace),
        "--rows",
        "50",
        "--closed",
        "--no-caps",
        "--policy",
        "ours",
    )
    assert code == 0
    assert "trace t.csv, 50 jobs" in out
    assert "loop: closed" in out
    assert "caps: off" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "ours,best"), "no policy is called 'best'; there are ours, none, kill"),
        (("--load", "0.8;1"), "'0.8;1' has to be numbers above 0 with commas between"),
        (("--load", "0"), "has to be numbers above 0"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments: tuple[str, ...], message: str) -> None:
    code, _, errors = run(*SMALL, *arguments)
    assert code == 2
    assert message in " ".join(errors.split())


def test_a_wrong_trace_is_said_in_a_sentence(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("when,who\n1,2\n")
    code, _, errors = run("simulate", "--gpus", "2", "--trace", str(trace))
    assert code == 2
    assert "arrival_s, user, kind, gpu_seconds is missing" in " ".join(errors.split())


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """Sets of text are gone through in another order in each process, unless told otherwise."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'darkroom[simulator]'")
    written = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        subprocess.run(
            [
                sys.executable,
                "-m",
                "scheduler",
                *SMALL,
                "--load",
                "1.2",
                "--faults",
                "1",
                "--out",
                str(folder),
            ],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
        )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert len(written[0]) == 5
    assert written[0] == written[1]
