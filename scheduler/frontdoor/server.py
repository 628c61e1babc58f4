"""The gRPC service of one front door: it holds nothing that a restart would lose.

Everything durable is in PostgreSQL, so any number of front doors run side by side, and a client whose front
door closes goes on at another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.trace import NoOpTracer, Tracer

from billing.v1 import admin_pb2_grpc, billing_pb2_grpc
from gpu_worker.models import Models
from scheduler.frontdoor.accounts import AccountService
from scheduler.frontdoor.admin import ACTION_OF as ACTION_OF_ADMIN
from scheduler.frontdoor.admin import AdminService
from scheduler.frontdoor.admin_accounts import AccountDeeds
from scheduler.frontdoor.admin_balances import BalanceDeeds
from scheduler.frontdoor.admin_plans import PlanDeeds
from scheduler.frontdoor.admin_records import Records
from scheduler.frontdoor.admission import Admission, QueueRoom
from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.auth import SERVICES, Doorman, every_method_has_a_role
from scheduler.frontdoor.billing import BillingService
from scheduler.frontdoor.canary import Canary
from scheduler.frontdoor.deeds import Deeds, deed_refused
from scheduler.frontdoor.deletions import Deletions
from scheduler.frontdoor.downloads import Downloads
from scheduler.frontdoor.estimates import Estimates
from scheduler.frontdoor.fleet import ACTION_OF as ACTION_OF_OPERATOR
from scheduler.frontdoor.fleet import FleetService
from scheduler.frontdoor.gate import Gate, OnRefusal
from scheduler.frontdoor.jobs import JobService, submission_refused
from scheduler.frontdoor.lateness import Lateness, private_socket
from scheduler.frontdoor.lifetimes import Lifetimes
from scheduler.frontdoor.moderation import Moderation
from scheduler.frontdoor.moderation_classifier import classification
from scheduler.frontdoor.moderation_service import ACTION_OF as ACTION_OF_MODERATOR
from scheduler.frontdoor.moderation_service import ModerationService
from scheduler.frontdoor.orphans import Orphans
from scheduler.frontdoor.pictures import Pictures
from scheduler.frontdoor.renewals import Renewals
from scheduler.frontdoor.standings import Standings
from scheduler.frontdoor.tls import TlsFiles
from scheduler.frontdoor.watch import Watches
from scheduler.link import SchedulerLink
from scheduler.metrics import FrontDoorMetrics
from scheduler.policy.parameters import Parameters
from scheduler.refusals import Overloaded
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.settings import Settings
from scheduler.store.pool import Pool
from scheduler.v1 import account_pb2_grpc, fleet_pb2_grpc, job_pb2_grpc, moderation_pb2_grpc

_LOOK_AT_DATABASE_EVERY_S = 1.0
# Above all streams that may be open, and a bound all the same: each takes some KB.
_MOST_PENDING = 20_000


class CannotListen(OSError):
    """The address is taken, or is not one of this machine."""


@dataclass(frozen=True, kw_only=True)
class FrontDoor:
    """A running front door."""

    host: str
    port: int
    """The one it listens on, also where the settings said 0."""
    doorman: Doorman
    """Who knows all keys, for whatever else asks for one."""
    background: asyncio.Task[None]
    """Ends only by failing: whoever keeps the service up awaits it too."""

    @property
    def address(self) -> str:
        """What a client on this machine connects to."""
        return f"{self.host}:{self.port}"


class _OneQueue:
    """A server as generated code sees it that adds a service: calls of all methods wait in one queue.

    Methods that are registered one by one have a queue each. With every call the library then waits anew for
    each of them, which took a fifth of a front door's time; and a method's queue is known to who calls it.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        """Leave them to the generic handlers, which the generated code adds too."""


