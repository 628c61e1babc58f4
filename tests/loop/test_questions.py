"""What a leader answers about its board: why a job waits, when it starts, what if, and who holds the GPUs."""

from __future__ import annotations

import asyncio
import io
import pickle
from collections.abc import Sequence

import pytest
from structlog.testing import capture_logs

from gpu_worker.contract import RenderKind
from scheduler.answers import PlanTerms, WhatIf
from scheduler.clock import LeaderClock
from scheduler.cluster.local_fleet import LocalFleet
from scheduler.forecast_process import LENGTH_BYTES, Answer, Question, framed, serve
from scheduler.forecasts import Forecasts, ListenedBoard
from scheduler.leader import Leader
from scheduler.policy.events import AccountRestored, Event, JobSubmitted, TierPaused, WorkerJoined
from scheduler.policy.explain import Stage as Where
from scheduler.policy.foresight.eta import Eta
from scheduler.policy.foresight.lately import Lately
from scheduler.policy.foresight.what_if import in_tier, submitted
from scheduler.policy.ids import AccountId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker
from scheduler.updates import QueueReason, StartTimes
from tests.loop.conftest import PREDICTED_MS, Stage
from tests.stand_in import stand_in_models

LIMITS = Limits(running=3, relax_running=2, accepted=10)


def facts() -> list[Event]:
    """A GPU, and two accounts with a relax job each."""
    worker = Worker(
        worker_id=WorkerId("w"), memory_bytes=2**40, speed_permille=1_000, warm_models=frozenset({"m"})
    )
    events: list[Event] = [WorkerJoined(at_ms=0, worker=worker)]
    for arrival, name in enumerate(("ada", "ben")):
        account_id = AccountId(name)
        events += [
            AccountRestored(at_ms=0, account_id=account_id, limits=LIMITS, weight_milli=1_000, shares={}),
            JobSubmitted(at_ms=0, job=a_job(name, arrival)),
        ]
    return events


def a_job(account: str, arrival: int) -> Job:
    return Job(
        job_id=JobId(f"{account}'s" if arrival < 10 else f"{account}'s {arrival}"),
        account_id=AccountId(account),
        tier=Tier.RELAX,
        arrival=arrival,
        predicted_ms=10_000,
        step_ms=500,
        model="m",
        memory_bytes=1,
    )


def a_question(*jobs: JobId, now_ms: int = 0) -> Question:
    return Question(
        parameters=Parameters(),
        recent=Lately(0).seen(now_ms),
        now_ms=now_ms,
        draws=3,
        first=100,
        seed=1,
        changes=tuple(in_tier(job, Tier.FAST, now_ms) for job in jobs) or None,
    )


def test_the_process_answers_each_question_from_the_facts_before_it() -> None:
    known = facts()
    sent = [known[:2], known[2:], a_question(), known, a_question(JobId("ben's"))]
    answers = io.BytesIO()
    serve(io.BytesIO(b"".join(map(framed, sent))), answers)
    answers.seek(0)
    told: list[Answer] = []
    while header := answers.read(LENGTH_BYTES):
        told.append(pickle.loads(answers.read(int.from_bytes(header, "big"))))
    starts, change = told
    assert starts.etas == {"ada's": Eta(p50_ms=0, p90_ms=0), "ben's": Eta(p50_ms=10_000, p90_ms=10_000)}
    (moved,) = change.what_ifs
    assert moved.start == Eta(p50_ms=0, p90_ms=0)
    assert (moved.others_delayed, moved.delay_ms_sum) == (1, 10_000)


@pytest.mark.parametrize(
    ("ms", "told_ms"), [(-900, 0), (2_400, 0), (2_600, 5_000), (119_000, 120_000), (140_000, 150_000)]
)
def test_an_expected_start_is_told_no_finer_than_it_is_known(ms: int, told_ms: int) -> None:
    lately = Lately(0)
    board = ListenedBoard(Parameters(), lately)
    clock = LeaderClock(started_ms=0)
    forecasts = Forecasts(board=board, lately=lately, parameters=Parameters(), clock=clock)
    job = a_job("ben", 1)
    forecasts._etas = {job.job_id: Eta(p50_ms=clock.now_ms() + ms, p90_ms=clock.now_ms() + ms)}
    start = forecasts.start_times(job)
    assert start == StartTimes(p50_ms=told_ms, p90_ms=told_ms)


