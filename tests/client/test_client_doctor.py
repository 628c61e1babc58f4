"""The doctor's first half: what it finds of the client and the service it calls, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from billing.v1.billing_pb2 import Balance
from scheduler.v1 import fleet_pb2, job_pb2
from scheduler.v1.account_pb2 import Account
from scheduler.v1.fleet_pb2 import ListWorkersResponse, Queues, TierQueue, Worker
from tests.client.other_services import something_else
from tests.client.scripted_service import BUSY, Refuse, ScriptedService
from tests.client.typed_commands import darkroom, lines, one_document
from tests.security.certificates import Authority

ADA = Account(name="accounts/ada", balance=Balance(plan="plans/basic", available_ms=60_000))
NOT_AN_OPERATOR = Refuse(code=grpc.StatusCode.PERMISSION_DENIED, reason="ROLE_REQUIRED")


def checks(environment: dict[str, str], *flags: str) -> tuple[int, dict[str, Any]]:
    """Return the exit status and, by what each is of, what the client's half found."""
    result = darkroom(environment, *flags, "doctor", "--client-only", "--json")
    found = one_document(result)["checks"]
    assert all(bool(one["fix"]) == (one["level"] != "ok") for one in found)
    return result.exit_code, {one["what"]: one for one in found}


def test_all_is_well(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("GetAccount", ADA)
    service.says("GetQueues", NOT_AN_OPERATOR)
    printed = darkroom(environment, "doctor", "--client-only")
    found = {what: (level, sentence) for level, what, sentence in lines(printed)}
    assert {level for level, _ in found.values()} == {"ok"}
    assert found["client"][1].startswith("darkroom 0.1.0, grpcio ")
    assert found["account"][1] == "ada, plan basic, fast time left 1 min"


def test_an_operator_hears_of_the_fleet_and_of_what_to_do_about_it(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    relax = TierQueue(tier=job_pb2.TIER_RELAX, waiting=3, paused=True, pause_reason="new fans")
    aside = Worker(
        name="workers/a/gpu-0", state=fleet_pb2.WORKER_STATE_SET_ASIDE, sentence="It lost 3 jobs in a row."
    )
    idle = Worker(name="workers/a/gpu-1", state=fleet_pb2.WORKER_STATE_IDLE)
    service.says("GetAccount", ADA)
    service.says("GetQueues", Queues(tiers=[relax]))
    service.says("ListWorkers", ListWorkersResponse(workers=[aside, idle]))
    status, found = checks(environment)
    assert status == 7
    assert found["relax"]["fix"] == "darkroom admin unpause relax --reason WHY"
    assert found["workers"]["sentence"] == "1 of 2 take jobs"
    assert found["worker a/gpu-0"]["fix"] == "darkroom admin undrain a/gpu-0 --reason WHY"


def test_a_fleet_without_workers_fails(service: ScriptedService, environment: dict[str, str]) -> None:
    service.says("GetAccount", ADA)
    service.says("GetQueues", Queues())
    service.says("ListWorkers", ListWorkersResponse())
    status, found = checks(environment)
    assert (status, found["workers"]["level"]) == (6, "fail")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "Nobody listens at 127.0.0.1:1."),
        ("no-such-host.invalid:7443", "No machine is called no-such-host.invalid."),
        ("localhost", "localhost is not host:port."),
    ],
)
def test_an_address_where_nobody_is_fails_and_no_call_is_tried(
    environment: dict[str, str], address: str, said: str
) -> None:
    status, found = checks(environment | {"DARKROOM_ADDRESS": address})
    assert status == 6
    assert found["address"]["sentence"] == said
    assert "darkroom config set address" in found["address"]["fix"]
    assert "service" not in found


def test_a_port_of_something_else_is_told_from_one_where_nobody_is(environment: dict[str, str]) -> None:
    with something_else(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        status, found = checks(environment | {"DARKROOM_ADDRESS": address})
    assert status == 6
    assert found["address"]["level"] == "ok"
    assert found["service"]["sentence"].startswith(
        "Something listens there that does not speak as the service"
    )


def test_tls_where_the_service_speaks_plain_text_is_said(
    service: ScriptedService, environment: dict[str, str], tmp_path: Path
) -> None:
    status, found = checks(environment, "--ca-file", str(Authority(tmp_path).certificate))
    assert (status, found["address"]["level"]) == (6, "ok")
    assert found["TLS"]["sentence"] == f"{service.address} does not speak TLS."


@pytest.mark.parametrize(
    ("answer", "what", "said"),
    [
        (
            Refuse(code=grpc.StatusCode.UNAUTHENTICATED, reason="UNAUTHENTICATED"),
            "key",
            "It takes connections, and not this key.",
        ),
        (BUSY, "service", "The database is away."),
        (Refuse(code=grpc.StatusCode.DEADLINE_EXCEEDED), "service", "No answer from"),
        (
            Refuse(code=grpc.StatusCode.PERMISSION_DENIED, reason="ACCOUNT_BLOCKED", sentence="Blocked."),
            "service",
            "Blocked.",
        ),
    ],
    ids=["key", "overloaded", "deadline", "blocked"],
)
def test_a_service_that_refuses_is_asked_once_and_quoted(
    service: ScriptedService, environment: dict[str, str], answer: Refuse, what: str, said: str
) -> None:
    service.says("GetAccount", answer)
    status, found = checks(environment)
    assert (status, found[what]["level"]) == (6, "fail")
    assert found[what]["sentence"].startswith(said)
    assert len(service.asked("GetAccount")) == 1


def test_no_key_and_a_key_that_others_can_read_are_found(
    service: ScriptedService, environment: dict[str, str]
) -> None:
    service.says("GetAccount", ADA, ADA)
    service.says("GetQueues", NOT_AN_OPERATOR, NOT_AN_OPERATOR)
    environment["DARKROOM_KEY"] = ""
    assert checks(environment)[1]["settings"]["fix"] == "darkroom config set key -"
    assert darkroom(environment, "config", "set", "key", "dk_ada_secret").exit_code == 0
    path = Path(environment["XDG_CONFIG_HOME"]) / "darkroom" / "client.toml"
    path.chmod(0o644)
    status, found = checks(environment)
    assert (status, found["settings"]["fix"]) == (7, f"chmod 600 {path}")


def test_settings_that_cannot_be_read_are_found_and_not_the_end_of_it(environment: dict[str, str]) -> None:
    path = Path(environment["XDG_CONFIG_HOME"]) / "darkroom" / "client.toml"
    path.parent.mkdir(parents=True)
    path.write_text("address = ", encoding="utf-8")
    status, found = checks(environment)
    assert status == 6
    assert "not valid TOML" in found["settings"]["sentence"]
