"""What operators ask of the fleet: rows with a reason and an audit event, and the picture they see of it."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from scheduler.answers import QueuesView, TierView, WorkerRun, WorkerView
from scheduler.policy.ids import Tier
from scheduler.store import operations, overview
from scheduler.store.accounts import Role
from scheduler.v1 import fleet_pb2, job_pb2
from tests.frontdoor.door import WORKER, Caller, Door, refusal

DECISION_KINDS = fleet_pb2.DecisionKind.DESCRIPTOR.values_by_name
JOB_ID, ATTEMPT_ID = str(uuid.uuid4()), str(uuid.uuid4())
NAME = f"workers/{WORKER}"


@pytest.fixture
async def operator(door: Door) -> Caller:
    door.scheduler.workers = [a_worker()]
    return await door.caller("olga", role=Role.OPERATOR)


def a_worker(**fields: Any) -> WorkerView:
    defaults: dict[str, Any] = {
        "worker_id": WORKER,
        "idle_since_ms": 1_000,
        "healthy": True,
        "sentence": "",
        "device": "cpu-avx2-2",
        "speed_permille": 1_000,
        "memory_bytes": 8_000,
        "memory_used_bytes": 3_000,
        "warm_models": ("small",),
        "active": None,
        "parked": (),
    }
    return WorkerView(**defaults | fields)


def a_run(**fields: Any) -> WorkerRun:
    defaults: dict[str, Any] = {
        "attempt_id": ATTEMPT_ID,
        "job_id": JOB_ID,
        "account_id": "ann",
        "tier": Tier.FAST,
        "started_ms": 2_000,
    }
    return WorkerRun(**defaults | fields)


def drain(reason: str = "new fan", **fields: Any) -> fleet_pb2.DrainWorkerRequest:
    defaults = {"name": NAME, "request_id": str(uuid.uuid4()), "reason": reason}
    return fleet_pb2.DrainWorkerRequest(**defaults | fields)


def resume(**fields: Any) -> fleet_pb2.ResumeWorkerRequest:
    defaults = {"name": NAME, "request_id": str(uuid.uuid4()), "reason": "fan is new"}
    return fleet_pb2.ResumeWorkerRequest(**defaults | fields)


async def workers(caller: Caller) -> list[fleet_pb2.Worker]:
    return list((await caller.fleet.ListWorkers(fleet_pb2.ListWorkersRequest())).workers)


async def wishes(door: Door) -> operations.Wishes:
    async with door.pool.reading() as connection:
        return await operations.wishes(connection)


async def audit(door: Door, action: str) -> list[tuple[str, str, Any, Any]]:
    async with door.pool.reading() as connection:
        rows = await connection.fetch(
            """SELECT target, reason, before::text, after::text FROM billing.audit_event WHERE action = $1
               ORDER BY audit_id""",
            action,
        )
    return [
        (row["target"], row["reason"], json.loads(row["before"]), json.loads(row["after"])) for row in rows
    ]


async def test_workers_are_listed_with_what_they_have_in_hand(door: Door, operator: Caller) -> None:
    parked = a_run(attempt_id=str(uuid.uuid4()), tier=Tier.RELAX, parked_since_ms=2_000)
    door.scheduler.workers = [
        a_worker(worker_id="b", healthy=False, sentence="The GPU fell off the bus."),
        a_worker(worker_id="a", idle_since_ms=None, active=a_run(), parked=(parked,)),
        a_worker(worker_id="c"),
    ]
    a, b, c = await workers(operator)
    assert (a.name, a.state) == ("workers/a", fleet_pb2.WORKER_STATE_RUNNING)
    assert a.state_time.ToMilliseconds() == 2_000
    assert (a.active.job, a.active.tier) == (f"accounts/ann/jobs/{JOB_ID}", job_pb2.TIER_FAST)
    assert not a.active.HasField("park_time")
    assert [run.park_time.ToMilliseconds() for run in a.parked] == [2_000]
    assert (b.state, b.sentence) == (fleet_pb2.WORKER_STATE_UNHEALTHY, "The GPU fell off the bus.")
    assert (c.state, c.state_time.ToMilliseconds()) == (fleet_pb2.WORKER_STATE_IDLE, 1_000)
    assert (c.device, c.speed_permille, c.memory_bytes, c.memory_bytes_used) == (
        "cpu-avx2-2",
        1_000,
        8_000,
        3_000,
    )
    assert list(c.warm_models) == ["small"]


async def test_a_worker_that_is_emptied_says_since_when_and_why(door: Door, operator: Caller) -> None:
    leaves = {"leaves_since_ms": 5_000, "leaves_because": "Its machine is about to end."}
    door.scheduler.workers = [
        a_worker(worker_id="a", idle_since_ms=None, active=a_run(step=7, steps=20), **leaves),
        a_worker(worker_id="b", **leaves, healthy=False, sentence="The GPU fell off the bus."),
    ]
    a, b = await workers(operator)
    assert (a.state, a.sentence) == (fleet_pb2.WORKER_STATE_LEAVING, "Its machine is about to end.")
    assert a.state_time.ToMilliseconds() == 5_000
    assert (a.active.step, a.active.steps) == (7, 20)
    assert b.state == fleet_pb2.WORKER_STATE_UNHEALTHY, "what is wrong comes first"


async def test_what_was_decided_lately_is_listed_newest_first(door: Door, operator: Caller) -> None:
    ann = await door.caller("ann")
    job = await ann.create(tier=job_pb2.TIER_RELAX)
    attempt_id = await door.start(job.uid)
    await door.sql(
        """UPDATE scheduler.attempt SET decision = '{"reason": "It used least."}' WHERE attempt_id = $1""",
        uuid.UUID(attempt_id),
    )
    kinds = ["Dispatch", "AttemptParked", "JobArrived", "AttemptResumed"]
    for number, kind in enumerate(kinds):
        await door.sql(
            """INSERT INTO scheduler.journal VALUES (1, $1, to_timestamp($1::bigint), $2, $3, '{}')
               RETURNING number""",
            number,
            kind,
            attempt_id,
        )
    answer = await operator.fleet.ListDecisions(fleet_pb2.ListDecisionsRequest())
    assert [(one.kind, one.time.seconds) for one in answer.decisions] == [
        (fleet_pb2.DECISION_KIND_RESUMED, 3),
        (fleet_pb2.DECISION_KIND_PARKED, 1),
        (fleet_pb2.DECISION_KIND_STARTED, 0),
    ]
    started = answer.decisions[-1]
    assert (started.tier, started.job, started.worker, started.sentence) == (
        job_pb2.TIER_RELAX,
        job.name,
        NAME,
        "It used least.",
    )
    answer = await operator.fleet.ListDecisions(fleet_pb2.ListDecisionsRequest(page_size=1))
    assert [one.kind for one in answer.decisions] == [fleet_pb2.DECISION_KIND_RESUMED]


def test_every_decision_has_a_name_for_clients() -> None:
    named = {name.removeprefix("DECISION_KIND_") for name in DECISION_KINDS}
    assert named == {"UNSPECIFIED", *(kind.name for kind in overview.Decided)}


async def test_a_drained_worker_is_a_row_with_its_reason_until_it_is_resumed(
    door: Door, operator: Caller
) -> None:
    answer = await operator.fleet.DrainWorker(drain())
    assert (answer.state, answer.drain_reason) == (fleet_pb2.WORKER_STATE_DRAINING, "new fan")
    assert (await wishes(door)).draining.keys() == {WORKER}
    door.scheduler.workers = []
    (gone,) = await workers(operator)
    assert (gone.state, gone.draining) == (fleet_pb2.WORKER_STATE_ABSENT, True)

    answer = await operator.fleet.ResumeWorker(resume())
    assert not answer.draining
    assert (await wishes(door)).draining == {}
    assert await workers(operator) == []
    assert door.scheduler.told_fleet == 2
    (drained,), (resumed,) = await audit(door, "DrainWorker"), await audit(door, "ResumeWorker")
    assert drained[:2] == (NAME, "new fan")
    assert (drained[2]["draining"], drained[3]["draining"]) == (False, True)
    assert resumed[:2] == (NAME, "fan is new")
    assert resumed[2]["drain_reason"] == "new fan"


async def test_a_drained_worker_hands_over_what_it_has_not_finished_in_time(
    door: Door, operator: Caller
) -> None:
    async def hand_over_ms(**fields: Any) -> int:
        answer = await operator.fleet.DrainWorker(drain(**fields))
        at = (await wishes(door)).draining[WORKER]
        assert answer.hand_over_time.ToDatetime(tzinfo=UTC) == at
        return int((at - await door.sql("SELECT now()")) / timedelta(milliseconds=1))

    assert 50_000 < await hand_over_ms() <= 60_000, "as the service is set up"
    assert await hand_over_ms(within_ms=0) <= 0
    assert 290_000 < await hand_over_ms(within_ms=300_000) <= 300_000
    (worker,) = await workers(operator)
    assert worker.HasField("hand_over_time")
    assert not (await operator.fleet.ResumeWorker(resume())).HasField("hand_over_time")
    for within_ms in (-1, 100_000_000):
        refused = await refusal(operator.fleet.DrainWorker(drain(within_ms=within_ms)))
        assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "within_ms" in str(refused)


async def test_a_repeated_drain_does_not_drain_again(door: Door, operator: Caller) -> None:
    request = drain()
    await operator.fleet.DrainWorker(request)
    await operator.fleet.ResumeWorker(resume())
    answer = await operator.fleet.DrainWorker(request)
    assert answer.state == fleet_pb2.WORKER_STATE_IDLE, "the first answer's wish was taken back since"
    assert len(await audit(door, "DrainWorker")) == 1
    assert door.scheduler.told_fleet == 3, "the front door that did it may have died before it told"
    refused = await refusal(operator.fleet.DrainWorker(drain(request_id=request.request_id, reason="other")))
    assert refused.reason == "REQUEST_ID_REUSED"
    for result, number in (("done", 1), ("replayed", 1), ("refused", 1)):
        labels = {"action": "drain_worker", "result": result}
        assert door.metrics.registry.get_sample_value("darkroom_admin_actions_total", labels) == number


async def test_resuming_ends_a_set_aside_and_forgets_what_led_to_it(door: Door, operator: Caller) -> None:
    until = datetime(2999, 1, 1, tzinfo=UTC)
    await door.sql(
        """INSERT INTO scheduler.worker_slot (worker_id, losses_in_row, set_aside_until)
           VALUES ($1, 3, $2) RETURNING 1""",
        WORKER,
        until,
    )
    (worker,) = await workers(operator)
    assert worker.state == fleet_pb2.WORKER_STATE_SET_ASIDE
    assert worker.set_aside_until_time.ToDatetime(tzinfo=UTC) == until
    assert (await wishes(door)).set_aside == {WORKER: until}
    answer = await operator.fleet.ResumeWorker(resume())
    assert answer.state == fleet_pb2.WORKER_STATE_IDLE
    assert (await wishes(door)).set_aside == {}
    assert await door.sql("SELECT losses_in_row FROM scheduler.worker_slot") == 0


async def test_a_worker_that_nobody_knows(door: Door, operator: Caller) -> None:
    refused = await refusal(operator.fleet.DrainWorker(drain(name="workers/node-z/gpu-9")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_WORKER")
    assert refused.metadata == {"worker": "node-z/gpu-9"}
    assert (await wishes(door)).draining == {}


async def test_while_the_scheduler_is_away(door: Door, operator: Caller) -> None:
    await operator.fleet.DrainWorker(drain())
    door.scheduler.workers = None
    answer = await operator.fleet.ResumeWorker(resume())
    assert not answer.draining, "a worker with a row is known without it"
    for call in (
        operator.fleet.DrainWorker(drain(name="workers/node-z/gpu-9")),
        operator.fleet.ListWorkers(fleet_pb2.ListWorkersRequest()),
        operator.fleet.GetQueues(fleet_pb2.GetQueuesRequest()),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")


async def test_queues_show_waiting_work_and_who_holds_the_gpus(door: Door, operator: Caller) -> None:
    door.scheduler.seen_queues = QueuesView(
        tiers=(a_tier(Tier.FAST), a_tier(Tier.RELAX, waiting=7, held=1, parked=2, oldest_wait_ms=90_000)),
        gpus=8,
        idle_gpus=1,
        fast_gpus=3,
        relax_floor_gpus=1,
        wanted_gpus=None,
    )
    await operator.fleet.PauseTier(pause())
    queues = await operator.fleet.GetQueues(fleet_pb2.GetQueuesRequest())
    fast, relax = queues.tiers
    assert (fast.tier, fast.paused) == (job_pb2.TIER_FAST, False)
    assert (relax.tier, relax.paused, relax.pause_reason) == (job_pb2.TIER_RELAX, True, "too hot")
    assert (relax.waiting, relax.held, relax.parked, relax.oldest_wait_ms) == (7, 1, 2, 90_000)
    assert (queues.gpus, queues.idle_gpus, queues.fast_gpus, queues.relax_floor_gpus) == (8, 1, 3, 1)
    assert not queues.HasField("wanted_gpus"), "what is not known is not shown as none"


def a_tier(tier: Tier, **fields: int) -> TierView:
    numbers = {"waiting": 0, "held": 0, "running": 0, "parked": 0, "oldest_wait_ms": 0} | fields
    return TierView(tier=tier, **numbers)


def pause(**fields: Any) -> fleet_pb2.PauseTierRequest:
    defaults = {"tier": job_pb2.TIER_RELAX, "request_id": str(uuid.uuid4()), "reason": "too hot"}
    return fleet_pb2.PauseTierRequest(**defaults | fields)


async def test_a_paused_tier_is_a_row_with_its_reason_until_it_is_resumed(
    door: Door, operator: Caller
) -> None:
    answer = await operator.fleet.PauseTier(pause())
    assert (answer.tier, answer.paused) == (job_pb2.TIER_RELAX, True)
    assert (await wishes(door)).paused == {Tier.RELAX}
    resumed = await operator.fleet.ResumeTier(
        fleet_pb2.ResumeTierRequest(
            tier=job_pb2.TIER_RELAX, request_id=str(uuid.uuid4()), reason="cool again"
        )
    )
    assert (resumed.paused, resumed.pause_reason) == (False, "")
    assert (await wishes(door)).paused == frozenset()
    assert door.scheduler.told_fleet == 2
    assert await audit(door, "PauseTier") == [
        (
            "tiers/relax",
            "too hot",
            {"paused": False, "pause_reason": ""},
            {"paused": True, "pause_reason": "too hot"},
        )
    ]
    assert [event[1] for event in await audit(door, "ResumeTier")] == ["cool again"]


async def test_nothing_is_changed_without_a_reason(door: Door, operator: Caller) -> None:
    for call in (
        operator.fleet.DrainWorker(drain(reason=" ")),
        operator.fleet.ResumeWorker(resume(reason="")),
        operator.fleet.PauseTier(pause(reason="", tier=job_pb2.TIER_UNSPECIFIED)),
    ):
        refused = await refusal(call)
        assert refused.reason == "INVALID_PARAMETER"
        assert "reason" in refused.violations
    assert refused.violations["tier"] == "tier must be fast or relax."
    refused = await refusal(operator.fleet.DrainWorker(drain(name="node-a")))
    assert "name" in refused.violations


@pytest.mark.parametrize(
    ("role", "may"), [(Role.USER, False), (Role.MODERATOR, False), (Role.OPERATOR, True), (Role.ADMIN, True)]
)
async def test_the_fleet_is_for_operators_and_admins(door: Door, role: Role, may: bool) -> None:
    caller = await door.caller("olga", role=role)
    if may:
        assert await workers(caller) == []
        return
    refused = await refusal(workers(caller))
    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
    assert refused.metadata == {"role": "operator"}
