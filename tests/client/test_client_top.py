"""The live board: what operators and everybody else see, also on small terminals and while nobody answers."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from rich.console import Console

from billing.v1.billing_pb2 import Balance
from scheduler.client.aio import DarkroomClient
from scheduler.client.top import Board, Fleet, OwnJobs, look
from scheduler.v1 import fleet_pb2, job_pb2
from scheduler.v1.account_pb2 import Account
from scheduler.v1.fleet_pb2 import (
    Decision,
    ListDecisionsResponse,
    ListWorkersResponse,
    Queues,
    TierQueue,
    Worker,
    WorkerRun,
)
from scheduler.v1.job_pb2 import ListJobsResponse
from tests.client.scripted_service import BUSY, UID, Refuse, ScriptedService, a_job
from tests.client.typed_commands import darkroom, lines, one_document

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOT_AN_OPERATOR = Refuse(code=grpc.StatusCode.PERMISSION_DENIED, reason="ROLE_REQUIRED")


def a_worker(number: int, account: str = "", tier: job_pb2.Tier = job_pb2.TIER_FAST) -> Worker:
    worker = Worker(name=f"workers/node-a/gpu-{number}", state=fleet_pb2.WORKER_STATE_IDLE)
    if account:
        worker.state = fleet_pb2.WORKER_STATE_RUNNING
        worker.active.CopyFrom(WorkerRun(job=f"accounts/{account}/jobs/{UID}", tier=tier))
        worker.active.step, worker.active.steps = 12, 20
        worker.active.start_time.FromDatetime(NOON - timedelta(seconds=42))
    return worker


QUEUES = Queues(
    tiers=[
        TierQueue(tier=job_pb2.TIER_FAST, waiting=2, running=2, oldest_wait_ms=3_000),
        TierQueue(tier=job_pb2.TIER_RELAX, waiting=17, running=1, paused=True, pause_reason="new fans"),
    ],
    gpus=4,
    idle_gpus=1,
    fast_gpus=2,
    relax_floor_gpus=1,
    wanted_gpus=6,
)
WORKERS = [
    a_worker(0),
    a_worker(1, "ada"),
    a_worker(2, "ada"),
    a_worker(3, "ben", job_pb2.TIER_RELAX),
    Worker(
        name="workers/node-b/gpu-0",
        state=fleet_pb2.WORKER_STATE_SET_ASIDE,
        sentence="It lost 3 jobs in a row.",
    ),
]
DECISIONS = [
    Decision(
        kind=fleet_pb2.DECISION_KIND_GIVEN_UP,
        tier=job_pb2.TIER_RELAX,
        job=f"accounts/ben/jobs/{UID}",
        sentence="It could not be done, and failed.",
    ),
    Decision(
        kind=fleet_pb2.DECISION_KIND_STARTED,
        tier=job_pb2.TIER_FAST,
        job=f"accounts/ada/jobs/{UID}",
        worker="workers/node-a/gpu-1",
        sentence="It waited longest.",
    ),
]
for ago, decision in enumerate(DECISIONS, start=1):
    decision.time.FromDatetime(NOON - timedelta(seconds=20 * ago))
FLEET = Fleet(queues=QUEUES, workers=WORKERS, decisions=DECISIONS)
ADA = Account(
    name="accounts/ada",
    mode=job_pb2.TIER_FAST,
    jobs_running=1,
    jobs_waiting=1,
    balance=Balance(plan="plans/basic", available_ms=60_000),
)


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Board:
    return Board("127.0.0.1:7443", every_s=2, clock=clock)


def drawn(board: Board, width: int = 120, height: int = 30) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(board)
    shown: str = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in shown.splitlines()]


def test_an_operator_sees_the_queues_the_workers_and_who_holds_the_gpus(board: Board) -> None:
    board.show(FLEET)
    shown = "\n".join(drawn(board))
    assert "GPUs: fast 2, relax 1, idle 1 of 4, 6 wanted; 1 kept for relax" in shown
    assert "Held by: ada 2, ben 1" in shown
    assert "paused: new fans" in shown
    (running,) = [line for line in shown.splitlines() if "gpu-3" in line]
    assert running.split()[1:7] == ["running", "relax", "ben", UID, "12/20", "42"]


def test_an_operator_sees_what_was_decided_lately_and_why(board: Board) -> None:
    board.show(FLEET)
    newest, before = drawn(board)[-2:]
    assert newest.split("  ") != before.split("  ")
    assert newest.startswith("20 s ago  given up  relax ben 1b4e28ba")
    assert newest.endswith("It could not be done, and failed.")
    assert before.startswith("40 s ago  started   fast ada 1b4e28ba")
    assert before.endswith("node-a/gpu-1  It waited longest.")


def test_a_worker_that_leaves_says_for_how_long_and_why(board: Board) -> None:
    leaving = Worker(
        name="workers/node-b/gpu-0",
        state=fleet_pb2.WORKER_STATE_LEAVING,
        sentence="Its machine is about to end.",
    )
    leaving.state_time.FromDatetime(NOON - timedelta(seconds=8))
    board.show(Fleet(queues=QUEUES, workers=[leaving], decisions=[]))
    (line,) = [line for line in drawn(board) if line.startswith("node-b/gpu-0")]
    assert " ".join(line.split()) == "node-b/gpu-0 leaving Its machine is about to end. 8 s"


def test_what_is_wrong_comes_first(board: Board) -> None:
    board.show(FLEET)
    shown = drawn(board)
    first = shown[next(number for number, line in enumerate(shown) if line.startswith("worker")) + 1]
    assert first.startswith("node-b/gpu-0")
    assert "It lost 3 jobs in a row." in first


def test_the_bar_is_as_long_as_the_terminal_is_wide(board: Board) -> None:
    board.show(FLEET)
    assert drawn(board, width=40)[2] == "█" * 40


def test_shares_are_of_the_time_that_was_looked_at(board: Board, clock: Clock) -> None:
    board.show(FLEET)
    assert not any("GPU time" in line for line in drawn(board))
    clock.passes(10)
    board.show(Fleet(queues=Queues(gpus=4, idle_gpus=4), workers=[], decisions=[]))
    clock.passes(10)
    board.show(FLEET)
    (shares,) = [line for line in drawn(board) if "GPU time" in line]
    assert shares.endswith("fast 25 %, relax 12 %, idle 62 %")


@pytest.mark.parametrize("width", [30, 60, 80, 100, 140, 200])
@pytest.mark.parametrize("height", [10, 14, 24])
def test_no_terminal_is_too_small(board: Board, width: int, height: int) -> None:
    workers = [a_worker(number, "ada") for number in range(100)]
    board.show(Fleet(queues=QUEUES, workers=workers, decisions=[]))
    shown = drawn(board, width, height)
    assert all(len(line) <= width for line in shown)
    assert any("gpu-0" in line for line in shown) or width < 60
    rows = sum("run" in line and "gpu" in line for line in shown)
    if width >= 60:
        assert shown[-1] == f"… and {100 - rows} more"
    if height >= 14:
        assert len(shown) <= height
    board.show(Fleet(queues=QUEUES, workers=workers, decisions=DECISIONS * 10))
    shown = drawn(board, width, height)
    assert all(len(line) <= width for line in shown)
    if height >= 14:
        assert len(shown) <= height


def test_while_nobody_answers_it_shows_what_was_and_since_when(board: Board, clock: Clock) -> None:
    board.show(FLEET)
    clock.passes(12)
    board.lose("Cannot reach the service at 127.0.0.1:7443.")
    shown = drawn(board)
    assert shown[1].startswith("No answer for 12 s; what is below was true then. Cannot reach the service")
    assert any("Held by: ada 2" in line for line in shown)
    board.show(FLEET)
    assert not any("No answer" in line for line in drawn(board))
    assert not any("GPU time" in line for line in drawn(board)), "nobody knows what was meanwhile"


def test_an_answer_that_is_late_is_noticed_before_it_fails(board: Board, clock: Clock) -> None:
    board.show(FLEET)
    clock.passes(5)
    assert "No answer" not in drawn(board)[1]
    clock.passes(5)
    assert drawn(board)[1].startswith("No answer for 10 s")


def test_other_peoples_text_cannot_control_the_board(board: Board) -> None:
    board.show(OwnJobs(account=ADA, jobs=[a_job(prompt="a cat\x1b[2J [red]loud[/red]")]))
    shown = "\n".join(drawn(board))
    assert "a cat [2J [red]loud[/red]" in shown


async def test_without_the_role_one_sees_ones_own_jobs(
    service: ScriptedService, client: DarkroomClient, board: Board
) -> None:
    service.says("GetQueues", NOT_AN_OPERATOR)
    service.says("GetAccount", ADA)
    job = a_job(state=job_pb2.JOB_STATE_RUNNING)
    job.start_time.FromDatetime(NOON - timedelta(seconds=7))
    waiting = a_job(queue_status=job_pb2.QueueStatus(start_p50_ms=20_000, start_p90_ms=60_000))
    service.says("ListJobs", ListJobsResponse(jobs=[job, waiting]))
    board.show(await look(client))
    states = service.asked("ListJobs")[0].states
    assert list(states) == [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING]
    shown = "\n".join(drawn(board))
    assert "ada (basic), mode fast: 1 running, 1 waiting" in shown
    assert "fast time left 1 min" in shown
    assert "7 s" in shown
    assert "in about 20 s" in shown


# Into anything but a terminal


def test_in_a_pipe_it_is_printed_once(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("GetQueues", QUEUES)
    service.says("ListWorkers", ListWorkersResponse(workers=WORKERS))
    service.says("ListDecisions", ListDecisionsResponse(decisions=DECISIONS))
    printed = lines(darkroom(environment, "top"))
    assert printed[0][:2] == ["fast", "2"]
    assert printed[-3][0] == "node-b/gpu-0"
    assert printed[-1][1:] == ["started", "fast", "ada", UID, "node-a/gpu-1", "It waited longest."]


def test_json_is_one_document(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("GetQueues", QUEUES, NOT_AN_OPERATOR)
    service.says("ListWorkers", ListWorkersResponse(workers=WORKERS))
    service.says("ListDecisions", ListDecisionsResponse(decisions=DECISIONS))
    service.says("GetAccount", ADA)
    service.says("ListJobs", ListJobsResponse(jobs=[a_job()]))
    operators = one_document(darkroom(environment, "top", "--json"))
    assert operators["queues"]["gpus"] == 4
    assert len(operators["workers"]) == len(WORKERS)
    assert operators["workers"][1]["active"]["step"] == 12
    assert [one["sentence"] for one in operators["decisions"]] == [one.sentence for one in DECISIONS]
    own = one_document(darkroom(environment, "top", "--json"))
    assert (own["account"]["name"], own["jobs"][0]["uid"]) == ("accounts/ada", UID)


# In a terminal


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scheduler.client.cli", *arguments],
            env={**os.environ, **environment, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.output = b""

    def until(self, text: str) -> None:
        """Return once it has written that."""
        ends_s = time.monotonic() + 30
        while text.encode() not in self.output:
            assert time.monotonic() < ends_s, self.output[-2_000:]
            assert self._read(), self.output[-2_000:]

    def press(self, key: str) -> None:
        os.write(self._ours, key.encode())

    def ends(self) -> int:
        """Wait for its end; return its exit status."""
        while self._read():
            pass
        return self.process.wait(timeout=30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], 30)[0]:
            return False
        try:
            block = os.read(self._ours, 65536)
        except OSError:
            return False  # how a pseudo-terminal says that nobody holds the other end any more
        self.output += block
        return bool(block)


@contextmanager
def a_terminal(environment: dict[str, str], *arguments: str) -> Iterator[Terminal]:
    terminal = Terminal(environment, *arguments)
    try:
        yield terminal
    finally:
        terminal.close()


def test_it_lives_through_a_service_that_goes_away_and_comes_back_until_q_is_pressed(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("GetQueues", QUEUES, BUSY, *[Queues(gpus=9, idle_gpus=9)] * 1_000)
    service.says("ListWorkers", *[ListWorkersResponse(workers=WORKERS)] * 1_000)
    service.says("ListDecisions", *[ListDecisionsResponse()] * 1_000)
    with a_terminal(environment, "top", "--every", "0.6") as terminal:
        terminal.until("Held by: ada 2")
        terminal.until("No answer for")
        terminal.until("idle 9 of 9")
        terminal.press("q")
        assert terminal.ends() == 0, terminal.output
    assert b"Traceback" not in terminal.output
    assert b"\x1b[?1049l" in terminal.output, "the screen is as it was before"


def test_ctrl_c_ends_it_well(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("GetQueues", *[QUEUES] * 1_000)
    service.says("ListWorkers", *[ListWorkersResponse(workers=WORKERS)] * 1_000)
    service.says("ListDecisions", *[ListDecisionsResponse()] * 1_000)
    with a_terminal(environment, "top", "--every", "0.5") as terminal:
        terminal.until("Held by: ada 2")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.ends() == 0, terminal.output
    assert b"Traceback" not in terminal.output


def test_a_key_that_is_revoked_meanwhile_ends_it(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("GetQueues", QUEUES, Refuse(code=grpc.StatusCode.UNAUTHENTICATED, reason="UNAUTHENTICATED"))
    service.says("ListWorkers", ListWorkersResponse(workers=WORKERS))
    service.says("ListDecisions", ListDecisionsResponse())
    with a_terminal(environment, "top", "--every", "0.5") as terminal:
        assert terminal.ends() == 1, terminal.output
    assert b"darkroom config set key" in terminal.output
