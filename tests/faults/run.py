"""One run: the service comes up, people use it, faults strike and are mended, and what is left is checked.

The plan and what people intend follow from the seed; who wins each race does not. A run that finds something
names the seed, and keeps the logs, the promises and the plan.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg

from scheduler.client.aio import DarkroomClient
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.deletions import Deletions
from scheduler.frontdoor.orphans import Orphans
from scheduler.metrics import FrontDoorMetrics
from scheduler.policy.auditing.findings import Bound
from scheduler.store import invariants
from scheduler.store.pool import open_pool
from scheduler.v1 import job_pb2
from tests.faults import checks
from tests.faults.checks import Of, Wrong
from tests.faults.counters import Sometimes, count
from tests.faults.crowd import Crowd, Deed
from tests.faults.faults import fault
from tests.faults.plan import BREAKS_CALLS, HOLDS_ALL_UP, Kind, Planned
from tests.faults.stage import PLAIN, Scene, Stage, stage

# After the last fault was mended.
_DRAIN_S = 240.0
_SETTLE_S = 30.0
_LOOK_S = 0.25
_CHECK_EVERY_S = 4.0
# A call that a wire broke off is known to be within this; a try of a client's takes four seconds at most.
_CALLS_BREAK_FOR_S = 6.0
_AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of a run."""

    seed: int
    findings: tuple[Wrong, ...]
    """What is not as it should be; none is what is hoped for."""
    faults: Counter[Kind] = field(default_factory=Counter)
    """That hit something."""
    promised: int = 0
    """Jobs that were acknowledged."""
    ended: int = 0
    """Of those."""
    refused: Counter[str] = field(default_factory=Counter)
    recovery_s: float = 0.0
    """The longest in which no attempt began or ended though somebody waited, after the last mend in it of a
    fault that may hold all up."""
    standstill_s: float = 0.0
    """The same, whatever was wrong meanwhile."""
    wait_s: float = 0.0
    """The longest from acceptance to the first start."""
    counters: Counter[Sometimes] = field(default_factory=Counter)
    cases: Counter[Bound] = field(default_factory=Counter)
    """How often each bound of fairness that always holds could have been broken."""
    orphans: int = 0
    """Files that faults left behind, which the sweep for orphans removed."""

    @property
    def doubled(self) -> int:
        """Findings of something that was done twice."""
        return sum(one.of is Of.DOUBLED for one in self.findings)


@dataclass(kw_only=True)
class _Seen:
    """What was noticed while the run went on."""

    faults: Counter[Kind] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    mended: list[float] = field(default_factory=list)
    """When faults were mended that may have held all up, in seconds since 1970."""
    store_mended_s: float = 0.0
    """When the store was away or full for the last time, likewise."""
    breaking: int = 0
    """Faults that may break off a client's call, just now."""
    broke_s: float = -_CALLS_BREAK_FOR_S
    """When the last of those was mended, by the monotonic clock."""
    unanswered: dict[str, int] = field(
        default_factory=lambda: {one.sentence: one.number for one in invariants.INVARIANTS}
    )
    """Invariants that no look has had an answer of yet."""
    broken: list[Wrong] = field(default_factory=list)

    def wires_fail(self) -> bool:
        """Whether a client's call may be broken off now, or may have been a moment ago."""
        return self.breaking > 0 or time.monotonic() - self.broke_s < _CALLS_BREAK_FOR_S


async def run(
    plan: Sequence[Planned], *, seed: int, span_s: float, scene: Scene = PLAIN, keep_in: Path | None = None
) -> Report:
    """Run a plan and check what came of it; logs are kept in `keep_in`, if that is given."""
    seen = _Seen()
    async with stage(scene, keep_in) as it:
        crowd = Crowd([door.address for door in it.doors], it.admin_key, seed, seen.wires_fail)
        try:
            await crowd.open_accounts()
            await it.up()
            undisturbed = await crowd.draw_undisturbed()
            await _through_the_faults(it, crowd, plan, span_s, seen)
            await crowd.let_everything_run()
            late = await crowd.see_the_ends(_DRAIN_S)
            report = await _judged(it, crowd, undisturbed, seed, seen, late)
            if keep_in is not None and report.findings:
                it.database.dump(keep_in / "database.sql")
        finally:
            await crowd.close()
            if keep_in is not None:
                _write_down(keep_in, crowd, seen)
    return report


def _write_down(folder: Path, crowd: Crowd, seen: _Seen) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    crowd.write(folder / "promises.jsonl")
    (folder / "faults.log").write_text("\n".join(seen.log) + "\n")


