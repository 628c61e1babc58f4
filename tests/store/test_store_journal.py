"""What the board was told, kept as rows: the auditor finds there what it would have found in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable

import asyncpg
import pytest

from scheduler.clock import from_ms
from scheduler.policy.auditing.audit import audit
from scheduler.policy.auditing.findings import Bound, Verdict
from scheduler.policy.auditing.journal import Journal, Recorder
from scheduler.policy.board import Board
from scheduler.policy.decisions import Start
from scheduler.policy.events import (
    AccountRestored,
    AttemptDrawn,
    AttemptFinished,
    AttemptLost,
    AttemptParked,
    AttemptRestored,
    AttemptStarted,
    CancelWanted,
    CellRestored,
    Event,
    FairShare,
    FundsChanged,
    JobSubmitted,
    MemoryOutgrown,
    Outcome,
    RefusedBecause,
    StartRefused,
    StopAsked,
    TierChanged,
    TierPaused,
    Waited,
    WaitingRestored,
    WorkerJoined,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker
from scheduler.store import journal
from scheduler.store.journal import Notes
from scheduler.store.leadership import Deposed

START_MS = 1_800_000_000_000
JOB_MS = 10_000


class Service:
    """A board whose owner takes down what it is told, as the loop does: one GPU, jobs of ten seconds."""

    def __init__(self) -> None:
        self.board = Board(Parameters())
        self.notes = Notes()
        self.recorder = Recorder()
        self.now_ms = START_MS
        self.running: dict[AttemptId, JobId] = {}
        for tier in Tier:
            self.tell(CellRestored(at_ms=self.now_ms, tier=tier, virtual_time=0, decay_origin_ms=START_MS))
        worker = Worker(
            worker_id=WorkerId("w"), memory_bytes=2**34, speed_permille=1000, warm_models=frozenset("m")
        )
        self.tell(WorkerJoined(at_ms=self.now_ms, worker=worker))
        for name in ("ann", "ben"):
            self.tell(self.restored(name))

    def restored(self, name: str) -> AccountRestored:
        return AccountRestored(
            at_ms=self.now_ms,
            account_id=AccountId(name),
            limits=Limits(running=3, relax_running=2, accepted=100),
            weight_milli=1000,
            shares={Tier.RELAX: FairShare(finish_tag=0, tag=None, usage=60_000.5)},
        )

    def tell(self, event: Event) -> None:
        whose = self.board.whose(event)
        self.board.apply(event)
        self.notes.note(event, whose)
        self.recorder.note(event)

    def tell_of_waiting(self, name: str, jobs: int) -> None:
        """Tell of an account that waited when this board's owner took over."""
        events = [self.restored(name), self.waiting(name, jobs)]
        for event in events:
            self.board.apply(event)
            self.recorder.note(event)
        self.notes.put_off(events)

    def waiting(self, name: str, jobs: int) -> WaitingRestored:
        waited = (Waited(self.submitted(name, number).job, number, number, None) for number in range(jobs))
        return WaitingRestored(at_ms=self.now_ms, account_id=AccountId(name), jobs=tuple(waited))

    def submit(self, account: str, number: int, tier: Tier = Tier.RELAX) -> None:
        self.tell(self.submitted(account, number, tier))

    def submitted(self, account: str, number: int, tier: Tier = Tier.RELAX) -> JobSubmitted:
        job = Job(
            job_id=JobId(f"{account}-{number}"),
            account_id=AccountId(account),
            tier=tier,
            arrival=number,
            predicted_ms=JOB_MS,
            step_ms=500,
            model="m",
            memory_bytes=2**30,
        )
        return JobSubmitted(at_ms=self.now_ms, job=job)

    def cycle(self) -> None:
        decisions = self.board.decide(self.now_ms)
        self.notes.decided(decisions)
        self.recorder.decided(decisions)
        for start in (one for one in decisions if isinstance(one, Start)):
            if start.parks is not None:
                self.tell(AttemptParked(at_ms=self.now_ms, attempt_id=start.parks))
            attempt_id = AttemptId(f"{start.job_id}/1")
            self.running[attempt_id] = start.job_id
            self.tell(
                AttemptStarted(
                    at_ms=self.now_ms,
                    job_id=start.job_id,
                    attempt_id=attempt_id,
                    worker_id=start.worker_id,
                    charge=start.charge,
                )
            )

    def finish(self) -> None:
        """End what runs, ten seconds later."""
        self.now_ms += JOB_MS
        for attempt_id in list(self.running):
            del self.running[attempt_id]
            self.tell(
                AttemptFinished(
                    at_ms=self.now_ms, attempt_id=attempt_id, outcome=Outcome.SUCCEEDED, gpu_ms=JOB_MS
                )
            )

    def work_off(self) -> Service:
        for number in range(6):
            self.submit("ann", number)
            self.submit("ben", number)
        for _ in range(12):
            self.cycle()
            self.finish()
        return self


