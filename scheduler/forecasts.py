"""When waiting jobs will start, and what would come of changes: foreseen in processes of their own.

Every few seconds, while something waits, a copy of the board is played forward several times
(`forecast_process`), and the newest result is kept. Questions about changes have a process to themselves, so
that nobody waits behind a round. On boards too large to be copied between two cycles, and for jobs that are
newer than the last round, the board is only glanced at.

What is foreseen decides nothing: without it the scheduler goes on, and says that it does not know.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import structlog

from scheduler.clock import LeaderClock
from scheduler.forecast_process import LENGTH_BYTES, Answer, Question, framed
from scheduler.policy.board import Board
from scheduler.policy.events import Event, JobSubmitted, LimitsChanged
from scheduler.policy.facts import facts
from scheduler.policy.foresight.eta import Eta, quick_eta
from scheduler.policy.foresight.lately import Lately
from scheduler.policy.foresight.what_if import Change, WhatIf
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.job import Job
from scheduler.policy.parameters import Parameters
from scheduler.updates import StartTimes

_log = structlog.get_logger()

# Not `-m`: run as __main__, its classes would not be those that the messages are pickled of.
_MAIN = "from scheduler.forecast_process import main; main()"

_EVERY_S = 3.0
# Copying this many jobs and workers takes the loop's thread a twentieth of a second, where each job has an
# account of its own.
_MOST_COPIED = 5_000
# After so long without an answer a process is taken to hang.
_ANSWER_S = 30.0
# Pickled at a time: between two of these slices the loop gets its turn.
_SLICE = 200
_DRAWS = 9
_STARTS = 2_000
_DRAWS_OF_CHANGE = 5
_STARTS_OF_CHANGE = 500
# Arrivals of late that a question brings; they are drawn from, and more would say little more.
_MOST_RECENT = 2_000


class ListenedBoard(Board):
    """A board whose facts forecasts listen to."""

    def __init__(self, parameters: Parameters, lately: Lately) -> None:
        super().__init__(parameters)
        self._lately = lately

    def apply(self, event: Event) -> None:
        """Take note of a fact."""
        super().apply(event)
        self._lately.apply(event)


class Forecasts:
    """What is foreseen of one board. `board` listens with the same `lately`."""

    def __init__(self, *, board: Board, lately: Lately, parameters: Parameters, clock: LeaderClock) -> None:
        self._board = board
        self._lately = lately
        self._parameters = parameters
        self._clock = clock
        self._etas: Mapping[JobId, Eta] = {}
        self._rounds = _Process("rounds")
        self._changes = _Process("changes")
        self._asked = 0

    async def run(self) -> None:
        """Foresee every few seconds, until cancelled. Whatever fails, nothing else ends with it."""
        failing = False
        try:
            while True:
                await asyncio.sleep(_EVERY_S)
                try:
                    await self.foresee()
                except Exception as error:
                    self._etas = {}
                    if not failing:
                        _log.exception("forecasts fail", reason=str(error))
                    failing = True
                else:
                    failing = False
        finally:
            await self.close()

    async def close(self) -> None:
        """End the processes."""
        await self._rounds.close()
        await self._changes.close()

    async def foresee(self) -> None:
        """Work out once when what waits now will start."""
        waits = any(self._board.queued(tier) for tier in Tier)
        if not waits or not self._board.is_whole or self._is_large():
            self._etas = {}
            return
        answer = await self._ask(self._rounds, None, draws=_DRAWS, first=_STARTS)
        self._etas = {} if answer is None else answer.etas

    def start_times(self, job: Job) -> StartTimes | None:
        """Return when a waiting job will start; None: a gate holds it, or who is before it is being read."""
        if not self._board.is_whole:
            return None
        now_ms = self._clock.now_ms()
        eta = self._etas.get(job.job_id)
        if eta is None:
            eta = quick_eta(self._board.cell, job, self._lately.mean_ms, now_ms)
        if eta is None:
            return None
        return StartTimes(p50_ms=_coarse(eta.p50_ms - now_ms), p90_ms=_coarse(eta.p90_ms - now_ms))

    async def what_ifs(self, changes: Sequence[Change]) -> Sequence[WhatIf | None]:
        """Return what would come of each change, alone, to the board as it is now.

        None: it cannot be told.
        """
        if not changes or not self._board.is_whole or self._is_large():
            return [None] * len(changes)
        answer = await self._ask(
            self._changes, tuple(changes), draws=_DRAWS_OF_CHANGE, first=_STARTS_OF_CHANGE
        )
        return [None] * len(changes) if answer is None else answer.what_ifs

    def _is_large(self) -> bool:
        jobs = sum(self._board.queued(tier) + self._board.running(tier) for tier in Tier)
        return jobs + self._board.sharing().gpus > _MOST_COPIED

    async def _ask(
        self, process: _Process, changes: tuple[Change, ...] | None, *, draws: int, first: int
    ) -> Answer | None:
        now_ms = self._clock.now_ms()
        self._asked += 1
        recent = self._lately.seen(now_ms, _MOST_RECENT)
        lately = dict.fromkeys(job.account_id for _, job in recent.jobs)
        for change in changes or ():
            lately.update(dict.fromkeys(_accounts_of(change)))
        question = Question(
            parameters=self._parameters,
            recent=recent,
            now_ms=now_ms,
            draws=draws,
            first=first,
            seed=self._asked,
            changes=changes,
        )
        return await process.ask(facts(self._board.cell, now_ms, lately), question)


class _Process:
    """One process that answers; started when it is first asked, and again if it died."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._failing = False
        """It was told already that it does not answer."""

    async def ask(self, facts: Sequence[Event], question: Question) -> Answer | None:
        """Return the answer; None if the process cannot be started, died over it or hangs."""
        async with self._turn:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    answer = await self._exchange(facts, question)
            except (OSError, asyncio.IncompleteReadError) as error:
                # A TimeoutError is an OSError.
                status = await self._end()
                if not self._failing:
                    _log.error(
                        "no forecast", process=self._name, reason=str(error) or repr(error), status=status
                    )
                self._failing = True
                return None
            except BaseException:
                # Its answer, when it comes, would be taken for that of the next question.
                await self._end()
                raise
            self._failing = False
        return answer

    async def _exchange(self, facts: Sequence[Event], question: Question) -> Answer:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _MAIN,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None, "it was made with pipes"
        assert stdout is not None, "it was made with pipes"
        for begin in range(0, len(facts), _SLICE):
            stdin.write(framed(facts[begin : begin + _SLICE]))
            await stdin.drain()
            await asyncio.sleep(0)
        stdin.write(framed(question))
        await stdin.drain()
        length = int.from_bytes(await stdout.readexactly(LENGTH_BYTES), "big")
        answer: Answer = pickle.loads(await stdout.readexactly(length))  # noqa: S301 - our own child
        return answer

    async def close(self) -> None:
        """End the process, if there is one."""
        async with self._turn:
            await self._end()

    async def _end(self) -> int | None:
        """End the process and return its exit status; None: there is none."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            # It may end by itself at this moment.
            with suppress(ProcessLookupError):
                process.kill()
        return await process.wait()


def _accounts_of(change: Change) -> Iterator[AccountId]:
    """Return the accounts that a change is about, of which the facts must tell."""
    for event in change.events:
        if isinstance(event, JobSubmitted):
            yield event.job.account_id
        elif isinstance(event, LimitsChanged):
            yield event.account_id


def _coarse(ms: int) -> int:
    """Return an expected wait no finer than it can be known, so that who watches is not told every second."""
    step_ms = 5_000 if ms < 120_000 else 30_000 if ms < 3_600_000 else 300_000
    return max(0, (ms + step_ms // 2) // step_ms * step_ms)
