"""Nothing that is printed, stored or shown holds a key, a password, or what somebody asked to be drawn."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
import structlog
from pydantic import ValidationError
from typer.testing import CliRunner

from billing.v1 import admin_pb2
from scheduler.__main__ import server
from scheduler.client.aio import DarkroomClient, Tls
from scheduler.client.errors import DarkroomError, InvalidParameter, Unauthenticated
from scheduler.logs import configure_logs
from scheduler.settings import Database, Settings
from scheduler.store.accounts import ApiKey, NewKey, Role
from tests.folders import data_folder
from tests.frontdoor.door import Door, refusal
from tests.security.certificates import Authority
from tests.service.process import ServiceProcess
from tests.stand_in import STAND_IN_FILE

PASSWORD = "pw-zqxjkvbp-of-the-database"
PROMPT = "zqxjkvbp of a fox"


# -- one service, from its start to its end ----------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    with data_folder() as folder:
        yield folder


@pytest.fixture
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture
def service(database: str, folder: Path, authority: Authority) -> Iterator[ServiceProcess]:
    """A service that says all it has to say, on a database with a password and behind TLS."""
    certificate, key = authority.issue("server")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "scheduler", "serve", "--port", "0", "--ops-port", "0"),
            *("--data-dir", str(folder), "--gpus", "1", "--engine", "timed", "--log-level", "debug"),
            *("--models-file", str(STAND_IN_FILE)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "DARKROOM_DATABASE__DSN": database.replace("postgres@", f"postgres:{PASSWORD}@"),
            "DARKROOM_FRONTDOOR__TLS_CERTIFICATE": str(certificate),
            "DARKROOM_FRONTDOOR__TLS_KEY": str(key),
            "DARKROOM_WORKER__TIMED_STEP_MS": "5",
        },
    )
    try:
        running = ServiceProcess(process, folder)
        yield running
        running.stop()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(60)


@pytest.mark.ray
@pytest.mark.timeout(300)
async def test_a_service_keeps_its_secrets_through_good_and_bad_times(
    service: ServiceProcess, authority: Authority, folder: Path, database: str
) -> None:
    tls = Tls(ca_file=authority.certificate)
    async with DarkroomClient(service.address, service.admin_key, tls=tls) as admin:
        await admin.create_account(plan="plans/standard", account_id="ann", reason="a test")
        made = await admin.create_api_key("accounts/ann", role=admin_pb2.ROLE_USER, reason="a test")
        revoked = await admin.create_api_key("accounts/ann", role=admin_pb2.ROLE_USER, reason="a test")
        await admin.revoke_api_key("accounts/ann", revoked.name.rpartition("/")[2], reason="a test")
        events = [event async for event in admin.audit_events()]
    told: list[str] = [str(event) for event in events]
    async with DarkroomClient(service.address, made.secret, tls=tls) as ann:
        handle = await ann.imagine(PROMPT)
        await handle.result()
        told.append(await _error(InvalidParameter, ann.imagine(f"{PROMPT} --bogus 1")))
        await _cut_connections(database)
        again = await ann.imagine(PROMPT)
        await again.cancel()
        told.append(repr(ann) + repr(handle))
    for wrong in (revoked.secret, f"{made.secret[:-4]}0000", f"{made.secret} "):
        async with DarkroomClient(service.address, wrong, tls=tls) as nobody:
            told.append(await _error(Unauthenticated, nobody.account()))

    (serving,) = (one for one in psutil.Process().children() if str(folder) in _command_line(one))
    processes = [serving, *serving.children(recursive=True)]
    command_lines = [" ".join(_command_line(process)) for process in processes]
    assert any("ray::" in line for line in command_lines)
    metrics = await asyncio.to_thread(_page, f"http://{service.ops}/metrics")
    metrics += await asyncio.to_thread(_page, f"http://{service.ops}/metrics/scheduler")
    assert "darkroom_jobs" in metrics
    ray_logs = _ray_logs(command_lines)
    assert ray_logs
    stored = await _all_rows(database)
    status = await asyncio.to_thread(service.stop)
    assert status == 0

    key_of_tls = (folder / "server.key").read_text().splitlines()[1]
    secrets = {
        "the password of the database": PASSWORD,
        "the key of an account": made.secret.rpartition("_")[2],
        "a revoked key": revoked.secret.rpartition("_")[2],
        "the private key of TLS": key_of_tls,
    }
    for what, secret in {**secrets, "the admin's key": service.admin_key.rpartition("_")[2]}.items():
        places = {
            "a command line": "\n".join(command_lines),
            "/metrics": metrics,
            "the database": stored,
            "an error or an audit event": "\n".join(told),
            **ray_logs,
        }
        assert [place for place, text in places.items() if secret in text] == [], what
        printed = [line for line in service.said.splitlines() if secret in line]
        assert [line for line in printed if "shown once" not in line] == [], what
    assert PROMPT.split()[0] not in metrics + "\n".join(told) + "\n".join(command_lines)
    about_the_prompt = [line for line in service.said.splitlines() if PROMPT.split()[0] in line]
    assert [line for line in about_the_prompt if '"level": "debug"' not in line] == []
    assert [name for name, text in ray_logs.items() if PROMPT.split()[0] in text] == []


async def _error(kind: type[DarkroomError], call: object) -> str:
    with pytest.raises(kind) as caught:
        await call  # type: ignore[misc]
    return f"{caught.value} {caught.value!r} {caught.value.details}"


async def _cut_connections(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
           WHERE datname = current_database() AND pid <> pg_backend_pid()"""
    )
    await connection.close()


