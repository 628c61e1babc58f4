"""Takes down what the board is told and decides: an operator's flight recorder, off unless it is asked for.

Each leader writes a file of its own (`recording` has the form), from the first event of its recovery on. The
loop makes lines and puts them in a queue; a thread packs and writes them, twice a second. So a disk never
holds the loop up, and a leader that is killed loses less than a second of its end. Where the disk is full, or
slower than what happens, or the file has its largest size, recording ends with one line in the log, and the
scheduler goes on.

Events have ids, times and numbers, and nothing that anybody wrote.
"""

from __future__ import annotations

import threading
from io import RawIOBase
from pathlib import Path
from queue import Empty, SimpleQueue

import structlog

from scheduler.forecasts import ListenedBoard
from scheduler.policy.decisions import Decision
from scheduler.policy.events import Event
from scheduler.policy.foresight.lately import Lately
from scheduler.policy.parameters import Parameters
from scheduler.recording import (
    End,
    Header,
    Packing,
    answered_line,
    asked_line,
    ended_line,
    header_line,
    told_line,
)
from scheduler.settings import RELEASE

_log = structlog.get_logger()

_EVERY_S = 0.5
# About 100 MB. A takeover makes 10,000 a second, which are ten times as long, and the thread packs several
# times as many.
_MOST_WAITING = 200_000
_LINES_AT_A_TIME = 20_000
# What is left of the last second is on the disk long before; one that hangs is not waited for.
_CLOSE_S = 2.0
_KEPT = 20
"""Recordings: a scheduler that fails again and again must not fill the disk by that."""


class RecordedBoard(ListenedBoard):
    """A board of which everything is taken down that decides what it decides."""

    def __init__(self, parameters: Parameters, lately: Lately, recorder: Recorder) -> None:
        super().__init__(parameters, lately)
        self._recorder = recorder

    def apply(self, event: Event) -> None:
        """Take note of a fact."""
        # Before: what breaks the board is what its recording is looked into for.
        if self._recorder.is_on:
            self._recorder.put(told_line(event))
        super().apply(event)

    def decide(self, now_ms: int) -> list[Decision]:
        """Return what should be done now."""
        if not self._recorder.goes_on():
            return super().decide(now_ms)
        self._recorder.put(asked_line(now_ms))
        decisions = super().decide(now_ms)
        self._recorder.put(answered_line(decisions))
        return decisions


class Recorder:
    """Writes one recording. One task puts lines, in their order; a thread writes them."""

    def __init__(self, file: RawIOBase, packing: Packing, *, bytes_max: int) -> None:
        """`file` has the first line, of `packing`, and is closed by this."""
        self.is_on = True
        """Whether lines are still wanted."""
        self._file = file
        self._packing = packing
        self._bytes_left = bytes_max
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._closing = threading.Event()
        self._ended_because = ""
        """Set by the thread when it can write no more."""
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Take a line."""
        self._lines.put(line)

    def goes_on(self) -> bool:
        """Return whether lines are still wanted, having looked; says in the log when they no longer are."""
        if self.is_on and self._lines.qsize() > _MOST_WAITING:
            self._ended_because = self._ended_because or "the disk is slower than what happens"
            self._lines.put(None)
        if self.is_on and self._ended_because:
            self.is_on = False
            _log.error("recording ended", reason=self._ended_because)
        return self.is_on

    def close(self) -> None:
        """Write what is left, and wait for that a moment."""
        self._lines.put(ended_line(End.STOPPED))
        self._lines.put(None)
        self._closing.set()
        self._thread.join(_CLOSE_S)
        self.goes_on()
        self.is_on = False

    def _run(self) -> None:
        try:
            with self._file:
                goes_on = True
                while goes_on:
                    lines, goes_on = self._next()
                    packed = self._packing.packed(b"".join(lines))
                    self._bytes_left -= len(packed)
                    self._write(packed)
                    if self._bytes_left < 0:
                        self._write(self._packing.packed(ended_line(End.FULL)))
                        self._ended_because = "it has its largest size (scheduling.record_bytes_max)"
                        goes_on = False
                self._write(self._packing.end())
        except OSError as trouble:
            self._ended_because = str(trouble)

    def _next(self) -> tuple[list[bytes], bool]:
        """Wait for lines, and return them and whether there may be more."""
        first = self._lines.get()
        lines: list[bytes] = []
        if self._lines.qsize() < _LINES_AT_A_TIME:
            # So that what is packed together is worth it.
            self._closing.wait(_EVERY_S)
        while first is not None:
            lines.append(first)
            if len(lines) == _LINES_AT_A_TIME:
                return lines, True
            try:
                first = self._lines.get_nowait()
            except Empty:
                return lines, True
        return lines, False

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]


def start_recording(folder: Path, *, epoch: int, parameters: Parameters, bytes_max: int) -> Recorder | None:
    """Begin the recording of a leader, and remove the oldest; None: it cannot be written, as the log says."""
    header, packing = Header(release=RELEASE, epoch=epoch, parameters=parameters), Packing()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in recordings(folder)[: -(_KEPT - 1)]:
            old.unlink(missing_ok=True)
        file = recording_of(folder, epoch).open("xb", buffering=0)
        # Few bytes, at once: so that there is a file for each scheduler that led.
        file.write(packing.packed(header_line(header)))
    except OSError as trouble:
        _log.error("nothing is recorded", reason=str(trouble))
        return None
    return Recorder(file, packing, bytes_max=bytes_max)


def recording_of(folder: Path, epoch: int) -> Path:
    """Return where the recording of an epoch's leader is."""
    return folder / f"epoch-{epoch:020}.jsonl.gz"


def recordings(folder: Path) -> list[Path]:
    """Return the recordings in a folder, the oldest first."""
    return sorted(folder.glob("epoch-*.jsonl.gz"))
