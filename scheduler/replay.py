"""Decides again what a recording says was decided, and tells the first difference.

The same events give the same decisions, and deciding changes nothing. So each cycle is decided twice: both
answers must be the one that was recorded. A release that decides otherwise on purpose differs too.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

from scheduler.policy.board import Board
from scheduler.recording import Answered, Asked, Line, Recording, RecordingWrong, Told, Written, as_written

# Enough to see what led there, few enough to be read.
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first decision that is another one."""

    before: tuple[Line, ...]
    """The last of what happened before it, the question it answers included."""
    which: int
    """Of the cycle's decisions, from 1."""
    recorded: Written | None
    """None: it had decided nothing more."""
    decided: Written | None
    asked_again: bool
    """It is between two answers to the same question, the first of which stands as `recorded`."""

    def sentences(self) -> Iterator[str]:
        """Tell it, a line at a time."""
        asked = self.before[-1]
        yield f"The first difference is in decision {self.which} of the cycle at line {asked.number}."
        yield "What happened before it:"
        for line in self.before:
            yield f"  {line.number:>8}  {line.text}"
        first = "decided at first" if self.asked_again else "recorded"
        second = "asked once more" if self.asked_again else "decided now"
        width = max(len(first), len(second))
        yield f"{first:>{width}}: {_told(self.recorded)}"
        yield f"{second:>{width}}: {_told(self.decided)}"


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What came of deciding a recording again."""

    events: int
    cycles: int
    """Of which the answers are recorded."""
    decisions: int
    """That were recorded."""
    difference: Difference | None
    """None: all is the same."""


def replay(recording: Recording, board: Board) -> Replayed:
    """Tell an empty board what a recording's board was told, and compare what both decided.

    Raises RecordingWrong. Whatever the board raises has a note of the line at which it did.
    """
    events = cycles = decisions = 0
    before: deque[Line] = deque(maxlen=_SHOWN)
    difference: Difference | None = None
    decided: Sequence[Written] | None = None
    for line in recording:
        match line.entry:
            case Told(event=event):
                before.append(line)
                with _noted(line):
                    board.apply(event)
                events += 1
            case Asked(now_ms=now_ms):
                if decided is not None:
                    raise RecordingWrong(f"what was asked before line {line.number} has no answer")
                before.append(line)
                with _noted(line):
                    decided = as_written(board.decide(now_ms))
                    again = as_written(board.decide(now_ms))
                difference = _difference(before, decided, again, asked_again=True)
            case Answered(decisions=recorded):
                if decided is None:
                    raise RecordingWrong(f"line {line.number} answers what was not asked")
                difference = _difference(before, recorded, decided, asked_again=False)
                before.pop()
                cycles, decisions, decided = cycles + 1, decisions + len(recorded), None
        if difference is not None:
            break
    return Replayed(events=events, cycles=cycles, decisions=decisions, difference=difference)


@contextmanager
def _noted(line: Line) -> Iterator[None]:
    """Say with whatever goes wrong at which line of the recording it did."""
    try:
        yield
    except Exception as wrong:
        wrong.add_note(f"at line {line.number} of the recording: {line.text}")
        raise


def _difference(
    before: Iterable[Line], first: Sequence[Written], second: Sequence[Written], *, asked_again: bool
) -> Difference | None:
    for which, (one, other) in enumerate(zip_longest(first, second), start=1):
        if one != other:
            return Difference(
                before=tuple(before), which=which, recorded=one, decided=other, asked_again=asked_again
            )
    return None


def _told(decision: Written | None) -> str:
    return "nothing more" if decision is None else json.dumps(decision)
