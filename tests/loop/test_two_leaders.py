"""Two schedulers at once: whatever the old one still writes is refused, whichever kind of write it is.

The kinds are found in the code itself: everything that a leader has its lanes do is either a reading, tried
in a transaction that may only read, or a write, tried after another scheduler took the lead. A new kind that
is in neither table fails the first test.
"""

from __future__ import annotations

import ast
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from billing import ledger
from gpu_worker.contract import Checkpoint, StageTimes
from scheduler import leader
from scheduler.policy.ids import AccountId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.policy.usage import Rescaling
from scheduler.store import (
    checkpoints,
    dispatch,
    endings,
    journal,
    leadership,
    live,
    operations,
    parking,
    reconciling,
)
from scheduler.store.leadership import Deposed
from tests.loop.conftest import Stage, a_planned_attempt

_PACKAGE = Path(leader.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an old leader has before it: a job that waits, one that runs and one that is parked."""

    epoch: int
    """Its own."""
    now_ms: int
    waiting: str
    running: dispatch.PlannedAttempt
    parked: dispatch.PlannedAttempt
    standing: live.AccountStanding

    @property
    def checkpoint(self) -> checkpoints.SavedCheckpoint:
        """One of the running attempt."""
        return checkpoints.SavedCheckpoint(
            attempt_id=self.running.attempt_id,
            token=self.running.token,
            checkpoint=Checkpoint(path="p", step=1, steps=2, kept=StageTimes(), device="d", size_bytes=1),
        )

    @property
    def end(self) -> endings.AttemptEnd:
        """That of the running attempt."""
        return endings.AttemptEnd(
            attempt_id=self.running.attempt_id,
            token=self.running.token,
            verdict=endings.Verdict.FAILED,
            gpu_ms=1,
            failure_reason="ENGINE_ERROR",
        )

    @property
    def line(self) -> journal.Line:
        """Of the journal."""
        return journal.Line(number=2, at_ms=self.now_ms, kind="TierPaused", subject="fast", facts="{}")

    def batch(self, connection: asyncpg.Connection, **what: Any) -> Awaitable[object]:
        """What `dispatch.start_attempts` does of a batch with only this in it."""
        given: dict[str, Any] = {"planned": [], "tags": [], "running": [], **what}
        return dispatch.start_attempts(
            connection,
            epoch=self.epoch,
            parameters=Parameters(),
            now_ms=self.now_ms,
            again=False,
            **given,
        )


Deed = Callable[[asyncpg.Connection, Scene], Awaitable[object]]

# `standings` may open an account's period. So does every front door that touches the account: it is the same
# whoever does it, and is done once.
_READINGS: Mapping[str, Deed] = {
    "_plan_names": lambda connection, _: leader._plan_names(connection),
    "ledger.open_holds": lambda connection, _: ledger.open_holds(connection),
    "live.cells": lambda connection, _: live.cells(connection),
    "live.live_jobs": lambda connection, _: live.live_jobs(connection, ["ada"]),
    "live.running_attempts": lambda connection, _: live.running_attempts(connection),
    "live.standings": lambda connection, scene: live.standings(connection, ["ada"], scene.now_ms),
    "live.unheeded": lambda connection, _: live.unheeded(connection, most=1, everywhere=True),
    "live.waiting_accounts": lambda connection, _: live.waiting_accounts(connection),
    "operations.wishes": lambda connection, _: operations.wishes(connection),
    "reconciling.look": lambda connection, _: reconciling.look(
        connection, after_lot_id=0, lots=10, again=(), counted_to=0, count_to=0
    ),
}

_WRITES: Mapping[str, Mapping[str, Deed]] = {
    "dispatch.start_attempts": {
        "start": lambda connection, scene: scene.batch(
            connection, planned=[a_planned_attempt(scene.waiting, scene.now_ms, worker_id="here/gpu-2")]
        ),
        "tag": lambda connection, scene: scene.batch(connection, tags=[(AccountId("ada"), Tier.RELAX, 1)]),
        "let go": lambda connection, scene: scene.batch(
            connection,
            drawn=[parking.DrawnAttempt(attempt_id=scene.running.attempt_id, at_ms=scene.now_ms)],
        ),
        "park": lambda connection, scene: scene.batch(
            connection,
            planned=[a_planned_attempt(scene.waiting, scene.now_ms, parks=scene.running.attempt_id)],
        ),
        "resume": lambda connection, scene: scene.batch(
            connection,
            resumes=[parking.PlannedResume(attempt_id=scene.parked.attempt_id, sheltered=False, sentence="")],
        ),
        "migrate": lambda connection, scene: scene.batch(
            connection,
            migrations=[
                parking.PlannedMigration(
                    attempt_id=scene.parked.attempt_id,
                    to_attempt_id=scene.parked.token,
                    token=scene.parked.token,
                    worker_id="here/gpu-2",
                    incarnation="first",
                    decision={},
                    sentence="",
                )
            ],
        ),
    },
    "endings.give_up": {
        "give up": lambda connection, scene: endings.give_up(
            connection, epoch=scene.epoch, job_id=scene.waiting, sentence="", now_ms=scene.now_ms
        )
    },
    "self._settle": {
        "settle": lambda connection, scene: endings.settle_attempts(
            connection,
            epoch=scene.epoch,
            ends=[scene.end],
            parameters=Parameters(),
            now_ms=scene.now_ms,
        )
    },
    "checkpoints.store_checkpoints": {
        "store a checkpoint": lambda connection, scene: checkpoints.store_checkpoints(
            connection, epoch=scene.epoch, saved=[scene.checkpoint]
        )
    },
    "journal.write": {
        "write the journal": lambda connection, scene: journal.write(
            connection, epoch=scene.epoch, lines=[scene.line]
        )
    },
    "journal.forget": {
        "forget the journal": lambda connection, scene: journal.forget(
            connection, epoch=scene.epoch, before=scene.standing.renews_at
        )
    },
    "leadership.keep_time": {
        "keep the time": lambda connection, scene: leadership.keep_time(
            connection, scene.epoch, scene.now_ms + 1_000_000
        )
    },
    "live.forget_usage": {
        "forget usage": lambda connection, scene: live.forget_usage(
            connection, epoch=scene.epoch, expired=[replace(scene.standing, usage_expired=True)]
        )
    },
    "live.rescale_usage": {
        "rescale usage": lambda connection, scene: live.rescale_usage(
            connection,
            epoch=scene.epoch,
            before_ms=scene.now_ms,
            rescaling=Rescaling(decay_origin_ms=scene.now_ms + 1, factor=0.5),
        )
    },
}

_NOTICES = "live.noticed_jobs"
"""Reads and stamps. It refuses by not stamping: the reader learns by the next write that it leads no more."""

_TAKES = "leadership.take_lead"


def _work_of_lanes() -> Iterator[str]:
    """Find what is given to lanes: `….run(lambda connection: this(connection, …))` or `….run(this)`."""
    for path in sorted(_PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr != "run" or len(node.args) != 1 or "lane" not in ast.unparse(node.func):
                continue
            work = node.args[0]
            if isinstance(work, ast.Lambda):
                assert isinstance(work.body, ast.Call), f"{path.name}: {ast.unparse(work)}"
                work = work.body.func
            yield ast.unparse(work)


def test_every_kind_of_work_of_a_lane_is_tried_here() -> None:
    assert set(_work_of_lanes()) == {*_READINGS, *_WRITES, _NOTICES, _TAKES}


async def _scene(stage: Stage) -> Scene:
    await stage.open_account("ada")
    jobs = [await stage.submit("ada", Tier.FAST) for _ in range(3)]
    taken = await leadership.take_lead(stage.connection, "the old one")
    await stage.connection.execute("UPDATE scheduler.cell SET decay_origin_ms = $1", taken.now_ms)
    (standing,) = await live.standings(stage.connection, ["ada"], taken.now_ms)
    running = a_planned_attempt(jobs[0], taken.now_ms)
    parked = a_planned_attempt(jobs[1], taken.now_ms, worker_id="here/gpu-1")
    scene = Scene(
        epoch=taken.epoch,
        now_ms=taken.now_ms,
        waiting=jobs[2],
        running=running,
        parked=parked,
        standing=standing,
    )
    await scene.batch(stage.connection, planned=[running, parked])
    await stage.connection.execute(
        "UPDATE scheduler.attempt SET parked_at = now() WHERE attempt_id = $1", parked.attempt_id
    )
    await stage.connection.execute(
        "UPDATE scheduler.job SET checkpoint = $2 WHERE job_id = $1",
        parked.job_id,
        checkpoints.checkpoint_to_json(scene.checkpoint.checkpoint),
    )
    await journal.write(stage.connection, epoch=taken.epoch, lines=[replace(scene.line, number=1)])
    return scene


async def _rows(stage: Stage) -> dict[str, list[str]]:
    """Return all there is, but for who leads."""
    tables = await stage.connection.fetch(
        """SELECT table_schema || '.' || table_name AS name FROM information_schema.tables
           WHERE table_schema IN ('billing', 'scheduler') AND table_type = 'BASE TABLE'
                 AND (table_schema, table_name) <> ('scheduler', 'leader')"""
    )
    return {
        table["name"]: sorted(
            str(row) for row in await stage.connection.fetch(f"SELECT * FROM {table['name']}")
        )
        for table in tables
    }


async def test_what_reads_only_reads(stage: Stage) -> None:
    scene = await _scene(stage)
    for reads in _READINGS.values():
        async with stage.connection.transaction(readonly=True):
            await reads(stage.connection, scene)


@pytest.mark.unsound
async def test_the_old_one_writes_nothing_any_more(stage: Stage) -> None:
    scene = await _scene(stage)
    taken = await leadership.take_lead(stage.connection, "the new one")
    before = await _rows(stage)
    for kinds in _WRITES.values():
        for kind, write in kinds.items():
            try:
                await write(stage.connection, scene)
            except Deposed:
                continue
            pytest.fail(f"{kind} was not refused")
    await live.noticed_jobs(stage.connection, epoch=scene.epoch, job_ids=[scene.waiting])
    assert await _rows(stage) == before
    assert await _last_now_ms(stage) == taken.now_ms


@pytest.mark.unsound
async def test_each_of_them_would_have_written_something(stage: Stage) -> None:
    scene = await _scene(stage)
    before = await _rows(stage), await _last_now_ms(stage)
    for kinds in _WRITES.values():
        for kind, write in kinds.items():
            undone = stage.connection.transaction()
            await undone.start()
            await write(stage.connection, scene)
            assert (await _rows(stage), await _last_now_ms(stage)) != before, kind
            await undone.rollback()


async def _last_now_ms(stage: Stage) -> int:
    last_ms: int = await stage.connection.fetchval("SELECT last_now_ms FROM scheduler.leader")
    return last_ms
