"""A leading scheduler on a real database and a stub fleet, and words to speak about it in tests."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from opentelemetry.trace import Tracer

from billing import accounts as ledger_accounts
from billing import admin as billing_admin
from gpu_worker.contract import RenderKind, RenderSpec
from scheduler import intake
from scheduler.fleet import Fleet
from scheduler.leader import Leader, lead
from scheduler.metrics import FrontDoorMetrics
from scheduler.policy.decisions import Charge
from scheduler.policy.fleet_size import Bounds
from scheduler.policy.ids import AccountId, JobId, Tier
from scheduler.policy.parameters import Parameters
from scheduler.running import Running
from scheduler.store import accounts, dispatch, invariants, leadership
from scheduler.store.jobs import JobKind
from scheduler.store.pool import Pool, open_pool
from tests.stand_in import stand_in_models

PREDICTED_MS = 60_000
_PATIENCE_S = 60


class DirectLink:
    """A front door's line to a leader in the same process; deaf while there is none."""

    def __init__(self) -> None:
        self.leader: Leader | None = None

    def jobs_changed(self, job_ids: Any) -> None:
        if self.leader is not None:
            self.leader.jobs_changed(job_ids)

    def accounts_changed(self, account_ids: Any) -> None:
        if self.leader is not None:
            self.leader.accounts_changed(account_ids)

    def abilities(self) -> None:
        """Nothing is known of the fleet here."""


@dataclass
class Stage:
    """What a test acts on."""

    dsn: str
    pool: Pool
    link: DirectLink
    connection: asyncpg.Connection
    metrics: FrontDoorMetrics
    running: asyncio.Task[None] | None = None

    async def open_account(self, account_id: str, plan: str = "standard") -> str:
        async with self.pool.transaction() as connection:
            await ledger_accounts.create(connection, account_id, plan, datetime.now(UTC))
            await accounts.create_account(connection, account_id)
        return account_id

    async def submit(
        self,
        account_id: str,
        tier: Tier = Tier.RELAX,
        *,
        predicted_ms: int = PREDICTED_MS,
        model: str = "",
        traceparent: str | None = None,
    ) -> str:
        default = stand_in_models().default
        accepted = await intake.submit(
            self.pool,
            self.link,  # type: ignore[arg-type]
            self.metrics,
            account_id=account_id,
            submission=intake.Submission(
                request_id=str(uuid.uuid4()),
                digest=b"",
                kind=JobKind.IMAGINE,
                prompt="a test",
                spec=RenderSpec(
                    kind=RenderKind.IMAGINE,
                    model=model or default.name,
                    prompt="a test",
                    width=default.default_width,
                    height=default.default_height,
                    steps=default.steps,
                    guidance_milli=default.guidance_milli,
                    seed=1,
                ),
                seed_fixed=False,
                tier=tier,
                visibility=None,
                predicted_ms=predicted_ms,
                source_job_id=None,
                source_image=None,
                warnings=(),
                uploads=0,
            ),
            parameters=Parameters(),
            at=datetime.now(UTC),
            traceparent=traceparent,
        )
        return accepted.job.job_id

    async def cancel(self, account_id: str, job_id: str) -> None:
        await intake.cancel(
            self.pool,
            self.link,  # type: ignore[arg-type]
            self.metrics,
            account_id=account_id,
            request_id=str(uuid.uuid4()),
            job_id=job_id,
            digest=b"",
            at=datetime.now(UTC),
        )

    async def move(self, account_id: str, job_id: str, tier: Tier) -> None:
        await intake.move(
            self.pool,
            self.link,  # type: ignore[arg-type]
            self.metrics,
            account_id=account_id,
            job_id=job_id,
            tier=tier,
            request_id=str(uuid.uuid4()),
            digest=b"",
            at=datetime.now(UTC),
        )

    async def adjust_balance(self, account_id: str, amount_ms: int) -> None:
        async with self.pool.transaction() as connection:
            await billing_admin.adjust_balance(
                connection,
                account_id,
                amount_ms,
                actor="test",
                reason="a test",
                request_id=str(uuid.uuid4()),
                expires_at=None,
                at=datetime.now(UTC),
            )

    async def job(self, job_id: str) -> Mapping[str, Any]:
        row = await self.connection.fetchrow("SELECT * FROM scheduler.job WHERE job_id = $1", job_id)
        assert row is not None
        return dict(row)

    async def attempts(self, job_id: str) -> list[Mapping[str, Any]]:
        rows = await self.connection.fetch(
            "SELECT * FROM scheduler.attempt WHERE job_id = $1 ORDER BY number", job_id
        )
        return [dict(row) for row in rows]

    @asynccontextmanager
    async def leading(
        self,
        fleet: Fleet,
        *,
        parameters: Parameters | None = None,
        drain_within_ms: int = 60_000,
        scaling: Bounds | None = None,
        record_to: Path | None = None,
        tracer: Tracer | None = None,
    ) -> AsyncIterator[Leader]:
        """Lead while the context is open; then die without a word, as a killed process would."""
        async with lead(
            dsn=self.dsn,
            holder="test",
            fleet=fleet,
            models=stand_in_models(),
            sweep_ms=200,
            drain_within_ms=drain_within_ms,
            scaling=scaling,
            parameters=parameters,
            record_to=record_to,
            tracer=tracer,
        ) as leader:
            self.link.leader = leader
            self.running = asyncio.create_task(leader.run())
            try:
                yield leader
            finally:
                self.link.leader = None
                self.running.cancel()
                await asyncio.gather(self.running, return_exceptions=True)

    async def until(self, leader: Leader, fulfilled: Callable[[], Any]) -> Any:
        """Wait until `fulfilled` (or what it awaits) is true, looking again when a job changed."""
        seen = 0
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                outcome = fulfilled()
                if asyncio.iscoroutine(outcome):
                    outcome = await outcome
                if outcome:
                    return outcome
                assert self.running is not None
                if self.running.done():
                    self.running.result()  # it failed: say why
                seen = (await leader.updates.after(seen, 0.2)).newest

    async def until_attempts(self, leader: Leader, job_id: str, count: int) -> None:
        """Wait until a job's attempt of that number runs, and its worker has it."""

        async def runs() -> bool:
            attempts = await self.attempts(job_id)
            return (
                len(attempts) == count
                and attempts[-1]["state"] == "running"
                and str(attempts[-1]["attempt_id"]) in {run.attempt_id for run in _given(leader)}
            )

        await self.until(leader, runs)

    async def until_state(self, leader: Leader, job_id: str, state: str) -> Mapping[str, Any]:
        """Wait until a job is in that state, and the leader knows it and has acted."""

        async def reached() -> Mapping[str, Any] | None:
            job = await self.job(job_id)
            given = job_id in {run.job_id for run in _given(leader)}
            waits = job_id in leader.queue_statuses([job_id])
            known = (given, waits) == (state == "running", state == "queued")
            return job if job["state"] == state and known else None

        job: Mapping[str, Any] = await self.until(leader, reached)
        return job

    async def until_waits(self, leader: Leader, job_id: str, reason: str) -> None:
        """Wait until a job waits for that reason; a board that is still to hear of it tells none."""

        def waits() -> bool:
            status = leader.queue_statuses([job_id]).get(job_id)
            return status is not None and status.reason.value == reason

        await self.until(leader, waits)

    async def until_blocked(self) -> None:
        """Return once some transaction waits for a lock of another."""
        watcher = await asyncpg.connect(self.dsn)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while not await watcher.fetchval(
                    """SELECT count(*) FROM pg_stat_activity
                       WHERE wait_event_type = 'Lock' AND datname = current_database()"""
                ):
                    pass
        finally:
            await watcher.close()