async def _all_rows(database: str) -> str:
    connection = await asyncpg.connect(database)
    tables = await connection.fetch(
        """SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables
           WHERE schemaname IN ('scheduler', 'billing')"""
    )
    assert len(tables) > 20
    rows = [row[0] for t in tables for row in await connection.fetch(f"SELECT t::text FROM {t['name']} AS t")]
    await connection.close()
    return "\n".join(rows)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as page:
        return str(page.read(), "utf-8")


def _ray_logs(command_lines: list[str]) -> dict[str, str]:
    """Return all that Ray wrote of this service, by file."""
    words = " ".join(command_lines).replace("=", " ").split()
    folders = {Path(*Path(word).parts[:3]) for word in words if word.startswith("/tmp/dr-local-")}
    (folder,) = folders
    return {
        str(file): file.read_text(errors="replace")
        for file in folder.rglob("logs/**/*")
        if file.is_file() and not file.is_symlink()
    }


# -- single places -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
async def test_what_a_database_says_of_a_row_is_only_logged_at_debug(
    door: Door, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ann = await door.caller("ann")
    await door.sql("ALTER TABLE scheduler.job ADD CONSTRAINT no_foxes CHECK (prompt NOT LIKE '%fox%')")
    before = structlog.get_config()
    configure_logs(level)
    try:
        refused = await refusal(ann.create(PROMPT))
    finally:
        structlog.configure(**before)
    assert refused.reason == "INTERNAL"
    assert PROMPT not in refused.raw.decode(errors="replace")
    logged = capsys.readouterr().err
    (line,) = [json.loads(line) for line in logged.splitlines() if "call failed by a bug" in line]
    assert refused.metadata["error_id"] == line["error_id"], (
        "the log can be searched for what a client was told"
    )
    assert "CheckViolationError" in line["exception"]
    assert "no_foxes" in line["exception"], "what was violated is enough to find out more"
    assert (PROMPT in logged) == (level == "debug")
    assert ann.secret.rpartition("_")[2] not in logged


def test_what_led_to_an_error_is_left_out_of_logs_too(capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    configure_logs("info")
    try:
        try:
            raise asyncpg.DataError(f"invalid input for query argument $1: {PROMPT!r}")
        except asyncpg.DataError as cause:
            group = ExceptionGroup("several", [RuntimeError("of it"), cause])
            group.__cause__ = cause
            structlog.get_logger().error("something failed", exc_info=(type(group), group, None))
    finally:
        structlog.configure(**before)
    logged = capsys.readouterr().err
    assert "DataError" in logged
    assert PROMPT not in logged


def test_values_with_secrets_do_not_show_them() -> None:
    dsn = f"postgresql://postgres:{PASSWORD}@db.example/darkroom"
    shown = repr(Settings(database=Database(dsn=dsn)))
    assert "db.example" not in shown
    key = NewKey(key_id="0" * 16, secret="dk_0_5ec7e7", created_at=None)  # type: ignore[arg-type]
    assert "5ec7e7" not in repr(key)
    kept = ApiKey(key_id="0", account_id="ann", role=Role.USER, secret_hash=b"5ec7e7", blocked=False)
    assert "5ec7e7" not in repr(kept)


@pytest.mark.parametrize(
    "password", [f"{PASSWORD}#x", f"{PASSWORD}/x", f"{PASSWORD}?x", f"{PASSWORD}[x", f"{PASSWORD}\u2100"]
)
def test_a_password_that_is_not_escaped_is_refused_and_not_shown(password: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(database={"dsn": f"postgresql://u:{password}@127.0.0.1:1/db"})  # type: ignore[arg-type]
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in repr(caught.value)
    assert "%2F" in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "u:p@h1:5432,h2:5433/db",
        "u:p%40%23@[::1]:5432/db",
        "postgres@/postgres?host=/run/x",
        "h/db",
        "/db",
    ],
)
def test_addresses_of_databases_are_taken(address: str) -> None:
    assert Database(dsn=f"postgresql://{address}").dsn


async def test_an_embedded_database_is_its_owners_alone(postgresql: str) -> None:
    connection = await asyncpg.connect(postgresql)
    assert await connection.fetchval("SHOW listen_addresses") == ""
    sockets = await connection.fetchval("SHOW unix_socket_directories")
    await connection.close()
    assert _mode(sockets) == 0o700


def _mode(path: str) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


@pytest.mark.parametrize(
    ("command", "address"),
    [
        ("serve", "127.0.0.1:1/db"),
        ("migrate", "127.0.0.1:1/db"),
        ("migrate", "nowhere.invalid/db"),
        ("migrate", "127.0.0.1:1/db?sslmode=bogus"),
        ("migrate", "127.0.0.1:x/db"),
    ],
)
def test_a_database_that_cannot_be_had_is_told_without_its_password(
    command: str, address: str, tmp_path: Path
) -> None:
    before = structlog.get_config()
    try:
        done = CliRunner().invoke(
            server,
            [command, "--data-dir", str(tmp_path)],
            env={"DARKROOM_DATABASE__DSN": f"postgresql://u:{PASSWORD}@{address}"},
        )
    finally:
        structlog.configure(**before)
    assert done.exit_code in (2, 3)
    assert PASSWORD not in done.output
    assert "Traceback" not in done.output
    assert done.output.strip()
