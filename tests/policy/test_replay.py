"""B12 by recordings: what was told is read again to the last bit, and decided again to the same."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import policy_chaos as chaos
import pytest
from hypothesis import given, settings
from policy_cell import Cell, Decided, Restarted, a_worker
from typer.testing import CliRunner, Result

from scheduler.__main__ import server
from scheduler.policy.board import Board
from scheduler.policy.decisions import Decision, Start
from scheduler.policy.events import Event
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters
from scheduler.recording import (
    End,
    Header,
    Packing,
    Recording,
    RecordingWrong,
    Told,
    answered_line,
    asked_line,
    ended_line,
    header_line,
    told_line,
)
from scheduler.replay import replay
from tests.faults.another_order import InAnotherOrder, turn_around

pytestmark = pytest.mark.timeout(900)

_ROOT = Path(__file__).parents[2]
_LINES_AT_ONCE = 7


def lines_of(journal: Iterable[Event | Decided | Restarted], parameters: Parameters) -> list[bytes]:
    """Return the recording of the last board of a journal, a line each."""
    lines: list[bytes] = []
    for entry in journal:
        match entry:
            case Restarted():
                lines.clear()
            case Decided():
                lines += [asked_line(entry.at_ms), answered_line(entry.decisions)]
            case _:
                lines.append(told_line(entry))
    return [header_line(Header(release="0.1.0", epoch=1, parameters=parameters)), *lines]


def written(folder: Path, lines: Iterable[bytes]) -> Path:
    """Write lines as a leader does, some at a time."""
    file = folder / "a-recording.jsonl.gz"
    every = list(lines)
    packing = Packing()
    with file.open("wb") as parts:
        for begin in range(0, len(every), _LINES_AT_ONCE):
            parts.write(packing.packed(b"".join(every[begin : begin + _LINES_AT_ONCE])))
    return file


def busy(kind: type[Board] = Board) -> list[bytes]:
    """Return the recording of a cell in which runs were parked and moved, with such a board."""
    cell = Cell(workers=0)
    cell.board = kind(cell.parameters)
    for entry in cell.journal:
        assert not isinstance(entry, Decided | Restarted)
        cell.board.apply(entry)
    for number in range(6):
        cell.join(a_worker(f"w{number}", warm=("m", "n", "o")[number % 3 :]))

    def submit(number: int, tier: Tier) -> None:
        name, model, gib = "abcdefg"[number % 7], "mno"[number % 3], 1 + number % 2
        cell.submit(name, 9_000 + number, model=model, gib=gib, tier=tier)

    for number in range(60):
        submit(number, Tier.RELAX)
        cell.at(500 * number, partial(submit, number, Tier.FAST))
    cell.run()
    assert cell.parks
    assert cell.migrations
    return [*lines_of(cell.journal, cell.parameters), ended_line(End.STOPPED)]


@pytest.fixture(scope="module")
def recorded() -> list[bytes]:
    return busy()


# --- what is written can be read ------------------------------------------------------------------------


@settings(max_examples=20)
@given(parameters=chaos.parameters, plan=chaos.plans(chaos.faults))
def test_any_cells_recording_is_read_as_it_was_told_and_decided_again_to_the_same(
    tmp_path_factory: pytest.TempPathFactory, parameters: Parameters, plan: list[chaos.Step]
) -> None:
    cell = chaos.Chaos(parameters).play(plan).settle()
    recording = Recording(written(tmp_path_factory.mktemp("chaos"), lines_of(cell.journal, parameters)))
    assert recording.header.parameters == parameters
    began = max((place for place, one in enumerate(cell.journal) if one == Restarted()), default=-1) + 1
    told = [one for one in cell.journal[began:] if not isinstance(one, Decided)]
    assert [line.entry.event for line in recording if isinstance(line.entry, Told)] == told
    for board in (Board(parameters), InAnotherOrder(parameters)):
        replayed = replay(recording, board)
        assert replayed.difference is None
        assert replayed.events == len(told)


def test_a_recording_is_read_up_to_wherever_it_was_torn(recorded: list[bytes], tmp_path: Path) -> None:
    file = written(tmp_path, recorded[:40])
    whole = file.read_bytes()
    entries = [line.entry for line in Recording(file)]
    assert len(entries) == 39
    read = 0
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        try:
            recording = Recording(file)
        except RecordingWrong:
            assert not read, "once its first line is there it is a recording"
            continue
        there = [line.entry for line in recording]
        assert there == entries[: len(there)]
        assert len(there) >= read, "of more bytes no less can be read"
        assert recording.end is End.CUT_OFF
        read = len(there)
    assert read >= len(entries) - _LINES_AT_ONCE, "no more is lost than was written at once"


def test_how_a_recording_ends_is_told(recorded: list[bytes], tmp_path: Path) -> None:
    for lines, end in (
        (recorded, End.STOPPED),
        ([*recorded[:-1], ended_line(End.FULL)], End.FULL),
        (recorded[:-1], End.CUT_OFF),
    ):
        recording = Recording(written(tmp_path, lines))
        assert replay(recording, Board(recording.header.parameters)).difference is None
        assert recording.end is end


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b"no JSON\n"),
        gzip.compress(b'{"recording":2,"release":"9.0.0","epoch":1,"parameters":{}}\n'),
    ],
    # Not by their bytes, which have the time in them: processes that share a run have to name tests alike.
    ids=["nothing", "no gzip", "no header", "another format"],
)
def test_what_is_no_recording_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "something"
    file.write_bytes(content)
    with pytest.raises(RecordingWrong):
        Recording(file)
    assert replayed_by_command(file).exit_code == 2


@pytest.mark.parametrize(
    "line",
    [
        b'{"NeverHeardOf":{"at_ms":1}}\n',
        b'{"JobSubmitted":{"at_ms":1}}\n',
        b'{"decide":soon}\n',
        b'{"decided":[{]}\n',
        b'{"ended":"somehow"}\n',
        b'{"\xff":{}}\n',
    ],
)
def test_a_line_that_this_release_does_not_understand_is_refused_with_its_number(
    line: bytes, recorded: list[bytes], tmp_path: Path
) -> None:
    recording = Recording(written(tmp_path, [recorded[0], line]))
    with pytest.raises(RecordingWrong, match="line 2"):
        replay(recording, Board(recording.header.parameters))


def test_a_board_that_breaks_says_at_which_line(recorded: list[bytes], tmp_path: Path) -> None:
    unknown = b'{"AttemptDrawn":{"at_ms":1,"attempt_id":"nobody"}}\n'
    recording = Recording(written(tmp_path, [recorded[0], unknown]))
    with pytest.raises(KeyError) as broken:
        replay(recording, Board(recording.header.parameters))
    assert broken.value.__notes__ == ["at line 2 of the recording: " + unknown.decode().strip()]


# --- what is not the same is told -----------------------------------------------------------------------


def replayed_by_command(file: Path) -> Result:
    return CliRunner().invoke(server, ["replay", str(file)])


def test_the_command_says_that_all_is_the_same(recorded: list[bytes], tmp_path: Path) -> None:
    answer = replayed_by_command(written(tmp_path, recorded))
    assert answer.exit_code == 0
    decided = [json.loads(line)["decided"] for line in recorded if line.startswith(b'{"decided"')]
    cycles, decisions = len(decided), sum(map(len, decided))
    events = len(recorded) - 2 - 2 * cycles
    assert f"{events} events, {cycles} cycles, {decisions} decisions: the same\n" in answer.stdout


def test_a_decision_that_was_another_is_shown_with_what_led_to_it(
    recorded: list[bytes], tmp_path: Path
) -> None:
    place = next(at for at, line in enumerate(recorded) if line.count(b'"Start"') > 2)
    decided = json.loads(recorded[place])["decided"]
    decided[1]["Start"]["worker_id"] = "another-gpu"
    doctored = [*recorded[:place], json.dumps({"decided": decided}).encode() + b"\n", *recorded[place + 1 :]]
    answer = replayed_by_command(written(tmp_path, doctored))
    assert answer.exit_code == 6
    assert f"in decision 2 of the cycle at line {place}." in answer.stdout
    assert recorded[place - 2].decode().strip() in answer.stdout, "the last event before it"
    assert '   recorded: {"Start": ' in answer.stdout
    assert answer.stdout.count("another-gpu") == 1


@pytest.mark.parametrize("kind", [b"JobSubmitted", b"AttemptFinished", b"AttemptParked"])
def test_an_event_that_is_missing_is_told(kind: bytes, recorded: list[bytes], tmp_path: Path) -> None:
    places = [at for at, line in enumerate(recorded) if line.startswith(b'{"%b"' % kind)]
    without = places[len(places) // 2]
    recording = Recording(written(tmp_path, [*recorded[:without], *recorded[without + 1 :]]))
    # The board may find what follows impossible before it decides anything else.
    with suppress(KeyError, AssertionError):
        if replay(recording, Board(recording.header.parameters)).difference is None:
            pytest.fail("nothing is told")


class ChangesByDeciding(Board):
    """Leaves something behind when it was asked."""

    def decide(self, now_ms: int) -> list[Decision]:
        decisions = super().decide(now_ms)
        self.cell.queues[Tier.FAST].virtual_time += len(decisions)
        return decisions


class ByDictionaries(Board):
    """Says of the job that a dictionary has first that its model is warm."""

    def decide(self, now_ms: int) -> list[Decision]:
        return said_to_be_warm(next(iter(self.cell.jobs), None), super().decide(now_ms))


class BySets(Board):
    """Says of the job that a set has first that its model is warm."""

    def decide(self, now_ms: int) -> list[Decision]:
        return said_to_be_warm(next(iter(set(self.cell.jobs)), None), super().decide(now_ms))


def said_to_be_warm(job_id: str | None, decisions: list[Decision]) -> list[Decision]:
    return [replace(one, warm=one.job_id == job_id) if isinstance(one, Start) else one for one in decisions]


def test_a_board_that_changes_by_deciding_is_told(tmp_path: Path) -> None:
    recording = Recording(written(tmp_path, busy(ChangesByDeciding)))
    difference = replay(recording, ChangesByDeciding(recording.header.parameters)).difference
    assert difference is not None
    assert difference.asked_again
    assert "asked once more: " in "\n".join(difference.sentences())


def test_a_board_that_goes_by_the_order_of_its_dictionaries_is_told(tmp_path: Path) -> None:
    class Turned(InAnotherOrder, ByDictionaries):
        pass

    recording = Recording(written(tmp_path, busy(ByDictionaries)))
    assert replay(recording, ByDictionaries(recording.header.parameters)).difference is None
    assert replay(recording, Turned(recording.header.parameters)).difference is not None


_REPLAYS = """
import sys
from pathlib import Path
import test_replay
from scheduler.recording import Recording
from scheduler.replay import replay
recording = Recording(Path(sys.argv[1]))
board = test_replay.BySets(recording.header.parameters)
print("the same" if replay(recording, board).difference is None else "not the same")
"""


def test_a_board_that_goes_by_the_order_of_its_sets_is_told_by_another_process(tmp_path: Path) -> None:
    recording = written(tmp_path, busy(BySets))
    replays = subprocess.run(
        [sys.executable, "-c", _REPLAYS, recording],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert replays.stdout == "not the same\n"


def test_there_is_something_to_turn_around() -> None:
    cell = Cell(workers=3)
    for name in "abc":
        cell.submit(name)
    cell.decide()
    known = {name: list(vars(cell.board.cell)[name]) for name in ("accounts", "jobs", "attempts", "queues")}
    assert turn_around(cell.board.cell) > len(known)
    for name, keys in known.items():
        turned = list(vars(cell.board.cell)[name])
        assert turned == (keys if name == "queues" else keys[::-1])
