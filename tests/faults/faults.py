"""Each kind of fault: how it strikes, and how it is mended.

A fault is a context. On entering it strikes and says what it hit, or None where nothing of that kind was
there just then; on leaving it is mended, whatever else broke meanwhile.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import asyncpg
import psutil

from tests.faults.plan import Kind, Planned
from tests.faults.stage import RESTART_S, Door, NotStarted, RayNode, Stage

Fault = Callable[[Stage, Planned], AbstractAsyncContextManager[str | None]]

_SKEWS_S = (-600, -90, -20, 20, 90, 600)
"""By how much a clock may be wrong."""
_LOOK_S = 0.05
# Longer than any fault lasts.
_STARTS_WITHIN_S = 60.0
_UNREACHABLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


def fault(stage: Stage, planned: Planned) -> AbstractAsyncContextManager[str | None]:
    """Return the fault that is planned, ready to strike."""
    return _FAULTS[planned.kind](stage, planned)


# --- processes ------------------------------------------------------------------------------------------


@asynccontextmanager
async def _kill_door(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    door = _door(stage, planned)
    ran = door.runs
    door.kill()
    yield door.name if ran else None


@asynccontextmanager
async def _freeze_door(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    door = _door(stage, planned)
    frozen = door.family
    _signal(frozen, signal.SIGSTOP)
    try:
        yield door.name if frozen else None
    finally:
        _signal(frozen, signal.SIGCONT)


@asynccontextmanager
async def _kill_scheduler(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    yield _killed(stage.schedulers(), planned)


@asynccontextmanager
async def _freeze_scheduler(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    async with _frozen(stage.schedulers(), planned) as hit:
        yield hit


@asynccontextmanager
async def _kill_worker(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    yield _killed(stage.workers(), planned)


@asynccontextmanager
async def _freeze_worker(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    async with _frozen(stage.workers(), planned) as hit:
        yield hit


@asynccontextmanager
async def _kill_node(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    node = _node(stage, planned)
    if not node.runs:
        yield None
        return
    node.held_down = True
    node.kill()
    try:
        yield node.name
    finally:
        node.held_down = False


@asynccontextmanager
async def _freeze_node(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    node = _node(stage, planned)
    frozen = node.family
    _signal(frozen, signal.SIGSTOP)
    try:
        yield node.name if frozen else None
    finally:
        # Its raylet may find that the cluster took it for dead, and end: then it is started again.
        _signal(frozen, signal.SIGCONT)


@asynccontextmanager
async def _freeze_leader(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    """The head is spared: it holds Ray's own memory, without which nobody leads."""
    schedulers = {process.pid for process in stage.schedulers()}
    for node in stage.nodes.values():
        frozen = node.family
        if any(process.pid in schedulers for process in frozen):
            _signal(frozen, signal.SIGSTOP)
            try:
                yield node.name
            finally:
                _signal(frozen, signal.SIGCONT)
            return
    yield None


