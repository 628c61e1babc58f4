"""Every method that the service has opens for whom the page for clients says, and for nobody else."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from billing.v1 import billing_pb2
from scheduler.settings import FrontDoor as FrontDoorSettings
from scheduler.store.accounts import Role
from scheduler.v1 import account_pb2, job_pb2
from tests.frontdoor.door import Caller, Door, Refused, read_refusal

PAGE = Path(__file__).resolve().parents[2] / "proto" / "README.md"
OPEN = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")


@pytest.fixture
def frontdoor_settings() -> FrontDoorSettings:
    return FrontDoorSettings(port=0, requests_per_second=100_000, streams_per_key=1_000)


def documented() -> Mapping[str, tuple[Role, str]]:
    """Return of each method, `Service.Method`, the least role and whose things it is about."""
    rows = re.findall(r"^\| (\w+\.\w+) \| (\w+) \| ([\w; ]+) \|$", PAGE.read_text(), re.MULTILINE)
    return {method: (Role(role), whose) for method, role, whose in rows}


async def offered(door: Door) -> Mapping[str, tuple[str, bool]]:
    """Ask the service for its methods: the path of each, and whether it streams, by `Service.Method`."""
    stub = reflection_pb2_grpc.ServerReflectionStub(door.channel(None))

    async def ask(**question: str) -> reflection_pb2.ServerReflectionResponse:
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)]))
        return await anext(aiter(call))

    found: dict[str, tuple[str, bool]] = {}
    services = (await ask(list_services="")).list_services_response.service
    assert {service.name for service in services} > set(OPEN)
    for name in (service.name for service in services if service.name not in OPEN):
        answer = await ask(file_containing_symbol=name)
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            file = FileDescriptorProto.FromString(raw)
            for service in file.service:
                if f"{file.package}.{service.name}" == name:
                    for method in service.method:
                        found[f"{service.name}.{method.name}"] = (
                            f"/{name}/{method.name}",
                            method.server_streaming,
                        )
    return found


async def answer(
    door: Door, method: tuple[str, bool], authorization: str | None, request: bytes = b""
) -> Refused | None:
    """Return how a call is refused, None if it is not."""
    path, streaming = method
    channel = door.channel(None)
    metadata = None if authorization is None else (("authorization", authorization),)
    try:
        if streaming:
            call = channel.unary_stream(path)(request, metadata=metadata)
            await call.read()
            call.cancel()
        else:
            await channel.unary_unary(path)(request, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return read_refusal(error)
    return None


async def test_the_page_for_clients_has_a_line_for_every_method(door: Door) -> None:
    assert documented().keys() == (await offered(door)).keys()


async def test_without_a_good_key_every_method_answers_alike(door: Door) -> None:
    ann, ben = await door.caller("ann", role=Role.ADMIN), await door.caller("ben", role=Role.ADMIN)
    revoked, erased = await door.caller("ann", role=Role.ADMIN), await door.caller("eve", role=Role.ADMIN)
    await door.sql("UPDATE scheduler.api_key SET revoked_at = now() WHERE key_id = $1", _key_id(revoked))
    await door.sql("DELETE FROM scheduler.api_key WHERE key_id = $1", _key_id(erased))
    _, key_id, secret = ann.secret.split("_")
    keys = [
        None,
        "",
        "Bearer ",
        "Bearer null",
        ann.secret,
        f"bearer {ann.secret}",
        f"Basic {ann.secret}",
        f"Bearer  {ann.secret}",
        f"Bearer {ann.secret},",
        f"Bearer {ann.secret.upper()}",
        f"Bearer dk_{key_id}",
        f"Bearer dk_{key_id}_",
        f"Bearer dk_{key_id}_{secret[:-1]}{'0' if secret[-1] != '0' else '1'}",
        f"Bearer dk_{_key_id(ben)}_{secret}",
        f"Bearer dk_{'0' * 16}_{secret}",
        f"Bearer dk_%_{secret}",
        f"Bearer dk_{key_id}_{'0' * 64}",
        f"Bearer {revoked.secret}",
        f"Bearer {erased.secret}",
    ]
    answers = set()
    for name, method in (await offered(door)).items():
        for key in keys:
            refused = await answer(door, method, key)
            assert refused is not None, (name, key)
            assert refused.code is grpc.StatusCode.UNAUTHENTICATED, (name, key)
            answers.add(refused.raw)
    assert len(answers) == 1


@pytest.mark.parametrize("role", list(Role))
async def test_a_role_opens_what_the_page_says_and_nothing_else(door: Door, role: Role) -> None:
    caller = await door.caller("ann", role=role)
    table = documented()
    for name, method in (await offered(door)).items():
        needed, _ = table[name]
        refused = await answer(door, method, f"Bearer {caller.secret}")
        if list(Role).index(role) >= list(Role).index(needed):
            assert refused is None or refused.reason != "ROLE_REQUIRED", name
        else:
            assert refused is not None, name
            assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
            assert refused.metadata["role"] == needed.value


@pytest.mark.parametrize("role", list(Role))
async def test_a_key_of_a_blocked_account_opens_nothing(door: Door, role: Role) -> None:
    caller = await door.caller("ann", role=role)
    await door.sql("UPDATE scheduler.account SET blocked = true")
    for name, method in (await offered(door)).items():
        refused = await answer(door, method, f"Bearer {caller.secret}")
        assert refused is not None, name
        assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ACCOUNT_BLOCKED")


def _id() -> str:
    return str(uuid.uuid4())


# A request of each method about an account and a job of it, or that job's first picture.
ABOUT: Mapping[str, Callable[[str, str], Message]] = {
    "JobService.CreateJob": lambda account, job: job_pb2.CreateJobRequest(
        request_id=_id(), variation=job_pb2.Variation(source_image=f"accounts/{account}/jobs/{job}/images/1")
    ),
    "JobService.UpdateJob": lambda account, job: job_pb2.UpdateJobRequest(
        request_id=_id(),
        job=job_pb2.Job(name=f"accounts/{account}/jobs/{job}", tier=job_pb2.TIER_RELAX),
        update_mask=FieldMask(paths=["tier"]),
    ),
    "JobService.CancelJob": lambda account, job: job_pb2.CancelJobRequest(
        request_id=_id(), name=f"accounts/{account}/jobs/{job}"
    ),
    "JobService.DeleteJob": lambda account, job: job_pb2.DeleteJobRequest(
        request_id=_id(), name=f"accounts/{account}/jobs/{job}"
    ),
    "JobService.EstimateJob": lambda account, job: job_pb2.EstimateJobRequest(
        name=f"accounts/{account}/jobs/{job}"
    ),
    "JobService.GetJob": lambda account, job: job_pb2.GetJobRequest(name=f"accounts/{account}/jobs/{job}"),
    "JobService.ListJobs": lambda account, job: job_pb2.ListJobsRequest(parent=f"accounts/{account}"),
    "JobService.WatchJob": lambda account, job: job_pb2.WatchJobRequest(
        name=f"accounts/{account}/jobs/{job}"
    ),
    "JobService.DownloadImages": lambda account, job: job_pb2.DownloadImagesRequest(
        name=f"accounts/{account}/jobs/{job}/images/1"
    ),
    "JobService.ExplainJob": lambda account, job: job_pb2.ExplainJobRequest(
        name=f"accounts/{account}/jobs/{job}"
    ),
    "AccountService.GetAccount": lambda account, job: account_pb2.GetAccountRequest(
        name=f"accounts/{account}"
    ),
    "AccountService.UpdateAccount": lambda account, job: account_pb2.UpdateAccountRequest(
        request_id=_id(),
        account=account_pb2.Account(name=f"accounts/{account}", mode=job_pb2.TIER_RELAX),
        update_mask=FieldMask(paths=["mode"]),
    ),
    "BillingService.GetBalance": lambda account, job: billing_pb2.GetBalanceRequest(
        account=f"accounts/{account}"
    ),
    "BillingService.ListTransfers": lambda account, job: billing_pb2.ListTransfersRequest(
        account=f"accounts/{account}"
    ),
    "BillingService.GetStatement": lambda account, job: billing_pb2.GetStatementRequest(
        account=f"accounts/{account}"
    ),
    "BillingService.PreviewPlanChange": lambda account, job: billing_pb2.PreviewPlanChangeRequest(
        account=f"accounts/{account}", plan="plans/pro"
    ),
    "BillingService.ChangePlan": lambda account, job: billing_pb2.ChangePlanRequest(
        request_id=_id(), account=f"accounts/{account}", plan="plans/pro", reason="r"
    ),
}
SEES = {
    "own": (),
    "own; any for moderators": (Role.MODERATOR, Role.OPERATOR, Role.ADMIN),
    "own; any for admins": (Role.ADMIN,),
}


def test_every_method_about_somebodys_things_is_tried() -> None:
    assert ABOUT.keys() == {
        name for name, (_, whose) in documented().items() if whose not in ("all", "public")
    }
    assert {whose for _, whose in documented().values()} == {*SEES, "all", "public"}


@pytest.mark.parametrize("role", list(Role))
async def test_what_is_anothers_reads_as_what_is_not_there(door: Door, role: Role) -> None:
    ann, eve = await door.caller("ann", plan="pro"), await door.caller("eve", role=role)
    await door.caller("mallory")
    picture = await ann.create("a fox --private")
    await door.start(picture.uid)
    await door.succeed(picture.uid)
    waiting = await ann.create("a hen --private")
    table = documented()
    before = await _of_ann(door)
    for name, method in (await offered(door)).items():
        if name not in ABOUT or role in SEES[table[name][1]]:
            continue
        about = ABOUT[name]
        answers = {}
        for job in (picture.uid, waiting.uid):
            for what, request in (
                ("another's", about("ann", job)),
                ("nobody's", about("no-such-account", str(uuid.uuid4()))),
                ("an account's that has no such job", about("mallory", job)),
                ("in capitals", about("ann", job.upper())),
            ):
                # `mallory` is an account too, and as little eve's.
                refused = await answer(door, method, f"Bearer {eve.secret}", request.SerializeToString())
                assert refused is not None, (name, what)
                answers[what, job] = (refused.reason, refused.raw)
        ((reason, _),) = set(answers.values())
        assert reason == "NOT_FOUND_OR_NOT_YOURS", name
    assert await _of_ann(door) == before


@pytest.mark.parametrize("role", list(Role))
async def test_another_account_cannot_be_named_as_ones_own(door: Door, role: Role) -> None:
    ann, eve = await door.caller("ann", plan="pro"), await door.caller("eve", role=role)
    job = await ann.create("a fox --private")
    for name, method in (await offered(door)).items():
        if name in ABOUT and documented()[name][1] == "own" and name != "AccountService.UpdateAccount":
            for account in ("-", "eve"):
                request = ABOUT[name](account, job.uid).SerializeToString()
                refused = await answer(door, method, f"Bearer {eve.secret}", request)
                assert refused is not None, (name, account)
                assert refused.reason == "NOT_FOUND_OR_NOT_YOURS", (name, account)


async def test_those_who_see_all_are_not_told_that_it_is_not_there(door: Door) -> None:
    ann = await door.caller("ann", plan="pro")
    job = await ann.create("a fox --private")
    await door.start(job.uid)
    await door.succeed(job.uid)
    methods = await offered(door)
    for name, (_, whose) in documented().items():
        for role in SEES.get(whose, ()):
            caller = await door.caller(f"the-{role}", role=role)
            request = ABOUT[name]("ann", job.uid).SerializeToString()
            refused = await answer(door, methods[name], f"Bearer {caller.secret}", request)
            assert refused is None or refused.reason != "NOT_FOUND_OR_NOT_YOURS", (name, role)


async def test_of_a_key_only_a_hash_is_stored(door: Door) -> None:
    ann = await door.caller("ann")
    await ann.create()
    _, key_id, secret = ann.secret.split("_")
    kept = await door.sql("SELECT secret_hash FROM scheduler.api_key WHERE key_id = $1", key_id)
    assert len(kept) == 32
    assert bytes.fromhex(secret) != kept
    tables = await door.sql(
        """SELECT array_agg(format('%I.%I', schemaname, tablename)) FROM pg_tables
           WHERE schemaname IN ('scheduler', 'billing')"""
    )
    assert "scheduler.api_key" in tables
    for table in tables:
        assert not await door.sql(
            f"SELECT count(*) FROM {table} AS t WHERE t::text LIKE $1", f"%{secret}%"
        ), table


async def _of_ann(door: Door) -> Any:
    return await door.sql(
        """SELECT (SELECT json_agg(j ORDER BY arrival) FROM scheduler.job AS j WHERE account_id = 'ann')::text
                  || (SELECT row_to_json(a) FROM scheduler.account AS a WHERE account_id = 'ann')::text
                  || (SELECT row_to_json(s) FROM billing.subscription AS s WHERE account_id = 'ann')::text"""
    )


def _key_id(caller: Caller) -> str:
    return caller.secret.split("_")[1]
