"""Who calls, and what they may call.

A key is `dk_<id>_<secret>` in the metadata `authorization: Bearer …`. Missing, malformed, wrong and revoked
keys get the same answer. What a key may do is looked up at most once a second, so a key that another front
door revoked works here for at most that long. The streams that it has open are looked at four times a
minute, and end with what a new call would be told.

Strangers cost the database little, however many they are: one query looks up all keys that are asked for
while the one before it runs, known ones and made-up ones alike, so a flood of others keeps nobody out.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network, ip_address
from urllib.parse import unquote

from google.protobuf.descriptor import ServiceDescriptor

from billing.refusals import Refusal
from billing.v1 import admin_pb2, billing_pb2
from scheduler.refusals import AccountBlocked, Overloaded, RateLimited, RoleRequired, Unauthenticated
from scheduler.store import accounts
from scheduler.store.accounts import ApiKey, Role
from scheduler.store.pool import Pool
from scheduler.v1 import account_pb2, fleet_pb2, job_pb2, moderation_pb2

ROLE_NEEDED: Mapping[str, Role] = {
    "/scheduler.v1.JobService/CreateJob": Role.USER,
    "/scheduler.v1.JobService/GetJob": Role.USER,
    "/scheduler.v1.JobService/ListJobs": Role.USER,
    "/scheduler.v1.JobService/CancelJob": Role.USER,
    "/scheduler.v1.JobService/DeleteJob": Role.USER,
    "/scheduler.v1.JobService/WatchJob": Role.USER,
    "/scheduler.v1.JobService/DownloadImages": Role.USER,
    "/scheduler.v1.JobService/ListFeed": Role.USER,
    "/scheduler.v1.JobService/UpdateJob": Role.USER,
    "/scheduler.v1.JobService/ExplainJob": Role.USER,
    "/scheduler.v1.JobService/EstimateJob": Role.USER,
    "/scheduler.v1.AccountService/GetAccount": Role.USER,
    "/scheduler.v1.AccountService/UpdateAccount": Role.USER,
    "/scheduler.v1.FleetService/ListWorkers": Role.OPERATOR,
    "/scheduler.v1.FleetService/DrainWorker": Role.OPERATOR,
    "/scheduler.v1.FleetService/ResumeWorker": Role.OPERATOR,
    "/scheduler.v1.FleetService/GetQueues": Role.OPERATOR,
    "/scheduler.v1.FleetService/PauseTier": Role.OPERATOR,
    "/scheduler.v1.FleetService/ResumeTier": Role.OPERATOR,
    "/scheduler.v1.FleetService/AuditFairness": Role.OPERATOR,
    "/scheduler.v1.FleetService/ListDecisions": Role.OPERATOR,
    "/scheduler.v1.ModerationService/ListRules": Role.MODERATOR,
    "/scheduler.v1.ModerationService/UpdateRules": Role.MODERATOR,
    "/scheduler.v1.ModerationService/HideJob": Role.MODERATOR,
    "/scheduler.v1.ModerationService/UnhideJob": Role.MODERATOR,
    "/scheduler.v1.ModerationService/BlockAccount": Role.MODERATOR,
    "/scheduler.v1.ModerationService/UnblockAccount": Role.MODERATOR,
    "/billing.v1.BillingService/GetBalance": Role.USER,
    "/billing.v1.BillingService/ListTransfers": Role.USER,
    "/billing.v1.BillingService/GetStatement": Role.USER,
    "/billing.v1.BillingService/PreviewPlanChange": Role.USER,
    "/billing.v1.BillingService/ChangePlan": Role.USER,
    "/billing.v1.AdminService/CreateAccount": Role.ADMIN,
    "/billing.v1.AdminService/GetAccount": Role.ADMIN,
    "/billing.v1.AdminService/ListAccounts": Role.ADMIN,
    "/billing.v1.AdminService/EraseAccount": Role.ADMIN,
    "/billing.v1.AdminService/CreateApiKey": Role.ADMIN,
    "/billing.v1.AdminService/ListApiKeys": Role.ADMIN,
    "/billing.v1.AdminService/RevokeApiKey": Role.ADMIN,
    "/billing.v1.AdminService/CreatePlan": Role.ADMIN,
    "/billing.v1.AdminService/GetPlan": Role.ADMIN,
    "/billing.v1.AdminService/ListPlans": Role.ADMIN,
    "/billing.v1.AdminService/UpdatePlan": Role.ADMIN,
    "/billing.v1.AdminService/AdjustBalance": Role.ADMIN,
    "/billing.v1.AdminService/RefundJob": Role.ADMIN,
    "/billing.v1.AdminService/UndoRefund": Role.ADMIN,
    "/billing.v1.AdminService/UndoPlanChange": Role.ADMIN,
    "/billing.v1.AdminService/ListAuditEvents": Role.MODERATOR,
    "/billing.v1.AdminService/CheckInvariants": Role.ADMIN,
}
"""The least role that may call each method. Within the methods of a user, whose job it is decides; of audit
events, those who are no admins see what was done about moderation."""

SERVICES: tuple[ServiceDescriptor, ...] = (
    job_pb2.DESCRIPTOR.services_by_name["JobService"],
    account_pb2.DESCRIPTOR.services_by_name["AccountService"],
    fleet_pb2.DESCRIPTOR.services_by_name["FleetService"],
    moderation_pb2.DESCRIPTOR.services_by_name["ModerationService"],
    billing_pb2.DESCRIPTOR.services_by_name["BillingService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
)

_OPEN_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")

_KEY = re.compile(r"Bearer dk_([0-9a-f]{16})_([0-9a-f]{64})", re.ASCII)
_KEY_FRESH_S = 1.0
_MOST_KEPT = 10_000
_LOOK_AGAIN_S = 15.0
# Bursts of so many seconds' worth of requests are let through: a client that starts asks many things at once.
_BURST_S = 4.0
# Health checks that stay open, and reflection. Probes come one at a time.
_STREAMS_OF_STRANGERS = 100
# Of these: one machine does not take them all from the others. Whoever has ten machines does.
_STREAMS_OF_AN_ADDRESS = 10
# What one household or machine is given of IPv6, all of it its own.
_ONE_ADDRESS_BITS = 64
_NO_HASH = bytes(32)


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Whoever a valid key speaks for."""

    account_id: str
    key_id: str
    role: Role

    @property
    def sees_all(self) -> bool:
        """Return whether jobs of other accounts, also private ones, are shown."""
        return self.role.reaches(Role.MODERATOR)

    def reads_account(self, account_id: str) -> bool:
        """Return whether the caller may look at an account: their own, or any as an admin."""
        return account_id == self.account_id or self.is_admin

    @property
    def is_admin(self) -> bool:
        """Return whether the caller may change plans, and anybody's time and money."""
        return self.role.reaches(Role.ADMIN)

    @property
    def actor(self) -> str:
        """Name in audit events."""
        return f"accounts/{self.account_id}/keys/{self.key_id}"