@asynccontextmanager
async def _stop_database(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    await stage.database.stop_at_once()
    try:
        yield "PostgreSQL"
    finally:
        await stage.database.start()


@asynccontextmanager
async def _worker_and_database(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    """What a worker has done is reported and cannot be stored yet; then it dies."""
    async with _stop_database(stage, planned):
        await asyncio.sleep(planned.for_ms / 2000)
        workers = stage.workers()
        _signal(workers, signal.SIGKILL)
        yield f"PostgreSQL, {len(workers)} workers"


# --- wires ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def _delay_clients(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    door = _door(stage, planned)
    door.wire.delay_s = 0.05 + planned.which % 10 / 20
    try:
        yield f"{door.name} by {door.wire.delay_s:.2f} s"
    finally:
        door.wire.delay_s = 0.0


@asynccontextmanager
async def _cut_clients(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    for door in stage.doors:
        door.wire.cut()
    yield "both front doors"


@asynccontextmanager
async def _half_close_clients(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    door = _door(stage, planned)
    door.wire.half_close()
    yield door.name


@asynccontextmanager
async def _swallow_answers(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    door = _door(stage, planned)
    door.wire.swallows_answers = True
    try:
        yield door.name
    finally:
        door.wire.listen_again()


@asynccontextmanager
async def _delay_database(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    stage.wire.delay_s = 0.01 + planned.which % 10 / 100
    try:
        yield f"by {stage.wire.delay_s:.2f} s"
    finally:
        stage.wire.delay_s = 0.0


@asynccontextmanager
async def _cut_database(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    stage.wire.cut()
    yield "every connection"


@asynccontextmanager
async def _half_close_database(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    stage.wire.half_close()
    yield "every connection"


@asynccontextmanager
async def _swallow_database(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    stage.wire.swallows_answers = True
    try:
        yield "every connection"
    finally:
        stage.wire.listen_again()


@asynccontextmanager
async def _lose_commits(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    """It strikes with the first commit whose answer is lost. Every other one is of ends of attempts alone, as
    few commits are."""
    commits, of_ends = 3 + planned.which % 8, planned.which // 8 % 2
    before = stage.wire.answers_lost.total()
    stage.wire.lose_commit_answers(commits, "darkroom settlement" if of_ends else "")
    try:
        late = time.monotonic() + planned.for_ms / 1000
        while stage.wire.answers_lost.total() == before and time.monotonic() < late:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        struck = f"the next {commits}" + " of ends" * of_ends
        yield struck if stage.wire.answers_lost.total() > before else None
    finally:
        stage.wire.lose_commit_answers(0)


# --- the store ------------------------------------------------------------------------------------------


@asynccontextmanager
async def _store_away(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    """A file in the folder's place: every read, write and deletion fails. (Modes would not stop root.)"""
    stage.store.point_to_nothing()
    try:
        yield "the folder"
    finally:
        stage.store.point_to_folder()


@asynccontextmanager
async def _store_full(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    """Workers may open files and write no byte to them, as on a full disk; what there is can be read."""
    workers = stage.workers()
    limited = [worker for worker in workers if _limit_files(worker, full=True)]
    try:
        yield f"for {len(limited)} workers" if limited else None
    finally:
        for worker in limited:
            _limit_files(worker, full=False)


def _limit_files(worker: psutil.Process, *, full: bool) -> bool:
    with suppress(psutil.NoSuchProcess):
        _, most = worker.rlimit(psutil.RLIMIT_FSIZE)
        worker.rlimit(psutil.RLIMIT_FSIZE, (0 if full else most, most))
        return True
    return False


# --- the database's other users, and clocks ---------------------------------------------------------------


@asynccontextmanager
async def _old_transaction(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    async with _left_open(stage, "SELECT count(*) FROM scheduler.job") as hit:
        yield hit


@asynccontextmanager
async def _locked_account(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    locks = f"""SELECT account_id FROM billing.subscription WHERE account_id =
                (SELECT account_id FROM scheduler.job ORDER BY account_id
                 OFFSET {planned.which} % greatest(1, (SELECT count(*) FROM scheduler.job)) LIMIT 1)
                FOR UPDATE"""
    async with _left_open(stage, locks) as hit:
        yield hit


@asynccontextmanager
async def _left_open(stage: Stage, statement: str) -> AsyncIterator[str | None]:
    """Hold a transaction open that has done one statement and had a row; the database may end it."""
    try:
        connection = await asyncpg.connect(stage.database.dsn, timeout=5)
    except _UNREACHABLE:
        yield None
        return
    try:
        try:
            await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            rows = await connection.fetch(statement, timeout=5)
        except _UNREACHABLE:
            yield None
            return
        yield "one transaction" if rows else None
    finally:
        connection.terminate()


@asynccontextmanager
async def _wrong_clock(stage: Stage, planned: Planned) -> AsyncIterator[str | None]:
    """Start a front door anew on a machine whose clock is wrong, and anew when it is right.

    It strikes once that door takes jobs. Raises NotStarted.
    """
    door = _door(stage, planned)
    if door.held_down:
        yield None
        return
    door.held_down = True
    door.kill()
    skew_s = _SKEWS_S[planned.which % len(_SKEWS_S)]
    try:
        await _started(door, skew_s)
        yield f"{door.name} by {skew_s} s"
    finally:
        door.kill()
        door.held_down = False


async def _started(door: Door, skew_s: int) -> None:
    """Start a door, again and again as its supervisor would: other faults end it, or have its database away.

    Raises NotStarted once no fault can be the reason any more.
    """
    late = time.monotonic() + _STARTS_WITHIN_S
    while True:
        try:
            await door.start(skew_s)
            return
        except NotStarted:
            if time.monotonic() > late:
                raise
        await asyncio.sleep(RESTART_S)


# --- whom it hits ---------------------------------------------------------------------------------------


def _door(stage: Stage, planned: Planned) -> Door:
    return stage.doors[planned.which % len(stage.doors)]


def _node(stage: Stage, planned: Planned) -> RayNode:
    nodes = list(stage.nodes.values())
    return nodes[planned.which % len(nodes)]


def _killed(processes: Sequence[psutil.Process], planned: Planned) -> str | None:
    if not processes:
        return None
    hit = processes[planned.which % len(processes)]
    _signal([hit], signal.SIGKILL)
    return f"process {hit.pid}"


@asynccontextmanager
async def _frozen(processes: Sequence[psutil.Process], planned: Planned) -> AsyncIterator[str | None]:
    if not processes:
        yield None
        return
    hit = processes[planned.which % len(processes)]
    _signal([hit], signal.SIGSTOP)
    try:
        yield f"process {hit.pid}"
    finally:
        _signal([hit], signal.SIGCONT)


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


_FAULTS: Mapping[Kind, Fault] = {
    Kind.KILL_DOOR: _kill_door,
    Kind.FREEZE_DOOR: _freeze_door,
    Kind.KILL_SCHEDULER: _kill_scheduler,
    Kind.FREEZE_SCHEDULER: _freeze_scheduler,
    Kind.KILL_WORKER: _kill_worker,
    Kind.FREEZE_WORKER: _freeze_worker,
    Kind.KILL_NODE: _kill_node,
    Kind.FREEZE_NODE: _freeze_node,
    Kind.FREEZE_LEADER: _freeze_leader,
    Kind.STOP_DATABASE: _stop_database,
    Kind.WORKER_AND_DATABASE: _worker_and_database,
    Kind.DELAY_CLIENTS: _delay_clients,
    Kind.CUT_CLIENTS: _cut_clients,
    Kind.HALF_CLOSE_CLIENTS: _half_close_clients,
    Kind.SWALLOW_ANSWERS: _swallow_answers,
    Kind.DELAY_DATABASE: _delay_database,
    Kind.CUT_DATABASE: _cut_database,
    Kind.HALF_CLOSE_DATABASE: _half_close_database,
    Kind.SWALLOW_DATABASE: _swallow_database,
    Kind.LOSE_COMMITS: _lose_commits,
    Kind.STORE_AWAY: _store_away,
    Kind.STORE_FULL: _store_full,
    Kind.OLD_TRANSACTION: _old_transaction,
    Kind.LOCKED_ACCOUNT: _locked_account,
    Kind.WRONG_CLOCK: _wrong_clock,
}
assert _FAULTS.keys() == set(Kind)
