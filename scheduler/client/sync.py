"""The same client for programs without an event loop: same names, same arguments, same errors, no `await`.

A client owns one thread with an event loop in which the asyncio client runs. Iterators are fed from there,
one item at a time; closing one, or leaving its `for`, ends the call behind it. A client and its handles may
be used from several threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from opentelemetry.trace import TracerProvider

from billing.v1 import admin_pb2
from billing.v1.admin_pb2 import (
    AdminAccount,
    ApiKey,
    AuditEvent,
    CheckInvariantsResponse,
    EffectiveFrom,
    GrantSource,
    Plan,
    PlanUndo,
    Refund,
    RefundUndo,
    Role,
)
from billing.v1.billing_pb2 import Balance, PlanChange, Statement, Transfer
from scheduler.client import aio
from scheduler.client.aio import RetryPolicy, Tls
from scheduler.v1 import job_pb2
from scheduler.v1.account_pb2 import Account
from scheduler.v1.fleet_pb2 import AuditFairnessResponse, Decision, Queues, TierQueue, Worker
from scheduler.v1.job_pb2 import (
    Estimate,
    Explanation,
    Job,
    JobState,
    Receipt,
    Tier,
    UpscaleAlgorithm,
    Visibility,
    WatchJobResponse,
)
from scheduler.v1.moderation_pb2 import AccountBlock, ListRulesResponse, Rule, RulesUpdate

Result = TypeVar("Result")


class _LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="darkroom-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C comes to the thread that waits here: the call must end with it
            raise

    def iterate(self, items: AsyncIterator[Result]) -> Iterator[Result]:
        async def one() -> Result:
            return await anext(items)

        async def end() -> None:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()

        try:
            while True:
                try:
                    item = self.run(one())
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self.run(end())

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class DarkroomClient:
    """One connection to the service, for one key. Use it as a context manager. See `aio.DarkroomClient`."""

    def __init__(
        self,
        address: str,
        key: str,
        *,
        tls: Tls | None = None,
        plain_text: bool = False,
        retries: RetryPolicy | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        async def connect() -> aio.DarkroomClient:  # a channel belongs to the loop it is made in
            return aio.DarkroomClient(
                address,
                key,
                tls=tls,
                plain_text=plain_text,
                retries=retries,
                tracer_provider=tracer_provider,
            )

        self._loop = _LoopThread()
        try:
            self._client = self._loop.run(connect())
        except BaseException:
            self._loop.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, every call on it, and the thread."""
        self._loop.run(self._client.close())
        self._loop.stop()

    def imagine(
        self,
        prompt: str,
        *,
        pictures: Sequence[Path | bytes] = (),
        model: str = "",
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit a grid of four pictures made from text; it is durable when this returns."""
        return self._handle(
            self._client.imagine(prompt, pictures=pictures, model=model, tier=tier, visibility=visibility)
        )

    def vary(
        self,
        job: str,
        image: int,
        *,
        strong: bool = False,
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit a new grid close to picture `image`, 1 to 4, of a finished job; `strong`: less close."""
        return self._handle(self._client.vary(job, image, strong=strong, tier=tier, visibility=visibility))

    def upscale(
        self,
        job: str,
        image: int,
        *,
        algorithm: UpscaleAlgorithm.ValueType = job_pb2.UPSCALE_ALGORITHM_UNSPECIFIED,
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit picture `image`, 1 to 4, of a finished job to be enlarged."""
        return self._handle(
            self._client.upscale(job, image, algorithm=algorithm, tier=tier, visibility=visibility)
        )

    def reroll(
        self,
        job: str,
        *,
        exact: bool = False,
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit the same job again with a new seed, unless its prompt fixes one; `exact` keeps the seed."""
        return self._handle(self._client.reroll(job, exact=exact, tier=tier, visibility=visibility))

    def redo(
        self,
        job: str,
        *,
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> JobHandle:
        """Submit an upscale again with the other algorithm, light or detailed; reroll any other job."""
        return self._handle(self._client.redo(job, tier=tier, visibility=visibility))

    def validate(
        self,
        prompt: str,
        *,
        pictures: Sequence[Path | bytes] = (),
        model: str = "",
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
    ) -> Job:
        """Return what `imagine` would get, without submitting anything."""
        return self._loop.run(
            self._client.validate(prompt, pictures=pictures, model=model, tier=tier, visibility=visibility)
        )

    def get(self, job: str) -> Job:
        """Return one job."""
        return self._loop.run(self._client.get(job))

    def handle(self, job: str) -> JobHandle:
        """Return a handle of a job that was submitted before."""
        return self._handle(self._client.handle(job))

    def jobs(
        self, *, states: Sequence[JobState.ValueType] = (), account: str = "", page_size: int = 50
    ) -> Iterator[Job]:
        """Yield an account's jobs, newest first; empty: the own one's."""
        return self._loop.iterate(self._client.jobs(states=states, account=account, page_size=page_size))

    def feed(self, *, show_hidden: bool = False, page_size: int = 50) -> Iterator[Job]:
        """Yield finished public upscales of all accounts, newest first; for moderators also hidden ones."""
        return self._loop.iterate(self._client.feed(show_hidden=show_hidden, page_size=page_size))

    def cancel(self, job: str) -> Job:
        """Cancel a waiting job at once, a running one at its next step; return it as it is now."""
        return self._loop.run(self._client.cancel(job))

    def delete(self, job: str) -> None:
        """Delete a finished job, its pictures and its text."""
        self._loop.run(self._client.delete(job))

    def move(self, job: str, tier: Tier.ValueType) -> Job:
        """Move a waiting job to `tier`; return it."""
        return self._loop.run(self._client.move(job, tier))

    def explain(self, job: str) -> Explanation:
        """Return why a job is where it is, and when it will start."""
        return self._loop.run(self._client.explain(job))

    def estimate(
        self,
        prompt: str,
        *,
        pictures: Sequence[Path | bytes] = (),
        model: str = "",
        tier: Tier.ValueType = job_pb2.TIER_UNSPECIFIED,
        visibility: Visibility.ValueType = job_pb2.VISIBILITY_UNSPECIFIED,
        plan: str = "",
    ) -> Estimate:
        """Return what `imagine` would cost, when it would start and whom it would delay, in each tier."""
        return self._loop.run(
            self._client.estimate(
                prompt, pictures=pictures, model=model, tier=tier, visibility=visibility, plan=plan
            )
        )

    def estimate_job(self, job: str, *, plan: str = "") -> Estimate:
        """Return the same of a job that waits."""
        return self._loop.run(self._client.estimate_job(job, plan=plan))

    def watch(
        self, job: str, *, after_sequence: int = 0, previews: bool = False
    ) -> Iterator[WatchJobResponse]:
        """Yield what happens to a job until it has ended."""
        stream = self._client.watch(job, after_sequence=after_sequence, previews=previews)
        return self._loop.iterate(stream)

    def download(self, name: str, folder: Path, *, image: int | None = None) -> list[Path]:
        """Save all pictures and videos of a job, or one of them, in `folder`; return their paths."""
        return self._loop.run(self._client.download(name, folder, image=image))

    def download_all(self, folder: Path, *, file_name: str | None = None) -> Path:
        """Save all pictures of the account as one ZIP archive in `folder`; return its path."""
        return self._loop.run(self._client.download_all(folder, file_name=file_name))

    def account(self) -> Account:
        """Return the key's own account."""
        return self._loop.run(self._client.account())

    def update_account(
        self,
        *,
        mode: Tier.ValueType | None = None,
        visibility: Visibility.ValueType | None = None,
        overage_allowed: bool | None = None,
        spend_cap_micros: int | None = None,
    ) -> Account:
        """Change what is given of the key's own account, and nothing else; return it."""
        return self._loop.run(
            self._client.update_account(
                mode=mode,
                visibility=visibility,
                overage_allowed=overage_allowed,
                spend_cap_micros=spend_cap_micros,
            )
        )

    def balance(self) -> Balance:
        """Return the key's own fast time: granted, used, held, left."""
        return self._loop.run(self._client.balance())

    def list_transfers(self, account: str = "", *, page_size: int = 100) -> Iterator[Transfer]:
        """Yield the journal's rows of an account, the key's own unless it is given, newest first."""
        return self._loop.iterate(self._client.list_transfers(account, page_size=page_size))

    def statement(self, account: str = "", *, at: datetime | None = None) -> Statement:
        """Return the period of an account that holds the moment `at`; None: the present one."""
        return self._loop.run(self._client.statement(account, at=at))

    def preview_plan_change(self, plan: str, *, account: str = "") -> PlanChange:
        """Return what a change to `plan` would give and cost now."""
        return self._loop.run(self._client.preview_plan_change(plan, account=account))

    def change_plan(self, plan: str, *, etag: str = "", account: str = "", reason: str = "") -> PlanChange:
        """Change to `plan`, with the `etag` of a preview exactly as that said."""
        return self._loop.run(self._client.change_plan(plan, etag=etag, account=account, reason=reason))

    def workers(self) -> list[Worker]:
        """Return every worker."""
        return self._loop.run(self._client.workers())

    def drain_worker(self, worker: str, *, reason: str, within: timedelta | None = None) -> Worker:
        """Let a worker finish what it has, or hand it over after a while, and give it nothing new."""
        return self._loop.run(self._client.drain_worker(worker, reason=reason, within=within))

    def resume_worker(self, worker: str, *, reason: str) -> Worker:
        """Give a worker jobs again that drains or was set aside."""
        return self._loop.run(self._client.resume_worker(worker, reason=reason))

    def queues(self) -> Queues:
        """Return what waits and runs in each tier, and how the GPUs are shared."""
        return self._loop.run(self._client.queues())

    def decisions(self, *, most: int = 25) -> list[Decision]:
        """Return what the scheduler decided lately, newest first: up to `most`, 100 at most."""
        return self._loop.run(self._client.decisions(most=most))

    def audit_fairness(self, *, start: datetime, end: datetime | None = None) -> AuditFairnessResponse:
        """Hold what was decided in a period against the policy's bounds."""
        return self._loop.run(self._client.audit_fairness(start=start, end=end))

    def pause_tier(self, tier: Tier.ValueType, *, reason: str) -> TierQueue:
        """Let nothing of a tier start; what runs goes on."""
        return self._loop.run(self._client.pause_tier(tier, reason=reason))

    def resume_tier(self, tier: Tier.ValueType, *, reason: str) -> TierQueue:
        """Let jobs of a paused tier start again."""
        return self._loop.run(self._client.resume_tier(tier, reason=reason))

    def rules(self, *, category: str = "") -> ListRulesResponse:
        """Return the rules that prompts are held against; empty: of every category."""
        return self._loop.run(self._client.rules(category=category))

    def update_rules(
        self,
        *,
        add: Sequence[Rule] = (),
        remove: Sequence[str] = (),
        reason: str,
        etag: str = "",
        validate_only: bool = False,
    ) -> RulesUpdate:
        """Remove rules and add others, or with `validate_only` say what they would have refused."""
        return self._loop.run(
            self._client.update_rules(
                add=add, remove=remove, reason=reason, etag=etag, validate_only=validate_only
            )
        )

    def hide(self, job: str, *, category: str, reason: str) -> Job:
        """Keep a job out of the feed; its owner is told the category."""
        return self._loop.run(self._client.hide(job, category=category, reason=reason))

    def unhide(self, job: str, *, reason: str) -> Job:
        """Let the feed show a job again."""
        return self._loop.run(self._client.unhide(job, reason=reason))

    def block_account(self, account: str, *, reason: str, validate_only: bool = False) -> AccountBlock:
        """Let nobody in with any key of an account, and cancel its jobs; or say how many those would be."""
        return self._loop.run(self._client.block_account(account, reason=reason, validate_only=validate_only))

    def unblock_account(self, account: str, *, reason: str) -> AccountBlock:
        """Let an account in again; its jobs stay cancelled."""
        return self._loop.run(self._client.unblock_account(account, reason=reason))

    def create_account(self, *, plan: str, account_id: str = "", reason: str) -> AdminAccount:
        """Open an account on a plan; without an id it gets a random one."""
        return self._loop.run(self._client.create_account(plan=plan, account_id=account_id, reason=reason))

    def admin_account(self, account: str) -> AdminAccount:
        """Return an account as admins see it, with its balance."""
        return self._loop.run(self._client.admin_account(account))

    def accounts(self, *, plan: str = "", page_size: int = 100) -> Iterator[AdminAccount]:
        """Yield all accounts, or those of a plan, without balances, in the order of their ids."""
        return self._loop.iterate(self._client.accounts(plan=plan, page_size=page_size))

    def erase_account(self, account: str, *, reason: str) -> AdminAccount:
        """Delete an account's prompts, pictures and keys for good; the ledger keeps a pseudonym."""
        return self._loop.run(self._client.erase_account(account, reason=reason))

    def create_api_key(self, account: str, *, role: Role.ValueType, reason: str) -> ApiKey:
        """Make a key of an account. Its secret is in this answer and nowhere else."""
        return self._loop.run(self._client.create_api_key(account, role=role, reason=reason))

    def api_keys(self, account: str) -> list[ApiKey]:
        """Return an account's keys, without their secrets."""
        return self._loop.run(self._client.api_keys(account))

    def revoke_api_key(self, account: str, key: str, *, reason: str) -> ApiKey:
        """End a key of an account, given by its id or its resource name."""
        return self._loop.run(self._client.revoke_api_key(account, key, reason=reason))

    def plans(self) -> list[Plan]:
        """Return the newest version of every plan."""
        return self._loop.run(self._client.plans())

    def plan(self, plan: str, *, version: int | None = None) -> Plan:
        """Return the newest version of a plan, or the one that is given."""
        return self._loop.run(self._client.plan(plan, version=version))

    def create_plan(self, plan: Plan, *, reason: str, validate_only: bool = False) -> Plan:
        """Make a plan, or with `validate_only` ask whether it could be made."""
        return self._loop.run(self._client.create_plan(plan, reason=reason, validate_only=validate_only))

    def update_plan(
        self,
        plan: Plan,
        *,
        effective_from: EffectiveFrom.ValueType,
        reason: str,
        validate_only: bool = False,
    ) -> Plan:
        """Make a new version of a plan, or with `validate_only` say whom it would touch."""
        return self._loop.run(
            self._client.update_plan(
                plan, effective_from=effective_from, reason=reason, validate_only=validate_only
            )
        )

    def adjust_balance(
        self,
        account: str,
        *,
        amount_ms: int,
        reason: str,
        expires: datetime | None = None,
        source: GrantSource.ValueType = admin_pb2.GRANT_SOURCE_UNSPECIFIED,
        undoes: int = 0,
    ) -> Balance:
        """Grant an account GPU milliseconds of fast time, or take unused ones away."""
        return self._loop.run(
            self._client.adjust_balance(
                account, amount_ms=amount_ms, reason=reason, expires=expires, source=source, undoes=undoes
            )
        )

    def refund(self, job: str, *, reason: str, amount_ms: int = 0) -> Refund:
        """Give back `amount_ms` of the time a job was billed; 0: all that is not given back yet."""
        return self._loop.run(self._client.refund(job, reason=reason, amount_ms=amount_ms))

    def undo_refund(
        self, job: str, *, reason: str, etag: str = "", validate_only: bool = False
    ) -> RefundUndo:
        """Take back the newest refund of a job; or say what that would charge again."""
        return self._loop.run(
            self._client.undo_refund(job, reason=reason, etag=etag, validate_only=validate_only)
        )

    def undo_plan_change(
        self, account: str, *, reason: str, etag: str = "", validate_only: bool = False
    ) -> PlanUndo:
        """Take back the newest change of an account's plan that counted at once; or say what that would do.

        With the `etag` of such an answer it is that change, or refused with EtagMismatch.
        """
        return self._loop.run(
            self._client.undo_plan_change(account, reason=reason, etag=etag, validate_only=validate_only)
        )

    def audit_events(
        self,
        *,
        target: str = "",
        actor: str = "",
        start: datetime | None = None,
        end: datetime | None = None,
        page_size: int = 100,
    ) -> Iterator[AuditEvent]:
        """Yield what admins and operators did, newest first."""
        return self._loop.iterate(
            self._client.audit_events(target=target, actor=actor, start=start, end=end, page_size=page_size)
        )

    def check_invariants(
        self, *, within: timedelta | None = None, replay: bool = False
    ) -> CheckInvariantsResponse:
        """Ask every invariant of the ledger of the live database, within a time; None: a minute."""
        return self._loop.run(self._client.check_invariants(within=within, replay=replay))

    def _handle(self, made: Coroutine[Any, Any, aio.JobHandle]) -> JobHandle:
        return JobHandle(self._loop, self._loop.run(made))


class JobHandle:
    """A job that was submitted: watch it, wait for it, cancel it, save its pictures."""

    def __init__(self, loop: _LoopThread, handle: aio.JobHandle) -> None:
        self._loop = loop
        self._handle = handle

    @property
    def job(self) -> Job:
        """As last seen."""
        return self._handle.job

    @property
    def id(self) -> str:
        """Its UUID."""
        return self._handle.id

    @property
    def receipt(self) -> Receipt | None:
        """What it cost, once it has ended."""
        return self._handle.receipt

    def watch(self, *, previews: bool = False) -> Iterator[WatchJobResponse]:
        """Yield everything that happens to it until it has ended; `job` follows."""
        return self._loop.iterate(self._handle.watch(previews=previews))

    def result(self) -> Job:
        """Wait for its end and return it with its pictures. Raises JobFailed or JobCancelled."""
        return self._loop.run(self._handle.result())

    def cancel(self) -> Job:
        """Cancel it; return it as it is now."""
        return self._loop.run(self._handle.cancel())

    def move(self, tier: Tier.ValueType) -> Job:
        """Move it to `tier` while it waits; return it as it is now."""
        return self._loop.run(self._handle.move(tier))

    def explain(self) -> Explanation:
        """Return why it is where it is."""
        return self._loop.run(self._handle.explain())

    def save(self, folder: Path) -> list[Path]:
        """Save its pictures and videos in `folder`; return their paths in order, pictures first."""
        return self._loop.run(self._handle.save(folder))
