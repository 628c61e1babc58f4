"""What a leader decides is taken down as it happens, and never holds it up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.board import Board
from scheduler.policy.events import AttemptDrawn, CellRestored
from scheduler.policy.foresight.lately import Lately
from scheduler.policy.ids import AttemptId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.recorder import RecordedBoard, Recorder, recording_of, recordings, start_recording
from scheduler.recording import Asked, End, Packing, Recording, Told
from scheduler.replay import Replayed, replay
from scheduler.settings import Scheduling
from tests.loop.conftest import Stage


def replayed(file: Path) -> tuple[Replayed, End]:
    recording = Recording(file)
    return replay(recording, Board(recording.header.parameters)), recording.end


async def test_every_leader_leaves_a_recording_of_which_all_is_decided_again(
    stage: Stage, tmp_path: Path
) -> None:
    parameters = Parameters(park_patience_ms=1)
    await stage.open_account("ada")
    fleet = LocalFleet(workers=2, take_ms=None, gpu_ms=500)
    jobs = []
    async with stage.leading(fleet, parameters=parameters, record_to=tmp_path / "new") as leader:
        first = leader.epoch
        jobs = [await stage.submit("ada", tier) for tier in (Tier.RELAX, Tier.RELAX, Tier.FAST)]
        await stage.until_state(leader, jobs[2], "running")
        await stage.cancel("ada", jobs[1])
    async with stage.leading(LocalFleet(workers=2, take_ms=0), record_to=tmp_path / "new") as leader:
        second = leader.epoch
        await stage.until_state(leader, jobs[0], "succeeded")
    assert recordings(tmp_path / "new") == [recording_of(tmp_path / "new", one) for one in (first, second)]
    for epoch, kept in ((first, parameters), (second, Parameters())):
        file = recording_of(tmp_path / "new", epoch)
        again, end = replayed(file)
        assert again.difference is None
        assert again.decisions > 0
        assert end is End.STOPPED
        assert (Recording(file).header.epoch, Recording(file).header.parameters) == (epoch, kept)


class Recorded:
    """A board with a recorder, to which things happen."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.board = RecordedBoard(Parameters(), Lately(0), recorder)
        self.now_ms = 0

    def turn(self) -> None:
        self.now_ms += 1
        self.board.apply(
            CellRestored(at_ms=self.now_ms, tier=Tier.FAST, virtual_time=self.now_ms, decay_origin_ms=0)
        )
        self.board.decide(self.now_ms)

    def until_it_ends(self) -> str:
        """Let the thread end by itself, and return what the log says at the next turn."""
        self.recorder._thread.join()
        with capture_logs() as logs:
            self.turn()
            self.turn()
            self.recorder.close()
        (line,) = logs
        assert line["event"] == "recording ended"
        assert self.board.virtual_time(Tier.FAST) == self.now_ms, "the board goes on"
        return str(line["reason"])


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[Recorded]:
    recorder = start_recording(tmp_path, epoch=7, parameters=Parameters(), bytes_max=2**30)
    assert recorder is not None
    yield Recorded(recorder)
    recorder.close()


def test_what_happened_is_there_when_it_stopped_in_its_order(recorded: Recorded, tmp_path: Path) -> None:
    for _ in range(1_000):
        recorded.turn()
    recorded.recorder.close()
    entries = [line.entry for line in Recording(recording_of(tmp_path, 7))]
    assert [one.event.at_ms for one in entries if isinstance(one, Told)] == list(range(1, 1_001))
    assert [one.now_ms for one in entries if isinstance(one, Asked)] == list(range(1, 1_001))


def test_an_event_that_breaks_the_board_is_in_its_recording(recorded: Recorded, tmp_path: Path) -> None:
    recorded.turn()
    event = AttemptDrawn(at_ms=2, attempt_id=AttemptId("nobody"))
    with pytest.raises(KeyError):
        recorded.board.apply(event)
    recorded.recorder.close()
    *_, last = Recording(recording_of(tmp_path, 7))
    assert last.entry == Told(event=event)


def test_a_full_disk_ends_the_recording_and_nothing_else() -> None:
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0)
    recorded = Recorded(Recorder(full, Packing(), bytes_max=2**30))
    recorded.turn()
    assert "No space left" in recorded.until_it_ends()


def test_a_recording_of_the_largest_size_ends_and_says_so(tmp_path: Path) -> None:
    recorder = start_recording(tmp_path, epoch=7, parameters=Parameters(), bytes_max=100)
    assert recorder is not None
    recorded = Recorded(recorder)
    for _ in range(100):
        recorded.turn()
    assert "scheduling.record_bytes_max" in recorded.until_it_ends()
    again, end = replayed(recording_of(tmp_path, 7))
    assert again.difference is None
    assert end is End.FULL


def test_a_disk_that_is_too_slow_is_not_waited_for() -> None:
    read, write = os.pipe()
    recorder = Recorder(os.fdopen(write, "wb", buffering=0), Packing(), bytes_max=2**30)
    recorded = Recorded(recorder)
    recorder.put(os.urandom(2**20))
    while recorder.is_on:
        recorder.put(b"more")
        with capture_logs() as logs:
            recorder.goes_on()
    assert [line["reason"] for line in logs] == ["the disk is slower than what happens"]
    recorded.turn()
    assert recorded.board.virtual_time(Tier.FAST) == 1, "the board goes on"
    os.close(read)
    recorder.close()


def test_a_folder_that_cannot_be_written_is_told_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with capture_logs() as logs:
        assert start_recording(tmp_path / "file", epoch=7, parameters=Parameters(), bytes_max=2**30) is None
    assert [line["event"] for line in logs] == ["nothing is recorded"]


def test_the_newest_twenty_recordings_stay(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    for epoch in (5, 1_000_000, *range(100, 120)):
        recorder = start_recording(tmp_path, epoch=epoch, parameters=Parameters(), bytes_max=2**30)
        assert recorder is not None
        recorder.close()
    kept = [recording_of(tmp_path, epoch) for epoch in (*range(101, 120), 1_000_000)]
    assert recordings(tmp_path) == kept
    assert (tmp_path / "notes").exists()


def test_the_folder_is_named_from_the_root() -> None:
    with pytest.raises(ValidationError, match="from the root"):
        Scheduling(record_to=Path("recordings"))