async def _through_the_faults(
    it: Stage, crowd: Crowd, plan: Sequence[Planned], span_s: float, seen: _Seen
) -> None:
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        looking = group.create_task(_keep_looking(it, seen), name="look at invariants")
        living = group.create_task(crowd.run(), name="crowd")
        striking = [group.create_task(_strike(it, planned, began, seen)) for planned in plan]
        await asyncio.sleep(span_s)
        await asyncio.gather(*striking)
        await it.up()
        crowd.stop()
        await living
        looking.cancel()


async def _strike(it: Stage, planned: Planned, began: float, seen: _Seen) -> None:
    await asyncio.sleep(began + planned.at_ms / 1000 - time.monotonic())
    breaks_calls = planned.kind in BREAKS_CALLS
    seen.breaking += breaks_calls
    try:
        async with fault(it, planned) as hit:
            seen.log.append(f"{time.monotonic() - began:6.1f} s  {planned}: {hit or 'hit nothing'}")
            if hit is not None:
                seen.faults[planned.kind] += 1
                await asyncio.sleep(planned.for_ms / 1000)
    finally:
        if breaks_calls:
            seen.breaking -= 1
            seen.broke_s = time.monotonic()
    if hit is not None and planned.kind in HOLDS_ALL_UP:
        seen.mended.append(time.time())
    if planned.kind in (Kind.STORE_AWAY, Kind.STORE_FULL):
        seen.store_mended_s = time.time()


async def _keep_looking(it: Stage, seen: _Seen) -> None:
    """Ask the invariants that hold at any moment, again and again, while the database answers."""
    while True:
        await asyncio.sleep(_CHECK_EVERY_S)
        try:
            async with it.database.connection() as connection:
                answers = await invariants.results(connection, 10_000)
        except _AWAY:
            continue
        seen.broken += heard(answers, seen.unanswered)


def heard(answers: Iterable[invariants.InvariantResult], unanswered: dict[str, int]) -> list[Wrong]:
    """Return what answers say is broken, and take those that are answers off `unanswered`."""
    broken = []
    for one in answers:
        if one.violations != invariants.NOT_ASKED:
            unanswered.pop(one.sentence, None)
        if one.violations > 0:
            of = checks.of_invariant(one.number)
            broken.append(Wrong(sentence=f"invariant broken meanwhile: {one}", of=of))
    return broken


async def written_down(connection: asyncpg.Connection) -> None:
    """Return once the journal, written once a second, has the end of all that ended under this leader.

    Raises TimeoutError.
    """
    query = """SELECT count(*) FROM scheduler.attempt CROSS JOIN scheduler.leader
                WHERE ended_at > taken_at AND state <> 'migrated' AND NOT EXISTS (
                          SELECT FROM scheduler.journal
                           WHERE journal.epoch = leader.epoch AND subject = attempt_id::text
                                 AND kind IN ('AttemptFinished', 'AttemptLost'))"""
    async with asyncio.timeout(_SETTLE_S):
        while await connection.fetchval(query):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(_LOOK_S)


async def _judged(
    it: Stage,
    crowd: Crowd,
    undisturbed: Mapping[int, tuple[str, ...]],
    seed: int,
    seen: _Seen,
    late: list[str],
) -> Report:
    found = [Wrong(sentence=one, of=Of.LOST) for one in late]
    found += dict.fromkeys(seen.broken)
    found += [
        Wrong(sentence=f"while faults struck, invariant {number} was never answered: {sentence}")
        for sentence, number in seen.unanswered.items()
    ]
    found += [Wrong(sentence=one) for one in crowd.broken]
    found += [Wrong(sentence=one, of=Of.DOUBLED) for one in crowd.told_again]
    if not late:
        found += [Wrong(sentence=one) for one in await _memory_is_the_database(it, crowd)]
    async with it.database.connection() as connection:
        await written_down(connection)
        evidence = checks.Evidence(
            connection=connection,
            promises=crowd.promises,
            undisturbed=undisturbed,
            store=it.store.path,
            recordings=it.recordings,
            store_mended_s=seen.store_mended_s,
        )
        leaks, orphans = await _swept(it, evidence)
        found += leaks
        found += await checks.findings(evidence)
        counters = await count(connection, said=it.said(), promises=crowd.promises)
        cases = Counter({one.bound: one.cases for one in await checks.audited(evidence)})
        standstills = await _standstills(connection)
        created = {one.job_id for one in crowd.promises if one.deed is Deed.CREATED}
        return Report(
            seed=seed,
            faults=seen.faults,
            promised=len(created),
            ended=await connection.fetchval(
                """SELECT count(*) FROM scheduler.job
                    WHERE job_id = ANY($1::uuid[]) AND state IN ('succeeded', 'failed', 'cancelled')""",
                list(created),
            ),
            refused=crowd.refused,
            recovery_s=longest_s(standstills, seen.mended),
            standstill_s=longest_s(standstills),
            wait_s=await connection.fetchval(
                """SELECT COALESCE(extract(epoch FROM max(started_at - created_at)), 0)::float8
                     FROM scheduler.job"""
            ),
            counters=counters,
            cases=cases,
            orphans=orphans,
            findings=tuple(found),
        )


