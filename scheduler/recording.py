"""A recording: what one leader's board was told, when it was asked, and what it decided, in their order.

It is the first thing that happened to that board and all that followed, so whoever has it can decide it all
again (`replay`). It is written by the leader (`recorder`) while `scheduling.record_to` names a folder.

A file of JSON lines, in gzip. The first says what it is; then a line each:

    {"JobSubmitted": {…}}             an event that the board was told: its class and its fields
    {"decide": 1760000000000}         it was asked what to do, at this time in milliseconds since 1970
    {"decided": [{"Start": {…}}, …]}  what it answered
    {"ended": "stopped"}              nothing is missing; or "full": it has its largest size

The recording of a leader that was stopped or killed has no last line, and lacks what was on its way to the
disk, of less than a second. Before that nothing is missing.

JSON, and not pickles: a file that is sent to somebody must not run anything there, whoever looks into it
needs nothing of ours, and pickles of these classes take eight times as long to write.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from scheduler.policy.decisions import Decision
from scheduler.policy.events import Event
from scheduler.policy.parameters import Parameters

_GZIP_WBITS = 31
"""zlib's name for the form of gzip."""
_PART_BYTES = 64 * 1024

FORMAT = 1
"""Raised when the lines change so that a reader of the former ones would not understand them."""

Written = Mapping[str, Any]
"""A decision as JSON has it: `{"Start": {…}}`. None has a set in it, so equal ones are written alike."""

_EVENTS: Mapping[str, TypeAdapter[Any]] = {one.__name__: TypeAdapter(one) for one in get_args(Event)}
_WRITE_EVENT = {
    one: (f'{{"{one.__name__}":'.encode(), _EVENTS[one.__name__].dump_json) for one in get_args(Event)
}
_WRITE_DECISION = {
    one: (f'{{"{one.__name__}":'.encode(), TypeAdapter[Any](one).dump_json) for one in get_args(Decision)
}


class RecordingWrong(Exception):
    """A file is not a recording, or not one that this release can read."""


class End(StrEnum):
    """How a recording ends."""

    STOPPED = "stopped"
    """Its scheduler ended by itself: it failed, or another leads. Nothing is missing."""
    FULL = "full"
    """It reached its largest size; its scheduler went on."""
    CUT_OFF = "cut off"
    """Its scheduler was ended, or leads yet, or could not write on."""

    @property
    def sentence(self) -> str:
        """Say it to a person."""
        return _SENTENCES[self]


_SENTENCES = {
    End.STOPPED: "It is whole: it ends where its scheduler did.",
    End.FULL: "It has its largest size (scheduling.record_bytes_max): its scheduler went on.",
    End.CUT_OFF: "It has no end: its scheduler was stopped or killed, leads yet, or could not write on.",
}


class Header(BaseModel):
    """What a recording is of."""

    model_config = ConfigDict(frozen=True)

    recording: int = FORMAT
    release: str
    epoch: int
    parameters: Parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """The board was told what happened."""

    event: Event


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The board was asked what should be done."""

    now_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What it decided when it was asked last."""

    decisions: Sequence[Written]


Entry = Told | Asked | Answered


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """An entry, and where it stands."""

    number: int
    """In the file, from 1; the header is the first."""
    text: str
    entry: Entry


def header_line(header: Header) -> bytes:
    """Return the first line of a recording."""
    return header.model_dump_json().encode() + b"\n"


def told_line(event: Event) -> bytes:
    """Return the line of an event that the board is told."""
    begin, write = _WRITE_EVENT[type(event)]
    return b"%b%b}\n" % (begin, write(event))


def asked_line(now_ms: int) -> bytes:
    """Return the line of a question."""
    return b'{"decide":%d}\n' % now_ms


def answered_line(decisions: Sequence[Decision]) -> bytes:
    """Return the line of an answer."""
    written = []
    for decision in decisions:
        begin, write = _WRITE_DECISION[type(decision)]
        written.append(b"%b%b}" % (begin, write(decision)))
    return b'{"decided":[%b]}\n' % b",".join(written)


def ended_line(end: End) -> bytes:
    """Return the last line."""
    return b'{"ended":"%b"}\n' % end.encode()


def as_written(decisions: Sequence[Decision]) -> Sequence[Written]:
    """Return decisions as a recording has them."""
    decided: Sequence[Written] = json.loads(answered_line(decisions))["decided"]
    return decided


class Packing:
    """Makes the bytes of a file of its lines. What is written of them can be read, whatever follows."""

    def __init__(self) -> None:
        # Above this level it takes much longer, for files that are little smaller.
        self._pack = zlib.compressobj(1, zlib.DEFLATED, _GZIP_WBITS)

    def packed(self, lines: bytes) -> bytes:
        """Return what is to be written for these."""
        return self._pack.compress(lines) + self._pack.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        """Return what is to be written last."""
        return self._pack.flush(zlib.Z_FINISH)


class Recording:
    """A recording that is read from its beginning."""

    def __init__(self, file: Path) -> None:
        """Read what it is of. Raises RecordingWrong and OSError."""
        self._file = file
        self.end = End.CUT_OFF
        """How it ends; known once all of it was read."""
        first = next(self._texts(), None)
        if first is None:
            raise RecordingWrong(f"{file} has no first line")
        try:
            self.header = Header.model_validate_json(first)
        except ValidationError as wrong:
            raise RecordingWrong(f"{file} does not begin as a recording does") from wrong
        if self.header.recording != FORMAT:
            raise RecordingWrong(
                f"{file} is written in format {self.header.recording}, and this release reads {FORMAT}"
            )

    def __iter__(self) -> Iterator[Line]:
        """Go through what happened, up to the end or to where it was cut off. Raises RecordingWrong."""
        self.end = End.CUT_OFF
        for number, text in enumerate(self._texts(), start=1):
            if number == 1:
                continue
            try:
                entry = _entry(text)
            except ValueError as wrong:  # of text, of JSON, of what it should be
                raise RecordingWrong(f"{self._file}, line {number}: {wrong}") from wrong
            if isinstance(entry, End):
                self.end = entry
                return
            yield Line(number=number, text=text.decode(), entry=entry)

    def _texts(self) -> Iterator[bytes]:
        """Return the lines that are there to their ends, without these."""
        # Not gzip.open: it may fail before it has given all that was there before the tear.
        unpack, rest = zlib.decompressobj(_GZIP_WBITS), b""
        with self._file.open("rb") as packed:
            while part := packed.read(_PART_BYTES):
                try:
                    *texts, rest = (rest + unpack.decompress(part)).split(b"\n")
                except zlib.error as wrong:
                    raise RecordingWrong(f"{self._file} is damaged, or no recording: {wrong}") from wrong
                yield from texts


def _entry(text: bytes) -> Entry | End:
    """Return what a line says. Raises ValueError."""
    name, _, body = text[2:-1].partition(b'":')
    match name:
        case b"decide":
            return Asked(now_ms=int(body))
        case b"decided":
            return Answered(decisions=json.loads(body))
        case b"ended":
            return End(json.loads(body))
    kind = _EVENTS.get(name.decode())
    if kind is None:
        raise ValueError(f"this release knows no event {name.decode()!r}")
    event: Event = kind.validate_json(body)
    return Told(event=event)