async def test_a_board_too_large_to_be_copied_is_only_glanced_at(forecasts: Forecasts) -> None:
    board = forecasts._board
    for number in range(20_000):
        board.apply(JobSubmitted(at_ms=0, job=a_job("ada", 10 + number)))
    await forecasts.foresee()
    assert await forecasts.what_ifs([in_tier(JobId("ben's"), Tier.FAST, 0)]) == [None]
    ben = board.waiting_job(JobId("ben's"))
    assert ben is not None
    start = forecasts.start_times(ben)
    assert start is not None
    assert 0 < start.p50_ms < start.p90_ms
    board.apply(TierPaused(at_ms=0, tier=Tier.RELAX))
    assert forecasts.start_times(ben) is None, "nobody knows when an operator opens a gate"


@pytest.fixture
async def forecasts() -> Forecasts:
    lately = Lately(0)
    board = ListenedBoard(Parameters(), lately)
    for event in facts():
        board.apply(event)
    clock = LeaderClock(started_ms=0)
    return Forecasts(board=board, lately=lately, parameters=Parameters(), clock=clock)


async def test_a_round_tells_when_each_waiting_job_starts(forecasts: Forecasts) -> None:
    ben = JobId("ben's")
    try:
        job = forecasts._board.waiting_job(ben)
        assert job is not None
        await forecasts.foresee()
        start = forecasts.start_times(job)
        assert start is not None
        assert 0 <= start.p50_ms <= start.p90_ms <= 10_000
    finally:
        await forecasts.close()


async def test_a_process_that_dies_is_nobodys_answer_and_is_started_anew(forecasts: Forecasts) -> None:
    change = in_tier(JobId("ben's"), Tier.FAST, 0)
    try:
        (told,) = await forecasts.what_ifs([change])
        assert told is not None
        process = forecasts._changes._process
        assert process is not None
        process.kill()
        assert await forecasts.what_ifs([change]) == [None]
        (told,) = await forecasts.what_ifs([change])
        assert told is not None
    finally:
        await forecasts.close()


async def test_a_question_about_an_account_that_has_nothing_there_is_answered(forecasts: Forecasts) -> None:
    forecasts._board.apply(
        AccountRestored(at_ms=0, account_id=AccountId("eve"), limits=LIMITS, weight_milli=1_000, shares={})
    )
    change = submitted(a_job("eve", 20), 0)
    try:
        (told,) = await forecasts.what_ifs([change])
        assert told is not None
        assert told.start is not None
    finally:
        await forecasts.close()