@pytest.fixture
async def epoch(connection: asyncpg.Connection) -> int:
    return await connection.fetchval("UPDATE scheduler.leader SET epoch = epoch + 1 RETURNING epoch")


async def read(connection: asyncpg.Connection, start_ms: int, end_ms: int) -> journal.Period:
    return await journal.read(connection, start=from_ms(start_ms), end=from_ms(end_ms))


def violated(kept: Journal) -> Iterable[Bound]:
    return [one.bound for one in audit(kept, Parameters()) if one.verdict is Verdict.VIOLATED]


async def test_what_is_read_is_what_was_noted(connection: asyncpg.Connection, epoch: int) -> None:
    service = Service().work_off()
    await journal.write(connection, epoch=epoch, lines=service.notes.lines())
    period = await read(connection, START_MS, service.now_ms + 1)
    assert period.unknown == (
        "Nothing is known from before the period: it begins with the first takeover in it.",
    )
    assert list(period.journal.records) == list(service.recorder.journal().records)
    assert not violated(period.journal)


async def test_lines_written_again_after_a_lost_answer_are_there_once(
    connection: asyncpg.Connection, epoch: int
) -> None:
    service = Service()
    lines = service.notes.lines()
    await journal.write(connection, epoch=epoch, lines=lines)
    await journal.write(connection, epoch=epoch, lines=lines)
    assert await connection.fetchval("SELECT count(*) FROM scheduler.journal") == len(lines)
    assert not service.notes.lines()


async def test_a_deposed_scheduler_notes_nothing(connection: asyncpg.Connection, epoch: int) -> None:
    with pytest.raises(Deposed):
        await journal.write(connection, epoch=epoch - 1, lines=Service().notes.lines())


async def test_a_period_in_the_middle_is_audited_without_its_beginning(
    connection: asyncpg.Connection, epoch: int
) -> None:
    service = Service().work_off()
    await journal.write(connection, epoch=epoch, lines=service.notes.lines())
    period = await read(connection, START_MS + 3 * JOB_MS + 1, START_MS + 9 * JOB_MS)
    assert not period.unknown
    findings = {one.bound: one for one in audit(period.journal, Parameters())}
    assert not violated(period.journal)
    assert findings[Bound.B10].cases >= 5, "starts in the period"
    assert findings[Bound.B11].cases >= 5
    assert findings[Bound.TAGS].cases > 10


async def test_what_a_job_ran_out_of_before_a_period_is_known_in_it(
    connection: asyncpg.Connection, epoch: int
) -> None:
    service = Service()
    service.submit("ann", 0)
    service.cycle()
    job_id = JobId("ann-0")
    service.tell(MemoryOutgrown(at_ms=START_MS, job_id=job_id, memory_bytes=2**35))
    service.tell(AttemptLost(at_ms=START_MS, attempt_id=AttemptId("ann-0/1"), executed=False))
    service.tell(CancelWanted(at_ms=START_MS + 2, job_id=job_id))
    await journal.write(connection, epoch=epoch, lines=service.notes.lines())
    period = await read(connection, START_MS + 1, START_MS + 3)
    (submitted,) = [one for one in period.journal.records if isinstance(one, JobSubmitted)]
    assert (submitted.job.job_id, submitted.job.memory_bytes) == (job_id, 2**35)


async def test_a_job_that_waits_before_a_period_and_starts_in_it_is_known_from_its_submission(
    connection: asyncpg.Connection, epoch: int
) -> None:
    service = Service()
    service.submit("ann", 0)
    service.cycle()
    service.submit("ben", 0)
    service.finish()
    service.cycle()
    await journal.write(connection, epoch=epoch, lines=service.notes.lines())
    period = await read(connection, START_MS + 1, service.now_ms + 1)
    kinds = [type(record).__name__ for record in period.journal.records]
    assert kinds == [
        "CellMet",
        "WorkerJoined",
        "AccountMet",
        "AccountMet",
        "AttemptRestored",
        "JobSubmitted",
        "AttemptFinished",
        "Dispatch",
    ]


