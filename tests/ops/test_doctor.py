"""The doctor's other half: what it finds of a machine, its database, its cluster and its ports."""

from __future__ import annotations

import asyncio
import http.server
import resource
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import fsspec
import pytest

from scheduler.client.diagnosis import Diagnosis, Level
from scheduler.doctor import ray_token, service_diagnoses
from scheduler.doctor_machine import cards
from scheduler.settings import RELEASE
from scheduler.store.migrate import process_name
from tests.client.other_services import something_else


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder, and no settings of anybody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DARKROOM_FRONTDOOR__PORT", "0")
    monkeypatch.setenv("DARKROOM_OPS__PORT", "0")
    return tmp_path


async def found_of(machine: Path, dsn: str | None = None) -> dict[str, Diagnosis]:
    found = [one async for one in service_diagnoses(data_dir=machine, dsn=dsn)]
    assert all(bool(one.fix) == (one.level is not Level.OK) for one in found)
    return {one.what: one for one in found}


async def test_a_front_door_that_may_not_open_what_it_lets_in_is_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_FRONTDOOR__WATCHES_AT_ONCE", "1000000000")
    found = await found_of(machine)
    assert found["open files"].level is Level.WARN
    assert found["open files"].fix.startswith("ulimit -n 1000001256")


async def test_a_shell_with_fewer_open_files_than_a_service_needs_is_no_fault_of_the_service(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, 524_288))
    open_files = (await found_of(machine))["open files"]
    assert open_files.level is Level.OK
    assert open_files.sentence.startswith(
        "1,024 for a process of this shell, and a front door may come to need"
    )
    assert "LimitNOFILE=6256" in open_files.sentence


async def test_a_machine_where_nothing_runs_yet_is_well(machine: Path) -> None:
    found = await found_of(machine)
    assert "embedded" in found["database"].sentence
    assert found["service packages"].sentence.startswith("darkroom 0.1.0, ray ")
    assert [one for one in found.values() if one.level is Level.FAIL] == []


async def test_a_database_of_this_release_is_well(machine: Path, database: str) -> None:
    found = await found_of(machine, database)
    for what in ("database", "pooler", "schema", "clock", "scheduler", "releases"):
        assert found[what].level is Level.OK, found[what]
    assert found["pooler"].sentence == "none: sessions reach PostgreSQL itself"


async def test_a_database_that_is_away_is_found_without_its_password(machine: Path) -> None:
    found = await found_of(machine, "postgresql://ada:swordfish@127.0.0.1:1/darkroom")
    assert found["database"].level is Level.FAIL
    assert not any("swordfish" in str(one) for one in found.values())


async def test_an_empty_database_wants_to_be_migrated(machine: Path, postgresql: str) -> None:
    found = await found_of(machine, postgresql)
    assert (found["schema"].level, found["schema"].fix) == (Level.FAIL, "darkroom migrate")


async def test_an_account_for_the_canary_is_missed_only_where_accounts_could_be(
    machine: Path, postgresql: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_CANARY__ACCOUNT", "canary")
    assert "canary" not in await found_of(machine, postgresql), "that the schema is missing says enough"
    assert (await found_of(machine, database))["canary"].sentence == "There is no account canary for it."


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        (
            "UPDATE public.darkroom_migration SET sha256 = '' WHERE package = 'billing'",
            Level.FAIL,
            "Install this release anew",
        ),
        (
            "INSERT INTO public.darkroom_migration (package, name, sha256) VALUES ('x', '9000_new', '')",
            Level.WARN,
            "deploy/upgrade.md",
        ),
    ],
    ids=["changed", "newer"],
)
async def test_a_schema_that_is_not_this_releases_is_found(
    machine: Path, database: str, connection: asyncpg.Connection, change: str, level: Level, said: str
) -> None:
    await connection.execute(change)
    schema = (await found_of(machine, database))["schema"]
    assert schema.level is level
    assert said in schema.fix