async def test_a_process_that_cannot_be_started_is_no_answer(
    forecasts: Forecasts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.forecasts.sys.executable", "/nowhere/python")
    with capture_logs() as logs:
        await forecasts.foresee()
        await forecasts.foresee()
    (told,) = logs
    assert told["event"] == "no forecast"
    assert "/nowhere/python" in told["reason"]
    monkeypatch.undo()
    await forecasts.foresee()
    assert JobId("ben's") in forecasts._etas
    await forecasts.close()


async def test_a_process_that_hangs_is_ended_and_the_next_one_answers(
    forecasts: Forecasts, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = in_tier(JobId("ben's"), Tier.FAST, 0)
    with monkeypatch.context() as patch:
        patch.setattr("scheduler.forecasts._MAIN", "import time; time.sleep(600)")
        patch.setattr("scheduler.forecasts._ANSWER_S", 0.5)
        began = asyncio.get_running_loop().time()
        assert await forecasts.what_ifs([change]) == [None]
        assert 0.4 < asyncio.get_running_loop().time() - began < 30
    assert forecasts._changes._process is None
    try:
        (told,) = await forecasts.what_ifs([change])
        assert told is not None
    finally:
        await forecasts.close()


async def test_forecasts_that_fail_are_told_once_and_go_on(
    forecasts: Forecasts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.forecasts._EVERY_S", 0.01)
    asked = 0
    enough = asyncio.Event()

    async def fail() -> None:
        nonlocal asked
        asked += 1
        if asked == 6:
            enough.set()
        if asked != 3:
            raise RuntimeError("no more stars")

    monkeypatch.setattr(forecasts, "foresee", fail)
    forecasts._etas = {JobId("ben's"): Eta(p50_ms=0, p90_ms=0)}
    with capture_logs() as logs:
        running = asyncio.create_task(forecasts.run())
        await enough.wait()
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert [told["reason"] for told in logs] == ["no more stars"] * 2, "once an outage"
    assert forecasts._etas == {}, "what was foreseen before is too old to be told"


async def full(stage: Stage, leader: Leader, fleet: LocalFleet) -> Sequence[str]:
    """Let Ada have the only GPU, while a job of Ben's and one of Cleo's wait."""
    jobs = []
    for name in ("ada", "ben", "cleo"):
        await stage.open_account(name)
        jobs.append(await stage.submit(name))
        await stage.until(leader, lambda: fleet.busy)
    await stage.until(leader, lambda: len(leader.queue_statuses(jobs)) == 2)
    return jobs


def a_what_if(
    job_id: str | None, tier: Tier, *, account_id: str = "cleo", plan: PlanTerms | None = None
) -> WhatIf:
    default = stand_in_models().default
    return WhatIf(
        account_id=account_id,
        tier=tier,
        job_id=job_id,
        kind=RenderKind.IMAGINE,
        model=default.name,
        width=default.default_width,
        height=default.default_height,
        steps=default.steps,
        predicted_ms=PREDICTED_MS,
        plan=plan,
    )


async def test_a_leader_explains_what_waits_and_what_runs(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    async with stage.leading(fleet) as leader:
        running, first, second = await full(stage, leader, fleet)
        told = leader.explain(running)
        assert told is not None
        assert (told.explanation.stage, told.status) == (Where.RUNNING, None)
        places = []
        for job_id in (first, second):
            told = leader.explain(job_id)
            assert told is not None
            assert told.status is not None
            assert told.explanation.sentences
            places.append((told.status.reason, told.status.position))
        assert places == [(QueueReason.WAITING_FOR_GPU, 1), (QueueReason.WAITING_FOR_GPU, 2)]
        assert leader.explain("00000000-0000-0000-0000-000000000000") is None


async def test_a_leader_tells_the_expected_start_of_what_waits(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    async with stage.leading(fleet) as leader:
        _, _, last = await full(stage, leader, fleet)
        await leader._oracle._forecasts.foresee()
        status = leader.queue_statuses([last])[last]
        assert status.start is not None
        assert PREDICTED_MS < status.start.p50_ms <= 2 * PREDICTED_MS


async def test_a_leader_tells_what_would_come_of_other_terms(stage: Stage) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    async with stage.leading(fleet) as leader:
        _, _, last = await full(stage, leader, fleet)
        await stage.open_account("dora")
        unknown = "00000000-0000-0000-0000-000000000000"
        plan = PlanTerms(limits=LIMITS, weight_milli=2_000)
        as_is, fast, with_plan, nobody, new, stranger = await leader.estimate(
            [
                a_what_if(last, Tier.RELAX),
                a_what_if(last, Tier.FAST),
                a_what_if(last, Tier.RELAX, plan=plan),
                a_what_if(unknown, Tier.FAST),
                a_what_if(None, Tier.RELAX),
                a_what_if(None, Tier.FAST, account_id="dora"),
            ]
        )
        assert nobody is None
        assert as_is is not None
        assert as_is.start is not None
        assert (as_is.delayed_jobs, as_is.delayed_ms) == (0, 0)
        assert fast is not None
        assert fast.start is not None
        assert fast.start.p50_ms < as_is.start.p50_ms
        assert fast.delayed_jobs == 1, "Ben's job starts later for it"
        assert with_plan is not None
        assert with_plan.start is not None
        assert new is not None
        assert new.start is not None
        assert new.start.p50_ms > as_is.start.p50_ms
        assert stranger is not None
        assert stranger.start is not None
        assert stranger.delayed_jobs == 2
        assert not leader._loop.board.knows_account(AccountId("dora")), "a question leaves no trace"


async def test_a_leader_shows_its_queues_and_workers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = LocalFleet(workers=1, take_ms=None)
    async with stage.leading(fleet) as leader:
        running, *_ = await full(stage, leader, fleet)
        queues = leader.queues()
        fast, relax = queues.tiers
        assert (fast.tier, fast.waiting, fast.running) == (Tier.FAST, 0, 0)
        assert (relax.waiting, relax.held, relax.running, relax.parked) == (2, 0, 1, 0)
        assert relax.oldest_wait_ms >= 0
        assert (queues.gpus, queues.idle_gpus, queues.fast_gpus, queues.relax_floor_gpus) == (1, 0, 0, 0)
        assert queues.wanted_gpus == 1
        asked: list[Tier] = []
        monkeypatch.setattr(leader._loop.board, "load", lambda tier, now_ms: asked.append(tier))
        assert leader.queues().wanted_gpus == 1, "it is worked out once a second"
        assert asked == []
        (worker,) = leader.workers_view()
        assert worker.active is not None
        assert worker.active.job_id == running