async def test_a_run_parked_before_a_period_is_parked_in_it(
    connection: asyncpg.Connection, epoch: int
) -> None:
    service = Service()
    service.submit("ann", 0)
    service.cycle()
    service.now_ms += 1_000
    service.submit("ben", 0, Tier.FAST)
    service.cycle()
    service.now_ms += 1_000
    service.tell(
        AttemptFinished(
            at_ms=service.now_ms, attempt_id=AttemptId("ben-0/1"), outcome=Outcome.SUCCEEDED, gpu_ms=1_000
        )
    )
    service.tell(
        AttemptFinished(
            at_ms=service.now_ms, attempt_id=AttemptId("ann-0/1"), outcome=Outcome.CANCELLED, gpu_ms=1_000
        )
    )
    await journal.write(connection, epoch=epoch, lines=service.notes.lines())
    period = await read(connection, START_MS + 1_500, service.now_ms + 1)
    parked = [getattr(record, "parked_since_ms", None) for record in period.journal.records]
    assert START_MS + 1_000 in parked
    assert not violated(period.journal)


async def test_a_run_drawn_before_a_period_is_drawn_in_it(connection: asyncpg.Connection, epoch: int) -> None:
    service = Service()
    for name in ("ann", "ben"):
        service.submit(name, 0)
    service.cycle()
    service.now_ms += 1_000
    (drawn,) = service.running
    service.tell(AttemptDrawn(at_ms=service.now_ms, attempt_id=drawn))
    service.cycle()
    assert len(service.running) == 2
    service.finish()
    await journal.write(connection, epoch=epoch, lines=service.notes.lines())
    period = await read(connection, START_MS + 1_500, service.now_ms + 1)
    restored = [one for one in period.journal.records if isinstance(one, AttemptRestored)]
    assert {one.attempt_id: one.drawn for one in restored} == {
        AttemptId("ann-0/1"): drawn == "ann-0/1",
        AttemptId("ben-0/1"): drawn == "ben-0/1",
    }
    assert not violated(period.journal)
    whole = await read(connection, START_MS, service.now_ms + 1)
    assert list(whole.journal.records) == list(service.recorder.journal().records)


async def test_a_takeover_begins_anew(connection: asyncpg.Connection, epoch: int) -> None:
    await journal.write(connection, epoch=epoch, lines=Service().work_off().notes.lines())
    second = await connection.fetchval("UPDATE scheduler.leader SET epoch = epoch + 1 RETURNING epoch")
    service = Service().work_off()
    await journal.write(connection, epoch=second, lines=service.notes.lines())
    period = await read(connection, START_MS, service.now_ms + 1)
    assert not violated(period.journal)
    starts = sum(type(record).__name__ == "Dispatch" for record in period.journal.records)
    assert starts == 24


async def test_what_concerns_no_bound_is_not_kept_and_old_lines_are_forgotten(
    connection: asyncpg.Connection, epoch: int
) -> None:
    service = Service()
    service.submit("ann", 0)
    service.cycle()
    service.tell(StopAsked(at_ms=service.now_ms, attempt_id=AttemptId("ann-0/1")))
    await journal.write(connection, epoch=epoch, lines=service.notes.lines())
    assert "StopAsked" not in {
        row["kind"] for row in await connection.fetch("SELECT DISTINCT kind FROM scheduler.journal")
    }
    await journal.forget(connection, epoch=epoch, before=from_ms(START_MS + 1))
    assert await connection.fetchval("SELECT count(*) FROM scheduler.journal") == 0


def test_a_recovery_of_many_jobs_is_written_in_bites() -> None:
    notes = Notes()
    for at_ms in range(1_100):
        notes.note(TierPaused(at_ms=at_ms, tier=Tier.FAST))
    bites = [notes.lines() for _ in range(4)]
    assert [len(bite) for bite in bites] == [500, 500, 100, 0]
    assert [line.number for bite in bites for line in bite] == list(range(1, 1_101))
    assert not notes.behind


