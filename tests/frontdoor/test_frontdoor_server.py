"""The socket itself: TLS, ports, reflection, and pings that are not answered with a goodbye."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gpu_worker.models import Models
from scheduler.frontdoor.server import CannotListen, serve
from scheduler.metrics import FrontDoorMetrics
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.settings import Settings
from scheduler.store.pool import Pool, open_pool
from scheduler.v1 import job_pb2, job_pb2_grpc
from tests.frontdoor.door import PLANS, Door, SmallScheduler, refusal


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    pool = await open_pool(database, 2)
    yield pool
    await pool.close()


def _serve(pool: Pool, models: Models, folder: Path, frontdoor: FrontDoorSettings):  # type: ignore[no-untyped-def]
    settings = Settings(data_dir=folder, frontdoor=frontdoor)
    return serve(settings, pool, SmallScheduler(), models, FrontDoorMetrics.create(PLANS))


async def test_anybody_may_ask_for_health_and_reflection(door: Door) -> None:
    channel = door.channel(None)
    health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await anext(aiter(call))
    assert {service.name for service in answer.list_services_response.service} >= {
        "scheduler.v1.JobService",
        "scheduler.v1.AccountService",
        "billing.v1.BillingService",
        "billing.v1.AdminService",
        "grpc.health.v1.Health",
    }


async def test_a_method_that_does_not_exist_is_unimplemented(door: Door) -> None:
    call = door.channel("Bearer x").unary_unary("/scheduler.v1.JobService/Frobnicate")(b"")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_port_is_not_shared(pool: Pool, models: Models, tmp_path: Path) -> None:
    async with _serve(pool, models, tmp_path, FrontDoorSettings(port=0)) as first:
        with pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1:{first.port}"):
            async with _serve(pool, models, tmp_path, FrontDoorSettings(port=first.port)):
                pass


async def test_a_client_that_pings_often_keeps_its_quiet_watch(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create()
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with grpc.aio.insecure_channel(door.address, options=options) as channel:
        stub = job_pb2_grpc.JobServiceStub(channel)
        watch = aiter(
            stub.WatchJob(
                job_pb2.WatchJobRequest(name=job.name), metadata=(("authorization", f"Bearer {ann.secret}"),)
            )
        )
        await anext(watch)
        await anext(watch)
        silent = asyncio.ensure_future(anext(watch))
        with pytest.raises(TimeoutError):  # nothing came: neither an event nor a GOAWAY
            await asyncio.wait_for(asyncio.shield(silent), 1.0)
        await ann.cancel(job.name)
        door.scheduler.update(job.uid)
        assert (await silent).event.state == job_pb2.JOB_STATE_CANCELLED


async def test_tls_asks_clients_for_a_certificate_of_the_given_authority(
    pool: Pool, models: Models, tmp_path: Path
) -> None:
    authority = _Authority(tmp_path)
    certificate, key = authority.issue("server")
    settings = FrontDoorSettings(
        port=0, tls_certificate=certificate, tls_key=key, tls_client_ca=authority.certificate
    )
    client_certificate, client_key = authority.issue("client")
    root = authority.certificate.read_bytes()
    known = grpc.ssl_channel_credentials(root, client_key.read_bytes(), client_certificate.read_bytes())
    stranger = grpc.ssl_channel_credentials(root)
    async with _serve(pool, models, tmp_path, settings) as front_door:
        async with grpc.aio.secure_channel(front_door.address, known) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            refused = await refusal(job_pb2_grpc.JobServiceStub(channel).GetJob(job_pb2.GetJobRequest()))
            assert refused.reason == "UNAUTHENTICATED"  # a certificate is no key
        for channel in (
            grpc.aio.secure_channel(front_door.address, stranger),
            grpc.aio.insecure_channel(front_door.address),
        ):
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


class _Authority:
    """A certificate authority of one test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        self.certificate, _ = self._write("authority", self._name, self._key, is_authority=True)

    def issue(self, name: str) -> tuple[Path, Path]:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        return self._write(name, subject, ec.generate_private_key(ec.SECP256R1()), is_authority=False)

    def _write(
        self, name: str, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_authority: bool
    ) -> tuple[Path, Path]:
        now = datetime.datetime.now(datetime.UTC)
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(address, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        paths = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths
