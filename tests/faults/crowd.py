"""People under faults: they submit, watch, move, cancel and delete, and write down what they were promised.

Each call is repeated under its request id, at either front door in turn, until it is answered: so nobody is
left not knowing. What was answered is a promise, and the checks hold the service to all of them.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from billing.v1 import admin_pb2
from scheduler.client.aio import ENDED, DarkroomClient, RetryPolicy
from scheduler.client.errors import (
    DarkroomError,
    FastTimeExhausted,
    JobFinished,
    JobStarted,
    NoAnswerInTime,
    QueueFull,
    RateLimited,
    Refusal,
    ServiceFailed,
    raised_for,
)
from scheduler.v1 import job_pb2, job_pb2_grpc

T = TypeVar("T")

GALLERY = tuple(f"plate {number} --seed {100 + number} --w 128 --h 128" for number in range(8))
"""All that anybody asks for. The seeds are in the prompts, so that each has one right answer."""

_WHY = "a run under faults"
_TIERS = (job_pb2.TIER_FAST, job_pb2.TIER_RELAX)
_TRY_S = 4.0
# Longer than everything that a plan may let pile up.
_PATIENCE_S = 120.0
_PAUSE_S = 0.1
_MOST_PAUSE_S = 1.0
# Reaches a dead connection's client early enough.
_CHANNEL = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)


class Deed(StrEnum):
    """What somebody was told was done."""

    CREATED = "created"
    CANCELLED = "cancelled"
    MOVED = "moved"
    DELETED = "deleted"
    SAW_END = "saw the end of"


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One answer that somebody got, and may rely on from then on."""

    at_s: float
    """Since 1970, as are all times here."""
    account_id: str
    deed: Deed
    job_id: str
    request_id: str = ""
    tries: int = 1
    sent_s: float = 0.0
    """When the try was sent that was answered."""
    picture: int = 0
    """Of the gallery."""
    tier: str = ""
    asked: str = ""
    """The tier that a move was to."""
    state: str = ""
    sha256: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Habit:
    """What kind of account somebody has, and what he does with it."""

    name: str
    plan: str = "standard"
    fast_in_ten: int = 5
    funds_ms: int | None = None
    """All the fast time there is; None: that of the plan."""
    overage: bool = False
    cancels_in_ten: int = 1
    moves_in_ten: int = 1
    deletes_in_ten: int = 1
    most_live: int = 4


HABITS = (
    Habit(name="ada", fast_in_ten=10),
    Habit(name="ben", plan="basic", fast_in_ten=0),
    Habit(name="cy", fast_in_ten=8, funds_ms=12_000, overage=True),
    Habit(name="dan", fast_in_ten=8, funds_ms=20_000),
    Habit(name="eve", cancels_in_ten=4, moves_in_ten=3),
    Habit(name="flo", plan="pro", fast_in_ten=3, deletes_in_ten=4, most_live=6),
)


@dataclass(frozen=True, kw_only=True)
class _Answered:
    """What came of a call, and what it took."""

    answer: Any
    tries: int
    sent_s: float


class Crowd:
    """All of them, and what they were promised."""

    def __init__(
        self,
        addresses: Sequence[str],
        admin_key: str,
        seed: int,
        wires_fail: Callable[[], bool] = lambda: False,
    ) -> None:
        self.wires_fail = wires_fail
        """Whether something between clients and front doors breaks calls off just now, or did just before."""
        self._addresses = addresses
        self._admin_key = admin_key
        self._seed = seed
        self._stopping = asyncio.Event()
        self.members: list[Member] = []
        self.promises: list[Promise] = []
        self.refused: Counter[str] = Counter()
        self.broken: list[str] = []
        """Answers that no client should ever get."""
        self.told_again: list[str] = []
        """Events that somebody was told twice."""

    async def open_accounts(self, habits: Sequence[Habit] = HABITS) -> None:
        """Open an account for each habit, with as much fast time as it says."""
        async with self._admin() as admin:
            for habit in habits:
                account_id = f"{habit.name}-{self._seed}"
                await admin.create_account(plan=f"plans/{habit.plan}", account_id=account_id, reason=_WHY)
                key = await admin.create_api_key(
                    f"accounts/{account_id}", role=admin_pb2.ROLE_USER, reason=_WHY
                )
                if habit.funds_ms is not None:
                    granted_ms = (await admin.admin_account(account_id)).balance.available_ms
                    await admin.adjust_balance(account_id, amount_ms=habit.funds_ms - granted_ms, reason=_WHY)
                if habit.overage:
                    async with DarkroomClient(self._addresses[0], key.secret) as owner:
                        await owner.update_account(overage_allowed=True)
                self.members.append(Member(self, habit, account_id, key.secret, self._addresses, self._seed))

    async def draw_undisturbed(self) -> Mapping[int, tuple[str, ...]]:
        """Have every picture of the gallery drawn while nothing is wrong; returns the digests of each."""
        member = self.members[0]
        jobs = [await member.create(number, job_pb2.TIER_FAST) for number in range(len(GALLERY))]
        ended = [await member.watch(number, job) for number, job in enumerate(jobs)]
        return {number: one.sha256 for number, one in enumerate(ended)}

    async def run(self) -> None:
        """Let all of them do what they do until `stop`; returns once everybody has his last answer."""
        async with asyncio.TaskGroup() as group:
            for member in self.members:
                group.create_task(member.live(self._stopping), name=member.account_id)
            group.create_task(self._operate(), name="operator")

    def stop(self) -> None:
        """Let nobody begin anything new."""
        self._stopping.set()

    async def let_everything_run(self) -> None:
        """Grant everybody time, so that what waits for funds goes on, and open what an operator closed."""
        async with self._admin() as admin:
            for member in self.members:
                await admin.adjust_balance(member.account_id, amount_ms=3_600_000, reason=_WHY)
            for tier in _TIERS:
                await admin.resume_tier(tier, reason=_WHY)
            for worker in await admin.workers():
                # A slot that lost three jobs in a row is set aside for an hour, unless somebody knows better.
                await admin.resume_worker(worker.name, reason=_WHY)

    async def see_the_ends(self, within_s: float) -> list[str]:
        """Wait until everybody has seen the end of each of his jobs; returns whose end was not seen."""
        watches = [watch for member in self.members for watch in member.watches]
        seen, late = await asyncio.wait(watches, timeout=within_s) if watches else (set(), set())
        failed = [(watch.get_name(), watch.exception()) for watch in seen if watch.exception() is not None]
        self.broken += [f"{name} failed: {failure!r}" for name, failure in failed]
        return [f"{watch.get_name()}: its end was not seen in {within_s:.0f} s" for watch in late]

    async def close(self) -> None:
        """End every watch and connection."""
        for member in self.members:
            await member.close()

    async def _operate(self) -> None:
        """Drain workers and pause tiers, one at a time and for a moment: their jobs go elsewhere, or wait."""
        draw = random.Random(f"operator {self._seed}")
        async with DarkroomClient(self._addresses[-1], self._admin_key) as operator:
            while not self._stopping.is_set():
                with suppress(DarkroomError):
                    workers = await operator.workers()
                    if workers and draw.randrange(3):
                        worker = draw.choice(workers).name
                        await operator.drain_worker(worker, reason=_WHY, within=timedelta(seconds=1))
                        await self._unless_stopping(draw.uniform(1, 4))
                        await operator.resume_worker(worker, reason=_WHY)
                    else:
                        tier = draw.choice(_TIERS)
                        await operator.pause_tier(tier, reason=_WHY)
                        await self._unless_stopping(draw.uniform(0.5, 2))
                        await operator.resume_tier(tier, reason=_WHY)
                await self._unless_stopping(draw.uniform(2, 6))

    async def _unless_stopping(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _admin(self) -> DarkroomClient:
        return DarkroomClient(self._addresses[0], self._admin_key, retries=RetryPolicy(times=30))

    def write(self, file: Path) -> None:
        """Write every promise down, one a line."""
        file.write_text("".join(json.dumps(asdict(promise)) + "\n" for promise in self.promises))


class Member:
    """One account, at both front doors."""

    def __init__(
        self, crowd: Crowd, habit: Habit, account_id: str, key: str, addresses: Sequence[str], seed: int
    ) -> None:
        self.account_id = account_id
        self.watches: list[asyncio.Task[Promise]] = []
        self._crowd = crowd
        self._habit = habit
        self._draw = random.Random(f"{habit.name} {seed}")
        self._addresses = addresses
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._channels = [grpc.aio.insecure_channel(address, options=_CHANNEL) for address in addresses]
        self._stubs = [job_pb2_grpc.JobServiceStub(channel) for channel in self._channels]
        self._door = self._draw.randrange(len(self._stubs))
        self._live: set[str] = set()
        self._ended: list[str] = []

    async def live(self, stopping: asyncio.Event) -> None:
        """Do one thing after the other until told to stop."""
        while not stopping.is_set():
            await self._do_something()
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), self._draw.uniform(0.05, 0.5))

    async def create(self, picture: int, tier: job_pb2.Tier.ValueType) -> str:
        """Submit one of the gallery's prompts; returns the job's id. Raises a refusal."""
        request = job_pb2.CreateJobRequest(
            request_id=str(uuid.UUID(int=self._draw.getrandbits(128), version=4)),
            imagine=job_pb2.Imagine(prompt=GALLERY[picture]),
            tier=tier,
        )
        answered = await self._answer("CreateJob", request)
        job: job_pb2.Job = answered.answer
        self._promise(answered, Deed.CREATED, job, request.request_id, picture=picture)
        self._live.add(job.uid)
        return job.uid

    async def watch(self, picture: int, job_id: str) -> Promise:
        """Follow a job to its end over whatever breaks; returns what was seen of it."""
        sequence = 0
        while True:
            job = None
            stub = self._stubs[self._door]
            call = stub.WatchJob(
                job_pb2.WatchJobRequest(name=f"accounts/-/jobs/{job_id}", after_sequence=sequence),
                metadata=self._metadata,
            )
            try:
                async for update in call:
                    if update.WhichOneof("update") == "event":
                        if update.event.sequence <= sequence:
                            self._crowd.told_again.append(f"job {job_id}: event {sequence} was told again")
                        sequence, job = update.event.sequence, update.event.job
                        if update.event.state in ENDED:
                            break
            except grpc.aio.AioRpcError as failure:
                await self._take(raised_for(failure, self._addresses[self._door]), "WatchJob")
            finally:
                call.cancel()
            if job is not None and job.state in ENDED:
                break
            if job is None:
                # Nothing came: perhaps its end was the last thing seen.
                job = await self._look(job_id)
                if job.state in ENDED and job.event_sequence <= sequence:
                    break
            await asyncio.sleep(_PAUSE_S)
        self._live.discard(job_id)
        self._ended.append(job_id)
        return self._promise(None, Deed.SAW_END, job, picture=picture)

    async def close(self) -> None:
        """End its watches and connections."""
        for watch in self.watches:
            watch.cancel()
        await asyncio.gather(*self.watches, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _do_something(self) -> None:
        habit, live = self._habit, sorted(self._live)
        deeds: list[tuple[int, Callable[[], Awaitable[Any]]]] = []
        if len(live) < habit.most_live:
            deeds.append((10, self._submit))
        else:
            deeds.append((10, lambda: self._look(self._draw.choice(live))))
        if live:
            deeds.append((habit.cancels_in_ten, lambda: self._cancel(self._draw.choice(live))))
            deeds.append((habit.moves_in_ten, lambda: self._move(self._draw.choice(live))))
        if self._ended:
            deeds.append((habit.deletes_in_ten, self._delete))
        (deed,) = self._draw.choices([deed for _, deed in deeds], [weight for weight, _ in deeds])
        try:
            await deed()
        except Refusal as refused:
            self._crowd.refused[refused.stable_reason] += 1
            if not isinstance(refused, _FAIR):
                self._crowd.broken.append(f"{self.account_id} was refused: {refused}")
        except TimeoutError:
            self._crowd.broken.append(f"{self.account_id} got no answer in {_PATIENCE_S:.0f} s")

    async def _submit(self) -> None:
        tier = job_pb2.TIER_FAST if self._draw.randrange(10) < self._habit.fast_in_ten else job_pb2.TIER_RELAX
        picture = self._draw.randrange(len(GALLERY))
        job_id = await self.create(picture, tier)
        self.watches.append(asyncio.create_task(self.watch(picture, job_id), name=f"watch {job_id}"))

    async def _cancel(self, job_id: str) -> None:
        request = job_pb2.CancelJobRequest(name=f"accounts/-/jobs/{job_id}", request_id=_new_id())
        answered = await self._answer("CancelJob", request)
        self._promise(answered, Deed.CANCELLED, answered.answer, request.request_id)

    async def _move(self, job_id: str) -> None:
        tier = self._draw.choice(_TIERS)
        request = job_pb2.UpdateJobRequest(
            job=job_pb2.Job(name=f"accounts/-/jobs/{job_id}", tier=tier),
            update_mask=FieldMask(paths=["tier"]),
            request_id=_new_id(),
        )
        answered = await self._answer("UpdateJob", request)
        self._promise(answered, Deed.MOVED, answered.answer, request.request_id, asked=_tier(tier))

    async def _delete(self) -> None:
        job_id = self._ended.pop(self._draw.randrange(len(self._ended)))
        request = job_pb2.DeleteJobRequest(name=f"accounts/-/jobs/{job_id}", request_id=_new_id())
        answered = await self._answer("DeleteJob", request)
        self._promise(answered, Deed.DELETED, job_pb2.Job(uid=job_id), request.request_id)

    async def _look(self, job_id: str) -> job_pb2.Job:
        answered = await self._answer("GetJob", job_pb2.GetJobRequest(name=f"accounts/-/jobs/{job_id}"))
        job: job_pb2.Job = answered.answer
        return job

    async def _answer(self, method: str, request: Any) -> _Answered:
        """Send a request until it is answered. Raises what refuses it, and TimeoutError after two minutes."""
        tries, pause_s = 0, _PAUSE_S
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                tries += 1
                sent_s = time.time()
                call = getattr(self._stubs[self._door], method)
                try:
                    answer = await call(request, timeout=_TRY_S, metadata=self._metadata)
                    return _Answered(answer=answer, tries=tries, sent_s=sent_s)
                except grpc.aio.AioRpcError as failure:
                    await self._take(raised_for(failure, self._addresses[self._door]), method)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MOST_PAUSE_S)

    async def _take(self, error: DarkroomError, method: str) -> None:
        """Go to the other door with what may be sent again. Raises everything else."""
        if isinstance(error, ServiceFailed):
            # Of a call that was broken off gRPC itself says CANCELLED or INTERNAL, and of a bug the service.
            if not (self._crowd.wires_fail() and any(wire in error.happened for wire in _OF_THE_WIRE)):
                self._crowd.broken.append(f"{method}: {error.happened}")
        elif not error.retried and not isinstance(error, NoAnswerInTime):
            raise error
        self._door = (self._door + 1) % len(self._stubs)

    def _promise(
        self,
        answered: _Answered | None,
        deed: Deed,
        job: job_pb2.Job,
        request_id: str = "",
        *,
        picture: int = 0,
        asked: str = "",
    ) -> Promise:
        promise = Promise(
            at_s=time.time(),
            account_id=self.account_id,
            deed=deed,
            job_id=job.uid,
            request_id=request_id,
            picture=picture,
            tier=_tier(job.tier),
            asked=asked,
            state=job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower(),
            sha256=tuple(image.sha256 for image in job.images),
        )
        if answered is not None:
            promise = replace(promise, tries=answered.tries, sent_s=answered.sent_s)
        self._crowd.promises.append(promise)
        return promise


_OF_THE_WIRE = ("RST_STREAM", "CANCELLED", "Socket closed", "GOAWAY", "transport")
# What somebody may be told who asks for too much, or for what has happened meanwhile.
_FAIR = (QueueFull, FastTimeExhausted, RateLimited, JobStarted, JobFinished)


def _tier(tier: job_pb2.Tier.ValueType) -> str:
    return job_pb2.Tier.Name(tier).removeprefix("TIER_").lower()


def _new_id() -> str:
    return str(uuid.uuid4())