async def test_what_waited_is_written_before_what_builds_on_it_and_the_rest_later(
    connection: asyncpg.Connection, epoch: int
) -> None:
    service = Service()
    service.tell_of_waiting("cem", 2)
    service.tell_of_waiting("dot", 2)
    service.cycle()
    (started,) = service.running.values()
    early = service.notes.lines(without_waiting=True)
    first = started.split("-")[0]
    waited = [line for line in early if line.kind in ("AccountRestored", "JobSubmitted")]
    assert [line.subject for line in waited] == ["ann", "ben", first, f"{first}-0", f"{first}-1"]
    assert not service.notes.behind
    await journal.write(connection, epoch=epoch, lines=early)
    unknown = (await read(connection, START_MS, service.now_ms + 1)).unknown
    assert not [sentence for sentence in unknown if "no earlier line" in sentence]
    late = service.notes.lines()
    assert [line.kind for line in late] == ["AccountRestored", "JobSubmitted", "JobSubmitted"]
    await journal.write(connection, epoch=epoch, lines=late)
    period = await read(connection, START_MS, service.now_ms + 1)
    assert tuple(period.journal.records) == service.recorder.journal().records, "in their order"


@pytest.mark.parametrize("told", [CancelWanted, TierChanged, StartRefused, FundsChanged, JobSubmitted])
def test_whatever_is_told_of_an_account_comes_behind_what_waited_of_it(told: type) -> None:
    service = Service()
    service.tell_of_waiting("cem", 2)
    about = {
        CancelWanted: {"job_id": JobId("cem-1")},
        TierChanged: {"job_id": JobId("cem-1"), "tier": Tier.FAST},
        StartRefused: {"job_id": JobId("cem-1"), "reason": RefusedBecause.GONE},
        FundsChanged: {"account_id": AccountId("cem")},
        JobSubmitted: {"job": service.submitted("cem", 2).job},
    }
    service.tell(told(at_ms=service.now_ms, **about[told]))
    lines = service.notes.lines(without_waiting=True)
    assert [line.kind for line in lines][-4:] == ["AccountRestored", *2 * ["JobSubmitted"], told.__name__]


def test_of_too_much_that_waited_whole_accounts_are_dropped() -> None:
    notes = Notes(most=4)
    for name in ("cem", "dot", "eve"):
        notes.put_off([Service().restored(name), Service().waiting(name, 1)])
    gap, *kept = notes.lines()
    assert json.loads(gap.facts)["lines"] == 2
    assert sorted(line.subject for line in kept) == ["cem", "cem-0", "dot", "dot-0"]


def test_while_a_bite_is_left_the_notes_are_behind() -> None:
    notes = Notes()
    for at_ms in range(501):
        notes.note(TierPaused(at_ms=at_ms, tier=Tier.FAST))
    notes.lines()
    assert notes.behind
    notes.lines()
    assert not notes.behind


async def test_what_was_too_much_to_keep_is_dropped_oldest_first_and_told(
    connection: asyncpg.Connection, epoch: int
) -> None:
    notes = Notes(most=3)
    for at_ms in range(START_MS, START_MS + 10):
        notes.note(TierPaused(at_ms=at_ms, tier=Tier.FAST))
    lines = notes.lines()
    assert [line.at_ms - START_MS for line in lines] == [6, 7, 8, 9], "a gap, and the newest three"
    await journal.write(connection, epoch=epoch, lines=lines)
    for start_ms, lost in ((START_MS, True), (START_MS + 6, True), (START_MS + 7, False)):
        unknown = (await read(connection, start_ms, START_MS + 20)).unknown
        assert any(sentence.startswith("7 lines of this time") for sentence in unknown) is lost


async def test_a_gap_before_a_period_is_told_if_the_period_builds_on_it(
    connection: asyncpg.Connection, epoch: int
) -> None:
    service = Service().work_off()
    service.notes._most = 5
    await journal.write(connection, epoch=epoch, lines=service.notes.lines())
    period = await read(connection, START_MS, service.now_ms + 1)
    assert "could not be kept" in period.unknown[0]
    audit(period.journal, Parameters())


async def test_old_lines_are_forgotten_in_bites(connection: asyncpg.Connection, epoch: int) -> None:
    await connection.execute(
        """INSERT INTO scheduler.journal (epoch, number, at, kind, subject, facts)
           SELECT $1, number, $2::timestamptz + number * interval '1 ms', 'TierPaused', 'fast', '{}'
           FROM generate_series(1, 5002) AS number""",
        epoch,
        from_ms(START_MS),
    )
    before = from_ms(START_MS + 5_002)
    assert await journal.forget(connection, epoch=epoch, before=before)
    assert not await journal.forget(connection, epoch=epoch, before=before)
    assert await connection.fetchval("SELECT min(number) FROM scheduler.journal") == 5_002