async def test_a_leader_that_is_silent_while_front_doors_wait_is_found(
    machine: Path, database: str, connection: asyncpg.Connection
) -> None:
    now = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
    await connection.execute(f"UPDATE scheduler.leader SET holder = 'scheduler-0.1.0', last_now_ms = {now}")
    assert (await found_of(machine, database))["scheduler"].level is Level.OK
    await connection.execute(f"UPDATE scheduler.leader SET last_now_ms = {now} - 60000")
    assert (await found_of(machine, database))["scheduler"].level is Level.OK, "nobody waits for it"
    waiting = await asyncpg.connect(
        database, server_settings={"application_name": process_name("frontdoor", RELEASE)}
    )
    try:
        found = await found_of(machine, database)
    finally:
        await waiting.close()
    assert found["scheduler"].level is Level.FAIL
    assert found["scheduler"].sentence.startswith("scheduler-0.1.0 wrote 60.")
    assert found["releases"].sentence == "frontdoor-0.1.0"


async def test_another_release_beside_this_one_is_found(machine: Path, database: str) -> None:
    other = await asyncpg.connect(
        database, server_settings={"application_name": process_name("scheduler", "0.0.9")}
    )
    try:
        found = await found_of(machine, database)
    finally:
        await other.close()
    assert (found["releases"].level, found["releases"].sentence) == (
        Level.WARN,
        "scheduler-0.0.9 beside this 0.1.0.",
    )


async def test_weights_that_are_not_there_are_found(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = machine / "models.toml"
    entry = """
[models.{name}]
source = "{source}"
steps = 20
guidance_milli = 3000
default_width = 256
default_height = 256
memory_bytes = 50_000_000
memory_bytes_per_pixel = 4_000
imagine_ms = 3_500
variation_ms = 1_700
"""
    models.write_text(
        'default = "here"\n'
        + entry.format(name="here", source=machine / "here")
        + entry.format(name="lost", source=machine / "lost")
        + entry.format(name="far", source="owner/name")
    )
    (machine / "here").mkdir()
    (machine / "here" / "model_index.json").write_text("{}")
    monkeypatch.setenv("DARKROOM_MODELS_FILE", str(models))
    monkeypatch.setenv("HF_HOME", str(machine))
    found = await found_of(machine)
    assert found["model here"].level is Level.OK
    assert (found["model lost"].level, found["model far"].level) == (Level.FAIL, Level.WARN)
    assert found["model far"].fix == "hf download owner/name"


async def test_settings_of_the_service_that_are_wrong_are_all_named(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_FRONTDOOR__HOST", "0.0.0.0")
    monkeypatch.setenv("DARKROOM_LOG_LEVEL", "loud")
    found = [one async for one in service_diagnoses(data_dir=machine, dsn=None)]
    wrong = [one.sentence for one in found if one.what == "service settings"]
    assert len(wrong) == 2
    assert any("refusing plain text on 0.0.0.0" in sentence for sentence in wrong)


async def test_a_store_that_cannot_be_used_is_found(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_ARTIFACTS_URL", "nosuch://key:swordfish@bucket/pictures")
    store = (await found_of(machine))["artifact store"]
    assert store.level is Level.FAIL
    assert "swordfish" not in store.sentence


@pytest.mark.parametrize(("bucket", "level"), [("new", Level.OK), ("lost", Level.FAIL)])
async def test_a_bucket_before_its_first_picture_is_well_and_one_that_is_not_there_is_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch, bucket: str, level: Level
) -> None:
    fsspec.filesystem("memory").makedirs("/new", exist_ok=True)
    monkeypatch.setenv("DARKROOM_ARTIFACTS_URL", f"memory://{bucket}/darkroom")
    assert (await found_of(machine))["artifact store"].level is level


@pytest.mark.parametrize(
    ("mode", "token", "level"),
    [("", "", Level.WARN), ("token", "", Level.FAIL), ("token", "0" * 64, Level.OK)],
)
async def test_a_cluster_that_asks_for_no_token_is_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch, mode: str, token: str, level: Level
) -> None:
    monkeypatch.setenv("HOME", str(machine))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    assert ray_token().level is level


@pytest.mark.parametrize(
    ("mode", "level"), [(0o600, Level.OK), (0o640, Level.OK), (0o644, Level.WARN), (0o642, Level.WARN)]
)
def test_a_token_may_be_read_by_its_group_and_by_nobody_else(
    machine: Path, monkeypatch: pytest.MonkeyPatch, mode: int, level: Level
) -> None:
    token = machine / "ray_auth_token"
    token.write_text("0" * 64)
    token.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert ray_token().level is level


PAGES = {
    "/healthz": (200, '{"alive": true}'),
    "/readyz": (503, '{"ready": false, "missing": ["no scheduler leads"]}'),
    "/metrics": (200, 'darkroom_build_info{commit="",version="0.0.9"} 1.0\n'),
    "/metrics/scheduler": (503, "the scheduler does not answer"),
}


class _Ops(http.server.BaseHTTPRequestHandler):
    """The ops port of a front door of another release that waits for its scheduler."""

    def do_GET(self) -> None:
        status, text = PAGES[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


async def test_a_front_door_that_is_not_ready_or_of_another_release_is_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Ops) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        monkeypatch.setenv("DARKROOM_OPS__PORT", str(server.server_port))
        try:
            found = await found_of(machine)
        finally:
            await asyncio.to_thread(server.shutdown)
            serving.join()
    assert found["front door"].level is Level.FAIL
    assert "no scheduler leads" in found["front door"].sentence
    assert found["metrics"].sentence == "What runs is 0.0.9, and installed is 0.1.0."
    assert found["scheduler metrics"].level is Level.FAIL


async def test_a_port_that_something_else_has_is_found(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with something_else(b"SSH-2.0-none\r\n") as address:
        monkeypatch.setenv("DARKROOM_FRONTDOOR__PORT", address.rpartition(":")[2])
        found = await found_of(machine)
    assert found["port"].level is Level.WARN
    assert found["port"].sentence == f"{address} is taken, and not by this service."


# GPUs


class Nvml:
    """A driver with two cards, of which one may be broken. It is called as NVIDIA's library is."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0

    class NVMLError_NotSupported(Exception):  # noqa: N801 - so it is called
        """This card does not count that."""

    def __init__(self, errors: dict[int, int]) -> None:
        self._errors = errors

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return 13_000

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetName(self, card: int) -> str:  # noqa: N802
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, card: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=139 << 30)

    def nvmlDeviceGetTotalEccErrors(self, card: int, kind: int, counter: int) -> int:  # noqa: N802
        if card not in self._errors:
            raise self.NVMLError_NotSupported
        return self._errors[card]


@pytest.mark.parametrize(
    ("torch", "device", "level"),
    [("2.13.0+cu130", "auto", Level.OK), ("2.13.0+cpu", "auto", Level.WARN), ("2.13.0+cpu", "cpu", Level.OK)],
)
def test_cards_that_torch_cannot_use_are_found(torch: str, device: str, level: Level) -> None:
    (found,) = cards(Nvml({}), device=device, torch=torch)
    assert found.level is level
    assert "NVIDIA H200 with 139.0 GiB, NVIDIA H200 with 139.0 GiB; driver 580.65.06, CUDA up to 13.0" in (
        found.sentence
    )


def test_a_card_whose_memory_is_broken_is_found() -> None:
    _, found = cards(Nvml({0: 0, 1: 4}), device="auto", torch="2.13.0")
    assert (found.what, found.level) == ("GPU 1", Level.FAIL)
    assert "nvidia-smi --gpu-reset -i 1" in found.fix