def is_open(path: str) -> bool:
    """Return whether a method is answered without a key: health and reflection tell nothing of anybody."""
    return path.startswith(_OPEN_PREFIXES)


def every_method_has_a_role() -> None:
    """Fail at start, not at the first call, if a method was added and nobody said who may call it."""
    offered = {f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods}
    assert offered == set(ROLE_NEEDED), f"roles and methods differ: {offered ^ set(ROLE_NEEDED)}"


class Doorman:
    """Looks at keys and counts what each asks for. `now_s` is a monotonic clock in seconds."""

    def __init__(
        self, pool: Pool, *, requests_per_second: float, streams_per_key: int, now_s: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._rate = requests_per_second
        self._streams_per_key = streams_per_key
        self._now_s = now_s
        self._keys: dict[str, _Kept] = {}
        # By themselves: made-up ids, of which there is no end, push no key out that is in use.
        self._unknown: dict[str, _Kept] = {}
        self._wanted: dict[str, asyncio.Future[ApiKey | None]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._changes = 0
        self._strangers: Counter[str] = Counter()
        """Streams without a key, by where they come from."""
        self._buckets: dict[str, _Bucket] = {}
        self._streams: dict[str, dict[OpenStream, None]] = {}
        """Those that are open, by their keys' ids."""

    async def admit(self, path: str, metadata: Iterable[tuple[str, str | bytes]]) -> Principal:
        """Return who calls.

        Raises Unauthenticated, RateLimited, AccountBlocked or RoleRequired, in this order: a stranger
        learns nothing, and who is refused may not ask faster than others.
        """
        given = next((value for name, value in metadata if name == "authorization"), "")
        return await self._admit(given, ROLE_NEEDED[path])

    async def admit_key(self, key: str, needed: Role) -> Principal:
        """Return whose key `dk_…` this is, for who does not come by gRPC. Raises what `admit` does."""
        return await self._admit(f"Bearer {key}", needed)

    async def still_admitted(self, key_id: str, needed: Role) -> Principal | None:
        """Return whose key this is, which was shown here before.

        None if it was revoked, its account was blocked, or it does not reach that role. Raises Overloaded.
        """
        key = await self._look_up(key_id)
        if key is None or key.blocked or not key.role.reaches(needed):
            return None
        return Principal(account_id=key.account_id, key_id=key.key_id, role=key.role)

    def forget(self, account_id: str) -> None:
        """Look at an account's keys afresh: they changed here, and whoever changed them may try at once."""
        self._keys = {
            key_id: kept
            for key_id, kept in self._keys.items()
            if kept.key is None or kept.key.account_id != account_id
        }
        # What is being read may be from before the change: whoever waits for it reads again.
        self._changes += 1

    @contextmanager
    def stream_of_a_stranger(self, peer: str) -> Iterator[None]:
        """Count a stream of an open method while the context is open; raises RateLimited above a limit.

        `peer` is as gRPC names it.
        """
        address = _address_of(peer)
        if self._strangers[address] >= _STREAMS_OF_AN_ADDRESS:
            raise RateLimited(
                sentence=f"Your address has {_STREAMS_OF_AN_ADDRESS} streams open without a key, the most it "
                "may: close one.",
                retry_after_ms=1_000,
            )
        if self._strangers.total() >= _STREAMS_OF_STRANGERS:
            raise RateLimited(
                sentence="Too many callers without a key have a stream open: try again later.",
                retry_after_ms=1_000,
            )
        self._strangers[address] += 1
        try:
            yield
        finally:
            self._strangers -= Counter((address,))  # which drops an address that has none left

    @contextmanager
    def stream_of(self, principal: Principal) -> Iterator[OpenStream]:
        """Count a stream of a key while the context is open; raises RateLimited above the limit."""
        streams = self._streams.setdefault(principal.key_id, {})
        if len(streams) >= self._streams_per_key:
            raise RateLimited(
                sentence=f"This key has {self._streams_per_key} open streams, the most it may: close one.",
                retry_after_ms=1_000,
            )
        stream = OpenStream()
        streams[stream] = None
        try:
            yield stream
        finally:
            del streams[stream]
            if not streams:
                del self._streams[principal.key_id]

    async def run(self) -> None:
        """Look at the keys of open streams now and then, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_AGAIN_S)
            # While nobody can tell whose key is good, streams go on: so do those of keys that are.
            with suppress(Overloaded):
                await self.look_again()

    async def look_again(self) -> None:
        """End the open streams of keys that open nothing any more. Raises Overloaded."""
        key_ids = list(self._streams)
        for key_id, key in zip(key_ids, await asyncio.gather(*map(self._look_up, key_ids)), strict=True):
            refusal = Unauthenticated() if key is None else AccountBlocked() if key.blocked else None
            if refusal is not None:
                for stream in self._streams.get(key_id, ()):
                    stream.end(refusal)

    async def _admit(self, given: str | bytes, needed: Role) -> Principal:
        key = await self._valid_key(given)
        self._take_token(key.key_id)
        if key.blocked:
            raise AccountBlocked
        if not key.role.reaches(needed):
            raise RoleRequired(role=needed.value)
        return Principal(account_id=key.account_id, key_id=key.key_id, role=key.role)

    async def _valid_key(self, given: str | bytes) -> ApiKey:
        match = _KEY.fullmatch(given) if isinstance(given, str) else None
        if match is None:
            raise Unauthenticated
        key_id, secret = match.groups()
        key = await self._look_up(key_id)
        # Compared also where there is no key: an id that exists takes no longer than one that does not.
        stored = _NO_HASH if key is None else key.secret_hash
        right = hmac.compare_digest(stored, accounts.hash_secret(secret))
        if key is None or not right:
            raise Unauthenticated
        return key

    async def _look_up(self, key_id: str) -> ApiKey | None:
        kept = self._keys.get(key_id) or self._unknown.get(key_id)
        if kept is not None and self._now_s() - kept.read_s < _KEY_FRESH_S:
            return kept.key
        found = self._wanted.get(key_id)
        if found is None:
            found = self._wanted[key_id] = asyncio.get_running_loop().create_future()
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_wanted())
        # Others may wait for the same key when this caller goes away.
        return await asyncio.shield(found)

    async def _read_wanted(self) -> None:
        """Read what is wanted, all of it at once, until nothing is."""
        try:
            while self._wanted:
                wanted, self._wanted = self._wanted, {}
                try:
                    keys = await self._read(list(wanted))
                except Exception as trouble:
                    # Each caller's own: a refusal if the database is away, a bug if it is one.
                    for found in wanted.values():
                        found.set_exception(trouble)
                    continue
                for key_id, found in wanted.items():
                    found.set_result(keys.get(key_id))
        finally:
            self._reading = None

    async def _read(self, key_ids: Sequence[str]) -> Mapping[str, ApiKey]:
        while True:
            changes, read_s = self._changes, self._now_s()
            async with self._pool.reading() as connection:
                keys = await accounts.find_keys(connection, key_ids)
            if changes == self._changes:
                break
        for key_id in key_ids:
            kept = _Kept(read_s=read_s, key=keys.get(key_id))
            where, other = (self._unknown, self._keys) if kept.key is None else (self._keys, self._unknown)
            if len(where) >= _MOST_KEPT:
                where.clear()  # all of it is a second old at most: nothing worth choosing is lost
            where[key_id] = kept
            other.pop(key_id, None)
        return keys

    def _take_token(self, key_id: str) -> None:
        now_s = self._now_s()
        bucket = self._buckets.get(key_id)
        if bucket is None:
            if len(self._buckets) >= _MOST_KEPT:
                self._buckets = {k: b for k, b in self._buckets.items() if not b.is_full(now_s)}
            bucket = self._buckets[key_id] = _Bucket(rate=self._rate, filled_s=now_s)
        wait_s = bucket.take(now_s)
        if wait_s > 0:
            raise RateLimited(
                sentence=f"This key sends more than {self._rate:g} requests a second: slow down.",
                retry_after_ms=int(wait_s * 1000) + 1,
            )


class OpenStream:
    """A stream as long as its key is good."""

    def __init__(self) -> None:
        self._refusal: Refusal | None = None
        self._waiting: asyncio.Timeout | None = None

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Have what is awaited in the context end when the stream does. Raises what `end` was told."""
        if self._refusal is not None:
            raise self._refusal
        limit = self._waiting = asyncio.timeout(None)
        try:
            async with limit:
                yield
        except TimeoutError:
            if self._refusal is None:
                raise
            raise self._refusal from None
        finally:
            self._waiting = None

    def end(self, refusal: Refusal) -> None:
        """End it now if it waits, else before its next message."""
        self._refusal = refusal
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())


def _address_of(peer: str) -> str:
    """Return where a peer is, without its port: `ipv4:192.0.2.7:50123`, `ipv6:%5B2001:db8::7%5D:50123`."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind  # a socket of this machine: whoever may open it, may take all of ours
    address = ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or IPv6Network((address, _ONE_ADDRESS_BITS), strict=False))
    return str(address)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What was found of a key id, and when."""

    read_s: float
    key: ApiKey | None


@dataclass(kw_only=True)
class _Bucket:
    """Tokens that come back at `rate` a second, up to a burst's worth."""

    rate: float
    filled_s: float
    tokens: float = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self._most

    @property
    def _most(self) -> float:
        # With a rate below one in four seconds a single request must still be possible.
        return max(1.0, self.rate * _BURST_S)

    def take(self, now_s: float) -> float:
        """Take a token and return 0, or take none and return the seconds until there is one."""
        self.tokens = min(self._most, self.tokens + (now_s - self.filled_s) * self.rate)
        self.filled_s = now_s
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0.0

    def is_full(self, now_s: float) -> bool:
        """Return whether forgetting this bucket forgets nothing."""
        return self.tokens + (now_s - self.filled_s) * self.rate >= self._most