def _given(leader: Leader) -> list[Running]:
    """Return what the leader has given to workers and not seen settled: each a moment after its commit."""
    return list(leader._loop._desk.running)


def a_planned_attempt(
    job_id: str, at_ms: int, *, account_id: str = "ada", tier: Tier = Tier.FAST, **changes: Any
) -> dispatch.PlannedAttempt:
    """An attempt at a job that the loop has decided to start, not written yet."""
    planned = dispatch.PlannedAttempt(
        attempt_id=str(uuid.uuid4()),
        token=str(uuid.uuid4()),
        job_id=JobId(job_id),
        account_id=AccountId(account_id),
        tier=tier,
        worker_id="here/gpu-0",
        incarnation="first",
        charge=Charge(
            predicted_ms=PREDICTED_MS,
            weight_milli=1000,
            charged_at_ms=at_ms,
            start_tag=0,
            finish_tag=PREDICTED_MS * 1000,
            next_tag=None,
            usage_added=1.0,
            virtual_time=0,
            aged=False,
        ),
        decision={},
        sentence="",
    )
    return replace(planned, **changes)


async def a_started_attempt(
    stage: Stage, job_id: str
) -> tuple[leadership.Leadership, dispatch.PlannedAttempt]:
    """Take the lead and write the start of an attempt at a fast job of ada's, without a loop."""
    lead = await leadership.take_lead(stage.connection, "test")
    await stage.connection.execute("UPDATE scheduler.cell SET decay_origin_ms = $1", lead.now_ms)
    planned = a_planned_attempt(job_id, lead.now_ms)
    outcome = await dispatch.start_attempts(
        stage.connection,
        epoch=lead.epoch,
        planned=[planned],
        tags=[],
        running=[],
        parameters=Parameters(),
        now_ms=lead.now_ms,
        again=False,
    )
    assert [one.planned for one in outcome.started] == [planned]
    return lead, planned


@pytest.fixture
def promises() -> Collection[invariants.Invariant]:
    """All but those that hold a worker's clock against ours: the stub fleet counts what it is told to."""
    return [one for one in invariants.INVARIANTS if one not in invariants.WALL_TIME]


@pytest.fixture
async def stage(database: str, connection: asyncpg.Connection) -> AsyncIterator[Stage]:
    pool = await open_pool(database, 4)
    try:
        yield Stage(
            dsn=database,
            pool=pool,
            link=DirectLink(),
            connection=connection,
            metrics=FrontDoorMetrics(["basic", "standard", "pro"]),
        )
    finally:
        await pool.close()
