"""The process that plays futures forward: questions come in on stdin, answers go out on stdout.

It knows nothing but what a question brings, and ends when whoever asks is gone. It is a process of its own
because a future of thousands of starts takes seconds, and polite to all others because nobody waits for it
who could not do without.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from scheduler.policy.events import Event
from scheduler.policy.foresight.eta import Eta, etas
from scheduler.policy.foresight.lately import Recent, resampled
from scheduler.policy.foresight.what_if import Change, WhatIf, what_if
from scheduler.policy.ids import JobId
from scheduler.policy.parameters import Parameters

LENGTH_BYTES = 8
"""Before each message on either pipe: its length, big-endian. Messages are pickled."""

_NICENESS = 10


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be foreseen, from the facts that were sent before it as lists of events."""

    parameters: Parameters
    recent: Recent
    now_ms: int
    draws: int
    """How many futures; 9 tell a p90, 19 tell it with less noise."""
    first: int
    """How many starts are played in each; what is later is told from tags."""
    seed: int
    changes: tuple[Change, ...] | None
    """What is asked about, each alone; None: when everything that waits will start."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was foreseen. Times are those of the clock that the question's are of."""

    etas: Mapping[JobId, Eta]
    """Empty if it was asked about changes."""
    what_ifs: tuple[WhatIf, ...]
    """Of each change."""


def foresee(facts: Sequence[Event], question: Question) -> Answer:
    """Return the answer; the same for the same question."""
    uniform = random.Random(question.seed).random  # noqa: S311 - chances, not secrets
    draws = [resampled(question.recent, uniform) for _ in range(question.draws)]
    if question.changes is None:
        found = etas(facts, question.parameters, draws, question.now_ms, question.first)
        return Answer(etas=found, what_ifs=())
    what_ifs = tuple(
        what_if(facts, question.parameters, draws, question.now_ms, change, question.first)
        for change in question.changes
    )
    return Answer(etas={}, what_ifs=what_ifs)


def framed(message: object) -> bytes:
    """Return a message as it goes over a pipe."""
    body = pickle.dumps(message, protocol=5)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer until there are no more questions."""
    facts: list[Event] = []
    while header := questions.read(LENGTH_BYTES):
        # Only the process that started this one has the other end of the pipe.
        message: Any = pickle.loads(questions.read(int.from_bytes(header, "big")))  # noqa: S301
        if isinstance(message, Question):
            answers.write(framed(foresee(facts, message)))
            answers.flush()
            facts = []
        else:
            facts += message


def main() -> None:
    """Be the process."""
    os.nice(_NICENESS)
    serve(sys.stdin.buffer, sys.stdout.buffer)
