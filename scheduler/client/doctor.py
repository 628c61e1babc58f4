"""What `darkroom doctor` finds out without anything of the server: this client, and the service it calls.

It goes the way of a call: what is installed, the settings, the address, TLS, the key, and of the service
whatever this key may see. What cannot be asked after the trouble before it is left out.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

from scheduler.client.aio import DarkroomClient, RetryPolicy
from scheduler.client.config import ClientConfig
from scheduler.client.diagnosis import Diagnosis, fail, ok, warn
from scheduler.client.errors import (
    DarkroomError,
    NoAnswerInTime,
    Overloaded,
    RoleRequired,
    ServiceUnreachable,
    TlsFailed,
    Unauthenticated,
)
from scheduler.client.names import last_part, worker_id
from scheduler.client.terminal import about, duration, plain, tier_word
from scheduler.v1 import fleet_pb2
from scheduler.v1.fleet_pb2 import Queues, Worker

_CONNECT_S = 3.0
# As long as a person takes for slow, and a call for a picture goes through more than this one.
_SLOW_MS = 1_000
_LOW_BYTES = 1 << 30
_SHOWN = 5

_BROKEN = (
    fleet_pb2.WORKER_STATE_SET_ASIDE,
    fleet_pb2.WORKER_STATE_UNHEALTHY,
    fleet_pb2.WORKER_STATE_ABSENT,
)


async def client_diagnoses(read_config: Callable[[], ClientConfig], path: Path) -> AsyncIterator[Diagnosis]:
    """Yield what is found of this client and the service it calls. `path` is where client.toml is.

    `read_config` returns the settings in force, and may raise ConfigUnreadable, which is then found.
    """
    yield ok("client", _versions())
    yield _room(Path.cwd())
    try:
        config = read_config()
        client = config.connect(retries=RetryPolicy(times=0))
    except DarkroomError as error:
        yield fail("settings", error.happened, error.advice)
        return
    async with client:
        yield _settings(config, path)
        address = _address(client.address)
        yield address
        if address.fix:
            return
        async for found in _service(client, bool(config.value("key"))):
            yield found


def _versions() -> str:
    names = ("darkroom", "grpcio", "protobuf")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{versions}, Python {platform.python_version()} on {sys.platform}"


def _room(folder: Path) -> Diagnosis:
    free = shutil.disk_usage(folder).free
    sentence = f"{free / 2**30:.1f} GiB free for pictures in {folder}"
    if free < _LOW_BYTES:
        return warn("room here", sentence, "Make room, or save elsewhere: --out FOLDER.")
    return ok("room here", sentence)


def _settings(config: ClientConfig, path: Path) -> Diagnosis:
    if not config.value("key"):
        return fail("settings", "There is no key.", "darkroom config set key -")
    key_is_stored = config.settings["key"].source == str(path)
    if sys.platform != "win32" and key_is_stored and stat.S_IMODE(path.stat().st_mode) & 0o077:
        return warn("settings", f"Others on this machine can read {path}.", f"chmod 600 {path}")
    sources = ", ".join(f"{name} from {setting.source}" for name, setting in config.settings.items())
    return ok("settings", sources)


def _address(address: str) -> Diagnosis:
    if address.startswith("unix:"):
        return ok("address", f"{address} is a socket of this machine")
    host, _, port = address.rpartition(":")
    fix = "darkroom config set address HOST:PORT"
    if not host or not port.isdecimal():
        return fail("address", f"{address} is not host:port.", fix)
    began_s = time.perf_counter()
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except socket.gaierror:
        return fail("address", f"No machine is called {host}.", fix)
    except TimeoutError:
        return fail("address", f"{address} does not answer within {_CONNECT_S:.0f} s: a firewall?", fix)
    except ConnectionRefusedError:
        return fail(
            "address", f"Nobody listens at {address}.", f"Start the service, `darkroom serve`; or: {fix}"
        )
    except (OSError, OverflowError) as trouble:
        return fail("address", f"{address}: {trouble}.", fix)
    return ok("address", f"{address} takes connections, in {_since_ms(began_s)} ms")


async def _service(client: DarkroomClient, has_key: bool) -> AsyncIterator[Diagnosis]:
    began_s = time.perf_counter()
    try:
        account = await client.account()
    except DarkroomError as error:
        yield _refused(error, has_key)
        return
    took_ms = _since_ms(began_s)
    answered = f"It answered in {took_ms} ms"
    if took_ms > _SLOW_MS:
        yield warn("service", f"{answered}.", "Look at it from its own machine: `darkroom doctor` there.")
    else:
        yield ok("service", answered)
    yield ok(
        "account",
        f"{last_part(account.name)}, plan {last_part(account.balance.plan)}, "
        f"fast time left {duration(account.balance.available_ms)}",
    )
    try:
        queues, workers = await client.queues(), await client.workers()
    except RoleRequired:
        return  # the fleet is none of this account's business
    except DarkroomError as error:
        yield fail("fleet", error.happened, "darkroom doctor, on the service's machine")
        return
    for found in [*_tiers(queues), *_workers(workers)]:
        yield found


def _refused(error: DarkroomError, has_key: bool) -> Diagnosis:
    match error:
        case Unauthenticated():
            what = "It takes connections, and not this key." if has_key else "It wants a key."
            return fail("key", what, "darkroom config set key -")
        case TlsFailed():
            return fail("TLS", error.happened, error.advice)
        case ServiceUnreachable():
            return fail(
                "service",
                f"Something listens there that does not speak as the service does. {error.happened}",
                "Check the port; --plain-text for a service without TLS, --ca-file for one with it.",
            )
        case Overloaded() | NoAnswerInTime():
            return fail("service", error.happened, "darkroom doctor, on the service's machine")
        case _:
            return fail("service", error.happened, error.advice)


def _tiers(queues: Queues) -> Iterator[Diagnosis]:
    for tier in queues.tiers:
        word = tier_word(tier.tier)
        waits = f", the oldest for {about(tier.oldest_wait_ms)}" if tier.waiting else ""
        sentence = f"{tier.waiting} waiting{waits}, {tier.running} running"
        if tier.paused:
            yield warn(
                word,
                f"Paused ({plain(tier.pause_reason)}): {sentence}",
                f"darkroom admin unpause {word} --reason WHY",
            )
        else:
            yield ok(word, sentence)


def _workers(workers: Sequence[Worker]) -> Iterator[Diagnosis]:
    broken = [worker for worker in workers if worker.state in _BROKEN]
    draining = sum(worker.state == fleet_pb2.WORKER_STATE_DRAINING for worker in workers)
    taking = len(workers) - len(broken) - draining
    sentence = f"{taking} of {len(workers)} take jobs"
    if not taking:
        yield fail("workers", sentence, "`darkroom admin workers` says why; see also the lines below, if any")
    else:
        yield ok("workers", sentence + (f", {draining} drain" if draining else ""))
    for worker in broken[:_SHOWN]:
        name = worker_id(worker.name)
        fix = (
            f"darkroom admin undrain {name} --reason WHY"
            if worker.state == fleet_pb2.WORKER_STATE_SET_ASIDE
            else "darkroom doctor, on its machine"
        )
        yield warn(f"worker {name}", plain(worker.sentence) or "It takes no jobs.", fix)
    if len(broken) > _SHOWN:
        yield warn("workers", f"{len(broken) - _SHOWN} more take no jobs.", "darkroom admin workers")


def _since_ms(began_s: float) -> int:
    return round((time.perf_counter() - began_s) * 1000)