def _now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def serve(
    settings: Settings,
    pool: Pool,
    link: SchedulerLink,
    models: Models,
    metrics: FrontDoorMetrics,
    *,
    clock: Callable[[], datetime] = _now,
    monotonic_s: Callable[[], float] = time.monotonic,
    tracer: Tracer | None = None,
) -> AsyncIterator[FrontDoor]:
    """Answer calls while the context is open; then let those in progress end, and watches resume elsewhere.

    `clock` is the ledger's time, `monotonic_s` that of rate limits and caches; without `tracer` nothing is
    traced. Raises CannotListen, TlsUnusable and ClassifierUnusable.
    """
    every_method_has_a_role()
    doorman = Doorman(
        pool,
        requests_per_second=settings.frontdoor.requests_per_second,
        streams_per_key=settings.frontdoor.streams_per_key,
        now_s=monotonic_s,
    )
    on_refusal: dict[str, OnRefusal] = {
        "/scheduler.v1.JobService/CreateJob": submission_refused(metrics),
        **{
            path: deed_refused(metrics, action)
            for actions in (ACTION_OF_ADMIN, ACTION_OF_OPERATOR, ACTION_OF_MODERATOR)
            for path, action in actions.items()
        },
    }
    deeds = Deeds(pool=pool, metrics=metrics, clock=clock)
    moderation = Moderation(pool, monotonic_s, classification(settings.moderation))
    standings = Standings(pool, link, clock)
    watches = Watches(pool, link, standings, settings.frontdoor.watches_at_once)
    room = QueueRoom(pool, settings.scheduling.waiting_max)
    estimates = Estimates(pool, models)
    artifacts = Artifacts(settings.artifacts)
    lateness = Lateness()
    deletions = Deletions(pool, artifacts, clock)
    server = grpc.aio.server(
        interceptors=[
            Gate(
                doorman,
                Admission(settings.frontdoor, lateness.ms),
                metrics,
                on_refusal,
                strangers_streams_s=settings.frontdoor.connection_age_ms / 1_000,
                tracer=tracer or NoOpTracer(),
            )
        ],
        options=_options(settings.frontdoor),
    )
    services = cast(grpc.aio.Server, _OneQueue(server))
    job_pb2_grpc.add_JobServiceServicer_to_server(
        JobService(
            pool=pool,
            link=link,
            metrics=metrics,
            models=models,
            estimates=estimates,
            moderation=moderation,
            standings=standings,
            watches=watches,
            downloads=Downloads(pool, artifacts),
            pictures=Pictures(artifacts, settings.pictures),
            deletions=deletions,
            room=room,
            parameters=Parameters(),
            clock=clock,
        ),
        services,
    )
    account_pb2_grpc.add_AccountServiceServicer_to_server(
        AccountService(pool=pool, link=link, metrics=metrics, clock=clock), services
    )
    billing_pb2_grpc.add_BillingServiceServicer_to_server(
        BillingService(pool=pool, link=link, metrics=metrics, clock=clock), services
    )
    admin_pb2_grpc.add_AdminServiceServicer_to_server(
        AdminService(
            accounts=AccountDeeds(
                pool=pool, link=link, deeds=deeds, deletions=deletions, doorman=doorman, clock=clock
            ),
            plans=PlanDeeds(pool=pool, link=link, deeds=deeds),
            balances=BalanceDeeds(link=link, deeds=deeds, clock=clock),
            records=Records(pool=pool),
        ),
        services,
    )
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(
        FleetService(
            pool=pool,
            link=link,
            deeds=deeds,
            drain_within_ms=settings.scheduling.drain_within_ms,
            clock=clock,
        ),
        services,
    )
    moderation_pb2_grpc.add_ModerationServiceServicer_to_server(
        ModerationService(
            pool=pool,
            link=link,
            deeds=deeds,
            doorman=doorman,
            moderation=moderation,
            standings=standings,
        ),
        services,
    )
    healths = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, services)
    # This asks what kind of server it is, so it has the real one, and a queue of its own.
    reflection.enable_server_reflection(
        [*(service.full_name for service in SERVICES), health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    metrics.follow_pool(most=pool.most, used=lambda: pool.used)
    pool.observe_waits(metrics.db_pool_wait_seconds.observe)
    pool.watched_by(metrics.process)

    canary = None
    if settings.canary.account is not None:
        canary = Canary(
            settings.canary,
            account_id=settings.canary.account,
            pool=pool,
            link=link,
            metrics=metrics,
            models=models,
            estimates=estimates,
            deletions=deletions,
            clock=clock,
        )

    port = _listen(server, settings.frontdoor)
    with private_socket(server) as knocked_at:
        await _tell_health(pool, healths)
        await server.start()
        background = asyncio.create_task(
            _background(
                partial(lateness.run, knocked_at),
                doorman.run,
                standings.run,
                room.run,
                estimates.run,
                deletions.run,
                Lifetimes(pool, clock, settings.lifetimes).run,
                Orphans(pool, artifacts, metrics, clock, timedelta(days=settings.lifetimes.orphans_days)).run,
                Renewals(pool, link, clock).run,
                partial(_keep_telling_health, pool, healths),
                metrics.process.watch_event_loop,
                *([] if canary is None else [canary.run]),
            )
        )
        try:
            yield FrontDoor(host=settings.frontdoor.host, port=port, doorman=doorman, background=background)
        finally:
            await healths.enter_graceful_shutdown()
            watches.close()
            try:
                await server.stop(settings.frontdoor.stop_within_ms / 1000)
            finally:
                # Who cannot wait for that cancels it, and the calls in progress with it.
                await server.stop(None)
                background.cancel()
                with suppress(asyncio.CancelledError):
                    await background


async def _background(*kinds_of_work: Callable[[], Coroutine[None, None, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for work in kinds_of_work:
            group.create_task(work())


def _options(settings: FrontDoorSettings) -> list[tuple[str, int]]:
    return [
        # Two front doors on one port would share its clients without knowing; the second is to fail.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.max_concurrent_streams", settings.streams_per_connection),
        # Of calls that came faster than Python takes them, the library drops some beyond 1,000, as CANCELLED,
        # which no client retries. We refuse what is too much ourselves.
        ("grpc.server.max_pending_requests", _MOST_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING),
        ("grpc.max_connection_age_ms", settings.connection_age_ms),
        # Clients ping to keep a quiet watch alive through middleboxes. The defaults answer that with GOAWAY.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        # And the server finds clients that vanished, whose streams would count against their keys for ever.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def _listen(server: grpc.aio.Server, settings: FrontDoorSettings) -> int:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.port}"
    tls = TlsFiles.of(settings)
    credentials = None if tls is None else tls.credentials()
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise CannotListen(
            f"cannot listen on {address}: is the port taken, or the address another machine's?"
        ) from error


async def _keep_telling_health(pool: Pool, healths: health.aio.HealthServicer) -> None:
    while True:
        await asyncio.sleep(_LOOK_AT_DATABASE_EVERY_S)
        await _tell_health(pool, healths)


async def _tell_health(pool: Pool, healths: health.aio.HealthServicer) -> None:
    try:
        async with pool.reading() as connection:
            await connection.execute("SELECT")
        status = health_pb2.HealthCheckResponse.SERVING
    except Overloaded:
        status = health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", *(service.full_name for service in SERVICES)):
        await healths.set(name, status)