async def _memory_is_the_database(it: Stage, crowd: Crowd) -> list[str]:
    """Compare while nothing is there, and while a paused tier has jobs that wait."""
    async with DarkroomClient(it.doors[0].address, it.admin_key) as admin:
        found = await _compared(it, admin)
        await admin.pause_tier(job_pb2.TIER_RELAX, reason="to look at jobs that wait")
        member = crowd.members[-1]
        waiting = [await member.create(number, job_pb2.TIER_RELAX) for number in range(2)]
        found += await _compared(it, admin)
        await admin.resume_tier(job_pb2.TIER_RELAX, reason="looked at")
        async with asyncio.timeout(_DRAIN_S):
            await asyncio.gather(*(member.watch(number, job) for number, job in enumerate(waiting)))
    return found


async def _swept(it: Stage, evidence: checks.Evidence) -> tuple[list[Wrong], int]:
    """Let the front door's sweeps remove what they would have removed in a week.

    Returns what was left for the sweep for orphans that no fault explains, and how much that removed.
    """
    for table, due in (
        ("stray_checkpoint", "since"),
        ("stray_picture", "since"),
        ("job", "files_due_at"),
    ):
        await evidence.connection.execute(f"UPDATE scheduler.{table} SET {due} = {due} - interval '1 day'")
    pool = await open_pool(it.database.dsn, 2)
    try:
        store, clock = Artifacts(f"file://{it.store.path}"), lambda: datetime.now(UTC)
        await Deletions(pool, store, clock).sweep()
        leaks = await _leaks(evidence)
        swept = await Orphans(pool, store, FrontDoorMetrics(()), clock, kept=timedelta(0)).sweep("")
    finally:
        await pool.close()
    return leaks, len(swept.removed)


async def _leaks(evidence: checks.Evidence) -> list[Wrong]:
    """Look until there are none: a worker cleans up a moment after its job has ended."""
    late = time.monotonic() + _SETTLE_S
    while True:
        found = await checks.findings(evidence, {checks.nothing_leaks: Of.OTHER})
        if not found or time.monotonic() > late:
            return found
        await asyncio.sleep(_LOOK_S)


async def _compared(it: Stage, admin: DarkroomClient) -> list[str]:
    """Compare until it agrees: what was committed a moment ago reaches the board a moment later."""
    late = time.monotonic() + _SETTLE_S
    async with it.database.connection() as connection:
        while True:
            found = await checks.memory_is_the_database(admin, connection, await it.exposition())
            if not found or time.monotonic() > late:
                return [f"memory_is_the_database: {one}" for one in found]
            await asyncio.sleep(_LOOK_S)


async def _standstills(connection: asyncpg.Connection) -> list[tuple[float, float]]:
    """Return from when to when nothing began or ended and somebody waited, in seconds since 1970."""
    return [
        (one["began_s"], one["ended_s"])
        for one in await connection.fetch(
            """WITH moves AS (
                   SELECT at, lag(at) OVER (ORDER BY at) AS before FROM (
                       SELECT started_at AS at FROM scheduler.attempt
                       UNION SELECT ended_at FROM scheduler.attempt) AS every_move)
               SELECT extract(epoch FROM before)::float8 AS began_s,
                      extract(epoch FROM at)::float8 AS ended_s
                 FROM moves
                WHERE EXISTS (SELECT FROM scheduler.job WHERE created_at < before AND ended_at >= at)"""
        )
    ]


def longest_s(standstills: Iterable[tuple[float, float]], mended: Sequence[float] = ()) -> float:
    """Return how long the longest standstill was, from the last time in it that something was mended."""
    return max(
        (
            ended - max((at for at in mended if began < at < ended), default=began)
            for began, ended in standstills
        ),
        default=0.0,
    )
